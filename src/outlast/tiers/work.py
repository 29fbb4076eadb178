"""Carry out one task of a plan. Each can be killed at any instant, and carried out again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from outlast.backup.create import create
from outlast.backup.origin import RepositoryOrigin
from outlast.backup.repair import repair
from outlast.errors import Archived, Corrupt
from outlast.records import Snapshot
from outlast.repo import archive, forget, prune
from outlast.repo.archive_plan import ArchivePolicy
from outlast.repo.copy import copy
from outlast.repo.prove import prove
from outlast.repo.prune_plan import Policy as PrunePolicy
from outlast.repo.repository import Repository
from outlast.repo.scrub import Data
from outlast.repo.state import PROVEN, State
from outlast.tiers.drill import Commands, drill
from outlast.tiers.due import Task
from outlast.tiers.places import Places

# What is dropped was decided snapshot by snapshot, each with its copies: that it is much is no reason to stop.
_PRUNE = PrunePolicy(max_delete=1.0)


class Done(msgspec.Struct, frozen=True):
    """What came of a task. `problems`: what was not as it should be, in sentences."""

    task: Task
    text: str
    problems: tuple[str, ...] = ()
    snapshots: tuple[str, ...] = ()
    """made, copied, mended, proven or dropped"""
    bytes: int = 0
    """written, or read where nothing is written"""


def perform(task: Task, places: Places, fence: tuple[str, int] | None = None) -> Done:
    """Carry out a task of the plan that was just made. Raises as the work does; `fence`: see `Log.fence`."""
    repository = places.repository(task.tier, throttled=task.kind == "copy")
    repository.refresh()
    repository.log.fence = fence
    try:
        return _WORK[task.kind](task, places, repository)
    finally:
        repository.log.fence = None


def _backup(task: Task, places: Places, repository: Repository) -> Done:
    source = places.policy.source(task.name)
    assert source is not None
    made = create(repository, source.paths, name=source.name, exclude=source.exclude, full=task.full)
    problems = tuple(f"{each.path}: {each.reason}" for each in made.problems if each.kind != "skipped")
    files = f"{made.files:,} file{'' if made.files == 1 else 's'}"
    text = f"backed up {made.name}: {files}, {made.bytes:,} bytes, {made.bytes_added:,} of them new"
    return Done(task, text, problems, (made.snapshot,), made.bytes_stored)


def _copy(task: Task, places: Places, repository: Repository) -> Done:
    """In batches, each of which is committed snapshot by snapshot: a copy that is killed goes on where it was."""
    origin, tier = places.repository(task.origin), places.tier(task.tier)
    origin.refresh()
    ids = [each for each in task.snapshots if each in origin.state.snapshots]
    is_archived = bool(places.tier(task.origin).archive_class)  # what can't be read there may be whole
    copied: list[str] = []
    problems: list[str] = []
    stored = 0
    for at in range(0, len(ids), tier.batch_size):
        report = copy(origin, repository, ids[at : at + tier.batch_size], delta=tier.recompresses)
        copied += report.copied
        stored += report.bytes_stored
        hurt = [each.snapshot for each in report.failed if each.snapshot in origin.state.snapshots]
        problems += [f"snapshot {each.snapshot[:8]} of {each.name}: {each.problem}" for each in report.failed]
        if hurt and not is_archived:
            _note_hurt(origin, hurt)
    if is_archived and problems and not copied:
        raise Archived(f"{task.origin} can't give them now. {problems[0]}")
    text = f"copied {_count(copied)} from {task.origin}, {stored:,} bytes written"
    return Done(task, text, tuple(problems), tuple(copied), stored)


def _note_hurt(repository: Repository, snapshots: Sequence[str]) -> None:
    def body(state: State) -> dict[str, Any] | None:
        known = [each for each in snapshots if each in state.snapshots]
        return {"snapshots": [], "damaged": known} if known else None

    repository.log.append(PROVEN, body)


def _prove(task: Task, places: Places, repository: Repository) -> Done:
    trust_seconds = 0.0 if task.full else places.policy.verified_within_seconds / 2
    report = prove(repository, _snapshots(task, repository), trust_seconds=trust_seconds)
    problems = tuple(f"snapshot {each[:8]} is damaged: {problem}" for each, problem in report.damaged.items())
    text = f"proved {_count(report.proven)}, {report.bytes_read:,} bytes read"
    tier = places.tier(task.tier)
    if tier.archive_class:
        policy = ArchivePolicy(tier.archive_class, tier.archive_after_seconds)
        moved = archive.execute(repository, archive.plan(repository, policy))
        text += f"; {moved.bytes:,} bytes moved to {tier.archive_class}"
        problems += tuple(f"pack {each[:16]} could not be moved to {tier.archive_class}" for each in moved.failed)
    return Done(task, text, problems, tuple(report.proven), report.bytes_read)


def _mend(task: Task, places: Places, repository: Repository) -> Done:
    """Fetch what is damaged from the other tier, and look whether the snapshots are whole then."""
    found = repair(repository, data=_doubtful(repository), origin=RepositoryOrigin(places.repository(task.origin)))
    if found.refused:
        raise Corrupt(f"{task.tier} can't be repaired: {found.refused}")
    places.forget(task.tier)
    again = places.repository(task.tier)
    again.log.fence = repository.log.fence
    try:
        report = prove(again, _snapshots(task, again), trust_seconds=places.policy.verified_within_seconds / 2)
    finally:
        again.log.fence = None
    if report.damaged:
        # Then what it was to be fetched from isn't whole either, as was believed: another tier's turn is next.
        origin = places.repository(task.origin)
        prove(origin, [each for each in _snapshots(task, origin) if each.id in report.damaged])
    problems = tuple(f"snapshot {each[:8]} is damaged still: {problem}" for each, problem in report.damaged.items())
    text = f"mended {_count(report.proven)} from {task.origin}, {found.bytes_found:,} bytes fetched"
    return Done(task, text, problems, tuple(report.proven), found.bytes_found)


def _doubtful(repository: Repository) -> Data:
    """The share of the packs that were not found right when last read: a repair reads those first, and mends what it
    reads."""
    state = repository.state
    total = sum(pack.bytes for pack in state.packs.values())
    bad = sum(pack.bytes for name, pack in state.packs.items() if name not in state.verified)
    return "all" if bad == total else bad / total if bad else "none"


def _drop(task: Task, places: Places, repository: Repository) -> Done:
    """Forget, and give back the room of what was condemned a day ago and longer."""
    ids = [each for each in task.snapshots if each in repository.state.snapshots]
    gone: tuple[str, ...] = ()
    if ids:
        gone = forget.execute(repository, forget.plan(repository, ids=ids)).forgotten
    pruned = prune.prune(repository, _PRUNE)
    text = f"dropped {_count(gone)}, {pruned.bytes_freed:,} bytes freed"
    return Done(task, text, (), gone, pruned.bytes_freed)


def _drill(task: Task, places: Places, repository: Repository) -> Done:
    source = places.policy.source(task.name)
    policy = source.drill if source else places.policy.run_drill
    assert policy is not None
    commands = Commands(policy.golden or None, policy.quality or None, policy.resume or None)
    held = drill(repository, _snapshots(task, repository)[0], level=policy.level, commands=commands).drill
    problems = () if held.passed else (f"the drill of {held.name} did not reach L{held.asked}: {held.problem}",)
    text = f"restored {held.bytes:,} bytes of {held.name} in {held.rto_seconds:.1f} s, L{max(held.level, 0)} reached"
    return Done(task, text if held.level >= 0 else "no level was reached", problems, task.snapshots, held.bytes)


def _count(snapshots: Sequence[str]) -> str:
    return f"{len(snapshots):,} snapshot{'' if len(snapshots) == 1 else 's'}"


def _snapshots(task: Task, repository: Repository) -> list[Snapshot]:
    return [found for each in task.snapshots if (found := repository.state.snapshots.get(each)) is not None]


_WORK: dict[str, Callable[[Task, Places, Repository], Done]] = {
    "backup": _backup,
    "mend": _mend,
    "copy": _copy,
    "prove": _prove,
    "drop": _drop,
    "drill": _drill,
}
