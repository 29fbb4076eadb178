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
