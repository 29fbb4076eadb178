"""Forget snapshots: plan which, then commit that they exist no more. What they held is left to prune."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import msgspec

from outlast.errors import InvalidInput, Refused
from outlast.records import Snapshot
from outlast.repo import retention
from outlast.repo.repository import Repository
from outlast.repo.retention import Decision, Policy
from outlast.repo.state import FORGET, State

_NAMES_SHOWN = 5


class ForgetPlan(msgspec.Struct, frozen=True):
    """What would be forgotten, as of the state that it was made from. Making it changes nothing."""

    decisions: tuple[Decision, ...]
    """of a policy, one for every snapshot that it judged; else one for every snapshot that was named"""
    refusal: str = ""
    """why `execute` would refuse without `allow_empty`; "" when it wouldn't"""

    def forgotten(self) -> list[Snapshot]:
        return [decision.snapshot for decision in self.decisions if not decision.keep]


class ForgetReport(msgspec.Struct, frozen=True):
    """What `execute` did."""

    forgotten: tuple[str, ...]
    """ids"""
    already_gone: tuple[str, ...] = ()
    """ids that somebody else had forgotten since the plan was made"""
    entry: int = 0
    """the number of the log entry; 0 where none was needed"""


def plan(
    repository: Repository, *, name: str | None = None, policy: Policy | None = None, ids: Sequence[str] = ()
) -> ForgetPlan:
    """Say which snapshots to forget: those in `ids`, or what `policy` doesn't keep.

    `ids` are the beginnings of ids, or `latest`. With `name` only snapshots of that name are looked
    at. Raises `NotFound` or, when `ids` and `policy` are both given or both missing, `InvalidInput`.
    """
    if ids and policy:
        raise InvalidInput(
            "both snapshots and rules that keep some were given; nothing was forgotten.",
            hint="Name the snapshots to forget, or say what to keep, one of the two.",
        )
    if ids:
        named = {found.id: found for found in (repository.find_snapshot(each, name) for each in ids)}
        decisions = [Decision(snapshot, False, ("it was named",)) for snapshot in named.values()]
    elif policy:
        if name is not None:
            repository.find_snapshot("latest", name)  # raises where there is none of that name
        chosen = [snapshot for snapshot in repository.snapshots() if name is None or snapshot.name == name]
        decisions = retention.decide(chosen, policy, repository.clock.now_ns())
    else:
        raise InvalidInput(
            "nothing says which snapshots to forget; nothing was forgotten.",
            hint="Name them by their ids, or say what to keep, for example --keep-daily 7.",
        )
    gone = {decision.snapshot.id for decision in decisions if not decision.keep}
    return ForgetPlan(tuple(decisions), _refusal(repository.state, gone))


def execute(repository: Repository, plan: ForgetPlan, *, allow_empty: bool = False) -> ForgetReport:
    """Commit the plan: all of it or nothing. What others have forgotten meanwhile is left out.

    Raises `Refused` when no snapshot of some name would be left, unless `allow_empty`: judged by the
    state that the commit applies to, so two that run at once can't do together what neither may alone.
    """
    planned = [snapshot.id for snapshot in plan.forgotten()]

    def body(state: State) -> dict[str, Any] | None:
        present = [each for each in planned if each in state.snapshots]
        if not present:
            return None
        refusal = _refusal(state, set(present))
        if refusal and not allow_empty:
            raise Refused(
                f"{refusal} Nothing was forgotten.",
                hint="--allow-empty allows it; --dry-run shows every decision with its reason.",
            )
        return {"snapshots": present}

    entry = repository.log.append(FORGET, body)
    if entry is None:
        return ForgetReport((), tuple(planned))
    repository.log.save_state()
    forgotten = tuple(entry.body["snapshots"])
    return ForgetReport(forgotten, tuple(each for each in planned if each not in set(forgotten)), entry.seq)


def _refusal(state: State, gone: Collection[str]) -> str:
    """A sentence when names would lose their last snapshot; else ""."""
    left = {snapshot.name for snapshot in state.snapshots.values() if snapshot.id not in gone}
    emptied = sorted({state.snapshots[each].name for each in gone} - left)
    if not emptied:
        return ""
    more = f" and {len(emptied) - _NAMES_SHOWN:,} more names" if len(emptied) > _NAMES_SHOWN else ""
    return f"this would forget the last snapshot of {', '.join(emptied[:_NAMES_SHOWN])}{more}."
