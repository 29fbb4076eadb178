"""A team's year, simulated: three sources, four tiers, two agents, and everything that goes wrong meanwhile.

Repositories, agents and folders are real; stores lie in memory, and time is a `ManualClock`. What agents know is what
the logs say; what the year should have been is worked out here a second time, from the faults that were drawn.
"""

from __future__ import annotations

import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from random import Random  # noqa: TID251  the year must be the same again

from outlast.clock import ManualClock
from outlast.errors import StoreFull, Unavailable
from outlast.events import Event, ListSink
from outlast.records import Chunking
from outlast.repo.repository import Repository
from outlast.store.base import Buffer, ObjectInfo, ObjectStore
from outlast.store.layers import Layer
from outlast.store.lease import Lease
from outlast.store.memory import MemoryStore
from outlast.tiers.jobs import Job, jobs
from outlast.tiers.places import Places
from outlast.tiers.policy import DAY_SECONDS, Policy, Tier

NS = 10**9
HOUR = 3600
LOOK_SECONDS = 4 * HOUR
"""an agent that has nothing to do looks again after so long"""


@contextmanager
def kept_by_nobody(lease: Lease) -> Iterator[None]:
    """In place of `Lease.kept`: the thread that renews a lease goes by real time, of which none passes here."""
    try:
        yield
    finally:
        lease.release()


class Killed(BaseException):
    """kill -9 of an agent."""


class Weather(Layer):
    """A tier's store, which may be down, full, slow, or lose the reply to a write."""

    def __init__(self, store: ObjectStore, year: Year) -> None:
        super().__init__(store)
        self.down = self.full = self.slow = False
        self._year = year

    def _pass(self, *, writes: bool = False) -> None:
        self._year.between_calls()
        if self.slow and threading.current_thread() is threading.main_thread():
            self._year.clock.sleep(1.0)
        if self.down:
            raise Unavailable("the tier is down.")
        if writes and self.full:
            raise StoreFull("the tier is full.")

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        self._pass(writes=True)
        self._store.put_if_absent(name, parts)
        if self._year.loses_reply():
            raise Unavailable("the reply was lost.")

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        self._pass(writes=True)
        self._store.put(name, parts)

    def get(self, name: str) -> bytes:
        self._pass()
        return self._store.get(name)

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        self._pass()
        return self._store.get_ranges(name, ranges)

    def stat(self, name: str) -> ObjectInfo:
        self._pass()
        return self._store.stat(name)

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        self._pass()
        return self._store.list(prefix, after)

    def delete(self, name: str) -> None:
        self._pass(writes=True)
        self._store.delete(name)


class Agent:
    """One process: what it knows dies with it."""

    def __init__(self, year: Year, name: str) -> None:
        self.name = name
        self.alive = True
        self.busy = False
        self.next_ns = year.clock.now_ns()
        self._year = year
        self._start()

    def _start(self) -> None:
        places = Places(self._year.policy, self._year.store, self._year.open, self._year.clock)
        self.jobs: list[Job] = jobs(self._year.policy, places, self._year.sink, one_thread=True)

    def step(self) -> None:
        self.busy = True
        began_ns = self._year.clock.now_ns()
        try:
            self.next_ns = began_ns + LOOK_SECONDS * NS
            for job in self.jobs:
                while (again_ns := job.step(self._year.clock.now_ns())) <= self._year.clock.now_ns():
                    pass
                self.next_ns = min(self.next_ns, again_ns)
        except Killed:
            self._year.counts["killed"] += 1
            self.next_ns = self._year.clock.now_ns() + self._year.dice.randrange(60, 6 * HOUR) * NS
            self._start()
            self.alive = False
        else:
            self.alive = True
        finally:
            self.busy = False


class Year:
    def __init__(self, policy: Policy, folder: str, seed: int) -> None:
        self.policy, self.folder = policy, folder
        self.dice = Random(seed)
        self.clock = ManualClock(seed)
        self.sink = ListSink()
        self.sink.event = self._count  # type: ignore[method-assign]
        self.counts: Counter[str] = Counter()
        self.recent: deque[str] = deque(maxlen=200)
        self.stores = {tier.name: Weather(MemoryStore(clock=self.clock), self) for tier in policy.tiers}
        self.calm = True
        self.open = partial(Repository.open, clock=self.clock)
        for store in self.stores.values():
            Repository.create(store, chunking=Chunking(), clock=self.clock)
        self._acting: list[Agent] = []
        self.agents = [Agent(self, "first"), Agent(self, "second")]
        self._ends: list[tuple[int, Callable[[], None]]] = []
        self.calm = False

    def store(self, tier: Tier) -> ObjectStore:
        return self.stores[tier.name]

    def _count(self, event: Event) -> None:
        self.counts[event.kind + ":" + str(event.fields.get("kind", ""))] += 1
        self.recent.append(f"{self.days():.3f} {event.reason}")

    def days(self) -> float:
        return self.clock.monotonic_seconds() / DAY_SECONDS

    # -- what goes wrong -----------------------------------------------------------------------------

    def between_calls(self) -> None:
        """Before each call of an agent: it may be killed, stand still, or the other one be quicker."""
        if self.calm or not self._acting or threading.current_thread() is not threading.main_thread():
            return
        chance = self.dice.random()
        if chance < 0.0002:
            raise Killed
        if chance < 0.0006:
            self._stand_still(self.dice.choice([1, 30, 200, 2000]))

    def _stand_still(self, seconds: int) -> None:
        self.counts["stood still"] += 1
        self.clock.sleep(seconds)
        other = next((each for each in self.agents if not each.busy), None)
        if other is not None and other.alive:
            self._act(other)

    def loses_reply(self) -> bool:
        lost = not self.calm and self.dice.random() < 0.0005
        self.counts["replies lost"] += lost
        return lost

    def _draw_faults(self) -> None:
        """Once a day."""
        for store in self.stores.values():
            for fault, chance, hours_max in (("down", 0.02, 100), ("full", 0.01, 16), ("slow", 0.01, 24)):
                if not getattr(store, fault) and self.dice.random() < chance:
                    self.counts[fault] += 1
                    setattr(store, fault, True)
                    end_ns = self.clock.now_ns() + self.dice.randrange(1, hours_max) * HOUR * NS
                    self._ends.append((end_ns, partial(setattr, store, fault, False)))

    def be_calm(self) -> None:
        """Everything works from here on, and nobody works on files."""
        self.calm = True
        for _, end in self._ends:
            end()
        self._ends.clear()

    # -- time ----------------------------------------------------------------------------------------

    def run(self, days: float, look: Callable[[], None]) -> None:
        """Let time pass; `look` is called every eight hours, when no agent is at work."""
        until_ns = self.clock.now_ns() + int(days * DAY_SECONDS) * NS
        next_look_ns = next_day_ns = self.clock.now_ns()
        while (now_ns := self.clock.now_ns()) < until_ns:
            for end in [each for each in self._ends if each[0] <= now_ns]:
                self._ends.remove(end)
                end[1]()
            if now_ns >= next_day_ns:
                next_day_ns += DAY_SECONDS * NS
                if not self.calm:
                    self._draw_faults()
                    self._work_on_files()
            for agent in self.agents:
                if agent.next_ns <= self.clock.now_ns():
                    self._act(agent)
            if now_ns >= next_look_ns:
                next_look_ns = now_ns + 2 * LOOK_SECONDS * NS
                look()
            wake_ns = min(
                next_look_ns, next_day_ns, *(agent.next_ns for agent in self.agents), *(at for at, _ in self._ends)
            )
            self.clock.sleep(max(1.0, (wake_ns - self.clock.now_ns()) / NS))

    def _act(self, agent: Agent) -> None:
        self._acting.append(agent)
        try:
            agent.step()
        finally:
            self._acting.pop()

    def _work_on_files(self) -> None:
        """The team at work: a file of each source changes on most days."""
        for source in self.policy.sources:
            for path in source.paths:
                os.makedirs(path, exist_ok=True)
                if self.dice.random() < 0.8 or not os.listdir(path):
                    with open(f"{path}/{self.dice.randrange(4)}.bin", "wb") as file:
                        file.write(self.dice.randbytes(self.dice.randrange(100, 600)))
