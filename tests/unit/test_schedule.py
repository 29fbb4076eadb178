"""When to save: the interval is the best one that can be had, by simulation over traces of failures."""

from __future__ import annotations

import math
import random  # noqa: TID251

import pytest

from outlast.checkpoint.schedule import Facts, Policy, interval, policy

HOUR = 3600.0


def lost_seconds(every_seconds: float, failures: list[float], cost_seconds: float, write_seconds: float) -> float:
    """Time lost to saving, and to doing again what was done since the last save that was durable."""
    lost = 0.0
    for lasted in failures:
        saves = int(lasted // every_seconds)
        lost += saves * cost_seconds
        durable = int(max(0.0, lasted - write_seconds) // every_seconds)
        lost += lasted - durable * every_seconds
    return lost


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("mean_hours", "cost", "write"), [(2, 0.5, 1.5), (12, 4.0, 60.0), (0.5, 0.05, 2.0)])
def test_auto_loses_little_more_than_the_best_fixed_interval(
    seed: int, mean_hours: float, cost: float, write: float
) -> None:
    dice = random.Random(seed)
    failures = [dice.expovariate(1 / (mean_hours * HOUR)) for _ in range(400)]
    chosen, run_seconds = 0.0, 0.0
    for count, lasted in enumerate(failures):
        found = interval(Facts(cost, write, count, run_seconds), Policy())
        chosen += lost_seconds(found.seconds, [lasted], cost, write)
        run_seconds += lasted
    fixed = min(lost_seconds(write * 1.05**power, failures, cost, write) for power in range(200))
    print(f"seed {seed}: auto loses {chosen / fixed:.3f}x of what the best fixed interval does")
    assert chosen <= 1.10 * fixed


@pytest.mark.parametrize("cost", [0.001, 0.5, 30.0, 1000.0])
@pytest.mark.parametrize("run_seconds", [0.0, 30 * 24 * HOUR])
def test_without_failures_saving_takes_no_more_than_its_share(cost: float, run_seconds: float) -> None:
    found = interval(Facts(cost, cost, 0, run_seconds), Policy())
    assert cost / found.seconds <= 0.01 * (1 + 1e-9)


def test_a_save_is_durable_before_the_next_begins() -> None:
    assert interval(Facts(0.01, 900.0, 50, HOUR), Policy()).seconds == 900.0


def test_steps_and_seconds_are_taken_at_their_word() -> None:
    assert interval(Facts(1e6, 1e6), Policy(steps=7)).steps == 7
    assert interval(Facts(1e6, 1e6), Policy(seconds=90)).seconds == 90
    assert math.isfinite(interval(Facts(), Policy()).seconds), "the first save can't wait until its cost is known"


def test_how_often_is_said_in_steps_or_in_time() -> None:
    assert [policy(each) for each in (5, "90s", "10m", "1.5h", "auto")] == [
        Policy(steps=5), Policy(seconds=90), Policy(seconds=600), Policy(seconds=5400), Policy()
    ]  # fmt: skip
