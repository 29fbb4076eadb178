"""Which chunks snapshots need: those of their manifests, and those that the manifests list."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from threading import Lock

import msgspec

from outlast import records
from outlast.errors import Corrupt
from outlast.records import ChunkRef, Snapshot, Sum
from outlast.repo.repository import Repository

_TAKEN_CHUNKS = 1 << 16


class _Chunks(msgspec.Struct, frozen=True, gc=False):
    """What matters here of a line of a manifest."""

    chunks: list[ChunkRef] = []
    sums: list[Sum] = []


_decoder = msgspec.json.Decoder(_Chunks)


def needed_chunks(
    repository: Repository, snapshots: Iterable[Snapshot], take: Callable[[bytes], None], *, content: bool = False
) -> None:
    """Call `take` with ids of chunks, 32 bytes each, end to end, until each needed one was named at least once.

    Needed are the chunks that are stored. With `content` those are named that make up the files, whether they
    are stored themselves or as sums of others.
    A manifest chunk that many snapshots share is read once. Raises `Corrupt` when a manifest can't be
    read: then it isn't known what the snapshot needs.
    """
    every = list(snapshots)
    texts = {bytes.fromhex(chunk) for snapshot in every for chunk, _ in snapshot.manifest}
    take(b"".join(texts))
    edges: dict[str, tuple[bytes, bytes | None]] = {}
    found: list[str] = []
    turn = Lock()

    def lines(text: bytes) -> None:
        for entry in _decoder.decode_lines(text):
            chunks = entry.chunks if content or not entry.sums else records.stored(entry.chunks, entry.sums)
            found.extend(chunk for chunk, _ in chunks)
        if len(found) >= _TAKEN_CHUNKS:
            give()

    def give() -> None:
        take(bytes.fromhex("".join(found)))
        found.clear()

    def read(chunk: bytes, plain: bytes | memoryview) -> None:
        head, newline, body = bytes(plain).partition(b"\n")
        whole, _, tail = body.rpartition(b"\n")
        with turn:
            edges[chunk.hex()] = head, tail if newline else None
            lines(whole)

    try:
        repository.fetch(texts, read)
        for line in _straddling(every, edges):
            lines(line)
        give()
    except (msgspec.DecodeError, ValueError, RecursionError) as exc:
        raise Corrupt(f"a manifest can't be read: {exc}.") from exc


def _straddling(snapshots: list[Snapshot], edges: dict[str, tuple[bytes, bytes | None]]) -> Iterable[bytes]:
    """The first line of each manifest chunk, joined to what the chunks before it end with; equal ones once."""
    seen: set[tuple[str, ...]] = set()
    for snapshot in snapshots:
        parts: list[bytes] = []
        chunks: tuple[str, ...] = ()
        for chunk, _ in snapshot.manifest:
            head, tail = edges[chunk]
            parts.append(head)
            chunks += (chunk,)
            if tail is None:
                continue
            if chunks not in seen:
                seen.add(chunks)
                yield b"".join(parts)
            parts, chunks = [tail], (chunk,)
        if any(parts):
            raise Corrupt(f"the manifest of snapshot {snapshot.id[:12]} ends in the middle of a line.")
