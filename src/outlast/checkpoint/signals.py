"""What may end a training run from outside: asked here, acted on at the end of a step."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from outlast.checkpoint.schedule import SIGNALS


class Signals:
    """SIGTERM: save and leave. SIGINT: the same, and a second one ends the process as it always did. SIGUSR1: save
    into memory and go on. Handlers can only be set in the main thread; elsewhere nothing is answered."""

    def __init__(self, on_exception: Callable[[BaseException], None]) -> None:
        """`on_exception` is called for one that nobody caught, before Python tells of it."""
        self.asked = 0
        """the strongest that came since it was last taken"""
        self._was_interrupted = False
        self._process = os.getpid()
        self._on_exception = on_exception
        self._before: dict[int, Any] = {}
        self._hook_before: Any = None

    def answer(self) -> None:
        if threading.current_thread() is threading.main_thread() and not self._before:
            for each in SIGNALS:
                self._before[each] = signal.signal(each, self._ask)
            self._hook_before, sys.excepthook = sys.excepthook, self._uncaught

    def stop(self) -> None:
        """Give the signals back to whoever answered them before."""
        for each, before in self._before.items():
            if signal.getsignal(each) == self._ask and before is not None:
                signal.signal(each, before)
        if self._before and sys.excepthook == self._uncaught:
            sys.excepthook = self._hook_before
        self._before.clear()

    def take(self) -> int:
        asked, self.asked = self.asked, 0
        return asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a child of this one, such as a worker: nothing of the run is its own
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if number == signal.SIGINT and self._was_interrupted:
            self.asked = 0
            raise KeyboardInterrupt
        self._was_interrupted |= number == signal.SIGINT
        if not self.asked or SIGNALS.index(number) < SIGNALS.index(self.asked):
            self.asked = number

    def _uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        try:
            if os.getpid() == self._process:
                self._on_exception(error)
        finally:
            self._hook_before(kind, error, trace)
