"""The command that keeps a second copy: copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING

import click

from outlast.cli.command import PARTLY_DONE, Argument, Call, Command
from outlast.cli.passphrase import FROM_VARIABLE, Secret, is_source_given, source_secret
from outlast.cli.text import count_text, duration_text, path_shown, printable, short_id, size_text
from outlast.errors import InvalidInput, Refused

if TYPE_CHECKING:
    from outlast.repo.copy import CopyReport, Uncopied
    from outlast.repo.repository import Repository
    from outlast.store.base import ObjectStore

_FILES_SHOWN = 10


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
    help="Copy these: the first characters of an id, or `latest`. Default: all that are not there yet.",
)
@click.option("--from", "source", required=True, metavar="URL", help="The repository to copy from; it is only read.")
@click.option("--to", "target", metavar="URL", help="The repository to copy to. Default: --repo or OUTLAST_REPO.")
@click.option("--name", metavar="NAME", help="Only snapshots of this name.")
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
    from_passphrase_file: str | None,
    from_passphrase_command: str | None,
) -> int:
    """Copy snapshots to another repository: only what it lacks, every chunk verified.

    The copies are the same snapshots, with the same ids. Both repositories may be encrypted, each
    with its own passphrase. Copying again copies what is new.
    """
    import msgspec

    from outlast.repo.copy import copy as run

    if target is not None:
        if call.options.repo not in (None, target):
            raise InvalidInput("--to and --repo name two repositories; nothing was done.", hint="Leave --repo out.")
        call.options = call.options._replace(repo=target)
    origin = _Source(call, source, from_passphrase_file, from_passphrase_command)
    copied_from = origin.readable_repository()
    copied_to = call.repository()
    chosen = [origin.snapshot(copied_from, each, name).id for each in snapshot]
    report = run(copied_from, copied_to, chosen, name=name)
    call.warnings += origin.warnings
    call.result(msgspec.to_builtins(report), _report_lines(report), always=bool(report.failed))
    # Of a source with a damaged log nobody knows which snapshots it lacks.
    return PARTLY_DONE if report.failed or (origin.warnings and not snapshot) else 0


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


def _failure_lines(failed: Uncopied) -> Iterator[str]:
    yield f"Not copied: snapshot {short_id(failed.snapshot)} of {printable(failed.name)}: {printable(failed.problem)}"
    shown = failed.files[:_FILES_SHOWN]
    more = len(failed.files) - len(shown) + failed.more_files
    if shown:
        rest = f" and {more:,} more" if more else ""
        yield f"  files: {', '.join(path_shown(each) for each in shown)}{rest}"
