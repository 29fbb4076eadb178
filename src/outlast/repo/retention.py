"""Which snapshots to keep, and why: a plain function of the snapshots, a policy and the time. Pure.

Snapshots of one name are judged together, backups and checkpoints alike. A snapshot is kept as soon
as one rule keeps it; every rule that does is told as a reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice

import msgspec

from outlast.errors import InvalidInput
from outlast.records import Snapshot

DAY_SECONDS = 86_400
FUTURE_SECONDS_MAX = DAY_SECONDS
"""A snapshot may be ahead of the clock by so much: clocks differ, but not by days."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_PERIODS = (("hourly", "%Y-%m-%d %H:00"), ("daily", "%Y-%m-%d"), ("weekly", "%G-W%V"), ("monthly", "%Y-%m"))
_UNIT_SECONDS = {"y": 366 * DAY_SECONDS, "m": 31 * DAY_SECONDS, "w": 7 * DAY_SECONDS, "d": DAY_SECONDS, "h": 3600}
_DURATION = re.compile(r"(?:[0-9]{1,6}[ymwdh])+")


class Policy(msgspec.Struct, frozen=True):
    """The rules; 0 or nothing means that there is no such rule. One that keeps nothing is no policy.

    `last`: the newest so many, in the order of commit. `hourly`, `daily`, `weekly`, `monthly`: the
    newest of each of the last so many hours, days, ISO weeks or months, in UTC, that have one.
    `within_seconds`: all that are not older than that, counted from the newest of the same name.
    `tags`: all that have one of these, each KEY or KEY=VALUE.

    Raises `InvalidInput`.

    >>> Policy(last=3, tags=("prod",)).last
    3
    """

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    within_seconds: int = 0
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        counts = (self.last, self.hourly, self.daily, self.weekly, self.monthly, self.within_seconds)
        if min(counts) < 0:
            raise InvalidInput("a rule can't keep fewer than 0 snapshots; nothing was touched.")
        for tag in self.tags:
            key, separator, value = tag.partition("=")
            is_text = not any("\ud800" <= character <= "\udfff" for character in tag)
            if not key.strip() or (separator and not value.strip()) or not is_text:
                raise InvalidInput(
                    f"the tag to keep by, {tag!r}, is not KEY or KEY=VALUE in UTF-8; nothing was touched.",
                    hint="KEY keeps every snapshot that has this tag, whatever its value.",
                )
        if not any(counts) and not self.tags:
            raise InvalidInput(
                "there is no rule that keeps anything, so this would forget every snapshot; nothing was touched.",
                hint="Say what to keep, for example --keep-daily 7.",
            )


class Decision(msgspec.Struct, frozen=True):
    """Whether a snapshot stays, and why."""

    snapshot: Snapshot
    keep: bool
    reasons: tuple[str, ...]


def decide(snapshots: Sequence[Snapshot], policy: Policy, now_ns: int) -> list[Decision]:
    """One decision for each snapshot, in the given order, which has to be the order of commit.

    `now_ns` is in nanoseconds since the Unix epoch. A snapshot of more than a day later was made by a
    clock that was wrong, or is a forgery: it is kept, and takes no other's place. So is one whose
    time can't be read.

    >>> from outlast.records import time_ns
    >>> times = ("2026-11-20T23:00:00Z", "2026-11-21T08:00:00Z", "2026-11-21T20:00:00Z", "2031-01-01T00:00:00Z")
    >>> runs = [Snapshot(str(number), "backup", "run", time) for number, time in enumerate(times)]
    >>> for decision in decide(runs, Policy(daily=2), time_ns("2026-11-22T00:00:00Z")):
    ...     print("keep  " if decision.keep else "forget", *decision.reasons)
    keep   daily 2026-11-20
    forget no rule keeps it
    keep   daily 2026-11-21
    keep   its time lies in the future: kept, and not counted
    """
    groups: dict[str, list[Snapshot]] = {}
    for snapshot in snapshots:
        groups.setdefault(snapshot.name, []).append(snapshot)
    reasons: dict[str, list[str]] = {snapshot.id: [] for snapshot in snapshots}
    for group in groups.values():
        for snapshot, reason in _keeping(group, policy, now_ns):
            reasons[snapshot.id].append(reason)
    return [
        Decision(snapshot, bool(reasons[snapshot.id]), tuple(reasons[snapshot.id]) or ("no rule keeps it",))
        for snapshot in snapshots
    ]


def _keeping(group: Sequence[Snapshot], policy: Policy, now_ns: int) -> Iterator[tuple[Snapshot, str]]:
    """Each snapshot of one name that a rule keeps, with that rule."""
    dated: list[tuple[datetime, Snapshot]] = []
    for snapshot in group:
        moment = _moment(snapshot.time)
        if moment is None:
            yield snapshot, "its time can't be read: kept, and not counted"
        elif _ns(moment) > now_ns + FUTURE_SECONDS_MAX * 10**9:
            yield snapshot, "its time lies in the future: kept, and not counted"
        else:
            dated.append((moment, snapshot))
    for rank, (_, snapshot) in enumerate(islice(reversed(dated), policy.last), 1):
        yield snapshot, f"last {rank} of {policy.last}"
    # Of two with the same time, the one committed later counts as the newer.
    newest_first = sorted(dated, key=lambda item: item[0])[::-1]
    for rule, form in _PERIODS:
        yield from _newest_of_each(newest_first, rule, form, getattr(policy, rule))
    if policy.within_seconds and newest_first:
        since_ns = _ns(newest_first[0][0]) - policy.within_seconds * 10**9
        within = f"within {_span_text(policy.within_seconds)}"
        yield from ((snapshot, within) for moment, snapshot in newest_first if _ns(moment) >= since_ns)
    for tag in policy.tags:
        yield from ((snapshot, f"tag {tag}") for snapshot in group if has_tag(snapshot, tag))


def _newest_of_each(
    newest_first: Iterable[tuple[datetime, Snapshot]], rule: str, form: str, count: int
) -> Iterator[tuple[Snapshot, str]]:
    seen: set[str] = set()
    for moment, snapshot in newest_first:
        if len(seen) == count:
            return
        period = format(moment, form)
        if period not in seen:
            seen.add(period)
            yield snapshot, f"{rule} {period}"


def has_tag(snapshot: Snapshot, tag: str) -> bool:
    """Whether the snapshot has this tag, given as KEY or KEY=VALUE."""
    key, separator, value = tag.partition("=")
    return key in snapshot.tags and (not separator or snapshot.tags[key] == value)


def duration_seconds(text: str) -> int:
    """Seconds of a duration: whole numbers, each with y, m (months), w, d or h. Raises `InvalidInput`.

    So that it never means less than somebody had in mind, a month has 31 days here and a year 366.

    >>> duration_seconds("30d") == 30 * DAY_SECONDS, duration_seconds("1y5m7d2h")
    (True, 45626400)
    """
    seconds = 0
    if _DURATION.fullmatch(text):
        seconds = sum(int(count) * _UNIT_SECONDS[unit] for count, unit in re.findall(r"([0-9]+)([a-z])", text))
    if not seconds:
        raise InvalidInput(
            f"the duration {text!r} can't be understood; nothing was touched.",
            hint="Write numbers with y, m (months), w, d or h, for example 30d, 12h, 2w or 1y5m7d2h.",
        )
    return seconds


def _span_text(seconds: int) -> str:
    parts = []
    for unit, unit_seconds in (("day", DAY_SECONDS), ("hour", 3600), ("minute", 60), ("second", 1)):
        count, seconds = divmod(seconds, unit_seconds)
        if count:
            parts.append(f"{count:,} {unit}{'' if count == 1 else 's'}")
    return " ".join(parts)


def _moment(rfc3339: str) -> datetime | None:
    """A time in UTC; None for a text that is none, or one without a time zone."""
    try:
        moment = datetime.fromisoformat(rfc3339)
        return moment.astimezone(UTC) if moment.tzinfo else None
    except (ValueError, OverflowError):
        return None


def _ns(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(microseconds=1) * 1000
