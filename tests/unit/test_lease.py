"""A lease has one owner at a time, ends by the store's clock, and fences off whoever was followed."""

from __future__ import annotations

import threading

import pytest

from outlast.clock import ManualClock
from outlast.errors import Busy, Fenced, Unavailable
from outlast.repo.repository import Repository
from outlast.repo.state import LEASE, PROVEN
from outlast.store.base import Buffer, ObjectStore
from outlast.store.lease import Lease, acquire
from outlast.store.local import LocalStore
from outlast.store.memory import MemoryStore

DAY_NS = 86_400 * 10**9


def take(store: ObjectStore, clock: ManualClock, owner: str = "me", seconds: float = 60.0) -> Lease:
    return acquire(store, "backup-models", owner, seconds, clock)


def test_while_one_has_it_nobody_else_gets_it() -> None:
    clock = ManualClock()
    store = MemoryStore(clock=clock)
    first = take(store, clock, "first on box 1")
    clock.sleep(59)
    with pytest.raises(Busy, match="first on box 1"):
        take(store, clock)
    first.renew()
    clock.sleep(59)
    with pytest.raises(Busy):
        take(store, clock)


def test_it_ends_after_so_long_without_a_sign_of_life_and_the_token_rises() -> None:
    clock = ManualClock()
    store = MemoryStore(clock=clock)
    first = take(store, clock)
    clock.sleep(61)
    second = take(store, clock)
    assert second.token > first.token
    assert second.was_left
    with pytest.raises(Fenced):
        first.renew()
    first.release()  # says nothing about the second's
    with pytest.raises(Busy):
        take(store, clock)


def test_who_gives_it_up_keeps_nobody_waiting() -> None:
    clock = ManualClock()
    store = MemoryStore(clock=clock)
    first = take(store, clock)
    with first.kept():
        pass
    second = take(store, clock)
    assert second.token > first.token
    assert not second.was_left


def test_an_owner_that_fails_gives_it_up_too() -> None:
    clock = ManualClock()
    store = MemoryStore(clock=clock)
    with pytest.raises(ZeroDivisionError), take(store, clock).kept():
        raise ZeroDivisionError
    assert not take(store, clock).was_left


def test_a_host_whose_clock_is_wrong_takes_nothing_early() -> None:
    """Ages are told by the store."""
    of_store = ManualClock()
    store = MemoryStore(clock=of_store)
    take(store, ManualClock(now_ns=of_store.now_ns()))
    ahead = ManualClock(seed=1, now_ns=of_store.now_ns() + 10**15)
    with pytest.raises(Busy):
        take(store, ahead)


def test_of_many_that_try_at_once_one_wins(tmp_path: object) -> None:
    store, clock = LocalStore(str(tmp_path)), ManualClock()
    won: list[Lease] = []
    gate = threading.Barrier(8)

    def attempt(number: int) -> None:
        gate.wait()
        try:
            won.append(take(store, ManualClock(seed=number), f"number {number}"))
        except Busy:
            pass

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    with pytest.raises(Busy):
        take(store, clock)


def test_what_is_no_lease_any_more_is_taken_over() -> None:
    clock = ManualClock()
    store = MemoryStore(clock=clock)
    first = take(store, clock)
    store.put(f"leases/backup-models/{first.token:020d}", [b"\0garbage"])
    assert take(store, clock).token > first.token


def test_a_store_that_is_away_gives_no_lease() -> None:
    class Away(MemoryStore):
        def put_if_absent(self, name: str, parts: list[Buffer]) -> None:  # type: ignore[override]
            raise Unavailable("it is away.")

    with pytest.raises(Unavailable):
        take(Away(), ManualClock())


def test_who_was_followed_commits_nothing_any_more() -> None:
    clock = ManualClock()
    store = MemoryStore(clock=clock)
    stale, fresh = Repository.create(store, clock=clock), Repository.open(store, clock=clock)
    stale.log.fence = ("backup-models", 3)
    stale.log.append(PROVEN, lambda _: {"snapshots": []})
    fresh.log.fence = ("backup-models", 4)
    fresh.log.append(LEASE, lambda _: {"lease": "backup-models"})
    with pytest.raises(Fenced):
        stale.log.append(PROVEN, lambda _: {"snapshots": []})
    stale.log.fence = ("copy-cold", 1)  # another lease is another matter
    stale.log.append(PROVEN, lambda _: {"snapshots": []})
    assert Repository.open(store, clock=clock).state.fences == {"backup-models": 4, "copy-cold": 1}


def test_a_clock_of_the_store_that_was_set_back_keeps_no_dead_owner_alive() -> None:
    later, now = ManualClock(now_ns=6 * DAY_NS), ManualClock(now_ns=DAY_NS)
    store = MemoryStore("set back", clock=later)
    take(store, later, "dead")
    found = take(MemoryStore("set back", clock=now), now)
    assert found.was_left, "who it was may be at work, and has to be fenced"
