"""The commands about outlast.yaml: what is wrong in it, and what it comes to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from outlast.cli.agent import load as configured
from outlast.cli.command import Argument, Call, Command, Group
from outlast.cli.text import count_text, printable
from outlast.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterator

    from outlast.config import Mistake

_file = click.argument(
    "file", cls=Argument, required=False, metavar="[FILE]", help="Else OUTLAST_CONFIG, else ./outlast.yaml."
)


@click.group(cls=Group)
def config() -> None:
    """Look at outlast.yaml: the tiers, what is backed up, and how often."""


@config.command(cls=Command)
@_file
def check(call: Call, file: str | None) -> int:
    """Name every mistake in the configuration, with its line and what to write instead."""
    from outlast.config import Mistaken, find, load

    path = find(file)
    mistakes: tuple[Mistake, ...] = ()
    try:
        warnings = load(path).warnings
    except Mistaken as exc:
        mistakes, warnings = exc.mistakes, exc.warnings
    document = {
        "path": path,
        "ok": not mistakes,
        "mistakes": [each._asdict() for each in mistakes],
        "warnings": [each._asdict() for each in warnings],
    }
    call.result(document, _check_lines(path, mistakes, warnings), always=bool(mistakes))
    return InvalidInput.exit_code if mistakes else 0


def _check_lines(path: str, mistakes: tuple[Mistake, ...], warnings: tuple[Mistake, ...]) -> Iterator[str]:
    for each in mistakes:
        yield printable(each.text(path))
    for each in warnings:
        yield printable(f"{each.text(path)} (warning)")
    told = f"{count_text(len(mistakes), 'mistake')}, {count_text(len(warnings), 'warning')}"
    yield printable(f"{path}: {told}." if mistakes or warnings else f"{path}: no mistakes.")


@config.command(cls=Command)
@_file
def show(call: Call, file: str | None) -> None:
    """Print what is in force, defaults included, in a form that is itself a configuration."""
    from outlast.config.show import document, lines

    found = configured(call, file)
    call.result(document(found), map(printable, lines(found)), always=True)
