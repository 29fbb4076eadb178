"""A command of the user's, run to its end: what it came to, what it printed last, and nothing of it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import msgspec

from outlast.errors import InvalidInput, Unavailable

Command = str | Sequence[str]
"""A line for `sh -c`, or a program with its arguments"""

SECRETS = ("OUTLAST_PASSPHRASE", "OUTLAST_FROM_PASSPHRASE", "OUTLAST_NEW_PASSPHRASE")

_TAIL_BYTES = 16 << 10
_LINES_SHOWN = 5
_LINE_CHARACTERS_MAX = 300
_END_SECONDS = 10.0
# It dies with this process, also by kill -9: prctl(2), PR_SET_PDEATHSIG. What Python does to itself when it starts, two
# signals that it ignores and a variable that it may set (PEP 538), is undone.
_LAUNCH = """
import ctypes, os, signal, sys
parent, locale, *words = sys.argv[1:]
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
for each in (signal.SIGPIPE, signal.SIGXFSZ):
    signal.signal(each, signal.SIG_DFL)
os.environ.pop("LC_CTYPE", None)
if locale:
    os.environ["LC_CTYPE"] = locale
if os.getppid() != int(parent):
    os._exit(137)
try:
    os.execvp(words[0], words)
except OSError as exc:
    os.write(2, f"{words[0]} can't be started: {exc.strerror}\\n".encode())
    os._exit(127)
"""


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    """its exit code; minus the signal that killed it"""
    is_late: bool
    """It was ended, for its time was over."""
    tail: str
    """the last lines of what it printed, on one line"""

    def told(self, timeout_seconds: float) -> str:
        """Why it failed; empty where it did not."""
        if not self.code and not self.is_late:
            return ""
        if self.is_late:
            how = f"was still running after {timeout_seconds:,.0f} s, and was ended"
        elif self.code < 0:
            how = f"was killed by {_signal_name(-self.code)}"
        else:
            how = f"ended with exit code {self.code}"
        return f"{how}: {self.tail}" if self.tail else how


def check(command: Command) -> None:
    """Raise `InvalidInput` for what can't be a command."""
    words = [command] if isinstance(command, str) else list(command)
    if not words or not words[0].strip() or any("\0" in word for word in words):
        raise InvalidInput(f"{command!r} is no command; nothing was done.")


def run(command: Command, environment: Mapping[str, str], timeout_seconds: float) -> Ended:
    """Run it in the current folder, with nothing to read, in a process group of its own that ends with it.

    Of the environment our own passphrases are left out.
    """
    words = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
    kept = {name: text for name, text in environment.items() if name not in SECRETS}
    launch = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), kept.get("LC_CTYPE", ""), *words]
    output = _Tail()
    process = subprocess.Popen(
        launch, env=kept, stdin=subprocess.DEVNULL, stdout=output.fd, stderr=output.fd, start_new_session=True
    )
    output.read_on()
    ended = _Ending(process.pid)
    is_late = False
    try:
        is_late = not ended.wait(timeout_seconds)
    finally:
        # Also when we are interrupted: whatever it started and left behind goes too. It is not reaped before,
        # so that nobody else can have its number.
        if not ended.wait(0):
            _signal(process.pid, signal.SIGTERM)
            ended.wait(_END_SECONDS)
        _signal(process.pid, signal.SIGKILL)
        ended.wait(None)
        process.wait()
        output.close()
    if ended.code is None:
        raise Unavailable("the exit code of a command was taken by another part of this process; it is not known.")
    return Ended(ended.code, is_late, output.told())


def _signal(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class _Ending:
    """Tells when a process has ended, without reaping it."""

    def __init__(self, pid: int) -> None:
        self.code: int | None = None
        self._pid = pid
        self._over = threading.Event()
        threading.Thread(target=self._watch, name="outlast-command", daemon=True).start()

    def _watch(self) -> None:
        with suppress(ChildProcessError):
            found = os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
            if found is not None:
                self.code = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        self._over.set()

    def wait(self, seconds: float | None) -> bool:
        return self._over.wait(seconds)


class _Tail:
    """Takes all that is printed, so that nobody waits for it, and keeps the end."""

    def __init__(self) -> None:
        self._source, self.fd = os.pipe()
        self._kept = bytearray()
        self._thread = threading.Thread(target=self._read, name="outlast-output", daemon=True)

    def read_on(self) -> None:
        """Call it when the command has the other end."""
        os.close(self.fd)
        self._thread.start()

    def _read(self) -> None:
        with open(self._source, "rb", buffering=0) as source:
            while piece := source.read(64 << 10):
                self._kept += piece
                del self._kept[:-_TAIL_BYTES]

    def close(self) -> None:
        self._thread.join(_END_SECONDS)  # what left the process group may hold the pipe for ever

    def told(self) -> str:
        lines = [line.strip() for line in bytes(self._kept).decode(errors="replace").splitlines()]
        shown = [line[:_LINE_CHARACTERS_MAX] for line in lines if line][-_LINES_SHOWN:]
        return " | ".join(shown)


class Commands(msgspec.Struct, frozen=True):
    """What proves the upper levels; each passes with exit code 0."""

    golden: Command | None = None
    """L3: compares what the model gives with what it has to"""
    quality: Command | None = None
    """L4: measures it on a test set that doesn't change"""
    resume: Command | None = None
    """L5: trains on from it"""
    timeout_seconds: float = 3600.0
    """for each"""
