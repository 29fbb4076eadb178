"""The commands that give space back: forget, prune."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from outlast.cli.command import Argument, Call, Command
from outlast.cli.text import (
    count_text,
    duration_text,
    printable,
    share_of,
    short_id,
    size_text,
    span_seconds,
    table,
    time_text,
)
from outlast.errors import InvalidInput, Refused

if TYPE_CHECKING:
    from outlast.repo.forget import ForgetPlan, ForgetReport
    from outlast.repo.prune import PrunePlan, PruneReport
    from outlast.repo.prune_plan import Decided
    from outlast.repo.repository import Repository
    from outlast.repo.retention import Policy


Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def _keep_option(period: str, what: str) -> Callable[[Decorated], Decorated]:
    return click.option(f"--keep-{period}", type=click.IntRange(min=0), metavar="N", help=f"Keep the newest of {what}.")


_KEEP_OPTIONS = (
    click.option("--keep-last", type=click.IntRange(min=0), metavar="N", help="Keep the N that were committed last."),
    _keep_option("hourly", "each of the last N hours that have one"),
    _keep_option("daily", "each of the last N days that have one"),
    _keep_option("weekly", "each of the last N weeks that have one (ISO weeks, from Monday)"),
    _keep_option("monthly", "each of the last N months that have one"),
    click.option(
        "--keep-within",
        metavar="DURATION",
        help="Keep all that are at most so much older than the newest: 30d, 12h, 2w, 1y5m7d2h (m is a month).",
    ),
    click.option(
        "--keep-tag", multiple=True, metavar="KEY[=VALUE]", help="Keep all that have this tag. May be repeated."
    ),
)


def keep_options(command: Decorated) -> Decorated:
    """The rules by which snapshots are kept, for `policy_of`."""
    for option in reversed(_KEEP_OPTIONS):
        command = option(command)
    return command


@click.command(
    cls=Command,
    codes=(10, 12, 20, 21),
    when_stopped="Either all of them are forgotten or none is: `outlast snapshots` tells.",
)
@click.argument(
    "snapshot",
    cls=Argument,
    nargs=-1,
    metavar="[SNAPSHOT]...",
    help="Forget these: the first characters of an id, `latest`, RUN@STEP or RUN@loss:max. Not together with --keep-….",
)
@click.option("--name", metavar="NAME", help="Look only at snapshots of this name.")
@keep_options
@click.option("--allow-empty", is_flag=True, help="Forget also the last snapshot of a name.")
@click.option("--dry-run", is_flag=True, help="Show each decision, and do nothing.")
def forget(
    call: Call,
    snapshot: Sequence[str],
    name: str | None,
    keep_within: str | None,
    keep_tag: Sequence[str],
    allow_empty: bool,
    dry_run: bool,
    **counts: int | None,
) -> int:
    """Forget snapshots: those named, or all that no --keep rule keeps.

    Snapshots of one name are judged together; times are UTC. What one rule keeps stays, and so does
    whatever has a time more than a day ahead. The space is freed by `outlast prune`.
    """
    from outlast.repo.forget import execute, plan

    policy = policy_of(counts, keep_within, keep_tag)
    repository = call.repository()
    ids = [_id_of(repository, each, name) for each in snapshot]
    planned = plan(repository, name=name, policy=policy, ids=ids)
    _warn_of_unused_tags(call, planned, keep_tag)
    if dry_run:
        refusal = "" if allow_empty else planned.refusal
        document = {"dry_run": True, "refused": refusal, **_document(planned)}
        call.result(document, _plan_lines(planned, refusal), always=True)
        return Refused.exit_code if refusal else 0
    report = execute(repository, planned, allow_empty=allow_empty)
    done = {"forgotten": report.forgotten, "already_gone": report.already_gone, "entry": report.entry}
    call.result({"dry_run": False, "refused": "", **_document(planned), **done}, _report_lines(planned, report))
    return 0


def _id_of(repository: Repository, reference: str, name: str | None) -> str:
    """Raises `InvalidInput` for a run as a whole: it would be forgotten by its latest checkpoint alone."""
    from outlast.checkpoint.references import find

    found = find(repository, reference, name)
    if found.kind == "checkpoint" and reference == found.name:
        raise InvalidInput(
            f"{reference} is a run, and which of its checkpoints are meant was not said; nothing was forgotten.",
            hint=f"Name one, such as {reference}@{found.tags['step']}, or say what to keep by --name {reference}.",
        )
    return found.id


def policy_of(counts: dict[str, int | None], within: str | None, tags: Sequence[str]) -> Policy | None:
    """The rules, None where no --keep option was given. Raises `InvalidInput`."""
    from outlast.repo.retention import Policy, duration_seconds

    rules = {option.removeprefix("keep_"): count for option, count in counts.items() if count is not None}
    if within is not None:
        rules["within_seconds"] = duration_seconds(within)
    return Policy(**rules, tags=tuple(dict.fromkeys(tags))) if rules or tags else None


def _warn_of_unused_tags(call: Call, plan: ForgetPlan, tags: Sequence[str]) -> None:
    """A tag that no snapshot has is mostly misspelt, and what it was to keep would go."""
    from outlast.repo.retention import has_tag

    for tag in tags:
        if not any(has_tag(decision.snapshot, tag) for decision in plan.decisions):
            call.warnings.append(f"no snapshot has the tag {tag!r}, so it keeps nothing.")
            call.printer.warn(call.warnings[-1])


def _document(plan: ForgetPlan) -> dict[str, Any]:
    gone = plan.forgotten()
    return {
        "snapshots": len(plan.decisions),
        "forgotten": [snapshot.id for snapshot in gone],
        "decisions": [
            {
                "snapshot": each.snapshot.id,
                "name": each.snapshot.name,
                "time": each.snapshot.time,
                "keep": each.keep,
                "reasons": each.reasons,
            }
            for each in plan.decisions
        ],
    }


def _decision_lines(plan: ForgetPlan) -> Iterator[str]:
    if plan.decisions:
        yield from table(
            ("ID", "TIME (UTC)", "NAME", "DECISION", "REASONS"),
            (
                (
                    short_id(each.snapshot.id),
                    printable(time_text(each.snapshot.time)),
                    printable(each.snapshot.name),
                    "keep" if each.keep else "forget",
                    printable(", ".join(each.reasons)),
                )
                for each in plan.decisions
            ),
        )


def _plan_lines(plan: ForgetPlan, refusal: str) -> Iterator[str]:
    yield from _decision_lines(plan)
    gone = len(plan.forgotten())
    yield f"Would forget {_of(gone, len(plan.decisions))}. Nothing was changed."
    if refusal:
        yield printable(f"It would be refused: {refusal} --allow-empty allows it.")


def _report_lines(plan: ForgetPlan, report: ForgetReport) -> Iterator[str]:
    yield from _decision_lines(plan)
    if report.already_gone:
        yield f"Forgotten by somebody else meanwhile: {count_text(len(report.already_gone), 'snapshot')}."
    if report.forgotten:
        yield f"Forgot {_of(len(report.forgotten), len(plan.decisions))}. `outlast prune` frees the space."
    else:
        yield "Forgot no snapshot."


def _of(count: int, every: int) -> str:
    """
    >>> _of(2, 5), _of(1, 1)
    ('2 of 5 snapshots', '1 snapshot')
    """
    return count_text(count, "snapshot") if count == every else f"{count:,} of {count_text(every, 'snapshot')}"


@click.command(
    cls=Command,
    codes=(10, 11, 12, 20, 21),
    when_stopped="No snapshot is touched: the same command goes on from here.",
)
@click.option(
    "--max-unused",
    metavar="N%",
    default="5%",
    show_default=True,
    help="Unneeded data may stay, up to this share, in packs that also hold needed data.",
)
@click.option(
    "--max-delete",
    metavar="N%",
    default="50%",
    show_default=True,
    help="Stop, with exit code 21, when more than this share of all bytes would newly be condemned.",
)
@click.option(
    "--grace",
    metavar="DURATION",
    default="1d",
    show_default=True,
    help="How long condemned packs stay readable, for restores that run: 12h, 1d; 0 for not at all.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be done, and do nothing.")
def prune(call: Call, max_unused: str, max_delete: str, grace: str, dry_run: bool) -> int:
    """Free the space of what no snapshot needs, while backups, restores and checks go on.

    It takes two runs. One condemns packs: they stay readable, but nothing new relies on them. One that comes
    at least --grace later deletes them, unless a snapshot needs them again.
    """
    import msgspec

    from outlast.repo import prune as pruning
    from outlast.repo.prune_plan import Policy

    grace_seconds = 0 if grace.strip() == "0" else span_seconds("--grace", grace)
    policy = Policy(share_of("--max-unused", max_unused), share_of("--max-delete", max_delete), grace_seconds)
    repository = call.repository()
    if dry_run:
        planned = pruning.plan(repository, policy, dry_run=True)
        refusal = pruning.refusal(planned)
        document = {"dry_run": True, "refused": refusal, **_prune_document(planned.decided)}
        call.result(document, _prune_plan_lines(planned, refusal), always=True)
        return Refused.exit_code if refusal else 0
    report = pruning.prune(repository, policy)
    done = msgspec.to_builtins(report)
    del done["decided"]
    assert report.decided is not None
    document = {"dry_run": False, "refused": "", **_prune_document(report.decided), **done}
    call.result(document, _prune_lines(report, grace))
    return 0


def _prune_document(decided: Decided) -> dict[str, Any]:
    return {
        "bytes": decided.bytes_total,
        "bytes_needed": decided.bytes_needed,
        "bytes_to_free": decided.bytes_freed,
        "packs": [
            {"pack": each.pack, "action": each.action, "bytes": each.bytes, "reason": each.reason}
            for each in decided.decisions
        ],
    }


def _prune_plan_lines(plan: PrunePlan, refusal: str) -> Iterator[str]:
    decided = plan.decided
    groups: dict[tuple[str, str], list[int]] = {}
    for each in decided.decisions:
        reason = "only part of it is needed" if each.action == "repack" else each.reason or "it is needed"
        groups.setdefault((_WORDS[each.action], reason), []).append(each.bytes)
    rewriting = decided.of("repack")
    condemned = sum(each.bytes for each in [*rewriting, *decided.of("condemn")])
    needed = size_text(sum(each.needed_bytes for each in rewriting))
    rewritten = f", rewrite {needed} of it" if rewriting else ""
    yield from table(
        ("ACTION", "PACKS", "BYTES", "REASON"),
        (
            (action, f"{len(sizes):,}", size_text(sum(sizes)), reason)
            for (action, reason), sizes in sorted(groups.items())
        ),
        right="PACKS BYTES",
    )
    yield (
        f"Would condemn {size_text(condemned)} of {size_text(decided.bytes_total)}{rewritten}, and delete "
        f"{size_text(sum(each.bytes for each in decided.of('sweep')))} that was condemned before. Nothing was changed."
    )
    if refusal:
        yield f"It would be refused: {refusal}"


_WORDS = {
    "keep": "keep",
    "repack": "rewrite",
    "condemn": "condemn",
    "wait": "wait",
    "sweep": "delete",
    "rescue": "take back",
}


def _prune_lines(report: PruneReport, grace: str) -> Iterator[str]:
    if report.repacked:
        yield f"Rewrote {count_text(report.repacked, 'pack')}, {size_text(report.bytes_repacked)} written."
    if report.rescued:
        yield f"Took back {count_text(report.rescued, 'pack')}: condemned before, and needed after all."
    if report.condemned:
        yield f"Condemned {count_text(report.condemned, 'pack')}, {size_text(report.bytes_condemned)}."
    if report.swept or report.condemned or report.waiting:
        yield f"Deleted {count_text(report.swept, 'pack')}, {size_text(report.bytes_freed)}."
    else:
        yield "Nothing to prune."
    if report.waiting:
        yield (
            f"Condemned and still readable: {count_text(report.waiting, 'pack')}, {size_text(report.bytes_waiting)}. "
            f"A prune that runs {grace} after they were condemned deletes them."
        )
    if report.unnamed:
        yield (
            f"Kept, though no commit names them yet: {count_text(report.unnamed, 'pack')}, "
            f"{size_text(report.bytes_unnamed)}, of a backup that is running or was cut short."
        )
    if report.extended:
        yield f"The lock of {count_text(report.extended, 'object')} was extended."
    yield f"Done in {duration_text(report.seconds)}."
