"""`make bench`: Outlast beside restic, borg, PyTorch's own checkpoints and the disk itself, in one run.

    python bench/run.py                                 everything; writes docs/benchmarks.md
    python bench/run.py --rows first,restore            some rows; the others stay as they were
    python bench/run.py --scale 0.01 --rounds 1         a smoke test; prints the page, writes nothing

The first round is thrown away (it warms caches and finds broken set-ups), except when it is the only one.
"""

from __future__ import annotations

import argparse
import compileall
import json
import shutil
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bars import Record, shown_seconds
from cold import ROWS
from contenders import ALL_RIVALS, AUTO, installed, version
from measure import machine, remove, run
from page import kept_notes, render
from rows import Row, Stage

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results.jsonl"
PAGE = ROOT / "docs" / "benchmarks.md"
MODEL_BYTES = 1_500_000_000
SMALL_FILES_BYTES = 100_000 * 4096 * 2


def arguments() -> argparse.Namespace:
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(description="Measure Outlast beside restic, borg and the disk.")
    parser.add_argument("--rows", default=",".join(names), help=f"which rows, of: {', '.join(names)}")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default 5)")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the data; 1 is 1.5 GB and 100,000 files")
    parser.add_argument("--disk", type=Path, default=ROOT, help="measure in a new folder .bench of this folder")
    options = parser.parse_args()
    options.rows = options.rows.split(",")
    options.scratch = options.disk.resolve() / ".bench"
    unknown = [name for name in options.rows if name not in names]
    if unknown:
        parser.error(f"there is no row {', '.join(unknown)}; the rows are {', '.join(names)}")
    return options


def check_room(scratch: Path, scale: float) -> None:
    """Twelve times the model at most: source, five repositories, a copy, a restore, and new versions."""
    needed = int(scale * (12 * MODEL_BYTES + 6 * SMALL_FILES_BYTES))
    free = shutil.disk_usage(scratch).free
    if free < needed:
        raise SystemExit(
            f"The benchmark needs {needed / 1e9:.0f} GB for its scratch folder and {free / 1e9:.0f} GB are free; "
            "make room, or point --disk at a folder of another disk."
        )


def measure_row(row: Row, rounds: int) -> list[Record]:
    """All measured runs of one row, interleaved; every second round goes backwards."""
    records: list[Record] = []
    thrown_away = 0 if rounds == 1 else 1
    for number in range(rounds + thrown_away):
        row.stage.first_round = number == 0
        row.new_round(number)
        trials = row.trials()
        shift = number % len(trials)
        trials = trials[shift:] + trials[:shift]
        for trial in reversed(trials) if number % 2 else trials:
            outcome = run(trial.ready())
            record: Record = {"row": row.name, "contender": trial.contender, "round": number}
            record |= {name: value for name, value in asdict(outcome).items() if name != "stdout"}
            record |= {"source_bytes": row.source_bytes(), **trial.facts(outcome)}
            counted = number >= thrown_away
            label = f"{number - thrown_away + 1}/{rounds}" if counted else "warm-up"
            took = shown_seconds(outcome.wall_seconds)
            print(f"{row.name:<14} {label:<8} {trial.contender:<34} {took:>9}", flush=True)
            if counted:
                records.append(record)
    return records


def earlier(rows: list[str]) -> list[Record]:
    """Runs of the other rows from the results file, for a run of some rows only."""
    if not RESULTS.exists():
        return []
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "row" in line and line["row"] not in rows]


def main() -> None:
    options = arguments()
    if not installed(AUTO):
        raise SystemExit("`outlast` is not installed beside this Python; run `make setup`.")
    for rival in ALL_RIVALS:
        if not installed(rival):
            print(f"NOT MEASURED: {rival.name} is not installed; run `make setup-servers`.", file=sys.stderr)
    compileall.compile_dir(ROOT / "src", quiet=1)  # as installing does: a start that compiles takes a third longer
    remove(options.scratch)
    options.scratch.mkdir(parents=True)
    try:
        check_room(options.scratch, options.scale)
        header: dict[str, Any] = {
            "machine": machine(options.scratch),
            "programs": [version(keeper) for keeper in (AUTO, *ALL_RIVALS) if installed(keeper)],
            "rounds": options.rounds,
            "scale": options.scale,
        }
        stage = Stage(options.scratch, options.scale)
        measured: list[Record] = []
        with closing(stage):
            for kind in ROWS:
                if kind.name in options.rows:
                    row = kind(stage)
                    measured += measure_row(row, options.rounds)
                    row.end()
    finally:
        remove(options.scratch)
    if options.scale != 1:
        print(render(header, measured, ""))
        return
    records = earlier(options.rows) + measured
    last = {record["row"]: record["round"] for record in sorted(records, key=lambda record: record["round"])}
    header["rounds"] = min(last.values())
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in [header, *records]), encoding="utf-8")
    PAGE.write_text(render(header, records, kept_notes(PAGE)), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
