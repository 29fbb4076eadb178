"""The command that verifies, and repairs: check."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Literal, cast

import click

from outlast.cli.command import CORRUPT, Call, Command
from outlast.cli.passphrase import FROM_VARIABLE, Secret, source_secret
from outlast.cli.text import (
    count_text,
    duration_text,
    path_shown,
    printable,
    share_of,
    short_id,
    size_text,
    span_seconds,
    time_text,
)
from outlast.errors import InvalidInput, WrongKey

if TYPE_CHECKING:
    from outlast.backup.repair import LostFile, RepairReport
    from outlast.repo.check import CheckReport, Damage

_ITEMS_SHOWN = 10

Share = Literal["all", "none"] | float


@click.command(
    cls=Command,
    codes=(10, 12, 20, 21),
    when_stopped="Nothing was lost: what a repair stored already is used by the next one.",
)
@click.option(
    "--data",
    metavar="all|none|N%",
    help="How much of the stored data to read besides the structure; of a part, what was not read for longest. "
    "Default: none; with --max-time or --repair, all.",
)
@click.option("--max-time", metavar="DURATION", help="Begin to read no more data after 30s, 10m or 2h.")
@click.option("--repair", is_flag=True, help="Mend what can be mended. Nothing is edited and nothing deleted.")
@click.option(
    "--from", "source", metavar="URL|DIR", help="With --repair: a repository or folder that may have what is lost."
)
@click.option(
    "--from-passphrase-file", metavar="FILE", help=f"A file that holds the passphrase of --from (or {FROM_VARIABLE})."
)
@click.option("--from-passphrase-command", metavar="COMMAND", help="A command that prints the passphrase of --from.")
def check(
    call: Call,
    data: str | None,
    max_time: str | None,
    repair: bool,
    source: str | None,
    from_passphrase_file: str | None,
    from_passphrase_command: str | None,
) -> int:
    """Verify the repository, and name what is damaged and which snapshots and files need it.

    Without the passphrase of an encrypted one, --data all verifies the bytes as they are stored.
    """
    import msgspec

    share = _share(data if data is not None else "all" if repair or max_time else "none")
    seconds = None if max_time is None else span_seconds("--max-time", max_time)
    _refuse_senseless(share, seconds, repair=repair, source=source)
    if repair:
        secret = cache(source_secret(from_passphrase_file, from_passphrase_command))
        repaired = _repair(call, share, source, secret)
        lines = _repair_lines(repaired, share)
        call.printer.result(msgspec.to_builtins(repaired), lines, always=not repaired.ok)
        return 0 if repaired.ok else CORRUPT
    report = _check(call, share, seconds)
    lines = _keyless_lines(report) if report.keyless else chain(_check_lines(report, share), _healing_lines(report))
    call.printer.result(msgspec.to_builtins(report), lines, always=not report.ok or report.keyless)
    return 0 if report.ok else CORRUPT


def _refuse_senseless(share: Share, seconds: float | None, *, repair: bool, source: str | None) -> None:
    if source is not None and not repair:
        raise InvalidInput("--from goes with --repair alone; nothing was done.", hint="Add --repair.")
    if seconds is not None and (repair or share == "none"):
        what = "--repair" if repair else "--data none"
        raise InvalidInput(f"--max-time does not go with {what}; nothing was done.", hint="Leave one of them out.")


def _check(call: Call, share: Share, seconds: float | None) -> CheckReport:
    from outlast.repo import check, keyless

    try:
        repository = call.connected()
    except WrongKey:
        if share == "none" or call.secret() is not None:
            raise
        return keyless.scrub(call.store(), data=share, max_seconds=seconds, sink=call.printer)
    return check.check(repository, data=share, max_seconds=seconds)


def _repair(call: Call, share: Share, source: str | None, secret: Secret) -> RepairReport:
    from outlast.backup import origin, repair

    repository = call.connected()
    found = None
    if source is not None:
        found = origin.open_origin(source, secret=secret, own=repository)
    return repair.repair(repository, data=share, origin=found)


# -- what is printed -----------------------------------------------------------------------------


def _check_lines(report: CheckReport, share: Share) -> Iterator[str]:
    yield from _damage_lines(report)
    what = (
        f"{count_text(report.snapshots, 'snapshot')}, {count_text(report.packs, 'pack')}, "
        f"{count_text(report.chunks, 'chunk')}; {size_text(report.bytes_read)} read in {duration_text(report.seconds)}"
    )
    yield from _place_lines(report)
    if not report.ok:
        yield f"{count_text(len(report.damaged), 'object')} damaged. Checked {what}."
    else:
        yield f"No damage found. Checked {what}."
    if share == "none":
        yield "The stored data itself was not read: `outlast check --data all` reads every byte."
    elif report.packs_unread > report.archived_packs:
        yield "The stored data itself was read only in part: `outlast check --data all` reads every byte."
    elif not report.ok:
        yield "Everything not named above is whole and can be restored."
    yield from _age_lines(report)


def _healing_lines(report: CheckReport) -> Iterator[str]:
    damaged = {damage.object.partition("/")[0] for damage in report.damaged}
    if damaged and damaged <= {"index", "state"}:
        yield "To heal it: `outlast check --repair`."
    elif damaged & {"packs"}:
        yield (
            "To heal it: `outlast check --repair`, with `--from` another repository or a folder that still has "
            "the files; or `outlast backup --full PATH`."
        )


def _damage_lines(report: CheckReport) -> Iterator[str]:
    for damage in report.damaged:
        yield f"Damaged: {printable(damage.object)}: {printable(damage.problem)}"
        yield from _affected_lines(damage)
    for each in report.unlisted[:_ITEMS_SHOWN]:
        which = f"{short_id(each.id)} of {printable(each.name)}, {time_text(each.time)},"
        yield f"Snapshot {which} can't be restored whole: its list of files is damaged."
    if len(report.unlisted) > _ITEMS_SHOWN:
        yield f"The same goes for {len(report.unlisted) - _ITEMS_SHOWN:,} more snapshots."


def _affected_lines(damage: Damage) -> Iterator[str]:
    if damage.snapshots:
        yield f"  snapshots: {_some([short_id(each) for each in damage.snapshots])}"
    if damage.files:
        yield f"  files: {_some([path_shown(each) for each in damage.files])}"


def _place_lines(report: CheckReport) -> Iterator[str]:
    if report.unreferenced_packs:
        unnamed = f"{count_text(report.unreferenced_packs, 'pack')} ({size_text(report.unreferenced_bytes)})"
        verb = "belongs" if report.unreferenced_packs == 1 else "belong"
        yield f"{unnamed} {verb} to no commit: a backup was cut short or is running, or log entries are missing."
    yield from _archived_lines(report)
    if report.condemned_packs:
        condemned = f"{count_text(report.condemned_packs, 'pack')} ({size_text(report.condemned_bytes)})"
        yield f"{condemned} condemned: the next `outlast prune` deletes what has waited long enough."
    if report.quarantined_packs:
        what = f"{count_text(report.quarantined_packs, 'damaged pack')} ({size_text(report.quarantined_bytes)})"
        yield f"{what} quarantined: `outlast prune` deletes what nothing needs."


def _archived_lines(report: CheckReport) -> Iterator[str]:
    if report.archived_packs:
        what = f"{count_text(report.archived_packs, 'pack')} ({size_text(report.archived_bytes)})"
        yield f"{what} archived: to read the data, `outlast repo thaw SNAPSHOT` comes first."


def _age_lines(report: CheckReport) -> Iterator[str]:
    """How much of the data was verified, and when."""
    if not report.bytes_verified:
        return
    since = report.verified_since[:10]
    if report.bytes_verified == report.bytes:
        yield f"All data was verified on {since} or later."
    else:
        done = f"{size_text(report.bytes_verified)} of {size_text(report.bytes)}"
        yield f"Of the data {done} was verified on {since} or later; the rest was not, or is damaged."


def _keyless_lines(report: CheckReport) -> Iterator[str]:
    yield from _damage_lines(report)
    what = (
        f"{count_text(report.packs, 'pack')}, {count_text(report.chunks, 'chunk')}; "
        f"{size_text(report.bytes_read)} read in {duration_text(report.seconds)}"
    )
    result = "No damage found" if report.ok else f"{count_text(len(report.damaged), 'object')} damaged"
    yield f"{result}. Checked without the passphrase {what}."
    yield from _archived_lines(report)
    if report.packs_unread > report.archived_packs:
        yield "The stored data itself was read only in part: `outlast check --data all` reads every byte."
    yield "Without the passphrase it can't be checked:"
    yield from (f"  {each}" for each in report.not_checked)


def _repair_lines(report: RepairReport, share: Share) -> Iterator[str]:
    from outlast.repo.pack import object_name

    if report.chunks_rescued:
        what = f"{count_text(report.chunks_rescued, 'chunk')} ({size_text(report.bytes_rescued)})"
        yield f"Stored again, out of packs that are damaged: {what}."
    if report.chunks_found:
        what = f"{count_text(report.chunks_found, 'chunk')} ({size_text(report.bytes_found)})"
        yield f"Stored again, from {printable(report.origin)}: {what}."
    if report.segments:
        yield f"Written anew: {count_text(report.segments, 'index segment')}."
    quarantined = [*map(object_name, report.quarantined), *report.ignored]
    if quarantined:
        yield f"Quarantined, not deleted: {_some(quarantined)}."
    told = {damage.object for damage in report.check.damaged}
    missing = [name for name in map(object_name, report.missing) if name not in told]
    if missing:
        yield f"Missing: {_some(missing)}."
    for each in report.lost:
        yield from _lost_lines(each)
    if report.more_lost:
        yield f"… and about {report.more_lost:,} more files that can't be restored whole."
    yield from _check_lines(report.check, share)
    if report.refused:
        yield report.refused
    elif report.ok and not (report.chunks_rescued or report.chunks_found or quarantined or missing):
        yield "Nothing was to be repaired."
    elif report.chunks_lost:
        lost = f"{count_text(report.chunks_lost, 'chunk')} ({size_text(report.bytes_lost)})"
        yield f"Beyond repair so far: {lost}. `--from` another repository, or a folder with the files, may have them."
        yield "Where nobody has them, `outlast forget` the snapshots named above, and `outlast prune` goes on."


def _lost_lines(file: LostFile) -> Iterator[str]:
    snapshots = _some([short_id(each) for each in file.snapshots])
    lost = f"{size_text(file.bytes_lost)} of {size_text(file.bytes)}"
    yield f"Lost: {path_shown(file.path)}: {lost}; snapshots {snapshots}"
    if file.tensors:
        names = [printable(name) for name in file.tensors]
        more = file.tensors_hurt - len(names)
        beyond = f" and {more:,} more" if more else ""
        yield f"  tensors: {_some(names)}{beyond} (the other {file.tensors_whole:,} are whole)"
    elif file.tensors is not None:
        yield f"  tensors: none; all {file.tensors_whole:,} are whole"
    elif file.problem:
        yield f"  tensors: {file.problem}"


def _some(items: list[str]) -> str:
    more = f" and {len(items) - _ITEMS_SHOWN:,} more" if len(items) > _ITEMS_SHOWN else ""
    return ", ".join(items[:_ITEMS_SHOWN]) + more


# -- what is understood --------------------------------------------------------------------------


def _share(text: str) -> Share:
    if text == "all" or text == "none":
        return cast(Literal["all", "none"], text)
    found = share_of("--data", text, hint="Write all, none or a percentage such as 10%.")
    if not found:
        raise InvalidInput("--data 0% reads nothing; nothing was read.", hint="Write none, or more than 0%.")
    return found
