"""The command `outlast`: puts the commands together and turns arguments into an exit code."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Sequence
from itertools import takewhile

import click

from outlast import __version__
from outlast.cli import agent as agents
from outlast.cli import (
    archive,
    checking,
    collect,
    config,
    copies,
    doctor,
    drill,
    exchange,
    keys,
    look,
    protect,
    repository,
    runs,
    watch,
)
from outlast.cli.command import Group, Options, make_printer, tell, terminate


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s", help="Print the version.")
def app() -> None:
    """Back up model folders, and bring them back verified.

    The repository is --repo URL or OUTLAST_REPO. The options may stand before or after the command.

    Exit codes: 0 done; 1 failed; 2 wrong usage; 3 partly done; 10 no repository; 11 busy; 12 wrong key;
    20 corrupt; 21 refused; 22 fenced; 130 cancelled; 143 ended by SIGTERM.
    """


for command in (protect.init, protect.backup, protect.snapshots, look.show, look.diff, protect.restore):
    app.add_command(command)
app.add_command(watch.watch)
app.add_command(checking.check)
app.add_command(collect.forget)
app.add_command(collect.prune)
app.add_command(keys.key)
app.add_command(copies.copy)
app.add_command(repository.repo)
repository.repo.add_command(archive.archive)
repository.repo.add_command(archive.thaw)
app.add_command(doctor.doctor)
app.add_command(drill.drill)
app.add_command(runs.runs)
app.add_command(config.config)
for command in (agents.plan, agents.agent, agents.status):
    app.add_command(command)
for command in (exchange.salvage, exchange.export, exchange.bring_in):
    app.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    _open_closed_streams()
    # Commands hold many small records and no cycles: looking for those often costs a tenth of a large restore.
    gc.set_threshold(100_000, 50, 50)
    # numpy, once loaded, starts threads for linear algebra, which nobody here does, and they spin.
    # What this program starts inherits it; that is one command, which prints a passphrase.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        signal.signal(signal.SIGTERM, terminate)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else the caller wants it ignored
            signal.signal(signal.SIGINT, terminate)
        # Not `app.main`, which would turn a signal into an error of its own.
        with app.make_context("outlast", given) as context:
            return int(app.invoke(context) or 0)
    except click.exceptions.Exit as exc:
        return exc.exit_code
    except (Exception, KeyboardInterrupt) as exc:  # noqa: BLE001  only what went wrong before a command ran
        options = set(takewhile(lambda argument: argument != "--", given))
        form = Options(json="--json" in options, json_lines="--json-lines" in options)
        return tell(make_printer(form), "--debug" in options, exc, "Nothing was done.")


def _open_closed_streams() -> None:
    """Give what was closed before the start, as by `>&-`, to /dev/null.

    Otherwise the first file that is opened would get the number of standard output.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until the end
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
