"""The commands about storage classes: repo archive, repo thaw."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import click

from outlast.cli.command import PARTLY_DONE, Call, Command
from outlast.cli.protect import name_option, snapshot_argument
from outlast.cli.text import count_text, duration_text, printable, short_id, size_text, span_seconds
from outlast.cli.thawing import PRICES, TIERS, money, prices_of, started_lines, thaw_document, thaw_lines

if TYPE_CHECKING:
    from outlast.repo.archive import ArchiveReport
    from outlast.repo.archive_plan import ArchivePlan
    from outlast.repo.thaw_plan import Prices, Tier

_CODES = (10, 12, 20, 21)


@click.command(cls=Command, codes=(3, *_CODES), when_stopped="Every pack is whole; the same command goes on.")
@click.option("--class", "storage_class", required=True, metavar="CLASS", help="STANDARD_IA, GLACIER, DEEP_ARCHIVE, …")
@click.option("--older-than", metavar="SPAN", help="Only packs that were written so long ago, as 30d.")
@click.option("--dry-run", is_flag=True, help="Show what would be moved, and move nothing.")
@PRICES
def archive(call: Call, storage_class: str, older_than: str | None, dry_run: bool, config: str | None) -> int:
    """Move verified packs of a repository on S3 to a cheaper storage class.

    What tells of snapshots and of the content of packs stays: log, keys, index, lists of files, footers.
    """
    import msgspec

    from outlast.repo import archive as moving
    from outlast.repo.archive_plan import ArchivePolicy

    prices = prices_of(call, config)
    seconds = span_seconds("--older-than", older_than) if older_than else 0
    repository = call.repository()
    planned = moving.plan(repository, ArchivePolicy(storage_class.upper(), seconds))
    document = _archive_document(planned, prices)
    if dry_run:
        call.result({"dry_run": True, **document}, _archive_lines(planned, document), always=True)
        return 0
    report = moving.execute(repository, planned)
    call.result({**document, **msgspec.to_builtins(report)}, _moved_lines(planned, report))
    return PARTLY_DONE if report.failed else 0


def _archive_document(planned: ArchivePlan, prices: Prices) -> dict[str, Any]:
    import msgspec

    storage_class = planned.policy.storage_class
    before = sum(prices.of_month(each.storage_class, each.bytes) for each in planned.packs)
    return {
        "storage_class": storage_class,
        "packs": len(planned.packs),
        "bytes": planned.bytes,
        "left": msgspec.to_builtins(planned.left),
        "cost": round(prices.of_moves(storage_class, len(planned.packs)), 4),
        "month_before": round(before, 4),
        "month_after": round(prices.of_month(storage_class, planned.bytes), 4),
        "currency": prices.currency,
    }


def _archive_lines(planned: ArchivePlan, document: dict[str, Any]) -> Iterator[str]:
    from outlast.repo.archive_plan import DAYS_MIN

    storage_class, currency = planned.policy.storage_class, document["currency"]
    what = f"{count_text(len(planned.packs), 'pack')}, {size_text(planned.bytes)}"
    yield f"Would move {what}, to {storage_class}. Nothing was changed."
    if planned.packs:
        before, after = (money(document[name], currency) for name in ("month_before", "month_after"))
        yield f"Moving costs {money(document['cost'], currency)}; a month then {after} instead of {before}."
        if days := DAYS_MIN.get(storage_class):
            yield f"{count_text(days, 'day')} are billed, however soon it is deleted."
    yield from _left_lines(planned)


def _left_lines(planned: ArchivePlan) -> Iterator[str]:
    for each in planned.left:
        yield f"Stays: {count_text(each.packs, 'pack')}, {size_text(each.bytes)}: {each.reason}."


def _moved_lines(planned: ArchivePlan, report: ArchiveReport) -> Iterator[str]:
    what = f"{count_text(report.packs, 'pack')}, {size_text(report.bytes)}"
    yield f"Moved {what}, to {report.storage_class} in {duration_text(report.seconds)}."
    if report.manifests_stored_again:
        chunks = count_text(report.manifests_stored_again, "chunk")
        yield f"Lists of files were stored again, in a pack that stays: {chunks}."
    if report.kept_back:
        yield f"Stays: {count_text(report.kept_back, 'pack')}: lists of files have no other place."
    if report.failed:
        yield f"Not moved: {count_text(len(report.failed), 'pack')}. The same command tries again."
    yield from _left_lines(planned)


@click.command(cls=Command, codes=_CODES)
@snapshot_argument
@name_option
@click.option("--tier", type=TIERS, default="standard", show_default=True, help="How fast, and how dear.")
@click.option("--dry-run", is_flag=True, help="Show what would be thawed, how long it takes and what it costs.")
@PRICES
def thaw(call: Call, snapshot: str, name: str | None, tier: str, dry_run: bool, config: str | None) -> None:
    """Thaw the archived packs that a snapshot needs, for a restore, a copy or a check.

    Asking again for what is thawing changes nothing. What has thawed can be read for seven days.
    """
    from outlast.repo import thaw as thawing

    prices = prices_of(call, config)
    repository = call.readable_repository()
    chosen = call.snapshot(repository, snapshot, name)
    found = thawing.look(repository, thawing.Needed.by(repository, chosen), prices)
    way = cast("Tier", tier)
    if not dry_run:
        thawing.start(repository, found, way)
    document = {"dry_run": dry_run, "snapshot": chosen.id, "thaw": thaw_document(found)}
    if not dry_run:
        document["hours"] = found.hours_left(way, prices)
    heading = f"Snapshot {short_id(chosen.id)} of {printable(chosen.name)}:"
    lines = [heading, *thaw_lines(found), *([] if dry_run else started_lines(found, way, prices))]
    call.result(document, lines, always=dry_run)
