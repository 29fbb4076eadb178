"""A year of a team: every objective that could be met was met, and nothing was kept or dropped against policy."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from year import HOUR, NS, Year, kept_by_nobody

from outlast.backup import restore
from outlast.records import LogEntry, Snapshot
from outlast.records import time_ns as parsed_ns
from outlast.repo.check import check
from outlast.repo.repository import Repository
from outlast.repo.state import FORGET, PROVEN, SNAPSHOT
from outlast.store.lease import Lease
from outlast.tiers.policy import DAY_SECONDS as DAY
from outlast.tiers.policy import Policy, Source, Tier, intervals

time_ns = lru_cache(None)(parsed_ns)

SEED = int(os.environ.get("OUTLAST_SEED", "20261122"))
DAYS = int(os.environ.get("OUTLAST_DAYS", "365"))
SLACK = 7 * HOUR
"""an agent looks every four hours, and tries again after at most one"""
VERIFIED_WITHIN = 7 * DAY
COPIES = 2


def team(folder: Path) -> Policy:
    def at(name: str) -> tuple[str, ...]:
        return (str(folder / name),)

    return Policy(
        tiers=(
            Tier("hot", "memory://", type="nvme_ssd", retention_seconds=7 * DAY),
            Tier("warm", "memory://", type="ssd", retention_seconds=30 * DAY),
            Tier("cold", "memory://", type="hdd", retention_seconds=180 * DAY, interval_seconds=6 * HOUR),
            Tier("glacier", "memory://", type="object_storage", interval_seconds=DAY),
        ),
        sources=(
            Source("models", at("models"), importance="critical", stage="final", full_seconds=6 * DAY, drill=None),
            Source(
                "data",
                at("data"),
                importance="low",
                stage="final",
                full_seconds=6 * DAY,
                retention_seconds=14 * DAY,
                drill=None,
            ),
            Source("config", at("config"), stage="final", full_seconds=6 * DAY, drill=None),
        ),
        copies=COPIES,
        verified_within_seconds=VERIFIED_WITHIN,
    )


class Observer:
    """Looks at the tiers themselves every eight hours, past all faults, and judges by rules of its own."""

    def __init__(self, year: Year) -> None:
        self.year = year
        self.misses: list[str] = []
        self.looks = self.judged = 0
        self._well_since: dict[str, int] = {}
        self._seen: dict[str, int] = {}
        self._repositories = {
            name: Repository.open(store._store, clock=year.clock) for name, store in year.stores.items()
        }

    def look(self) -> None:
        now_ns = self.year.clock.now_ns()
        for repository in self._repositories.values():
            repository.refresh()
        held = {name: repository.state.snapshots for name, repository in self._repositories.items()}
        for each in held.values():
            for snapshot in each:
                self._seen.setdefault(snapshot, now_ns)
        well = {name for name, store in self.year.stores.items() if not store.down and not store.full}
        working = any(agent.alive and now_ns - agent.next_ns < HOUR * NS for agent in self.year.agents)
        for name in [*held, "agents"]:
            if name in well or (name == "agents" and working):
                self._well_since.setdefault(name, now_ns)
            else:
                self._well_since.pop(name, None)
        self.looks += 1
        self._judge_backups(held, now_ns)
        self._judge_copies(held, now_ns)
        self._judge_retention(held, now_ns)

    def _well(self, seconds: float, *names: str) -> bool:
        since_ns = self.year.clock.now_ns() - seconds * NS
        return all(self._well_since.get(name, 2**63) <= since_ns for name in ("agents", *names))

    def _judge_backups(self, held: dict[str, dict[str, Snapshot]], now_ns: int) -> None:
        if not any(self._well(SLACK, tier) for tier in held):
            return
        self.judged += 1
        for source in self.year.policy.sources:
            made = [time_ns(each.time) for tier in held.values() for each in tier.values() if each.name == source.name]
            age = (now_ns - max(made, default=0)) / NS
            if age > intervals(source, None).incremental_seconds + SLACK:
                self._miss(f"the last backup of {source.name} is {age / HOUR:.1f} h old")

    def _judge_copies(self, held: dict[str, dict[str, Snapshot]], now_ns: int) -> None:
        for tier in self.year.policy.tiers[1:]:
            wait = tier.interval_seconds + SLACK
            if not self._well(wait, tier.name):
                continue
            for origin, snapshots in held.items():
                if not self._well(wait, origin):
                    continue
                for each in snapshots.values():
                    age = (now_ns - time_ns(each.time)) / NS
                    waited = (now_ns - self._seen[each.id]) / NS
                    if each.id not in held[tier.name] and waited > wait and age < self.limit(tier, each) - HOUR:
                        self._miss(f"{each.id[:8]} of {each.name}, {age / HOUR:.1f} h old, is not in {tier.name}")

    def _judge_retention(self, held: dict[str, dict[str, Snapshot]], now_ns: int) -> None:
        if not self._well(30 * HOUR, *held):
            return
        for tier in self.year.policy.tiers:
            for each in held[tier.name].values():
                age = (now_ns - time_ns(each.time)) / NS
                if age > self.limit(tier, each) + 30 * HOUR and not self._is_newest(held, each):
                    self._miss(f"{each.id[:8]} of {each.name}, {age / DAY:.1f} d old, is still in {tier.name}")

    def limit(self, tier: Tier, snapshot: Snapshot) -> float:
        """How old it gets in a tier."""
        source = self.year.policy.source(snapshot.name)
        assert source is not None
        own = intervals(source, None).retention_seconds if snapshot.parent else float("inf")
        return min(own, tier.retention_seconds or float("inf"))

    def _is_newest(self, held: dict[str, dict[str, Snapshot]], snapshot: Snapshot) -> bool:
        def newest(full: bool) -> str:
            every = [each for tier in held.values() for each in tier.values() if each.name == snapshot.name]
            return max((each.time, each.id) for each in every if not full or not each.parent)[1]

        return snapshot.id in (newest(False), newest(True))

    def _miss(self, what: str) -> None:
        self.misses.append(f"day {self.year.days():.2f}: {what}")


def entries(repository: Repository) -> Iterator[LogEntry]:
    for seq in range(1, repository.state.seq + 1):
        yield repository.log.parse(repository.store.get(f"log/{seq:020d}"), seq)


def judge_drops(observer: Observer, year: Year) -> tuple[int, int]:
    """Replay the logs of all tiers by time. Returns (drops, of these the ones that others had to hold)."""
    repositories = {name: Repository.open(store, clock=year.clock) for name, store in year.stores.items()}
    merged = sorted(
        ((entry.time, tier, entry) for tier, repository in repositories.items() for entry in entries(repository)),
        key=lambda each: (each[0], each[2].kind == FORGET),
    )
    held: dict[str, dict[str, Snapshot]] = {tier: {} for tier in repositories}
    proven: dict[str, dict[str, str]] = {tier: {} for tier in repositories}
    drops = evictions = 0
    for time, tier, entry in merged:
        body: dict[str, Any] = entry.body
        if entry.kind == SNAPSHOT:
            made = msgspec.convert(body["snapshot"], Snapshot)
            held[tier][made.id] = made
        elif entry.kind == PROVEN:
            proven[tier].update({each: body.get("since", {}).get(each, time) for each in body["snapshots"]})
        elif entry.kind == FORGET:
            for identity in body["snapshots"]:
                snapshot = held[tier].pop(identity)
                drops += 1
                age = (time_ns(time) - time_ns(snapshot.time)) / NS
                policy = {each.name: each for each in year.policy.tiers}
                assert age > observer.limit(policy[tier], snapshot), f"{tier} dropped {identity} at {age / DAY:.2f} d"
                assert any(each.name == snapshot.name for each in held[tier].values())
                keeping = [other for other in held if other != tier and age <= observer.limit(policy[other], snapshot)]
                good = [
                    other
                    for other in keeping
                    if identity in held[other]
                    and time_ns(time) - time_ns(proven[other].get(identity, "1970-01-01T00:00:00Z"))
                    <= VERIFIED_WITHIN * NS
                ]
                assert len(good) >= min(COPIES, len(keeping)), f"{tier} dropped {identity}, proven only in {good}"
                evictions += bool(keeping)
    return drops, evictions


def judge_double_work(year: Year) -> None:
    """Two agents never made the same backup: in one tier those of a name lie an interval apart."""
    first: dict[str, tuple[str, str, Snapshot]] = {}
    for tier, store in year.stores.items():
        for entry in entries(Repository.open(store, clock=year.clock)):
            if entry.kind == SNAPSHOT:
                snapshot = msgspec.convert(entry.body["snapshot"], Snapshot)
                first[snapshot.id] = min(
                    first.get(snapshot.id, ("9", "", snapshot)), (entry.time, tier, snapshot), key=itemgetter(0)
                )
    for tier in year.stores:
        for source in year.policy.sources:
            name = source.name
            snapshots = [each for _, at, each in first.values() if (at, each.name) == (tier, name)]
            times = sorted((time_ns(each.time), bool(each.parent)) for each in snapshots)
            for (before, _), (after, is_incremental) in pairwise(times):
                if is_incremental:
                    assert after - before >= intervals(source, None).incremental_seconds * NS, f"{name} in {tier}"


def digest(folder: str) -> dict[str, str]:
    return {
        os.path.relpath(os.path.join(root, file), folder): hashlib.sha256(Path(root, file).read_bytes()).hexdigest()
        for root, _, files in os.walk(folder)
        for file in files
    }


@pytest.mark.slow
def test_a_year_of_a_team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lease, "kept", kept_by_nobody)
    print(f"OUTLAST_SEED={SEED} OUTLAST_DAYS={DAYS}")
    year = Year(team(tmp_path), str(tmp_path), SEED)
    observer = Observer(year)
    year.run(DAYS, observer.look)
    print(dict(year.counts))
    assert not observer.misses, observer.misses[:20]
    assert observer.judged > 0.8 * observer.looks, "there was hardly a moment at which anything could be met"
    for what in ("killed", "stood still", "replies lost", "down", "full", "slow"):
        assert year.counts[what], f"nothing {what} in a whole year"
    year.be_calm()
    year.run(4, observer.look)
    assert not observer.misses, observer.misses[:20]
    drops, evictions = judge_drops(observer, year)
    assert drops > DAYS
    assert evictions > DAYS / 2
    judge_double_work(year)
    for name, store in year.stores.items():
        repository = Repository.open(store, clock=year.clock)
        assert check(repository, data="all").ok, name
        for source in year.policy.sources:
            target = str(tmp_path / "restored" / name / source.name)
            newest = repository.find_snapshot("latest", source.name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            restore.execute(repository, restore.plan(repository, newest, target))
            assert digest(f"{target}") == digest(source.paths[0])
