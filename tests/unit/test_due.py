"""What is due, when and why: rule by rule, with facts that are made up."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from outlast.records import Snapshot, time_text
from outlast.repo.state import Drill
from outlast.tiers.due import Held, Plan, Task, plan
from outlast.tiers.policy import DAY_SECONDS as DAY
from outlast.tiers.policy import HOUR_SECONDS as HOUR
from outlast.tiers.policy import DrillPolicy, Policy, Source, Tier, auto_seconds, intervals
from outlast.tiers.status import status

NS = 10**9
NOW = 1_800_000_000 // DAY * DAY  # a midnight, UTC
MODELS = Source("models", ("./models",), drill=None)
TIERS = (
    Tier("hot", "a", retention_seconds=7 * DAY),
    Tier("warm", "b", retention_seconds=30 * DAY),
    Tier("cold", "c", retention_seconds=180 * DAY),
)
POLICY = Policy(TIERS, (MODELS,))
DRILLED = replace(MODELS, drill=DrillPolicy())


def at(seconds: float) -> str:
    return time_text(int(seconds * NS))


def made(identity: str, age: float, *, parent: str = "0" * 32, name: str = "models", **more: Any) -> Snapshot:
    fields: dict[str, Any] = {"kind": "backup", "bytes": 10, "bytes_added": 5, **more}
    return Snapshot(identity, name=name, time=at(NOW - age), parent=parent, **fields)


def held(*snapshots: Snapshot, **more: Any) -> Held:
    return Held({each.id: each for each in snapshots}, **more)


FULL = made("full", 1 * HOUR, parent="")


def tasks(*tiers: Held, policy: Policy = POLICY, now: float = NOW) -> list[Task]:
    return list(planned(*tiers, policy=policy, now=now).tasks)


def planned(*tiers: Held, policy: Policy = POLICY, now: float = NOW) -> Plan:
    return plan(policy, [*tiers, *[Held()] * (len(policy.tiers) - len(tiers))], int(now * NS))


def of(kind: str, found: list[Task]) -> list[Task]:
    return [each for each in found if each.kind == kind]


@pytest.mark.parametrize(
    ("stage", "full", "incremental", "retention"),
    [("initial", 24, 4, 7), ("middle", 48, 12, 14), ("final", 72, 24, 30)],
)
def test_the_stages(stage: Any, full: int, incremental: int, retention: int) -> None:
    found = intervals(Source("m", ("m",), stage=stage), None)
    assert (found.full_seconds, found.incremental_seconds) == (full * HOUR, incremental * HOUR)
    assert found.retention_seconds == retention * DAY


def test_what_is_large_is_backed_up_less_often_and_what_matters_more_often() -> None:
    large = made("x", 0, bytes=101 * 10**9)
    assert intervals(MODELS, large).incremental_seconds == 18 * HOUR
    assert intervals(MODELS, large).full_seconds == 72 * HOUR
    assert intervals(MODELS, made("x", 0, bytes=100 * 10**9)).full_seconds == 48 * HOUR
    critical = intervals(replace(MODELS, importance="critical"), None)
    assert (critical.incremental_seconds, critical.retention_seconds) == (6 * HOUR, 28 * DAY)
    low = intervals(replace(MODELS, importance="low"), None)
    assert (low.incremental_seconds, low.retention_seconds) == (24 * HOUR, 7 * DAY)


def test_what_is_configured_goes_before_every_table() -> None:
    found = intervals(
        replace(MODELS, importance="critical", full_seconds=5, incremental_seconds=3, retention_seconds=9), None
    )
    assert (found.full_seconds, found.incremental_seconds, found.retention_seconds) == (5, 3, 9)


def test_auto_keeps_the_loss_within_the_rpo_and_the_cost_low_where_both_can_be() -> None:
    for rpo in (600, 3600, 86_400):
        for cost in (0.0, 1.0, 30.0, 200.0):
            interval, _ = auto_seconds(rpo, cost)
            if rpo > 60 + cost:
                assert interval + cost <= rpo, (rpo, cost)
    assert auto_seconds(3600, 0)[0] == 1800, "one backup may fail"
    assert auto_seconds(3600, 120)[0] == 2400, "5 % of the time"
    assert auto_seconds(3600, 1000)[0] == 1600, "it costs more than it should, and the RPO comes first"


def test_a_source_without_a_backup_is_backed_up_at_once_and_whole() -> None:
    [task] = tasks()
    assert (task.kind, task.full, task.due_ns) == ("backup", True, NOW * NS)


def test_incremental_backups_until_a_full_one_is_due() -> None:
    [task] = of("backup", tasks(held(FULL)))
    assert (task.full, task.due_ns) == (False, (NOW - HOUR + 12 * HOUR) * NS)
    later = made("later", 0.5 * HOUR)
    [task] = of("backup", tasks(held(replace(FULL, time=at(NOW - 48 * HOUR)), later)))
    assert task.full
    assert task.due_ns <= NOW * NS, "a full one doesn't wait for the next incremental one"


def test_backups_go_to_the_next_tier_while_the_first_is_away_or_full() -> None:
    for first in (Held(problem="away"), replace(held(FULL), full=True)):
        [task] = of("backup", tasks(first, held(FULL)))
        assert task.tier == "warm"
    assert not of("backup", tasks(*[Held(problem="away")] * 3))
    assert of("backup", tasks(*[replace(held(FULL), full=True)] * 3))[0].tier == "hot", "told as a failure there"


def test_copies_wait_for_others_but_not_long() -> None:
    [warm, _] = of("copy", tasks(held(FULL)))
    assert (warm.tier, warm.origin, warm.snapshots) == ("warm", "hot", ("full",))
    assert warm.due_ns == NOW * NS, "an hour after it was made"
    fresh = held(made("full", 60, parent=""))
    assert of("copy", tasks(fresh))[0].due_ns == (NOW - 60 + HOUR) * NS
    sync = replace(POLICY, tiers=(TIERS[0], replace(TIERS[1], mode="sync"), TIERS[2]))
    assert of("copy", tasks(fresh, policy=sync))[0].due_ns <= NOW * NS
    batch = held(made("full", 60, parent=""), *(made(f"s{number}", 50) for number in range(15)))
    assert of("copy", tasks(batch))[0].due_ns <= NOW * NS, "sixteen are a batch"


def test_a_copy_comes_from_the_nearest_tier_that_has_it_undamaged() -> None:
    found = of("copy", tasks(held(FULL, hurt={"full": at(NOW)}), held(FULL)))
    assert [(each.tier, each.origin) for each in found] == [("cold", "warm")]
    assert not of("copy", tasks(held(FULL, hurt={"full": at(NOW)}))), "nobody has it whole"


def test_a_tier_that_was_lost_is_filled_again_but_no_run_gets_back_what_it_dropped() -> None:
    point = made("p", 60, name="run", kind="checkpoint", tags={"step": "5"})
    found = of("copy", tasks(Held(), held(FULL, point), held(FULL, point)))
    assert [(each.tier, each.origin, each.snapshots) for each in found] == [("hot", "warm", ("full",))]


def test_lag_is_measured_in_snapshots_bytes_and_seconds() -> None:
    lags = planned(held(FULL, made("s", 60)), held(FULL), Held(problem="away")).lags
    assert [(each.tier, each.snapshots, each.bytes, each.seconds) for each in lags[:2]] == [
        ("hot", 0, 0, 0.0),
        ("warm", 1, 5, 60.0),
    ]
    assert lags[2].problem == "away"


OLD = made("old", 8 * DAY, parent="")
PROVEN = {"proven": {"old": at(NOW - DAY)}}


def drops(*tiers: Held, policy: Policy = POLICY, now: float = NOW) -> list[tuple[str, tuple[str, ...]]]:
    return [(each.tier, each.snapshots) for each in of("drop", tasks(*tiers, policy=policy, now=now))]


def test_a_tier_drops_what_it_keeps_no_more_when_two_others_hold_it_proven() -> None:
    tiers = held(OLD, FULL), held(OLD, FULL, **PROVEN), held(OLD, FULL, **PROVEN)
    assert drops(*tiers) == [("hot", ("old",))]
    assert drops(*tiers, policy=replace(POLICY, copies=1)) == [("hot", ("old",))]


@pytest.mark.parametrize(
    "cold",
    [held(FULL), held(OLD, FULL, hurt={"old": at(NOW)}), Held(problem="away")],
    ids=["lacks it", "damaged", "away"],
)
def test_nothing_is_dropped_while_too_few_hold_it(cold: Held) -> None:
    found = tasks(held(OLD, FULL), held(OLD, FULL, **PROVEN), cold)
    assert not of("drop", found)
    assert not [each for each in of("prove", found) if "old" in each.snapshots]


def test_copies_whose_proof_is_too_old_are_proven_before_anything_is_dropped() -> None:
    stale = {"proven": {"old": at(NOW - 8 * DAY)}}
    found = tasks(held(OLD, FULL), held(OLD, FULL, **PROVEN), held(OLD, FULL, **stale))
    assert not of("drop", found)
    assert [(each.tier, each.snapshots) for each in of("prove", found) if "old" in each.snapshots] == [
        ("cold", ("old",))
    ]


def test_the_newest_and_the_newest_full_one_stay_whatever_their_age() -> None:
    full, newest = made("full", 300 * DAY, parent=""), made("newest", 299 * DAY)
    proven = {"proven": {"full": at(NOW), "newest": at(NOW)}}
    tier = held(full, newest, **proven)
    assert not drops(tier, tier, tier)


def test_what_a_run_went_on_from_and_what_is_tagged_stays() -> None:
    tagged = replace(OLD, tags={"keep": "paper"})
    proven = held(tagged, FULL, **PROVEN)
    assert not drops(held(tagged, FULL), proven, proven)
    proven = held(OLD, FULL, **PROVEN)
    assert not drops(held(OLD, FULL, resumed=frozenset(["old"])), proven, proven)


def test_incremental_backups_end_with_their_source_and_full_ones_with_the_tier() -> None:
    """14 days for a source in the middle stage; nobody has to hold what no tier keeps."""
    incremental, full = made("i", 15 * DAY), made("f", 15 * DAY, parent="")
    assert drops(held(FULL), held(FULL, incremental, full), held(FULL, incremental, full)) == [
        ("warm", ("i",)),
        ("cold", ("i",)),
    ]


def test_dropping_is_put_off_to_midnight_so_that_it_is_done_together() -> None:
    late = made("old", 7 * DAY + 2 * HOUR, parent="")
    now = NOW + 5 * HOUR
    tier = held(late, FULL, **PROVEN)
    [task] = of("drop", tasks(tier, tier, tier, now=now))
    assert task.due_ns == NOW * NS, "what it kept until 22:00 goes at midnight"


def test_a_time_in_the_future_makes_nothing_old() -> None:
    odd = made("odd", -400 * DAY, parent="")
    assert not drops(held(odd, FULL), held(odd, FULL), held(odd, FULL))


def test_a_full_backup_is_verified_where_it_was_made() -> None:
    [task] = of("prove", tasks(held(FULL)))
    assert (task.tier, task.snapshots) == ("hot", ("full",))
    assert not of("prove", tasks(held(FULL, proven={"full": at(NOW)})))
    assert not of("prove", tasks(held(FULL, hurt={"full": at(NOW)}))), "it was read, and is damaged"


def test_what_gets_old_in_a_tier_that_archives_is_proven_once_more_and_never_again() -> None:
    far = replace(TIERS[2], archive_class="GLACIER", archive_after_seconds=30 * DAY)
    policy = Policy((TIERS[0], far), (MODELS,))
    old = made("old", 30.5 * DAY, parent="")

    def proofs(proven: dict[str, str], snapshot: Snapshot = old) -> list[tuple[str, ...]]:
        found = of(
            "prove", tasks(held(FULL, proven={"full": at(NOW)}), held(FULL, snapshot, proven=proven), policy=policy)
        )
        assert all(task.full and task.tier == "cold" and task.due_ns == NOW * NS for task in found)
        return [task.snapshots for task in found]

    assert proofs({}) == [("old",)]
    assert proofs({"old": at(NOW - 20 * DAY)}) == [("old",)], "it was too young to be moved then"
    assert proofs({"old": at(NOW)}) == []
    assert proofs({}, made("old", 29 * DAY, parent="")) == []


def test_what_is_archived_is_copied_from_only_where_nobody_else_has_it() -> None:
    archiving = replace(TIERS[1], archive_class="GLACIER")
    policy = Policy((TIERS[0], archiving, TIERS[2]), (MODELS,))
    [task] = of("copy", tasks(Held(), held(FULL), held(FULL), policy=policy))
    assert (task.tier, task.origin) == ("hot", "cold")
    [task, _] = of("copy", tasks(Held(), held(FULL), policy=policy))
    assert (task.tier, task.origin) == ("hot", "warm")


def test_damage_is_mended_from_where_it_is_whole_and_not_tried_without_end() -> None:
    [task] = of("mend", tasks(held(FULL), held(FULL, hurt={"full": at(NOW - 60)})))
    assert (task.tier, task.origin, task.due_ns) == ("warm", "hot", (NOW - 60 + HOUR) * NS)
    assert not of("mend", tasks(held(FULL, hurt={"full": at(NOW)})))


def test_rehearsals_go_through_the_tiers_in_turn() -> None:
    policy = Policy(TIERS, (replace(MODELS, drill=DrillPolicy(every_seconds=7 * DAY)),))
    [task] = of("drill", tasks(held(FULL), held(FULL), policy=policy))
    assert (task.tier, task.due_ns, task.snapshots) == ("hot", NOW * NS, ("full",))

    def after(age: float, level: int = 2) -> Held:
        drill = Drill("full", "models", 2, level, 1.0, 1.0, 1, time=at(NOW - age))
        return held(FULL, drills={"models": drill})

    [task] = of("drill", tasks(after(DAY), held(FULL), policy=policy))
    assert (task.tier, task.due_ns) == ("warm", (NOW + 6 * DAY) * NS)
    [task] = of("drill", tasks(after(8 * DAY), after(9 * DAY), held(FULL), policy=policy))
    assert task.tier == "cold"
    [task] = of("drill", tasks(after(DAY / 2, level=1), policy=policy))
    assert task.due_ns == (NOW + DAY / 2) * NS, "one that failed is tried again after a day"


def test_status_names_every_objective_that_is_missed() -> None:
    policy = Policy(TIERS, (replace(MODELS, rpo_seconds=2 * HOUR, rto_seconds=60, drill=DrillPolicy()),))
    drill = Drill("full", "models", 2, 2, 90.0, 1.0, 1, time=at(NOW - DAY))
    first = held(made("full", 3 * HOUR, parent=""), drills={"models": drill})
    found = status(
        policy, [first, held(made("full", 3 * HOUR, parent=""), hurt={"full": at(NOW)}), Held(problem="gone")], NOW * NS
    )
    assert found.missed == (
        "the last backup of models is 3.0 h old; tolerated are 2 h.",
        "restoring models took 90 s in hot; tolerated are 1 min.",
        "in warm 1 snapshot is damaged; `outlast plan --all` tells what is done about it.",
        "cold can't be read: gone",
    )
    fine = held(made("full", HOUR, parent=""), drills={"models": replace(drill, rto_seconds=5.0)})
    assert not status(policy, [fine, held(FULL), held(FULL)], NOW * NS).missed


def test_what_was_made_while_a_clock_was_ahead_keeps_nobody_from_backing_up() -> None:
    ahead = made("ahead", -365 * DAY, parent="")
    good, old = made("good", 13 * HOUR), made("old", 40 * HOUR, parent="")
    facts = held(old, good, ahead)
    [backup] = of("backup", tasks(facts, facts, facts))
    assert backup.due_ns <= NOW * NS
    assert any(
        "13.0 h" in each
        for each in status(replace(POLICY, sources=(replace(MODELS, rpo_seconds=HOUR),)), [facts] * 3, NOW * NS).missed
    )
    [first] = of("backup", tasks(held(ahead)))
    assert first.due_ns <= NOW * NS


def test_a_proof_and_a_drill_of_a_time_to_come_count_as_none() -> None:
    old, newest = made("old", 8 * DAY, parent=""), made("new", HOUR, parent="")
    forged = {"old": at(NOW + DAY), "new": at(NOW)}
    facts = held(old, newest, proven=forged)
    assert not of("drop", tasks(facts, facts, facts))
    drill = Drill("new", "models", 2, 2, 1.0, 1.0, 1, time=at(NOW + 30 * DAY))
    [task] = of("drill", tasks(held(newest, drills={"models": drill}), policy=replace(POLICY, sources=(DRILLED,))))
    assert task.due_ns <= NOW * NS


def test_what_is_damaged_everywhere_takes_no_place_of_what_is_whole() -> None:
    whole, hurt = made("whole", 200 * DAY, parent=""), made("hurt", 190 * DAY, parent="")
    facts = held(whole, hurt, hurt={"hurt": at(NOW - DAY)}, proven={"whole": at(NOW - HOUR)})
    dropped = [each for task in of("drop", tasks(facts, facts, facts)) for each in task.snapshots]
    assert "whole" not in dropped
