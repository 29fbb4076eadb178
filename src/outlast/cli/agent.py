"""The commands that go by outlast.yaml: agent, plan, status."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from outlast.cli.command import FAILED, PARTLY_DONE, Call, Command
from outlast.cli.text import count_text, printable, size_text, table, time_text
from outlast.clock import SYSTEM_CLOCK
from outlast.errors import NotFound, OutlastError

if TYPE_CHECKING:
    from outlast.config import Config
    from outlast.events import Event, Progress
    from outlast.repo.repository import Repository
    from outlast.store.base import ObjectStore
    from outlast.tiers.due import Plan, Task
    from outlast.tiers.places import Places
    from outlast.tiers.policy import Policy
    from outlast.tiers.status import Named, Standing, Status

_STOP_SECONDS = 20.0
_LISTED_MAX = 1000
CONFIG = click.option(
    "--config", "config", metavar="FILE", help="The configuration (or OUTLAST_CONFIG; ./outlast.yaml)."
)


def load(call: Call, given: str | None) -> Config:
    """The configuration, its warnings told. Raises `InvalidInput`, `NotFound`."""
    from outlast import config

    found = config.load(config.find(given))
    for warning in found.warnings:
        call.printer.warn(warning.text(found.path))
    return found


def is_by_config(call: Call, config: str | None) -> bool:
    """Whether a command is to go by outlast.yaml: it is named, or is there and no repository is named."""
    from outlast.config import FILE, VARIABLE

    if config is not None:
        return True
    named = call.options.repo or os.environ.get("OUTLAST_REPO")
    return not named and (bool(os.environ.get(VARIABLE)) or os.path.exists(FILE))


def tier_of(call: Call, policy: Policy, tier: str | None, reference: str, name: str | None) -> Repository:
    """The repository of a tier; without its name that of the nearest that holds the snapshot. Raises `NotFound`.

    The latest is that of all tiers: the nearest may have been out of reach, or full, when it was made.
    """
    from outlast.repo.naming import Together

    every = places(call, policy)
    if tier is not None:
        names = [each.name for each in policy.tiers]
        if tier not in names:
            raise NotFound(f"there is no tier {tier}; there are: {', '.join(names)}.")
        return every.repository(tier)
    found, failures = [], []
    for each in policy.tiers:
        try:
            found.append(every.repository(each.name))
        except OutlastError as exc:
            failures.append(exc)
    if not found:
        raise failures[0]
    wanted = call.snapshot(Together(found), reference, name).id
    return next(each for each in found if wanted in each.state.snapshots)


def tiers(call: Call, policy: Policy) -> dict[str, Repository]:
    """Those that can be opened, nearest first; the others are told. Raises what the first said where there is none."""
    every = places(call, policy)
    found, failures = {}, []
    for tier in policy.tiers:
        try:
            found[tier.name] = every.repository(tier.name)
        except OutlastError as exc:
            failures.append(exc)
            call.warnings.append(f"{tier.name} is left out: {exc.message}")
            call.printer.warn(call.warnings[-1])
    if not found:
        raise failures[0]
    return found


def places(call: Call, policy: Policy) -> Places:
    """The tiers, to be opened with the passphrase that is known, whatever each of them is."""
    from outlast.repo.repository import Repository
    from outlast.store.layers import open_store
    from outlast.tiers.places import Places

    secret = call.secret()

    def opened(store: ObjectStore) -> Repository:
        return Repository.open(store, secret=secret, sink=call.printer)

    return Places(
        policy, lambda tier: open_store(tier.url, SYSTEM_CLOCK, pack_class=tier.storage_class), opened, SYSTEM_CLOCK
    )


@click.command(cls=Command, codes=(3, 10, 12), when_stopped="What was committed is whole; the rest is done next time.")
@CONFIG
@click.option("--once", is_flag=True, help="Do what is due now, and end: for cron and Kubernetes.")
def agent(call: Call, config: str | None, once: bool) -> int:
    """Back up, copy, prove, drop and rehearse whenever it is due.

    It keeps nothing: what is due follows from the logs of the tiers. It may be killed at any time, moved to another
    machine, or run several times at once; a lease in each tier keeps two from doing the same work. What it does, and
    why, is told line by line; `outlast plan` tells it beforehand. outlast.yaml is read once, at the start. With
    --once exit code 3 says that something failed, or that a tier can't be read.
    """
    from outlast.agent import once as do_once
    from outlast.tiers.jobs import jobs

    policy = load(call, config).policy
    teller, every = _Teller(call), places(call, policy)
    if all(held.problem for held in every.look()):
        every.repository(policy.tiers[0].name)  # raises what is wrong: there is nothing to work on
    made = jobs(policy, every, teller, one_thread=once)
    if not once:
        return _serve(call, made, teller)
    do_once(made, SYSTEM_CLOCK)
    call.printer.result(teller.document(), _once_lines(teller))
    return PARTLY_DONE if teller.failed or teller.problems or teller.unreadable else 0


def _once_lines(teller: _Teller) -> Iterator[str]:
    told = [count_text(len(teller.done), "task") + " done"]
    told += [f"{len(teller.failed):,} failed"] if teller.failed else []
    told += [count_text(len(teller.problems), "problem")] if teller.problems else []
    told += [count_text(len(teller.unreadable), "tier") + " can't be read"] if teller.unreadable else []
    yield f"{', '.join(told)}." if teller.done or teller.failed or teller.unreadable else "Nothing was due."


def _serve(call: Call, made: list[Any], teller: _Teller) -> int:
    from outlast.agent import Agent

    # A signal that reaches another thread doesn't wake the first from waiting for a lock; a byte in a pipe does.
    told, tells = os.pipe()
    os.set_blocking(tells, False)
    signal.set_wakeup_fd(tells, warn_on_full_buffer=False)
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, _only_wake)
    running = Agent(made, SYSTEM_CLOCK, teller)
    running.start()
    teller.say(f"{count_text(len(made), 'job')} started.")
    os.read(told, 1)
    teller.say("stopping: what is under way gets some seconds to end.")
    is_over = running.stop(_STOP_SECONDS)
    call.printer.result(teller.document(), ())
    if is_over:
        return 0
    # A long copy is still under way in its threads, which nothing can end. Whatever instant it is killed at, what was
    # committed is whole; so it is.
    call.printer.close()
    os._exit(0)


def _only_wake(number: int, frame: FrameType | None) -> None:
    return


class _Teller:
    """The event sink of jobs: each thing that is done is a line, and the last ones are kept for the result."""

    wants_progress = False

    def __init__(self, call: Call) -> None:
        self.done: deque[dict[str, Any]] = deque(maxlen=_LISTED_MAX)
        self.failed: deque[dict[str, Any]] = deque(maxlen=_LISTED_MAX)
        self.problems: deque[str] = deque(maxlen=_LISTED_MAX)
        self.unreadable: dict[str, str] = {}
        """tier -> why it can't be read"""
        self._call = call
        self._quiet = call.options.json or call.options.json_lines or call.options.quiet
        self._lock = threading.Lock()

    def document(self) -> dict[str, Any]:
        with self._lock:
            told = {"done": list(self.done), "failed": list(self.failed), "problems": list(self.problems)}
            return {**told, "unreadable": dict(self.unreadable)}

    def event(self, event: Event) -> None:
        problems = event.fields.get("problems", [])
        is_failure = event.kind in ("job.failed", "job.bug")
        with self._lock:
            self.problems += problems
            if event.kind == "job.done":
                self.done.append({"reason": event.reason, **event.fields})
            elif is_failure:
                self.failed.append({"reason": event.reason, **event.fields})
            elif event.kind == "tier.unreadable":
                self.unreadable[event.fields["tier"]] = event.reason
            elif event.kind == "tier.back":
                self.unreadable.pop(event.fields["tier"], None)
        is_failure = is_failure or event.kind == "tier.unreadable"
        for problem in [*problems, *([event.reason] if is_failure else [])]:
            self._call.printer.warn(problem)  # as an event only the first hundred would be told
        if not is_failure or self._call.options.json_lines:
            self._call.printer.event(event)
        if event.kind in ("job.began", "job.done", "job.left", "tier.back"):
            self.say(event.reason)

    def say(self, text: str) -> None:
        if not self._quiet:
            from outlast.records import time_text as stamp

            when = time_text(stamp(SYSTEM_CLOCK.now_ns()))
            with suppress(OSError):  # nobody reads it, or its disk is full: the work goes on
                click.echo(f"{when}  {printable(text)}")

    def progress(self, progress: Progress) -> None:
        return


@click.command(cls=Command, codes=(3,))
@CONFIG
@click.option("--all", "everything", is_flag=True, help="Also what is not due yet.")
def plan(call: Call, config: str | None, everything: bool) -> int:
    """Show what an agent would do now, and why; with --all also what it will do later, and when. Changes nothing."""
    import msgspec

    from outlast.records import time_text as stamp
    from outlast.tiers.due import plan as make_plan

    policy = load(call, config).policy
    now_ns = SYSTEM_CLOCK.now_ns()
    made = make_plan(policy, places(call, policy).look(), now_ns)
    tasks = sorted(made.tasks if everything else made.due(now_ns), key=lambda task: task.due_ns)
    document = {
        "tasks": [
            {**msgspec.to_builtins(task), "due": stamp(task.due_ns), "is_due": task.due_ns <= now_ns} for task in tasks
        ],
        "lags": msgspec.to_builtins(made.lags),
    }
    call.printer.result(document, _plan_lines(made, tasks, now_ns), always=True)
    return PARTLY_DONE if any(lag.problem for lag in made.lags) else 0


def _plan_lines(made: Plan, tasks: list[Task], now_ns: int) -> Iterator[str]:
    from outlast.tiers.status import about

    for lag in made.lags:
        if lag.problem:
            yield f"{lag.tier} can't be read: {printable(lag.problem)}"
    if tasks:
        rows = (
            (
                "now" if task.due_ns <= now_ns else f"in {about((task.due_ns - now_ns) / 1e9)}",
                f"{'full ' if task.full and task.kind == 'backup' else ''}{task.kind}",
                printable(task.name) or count_text(len(task.snapshots), "snapshot"),
                f"{task.origin} -> {task.tier}" if task.origin else task.tier,
                size_text(task.bytes) if task.bytes else "",
                task.reason,
            )
            for task in tasks
        )
        yield from table(("DUE", "TASK", "WHAT", "WHERE", "SIZE", "WHY"), rows, right="SIZE")
    else:
        later = min((task.due_ns for task in made.tasks if task.due_ns > now_ns), default=None)
        when = f" The next task is due in {about((later - now_ns) / 1e9)}; --all shows it." if later else ""
        yield f"Nothing is due.{when}"


@click.command(cls=Command, codes=())
@CONFIG
def status(call: Call, config: str | None) -> int:
    """Show for each source and run the last backup and the last drill, and how far each tier is behind.

    RPO and RTO are what outlast.yaml tolerates, TOOK is what the last drill took, PROVEN when the newest snapshots were
    last read whole. Exit code 1 says that an objective is missed: each is named below the tables.
    """
    import msgspec

    from outlast.tiers.status import status as judge

    policy = load(call, config).policy
    found = judge(policy, places(call, policy).look(), SYSTEM_CLOCK.now_ns())
    call.printer.result(msgspec.to_builtins(found), _status_lines(found), always=True)
    return FAILED if found.missed else 0


def _status_lines(found: Status) -> Iterator[str]:
    yield from table(
        ("NAME", "KIND", "SNAPSHOTS", "LAST BACKUP", "RPO", "LAST DRILL", "LEVEL", "FROM", "TOOK", "RTO"),
        (_name_row(each) for each in found.names),
        right="SNAPSHOTS",
    )
    yield ""
    yield from table(
        ("TIER", "SNAPSHOTS", "BEHIND", "", "", "PROVEN", "DAMAGED"),
        map(_tier_row, found.tiers),
        right="SNAPSHOTS DAMAGED",
    )
    yield ""
    yield from (f"MISSED: {printable(each)}" for each in found.missed)
    if not found.missed:
        yield "Every objective is met."


def _ago(seconds: float | None) -> str:
    from outlast.tiers.status import about

    return "never" if seconds is None else f"{about(seconds)} ago"


def _name_row(each: Named) -> tuple[str, ...]:
    from outlast.tiers.due import span
    from outlast.tiers.status import about

    proof = each.proof
    return (
        printable(each.name),
        each.kind,
        f"{each.snapshots:,}",
        _ago(each.last_seconds),
        span(each.rpo_seconds) if each.rpo_seconds is not None else "",
        _ago(each.proof_seconds),
        "" if proof is None else f"L{proof.level}" if proof.level >= 0 else "failed",
        each.proof_tier,
        about(proof.rto_seconds) if proof else "",
        span(each.rto_seconds) if each.rto_seconds is not None else "",
    )


def _tier_row(each: Standing) -> tuple[str, ...]:
    from outlast.tiers.status import about

    lag = each.lag
    behind = ("can't be read", "", "") if lag.problem else ("nothing", "", "")
    if lag.snapshots:
        behind = (count_text(lag.snapshots, "snapshot"), size_text(lag.bytes), about(lag.seconds))
    proven = "not all" if each.proven_seconds is None else f"{about(each.proven_seconds)} ago"
    return (each.name, f"{each.snapshots:,}", *behind, proven if each.snapshots else "", f"{each.damaged:,}")
