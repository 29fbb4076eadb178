"""The benchmark runs, and its verdicts are right. Nothing here asserts a time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
RIVALS = ("restic", "borg")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


def run(row: str, contender: str, wall_seconds: float, **facts: int) -> dict[str, Any]:
    record = {"row": row, "contender": contender, "wall_seconds": wall_seconds, "settle_seconds": 0.0}
    return record | {"cpu_seconds": 1.0, "rss_bytes": 100_000_000, "source_bytes": 1_000_000, **facts}


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path) -> None:
    missing = [rival for rival in RIVALS if shutil.which(rival) is None]
    if missing:
        assert os.environ.get("CI") != "true", f"not installed: {missing}; run `make setup-servers`"
        warnings.warn(f"NOT MEASURED, because not installed: {', '.join(missing)}", stacklevel=1)
    options = ["--scale", "0.0005", "--rounds", "1", "--rows", "restore,onelayer,help"]
    ran = subprocess.run(
        [sys.executable, str(BENCH / "run.py"), *options, "--disk", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for contender in ("outlast none", "outlast auto", "outlast encrypted", "read + write + fsync"):
        assert f" | {contender} | " in ran.stdout
    for rival in RIVALS:
        assert (f" | {rival} | " in ran.stdout) == (rival not in missing)
    assert "really changed in every round" in ran.stdout
    assert list(tmp_path.iterdir()) == [], "the benchmark left something behind"


@pytest.mark.slow
def test_the_rows_of_trainings_run(tmp_path: Path) -> None:
    """Every promise about them is measured, but for the difference of two loops, which is noise where they are tiny."""
    rows = "stall,stall-overlap,loop,durable,frozen,frozen-new,load-cold,load-warm,step"
    options = ["--scale", "0.0005", "--rounds", "1", "--rows", rows, "--disk", str(tmp_path)]
    ran = subprocess.run([sys.executable, str(BENCH / "run.py"), *options], capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    table = ran.stdout.partition("## What is promised")[2].partition("<!-- notes")[0]
    promises = [line for line in table.splitlines() if "| Run." in line or "| mapped.open" in line]
    assert len(promises) == 12
    assert {line.split(" | ")[3] for line in promises if " | not measured | " in line} <= {"loop"}
    for contender in ("memcpy", "write + fsync", "torch.load + load_state_dict", "dcp.load", "safetensors safe_open"):
        assert f" | {contender} | " in ran.stdout
    assert list(tmp_path.iterdir()) == [], "the benchmark left something behind"


@pytest.mark.usefixtures("bench")
def test_short_times_are_told_in_their_own_units() -> None:
    from bars import BARS, judge

    records = [run("stall-overlap", "Run.save", 0.0042), run("step", "Run.step", 8e-7)]
    found = {(verdict.row, verdict.figure): verdict.kept for verdict in judge(records) if verdict.figure}
    assert found["stall-overlap", "4.2 ms"] is True
    assert found["step", "0.8 µs"] is True
    assert {"at most 10 ms", "at most 5 µs", "at most 0.5 s"} <= {bar.text for bar in BARS}


@pytest.mark.usefixtures("bench")
def test_what_costs_less_than_nothing_is_not_a_measure() -> None:
    """Where the loop with saves of the other was faster than that without, its noise is no rival."""
    from bars import judge

    records = [run("loop", "Run.save", 0.1), run("loop", "dcp.async_save", -0.2)]
    assert [verdict.kept for verdict in judge(records) if verdict.row == "loop"] == [None]


@pytest.mark.usefixtures("bench")
def test_verdicts_follow_the_medians() -> None:
    from bars import judge

    records = [run("first", "outlast none", seconds) for seconds in (1.1, 1.1, 9.0)]
    records += [run("first", "cp + fsync", 1.0), run("first", "outlast auto", 2.0), run("first", "restic", 4.0)]
    records += [run("onelayer", "outlast auto", 0.1, added_bytes=1_020, changed_bytes=1_000)]
    records += [run("help", "outlast auto", 0.3, rss_bytes=700_000_000)]
    found = {(verdict.row, verdict.subject, verdict.figure): verdict.kept for verdict in judge(records)}
    assert found["first", "outlast none", "1.10x"] is True
    assert found["first", "outlast auto", "2.00x"] is False, "2 times faster is less than 2.5 times"
    assert found["first", "outlast encrypted", ""] is None
    assert found["onelayer", "outlast auto", "1.020x"] is True
    assert found["help", "outlast auto", "0.30 s"] is False
    assert found["every row", "outlast", "700 MB"] is False


@pytest.mark.usefixtures("bench")
def test_sizes_and_rates_are_judged() -> None:
    from bars import judge

    kept = {"source_bytes": 1000, "repository_bytes": 790}
    records = [
        run("cold-fp32", "outlast copy --delta", 9.0, **kept),
        run("cold-bf16", "outlast copy --delta", 9.0, **kept),
    ]
    records += [run("cold-read", "outlast, fp32", 0.5, source_bytes=310_000_000)]
    found = {(verdict.row, verdict.figure): verdict.kept for verdict in judge(records) if verdict.figure}
    assert found["cold-fp32", "0.790x"] is True
    assert found["cold-bf16", "0.790x"] is False
    assert found["cold-read", "310 MB/s"] is True


@pytest.mark.slow
def test_the_rows_of_cold_places_run(tmp_path: Path) -> None:
    options = ["--scale", "0.0005", "--rounds", "1", "--rows", "cold-fp32,cold-bf16,cold-read,copy-s3"]
    command = [sys.executable, str(BENCH / "run.py"), *options, "--disk", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    table = ran.stdout.partition("## What is promised")[2].partition("<!-- notes")[0]
    promises = [line for line in table.splitlines() if "| cold-" in line or "| copy-s3" in line]
    assert len(promises) == 5 and not [line for line in promises if "not measured" in line]
    assert list(tmp_path.iterdir()) == [], "the benchmark left something behind"


@pytest.mark.usefixtures("bench")
def test_the_page_shows_lost_rows_and_keeps_the_notes(tmp_path: Path) -> None:
    from page import kept_notes, render

    names = ("cores", "cpu", "memory", "kernel", "disk")
    header = {"machine": dict.fromkeys(names, "some"), "programs": ["restic 1"], "rounds": 5}
    records = [run("first", "outlast none", 3.0), run("first", "cp + fsync", 1.0)]
    page = tmp_path / "benchmarks.md"
    page.write_text(render(header, records, "Why it is slow."))
    assert "| 3.00x | at most 1.15x the time of cp + fsync | **lost** | first | outlast none |" in page.read_text()
    assert kept_notes(page).strip() == "Why it is slow."
    assert "Why it is slow." in render(header, records, kept_notes(page))
