"""Signals that a training run answers: asked here, acted on at the end of a step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_ANSWERED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Signals:
    """SIGTERM: save and leave. SIGINT: the same, and a second one ends the process as it always did. SIGUSR1: save
    into memory and go on. Handlers can only be set in the main thread; elsewhere nothing is answered."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        """the strongest that came since it was last taken"""
        self._before: dict[signal.Signals, Any] = {}

    def answer(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for each in _ANSWERED:
                self._before[each] = signal.signal(each, self._ask)

    def stop(self) -> None:
        """Give the signals back to whoever answered them before."""
        for each, before in self._before.items():
            if signal.getsignal(each) == self._ask and before is not None:
                signal.signal(each, before)
        self._before.clear()

    def take(self) -> signal.Signals | None:
        asked, self.asked = self.asked, None
        return asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        if self.asked is None or _ANSWERED.index(signal.Signals(number)) < _ANSWERED.index(self.asked):
            self.asked = signal.Signals(number)
