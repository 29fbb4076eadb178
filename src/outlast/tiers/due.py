"""What is due, when, and why: computed from the policy and from what the logs of the tiers say. Pure.

`outlast plan` prints it, and the agent carries it out; there is no other state. Rules that hold for every task:

* A snapshot leaves a tier when the tier's policy doesn't keep it, and `copies` other tiers that do keep it (all of
  them, where they are fewer) hold it, proven in the last `verified_within_seconds`. Where no tier keeps it, it goes.
* Of each name the newest snapshot, and the newest full one, stay in every tier; so does what a run went on from.
* A tier that can't be reached is no reason to drop anything: what it holds is not known, and counts as no copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import msgspec

from outlast.records import Snapshot, time_ns
from outlast.repo.retention import has_tag
from outlast.repo.state import Drill
from outlast.tiers.policy import DAY_SECONDS, KEEP_TAG, DrillPolicy, Policy, Tier, intervals, is_full

_NS = 10**9
_FOR_EVER = 1 << 80

CLOCK_OFF_SECONDS = 600
"""what the log dates further ahead than this is of a clock that was wrong: two clocks differ by less"""

MEND_AGAIN_SECONDS = 3600
"""what a repair could not mend is tried again after so long"""

Kind = Literal["backup", "mend", "copy", "prove", "drop", "drill"]


class Held(msgspec.Struct, frozen=True):
    """What the log of a tier says. `problem`: why it can't be read; then the rest is empty."""

    snapshots: dict[str, Snapshot] = {}
    """in the order of commit"""
    proven: dict[str, str] = {}
    hurt: dict[str, str] = {}
    damaged: dict[str, str] = {}
    """packs that were found damaged, by whatever looked -> when"""
    drills: dict[str, Drill] = {}
    resumed: frozenset[str] = frozenset()
    """checkpoints that runs went on from"""
    problem: str = ""
    full: bool = False
    """nothing could be written there just now"""


class Task(msgspec.Struct, frozen=True):
    """A piece of work. `due_ns` may lie in the future: then it is not due yet."""

    kind: Kind
    due_ns: int
    reason: str
    tier: str
    """where it is done: backed up or copied to, mended, proven, dropped from, drilled with"""
    name: str = ""
    """backup, drill: the source or the run"""
    full: bool = False
    """backup, prove: every byte is read, whatever was read not long ago"""
    snapshots: tuple[str, ...] = ()
    """all but backup: ids, in the order of commit"""
    origin: str = ""
    """copy, mend: the tier to read from"""
    bytes: int = 0
    """of files in those snapshots"""


class Lag(msgspec.Struct, frozen=True):
    """How far a tier is behind: what others have, and it should have."""

    tier: str
    snapshots: int = 0
    bytes: int = 0
    """of files, as they were new in those snapshots"""
    seconds: float = 0.0
    """since the oldest of them was begun"""
    problem: str = ""


class Plan(msgspec.Struct, frozen=True):
    """The tasks in the order in which they matter, and the lag of every tier but the first."""

    tasks: tuple[Task, ...]
    lags: tuple[Lag, ...]

    def due(self, now_ns: int) -> list[Task]:
        return [task for task in self.tasks if task.due_ns <= now_ns]


Series = tuple[Literal["source", "run"], str]
"""Snapshots of one name that follow on each other. A run, or a folder of a trainer's that is watched, is another series
than a source of the same name."""


def series(snapshot: Snapshot) -> Series:
    is_run = snapshot.kind == "checkpoint" or "checkpoint" in snapshot.tags
    return ("run" if is_run else "source"), snapshot.name


class Known(NamedTuple):
    """A snapshot, and what of it is worked out once."""

    snapshot: Snapshot
    time_ns: int
    until_ns: int
    """what its source wants it to be kept to; for ever, if it is a full one"""


class Facts:
    """The tiers as they are: the policy's, each with what it holds."""

    def __init__(self, policy: Policy, held: Sequence[Held], now_ns: int) -> None:
        assert len(held) == len(policy.tiers)
        self.policy = policy
        self.held = {tier.name: each for tier, each in zip(policy.tiers, held, strict=True)}
        self._readable_first = [tier.name for tier in sorted(policy.tiers, key=lambda tier: bool(tier.archive_class))]
        self.now_ns = now_ns
        every = {identity: snapshot for each in held for identity, snapshot in each.snapshots.items()}
        began = {identity: _began_ns(snapshot, now_ns) for identity, snapshot in every.items()}
        # Made while a clock was ahead, a snapshot would count as just made until that time has come, and nothing would
        # be backed up. It is kept like one of now; but the last one is another.
        dated = [each for each in every.values() if began[each.id] < now_ns or self.past_ns(each.time)]
        newest = _newest_of_each(dated, began)
        full = _newest_of_each(filter(is_full, dated), began)
        self.intervals = {
            ("source", each.name): intervals(each, newest.get(("source", each.name))) for each in policy.sources
        }
        self.every = {
            identity: Known(snapshot, began[identity], self._until_ns(snapshot, began[identity]))
            for identity, snapshot in every.items()
        }
        """every snapshot that any tier holds, each tier's in the order of commit"""
        self.newest = {name: self.every[each.id] for name, each in newest.items()}
        self.newest_full = {name: self.every[each.id] for name, each in full.items()}
        self.last_in = {tier: self._last_in(its, began) for tier, its in self.held.items()}
        """tier -> series -> the newest snapshot that it holds"""
        lasting = {each.id for each in (*newest.values(), *full.values())}
        if any(each.hurt for each in held):
            # One that is damaged in every tier takes no place of one that is whole.
            whole = [each for each in dated if any(self.holds(tier, each.id) for tier in self.held)]
            for some in (whole, filter(is_full, whole)):
                lasting.update(each.id for each in _newest_of_each(some, began).values())
        lasting.update(*(each.resumed for each in held))
        lasting.update(each.id for each in every.values() if each.tags and has_tag(each, KEEP_TAG))
        self.kept = {tier.name: self._kept(tier, lasting) for tier in policy.tiers}
        """tier -> every snapshot that it is to hold, wherever that is now"""

    def _last_in(self, held: Held, began: dict[str, int]) -> dict[Series, Snapshot]:
        found = {of: each.snapshot for of, each in self.newest.items() if each.snapshot.id in held.snapshots}
        others = (
            [each for each in held.snapshots.values() if series(each) not in found]
            if len(found) < len(self.newest)
            else []
        )
        return {**found, **_newest_of_each(others, began)}

    def _until_ns(self, snapshot: Snapshot, began_ns: int) -> int:
        source = self.intervals.get(series(snapshot))
        return _FOR_EVER if source is None or is_full(snapshot) else began_ns + source.retention_seconds * _NS

    def _kept(self, tier: Tier, lasting: set[str]) -> dict[str, Known]:
        special = lasting.union(each.id for each in self.last_in[tier.name].values())
        since_ns = 0 if tier.retention_seconds is None else self.now_ns - tier.retention_seconds * _NS
        return {
            identity: known
            for identity, known in self.every.items()
            if (known.time_ns >= since_ns and known.until_ns >= self.now_ns) or identity in special
        }

    def holds(self, tier: str, snapshot: str) -> bool:
        """Whether it is there, as far as is known undamaged."""
        return snapshot in self.held[tier].snapshots and snapshot not in self.held[tier].hurt

    def origin(self, snapshot: str, without: str) -> str:
        """The nearest other tier that holds it, one from which nothing is archived before others; "" for none."""
        return next((tier for tier in self._readable_first if tier != without and self.holds(tier, snapshot)), "")

    def past_ns(self, text: str | None) -> int:
        """A time of the log; 0 for none, for one that can't be read, and for one that is yet to come."""
        at_ns = _ns_or_zero(text) if text else 0
        return 0 if at_ns > self.now_ns + CLOCK_OFF_SECONDS * _NS else at_ns

    def proven_ns(self, tier: str, snapshot: str) -> int:
        """When it was last proven there; 0 for never."""
        return self.past_ns(self.held[tier].proven.get(snapshot))


def plan(policy: Policy, held: Sequence[Held], now_ns: int) -> Plan:
    """What to do. `held`: one for each tier of the policy, in its order.

    The same facts, policy and time give the same tasks; a task that was carried out is not in the next plan.
    """
    facts = Facts(policy, held, now_ns)
    lacking = copies(facts)
    proofs = [*_proofs_of_full(facts), *_proofs_after_damage(facts), *_proofs_before_archiving(facts)]
    tasks = [
        *_backups(facts),
        *_mends(facts),
        *(task for tasks, _ in lacking for task in tasks),
        *proofs,
        *_drops(facts),
        *_drills(facts),
    ]
    return Plan(tuple(tasks), tuple(lag for _, lag in lacking))


def _backups(facts: Facts) -> Iterator[Task]:
    """Of each source the next one, to the first tier that can be written. A full one is an incremental one as well."""
    reachable = [tier.name for tier in facts.policy.tiers if not facts.held[tier.name].problem]
    first = next((tier for tier in reachable if not facts.held[tier].full), next(iter(reachable), None))
    if first is None:
        return
    for source in facts.policy.sources:
        found, newest, full = (
            facts.intervals["source", source.name],
            facts.newest.get(("source", source.name)),
            facts.newest_full.get(("source", source.name)),
        )
        if newest is None:
            yield Task("backup", facts.now_ns, "there is no backup of it", first, source.name, full=True)
            continue
        full_ns = full.time_ns + found.full_seconds * _NS if full else facts.now_ns
        next_ns = newest.time_ns + found.incremental_seconds * _NS
        if full_ns <= max(facts.now_ns, next_ns):
            due_ns, why = min(full_ns, next_ns), f"full every {span(found.full_seconds)}"
        else:
            due_ns, why = next_ns, f"incremental every {span(found.incremental_seconds)}"
        is_due_full = full_ns <= max(facts.now_ns, due_ns)
        yield Task("backup", due_ns, why, first, source.name, is_due_full, bytes=newest.snapshot.bytes)


def _mends(facts: Facts) -> Iterator[Task]:
    """What was found damaged in a tier, and is elsewhere. What is nowhere else the state of the objectives tells."""
    for tier, held in facts.held.items():
        by_origin: dict[str, list[Known]] = {}
        for each in held.hurt:
            if each in held.snapshots and (origin := facts.origin(each, tier)):
                by_origin.setdefault(origin, []).append(facts.every[each])
        for origin, found in by_origin.items():
            last_ns = max(facts.past_ns(held.hurt[known.snapshot.id]) for known in found)
            due_ns, why = last_ns + MEND_AGAIN_SECONDS * _NS, f"found damaged, and whole in {origin}"
            yield _task("mend", due_ns, why, tier, found, origin=origin)


def copies(facts: Facts) -> list[tuple[list[Task], Lag]]:
    """For each tier what is to be copied to it, and how far it is behind."""
    return [_copies(facts, number) for number in range(len(facts.policy.tiers))]


def _copies(facts: Facts, number: int) -> tuple[list[Task], Lag]:
    """What this tier lacks of what it would keep, from the nearest that has it.

    The first tier is where backups and runs put what they make: checkpoints that it lacks a run has dropped.
    """
    tier = facts.policy.tiers[number]
    held = facts.held[tier.name]
    if held.problem:
        return [], Lag(tier.name, problem=held.problem)
    missing = [
        known
        for identity, known in facts.kept[tier.name].items()
        if identity not in held.snapshots
        and (number or series(known.snapshot) in facts.intervals)
        and facts.origin(identity, tier.name)
    ]
    if not missing:
        return [], Lag(tier.name)
    oldest_ns = min(known.time_ns for known in missing)
    lag = Lag(
        tier.name,
        len(missing),
        sum(known.snapshot.bytes_added for known in missing),
        max(0.0, (facts.now_ns - oldest_ns) / _NS),
    )
    due_ns, why = oldest_ns + tier.interval_seconds * _NS, f"copied every {span(tier.interval_seconds)}"
    if tier.mode == "sync":
        due_ns, why = oldest_ns, "copied at once"
    elif len(missing) >= tier.batch_size:
        due_ns, why = min(due_ns, facts.now_ns), f"{len(missing)} wait, {tier.batch_size} are a batch"
    by_origin: dict[str, list[Known]] = {}
    for known in missing:
        by_origin.setdefault(facts.origin(known.snapshot.id, tier.name), []).append(known)
    return [_task("copy", due_ns, why, tier.name, found, origin=origin) for origin, found in by_origin.items()], lag


def _proofs_of_full(facts: Facts) -> Iterator[Task]:
    """Full backups are verified end to end where they were made."""
    first = facts.policy.tiers[0].name
    unproven = [
        known
        for (kind, _), known in facts.newest_full.items()
        if kind == "source"
        and facts.holds(first, known.snapshot.id)
        and known.snapshot.id not in facts.held[first].proven
    ]
    if unproven:
        task = _task("prove", facts.now_ns, "a full backup is verified end to end", first, unproven)
        yield msgspec.structs.replace(task, full=True)


def _proofs_after_damage(facts: Facts) -> Iterator[Task]:
    """Where packs were found damaged, by a check for example: which snapshots that hurts, every byte read, is told
    by a proof; then they are mended."""
    for tier, held in facts.held.items():
        if not held.damaged:
            continue
        found_ns = max(facts.past_ns(each) for each in held.damaged.values())
        unsure = [
            facts.every[each]
            for each in held.snapshots
            if each not in held.hurt and facts.proven_ns(tier, each) < found_ns
        ]
        if unsure:
            task = _task("prove", facts.now_ns, "damage was found there", tier, unsure)
            yield msgspec.structs.replace(task, full=True)


def _proofs_before_archiving(facts: Facts) -> Iterator[Task]:
    """What is archived can't be read any more, so it is proven before; what was proven is archived with it.

    A proof from before it was old enough is none: nothing was moved then.
    """
    for tier in facts.policy.tiers:
        held = facts.held[tier.name]
        if not tier.archive_class:
            continue
        after_ns = tier.archive_after_seconds * _NS
        found = [
            facts.every[each]
            for each in held.snapshots
            if each not in held.hurt
            and facts.proven_ns(tier.name, each) < facts.every[each].time_ns + after_ns <= facts.now_ns
        ]
        if found:
            due_ns = _next_midnight_ns(min(each.time_ns for each in found) + after_ns)
            task = _task("prove", due_ns, f"proven, and then moved to {tier.archive_class}", tier.name, found)
            yield msgspec.structs.replace(task, full=True)  # so that it counts from now on


def _drops(facts: Facts) -> Iterator[Task]:
    """What a tier keeps no more: dropped once a day, when the copies are proven; those that aren't are proven first.

    Once a day, for what is dropped is pruned, and what is proven together is read once.
    """
    wanted: dict[str, dict[str, Known]] = {}
    proofs_ns: dict[str, int] = {}
    drops = []
    is_blind = any(held.problem for held in facts.held.values())
    for number, tier in enumerate(facts.policy.tiers):
        held = facts.held[tier.name]
        if held.problem:
            continue
        kept = facts.kept[tier.name]
        gone = [facts.every[each] for each in held.snapshots if each not in kept]
        go: list[Known] = []
        for known in gone:
            if is_blind and known.snapshot.kind == "checkpoint":
                continue  # that a run went on from it stands in the log of one tier alone
            unproven = _unproven_copies(facts, number, known)
            if unproven is None:
                continue
            for other in unproven:
                wanted.setdefault(other, {})[known.snapshot.id] = known
                due_ns = _next_day_ns(facts, number, [known])
                proofs_ns[other] = min(due_ns, proofs_ns.get(other, due_ns))
            if not unproven:
                go.append(known)
        if go:
            why = "retention is over, and copies are proven where they stay"
            drops.append(_task("drop", _next_day_ns(facts, number, go), why, tier.name, go))
    for tier_name, found in wanted.items():
        why = "before copies elsewhere are dropped"
        yield _task("prove", proofs_ns[tier_name], why, tier_name, found.values())
    yield from drops


def _unproven_copies(facts: Facts, number: int, known: Known) -> list[str] | None:
    """In which tiers the copies still have to be proven before it may go from this one; None where there are too few.

    Tiers that keep it, and can't be reached or don't hold it yet, are waited for where they are needed.
    """
    here = facts.policy.tiers[number].name
    keeping = [tier for tier, kept in facts.kept.items() if tier != here and known.snapshot.id in kept]
    needed = min(facts.policy.copies, len(keeping))
    holding = [tier for tier in keeping if facts.holds(tier, known.snapshot.id)]
    if len(holding) < needed:
        return None
    since_ns = facts.now_ns - facts.policy.verified_within_seconds * _NS
    archived = {tier.name for tier in facts.policy.tiers if tier.archive_class}  # what is in there can't be read again
    fresh = [
        name for name in holding if facts.proven_ns(name, known.snapshot.id) > (0 if name in archived else since_ns)
    ]
    stale = [name for name in holding if name not in fresh]
    return stale[: max(0, needed - len(fresh))]


def _next_day_ns(facts: Facts, number: int, gone: Iterable[Known]) -> int:
    """The first midnight, UTC, after the oldest of these was kept no more; now, where that is over."""
    retention = facts.policy.tiers[number].retention_seconds
    own_ns = _FOR_EVER if retention is None else retention * _NS
    end_ns = min(min(known.until_ns, known.time_ns + own_ns) for known in gone)
    return _next_midnight_ns(end_ns)


def _next_midnight_ns(at_ns: int) -> int:
    """UTC."""
    day_ns = DAY_SECONDS * _NS
    return (at_ns // day_ns + 1) * day_ns


def _drills(facts: Facts) -> Iterator[Task]:
    """Of each name a restore of its newest snapshot, from the tiers in turn: the one whose last was longest ago."""
    for (kind, name), newest in facts.newest.items():
        source = facts.policy.source(name) if kind == "source" else None
        policy: DrillPolicy | None = facts.policy.run_drill if kind == "run" else source.drill if source else None
        if policy is None:
            continue
        drills = {tier: held.drills[name] for tier, held in facts.held.items() if name in held.drills}
        times = {tier: facts.past_ns(drill.time) for tier, drill in drills.items()}
        made = [(times[tier], drill) for tier, drill in drills.items() if times[tier]]
        turns = [
            (times.get(tier, 0), number, tier)
            for number, tier in enumerate(facts.held)
            if facts.holds(tier, newest.snapshot.id) and not facts.policy.tiers[number].archive_class
        ]
        if not turns:
            continue
        _, _, tier = min(turns)
        due_ns, why = facts.now_ns, "a restore was never rehearsed"
        if made:
            last_ns, last = max(made, key=lambda each: each[0])
            every = policy.every_seconds if last.passed else min(policy.every_seconds, DAY_SECONDS)
            due_ns, why = last_ns + every * _NS, f"rehearsed every {span(policy.every_seconds)}"
            if not last.passed:
                why = "the last rehearsal failed"
        task = _task("drill", due_ns, why, tier, [newest])
        yield msgspec.structs.replace(task, name=name)


def _task(kind: Kind, due_ns: int, reason: str, tier: str, known: Iterable[Known], *, origin: str = "") -> Task:
    found = [each.snapshot for each in known]
    size = sum(each.bytes for each in found)
    return Task(kind, due_ns, reason, tier, snapshots=tuple(each.id for each in found), origin=origin, bytes=size)


def _newest_of_each(snapshots: Iterable[Snapshot], began: dict[str, int]) -> dict[Series, Snapshot]:
    """series -> the newest; of two of one time the later one."""
    newest: dict[Series, Snapshot] = {}
    for snapshot in snapshots:
        of = series(snapshot)
        found = newest.get(of)
        if found is None or began[snapshot.id] >= began[found.id]:
            newest[of] = snapshot
    return newest


def _began_ns(snapshot: Snapshot, now_ns: int) -> int:
    """Its time; one in the future, or that can't be read, counts as now: so it is never old enough to go."""
    return min(_ns_or_zero(snapshot.time) or now_ns, now_ns)


@lru_cache(1 << 17)
def _ns_or_zero(text: str) -> int:
    try:
        return time_ns(text)
    except ValueError:
        return 0


def span(seconds: float) -> str:
    """A duration in words.

    >>> span(43200), span(86400), span(5400), span(45)
    ('12 h', '1 d', '90 min', '45 s')
    """
    for size, unit in ((DAY_SECONDS, "d"), (3600, "h"), (60, "min")):
        if seconds >= size and seconds % size == 0:
            return f"{seconds // size:g} {unit}"
    return f"{seconds:g} s"
