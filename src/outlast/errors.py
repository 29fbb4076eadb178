"""The exception tree, grouped by what a handler would do about it.

A message says what happened and to which object, and what is still safe; `hint` says what to do
next. `exit_code` is what the command line returns (docs/exit-codes are listed in the README);
`retryable` tells whether the same call may succeed later with nothing else changed.
"""

from __future__ import annotations

from typing import ClassVar


class OutlastError(Exception):
    """Base of everything this package raises on purpose."""

    kind: ClassVar[str] = "failed"
    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if hint:
            self.add_note(hint)  # a traceback shows it below the message


class InvalidInput(OutlastError):
    """The caller asked for something that makes no sense; nothing was touched."""

    kind = "invalid_input"
    exit_code = 2


class NotFound(OutlastError):
    """The named object, snapshot, file or tensor does not exist."""

    kind = "not_found"


class Exists(OutlastError):
    """Create-if-absent lost: an object of that name is already there, unchanged."""

    kind = "exists"


class Unavailable(OutlastError):
    """The store or the disk did not do its part; the outcome of a write may be unknown."""

    kind = "unavailable"
    retryable = True


class StoreFull(Unavailable):
    """No space or quota left; retrying changes nothing until somebody makes room."""

    kind = "store_full"
    retryable = False


class NoRepository(OutlastError):
    """There is no repository at this place."""

    kind = "no_repository"
    exit_code = 10


class Busy(OutlastError):
    """Somebody else is at work on the same thing."""

    kind = "busy"
    exit_code = 11
    retryable = True


class WrongKey(OutlastError):
    """The passphrase or key opens none of the key slots, or none was given."""

    kind = "wrong_key"
    exit_code = 12


class Corrupt(OutlastError):
    """Bytes are not what was written: a hash, a length or an authentication tag disagrees."""

    kind = "corrupt"
    exit_code = 20


class Refused(OutlastError):
    """Doing it would be unsafe, or this version does not know how."""

    kind = "refused"
    exit_code = 21


class Archived(Refused):
    """The object is whole, and in a storage class that has to be thawed for hours before it can be read."""

    kind = "archived"


class Fenced(OutlastError):
    """A newer owner holds the token; this one must stop."""

    kind = "fenced"
    exit_code = 22


class Cancelled(OutlastError):
    """The user stopped it; what was committed before is whole."""

    kind = "cancelled"
    exit_code = 130
