"""What of a tensor is no number: as the types say themselves, element by element."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from outlast.checkpoint.not_finite import NotFinite, count, is_float

TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu, "C64": torch.complex64,
    "C128": torch.complex128,
}  # fmt: skip


def counted(dtype: str, data: bytes, piece_bytes: int) -> NotFinite:
    def pieces() -> Iterator[bytes]:
        for start in range(0, len(data), piece_bytes):
            yield data[start : start + piece_bytes]

    return count(dtype, pieces) or NotFinite(len(data))


@pytest.mark.parametrize("piece_bytes", [16, 1 << 20])
@pytest.mark.parametrize("dtype", TYPES)
def test_any_bits_are_judged_as_torch_judges_them(dtype: str, piece_bytes: int) -> None:
    """All numbers of 8 and 16 bits; of wider ones, random bits with many odd exponents."""
    width = TYPES[dtype].itemsize
    if width <= 2:
        data = np.arange(1 << (8 * width), dtype=f"<u{width}").tobytes() * (3 if width == 2 else 300)
    else:
        rng = np.random.default_rng(5)
        bits = rng.integers(0, 256, 4096, np.uint8)
        bits[rng.random(4096) < 0.5] = 0xFF
        bits[rng.random(4096) < 0.3] = 0x7F
        bits[rng.random(4096) < 0.3] = 0
        data = bits.tobytes()
    found = counted(dtype, data, piece_bytes)
    values = torch.frombuffer(bytearray(data), dtype=TYPES[dtype])
    parts = torch.view_as_real(values) if values.is_complex() else values.to(torch.float64)
    nan, above, below = ((parts.isnan()), (parts == math.inf), (parts == -math.inf))
    assert (found.nan, found.above, found.below) == tuple(int(each.sum()) for each in (nan, above, below))
    assert found.nan or dtype.startswith("F8") or found.above
    assert is_float(dtype)


def test_masks_and_bounds_are_infinite_on_purpose() -> None:
    inf = math.inf

    def is_mask(*values: float) -> bool:
        return counted("F32", np.array(values, "<f4").tobytes(), 8).is_mask

    assert is_mask(0, -inf, -inf, 0, 0)
    assert is_mask(-inf, -inf, 1, 1, 1)
    assert is_mask(-inf, -inf)
    assert is_mask(inf)
    assert is_mask(-inf)
    assert not is_mask(0, -inf, 0.5, 0)
    assert not is_mask(0, 0, 0.5, -inf)
    assert not is_mask(inf, 0, 0)
    assert not is_mask(inf, -inf, 0)
    assert not is_mask(math.nan)
    assert not is_mask(math.nan, -inf, 0)


def test_whole_numbers_and_what_is_finite_are_fine() -> None:
    assert not is_float("I64")
    assert not is_float("Q4_K")
    assert count("F16", lambda: [np.array([1, -2, 65504], "<f2").tobytes()]) is None
    assert count("F32", list) is None
    assert str(NotFinite(1000, nan=2, below=1)) == "of 1,000 elements 2 are NaN and 1 are infinite"
