"""The rows of the benchmark: what is prepared, what is timed, what is noted beside the time."""

from __future__ import annotations

import filecmp
import json
import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from contenders import (
    AUTO,
    BORG,
    NONE,
    RESTIC,
    SEALED,
    Keeper,
    Outlast,
    copied_and_synced,
    installed,
    plainly_read,
    plainly_restored,
    said,
)
from measure import Command, Companion, Outcome, Question, bytes_in, remove, warm_up

DATA = Path(__file__).with_name("data.py")
GROW = Path(__file__).with_name("grow.py")
TRAINING = Path(__file__).with_name("training.py")
ALL = (NONE, AUTO, SEALED, RESTIC, BORG)
DEFAULTS = (AUTO, RESTIC, BORG)

COPY = "cp + fsync"
READ_WRITE = "read + write + fsync"
READ = "plain read"


@dataclass
class Stage:
    """The scratch folder and what already lies in it."""

    scratch: Path
    scale: float
    version: int = -1
    """of the model folder; -1 while there is none"""
    source_bytes: int = 0
    changed_bytes: int = 0
    small_bytes: int = 0
    kept: dict[tuple[str, str], Path] = field(default_factory=dict)
    companion: Companion | None = None
    first_round: bool = True

    @property
    def model(self) -> Path:
        return self.scratch / "source" / "model"

    @property
    def small(self) -> Path:
        return self.scratch / "source" / "small"

    @property
    def small_count(self) -> int:
        return max(50, round(100_000 * self.scale))

    def make_model(self, version: int, *, one_step: bool = False) -> None:
        """Have the model folder at `version`, written anew as a trainer does."""
        if self.version != version:
            sizes = ["--scale", str(self.scale), "--version", str(version)]
            facts = self._make("model", str(self.model), *sizes, *(["--one-step"] if one_step else []))
            self.version, self.source_bytes, self.changed_bytes = version, facts["bytes"], facts["changed"]
        warm_up(self.model)

    def make_grown(self) -> dict[str, Path]:
        """Repositories of 100, 1,000 and 10,000 snapshots, the largest with two million chunks, made once."""
        counts = [max(2, round(count * self.scale)) for count in (100, 1000, 10_000)]
        grown = self.scratch / "grown"
        if not grown.exists():
            grown.mkdir()
            subprocess.run([sys.executable, str(GROW), str(grown), *map(str, counts)], check=True)
        return {f"outlast, {count:,} snapshots": grown / str(count) for count in counts}

    def training(self) -> Companion:
        """The process that trains, begun when it is first needed."""
        if self.companion is None:
            argv = [sys.executable, str(TRAINING), str(self.scratch / "training"), "--scale", str(self.scale)]
            self.companion = Companion(argv)
        return self.companion

    def close(self) -> None:
        if self.companion is not None:
            self.companion.close()

    def make_small(self) -> None:
        if not self.small_bytes:
            facts = self._make("small", str(self.small), "--count", str(self.small_count))
            self.small_bytes = facts["bytes"]
        warm_up(self.small)

    def _make(self, *arguments: str) -> dict[str, int]:
        ran = subprocess.run([sys.executable, str(DATA), *arguments], capture_output=True, text=True, check=True)
        facts: dict[str, int] = json.loads(ran.stdout)
        return facts

    def home(self, kind: str, name: str) -> Path:
        """An empty folder of its own for one contender."""
        home = self.scratch / kind / name.replace(" ", "-")
        remove(home)
        home.mkdir(parents=True)
        return home

    def new_repository(self, kind: str, keeper: Keeper) -> Path:
        repository = self.home(kind, keeper.name) / "repository"
        said(keeper.init(repository))
        return repository

    def repository(self, keeper: Keeper, source: Path) -> Path:
        """A repository that holds `source`, made once and kept for several rows."""
        key = keeper.name, source.name
        if key not in self.kept:
            repository = self.new_repository(f"kept-{source.name}", keeper)
            said(keeper.backup(repository, source))
            self.kept[key] = repository
        return self.kept[key]


def nothing(_: Outcome) -> dict[str, int]:
    return {}


@dataclass
class Trial:
    """One contender in one row. `ready` prepares, untimed, and returns what to time."""

    contender: str
    ready: Callable[[], Command | Question]
    facts: Callable[[Outcome], dict[str, int]] = nothing


class Row(ABC):
    """`trials` lists the contenders; `new_round` runs before each round."""

    name: str
    title: str
    reference: str
    """the contender that every other one is divided by"""
    note = ""
    """what the title can't say"""
    ratio_of = "wall_seconds"

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def new_round(self, number: int) -> None:
        return

    @abstractmethod
    def trials(self) -> list[Trial]:
        """The contenders of one round."""

    def end(self) -> None:
        """After the last round."""
        return

    def source_bytes(self) -> int:
        return self.stage.source_bytes


class First(Row):
    name = "first"
    title = "First backup of a 1.5 GB checkpoint"
    reference = COPY

    def new_round(self, number: int) -> None:
        self.stage.make_model(0)

    def trials(self) -> list[Trial]:
        return [first_backup(self.stage, keeper, self.stage.model) for keeper in ALL if installed(keeper)] + [
            plain_copy(self.stage, self.stage.model)
        ]


class Unchanged(Row):
    name = "unchanged"
    title = "Backup of the unchanged folder"
    reference = "restic"

    def new_round(self, number: int) -> None:
        self.stage.make_model(0)

    def trials(self) -> list[Trial]:
        return [next_backup(self.stage, keeper) for keeper in DEFAULTS if installed(keeper)]


class Restore(Row):
    name = "restore"
    title = "Restore of the checkpoint, repository not in the page cache"
    reference = READ_WRITE

    def new_round(self, number: int) -> None:
        self.stage.make_model(0)

    def trials(self) -> list[Trial]:
        model = self.stage.model
        target = self.stage.scratch / "plain-restore"

        def ready() -> Command:
            remove(target)
            return plainly_restored(model, target)

        limit = Trial(READ_WRITE, ready, lambda _: remove_and_note(target))
        return [restore(self.stage, keeper, model) for keeper in ALL if installed(keeper)] + [limit]


class Check(Row):
    name = "check"
    title = "Check of all data, repository not in the page cache"
    reference = f"{READ} (none)"

    def new_round(self, number: int) -> None:
        self.stage.make_model(0)

    def trials(self) -> list[Trial]:
        found = [self._check(keeper) for keeper in ALL if installed(keeper)]
        return found + [self._limit(keeper) for keeper in (NONE, AUTO, SEALED)]

    def _check(self, keeper: Keeper) -> Trial:
        return Trial(keeper.name, lambda: keeper.check(self.stage.repository(keeper, self.stage.model)))

    def _limit(self, keeper: Outlast) -> Trial:
        name = f"{READ} ({keeper.name.split()[-1]})"
        return Trial(name, lambda: plainly_read(self.stage.repository(keeper, self.stage.model)))


class SmallBackup(Row):
    name = "small-backup"
    title = "First backup of 100,000 files of 4 KiB"
    reference = COPY

    def new_round(self, number: int) -> None:
        self.stage.make_small()

    def trials(self) -> list[Trial]:
        return [first_backup(self.stage, keeper, self.stage.small) for keeper in DEFAULTS if installed(keeper)] + [
            plain_copy(self.stage, self.stage.small)
        ]

    def source_bytes(self) -> int:
        return self.stage.small_bytes


class SmallRestore(Row):
    name = "small-restore"
    title = "Restore of 100,000 files of 4 KiB, repository not in the page cache"
    reference = "restic"

    def new_round(self, number: int) -> None:
        self.stage.make_small()

    def trials(self) -> list[Trial]:
        return [restore(self.stage, keeper, self.stage.small) for keeper in DEFAULTS if installed(keeper)]

    def source_bytes(self) -> int:
        return self.stage.small_bytes


class OneLayer(Row):
    """After the model's other rows: each round writes the next version of the checkpoint."""

    name = "onelayer"
    title = "Backup after 2 of 12 blocks changed, weights and AdamW moments, the others frozen"
    reference = "restic"
    one_step = False

    def new_round(self, number: int) -> None:
        if self.stage.version < 0:
            self.stage.make_model(0)
        for keeper in DEFAULTS:
            if installed(keeper):
                self.stage.repository(keeper, self.stage.model)
        self.stage.make_model(self.stage.version + 1, one_step=self.one_step)

    def trials(self) -> list[Trial]:
        return [next_backup(self.stage, keeper) for keeper in DEFAULTS if installed(keeper)]


class OneLayerOneStep(OneLayer):
    name = "onelayer-steps"
    title = "Backup after 2 of 12 blocks changed, and the step counter of every parameter"
    one_step = True


class Help(Row):
    name = "help"
    title = "`--help`: the time to start"
    reference = "restic"

    def trials(self) -> list[Trial]:
        return [
            Trial(keeper.name, lambda keeper=keeper: Command([keeper.program, "--help"]))  # type: ignore[misc]
            for keeper in DEFAULTS
            if installed(keeper)
        ]

    def source_bytes(self) -> int:
        return 0


class Grown(Row):
    """The same work on repositories of more and more snapshots."""

    reference = "outlast, 100 snapshots"

    def trials(self) -> list[Trial]:
        grown = self.stage.make_grown()
        return [Trial(name, partial(self.work, repository)) for name, repository in grown.items()]

    def source_bytes(self) -> int:
        return 0

    @abstractmethod
    def work(self, repository: Path) -> Command:
        """What is timed."""


class GrownCommit(Grown):
    name = "grown-commit"
    title = "Backup of 10 MB of new data into a repository of 200 new chunks a snapshot"

    def work(self, repository: Path) -> Command:
        source = self.stage.scratch / "ten-megabytes"
        source.mkdir(exist_ok=True)
        (source / "new.bin").write_bytes(os.urandom(round(10_000_000 * min(1, self.stage.scale))))
        return AUTO.backup(repository, source)


class GrownList(Grown):
    name = "grown-list"
    title = "List of all snapshots"

    def work(self, repository: Path) -> Command:
        return AUTO.snapshots(repository)


class GrownPrune(Grown):
    name = "grown-prune"
    title = "Plan of a prune: which chunks does each snapshot need, of 1,000 each?"

    def work(self, repository: Path) -> Command:
        return AUTO.plan_prune(repository)


class GrownLook(Grown):
    """A command that goes by outlast.yaml, when nothing is due."""

    arguments: tuple[str, ...]

    def work(self, repository: Path) -> Command:
        config = repository.with_suffix(".yaml")
        tier = {"type": "ssd", "url": str(repository), "retention": "indefinite"}
        config.write_text(json.dumps({"storage_tiers": {"only": tier}, "policies": {"runs": {"drill": "off"}}}))
        return AUTO.configured(config, *self.arguments)


class GrownPlan(GrownLook):
    name = "grown-plan"
    title = "What is due, of a tier with many snapshots: outlast plan"
    arguments = ("plan",)


class GrownStatus(GrownLook):
    name = "grown-status"
    title = "Are all objectives met, with many snapshots: outlast status"
    arguments = ("status",)


class GrownAgent(GrownLook):
    name = "grown-agent"
    title = "Nothing is due, with many snapshots: outlast agent --once"
    arguments = ("agent", "--once")


class OfTraining(Row):
    """Measured by the companion, which knows the contenders."""

    reads_or_writes_all = True
    """so that a rate says something"""

    def trials(self) -> list[Trial]:
        companion = self.stage.training()

        def facts(_: Outcome) -> dict[str, int]:
            return {"state_bytes": companion.facts["bytes"]}

        def ready(contender: str) -> Question:
            return Question(companion, f"{self.name}\t{contender}")

        return [Trial(each, partial(ready, each), facts) for each in companion.facts["rows"][self.name]]

    def end(self) -> None:
        self.stage.training().ask(f"{self.name}\t")

    def source_bytes(self) -> int:
        return int(self.stage.training().facts["bytes"]) if self.reads_or_writes_all else 0


class Stall(OfTraining):
    name = "stall"
    title = "A save that copies the training state within the call: how long the call takes"
    reference = "memcpy"
    note = (
        "`memcpy` copies the same tensors one after the other into memory that was touched before; in one piece are as "
        "many bytes of one array, whose memory lies in huge pages on both sides."
    )


class StallOverlapped(OfTraining):
    name = "stall-overlap"
    title = "A save that copies while training goes on: how long the training stands still"
    reference = "dcp.async_save, copied in a thread"
    reads_or_writes_all = False
    note = (
        "The call, and what the next `optimizer.step()` waits for; forward and backward between them take longer than "
        "the copy. DCP's stager copies in a thread too, where it is told to, and leaves the wait to the script."
    )


class Loop(OfTraining):
    name = "loop"
    title = "What one save costs a training loop as a whole"
    reference = "dcp.async_save"
    reads_or_writes_all = False
    note = "Four steps with one save, until it is written, minus four steps without: what the saving takes from them."


class Durable(OfTraining):
    name = "durable"
    title = "A save until it survives a power cut"
    reference = "write + fsync"


class Frozen(OfTraining):
    name = "frozen"
    title = "The same, after 2 of 12 blocks changed and all else was frozen"
    reference = "torch.save + fsync"
    note = "The blocks were trained before they were frozen, so the optimizer keeps moments for all of them."


class FrozenFromTheBeginning(OfTraining):
    name = "frozen-new"
    title = "The same, with an optimizer that never had the frozen blocks"
    reference = "torch.save + fsync"
    reads_or_writes_all = False
    note = "So two fifths of the state are moments and weights that change, and the rest are weights that don't."


class LoadCold(OfTraining):
    name = "load-cold"
    title = "Loading a training state that is not in the page cache"
    reference = "plain read"
    note = (
        "`Run.load` verifies every byte and fills the live model and optimizer. `torch.load` alone fills nothing, "
        "and neither it nor DCP verifies."
    )


class LoadWarm(OfTraining):
    name = "load-warm"
    title = "Weights from the page cache, memory-mapped and not verified"
    reference = "safetensors load_file"
    reads_or_writes_all = False
    note = "Of the model alone, until each tensor was added up once: mapping by itself reads nothing."


class Step(OfTraining):
    name = "step"
    title = "`run.step()` where no save is due"
    reference = "Run.step"
    reads_or_writes_all = False


ROWS: tuple[type[Row], ...] = (
    First,
    Unchanged,
    Restore,
    Check,
    OneLayer,
    OneLayerOneStep,
    SmallBackup,
    SmallRestore,
    GrownCommit,
    GrownList,
    GrownPrune,
    GrownPlan,
    GrownStatus,
    GrownAgent,
    Help,
    Stall,
    StallOverlapped,
    Loop,
    Durable,
    Frozen,
    FrozenFromTheBeginning,
    LoadCold,
    LoadWarm,
    Step,
)


def first_backup(stage: Stage, keeper: Keeper, source: Path) -> Trial:
    """Into a repository made for this run, and removed after it."""
    made: list[Path] = []

    def ready() -> Command:
        made[:] = [stage.new_repository("first", keeper)]
        return keeper.backup(made[0], source)

    def facts(outcome: Outcome) -> dict[str, int]:
        noted = {"repository_bytes": bytes_in(made[0]), "added_bytes": keeper.added_bytes(outcome.stdout)}
        remove(made[0].parent)
        return noted

    return Trial(keeper.name, ready, facts)


def next_backup(stage: Stage, keeper: Keeper) -> Trial:
    """Into the kept repository, after whatever changed."""
    before = [0]

    def ready() -> Command:
        repository = stage.repository(keeper, stage.model)
        before[0] = bytes_in(repository)
        return keeper.backup(repository, stage.model)

    def facts(outcome: Outcome) -> dict[str, int]:
        grown = bytes_in(stage.repository(keeper, stage.model)) - before[0]
        noted = {"repository_bytes": grown, "added_bytes": keeper.added_bytes(outcome.stdout)}
        return noted | ({"changed_bytes": stage.changed_bytes} if stage.changed_bytes else {})

    return Trial(keeper.name, ready, facts)


def restore(stage: Stage, keeper: Keeper, source: Path) -> Trial:
    """Into a folder that is not there yet; what came back is compared in the first round."""
    target = stage.scratch / "restored" / keeper.name.replace(" ", "-")

    def ready() -> Command:
        remove(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        return keeper.restore(stage.repository(keeper, source), target)

    def facts(_: Outcome) -> dict[str, int]:
        if stage.first_round:
            compare(source, target)
        return remove_and_note(target)

    return Trial(keeper.name, ready, facts)


def compare(source: Path, restored: Path) -> None:
    """A fast restore of something else would be no result: raise RuntimeError when a file differs."""
    found = {path.name: path for path in restored.rglob("*") if path.is_file()}
    for path in source.rglob("*"):
        if path.is_file() and not (path.name in found and filecmp.cmp(path, found[path.name], shallow=False)):
            raise RuntimeError(f"{path.name} did not come back as it was in {restored.name}")


def remove_and_note(target: Path) -> dict[str, int]:
    remove(target)
    return {}


def plain_copy(stage: Stage, source: Path) -> Trial:
    made: list[Path] = []

    def ready() -> Command:
        made[:] = [stage.home("first", "cp") / "copy"]
        return copied_and_synced(source, made[0])

    def facts(_: Outcome) -> dict[str, int]:
        noted = {"repository_bytes": bytes_in(made[0])}
        remove(made[0].parent)
        return noted

    return Trial(COPY, ready, facts)
