"""The jobs of the agent: each does one kind of work, whenever it is due, unless another agent is at it.

Agents know nothing of each other and keep nothing. What is due follows from the logs; a lease for each job and tier
keeps two from doing the same at once; and whoever was followed can't commit.
"""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Callable

import blake3
import msgspec

from outlast.clock import Clock
from outlast.errors import Busy, OutlastError, Refused, StoreFull, Unavailable
from outlast.events import Event, EventSink
from outlast.repo.state import LEASE
from outlast.store.base import ObjectStore
from outlast.store.lease import Lease, acquire, store_time_seconds
from outlast.tiers.due import CLOCK_OFF_SECONDS, Held, Plan, Task, plan
from outlast.tiers.places import Places
from outlast.tiers.policy import Policy
from outlast.tiers.status import about
from outlast.tiers.work import Done, perform

LOOK_SECONDS = 30.0
"""how old what is known of the tiers may be"""
_RETRY_SECONDS = 60
_RETRY_SECONDS_MAX = 3600
_NS = 10**9

_Key = tuple[str, str, str]


class Board:
    """What is due, for all jobs of an agent: the tiers are looked at once for all. For any thread."""

    def __init__(self, places: Places, sink: EventSink) -> None:
        self.places = places
        self.problems: dict[str, str] = {}
        """tier -> why it could not be read when it was looked at last"""
        self._sink = sink
        self._lock = threading.Lock()
        self._made: tuple[int, Plan] | None = None
        self._full_until_ns: dict[str, int] = {}

    def note_full(self, tier: str, now_ns: int) -> None:
        """Nothing can be written to it; so for a while backups go to the next one."""
        with self._lock:
            self._full_until_ns[tier] = now_ns + _RETRY_SECONDS_MAX * _NS

    def plan(self, now_ns: int, *, fresh: bool = False) -> Plan:
        with self._lock:
            # A clock that was set back leaves what was made in the future.
            if fresh or self._made is None or not 0 <= now_ns - self._made[0] <= LOOK_SECONDS * _NS:
                self._made = now_ns, plan(self.places.policy, self._look(now_ns), now_ns)
            return self._made[1]

    def _look(self, now_ns: int) -> list[Held]:
        found = self.places.look()
        self._tell_problems({t.name: each.problem for t, each in zip(self.places.policy.tiers, found, strict=True)})
        held = zip(self.places.policy.tiers, found, strict=True)
        longest_ns = _RETRY_SECONDS_MAX * _NS
        full = {tier for tier, until_ns in self._full_until_ns.items() if 0 < until_ns - now_ns <= longest_ns}
        return [msgspec.structs.replace(each, full=True) if tier.name in full else each for tier, each in held]

    def _tell_problems(self, problems: dict[str, str]) -> None:
        """When it changes: nothing else would tell that there is nothing to do because nothing is known."""
        for tier, problem in problems.items():
            before = self.problems.get(tier, "")
            if problem and not before:
                self._sink.event(Event("tier.unreadable", f"{tier} can't be read: {problem}", {"tier": tier}))
            elif before and not problem:
                self._sink.event(Event("tier.back", f"{tier} can be read again.", {"tier": tier}))
        self.problems = problems


class Job:
    """`step(now)` does what is due of the job's tasks, and tells when to ask again."""

    def __init__(self, name: str, is_mine: Callable[[Task], bool], board: Board, places: Places, sink: EventSink):
        self.name = name
        self.worked = False
        self._is_mine, self._board, self._places, self._sink = is_mine, board, places, sink
        self._clock: Clock = places.clock
        self._failed: dict[_Key, tuple[int, int]] = {}
        """task -> how often it failed in a row, and when to try again"""

    def step(self, now_ns: int) -> int:
        """Carry out one task, if one is due: then it returns `now_ns`. Else when to call again, nanoseconds like it."""
        self.worked = False
        mine = [task for task in self._board.plan(now_ns).tasks if self._is_mine(task)]
        ready = [self._ready_ns(task, now_ns) for task in mine]
        due = next((task for task, at_ns in zip(mine, ready, strict=True) if at_ns <= now_ns), None)
        if due is None:
            return max(now_ns + _NS, min(ready, default=now_ns + 86_400 * _NS))
        self._do(due, now_ns)
        return now_ns

    def _ready_ns(self, task: Task, now_ns: int) -> int:
        again_ns = self._failed.get(_key(task), (0, 0))[1]
        longest_ns = max(_RETRY_SECONDS_MAX, self._places.policy.lease_seconds) * _NS
        return max(task.due_ns, again_ns) if again_ns - now_ns <= longest_ns else task.due_ns  # else it was set back

    def _do(self, task: Task, now_ns: int) -> None:
        key = _key(task)
        try:
            done = self._under_lease(task)
        except Busy as exc:
            self._failed[key] = 0, now_ns + self._places.policy.lease_seconds * _NS // 2
            self._tell("job.left", task, f"is left to others: {exc.message}")
        except Exception as exc:  # noqa: BLE001  one that nobody foresaw must not keep the job from its other tasks
            if isinstance(exc, StoreFull) or (task.kind == "backup" and isinstance(exc, Unavailable)):
                self._board.note_full(task.tier, now_ns)
            count = self._failed.get(key, (0, 0))[0] + 1
            wait = min(_RETRY_SECONDS_MAX, _RETRY_SECONDS * 2 ** (count - 1))
            now_ns = max(now_ns, self._clock.now_ns())  # it may have failed after hours
            self._failed[key] = count, now_ns + wait * _NS
            for tier in filter(None, (task.tier, task.origin)):
                self._places.forget(tier)
            what = f"{type(exc).__name__}: {exc}"
            if isinstance(exc, OutlastError):
                what = f"{exc.message} {exc.hint}".rstrip()
            self._tell("job.failed", task, f"failed, and is tried again in {wait} s: {what}")
        else:
            self._failed[key] = 0, self._clock.now_ns() + _NS  # whatever it came to, it isn't done without a pause
            if done is not None:
                self.worked = True
                self._tell("job.done", task, done.text, problems=list(done.problems))
        self._board.plan(self._clock.now_ns(), fresh=True)

    def _under_lease(self, task: Task) -> Done | None:
        """None where somebody else has done it by now."""
        repository = self._places.repository(task.tier)
        seconds, owner = self._places.policy.lease_seconds, f"{socket.gethostname()}, process {os.getpid()}"
        name = lease_name(self.name)
        repository.refresh()
        used = repository.state.fences.get(name, 0)
        try:
            lease = acquire(repository.store, name, owner, seconds, self._clock, used)
        except Busy:
            raise
        except Exception:
            self._board.note_full(task.tier, self._clock.now_ns())  # read-only, broken, or full: it can't be written
            raise
        with lease.kept():
            if lease.was_left:
                self._fence_off(lease, task.tier)
            fresh = self._board.plan(self._clock.now_ns(), fresh=True)
            current = next((each for each in fresh.due(self._clock.now_ns()) if _key(each) == _key(task)), None)
            if current is None:
                return None
            if current.kind == "drop":
                self._check_clock(repository.store)
            self._tell("job.began", current, f"began: {current.reason}")
            return perform(current, self._places, (lease.name, lease.token))

    def _check_clock(self, store: ObjectStore) -> None:
        """A clock that is ahead would make everything old enough to go: a server's is asked as well."""
        theirs_seconds = store_time_seconds(store, self._clock.random_bytes(8).hex())
        off_seconds = self._clock.now_ns() / _NS - theirs_seconds
        if abs(off_seconds) > CLOCK_OFF_SECONDS:
            direction = "ahead of" if off_seconds > 0 else "behind"
            raise Refused(
                f"the clock here is {about(abs(off_seconds))} {direction} that of {store.url}; nothing was dropped."
            )

    def _fence_off(self, lease: Lease, tier: str) -> None:
        """Who had the lease may only be slow: from this entry on nothing of theirs is committed."""
        log = self._places.repository(tier).log
        log.fence = lease.name, lease.token
        try:
            log.append(LEASE, lambda _: {"lease": lease.name})
        finally:
            log.fence = None

    def _tell(self, kind: str, task: Task, what: str, **fields: object) -> None:
        told = {**msgspec.to_builtins(task), **fields}
        whom = f" of {task.name}" if task.name else ""
        self._sink.event(Event(kind, f"{task.kind}{whom} in {task.tier}: {what}", told))


def jobs(policy: Policy, places: Places, sink: EventSink, *, one_thread: bool = False) -> list[Job]:
    """Every job of the policy; those that come first matter most. `one_thread`: they will be called one by one."""
    board = Board(places, sink)

    def job(name: str, is_mine: Callable[[Task], bool]) -> Job:
        return Job(name, is_mine, board, places if one_thread else places.another(), sink)

    made = [job(f"backup-{source.name}", _of("backup", source.name)) for source in policy.sources]
    for tier in policy.tiers:
        made.append(job(f"copy-{tier.name}", _in(tier.name, "mend", "copy")))
    for tier in policy.tiers:
        made.append(job(f"upkeep-{tier.name}", _in(tier.name, "prove", "drop")))
    return [*made, job("drill", lambda task: task.kind == "drill")]


def _of(kind: str, name: str) -> Callable[[Task], bool]:
    return lambda task: task.kind == kind and task.name == name


def _in(tier: str, *kinds: str) -> Callable[[Task], bool]:
    return lambda task: task.kind in kinds and task.tier == tier


def _key(task: Task) -> _Key:
    # Full backups are proven for another reason than copies are: the one must not wait for the other.
    return task.kind, task.tier, task.name or task.origin or ("full" if task.full else "")


def lease_name(job: str) -> str:
    """A job's name as that of an object: what can't stand there is told by a hash.

    >>> lease_name("backup-models")
    'backup-models'
    """
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,79}", job):
        return job
    return f"{re.sub('[^A-Za-z0-9_-]', '_', job)[:60]}.{blake3.blake3(job.encode()).hexdigest()[:16]}"
