"""What runs a repository holds, as its log alone tells. Torch is not needed."""

from __future__ import annotations

import math

import msgspec

from outlast.checkpoint.references import checkpoints
from outlast.records import Snapshot, time_ns
from outlast.repo.repository import Repository

_METRIC = "metric."


class Metric(msgspec.Struct):
    """Of the checkpoints that are kept. None: it was no finite number."""

    last: float | None
    lowest: float | None = None
    lowest_step: int | None = None
    highest: float | None = None
    highest_step: int | None = None


class RunView(msgspec.Struct):
    """One run, as far as its checkpoints that are kept tell."""

    name: str
    checkpoints: int
    first_step: int
    last_step: int
    last: str
    """the snapshot of the last step"""
    time: str
    """when its save began, RFC 3339"""
    age_seconds: float
    bytes: int
    """of the last checkpoint, as it would be restored"""
    bytes_stored: int
    """what all of them added to the repository when they were saved"""
    crashes: int
    """how often the run went on from a checkpoint, and saved no later one"""
    host: str = ""
    metrics: dict[str, Metric] = {}


def runs(repository: Repository) -> list[RunView]:
    """Every run that has a checkpoint; the one that saved last comes last."""
    by_name: dict[str, list[tuple[int, Snapshot]]] = {}
    for step, each in checkpoints(repository):
        by_name.setdefault(each.name, []).append((step, each))
    found = [_view(repository, name, mine) for name, mine in by_name.items()]
    return sorted(found, key=lambda each: each.time)


def _view(repository: Repository, name: str, mine: list[tuple[int, Snapshot]]) -> RunView:
    step, last = mine[-1]
    return RunView(
        name=name,
        checkpoints=len(mine),
        first_step=mine[0][0],
        last_step=step,
        last=last.id,
        time=last.time,
        age_seconds=max(0.0, (repository.clock.now_ns() - time_ns(last.time)) / 1e9),
        bytes=last.bytes,
        bytes_stored=sum(each.bytes_stored for _, each in mine),
        crashes=sum(len(repository.state.resumed.get(each.id, [])) for _, each in mine),
        host=last.host,
        metrics=_metrics(mine),
    )


def _metrics(mine: list[tuple[int, Snapshot]]) -> dict[str, Metric]:
    found: dict[str, Metric] = {}
    for step, snapshot in mine:
        for name, value in metrics_of(snapshot).items():
            metric = found.setdefault(name, Metric(value))
            metric.last = value
            if value is None:
                continue
            if metric.lowest is None or value < metric.lowest:
                metric.lowest, metric.lowest_step = value, step
            if metric.highest is None or value > metric.highest:
                metric.highest, metric.highest_step = value, step
    return found


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
