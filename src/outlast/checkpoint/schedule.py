"""When to save: every so many steps or seconds, or as often as it pays. Pure.

`auto` weighs what saving costs against what a failure costs. With C the time that one save takes from the
training (for a save in the background that is its stall and what it slows down, not how long it writes) and M the
mean time between failures, lost time is least at the interval sqrt(2 C M) (Young, CACM 17(9), 1974; Daly, FGCS
22(3), 2006, whose further terms matter only where C is not small beside M). Two bounds go with it: a save must be
durable before the next one begins, and while no failure has been seen, saving takes no more than a given share of
the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from outlast.errors import InvalidInput

PRIOR_FAILURE_SECONDS = 24 * 3600.0
"""the mean time between failures that is assumed of a run that was never seen to fail; weighs as one failure"""
FIRST_SECONDS = 60.0
"""The first save shows what a save costs, so it comes early."""
_UNIT_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
SIGNALS = (15, 2, 10)
"""SIGTERM, SIGINT, SIGUSR1: of several the first is followed"""


class Policy(msgspec.Struct, frozen=True):
    """One of the three. `max_overhead`: of `auto`, while no failure is known: a share of the time."""

    steps: int = 0
    seconds: float = 0.0
    max_overhead: float = 0.01


def policy(every: int | str) -> Policy:
    """Of `save_every`: steps, time as in "90s", "10m" and "2h", or "auto". Raises `InvalidInput`."""
    if every == "auto":
        return Policy()
    if type(every) is int and every > 0:
        return Policy(steps=every)
    if isinstance(every, str) and every[-1:] in _UNIT_SECONDS:
        try:
            seconds = float(every[:-1]) * _UNIT_SECONDS[every[-1]]
        except ValueError:
            seconds = 0.0
        if 0 < seconds < math.inf:
            return Policy(seconds=seconds)
    raise InvalidInput(f'save_every={every!r} is neither a number of steps, nor time as in "90s" or "2h", nor "auto".')


class Facts(msgspec.Struct, frozen=True):
    """Measured, of the saves so far; None before the first."""

    cost_seconds: float | None = None
    """what one save takes from the training"""
    write_seconds: float | None = None
    """from the call until it is durable"""
    failures: int = 0
    run_seconds: float = 0.0
    """how long this run has been trained, in all its lives"""


class Interval(msgspec.Struct, frozen=True):
    """How long after a save the next one is due, in steps or, where that is 0, in seconds."""

    steps: int
    seconds: float
    reason: str


def interval(facts: Facts, policy: Policy) -> Interval:
    """What the policy comes to, by what is known."""
    if policy.steps:
        return Interval(policy.steps, 0.0, f"every {policy.steps} steps")
    if policy.seconds:
        return Interval(0, policy.seconds, f"every {policy.seconds:g} s")
    cost, write = facts.cost_seconds, facts.write_seconds
    if cost is None or write is None:
        return Interval(0, FIRST_SECONDS, "the first save shows what saving costs")
    between = (PRIOR_FAILURE_SECONDS + facts.run_seconds) / (1 + facts.failures)
    best = math.sqrt(2 * cost * between)
    reason = f"a save costs {cost:.3g} s, and a failure is expected every {between / 3600:.3g} h"
    if not facts.failures and cost > best * policy.max_overhead:
        best = cost / policy.max_overhead
        reason = f"a save costs {cost:.3g} s, and may cost {policy.max_overhead:.1%} of the time"
    if write > best:
        return Interval(0, write, f"a save takes {write:.3g} s to become durable")
    return Interval(0, best, reason)


class Told(msgspec.Struct, frozen=True):
    """What one of several ranks says when they meet."""

    signal: int = 0
    """asked of it, or 0"""
    is_saving: bool = False
    is_due: bool = False
    """by its own clock and count"""
    steps_left: float = math.inf
    """until it is due, as far as it knows"""
    step_seconds: float = 0.0


class Decision(msgspec.Struct, frozen=True):
    """The same on all ranks, for it depends on what all were told and on nothing else."""

    signal: int
    may_collect: bool
    """The save under way is over on every rank."""
    is_due: bool
    meet_in_steps: int


MEET_SECONDS = 1.0
"""How long a signal waits at most, where steps are shorter."""


def decide(told: Sequence[Told]) -> Decision:
    """What all ranks do after this step, and in how many steps they meet again. Rank 0 says when a save is due."""
    first = told[0]
    asked = [each.signal for each in told if each.signal]
    meet = MEET_SECONDS / first.step_seconds if first.step_seconds else 1.0
    return Decision(
        signal=min(asked, key=SIGNALS.index, default=0),
        may_collect=not any(each.is_saving for each in told),
        is_due=first.is_due,
        meet_in_steps=int(max(1.0, min(meet, first.steps_left))),
    )
