"""Make a staged state durable: cut, hash, store what is new, commit once for all ranks.

With several ranks each has its files in a folder of the snapshot. What is equal on several of them, as everything
that is replicated, is stored by one: all hash what they have, tell each other, and each stores its share.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import msgspec

from outlast import __version__, records
from outlast.checkpoint import finding
from outlast.checkpoint.description import STATE_FILE, STATE_VERSION, Description, folder_of
from outlast.checkpoint.leaves import Leaf, TensorFile
from outlast.checkpoint.ranks import Ranks, shares
from outlast.checkpoint.stage import Place
from outlast.checkpoint.state import Part
from outlast.errors import Refused
from outlast.records import ChunkRef, Entry, Snapshot
from outlast.repo import deltas
from outlast.repo.deltas import Block, Kept
from outlast.repo.repository import Repository
from outlast.repo.sums import Parts
from outlast.repo.write import Contribution, Writer

_PIECES_IN_FLIGHT = 8


class Captured(NamedTuple):
    """What is to be saved of one rank."""

    step: int
    parts: Mapping[str, Part]
    contents: Mapping[Place, memoryview]
    facts: Mapping[str, object]


class _Piece(NamedTuple):
    data: bytes | memoryview
    item_bytes: int
    id: bytes = b""
    """of the chunk, where it was worked out to be told to other ranks"""


class _Held(msgspec.Struct):
    """What one rank has to store."""

    step: int
    chunks: list[ChunkRef]


class _Stored(msgspec.Struct):
    """What one rank did of the work."""

    entries: list[Entry]
    contribution: Contribution


def files_of(parts: Mapping[str, Part]) -> dict[str, list[Leaf]]:
    """The tensor files of a checkpoint, by name."""
    found = {}
    for key, part in parts.items():
        for name, leaves in ((f"{key}.safetensors", part.leaves), (f"{key}.more.safetensors", part.more)):
            if leaves:
                found[name] = leaves
    return found


def persist(
    repository: Repository,
    name: str,
    captured: Callable[[], Captured],
    tags: Mapping[str, str],
    ranks: Ranks,
    *,
    trusting: bool = True,
    delta: bool = False,
) -> Snapshot:
    """Store and commit one checkpoint; every rank calls it and gets the same snapshot.

    Unless `trusting`, packs that it would rely on are read first. `delta`: of blocks that changed since the
    checkpoint before only the differences are stored where they are smaller.
    Raises `StoreFull`, `Unavailable`, `Busy`, on all ranks; what was committed before is whole.
    """
    now_ns = repository.clock.now_ns()
    old: dict[str, dict[int, deltas.Block]] = {}
    writers: list[Writer] = []
    files: dict[str, list[_Piece]] = {}
    try:
        with ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 2)), thread_name_prefix="save") as pool:

            def hold() -> _Held:
                repository.refresh()
                if delta and (made := finding.checkpoints(repository, name)):
                    old.update(deltas.before(repository, made[-1][1]))
                writers.append(repository.writer(trusting=trusting))
                found = captured()
                files.update(_pieces(repository, found))
                if ranks.size > 1:
                    for file, pieces in files.items():
                        ids = pool.map(writers[0].identify, [piece.data for piece in pieces])
                        files[file] = [piece._replace(id=each) for piece, each in zip(pieces, ids, strict=True)]
                every = (piece for pieces in files.values() for piece in pieces if piece.id)
                return _Held(found.step, [(piece.id.hex(), len(piece.data)) for piece in every])

            held = ranks.save.exchange(hold, _Held)
            [writer] = writers
            mine = shares([each.chunks for each in held])[ranks.rank]
            stored = ranks.save.exchange(lambda: _store(writer, pool, files, mine, old, ranks, now_ns), _Stored)

        def commit() -> Snapshot:
            if ranks.size > 1:
                repository.refresh()  # others may rely on packs that were committed since this rank last looked
            return _commit(writer, name, held, stored, tags, now_ns)

        snapshot = ranks.save.from_first(commit, Snapshot)
    except BaseException:
        for each in writers:
            each.abandon()
        raise
    if not ranks.is_first:
        writer.settle()
    return snapshot


def _commit(
    writer: Writer, name: str, held: list[_Held], stored: list[_Stored], tags: Mapping[str, str], now_ns: int
) -> Snapshot:
    """The only moment at which a checkpoint comes to exist, for all ranks."""
    if len({each.step for each in held}) > 1:
        raise Refused(f"the ranks are at different steps: {[each.step for each in held]}; nothing was saved.")
    for each in stored[1:]:
        writer.take(each.contribution)
    entries = _with_folders(deltas.with_all_sums([entry for each in stored for entry in each.entries]), now_ns)
    for entry in entries:
        writer.add_entry(entry)
    return writer.commit(
        Snapshot(
            id="",
            kind="checkpoint",
            name=name,
            time=records.time_text(now_ns),
            tags={"step": str(held[0].step), **tags},
            host=socket.gethostname(),
            files=sum(entry.type == "file" for entry in entries),
            bytes=sum(entry.size for entry in entries),
            program=f"outlast {__version__}",
        )
    )


def _pieces(repository: Repository, captured: Captured) -> dict[str, list[_Piece]]:
    """The content of each file, cut."""
    parts = {key: (part.kind, part.tree) for key, part in captured.parts.items()}
    described = msgspec.json.encode(Description(STATE_VERSION, captured.step, parts, dict(captured.facts)))
    cut = repository.cutter()

    def cut_up(data: bytes | memoryview, item_bytes: int) -> Iterator[_Piece]:
        start = 0
        for length in cut(data, True):
            yield _Piece(data[start : start + length], item_bytes)
            start += length

    found = {STATE_FILE: list(cut_up(memoryview(described), 0))}
    for file, leaves in files_of(captured.parts).items():
        contents = {leaf.name: captured.contents[file, leaf.name] for leaf in leaves}
        found[file] = []
        for data, item_bytes, is_cut in TensorFile(leaves, {"format": "pt"}).chunks(
            contents, repository.format.chunking
        ):
            found[file] += cut_up(data, item_bytes) if is_cut else [_Piece(data, item_bytes)]
    return found


def _store(
    writer: Writer,
    pool: ThreadPoolExecutor,
    files: Mapping[str, list[_Piece]],
    mine: set[str],
    old: Mapping[str, Mapping[int, Block]],
    ranks: Ranks,
    now_ns: int,
) -> _Stored:
    entries = []
    for file, pieces in files.items():
        path = folder_of(ranks.rank, ranks.size) + file
        kept: dict[str, Parts] = {}
        chunks = list(_add(writer, pool, pieces, mine, old.get(path, {}), kept))
        entry = Entry(path=path, type="file", mode=0o644, mtime_ns=now_ns, size=sum(length for _, length in chunks))
        entries.append(deltas.with_sums(entry, chunks, kept))
    of_first = Contribution([], [], 0, 0)  # its commit makes it durable
    return _Stored(entries, of_first if ranks.is_first else writer.contribute())


def _add(
    writer: Writer,
    pool: ThreadPoolExecutor,
    pieces: list[_Piece],
    mine: set[str],
    old: Mapping[int, Block],
    kept: dict[str, Parts],
) -> Iterator[ChunkRef]:
    """Hash and encode in the pool, a few pieces ahead of what is added. What is another's to store is named alone.

    `kept` learns which chunks are kept as sums.
    """
    waiting: deque[Future[Kept] | ChunkRef] = deque()

    def first() -> ChunkRef:
        each = waiting.popleft()
        if not isinstance(each, Future):
            return each
        found = each.result()
        writer.add(found.prepared)
        if found.parts is not None:
            kept[found.id.hex()] = found.parts
        return found.ref

    at = 0
    for data, item_bytes, chunk in pieces:
        if not chunk or chunk.hex() in mine:
            waiting.append(
                pool.submit(deltas.prepare, writer, data, item_bytes, old.get(at), lasting=True, chunk=chunk)
            )
        else:
            waiting.append((chunk.hex(), len(data)))
        at += len(data)
        if len(waiting) > _PIECES_IN_FLIGHT:
            yield first()
    while waiting:
        yield first()


def _with_folders(files: list[Entry], now_ns: int) -> list[Entry]:
    folders = {".", *(entry.path.rpartition("/")[0] or "." for entry in files)}
    made = [Entry(path=path, type="dir", mode=0o755, mtime_ns=now_ns) for path in folders]
    return sorted([*made, *files], key=lambda entry: records.path_order(entry.raw_path))
