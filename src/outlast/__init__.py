"""Outlast keeps AI work alive: verified backups and checkpoints, chunk by chunk, tensor by tensor.

>>> import outlast
>>> repository = outlast.create("memory://example")
>>> [snapshot.name for snapshot in repository.snapshots()]
[]

Names are loaded when they are first used, so that importing this package costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from outlast.backup.create import create as back_up
    from outlast.backup.inspect import diff, show
    from outlast.backup.restore import execute as restore
    from outlast.backup.restore import plan as plan_restore
    from outlast.backup.tensors import restore_tensors
    from outlast.checkpoint.pending import PendingSave
    from outlast.checkpoint.run import Run
    from outlast.errors import OutlastError
    from outlast.events import EventSink
    from outlast.records import Entry, Snapshot
    from outlast.repo.check import check
    from outlast.repo.repository import Repository

__version__ = "0.1.0"

__all__ = [
    "Entry",
    "OutlastError",
    "PendingSave",
    "Repository",
    "Run",
    "Snapshot",
    "back_up",
    "check",
    "create",
    "diff",
    "open",
    "plan_restore",
    "restore",
    "restore_tensors",
    "show",
]

_HOMES = {
    "Entry": ("outlast.records", "Entry"),
    "OutlastError": ("outlast.errors", "OutlastError"),
    "PendingSave": ("outlast.checkpoint.pending", "PendingSave"),
    "Repository": ("outlast.repo.repository", "Repository"),
    "Run": ("outlast.checkpoint.run", "Run"),
    "Snapshot": ("outlast.records", "Snapshot"),
    "back_up": ("outlast.backup.create", "create"),
    "check": ("outlast.repo.check", "check"),
    "diff": ("outlast.backup.inspect", "diff"),
    "plan_restore": ("outlast.backup.restore", "plan"),
    "restore": ("outlast.backup.restore", "execute"),
    "restore_tensors": ("outlast.backup.tensors", "restore_tensors"),
    "show": ("outlast.backup.inspect", "show"),
}

Passphrase = bytes | str | Callable[[], bytes]


def create(
    url: str,
    *,
    passphrase: Passphrase | None = None,
    compression: Literal["auto", "none", "zstd"] = "auto",
    sink: EventSink | None = None,
) -> Repository:
    """Make a repository at `url` (a path, `file://`, `s3://`, `gs://`, `az://`, `memory://`).

    It is encrypted when a passphrase is given. Raises `Refused` where a repository already is.
    """
    from outlast.events import NULL_SINK
    from outlast.repo.repository import Repository
    from outlast.store.layers import open_store

    return Repository.create(
        open_store(url), secret=secret_of(passphrase), compression=compression, sink=sink or NULL_SINK
    )


def open(url: str, *, passphrase: Passphrase | None = None, sink: EventSink | None = None) -> Repository:  # noqa: A001
    """Open the repository at `url`. A passphrase that is a function is called only if one is needed.

    Raises `NoRepository`, `WrongKey`, `Refused` (a newer format, or a passphrase for a repository
    that is not encrypted), `Corrupt` or `Unavailable`.
    """
    from outlast.events import NULL_SINK
    from outlast.repo.repository import Repository
    from outlast.store.layers import open_store

    secret = secret_of(passphrase)
    repository = Repository.open(open_store(url), secret=not_empty(secret) if secret else None, sink=sink or NULL_SINK)
    if passphrase is not None:
        expect_encrypted(repository)
    return repository


def expect_encrypted(repository: Repository) -> None:
    """Raise `Refused` for a repository that is not encrypted: whoever holds its store may have replaced it."""
    from outlast.errors import Refused

    if repository.format.encryption is None:
        raise Refused(
            f"the repository at {repository.store.url} is not encrypted, but a passphrase was given: if it was "
            "encrypted, somebody replaced its format. Nothing was changed.",
            hint="If it never was, leave the passphrase out: unset OUTLAST_PASSPHRASE, or drop the option.",
        )


def not_empty(secret: Callable[[], bytes]) -> Callable[[], bytes]:
    """The passphrase to open with, but `WrongKey` when it is empty: no repository has an empty one."""

    def checked() -> bytes:
        from outlast.errors import WrongKey

        found = secret()
        if not found:
            raise WrongKey(
                "the passphrase is empty; nothing was touched.", hint="Look at where the passphrase comes from."
            )
        return found

    return checked


def secret_of(passphrase: Passphrase | None) -> Callable[[], bytes] | None:
    if passphrase is None or callable(passphrase):
        return passphrase
    given = passphrase.encode() if isinstance(passphrase, str) else passphrase
    return lambda: given


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'outlast' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    found = getattr(import_module(module), attribute)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
