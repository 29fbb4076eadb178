"""Chunk id -> pack, offset, length: folded from pack footers.

`index/<name>` segments hold the folded footers of many packs, so that opening reads a few objects
instead of one footer per pack. They are derived: a damaged or missing one costs time, never data.

    segment   magic "OUTLINDX", version u32, length of the header u32, header (JSON: packs), records (56 B each):
              chunk id 32 B, pack number u32, offset u64, stored bytes u32, plain bytes u32, codec u8, 3 zero bytes
    name      BLAKE3 of the segment in hex, keyed with the id key in an encrypted repository
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
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


class _Sorted(NamedTuple):
    """Records in order of the first eight bytes of their ids, and those bytes as numbers."""

    records: NDArray[np.void]
    prefixes: memoryview


class Index:
    """All chunks of all known packs, in memory: 56 bytes a chunk, plus those of this process.

    Looking up is safe from any thread; adding is for one thread at a time.
    """

    def __init__(self) -> None:
        self._packs: list[IndexedPack] = []
        self._known: set[str] = set()
        self._sorted = _Sorted(np.empty(0, _RECORD), memoryview(b"").cast("Q"))
        self._unsorted: list[NDArray[np.void]] = []
        self._recent: dict[bytes, Location] = {}

    def __len__(self) -> int:
        return len(self._sorted.records) + sum(map(len, self._unsorted)) + len(self._recent)

    @property
    def packs(self) -> set[str]:
        return self._known

    def add(self, footers: Iterable[Footer]) -> None:
        """Fold the footers of packs that the index doesn't know yet."""
        for footer in footers:
            if footer.name in self._known:
                continue
            self._add_rows([indexed_pack(footer)], footer_rows(footer))

    def add_recent(self, footer: Footer) -> None:
        """Fold a pack that this process has just made, without sorting everything anew."""
        pack = indexed_pack(footer)
        if len(self._recent) > RECENT_MAX:
            self.sort()
            self._recent = {}
        self._add_rows([pack], footer_rows(footer))
        for chunk, _, offset, stored_bytes, plain_bytes, codec, _ in footer.records.tolist():
            self._recent[chunk] = Location(pack, offset, stored_bytes, plain_bytes, codec)

    def _add_rows(self, packs: Sequence[IndexedPack], rows: NDArray[np.void]) -> None:
        rows["pack"] += len(self._packs)
        self._packs.extend(packs)
        self._known.update(pack.name for pack in packs)
        self._unsorted.append(rows)

    def sort(self) -> None:
        """Make what was added findable; call once after a series of `add`."""
        if not self._unsorted:
            return
        merged = np.concatenate([self._sorted.records, *self._unsorted])
        # A view, so that large repositories aren't in memory three times, and nothing is lost if this fails.
        self._unsorted = [merged[len(self._sorted.records) :]]
        prefixes = np.frombuffer(merged["id"].tobytes(), ">u8")[::4].astype(np.uint64)
        order = np.argsort(prefixes, kind="stable")
        # One assignment: threads that look up meanwhile see the old pair or the new one.
        self._sorted = _Sorted(merged[order], memoryview(prefixes[order].tobytes()).cast("Q"))
        self._unsorted = []

    def get(self, chunk: bytes) -> Location | None:
        """Where the chunk lies, or None. Of several copies the last one added counts."""
        return self._recent.get(chunk) or next(self._sorted_copies(chunk), None)

    def copies(self, chunk: bytes) -> list[Location]:
        """Everywhere the chunk lies, the last copy added first."""
        recent = self._recent.get(chunk)
        return [*([recent] if recent else []), *self._sorted_copies(chunk)]

    def _sorted_copies(self, chunk: bytes) -> Iterator[Location]:
        prefix = int.from_bytes(chunk[:8], "big")
        rows, prefixes = self._sorted
        low = bisect_left(prefixes, prefix)
        for number in range(bisect_right(prefixes, prefix, low) - 1, low - 1, -1):
            found, pack, offset, stored_bytes, plain_bytes, codec, _ = rows[number].item()
            if found == chunk:
                yield Location(self._packs[pack], offset, stored_bytes, plain_bytes, codec)

    def forget_packs(self, names: set[str]) -> None:
        """Packs that are gone."""

    def add_segment(self, data: bytes, name: str, keys: Keys | None, wanted: Container[str] | None = None) -> None:
        """Fold a segment. Raises `Corrupt`, having changed nothing, when it isn't what its name says."""
        packs, rows = read_segment(data, name, keys)
        unknown = np.array(
            [pack.name not in self._known and (wanted is None or pack.name in wanted) for pack in packs], bool
        )
        if not unknown.any():
            return
        renumber = np.cumsum(unknown) - 1
        rows = rows[unknown[rows["pack"]]]
        rows["pack"] = renumber[rows["pack"]]
        self._add_rows([pack for pack, new in zip(packs, unknown, strict=True) if new], rows)


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
    header = records.canonical(_SegmentHeader([indexed_pack(footer) for footer in footers], sum(map(len, rows))))
    return _HEAD.pack(_MAGIC, 1, len(header)) + header + b"".join(part.tobytes() for part in rows)


def read_segment(data: bytes, name: str, keys: Keys | None) -> tuple[list[IndexedPack], NDArray[np.void]]:
    """The packs and rows of a segment; `Corrupt` when it isn't what its name says."""
    if segment_name(data, keys) != name:
        raise Corrupt(f"index segment {name[:16]} does not have the hash that its name promises.")
    magic, version, header_bytes = _HEAD.unpack_from(data) if len(data) >= _HEAD.size else (b"", 0, 0)
    if magic != _MAGIC or version != 1 or _HEAD.size + header_bytes > len(data):
        raise Corrupt(f"index segment {name[:16]} is not one that this version can read.")
    body = _HEAD.size + header_bytes
    header = records.parse(data[_HEAD.size : body], _SegmentHeader, f"index segment {name[:16]}")
    if header.records * _RECORD.itemsize != len(data) - body:
        raise Corrupt(f"index segment {name[:16]} has not the length that it says.")
    rows = np.frombuffer(data, _RECORD, offset=body).copy()
    if len(rows) and (int(rows["pack"].max()) >= len(header.packs) or int(rows["plain"].max()) > CHUNK_BYTES_MAX):
        raise Corrupt(f"index segment {name[:16]} names packs that it does not list.")
    return header.packs, rows


def segment_name(data: bytes, keys: Keys | None) -> str:
    """The name under `index/` that authenticates a segment."""
    return (blake3.blake3(data, key=keys.id_key) if keys else blake3.blake3(data)).hexdigest()
