"""Jobs of an agent on repositories in memory: damage, tiers that were swapped, wrong clocks, failures unforeseen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from outlast.agent import once
from outlast.clock import ManualClock
from outlast.errors import Refused, StoreFull, Unavailable
from outlast.events import ListSink
from outlast.repo.prove import prove
from outlast.repo.repository import Repository
from outlast.store.memory import MemoryStore
from outlast.tiers import jobs as jobs_module
from outlast.tiers.jobs import jobs
from outlast.tiers.places import Places
from outlast.tiers.policy import DAY_SECONDS as DAY
from outlast.tiers.policy import Policy, Source, Tier
from outlast.tiers.work import Done, perform

HALF_DAY = DAY / 2
TIERS = (
    Tier("hot", "memory://", retention_seconds=7 * DAY),
    Tier("warm", "memory://", retention_seconds=30 * DAY, mode="sync"),
    Tier("cold", "memory://", mode="sync"),
)


class Team:
    def __init__(self, folder: Path, sources: int = 1) -> None:
        self.folder, self.clock, self.sink = folder, ManualClock(), ListSink()
        (folder / "w").write_bytes(os.urandom(100_000))
        made = tuple(Source(f"models-{number}", (str(folder),), drill=None) for number in range(sources))
        self.policy = Policy(TIERS, made)
        self.stores = {tier.name: self.store() for tier in TIERS}
        self.jobs = jobs(self.policy, self.places(), self.sink, one_thread=True)

    def store(self) -> MemoryStore:
        made = MemoryStore(clock=self.clock)
        Repository.create(made, clock=self.clock)
        return made

    def places(self) -> Places:
        return Places(self.policy, lambda tier: self.stores[tier.name], self.open, self.clock)

    def open(self, store: MemoryStore) -> Repository:
        return Repository.open(store, clock=self.clock, sink=self.sink)

    def work(self, seconds: float, *, steps: int = 1) -> None:
        """Every job, so often, as far apart."""
        for _ in range(steps):
            self.clock.sleep(seconds)
            with (self.folder / "w").open("r+b") as file:
                file.write(os.urandom(1000))
            once(self.jobs, self.clock)

    def repository(self, tier: str) -> Repository:
        return self.open(self.stores[tier])

    def damage(self, tier: str) -> None:
        """A byte of every pack."""
        store = self.stores[tier]
        for info in list(store.list("packs/")):
            content = bytearray(store.get(info.name))
            content[len(content) // 2] ^= 1
            store.put(info.name, [bytes(content)])

    def notice(self, tier: str) -> None:
        repository = self.repository(tier)
        assert prove(repository, repository.snapshots()).damaged

    def told(self, kind: str) -> list[str]:
        return [each.reason for each in self.sink.events if each.kind == kind]


@pytest.fixture
def team(tmp_path: Path) -> Team:
    return Team(tmp_path)


def test_damage_is_mended_from_another_tier(team: Team) -> None:
    team.work(0)
    team.damage("hot")
    team.notice("hot")
    team.work(2 * 3600, steps=2)
    repository = team.repository("hot")
    assert not repository.state.hurt
    assert not prove(repository, repository.snapshots()).damaged


def test_where_the_nearest_copy_is_damaged_as_well_the_next_one_mends_both(team: Team) -> None:
    team.work(0)
    team.damage("hot")
    team.damage("warm")
    team.notice("warm")
    team.work(2 * 3600, steps=4)
    for tier in ("hot", "warm"):
        repository = team.repository(tier)
        assert not prove(repository, repository.snapshots()).damaged, tier


def test_what_is_damaged_everywhere_makes_no_work_for_ever(team: Team) -> None:
    team.work(0)
    for tier in team.stores:
        team.damage(tier)
    team.notice("hot")
    team.work(2 * 3600, steps=5)
    before = len(team.told("job.done"))
    team.work(60, steps=200)
    assert len([each for each in team.told("job.done")[before:] if each.startswith("mend")]) == 0


@pytest.mark.parametrize("tier", ["hot", "warm"])
def test_a_tier_that_is_copied_back_from_an_older_one_is_not_written_on_past_its_end(team: Team, tier: str) -> None:
    team.work(0)
    store = team.stores[tier]
    older = {info.name: store.get(info.name) for info in store.list("")}
    team.work(HALF_DAY, steps=3)
    for info in list(store.list("")):
        store.delete(info.name)
    for name, content in older.items():
        store.put(name, [content])
    team.work(HALF_DAY, steps=2)
    held = {name: set(team.repository(name).state.snapshots) for name in team.stores}
    assert held["hot"] == held["warm"] == held["cold"]
    assert len(held["hot"]) == 6


def test_another_repository_in_its_place_is_not_written_as_if_it_were_the_old_one(team: Team) -> None:
    team.work(0)
    store, other = team.stores["warm"], team.store()
    for info in list(store.list("")):
        store.delete(info.name)
    for info in other.list(""):
        store.put(info.name, [other.get(info.name)])
    team.work(HALF_DAY, steps=2)
    assert len(team.repository("warm").state.snapshots) == 3


def test_a_clock_that_is_ahead_of_the_stores_drops_nothing(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    team.work(HALF_DAY, steps=6)
    theirs = ManualClock(now_ns=team.clock.now_ns())
    for store in team.stores.values():
        monkeypatch.setattr(store, "_clock", theirs)
    before = {tier: set(team.repository(tier).state.snapshots) for tier in team.stores}
    team.work(400 * DAY)
    for tier, snapshots in before.items():
        assert snapshots <= set(team.repository(tier).state.snapshots)
    assert any("clock here is 400.0 d ahead" in each for each in team.told("job.failed"))


def test_an_agent_whose_clock_was_set_back_goes_on(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    team.work(0)
    back = ManualClock(seed=2, now_ns=team.clock.now_ns() - 5 * DAY * 10**9)
    monkeypatch.setattr(team.clock, "now_ns", back.now_ns)
    monkeypatch.setattr(team.clock, "sleep", back.sleep)
    team.work(HALF_DAY, steps=3)
    assert len(team.repository("hot").state.snapshots) >= 3


def test_a_failure_that_nobody_foresaw_keeps_no_other_task_from_being_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    team = Team(tmp_path)

    def work(task: object, *more: object) -> Done:
        if getattr(task, "origin", "") == "hot" and getattr(task, "tier", "") == "warm":
            raise RecursionError("too deep")
        return perform(task, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(jobs_module, "perform", work)
    team.work(0)
    assert any("RecursionError: too deep" in each for each in team.told("job.failed"))
    team.work(10)
    assert len(team.told("job.failed")) == 1, "it waits before it tries again"


@pytest.mark.parametrize(
    "failure", [Refused("read-only"), StoreFull("full"), Unavailable("away"), OSError(5, "broken")]
)
def test_where_the_first_tier_cannot_be_written_backups_go_to_the_next(
    team: Team, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    team.work(0)

    def fail(*args: object) -> None:
        raise failure

    for name in ("put", "put_if_absent"):
        monkeypatch.setattr(team.stores["hot"], name, fail)
    team.work(HALF_DAY, steps=4)
    held = {tier: len(team.repository(tier).state.snapshots) for tier in team.stores}
    assert held == {"hot": 1, "warm": 5, "cold": 5}


def test_what_was_read_at_a_time_to_come_is_read_again(team: Team) -> None:
    team.work(0)
    later = ManualClock(now_ns=team.clock.now_ns() + 300 * DAY * 10**9)
    ahead = Repository.open(team.stores["warm"], clock=later)
    assert prove(ahead, ahead.snapshots()).proven
    team.damage("warm")
    repository = team.repository("warm")
    assert prove(repository, repository.snapshots(), trust_seconds=DAY).damaged


def test_a_tier_that_cannot_be_read_is_told_once_and_when_it_is_back(team: Team) -> None:
    team.work(0)
    store = team.stores["warm"]
    form = store.get("format")
    store.delete("format")
    team.work(60, steps=5)
    assert len(team.told("tier.unreadable")) == 1
    assert not team.told("tier.back")
    store.put("format", [form])
    team.work(60, steps=2)
    assert team.told("tier.back") == ["warm can be read again."]
