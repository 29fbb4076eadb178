"""Which stored chunks are needed, which are needed but stored twice, and which are neither.

Of a needed chunk one copy is *used*: the one in the pack that holds most bytes of needed chunks, so
that packs which are mostly garbage empty first. Its other copies are *spare*. Packs that must not be
relied on count only for what is nowhere else. Packs that are alike are told apart by their names, so
everybody who counts the same repository comes to the same result.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from outlast.repo.index import Index, Location, Part

_ID_BYTES = 32
_NONE = 0xFFFFFFFF
_BATCH_IDS = 1 << 18
_BUCKET_BITS_MAX = 24

_Ids = NDArray[np.uint64]
"""chunk ids, each as a row of four numbers"""


class PackUsage(msgspec.Struct, frozen=True):
    """What a pack holds. Bytes are those that chunks take as stored; what is neither used nor spare is garbage."""

    chunks: int
    bytes: int
    used_chunks: int
    used_bytes: int
    spare_chunks: int
    spare_bytes: int


class Usage:
    """Counts what is needed of the chunks that `index` knows now; what is added to it later is left out.

    For one thread. `archived`: packs that are slow to read, so that of a chunk a copy elsewhere is used.
    `exclude`: packs that hold a chunk only if no other pack does, because they are about to go. `damaged`:
    packs that hold one only if not even one of those does. `among`: the packs that count, if not all; an
    index may also know packs that were uploaded and never committed.
    """

    def __init__(
        self,
        index: Index,
        exclude: Collection[str] = (),
        damaged: Collection[str] = (),
        among: Collection[str] | None = None,
        archived: Collection[str] = (),
    ) -> None:
        keys, parts = index.ordered()
        self._index = index
        self._names = sorted(index.packs if among is None else index.packs.intersection(among))
        self._numbers = {name: number for number, name in enumerate(self._names)}
        self._distrust = np.array(
            [4 * (name in damaged) + 2 * (name in exclude) + (name in archived) for name in self._names], np.uint8
        )
        self._pack, self._stored = self._read_columns(parts)
        order = (keys & np.uint64(_NONE)).astype(np.uint32)
        counts = self._pack[order] != _NONE
        if not counts.all():
            keys, order = keys[counts], order[counts]
        ids = _ids_in_order(parts, order, len(self._pack))
        heads = (keys >> np.uint64(32)).astype(np.uint32)
        new = _group(heads, order, ids)
        self._ids = ids if new.all() else ids[new]
        self._heads = heads[new]
        self._first = order[new]
        """by chunk: the row of its first copy"""
        chunks = (np.cumsum(new) - 1).astype(np.uint32)
        self._chunk = np.full(len(self._pack), _NONE, np.uint32)
        """by row: its chunk, or `_NONE` for rows that are not to be found"""
        self._chunk[order] = chunks
        several = ~new
        several[:-1] |= ~new[1:]
        self._several = order[several]
        """the rows of chunks of which there are several copies, by chunk"""
        self._bits = min(_BUCKET_BITS_MAX, max(1, len(self._heads).bit_length()))
        edges = np.arange(1 << self._bits, dtype=np.uint32) << np.uint32(32 - self._bits)
        self._buckets = np.searchsorted(self._heads, edges).astype(np.uint32)
        self._marked = np.zeros(len(self._heads), bool)
        self._settled: _Settled | None = None

    def _read_columns(self, parts: Sequence[Part]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """(number of the pack, stored bytes) by row."""
        packs = [np.empty(0, np.uint32)]
        for part in parts:
            numbers = [self._numbers.get(pack.name, _NONE) for pack in part.packs]
            packs.append(np.array(numbers, np.uint32)[part.rows["pack"]])
        return np.concatenate(packs), np.concatenate([np.empty(0, np.uint32), *(part.rows["stored"] for part in parts)])

    def mark(self, ids: bytes | memoryview) -> list[bytes]:
        """Count these chunks, 32 bytes each, end to end, as needed. Gives those that no pack holds, each once."""
        unknown: dict[bytes, None] = {}
        view = memoryview(ids).cast("B")
        if len(view) % _ID_BYTES:
            raise ValueError(f"{len(view)} bytes are no list of chunk ids of {_ID_BYTES} bytes.")
        for at in range(0, len(view), _BATCH_IDS * _ID_BYTES):
            part = view[at : at + _BATCH_IDS * _ID_BYTES]
            for number in self._mark(part).tolist():
                unknown[bytes(part[number * _ID_BYTES : (number + 1) * _ID_BYTES])] = None
        self._settled = None
        return list(unknown)

    def _mark(self, ids: memoryview) -> NDArray[np.intp]:
        """Gives the numbers of those ids that no pack holds, in order.

        Every id starts at the first chunk of its bucket, about one chunk wide, and goes on from chunk to
        chunk until it meets its own, or one that is beyond it.
        """
        wanted = np.frombuffer(ids, np.uint64).reshape(-1, 4)
        heads = np.frombuffer(ids, ">u4")[::8].astype(np.uint32)
        at = self._buckets[heads >> np.uint32(32 - self._bits)].astype(np.intp)
        waiting = np.arange(len(heads))
        unknown = []
        while len(waiting):
            own = heads[waiting]
            inside = at < len(self._heads)
            there = np.full(len(at), _NONE, np.uint32)
            there[inside] = self._heads[at[inside]]
            inside &= there <= own
            unknown.append(waiting[~inside])
            alike = np.flatnonzero(inside & (there == own))
            equal = alike[_same(self._ids[at[alike]], wanted[waiting[alike]])]
            self._marked[at[equal]] = True
            inside[equal] = False
            waiting, at = waiting[inside], at[inside] + 1
        return np.sort(np.concatenate(unknown)) if unknown else np.empty(0, np.intp)

    def packs(self) -> dict[str, PackUsage]:
        """Every pack that the index knows, by name."""
        settled = self._settle()
        found = self._chunk != _NONE
        columns: list[list[int]] = []
        for rows in (np.flatnonzero(found), settled.used, settled.spare):
            packs = self._pack[rows]
            columns.append(np.bincount(packs, minlength=len(self._names)).tolist())
            # Sums of floats, but of whole numbers: exact below 2**53, eight million gigabytes in one pack.
            stored = np.bincount(packs, self._stored[rows], len(self._names))
            columns.append(stored.astype(np.int64).tolist())
        return {name: PackUsage(*row) for name, *row in zip(self._names, *columns, strict=True)}

    def used(self, pack: str) -> list[tuple[bytes, Location]]:
        """(chunk id, where it lies) of the used chunks of a pack, in order of offset."""
        settled = self._settle()
        number = self._numbers.get(pack)
        if number is None:
            return []
        rows = settled.used[settled.edges[number] : settled.edges[number + 1]]
        return sorted(map(self._index.row, rows.tolist()), key=lambda row: row[1].offset)

    def spares(self, packs: Collection[str]) -> list[tuple[str, bytes, Location]]:
        """(pack, chunk id, where the used copy of the chunk lies) of each spare copy in these packs."""
        settled = self._settle()
        chosen = np.fromiter((name in packs for name in self._names), bool, len(self._names))
        rows = settled.spare[chosen[self._pack[settled.spare]]]
        holders = settled.holder[self._chunk[rows]]
        names = (self._names[number] for number in self._pack[rows].tolist())
        return [(name, *self._index.row(row)) for name, row in zip(names, holders.tolist(), strict=True)]

    def _settle(self) -> _Settled:
        if self._settled is None:
            found = np.flatnonzero(self._chunk != _NONE)
            needed = found[self._marked[self._chunk[found]]]
            holder = self._choose(needed)
            is_used = holder[self._chunk[needed]] == needed
            used = needed[is_used]
            used = used[np.argsort(self._pack[used], kind="stable")]
            edges = np.searchsorted(self._pack[used], np.arange(len(self._names) + 1))
            self._settled = _Settled(holder, used, edges, needed[~is_used])
        return self._settled

    def _choose(self, needed: NDArray[np.intp]) -> NDArray[np.uint32]:
        """By chunk, the row of the copy that counts. `needed`: all rows of needed chunks."""
        needed_bytes = np.bincount(self._pack[needed], self._stored[needed], len(self._names))
        rank = np.empty(len(self._names), np.uint32)
        rank[np.lexsort((-needed_bytes, self._distrust))] = np.arange(len(self._names))
        chunks = self._chunk[self._several]
        order = np.lexsort((rank[self._pack[self._several]], chunks))
        best = order[np.diff(chunks[order], prepend=-1) != 0]
        holder = self._first.copy()
        holder[chunks[best]] = self._several[best]
        return holder


class _Settled(msgspec.Struct, frozen=True):
    """`holder`: by chunk, the row of the copy that counts. `used`, in order of pack, and `spare`: rows.

    The used rows of pack n lie between `edges` n and n + 1.
    """

    holder: NDArray[np.uint32]
    used: NDArray[np.intp]
    edges: NDArray[np.intp]
    spare: NDArray[np.intp]


def _ids_in_order(parts: Sequence[Part], order: NDArray[np.uint32], rows: int) -> _Ids:
    place = np.full(rows, _NONE, np.uint32)
    place[order] = np.arange(len(order), dtype=np.uint32)
    ids = np.empty(len(order), "V32")
    for part in parts:
        to = place[part.first : part.first + len(part.rows)]
        found = to != _NONE
        ids[to[found]] = part.rows["id"][found]
    return ids.view(np.uint64).reshape(-1, 4)


def _group(heads: NDArray[np.uint32], order: NDArray[np.uint32], ids: _Ids) -> NDArray[np.bool_]:
    """Bring equal ids together, in place, and give for each row whether its id differs from the one before.

    The rows come in order of the first 4 bytes of their ids. Only where different ids share them,
    which happens to few, is there anything to move.
    """
    new = np.ones(len(ids), bool)
    new[1:] = ~_same(ids[1:], ids[:-1])
    first = np.ones(len(ids), bool)
    first[1:] = heads[1:] != heads[:-1]
    runs = np.cumsum(first)
    mixed = np.zeros(len(ids) + 1, bool)
    mixed[runs[new & ~first]] = True
    moved = np.flatnonzero(mixed[runs])
    if len(moved):
        own = ids[moved]
        to = np.lexsort((order[moved], *own.T, runs[moved]))
        order[moved], ids[moved] = order[moved][to], own[to]
        new[1:] = ~_same(ids[1:], ids[:-1])
    return new


def _same(one: _Ids, other: _Ids) -> NDArray[np.bool_]:
    equal: NDArray[np.bool_] = one[:, 0] == other[:, 0]
    for column in range(1, 4):
        equal &= one[:, column] == other[:, column]
    return equal
