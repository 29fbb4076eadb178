"""A save under way."""

from __future__ import annotations

import threading
from collections.abc import Callable

from outlast.checkpoint.stage import Staged
from outlast.errors import Busy
from outlast.records import Snapshot


class PendingSave:
    """What to wait for, in this order: staged, then durable.

    *Staged*: training may change everything. *Durable*: it survives a kill and a power cut, and older ones may be
    dropped.
    """

    def __init__(self, step: int, staged: Staged, began_seconds: float) -> None:
        self.step = step
        self.snapshot: Snapshot | None = None
        self.cost_seconds = 0.0
        """what it took from the training so far"""
        self.write_seconds = 0.0
        """from the call until it was durable"""
        self._staged = staged
        self._done = threading.Event()
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def wait_staged(self) -> None:
        self._staged.check()

    def wait_done(self) -> None:
        """Until it is over, well or not."""
        self._done.wait()

    def wait(self, timeout_seconds: float | None = None) -> Snapshot:
        """Until it is durable. Raises what made it fail; `Busy` when that takes longer."""
        if not self._done.wait(timeout_seconds):
            raise Busy(f"the save of step {self.step} is not durable after {timeout_seconds:g} s; it goes on.")
        self.raise_error()
        assert self.snapshot is not None
        return self.snapshot

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def run(self, persist: Callable[[], Snapshot]) -> None:
        """In the thread that saves."""
        try:
            self._staged.check()
            self.snapshot = persist()
        except BaseException as exc:  # noqa: BLE001  raised where the training asks for it
            self._error = exc
        finally:
            self._done.set()
