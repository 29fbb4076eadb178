"""A checkpoint that was made elsewhere, as a checkpoint of a run. No pickle is executed.

What a file holds is told by the names that scripts commonly use. A model's state is taken as it is; that of an
optimizer, whose parameters have numbers in a plain file, gets their names: those that the file itself gives, or
else those of the model, in order, where they are as many and as large, and there is only one group.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from math import prod
from pickle import UnpicklingError
from typing import Any, BinaryIO

import msgspec
import torch

from outlast.checkpoint import oldtorch, zipscan
from outlast.checkpoint import save as saving
from outlast.checkpoint import state as live
from outlast.checkpoint.leaves import DTYPES, Leaves, tensor_bytes
from outlast.checkpoint.pieces import LeafBytes
from outlast.checkpoint.ranks import Ranks
from outlast.checkpoint.save import Captured
from outlast.checkpoint.state import Part
from outlast.checkpoint.tree import encode
from outlast.errors import Corrupt, InvalidInput, NotFound, Refused
from outlast.records import Snapshot
from outlast.repo import dcp_folder, formats, torchfile
from outlast.repo.layout import Malformed, ReadAt
from outlast.repo.repository import Repository

_MODELS = ("model", "state_dict", "model_state_dict", "model_state")
_KNOWN = {
    "model": _MODELS,
    "optimizer": ("optimizer", "optimizer_state_dict", "optimizer_state", "optimizer_states.0"),
    "scheduler": ("scheduler", "lr_scheduler", "scheduler_state_dict", "lr_scheduler_state_dict", "lr_schedulers.0"),
    "scaler": ("scaler", "grad_scaler", "scaler_state_dict"),
}
"""key of a run's state -> where scripts, and Lightning, keep it"""
_STEPS = ("global_step", "step", "outlast.step")
_IGNORED = {"outlast"}
_KINDS = ("module", "optimizer", "stateful", "value")
_BUFFERS = {"running_mean", "running_var", "num_batches_tracked"}
_MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "acc_delta", "sum"}
_GLOBAL = re.compile(r"(?:GLOBAL|Unsupported class) ([\w.]+)")
_ITEM_BYTES_MAX = 64 << 30


class Imported(msgspec.Struct):
    """What was made of the file."""

    snapshot: str
    run: str
    step: int
    path: str
    parts: dict[str, str]
    """key of the state -> kind"""
    tensors: int
    bytes: int
    left_out: list[str]
    """what of the file is no part of the checkpoint"""
    notes: list[str] = []


def bring_in(
    repository: Repository, path: str, run: str, *, step: int | None = None, places: Sequence[str] = ()
) -> Imported:
    """Commit what a torch or safetensors file, or a folder of torch.distributed.checkpoint, holds.

    `places`: `KEY=PATH` or `KEY:KIND=PATH` says where in the file the part KEY of the run's state lies, keys joined
    with "."; KIND is module, optimizer, stateful (has `state_dict`) or value. `step`: that of the file, or 0.
    Raises `Refused` for what would need a pickle to run, and where an optimizer's parameters can't be named;
    `Corrupt`, `NotFound`, `InvalidInput`. Then nothing was stored.
    """
    content = read(path)
    notes: list[str] = []
    mapped = _mapped(content, places)
    model = mapped.get("model", (None, None))[1]
    if not mapped:
        raise Refused(
            f"nothing in {path} is called as checkpoints commonly are; it has {_few(content)}; nothing was stored.",
            hint="Say where the parts are: --map model=PATH --map optimizer=PATH.",
        )
    found_step = step if step is not None else _step(content)
    if found_step is None:
        notes.append("The file says no step: it is stored as step 0. --step N says another.")
    parts: dict[str, Part] = {}
    modules = [key for key, (kind, _) in mapped.items() if kind == "module"]
    for key, (kind, value) in mapped.items():
        if kind == "module":
            value = _plain_names(value, key, notes)
            if key == "model":
                model = value
        elif kind == "optimizer":
            prefix = "model." if len(modules) > 1 else ""
            value = _named(value, content, key, model if isinstance(model, Mapping) else None, prefix)
        parts[key] = _part(key, kind, value)
    snapshot = _commit(repository, run, found_step or 0, parts)
    leaves = [leaf for part in parts.values() for leaf in part.leaves]
    return Imported(
        snapshot.id,
        run,
        found_step or 0,
        path,
        {key: part.kind for key, part in parts.items()},
        len(leaves),
        sum(leaf.nbytes for leaf in leaves),
        _left_out(content, mapped),
        notes,
    )


# -- read ------------------------------------------------------------------------------------------------


def read(path: str) -> dict[str, Any]:
    """The nested content of a checkpoint file or folder. Raises `Refused` for what would run code to be read."""
    if not os.path.exists(path):
        raise NotFound(f"there is no {path}; nothing was stored.")
    if os.path.isdir(path):
        return _read_dcp(path)
    if not os.path.isfile(path):
        raise InvalidInput(f"{path} is neither a file nor a folder; nothing was stored.")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size

        def at(offset: int, length: int) -> bytes:
            return os.pread(file.fileno(), length, offset)

        if formats.detect(at, size) == "safetensors":
            return _read_safetensors(at, size, path)
        if not at(0, 64).startswith((torchfile.MAGIC, oldtorch.MAGIC)):
            raise Refused(
                f"{path} is neither what torch.save writes nor a safetensors file, or is damaged; nothing was stored.",
                hint="`outlast salvage` brings out what is intact of damaged ones.",
            )
        found = _load(file, path)
    if not isinstance(found, dict):
        raise Refused(
            f"{path} holds a {type(found).__name__}, not a dictionary of states; nothing was stored.",
            hint='Save it as {"model": model.state_dict(), ...}.',
        )
    return found


def _load(source: BinaryIO, what: str) -> Any:
    """What `torch.load` reads with its restricted reader. It checks no checksum, so that is done here."""

    def at(offset: int, length: int) -> bytes:
        source.seek(offset)
        return source.read(length)

    damage = zipscan.damage(at, source.seek(0, os.SEEK_END))
    if damage:
        raise Corrupt(
            f"{what} is damaged: {damage}; nothing was stored.",
            hint="`outlast salvage` brings out what is intact of it.",
        )
    source.seek(0)
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except UnpicklingError as exc:
        name = _GLOBAL.search(str(exc))
        told = f"it holds a {name[1]}" if name else "it holds what is no plain data, or is damaged"
        raise Refused(
            f"{what} can't be read without running code from it: {told}; nothing was stored.",
            hint="Where you trust it, load it in Python and save its state dicts alone; `outlast salvage` takes the "
            "tensors out of it as it is.",
        ) from exc
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, AttributeError, TypeError) as exc:
        first = (str(exc).splitlines() or [type(exc).__name__])[0]
        raise Corrupt(
            f"{what} can't be read: {first}; nothing was stored.",
            hint="`outlast salvage` brings out what is intact of it.",
        ) from exc


def _read_safetensors(at: ReadAt, size: int, path: str) -> dict[str, Any]:
    tensors = formats.tensors(at, size)
    if tensors is None:
        raise Corrupt(f"{path} is damaged; nothing was stored.", hint="`outlast salvage` brings out what is intact.")
    found = {}
    for each in tensors:
        if each.dtype not in DTYPES:
            raise Refused(f"{each.name} of {path} has elements of type {each.dtype}, which torch lacks.")
        data = bytearray(b"".join(formats.tensor_bytes(at, each)))
        flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        found[each.name] = flat.view(DTYPES[each.dtype]).reshape(each.shape)
    return found


def _read_dcp(folder: str) -> dict[str, Any]:
    """Read by what its `.metadata` says, which is not executed."""
    try:
        with open(os.path.join(folder, dcp_folder.METADATA_FILE), "rb") as file:
            data = file.read(dcp_folder.METADATA_BYTES_MAX + 1)
        if len(data) > dcp_folder.METADATA_BYTES_MAX:
            raise Malformed("it is longer than that of any model")
        items = dcp_folder.read_items(data)
    except FileNotFoundError as exc:
        raise Refused(f"{folder} is no folder of torch.distributed.checkpoint; nothing was stored.") from exc
    except Malformed as exc:
        raise Refused(
            f"{folder}/.metadata can't be read without running code from it: {exc}; nothing was stored.",
            hint="Where you trust it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE, "
            "and import the file.",
        ) from exc
    nested: dict[str | int, Any] = {}
    for item in items.values():
        inner = nested
        for step in item.path[:-1]:
            inner = inner.setdefault(step, {})
            if not isinstance(inner, dict):
                raise Corrupt(f"{folder}/.metadata has two things under one name: {item.name}.")
        inner[item.path[-1]] = _assembled(folder, item)
    return {str(key): _listed(each) for key, each in nested.items()}


def _assembled(folder: str, item: dcp_folder.Item) -> Any:
    if item.shape is None and len(item.shards) == 1:
        return _shard(folder, item.shards[0])
    whole: torch.Tensor | None = None
    filled = 0
    for shard in item.shards:
        part = _shard(folder, shard)
        if not isinstance(part, torch.Tensor) or tuple(part.shape) != shard.sizes or item.shape is None:
            raise Corrupt(f"{shard.file} does not hold what .metadata says of {item.name}; nothing was stored.")
        if shard.sizes == item.shape:
            return part
        if whole is None:
            if prod(item.shape) * part.element_size() > _ITEM_BYTES_MAX:
                raise Corrupt(f"{item.name} would take {prod(item.shape)} elements; nothing was stored.")
            whole = torch.empty(item.shape, dtype=part.dtype)
        box = tuple(slice(at, at + size) for at, size in zip(shard.corner, shard.sizes, strict=True))
        whole[box] = part
        filled += part.numel()
    if whole is None or filled != whole.numel():
        raise Corrupt(f"parts of {item.name} are missing in {folder}; nothing was stored.")
    return whole


def _shard(folder: str, shard: dcp_folder.Shard) -> Any:
    path = os.path.join(folder, shard.file)
    try:
        with open(path, "rb") as file:
            file.seek(shard.offset)
            data = file.read(min(shard.length, _ITEM_BYTES_MAX))
    except FileNotFoundError as exc:
        raise Corrupt(f"{path} is missing; nothing was stored.") from exc
    return _load(BytesIO(data), path)


def _listed(value: Any) -> Any:
    """Lists again, where the keys are their positions: torch flattens those that hold tensors too."""
    if not isinstance(value, dict):
        return value
    found = {key: _listed(each) for key, each in value.items()}
    is_list = bool(found) and set(found) == set(range(len(found)))
    return [found[at] for at in range(len(found))] if is_list else found


# -- what is what ----------------------------------------------------------------------------------------


def _mapped(content: dict[str, Any], places: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """Key of the run's state -> (kind, value)."""
    found: dict[str, tuple[str, Any]] = {}
    asked: dict[str, str] = {}
    for each in places:
        key, separator, path = each.partition("=")
        name, _, kind = key.partition(":")
        if not separator or not path or (kind and kind not in _KINDS):
            raise InvalidInput(
                f"--map {each!r} is not of the form KEY=PATH or KEY:KIND=PATH; nothing was stored.",
                hint=f"For example --map ema=ema_state_dict. Kinds are {', '.join(_KINDS)}.",
            )
        value = _at(content, path)
        if value is None:
            raise NotFound(f"there is no {path} in the file; it has {_few(content)}; nothing was stored.")
        found[name] = kind or _kind(value), value
        asked[path] = name
    live.check(dict.fromkeys(found) or {"model": None})
    if not places and content and all(isinstance(each, torch.Tensor) for each in content.values()):
        return {"model": ("module", content)}
    for key, names in _KNOWN.items():
        for name in names:
            value = _at(content, name)
            if isinstance(value, dict) and key not in found and name not in asked:
                kind = {"model": "module", "optimizer": "optimizer"}.get(key, "stateful")
                found[key] = kind, value
    return found


def _kind(value: Any) -> str:
    if isinstance(value, dict) and {"state", "param_groups"} <= value.keys():
        return "optimizer"
    if isinstance(value, dict):
        return "module" if value and all(isinstance(each, torch.Tensor) for each in value.values()) else "stateful"
    return "value"


def _at(content: Any, path: str) -> Any:
    """What lies at a path of keys; a key may itself hold dots."""
    if isinstance(content, list | tuple):
        head, _, rest = path.partition(".")
        inner = content[int(head)] if head.isdigit() and int(head) < len(content) else None
        return _at(inner, rest) if rest else inner
    if not isinstance(content, dict):
        return None
    if path in content:
        return content[path]
    for end in (at for at, character in enumerate(path) if character == "."):
        if path[:end] in content:
            found = _at(content[path[:end]], path[end + 1 :])
            if found is not None:
                return found
    return None


def _step(content: dict[str, Any]) -> int | None:
    for name in _STEPS:
        value = _at(content, name)
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if type(value) is int and value >= 0:
            return value
    return None


def _left_out(content: dict[str, Any], mapped: Mapping[str, tuple[str, Any]]) -> list[str]:
    used = {id(value) for _, value in mapped.values()}

    def is_used(value: Any) -> bool:
        return id(value) in used or (isinstance(value, list) and any(id(each) in used for each in value))

    if is_used(content):
        return []
    return sorted(str(key) for key, value in content.items() if not is_used(value) and key not in (*_IGNORED, *_STEPS))


def _few(content: Mapping[Any, Any]) -> str:
    names = [str(key) for key in content]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


# -- names -----------------------------------------------------------------------------------------------


def _plain_names(state: dict[str, Any], key: str, notes: list[str]) -> dict[str, Any]:
    """Without the prefixes of wrappers, as a Run names what it captures."""
    if any(not isinstance(name, str) for name in state):
        raise Refused(f"{key} is no state of a module: its names are no text; nothing was stored.")
    if state and all(name.startswith("module.") for name in state):
        notes.append(
            f"The names of {key} were saved with the prefix module. of DistributedDataParallel; it is removed."
        )
        state = {name.removeprefix("module."): value for name, value in state.items()}
    found = {live.plain_name(name): value for name, value in state.items()}
    if len(found) != len(state):
        raise Refused(f"two tensors of {key} have one name without the prefixes of wrappers; nothing was stored.")
    return found


def _named(
    saved: dict[str, Any], content: dict[str, Any], key: str, model: Mapping[str, Any] | None, prefix: str
) -> dict[str, Any]:
    """The state of an optimizer with names in place of numbers. Raises `Refused` where they can't be known."""
    groups = saved.get("param_groups")
    if not isinstance(groups, list) or not isinstance(saved.get("state"), dict) or not _are_groups(groups):
        raise Refused(f"{key} is no state of a torch optimizer; nothing was stored.")
    numbers = list(dict.fromkeys(number for group in groups for number in group["params"]))
    names = _names(saved, content, key, model, prefix, numbers)
    by_text = {str(number): name for number, name in names.items()}  # as torch.distributed.checkpoint writes numbers
    return saved | {
        "state": {by_text.get(str(number), str(number)): values for number, values in saved["state"].items()},
        "param_groups": [group | {"params": [names[number] for number in group["params"]]} for group in groups],
    }


def _are_groups(groups: list[Any]) -> bool:
    return all(isinstance(group, dict) and isinstance(group.get("params"), list | tuple) for group in groups)


def _names(
    saved: dict[str, Any],
    content: dict[str, Any],
    key: str,
    model: Mapping[str, Any] | None,
    prefix: str,
    numbers: list[Any],
) -> dict[Any, str]:
    if all(isinstance(number, str) for number in numbers):
        return {number: live.plain_name(number) for number in numbers}
    own = [name for group in saved["param_groups"] for name in group.get("param_names") or []]
    beside = _at(content, f"outlast.param_names.{key}")
    for told in (beside, own):
        if isinstance(told, list) and len(told) == len(numbers) and all(isinstance(name, str) for name in told):
            return {number: prefix + live.plain_name(name) for number, name in zip(numbers, told, strict=True)}
    hint = (
        "Make the optimizer with `model.named_parameters()`, so that torch stores the names, and save again; or load "
        "the file in the training script, and save with a Run."
    )
    if model is None or len(saved["param_groups"]) != 1:
        why = "there is no model beside it" if model is None else f"it has {len(saved['param_groups'])} groups"
        raise Refused(f"{key} says no names of its parameters, and {why}; nothing was stored.", hint=hint)
    for candidates in _candidates(model):
        if len(candidates) == len(numbers):
            names = dict(zip(numbers, candidates, strict=True))
            _refuse_misfits(saved["state"], names, model, key, hint)
            return {number: prefix + name for number, name in names.items()}
    count = len(list(_candidates(model))[-1])
    raise Refused(
        f"{key} has {len(numbers)} parameters without names, and the model has {count}; nothing was stored.", hint=hint
    )


def _candidates(model: Mapping[str, Any]) -> list[list[str]]:
    """The names of what may be parameters: every tensor of floats once, with and without well-known buffers."""
    floats: dict[object, str] = {}
    for name, value in model.items():
        if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
            place = value.data_ptr(), value.shape, value.stride()
            floats.setdefault(place if value.numel() else name, name)
    every = list(floats.values())
    return [every, [name for name in every if name.rpartition(".")[2] not in _BUFFERS]]


def _refuse_misfits(
    state: Mapping[Any, Any], names: Mapping[Any, str], model: Mapping[str, Any], key: str, hint: str
) -> None:
    """The moments of a parameter have its shape; where one has not, the order is another."""
    for number, name in names.items():
        for what, value in state.get(number, state.get(str(number), {})).items():
            if what in _MOMENTS and isinstance(value, torch.Tensor) and value.shape != model[name].shape:
                raise Refused(
                    f"{what} of parameter {number} of {key} has shape {list(value.shape)}, and {name}, the model's "
                    f"parameter in that place, {list(model[name].shape)}: their order is another; nothing was stored.",
                    hint=hint,
                )


# -- store -----------------------------------------------------------------------------------------------


def _part(key: str, kind: str, value: Any) -> Part:
    leaves = Leaves(set())
    if kind == "module":
        more = Leaves(set())
        node = {
            name: leaves.take(name, each)
            if isinstance(each, torch.Tensor)
            else encode(each, (key, name), live.named_by_path(more))
            for name, each in value.items()
        }
        return Part(kind, {"state": node, "buffers": {}, "grads": {}}, leaves.found, more.found)
    return Part(kind, encode(value, (key,), live.named_by_path(leaves)), leaves.found)


def _commit(repository: Repository, run: str, step: int, parts: Mapping[str, Part]) -> Snapshot:
    live = {(file, leaf.name): leaf.tensor for file, leaves in saving.files_of(parts).items() for leaf in leaves}

    def content(file: str, name: str) -> LeafBytes:
        return LeafBytes(tensor_bytes(live[file, name].contiguous()), {})

    captured = Captured(step, parts, content, lambda: None, {"imported": True})
    return saving.persist(repository, run, lambda: captured, {}, Ranks())
