"""The codecs give back every byte, and treat hostile bytes as damage, never as a crash or a huge allocation."""

from __future__ import annotations

import struct
import tracemalloc
from itertools import product

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.errors import Corrupt
from outlast.repo import codec

WIDTHS = (0, 1, 2, 4, 8)


def weights(count_bytes: int, seed: int = 1) -> bytes:
    """Bytes as fp32 weights have them: noisy mantissas, few exponents."""
    values = np.random.default_rng(seed).normal(0, 0.02, count_bytes // 4 + 1).astype("<f4")
    return values.tobytes()[:count_bytes]


def round_trip(plain: bytes, item_bytes: int, compression: codec.Compression) -> int:
    number, encoded = codec.Encoder(compression).encode(plain, item_bytes)
    assert bytes(codec.decode(number, bytes(encoded), len(plain))) == plain
    return number


@pytest.mark.parametrize("item_bytes", WIDTHS)
def test_every_short_length_comes_back(item_bytes: int) -> None:
    source = weights(1200)
    for length in [*range(301), *range(1000, 1030)]:
        for compression in ("auto", "zstd", "none"):
            round_trip(source[:length], item_bytes, compression)
            round_trip(bytes(length), item_bytes, compression)


@pytest.mark.parametrize("item_bytes", WIDTHS)
@pytest.mark.parametrize("around", [16 << 10, 64 << 10, 128 << 10, 1 << 20])
def test_lengths_around_blocks_come_back(item_bytes: int, around: int) -> None:
    source = weights((1 << 20) + 16)
    for length in range(around - 9, around + 10):
        round_trip(source[:length], item_bytes, "auto")


@given(
    data=st.one_of(
        st.binary(max_size=2000),
        st.lists(st.floats(width=32, allow_nan=True), max_size=500).map(
            lambda values: np.array(values, "<f4").tobytes()
        ),
        st.integers(0, 5000).map(bytes),
        st.builds(lambda part, times: part * times, st.binary(min_size=1, max_size=40), st.integers(1, 200)),
    ),
    item_bytes=st.sampled_from(WIDTHS),
    compression=st.sampled_from(["auto", "zstd", "none"]),
)
@settings(max_examples=300, deadline=None)
def test_anything_comes_back(data: bytes, item_bytes: int, compression: codec.Compression) -> None:
    round_trip(data, item_bytes, compression)


def test_weights_are_stored_as_planes_and_smaller() -> None:
    plain = weights(1 << 20)
    number, encoded = codec.Encoder("auto").encode(plain, 4)
    assert number == codec.PLANES
    assert len(encoded) < 0.95 * len(plain)


@pytest.mark.parametrize("dtype", ["<u2", "<f2", "<f4"])
def test_rows_that_repeat_are_stored_about_once(dtype: str) -> None:
    row = (np.random.default_rng(2).normal(0, 100, 1000)).astype(dtype)
    plain = np.tile(row, 500).tobytes()
    number, encoded = codec.Encoder("auto").encode(plain, row.itemsize)
    assert number == codec.PLANES
    assert len(encoded) < 0.02 * len(plain)


def test_noise_is_stored_as_it_is() -> None:
    plain = np.random.default_rng(3).bytes(1 << 20)
    assert round_trip(plain, 4, "auto") == codec.RAW
    assert round_trip(plain, 0, "zstd") == codec.RAW


def test_none_never_touches_a_byte() -> None:
    assert codec.Encoder("none").encode(bytes(1 << 20), 4) == (codec.RAW, bytes(1 << 20))


@given(number=st.integers(0, 255), garbage=st.binary(max_size=400), plain_bytes=st.integers(0, 5000))
@settings(max_examples=500, deadline=None)
def test_garbage_is_corrupt_or_has_the_right_length(number: int, garbage: bytes, plain_bytes: int) -> None:
    try:
        assert len(codec.decode(number, garbage, plain_bytes)) == plain_bytes
    except Corrupt:
        pass


@pytest.mark.parametrize(("item_bytes", "compression"), [(4, "auto"), (2, "auto"), (8, "auto"), (0, "zstd")])
def test_every_damaged_byte_is_corrupt_or_of_the_right_length(item_bytes: int, compression: codec.Compression) -> None:
    plain = weights(4096) if item_bytes else b"all work and no play " * 200
    number, encoded = codec.Encoder(compression).encode(plain, item_bytes)
    assert number != codec.RAW
    encoded = bytes(encoded)
    for at, flip in product(range(len(encoded)), (1, 0x80, 0xFF)):
        damaged = bytearray(encoded)
        damaged[at] ^= flip
        try:
            assert len(codec.decode(number, bytes(damaged), len(plain))) == len(plain)
        except Corrupt:
            pass
    for length in range(len(encoded)):
        try:
            assert len(codec.decode(number, encoded[:length], len(plain))) == len(plain)
        except Corrupt:
            pass


def peak_bytes(number: int, encoded: bytes, plain_bytes: int) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(Corrupt):
            codec.decode(number, encoded, plain_bytes)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_bomb_is_refused_without_its_memory() -> None:
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(256 << 20))
    assert peak_bytes(codec.ZSTD, bomb, 1000) < 1 << 20
    without_size = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(bytes(64 << 20))
    assert peak_bytes(codec.ZSTD, without_size, 1000) < 1 << 20
    plane = struct.pack("<BI", 1, len(bomb))
    assert peak_bytes(codec.PLANES, bytes([2]) + plane + plane + bomb, 1000) < 1 << 20


def test_lying_plane_lengths_are_corrupt() -> None:
    lying = bytes([4]) + struct.pack("<BI", 0, 2**32 - 1) * 3 + bytes(100)
    with pytest.raises(Corrupt):
        codec.decode(codec.PLANES, lying, 4000)
