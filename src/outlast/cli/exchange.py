"""The commands that exchange checkpoints with other programs: salvage, export, import."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from outlast.cli.command import CORRUPT, PARTLY_DONE, Argument, Call, Command
from outlast.cli.text import count_text, printable, short_id, size_text
from outlast.errors import OutlastError

if TYPE_CHECKING:
    from outlast.checkpoint.export import Exported
    from outlast.checkpoint.import_file import Imported
    from outlast.checkpoint.salvage import FileReport

_LOST_SHOWN = 20


@click.command(
    cls=Command, codes=(3, 20, 21), when_stopped="The files are as they were; what is written is written whole."
)
@click.argument(
    "file",
    cls=Argument,
    nargs=-1,
    required=True,
    metavar="FILE...",
    help="Damaged files, or folders of a DCP checkpoint.",
)
@click.option("--to", required=True, metavar="OUT", help="A new .safetensors file; for several, a folder of them.")
def salvage(call: Call, file: Sequence[str], to: str) -> int:
    """Bring every intact tensor out of damaged torch, safetensors and DCP files, and name what is lost.

    No pickle is executed, and the files are not changed. A tensor of a torch file comes out only where its CRC-32
    confirms it; safetensors files have no checksums.
    """
    import msgspec

    from outlast.checkpoint.salvage import salvage as run

    reports = run(file, to)
    out = sum(each.intact + each.unverified for each in reports)
    lost = sum(len(each.lost) for each in reports)
    document = {
        "found": sum(each.found for each in reports),
        "intact": sum(each.intact for each in reports),
        "unverified": sum(each.unverified for each in reports),
        "lost": lost,
        "files": [msgspec.to_builtins(each) for each in reports],
    }
    call.printer.result(document, _salvage_lines(reports), always=True)
    return 0 if not lost else PARTLY_DONE if out else CORRUPT


def _salvage_lines(reports: Sequence[FileReport]) -> Iterator[str]:
    for each in reports:
        out = each.intact + each.unverified
        kind = f", {each.format}" if each.format else ""
        size = size_text(each.bytes)
        yield f"{printable(each.path)}{kind}: {count_text(out, 'tensor')}, {size}, of {each.found:,} found."
        if each.intact:
            yield f"  Confirmed by a CRC-32: {each.intact:,}."
        for lost in each.lost[:_LOST_SHOWN]:
            yield f"  Lost: {printable(lost.name)}: {printable(lost.reason)}"
        if len(each.lost) > _LOST_SHOWN:
            yield f"  … and {len(each.lost) - _LOST_SHOWN:,} more; --json lists all."
        for note in dict.fromkeys(each.notes):
            yield f"  {printable(note)}"
        yield f"  Written to {printable(each.written)}." if each.written else "  Nothing was written."


@click.command(cls=Command, codes=(10, 12, 20, 21), when_stopped="Nothing is at the target.")
@click.argument(
    "checkpoint",
    cls=Argument,
    metavar="CHECKPOINT",
    help="RUN (its latest), RUN@STEP, RUN@loss:min (the best by a metric), or the first characters of an id.",
)
@click.option(
    "--format", "form", required=True, metavar="safetensors|torch|hdf5|dcp", help="What the programs that follow read."
)
@click.option("--to", required=True, metavar="PATH", help="A new folder (safetensors, dcp) or file (torch, hdf5).")
def export(call: Call, checkpoint: str, form: str, to: str) -> None:
    """Write a checkpoint of a run in a form that other programs read, every byte verified."""
    import msgspec

    _need_torch()
    from outlast.checkpoint.export import export_found

    repository = call.readable_repository()
    report = export_found(repository, lambda: call.snapshot(repository, checkpoint), form, to)
    call.result(msgspec.to_builtins(report), _export_lines(report))


def _export_lines(report: Exported) -> Iterator[str]:
    yield (
        f"Exported step {report.step:,} of {printable(report.run)} (checkpoint {short_id(report.snapshot)}) as "
        f"{report.format} to {printable(report.path)}: {count_text(report.files, 'file')}, {size_text(report.bytes)}."
    )
    yield f"It has {printable(', '.join(report.keys))}."
    yield from map(printable, report.notes)


@click.command(name="import", cls=Command, codes=(10, 12, 20, 21))
@click.argument(
    "path", cls=Argument, metavar="PATH", help="A .pt, .pth, .bin, .ckpt or .safetensors file, or a DCP folder."
)
@click.option("--run", required=True, metavar="NAME", help="The run that it is to be a checkpoint of.")
@click.option("--step", type=click.IntRange(min=0), metavar="N", help="Its step. Default: what the file says, or 0.")
@click.option(
    "--map",
    "places",
    multiple=True,
    metavar="KEY[:KIND]=PATH",
    help="Where a part of the run's state lies in the file. May be repeated.",
)
def bring_in(call: Call, path: str, run: str, step: int | None, places: Sequence[str]) -> None:
    """Make a checkpoint that was saved elsewhere one of a run, which then resumes from it.

    Files are read without executing a pickle; what needs one is refused. Parts are found by the names that scripts
    commonly use, such as model, optimizer, scheduler; KIND is module, optimizer, stateful or value.
    """
    import msgspec

    from outlast.checkpoint.references import run_name

    run_name(run)
    repository = call.repository()
    _need_torch()
    from outlast.checkpoint.import_file import bring_in as store

    report = store(repository, path, run, step=step, places=places)
    call.result(msgspec.to_builtins(report), _import_lines(report))


def _import_lines(report: Imported) -> Iterator[str]:
    yield (
        f"Imported {printable(report.path)} as step {report.step:,} of {printable(report.run)} (checkpoint "
        f"{short_id(report.snapshot)}): {count_text(report.tensors, 'tensor')}, {size_text(report.bytes)}."
    )
    parts = ", ".join(f"{key} ({kind})" for key, kind in report.parts.items())
    undo = f"`outlast forget {short_id(report.snapshot)}` undoes it."
    yield f"A Run resumes from it whose state has: {printable(parts)}. {undo}"
    if report.left_out:
        yield f"Left out: {printable(', '.join(report.left_out))}. --map KEY=PATH takes such parts in."
    yield from map(printable, report.notes)


def _need_torch() -> None:
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise OutlastError(
            "this needs torch, which is not installed; nothing was changed.", hint="pip install 'outlast[torch]'"
        )
