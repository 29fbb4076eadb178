"""What runs a repository holds, as its log alone tells. Torch is not needed."""

from __future__ import annotations

import msgspec

from outlast.checkpoint.references import checkpoints, metrics_of
from outlast.records import Snapshot, time_ns
from outlast.repo.repository import Repository


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
    retries: int
    """how often the run was started again from a checkpoint since it last saved; what runs now counts"""
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
        retries=sum(len(repository.state.resumed.get(each.id, [])) for _, each in mine),
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
