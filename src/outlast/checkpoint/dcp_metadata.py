"""What a checkpoint made through torch.distributed.checkpoint says of itself: `dcp.json`, and no pickle.

The tensors lie in `shards-NNNNN.safetensors`, one file for each rank that stored some. A tensor that a rank stored
whole has its name there; a part of one has `@` and the offsets of its first element behind it. What is neither a
tensor nor holds any stands in `dcp.json` itself, as `tree` writes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import msgspec
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.tensor import DTensor

from outlast.checkpoint.tree import Node, Path, decode, encode
from outlast.errors import Corrupt, Refused
from outlast.records import parse

FILE = "dcp.json"
VERSION = 1

Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Shard(msgspec.Struct, frozen=True):
    """A block of a tensor, and where its elements lie in row-major order."""

    offsets: list[Count]
    sizes: list[Count]
    file: str
    name: str


class TensorRecord(msgspec.Struct, frozen=True):
    dtype: str
    """as torch calls it, without "torch." """
    size: list[Count]
    shards: list[Shard]


class ObjectRecord(msgspec.Struct, frozen=True):
    tree: Any
    file: str
    """where the tensors lie that the tree names"""


class Topology(msgspec.Struct, frozen=True):
    """How the processes were arranged that took part."""

    ranks: int
    meshes: list[dict[str, int]] = []
    """of each device mesh that tensors were spread over: its dimensions"""

    def __str__(self) -> str:
        meshes = ["x".join(f"{name}={size}" for name, size in mesh.items()) for mesh in self.meshes]
        count = f"{self.ranks} rank{'s' if self.ranks != 1 else ''}"
        return f"{count} ({', '.join(meshes)})" if meshes else count


class Description(msgspec.Struct, frozen=True):
    """The content of `dcp.json`."""

    version: int
    torch: str
    saved_by: Topology
    tensors: dict[str, TensorRecord]
    objects: dict[str, ObjectRecord]
    planner: Any
    """what the planner that saved wants to have back, as `tree` writes it"""


class Stored(msgspec.Struct, frozen=True):
    """What became of one item of a plan: a file and, for a tensor, its name there, or else a tree."""

    file: str
    name: str = ""
    tree: Any = None


Place = tuple[str, tuple[int, ...]]
"""(name of a tensor, offsets of a block of it)"""


def topology(ranks: int, state: object) -> Topology:
    """`state`: the flat dictionary of a stock planner; what others have tells of no meshes."""
    meshes: list[dict[str, int]] = []
    for value in state.values() if isinstance(state, Mapping) else ():
        if isinstance(value, DTensor):
            mesh = value.device_mesh
            names = mesh.mesh_dim_names or [f"dim{at}" for at in range(mesh.ndim)]
            found = {name: mesh.size(at) for at, name in enumerate(names)}
            if found not in meshes:
                meshes.append(found)
    return Topology(ranks, sorted(meshes, key=str))


def describe(metadata: Metadata, stored: Mapping[MetadataIndex, Stored], saved_by: Topology) -> Description:
    """Raises `Refused` where nobody stored a block that was planned, or what the planner wants to keep has no form."""
    tensors: dict[str, TensorRecord] = {}
    objects: dict[str, ObjectRecord] = {}
    for name, each in metadata.state_dict_metadata.items():
        if isinstance(each, TensorStorageMetadata):
            shards = []
            for chunk in each.chunks:
                at = _find(stored, MetadataIndex(name, chunk.offsets))
                shards.append(Shard(list(chunk.offsets), list(chunk.sizes), at.file, at.name))
            dtype = str(each.properties.dtype).removeprefix("torch.")
            tensors[name] = TensorRecord(dtype, list(each.size), shards)
        else:
            at = _find(stored, MetadataIndex(name))
            objects[name] = ObjectRecord(at.tree, at.file)
    planner = encode(metadata.planner_data, ("planner_data",), _refuse_tensor)
    return Description(VERSION, str(torch.__version__), saved_by, tensors, objects, planner)


def _find(stored: Mapping[MetadataIndex, Stored], index: MetadataIndex) -> Stored:
    found = stored.get(index)
    if found is None:
        raise Refused(f"{index.fqn} (offset {index.offset}) was planned, but no rank stored it; nothing was saved.")
    return found


def _refuse_tensor(path: Path, _: torch.Tensor) -> Node:
    raise Refused(f"the planner keeps a tensor beside the state ({path}), which has no form here; nothing was saved.")


def read(data: bytes, sizes: Mapping[str, int], what: str) -> Description:
    """Raises `Corrupt` for what `describe` never writes, and `Refused` for a later version.

    `sizes`: of the files of the checkpoint.
    """
    found = parse(data, Description, what)
    if found.version != VERSION:
        raise Refused(f"{what} is of version {found.version}, and this program knows {VERSION}.")
    for name, tensor in found.tensors.items():
        width = dtype_of(tensor, name).itemsize
        for shard in tensor.shards:
            blocks = list(zip(shard.offsets, shard.sizes, tensor.size, strict=False))
            fits = len(shard.offsets) == len(shard.sizes) == len(tensor.size)
            if not fits or any(offset + size > whole for offset, size, whole in blocks):
                raise Corrupt(f"{what} tells of a block of {name} that lies outside of it.")
            if volume(shard.sizes) * width > sizes.get(shard.file, -1):
                raise Corrupt(f"{what} tells of a block of {name} that {shard.file} can't hold.")
        if volume(tensor.size) > sum(volume(shard.sizes) for shard in tensor.shards):
            raise Corrupt(f"{what} has no block for a part of {name}.")
    return found


def metadata_of(description: Description) -> Metadata:
    """What planners of torch.distributed.checkpoint go by. Raises `Corrupt`."""
    found: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for name, tensor in description.tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(each.offsets), torch.Size(each.sizes)) for each in tensor.shards]
        properties = TensorProperties(dtype=dtype_of(tensor, name))
        found[name] = TensorStorageMetadata(properties, torch.Size(tensor.size), chunks)
    for name in description.objects:
        found[name] = BytesStorageMetadata()
    return Metadata(found, planner_data=decode(description.planner, _no_tensor))


def _no_tensor(node: Node) -> torch.Tensor:
    raise Corrupt(f"the data of the planner has a tensor, {node!r}.")


def dtype_of(tensor: TensorRecord, name: str) -> torch.dtype:
    dtype = getattr(torch, tensor.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise Corrupt(f"{name} has elements of type {tensor.dtype!r}, which torch lacks.")
    return dtype


def volume(sizes: Iterable[int]) -> int:
    count = 1
    for size in sizes:
        count *= size
    return count
