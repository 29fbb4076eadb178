"""The commands that keep data and bring it back: init, backup, snapshots, restore, check."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from outlast.cli.command import CORRUPT, PARTLY_DONE, Call
from outlast.cli.passphrase import new_secret
from outlast.cli.text import (
    count_text,
    duration_text,
    path_shown,
    printable,
    short_id,
    size_text,
    table,
    time_text,
)
from outlast.errors import InvalidInput

if TYPE_CHECKING:
    from outlast.backup.create import BackupReport
    from outlast.backup.restore import RestoreReport
    from outlast.backup.restore_plan import RestorePlan
    from outlast.records import Snapshot
    from outlast.repo.check import CheckReport

_FILES_SHOWN = 10

Tags = Annotated[
    list[str] | None, typer.Option("--tag", metavar="KEY=VALUE", help="A tag of the snapshot. May be repeated.")
]


def init(
    call: Call,
    encrypt: Annotated[
        bool, typer.Option("--encrypt", help="Encrypt with a passphrase. Lost passphrase, lost data.")
    ] = False,
    compression: Annotated[
        str, typer.Option(metavar="auto|none|zstd", help="auto compresses what gains from it, floats by byte planes.")
    ] = "auto",
) -> None:
    """Make a repository at --repo."""
    from outlast.repo.repository import Repository

    if compression not in ("auto", "none", "zstd"):
        raise InvalidInput(
            f"there is no compression {compression!r}; nothing was made.", hint="Known are auto, none and zstd."
        )
    file, command = call.options.passphrase_file, call.options.passphrase_command
    if not encrypt and (file or command):
        raise InvalidInput(
            "a passphrase was given, but not --encrypt; nothing was made.",
            hint="Add --encrypt, or leave the passphrase out.",
        )
    store = call.store()
    secret = new_secret(file, command) if encrypt else None
    kind = cast(Literal["auto", "none", "zstd"], compression)
    made = Repository.create(store, secret=secret, compression=kind, sink=call.printer)
    document = {
        "repository": made.format.id,
        "url": store.url,
        "version": made.format.version,
        "encrypted": encrypt,
        "compression": compression,
    }
    sealed = "encrypted; without the passphrase nobody can read it, you neither" if encrypt else "not encrypted"
    call.printer.result(document, [f"Made a repository at {printable(store.url)} ({sealed})."])


def backup(
    call: Call,
    path: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Folders and files to back up.", show_default=False)
    ],
    name: Annotated[
        str | None, typer.Option(help="What the snapshot is of. Default: the name of the first PATH.")
    ] = None,
    tag: Tags = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Leave out what fits; as in .gitignore. May be repeated.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Read every file, also those that look unchanged.")] = False,
) -> int:
    """Back up folders and files into one new snapshot."""
    import msgspec

    from outlast.backup.create import create

    tags = _tags(tag)
    report = create(
        call.repository(),
        [os.fsencode(source) for source in path],
        name=name,
        tags=tags,
        exclude=exclude or (),
        full=full,
    )
    call.printer.result(msgspec.to_builtins(report), _backup_lines(report))
    return PARTLY_DONE if report.unreadable or report.unstable else 0


def _backup_lines(report: BackupReport) -> Iterator[str]:
    what = f"{count_text(report.files, 'file')}, {size_text(report.bytes)}"
    yield (
        f"Snapshot {short_id(report.snapshot)} of {printable(report.name)}: {what}, in {duration_text(report.seconds)}."
    )
    yield f"New data: {size_text(report.bytes_added)}, stored in {size_text(report.bytes_stored)}."
    if report.unreadable:
        yield f"{count_text(report.unreadable, 'file')} could not be read: in this snapshot without content."
    if report.unstable:
        yield f"{count_text(report.unstable, 'file')} kept changing: in this snapshot as last read, marked unstable."


def snapshots(
    call: Call,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Only those of this name.")] = None,
    tag: Tags = None,
) -> int:
    """List the snapshots, oldest first."""
    tags = _tags(tag)
    found = [
        snapshot
        for snapshot in call.readable_repository().snapshots()
        if (name is None or snapshot.name == name) and tags.items() <= snapshot.tags.items()
    ]
    call.printer.result([snapshot_document(each) for each in found], _snapshot_lines(found), always=True)
    return CORRUPT if call.warnings else 0


def _snapshot_lines(found: list[Snapshot]) -> Iterator[str]:
    if not found:
        yield "No snapshots."
        return
    yield from table(
        ("ID", "TIME (UTC)", "NAME", "FILES", "SIZE", "ADDED", "TAGS"),
        (
            (
                short_id(each.id),
                time_text(each.time),
                printable(each.name),
                f"{each.files:,}",
                size_text(each.bytes),
                size_text(each.bytes_added),
                tags_text(each) + _flaws(each),
            )
            for each in found
        ),
        right="FILES SIZE ADDED",
    )


def snapshot_document(snapshot: Snapshot) -> dict[str, Any]:
    """What JSON says about a snapshot, wherever one is listed."""
    names = ("id", "kind", "time", "name", "tags", "files", "bytes", "bytes_added", "bytes_stored")
    more = ("unreadable", "unstable", "host", "sources", "parent", "program")
    return {name: getattr(snapshot, name) for name in (*names, *more)}


def tags_text(snapshot: Snapshot) -> str:
    return printable(" ".join(f"{key}={value}" for key, value in snapshot.tags.items()))


def _flaws(snapshot: Snapshot) -> str:
    flaws = [
        f"{count:,} {what}"
        for count, what in ((snapshot.unreadable, "unreadable"), (snapshot.unstable, "unstable"))
        if count
    ]
    return f"  ({', '.join(flaws)})" if flaws else ""


def restore(
    call: Call,
    snapshot: Annotated[str, typer.Argument(metavar="SNAPSHOT", help="The first characters of an id, or `latest`.")],
    to: Annotated[str, typer.Option("--to", metavar="DIR", help="The folder; with --tensor, the .safetensors file.")],
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Take SNAPSHOT from those of this name.")] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Only files that fit. May be repeated.")
    ] = None,
    tensor: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only tensors of this name or glob. May be repeated.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and do nothing.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Don't keep what is replaced as DIR.before-<time>.")
    ] = False,
) -> int:
    """Bring a snapshot back, every chunk verified. The target changes at one instant, at the end."""
    import msgspec

    from outlast.backup.restore import execute, plan
    from outlast.backup.tensors import restore_tensors

    if tensor and dry_run:
        raise InvalidInput("--dry-run does not go with --tensor; nothing was done.", hint="Leave one of them out.")
    repository = call.readable_repository()
    chosen = call.snapshot(repository, snapshot, name)
    target = os.fsencode(to)
    if tensor:
        report = restore_tensors(repository, chosen, tensor, target, include=include or (), overwrite=overwrite)
    else:
        planned = plan(repository, chosen, target, include=include or (), overwrite=overwrite)
        if dry_run:
            call.result(_plan_document(planned), _plan_lines(planned), always=True)
            return 0
        report = execute(repository, planned)
    call.result(msgspec.to_builtins(report), _restore_lines(report, to))
    return PARTLY_DONE if report.skipped else 0


def _restore_lines(report: RestoreReport, to: str) -> Iterator[str]:
    yield (
        f"Restored {count_text(report.files, 'file')}, {size_text(report.bytes)}, from snapshot "
        f"{short_id(report.snapshot)} to {printable(to)} in {duration_text(report.seconds)}."
    )
    yield f"Fetched {size_text(report.bytes_fetched)}; every byte was verified."
    if report.kept_as:
        yield f"What was there before is kept as {path_shown(report.kept_as)}."
    for each in report.skipped[:_FILES_SHOWN]:
        yield f"Not as it was: {path_shown(each.path)}: {printable(each.reason)}"
    if len(report.skipped) > _FILES_SHOWN:
        yield f"… and {len(report.skipped) - _FILES_SHOWN:,} more."


def _plan_document(plan: RestorePlan) -> dict[str, Any]:
    from outlast.records import path_text

    names = ("path", "bytes", "bytes_to_fetch", "action")
    return {
        "dry_run": True,
        "snapshot": plan.snapshot.id,
        "target": path_text(plan.target),
        "files": plan.files,
        "bytes": plan.bytes,
        "bytes_present": plan.bytes_present,
        "bytes_to_fetch": plan.bytes_to_fetch,
        "kept_as": path_text(plan.kept_as) if plan.kept_as else "",
        "actions": [dict(zip(names, action, strict=True)) for action in plan.actions],
    }


def _plan_lines(plan: RestorePlan) -> Iterator[str]:
    from outlast.records import path_text

    for path, size, fetch, what in plan.actions:
        if what != "present":
            yield f"{what:<8}  {size_text(size):>10}  {path_shown(path)}" + (
                f"  ({size_text(fetch)} to fetch)" if what == "repair" else ""
            )
    present = sum(action[3] == "present" for action in plan.actions)
    yield (
        f"Would restore {count_text(plan.files, 'file')}, {size_text(plan.bytes)}, from snapshot "
        f"{short_id(plan.snapshot.id)} to {path_shown(path_text(plan.target))}."
    )
    yield (
        f"Already right: {count_text(present, 'item')}, {size_text(plan.bytes_present)}. "
        f"To fetch: {size_text(plan.bytes_to_fetch)}. Nothing was changed."
    )
    if plan.kept_as:
        yield f"What is there now would be kept as {path_shown(path_text(plan.kept_as))}."


def check(
    call: Call,
    data: Annotated[
        str, typer.Option(metavar="all|none|N%", help="How much of the stored data to read besides the structure.")
    ] = "none",
) -> int:
    """Verify the repository, and name what is damaged and which snapshots and files need it."""
    import msgspec

    share = _share(data)
    report = call.check(share)
    call.printer.result(msgspec.to_builtins(report), _check_lines(report, share), always=not report.ok)
    return 0 if report.ok else CORRUPT


def _check_lines(report: CheckReport, share: Literal["all", "none"] | float) -> Iterator[str]:
    for damage in report.damaged:
        yield f"Damaged: {printable(damage.object)}: {printable(damage.problem)}"
        if damage.snapshots:
            yield f"  snapshots: {_some([short_id(each) for each in damage.snapshots])}"
        if damage.files:
            yield f"  files: {_some([path_shown(each) for each in damage.files])}"
    what = (
        f"{count_text(report.snapshots, 'snapshot')}, {count_text(report.packs, 'pack')}, "
        f"{count_text(report.chunks, 'chunk')}; {size_text(report.bytes_read)} read in {duration_text(report.seconds)}"
    )
    if not report.ok:
        yield f"{count_text(len(report.damaged), 'object')} damaged. Checked {what}."
    else:
        yield f"No damage found. Checked {what}."
    if share not in ("all", 1.0):
        unread = "was not read" if share == "none" else "was read only in part"
        yield f"The stored data itself {unread}: `outlast check --data all` reads every byte."
    elif not report.ok:
        yield "Everything not named above is whole and can be restored."


def _some(items: list[str]) -> str:
    more = f" and {len(items) - _FILES_SHOWN:,} more" if len(items) > _FILES_SHOWN else ""
    return ", ".join(items[:_FILES_SHOWN]) + more


def _share(text: str) -> Literal["all", "none"] | float:
    if text == "all" or text == "none":
        return cast(Literal["all", "none"], text)
    try:
        share = float(text.removesuffix("%")) / 100 if text.endswith("%") else -1.0
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise InvalidInput(
            f"--data {text!r} is none of all, none and N%; nothing was read.", hint="For example: --data 10%."
        )
    return share


def _tags(given: list[str] | None) -> dict[str, str]:
    tags = {}
    for tag in given or ():
        key, separator, value = tag.partition("=")
        if not key or not separator:
            raise InvalidInput(
                f"the tag {tag!r} is not of the form KEY=VALUE; nothing was done.", hint="For example: --tag run=42."
            )
        tags[key] = value
    return tags
