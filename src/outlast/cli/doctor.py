"""The commands that find out what is wrong: with the ground that a repository stands on, or with going on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

from outlast.cli.command import FAILED, Argument, Call, Command, Group
from outlast.cli.text import count_text, duration_text, printable, short_id, size_text, table

if TYPE_CHECKING:
    from outlast.checkpoint.doctor import Examined, Report
    from outlast.store.base import ObjectStore
    from outlast.testing.conformance import CheckResult

# As this program was started with: `main` sets a variable for itself, which would change a training's numbers.
ENVIRONMENT = dict(os.environ)


@click.group(cls=Group)
def doctor() -> None:
    """Find out what is wrong: with the ground that a repository stands on, or with going on with a training."""


@doctor.command(cls=Command, codes=(21,), when_stopped="What the checks wrote was removed.")
@click.argument("url", cls=Argument, metavar="URL", help="A path, s3://, gs:// or az://, as for --repo.")
def store(call: Call, url: str) -> int:
    """Check that a store keeps the promises a repository needs.

    It writes about 40 MiB below a name of its own, touches nothing else, and removes what it wrote.
    """
    import msgspec

    from outlast.clock import SYSTEM_CLOCK
    from outlast.store.layers import open_store
    from outlast.testing.conformance import check_store

    place = open_store(url, SYSTEM_CLOCK)
    with _leaving_no_folder(place):
        results = list(check_store(place))
    ok = all(result.passed for result in results)
    document = {"url": place.url, "ok": ok, "checks": msgspec.to_builtins(results)}
    call.printer.result(document, _lines(place.url, results), always=True)
    return 0 if ok else FAILED


@contextmanager
def _leaving_no_folder(place: ObjectStore) -> Iterator[None]:
    """Remove the folders that the checks made to have somewhere to write, and only while they are empty."""
    from outlast.store.layers import own_folder

    made: list[bytes] = []
    root = own_folder(place)
    if root is not None:
        folder = os.path.join(root, b"tmp")
        while not os.path.lexists(folder):
            made.append(folder)
            folder = os.path.dirname(folder)
    try:
        yield
    finally:
        for each in made:
            with suppress(OSError):
                os.rmdir(each)


def _lines(url: str, results: list[CheckResult]) -> Iterator[str]:
    for result in results:
        mark = "ok    " if result.passed else "FAILED"
        detail = f"  ({printable(result.detail)})" if result.detail else ""
        yield f"{mark}  {duration_text(result.seconds):>8}  {printable(result.name)}{detail}"
    failed = sum(not result.passed for result in results)
    promises = count_text(len(results), "promise")
    if failed:
        yield f"{printable(url)} broke {failed} of {promises}: don't keep a repository there."
    elif url.startswith("memory:"):
        yield f"{printable(url)} kept all {promises}, but lives in one process only: what is put there ends with it."
    else:
        yield f"{printable(url)} kept all {promises}: a repository is safe there."


@doctor.command(cls=Command, codes=(10, 12, 20, 21), when_stopped="Nothing was saved, and the run is as it was.")
@click.argument("run", cls=Argument, metavar="RUN", help="The name of the run.")
@click.argument(
    "command",
    cls=Argument,
    nargs=-1,
    type=click.UNPROCESSED,
    metavar="[-- COMMAND...]",
    help="What trains it, as it was called. It saves nothing.",
)
def resume(call: Call, run: str, command: Sequence[str]) -> int:
    """Find out whether a training run would go on bit for bit.

    Without COMMAND: every byte of its latest checkpoint is read, and this machine is compared with the one that
    saved it. With COMMAND, which trains the run: it goes on from one checkpoint to the next one, which it must come
    to bit for bit; the first thing that differs is named. All it prints goes to standard error.
    """
    import msgspec

    from outlast.checkpoint import doctor as proving

    repository = call.readable_repository()
    found = proving.examine(repository, run, compares=not command)
    document: dict[str, Any] = {"run": run, **msgspec.to_builtins(found)}
    lines = list(_examined_lines(found, run, is_all=not command))
    if not command:
        call.result(document, lines, always=True)
        return FAILED if found.environment else 0
    before, after = proving.pair(repository, run)
    steps = int(after.tags["step"]) - int(before.tags["step"])
    if not call.options.quiet:
        click.echo(
            f"Training {count_text(steps, 'step')} once more, from checkpoint {short_id(before.id)} of step "
            f"{before.tags['step']} to {short_id(after.id)} of step {after.tags['step']}.",
            err=True,
        )
    report = proving.prove(repository, before, after, command, ENVIRONMENT)
    first = proving.first(report) if report.verdict == "differs" else ""
    document["proof"] = {"from": before.id, "to": after.id, "first": first, **msgspec.to_builtins(report)}
    call.result(document, [*lines, *_verdict_lines(report, first)], always=True)
    return 0 if report.verdict == "proven" else FAILED


def _examined_lines(found: Examined, run: str, *, is_all: bool) -> Iterator[str]:
    yield (
        f"Checkpoint {short_id(found.snapshot)} of {printable(run)}, step {found.step:,}: every byte is as it was "
        f"saved ({size_text(found.bytes)} in {count_text(found.chunks, 'chunk')})."
    )
    if is_all:
        ranks = len({part.rank for part in found.parts}) > 1
        yield from table(
            ("PART", "TENSORS", "ELEMENTS", "NORM", "DIGEST"),
            (
                (
                    printable(part.key) + (f" (rank {part.rank})" if ranks else ""),
                    f"{part.tensors:,}",
                    f"{part.elements:,}",
                    "" if part.norm is None else f"{part.norm:.6g}",
                    part.digest[:16] if part.tensors else "",
                )
                for part in found.parts
            ),
            right="TENSORS ELEMENTS NORM",
        )
    for part in found.parts:
        if part.not_finite:
            yield f"{printable(part.key)} has {count_text(part.not_finite, 'element')} that are infinite or no number."
    if is_all and found.environment is None:
        yield "PyTorch is not installed here, so this machine was not compared."
    for line in found.environment or ():
        yield f"This machine is another: {printable(line)}"
    if is_all and not found.environment:
        told = "" if found.environment is None else "This machine is like the one that saved it. "
        yield f"{told}For a proof give the command that trains: `outlast doctor resume {printable(run)} -- COMMAND`."


def _verdict_lines(report: Report, first: str) -> Iterator[str]:
    from outlast.checkpoint.doctor import advice, besides

    if report.verdict == "unproven":
        yield f"Can't be proven: {printable(report.reason)}."
        return
    what = f"{count_text(report.tensors, 'tensor')}, {size_text(report.bytes)}"
    where = f"From step {report.step_before:,} the run came to step {report.step_after:,}"
    if report.verdict == "proven":
        batch = "" if report.first_batch == "unknown" else ", the first batch"
        yield f"Proven. {where} bit for bit: random numbers{batch}, {what}, and every other value."
        for line in report.environment:
            yield f"The environment is another, and the numbers are the same: {printable(line)}"
        return
    yield f"{where}, and it is not the same."
    yield f"First that differs: {printable(first)}."
    yield from map(printable, advice(report))
    for number, line in enumerate(besides(report)):
        if not number:
            yield "Different besides:"
        yield f"  {printable(line)}"
