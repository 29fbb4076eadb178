"""The command that rehearses a restore: drill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from outlast.cli.agent import CONFIG, is_by_config, load, tier_of
from outlast.cli.command import CORRUPT, FAILED, Argument, Call, Command
from outlast.cli.doctor import ENVIRONMENT
from outlast.cli.text import (
    count_text,
    duration_text,
    printable,
    short_id,
    size_text,
    span_seconds,
    table,
    time_text,
)
from outlast.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    from outlast.records import Snapshot
    from outlast.repo.repository import Repository
    from outlast.tiers.drill import DrillReport, Level

_SHOWN = 10


@click.command(
    cls=Command,
    codes=(10, 12, 20, 21),
    when_stopped="What was restored for the drill was removed; nothing was written down.",
)
@click.argument(
    "reference",
    cls=Argument,
    metavar="[SNAPSHOT]",
    required=False,
    help="As for `restore`; default: the latest, of --source or --run where one is given.",
)
@click.option("--source", metavar="NAME", help="The latest backup of this name.")
@click.option("--run", metavar="NAME", help="The latest checkpoint of this training run.")
@click.option("--tier", metavar="NAME", help="From this tier of outlast.yaml. Default: the nearest that has it.")
@CONFIG
@click.option(
    "--level",
    metavar="L0..L5",
    help="How far to go: L0 bytes, L1 structure, L2 values, L3 golden outputs, L4 quality, L5 resumed training. "
    "Default: L2, or the highest that a command is given for.",
)
@click.option("--golden", metavar="COMMAND", help="L3: a command that compares what the model gives.")
@click.option("--quality", metavar="COMMAND", help="L4: a command that measures it on a fixed test set.")
@click.option("--resume", metavar="COMMAND", help="L5: the command that trains; a Run in it saves nothing.")
@click.option(
    "--time-limit", metavar="DURATION", default="1h", show_default=True, help="For each command, as 30s, 10m or 2h."
)
@click.option(
    "--allow-nan", multiple=True, metavar="GLOB", help="Tensors that may hold NaN or infinity. May be repeated."
)
@click.option(
    "--scratch", metavar="DIR", help="Where to restore to, for the time of the drill. Default: TMPDIR, or /tmp."
)
def drill(
    call: Call,
    reference: str | None,
    source: str | None,
    run: str | None,
    tier: str | None,
    config: str | None,
    level: str | None,
    golden: str | None,
    quality: str | None,
    resume: str | None,
    time_limit: str,
    allow_nan: Sequence[str],
    scratch: str | None,
) -> int:
    """Rehearse a restore, measure how long it takes, and write it down in the log.

    The snapshot is restored into a scratch folder, which is removed afterwards. A COMMAND is a line for the shell; it
    finds the folder in OUTLAST_RESTORED, and passes with exit code 0. With outlast.yaml, and no repository named, level
    and commands are those of its source where they are not given. 20: not even the bytes came back; 1: a higher
    level was not reached.
    """
    import msgspec

    from outlast.tiers.drill import Commands
    from outlast.tiers.drill import drill as hold
    from outlast.tiers.policy import DrillPolicy

    asked = None if level is None else _level(level)
    if tier is not None or is_by_config(call, config):
        policy = load(call, config).policy
        repository = tier_of(call, policy, tier, reference or "latest", source or run)
        snapshot = _snapshot(call, repository, reference, source, run)
        known = policy.source(snapshot.name)
        stated = (known.drill if known else policy.run_drill) or DrillPolicy()
        golden, quality, resume = golden or stated.golden, quality or stated.quality, resume or stated.resume
        asked = stated.level if asked is None else asked
    else:
        repository = call.repository()
        snapshot = _snapshot(call, repository, reference, source, run)
    commands = Commands(golden or None, quality or None, resume or None, span_seconds("--time-limit", time_limit))
    report = hold(
        repository,
        snapshot,
        level=asked,
        commands=commands,
        scratch=scratch,
        allowed=allow_nan,
        environment=ENVIRONMENT,
    )
    document: dict[str, Any] = {
        **msgspec.to_builtins(report.drill),
        "problem": report.drill.problem,
        "passed": report.drill.passed,
        "levels": msgspec.to_builtins(report.levels),
    }
    call.result(document, _lines(report, snapshot), always=True)
    return 0 if report.drill.passed else CORRUPT if report.is_damaged else FAILED


def _level(text: str) -> int:
    number = text.strip().upper().removeprefix("L")
    if number not in ("0", "1", "2", "3", "4", "5"):
        raise InvalidInput(f"there is no level {text!r}; nothing was done.", hint="Known are L0 to L5.")
    return int(number)


def _snapshot(
    call: Call, repository: Repository, reference: str | None, source: str | None, run: str | None
) -> Snapshot:
    if source is not None and run is not None:
        raise InvalidInput("--source and --run don't go together; nothing was done.", hint="Give one of them.")
    name = source if source is not None else run
    if name is None:
        return call.snapshot(repository, reference or "latest")
    kind = "checkpoint" if run is not None else "backup"
    every = [each for each in repository.snapshots() if each.kind == kind]
    mine = [each for each in every if each.name == name]
    if not mine:
        if run is not None:
            from outlast.checkpoint.references import no_run

            raise no_run(repository, run)
        names = sorted({printable(each.name) for each in every})
        there = f"; there are: {', '.join(names)}" if names else ""
        raise NotFound(f"no backup is named {name}{there}.", hint="`outlast snapshots` lists them.")
    if reference is not None:
        return call.snapshot(repository, reference, name)
    return max(reversed(mine), key=lambda each: each.time)


def _lines(report: DrillReport, snapshot: Snapshot) -> Iterator[str]:
    drill = report.drill
    yield (
        f"Drill with snapshot {short_id(snapshot.id)} of {printable(snapshot.name)}, "
        f"saved {time_text(snapshot.time)} UTC."
    )
    rows = [
        (
            f"L{each.level}",
            each.name,
            "left out" if each.is_skipped else "ok" if each.reached else "FAILED",
            "" if each.is_skipped else duration_text(each.seconds),
            "no command was given" if each.is_skipped else _seen(each),
        )
        for each in report.levels
    ]
    yield from list(table(("", "", "", "seconds", ""), rows, right="seconds"))[1:]
    for each in report.levels:
        for kind, told in (("Failed", each.looked.problems), ("Noted", each.looked.notes)):
            for line in told[:_SHOWN]:
                yield f"{kind}: {printable(line)}"
            if len(told) > _SHOWN:
                yield f"{kind}: and {count_text(len(told) - _SHOWN, 'more thing')}; --json has them."
    came = f"L{drill.level} reached" if drill.level >= 0 else "No level reached"
    of = "" if drill.passed else f", not L{drill.asked}"
    yield (
        f"{came}{of}. RTO {duration_text(drill.rto_seconds)} (restored and examined so far), "
        f"RPO {duration_text(drill.rpo_seconds)} (the age of the snapshot)."
    )


def _seen(level: Level) -> str:
    looked = level.looked
    if level.level >= 3 and not looked.tensors:
        return "the command passed" if level.reached else ""
    files = count_text(looked.files, "file")
    tensors = count_text(looked.tensors, "tensor")
    if level.level == 0:
        return f"{files}, {size_text(looked.bytes)}; every chunk was verified" if level.reached else ""
    if level.level == 1:
        documents = f" and {count_text(looked.documents, 'JSON file')}" if looked.documents else ""
        return f"{files} with {tensors}{documents}"
    if level.level == 2:
        return f"{tensors}, {size_text(looked.bytes)}"
    return f"a run went on: {tensors}, {size_text(looked.bytes)}"
