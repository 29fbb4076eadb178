"""Make a staged state durable: cut, hash, store what is new, commit once for all ranks.

With several ranks each has its files in a folder of the snapshot. What is equal on several of them, as everything
that is replicated, is stored by one: all hash what they have, tell each other, and each stores its share.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import msgspec

from outlast import __version__, records
from outlast.checkpoint import pieces, references
from outlast.checkpoint.leaves import Leaf, TensorFile
from outlast.checkpoint.pieces import LeafBytes, Piece
from outlast.checkpoint.ranks import Ranks, shares
from outlast.checkpoint.state import Part
from outlast.checkpoint.state_file import STATE_FILE, STATE_VERSION, Description, folder_of
from outlast.errors import Refused
from outlast.records import ChunkRef, Entry, Snapshot
from outlast.repo import deltas
from outlast.repo.deltas import Block
from outlast.repo.repository import Repository
from outlast.repo.write import Contribution, Writer


class Captured(NamedTuple):
    """What is to be saved of one rank."""

    step: int
    parts: Mapping[str, Part]
    content: Callable[[str, str], LeafBytes]
    """(file, name) -> a leaf, as soon as it is copied"""
    check: Callable[[], None]
    """Wait until all is copied; raises `Refused` where that is not of one instant."""
    facts: Mapping[str, object]


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
    found: list[Captured] = []
    files: dict[str, Iterable[Piece]] = {}
    try:
        with pieces.threads() as pool:

            def hold() -> _Held:
                repository.refresh()
                if delta and (made := references.checkpoints(repository, name)):
                    old.update(deltas.before(repository, made[-1][1]))
                writers.append(repository.writer(trusting=trusting))
                found.append(captured())
                files.update(_files(repository, found[0]))
                chunks: list[ChunkRef] = []
                if ranks.size > 1:
                    for file, some in files.items():
                        files[file] = pieces.identified(writers[0], pool, some)
                        chunks += [(piece.id.hex(), len(piece.data)) for piece in files[file]]
                return _Held(found[0].step, chunks)

            held = ranks.save.exchange(hold, _Held)
            [writer] = writers
            mine = shares([each.chunks for each in held])[ranks.rank] if ranks.size > 1 else None

            def store() -> _Stored:
                stored = _store(writer, pool, files, mine, old, ranks)
                found[0].check()
                return stored

            stored = ranks.save.exchange(store, _Stored)

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


def _files(repository: Repository, captured: Captured) -> dict[str, Iterable[Piece]]:
    """Each file in pieces, which come as they are copied: the first is stored while the last is copied."""
    parts = {key: (part.kind, part.tree) for key, part in captured.parts.items()}
    described = msgspec.json.encode(Description(STATE_VERSION, captured.step, parts, dict(captured.facts)))
    found: dict[str, Iterable[Piece]] = {STATE_FILE: pieces.of_data(repository, described)}
    for name, leaves in files_of(captured.parts).items():
        content = partial(captured.content, name)
        found[name] = pieces.of_tensors(repository, TensorFile(leaves, {"format": "pt"}), content)
    return found


def _store(
    writer: Writer,
    pool: ThreadPoolExecutor,
    files: Mapping[str, Iterable[Piece]],
    mine: set[str] | None,
    old: Mapping[str, Mapping[int, Block]],
    ranks: Ranks,
) -> _Stored:
    folder = folder_of(ranks.rank, ranks.size)
    entries = [
        pieces.store(writer, pool, folder + name, found, mine=mine, old=old.get(folder + name))
        for name, found in files.items()
    ]
    of_first = Contribution([], [], 0, 0)  # its commit makes it durable
    return _Stored(entries, of_first if ranks.is_first else writer.contribute())


def _with_folders(files: list[Entry], now_ns: int) -> list[Entry]:
    folders = {".", *(entry.path.rpartition("/")[0] or "." for entry in files)}
    made = [Entry(path=path, type="dir", mode=0o755, mtime_ns=now_ns) for path in folders]
    dated = [msgspec.structs.replace(each, mtime_ns=now_ns) for each in files]
    return sorted([*made, *dated], key=lambda entry: records.path_order(entry.raw_path))
