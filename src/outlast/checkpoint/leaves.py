"""Tensors of a state as named runs of bytes: what a `.safetensors` file of a checkpoint is made of.

Each file is laid out as the reference implementation would read it, so that a restored checkpoint is a folder of
files that any tool loads, and the same tensor in a backup of a `.pt` is the same chunks. Small tensors come first,
right after the header: with it they are one chunk that changes at every step, and all others stand alone.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from outlast.errors import Corrupt, Refused
from outlast.records import Chunking
from outlast.repo import formats
from outlast.repo.chunker import TENSOR_BYTES_MIN, pieces
from outlast.repo.formats import Span
from outlast.repo.layout import item_bytes

Node = Any
Bytes = memoryview

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_REAL = {torch.float32, torch.float64, torch.float16, torch.bfloat16}


class Leaf(NamedTuple):
    """A tensor to store, under its name in one file. It is live: its elements are read later."""

    name: str
    tensor: torch.Tensor
    steady: bool
    """nothing but a step of an optimizer changes it"""
    nbytes: int

    @property
    def dtype(self) -> str:
        return _NAMES[self.tensor.dtype]


class Region(NamedTuple):
    """The part of a sharded tensor that this rank holds."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor: all of it, but for a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def region_of(name: str, tensor: torch.Tensor) -> Region | None:
    """None for a tensor that isn't sharded. Raises `Refused` where a rank holds no single block of it."""
    if not hasattr(tensor, "__create_chunk_list__"):
        return None
    blocks = tensor.__create_chunk_list__()  # the protocol of torch.distributed.checkpoint
    partial = any(each.is_partial() for each in getattr(tensor, "placements", ()))
    if len(blocks) != 1 or partial or tensor.is_complex():
        what = "complex" if tensor.is_complex() else "a sum not made yet" if partial else "not one block"
        raise Refused(
            f"what this rank holds of the sharded tensor {name} is {what}; nothing was saved.",
            hint="Save it through outlast.checkpoint.dcp, or shard it in one block on each rank.",
        )
    return Region(tuple(blocks[0].offsets), tuple(blocks[0].sizes))


class Form(NamedTuple):
    """What a tensor is but for its elements."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def form_of(node: Node, stored: Form) -> Form:
    """Of the whole tensor that a node stands for, that of all ranks together where it is sharded.

    `stored`: of what lies in the file. Raises `Corrupt` where the two don't fit.
    """
    found = stored
    if "order" in node or "complex" in node:
        made = rebuild(node, torch.empty(stored.shape, dtype=stored.dtype, device="meta"))
        found = Form(tuple(made.shape), made.dtype)
    if "global" in node:
        shape, offset = node["global"]["shape"], node["global"]["offset"]
        fits = len(shape) == len(offset) == len(stored.shape) == len(found.shape)
        if not fits or any(at + size > end for at, size, end in zip(offset, stored.shape, shape, strict=True)):
            raise Corrupt(f"what is stored of the tensor {node['name']} is no block of a tensor of shape {shape}.")
        found = Form(tuple(shape), found.dtype)
    return found


class Leaves:
    """Gathers the tensors of one file. Each place in memory is stored once, however many names it has."""

    def __init__(self, steady: set[int]) -> None:
        self._steady = steady
        """`id` of tensors, or addresses of storages, that only optimizers change"""
        self._known: dict[tuple[Any, ...], str] = {}
        self._names: set[str] = set()
        self.found: list[Leaf] = []

    def take(self, name: str, tensor: torch.Tensor) -> Node:
        """The node that stands for the tensor: kind, name, and what a file of row-major tensors can't say."""
        node: dict[str, Any] = {"$": "tensor", "name": name}
        region = region_of(name, tensor)
        if region is not None:
            node["global"] = {"shape": list(tensor.shape), "offset": list(region.offset)}
        tensor = _plain(name, local(tensor).detach())
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.resolve_conj())
            node["complex"] = True
        device, storage, nbytes = tensor.device, tensor.untyped_storage().data_ptr(), tensor.nbytes
        place = (device, storage, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride())
        order = _memory_order(tensor)
        if order is not None:
            node["order"] = order
        if device.type != "cpu":
            node["device"] = str(device)
        known = self._known.get(place) if nbytes else None
        if known is not None:
            return node | {"name": known}
        name = node["name"] = self._free(name)
        self._known[place] = name
        self.found.append(Leaf(name, tensor, storage in self._steady, nbytes))
        return node

    def _free(self, name: str) -> str:
        while name in self._names or name == "__metadata__":
            name += "_"
        self._names.add(name)
        return name


def _plain(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Raises `Refused` for a tensor whose bytes don't say all of it."""
    if type(tensor) is torch.Tensor and tensor.dtype in _REAL and tensor.is_cpu and tensor.layout is torch.strided:
        return tensor.resolve_neg()  # as nearly all are
    what = ""
    if tensor.device.type == "meta":
        what = "is on the meta device and has no content"
    elif tensor.layout is not torch.strided:
        what = f"is sparse ({tensor.layout})"
    elif tensor.is_quantized or (tensor.dtype not in _NAMES and not tensor.is_complex()):
        what = f"has elements of type {tensor.dtype}"
    elif type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        what = f"is a {type(tensor).__module__}.{type(tensor).__qualname__}"
    if what:
        raise Refused(
            f"the tensor {name} {what}, which can't be captured exactly; nothing was saved.",
            hint="Keep a dense copy of what it stands for in the state, or leave it out.",
        )
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def is_spread(tensor: torch.Tensor) -> bool:
    """Whether an element stands in several places of it, as `expand` makes it."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _memory_order(tensor: torch.Tensor) -> list[int] | None:
    """For a dense tensor that lies in another order than row-major (channels_last): its dimensions as they lie."""
    if tensor.is_contiguous() or tensor.dim() < 2:
        return None
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda at: (-strides[at], at))
    return order if tensor.permute(order).is_contiguous() else None


def rebuild(node: Node, stored: torch.Tensor) -> torch.Tensor:
    """The tensor that a node stands for, of the elements that were stored. Raises `Corrupt`."""
    order = node.get("order")
    if order is not None:
        if sorted(order) != list(range(stored.dim())):
            raise Corrupt(f"the tensor {node['name']} has a memory order that does not fit it.")
        back = sorted(range(len(order)), key=order.__getitem__)
        stored = stored.permute(order).contiguous().permute(back)
    if not node.get("complex"):
        return stored
    try:
        return torch.view_as_complex(stored)
    except RuntimeError as exc:
        raise Corrupt(f"the tensor {node['name']} is stored in a form that holds no complex numbers.") from exc


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The elements of a contiguous CPU tensor as they lie in memory; writing to them writes to it."""
    # Of one element the stride may be anything, and it is contiguous all the same.
    flat = tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    return flat.numpy().data.cast("B") if flat.numel() else memoryview(b"")


def private_memory(count_bytes: int) -> mmap.mmap:
    """Zeros, in memory of this process alone, that is given when it is touched."""
    # Not in large pages: they are no faster to copy to, and to find them for the first save takes four times as long.
    return mmap.mmap(-1, count_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class Stretch(NamedTuple):
    """Neighbouring bytes of a file."""

    data: memoryview
    item_bytes: int
    is_cut: bool
    """it has still to be cut by content; otherwise it is one chunk"""
    leaf: str | None = None
    """whose bytes from `offset` on these are; None where they are of several, or of none"""
    offset: int = 0


class TensorFile:
    """A safetensors file that exists only as its header and the tensors' memory."""

    def __init__(self, leaves: list[Leaf], metadata: dict[str, str]) -> None:
        self.leaves = sorted(leaves, key=lambda leaf: leaf.nbytes >= TENSOR_BYTES_MIN)
        self.header = formats.safetensors_header(
            [(leaf.name, leaf.dtype, tuple(leaf.tensor.shape), leaf.nbytes) for leaf in self.leaves], metadata
        )
        self.size = len(self.header) + sum(leaf.nbytes for leaf in self.leaves)

    def stretches(self, content: Callable[[str], memoryview], chunking: Chunking) -> Iterator[Stretch]:
        """What the file consists of, from the first byte to the last.

        `content`: the bytes of a leaf by its name, asked for once, when they are reached.
        """
        rest = [leaf for leaf in reversed(self.leaves) if leaf.nbytes]
        spans, at = [], len(self.header)
        for leaf in reversed(rest):
            spans.append(Span(at, leaf.nbytes, item_bytes(leaf.dtype)))
            at += leaf.nbytes
        name: str | None = None
        start, run = 0, memoryview(self.header)
        for piece in pieces(self.size, spans, (), chunking):
            parts: list[memoryview] = []
            at, end = piece.offset, piece.offset + piece.length
            while at < end:
                if at == start + len(run):
                    name = rest.pop().name
                    start, run = at, content(name)
                parts.append(run[at - start : end - start])
                at += len(parts[-1])
            if len(parts) == 1:
                yield Stretch(parts[0], piece.item_bytes, piece.cut, name, piece.offset - start)
            else:
                yield Stretch(memoryview(b"".join(parts)), piece.item_bytes, piece.cut)
