"""The layout of a pack: header, payloads, and a footer that describes them.

All integers are little-endian.

    header   64 B   magic "OUTLPACK", version u16, flags u16 (1: encrypted), key epoch u32, salt 32 B, 16 zero bytes
    payloads        stored bytes of chunks; raw, unencrypted ones of 64 KiB and more start on a multiple of 4096
    table           a record per chunk (84 B), in order of offset, then a 32-byte base id for each delta record
    trailer  128 B  copy of the header, record count u32, base count u32, table offset u64,
                    BLAKE3 of everything from the table to here (with the header copy), magic "OUTLFOOT", 8 zero bytes

    record          chunk id 32 B, BLAKE3 of the stored bytes 32 B, offset u64, stored bytes u32, plain bytes u32,
                    codec u8, 3 zero bytes

The pack's name is the trailer's hash in hex. It commits to the table and so to every stored byte:
a host without keys can verify a pack, and a pack alone is enough to rebuild the index. The salt
makes names unique per upload, so a late delete never hits a later upload of the same chunks.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from outlast.errors import Corrupt
from outlast.repo import codec as codecs
from outlast.repo.seal import TAG_BYTES, ChunkSealer, Keys, digest

HEADER = struct.Struct("<8sHHI32s16x")
TRAILER = struct.Struct("<64sIIQ32s8s8x")
RECORD = np.dtype(
    [
        ("id", "V32"),
        ("stored_hash", "V32"),
        ("offset", "<u8"),
        ("stored", "<u4"),
        ("plain", "<u4"),
        ("codec", "u1"),
        ("pad", "V3"),
    ]
)
_RECORD = struct.Struct("<32s32sQIIB3x")
_MAGIC = b"OUTLPACK"
_FOOT = b"OUTLFOOT"
_ENCRYPTED = 1
_SPARE_BYTES = 8
ALIGN_BYTES = 4096
ALIGN_MIN_BYTES = 64 << 10
CHUNK_BYTES_MAX = 32 << 20


class EncodedChunk(msgspec.Struct, frozen=True, gc=False):
    """A chunk ready to be laid into a pack."""

    id: bytes
    codec: int
    plain_bytes: int
    encoded: bytes | memoryview


class Footer(msgspec.Struct, frozen=True):
    """A parsed footer. `records` is an array of `RECORD`, in order of offset."""

    name: str
    epoch: int
    encrypted: bool
    salt: bytes
    records: NDArray[np.void]


class BuiltPack(msgspec.Struct, frozen=True):
    name: str
    parts: list[bytes | bytearray | memoryview]
    bytes: int
    footer: Footer


def object_name(name: str) -> str:
    """The object that holds a pack."""
    return f"packs/{name[:2]}/{name}"


def build(chunks: list[EncodedChunk], keys: Keys | None, salt: bytes) -> BuiltPack:
    """Lay out a pack. Consumes `chunks` from the front, so that sealing doesn't hold them twice."""
    epoch = keys.epoch if keys else 0
    header = HEADER.pack(_MAGIC, 1, _ENCRYPTED if keys else 0, epoch, salt)
    sealer = ChunkSealer(keys, epoch, salt) if keys else None
    parts: list[bytes | bytearray | memoryview] = [header]
    records: list[bytes] = []
    at = len(header)
    chunks.reverse()
    while chunks:
        chunk = chunks.pop()
        stored: bytes | bytearray | memoryview = chunk.encoded
        if sealer is not None:
            stored = sealer.seal(chunk.encoded, chunk.id, chunk.codec, chunk.plain_bytes, at)
        elif chunk.codec == codecs.RAW and len(stored) >= ALIGN_MIN_BYTES and at % ALIGN_BYTES:
            padding = bytes(-at % ALIGN_BYTES)
            parts.append(padding)
            at += len(padding)
        # The id of a raw chunk in the clear is the hash of its stored bytes already.
        plain_raw = sealer is None and chunk.codec == codecs.RAW
        stored_hash = chunk.id if plain_raw else digest(memoryview(stored))
        records.append(_RECORD.pack(chunk.id, stored_hash, at, len(stored), chunk.plain_bytes, chunk.codec))
        parts.append(stored)
        at += len(stored)
    table = b"".join(records)
    hashed = digest(table + header + struct.pack("<IIQ", len(records), 0, at))
    parts += [table, TRAILER.pack(header, len(records), 0, at, hashed, _FOOT)]
    footer = Footer(hashed.hex(), epoch, keys is not None, salt, np.frombuffer(table, RECORD))
    return BuiltPack(hashed.hex(), parts, at + len(table) + TRAILER.size, footer)


def footer_bytes(tail: bytes, name: str, size: int) -> int:
    """How many bytes at the end of the pack are table and trailer, judged by the trailer alone."""
    if len(tail) < TRAILER.size or size < HEADER.size + TRAILER.size:
        raise Corrupt(f"pack {name[:16]} is {size} bytes long, too short to be one.")
    _, count, bases, table_offset, _, magic = TRAILER.unpack(tail[-TRAILER.size :])
    length = count * RECORD.itemsize + bases * 32 + TRAILER.size
    spare = tail[-_SPARE_BYTES:]
    if magic != _FOOT or any(spare) or table_offset < HEADER.size or table_offset + length != size:
        raise Corrupt(f"pack {name[:16]} has no valid footer.")
    return int(length)


def parse_footer(tail: bytes, name: str, size: int) -> Footer:
    """Parse and verify a footer from the last bytes of a pack of `size` bytes.

    Every record is checked to lie between header and table and to claim a sane plain length.
    """
    length = footer_bytes(tail, name, size)
    if length > len(tail):
        raise Corrupt(f"pack {name[:16]}: {length} bytes of footer are needed, {len(tail)} were read.")
    header, count, bases, table_offset, hashed, _ = TRAILER.unpack(tail[-TRAILER.size :])
    table = tail[-length : -TRAILER.size]
    if digest(table + header + struct.pack("<IIQ", count, bases, table_offset)) != hashed or hashed.hex() != name:
        raise Corrupt(f"the footer of pack {name[:16]} does not have the hash that its name promises.")
    magic, version, flags, epoch, salt = HEADER.unpack(header)
    if magic != _MAGIC or version != 1 or flags & ~_ENCRYPTED or bases:
        raise Corrupt(f"pack {name[:16]} is of version {version}, flags {flags}, which this version can't read.")
    records = np.frombuffer(table, RECORD, count=count)
    ends = records["offset"] + records["stored"]
    if count and (
        int(records["offset"].min()) < HEADER.size
        or int(records["offset"].max()) > table_offset
        or int(ends.max()) > table_offset
        or bool((records["offset"][1:] < ends[:-1]).any())
        or int(records["plain"].max()) > CHUNK_BYTES_MAX
        or int(records["stored"].max()) > CHUNK_BYTES_MAX + TAG_BYTES
    ):
        raise Corrupt(f"the footer of pack {name[:16]} describes chunks outside of it.")
    return Footer(name, epoch, bool(flags & _ENCRYPTED), salt, records)


class DamagedFooter:
    """What a footer without the right hash may still say, for a repair alone.

    `front`: the pack's first bytes, `tail`: its end; `size`, `count`: bytes and records by the log, so that
    nothing is needed that the trailer says of them. Raises `Corrupt` where nothing can be believed.
    """

    def __init__(self, front: bytes, tail: bytes, name: str, size: int, count: int) -> None:
        table_offset = size - TRAILER.size - count * RECORD.itemsize
        if table_offset < HEADER.size or len(front) < HEADER.size or len(tail) < size - table_offset:
            raise Corrupt(f"pack {name[:16]} has no room for the {count} chunks that the log tells of.")
        self._name, self._size, self._table_offset = name, size, table_offset
        self._table = tail[table_offset - size : -TRAILER.size]
        copies = [tail[-TRAILER.size :][: HEADER.size], front[: HEADER.size]]
        if digest(self._table + copies[1] + struct.pack("<IIQ", count, 0, table_offset)).hex() == name:
            copies.reverse()  # then it is the trailer's copy that is damaged
        for header in copies:
            magic, version, flags, self._epoch, self._salt = HEADER.unpack(header)
            if magic == _MAGIC and version == 1 and not flags & ~_ENCRYPTED:
                break
        else:
            raise Corrupt(f"pack {name[:16]} has no header that this version can read.")
        self._encrypted = bool(flags & _ENCRYPTED)
        self._trailer = TRAILER.pack(header, count, 0, table_offset, bytes.fromhex(name), _FOOT)

    def records(self) -> Footer:
        """Those within bounds. None is proven: what is read by one is right when it has its chunk's id."""
        records, end = np.frombuffer(self._table, RECORD), self._table_offset
        inside = (records["offset"] >= HEADER.size) & (records["offset"] <= end)
        inside &= records["offset"] + records["stored"] <= end
        sane = (records["plain"] <= CHUNK_BYTES_MAX) & (records["stored"] <= CHUNK_BYTES_MAX + TAG_BYTES)
        return Footer(self._name, self._epoch, self._encrypted, self._salt, records[inside & sane])

    def flipped_back(self, sound: set[bytes]) -> Footer | None:
        """The footer as it was written, if a single bit was flipped in the one record of no `sound` chunk."""
        rows = range(0, len(self._table), RECORD.itemsize)
        doubtful = [at for at in rows if self._table[at : at + 32] not in sound]
        if len(doubtful) != 1:
            return None
        for bit in range(8 * RECORD.itemsize):
            table = bytearray(self._table)
            table[doubtful[0] + bit // 8] ^= 1 << bit % 8
            try:
                return parse_footer(bytes(table) + self._trailer, self._name, self._size)
            except Corrupt:
                continue
        return None


def runs(records: NDArray[np.void]) -> Iterator[tuple[int, NDArray[np.void]]]:
    """Neighbouring records, in runs of up to 8 MiB to read at once: (offset of the first, records)."""
    first = 0
    for number in range(1, len(records) + 1):
        start = int(records[first]["offset"])
        if number == len(records) or int(records[number]["offset"]) + int(records[number]["stored"]) - start > 8 << 20:
            yield start, records[first:number]
            first = number


def are_right(data: memoryview, start: int, records: NDArray[np.void]) -> bool:
    """Whether the bytes of a run, which begin at offset `start`, have the hashes that the records say."""
    return all(
        digest(data[offset - start : offset - start + stored]) == hashed
        for _, hashed, offset, stored, _, _, _ in records.tolist()
    )


def gaps(footer: Footer, size: int) -> Sequence[tuple[int, int]]:
    """Runs (offset, length) between payloads that must be zero: the padding."""
    table_offset = size - TRAILER.size - len(footer.records) * RECORD.itemsize
    ends = [HEADER.size, *(footer.records["offset"] + footer.records["stored"]).tolist()]
    starts = [*footer.records["offset"].tolist(), table_offset]
    return [(end, start - end) for end, start in zip(ends, starts, strict=True) if start > end]
