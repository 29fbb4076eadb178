"""The commands that keep data and bring it back: init, backup, snapshots, restore."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import click

from outlast.cli.agent import CONFIG, is_by_config, load, tiers
from outlast.cli.command import CORRUPT, PARTLY_DONE, Argument, Call, Command
from outlast.cli.passphrase import VARIABLE, Secret, is_given, new_secret
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
from outlast.cli.thawing import TIERS, ArchivedPart
from outlast.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    from outlast.backup.create import BackupReport
    from outlast.backup.nearest import Holder, Source
    from outlast.backup.restore import RestoreReport
    from outlast.backup.restore_plan import Action, RestorePlan
    from outlast.records import Snapshot
    from outlast.repo.repository import Repository
    from outlast.repo.thaw_plan import Prices
    from outlast.store.base import ObjectStore

_FILES_SHOWN = 10

snapshot_argument = click.argument(
    "snapshot",
    cls=Argument,
    metavar="SNAPSHOT",
    help="The first characters of an id, or `latest`; of a training run RUN (its latest), RUN@STEP, or the best by a "
    "metric: RUN@loss:min, RUN@accuracy:max.",
)
name_option = click.option("--name", metavar="NAME", help="Take snapshots from those of this name.")
_tag_option = click.option("--tag", multiple=True, metavar="KEY=VALUE", help="A tag of the snapshot. May be repeated.")


@click.command(
    cls=Command, codes=(12, 21), when_stopped="There is either a whole repository or none: `outlast snapshots` tells."
)
@click.option("--encrypt", is_flag=True, help="Encrypt with a passphrase. Lost passphrase, lost data.")
@click.option(
    "--compression",
    metavar="auto|none|zstd",
    default="auto",
    show_default=True,
    help="auto compresses what gains from it, floats by byte planes.",
)
@click.option(
    "--lock-days",
    type=click.IntRange(min=1, max=36_500),
    metavar="N",
    help="Let nobody delete what is stored for N days after it was (S3 buckets with Object Lock).",
)
@click.option("--config", metavar="FILE", help="Make each tier of this configuration that is not there yet.")
def init(call: Call, encrypt: bool, compression: str, lock_days: int | None, config: str | None) -> None:
    """Make a repository at --repo; or with --config those of all tiers that have none."""
    from outlast.repo.repository import Repository

    if compression not in ("auto", "none", "zstd"):
        raise InvalidInput(
            f"there is no compression {compression!r}; nothing was made.", hint="Known are auto, none and zstd."
        )
    file, command = call.options.passphrase_file, call.options.passphrase_command
    if not encrypt and is_given(file, command):
        raise InvalidInput(
            "a passphrase was given, but not --encrypt; nothing was made.",
            hint=f"Add --encrypt, or leave the passphrase out (unset {VARIABLE}, or drop the option).",
        )
    kind = cast(Literal["auto", "none", "zstd"], compression)
    if config is not None:
        _init_tiers(call, config, kind, new_secret(file, command) if encrypt else None, lock_days or 0)
        return
    store = call.store()
    secret = new_secret(file, command) if encrypt else None
    made = Repository.create(store, secret=secret, compression=kind, lock_days=lock_days or 0, sink=call.printer)
    document = {
        "repository": made.format.id,
        "url": store.url,
        "version": made.format.version,
        "encrypted": encrypt,
        "compression": compression,
        "lock_days": lock_days or 0,
    }
    sealed = "encrypted; without the passphrase nobody can read it, you neither" if encrypt else "not encrypted"
    lines = [f"Made a repository at {printable(store.url)} ({sealed})."]
    if lock_days:
        lines.append(f"Each object is locked: until {count_text(lock_days, 'day')} after, nobody can delete it.")
    call.printer.result(document, lines)


def _init_tiers(
    call: Call, config: str, compression: Literal["auto", "none", "zstd"], secret: Secret | None, lock_days: int
) -> None:
    from outlast import expect_encrypted
    from outlast.errors import NoRepository
    from outlast.repo.repository import Repository
    from outlast.store.layers import open_store

    secret = cache(secret) if secret else None
    made: dict[str, ObjectStore] = {}
    there: list[str] = []
    for tier in load(call, config).policy.tiers:
        store = open_store(tier.url)
        try:
            found = Repository.connect(store, secret=secret)
            if secret:
                expect_encrypted(found)
            there.append(tier.name)
        except NoRepository:
            made[tier.name] = store
    for store in made.values():  # once it is known that the others are there, and open with this passphrase or without
        Repository.create(store, secret=secret, compression=compression, lock_days=lock_days, sink=call.printer)
    lines = [f"Made {count_text(len(made), 'tier')}: {', '.join(made)}." if made else "Made no tier."]
    if there:
        lines.append(f"There already: {', '.join(there)}.")
    call.printer.result({"made": list(made), "there": there}, lines)


@click.command(
    cls=Command,
    codes=(3, 10, 12, 20, 21),
    when_stopped="What was committed is whole: see `outlast snapshots`. The next backup uses what was already stored.",
)
@click.argument("path", cls=Argument, nargs=-1, required=True, metavar="PATH...", help="Folders and files to back up.")
@click.option("--name", metavar="NAME", help="What the snapshot is of. Default: the name of the first PATH.")
@_tag_option
@click.option(
    "--exclude", multiple=True, metavar="GLOB", help="Leave out what fits; as in .gitignore. May be repeated."
)
@click.option("--full", is_flag=True, help="Read every file, also those that look unchanged.")
def backup(
    call: Call, path: Sequence[str], name: str | None, tag: Sequence[str], exclude: Sequence[str], full: bool
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
        exclude=exclude,
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


@click.command(cls=Command, codes=(10, 12, 20, 21))
@click.option("--name", metavar="NAME", help="Only those of this name.")
@_tag_option
def snapshots(call: Call, name: str | None, tag: Sequence[str]) -> int:
    """List the snapshots, oldest first."""
    tags = _tags(tag)
    repository = call.readable_repository()
    every = sorted(repository.snapshots(), key=lambda snapshot: snapshot.time)
    named = [snapshot for snapshot in every if name is None or snapshot.name == name]
    if every and not named:
        try:
            repository.find_snapshot("latest", name)
        except NotFound as exc:  # the same words as where one snapshot is asked for
            call.printer.warn(exc.message)
    _warn_of_the_future(call, repository, named)
    found = [snapshot for snapshot in named if tags.items() <= snapshot.tags.items()]
    call.printer.result([snapshot_document(each) for each in found], _snapshot_lines(found), always=True)
    return CORRUPT if call.warnings else 0


def _warn_of_the_future(call: Call, repository: Repository, every: list[Snapshot]) -> None:
    """What a wrong clock made, or a forgery, is `latest` until its time has come."""
    from outlast.records import time_text as rfc3339
    from outlast.repo.retention import FUTURE_SECONDS_MAX

    limit = rfc3339(repository.clock.now_ns() + FUTURE_SECONDS_MAX * 10**9)
    if every and (each := every[-1]).time > limit:
        known = f"snapshot {short_id(each.id)} of {each.name} lies in the future ({time_text(each.time)})"
        call.printer.warn(f"{known}, so `latest` means it. To remove it: `outlast forget {short_id(each.id)}`.")


def _snapshot_lines(found: list[Snapshot]) -> Iterator[str]:
    if not found:
        yield "No snapshots."
        return
    yield from table(
        ("ID", "TIME (UTC)", "NAME", "FILES", "SIZE", "ADDED", "TAGS"),
        (
            (
                short_id(each.id),
                printable(time_text(each.time)),
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


@click.command(
    cls=Command,
    codes=(3, 10, 11, 12, 20, 21),
    when_stopped="Every file at the target is whole, as it was or as restored; the same command goes on from here.",
)
@snapshot_argument
@click.option("--to", required=True, metavar="DIR", help="The folder; with --tensor, the .safetensors file.")
@name_option
@click.option("--include", multiple=True, metavar="GLOB", help="Only files that fit. May be repeated.")
@click.option("--tensor", multiple=True, metavar="NAME", help="Only tensors of this name or glob. May be repeated.")
@click.option("--dry-run", is_flag=True, help="Show what would be done, and do nothing.")
@click.option("--overwrite", is_flag=True, help="Don't keep what is replaced as DIR.before-<time>.")
@click.option(
    "--also",
    multiple=True,
    metavar="URL",
    help="Another repository that may have it; the fastest first. May be repeated.",
)
@click.option("--thaw", type=TIERS, help="Thaw what is archived, and fetch what has thawed.")
@click.option("--wait", is_flag=True, help="With --thaw: wait until all has thawed.")
@CONFIG
def restore(
    call: Call,
    snapshot: str,
    to: str,
    name: str | None,
    include: Sequence[str],
    tensor: Sequence[str],
    dry_run: bool,
    overwrite: bool,
    also: Sequence[str],
    thaw: str | None,
    wait: bool,
    config: str | None,
) -> int:
    """Bring a snapshot back, every chunk verified. The target changes at one instant, at the end.

    With --also each chunk comes from the first repository that has it whole, beginning with --repo. Where no
    repository is named the tiers of outlast.yaml are meant, in their order, archived ones last; with --thaw the
    archived one alone.
    """
    import msgspec

    from outlast.backup.restore import execute, plan
    from outlast.backup.tensors import restore_tensors
    from outlast.backup.thawed import Thawing

    if tensor and (dry_run or thaw):
        option = "--dry-run" if dry_run else "--thaw"
        hint = "Leave one of them out." if dry_run else "`outlast repo thaw SNAPSHOT` first."
        raise InvalidInput(f"{option} does not go with --tensor; nothing was done.", hint=hint)
    if wait and not thaw:
        raise InvalidInput("--wait goes with --thaw alone; nothing was done.", hint="Add --thaw standard.")
    repository, chosen, frozen, prices = _origin(call, snapshot, name, also, config, thaw=bool(thaw))
    target = os.fsencode(to)
    if tensor:
        report = restore_tensors(repository, chosen, tensor, target, include=include, overwrite=overwrite)
    else:
        actions: list[Action] = []
        note = actions.append if dry_run else None
        archived = ArchivedPart(repository, frozen, thaw, prices, dry_run=dry_run) if frozen else None
        need = archived.need if archived else None
        planned = plan(repository, chosen, target, include=include, overwrite=overwrite, note=note, need=need)
        if archived:
            archived.look()
        for glob in _unfit(include, planned, repository):
            call.warnings.append(f"the pattern {glob!r} fits nothing.")
            call.printer.warn(call.warnings[-1])
        if dry_run:
            document, lines = _plan_document(planned, actions), list(_plan_lines(planned, actions))
            if archived:
                document, lines = {**document, **archived.document()}, [*lines, *archived.lines()]
            call.result(document, lines, always=True)
            return 0
        if archived and archived.matters:
            done = archived.restore(planned, wait=wait)
            if isinstance(done, Thawing):
                return archived.tell(call, done)
            report = done
        else:
            report = execute(repository, planned)
    call.result(msgspec.to_builtins(report), _restore_lines(report, chosen, to))
    return PARTLY_DONE if report.skipped else 0


class _Origin(NamedTuple):
    """What to restore from, and which snapshot of it. `frozen`: the repository whose packs may be archived."""

    holder: Holder
    snapshot: Snapshot
    frozen: Repository | None
    prices: Prices


def _origin(
    call: Call, reference: str, name: str | None, also: Sequence[str], config: str | None, *, thaw: bool
) -> _Origin:
    from outlast.backup.nearest import Nearest
    from outlast.repo.naming import Together
    from outlast.repo.thaw_plan import Prices

    if is_by_config(call, config):
        return _origin_by_config(call, reference, name, config, thaw=thaw)
    if not also:
        repository = call.readable_repository()
        return _Origin(repository, call.snapshot(repository, reference, name), repository, Prices())
    if thaw:
        hint = "Name the one whose packs are archived: --repo URL."
        raise InvalidInput("--thaw goes with one repository alone; nothing was done.", hint=hint)
    repositories = call.readable_repositories(also)
    nearest = Nearest(repositories, call.snapshot(Together(repositories), reference, name).id)
    return _Origin(nearest, nearest.snapshot, None, Prices())


def _origin_by_config(call: Call, reference: str, name: str | None, config: str | None, *, thaw: bool) -> _Origin:
    """All tiers, and of those that are archived only what no other has; with `thaw` the archived one alone."""
    from outlast.backup.nearest import Nearest
    from outlast.repo.naming import Together

    policy = load(call, config).policy
    archived = [tier for tier in policy.tiers if tier.archive_class]
    if thaw and len(archived) != 1:
        which = f"{' and '.join(each.name for each in archived)} are" if archived else "no tier of the configuration is"
        hint = "Name the one whose packs are archived: `outlast --repo URL restore ... --thaw standard`."
        raise InvalidInput(f"{which} archived; nothing was done.", hint=hint)
    opened = tiers(call, policy)
    last = {tier.name for tier in archived}
    repositories = [opened[each] for each in sorted(opened, key=last.__contains__)]
    chosen = call.snapshot(Together(repositories), reference, name)
    frozen = opened.get(archived[0].name) if len(archived) == 1 else None
    if not thaw:
        nearest = Nearest(repositories, chosen.id)
        return _Origin(nearest, nearest.snapshot, frozen, policy.prices)
    held = frozen.state.snapshots.get(chosen.id) if frozen else None
    if frozen is None or held is None:
        where = f"{archived[0].name}, the tier that is archived"
        hint = "Leave --thaw out: another tier has it."
        raise NotFound(f"snapshot {short_id(chosen.id)} is not in {where}; nothing was done.", hint=hint)
    return _Origin(frozen, held, frozen, policy.prices)


def _unfit(globs: Sequence[str], plan: RestorePlan, repository: Holder) -> list[str]:
    """The patterns that fit none of what is restored; a single one that fits nothing is an error before."""
    from outlast.backup.selection import matcher

    unfit = {glob: matcher([glob]) for glob in globs} if len(globs) > 1 else {}
    for item in plan.entries(repository) if unfit else ():
        unfit = {glob: fits for glob, fits in unfit.items() if not fits(item[0])}
        if not unfit:
            break
    return list(unfit)


def _restore_lines(report: RestoreReport, snapshot: Snapshot, to: str) -> Iterator[str]:
    what = count_text(len(report.tensors), "tensor") if report.tensors else count_text(report.files, "file")
    place = path_shown(report.path) if report.tensors else printable(to)  # tensors name the file in the folder
    yield (
        f"Restored {what}, {size_text(report.bytes)}, from snapshot "
        f"{short_id(report.snapshot)} of {printable(snapshot.name)} to {place} "
        f"in {duration_text(report.seconds)}."
    )
    yield f"Fetched {size_text(report.bytes_fetched)}; every byte was verified."
    if told := _sources_text(report.sources, report.path):
        yield f"From {told}."
    if report.kept_as:
        yield f"What was there before is kept as {path_shown(report.kept_as)}."
    if report.kept_files:
        yield f"Kept beside the new ones, as NAME.before-<time>: {count_text(report.kept_files, 'old item')}."
    for name, given in islice(report.renamed.items(), _FILES_SHOWN):
        yield f"The tensor {printable(name)} is there as {printable(given)}."
    if len(report.renamed) > _FILES_SHOWN:
        yield f"… and {len(report.renamed) - _FILES_SHOWN:,} more such names; --json has them all."
    for each in report.skipped[:_FILES_SHOWN]:
        yield f"Not as it was: {path_shown(each.path)}: {printable(each.reason)}"
    if len(report.skipped) > _FILES_SHOWN:
        yield f"… and {len(report.skipped) - _FILES_SHOWN:,} more."


def _sources_text(sources: Sequence[Source], target: str) -> str:
    """Empty where there is nothing to tell apart."""
    repositories = [each for each in sources if each.where != target]
    parts = []
    for each in repositories:
        failed = f" ({count_text(each.failed, 'chunk')} could not be had there)" if each.failed else ""
        if each.bytes or failed:
            parts.append(f"{printable(each.where) or 'nowhere'}: {size_text(each.bytes)}{failed}")
    there = [f"already there: {size_text(each.bytes)}" for each in sources if each.where == target and each.bytes]
    return "; ".join(parts + there) if parts and (there or len(repositories) > 1) else ""


def _plan_document(plan: RestorePlan, actions: list[Action]) -> dict[str, Any]:
    import msgspec

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
        "sources": msgspec.to_builtins(plan.sources),
        "bytes_holes": plan.bytes_holes,
        "extra_files": plan.extra_files,
        "extra_bytes": plan.extra_bytes,
        "kept_as": path_text(plan.kept_as) if plan.kept_as else "",
        "actions": [dict(zip(names, action, strict=True)) for action in actions],
    }


def _plan_lines(plan: RestorePlan, actions: list[Action]) -> Iterator[str]:
    from outlast.records import path_text

    for path, size, fetch, what in actions:
        if what != "present":
            yield f"{what:<10}  {size_text(size):>10}  {path_shown(path)}" + (
                f"  ({size_text(fetch)} to fetch)" if what == "repair" else ""
            )
    present = sum(action[3] == "present" for action in actions)
    yield (
        f"Would restore {count_text(plan.files, 'file')}, {size_text(plan.bytes)}, from snapshot "
        f"{short_id(plan.snapshot.id)} of {printable(plan.snapshot.name)} to {path_shown(path_text(plan.target))}."
    )
    yield (
        f"Already right: {count_text(present, 'item')}, {size_text(plan.bytes_present)}. "
        f"To fetch: {size_text(plan.bytes_to_fetch)}. Nothing was changed."
    )
    if told := _sources_text(plan.sources, path_text(plan.target)):
        yield f"It would come from {told}."
    if plan.extra_files:
        gone = "removed" if plan.overwrite else "moved away"
        extra = f"{count_text(plan.extra_files, 'item')}, {size_text(plan.extra_bytes)}"
        yield f"Only at the target, and not in the snapshot: {extra}; would be {gone}."
    if plan.kept_as:
        yield f"What is there now would be kept as {path_shown(path_text(plan.kept_as))}."
    if plan.mode == "merge" and not plan.overwrite and not plan.unchanged:
        yield "Files that are replaced would be kept beside the new ones, as NAME.before-<time>."


def _tags(given: Sequence[str]) -> dict[str, str]:
    tags = {}
    for tag in given:
        key, separator, value = tag.partition("=")
        if not key or not separator:
            raise InvalidInput(
                f"the tag {tag!r} is not of the form KEY=VALUE; nothing was done.", hint="For example: --tag run=42."
            )
        if key in tags:
            raise InvalidInput(
                f"the tag {key!r} was given twice; nothing was done.", hint="A snapshot has one value for each key."
            )
        tags[key] = value
    return tags
