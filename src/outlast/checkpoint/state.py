"""Capture everything that a training run is made of, or refuse; and give it back to the live objects.

A state is a dictionary: key -> module, optimizer, anything with `state_dict` and `load_state_dict`, generator of
random numbers, tensor, or container of plain values. A checkpoint holds one JSON tree for each key (see `tree`)
and, for the tensors in it, one file `KEY.safetensors`; of a module that file is its state dictionary and nothing
else, so that any tool loads it. What a module has besides (buffers that are not persistent, gradients) lies in
`KEY.more.safetensors`.
"""

from __future__ import annotations

import random  # noqa: TID251  its state is captured and given back; nothing is drawn
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import msgspec
import numpy as np
import torch

from outlast.checkpoint.leaves import (
    Form,
    Leaf,
    Leaves,
    Region,
    is_spread,
    local,
    private_memory,
    rebuild,
    region_of,
)
from outlast.checkpoint.state_file import KEY, RNG
from outlast.checkpoint.tree import Node, Path, TakeTensor, decode, encode, shown, writable
from outlast.errors import Corrupt, InvalidInput, OutlastError, Refused

_RESERVED = {RNG, "state"}
_LAZY_BYTES_MIN = 1 << 20
_WRAPPED = re.compile(r"(^|\.)_orig_mod(?=\.|$)")

State = Mapping[str, Any]
Give = Callable[[Node], torch.Tensor]
FormOf = Callable[[str, Node], Form]
"""of a key and the node of a tensor: its shape, that of all ranks together where it is sharded, and its type"""


class Part(msgspec.Struct):
    """What was captured of one key."""

    kind: str
    tree: Node
    leaves: list[Leaf] = []
    more: list[Leaf] = []


def check(state: State) -> None:
    """Raises `InvalidInput` for keys that can't name files, and what is no dictionary."""
    if not isinstance(state, Mapping) or not state:
        raise InvalidInput('a state is a dictionary such as {"model": model, "optimizer": optimizer}.')
    for key in state:
        if not isinstance(key, str) or not KEY.fullmatch(key) or key in _RESERVED:
            raise InvalidInput(f"{key!r} can't be a key of the state: letters, digits, _ and -, and not {_RESERVED}.")


def check_values(state: State) -> None:
    """Raises `InvalidInput` for what could be saved and not be given back."""
    known = set(parameter_names(state))
    for item in state.values():
        inside = item.values() if isinstance(item, dict) else item if isinstance(item, list) else [item]
        known |= {id(each) for each in inside if isinstance(each, torch.Tensor)}
    for key, item in state.items():
        if isinstance(item, torch.optim.Optimizer):
            for at, group in enumerate(item.param_groups):
                for place, parameter in enumerate(group["params"]):
                    if id(parameter) not in known:
                        raise InvalidInput(
                            f"parameter {place} of group {at} of state[{key!r}] is in no module of the state: it would "
                            "be lost.",
                            hint="Put the module that it belongs to into the state, or the tensor itself.",
                        )
        if kind_of(item) == "value" and not isinstance(item, dict | list | torch.Tensor):
            raise InvalidInput(
                f"state[{key!r}] is a plain {type(item).__name__}, which loading can not change in place.",
                hint=f'Put it into a dictionary: {{"{key}": {{"value": ...}}}}.',
            )


def kind_of(item: object) -> str:
    if isinstance(item, torch.nn.Module):
        return "module"
    if isinstance(item, torch.optim.Optimizer):
        return "optimizer"
    if isinstance(item, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
        return "generator"
    if callable(getattr(item, "state_dict", None)) and callable(getattr(item, "load_state_dict", None)):
        return "stateful"
    return "value"


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside wrappers that only add a prefix to its names."""
    if isinstance(module, torch.nn.parallel.DistributedDataParallel | torch.nn.DataParallel):
        return unwrap(module.module)
    return module


def plain_name(name: str) -> str:
    """A name without the prefixes that `torch.compile` adds."""
    if "_orig_mod" not in name:
        return name
    return _WRAPPED.sub(r"\1", name).replace("..", ".").lstrip(".")


def optimizers(state: State) -> Iterator[torch.optim.Optimizer]:
    yield from (item for item in state.values() if isinstance(item, torch.optim.Optimizer))


def parameter_names(state: State) -> dict[int, str]:
    """`id` of each parameter -> its name; with its module's key before it where there are several modules."""
    modules = {key: item for key, item in state.items() if isinstance(item, torch.nn.Module)}
    names: dict[int, str] = {}
    for key, module in modules.items():
        prefix = f"{key}." if len(modules) > 1 else ""
        for name, parameter in unwrap(module).named_parameters():
            names.setdefault(id(parameter), prefix + plain_name(name))
    return names


# -- capture ---------------------------------------------------------------------------------------------


def capture(state: State, accumulating: set[int]) -> dict[str, Part]:
    """Everything, live: tensors are named and not read yet. Raises `Refused` with the path of what can't be kept.

    `accumulating`: `id` of parameters whose gradients are still needed.
    """
    steady = _steady(state)
    names = parameter_names(state)
    parts = {}
    for key, item in state.items():
        kind = kind_of(item)
        leaves = Leaves(steady)
        if kind == "module":
            parts[key] = _module(item, key, leaves, Leaves(steady), accumulating)
        elif kind == "optimizer":
            parts[key] = Part(kind, encode(_named(item, names), (key,), named_by_path(leaves)), leaves.found)
        else:
            value = _generator(item) if kind == "generator" else item.state_dict() if kind == "stateful" else item
            parts[key] = Part(kind, encode(value, (key,), _whole(named_by_path(leaves))), leaves.found)
    leaves = Leaves(set())
    parts[RNG] = Part(RNG, encode(random_state(), (RNG,), named_by_path(leaves)), leaves.found)
    return parts


def _steady(state: State) -> set[int]:
    """Addresses of the storages that only a step of an optimizer changes."""
    found = set()
    for optimizer in optimizers(state):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                found.add(local(parameter).untyped_storage().data_ptr())
        for values in optimizer.state.values():
            for value in values.values() if isinstance(values, dict) else ():
                if isinstance(value, torch.Tensor):
                    found.add(local(value).untyped_storage().data_ptr())
    return found - {0}


def named_by_path(leaves: Leaves) -> TakeTensor:
    """Tensors are called by where they lie: `state["optimizer"]["state"]["w"]["exp_avg"]` is `state.w.exp_avg`."""

    def take(path: Path, tensor: torch.Tensor) -> Node:
        return leaves.take(".".join(map(str, path[1:] or path)), tensor)

    return take


def _whole(take: TakeTensor) -> TakeTensor:
    """Refuses what is sharded: only of parameters, and what optimizers keep for them, is it known how to shard them."""

    def taken(path: Path, tensor: torch.Tensor) -> Node:
        if hasattr(tensor, "to_local"):
            raise Refused(
                f"{shown(path)} is a sharded tensor outside of modules and optimizers; nothing was saved.",
                hint="Put the module that it belongs to into the state, such as the averaged copy itself for an EMA.",
            )
        return take(path, tensor)

    return taken


def _module(module: torch.nn.Module, key: str, leaves: Leaves, more: Leaves, accumulating: set[int]) -> Part:
    module = unwrap(module)
    tree: dict[str, Node] = {"state": {}, "buffers": {}, "grads": {}}
    for name, value in module.state_dict(keep_vars=True).items():
        name = plain_name(name)
        if name in tree["state"]:
            raise Refused(f"two tensors of {key} are called {name}; nothing was saved.")
        writable(name, (key, name))
        if isinstance(value, torch.Tensor) and is_spread(local(value)):
            raise Refused(
                f"{shown((key, name))} is an expanded tensor, whose elements share memory: no module loads what is "
                "saved of it; nothing was saved.",
                hint="Register a copy, `.clone()` of it, or leave it out of the state dict with persistent=False.",
            )
        take = leaves.take if isinstance(value, torch.Tensor) else None
        tree["state"][name] = take(name, value) if take else encode(value, (key, name), named_by_path(more))
    for name, buffer in module.named_buffers():
        if plain_name(name) not in tree["state"]:
            writable(name, (key, name))
            tree["buffers"][plain_name(name)] = more.take(f"buffer.{plain_name(name)}", buffer)
    for name, parameter in module.named_parameters():
        if parameter.grad is None:
            continue
        name = plain_name(name)
        # A gradient that was used up is not kept, but that there is one is: what has none is skipped by optimizers.
        needed = id(parameter) in accumulating
        tree["grads"][name] = more.take(f"grad.{name}", parameter.grad) if needed else None
    return Part("module", tree, leaves.found, more.found)


def _named(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, Any]:
    """Its state dictionary with names of parameters in place of numbers, so that their order doesn't matter."""
    found = optimizer.state_dict()
    by_number = numbered(optimizer, names)
    return found | {
        "state": {by_number[number]: values for number, values in found["state"].items()},
        "param_groups": [
            group | {"params": [by_number[number] for number in group["params"]]} for group in found["param_groups"]
        ],
    }


def numbered(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[int, str]:
    """The numbers that its state dictionary gives to parameters -> their names."""
    by_number: dict[int, str] = {}
    number = 0
    seen: dict[int, int] = {}
    for at, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            if id(parameter) not in seen:
                seen[id(parameter)] = number
                by_number[number] = names.get(id(parameter), f"group{at}.param{place}")
                number += 1
    return by_number


def _generator(item: Any) -> Any:
    if isinstance(item, torch.Generator):
        return item.get_state()
    if isinstance(item, np.random.Generator):
        return item.bit_generator.state
    return item.getstate() if isinstance(item, random.Random) else item.get_state(legacy=False)


def random_state() -> dict[str, Any]:
    """Of every global generator in this process: python's, numpy's, torch's, and of each accelerator."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


# -- give back -------------------------------------------------------------------------------------------


def regions(state: State, parts: Mapping[str, Part], form_of: FormOf) -> dict[str, dict[str, Region]]:
    """key -> name of a leaf -> what this rank is to hold of it, for all that has the shape of a parameter or buffer."""
    found: dict[str, dict[str, Region]] = {}
    names = parameter_names(state)
    for key, item in state.items():
        tree, mine = parts[key].tree, found.setdefault(key, {})
        if parts[key].kind == "module" and isinstance(item, torch.nn.Module):
            live = _tensors_of(item)
            pairs = [
                (node, live[name])
                for section in ("state", "buffers", "grads")
                for name, node in tree[section].items()
                if name in live
            ]
        elif parts[key].kind == "optimizer" and isinstance(item, torch.optim.Optimizer):
            owners = parameters_of(item, names)
            pairs = [(node, owners[name]) for name in owners for node in tree["state"].get(name, {}).values()]
        else:
            pairs = []
        for node, owner in pairs:
            # Complex ones are stored with a dimension more, and never sharded.
            if is_tensor(node) and not node.get("complex") and form_of(key, node).shape == tuple(owner.shape):
                mine[node["name"]] = region_of(node["name"], owner) or Region((0,) * owner.dim(), tuple(owner.shape))
    return found


def is_tensor(node: Node) -> bool:
    return isinstance(node, dict) and node.get("$") == "tensor"


def mesh(state: State) -> dict[str, int]:
    """Name -> size of the dimensions of the device mesh that parameters are sharded over; empty without any."""
    for item in state.values():
        if isinstance(item, torch.nn.Module):
            for parameter in unwrap(item).parameters():
                found = getattr(parameter, "device_mesh", None)
                if found is not None:
                    names = found.mesh_dim_names or [f"dim{at}" for at in range(found.ndim)]
                    return dict(zip(names, found.shape, strict=True))
    return {}


def _tensors_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Plain name -> parameter or buffer, those that are not persistent included."""
    module = unwrap(module)
    found = {plain_name(name): value for name, value in module.named_buffers()}
    found |= {plain_name(name): value for name, value in module.state_dict(keep_vars=True).items()
              if isinstance(value, torch.Tensor)}  # fmt: skip
    return found


def parameters_of(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, torch.Tensor]:
    """Name -> parameter, of those that an optimizer changes."""
    by_number = numbered(optimizer, names)
    parameters = dict.fromkeys(each for group in optimizer.param_groups for each in group["params"])
    return {by_number[number]: parameter for number, parameter in enumerate(parameters)}


def class_name(item: object) -> str:
    return type(item).__qualname__


def give_back(
    state: State,
    parts: Mapping[str, Part],
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    regions: Mapping[str, Mapping[str, Region]],
) -> None:
    """Load every part into its live object, in an order that depends on nothing: random numbers come last."""
    names = parameter_names(state)
    for key, item in sorted(state.items(), key=lambda each: _ORDER.index(kind_of(each[1]))):
        part, owned = parts[key], regions.get(key, {})

        def give(node: Node, key: str = key) -> torch.Tensor:
            return _at_home(node, _stored(tensors, key, node))

        try:
            if part.kind == "module":
                _give_to_module(unwrap(item), key, part.tree, give, owned)
            elif part.kind == "optimizer":
                _give_to_optimizer(item, _of_owners(key, part.tree, give, parameters_of(item, names), owned), names)
            else:
                _give_to_other(item, part.kind, decode(part.tree, give, (key,)), key)
        except OutlastError:
            raise
        except _UNTAKEN as exc:
            raise Refused(
                f"state[{key!r}], a {class_name(item)}, does not take what was saved of it: "
                f"{type(exc).__name__}: {exc}. The state is now a mixture, not to be trained with.",
                hint="The checkpoint was saved by other code, or was made up; load another one.",
            ) from exc
    if RNG in parts:
        give_random_state(decode(parts[RNG].tree, lambda node: _stored(tensors, RNG, node), (RNG,)))


# What methods of live objects raise, those of torch, of numpy and of users, that get a state of another form.
_UNTAKEN = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def _stored(tensors: Mapping[str, Mapping[str, torch.Tensor]], key: str, node: Node) -> torch.Tensor:
    found = tensors[key].get(node["name"])
    if found is None:
        raise Corrupt(f"the files of {key} lack the tensor {node['name']}.")
    return rebuild(node, found)


def _give_to_other(item: Any, kind: str, saved: Any, key: str) -> None:
    if kind == "generator":
        _give_to_generator(item, saved)
    elif kind == "stateful":
        item.load_state_dict(saved)
    else:
        _give_to_value(item, saved, key)


_ORDER = ["module", "optimizer", "stateful", "value", "generator"]


def _at_home(node: Node, tensor: torch.Tensor) -> torch.Tensor:
    """On the device that it was on, where there is one like it."""
    kind, _, index = node.get("device", "cpu").partition(":")
    if kind == "cuda" and int(index or 0) < torch.cuda.device_count():
        return tensor.to(f"cuda:{int(index or 0)}")
    return tensor


def _give_to_module(module: torch.nn.Module, key: str, tree: Node, give: Give, regions: Mapping[str, Region]) -> None:
    live = {plain_name(name): (name, value) for name, value in module.state_dict(keep_vars=True).items()}

    def decoded(plain: str, node: Node) -> Any:
        return _like(live[plain][1], give, regions, node) if is_tensor(node) else decode(node, give, (key, plain))

    # Through its own method, for hooks and extra state. What was filled in place already is copied onto itself.
    module.load_state_dict({live[plain][0]: decoded(plain, node) for plain, node in tree["state"].items()})
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if plain_name(name) in tree["buffers"]:
                _fill(buffer, give(tree["buffers"][plain_name(name)]))
        for name, parameter in module.named_parameters():
            node = tree["grads"].get(plain_name(name), "absent")
            if node == "absent":
                parameter.grad = None
            else:
                parameter.grad = _zeros_like(parameter)
                if node is not None:
                    parameter.grad.copy_(_like(parameter, give, regions, node))


def _fill(live: torch.Tensor, saved: torch.Tensor) -> None:
    """In place; of an expanded tensor each element once. Raises `Refused` where it can't hold what was saved."""
    if not is_spread(live):
        live.copy_(saved)
        return
    once = tuple(slice(None, 1) if stride == 0 else slice(None) for stride in live.stride())
    same = saved[once].expand(saved.shape)
    if not torch.equal(*(each.contiguous().view(torch.uint8) for each in (same, saved))):
        raise Refused("an expanded tensor of the state can't hold what was saved: its elements share memory.")
    live[once].copy_(saved[once])


def _zeros_like(parameter: torch.Tensor) -> torch.Tensor:
    """Large ones in memory that is touched when it is used, and mostly it isn't: gradients are zeroed before."""
    plain = type(parameter) in (torch.Tensor, torch.nn.Parameter) and parameter.is_contiguous()
    if not plain or parameter.device.type != "cpu" or parameter.nbytes < _LAZY_BYTES_MIN:
        return torch.zeros_like(parameter)
    return torch.frombuffer(private_memory(parameter.nbytes), dtype=parameter.dtype).view(parameter.shape)


def _of_owners(
    key: str, tree: Node, give: Give, owners: Mapping[str, torch.Tensor], regions: Mapping[str, Region]
) -> dict[str, Any]:
    """The state of an optimizer, in which what has the shape of a sharded parameter is sharded like it."""
    found: dict[str, Any] = decode({name: node for name, node in tree.items() if name != "state"}, give, (key,))
    found["state"] = {
        name: decode(values, partial(_like, owners.get(name), give, regions), (key, name))
        for name, values in tree["state"].items()
    }
    return found


def _like(owner: torch.Tensor | None, give: Give, regions: Mapping[str, Region], node: Node) -> torch.Tensor:
    """What was stored, sharded as its owner is."""
    stored = give(node)
    if owner is None or node["name"] not in regions or not hasattr(owner, "to_local"):
        return stored
    of: Any = owner
    made: torch.Tensor = type(of).from_local(
        stored.to(local(owner).device), of.device_mesh, of.placements, run_check=False,
        shape=owner.shape, stride=owner.stride(),
    )  # fmt: skip
    return made


def _give_to_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], names: dict[int, str]) -> None:
    by_number = numbered(optimizer, names)
    numbers = {name: number for number, name in by_number.items()}
    groups = []
    for live, group in zip(optimizer.state_dict()["param_groups"], _matched(optimizer, saved, by_number), strict=True):
        groups.append(group | {"params": live["params"]})
    state = {numbers[name]: values for name, values in saved["state"].items() if name in numbers}
    optimizer.load_state_dict(saved | {"state": state, "param_groups": groups})
    # Its method casts floating-point state to the type of the parameter: moments kept wider come back as they were.
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    for number, parameter in enumerate(dict.fromkeys(parameters)):
        for name, value in saved["state"].get(by_number[number], {}).items():
            now = optimizer.state[parameter].get(name)
            if isinstance(value, torch.Tensor) and isinstance(now, torch.Tensor) and now.dtype != value.dtype:
                optimizer.state[parameter][name] = value.to(now.device)
            elif isinstance(value, deque):  # it rebuilds those without their length
                optimizer.state[parameter][name] = value


def _matched(
    optimizer: torch.optim.Optimizer, saved: dict[str, Any], by_number: dict[int, str]
) -> Iterator[dict[str, Any]]:
    """For each live group the saved one that holds its parameters, in whatever order both are."""
    home = {name: group for group in saved["param_groups"] for name in group["params"]}
    for at, live in enumerate(optimizer.state_dict()["param_groups"]):
        found = {id(home[by_number[number]]): home[by_number[number]] for number in live["params"]}
        if len(found) > 1:
            raise Refused(f"group {at} of the optimizer holds parameters that were saved in {len(found)} groups.")
        yield next(iter(found.values())) if found else saved["param_groups"][at]


def _give_to_generator(item: Any, saved: Any) -> None:
    if isinstance(item, torch.Generator):
        item.set_state(saved)
    elif isinstance(item, np.random.Generator):
        item.bit_generator.state = _within(saved)
    elif isinstance(item, random.Random):
        item.setstate(saved)
    else:
        item.set_state(_within(saved))


def _within(saved: Any) -> Any:
    """The state of a generator of numpy, which believes where in its memory to read on. Raises `ValueError`."""
    for place, end in ((saved["state"].get("pos"), 624), (saved.get("buffer_pos"), 4)):
        if place is not None and not 0 <= place <= end:
            raise ValueError(f"it is at {place} of {end} numbers")
    return saved


def _give_to_value(live: Any, saved: Any, path: str) -> None:
    """In place, for others hold the same objects."""
    if isinstance(live, torch.Tensor) and isinstance(saved, torch.Tensor):
        with torch.no_grad():
            _fill(live, saved)
    elif isinstance(live, dict) and isinstance(saved, dict):
        for key in [key for key in live if key not in saved]:
            del live[key]
        for key, value in saved.items():
            if key in live and isinstance(live[key], dict | list | torch.Tensor) and _fits(live[key], value):
                _give_to_value(live[key], value, f"{path}[{key!r}]")
            else:
                live[key] = value
    elif isinstance(live, list) and isinstance(saved, list):
        del live[len(saved) :]
        for at, value in enumerate(saved):
            if at < len(live) and isinstance(live[at], dict | list | torch.Tensor) and _fits(live[at], value):
                _give_to_value(live[at], value, f"{path}[{at}]")
            else:
                live[at : at + 1] = [value]
    elif live != saved:
        raise Refused(
            f"state[{path!r}] is a plain {type(live).__name__}, which can't be changed in place.",
            hint="Put it into a dictionary or a list inside the state.",
        )


def _fits(live: Any, saved: Any) -> bool:
    if isinstance(live, torch.Tensor):
        return isinstance(saved, torch.Tensor) and live.shape == saved.shape and live.dtype == saved.dtype
    return type(live) is type(saved)


def reseed(rank: int) -> None:
    """For a rank that none was before: generators that give other numbers than those of the rank they were taken of."""
    for seed in (random, np.random, torch):
        drawn = int(torch.empty((), dtype=torch.int64).random_().item())
        seeded = (drawn ^ (rank * 0x9E3779B97F4A7C15)) & 0xFFFFFFFF
        seed.manual_seed(seeded) if seed is torch else seed.seed(seeded)


def give_random_state(saved: dict[str, Any]) -> None:
    """Raises `Corrupt` for a state that a generator doesn't take."""
    try:
        random.setstate(saved["python"])
        np.random.set_state(_within(saved["numpy"]))
        torch.set_rng_state(saved["torch"])
        if torch.cuda.is_available():
            for device, state in enumerate(saved["cuda"][: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(state, device)
    except _UNTAKEN as exc:
        raise Corrupt(f"the state of the random number generators can't be restored: {exc}.") from exc
