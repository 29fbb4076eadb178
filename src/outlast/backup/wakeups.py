"""Wait until something changes in a folder, or a time has passed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable


class Wakeups:
    """Tells of changes below a folder as soon as the kernel does, through the library watchfiles.

    That only saves time: where it isn't installed, or the kernel has no room for another watch, or the folder isn't
    there yet, each wait lasts as long as it may, and at most `poll_seconds`.
    """

    def __init__(self, folder: bytes, poll_seconds: float, tell: Callable[[str], None]) -> None:
        """`tell` is called, once, with why changes are not told of at once."""
        self._folder = folder
        self._poll_seconds = poll_seconds
        self._tell = tell
        self._is_told = False
        self._changed = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._watched: tuple[int, int] | None = None
        """(device, inode) of the folder that the thread watches: another of that name may take its place"""
        self._failure = ""

    def wait(self, seconds: float) -> None:
        """Return after a change, or after so many seconds. What signal handlers raise ends it at once."""
        self._begin()
        is_watching = self._thread is not None and self._thread.is_alive()
        self._changed.wait(seconds if is_watching else min(seconds, self._poll_seconds))
        self._changed.clear()
        if self._failure and not self._is_told:
            self._is_told = True
            self._tell(self._failure)

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _begin(self) -> None:
        try:
            status = os.stat(self._folder)
        except OSError:
            return
        found = status.st_dev, status.st_ino
        if found == self._watched:
            return
        self.close()
        self._stop = threading.Event()
        self._watched = found
        self._thread = threading.Thread(target=self._follow, args=(self._stop,), name="watch", daemon=True)
        self._thread.start()

    def _follow(self, stop: threading.Event) -> None:
        try:
            from watchfiles import Change, watch

            folder = self._folder.decode()
            for changes in watch(
                folder, watch_filter=None, stop_event=stop, step=100, debounce=500, raise_interrupt=False
            ):
                self._changed.set()
                if (Change.deleted, folder) in changes:
                    self._watched = None  # another one may even get the same inode
                    return
        except ImportError:
            self._failure = "watchfiles is not installed (pip install 'outlast[watch]')"
        except (OSError, UnicodeDecodeError, RuntimeError) as exc:
            self._failure = f"the folder can't be watched ({exc})"
        self._changed.set()
