"""Which snapshot is meant by what a person writes.

`RUN` is the latest checkpoint of a run, `RUN@STEP` that of a step, `RUN@METRIC:min` or `RUN@METRIC:max` the best by a
metric; anything else is `latest` or the first characters of an id.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from outlast.checkpoint import keep
from outlast.errors import InvalidInput, NotFound
from outlast.records import Snapshot
from outlast.repo.naming import Snapshots

_SHOWN = 8
_CLOSE_SHOWN = 3
_METRIC = "metric."
_BEST = re.compile(r"([^:]+):(min|max)")
_LATEST = "latest"


def checkpoints(repository: Snapshots, run: str | None = None) -> list[tuple[int, Snapshot]]:
    """(step, snapshot) of every checkpoint, or of those of one run, in the order in which they were committed."""
    return [
        (int(each.tags["step"]), each)
        for each in repository.snapshots()
        if each.kind == "checkpoint" and run in (None, each.name) and each.tags.get("step", "").isdecimal()
    ]


def metrics_of(snapshot: Snapshot) -> dict[str, float | None]:
    """Those that were given with its step. None for what is no finite number."""
    found: dict[str, float | None] = {}
    for tag, told in snapshot.tags.items():
        if tag.startswith(_METRIC):
            try:
                value = float(told)
            except ValueError:
                value = math.nan
            found[tag.removeprefix(_METRIC)] = value if math.isfinite(value) else None
    return found


def run_name(name: object) -> str:
    """The name, if a run can be called so: what names it must not mean something else. Raises `InvalidInput`.

    >>> run_name("gpt-2")
    'gpt-2'
    """
    problem = ""
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        problem = "it is no text, or none that can be printed"
    elif name.strip().lower() == _LATEST:
        problem = "`latest` means the newest snapshot of all"
    elif "@" in name:
        problem = '"@" stands between the name of a run and a step'
    elif name.startswith("-"):
        problem = 'what begins with "-" is an option'
    if problem or not isinstance(name, str):
        raise InvalidInput(f"{name!r} can't be the name of a run: {problem}.")
    return name


def of_run(repository: Snapshots, reference: str) -> Snapshot | None:
    """The checkpoint that `RUN`, `RUN@STEP` or `RUN@METRIC:min|max` means; None where there is no such run.

    Raises `NotFound` for a step or a metric that a run doesn't have, `InvalidInput` for what says neither.
    """
    runs: dict[str, list[tuple[int, Snapshot]]] = {}
    for step, each in checkpoints(repository):
        runs.setdefault(each.name, []).append((step, each))
    if reference in runs:
        return runs[reference][-1][1]
    for at in reversed([at for at, letter in enumerate(reference) if letter == "@"]):  # a metric may be "recall@5"
        name, which = reference[:at], reference[at + 1 :]
        if name in runs:
            return _of_step(name, runs[name], which) if which.isdecimal() else _best(name, runs[name], which)
    return None


def _of_step(name: str, mine: list[tuple[int, Snapshot]], which: str) -> Snapshot:
    found = [each for step, each in mine if step == int(which)]
    if not found:
        steps = sorted({step for step, _ in mine})
        raise NotFound(
            f"run {name} has no checkpoint of step {which}; it has those of {few(steps)}.",
            hint=f"`outlast snapshots --name {name}` lists them.",
        )
    return found[-1]


def _best(name: str, mine: list[tuple[int, Snapshot]], which: str) -> Snapshot:
    """The one that a run keeps as its best, told the same."""
    metrics = {each.id: metrics_of(each) for _, each in mine}
    known = sorted({metric for those in metrics.values() for metric in those})
    asked = _BEST.fullmatch(which)
    if asked is None:
        example = f"{name}@{known[0] if known else 'loss'}:min"
        told = "which metric a run keeps its best by is not stored" if which == "best" else "it is no step"
        raise InvalidInput(
            f"{which!r} says no checkpoint of run {name}: {told}.",
            hint=f"Write {name}@{mine[-1][0]} for a step, {example} (or :max) for the best by a metric, {name} for "
            "the latest.",
        )
    rated = [
        keep.Kept(each.id, step, {metric: value for metric, value in metrics[each.id].items() if value is not None})
        for step, each in mine
    ]
    winner = keep.best(rated, keep.Policy(best=which))
    if winner is None:
        there = f"there are: {few(known)}" if known else "it was saved without any"
        raise NotFound(
            f"no checkpoint of run {name} has a number for the metric {asked[1]}; {there}.",
            hint=f"`outlast snapshots --name {name}` lists them with what they have.",
        )
    return next(each for _, each in mine if each.id == winner.id)


def find(repository: Snapshots, reference: str, name: str | None = None) -> Snapshot:
    """The snapshot that is meant; with `name`, which is no reference to a run, one of those of this name.

    Raises `NotFound`, which says what may have been meant, and `InvalidInput` for what fits several.
    """
    wanted = reference.strip().lower()
    found = None if wanted == _LATEST or name is not None else of_run(repository, reference)
    if found is not None:
        return found
    try:
        return repository.find_snapshot(reference, name)
    except (NotFound, InvalidInput) as exc:
        runs = {each.name for _, each in checkpoints(repository)}
        if not runs or name is not None or any(each.id.startswith(wanted) for each in repository.snapshots()):
            raise
        run, at, which = reference.partition("@")
        raise NotFound(
            f"no run and no snapshot is called {reference!r}; there are runs: {few(sorted(runs))}.",
            hint=f"{_meant([each + at + which for each in _close(run, runs)])}`outlast runs` lists the runs, "
            "`outlast snapshots` every snapshot.",
        ) from exc


def is_relative(reference: str, snapshot: Snapshot) -> bool:
    """Whether `reference`, which means this snapshot now, may mean another one once there are more."""
    which = reference.removeprefix(f"{snapshot.name}@")
    return reference == snapshot.name or (which != reference and not which.isdecimal())


def no_run(repository: Snapshots, run: str) -> NotFound:
    """What to raise where there is no such run."""
    runs = {each.name for _, each in checkpoints(repository)}
    there = f"; there are runs: {few(sorted(runs))}" if runs else ""
    close = _meant(_close(run.partition("@")[0], runs))
    return NotFound(f"there is no run {run} with a checkpoint{there}.", hint=f"{close}`outlast runs` lists the runs.")


def _close(run: str, runs: Iterable[str]) -> list[str]:
    """The names that may have been meant."""
    from difflib import get_close_matches

    by_lower = {each.lower(): each for each in sorted(runs)}
    wanted = run.lower()
    found = get_close_matches(wanted, by_lower, _CLOSE_SHOWN)
    found += [each for each in by_lower if wanted and each.startswith(wanted) and each not in found]
    return [by_lower[each] for each in found[:_CLOSE_SHOWN]]


def _meant(close: Sequence[str]) -> str:
    return f"Is it {' or '.join(close)}? " if close else ""


def few(values: Sequence[object]) -> str:
    """The last of them, for a message."""
    shown = [str(each) for each in values[-_SHOWN:]]
    return ", ".join(["…", *shown] if len(values) > _SHOWN else shown)
