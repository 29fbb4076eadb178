"""A pack's footer proves itself: no changed byte, wrong length or lying number gets past it."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.errors import Corrupt
from outlast.repo import codec, pack, seal
from outlast.repo.pack import EncodedChunk

SALT = bytes(range(32))
KEYS = seal.new_keys(b"r" * 16, bytes(range(64)))


def chunk(plain: bytes, keys: seal.Keys | None = None) -> EncodedChunk:
    return EncodedChunk(seal.chunk_id(plain, keys), codec.RAW, len(plain), plain)


def build(sizes: list[int], keys: seal.Keys | None = None, salt: bytes = SALT) -> tuple[pack.BuiltPack, bytes]:
    built = pack.build([chunk(bytes([n % 251]) * size, keys) for n, size in enumerate(sizes)], keys, salt)
    return built, b"".join(built.parts)


@given(
    sizes=st.lists(st.sampled_from([0, 1, 100, 4095, 4096, 65535, 65536, 65537, 70000]), max_size=8),
    sealed=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_what_is_built_parses_and_lies_where_it_says(sizes: list[int], sealed: bool) -> None:
    keys = KEYS if sealed else None
    built, data = build(sizes, keys)
    assert built.bytes == len(data)
    footer = pack.parse_footer(data, built.name, len(data))
    assert (footer.encrypted, footer.salt, len(footer.records)) == (sealed, SALT, len(sizes))
    assert footer.records.tobytes() == built.footer.records.tobytes()
    for row in footer.records:
        stored = data[int(row["offset"]) : int(row["offset"]) + int(row["stored"])]
        assert seal.digest(stored) == row["stored_hash"].tobytes()
        if not sealed and len(stored) >= pack.ALIGN_MIN_BYTES:
            assert int(row["offset"]) % 4096 == 0, "a raw local chunk must be mappable"
    for offset, length in pack.gaps(footer, len(data)):
        assert data[offset : offset + length] == bytes(length)
    covered = sum(length for _, length in pack.gaps(footer, len(data))) + int(footer.records["stored"].sum())
    table = len(sizes) * pack.RECORD.itemsize
    assert covered + pack.HEADER.size + table + pack.TRAILER.size == len(data)


def test_the_salt_makes_every_upload_a_name_of_its_own() -> None:
    assert build([10])[0].name != build([10], salt=b"s" * 32)[0].name


@pytest.mark.parametrize("keys", [None, KEYS], ids=["plain", "sealed"])
def test_every_changed_byte_of_a_footer_is_noticed(keys: seal.Keys | None) -> None:
    built, data = build([5, 70000, 9], keys)
    length = pack.footer_bytes(data, built.name, len(data))
    unnoticed = []
    for at in range(len(data) - length, len(data)):
        for flip in (1, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[at] ^= flip
            try:
                pack.parse_footer(bytes(damaged), built.name, len(data))
                unnoticed.append(at - len(data))
            except Corrupt:
                pass
    assert unnoticed == []


def test_a_pack_that_was_cut_short_is_noticed() -> None:
    built, data = build([5, 9])
    for length in range(len(data)):
        with pytest.raises(Corrupt):
            pack.parse_footer(data[:length], built.name, length)
        with pytest.raises(Corrupt):
            pack.parse_footer(data[len(data) - length :], built.name, length)


def test_another_packs_footer_is_noticed() -> None:
    _, data = build([5, 9])
    other, _ = build([5, 9], salt=b"x" * 32)
    with pytest.raises(Corrupt, match="name"):
        pack.parse_footer(data, other.name, len(data))


@pytest.mark.parametrize(
    ("count", "bases", "table_offset"),
    [
        (2**32 - 1, 0, 64),
        (0, 2**32 - 1, 64),
        (2**32 - 1, 2**32 - 1, 2**64 - 1),
        (1, 0, 2**64 - 1),
        (1, 0, 0),
        (0, 0, 0),
    ],
)
def test_lying_counts_cost_nothing(count: int, bases: int, table_offset: int) -> None:
    built, data = build([5, 9])
    trailer = pack.TRAILER.pack(data[:64], count, bases, table_offset, bytes(32), b"OUTLFOOT")
    lying = data[: -pack.TRAILER.size] + trailer
    with pytest.raises(Corrupt):
        pack.footer_bytes(lying, built.name, len(lying))
    with pytest.raises(Corrupt):
        pack.parse_footer(lying, built.name, len(lying))


def forge(offset: int, stored: int, plain: int, body_bytes: int = 100) -> tuple[bytes, str]:
    """A pack whose footer has a right hash and a record that says these things."""
    header = pack.HEADER.pack(b"OUTLPACK", 1, 0, 0, SALT)
    table = struct.pack("<32s32sQIIB3x", bytes(32), bytes(32), offset, stored, plain, 0)
    at = len(header) + body_bytes
    hashed = seal.digest(table + header + struct.pack("<IIQ", 1, 0, at))
    return header + bytes(body_bytes) + table + pack.TRAILER.pack(header, 1, 0, at, hashed, b"OUTLFOOT"), hashed.hex()


@pytest.mark.parametrize(
    ("offset", "stored", "plain"),
    [
        (0, 10, 10),
        (64, 101, 101),
        (200, 0, 0),
        (2**64 - 10, 20, 20),
        (64, 100, 2**32 - 1),
        (64, 2**32 - 1, 10),
    ],
)
def test_records_that_point_outside_are_refused_even_with_a_right_hash(offset: int, stored: int, plain: int) -> None:
    data, name = forge(offset, stored, plain)
    with pytest.raises(Corrupt, match="outside"):
        pack.parse_footer(data, name, len(data))


def test_a_newer_pack_version_is_named() -> None:
    _, data = build([])
    header = bytearray(data[:64])
    header[8] = 2
    hashed = seal.digest(bytes(header) + struct.pack("<IIQ", 0, 0, 64))
    newer = bytes(header) + pack.TRAILER.pack(bytes(header), 0, 0, 64, hashed, b"OUTLFOOT")
    with pytest.raises(Corrupt, match="version 2"):
        pack.parse_footer(newer, hashed.hex(), len(newer))


def test_payloads_never_overlap() -> None:
    built, _ = build([70000, 3, 65536, 0, 1], KEYS)
    rows = [(int(row["offset"]), int(row["stored"])) for row in built.footer.records]
    assert all(offset + stored <= following for (offset, stored), (following, _) in pairwise(rows))
