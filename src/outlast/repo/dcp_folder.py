"""What the `.metadata` of a torch.distributed.checkpoint folder says, read without executing it. Pure.

It is a pickle of `torch.distributed.checkpoint.metadata.Metadata`: for each item its shape, and where each of its
parts lies in the `.distcp` files. It has no checksum.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from outlast.repo import torchpickle
from outlast.repo.layout import Malformed

METADATA_FILE = ".metadata"
METADATA_BYTES_MAX = 24 << 20
_PARTS_MAX = 1 << 20


class Shard(msgspec.Struct):
    """One part of an item: the box of a tensor that it holds, and the bytes of a file that hold it."""

    file: str
    offset: int
    length: int
    corner: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


class Item(msgspec.Struct):
    """A tensor or, where `shape` is None, a value that is none."""

    name: str
    shape: tuple[int, ...] | None
    path: tuple[str | int, ...]
    """the keys that lead to it in the nested dictionary that was saved"""
    shards: list[Shard] = []


def read_items(metadata: bytes) -> dict[str, Item]:
    """Every item by name, with its shards in order. Raises `Malformed`."""
    root = _fields(torchpickle.interpret(metadata, torchpickle.Budget()).root)
    items: dict[str, Item] = {}
    boxes: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = {}
    for name, described in _pairs(root.get("state_dict_metadata")):
        if not isinstance(name, str):
            raise Malformed("an item without a name")
        fields = _fields(described)
        items[name] = Item(name, _numbers(fields["size"]) if "size" in fields else None, (name,))
        for chunk in fields.get("chunks") or []:
            box = _fields(chunk)
            boxes[name, _numbers(box.get("offsets"))] = _numbers(box.get("sizes"))
    for name, path in _pairs(root.get("planner_data")):
        if name in items and isinstance(path, tuple) and all(type(each) in (str, int) for each in path):
            items[name].path = path
    for at, (index, info) in enumerate(_pairs(root.get("storage_data"))):
        if at > _PARTS_MAX:
            raise Malformed("more parts than any model has")
        _add_shard(items, boxes, _fields(index), _fields(info))
    for item in items.values():
        item.shards.sort(key=lambda each: each.corner)
    return items


def _add_shard(
    items: dict[str, Item],
    boxes: dict[tuple[str, tuple[int, ...]], tuple[int, ...]],
    index: dict[str, Any],
    info: dict[str, Any],
) -> None:
    item = items.get(index["fqn"]) if isinstance(index.get("fqn"), str) else None
    file, offset, length = (info.get(name) for name in ("relative_path", "offset", "length"))
    if item is None or not isinstance(file, str) or type(offset) is not int or type(length) is not int:
        raise Malformed("a part without a place")
    if "/" in file or file in ("", ".", "..") or "\0" in file or offset < 0 or length < 0:
        raise Malformed("a part outside the folder")
    if info.get("transform_descriptors"):
        raise Malformed("its parts were compressed or encrypted by an extension")
    corner = () if item.shape is None else _numbers(index.get("offset") or (0,) * len(item.shape))
    sizes = boxes.get((item.name, corner), ())
    if item.shape is not None and not _inside(item.shape, corner, sizes):
        raise Malformed("a part that is not inside its tensor")
    item.shards.append(Shard(file, offset, length, corner, sizes))


def _inside(shape: tuple[int, ...], corner: tuple[int, ...], sizes: tuple[int, ...]) -> bool:
    if not len(shape) == len(corner) == len(sizes):
        return False
    return all(
        at >= 0 and size >= 0 and at + size <= whole for whole, at, size in zip(shape, corner, sizes, strict=True)
    )


def rows(item: Item) -> bool:
    """Whether the shards, one after the other, are the whole tensor: each has all of it but some of its rows."""
    shape = item.shape or ()
    if not shape or len(item.shards) == 1:
        return len(item.shards) == 1 and item.shards[0].sizes == shape
    row = 0
    for each in item.shards:
        if each.corner != (row, *(0,) * (len(shape) - 1)) or each.sizes[1:] != shape[1:]:
            return False
        row += each.sizes[0]
    return row == shape[0]


def _fields(value: object) -> dict[str, Any]:
    """The attributes of an object. Raises `Malformed` for anything else."""
    if not isinstance(value, torchpickle.Record):
        raise Malformed("not what torch.distributed.checkpoint writes")
    found: dict[str, Any] = {}
    for key, each in value.items:
        inner = each.items if key is None and isinstance(each, torchpickle.Record) else [(key, each)]
        found.update((name, one) for name, one in inner if isinstance(name, str))
    return found


def _pairs(value: object) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, torchpickle.Record):
        yield from value.items


def _numbers(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or any(type(each) is not int for each in value):
        raise Malformed("a shape that is none")
    return tuple(value)
