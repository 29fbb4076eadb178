"""How far a life of a run got, for the next one on this machine: the step at which it died, whatever killed it.

A file in memory of three numbers: the step that the life began at; the step it reached, which is written by a store
to memory at each step; and the id of its process. It tells a run that crashes at the same step again and again from
one that is killed now and then. After a reboot, or on another machine, it isn't known.

While the life goes on the process has a lock on the file, as fcntl(2) has them: it ends with the process, however
that ends, and workers that are forked don't have it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct

_NUMBERS = struct.Struct("<qqq")


class CrashMarker:
    """The marker at `path`, whose folder is there. `steps[1]` is to be set as steps are finished."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.steps: memoryview | list[int] = [0, 0, 0]
        self._file = -1

    def last(self) -> tuple[int, int] | None:
        """(the step it began at, the step it reached) of the life before, if it didn't end well."""
        try:
            with open(self._path, "rb") as file:
                began_at, reached, _ = _NUMBERS.unpack(file.read(_NUMBERS.size))
        except (OSError, struct.error):
            return None
        return began_at, reached

    def other_process(self) -> int | None:
        """The process on this machine in which a life of the run goes on, if it is another one."""
        try:
            with open(self._path, "rb+") as file:
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return int(_NUMBERS.unpack(file.read(_NUMBERS.size))[2])
        except (OSError, struct.error):
            pass
        return None

    def begin(self, step: int) -> None:
        """This life begins. Where the marker can't be made, it goes unmarked."""
        self._close()
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(self._file, 0, _NUMBERS.size)  # a hole would end the process when there is no room
            self.steps = memoryview(mmap.mmap(self._file, _NUMBERS.size)).cast("q")
        except OSError:
            self._close()
            return
        self.steps[0] = self.steps[1] = step
        self.steps[2] = os.getpid()

    def end(self) -> None:
        """It ended well."""
        if isinstance(self.steps, memoryview):
            self._close()
            try:
                os.unlink(self._path)
            except OSError:
                pass

    def _close(self) -> None:
        self.steps = [0, 0, 0]
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
