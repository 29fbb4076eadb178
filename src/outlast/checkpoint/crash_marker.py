"""How far a life of a run got, for the next one on this machine: the step at which it died, whatever killed it.

A file in memory of two numbers, the step that the life began at and the step it reached, which is written by a
store to memory at each step. It tells a run that crashes at the same step again and again from one that is killed
now and then. After a reboot, or on another machine, it isn't known.

While the life goes on the process has a lock on the file, as fcntl(2) has them: it ends with the process, however
that ends, and workers that are forked don't have it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct

from outlast.errors import Refused

_NUMBERS = struct.Struct("<qq")
_LOCK = struct.Struct("@hhqqi")
"""struct flock of Linux: kind, from where, start, length, process"""
_HELD: dict[str, memoryview] = {}
"""path -> numbers, of those that this process holds: to open and close such a file again would end the lock"""
os.register_at_fork(after_in_child=_HELD.clear)


class CrashMarker:
    """The marker at `path`, whose folder is there, of a run. `steps[1]` is to be set as steps are finished."""

    def __init__(self, path: str, run: str) -> None:
        self._path, self._run = path, run
        self.steps: memoryview | list[int] = [0, 0]
        self._file = -1

    def last(self) -> tuple[int, int] | None:
        """(the step it began at, the step it reached) of the life before, if it didn't end well."""
        held = _HELD.get(self._path)
        if held is not None:
            return held[0], held[1]
        try:
            with open(self._path, "rb") as file:
                began_at, reached = _NUMBERS.unpack(file.read(_NUMBERS.size))
        except (OSError, struct.error):
            return None
        return began_at, reached

    def refuse_other(self) -> None:
        """Raises `Refused` where a life of the run goes on in another process of this machine."""
        if self._path in _HELD:
            return
        try:
            with open(self._path, "rb+") as file:
                asked = _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
                kind, _, _, _, process = _LOCK.unpack(fcntl.fcntl(file, fcntl.F_GETLK, asked)[: _LOCK.size])
        except OSError:
            return
        if kind != fcntl.F_UNLCK:
            raise Refused(
                f"run {self._run} is being trained by process {process} on this machine; nothing was changed.",
                hint="End that one first, or give this run another name.",
            )

    def begin(self, step: int) -> None:
        """This life begins. Where the marker can't be made, it goes unmarked. Raises `Refused` as `refuse_other`."""
        self.let_go()
        self.refuse_other()
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(self._file, 0, _NUMBERS.size)  # a hole would end the process when there is no room
            self.steps = memoryview(mmap.mmap(self._file, _NUMBERS.size)).cast("q")
        except OSError:
            self.let_go()
            self.refuse_other()
            return
        _HELD[self._path] = self.steps
        self.steps[0] = self.steps[1] = step

    def end(self) -> None:
        """It ended well."""
        if isinstance(self.steps, memoryview):
            try:
                os.unlink(self._path)
            except OSError:
                pass
            self.let_go()

    def let_go(self) -> None:
        """Nothing more is marked by this process."""
        if _HELD.get(self._path) is self.steps:
            del _HELD[self._path]
        self.steps = [0, 0]
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
