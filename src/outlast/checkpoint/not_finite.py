"""How many elements of a tensor are no number or infinite, whatever its type. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import msgspec
import numpy as np

from outlast.repo.layout import DTYPE_BITS

_BLOCK = 1 << 16


class _Bits(NamedTuple):
    """How a type of floats says it: all bits of the exponent are set, and of the fraction some, or none."""

    numbers: str
    sign: int
    exponent: int
    fraction: int


# IEEE 754 binary64, binary32 and binary16; bfloat16; OCP 8-bit floating point (E5M2).
_WITH_INFINITY = {
    "F64": _Bits("<u8", 1 << 63, 0x7FF << 52, (1 << 52) - 1),
    "F32": _Bits("<u4", 1 << 31, 0xFF << 23, (1 << 23) - 1),
    "F16": _Bits("<u2", 1 << 15, 0x1F << 10, (1 << 10) - 1),
    "BF16": _Bits("<u2", 1 << 15, 0xFF << 7, (1 << 7) - 1),
    "F8_E5M2": _Bits("u1", 1 << 7, 0x1F << 2, 3),
}
_OF_COMPLEX = {"C128": "F64", "C64": "F32", "C32": "F16"}
# Types without an infinity: (the bits that count, what they are in what is no number).
_WITHOUT_INFINITY = {
    "F8_E4M3": (0x7F, 0x7F),
    "F8_E4M3FNUZ": (0xFF, 0x80),
    "F8_E5M2FNUZ": (0xFF, 0x80),
    "F8_E8M0": (0xFF, 0xFF),
}


class NotFinite(msgspec.Struct):
    """What of a tensor is not finite."""

    elements: int = 0
    nan: int = 0
    above: int = 0
    """plus infinity"""
    below: int = 0
    """minus infinity"""
    others_alike: bool = True
    """All finite elements are one and the same."""

    @property
    def is_mask(self) -> bool:
        """Whether it is of the kind that models have on purpose: minus infinity and one other value, or a bound."""
        if self.nan:
            return False
        return self.elements == 1 or (not self.above and self.others_alike)

    def __str__(self) -> str:
        infinite = self.above + self.below
        told = [f"{self.nan:,} are NaN"] if self.nan else []
        told += [f"{infinite:,} are infinite"] if infinite else []
        return f"of {self.elements:,} elements {' and '.join(told)}"


def is_float(dtype: str) -> bool:
    """Whether `count` can tell what of such a tensor is not finite."""
    return dtype in _WITH_INFINITY or dtype in _OF_COMPLEX or dtype in _WITHOUT_INFINITY


def count(dtype: str, pieces: Callable[[], Iterable[bytes]]) -> NotFinite | None:
    """What of a tensor is not finite; None where all is. `pieces` gives its bytes, once more where it has to."""
    elements = nan = above = below = 0
    whole = _OF_COMPLEX.get(dtype, dtype)
    for piece in pieces():
        elements += len(piece) * 8 // DTYPE_BITS[dtype]
        if whole in _WITHOUT_INFINITY:
            mask, what = _WITHOUT_INFINITY[whole]
            values = np.frombuffer(piece, "u1")
            for start in range(0, len(values), _BLOCK):
                nan += int(np.count_nonzero((values[start : start + _BLOCK] & mask) == what))
            continue
        bits = _WITH_INFINITY[whole]
        odd = _odd(np.frombuffer(piece, bits.numbers), bits)
        infinite = odd[(odd & bits.fraction) == 0]
        nan += len(odd) - len(infinite)
        negative = int(np.count_nonzero(infinite & bits.sign))
        below, above = below + negative, above + len(infinite) - negative
    if not nan + above + below:
        return None
    found = NotFinite(elements, nan, above, below)
    if below and not nan + above:
        found.others_alike = _are_alike(_WITH_INFINITY[whole], pieces())
    return found


def _odd(values: np.ndarray[Any, Any], bits: _Bits) -> np.ndarray[Any, Any]:
    """Those that are not finite. Mostly there are none, which the largest exponent of a block tells."""
    found = []
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK]
        if (block & bits.exponent).max() == bits.exponent:
            found.append(block[_is_odd(block, bits)])
    return np.concatenate(found) if found else values[:0]


def _is_odd(values: np.ndarray[Any, Any], bits: _Bits) -> np.ndarray[Any, Any]:
    odd: np.ndarray[Any, Any] = (values & bits.exponent) == bits.exponent
    return odd


def _are_alike(bits: _Bits, pieces: Iterable[bytes]) -> bool:
    first = None
    for piece in pieces:
        values = np.frombuffer(piece, bits.numbers)
        finite = values[~_is_odd(values, bits)]
        if len(finite):
            first = finite[0] if first is None else first
            if (finite != first).any():
                return False
    return True
