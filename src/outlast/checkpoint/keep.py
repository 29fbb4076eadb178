"""Which checkpoints of a run to keep. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from outlast.errors import InvalidInput


class Kept(msgspec.Struct, frozen=True):
    """What may be known of a checkpoint."""

    id: str
    step: int
    metrics: Mapping[str, float] = {}

    @property
    def is_sane(self) -> bool:
        return all(map(math.isfinite, self.metrics.values()))


class Policy(msgspec.Struct, frozen=True):
    """`last`: so many. `every_steps`: and all whose step is a multiple of it. `best`: "loss:min" or "accuracy:max"."""

    last: int = 3
    every_steps: int = 0
    best: str = ""

    @property
    def metric(self) -> tuple[str, bool]:
        """(name, whether less is better). Raises `InvalidInput`."""
        name, _, direction = self.best.partition(":")
        if not name or direction not in ("min", "max"):
            raise InvalidInput(f'best={self.best!r} says no metric and direction, such as "loss:min".')
        return name, direction == "min"


def checked(last: int, every_steps: int, best: str) -> Policy:
    """Raises `InvalidInput`."""
    if type(last) is not int or type(every_steps) is not int or last < 1 or every_steps < 0:
        raise InvalidInput(
            f"keep={last!r}, keep_every={every_steps!r}: at least the last one is kept, and steps are counted."
        )
    policy = Policy(last, every_steps, best)
    if best:
        policy.metric  # noqa: B018  raises
    return policy


def crashes(resumed: Sequence[int], died_at: int | None) -> int:
    """How often a run died at the same step, or nobody knows where, since it went on from a checkpoint.

    `resumed`: for each time it went on the step at which the life before had died, -1 where that isn't known;
    `died_at`: of the last life. Lives that were killed at different steps were not killed by the checkpoint.

    >>> crashes([-1, 106, 106], 106), crashes([-1, 104, 131], 117), crashes([-1, -1, -1], None)
    (3, 1, 3)
    """
    known = [step for step in (*resumed, *(() if died_at is None else (died_at,))) if step >= 0]
    return len(resumed) - len(known) + max(Counter(known).values(), default=0)


def best(found: Sequence[Kept], policy: Policy) -> Kept | None:
    """The best by its metric; of equals the newest. One that isn't a number is never it."""
    if not policy.best:
        return None
    name, is_less = policy.metric
    rated = [each for each in found if math.isfinite(each.metrics.get(name, math.nan))]
    return min(rated, key=lambda each: (each.metrics[name] * (1 if is_less else -1), -each.step), default=None)


def reasons(found: Sequence[Kept], policy: Policy) -> dict[str, str]:
    """id -> why it is kept; the others may go. `found` is in the order in which they were saved.

    The newest whose metrics are all numbers stays, however many came after it: a run that turned into NaN goes
    back to it.
    """
    kept: dict[str, str] = {}
    for each in found[-max(1, policy.last) :]:
        kept[each.id] = f"one of the last {policy.last}"
    if policy.every_steps:
        kept |= {each.id: f"every {policy.every_steps} steps" for each in found if each.step % policy.every_steps == 0}
    if (winner := best(found, policy)) is not None:
        kept[winner.id] = f"best {policy.best}"
    sane = [each for each in found if each.is_sane]
    if sane:
        kept.setdefault(sane[-1].id, "the newest whose metrics are numbers")
    return kept
