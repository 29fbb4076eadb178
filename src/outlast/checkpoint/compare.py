"""What differs between two checkpoints: each tensor, by how much, and every other value. Torch is not needed.

Tensors whose chunks are the same are not read. The others are read piece by piece, and compared as numbers of 64 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import blake3
import msgspec
import numpy as np

from outlast.checkpoint import tree_text
from outlast.checkpoint.inventory import Held, RankFiles, rank_files
from outlast.checkpoint.state_file import RNG
from outlast.checkpoint.tree_text import ValueChange
from outlast.errors import Refused
from outlast.records import Snapshot
from outlast.repo.chunker import TENSOR_BYTES_MIN
from outlast.repo.layout import item_bytes
from outlast.repo.repository import Repository

_PIECE_BYTES = 4 << 20
_ENVIRONMENT = "environment"

NUMBERS = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "u1", "BF16": "<u2",
}  # fmt: skip


class TensorSide(msgspec.Struct):
    """A tensor that only one of the two has."""

    key: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    rank: int | None = None


class TensorReshaped(msgspec.Struct):
    """One whose type or shape is another."""

    key: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    dtype_before: str
    shape_before: tuple[int, ...]
    rank: int | None = None


class TensorChange(msgspec.Struct):
    """One whose elements differ. Norms are Euclidean, over what is finite on both sides; None: not worked out."""

    key: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    elements: int
    elements_changed: int = 0
    norm_of_change: float | None = None
    norm_before: float | None = None
    relative: float | None = None
    """norm of the change / norm before"""
    largest: float | None = None
    """of the changes of single elements"""
    not_finite: int = 0
    """elements that are infinite or no number afterwards"""
    rank: int | None = None
    """None: it is the same on all ranks"""


class PartChange(msgspec.Struct):
    """A value that is no tensor."""

    key: str
    path: str
    before: str | None
    after: str | None
    rank: int | None = None


class Comparison(msgspec.Struct):
    """`unchanged` counts tensors."""

    before: str
    after: str
    step_before: int
    step_after: int
    unchanged: int = 0
    unchanged_bytes: int = 0
    changed: list[TensorChange] = []
    added: list[TensorSide] = []
    removed: list[TensorSide] = []
    reshaped: list[TensorReshaped] = []
    values: list[PartChange] = []
    environment: list[ValueChange] = []
    notes: list[str] = []


def compare(repository: Repository, before: Snapshot, after: Snapshot) -> Comparison:
    """Raises `Corrupt` for what is damaged, `Refused` for what is no checkpoint of a `Run`."""
    olds, news = rank_files(repository, before), rank_files(repository, after)
    for each, ranks in ((before, olds), (after, news)):
        if not ranks:
            raise Refused(f"snapshot {each.id[:8]} is no checkpoint that a Run saved.")
    found = Comparison(before.id, after.id, olds[0].described.step, news[0].described.step)
    if len(olds) != len(news):
        found.notes.append(
            f"{len(olds)} ranks saved the one, {len(news)} the other: what is sharded is told by the part of rank 0."
        )
        olds, news = olds[:1], news[:1]
    first: dict[tuple[str, str], object] = {}
    for old, new in zip(olds, news, strict=True):
        rank = new.rank if len(news) > 1 else None
        _compare_rank(old, new, rank, first, found)
        found.values += list(_values(old, new, rank, found.values))
    facts: list[Any] = [each[0].described.facts.get(_ENVIRONMENT, {}) for each in (olds, news)]
    found.environment = tree_text.differences(*facts)
    return found


def _compare_rank(
    old: RankFiles, new: RankFiles, rank: int | None, first: dict[tuple[str, str], object], found: Comparison
) -> None:
    """`first`: what was compared on rank 0; the same once more is not told."""
    before = dict(old.tensors())
    for (key, name), held in new.tensors():
        tensor = held.tensor
        was = before.pop((key, name), None)
        if _is_told((key, name), was, held, rank, first):
            continue
        if was is None:
            found.added.append(TensorSide(key, name, tensor.dtype, tensor.shape, tensor.length, rank))
        elif (was.tensor.dtype, was.tensor.shape) != (tensor.dtype, tensor.shape):
            found.reshaped.append(
                TensorReshaped(key, name, tensor.dtype, tensor.shape, was.tensor.dtype, was.tensor.shape, rank)
            )
        elif was.pieces() != held.pieces() and (change := _change(key, name, was, held)) is not None:
            change.rank = rank
            found.changed.append(change)
        else:
            found.unchanged += 1
            found.unchanged_bytes += tensor.length
    for (key, name), was in before.items():
        tensor = was.tensor
        if _is_told((key, name), was, None, rank, first):
            continue
        found.removed.append(TensorSide(key, name, tensor.dtype, tensor.shape, tensor.length, rank))


def _is_told(
    which: tuple[str, str], was: Held | None, now: Held | None, rank: int | None, first: dict[tuple[str, str], object]
) -> bool:
    """Whether it is on this rank what it is on rank 0, before and after, as everything is that is replicated."""
    if rank is None:
        return False
    both = tuple(None if each is None else _content(each) for each in (was, now))
    return first.setdefault(which, both) == both and rank > 0


def _content(held: Held) -> object:
    """Equal for equal content. Small tensors share a chunk with others, so theirs are read."""
    if held.tensor.length >= TENSOR_BYTES_MIN:
        return held.pieces()
    return blake3.blake3(held.content.read(held.tensor.offset, held.tensor.length)).digest()


def _change(key: str, name: str, was: Held, now: Held) -> TensorChange | None:
    """None: the same bytes, in other chunks."""
    tensor = now.tensor
    change = TensorChange(key, name, tensor.dtype, tensor.shape, math.prod(tensor.shape))
    is_number = tensor.dtype in NUMBERS and key != RNG
    of_change = of_before = largest = 0.0
    for old, new in _pieces(was, now):
        bits = _bits(tensor.dtype)
        changed = np.frombuffer(old, bits) != np.frombuffer(new, bits)
        change.elements_changed += int(np.count_nonzero(changed))
        if not is_number:
            continue
        a, b = numbers(old, tensor.dtype), numbers(new, tensor.dtype)
        finite = np.isfinite(a) & np.isfinite(b)
        change.not_finite += int(np.count_nonzero(~np.isfinite(b)))
        by = np.where(finite, b, 0.0) - np.where(finite, a, 0.0)
        of_change += float(np.dot(by, by))
        of_before += float(np.sum(np.square(a, where=finite, out=np.zeros_like(a))))
        largest = max(largest, float(np.abs(by).max(initial=0.0)))
    if not change.elements_changed:
        return None
    if is_number:
        change.norm_of_change, change.norm_before, change.largest = map(
            _finite, (math.sqrt(of_change), math.sqrt(of_before), largest)
        )
        change.relative = _finite(math.sqrt(of_change / of_before)) if of_before else None
    return change


def _pieces(was: Held, now: Held) -> Iterator[tuple[bytes, bytes]]:
    for start in range(0, now.tensor.length, _PIECE_BYTES):
        length = min(_PIECE_BYTES, now.tensor.length - start)
        yield was.content.read(was.tensor.offset + start, length), now.content.read(now.tensor.offset + start, length)


def _bits(dtype: str) -> str:
    width = item_bytes(dtype)
    return f"<u{width}" if width in (1, 2, 4, 8) else "u1"


def numbers(data: bytes | memoryview, dtype: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The elements, as numbers of 64 bits. Not of types of 8 bits with a floating point, which numpy lacks."""
    found = np.frombuffer(data, NUMBERS[dtype])
    if dtype == "BF16":  # the upper half of a float32
        found = (found.astype(np.uint32) << 16).view(np.float32)
    return found.astype(np.float64)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _values(old: RankFiles, new: RankFiles, rank: int | None, told: list[PartChange]) -> Iterator[PartChange]:
    of_first = {(each.key, each.path, each.before, each.after) for each in told if rank}
    before, after = old.described.parts, new.described.parts
    for key in [*after, *(key for key in before if key not in after)]:
        if key not in before or key not in after:
            has = [parts[key][0] if key in parts else None for parts in (before, after)]
            changes = [ValueChange("", *has)]
        else:
            changes = tree_text.differences(before[key][1], after[key][1])
        for each in changes:
            if (key, each.path, each.before, each.after) not in of_first:
                yield PartChange(key, each.path, each.before, each.after, rank)
