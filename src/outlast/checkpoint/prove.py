"""Inside a training that is to prove that it goes on bit for bit (see `doctor`), and what checkpoints keep for that.

The run goes on from one checkpoint. What was given back is compared with what was saved; then it trains until the
step of the later checkpoint, saves nothing and notes nothing, and is compared with that, tensor by tensor. A save
that would have made the later checkpoint is where it is compared: there, and not a moment before or after, the
state was what was saved.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import blake3
import msgspec
import torch

from outlast.checkpoint import environment, tree_text
from outlast.checkpoint import state as live
from outlast.checkpoint.doctor import VARIABLE, Finding, Order, Report
from outlast.checkpoint.leaves import Leaf, local, tensor_bytes
from outlast.checkpoint.load import Shelf, load
from outlast.checkpoint.pending import PendingSave
from outlast.checkpoint.ranks import Ranks
from outlast.checkpoint.stage import Staged
from outlast.checkpoint.state import Part, State
from outlast.checkpoint.state_file import folder_of, ranks_of
from outlast.checkpoint.tiers import Tier
from outlast.checkpoint.tree import Node, Path, encode
from outlast.errors import InvalidInput, OutlastError, Refused
from outlast.records import Snapshot
from outlast.repo.content import RecentChunks
from outlast.repo.repository import Repository
from outlast.store.layers import open_store

_FINDINGS_MAX = 200
_HASHED_BYTES_MAX = 4 << 20
_BLOCK_BYTES = 64 << 10
_ORDER = ("rng", "module", "optimizer")
_CATEGORIES = {"rng": "random numbers", "generator": "random numbers", "module": "model", "optimizer": "optimizer"}


# -- what a checkpoint keeps for it --------------------------------------------------------------------------


class _Since(msgspec.Struct):
    snapshot: str = ""
    first_batch: str | None = None


class Trail:
    """From which checkpoint the next one comes, and which batch was the first after it."""

    def __init__(self) -> None:
        self.wants = True
        """whether the next batch that is given out is such a first one"""
        self._since = _Since()
        self._if_saved: _Since | None = None

    def see(self, batch: object) -> None:
        self.wants = False
        (self._if_saved or self._since).first_batch = digest(batch)

    def went_on_from(self, snapshot: str) -> None:
        self._since, self._if_saved, self.wants = _Since(snapshot), None, True

    def saving(self) -> None:
        """Call `saved` when it is over: with None where it failed, for then the next one comes from the one before."""
        self._if_saved, self.wants = _Since(), True

    def saved(self, snapshot: Snapshot | None) -> None:
        if self._if_saved is not None and snapshot is not None:
            self._since = self._if_saved
            self._since.snapshot = snapshot.id
        self._if_saved = None

    def facts(self, *, asked: bool) -> dict[str, object]:
        """`asked`: the script called `save` itself; then the state may be another than at the end of the step."""
        return {"snapshot": self._since.snapshot, "first_batch": self._since.first_batch, "asked": asked}


def digest(batch: object) -> str | None:
    """BLAKE3 over nested values and tensors; of those of more than 4 MiB, parts. None for what has no safe form."""
    hasher = blake3.blake3()

    def take(path: Path, tensor: torch.Tensor) -> Node:
        hasher.update(msgspec.json.encode([[str(each) for each in path], str(tensor.dtype), list(tensor.shape)]))
        flat = local(tensor.detach()).reshape(-1).view(torch.uint8)
        starts = _starts(len(flat))
        if flat.device.type != "cpu" and starts:
            flat = torch.cat([flat[start : start + _BLOCK_BYTES] for start in starts]).cpu()
            starts = range(0, len(flat), _BLOCK_BYTES)
        memory = tensor_bytes(flat)
        for start in starts:
            hasher.update(memory[start : start + _BLOCK_BYTES])
        return None

    try:
        hasher.update(msgspec.json.encode(encode(_plain(batch), ("batch",), take)))
    except (OutlastError, RuntimeError, TypeError):
        return None
    return hasher.hexdigest()


def _starts(count: int) -> Sequence[int]:
    """Of the blocks to hash: all of them, or as many as a training may wait for, the first and the last included."""
    if count <= _HASHED_BYTES_MAX:
        return range(0, count, _BLOCK_BYTES)
    blocks = _HASHED_BYTES_MAX // _BLOCK_BYTES
    return [at * (count - _BLOCK_BYTES) // (blocks - 1) for at in range(blocks)]


def _plain(value: object) -> object:
    """Containers of other libraries as dictionaries and lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


# -- the proof -----------------------------------------------------------------------------------------------


class _Seen(msgspec.Struct):
    """What one rank saw."""

    findings: list[Finding] = []
    different: int = 0
    tensors: int = 0
    bytes: int = 0
    environment: list[str] = []
    first_batch: Literal["same", "different", "unknown"] = "unknown"


def ordered(run: str, tier: Tier, ranks: Ranks, state: State, trail: Trail) -> Proof | None:
    """What this process was started to prove, if anything.

    Raises `Refused` where that is another run: then this one must not train either. `InvalidInput` for an order that
    can't be read.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return None
    try:
        with open(path, "rb") as file:
            order = msgspec.json.decode(file.read(), type=Order)
    except (OSError, msgspec.DecodeError) as exc:
        raise InvalidInput(
            f"{VARIABLE}={path} names no order of `outlast doctor resume`: {exc}; nothing was trained.",
            hint=f"Unset {VARIABLE} to train.",
        ) from exc
    repository = Repository.open(open_store(order.place)) if order.place else tier.open(make=False)
    is_same = repository is not None and (order.place or repository.format.id == order.repository)
    if repository is None or not is_same or run != order.run:
        reason = f"the command resumed the run {run}" + (
            f", not {order.run}" if run != order.run else " in another repository than --repo"
        )
        _write(order.report, Report("unproven", reason))
        raise Refused(
            f"this process was started to prove another run: {reason}; nothing was trained.",
            hint="Give `outlast doctor resume` the run, and the repository, that the command trains.",
        )
    return Proof(order, repository, ranks, state, trail)


class Proof:
    """One proof, on one rank."""

    def __init__(self, order: Order, repository: Repository, ranks: Ranks, state: State, trail: Trail) -> None:
        self._order, self._repository, self._ranks, self._state, self._trail = order, repository, ranks, state, trail
        self._before = repository.find_snapshot(order.before)
        self._after = repository.find_snapshot(order.after) if order.after else None
        """None: some steps are to be trained, and there is nothing to compare them with"""
        self._seen = _Seen()
        self._report = Report("begun", ranks=ranks.size)
        self._end = 0
        self._was_asked = False
        self._since: dict[str, Any] = {}

    @property
    def due_step(self) -> int:
        """The step at whose end the run would have saved; one after it where the script saved by itself."""
        return self._end + self._was_asked

    def begin(self) -> int:
        """Go on from the earlier checkpoint; its step."""
        return self._all(self._begin)

    def _begin(self) -> int:
        size, rank = self._ranks.size, self._ranks.rank
        stored = self._shelf(self._before)
        later = self._shelf(self._after) if self._after else stored
        facts: Any = later.described.facts
        if self._after:
            self._end = later.described.step
            self._since = facts.get("since", {})
            self._was_asked = bool(self._since.get("asked", False))
        else:
            self._end = stored.described.step + self._order.steps
        loaded = load(self._repository, self._before, self._state, rank, size)
        self._seen.environment = environment.differences(facts.get("environment", {}), environment.fingerprint())
        self._compare(stored, live.capture(self._state, _accumulating(self._state, stored)), "restored")
        self._trail.went_on_from(self._before.id)
        self._report.step_before, self._report.step_after = loaded.step, self._end
        if self._ranks.is_first:
            _write(self._order.report, self._report)
        return loaded.step

    def _shelf(self, snapshot: Snapshot) -> Shelf:
        files = {entry.path: entry for entry in self._repository.entries(snapshot) if entry.type == "file"}
        ranks = ranks_of(files)
        if ranks != self._ranks.size:
            raise Refused(f"checkpoint {snapshot.id[:8]} was saved by {ranks} ranks, and here are {self._ranks.size}")
        folder = folder_of(self._ranks.rank, ranks)
        return Shelf(files, folder, RecentChunks(self._repository), snapshot)

    def instead_of_saving(self, step: int, asked: bool, capture: Callable[[], dict[str, Part]]) -> PendingSave:
        """Compare, and leave the process, where the later checkpoint was saved; elsewhere nothing is saved."""
        if step > self._end:
            self._leave(Report("unproven", f"the command did not save at step {self._end}, where the run had saved"))
        if step == self._end and asked == self._was_asked:
            self._all(lambda: self._reach(capture()))
            self._conclude()
        staged = Staged()
        staged.finish()
        pending = PendingSave(step, staged, lambda _: None)
        pending.run(lambda: self._before, lambda: None)
        return pending

    def _reach(self, parts: dict[str, Part]) -> int:
        if self._after is None:
            self._look(parts)
            return self._end
        first, now = self._since.get("first_batch"), self._trail.facts(asked=False)["first_batch"]
        if self._since.get("snapshot") == self._before.id and first and now:
            self._seen.first_batch = "same" if first == now else "different"
            if first != now:
                self._find(Finding("reached", "first batch", "", "", "it is another one", self._ranks.rank))
        self._compare(self._shelf(self._after), parts, "reached")
        return self._end

    def _look(self, parts: dict[str, Part]) -> None:
        """What is reached can't be compared, but weights that were numbers must be numbers still."""
        stored = self._shelf(self._before)
        for key, part in parts.items():
            for leaf in [*part.leaves, *part.more]:
                self._seen.tensors += 1
                self._seen.bytes += leaf.nbytes
                known = stored.tensors(key).get(leaf.name) if key in stored.parts else None
                if part.kind != "module" or known is None or not leaf.tensor.is_floating_point():
                    continue
                odd = leaf.tensor.numel() - int(torch.isfinite(leaf.tensor).sum())
                if odd and bool(torch.isfinite(stored.read(known)).all()):
                    what = f"after {self._order.steps} steps {odd:,} of {leaf.tensor.numel():,} elements are not finite"
                    self._find(Finding("reached", "model", key, leaf.name, what, self._ranks.rank))

    def _all(self, work: Callable[[], int]) -> int:
        """The work on all ranks. Where it fails on one, the process is left."""
        try:
            return self._ranks.main.exchange(work, int)[0]
        except OutlastError as exc:
            self._leave(Report("unproven", exc.message))
            raise  # not reached

    def _conclude(self) -> None:
        every = self._ranks.main.exchange(lambda: self._seen, _Seen)
        report = self._report
        report.environment = list(dict.fromkeys(line for seen in every for line in seen.environment))
        findings = [each for seen in every for each in seen.findings]
        report.findings = sorted(findings, key=lambda each: each.order)[:_FINDINGS_MAX]
        report.different = sum(seen.different for seen in every)
        report.tensors, report.bytes = (sum(getattr(seen, name) for seen in every) for name in ("tensors", "bytes"))
        batches = [seen.first_batch for seen in every]
        report.first_batch = next((each for each in ("different", "unknown") if each in batches), "same")
        report.verdict = "differs" if report.findings else "proven"
        self._leave(report)

    def _leave(self, report: Report) -> None:
        if self._ranks.is_first:
            report.step_before, report.step_after = self._report.step_before, self._end
            _write(self._order.report, report)
        raise SystemExit(0)

    # -- comparing -------------------------------------------------------------------------------

    def _find(self, finding: Finding) -> None:
        self._seen.different += 1
        if len(self._seen.findings) < _FINDINGS_MAX:
            self._seen.findings.append(finding)

    def _compare(self, stored: Shelf, parts: Mapping[str, Part], stage: Literal["restored", "reached"]) -> None:
        saved = stored.parts
        for key in sorted({*saved, *parts}, key=lambda each: _place(saved.get(each) or parts[each])):
            kind = (saved.get(key) or parts[key]).kind
            category = _CATEGORIES.get(kind, "rest")

            def find(name: str, what: str, *numbers: Any, key: str = key, category: str = category) -> None:
                self._find(Finding(stage, category, key, name, what, self._ranks.rank, *numbers))

            if key not in saved or key not in parts:
                find("", "only the checkpoint has it" if key in saved else "the checkpoint lacks it")
                continue
            # In JSON and back: so it is what a checkpoint would say.
            tree = msgspec.json.decode(msgspec.json.encode(parts[key].tree))
            for change in tree_text.differences(saved[key].tree, tree):
                was, now = ("nothing" if each is None else each for each in (change.before, change.after))
                find(change.path, f"was {was}, is {now}")
            leaves = {leaf.name: leaf for leaf in [*parts[key].leaves, *parts[key].more]}
            for name in [*leaves, *(name for name in stored.tensors(key) if name not in leaves)]:
                self._compare_tensor(stored, key, name, leaves.get(name), find)
                if stage == "reached" and name in leaves:
                    self._seen.tensors += 1
                    self._seen.bytes += leaves[name].nbytes

    def _compare_tensor(self, stored: Shelf, key: str, name: str, leaf: Leaf | None, find: Callable[..., None]) -> None:
        known = stored.tensors(key).get(name)
        if leaf is None or known is None:
            find(name, "only the checkpoint has it" if leaf is None else "the checkpoint lacks it")
            return
        was, now = stored.read(known), leaf.tensor.detach().cpu().contiguous()
        if (was.dtype, was.shape) != (now.dtype, now.shape):
            find(name, f"was {was.dtype} {list(was.shape)}, is {now.dtype} {list(now.shape)}")
            return
        width = was.element_size()
        a, b = (each.reshape(-1).view(torch.uint8).reshape(-1, width) for each in (was, now))
        count = int((a != b).any(dim=1).sum()) if was.numel() else 0
        if count:
            by = (now.double() - was.double()).abs()
            by = by[torch.isfinite(by)]
            largest = float(by.max()) if by.numel() else None
            told = f", by at most {largest:.3g}" if largest is not None else ""
            find(name, f"{count:,} of {was.numel():,} elements differ{told}", was.numel(), count, largest)


def _place(part: Part) -> int:
    return _ORDER.index(part.kind) if part.kind in _ORDER else len(_ORDER)


def _accumulating(state: State, stored: Shelf) -> set[int]:
    """`id` of the parameters whose gradients the checkpoint holds."""
    return {
        id(parameter)
        for key, item in state.items()
        if isinstance(item, torch.nn.Module) and key in stored.parts
        for name, parameter in live.unwrap(item).named_parameters()
        if stored.parts[key].tree["grads"].get(live.plain_name(name)) is not None
    }


def _write(path: str, report: Report) -> None:
    """Whole, or not at all."""
    part = f"{path}.part"
    with open(part, "wb") as file:
        file.write(msgspec.json.encode(report))
    os.replace(part, path)
