"""Spans of a file -> pieces to store: blocks aligned to each tensor, content-defined cuts elsewhere.

A tensor is cut into fixed blocks from its own first byte on, so the same tensor in a `.pt`, a
`.safetensors`, a shard or live memory gives the same chunks, whatever surrounds it. Everything
else is cut by content (FastCDC, Xia et al., IEEE TPDS 2020), so inserted bytes shift nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence

import msgspec
from pyfastcdc import FastCDC

from outlast.records import Chunking, Hole
from outlast.repo.formats import Span

TENSOR_BYTES_MIN = 512
"""Shorter tensors stay inside the opaque run around them: a chunk of their own costs more than it saves."""


class Piece(msgspec.Struct, frozen=True):
    """A run of the file to read. `item_bytes` is 0 unless it is a tensor's; `cut` says that it has
    still to be cut by content, otherwise it is one chunk."""

    offset: int
    length: int
    item_bytes: int
    cut: bool


def pieces(size: int, spans: Sequence[Span] | None, holes: Sequence[Hole], chunking: Chunking) -> Iterator[Piece]:
    """Cover the file from 0 to `size`, without its holes, in order.

    `spans` are sorted and don't overlap. A hole inside a tensor ends the tensor's alignment there.
    """
    starts = [span.offset for span in spans or ()]
    at = 0
    for offset, length in [*holes, (size, 0)]:
        inside = (spans or ())[bisect_left(starts, at) : bisect_left(starts, offset)]
        yield from _extent(at, offset, inside, chunking)
        at = offset + length


def _extent(start: int, end: int, spans: Sequence[Span], chunking: Chunking) -> Iterator[Piece]:
    at = start
    for span in spans:
        if span.offset < at or span.offset + span.length > end or span.length < TENSOR_BYTES_MIN:
            continue
        if span.offset > at:
            yield _opaque(at, span.offset, chunking)
        for offset in range(span.offset, span.offset + span.length, chunking.block_bytes):
            length = min(chunking.block_bytes, span.offset + span.length - offset)
            yield Piece(offset, length, span.item_bytes, cut=False)
        at = span.offset + span.length
    if end > at:
        yield _opaque(at, end, chunking)


def _opaque(start: int, end: int, chunking: Chunking) -> Piece:
    return Piece(start, end - start, 0, cut=end - start > chunking.min_bytes)


def cutter(chunking: Chunking, seed: int) -> Callable[[bytes | memoryview, bool], list[int]]:
    """A function (data, at_end) -> lengths of the chunks at the start of data.

    Without `at_end` the last cut is left out, for it might move once more data is there: give at
    least `2 * max_bytes`, and begin the next call after the sum of the lengths. For one thread.
    """
    fastcdc = FastCDC(
        avg_size=chunking.avg_bytes,
        min_size=chunking.min_bytes,
        max_size=chunking.max_bytes,
        normalized_chunking=2,
        seed=seed,
    )

    def cut(data: bytes | memoryview, at_end: bool) -> list[int]:
        lengths = [chunk.length for chunk in fastcdc.cut_buf(data)]
        return lengths if at_end else lengths[:-1]

    return cut
