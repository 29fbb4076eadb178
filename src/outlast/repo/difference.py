"""The exact difference of two blocks of numbers, and its undoing.

Elements are taken as unsigned integers of w = 2, 4 or 8 bytes, little-endian, whatever they mean. What one block has
to be increased by to become the other, modulo 2**(8 w), is exact for every bit pattern, NaNs, signed zeros and
denormals included; a difference of floats would not be. An optimizer's step moves a weight by few units in the last
places, so these numbers are small, of either sign. They are stored folded, d -> 2 d for d >= 0 and -2 d - 1 for
d < 0, so that the upper bytes of all small ones are zero: the byte planes of `codec.py` then lie at rest.

Against XOR, which is as exact, that saves 2 to 3 % of an AdamW state in fp32 and 8 to 9 % in bf16: a carry flips many
bits, and is one unit here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ITEM_BYTES = (2, 4, 8)
PARTS_MAX = 8
"""of a sum, in a manifest: one block and up to seven differences"""

_AT_ONCE_BYTES = 128 << 10
"""what a core's own cache holds several of: twice as fast as whole blocks"""

Bytes = NDArray[np.uint8]


def difference(new: bytes | memoryview, old: Bytes, item_bytes: int) -> Bytes:
    """The folded difference. Both blocks have the same number of whole elements."""
    wide, narrow = np.dtype(f"<u{item_bytes}"), np.dtype(f"<i{item_bytes}")
    result = np.empty(len(new), np.uint8)
    unit = _AT_ONCE_BYTES
    for at in range(0, len(new), unit):
        found = result[at : at + unit].view(wide)
        np.subtract(np.frombuffer(new[at : at + unit], wide), old[at : at + unit].view(wide), out=found)
        sign = found.view(narrow) >> (8 * item_bytes - 1)
        np.left_shift(found, 1, out=found)
        np.bitwise_xor(found, sign.view(wide), out=found)
    return result


def add(total: Bytes, folded: bytes | memoryview, item_bytes: int) -> None:
    """Increase `total` by a folded difference of the same length, in place. The order of additions doesn't matter."""
    wide = np.dtype(f"<u{item_bytes}")
    unit = _AT_ONCE_BYTES
    room = np.empty(unit // item_bytes, wide)
    half = np.empty_like(room)
    for at in range(0, len(total), unit):
        part = np.frombuffer(folded[at : at + unit], wide)
        to, sign, size = total[at : at + unit].view(wide), room[: len(part)], half[: len(part)]
        np.bitwise_and(part, 1, out=sign)
        np.negative(sign, out=sign)
        np.right_shift(part, 1, out=size)
        np.bitwise_xor(size, sign, out=size)
        np.add(to, size, out=to)
