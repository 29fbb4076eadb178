"""Would a run go on bit for bit? What its latest checkpoint says, and a proof by training once more what was trained.

Two checkpoints of one run are enough for a proof: the training's own command is started, goes on from the earlier
one, and at the step of the later one it must have come to the same state (see `prove`, which runs inside of it).
Here is what needs no torch: which two, the start, and the verdict.
"""

from __future__ import annotations

import math
import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import blake3
import msgspec
import numpy as np

from outlast.checkpoint.compare import NUMBERS, numbers
from outlast.checkpoint.inventory import RankFiles, rank_files
from outlast.checkpoint.references import checkpoints, no_run
from outlast.checkpoint.state_file import RNG
from outlast.errors import Corrupt, InvalidInput, Refused
from outlast.records import Snapshot
from outlast.repo.repository import Repository

VARIABLE = "OUTLAST_PROVE"
"""names a file with an `Order`, for the process that is to prove"""

_REPORT = "report.json"
_PIECE_BYTES = 4 << 20
_LOOKED_AT = 20
_END_SECONDS = 10.0
_SHOWN_OF_A_KEY = 3
# What a script doesn't choose itself: the rest is compared inside of it.
_OF_THE_MACHINE = ("python", "torch", "numpy", "machine", "cpu", "devices", "cuda", "cudnn")

CATEGORIES = ("environment", "random numbers", "first batch", "model", "optimizer", "rest")
Verdict = Literal["begun", "proven", "differs", "unproven"]


class Order(msgspec.Struct, frozen=True):
    """What the process is to prove."""

    repository: str
    """the id of its format"""
    run: str
    before: str = msgspec.field(name="from")
    after: str = msgspec.field(name="to")
    report: str
    """where it is to leave a `Report`"""
    place: str = ""
    """a repository to go on from instead of the run's own: a rehearsal, in which `to` is empty"""
    steps: int = 0
    """to be trained in a rehearsal"""


class Finding(msgspec.Struct):
    """One thing that is not as it was."""

    stage: Literal["restored", "reached"]
    """right after the earlier checkpoint was loaded, or at the step of the later one"""
    category: str
    key: str
    name: str
    what: str
    rank: int = 0
    elements: int = 0
    elements_different: int = 0
    largest: float | None = None
    """difference of two elements"""

    @property
    def order(self) -> tuple[int, ...]:
        """What may be the cause of something else comes before it."""
        if self.stage == "restored":
            cause = 0
        elif self.category in ("first batch", "random numbers"):
            cause = 1 if self.category == "first batch" else 2
        else:  # a learning rate changes weights, and never the other way round
            cause = 3 if self.category == "optimizer" and self.name.startswith("param_groups") else 4
        return cause, CATEGORIES.index(self.category), self.rank


class Report(msgspec.Struct):
    """What came of it."""

    verdict: Verdict
    reason: str = ""
    """why it can't be proven"""
    step_before: int = 0
    step_after: int = 0
    ranks: int = 1
    environment: list[str] = []
    first_batch: Literal["same", "different", "unknown"] = "unknown"
    tensors: int = 0
    bytes: int = 0
    findings: list[Finding] = []
    """the first ones; environment first, and then as one may be the cause of the other"""
    different: int = 0
    """how many findings there are"""


class PartSum(msgspec.Struct):
    """One key of the state, summed up, so that two can be compared at a glance."""

    key: str
    kind: str
    rank: int
    tensors: int = 0
    elements: int = 0
    norm: float | None = None
    not_finite: int = 0
    digest: str = ""
    """BLAKE3 over name, type, shape and bytes of each tensor"""


class Examined(msgspec.Struct):
    """The latest checkpoint, without training."""

    snapshot: str
    step: int
    chunks: int
    bytes: int
    parts: list[PartSum] = []
    environment: list[str] | None = None
    """what is another on this machine; None where that was not looked at, or torch is not installed"""


def examine(repository: Repository, run: str, *, compares: bool) -> Examined:
    """Read every byte of the latest checkpoint of a run; `compares`: this machine too. Raises `Corrupt`, `NotFound`."""
    mine = _checkpoints_of(repository, run)
    step, snapshot = mine[-1]
    chunks = {chunk: length for entry in repository.entries(snapshot) for chunk, length in entry.chunks}
    try:
        repository.fetch(map(bytes.fromhex, sorted(chunks)), lambda _, __: None)
    except Corrupt as exc:
        raise Corrupt(
            f"checkpoint {snapshot.id[:8]} of {run}, step {step}, is damaged: {exc.message}",
            hint="`Run.resume` leaves it out, and goes on from the one before. `outlast check` tells what is damaged.",
        ) from exc
    ranks = rank_files(repository, snapshot)
    if not ranks:
        raise Refused(f"checkpoint {snapshot.id[:8]} of {run} was not saved by a Run.")
    found = Examined(snapshot.id, step, len(chunks), sum(chunks.values()))
    for files in ranks:
        found.parts += _sums(files)
    saved: Any = ranks[0].described.facts.get("environment", {})
    found.environment = _differs_here(saved) if compares else None
    return found


def _checkpoints_of(repository: Repository, run: str) -> list[tuple[int, Snapshot]]:
    mine = checkpoints(repository, run)
    if not mine:
        raise no_run(repository, run)
    return mine


def _sums(files: RankFiles) -> list[PartSum]:
    found = {key: PartSum(key, kind, files.rank) for key, (kind, _) in files.described.parts.items()}
    digests = {key: blake3.blake3() for key in found}
    squares = dict.fromkeys(found, 0.0)
    for (key, name), held in files.tensors():
        part, tensor, digest = found[key], held.tensor, digests[key]
        part.tensors += 1
        part.elements += math.prod(tensor.shape)
        digest.update(msgspec.json.encode([name, tensor.dtype, tensor.shape]))
        for start in range(0, tensor.length, _PIECE_BYTES):
            data = held.content.read(tensor.offset + start, min(_PIECE_BYTES, tensor.length - start))
            digest.update(data)
            if tensor.dtype in NUMBERS and key != RNG:
                values = numbers(data, tensor.dtype)
                finite = np.isfinite(values)
                part.not_finite += int(np.count_nonzero(~finite))
                squares[key] += float(np.sum(np.square(values, where=finite, out=np.zeros_like(values))))
    for key, part in found.items():
        part.digest = digests[key].hexdigest()
        has_norm = part.elements and key != RNG and math.isfinite(squares[key])
        part.norm = math.sqrt(squares[key]) if has_norm else None
    return list(found.values())


def _differs_here(saved: Mapping[str, Any]) -> list[str] | None:
    try:
        from outlast.checkpoint import environment
    except ImportError:
        return None
    now = environment.fingerprint()
    kept: list[dict[str, Any]] = [{name: each.get(name) for name in _OF_THE_MACHINE} for each in (saved, now)]
    return environment.differences(*kept) if saved else []


# -- proof ---------------------------------------------------------------------------------------------------


def pair(repository: Repository, run: str) -> tuple[Snapshot, Snapshot]:
    """The two newest checkpoints of which the later came from the earlier; else the two of the highest steps.

    Raises `Refused` where there are no two, `NotFound` where there is none.
    """
    mine = _checkpoints_of(repository, run)
    by_id = {each.id: (step, each) for step, each in mine}
    for step, later in reversed(mine[-_LOOKED_AT:]):
        ranks = rank_files(repository, later)
        since: Any = ranks[0].described.facts.get("since", {}) if ranks else {}
        earlier = by_id.get(since.get("snapshot", ""))
        if earlier is not None and earlier[0] < step:
            return earlier[1], later
    for (before, earlier_one), (after, later) in reversed([*pairwise(mine)]):
        if before < after:
            return earlier_one, later
    raise Refused(
        f"it takes two checkpoints of {run} at different steps, and there is one; nothing was started.",
        hint="Let it train until it has saved twice.",
    )


def prove(
    repository: Repository, before: Snapshot, after: Snapshot, command: Sequence[str], environment: Mapping[str, str]
) -> Report:
    """Start the command, which has to go on with the run, and tell what it came to.

    Its standard output goes to standard error. Raises `InvalidInput` where it can't be started.
    """
    with tempfile.TemporaryDirectory(prefix="outlast-prove-") as folder:
        order = Order(repository.format.id, before.name, before.id, after.id, os.path.join(folder, _REPORT))
        code, found = _ordered(order, folder, lambda more: _run(command, {**environment, **more}))
    if found is None:
        return Report("unproven", f"the command ended with {code}, and no Run of it was resumed")
    if found.verdict == "begun":
        found.verdict = "unproven"
        found.reason = f"the command ended with {code} before it came to where step {found.step_after} was saved"
    return found


def rehearse(
    place: str, snapshot: Snapshot, steps: int, folder: str, start: Callable[[Mapping[str, str]], int]
) -> Report | None:
    """Let a run go on from a checkpoint in the repository at `place`, which needs no passphrase, and train some steps.

    What was given back is compared with what was saved, and where weights were finite they must still be so at the end.
    The run's own repository is not touched. `start` starts the command that trains, with these variables besides, and
    gives its exit code; `folder` is for what is told to it and by it. None where no `Run` was resumed in the command.
    """
    order = Order("", snapshot.name, snapshot.id, "", os.path.join(folder, _REPORT), place, steps)
    code, found = _ordered(order, folder, start)
    if found is not None and found.verdict == "begun":
        found.verdict = "unproven"
        found.reason = (
            f"the command ended with {code} before it had trained {steps} steps, from step {found.step_before} to "
            f"{found.step_after}"
        )
    return found


def _ordered(order: Order, folder: str, start: Callable[[Mapping[str, str]], int]) -> tuple[int, Report | None]:
    path = os.path.join(folder, "order.json")
    with open(path, "wb") as file:
        file.write(msgspec.json.encode(order))
    code = start({VARIABLE: path})
    try:
        with open(order.report, "rb") as file:
            return code, msgspec.json.decode(file.read(), type=Report)
    except FileNotFoundError:
        return code, None


def _run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    try:
        child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=2)
    except (OSError, ValueError) as exc:
        raise InvalidInput(
            f"{command[0]} can't be started: {getattr(exc, 'strerror', None) or exc}; nothing was changed.",
            hint="Give the command that trains after `--`, as `-- python train.py`.",
        ) from exc
    try:
        return child.wait()
    except BaseException:
        child.terminate()
        try:
            child.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        raise


def first(report: Report) -> str:
    """The first thing that differs, as a sentence says it."""
    if report.environment:
        return f"the environment: {report.environment[0]}"
    return told(report.findings[0])


def besides(report: Report) -> Iterator[str]:
    """What else differs: of each key of the state the first few."""
    yield from (f"the environment: {line}" for line in report.environment[1:])
    shown: Counter[tuple[str, int]] = Counter()
    for each in report.findings[0 if report.environment else 1 :]:
        shown[each.key, each.rank] += 1
        if shown[each.key, each.rank] <= _SHOWN_OF_A_KEY:
            yield told(each)
    rest = sum(max(0, count - _SHOWN_OF_A_KEY) for count in shown.values())
    if rest or report.different > len(report.findings):
        yield f"… and {rest + report.different - len(report.findings):,} more"


def told(each: Finding) -> str:
    """A finding as a sentence says it."""
    rank = f" on rank {each.rank}" if each.rank else ""
    when = ", right after it was loaded" if each.stage == "restored" else ""
    if each.category == "first batch":
        return f"the first batch{rank}"
    if each.key == RNG:
        return f"the random numbers of {each.name}{rank}{when}: {each.what}"
    return f"{each.name} of {each.key}{rank}{when}: {each.what}" if each.name else f"{each.key}{rank}: {each.what}"


def advice(report: Report) -> Iterator[str]:
    """What may be the cause, for the first thing that differs."""
    if report.verdict != "differs":
        return
    if report.environment:
        yield "Make the environment as it was, and prove it again."
        return
    found = report.findings[0]
    if found.stage == "restored":
        yield "It was given back other than it was saved: its `load_state_dict` loses or changes it."
    elif found.category == "optimizer" and found.name.startswith("param_groups"):
        yield "The script sets it after the run went on, or a scheduler that does is not in the state."
    elif found.category == "first batch":
        yield "The data, its order or its augmentation is another than it was, or the loader is not in the state."
    elif found.category == "random numbers":
        yield "More or fewer random numbers were drawn than before."
    else:
        yield (
            "Something takes part that is not in the state, such as a generator of its own or an option of the "
            "command; or an operation is not deterministic: torch.use_deterministic_algorithms(True) names those."
        )
