"""Where the passphrase comes from: a file, a command, the environment or the terminal; never an argument."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial

from outlast.errors import InvalidInput, WrongKey

VARIABLE = "OUTLAST_PASSPHRASE"
ADDED_VARIABLE = "OUTLAST_NEW_PASSPHRASE"
FROM_VARIABLE = "OUTLAST_FROM_PASSPHRASE"

Secret = Callable[[], bytes]


def known_secret(file: str | None, command: str | None) -> Secret | None:
    """How to open a repository, asked only if it is encrypted; None when there is no way to know."""
    from outlast import not_empty

    secret = _given(file, command)
    if secret is None and _at_terminal():
        return not_empty(lambda: _ask("Passphrase of the repository: "))
    return not_empty(secret) if secret else None


def is_given(file: str | None, command: str | None) -> bool:
    """Whether there is a passphrase without asking for one."""
    return file is not None or command is not None or VARIABLE in os.environ


def new_secret(file: str | None, command: str | None) -> Secret:
    """The passphrase for a new repository; typed twice when it is typed."""
    secret = _given(file, command) or (_ask_twice if _at_terminal() else None)
    if secret is None:
        raise WrongKey(
            "an encrypted repository needs a passphrase and none was given; nothing was made.",
            hint=f"Set {VARIABLE}, or use --passphrase-file or --passphrase-command.",
        )
    return secret


def added_secret(file: str | None, command: str | None) -> Secret:
    """One more passphrase for a repository; typed twice when it is typed."""
    secret = _given(file, command, "--new-passphrase", ADDED_VARIABLE) or (_ask_twice if _at_terminal() else None)
    if secret is None:
        raise WrongKey(
            "no new passphrase was given; nothing was changed.",
            hint=f"Set {ADDED_VARIABLE}, or use --new-passphrase-file or --new-passphrase-command.",
        )
    return secret


def source_secret(file: str | None, command: str | None) -> Secret:
    """How to open the repository that is copied from, asked only if it is encrypted."""
    from outlast import not_empty

    secret = _given(file, command, "--from-passphrase", FROM_VARIABLE)
    if secret is None and _at_terminal():
        secret = partial(_ask, "Passphrase of the repository to copy from: ")
    return not_empty(secret or _no_source_passphrase)


def is_source_given(file: str | None, command: str | None) -> bool:
    """Whether there is a passphrase of the repository that is copied from without asking for one."""
    return file is not None or command is not None or FROM_VARIABLE in os.environ


def _no_source_passphrase() -> bytes:
    raise WrongKey(
        "the repository to copy from is encrypted and no passphrase of it was given; nothing was touched.",
        hint=f"Set {FROM_VARIABLE}, or use --from-passphrase-file or --from-passphrase-command.",
    )


def _given(
    file: str | None, command: str | None, option: str = "--passphrase", variable: str = VARIABLE
) -> Secret | None:
    if file is not None and command is not None:
        raise InvalidInput(
            f"{option}-file and {option}-command were both given; nothing was touched.",
            hint="Give one of them.",
        )
    if file is not None:
        return lambda: _from_file(file)
    if command is not None:
        return lambda: _from_command(command)
    if variable in os.environ:
        return lambda: os.fsencode(os.environ[variable])
    return None


def _from_file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return _without_newline(file.read(1 << 20))
    except OSError as exc:
        raise WrongKey(
            f"the passphrase file {path} can't be read: {exc.strerror}. Nothing was touched.",
            hint="Give a file that you may read.",
        ) from exc


def _from_command(command: str) -> bytes:
    """Run without a shell; what it says on standard error goes to the terminal, its output nowhere."""
    import shlex
    import subprocess

    try:
        words = shlex.split(command)
    except ValueError as exc:
        raise InvalidInput(f"the passphrase command has an open quote: {exc}. Nothing was touched.") from exc
    if not words:
        raise InvalidInput("the passphrase command is empty; nothing was touched.")
    try:
        ran = subprocess.run(words, stdout=subprocess.PIPE, check=False)
    except OSError as exc:
        raise WrongKey(
            f"the passphrase command {words[0]} can't be run: {exc.strerror}. Nothing was touched.",
            hint="Give a program and its arguments; for a pipe, write sh -c '…'.",
        ) from exc
    if ran.returncode:
        raise WrongKey(
            f"the passphrase command {words[0]} ended with exit code {ran.returncode}; nothing was touched.",
            hint="Run it by hand: it must print the passphrase and end with exit code 0.",
        )
    return _without_newline(ran.stdout)


def _without_newline(data: bytes) -> bytes:
    return data.removesuffix(b"\n").removesuffix(b"\r")


def _at_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _ask(prompt: str) -> bytes:
    import getpass

    try:
        return os.fsencode(getpass.getpass(prompt))
    except EOFError as exc:
        raise WrongKey("no passphrase was typed; nothing was touched.") from exc


def _ask_twice() -> bytes:
    first = _ask("New passphrase: ")
    if first != _ask("The same again: "):
        raise InvalidInput("the two passphrases differ; nothing was made.", hint="Type them again.")
    return first
