"""The one long-running loop: calls `step(now)` of each job when it asks for it. It knows no rule of any of them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from outlast.clock import Clock
from outlast.events import Event, EventSink

LOOK_SECONDS = 30.0
"""A job that has nothing to do is asked again after so long: others may have made work for it."""


class Job(Protocol):
    """A piece of work that comes again and again."""

    name: str
    worked: bool
    """whether the last step did anything: then the others are asked at once, for it may be work for them"""

    def step(self, now_ns: int) -> int:
        """Do something that is due, and tell of failures; return when to be called again, `now_ns` for at once."""
        ...


def once(jobs: Sequence[Job], clock: Clock) -> None:
    """Call each job, in order, until nothing of it is due: for cron, and for whoever looks on."""
    for job in jobs:
        now_ns = clock.now_ns()
        while job.step(now_ns) <= now_ns:
            now_ns = clock.now_ns()


class Agent:
    """Every job in a thread of its own, so that a long copy keeps no backup waiting."""

    def __init__(self, jobs: Sequence[Job], clock: Clock, sink: EventSink) -> None:
        self._clock, self._sink = clock, sink
        self._over = False
        self._change = threading.Condition()
        self._changes = 0
        self._threads = [
            threading.Thread(target=self._repeat, args=(job,), name=f"job {job.name}", daemon=True) for job in jobs
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, within_seconds: float) -> bool:
        """Begin nothing more, and wait for what is under way. Whether all of it has ended."""
        with self._change:
            self._over = True
            self._change.notify_all()
        until = self._clock.monotonic_seconds() + within_seconds
        for thread in self._threads:
            thread.join(max(0.0, until - self._clock.monotonic_seconds()))
        return not any(thread.is_alive() for thread in self._threads)

    def _repeat(self, job: Job) -> None:
        while not self._over:
            now_ns, seen = self._clock.now_ns(), self._changes
            wait_seconds = LOOK_SECONDS
            try:
                wait_seconds = min(LOOK_SECONDS, (job.step(now_ns) - self._clock.now_ns()) / 1e9)
            except Exception as exc:  # noqa: BLE001  a job that fails in a way nobody foresaw must not end the others
                what = f"the job {job.name} failed, and goes on in {LOOK_SECONDS:.0f} s: {type(exc).__name__}: {exc}"
                with suppress(Exception):  # who listens may be what failed
                    self._sink.event(Event("job.bug", what, {"job": job.name}))
            with self._change:
                if job.worked:
                    self._changes += 1
                    seen = self._changes
                    self._change.notify_all()
                if not self._over and self._changes == seen:
                    self._change.wait(max(0.1, wait_seconds))
