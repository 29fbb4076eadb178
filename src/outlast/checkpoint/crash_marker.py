"""How far a life of a run got, for the next one on this machine: the step at which it died, whatever killed it.

A file in memory of two numbers, the step that the life began at and the step it reached, which is written by a
store to memory at each step. It tells a run that crashes at the same step again and again from one that is killed
now and then. After a reboot, or on another machine, it isn't known.
"""

from __future__ import annotations

import mmap
import os
import struct

_NUMBERS = struct.Struct("<qq")


class CrashMarker:
    """The marker at `path`, whose folder is there. `steps[1]` is to be set as steps are finished."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.steps: memoryview | list[int] = [0, 0]

    def last(self) -> tuple[int, int] | None:
        """(the step it began at, the step it reached) of the life before, if it didn't end well."""
        try:
            with open(self._path, "rb") as file:
                return _NUMBERS.unpack(file.read(_NUMBERS.size))
        except (OSError, struct.error):
            return None

    def begin(self, step: int) -> None:
        """This life begins. Where the marker can't be made, it goes unmarked."""
        try:
            place = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError:
            return
        try:
            os.posix_fallocate(place, 0, _NUMBERS.size)  # a hole would end the process when there is no room
            self.steps = memoryview(mmap.mmap(place, _NUMBERS.size)).cast("q")
        except OSError:
            return
        finally:
            os.close(place)
        self.steps[0] = self.steps[1] = step

    def end(self) -> None:
        """It ended well."""
        if isinstance(self.steps, memoryview):
            self.steps = [0, 0]
            try:
                os.unlink(self._path)
            except OSError:
                pass
