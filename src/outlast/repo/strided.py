"""Elements that lie apart in a file, gathered into row-major order in bounded memory. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from outlast.repo.layout import DTYPE_BITS, ReadAt, Tensor

_BLOCK_BYTES = 32 << 20
_SPARSE_FACTOR = 4
"""A read may bring this many times the bytes that are needed before it is split."""
_READ_BYTES_MIN = 64 << 10

_Box = tuple[int, tuple[int, ...]]  # offset in bytes, shape


def gather(read: ReadAt, tensor: Tensor, piece_bytes: int) -> Iterator[bytes]:
    """The elements of a tensor with strides, in pieces of at most `piece_bytes`."""
    assert tensor.strides is not None
    item = DTYPE_BITS[tensor.dtype] // 8
    if tensor.length == 0:
        return
    steps = tuple(stride * item for stride in tensor.strides)
    reach = _reach(tensor.shape, steps, item)
    if reach <= _BLOCK_BYTES:
        # Everything is read once; a view that repeats elements is only unfolded piece by piece.
        source = read(tensor.offset, reach)
        for offset, shape in _boxes((tensor.offset, tensor.shape), steps, piece_bytes // item):
            view = _view(source, offset - tensor.offset, shape, steps[-len(shape) :] if shape else (), item)
            yield view.tobytes()
        return
    for offset, shape in _boxes((tensor.offset, tensor.shape), steps, _BLOCK_BYTES // item):
        block = np.empty(shape, dtype=f"V{item}")
        _fill(read, block, offset, steps[len(steps) - len(shape) :], item)
        flat = block.reshape(-1)
        for start in range(0, flat.size, piece_bytes // item):
            yield flat[start : start + piece_bytes // item].tobytes()


def _reach(shape: tuple[int, ...], steps: tuple[int, ...], item: int) -> int:
    """Bytes from the first byte of the first element to the last of the farthest one."""
    return sum((size - 1) * step for size, step in zip(shape, steps, strict=True)) + item


def _view(source: bytes, offset: int, shape: tuple[int, ...], steps: tuple[int, ...], item: int) -> NDArray[np.void]:
    # The caller has read `_reach` bytes, so the view stays inside the buffer.
    start = np.frombuffer(source, dtype=f"V{item}", count=1, offset=offset)
    return as_strided(start, shape=shape, strides=steps, writeable=False)


def _boxes(box: _Box, steps: tuple[int, ...], count_max: int) -> Iterator[_Box]:
    """Cut a box into boxes of at most `count_max` elements that follow one another in row-major order.

    A box may have lost leading dimensions; its steps are the last ones.
    """
    offset, shape = box
    if prod(shape) <= count_max:
        yield box
        return
    row = prod(shape[1:])
    step = steps[len(steps) - len(shape)]
    if row > count_max:
        for at in range(shape[0]):
            yield from _boxes((offset + at * step, shape[1:]), steps, count_max)
        return
    rows = count_max // row
    for at in range(0, shape[0], rows):
        yield offset + at * step, (min(rows, shape[0] - at), *shape[1:])


def _fill(read: ReadAt, block: NDArray[np.void], offset: int, steps: tuple[int, ...], item: int) -> None:
    """Read a block, halving the dimension that reaches farthest until a read is dense or small."""
    shape = block.shape
    reach = _reach(shape, steps, item)
    if reach <= max(_READ_BYTES_MIN, min(_BLOCK_BYTES, _SPARSE_FACTOR * block.size * item)):
        block[...] = _view(read(offset, reach), 0, shape, steps, item)
        return
    axis = max(range(len(shape)), key=lambda each: (shape[each] - 1) * steps[each])
    half = shape[axis] // 2
    head = [slice(None)] * len(shape)
    tail = head.copy()
    head[axis], tail[axis] = slice(0, half), slice(half, None)
    _fill(read, block[tuple(head)], offset, steps, item)
    _fill(read, block[tuple(tail)], offset + half * steps[axis], steps, item)
