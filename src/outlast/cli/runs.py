"""What is told of training runs: the command runs, and checkpoints for the commands show and diff."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from outlast.cli.command import CORRUPT, Call, Command
from outlast.cli.protect import snapshot_document
from outlast.cli.text import (
    count_text,
    duration_text,
    printable,
    shape_text,
    short_id,
    size_text,
    table,
    time_text,
)

if TYPE_CHECKING:
    from outlast.checkpoint.compare import Comparison, TensorChange
    from outlast.checkpoint.inventory import Inventory, RankFiles
    from outlast.checkpoint.runs import Metric, RunView
    from outlast.records import Snapshot
    from outlast.repo.repository import Repository

_LINES_SHOWN = 40
_METRICS_SHOWN = 3


@click.command(cls=Command, codes=(10, 12, 20, 21))
def runs(call: Call) -> int:
    """List the training runs: last step, age, size, retries, metrics.

    RETRIES: how often the run was started again from a checkpoint since it last saved. 0 or 1 is good: 1 is also what
    a run shows that goes on just now and has not saved yet. More means that it keeps dying before its next save.
    """
    import msgspec

    from outlast.checkpoint.runs import runs as find

    found = find(call.readable_repository())
    call.printer.result([msgspec.to_builtins(each) for each in found], _run_lines(found), always=True)
    return CORRUPT if call.warnings else 0


def _run_lines(found: list[RunView]) -> Iterator[str]:
    if not found:
        yield "No runs."
        return
    yield from table(
        ("RUN", "STEP", "SAVED (UTC)", "AGE", "CHECKPOINTS", "SIZE", "STORED", "RETRIES", "METRICS"),
        (
            (
                printable(each.name),
                f"{each.last_step:,}",
                time_text(each.time),
                duration_text(each.age_seconds),
                f"{each.checkpoints:,}",
                size_text(each.bytes),
                size_text(each.bytes_stored),
                f"{each.retries:,}",
                "  ".join(_metric_text(*metric) for metric in [*each.metrics.items()][:_METRICS_SHOWN]),
            )
            for each in found
        ),
        right="STEP AGE CHECKPOINTS SIZE STORED RETRIES",
    )


def _metric_text(name: str, metric: Metric) -> str:
    last = "no number" if metric.last is None else f"{metric.last:.4g}"
    if metric.lowest is None or metric.lowest == metric.highest:
        return f"{printable(name)} {last}"
    return f"{printable(name)} {last} ({metric.lowest:.4g} to {metric.highest:.4g})"


# -- show ----------------------------------------------------------------------------------------------------


def show_checkpoint(call: Call, snapshot: Snapshot, ranks: list[RankFiles]) -> None:
    import msgspec

    from outlast.checkpoint.inventory import inventory
    from outlast.checkpoint.references import metrics_of

    found = inventory(ranks)
    document = snapshot_document(snapshot) | msgspec.to_builtins(found)
    document["metrics"] = metrics_of(snapshot)
    for name in ("captured", "not_captured"):
        document[name] = [{"what": what, "how": how} for what, how in getattr(found, name)]
    call.result(document, _inventory_lines(snapshot, found), always=True)


def _inventory_lines(snapshot: Snapshot, found: Inventory) -> Iterator[str]:
    facts = found.facts
    yield (
        f"Checkpoint {short_id(snapshot.id)}  {printable(snapshot.name)}, step {found.step:,}  "
        f"{time_text(snapshot.time)} UTC"
    )
    metrics = [
        f"{tag.removeprefix('metric.')} {told}" for tag, told in snapshot.tags.items() if tag.startswith("metric.")
    ]
    ranks = f", by {count_text(len(found.ranks), 'rank')}" if len(found.ranks) > 1 else ""
    told = f"; {printable(', '.join(metrics))}" if metrics else ""
    yield f"{count_text(snapshot.files, 'file')}, {size_text(snapshot.bytes)}{ranks}{told}"
    yield from _origin_lines(facts)
    yield ""
    first = found.ranks[0]
    yield from table(
        ("PART", "KIND", "TENSORS", "SIZE", "TYPES"),
        (
            (each.key, printable(each.kind), f"{each.tensors:,}", size_text(each.bytes), " ".join(each.dtypes))
            for each in first.parts
        ),
        right="TENSORS SIZE",
    )
    if len(found.ranks) > 1:
        yield f"So on rank 0, in {first.folder}. Of each of the others:"
        for rank in found.ranks[1:]:
            tensors, size = sum(each.tensors for each in rank.parts), sum(each.bytes for each in rank.parts)
            yield f"  {rank.folder}  {count_text(tensors, 'tensor')}, {size_text(size)}"
    for title, listed in (("Captured besides:", found.captured), ("Not captured:", found.not_captured)):
        if listed:
            yield ""
            yield title
            yield from (f"  {line}" for line in table(("", ""), map(_row, listed)) if line)
    yield from _environment_lines(facts)
    yield ""
    yield f"`outlast show {short_id(snapshot.id)} .` lists its files and tensors."


def _row(told: tuple[str, str]) -> tuple[str, str]:
    return told[0], printable(told[1])


def _origin_lines(facts: dict[str, Any]) -> Iterator[str]:
    origin, parallel = facts.get("origin") or {}, facts.get("parallel") or {}
    if origin:
        git = origin.get("git") or {}
        dirty = ", with changes" if git.get("dirty") else ""
        commit = f", commit {str(git.get('commit'))[:12]}{dirty}" if git else ""
        yield f"On {printable(str(origin.get('host')))}{printable(commit)}: {_command_text(origin.get('command', []))}"
    mesh = " ".join(f"{name}={size}" for name, size in (parallel.get("mesh") or {}).items())
    if mesh:
        yield f"Ranks: {parallel.get('ranks')}, as {printable(mesh)}"


def _command_text(words: Sequence[str]) -> str:
    import shlex

    return printable(shlex.join(map(str, words)))


def _environment_lines(facts: dict[str, Any]) -> Iterator[str]:
    environment, life = facts.get("environment") or {}, facts.get("life") or {}
    if environment:
        yield ""
        yield "Environment:"
        rows = [
            (name, _value_text(value)) for name, value in sorted(environment.items()) if value not in (None, [], {})
        ]
        yield from (f"  {line}" for line in table(("", ""), rows) if line)
    if life:
        seconds, failures = float(life.get("run_seconds", 0)), int(life.get("failures", 0))
        yield ""
        lost = f", after {count_text(failures, 'failure')} that lost work" if failures else ""
        yield f"Trained for {duration_text(seconds)} until then{lost}."


def _value_text(value: Any) -> str:
    if isinstance(value, dict):
        return printable(" ".join(f"{name}={each}" for name, each in value.items()))
    if isinstance(value, list):
        return printable(", ".join(map(str, value)))
    return printable(str(value))


# -- diff ----------------------------------------------------------------------------------------------------


def diff_checkpoints(call: Call, repository: Repository, before: Snapshot, after: Snapshot) -> None:
    import msgspec

    from outlast.checkpoint.compare import compare

    found = compare(repository, before, after)
    call.result(msgspec.to_builtins(found), _comparison_lines(found, before, after), always=True)


def _comparison_lines(found: Comparison, before: Snapshot, after: Snapshot) -> Iterator[str]:
    sides = [
        f"{short_id(each.id)} ({printable(each.name)}, step {step:,})"
        for each, step in ((before, found.step_before), (after, found.step_after))
    ]
    yield f"From checkpoint {sides[0]} to {sides[1]}:"
    yield from map(printable, found.notes)
    yield (
        f"Tensors: {len(found.changed):,} changed, {found.unchanged:,} unchanged "
        f"({size_text(found.unchanged_bytes)}), {len(found.added):,} added, {len(found.removed):,} removed, "
        f"{len(found.reshaped):,} reshaped"
    )
    if found.changed:
        parts = list(dict.fromkeys(each.key for each in found.changed))
        biggest = sorted(found.changed, key=lambda each: (parts.index(each.key), -(each.relative or 0.0)))
        header = ("  CHANGED", "TYPE", "ELEMENTS", "CHANGED ONES", "NORM OF CHANGE", "RELATIVE", "LARGEST")
        rows = [_change_row(each) for each in biggest[:_LINES_SHOWN]]
        yield from _columns(header, rows)
        yield from _more(len(found.changed))
    for mark, sides_of in (("+", found.added), ("-", found.removed)):
        for side in sides_of[:_LINES_SHOWN]:
            shape = f"{side.dtype} {shape_text(side.shape)}, {size_text(side.bytes)}"
            yield f"  {mark} {_name(side)}  {shape}"
        yield from _more(len(sides_of))
    for each in found.reshaped[:_LINES_SHOWN]:
        was = f"{each.dtype_before} {shape_text(each.shape_before)}"
        yield f"  ~ {_name(each)}  {each.dtype} {shape_text(each.shape)}, was {was}"
    yield from _more(len(found.reshaped))
    for title, values in (("Values", found.values), ("Environment", found.environment)):
        if values:
            yield f"{title}: {count_text(len(values), 'difference')}"
            for value in values[:_LINES_SHOWN]:
                key = getattr(value, "key", "")
                path = ".".join(part for part in (key, value.path) if part).replace(".[", "[")
                rank = _rank_text(getattr(value, "rank", None))
                sides = ["(none)" if side is None else side for side in (value.before, value.after)]
                yield printable(f"  {path}{rank}: {sides[0]} -> {sides[1]}")
            yield from _more(len(values))


def _columns(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    """As `table`, with headings of several words."""
    widths = [max(len(line[at]) for line in [header, *rows]) for at in range(len(header))]
    for line in [header, *rows]:
        cells = (
            cell.ljust(width) if at < 2 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()


def _change_row(each: TensorChange) -> tuple[str, ...]:
    bad = f"  {each.not_finite:,} not finite" if each.not_finite else ""
    unknown = "-"
    return (
        f"  ~ {_name(each)}",
        each.dtype,
        f"{each.elements:,}",
        f"{each.elements_changed:,}",
        unknown if each.norm_of_change is None else f"{each.norm_of_change:.4g}",
        unknown if each.relative is None else f"{each.relative:.2e}",
        (unknown if each.largest is None else f"{each.largest:.4g}") + bad,
    )


def _name(each: Any) -> str:
    return printable(f"{each.key}: {each.name}") + _rank_text(each.rank)


def _rank_text(rank: int | None) -> str:
    return f" (rank {rank})" if rank else ""


def _more(count: int) -> Iterator[str]:
    if count > _LINES_SHOWN:
        yield f"  … and {count - _LINES_SHOWN:,} more; --json has them all"
