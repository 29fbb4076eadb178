"""Which checkpoint is meant by what a person writes: `RUN`, `RUN@STEP`, or the first characters of an id."""

from __future__ import annotations

from collections.abc import Sequence

from outlast.errors import InvalidInput, NotFound
from outlast.records import Snapshot
from outlast.repo.repository import Repository

_SHOWN = 8


def checkpoints(repository: Repository, run: str | None = None) -> list[tuple[int, Snapshot]]:
    """(step, snapshot) of every checkpoint, or of those of one run, in the order in which they were committed."""
    return [
        (int(each.tags["step"]), each)
        for each in repository.snapshots()
        if each.kind == "checkpoint" and run in (None, each.name) and each.tags.get("step", "").isdecimal()
    ]


def of_run(repository: Repository, reference: str) -> Snapshot | None:
    """The checkpoint that `RUN` (its latest) or `RUN@STEP` means; None where there is no such run.

    Raises `NotFound` for a step that a run doesn't have.
    """
    mine = checkpoints(repository, reference)
    if mine:
        return mine[-1][1]
    name, _, step = reference.rpartition("@")
    every = checkpoints(repository, name) if step.isdecimal() else []
    if not every:
        return None
    mine = [each for each in every if each[0] == int(step)]
    if not mine:
        steps = sorted({each[0] for each in every})
        raise NotFound(f"run {name} has no checkpoint of step {step}; it has those of {few(steps)}.")
    return mine[-1][1]


def find_checkpoint(repository: Repository, reference: str) -> Snapshot:
    """The checkpoint that is meant. Raises `NotFound`, and `InvalidInput` for a backup or what fits several."""
    found = of_run(repository, reference)
    if found is not None:
        return found
    try:
        found = repository.find_snapshot(reference)
    except (NotFound, InvalidInput) as exc:
        names = sorted({each.name for _, each in checkpoints(repository)})
        what = f"there are runs: {few(names)}" if names else "there are no checkpoints here"
        raise NotFound(
            f"{reference} is neither a run nor a checkpoint; {what}.", hint="`outlast runs` lists the runs."
        ) from exc
    if found.kind != "checkpoint":
        raise InvalidInput(f"snapshot {found.id[:8]} is a backup of files, not a checkpoint: `outlast restore` it.")
    return found


def few(values: Sequence[object]) -> str:
    """The last of them, for a message."""
    shown = [str(each) for each in values[-_SHOWN:]]
    return ", ".join(["…", *shown] if len(values) > _SHOWN else shown)
