"""Which snapshots a policy keeps, and why: the calendar's edges, wrong clocks, and laws that hold for all."""

from __future__ import annotations

import doctest
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.errors import InvalidInput
from outlast.records import Snapshot, time_ns
from outlast.repo import retention
from outlast.repo.retention import DAY_SECONDS, Decision, Policy, decide, duration_seconds

NOW = "2027-01-10T00:00:00Z"
FUTURE = "its time lies in the future: kept, and not counted"


def snapshots(*times: str, name: str = "run") -> list[Snapshot]:
    return [Snapshot(f"{name}{number}", "backup", name, time) for number, time in enumerate(times)]


def reasons(times: Sequence[str], policy: Policy, now: str = NOW) -> list[str]:
    """For each time what is said, "" for a snapshot that goes."""
    decisions = decide(snapshots(*times), policy, time_ns(now))
    for decision in decisions:
        assert decision.keep == (decision.reasons != ("no rule keeps it",))
    return [", ".join(decision.reasons) if decision.keep else "" for decision in decisions]


CALENDAR: dict[str, tuple[Policy, dict[str, str]]] = {
    "the newest of each day": (
        Policy(daily=2),
        {
            "2026-11-20T23:59:59.999999Z": "",
            "2026-11-21T00:00:00Z": "",
            "2026-11-21T23:59:59.999999Z": "daily 2026-11-21",
            "2026-11-22T00:00:00Z": "daily 2026-11-22",
        },
    ),
    "days without a snapshot don't count": (
        Policy(daily=2),
        {
            "2026-01-01T10:00:00Z": "",
            "2026-03-01T10:00:00Z": "daily 2026-03-01",
            "2026-12-01T10:00:00Z": "daily 2026-12-01",
        },
    ),
    "hours of different days differ": (
        Policy(hourly=2),
        {
            "2026-11-21T14:10:00Z": "hourly 2026-11-21 14:00",
            "2026-11-22T14:00:00Z": "",
            "2026-11-22T14:59:00Z": "hourly 2026-11-22 14:00",
        },
    ),
    "an ISO week spans the end of the year": (
        Policy(weekly=2),
        {
            "2026-12-27T12:00:00Z": "weekly 2026-W52",
            "2026-12-28T12:00:00Z": "",
            "2027-01-03T12:00:00Z": "weekly 2026-W53",
        },
    ),
    "week 53 belongs to the year before, week 1 to the year after": (
        Policy(weekly=3),
        {
            "2021-01-03T12:00:00Z": "weekly 2020-W53",
            "2024-12-29T12:00:00Z": "weekly 2024-W52",
            "2024-12-30T12:00:00Z": "weekly 2025-W01",
        },
    ),
    "months end at the end of the year and in a leap year": (
        Policy(monthly=3),
        {
            "2024-02-28T12:00:00Z": "",
            "2024-02-29T12:00:00Z": "monthly 2024-02",
            "2025-12-31T23:59:59Z": "monthly 2025-12",
            "2026-01-01T00:00:00Z": "monthly 2026-01",
        },
    ),
    "another time zone is the same instant": (
        Policy(daily=1),
        {"2026-11-21T22:30:00Z": "", "2026-11-22T00:45:00+02:00": "daily 2026-11-21"},
    ),
    "within counts from the newest, not from now, to the instant": (
        Policy(within_seconds=DAY_SECONDS),
        {
            "2026-11-20T11:59:59.999999Z": "",
            "2026-11-20T12:00:00Z": "within 1 day",
            "2026-11-21T12:00:00Z": "within 1 day",
        },
    ),
    "every rule that keeps one is told": (
        Policy(last=2, daily=1, monthly=1, within_seconds=36 * 3600),
        {
            "2026-11-01T12:00:00Z": "",
            "2026-11-21T12:00:00Z": "last 2 of 2, within 1 day 12 hours",
            "2026-11-22T12:00:00Z": "last 1 of 2, daily 2026-11-22, monthly 2026-11, within 1 day 12 hours",
        },
    ),
    "last goes by the order of commit, the calendar by time": (
        Policy(last=1, daily=1),
        {"2026-11-22T12:00:00Z": "daily 2026-11-22", "2026-11-20T12:00:00Z": "last 1 of 1"},
    ),
}


@pytest.mark.parametrize("case", CALENDAR)
def test_the_calendar(case: str) -> None:
    policy, expected = CALENDAR[case]
    assert reasons(list(expected), policy) == list(expected.values())


def test_of_two_at_one_instant_the_one_committed_later_stays() -> None:
    assert reasons(["2026-11-22T12:00:00Z"] * 3, Policy(monthly=5)) == ["", "", "monthly 2026-11"]


def test_clocks_that_were_wrong_push_nothing_out() -> None:
    times = ["2026-11-21T12:00:00Z", "2026-11-22T12:00:00Z", "2027-06-01T00:00:00Z", "9999-12-31T23:59:59Z", "soon"]
    unread = "its time can't be read: kept, and not counted"
    for policy, expected in (
        (Policy(daily=1), ["", "daily 2026-11-22", FUTURE, FUTURE, unread]),
        (Policy(last=1), ["", "last 1 of 1", FUTURE, FUTURE, unread]),
        (Policy(within_seconds=3600), ["", "within 1 hour", FUTURE, FUTURE, unread]),
        (Policy(tags=("prod",)), ["", "", FUTURE, FUTURE, unread]),
    ):
        assert reasons(times, policy) == expected


@pytest.mark.parametrize("time", ["", "2026-11-21T12:00:00", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"])
def test_a_time_that_says_nothing_is_kept(time: str) -> None:
    assert "can't be read" in reasons([time, "2026-11-22T12:00:00Z"], Policy(last=1))[0]


def test_a_snapshot_up_to_a_day_ahead_is_as_any_other() -> None:
    times = ["2027-01-09T23:00:00Z", "2027-01-11T00:00:00Z", "2027-01-11T00:00:00.000001Z"]
    assert reasons(times, Policy(last=1)) == ["", "last 1 of 1", FUTURE]


def test_names_are_judged_apart_and_kinds_together() -> None:
    runs, others = (
        snapshots("2026-11-21T12:00:00Z", "2026-11-22T12:00:00Z"),
        snapshots("2026-11-01T12:00:00Z", name="b"),
    )
    checkpoint = Snapshot("c", "checkpoint", "run", "2026-11-22T13:00:00Z")
    decisions = decide([runs[0], *others, runs[1], checkpoint], Policy(daily=1), time_ns(NOW))
    assert [(each.snapshot.id, each.keep) for each in decisions] == [
        ("run0", False),
        ("b0", True),
        ("run1", False),
        ("c", True),
    ]


def test_tags_keep_by_key_or_by_key_and_value() -> None:
    def tagged(**tags: str) -> Snapshot:
        return Snapshot(str(tags), "backup", "run", "2026-11-21T12:00:00Z", tags=tags)

    every = [tagged(prod="1"), tagged(prod="2", stage="a=b"), tagged(product="1"), tagged()]

    def kept(*tags: str) -> list[tuple[str, ...]]:
        return [each.reasons if each.keep else () for each in decide(every, Policy(tags=tags), time_ns(NOW))]

    assert kept("prod") == [("tag prod",), ("tag prod",), (), ()]
    assert kept("prod=1", "stage=a=b") == [("tag prod=1",), ("tag stage=a=b",), (), ()]
    assert kept("prod=3") == [(), (), (), ()]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"last": 0, "within_seconds": 0, "tags": ()},
        {"last": -1},
        {"last": 5, "daily": -1},
        {"last": 5, "tags": ("",)},
        {"last": 5, "tags": ("prod", " ")},
        {"tags": ("=1",)},
        {"tags": ("prod=",)},
        {"tags": ("prod=\udcff",)},
    ],
)
def test_a_policy_that_keeps_nothing_or_makes_no_sense_can_not_be_made(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="nothing was touched"):
        Policy(**fields)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30d", 30 * 86400), ("12h", 43200), ("2w", 14 * 86400), ("1m", 31 * 86400), ("1y", 366 * 86400), ("2h1d", 93600)],
)
def test_durations(text: str, seconds: int) -> None:
    assert duration_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "d", "30 d", "0d", "-1d", "1.5d", "30s", "30D", "٣d", "1d\n", "1234567d"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="can't be understood"):
        duration_seconds(text)


def test_the_examples_of_the_module() -> None:
    assert doctest.testmod(retention).failed == 0


# -- laws --------------------------------------------------------------------------------------------

START = datetime(2026, 10, 1, tzinfo=UTC)


@st.composite
def histories(draw: st.DrawFn) -> list[Snapshot]:
    """Snapshots of two names in the order of commit, crowded so that periods, ties and the future are met."""
    hours = st.one_of(st.integers(0, 48), st.integers(0, 24 * 130))
    found = draw(st.lists(st.tuples(hours, st.sampled_from("ab"), st.sampled_from(["", "1", "2"])), max_size=25))
    return [
        Snapshot(
            str(number), "backup", name, (START + timedelta(hours=hour)).isoformat(), tags={"prod": tag} if tag else {}
        )
        for number, (hour, name, tag) in enumerate(found)
    ]


COUNTS = ("last", "hourly", "daily", "weekly", "monthly")
rules = st.fixed_dictionaries(
    {rule: st.integers(0, 4) for rule in COUNTS}
    | {
        "within_seconds": st.sampled_from([0, 3600, 5 * DAY_SECONDS]),
        "tags": st.sampled_from([(), ("prod",), ("prod=1",)]),
    }
).filter(lambda fields: any(fields.values()))


def ids(decisions: Sequence[Decision], keep: bool = True) -> set[str]:
    return {decision.snapshot.id for decision in decisions if decision.keep == keep}


@given(histories(), rules)
@settings(max_examples=150, deadline=None)
def test_the_newest_of_each_name_stays_when_anything_is_kept_by_number(
    history: list[Snapshot], fields: dict[str, Any]
) -> None:
    now_ns = time_ns(NOW)
    kept = ids(decide(history, Policy(**fields), now_ns))
    for name in {snapshot.name for snapshot in history}:
        group = [each for each in history if each.name == name]
        counted = [each for each in group if time_ns(each.time) <= now_ns + DAY_SECONDS * 10**9]
        if counted and any(fields[rule] for rule in (*COUNTS[1:], "within_seconds")):
            assert max(reversed(counted), key=lambda each: time_ns(each.time)).id in kept
        if counted and fields["last"]:
            assert counted[-1].id in kept
        assert {each.id for each in group if each not in counted} <= kept


@given(histories(), rules, st.sampled_from([*COUNTS, "within_seconds"]), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_a_wider_rule_keeps_no_less(history: list[Snapshot], fields: dict[str, Any], rule: str, more: int) -> None:
    kept = ids(decide(history, Policy(**fields), time_ns(NOW)))
    wider = {**fields, rule: fields[rule] + more * (DAY_SECONDS if rule == "within_seconds" else 1)}
    assert kept <= ids(decide(history, Policy(**wider), time_ns(NOW)))


@given(histories(), rules)
@settings(max_examples=150, deadline=None)
def test_deciding_again_on_what_was_kept_forgets_nothing(history: list[Snapshot], fields: dict[str, Any]) -> None:
    policy = Policy(**fields)
    first = decide(history, policy, time_ns(NOW))
    kept = [decision for decision in first if decision.keep]
    again = decide([decision.snapshot for decision in kept], policy, time_ns(NOW))
    assert again == kept


@given(histories(), rules, st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_apart_from_last_and_ties_the_order_does_not_matter(
    history: list[Snapshot], fields: dict[str, Any], random: Any
) -> None:
    one_each = list({(each.name, each.time): each for each in history}.values())
    policy = Policy(**{**fields, "last": 0, "daily": fields["daily"] or 1})
    shuffled = random.sample(one_each, len(one_each))
    assert ids(decide(one_each, policy, time_ns(NOW))) == ids(decide(shuffled, policy, time_ns(NOW)))
    # With `last` too, only the order among those of one name matters.
    by_name = sorted(history, key=lambda each: each.name)
    assert ids(decide(history, Policy(**fields), time_ns(NOW))) == ids(decide(by_name, Policy(**fields), time_ns(NOW)))
