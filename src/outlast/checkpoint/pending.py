"""A save under way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from outlast.checkpoint.background import Background
from outlast.checkpoint.stage import Staged
from outlast.errors import Busy, Refused
from outlast.records import Snapshot


class PendingSave:
    """What to wait for, in this order: staged, durable, verified.

    *Staged*: training may change everything. *Durable*: it survives a kill and a power cut, and older ones may be
    dropped. *Verified*: every byte was read back from the repository and compared; nobody does that unasked.
    """

    def __init__(
        self, step: int, staged: Staged, verify: Callable[[Snapshot], None], *, in_memory: bool = False
    ) -> None:
        self.step = step
        self.in_memory = in_memory
        self.snapshot: Snapshot | None = None
        self.cost_seconds = 0.0
        """what it took from the training so far"""
        self.write_seconds = 0.0
        """from the call until it was durable"""
        self._staged = staged
        self._verify = verify
        self._durable = threading.Event()
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._was_raised = False
        self._background: Background | None = None

    @property
    def done(self) -> bool:
        """Durable, and older ones dropped; or failed."""
        self._settle()
        return self._done.is_set()

    def wait_staged(self) -> None:
        """Raises `Refused` when the copy isn't of one instant."""
        self._staged.check()

    def wait_done(self) -> None:
        """Until it is over, well or not."""
        self._settle()
        self._done.wait()

    def wait(self, timeout_seconds: float | None = None) -> Snapshot:
        """Until it is durable. Raises what made it fail; `Busy` when that takes longer."""
        if not self._durable.wait(timeout_seconds):
            raise Busy(f"the save of step {self.step} is not durable after {timeout_seconds:g} s; it goes on.")
        self.raise_error()
        assert self.snapshot is not None
        return self.snapshot

    def wait_verified(self) -> Snapshot:
        """Until it is durable, and then read it back. Raises `Corrupt`, and what `wait` raises."""
        snapshot = self.wait()
        self.wait_done()  # a repository is for one thread
        self._verify(snapshot)
        return snapshot

    def take_error(self) -> BaseException | None:
        """What made it fail, unless it was raised already."""
        if self._was_raised:
            return None
        self._was_raised = self._error is not None
        return self._error

    def raise_error(self) -> None:
        if self._error is not None:
            self._was_raised = True
            raise self._error

    def start(self, persist: Callable[[], Snapshot], then: Callable[[], None]) -> None:
        """Save, in a thread. `then`: what is left to do when it is durable."""
        self._background = Background(partial(self.run, persist, then), self._lose, name="outlast-save", daemon=False)
        self._background.start()

    def _settle(self) -> None:
        if self._background is not None:
            self._background.settle()

    def _lose(self) -> None:
        self._was_raised = True  # by what interrupted it
        self._error = Refused(f"the save of step {self.step} was interrupted before it began; nothing was saved.")
        self._durable.set()
        self._done.set()

    def run(self, persist: Callable[[], Snapshot], then: Callable[[], None]) -> None:
        """Save, in this thread."""
        try:
            self.snapshot = persist()
            self._durable.set()
            then()
        except BaseException as exc:  # noqa: BLE001  raised where the training asks for it
            self._error = exc
        finally:
            self._durable.set()
            self._done.set()
