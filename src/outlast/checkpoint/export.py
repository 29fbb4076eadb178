"""A checkpoint of a run as files that other programs read: safetensors, torch, HDF5, torch.distributed.checkpoint."""

from __future__ import annotations

import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

import msgspec
import numpy as np
import torch

from outlast.checkpoint import load as loading
from outlast.checkpoint.leaves import DTYPES, Region, rebuild, tensor_bytes
from outlast.checkpoint.load import Shelf
from outlast.checkpoint.new_file import fresh
from outlast.checkpoint.state_file import STATE_FILE, folder_of
from outlast.checkpoint.tree import Node, decode
from outlast.errors import Corrupt, InvalidInput, NotFound, OutlastError, Refused
from outlast.events import Event, ListSink
from outlast.records import Entry, Snapshot
from outlast.repo.content import RecentChunks
from outlast.repo.repository import Repository, chunk_offsets

FORMATS = ("safetensors", "torch", "hdf5", "dcp")

_MODULE = "module"
_HDF5_LIKE = {"BF16": "U16"} | {name: "U8" for name in DTYPES if name.startswith("F8_")}
"""what HDF5 has no type for is stored as numbers of the same bits"""


class Exported(msgspec.Struct):
    """What was written."""

    snapshot: str
    run: str
    step: int
    format: str
    path: str
    keys: list[str]
    files: int
    bytes: int
    notes: list[str] = []


def export(repository: Repository, snapshot: Snapshot, form: str, path: str) -> Exported:
    """Write a checkpoint to a new file or folder; every byte read is verified.

    Raises `Refused` where something is at `path`, and for what a form can't hold; `Corrupt`; `InvalidInput` where
    what writes a form is not installed, and for a backup. Then nothing is there.
    """
    if snapshot.kind != "checkpoint":
        raise InvalidInput(
            f"snapshot {snapshot.id[:8]} is a backup of files, not a checkpoint; nothing was written.",
            hint=f"`outlast restore {snapshot.id[:8]} --to DIR` brings it back.",
        )
    if form not in FORMATS:
        raise InvalidInput(f"there is no format {form}; nothing was written.", hint=f"Known are {', '.join(FORMATS)}.")
    files = {entry.path: entry for entry in repository.entries(snapshot) if entry.type == "file"}
    report = Exported(snapshot.id, snapshot.name, int(snapshot.tags.get("step", 0)), form, path, [], 0, 0)
    if form == "safetensors":
        with fresh(path) as part:
            _verbatim(repository, files, part)
        report.keys = sorted({_key(name) for name in files if name.endswith(".safetensors")})
        report.files, report.bytes = len(files), sum(entry.size for entry in files.values())
        return report
    ranks = sum(name.rpartition("/")[2] == STATE_FILE for name in files)
    if not ranks:
        raise Refused(
            f"checkpoint {snapshot.id[:8]} was not saved by a Run: it has no {STATE_FILE}; nothing was written.",
            hint="Export it as safetensors: its files come out as they are.",
        )
    shelves = loading.Shelves(files, ranks, RecentChunks(repository), snapshot)
    write = {"torch": _torch, "hdf5": _hdf5, "dcp": _dcp}[form]
    report.keys = list(shelves[0].parts)
    with fresh(path) as part:
        write(shelves, ranks, part, report)
        report.files, report.bytes = _measure(part)
    return report


def export_found(repository: Repository, find: Callable[[], Snapshot], form: str, path: str) -> Exported:
    """`export` of what `find` gives, from a repository that a training may be saving to.

    Its prunes take what was seen here. What is missing then is looked for once more, by what the log says now; that a
    pack is gone which no snapshot needs any more is no news. Raises `NotFound` where the checkpoint itself is gone.
    """
    sink, seq = repository.sink, repository.state.seq
    snapshot = find()
    repository.sink = told = ListSink()
    try:
        return export(repository, snapshot, form, path)
    except Corrupt:
        _refresh(repository)
        if repository.state.seq == seq:
            raise
    finally:
        repository.sink = sink
        if told.events:
            _refresh(repository)
        for event in told.events:
            if _is_news(repository, event):
                sink.event(event)
    if snapshot.id not in repository.state.snapshots:
        try:
            snapshot = find()
        except NotFound as exc:
            raise NotFound(
                f"checkpoint {snapshot.id[:8]} of {snapshot.name} was removed while it was exported: its run keeps "
                "others by now; nothing was written.",
                hint=f"`outlast export {snapshot.name}` takes the latest; Run(keep=...) says how many stay.",
            ) from exc
    return export(repository, snapshot, form, path)


def _refresh(repository: Repository) -> None:
    with suppress(OutlastError):  # the log is damaged, or out of reach: what was told or failed first is the news
        repository.refresh()


def _is_news(repository: Repository, event: Event) -> bool:
    place, _, name = event.fields.get("object", "").rpartition("/")
    return not place.startswith("packs") or repository.state.find(name) is not None


def _key(path: str) -> str:
    return path.rpartition("/")[2].removesuffix(".safetensors").removesuffix(".more")


def _measure(path: str) -> tuple[int, int]:
    if not os.path.isdir(path):
        return 1, os.path.getsize(path)
    sizes = [os.path.getsize(os.path.join(folder, file)) for folder, _, files in os.walk(path) for file in files]
    return len(sizes), sum(sizes)


# -- safetensors -----------------------------------------------------------------------------------------


def _verbatim(repository: Repository, files: Mapping[str, Entry], folder: str) -> None:
    os.mkdir(folder)
    for name, entry in files.items():
        if any(part in ("", ".", "..") for part in name.split("/")):
            raise Corrupt(f"a file of the checkpoint is called {name}.")
        os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
        places: dict[bytes, list[int]] = {}
        for start, (chunk, _) in chunk_offsets(entry):
            places.setdefault(bytes.fromhex(chunk), []).append(start)
        fd = os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        try:
            os.truncate(fd, entry.size)

            def deliver(
                chunk: bytes, plain: bytes | memoryview, fd: int = fd, places: dict[bytes, list[int]] = places
            ) -> None:
                for start in places[chunk]:
                    view = memoryview(plain)
                    while view:
                        done = os.pwrite(fd, view, start)
                        view, start = view[done:], start + done

            repository.fetch(places, deliver)
        finally:
            os.close(fd)


# -- torch and torch.distributed.checkpoint --------------------------------------------------------------


def _torch(shelves: Any, ranks: int, path: str, report: Exported) -> None:
    state, names = _state(shelves, ranks, report, by_number=True)
    known = {"run": report.run, "step": report.step, "snapshot": report.snapshot, "param_names": names}
    state = {**state, "outlast": known} if "outlast" not in state else state
    state.setdefault("step", report.step)
    torch.save(state, path)
    torch.load(path, weights_only=True, mmap=True)  # the proof that anybody can, without running code
    for key, found in names.items():
        report.notes.append(f'The parameters of {key} have numbers; ["outlast"]["param_names"] has {len(found)} names.')


def _dcp(shelves: Any, ranks: int, path: str, report: Exported) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    state, _ = _state(shelves, ranks, report, by_number=False)
    state.setdefault("step", report.step)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save(state, storage_writer=FileSystemWriter(path), no_dist=True)
    report.notes.append("Optimizers have names of parameters, not numbers, as torch's own `set_state_dict` takes them.")


def _state(
    shelves: Any, ranks: int, report: Exported, *, by_number: bool
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """What a plain PyTorch script would have saved, and the names of the parameters of each optimizer in order."""
    shelf: Shelf = shelves[0]
    state: dict[str, Any] = {}
    names: dict[str, list[str]] = {}
    left_out = []
    for key, part in shelf.parts.items():
        given: dict[str, torch.Tensor] = {}

        def give(node: Node, key: str = key, given: dict[str, torch.Tensor] = given) -> torch.Tensor:
            plain = not {"order", "complex"} & node.keys()
            if not plain:
                return rebuild(node, _read(shelves, key, node))
            if node["name"] not in given:  # tied tensors stay one
                given[node["name"]] = rebuild(node, _read(shelves, key, node))
            return given[node["name"]]

        tree: Any = part.tree
        if part.kind == _MODULE:
            state[key] = {name: _portable(decode(node, give)) for name, node in tree["state"].items()}
            if any(tree.get("grads", {}).values()) or tree.get("buffers"):
                left_out.append(key)
        else:
            state[key] = _portable(decode(tree, give))
            if part.kind == "optimizer" and by_number:
                state[key], names[key] = _numbered(state[key])
    if ranks > 1:
        first = folder_of(0, ranks).rstrip("/")
        report.notes.append(f"{ranks} ranks saved it. Sharded tensors are whole; what differs by rank is {first}'s.")
    if left_out:
        report.notes.append(
            f"Gradients, and buffers that are not persistent, of {', '.join(left_out)} are no part of a state dict."
        )
    return state, names


def _read(shelves: Any, key: str, node: Node) -> torch.Tensor:
    shelf: Shelf = shelves[0]
    stored = shelf.tensors(key).get(node["name"])
    if stored is None:
        raise Corrupt(f"the checkpoint lacks the tensor {node['name']} of {key}.")
    if "global" not in node:
        return shelf.read(stored)
    shape = tuple(node["global"]["shape"])
    blocks = {each.region(key, node["name"]) for each in shelves if node["name"] in each.tensors(key)}
    if sum(math.prod(block.shape) for block in blocks) != math.prod(shape):
        raise Corrupt(f"{node['name']} of {key} is stored in parts that don't make up the whole tensor.")
    whole = torch.empty(shape, dtype=stored.dtype)
    loading.put_together(shelves, key, node["name"], whole, Region((0,) * len(shape), shape))
    return whole


def _numbered(saved: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The state of an optimizer with numbers again, in the order of its groups, as torch counts them."""
    names = list(dict.fromkeys(name for group in saved["param_groups"] for name in group["params"]))
    numbers = {name: number for number, name in enumerate(names)}
    groups = [group | {"params": [numbers[name] for name in group["params"]]} for group in saved["param_groups"]]
    state = {numbers.get(name, name): values for name, values in saved["state"].items()}
    return saved | {"state": state, "param_groups": groups}, names


def _portable(value: Any) -> Any:
    """Without what `torch.load(weights_only=True)` refuses: numpy's values become torch's and Python's own."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, frozenset):
        return {_portable(each) for each in value}
    if isinstance(value, deque):
        return [_portable(each) for each in value]
    if type(value) in (list, tuple, set):
        return type(value)(_portable(each) for each in value)
    if isinstance(value, dict):
        return type(value)({_portable(key): _portable(each) for key, each in value.items()})
    return value


# -- HDF5 ------------------------------------------------------------------------------------------------


def _hdf5(shelves: Any, ranks: int, path: str, report: Exported) -> None:
    try:
        h5py = import_module("h5py")
    except ImportError as exc:
        raise InvalidInput(
            "HDF5 needs h5py, which is not installed; nothing was written.", hint="pip install 'outlast[hdf5]'"
        ) from exc
    with h5py.File(path, "w") as file:
        file.attrs.update({"run": report.run, "step": report.step, "snapshot": report.snapshot})
        for rank in range(ranks):
            shelf: Shelf = shelves[rank]
            group = file.require_group(folder_of(rank, ranks).rstrip("/") or "/")
            described = msgspec.json.encode(shelf.described)
            group.create_dataset(STATE_FILE, data=np.frombuffer(described, np.uint8))
            for key in shelf.parts:
                for name, array, attributes in _arrays(shelf, key):
                    made = group.require_group(key).create_dataset(name, data=array)
                    made.attrs.update(attributes)
    report.notes.append(f"What is no tensor stands in the dataset {STATE_FILE}, as JSON.")
    if ranks > 1:
        report.notes.append(f"Each of the {ranks} ranks has a group of its own, with its part of what is sharded.")


def _arrays(shelf: Shelf, key: str) -> Iterator[tuple[str, np.ndarray[Any, Any], dict[str, Any]]]:
    """(name, elements, what the type of the elements doesn't say)."""
    types = {dtype: name for name, dtype in DTYPES.items()}
    offsets = shelf.offsets
    for name, stored in shelf.tensors(key).items():
        if not name.strip("/") or any(part in ("", ".", "..") for part in name.split("/")):
            raise Refused(f"HDF5 has no name for the tensor {name!r} of {key}; nothing was written.")
        tensor = shelf.read(stored)
        type_name = types[stored.dtype]
        attributes: dict[str, Any] = {}
        if type_name in _HDF5_LIKE:
            attributes["dtype"] = str(stored.dtype).removeprefix("torch.")
        if (key, name) in offsets:
            attributes["offset"] = offsets[key, name]
        plain = torch.uint16 if type_name == "BF16" else torch.uint8
        dtype = torch.empty(0, dtype=plain if type_name in _HDF5_LIKE else stored.dtype).numpy().dtype
        yield name, np.frombuffer(tensor_bytes(tensor), dtype).reshape(stored.shape), attributes
