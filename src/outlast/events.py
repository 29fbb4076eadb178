"""What happened and why: the one channel for progress, warnings and audit.

Code below the command line never prints and never logs; it emits events. A sink turns them into
a progress bar, JSON lines or metrics.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol

import msgspec


class Event(msgspec.Struct, frozen=True):
    """One fact. `kind` is a stable dotted code, `reason` a sentence for people."""

    kind: str
    reason: str = ""
    fields: dict[str, Any] = {}


class Progress(msgspec.Struct, frozen=True):
    """How far a piece of work is: `phase` names it, totals are 0 while unknown."""

    phase: str
    done_bytes: int = 0
    total_bytes: int = 0
    done_files: int = 0
    total_files: int = 0


class EventSink(Protocol):
    """Called from worker threads; it must be quick and must not raise."""

    @property
    def wants_progress(self) -> bool:
        """Whether anybody looks at progress; totals are only worked out for somebody who does."""
        ...

    def event(self, event: Event) -> None: ...

    def progress(self, progress: Progress) -> None: ...


class NullSink:
    """Drops everything."""

    wants_progress = False

    def event(self, event: Event) -> None:
        return

    def progress(self, progress: Progress) -> None:
        return


class LogSink:
    """Warns through the logger "outlast", which writes to standard error where nobody set up anything else."""

    wants_progress = False

    def event(self, event: Event) -> None:
        logging.getLogger("outlast").warning("%s", event.reason or event.kind)

    def progress(self, progress: Progress) -> None:
        return


class ListSink:
    """Keeps events in a list; for tests and callers that look afterwards."""

    wants_progress = False

    def __init__(self) -> None:
        self.events: list[Event] = []

    def event(self, event: Event) -> None:
        self.events.append(event)

    def progress(self, progress: Progress) -> None:
        return


NULL_SINK = NullSink()
LOG_SINK = LogSink()
