"""The command that follows a trainer's folder: watch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from outlast.cli.collect import keep_options, policy_of
from outlast.cli.command import PARTLY_DONE, Argument, Call, Command
from outlast.cli.text import count_text, duration_text, path_shown, printable, short_id, size_text, span_seconds
from outlast.clock import SYSTEM_CLOCK
from outlast.errors import Unavailable

if TYPE_CHECKING:
    from outlast.backup.watch import Look, Taken, Watch
    from outlast.repo.repository import Repository

_TAKEN_LISTED_MAX = 1000
_OPEN_AGAIN_SECONDS = 10.0


@click.command(
    cls=Command,
    codes=(3, 10, 12, 20, 21),
    when_stopped="What was committed is whole; the same command goes on from here.",
)
@click.argument("folder", cls=Argument, metavar="DIR", help="The folder that the trainer writes its checkpoints to.")
@click.option("--name", metavar="NAME", help="What the snapshots are of. Default: the name of DIR.")
@click.option(
    "--quiet-period",
    metavar="DURATION",
    default="10s",
    show_default=True,
    help="A checkpoint is looked at when nothing of it has changed for so long: 10s, 2m.",
)
@click.option("--once", is_flag=True, help="Back up what is whole now, and end; exit code 3 if something isn't.")
@keep_options
def watch(
    call: Call,
    folder: str,
    name: str | None,
    quiet_period: str,
    once: bool,
    keep_within: str | None,
    keep_tag: Sequence[str],
    **counts: int | None,
) -> int:
    """Back up each checkpoint in DIR as soon as it is whole, whatever trainer writes it.

    Nothing in DIR is ever changed. A checkpoint is a folder or a file in DIR, or DIR itself where it is laid out as
    one model. It is whole when it is quiet, has what its trainer writes last, and its files don't end early; one that
    stays otherwise for 15 minutes is backed up as NAME.incomplete. After each backup the --keep rules are applied to
    the snapshots of this name; without any, all are kept. SIGTERM and Ctrl-C end it, with exit code 0.
    """
    from outlast.backup.watch import PATIENCE_SECONDS, Watch

    policy = policy_of(counts, keep_within, keep_tag)
    quiet_seconds = span_seconds("--quiet-period", quiet_period)
    taken: deque[Taken] = deque(maxlen=_TAKEN_LISTED_MAX)
    in_this_look: set[str] = set()

    def tell(each: Taken) -> None:
        taken.append(each)
        in_this_look.add(each.checkpoint)
        call.printer.say(_taken_line(each))

    def watching(repository: Repository) -> Watch:
        return Watch(
            repository,
            folder,
            name=name,
            policy=policy,
            quiet_seconds=quiet_seconds,
            patience_seconds=max(PATIENCE_SECONDS, 3 * quiet_seconds),
            once=once,
            tell=tell,
        )

    if once:
        made = watching(call.repository())
        return _result(call, made, made.look(), list(taken))
    made = watching(_opened(call))
    call.printer.say(f"Watching {path_shown(_path_text(made))} for checkpoints. SIGTERM or Ctrl-C ends it.")
    _result(call, made, _follow(call, made, quiet_seconds, in_this_look), list(taken))
    return 0


def _follow(call: Call, watcher: Watch, quiet_seconds: float, in_this_look: set[str]) -> Look | None:
    """Look until a signal comes; returns the last look, less what one that was interrupted came to."""
    import msgspec

    from outlast.backup.wakeups import Wakeups

    def tell(failure: str) -> None:
        call.printer.warn(f"{failure}: it is looked at every {duration_text(poll_seconds)} instead.")

    poll_seconds = min(max(1.0, float(quiet_seconds)), 30.0)
    wakeups = Wakeups(watcher.folder, poll_seconds, tell)
    look = None
    try:
        while True:
            look = watcher.look()
            in_this_look.clear()
            wakeups.wait(look.next_seconds)
    except KeyboardInterrupt:
        left = tuple(each for each in look.waiting if each.checkpoint not in in_this_look) if look else ()
        return msgspec.structs.replace(look, waiting=left) if look else None
    finally:
        wakeups.close()


def _opened(call: Call) -> Repository:
    """The repository, as soon as it can be reached."""
    is_told = False
    while True:
        try:
            return call.repository()
        except Unavailable as exc:
            if not is_told:
                call.printer.warn(f"{exc.message} It is tried again until it can be reached.")
            is_told = True
            SYSTEM_CLOCK.sleep(_OPEN_AGAIN_SECONDS)


def _result(call: Call, watcher: Watch, look: Look | None, taken: list[Taken]) -> int:
    import msgspec

    waiting = look.waiting if look else ()
    document = {
        "folder": _path_text(watcher),
        "name": watcher.name,
        "backed_up": msgspec.to_builtins(taken),
        "waiting": msgspec.to_builtins(waiting),
        "unchanged": look.unchanged if look else 0,
        "others": list(look.others) if look else [],
    }
    call.result(document, _lines(watcher, look, taken))
    return PARTLY_DONE if waiting or any(each.flaw or each.unsound for each in taken) else 0


def _path_text(watcher: Watch) -> str:
    from outlast.records import path_text

    return path_text(watcher.folder)


def _taken_line(each: Taken) -> str:
    what = f"{count_text(each.files, 'file')}, {size_text(each.bytes)}, {size_text(each.bytes_added)} new"
    forgot = f" Forgot {count_text(len(each.forgotten), 'snapshot')}." if each.forgotten else ""
    unsound = f" {count_text(each.unsound, 'file')} could not be read as a whole." if each.unsound else ""
    name = f"{printable(each.checkpoint)} of {printable(each.name)}"
    return f"Snapshot {short_id(each.snapshot)}: {name}, {what}, in {duration_text(each.seconds)}.{unsound}{forgot}"


def _lines(watcher: Watch, look: Look | None, taken: list[Taken]) -> Iterator[str]:
    for each in look.waiting if look else ():
        yield f"Not backed up yet: {printable(each.checkpoint)}: {printable(each.reason).rstrip('.')}."
    more = f", {look.unchanged:,} there already" if look and look.unchanged else ""
    left = f", {len(look.waiting):,} not yet" if look and look.waiting else ""
    yield f"{printable(watcher.name)}: {count_text(len(taken), 'checkpoint')} backed up{more}{left}."
