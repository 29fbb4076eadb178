"""Where a command's words go: a text printer for people, a JSON printer for programs, one interface.

The result goes to standard output, everything else (warnings, errors, progress) to standard error;
only with `--json-lines` are progress and events lines on standard output too. A printer is also the
event sink of the repository it reports on, so it may be called from many threads.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol

from outlast.cli.text import printable
from outlast.clock import SYSTEM_CLOCK, Clock
from outlast.errors import Unavailable

if TYPE_CHECKING:
    from outlast.cli.progress import Bar
    from outlast.events import Event, Progress

_WARNINGS_MAX = 100
_WARNING_ENDINGS = {
    "corrupt", "damaged", "failed", "ignored", "lost", "missing", "not_committed", "not_written",
    "skipped", "space", "target_in_source", "unreadable", "unstable", "waiting",
}  # fmt: skip
_BAR_AFTER_SECONDS = 0.5
_LINE_EVERY_SECONDS = 0.2
_SPOOL_BYTES = 32 << 20


class Failure(NamedTuple):
    """An error as it is told: what happened and what is safe, what to do next, and the exit code."""

    kind: str
    message: str
    hint: str
    exit_code: int


class OutputClosed(Exception):
    """Nobody reads standard output any more, as behind `| head`."""


class Printer(Protocol):
    """What commands talk to. It is an `outlast.events.EventSink`."""

    @property
    def wants_progress(self) -> bool: ...

    def event(self, event: Event) -> None: ...

    def progress(self, progress: Progress) -> None: ...

    def result(self, document: Any, lines: Iterable[str], *, always: bool = False) -> None:
        """Print the one result: `document` in JSON, or `lines` for people.

        Only one of the two is consumed, so both may be lazy. `--quiet` leaves the lines out unless
        they are what was asked for (`always`).
        """
        ...

    def say(self, line: str) -> None:
        """A line on standard output for people, while the work goes on; in JSON events say it."""
        ...

    def warn(self, text: str) -> None:
        """On standard error, in every form: what makes the result less than it seems."""
        ...

    def failure(self, failure: Failure) -> None: ...

    def trace(self, error: BaseException) -> None:
        """The traceback, for `--debug`."""
        ...

    def close(self) -> None: ...


class TextPrinter:
    """Aligned lines on standard output; warnings, errors and a progress bar on standard error."""

    def __init__(self, *, quiet: bool = False, clock: Clock = SYSTEM_CLOCK) -> None:
        self._quiet = quiet
        self._clock = clock
        self._started_seconds = clock.monotonic_seconds()
        self._bar: Bar | None = None
        self._warned = 0
        self._lock = threading.Lock()
        self.wants_progress = not quiet and sys.stderr is not None and sys.stderr.isatty()

    def event(self, event: Event) -> None:
        if event.kind.rpartition(".")[2] not in _WARNING_ENDINGS or not event.reason:
            return
        with self._lock:
            self._warned += 1
            if self._warned <= _WARNINGS_MAX:
                self._tell(f"outlast: warning: {printable(event.reason)}")
            elif self._warned == _WARNINGS_MAX + 1:
                self._tell("outlast: warning: there are more such warnings; --json lists more of them.")

    def say(self, line: str) -> None:
        if self._quiet:
            return
        with self._lock:
            if self._bar is not None:
                self._bar.close()
                self._bar = None
            _write_out((line + "\n").encode("utf-8", "backslashreplace"))
            _flush_out()

    def warn(self, text: str) -> None:
        with self._lock:
            self._tell(f"outlast: warning: {printable(text)}")

    def progress(self, progress: Progress) -> None:
        if not self.wants_progress:
            return
        with self._lock:
            if self._bar is None:
                # A command that ends at once shows no bar, and doesn't pay for loading one.
                if self._clock.monotonic_seconds() - self._started_seconds < _BAR_AFTER_SECONDS:
                    return
                from outlast.cli.progress import Bar

                self._bar = Bar()
            self._bar.show(progress)

    def result(self, document: Any, lines: Iterable[str], *, always: bool = False) -> None:
        self._stop_bar()
        if self._quiet and not always:
            return
        for line in lines:
            _write_out((line + "\n").encode("utf-8", "backslashreplace"))
        _flush_out()

    def failure(self, failure: Failure) -> None:
        self._stop_bar()
        self._tell(f"outlast: {printable(failure.message)}")
        if failure.hint:
            self._tell(printable(failure.hint))

    def trace(self, error: BaseException) -> None:
        self._stop_bar()
        self._tell(_traceback_text(error))

    def close(self) -> None:
        self._stop_bar()

    def _stop_bar(self) -> None:
        with self._lock:
            bar, self._bar = self._bar, None
            self.wants_progress = False
        if bar is not None:
            bar.close()

    def _tell(self, line: str) -> None:
        if self._bar is not None:
            self._bar.say(line)
        else:
            _write_error(line)


class JsonPrinter:
    """Exactly one JSON document on standard output, also when something fails.

    With `lines` every event and, a few times a second, the progress come before it, one JSON
    document a line: `{"event": ...}`, `{"progress": ...}`. The last line is the result.
    """

    def __init__(self, *, lines: bool = False, clock: Clock = SYSTEM_CLOCK) -> None:
        self._lines = lines
        self._clock = clock
        self._next_seconds = 0.0
        self._lock = threading.Lock()
        self._done = False
        self._unwritten: Exception | None = None
        self.wants_progress = lines

    def event(self, event: Event) -> None:
        fields = {"kind": event.kind, "reason": event.reason, **event.fields}
        self._line({"event": fields})

    def say(self, line: str) -> None:
        return

    def warn(self, text: str) -> None:
        _write_error(f"outlast: warning: {printable(text)}")

    def progress(self, progress: Progress) -> None:
        if not self._lines:
            return
        now_seconds = self._clock.monotonic_seconds()
        with self._lock:
            if now_seconds < self._next_seconds:
                return
            self._next_seconds = now_seconds + _LINE_EVERY_SECONDS
        self._line({"progress": {name: getattr(progress, name) for name in progress.__struct_fields__}})

    def result(self, document: Any, lines: Iterable[str], *, always: bool = False) -> None:
        import tempfile

        # What fails while a long list is made must not leave half a document behind.
        with tempfile.SpooledTemporaryFile(_SPOOL_BYTES) as spool:
            for piece in json_pieces(document):
                spool.write(piece)
            spool.write(b"\n")
            spool.seek(0)
            with self._lock:
                self._done = True
                if self._unwritten is not None:
                    raise self._unwritten
                while piece := spool.read(1 << 20):
                    _write_out(piece)
                _flush_out()

    def failure(self, failure: Failure) -> None:
        if self._done:
            _write_error(f"outlast: {printable(failure.message)}")
            return
        self.result({"error": failure._asdict()}, ())

    def trace(self, error: BaseException) -> None:
        _write_error(_traceback_text(error))

    def close(self) -> None:
        return

    def _line(self, document: Mapping[str, Any]) -> None:
        if not self._lines:
            return
        line = _json_bytes(document) + b"\n"
        with self._lock:
            if self._done:
                return
            try:
                _write_out(line)
                _flush_out()
            except (OutputClosed, Unavailable) as exc:
                self._lines = False  # the work goes on; the result will say that nobody reads
                self._unwritten = exc


def json_pieces(document: Any) -> Iterator[bytes]:
    """The JSON of a document in pieces; a value of the outermost object may be an iterator, for a long list."""
    if not isinstance(document, Mapping) or not any(isinstance(value, Iterator) for value in document.values()):
        yield _json_bytes(document)
        return
    yield b"{"
    for number, (key, value) in enumerate(document.items()):
        yield (b", " if number else b"") + _json_bytes(key) + b": "
        if not isinstance(value, Iterator):
            yield _json_bytes(value)
            continue
        yield b"["
        for position, item in enumerate(value):
            yield (b", " if position else b"") + _json_bytes(item)
        yield b"]"
    yield b"}"


def _json_bytes(value: Any) -> bytes:
    # A file name that is no text arrives as lone surrogates, which JSON can only hold as escapes.
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")


def _traceback_text(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(error)).rstrip()


def _write_out(data: bytes) -> None:
    stream: BinaryIO = sys.stdout.buffer
    try:
        stream.write(data)
    except OSError as exc:
        raise _output_error(exc) from exc


def _flush_out() -> None:
    try:
        sys.stdout.buffer.flush()
    except OSError as exc:
        raise _output_error(exc) from exc


def _output_error(exc: OSError) -> Exception:
    # What is left in the buffer would fail once more when the interpreter closes it.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    if isinstance(exc, BrokenPipeError):
        return OutputClosed()
    return Unavailable(
        f"the result can't be written to standard output: {exc.strerror}. What the command did is done and safe.",
        hint="`outlast snapshots` and `outlast show` tell what there is.",
    )


def _write_error(line: str) -> None:
    try:
        sys.stderr.buffer.write((line + "\n").encode("utf-8", "backslashreplace"))
        sys.stderr.buffer.flush()
    except (OSError, ValueError, AttributeError):
        return  # nowhere to say it: the exit code still does
