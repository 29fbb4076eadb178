"""Renders the results as docs/benchmarks.md: ratio first, and the rows that were lost beside the rest."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from bars import Record, judge, shown_seconds
from cold import ROWS
from rows import OfTraining, Row

NOTES_BEGIN = "<!-- notes: written by hand, kept when the page is made again -->"
NOTES_END = "<!-- end of notes -->"

HEAD = """# Benchmarks

Made by `make bench`; the runs behind it are in `bench/results.jsonl`. All contenders of a row ran side by
side in one go: one round after another, each round in another order, the disk synced before every run, the
first round thrown away. Times are medians of at least {rounds} rounds; the ratio comes first.

{machine}

{programs}

The checkpoint is a transformer of 12 blocks in fp32 (GPT-2 small's shapes) with both AdamW moments, saved by
`torch.save`: {gigabytes:.2f} GB. Its tensors are drawn, not trained: normal weights with another scale in
every layer, normal first moments, squared normal second moments. Sources are in the page cache when they
are backed up. Before a restore, a check or a plain read every file that will be read is dropped from the
cache; the programs themselves stay in it. restic and borg run with their defaults (restic: repository format
2; borg: no encryption, lz4) and keep their own metadata caches. Outlast syncs what it writes to the disk; a
program that doesn't gets its time without that, and the column "on disk" says when a sync was through.
Peak memory is that of the process and its children; 22 MB and less is the floor of the measurement.

The last {trainings} tables, of training states, are measured inside one process that holds a transformer of these
shapes and its AdamW on the CPU: parameters and moments are {state:.2f} GB, and all of them change between two saves.
Peak memory is there what the contender took at most beside the state.
"""


def render(header: dict[str, Any], records: list[Record], notes: str) -> str:
    """The whole page; `notes` is the part that people write."""
    sizes = [item["source_bytes"] for item in records if item["row"] == "first"]
    text = HEAD.format(
        rounds=header["rounds"],
        machine=sentence(header["machine"]),
        programs="Programs: " + ", ".join(header["programs"]) + ".",
        gigabytes=max(sizes, default=0) / 1e9,
        state=max((item.get("state_bytes", 0) for item in records), default=0) / 1e9,
        trainings=sum(issubclass(row, OfTraining) for row in ROWS),
    )
    sections = [text, bars_table(records), f"{NOTES_BEGIN}\n{notes.strip()}\n{NOTES_END}\n"]
    sections += [row_table(row, records) for row in ROWS if any(item["row"] == row.name for item in records)]
    return "\n".join(sections)


def sentence(machine: dict[str, str]) -> str:
    cores = f"{machine['cores']} cores ({machine['cpu']})"
    return f"Machine: {cores}, {machine['memory']} of memory, {machine['kernel']}, {machine['disk']}."


def bars_table(records: list[Record]) -> str:
    lines = ["## What is promised", "", "| measured | promised | | row | contender |", "|--:|---|---|---|---|"]
    for verdict in judge(records):
        word = {True: "pass", False: "**lost**", None: "not measured"}[verdict.kept]
        cells = [verdict.figure, verdict.bar, word, verdict.row, verdict.subject]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def row_table(row: type[Row], records: list[Record]) -> str:
    mine = [item for item in records if item["row"] == row.name]
    names = list(dict.fromkeys(item["contender"] for item in mine))
    runs = {name: [item for item in mine if item["contender"] == name] for name in names}
    middle = {name: median(item[row.ratio_of] for item in runs[name]) for name in names}
    reference = row.reference if row.reference in middle else names[0]
    lines = [
        f"## {row.title}",
        "",
        *([row.note, ""] if row.note else []),
        f"| ratio to {reference} | | median | range | on disk | rate | CPU | repository | new bytes | peak memory |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in sorted(names, key=lambda name: middle[name]):
        cells = [f"{middle[name] / middle[reference]:.2f}x", name, *figures(runs[name])]
        lines.append(f"| {' | '.join(cells)} |")
    changed = [item["changed_bytes"] for item in mine if item.get("changed_bytes")]
    if changed:
        lines += [
            "",
            f"{megabytes(median(changed))} really changed in every round; new bytes are given in multiples of it too.",
        ]
    return "\n".join([*lines, ""])


def figures(runs: list[Record]) -> list[str]:
    wall = [item["wall_seconds"] for item in runs]
    settled = median(item["wall_seconds"] + item["settle_seconds"] for item in runs)
    rate = runs[0]["source_bytes"] / median(wall) / 1e6
    return [
        shown_seconds(median(wall)),
        f"{shown_seconds(min(wall))} to {shown_seconds(max(wall))}",
        shown_seconds(settled),
        f"{rate:,.0f} MB/s" if runs[0]["source_bytes"] else "",
        shown_seconds(median(item["cpu_seconds"] for item in runs)),
        megabytes(middle_of(runs, "repository_bytes")),
        new_bytes(runs),
        megabytes(max(item["rss_bytes"] for item in runs)),
    ]


def new_bytes(runs: list[Record]) -> str:
    """What the run added, and where it is known how many times what really changed."""
    added, changed = middle_of(runs, "added_bytes"), middle_of(runs, "changed_bytes")
    ratio = f" ({added / changed:.2f}x)" if added is not None and changed else ""
    return megabytes(added) + ratio


def middle_of(runs: list[Record], key: str) -> float | None:
    found = [item[key] for item in runs if key in item]
    return median(found) if found else None


def megabytes(count: float | None) -> str:
    if count is None:
        return ""
    return f"{count / 1e6:,.1f} MB" if count < 100e6 else f"{count / 1e6:,.0f} MB"


def kept_notes(page: Path) -> str:
    """The hand-written part of a page made before."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    if NOTES_BEGIN not in text or NOTES_END not in text:
        return ""
    return text.split(NOTES_BEGIN)[1].split(NOTES_END)[0]
