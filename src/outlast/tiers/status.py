"""How things stand: of each source and run the last backup and proof, of each tier its lag, and what is missed.

Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import msgspec

from outlast.repo.state import Drill
from outlast.tiers.due import Facts, Held, Lag, Series, copies, series, span
from outlast.tiers.policy import Policy, rpo_seconds

_NS = 10**9
_LATE_FACTOR = 2
"""A copy or a rehearsal may be missed once."""
_LATE_SECONDS = 3600.0


class Named(msgspec.Struct, frozen=True):
    """A source, or a run."""

    name: str
    kind: Literal["source", "run", "backup"]
    """backup: of no source of the configuration"""
    snapshots: int
    """in all tiers, each counted once"""
    last_seconds: float | None
    """the age of the newest; None where there is none"""
    rpo_seconds: int | None
    """the objective for it"""
    proof: Drill | None
    """the last drill, in whatever tier"""
    proof_tier: str
    proof_seconds: float | None
    """its age"""
    rto_seconds: int | None
    """the objective for how long it takes"""


class Standing(msgspec.Struct, frozen=True):
    """A tier. `proven_seconds`: the age of the oldest proof of the newest snapshots, None where one has none."""

    name: str
    url: str
    snapshots: int
    damaged: int
    proven_seconds: float | None
    lag: Lag


class Status(msgspec.Struct, frozen=True):
    """`missed`: one sentence for each objective that is missed now."""

    names: tuple[Named, ...]
    tiers: tuple[Standing, ...]
    missed: tuple[str, ...]


def status(policy: Policy, held: Sequence[Held], now_ns: int) -> Status:
    """`held`: one for each tier of the policy, in its order."""
    facts = Facts(policy, held, now_ns)
    lags = [lag for _, lag in copies(facts)]
    times: dict[Series, list[int]] = {("source", source.name): [] for source in policy.sources}
    for known in facts.every.values():
        times.setdefault(series(known.snapshot), []).append(known.time_ns)
    names = tuple(_named(facts, of, len(begun)) for of, begun in times.items())
    tiers = tuple(_standing(facts, number, lag) for number, lag in enumerate(lags))
    missed = [*_missed_names(facts, names, times), *_missed_tiers(facts, tiers)]
    return Status(names, tiers, tuple(missed))


def _named(facts: Facts, of: Series, snapshots: int) -> Named:
    kind, name = of
    source, newest = (facts.policy.source(name) if kind == "source" else None), facts.newest.get(of)
    drills = ((each.drills.get(name), tier) for tier, each in facts.held.items())
    made = [(at_ns, tier) for drill, tier in drills if drill and (at_ns := facts.past_ns(drill.time))]
    at_ns, tier = max(made, default=(0, ""))
    return Named(
        name,
        "source" if source else "run" if kind == "run" else "backup",
        snapshots,
        _age(facts, newest.time_ns) if newest else None,
        rpo_seconds(source, facts.intervals[of]) if source else None,
        facts.held[tier].drills[name] if tier else None,
        tier,
        _age(facts, at_ns) if tier else None,
        source.rto_seconds if source else None,
    )


def _standing(facts: Facts, number: int, lag: Lag) -> Standing:
    tier = facts.policy.tiers[number]
    held = facts.held[tier.name]
    proofs = [facts.proven_ns(tier.name, each.id) for each in facts.last_in[tier.name].values()]
    oldest = min(proofs, default=0)
    proven = _age(facts, oldest) if oldest else None
    return Standing(tier.name, tier.url, len(held.snapshots), len(held.hurt), proven, lag)


def _missed_names(facts: Facts, names: Sequence[Named], times: Mapping[Series, Sequence[int]]) -> Iterator[str]:
    """`times`: of each series when its snapshots were begun, in nanoseconds; in the order of `names`."""
    for each, begun in zip(names, times.values(), strict=True):
        source = facts.policy.source(each.name) if each.kind == "source" else None
        if each.last_seconds is None:
            yield f"{each.name} has no backup."
            continue
        if each.rpo_seconds is not None and each.last_seconds > each.rpo_seconds:
            age = about(each.last_seconds)
            yield f"the last backup of {each.name} is {age} old; tolerated are {span(each.rpo_seconds)}."
        drill = source.drill if source else facts.policy.run_drill if each.kind == "run" else None
        if drill is not None:
            late = _LATE_FACTOR * drill.every_seconds
            if each.proof is None and _age(facts, min(begun)) > late:
                yield f"a restore of {each.name} was never rehearsed."
            elif each.proof_seconds is not None and each.proof_seconds > late:
                age = about(each.proof_seconds)
                yield f"a restore of {each.name} was last rehearsed {age} ago; due every {span(drill.every_seconds)}."
        if each.proof is not None and not each.proof.passed:
            reached = f"L{each.proof.level}" if each.proof.level >= 0 else "not even L0"
            yield f"the last rehearsal of {each.name} reached {reached} of L{each.proof.asked}: {each.proof.problem}"
        elif each.proof is not None and each.rto_seconds is not None and each.proof.rto_seconds > each.rto_seconds:
            took = about(each.proof.rto_seconds)
            yield f"restoring {each.name} took {took} in {each.proof_tier}; tolerated are {span(each.rto_seconds)}."


def _missed_tiers(facts: Facts, tiers: Sequence[Standing]) -> Iterator[str]:
    for tier, each in zip(facts.policy.tiers, tiers, strict=True):
        late = _LATE_FACTOR * tier.interval_seconds + _LATE_SECONDS
        if each.lag.problem:
            yield f"{each.name} can't be read: {each.lag.problem}"
        elif each.lag.seconds > late:
            behind = f"{each.lag.snapshots:,} snapshots, {about(each.lag.seconds)}"
            yield f"{each.name} is {behind} behind; copies are due every {span(tier.interval_seconds)}."
        if each.damaged:
            what = "1 snapshot is" if each.damaged == 1 else f"{each.damaged:,} snapshots are"
            yield f"in {each.name} {what} damaged; `outlast plan --all` tells what is done about it."


def _age(facts: Facts, at_ns: int) -> float:
    return max(0.0, (facts.now_ns - at_ns) / _NS)


def about(seconds: float) -> str:
    """A duration as people say it.

    >>> about(95), about(7300), about(200_000), about(0.25)
    ('95 s', '2.0 h', '2.3 d', '0.2 s')
    """
    for size, unit in ((172_800, "d"), (7200, "h"), (300, "min")):
        if seconds >= size:
            return f"{seconds / {'d': 86_400, 'h': 3600, 'min': 60}[unit]:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
