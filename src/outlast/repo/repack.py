"""Copy the needed chunks out of packs, so that the packs can be condemned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from outlast.errors import Archived, Corrupt, NotFound
from outlast.events import Event, Progress
from outlast.repo.index import Location
from outlast.repo.pack import EncodedChunk, object_name
from outlast.repo.read import Range, joined
from outlast.repo.repository import Repository
from outlast.repo.write import Writer

Row = tuple[bytes, Location]
"""(chunk id, where it lies)"""


class Repacked(msgspec.Struct):
    """`packs`: those of which everything asked for is durable, and committed, in the packs `written`."""

    packs: set[str]
    written: frozenset[str] = frozenset()
    chunks: int = 0
    bytes_written: int = 0
    damaged: list[bytes] = []


def repack(repository: Repository, wanted: Iterable[tuple[str, list[Row]]], *, partly: bool = False) -> Repacked:
    """Store these chunks of these packs again, in new packs, and commit those.

    Each chunk is decoded and compared with its id on the way; it keeps its encoded form, and is sealed with
    the newest key. A pack with a damaged chunk is left out of the result, and with `partly` its other
    chunks are copied all the same. Raises `Unavailable`, `StoreFull`; then nothing is lost.
    """
    done = Repacked(set())
    writer = repository.writer()
    try:
        for number, (pack, rows) in enumerate(wanted):
            if _copy(repository, writer, rows, done, partly=partly):
                done.packs.add(pack)
            repository.sink.progress(Progress("repack", done_files=number + 1))
        writer.finish()
    except BaseException:
        writer.abandon()
        raise
    done.written = frozenset(writer.relied_on)
    done.bytes_written = writer.bytes_stored
    return done


def unreadable(repository: Repository, rows: Iterable[Row]) -> list[bytes]:
    """Those of the chunks that can't be read, or are not right, at these very places; read in parallel."""

    def look(part: Range) -> list[bytes]:
        found = []
        for (chunk, location), stored in zip(part.chunks, _read(repository, part.pack, part.chunks), strict=True):
            try:
                if stored is None:
                    raise Corrupt(f"chunk {chunk.hex()[:16]} can't be read.")
                repository.open_chunk(chunk, location, stored)
            except Corrupt:
                found.append(chunk)
        return found

    able = repository.store.capabilities
    with ThreadPoolExecutor(max(2, able.concurrency), thread_name_prefix="prove") as threads:
        return [chunk for found in threads.map(look, joined(rows, able.read_bytes)) for chunk in found]


def _copy(repository: Repository, writer: Writer, rows: Iterable[Row], done: Repacked, *, partly: bool) -> bool:
    """Whether all of the rows, which are of one pack, were copied."""
    whole = True
    for part in joined(rows, repository.store.capabilities.read_bytes):
        for (chunk, location), stored in zip(part.chunks, _read(repository, part.pack, part.chunks), strict=True):
            try:
                if stored is None:
                    raise Corrupt(f"chunk {chunk.hex()[:16]} can't be read.")
                encoded, _ = repository.unseal_chunk(chunk, location, stored)
            except Corrupt as exc:
                whole = False
                done.damaged.append(chunk)
                what = f"pack {part.pack[:16]} can't be emptied: {exc.message}"
                repository.sink.event(Event("pack.damaged", what, {"object": object_name(part.pack)}))
                continue
            if whole or partly:
                writer.store_again(EncodedChunk(chunk, location.codec, location.plain_bytes, bytes(encoded)))
                done.chunks += 1
    return whole


def _read(repository: Repository, pack: str, rows: Sequence[Row]) -> list[memoryview | None]:
    """The stored bytes of neighbouring rows; None for those that can't be had."""
    start = rows[0][1].offset
    end = max(row.offset + row.stored_bytes for _, row in rows)
    try:
        [data] = repository.read_pack(pack, [(start, end - start)])
    except (Corrupt, NotFound, Archived):
        if len(rows) == 1:
            return [None]
        return [_read(repository, pack, [row])[0] for row in rows]
    view = memoryview(data)
    return [view[row.offset - start : row.offset - start + row.stored_bytes] for _, row in rows]
