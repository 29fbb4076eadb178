"""Load a checkpoint into live objects: every byte verified, straight into the memory where it belongs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import torch

from outlast.checkpoint import state as live
from outlast.checkpoint.leaves import DTYPES, tensor_bytes
from outlast.checkpoint.save import STATE_FILE, STATE_VERSION, Description
from outlast.checkpoint.state import Part, State
from outlast.errors import Corrupt, Refused
from outlast.records import Entry, Snapshot, parse
from outlast.repo import formats
from outlast.repo.content import Content, RecentChunks
from outlast.repo.repository import Repository, chunk_offsets

_LINES_MAX = 18
Tensors = dict[str, dict[str, torch.Tensor]]


class Loaded(msgspec.Struct):
    step: int
    snapshot: Snapshot
    bytes: int


def load(repository: Repository, snapshot: Snapshot, state: State) -> Loaded:
    """Fill the live objects of `state`. Raises `Corrupt`, `Refused`; then they may be filled in part."""
    files = {entry.path: entry for entry in repository.entries(snapshot) if entry.type == "file"}
    chunks = RecentChunks(repository)
    described = describe(files, chunks, snapshot)
    parts = {key: Part(kind, tree) for key, (kind, tree) in described.parts.items()}
    missing = [key for key in state if key not in parts]
    if missing:
        raise Refused(f"checkpoint {snapshot.id[:8]} has no {', '.join(missing)}; it has {', '.join(parts)}.")
    wanted = {key: part for key, part in parts.items() if key in state or key == live.RNG}
    targets = live.destinations(state, wanted)
    tensors: Tensors = {}
    places: dict[str, list[tuple[int, memoryview]]] = {}
    total = 0
    for key in wanted:
        mine = tensors[key] = {}
        for file, into in ((f"{key}.safetensors", targets.get(key, {})), (f"{key}.more.safetensors", {})):
            entry = files.get(file)
            if entry is not None:
                total += entry.size
                mine.update(_plan(entry, chunks, into, places))
    refuse_mismatch(snapshot, live.mismatches(state, wanted, tensors))
    _fill(repository, places)
    live.give_back(state, wanted, tensors)
    return Loaded(described.step, snapshot, total)


def refuse_mismatch(snapshot: Snapshot, found: list[str]) -> None:
    """Raises `Refused`, before anything is changed, with what doesn't fit."""
    if not found:
        return
    shown = found[:_LINES_MAX] + ([f"and {len(found) - _LINES_MAX} more"] if len(found) > _LINES_MAX else [])
    raise Refused(
        f"checkpoint {snapshot.id[:8]} does not fit the state; nothing was loaded:\n  " + "\n  ".join(shown),
        hint="Build the model and the optimizer as they were, or load by name what you need of it.",
    )


def describe(files: Mapping[str, Entry], chunks: RecentChunks, snapshot: Snapshot) -> Description:
    """What `state.json` of a checkpoint says. Raises `Corrupt`, and `Refused` for a later version."""
    entry = files.get(STATE_FILE)
    if entry is None:
        raise Refused(f"snapshot {snapshot.id[:8]} is no checkpoint of a training state: it has no {STATE_FILE}.")
    what = f"{STATE_FILE} of checkpoint {snapshot.id[:8]}"
    found = parse(Content(entry, chunks.get).read(0, entry.size), Description, what)
    if found.version != STATE_VERSION:
        raise Refused(f"{what} is of version {found.version}, and this program knows {STATE_VERSION}.")
    return found


def _plan(
    entry: Entry,
    chunks: RecentChunks,
    into: Mapping[str, torch.Tensor],
    places: dict[str, list[tuple[int, memoryview]]],
) -> dict[str, torch.Tensor]:
    """The tensors of a file, in live memory where it fits; `places` learns which chunk is to fill what."""
    content = Content(entry, chunks.get)
    found = formats.tensors(content.read, entry.size)
    if found is None:
        raise Corrupt(f"{entry.path} is no safetensors file.")
    tensors: dict[str, torch.Tensor] = {}
    runs: list[tuple[int, memoryview]] = []
    for each in found:
        dtype = DTYPES.get(each.dtype)
        if dtype is None:
            raise Refused(f"{each.name} of {entry.path} has elements of type {each.dtype}, which torch lacks.")
        target = into.get(each.name)
        if target is None or target.dtype != dtype or tuple(target.shape) != each.shape:
            target = torch.empty(each.shape, dtype=dtype)
        tensors[each.name] = target
        if each.length:
            runs.append((each.offset, tensor_bytes(target)))
    _aim(entry, runs, places)
    return tensors


def _aim(entry: Entry, runs: list[tuple[int, memoryview]], places: dict[str, list[tuple[int, memoryview]]]) -> None:
    """For each chunk: (its offset within the chunk, memory to fill from there). Both lists are in order of offset."""
    at = 0
    for start, (chunk, length) in chunk_offsets(entry):
        while at < len(runs) and runs[at][0] + len(runs[at][1]) <= start:
            at += 1
        each = at
        while each < len(runs) and runs[each][0] < start + length:
            offset, memory = runs[each]
            low, high = max(offset, start), min(offset + len(memory), start + length)
            places.setdefault(chunk, []).append((low - start, memory[low - offset : high - offset]))
            each += 1


def _fill(repository: Repository, places: dict[str, list[tuple[int, memoryview]]]) -> None:
    def deliver(chunk: bytes, plain: bytes | memoryview) -> None:
        view = memoryview(plain)
        for skip, memory in places[chunk.hex()]:
            memory[:] = view[skip : skip + len(memory)]

    repository.fetch((bytes.fromhex(chunk) for chunk in places), deliver)


def checkpoints(repository: Repository, name: str) -> list[tuple[int, Snapshot]]:
    """(step, snapshot) of a run, oldest first."""
    found: list[tuple[int, Snapshot]] = []
    for snapshot in repository.snapshots():
        step: Any = snapshot.tags.get("step", "")
        if snapshot.kind == "checkpoint" and snapshot.name == name and step.isdigit():
            found.append((int(step), snapshot))
    return found
