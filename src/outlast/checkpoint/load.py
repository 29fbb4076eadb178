"""Load a checkpoint into live objects: every byte verified, straight into the memory where it belongs.

Each rank finds its own files. Where the ranks, or what each of them holds of a sharded tensor, are others than
those that saved, tensors are put together from the files of all ranks; what differed by rank besides (random
numbers, place in the data) is then that of rank 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from outlast.checkpoint import state as live
from outlast.checkpoint.destinations import destinations
from outlast.checkpoint.leaves import DTYPES, Form, Region, form_of, tensor_bytes
from outlast.checkpoint.state import Part, State
from outlast.checkpoint.state_file import RNG, describe, folder_of, ranks_of
from outlast.checkpoint.tree import Node
from outlast.checkpoint.tree_text import tensor_nodes
from outlast.errors import Corrupt, Refused
from outlast.records import Entry, Snapshot
from outlast.repo import formats
from outlast.repo.content import Content, RecentChunks
from outlast.repo.repository import Repository, chunk_offsets

_LINES_MAX = 18
Tensors = dict[str, dict[str, torch.Tensor]]
Places = dict[str, list[tuple[int, memoryview]]]


class Loaded(msgspec.Struct):
    step: int
    snapshot: Snapshot
    bytes: int
    facts: dict[str, Any] = {}
    notes: list[str] = []
    """what is not as it was when it was saved"""


class Stored(NamedTuple):
    """A tensor in a file of the checkpoint."""

    entry: Entry
    offset: int
    length: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Shelf:
    """What one rank saved."""

    def __init__(self, files: Mapping[str, Entry], folder: str, chunks: RecentChunks, snapshot: Snapshot) -> None:
        self._chunks, self._snapshot = chunks, snapshot
        self.files = {path.removeprefix(folder): entry for path, entry in files.items() if path.startswith(folder)}
        self.described = describe(self.files, chunks, snapshot)
        self.parts = {key: Part(kind, tree) for key, (kind, tree) in self.described.parts.items()}
        self._tensors: dict[str, dict[str, Stored]] = {}

    def tensors(self, key: str) -> dict[str, Stored]:
        """Those of both files of a key, by name; all that its tree speaks of, in a form that fits it."""
        if key not in self._tensors:
            found: dict[str, Stored] = {}
            for file in (f"{key}.safetensors", f"{key}.more.safetensors"):
                if file in self.files:
                    found.update(_tensors_of(self.files[file], self._chunks))
            for node in tensor_nodes(self.parts[key].tree) if key in self.parts else ():
                stored = found.get(node["name"])
                if stored is None:
                    what = f"the files of {key} lack the tensor {node['name']}."
                    raise Corrupt(f"checkpoint {self._snapshot.id[:8]} is not whole: {what}")
                try:
                    form_of(node, Form(stored.shape, stored.dtype))
                except Corrupt as exc:
                    raise Corrupt(f"checkpoint {self._snapshot.id[:8]}, {key}: {exc.message}") from exc
            self._tensors[key] = found
        return self._tensors[key]

    def form_of(self, key: str, node: Node) -> Form:
        """Of the whole tensor, that of all ranks together where it is sharded."""
        stored = self.tensors(key)[node["name"]]
        return form_of(node, Form(stored.shape, stored.dtype))

    def read(self, stored: Stored) -> torch.Tensor:
        data = bytearray(Content(stored.entry, self._chunks.get).read(stored.offset, stored.length))
        flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return flat.view(stored.dtype).reshape(stored.shape)

    @cached_property
    def offsets(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """(key, name of a leaf) -> where in the whole tensor what is stored begins, for those that are sharded."""
        return {
            (key, node["name"]): tuple(node["global"]["offset"])
            for key, part in self.parts.items()
            for node in tensor_nodes(part.tree)
            if "global" in node
        }

    def region(self, key: str, name: str) -> Region:
        shape = self.tensors(key)[name].shape
        return Region(self.offsets.get((key, name), (0,) * len(shape)), shape)


def load(
    repository: Repository,
    snapshot: Snapshot,
    state: State,
    rank: int = 0,
    ranks: int = 1,
    *,
    check: Callable[[Loaded], None] | None = None,
) -> Loaded:
    """Fill the live objects of `state`. Raises `Corrupt`, `Refused`; then they may be filled in part.

    `check` gets what is to be loaded before anything is changed, and what it raises keeps everything as it is.
    """
    files = {entry.path: entry for entry in repository.entries(snapshot) if entry.type == "file"}
    chunks = RecentChunks(repository)
    saved_ranks = ranks_of(files) or 1
    shelves = Shelves(files, saved_ranks, chunks, snapshot)
    shelf = shelves[rank if saved_ranks == ranks else 0]
    missing = [key for key in state if key not in shelf.parts]
    if missing:
        raise Refused(
            f"checkpoint {snapshot.id[:8]} has no {', '.join(missing)}; it has {', '.join(shelf.parts)}.",
            hint="Leave out of the state what is new until it was resumed, and begin another run with all of it.",
        )
    wanted = {key: part for key, part in shelf.parts.items() if key in state or key == RNG}
    classes: Any = shelf.described.facts.get("classes", {})
    refuse_mismatch(snapshot, mismatches(state, wanted, shelf.form_of, classes))
    regions = live.regions(state, wanted, shelf.form_of)
    targets = destinations(state, wanted)
    notes = [] if saved_ranks == ranks else [_resharding(shelf, state, saved_ranks, ranks)]
    left_out = [key for key in shelf.parts if key not in wanted]
    notes += [f"not in the state, and so not restored: {', '.join(left_out)}"] if left_out else []
    notes += sorted(_overridden(state, wanted))
    if saved_ranks != ranks:
        notes += _taken_of_first(snapshot, shelves, state)
    total = sum(entry.size for entry in shelf.files.values())
    loaded = Loaded(shelf.described.step, snapshot, total, shelf.described.facts, notes)
    if check is not None:
        check(loaded)
    tensors: Tensors = {}
    runs: dict[str, list[tuple[int, memoryview]]] = {}
    spread: list[tuple[str, str, torch.Tensor, Region]] = []
    for key in wanted:
        mine = tensors[key] = {}
        for name, stored in shelf.tensors(key).items():
            region = regions.get(key, {}).get(name)
            have = shelf.region(key, name)
            shape = have.shape if region is None else region.shape
            target = targets.get(key, {}).get(name)
            if target is None or target.dtype != stored.dtype or tuple(target.shape) != shape:
                target = torch.empty(shape, dtype=stored.dtype)
            mine[name] = target
            if region is not None and region != have:
                spread.append((key, name, target, region))
            elif stored.length:
                runs.setdefault(stored.entry.path, []).append((stored.offset, tensor_bytes(target)))
    _fill(repository, files, runs)
    for key, name, target, region in spread:
        put_together(shelves, key, name, target, region)
    try:
        live.give_back(state, wanted, tensors, regions)
    except Corrupt as exc:
        raise Corrupt(f"checkpoint {snapshot.id[:8]} can't be given back: {exc.message}") from exc
    if rank >= saved_ranks or (rank and saved_ranks != ranks):
        live.reseed(rank)
    return loaded


class Shelves:
    """Those of all ranks, looked at when they are needed."""

    def __init__(self, files: Mapping[str, Entry], count: int, chunks: RecentChunks, snapshot: Snapshot) -> None:
        self._files, self._chunks, self._snapshot = files, chunks, snapshot
        self._count = count
        self._found: dict[int, Shelf] = {}

    def __getitem__(self, rank: int) -> Shelf:
        if rank not in self._found:
            folder = folder_of(rank, self._count)
            self._found[rank] = Shelf(self._files, folder, self._chunks, self._snapshot)
        return self._found[rank]

    def __iter__(self) -> Iterator[Shelf]:
        return (self[rank] for rank in range(self._count))


def refuse_mismatch(snapshot: Snapshot, found: list[str]) -> None:
    """Raises `Refused`, before anything is changed, with what doesn't fit."""
    if not found:
        return
    shown = found[:_LINES_MAX] + ([f"and {len(found) - _LINES_MAX} more"] if len(found) > _LINES_MAX else [])
    raise Refused(
        f"checkpoint {snapshot.id[:8]} does not fit the state; nothing was loaded:\n  " + "\n  ".join(shown),
        hint="Build the model and the optimizer as they were, or load by name what you need of it.",
    )


def mismatches(state: State, parts: Mapping[str, Part], form_of: live.FormOf, classes: Mapping[str, str]) -> list[str]:
    """What keeps saved parts from being given back, a line each: kinds, and names, shapes and types of tensors."""
    found = []
    names = live.parameter_names(state)
    for key, item in state.items():
        part = parts[key]
        if part.kind != live.kind_of(item):
            found.append(f"{key}: was a {part.kind}, is a {live.kind_of(item)}")
        elif part.kind == "module":
            mine = {
                live.plain_name(name): value for name, value in live.unwrap(item).state_dict(keep_vars=True).items()
            }
            found += _missing(key, mine, part.tree["state"])
            buffers = {live.plain_name(name): buffer for name, buffer in live.unwrap(item).named_buffers()}
            parameters = {live.plain_name(name): each for name, each in live.unwrap(item).named_parameters()}
            for section, here in (("state", mine), ("buffers", buffers), ("grads", parameters)):
                for name in sorted(here.keys() & part.tree[section].keys()):
                    node, what = part.tree[section][name], f"gradient of {name}" if section == "grads" else name
                    if node is not None or section != "grads":
                        found += _misfits(f"{key}: ", what, here[name], node, partial(form_of, key))
        elif part.kind == "optimizer":
            mine = dict.fromkeys(live.numbered(item, names).values())
            saved_names = dict.fromkeys(name for group in part.tree["param_groups"] for name in group["params"])
            if classes.get(key, live.class_name(item)) != live.class_name(item):
                found.append(f"{key}: was of {classes[key]}, is of {live.class_name(item)}")
            found += _missing(key, mine, saved_names) or _misgrouped(key, item, part.tree, names)
        elif hasattr(item, "differs_from"):
            differs = item.differs_from(part.tree) if isinstance(part.tree, dict) else "was no dictionary"
            found += [f"{key}: {differs}"] if differs else []
        elif isinstance(item, torch.Tensor):
            found += _misfits("", key, item, part.tree, partial(form_of, key))
    return found


def _overridden(state: State, parts: Mapping[str, Part]) -> Iterator[str]:
    """Options of optimizers that the script gives otherwise than they were: what was saved counts."""
    for key, item in state.items():
        if not isinstance(item, torch.optim.Optimizer):
            continue
        for at, (live_group, saved) in enumerate(zip(item.param_groups, parts[key].tree["param_groups"], strict=False)):
            scheduled = {"lr"} if "initial_lr" in saved else set()
            for name in saved.keys() & live_group.keys() - {"params"} - scheduled:
                now, was = live_group[name], saved[name]
                if type(now) is type(was) and isinstance(now, int | float) and now != was:
                    yield f"{name} of {key}, group {at}, is {now} in the script, and goes on as {was}"


def _misfits(prefix: str, name: str, value: object, node: Node, form_of: Callable[[Node], Form]) -> Iterator[str]:
    """What keeps the live tensor of a name from taking what a node stands for."""
    if not isinstance(value, torch.Tensor) or (name.endswith("_extra_state") and not live.is_tensor(node)):
        return
    if not live.is_tensor(node):
        yield f"{prefix}retyped {name}: was no tensor"
        return
    shape, dtype = form_of(node)
    if shape != tuple(value.shape):
        yield f"{prefix}reshaped {name}: was {list(shape)}, is {list(value.shape)}"
    if dtype != value.dtype:
        was, now = (str(each).removeprefix("torch.") for each in (dtype, value.dtype))
        yield f"{prefix}retyped {name}: was {was}, is {now}"


def _misgrouped(key: str, optimizer: torch.optim.Optimizer, tree: Node, names: dict[int, str]) -> list[str]:
    """What of the groups can't be matched by the names of their parameters."""
    by_number = live.numbered(optimizer, names)
    home = {name: at for at, group in enumerate(tree["param_groups"]) for name in group["params"]}
    found = []
    for at, group in enumerate(optimizer.state_dict()["param_groups"]):
        saved = {home[by_number[number]] for number in group["params"]}
        if len(saved) > 1:
            found.append(f"{key}: group {at} holds parameters that were in {len(saved)} groups")
        elif not saved and at >= len(tree["param_groups"]):
            found.append(f"{key}: group {at} is empty, and there was none like it")
    return found


def _missing(key: str, mine: Mapping[str, object], saved: Mapping[str, object]) -> list[str]:
    return [f"{key}: missing {name}: the checkpoint lacks it" for name in mine if name not in saved] + [
        f"{key}: unexpected {name}: only the checkpoint has it" for name in saved if name not in mine
    ]


def _resharding(shelf: Shelf, state: State, saved_ranks: int, ranks: int) -> str:
    def told(count: int, mesh: Mapping[str, int]) -> str:
        return " ".join([f"{count} rank{'s' * (count != 1)}", *(f"{name}={size}" for name, size in mesh.items())])

    parallel: Any = shelf.described.facts.get("parallel", {})
    before, now = told(saved_ranks, parallel.get("mesh", {})), told(ranks, live.mesh(state))
    return f"saved with {before}, now {now}: resharding; what differed by rank is taken of rank 0"


def _taken_of_first(snapshot: Snapshot, shelves: Shelves, state: State) -> list[str]:
    """Raises `Refused` for what differs by rank and isn't known to be a part of a whole; a note for what may differ."""
    differing = []
    for key, item in state.items():
        first = shelves[0]
        files = [[shelf.files.get(f"{key}{end}.safetensors") for shelf in shelves] for end in ("", ".more")]
        if all(_chunks(entry) == _chunks(each[0]) for each in files for entry in each):
            continue
        may_differ = set()
        if isinstance(item, torch.nn.Module):
            may_differ = {name for name, _ in live.unwrap(item).named_buffers()}
        for name, stored in first.tensors(key).items():
            if (key, name) in first.offsets:
                continue
            mine = first.read(stored)
            if any(not _same(mine, shelf, key, name) for shelf in shelves):
                differing.append((key, name))
                if live.kind_of(item) in ("module", "optimizer") and live.plain_name(name) not in may_differ:
                    raise Refused(
                        f"{name} of {key} in checkpoint {snapshot.id[:8]} differs between the ranks that saved it, and "
                        "says no layout, so it can't be resharded; nothing was loaded.",
                        hint="Go on with as many ranks as saved it, or shard it as a DTensor.",
                    )
    told = "{} tensors differ by rank, such as {} of {}: those of rank 0 are taken"
    return [told.format(len(differing), *reversed(differing[0]))] if differing else []


def _chunks(entry: Entry | None) -> object:
    return None if entry is None else entry.chunks


def _same(mine: torch.Tensor, shelf: Shelf, key: str, name: str) -> bool:
    stored = shelf.tensors(key).get(name)
    return stored is not None and stored.shape == tuple(mine.shape) and (
        tensor_bytes(shelf.read(stored)) == tensor_bytes(mine)
    )  # fmt: skip


def _overlap(a: Region, b: Region) -> bool:
    return all(max(x, y) < min(x + m, y + n) for x, m, y, n in zip(*a, *b, strict=True))


def put_together(shelves: Shelves, key: str, name: str, target: torch.Tensor, wanted: Region) -> None:
    """Fill the wanted region from the regions that ranks stored. Raises `Corrupt` where they don't make it up."""
    covered: dict[tuple[int, ...], Region] = {}
    filled = 0
    for shelf in shelves:
        if name not in shelf.tensors(key):
            continue
        have = shelf.region(key, name)
        low = [max(a, b) for a, b in zip(have.offset, wanted.offset, strict=True)]
        high = [min(a + m, b + n) for a, m, b, n in zip(*have, *wanted, strict=True)]
        if any(a >= b for a, b in zip(low, high, strict=True)) or have.offset in covered:
            continue
        if any(_overlap(have, other) for other in covered.values()):
            raise Corrupt(f"{name} of {key} is stored in parts that overlap.")
        covered[have.offset] = have  # the same region on several ranks is the same replica
        source = shelf.read(shelf.tensors(key)[name])
        into = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, wanted.offset, strict=True))
        out_of = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, have.offset, strict=True))
        with torch.no_grad():
            target[into].copy_(source[out_of])
        filled += source[out_of].numel()
    if filled != target.numel():
        raise Corrupt(f"{name} of {key} is stored in parts that don't make up the whole tensor.")


def _tensors_of(entry: Entry, chunks: RecentChunks) -> Iterator[tuple[str, Stored]]:
    content = Content(entry, chunks.get)
    found = formats.tensors(content.read, entry.size)
    if found is None:
        raise Corrupt(f"{entry.path} is no safetensors file.")
    for each in found:
        dtype = DTYPES.get(each.dtype)
        if dtype is None:
            raise Refused(f"{each.name} of {entry.path} has elements of type {each.dtype}, which torch lacks.")
        yield each.name, Stored(entry, each.offset, each.length, dtype, each.shape)


def _aim(entry: Entry, runs: list[tuple[int, memoryview]], places: Places) -> None:
    """For each chunk: (its offset within the chunk, memory to fill from there)."""
    at = 0
    runs = sorted(runs, key=lambda run: run[0])
    for start, (chunk, length) in chunk_offsets(entry):
        while at < len(runs) and runs[at][0] + len(runs[at][1]) <= start:
            at += 1
        each = at
        while each < len(runs) and runs[each][0] < start + length:
            offset, memory = runs[each]
            low, high = max(offset, start), min(offset + len(memory), start + length)
            places.setdefault(chunk, []).append((low - start, memory[low - offset : high - offset]))
            each += 1


def _fill(repository: Repository, files: Mapping[str, Entry], runs: Mapping[str, list[tuple[int, memoryview]]]) -> None:
    """Read each chunk once, and put it wherever it belongs. `runs`: by path, (offset in the file, memory)."""
    places: Places = {}
    for path, mine in runs.items():
        _aim(files[path], mine, places)

    def deliver(chunk: bytes, plain: bytes | memoryview) -> None:
        whole = np.frombuffer(plain, np.uint8)
        for skip, memory in places[chunk.hex()]:
            # numpy lets other threads run meanwhile, which slices of memory don't.
            np.copyto(np.frombuffer(memory, np.uint8), whole[skip : skip + len(memory)])

    repository.fetch((bytes.fromhex(chunk) for chunk in places), deliver)
