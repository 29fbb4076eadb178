"""Work in a thread of its own, which an exception that comes while it is started does not lose track of.

`Thread.start` can be left by a KeyboardInterrupt before the thread exists, or after it began. Whoever goes on then has
to know which: what still runs reads the memory that the next save writes to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs `work` once, or never: then `lost` is called."""

    def __init__(self, work: Callable[[], object], lost: Callable[[], object], *, name: str, daemon: bool) -> None:
        self._work, self._lost = work, lost
        self._thread = threading.Thread(target=self._run, name=name, daemon=daemon)
        self._lock = threading.Lock()
        self._is_decided = False
        """whether it runs"""
        self._is_started = False
        self._over = threading.Event()

    def start(self) -> None:
        self._thread.start()
        self._is_started = True

    def settle(self) -> None:
        """From now on it is certain that it runs, or never will."""
        if self._is_started:
            return
        with self._lock:
            is_lost, self._is_decided = not self._is_decided, True
        if is_lost:
            self._lost()
            self._over.set()

    def wait(self) -> None:
        """Until nothing of it runs any more."""
        self.settle()
        self._over.wait()

    def _run(self) -> None:
        with self._lock:
            if self._is_decided:
                return
            self._is_decided = True
        try:
            self._work()
        finally:
            self._over.set()
