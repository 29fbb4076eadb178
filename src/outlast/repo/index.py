"""Chunk id -> pack, offset, length: folded from pack footers.

`index/<name>` segments hold the folded footers of many packs, so that opening reads a few objects
instead of one footer per pack. They are derived: a damaged or missing one costs time, never data.

    segment   magic "OUTLINDX", version u32, length of the header u32, header (JSON: packs), records (56 B each):
              chunk id 32 B, pack number u32, offset u64, stored bytes u32, plain bytes u32, codec u8, 3 zero bytes
    name      BLAKE3 of the segment in hex, keyed with the id key in an encrypted repository

In memory the records stay where they were read, and one sorted array of numbers finds them. Each
number is a key: the first 4 bytes of a chunk id above the number of its row. So sorting needs no
second array, equal ids stay in the order in which they came, and with two million chunks one miss
in two thousand has to look at a row.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import NamedTuple

import blake3
import msgspec
import numpy as np
from numpy.typing import NDArray

from outlast import records
from outlast.errors import Corrupt
from outlast.repo.pack import CHUNK_BYTES_MAX, Footer
from outlast.repo.seal import Keys

_HEAD = struct.Struct("<8sII")
_MAGIC = b"OUTLINDX"
RECENT_MAX = 100_000
"""New chunks are kept in a dict, at some 300 bytes each, up to this many, and then sorted in."""
_PENDING_ROWS_MAX = 1 << 16
_ROWS_MAX = 1 << 32
_RECORD = np.dtype(
    [
        ("id", "V32"),
        ("pack", "<u4"),
        ("offset", "<u8"),
        ("stored", "<u4"),
        ("plain", "<u4"),
        ("codec", "u1"),
        ("pad", "V3"),
    ]
)
_ROW = struct.Struct("<32sIQIIB3x")


class IndexedPack(msgspec.Struct, frozen=True):
    """What a reader must know of a pack beside its chunks."""

    name: str
    epoch: int
    encrypted: bool
    salt: str


class _SegmentHeader(msgspec.Struct, frozen=True):
    packs: list[IndexedPack]
    records: int


class Location(msgspec.Struct, frozen=True, gc=False):
    """Where a chunk lies."""

    pack: IndexedPack
    offset: int
    stored_bytes: int
    plain_bytes: int
    codec: int


class Part(NamedTuple):
    """Rows that came together. `first`: the number of the first; the rows give their packs as numbers in `packs`."""

    first: int
    rows: NDArray[np.void]
    packs: Sequence[IndexedPack]
    raw: memoryview
    """the bytes of `rows`"""


class Index:
    """All chunks of all known packs, in memory: 64 bytes a chunk, plus those of this process.

    Looking up is safe from any thread; adding, sorting and forgetting are for one thread at a time.
    """

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._forgotten: set[str] = set()
        self._parts: list[Part] = []
        self._starts: list[int] = []
        self._rows = 0
        self._keys = np.empty(0, np.uint64).data
        self._unsorted: list[NDArray[np.uint64]] = []
        self._pending: list[NDArray[np.void]] = []
        self._pending_packs: list[IndexedPack] = []
        self._pending_rows = 0
        self._recent: dict[bytes, Location] = {}

    def __len__(self) -> int:
        return len(self._keys) + sum(map(len, self._unsorted)) + self._pending_rows

    @property
    def packs(self) -> set[str]:
        """The names of the packs whose chunks are here."""
        return self._known

    def add(self, footers: Iterable[Footer], *, known: bool = False) -> None:
        """Fold the footers of packs that are new, or also `known` ones'. `sort` makes them findable."""
        for footer in footers:
            self._add_footer(footer, known=known)

    def add_recent(self, footer: Footer) -> None:
        """Fold a pack that this process has just made, without sorting everything anew."""
        if len(self._recent) > RECENT_MAX:
            self.sort()
        pack = self._add_footer(footer)
        if pack is not None:
            for chunk, _, offset, stored_bytes, plain_bytes, codec, _ in footer.records.tolist():
                self._recent[chunk] = Location(pack, offset, stored_bytes, plain_bytes, codec)

    def _add_footer(self, footer: Footer, *, known: bool = False) -> IndexedPack | None:
        if (footer.name in self._known and not known) or footer.name in self._forgotten:
            return None
        pack = indexed_pack(footer)
        self._pending.append(footer_rows(footer, len(self._pending_packs)))
        self._pending_packs.append(pack)
        self._pending_rows += len(footer.records)
        self._known.add(footer.name)
        if self._pending_rows >= _PENDING_ROWS_MAX:
            self._join_pending()
        return pack

    def _join_pending(self) -> None:
        """Many small packs become one part: a part for each would cost more than its rows."""
        if self._pending:
            self._add_part(np.concatenate(self._pending), self._pending_packs, None)
            self._pending, self._pending_packs, self._pending_rows = [], [], 0

    def _add_part(self, rows: NDArray[np.void], packs: Sequence[IndexedPack], kept: NDArray[np.bool_] | None) -> None:
        """Rows that are not `kept` stay in memory, but nothing leads to them."""
        if not len(rows):
            return
        assert self._rows + len(rows) <= _ROWS_MAX, "an index has room for four billion rows"
        raw = rows.view(np.uint8).data
        numbers = np.arange(self._rows, self._rows + len(rows), dtype=np.uint64)
        heads = np.ndarray(len(rows), ">u4", raw, 0, (_RECORD.itemsize,))
        keys = heads.astype(np.uint64)
        keys <<= np.uint64(32)
        keys |= numbers
        self._parts.append(Part(self._rows, rows, packs, raw))
        self._starts.append(self._rows)
        self._rows += len(rows)
        self._unsorted.append(keys if kept is None else keys[kept])

    def sort(self) -> None:
        """Make what was added findable; call once after a series of `add`."""
        self._join_pending()
        if self._unsorted:
            keys = np.concatenate([np.asarray(self._keys), *self._unsorted])
            keys.sort()
            # One assignment: threads that look up meanwhile see the old keys or the new ones.
            self._keys = keys.data
            self._unsorted = []
        self._recent = {}

    def get(self, chunk: bytes) -> Location | None:
        """Where the chunk lies, or None. Of several copies the last one added counts."""
        return self._recent.get(chunk) or next(self._sorted_copies(chunk), None)

    def copies(self, chunk: bytes) -> list[Location]:
        """Everywhere the chunk lies, the last copy added first.

        Of the packs of `add_recent` one copy is told until the next `sort`.
        """
        recent = self._recent.get(chunk)
        return [*([recent] if recent else []), *self._sorted_copies(chunk)]

    def _sorted_copies(self, chunk: bytes) -> Iterator[Location]:
        keys = self._keys
        low = int.from_bytes(chunk[:4], "big") << 32
        at = bisect_right(keys, low | 0xFFFFFFFF) - 1
        while at >= 0 and keys[at] >= low:
            found, location = self.row(keys[at] & 0xFFFFFFFF)
            if found == chunk:
                yield location
            at -= 1

    def row(self, number: int) -> tuple[bytes, Location]:
        """(chunk id, where it lies) of a row."""
        part = self._parts[bisect_right(self._starts, number) - 1]
        at = (number - part.first) * _ROW.size
        chunk, pack, offset, stored_bytes, plain_bytes, codec = _ROW.unpack_from(part.raw, at)
        return chunk, Location(part.packs[pack], offset, stored_bytes, plain_bytes, codec)

    def ordered(self) -> tuple[NDArray[np.uint64], Sequence[Part]]:
        """(keys of all rows that can be found, in order; the rows): for work on all chunks at once."""
        self.sort()
        return np.asarray(self._keys), self._parts

    def add_segment(self, data: bytes, name: str, keys: Keys | None, wanted: Container[str] | None = None) -> set[str]:
        """Fold what a segment says of packs that are not known yet, of those only the `wanted` ones. Gives their names.

        `data` is kept. Raises `Corrupt`, having changed nothing, when it isn't what its name says.
        """
        packs, rows = read_segment(data, name, keys)
        new = {
            pack.name
            for pack in packs
            if pack.name not in self._known
            and pack.name not in self._forgotten
            and (wanted is None or pack.name in wanted)
        }
        if not new:
            return new
        self._join_pending()
        kept = None
        if len(new) < len(packs):
            kept = np.fromiter((pack.name in new for pack in packs), bool, len(packs))[rows["pack"]]
            if 2 * int(np.count_nonzero(kept)) < len(rows):
                rows, kept = rows[kept], None
        self._add_part(rows, packs, kept)
        self._known |= new
        return new

    def forget_packs(self, names: set[str]) -> None:
        """Packs that are gone: from now on nothing is found in them, and they are never added again."""
        gone = names & self._known
        self._forgotten |= names
        if not gone:
            return
        self.sort()
        found = np.ones(self._rows, bool)
        for part in self._parts:
            there = np.fromiter((pack.name not in gone for pack in part.packs), bool, len(part.packs))
            if not there.all():
                found[part.first : part.first + len(part.rows)] = there[part.rows["pack"]]
        keys = np.asarray(self._keys)
        self._keys = keys[found[keys & np.uint64(0xFFFFFFFF)]].data
        self._known -= gone


def indexed_pack(footer: Footer) -> IndexedPack:
    return IndexedPack(footer.name, footer.epoch, footer.encrypted, footer.salt.hex())


def footer_rows(footer: Footer, number: int = 0) -> NDArray[np.void]:
    """The rows that a pack has in a segment that lists it as pack `number`."""
    rows = np.zeros(len(footer.records), _RECORD)
    for field in ("id", "offset", "stored", "plain", "codec"):
        rows[field] = footer.records[field]
    rows["pack"] = number
    return rows


def build_segment(footers: Sequence[Footer]) -> bytes:
    """The segment of these packs."""
    rows = [footer_rows(footer, number) for number, footer in enumerate(footers)]
    return _encode_segment([indexed_pack(footer) for footer in footers], rows)


def build_segments(index: Index, rows_max: int) -> Iterator[bytes]:
    """Everything that can be found in an index, in segments of about so many rows; a pack is never split."""
    keys, parts = index.ordered()
    found = np.zeros(sum(len(part.rows) for part in parts), bool)
    found[keys & np.uint64(0xFFFFFFFF)] = True
    packs: list[IndexedPack] = []
    pieces: list[NDArray[np.void]] = []
    count = 0
    for part in parts:
        rows = part.rows[found[part.first : part.first + len(part.rows)]]
        if not len(rows):
            continue
        rows = rows[np.argsort(rows["pack"], kind="stable")]
        numbers, firsts = np.unique(rows["pack"], return_index=True)
        for number, start, end in zip(numbers.tolist(), firsts, [*firsts[1:], len(rows)], strict=True):
            own = rows[start:end].copy()
            own["pack"] = len(packs)
            packs.append(part.packs[number])
            pieces.append(own)
            count += len(own)
            if count >= rows_max:
                yield _encode_segment(packs, pieces)
                packs, pieces, count = [], [], 0
    if packs:
        yield _encode_segment(packs, pieces)


def _encode_segment(packs: Sequence[IndexedPack], rows: Sequence[NDArray[np.void]]) -> bytes:
    header = records.canonical(_SegmentHeader(list(packs), sum(map(len, rows))))
    return _HEAD.pack(_MAGIC, 1, len(header)) + header + b"".join(part.tobytes() for part in rows)


def read_segment(data: bytes, name: str, keys: Keys | None) -> tuple[list[IndexedPack], NDArray[np.void]]:
    """The packs of a segment, and its rows as a view of `data`; `Corrupt` when it isn't what its name says."""
    if segment_name(data, keys) != name:
        raise Corrupt(f"index segment {name[:16]} does not have the hash that its name promises.")
    magic, version, header_bytes = _HEAD.unpack_from(data) if len(data) >= _HEAD.size else (b"", 0, 0)
    if magic != _MAGIC or version != 1 or _HEAD.size + header_bytes > len(data):
        raise Corrupt(f"index segment {name[:16]} is not one that this version can read.")
    body = _HEAD.size + header_bytes
    header = records.parse(data[_HEAD.size : body], _SegmentHeader, f"index segment {name[:16]}")
    if header.records * _RECORD.itemsize != len(data) - body:
        raise Corrupt(f"index segment {name[:16]} has not the length that it says.")
    rows = np.frombuffer(data, _RECORD, offset=body)
    if len(rows) and (int(rows["pack"].max()) >= len(header.packs) or int(rows["plain"].max()) > CHUNK_BYTES_MAX):
        raise Corrupt(f"index segment {name[:16]} names packs that it does not list.")
    return header.packs, rows


def segment_name(data: bytes, keys: Keys | None) -> str:
    """The name under `index/` that authenticates a segment."""
    return (blake3.blake3(data, key=keys.id_key) if keys else blake3.blake3(data)).hexdigest()
