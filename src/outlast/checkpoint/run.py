"""What a training script uses: `Run`. Resume, save when due, stop well, raise what failed in the background."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator, Mapping
from types import MappingProxyType, TracebackType
from typing import Any, Literal, Self

import torch
from torch.utils.data import DataLoader

from outlast.checkpoint import keep as keeping
from outlast.checkpoint import save as saving
from outlast.checkpoint import schedule
from outlast.checkpoint import state as live
from outlast.checkpoint.data import Feed
from outlast.checkpoint.home import Home
from outlast.checkpoint.load import load
from outlast.checkpoint.pending import PendingSave
from outlast.checkpoint.signals import Signals
from outlast.checkpoint.stage import Stage, Staged
from outlast.checkpoint.state import State
from outlast.clock import SYSTEM_CLOCK, Clock
from outlast.errors import Corrupt, InvalidInput, Refused
from outlast.events import NULL_SINK, Event, EventSink
from outlast.records import Snapshot

TERMINATED = 143
_NEVER = math.inf
_EASE = 0.05


class Run:
    """One training run, whose checkpoints lie in the repository at `url` under its name."""

    def __init__(
        self,
        url: str,
        *,
        name: str,
        state: State,
        save_every: int | str = "auto",
        keep: int = 3,
        keep_every: int = 0,
        best: str = "",
        sink: EventSink = NULL_SINK,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """`save_every`: steps, or seconds as in "90s", or "auto". `best`: "loss:min", by the metrics given to `step`.

        Kept are the last `keep` checkpoints, each whose step is a multiple of `keep_every`, the best one, and the
        newest whose metrics are all numbers.
        """
        live.check(state)
        self.finished_steps = 0
        self.state: dict[str, Any] = {key: _resumable(item) for key, item in state.items()}
        self._feeds = {id(item): self.state[key] for key, item in state.items()}
        self._policy = _policy(save_every)
        self._home = Home(url, name, keeping.Policy(keep, keep_every, best), clock, sink)
        self._sink, self._clock = sink, clock
        self._stage = Stage()
        self._staged: Staged | None = None
        self._pending: PendingSave | None = None
        self._signals = Signals()
        self._stepped_at: dict[int, int] = {}
        self._is_inside_step = False
        self._last = self._began = self._saved_at = clock.monotonic_seconds()
        self._step_seconds = 0.0
        self._facts = schedule.Facts()
        self._due_step, self._due_seconds = self._next_due()
        self._hooks = [hook for each in live.optimizers(self.state) for hook in self._hooked(each)]

    def _hooked(self, optimizer: torch.optim.Optimizer) -> Iterator[Any]:
        key = id(optimizer)

        def before(*_: object) -> None:
            staged = self._staged
            if staged is not None:
                staged.wait()
                self._staged = None

        def after(*_: object) -> None:
            self._stepped_at[key] = self.finished_steps

        yield optimizer.register_step_pre_hook(before)
        yield optimizer.register_step_post_hook(after)

    # -- resume ----------------------------------------------------------------------------------

    def resume(self, *, crashes_max: int = 3) -> int:
        """Load the newest checkpoint that is whole; the step to go on from, 0 where there is none.

        A damaged one is named as an event, and the one before it is taken; so is one that the run went on from
        `crashes_max` times without ever saving a later one. From now on signals are answered.

        Raises `Corrupt` when there are checkpoints and none is whole: then the live state is a mixture, not to be
        trained with. Raises `Refused` when the state doesn't fit, or each of them was tried too often.
        """
        self._signals.answer()
        failure: Exception | None = None
        for home, step, snapshot in self._home.candidates():
            crashes = home.crashes(snapshot)
            if crashes >= crashes_max:
                what = f"the run went on from it {crashes} times and saved no later one"
                failure = failure or Refused(f"checkpoint {snapshot.id[:8]} of step {step} is left out: {what}.")
                self._skip(step, snapshot, what)
                continue
            try:
                loaded = load(home.repository, snapshot, self.state)
            except Corrupt as exc:
                failure = failure or exc
                self._skip(step, snapshot, f"it is damaged: {exc.message}")
                continue
            home.note_resumed(snapshot)
            self.finished_steps = loaded.step
            self._saved_at = self._last = self._clock.monotonic_seconds()
            self._due_step, self._due_seconds = self._next_due()
            return loaded.step
        if failure is not None:
            raise failure
        return 0

    def checkpoints(self) -> list[tuple[int, Snapshot]]:
        """(step, snapshot) of those on disk, in order of step."""
        return self._home.disk.checkpoints()

    def load(self, snapshot: Snapshot) -> int:
        """Load this checkpoint; its step. Raises `Corrupt`, `Refused`."""
        loaded = load(self._home.disk.repository, snapshot, self.state)
        self.finished_steps = loaded.step
        self._saved_at = self._last = self._clock.monotonic_seconds()
        self._due_step, self._due_seconds = self._next_due()
        return loaded.step

    def _skip(self, step: int, snapshot: Snapshot, what: str) -> None:
        told = f"checkpoint {snapshot.id[:8]} of step {step} is skipped: {what}"
        self._sink.event(Event("checkpoint.skipped", told, {"snapshot": snapshot.id, "step": step}))

    # -- the loop --------------------------------------------------------------------------------

    def steps(self, loader: Any, *, until: int) -> Iterator[tuple[int, Any]]:
        """(step, batch) from where the run is, epoch after epoch."""
        feed = self._feeds.get(id(loader), loader)
        while self.finished_steps < until:
            empty = True
            for batch in feed:
                empty = False
                self._is_inside_step = True
                yield self.finished_steps, batch
                if self.finished_steps >= until:
                    return
            if empty:
                raise InvalidInput("the loader gave no batch in a whole epoch, so the run would never end.")

    def step(self, **metrics: float) -> None:
        """Say that a step is complete, at the end of each iteration. Saves when due, and answers signals.

        Raises what made a save in the background fail, once; `SystemExit` with 143 after SIGTERM, and
        `KeyboardInterrupt` after SIGINT, when the state is saved.
        """
        self.finished_steps += 1
        self._is_inside_step = False
        now = self._clock.monotonic_seconds()
        took, self._last = now - self._last, now
        if self._pending is None and self._signals.asked is None:
            self._step_seconds += (took - self._step_seconds) * (_EASE if self._step_seconds else 1.0)
            if self.finished_steps < self._due_step and now < self._due_seconds:
                return
        self._attend(now, took, metrics)

    def _attend(self, now: float, took: float, metrics: Mapping[str, float]) -> None:
        pending = self._pending
        if pending is not None:
            pending.cost_seconds += max(0.0, took - self._step_seconds)
            if pending.done:
                self._end_pending()
        asked = self._signals.take()
        if asked is not None:
            self._answer(asked, metrics)
        elif self._pending is None and (self.finished_steps >= self._due_step or now >= self._due_seconds):
            self.save(metrics)

    def _answer(self, asked: signal.Signals, metrics: Mapping[str, float]) -> None:
        if asked == signal.SIGUSR1:
            self.save(metrics, in_memory=True)
            return
        self.save(metrics).wait()
        self.close()
        if asked == signal.SIGTERM:
            raise SystemExit(TERMINATED)
        raise KeyboardInterrupt

    # -- saving ----------------------------------------------------------------------------------

    def save(self, metrics: Mapping[str, float] = MappingProxyType({}), *, in_memory: bool = False) -> PendingSave:
        """Begin to save the state as it is now. Waits for a save that is still under way, and raises if that failed.

        `in_memory`: into the memory of this machine, where a later process of this run finds it; a reboot ends it.
        """
        self._end_pending(wait=True)
        began = self._clock.monotonic_seconds()
        parts = live.capture(self.state, self._accumulating())
        staged = self._stage.begin(saving.files_of(parts), overlap=True)
        self._staged = None if staged.done else staged
        step = self.finished_steps
        pending = self._pending = PendingSave(step, staged, began)

        def persist() -> Snapshot:
            snapshot = self._home.persist(step, parts, staged.contents, metrics, in_memory=in_memory)
            pending.write_seconds = self._clock.monotonic_seconds() - began
            return snapshot

        threading.Thread(target=pending.run, args=(persist,), name="outlast-save").start()
        self._last = self._saved_at = self._clock.monotonic_seconds()
        pending.cost_seconds = self._last - began
        self._due_step, self._due_seconds = self._next_due()
        return pending

    def _next_due(self) -> tuple[float, float]:
        """(step, moment): whichever of the two counts; the other is never."""
        after = schedule.interval(self._facts, self._policy)
        if after.steps:
            return self.finished_steps + after.steps, _NEVER
        return _NEVER, self._saved_at + after.seconds - self._step_seconds / 2

    def _accumulating(self) -> set[int]:
        """Parameters of optimizers that have not stepped in the iteration that ends: their gradients are needed."""
        return {
            id(parameter)
            for each in live.optimizers(self.state)
            if self._stepped_at.get(id(each), -1) != self.finished_steps - 1
            for group in each.param_groups
            for parameter in group["params"]
        }

    def _end_pending(self, *, wait: bool = False) -> None:
        pending = self._pending
        if pending is None:
            return
        if wait:
            pending.wait_done()
        self._pending = None
        pending.raise_error()
        run_seconds = self._home.run_seconds_before + self._clock.monotonic_seconds() - self._began
        self._facts = schedule.Facts(
            pending.cost_seconds, pending.write_seconds, self._home.failures_before, run_seconds
        )
        self._due_step, self._due_seconds = self._next_due()

    def close(self) -> None:
        """Wait for what is under way; raises what failed. Signals are no longer answered."""
        try:
            self._end_pending(wait=True)
        finally:
            self._signals.stop()
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After an exception the state is saved only where it is whole: between two steps, not inside one."""
        if isinstance(error, Exception) and not self._is_inside_step and self.finished_steps:
            try:
                self.save().wait()
            except Exception as exc:  # noqa: BLE001  the first error is the one to tell of
                self._sink.event(Event("save.failed", f"the last save failed: {exc}"))
        self.close()


def _resumable(item: Any) -> Any:
    own = callable(getattr(item, "state_dict", None)) and callable(getattr(item, "load_state_dict", None))
    return Feed(item) if isinstance(item, DataLoader) and not own else item


def _policy(every: int | str | Literal["auto"]) -> schedule.Policy:
    if every == "auto":
        return schedule.Policy()
    if isinstance(every, int) and every > 0:
        return schedule.Policy(steps=every)
    if isinstance(every, str) and every.endswith("s"):
        try:
            return schedule.Policy(seconds=float(every[:-1]))
        except ValueError:
            pass
    raise InvalidInput(f'save_every={every!r} is neither a number of steps, nor seconds as in "90s", nor "auto".')
