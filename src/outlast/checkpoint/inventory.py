"""What a checkpoint holds of a training, and what it doesn't. Torch is not needed to look."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from outlast.checkpoint.state_file import RNG, Description, describe, folder_of, ranks_of
from outlast.checkpoint.tree_text import is_tensor, tensor_nodes, text
from outlast.errors import Corrupt
from outlast.records import Entry, Snapshot
from outlast.repo import formats
from outlast.repo.content import Content, RecentChunks
from outlast.repo.formats import Tensor
from outlast.repo.repository import Repository


class Held(NamedTuple):
    """A tensor in a file of a checkpoint."""

    content: Content
    tensor: Tensor

    def pieces(self) -> tuple[tuple[str, int, int], ...]:
        """(chunk, where in it, bytes): two tensors whose pieces are equal are equal, and needn't be read."""
        at, end, found = self.tensor.offset, self.tensor.offset + self.tensor.length, []
        while at < end:
            piece = self.content.piece(at)
            length = min(piece.rest, end - at)
            found.append((piece.chunk, piece.skip, length))
            at += length
        return tuple(found)


class RankFiles:
    """What one rank saved."""

    def __init__(self, rank: int, files: dict[str, Entry], chunks: RecentChunks, snapshot: Snapshot) -> None:
        self.rank = rank
        self.described: Description = describe(files, chunks, snapshot)
        self._files, self._chunks = files, chunks

    def tensors(self) -> Iterator[tuple[tuple[str, str], Held]]:
        """((key, name), where it lies), file by file. Raises `Corrupt`."""
        for path, entry in self._files.items():
            if not path.endswith(".safetensors"):
                continue
            content = Content(entry, self._chunks.get)
            found = formats.tensors(content.read, entry.size)
            if found is None:
                raise Corrupt(f"{entry.path} is no safetensors file.")
            for each in found:
                yield (path.partition(".")[0], each.name), Held(content, each)


def rank_files(repository: Repository, snapshot: Snapshot) -> list[RankFiles]:
    """What each rank saved; empty for a snapshot that no `Run` made. Raises `Corrupt`, `Refused`."""
    files = {entry.path: entry for entry in repository.entries(snapshot) if entry.type == "file"}
    ranks = ranks_of(files)
    chunks = RecentChunks(repository)
    found = []
    for rank in range(ranks):
        folder = folder_of(rank, ranks)
        mine = {path.removeprefix(folder): entry for path, entry in files.items() if path.startswith(folder)}
        found.append(RankFiles(rank, mine, chunks, snapshot))
    return found


class PartView(msgspec.Struct):
    """One key of the state."""

    key: str
    kind: str
    tensors: int
    bytes: int
    dtypes: list[str]


class RankView(msgspec.Struct):
    """What is not the same on all ranks, or may not be."""

    rank: int
    folder: str
    parts: list[PartView]


class Inventory(msgspec.Struct):
    """A checkpoint, told."""

    step: int
    ranks: list[RankView]
    captured: list[tuple[str, str]]
    """(what, how it was) of what no tensor shows"""
    not_captured: list[tuple[str, str]]
    """(what, why)"""
    facts: dict[str, Any]
    """of rank 0: environment, origin, parallel, life"""


def inventory(ranks: list[RankFiles]) -> Inventory:
    views = [_rank(each, len(ranks)) for each in ranks]
    described = ranks[0].described
    captured: list[tuple[str, str]] = []
    lacking: list[tuple[str, str]] = []
    for key, (kind, tree) in described.parts.items():
        tell = _TELLERS.get(kind)
        for what, told, is_there in tell(key, tree) if tell else ():
            (captured if is_there else lacking).append((what, told))
    kinds = {kind for kind, _ in described.parts.values()}
    if not any(what == "data position" for what, _ in captured):
        lacking.append(("data position", "no loader is in the state, so the data begins anew"))
    if "optimizer" not in kinds:
        lacking.append(("optimizer", "none is in the state"))
    facts: Any = described.facts
    return Inventory(described.step, views, sorted(captured, key=_in_order), sorted(lacking, key=_in_order), facts)


_ORDER = ("random numbers", "data position", "learning rate", "gradients", "buffers", "tied tensors", "optimizer")


def _in_order(told: tuple[str, str]) -> int:
    return _ORDER.index(told[0])


def _rank(files: RankFiles, ranks: int) -> RankView:
    parts = {key: PartView(key, kind, 0, 0, []) for key, (kind, _) in files.described.parts.items()}
    for (key, _), held in files.tensors():
        part = parts.setdefault(key, PartView(key, "unknown", 0, 0, []))
        part.tensors += 1
        part.bytes += held.tensor.length
        if held.tensor.dtype not in part.dtypes:
            part.dtypes.append(held.tensor.dtype)
    return RankView(files.rank, folder_of(files.rank, ranks), list(parts.values()))


Told = Iterator[tuple[str, str, bool]]
"""(what, how, whether it was captured)"""


def _of_module(key: str, tree: Any) -> Told:
    gradients = tree.get("grads", {})
    kept = sum(is_tensor(each) for each in gradients.values())
    if kept:
        yield "gradients", f"{key}: {kept:,}, which the next step of the optimizer still needs", True
    if len(gradients) > kept:
        yield "gradients", f"{key}: {len(gradients) - kept:,}, which were used up", False
    if tree.get("buffers"):
        yield "buffers", f"{key}: {len(tree['buffers']):,} that its state dict lacks", True
    names = [node["name"] for node in tensor_nodes(tree.get("state", {}))]
    if len(names) > len(set(names)):
        yield "tied tensors", f"{key}: {len(names):,} names of {len(set(names)):,} tensors", True


def _of_optimizer(key: str, tree: Any) -> Told:
    for at, group in enumerate(tree.get("param_groups", [])):
        if "lr" in group:
            count = len(group.get("params", []))
            where = f"{key}, group {at}" if len(tree["param_groups"]) > 1 else key
            yield "learning rate", f"{where}: {text(group['lr'])} for {count:,} parameter{'s' * (count != 1)}", True


def _of_stateful(key: str, tree: Any) -> Told:
    if not isinstance(tree, dict) or not {"epoch", "consumed"} <= tree.keys():
        return
    samples = f" of {tree['samples']:,}" if isinstance(tree.get("samples"), int) else ""
    consumed = f"{tree['consumed']:,}" if isinstance(tree["consumed"], int) else text(tree["consumed"])
    where = "between two epochs" if tree.get("seed") is None else f"{consumed}{samples} consumed"
    yield "data position", f"{key}: epoch {text(tree['epoch'])}, {where}", True


def _of_random_numbers(_: str, tree: Any) -> Told:
    accelerators = len(tree.get("cuda", []))
    names = [name for name in ("python", "numpy", "torch") if name in tree]
    many = f"{accelerators} accelerator{'s' * (accelerators != 1)}"
    yield "random numbers", ", ".join([*names, *([many] if accelerators else [])]), True
    if not accelerators:
        yield "random numbers", "of accelerators: there was none", False


_TELLERS = {
    "module": _of_module,
    "optimizer": _of_optimizer,
    "stateful": _of_stateful,
    RNG: _of_random_numbers,
}
