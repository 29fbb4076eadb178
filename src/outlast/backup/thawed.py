"""Restore what lies in archived packs: start the thaw, fetch what has thawed, and go on when there is more."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from outlast.backup.restore import RestoreReport, execute, plan
from outlast.errors import Archived
from outlast.events import Event
from outlast.records import Snapshot
from outlast.repo.repository import Repository
from outlast.repo.thaw import Needed, look, start
from outlast.repo.thaw_plan import Prices, ThawPlan, Tier

_LOOKS = 60
"""in the time that a thaw takes"""
_WAIT_SECONDS_MIN, _WAIT_SECONDS_MAX = 30.0, 900.0


class Thawing(msgspec.Struct, frozen=True):
    """A restore that waits: the target is as it was, and what has thawed lies in the staging folder."""

    thaw: ThawPlan
    """what is still needed, as it was found before the thaw was asked for"""
    hours: float
    """after at most so many all of it can be read, as a rule"""


def restore_thawed(
    repository: Repository,
    snapshot: Snapshot,
    target: bytes,
    tier: Tier,
    *,
    include: Sequence[str] = (),
    overwrite: bool = False,
    wait: bool = False,
    prices: Prices | None = None,
) -> RestoreReport | Thawing:
    """Thaw what is archived, and restore as `restore.execute` does. Calling it again goes on.

    Until everything has thawed it gives `Thawing`, or, with `wait`, it looks again by the clock. Raises what
    `plan`, `execute` and `thaw.start` raise.
    """
    prices = prices or Prices()
    while True:
        needed = Needed(repository)
        planned = plan(repository, snapshot, target, include=include, overwrite=overwrite, need=needed.add)
        found = look(repository, needed, prices)
        start(repository, found, tier)
        try:
            return execute(repository, planned)
        except Archived:
            if not found.waiting:
                raise  # it is archived in a way that can't be seen
        hours = found.hours_left(tier, prices)
        if not wait:
            return Thawing(found, hours)
        what = f"{found.waiting} packs are thawing, for {hours:g} hours or less; what has thawed is restored."
        repository.sink.event(Event("restore.waiting", what, {"packs": found.waiting, "hours": hours}))
        waiting = found.waiting
        while waiting >= found.waiting:
            repository.clock.sleep(min(_WAIT_SECONDS_MAX, max(_WAIT_SECONDS_MIN, hours * 3600 / _LOOKS)))
            waiting = look(repository, needed, prices).waiting
