"""Read what a plan of torch.distributed.checkpoint asks for: blocks of tensors, out of blocks that were stored.

A block of a tensor that lies in row-major order is, in the file, a few runs of bytes. Those are aimed straight at
the memory of the live tensor where it has the same order; else they pass through memory of bounded size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem

from outlast.checkpoint.dcp_metadata import Description, Place, Shard, dtype_of, volume
from outlast.checkpoint.leaves import DTYPES, rebuild, tensor_bytes
from outlast.checkpoint.tree import Node, decode
from outlast.errors import Corrupt, OutlastError, Refused
from outlast.records import Entry, Snapshot
from outlast.repo import formats
from outlast.repo.content import Content, RecentChunks
from outlast.repo.layout import Tensor
from outlast.repo.repository import Repository

_PASSING_BYTES_MAX = 256 << 20
_RUN_BYTES_MAX = 4 << 20
_NAMES_MAX = 5


class Rows(NamedTuple):
    """Consecutive rows of a stored block, of which some columns are wanted."""

    prefix: tuple[int, ...]
    """index into the block that is wanted, for the dimensions before those below"""
    start: int
    """the first row within the block that is wanted"""
    offset: int
    """in elements, from the first of the stored block to the first of these rows"""
    shape: tuple[int, ...]
    """of what is read: the number of rows, and what is stored of each"""
    columns: tuple[tuple[int, int], ...]
    """(offset, length) of what is wanted, in each dimension but the first"""


def rows(sizes: Sequence[int], offsets: Sequence[int], lengths: Sequence[int], elements_max: int) -> Iterator[Rows]:
    """Cover a block of a row-major tensor of these sizes, with at most `elements_max` elements at once, or one row.

    Of a row that is long and not wanted as a whole only the part is read. Pure.

    >>> list(rows((4, 3), (1, 0), (2, 3), 100))
    [Rows(prefix=(), start=0, offset=3, shape=(2, 3), columns=((0, 3),))]
    """
    if not sizes:
        yield Rows((), 0, 0, (), ())
        return
    row = volume(sizes[1:])
    is_part = any(length != size for length, size in zip(lengths[1:], sizes[1:], strict=True))
    if is_part and row > elements_max:
        for at in range(lengths[0]):
            for inner in rows(sizes[1:], offsets[1:], lengths[1:], elements_max):
                yield inner._replace(prefix=(at, *inner.prefix), offset=inner.offset + (offsets[0] + at) * row)
        return
    columns = tuple(zip(offsets[1:], lengths[1:], strict=True))
    step = max(1, elements_max // max(1, row))
    for at in range(0, lengths[0], step):
        count = min(step, lengths[0] - at)
        yield Rows((), at, (offsets[0] + at) * row, (count, *sizes[1:]), columns)


class _File:
    """A file of tensors, of which the header is read when it is first needed."""

    def __init__(self, entry: Entry, recent: RecentChunks) -> None:
        self.content = Content(entry, recent.get)
        self.lengths = dict(entry.chunks)
        if entry.holes or sum(length for _, length in entry.chunks) != entry.size:
            raise Corrupt(f"the chunks of {entry.path} are not all of it.")

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        entry = self.content.entry
        found = formats.tensors(self.content.read, entry.size)
        if found is None:
            raise Corrupt(f"{entry.path} is no safetensors file.")
        return {each.name: each for each in found}

    def find(self, name: str) -> Tensor:
        found = self.tensors.get(name)
        if found is None:
            raise Corrupt(f"{self.content.entry.path} has no tensor {name!r}.")
        return found


class _Aim(NamedTuple):
    """Memory to fill from a chunk."""

    start: int
    """of the chunk, relative to the first byte of the memory: negative where the chunk begins before it"""
    memory: memoryview
    of: str
    """the tensor"""


class Reading:
    """Reads one checkpoint. Every chunk is verified."""

    def __init__(
        self, repository: Repository, snapshot: Snapshot, described: Description, files: Mapping[str, Entry]
    ) -> None:
        self._repository, self._snapshot, self._described = repository, snapshot, described
        self._recent = RecentChunks(repository)
        self._entries = files
        self._files: dict[str, _File] = {}
        self._aims: dict[str, list[_Aim]] = {}
        self._lengths: dict[str, int] = {}
        self._passing: list[tuple[torch.Tensor, torch.Tensor]] = []
        """(what is read, and the live tensor that it goes to)"""
        self._passing_bytes = 0

    def object(self, name: str) -> object:
        """Raises `Corrupt`."""
        record = self._described.objects.get(name)
        if record is None:
            raise Refused(f"{name} is a tensor in checkpoint {self._snapshot.id[:8]}, and no object.")

        def give(node: Node) -> torch.Tensor:
            file = self._file(record.file)
            found = file.find(str(node.get("name")))
            dtype = DTYPES.get(found.dtype)
            if dtype is None or volume(found.shape) * dtype.itemsize != found.length:
                raise Corrupt(f"{found.name} of {record.file} can't be read.")
            tensor = torch.empty(found.shape, dtype=dtype)
            tensor_bytes(tensor)[:] = file.content.read(found.offset, found.length)
            return rebuild(node, tensor)

        return decode(record.tree, give)

    def tensors(self, items: Sequence[ReadItem], planner: LoadPlanner) -> None:
        """Fill what the planner wants. Raises `Corrupt` with the names of what can't be read; others may be filled."""
        shards = self._shards({item.storage_index.fqn for item in items})
        aimed: list[tuple[ReadItem, torch.Tensor]] = []

        def finish() -> None:
            self._fetch()
            for item, target in aimed:
                planner.commit_tensor(item, target)
            aimed.clear()

        found = [(self._shard(shards, item.storage_index), item) for item in items]
        for shard, item in sorted(found, key=lambda each: (each[0].file, self._stored(each[0]).offset)):
            target = planner.resolve_tensor(item).detach()
            if tuple(target.shape) != tuple(item.lengths):
                raise Refused(
                    f"{item.storage_index.fqn} was to be read as {list(item.lengths)}, but the planner has room for "
                    f"{list(target.shape)}."
                )
            for _ in self._aim(item, shard, target):
                if self._passing_bytes >= _PASSING_BYTES_MAX:
                    finish()
            aimed.append((item, target))
        finish()

    def _shards(self, names: set[str]) -> dict[Place, Shard]:
        tensors = self._described.tensors
        return {(name, tuple(each.offsets)): each for name in names & tensors.keys() for each in tensors[name].shards}

    def _shard(self, shards: Mapping[Place, Shard], index: MetadataIndex) -> Shard:
        tensor = self._described.tensors.get(index.fqn)
        offsets = index.offset if index.offset is not None else [0] * len(tensor.size) if tensor else []
        found = shards.get((index.fqn, tuple(offsets)))
        if found is None:
            raise Refused(f"checkpoint {self._snapshot.id[:8]} has no block of {index.fqn} at {tuple(offsets)}.")
        return found

    def _file(self, path: str) -> _File:
        if path not in self._files:
            entry = self._entries.get(path)
            if entry is None:
                raise Corrupt(f"checkpoint {self._snapshot.id[:8]} has no file {path}.")
            self._files[path] = _File(entry, self._recent)
        return self._files[path]

    def _stored(self, shard: Shard) -> Tensor:
        return self._file(shard.file).find(shard.name)

    def _aim(self, item: ReadItem, shard: Shard, target: torch.Tensor) -> Iterator[None]:
        """Note what is to be read to where, a bounded part at a time."""
        name = item.storage_index.fqn
        stored, dtype = self._stored(shard), dtype_of(self._described.tensors[name], name)
        shape = (*shard.sizes, 2) if dtype.is_complex else tuple(shard.sizes)
        real = dtype.to_real() if dtype.is_complex else dtype
        if DTYPES.get(stored.dtype) != real or stored.shape != shape or stored.strides is not None:
            raise Corrupt(f"{shard.file} has another {shard.name} than checkpoint {self._snapshot.id[:8]} tells of.")
        straight = target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous()
        straight = straight and not (target.is_conj() or target.is_neg())
        for part in rows(shard.sizes, item.storage_offsets, item.lengths, _RUN_BYTES_MAX // dtype.itemsize):
            into = target[part.prefix]
            if part.shape:
                into = into.narrow(0, part.start, part.shape[0])
            if not straight or tuple(into.shape) != part.shape:
                read, wanted = torch.empty(part.shape, dtype=dtype), into
                into = read
                for dimension, (offset, length) in enumerate(part.columns, 1):
                    read = read.narrow(dimension, offset, length)
                self._passing.append((read, wanted))
                self._passing_bytes += into.nbytes
            memory = tensor_bytes(torch.view_as_real(into) if dtype.is_complex else into)
            self._aim_at(shard.file, stored.offset + part.offset * dtype.itemsize, memory, name)
            yield

    def _aim_at(self, path: str, offset: int, memory: memoryview, name: str) -> None:
        if not len(memory):
            return
        file = self._file(path)
        for start, chunk in file.content.chunks(offset, len(memory)):
            self._aims.setdefault(chunk, []).append(_Aim(start, memory, name))
            self._lengths[chunk] = file.lengths[chunk]

    def _fetch(self) -> None:
        """Read what was noted."""
        failures: dict[str, OutlastError] = {}

        def deliver(chunk: bytes, plain: bytes | memoryview) -> None:
            key = chunk.hex()
            view = memoryview(plain)
            if len(view) != self._lengths[key]:
                raise Corrupt(f"chunk {key[:16]} has {len(view)} bytes, not {self._lengths[key]}.")
            for start, memory, _ in self._aims[key]:
                low, high = max(0, start), min(len(memory), start + len(view))
                memory[low:high] = view[low - start : high - start]

        def failed(chunk: bytes, error: OutlastError) -> None:
            failures[chunk.hex()] = error

        self._repository.fetch((bytes.fromhex(chunk) for chunk in self._aims), deliver, failed)
        if failures:
            raise self._loss(failures)
        for read, wanted in self._passing:
            wanted.copy_(read)
        self._aims.clear()
        self._passing.clear()
        self._passing_bytes = 0

    def _loss(self, failures: Mapping[str, OutlastError]) -> OutlastError:
        names = sorted({aim.of for chunk in failures for aim in self._aims[chunk]})
        more = f" and {len(names) - _NAMES_MAX} more" if len(names) > _NAMES_MAX else ""
        what = f"{', '.join(names[:_NAMES_MAX])}{more} of checkpoint {self._snapshot.id[:8]}"
        first = next(iter(failures.values()))
        return type(first)(f"{what} can't be read: {first.message}", hint=first.hint)
