"""The command that keeps a second copy: copy."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import click

from outlast.cli.command import PARTLY_DONE, Argument, Call, Command
from outlast.cli.passphrase import FROM_VARIABLE, VARIABLE, Secret, is_source_given, source_secret
from outlast.cli.text import count_text, duration_text, path_shown, printable, short_id, size_text
from outlast.errors import (
    Busy,
    Corrupt,
    InvalidInput,
    NoRepository,
    NotFound,
    OutlastError,
    Refused,
    StoreFull,
    WrongKey,
)

if TYPE_CHECKING:
    from outlast.repo.copy import CopyReport, Uncopied
    from outlast.repo.repository import Repository
    from outlast.store.base import ObjectStore

_FILES_SHOWN = 10
_COMMAND = re.compile(r"`(outlast (?!copy\b)[^`]+)`")


class _Source(Call):
    """The call as if the repository to copy from were the one of `--repo`; nothing is ever written there."""

    def __init__(self, call: Call, url: str, file: str | None, command: str | None) -> None:
        super().__init__(call.options._replace(repo=url, passphrase_file=file, passphrase_command=command))
        self.printer = call.printer

    def store(self) -> ObjectStore:
        from outlast.store.layers import ReadOnlyStore

        return ReadOnlyStore(super().store())

    def secret(self) -> Secret:
        return cache(source_secret(self.options.passphrase_file, self.options.passphrase_command))

    def _expected(self, repository: Repository) -> Repository:
        try:
            return super()._expected(repository)
        except Refused as exc:
            hint = f"If it never was, unset {FROM_VARIABLE}, or drop the option --from-passphrase-…"
            raise Refused(exc.message, hint=hint) from exc

    def _is_secret_given(self) -> bool:
        return is_source_given(self.options.passphrase_file, self.options.passphrase_command)


@click.command(
    cls=Command,
    codes=(3, 10, 11, 12, 20, 21),
    when_stopped="Every snapshot that was copied is whole; the same command goes on from here.",
)
@click.argument(
    "snapshot",
    cls=Argument,
    nargs=-1,
    metavar="[SNAPSHOT]...",
    help="Copy these: the first characters of an id, `latest`, RUN, RUN@STEP or RUN@loss:min. Default: all that are "
    "not there yet.",
)
@click.option("--from", "source", required=True, metavar="URL", help="The repository to copy from; it is only read.")
@click.option("--to", "target", metavar="URL", help="The repository to copy to. Default: --repo or OUTLAST_REPO.")
@click.option("--name", metavar="NAME", help="Only snapshots of this name.")
@click.option("--delta", is_flag=True, help="Keep tensors small: as exact differences from the snapshot before.")
@click.option(
    "--from-passphrase-file",
    metavar="FILE",
    help=f"A file that holds the passphrase of --from (or {FROM_VARIABLE}).",
)
@click.option("--from-passphrase-command", metavar="COMMAND", help="A command that prints the passphrase of --from.")
def copy(
    call: Call,
    snapshot: Sequence[str],
    source: str,
    target: str | None,
    name: str | None,
    delta: bool,
    from_passphrase_file: str | None,
    from_passphrase_command: str | None,
) -> int:
    """Copy snapshots to another repository: only what it lacks, every chunk verified.

    The copies are the same snapshots, with the same ids. Both repositories may be encrypted, each
    with its own passphrase. Copying again copies what is new. For a place where checkpoints and models are kept
    long, --delta makes them smaller, and slower to store; reading them back is exact.
    """
    import msgspec

    from outlast.repo.copy import copy as run

    if target is not None:
        if call.options.repo not in (None, target):
            raise InvalidInput("--to and --repo name two repositories; nothing was done.", hint="Leave --repo out.")
        call.options = call.options._replace(repo=target)
    if not (call.options.repo or os.environ.get("OUTLAST_REPO")):
        raise InvalidInput("no repository to copy to was named; nothing was done.", hint="Give --to URL.")
    origin = _Source(call, source, from_passphrase_file, from_passphrase_command)
    secret = f"{FROM_VARIABLE}, --from-passphrase-file or --from-passphrase-command"
    with _naming(origin, "copying from", "--from", secret):
        copied_from = origin.readable_repository()
        chosen = [origin.snapshot(copied_from, each, name).id for each in snapshot]
    with _naming(call, "copying to", "--to", f"{VARIABLE}, --passphrase-file or --passphrase-command"):
        copied_to = call.repository()
    with _naming_both(copied_from, copied_to, chosen, name):
        report = run(copied_from, copied_to, chosen, name=name, delta=delta)
    call.warnings += origin.warnings
    call.result(msgspec.to_builtins(report), _report_lines(report), always=bool(report.failed))
    # Of a source with a damaged log nobody knows which snapshots it lacks.
    return PARTLY_DONE if report.failed or (origin.warnings and not snapshot) else 0


# -- errors name their repository ----------------------------------------------------------------


@contextmanager
def _naming(call: Call, doing: str, option: str, passphrase: str) -> Iterator[None]:
    """`doing`: what is done with the repository; `option`: what names it; `passphrase`: how to give its own."""
    url = ""
    try:
        url = call.store().url
        yield
    except OutlastError as exc:
        if isinstance(exc, NoRepository) and option == "--from":
            exc.hint = "Give --from the URL of the repository to copy from."
        elif isinstance(exc, WrongKey) and not exc.hint:
            exc.hint = f"Give its passphrase by {passphrase}."
        _name(exc, f"{doing} {url}" if url else option, url)
        raise


@contextmanager
def _naming_both(source: Repository, target: Repository, chosen: Sequence[str], name: str | None) -> Iterator[None]:
    """Of an error half-way also tell how much was copied: there is no report then."""
    before = set(target.state.snapshots)
    place, other = target.store.url, source.store.url
    asked = {each.id for each in source.snapshots() if each.id in chosen or (not chosen and name in (None, each.name))}
    try:
        yield
    except OutlastError as exc:
        if source.format.id == target.format.id:
            again = f"`outlast copy --from {_word(other)} --to URL`"
            exc.hint = f"Make another repository for the copies: `outlast init --repo URL`, then {again}."
            raise
        if isinstance(exc, NotFound | InvalidInput):
            _name(exc, f"copying from {other}", other)
            raise
        exc.message += f" {_so_far(asked, before, target.state.snapshots)}"
        if isinstance(exc, Busy | Corrupt | Refused | StoreFull):  # what is wrong with the source is in the report
            _name(exc, f"copying to {place}", place)
        else:
            _name(exc, f"copying from {other} to {place}", other if other in exc.message else place)
        raise


def _name(exc: OutlastError, doing: str, url: str) -> None:
    """Say in an error what was being done, and in the commands of its hint to which repository."""
    exc.message = f"{doing}: {exc.message}"
    if url:
        exc.hint = _COMMAND.sub(lambda found: f"`{found[1]} --repo {_word(url)}`", exc.hint)


def _word(url: str) -> str:
    return shlex.quote(url)


def _so_far(asked: Collection[str], before: Collection[str], now: Collection[str]) -> str:
    """
    >>> _so_far({"a", "b", "c"}, {"a", "x"}, {"a", "b", "x"})
    'Of 3 snapshots 1 was copied before that, 1 was there already, 1 is left.'
    """
    present = sum(each in before for each in asked)
    copied = sum(each in now for each in asked) - present
    left = len(asked) - present - copied
    parts = ((copied, "copied before that"), (present, "there already"))
    told = [f"{count:,} {'was' if count == 1 else 'were'} {what}" for count, what in parts]
    return f"Of {count_text(len(asked), 'snapshot')} {', '.join(told)}, {left:,} {'is' if left == 1 else 'are'} left."


# -- what is printed -----------------------------------------------------------------------------


def _report_lines(report: CopyReport) -> Iterator[str]:
    for each in report.failed:
        yield from _failure_lines(each)
    if report.copied:
        yield (
            f"Copied {count_text(len(report.copied), 'snapshot')} to {printable(report.target)} "
            f"in {duration_text(report.seconds)}."
        )
    else:
        yield f"Copied no snapshot to {printable(report.target)}."
    yield (
        f"New data: {count_text(report.chunks, 'chunk')}, {size_text(report.bytes_added)}, stored in "
        f"{size_text(report.bytes_stored)}; {size_text(report.bytes_read)} read."
    )
    if report.skipped:
        yield f"There already: {count_text(len(report.skipped), 'snapshot')}."
    if report.failed:
        every = len(report.copied) + len(report.skipped) + len(report.failed)
        yield (
            f"Left: {len(report.failed):,} of {count_text(every, 'snapshot')}. "
            f"`outlast check --data all --repo {printable(_word(report.source))}` tells what is damaged or archived "
            "there."
        )


def _failure_lines(failed: Uncopied) -> Iterator[str]:
    yield f"Not copied: snapshot {short_id(failed.snapshot)} of {printable(failed.name)}: {printable(failed.problem)}"
    shown = failed.files[:_FILES_SHOWN]
    more = len(failed.files) - len(shown) + failed.more_files
    if shown:
        rest = f" and {more:,} more" if more else ""
        yield f"  files: {', '.join(path_shown(each) for each in shown)}{rest}"
