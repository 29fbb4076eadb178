"""Which memory of the live objects a load fills as it is, so that nothing is held twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import torch

from outlast.checkpoint.leaves import local
from outlast.checkpoint.state import Part, State, parameter_names, parameters_of, plain_name, unwrap
from outlast.checkpoint.tree import Node

Pairs = Iterator[tuple[object, Node]]


def destinations(state: State, parts: Mapping[str, Part]) -> dict[str, dict[str, torch.Tensor]]:
    """key -> name of a leaf -> live memory on the CPU, row-major. Its shape and type may differ from those saved."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, part in parts.items():
        item = state.get(key)
        if part.kind == "module" and isinstance(item, torch.nn.Module):
            pairs = _of_module(item, part.tree)
        elif part.kind == "optimizer" and isinstance(item, torch.optim.Optimizer):
            pairs = _of_optimizer(item, part.tree, parameter_names(state))
        else:
            continue
        mine = found.setdefault(key, {})
        for value, node in pairs:
            if isinstance(value, torch.Tensor) and isinstance(node, dict) and set(node) - {"global"} == {"$", "name"}:
                memory = local(value.detach())
                plain = type(memory) in (torch.Tensor, torch.nn.Parameter)
                if plain and memory.device.type == "cpu" and memory.is_contiguous():
                    mine.setdefault(node["name"], memory)
    return found


def _of_module(module: torch.nn.Module, tree: Node) -> Pairs:
    for name, value in unwrap(module).state_dict(keep_vars=True).items():
        yield value, tree["state"].get(plain_name(name))


def _of_optimizer(optimizer: torch.optim.Optimizer, tree: Node, names: dict[int, str]) -> Pairs:
    """But for what lies in memory of something else: it may have been apart, and differed, when it was saved.

    A module's own method would fill what it ties twice just as well.
    """
    parameters = parameters_of(optimizer, names)
    # `get`, for to look up what is missing in an optimizer's state makes it.
    of = {name: optimizer.state.get(each, {}) for name, each in parameters.items()}
    values = [(name, key, value) for name, mine in of.items() for key, value in mine.items()]
    memory = Counter(map(_place, parameters.values()))
    memory.update(_place(value) for _, _, value in values if isinstance(value, torch.Tensor))
    for name, key, value in values:
        if isinstance(value, torch.Tensor) and memory[_place(value)] == 1:
            yield value, tree["state"].get(name, {}).get(key)


def _place(tensor: torch.Tensor) -> int:
    return local(tensor.detach()).untyped_storage().data_ptr()
