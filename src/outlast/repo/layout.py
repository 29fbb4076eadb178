"""What every model-file reader shares: the result types, element widths and a bounded reader. Pure.

A file is hostile until proven otherwise: readers ask for bytes only through `Window`, which refuses
what lies outside the file, and report everything that disagrees with itself as `Malformed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec

ReadAt = Callable[[int, int], bytes]
"""read(offset, length) -> exactly those bytes of the file; fewer only at its end"""

# Bits of one element. The names are those of safetensors, which has neither C32 nor C128.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C32": 32, "C64": 64, "C128": 128,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


class Malformed(Exception):
    """The bytes contradict the format or each other."""


class Span(msgspec.Struct, frozen=True):
    """A run of bytes of the file that holds one tensor or storage.

    `item_bytes` is the width of its elements (for complex ones of a component): 1, 2, 4 or 8;
    0 where it is unknown or there are no such elements (quantised blocks).
    """

    offset: int
    length: int
    item_bytes: int


class Tensor(msgspec.Struct, frozen=True):
    """A named tensor and where its elements lie in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """of the first byte of element [0, ..., 0]"""
    length: int
    """bytes of the tensor in row-major order; of a quantised one, its stored bytes"""
    strides: tuple[int, ...] | None = None
    """in elements, only where the elements do not lie in row-major order end to end"""

    @property
    def reach_bytes(self) -> int:
        """From the first element to the end of the last one in the file."""
        if self.strides is None or not self.length:
            return self.length
        steps = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return (steps + 1) * DTYPE_BITS[self.dtype] // 8


class Window:
    """Reads of a file of known size that keeps the last piece read, to answer small requests from it."""

    def __init__(self, read: ReadAt, size: int) -> None:
        self.size = size
        self._read = read
        self._start = 0
        self._piece = b""

    def get(self, offset: int, length: int, *, ahead: int = 0, behind: int = 0) -> bytes:
        """Exactly these bytes; on a miss also up to `behind` bytes before and `ahead` after, if they can be read."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise Malformed("outside the file")
        at = offset - self._start
        if at < 0 or at + length > len(self._piece):
            start = max(0, offset - behind)
            end = min(self.size, offset + length + ahead)
            try:
                self._piece = self._read(start, end - start)
            except Exception:  # what lies around may be damaged, and nobody needs that
                if end - start == length:
                    raise
                start, end = offset, offset + length
                self._piece = self._read(start, length)
            self._start = start
            at = offset - start
            if len(self._piece) != end - start:
                raise Malformed("the file is shorter than its size")
        return self._piece[at : at + length]

    def get_many(self, ranges: Sequence[tuple[int, int]], *, gap: int = 4096, limit: int = 1 << 20) -> list[bytes]:
        """The bytes of ascending (offset, length) ranges; close ones are read at once."""
        pieces: list[bytes] = []
        first = 0
        while first < len(ranges):
            start, length = ranges[first]
            end, after = start + length, first + 1
            while after < len(ranges):
                offset, length = ranges[after]
                if not start <= offset <= end + gap or offset + length > min(start + limit, self.size):
                    break
                end, after = max(end, offset + length), after + 1
            piece = self.get(start, end - start)
            pieces += [piece[offset - start : offset - start + length] for offset, length in ranges[first:after]]
            first = after
        return pieces


def item_bytes(dtype: str) -> int:
    """`Span.item_bytes` of a dtype; 0 for packed, quantised and unknown ones.

    >>> item_bytes("BF16"), item_bytes("C64"), item_bytes("Q4_K")
    (2, 4, 0)
    """
    bits = DTYPE_BITS.get(dtype, 0)
    if dtype.startswith("C"):
        bits //= 2
    return bits // 8 if bits % 8 == 0 else 0


def element_count(shape: Iterable[int], limit: int) -> int:
    """The product of a shape; `Malformed` when a dimension is negative or the product exceeds `limit`.

    The limit is applied while multiplying, so a million huge dimensions don't become one huge number.
    """
    dimensions = tuple(shape)
    if min(dimensions, default=1) < 0:
        raise Malformed("a negative dimension")
    if 0 in dimensions:
        return 0
    count = 1
    for dimension in dimensions:
        count *= dimension
        if count > limit:
            raise Malformed("more elements than the file can hold")
    return count


def merge_spans(found: Iterable[Span], size: int) -> list[Span]:
    """Sorted spans inside the file: one that occurs twice (tied tensors) once, an empty one never.

    Raises `Malformed` when two overlap in part or one reaches outside the file.
    """
    by_place: dict[tuple[int, int], Span] = {}
    for span in found:
        if span.length > 0:
            by_place.setdefault((span.offset, span.length), span)
    spans = [by_place[place] for place in sorted(by_place)]
    end = 0
    for span in spans:
        if span.offset < end:
            raise Malformed("overlapping tensors")
        end = span.offset + span.length
    if end > size:
        raise Malformed("a tensor outside the file")
    return spans
