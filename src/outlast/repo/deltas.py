"""Write a block of a tensor as a difference from what the snapshot before has in its place; see `sums.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import msgspec
import numpy as np

from outlast.errors import Archived, Corrupt
from outlast.events import Event
from outlast.records import ChunkRef, Entry, Snapshot, path_order
from outlast.repo import difference, form
from outlast.repo.manifest import validated
from outlast.repo.repository import Repository, chunk_offsets
from outlast.repo.sums import Parts, added
from outlast.repo.write import Prepared, Writer

DIFFERENCES_MAX = {2: 1, 4: 3, 8: 3}
"""By the bytes of an element, of the sums that are written. With more of them a series gets hardly smaller (1 % with
seven) and slower to read, and more depends on one block. Of narrow elements every byte has to be decoded, which takes
twice as long for each difference."""
GAIN_MIN = 0.05


class Block(NamedTuple):
    """A block of an earlier version of a file; `parts` is itself where it is no sum."""

    id: bytes
    bytes: int
    parts: Parts


class Kept(NamedTuple):
    """How a block is kept: a chunk for `Writer.add`, and its parts where it is a sum."""

    id: bytes
    prepared: Prepared
    parts: Parts | None = None

    @property
    def ref(self) -> ChunkRef:
        return self.id.hex(), self.prepared.plain_bytes


def are_allowed(repository: Repository) -> bool:
    """Whether every program that can open the repository knows sums."""
    return form.SUMS in repository.format.features


def blocks(entry: Entry) -> dict[int, Block]:
    """The chunks of a file by their offsets."""
    sums = {entry.chunks[number][0]: Parts(width, tuple(map(bytes.fromhex, ids))) for number, width, ids in entry.sums}
    found = {}
    for offset, (chunk, length) in chunk_offsets(entry):
        raw = bytes.fromhex(chunk)
        found[offset] = Block(raw, length, sums.get(chunk, Parts(0, (raw,))))
    return found


def before(repository: Repository, snapshot: Snapshot) -> dict[str, dict[int, Block]]:
    """The chunks of each file of a snapshot, by path and offset; none of those that damage keeps from being known."""
    return {entry.path: blocks(entry) for entry in _files(repository, snapshot)}


class Earlier:
    """`before` for files that are asked for in `path_order`, so that no more than one is held in memory."""

    def __init__(self, repository: Repository, snapshot: Snapshot | None) -> None:
        self._files = _files(repository, snapshot) if snapshot else iter(())
        self._at = next(self._files, None)

    def blocks(self, entry: Entry) -> dict[int, Block]:
        """The chunks that the file at the path of `entry` had, by the offsets of those that stand for them now.

        Where it has as many chunks, they stand for each other in turn, wherever they lie: a header that grew moves all
        that is behind it, and changes no tensor.
        """
        order = path_order(entry.raw_path)
        while self._at is not None and path_order(self._at.raw_path) < order:
            self._at = next(self._files, None)
        if self._at is None or self._at.path != entry.path:
            return {}
        found = blocks(self._at)
        if len(found) != len(entry.chunks):
            return found
        return {offset: block for (offset, _), block in zip(chunk_offsets(entry), found.values(), strict=True)}


def _files(repository: Repository, snapshot: Snapshot) -> Iterator[Entry]:
    if not are_allowed(repository):
        return
    try:
        for _, entry in validated(repository.entries(snapshot), snapshot.id):
            if entry.type == "file":
                yield entry
    except Corrupt as exc:
        repository.sink.event(Event("manifest.damaged", f"{exc.message} So new blocks are not built on all of its."))


def with_sums(entry: Entry, chunks: list[ChunkRef], kept: dict[str, Parts]) -> Entry:
    """The entry with these chunks, those of `kept` as sums; each is listed once, where it first stands."""
    first = {chunk: number for number, (chunk, _) in reversed(list(enumerate(chunks))) if chunk in kept}
    sums = [kept[chunk].listed(number) for chunk, number in sorted(first.items(), key=lambda each: each[1])]
    return msgspec.structs.replace(entry, chunks=chunks, sums=sums)


def with_all_sums(entries: list[Entry]) -> list[Entry]:
    """What one process keeps as a sum another may name as well, and know nothing of it."""
    kept = {
        entry.chunks[number][0]: Parts(width, tuple(map(bytes.fromhex, ids)))
        for entry in entries
        for number, width, ids in entry.sums
    }
    return [with_sums(entry, entry.chunks, kept) for entry in entries] if kept else entries


def prepare(
    writer: Writer,
    plain: bytes | memoryview,
    item_bytes: int,
    before: Block | None,
    *,
    lasting: bool = False,
    chunk: bytes = b"",
) -> Kept:
    """`Writer.prepare` for a block of elements, built on `before` where that makes it smaller by `GAIN_MIN`.

    Whole where the repository has it whole, or where sums are not allowed. What it is built on is read and verified
    before anything relies on it.
    """
    repository = writer.repository
    if before is None or before.bytes != len(plain) or not are_allowed(repository):
        return whole(writer.prepare(plain, item_bytes, lasting=lasting, chunk=chunk))
    chunk = chunk or writer.identify(plain)
    if chunk == before.id and before.parts.item_bytes and has(writer, before):
        return Kept(chunk, Prepared(chunk, len(plain)), before.parts)
    complete = writer.prepare(plain, item_bytes, lasting=lasting, chunk=chunk)
    if complete.encoded is None or not _may_build(before, item_bytes) or not has(writer, before):
        return whole(complete)
    try:
        old = np.array(np.frombuffer(_read(repository, before), np.uint8))
    except (Corrupt, Archived):
        return whole(complete)
    folded = difference.difference(plain, old, item_bytes)
    prepared = writer.prepare(folded.data, item_bytes, compress=True)
    if prepared.encoded is not None and len(prepared.encoded) > len(complete.encoded) * (1 - GAIN_MIN):
        return whole(complete)
    difference.add(old, folded.data, item_bytes)
    if not np.array_equal(old, np.frombuffer(plain, np.uint8)):
        return whole(complete)
    return Kept(chunk, prepared, Parts(item_bytes, (*before.parts.ids, prepared.id)))


def whole(prepared: Prepared) -> Kept:
    """No sum."""
    return Kept(prepared.id, prepared)


def has(writer: Writer, block: Block) -> bool:
    """Whether new work may rely on what a block is made of."""
    return writer.has((part.hex(), block.bytes) for part in block.parts.ids)


def _may_build(before: Block, item_bytes: int) -> bool:
    fits = item_bytes in difference.ITEM_BYTES and before.parts.item_bytes in (0, item_bytes)
    return fits and before.bytes % item_bytes == 0 and len(before.parts.ids) <= DIFFERENCES_MAX[item_bytes]


def _read(repository: Repository, block: Block) -> bytes | memoryview:
    if not block.parts.item_bytes:
        return repository.get_stored(block.id)
    return added(repository, block.id, block.parts)
