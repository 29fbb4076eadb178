"""The JSON trees of a checkpoint as paths and values, for people, and what differs between two. Torch is not needed.

See `tree` for what the objects with a `$` stand for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np

Node = Any

_LONG = 16
"""a list of more plain values is looked at as one thing: the state of a generator, a history"""
_SHOWN_CHARACTERS = 80
_ABSENT = object()


class ValueChange(msgspec.Struct, frozen=True):
    """A value that is no tensor, and differs. None: that side lacks it."""

    path: str
    before: str | None
    after: str | None


def is_tensor(node: Node) -> bool:
    return isinstance(node, dict) and node.get("$") == "tensor"


def tensor_nodes(tree: Node) -> Iterator[dict[str, Any]]:
    """Every node of a tensor."""
    return (node for _, node in leaves(tree) if is_tensor(node))


def leaves(node: Node, path: str = "") -> Iterator[tuple[str, Node]]:
    """(path, value) of everything that holds nothing further: `param_groups[0].lr`."""
    if isinstance(node, list):
        yield from _listed(node, path, node)
    elif not isinstance(node, dict):
        yield path, node
    elif "$" not in node:
        if not node:
            yield path, node
        for key, each in node.items():
            yield from leaves(each, f"{path}.{key}" if path else str(key))
    else:
        kind, inner = node["$"], node.get("v")
        if kind in ("dict", "ordered", "counter") and inner:
            for key, each in inner:
                yield from leaves(each, f"{path}[{text(key)}]")
        elif kind in ("tuple", "deque", "size") and isinstance(inner, list):
            yield from _listed(inner, path, node)
        elif kind == "array":
            yield from leaves(inner, path)
        else:
            yield path, node


def _listed(values: list[Node], path: str, whole: Node) -> Iterator[tuple[str, Node]]:
    if not values or (len(values) > _LONG and not any(isinstance(each, dict | list) for each in values)):
        yield path, whole
        return
    for at, each in enumerate(values):
        yield from leaves(each, f"{path}[{at}]")


def differences(before: Node, after: Node) -> list[ValueChange]:
    """What differs but for the elements of tensors, in the order of the tree after."""
    old, new = dict(leaves(before)), dict(leaves(after))
    found = []
    for path in [*new, *(path for path in old if path not in new)]:
        a, b = old.get(path, _ABSENT), new.get(path, _ABSENT)
        if _comparable(a) == _comparable(b) or _is_only_a_tensor(a, b):
            continue
        if isinstance(a, dict | list) and isinstance(b, dict | list) and (told := _how_many_differ(a, b)):
            found.append(ValueChange(path, *told))
        else:
            found.append(ValueChange(path, *(None if each is _ABSENT else text(each) for each in (a, b))))
    return found


def _comparable(node: Node) -> Node:
    """Without what doesn't change a tensor's elements: where it lies, and in which order."""
    if is_tensor(node):
        return {name: value for name, value in node.items() if name not in ("device", "order")}
    return (type(node), node) if isinstance(node, bool | int | float) else node  # True == 1 == 1.0


def _is_only_a_tensor(a: Node, b: Node) -> bool:
    """A tensor that only one side has is told of as a tensor."""
    return any(is_tensor(this) and (other is None or other is _ABSENT) for this, other in ((a, b), (b, a)))


def _how_many_differ(a: Node, b: Node) -> tuple[str, str] | None:
    first, second = (each.get("v") if isinstance(each, dict) else each for each in (a, b))
    if not isinstance(first, list) or not isinstance(second, list) or max(len(first), len(second)) <= _LONG:
        return None
    if len(first) != len(second):
        return f"{len(first):,} values", f"{len(second):,} values"
    count = sum(x != y for x, y in zip(first, second, strict=True))
    return f"{len(first):,} values", f"{count:,} of them others"


def text(node: Node) -> str:
    """As a person would write it."""
    if isinstance(node, list):
        return _cut(f"[{', '.join(map(text, node[:_LONG]))}{', …' if len(node) > _LONG else ''}]")
    if not isinstance(node, dict):
        return _cut(repr(node))
    kind, inner = node.get("$"), node.get("v")
    if kind is None:
        return _cut("{" + ", ".join(f"{key}: {text(each)}" for key, each in node.items()) + "}")
    if kind == "tensor":
        return f"tensor {node.get('name')}"
    if kind in ("bytes", "bytearray"):
        return f"{len(str(inner)) * 3 // 4:,} bytes"
    if kind == "scalar":
        try:
            return str(np.frombuffer(bytes.fromhex(str(inner)), np.dtype(str(node.get("dtype"))))[0])
        except (ValueError, TypeError, IndexError):
            return str(inner)
    if isinstance(inner, list):
        many = ", ".join(map(text, inner[:_LONG])) + (", …" if len(inner) > _LONG else "")
        return _cut(f"({many})" if kind == "tuple" else f"{kind}({many})")
    return _cut(str(inner))


def _cut(told: str) -> str:
    return told if len(told) <= _SHOWN_CHARACTERS else told[: _SHOWN_CHARACTERS - 1] + "…"
