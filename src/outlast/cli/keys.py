"""The commands that look at and change the keys of an encrypted repository."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from outlast.cli.command import Argument, Call, Command, Group
from outlast.cli.passphrase import added_secret
from outlast.cli.text import printable, short_id, table, time_text

if TYPE_CHECKING:
    from outlast.repo.keyring import Slot
    from outlast.repo.repository import Repository

_CODES = (10, 11, 12, 20, 21)


@click.group(cls=Group)
def key() -> None:
    """Give others a passphrase of their own, take it back, and change the keys that data is sealed with.

    Exit codes: 0 done; 1 failed; 2 wrong usage; 10 no repository; 11 busy; 12 wrong key; 20 corrupt; 21 refused;
    130 cancelled.
    """


@key.command("list", cls=Command, codes=(10, 12, 20, 21))
def list_keys(call: Call) -> None:
    """List the keys: which passphrase opens which, and the data key that each holds.

    EPOCH is the number of the newest data key in it; a rotation makes the next one.
    """
    from outlast.repo import keyring

    repository = call.repository()
    found = keyring.slots(repository)
    document = {"epoch": repository.state.epoch, "keys": [_document(slot, repository) for slot in found]}
    rows = (
        (
            short_id(slot.id),
            printable(time_text(slot.created)) or "?",
            "?" if slot.epoch is None else str(slot.epoch),
            printable(slot.label),
            ", ".join(_notes(slot, repository)),
        )
        for slot in found
    )
    call.result(document, table(("ID", "CREATED (UTC)", "EPOCH", "LABEL", "NOTES"), rows, right="EPOCH"), always=True)


@key.command(cls=Command, codes=_CODES, when_stopped="Either the key was added or not: `outlast key list` tells.")
@click.option("--label", metavar="TEXT", help="What the key is for; whoever can read the store can see it.")
@click.option(
    "--new-passphrase-file", metavar="FILE", help="A file that holds the new passphrase (or OUTLAST_NEW_PASSPHRASE)."
)
@click.option("--new-passphrase-command", metavar="COMMAND", help="A command that prints the new passphrase.")
def add(call: Call, label: str | None, new_passphrase_file: str | None, new_passphrase_command: str | None) -> None:
    """Let another passphrase open the repository too."""
    from outlast.repo import keyring

    secret = added_secret(new_passphrase_file, new_passphrase_command)
    repository = call.repository()
    if repository.keys is None:
        keyring.slots(repository)  # says why not, before anybody is asked for a passphrase
    change = keyring.add(repository, secret(), label or "")
    lines = [f"Added the key {short_id(change.slot)}: its passphrase opens everything, from now on."]
    if change.replaced:
        replaced = ", ".join(map(short_id, change.replaced))
        lines.append(f"It stands in for {replaced}, which the same passphrase opened, from before a rotation.")
    document = {"key": change.slot, "label": label or "", "epoch": change.epoch, "replaced": list(change.replaced)}
    call.result(document, lines)


@key.command(cls=Command, codes=_CODES, when_stopped="If the key is still listed, run the same command again.")
@click.argument("id", cls=Argument, metavar="ID", help="The first characters of an id from `outlast key list`.")
def remove(call: Call, id: str) -> None:
    """Remove a key: its passphrase opens the repository no more.

    Whoever had opened the repository with it may have kept the data key: if that matters, rotate the
    keys then, so that at least what is stored from now on is out of reach.
    """
    from outlast.repo import keyring

    repository = call.repository()
    own = {slot.id for slot in keyring.slots(repository) if slot.epochs is not None}
    change = keyring.remove(repository, id)
    if own == {change.slot}:
        call.warnings.append("that was the key of the passphrase in use here: it opens the repository no more.")
        call.printer.warn(call.warnings[-1])
    call.result({"removed": change.slot}, [f"Removed the key {short_id(change.slot)}."])


@key.command(
    cls=Command,
    codes=_CODES,
    when_stopped="The passphrase opens everything, as before; `outlast key list` tells which data key is in use.",
)
def rotate(call: Call) -> None:
    """Make a new data key, and seal everything with it from now on.

    What is stored already stays sealed with the old data keys: your passphrase reads it as before, and
    so does whoever kept an old data key. The keys of other passphrases lack the new data key: add those
    passphrases again, by `outlast key add`.
    """
    from outlast.repo import keyring

    repository = call.repository()
    change = keyring.rotate(repository)
    behind = [slot for slot in change.left_behind if not slot.is_damaged]
    if behind:
        call.warnings.append(_left_behind(behind))
        call.printer.warn(call.warnings[-1])
    document = {
        "epoch": change.epoch,
        "key": change.slot,
        "replaced": list(change.replaced),
        "left_behind": [_document(slot, repository) for slot in behind],
    }
    call.result(
        document,
        _rotated_lines(change.epoch),
    )


def _rotated_lines(epoch: int) -> Iterator[str]:
    yield f"Everything stored from now on is sealed with data key {epoch}. Your passphrase is the same, and reads all."
    yield "What was stored before stays sealed with the older data keys: whoever kept one can still read it."
    yield (
        f"`outlast prune --max-unused 0%` seals with data key {epoch} what is needed of the old packs that hold "
        "unneeded data too. Old packs that are needed whole, and the log until now, stay as they are: only "
        "`outlast copy` to a new repository, made by `outlast init --encrypt`, seals those anew."
    )


def _left_behind(behind: list[Slot]) -> str:
    names = ", ".join(f"{short_id(slot.id)} ({printable(slot.label) or 'no label'})" for slot in behind)
    return (
        f"the passphrases of these keys can't open the repository any more: {names}. For each that should: "
        "`outlast key add` with that passphrase as the new one. The others: `outlast key remove ID`."
    )


def _document(slot: Slot, repository: Repository) -> dict[str, Any]:
    return {
        "id": slot.id,
        "created": slot.created,
        "label": slot.label,
        "epoch": slot.epoch,
        "opened": slot.epochs is not None,
        "notes": _notes(slot, repository),
    }


def _notes(slot: Slot, repository: Repository) -> list[str]:
    return list(_each_note(slot, repository.state.epoch))


def _each_note(slot: Slot, newest: int) -> Iterator[str]:
    if slot.is_damaged:
        yield "damaged"
    if slot.epochs is not None:
        yield "your passphrase"
    if slot.epochs is not None and newest not in slot.epochs and max(slot.epochs) > newest:
        yield "of a rotation that was not finished"
    elif slot.epoch is not None and slot.epoch < newest:
        yield "from before a rotation"
    if slot.is_removed:
        yield "removed, but still there: remove it again"
