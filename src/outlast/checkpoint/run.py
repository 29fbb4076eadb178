"""What a training script uses: `Run`. Resume, save when due, stop well, raise what failed in the background."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from types import TracebackType
from typing import Any, Self
from weakref import WeakSet

import msgspec
import torch

from outlast import Passphrase, secret_of
from outlast.checkpoint import environment, gradients, prove, references, schedule
from outlast.checkpoint import keep as keeping
from outlast.checkpoint import save as saving
from outlast.checkpoint import state as live
from outlast.checkpoint.data import Feed, Placed, resumable
from outlast.checkpoint.load import Loaded, load
from outlast.checkpoint.pending import PendingSave
from outlast.checkpoint.prove import Proof, Trail
from outlast.checkpoint.ranks import Ranks
from outlast.checkpoint.save import Captured
from outlast.checkpoint.signals import Signals
from outlast.checkpoint.stage import Stage, Staged
from outlast.checkpoint.state import State
from outlast.checkpoint.tiers import Candidate, Tiers
from outlast.clock import SYSTEM_CLOCK, Clock
from outlast.errors import Corrupt, InvalidInput, NotFound, Refused
from outlast.events import LOG_SINK, Event, EventSink
from outlast.records import Snapshot
from outlast.repo.repository import Repository

TERMINATED = 143
_OPEN: WeakSet[Run] = WeakSet()
_NEVER = math.inf
_EASE = 0.05
_STEPLESS_BATCHES = 100


class _Life(msgspec.Struct):
    """Of all lives of a run together, as the last checkpoint tells."""

    run_seconds: float = 0.0
    failures: int = 0
    """lives that ended without saving first"""
    ended_well: bool = False
    """it was the last save of a life that ended because it was told to, or was done"""


class _Tried(msgspec.Struct):
    """What loading a checkpoint came to on one rank."""

    step: int = 0
    damage: str = ""


class Run:
    """One training run, whose checkpoints lie in the repository at `url` under its name.

    Under `torch.distributed` every rank makes one, after `init_process_group`, and all call the same methods at the
    same steps. They commit each checkpoint together, or not at all.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        name: str,
        state: State,
        save_every: int | str = "auto",
        keep: int = 3,
        keep_every: int = 0,
        best: str = "",
        delta: bool = False,
        overlap: bool = True,
        passphrase: Passphrase | None = None,
        ranks: Ranks | None = None,
        sink: EventSink = LOG_SINK,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """`save_every`: steps, time as in "90s", "10m" and "2h", or "auto".

        `best`: "loss:min", by the metrics given to `step`. Kept are the last `keep` checkpoints, each whose step is a
        multiple of `keep_every`, the best one, and the newest whose metrics are all numbers. With `delta` dense
        states are stored as exact differences from the checkpoint before, which takes less space and more work.
        Without `overlap` everything is copied within the call that saves, for a training that changes parameters
        elsewhere than in the step of an optimizer. With a `passphrase` the repository is encrypted.
        """
        url = os.fspath(url)
        live.check(state)
        self._name = references.run_name(name)
        self.finished_steps = 0
        self.skipped: list[str] = []
        """checkpoints that `resume` left out, and why"""
        self.state: dict[str, Any] = {key: resumable(item) for key, item in state.items()}
        live.check_values(self.state)
        self._feeds = {id(item): self.state[key] for key, item in state.items()}
        self._unread: set[str] = set()
        """loaders of the state that gave no batch yet"""
        for key, feed in self.state.items():
            if isinstance(feed, Feed | Placed):
                feed.on_batch = partial(self._read_from, key)
                self._unread.add(key)
        self._policy = schedule.policy(save_every)
        self._tiers = Tiers(url, name, keeping.checked(keep, keep_every, best), secret_of(passphrase), clock, sink)
        self._tiers.disk.delta = delta
        self._ranks = ranks or Ranks()
        self._trail = Trail()
        self._proof: Proof | None = None
        self._overlap, self._sink, self._clock = overlap, sink, clock
        self._stage = Stage()
        self._pending: PendingSave | None = None
        self._signals = Signals(self._on_uncaught)
        self._is_inside_step = False
        self._last = self._began = self._saved_at = clock.monotonic_seconds()
        self._saved_step = self._first_step = 0
        self._has_begun = False
        self._unnoted: tuple[int, Candidate | None] | None = None
        """where this life began, until its first step does: one that makes no step is no life"""
        self._metrics: Mapping[str, float] = {}
        self._step_seconds = 0.0
        self._facts = schedule.Facts()
        self._life = _Life()
        self._due_step, self._due_seconds = self._next_due()
        self._meet_step = 1
        self._hooks = [hook for each in live.optimizers(self.state) for hook in self._hooked(each)]
        _OPEN.add(self)

    def _hooked(self, optimizer: torch.optim.Optimizer) -> Iterator[Any]:
        def before(*_: object) -> None:
            self.begin_step()
            self._stage.hold()

        yield optimizer.register_step_pre_hook(before)
        yield optimizer.register_step_post_hook(lambda *_: gradients.use_up(optimizer))

    # -- resume ----------------------------------------------------------------------------------

    def resume(self, *, crashes_max: int = 3, same_environment: bool = False) -> int:
        """Load the newest checkpoint that is whole; the step to go on from, 0 where there is none.

        A damaged one is named, and the one before it is taken; so is one that the run went on from `crashes_max`
        times without ever saving a later one. What is not as it was when it was saved (versions, devices, flags,
        number of ranks) is told, or refused with `same_environment`. From now on signals are answered.

        Raises `Corrupt` when there are checkpoints and none is whole: then the live state is a mixture, not to be
        trained with. Raises `Refused` when the state doesn't fit, or each of them was tried too often.
        """
        self._proof = prove.ordered(self._name, self._tiers.disk, self._ranks, self.state, self._trail)
        if self._proof is not None:
            return self.begin_at(self._proof.begin())
        self._tell(self._end_pending(wait=True))
        self._signals.answer()
        self._is_inside_step = True  # the state is a mixture until one was loaded
        failure: Exception | None = None
        for each in self._ranks.main.from_first(self._candidates, list[Candidate]):
            if each.crashes >= crashes_max:
                what = f"the run went on from it, died at the same step {each.crashes} times, and saved no later one"
                failure = failure or Refused(f"checkpoint {each.snapshot[:8]} of step {each.step} is left out: {what}.")
                self._skip(each, what)
                continue
            tried = self._ranks.main.exchange(lambda each=each: self._try(each, same_environment), _Tried)  # type: ignore[misc]
            damage = next((rank.damage for rank in tried if rank.damage), "")
            if not damage:
                self._unnoted = tried[0].step, each
                self._trail.went_on_from(each.snapshot)
                self._life.failures += each.crashes + (not self._life.ended_well)
                self._facts = schedule.Facts(failures=self._life.failures, run_seconds=self._life.run_seconds)
                return self.begin_at(tried[0].step)
            failure = failure or Corrupt(damage)
            self._tiers.tier(each).was_damaged = True
            self._skip(each, f"it is damaged: {damage}")
        if failure is not None:
            raise failure
        self._unnoted = 0, None
        return self.begin_at(0)

    def _candidates(self) -> list[Candidate]:
        return self._tiers.candidates(with_memory=self._ranks.is_one_host)

    def _try(self, candidate: Candidate, same_environment: bool) -> _Tried:
        tier, snapshot = self._tiers.find(candidate)
        try:
            return _Tried(self._load(tier.repository, snapshot, same_environment=same_environment))
        except Corrupt as exc:
            return _Tried(damage=exc.message)

    def _load(self, repository: Repository, snapshot: Snapshot, *, same_environment: bool = False) -> int:
        differing: list[str] = []

        def check(found: Loaded) -> None:
            saved: Any = found.facts.get("environment", {})
            differing.extend(environment.differences(saved, environment.fingerprint()) if saved else [])
            if differing and same_environment:
                raise Refused(
                    f"checkpoint {snapshot.id[:8]} was saved where things were different; nothing was loaded:\n  "
                    + "\n  ".join(differing),
                    hint="Make them as they were, or resume without same_environment=True; then bits may differ.",
                )

        loaded = load(repository, snapshot, self.state, self._ranks.rank, self._ranks.size, check=check)
        for note in [*loaded.notes, *differing] if self._ranks.is_first else []:
            self._sink.event(Event("resume.different", f"resuming at step {loaded.step}: {note}"))
        self._life = msgspec.convert(loaded.facts.get("life", {}), _Life)
        return loaded.step

    def begin_at(self, step: int) -> int:
        """Go on from this step with the live state as it is; the step. `resume` and `load` say it."""
        self._has_begun, self._is_inside_step = True, False
        self.finished_steps = self._saved_step = self._first_step = step
        self._saved_at = self._last = self._clock.monotonic_seconds()
        self._due_step, self._due_seconds = self._next_due()
        self._meet_step = step + 1
        return step

    def checkpoints(self) -> list[tuple[int, Snapshot]]:
        """(step, snapshot) of those on disk, in the order in which they were saved. Waits for a save under way."""
        if self._pending is not None:
            self._pending.wait_done()
        return self._tiers.disk.checkpoints(fresh=True)

    def latest(self) -> Snapshot | None:
        """The checkpoint that was saved last."""
        found = self.checkpoints()
        return found[-1][1] if found else None

    def load(self, which: Snapshot | int | None = None) -> int:
        """Load this checkpoint, the one of this step, or the latest; its step.

        Raises `NotFound`, `Corrupt`, `Refused`.
        """
        self._tell(self._end_pending(wait=True))
        found = [each for step, each in self.checkpoints() if which in (None, step, each)]
        if not found:
            what = "no checkpoint yet" if which is None else f"no checkpoint of step {which}"
            raise NotFound(f"run {self._name} has {what}.", hint="`outlast snapshots` lists those that there are.")
        snapshot = found[-1]
        self._is_inside_step = True  # until it is loaded
        step = self._load(self._tiers.disk.repository, snapshot)
        self._trail.went_on_from(snapshot.id)
        self._unnoted = step, None
        return self.begin_at(step)

    def _skip(self, candidate: Candidate, what: str) -> None:
        told = f"checkpoint {candidate.snapshot[:8]} of step {candidate.step} is skipped: {what}"
        self.skipped.append(told)
        fields = {"snapshot": candidate.snapshot, "step": candidate.step}
        self._sink.event(Event("checkpoint.skipped", told, fields))

    # -- the loop --------------------------------------------------------------------------------

    def steps(self, loader: Any, *, until: int) -> Iterator[tuple[int, Any]]:
        """(step, batch) from where the run is, epoch after epoch."""
        feed = self._feeds.get(id(loader), loader)
        given = 0
        while self.finished_steps < until:
            empty = True
            for batch in self._batches(feed):
                empty = False
                self.begin_step()
                if self._trail.wants:
                    self._trail.see(batch)
                yield self.finished_steps, batch
                given += 1
                if given == _STEPLESS_BATCHES and self.finished_steps == self._first_step:
                    told = (
                        f"{given} batches were given out and run.step() was never called; nothing is saved without it"
                    )
                    self._sink.event(Event("run.stepless", told))
                if self.finished_steps >= until:
                    return
            if empty:
                raise InvalidInput("the loader gave no batch in a whole epoch, so the run would never end.")

    def _batches(self, feed: Any) -> Iterator[Any]:
        """Where a signal to all processes killed the loader's workers, it is answered all the same."""
        try:
            yield from feed
        except RuntimeError:
            if self._signals.asked and not self._is_inside_step:
                self._answer(self._signals.take(), {})
            raise

    def _read_from(self, key: str) -> None:
        self._unread.discard(key)
        self.begin_step()

    def begin_step(self) -> None:
        """Say that a step begins: until `step` the state is not whole, and no exception saves it. `steps` says it."""
        self._is_inside_step = True
        if self._unnoted is not None:
            step, candidate = self._unnoted
            self._unnoted = None
            if self._ranks.is_first:
                if self._pending is not None:
                    self._pending.wait_done()  # a repository is for one thread
                self._tiers.begin(step, candidate)

    def step(self, save: bool = False, **metrics: float) -> None:
        """Say that a step is complete, at the end of each iteration. Saves when due or told to, and answers signals.

        What one rank is told with `save`, all are to be told. Raises what made a save in the background fail, once;
        `SystemExit` with 143 after SIGTERM, and `KeyboardInterrupt` after SIGINT, when the state is saved.
        """
        if save is not True and save is not False:
            raise InvalidInput(f"run.step(save={save!r}) is neither True nor False; metrics have names, as in loss=...")
        self.finished_steps += 1
        self._tiers.marker.steps[1] = self.finished_steps
        self._metrics = metrics
        self._is_inside_step = False
        now = self._clock.monotonic_seconds()
        took, self._last = now - self._last, now
        pending = self._pending
        if pending is None:
            self._step_seconds += (took - self._step_seconds) * (_EASE if self._step_seconds else 1.0)
        elif took > self._step_seconds:
            pending.cost_seconds += took - self._step_seconds
        if self._ranks.size > 1:
            if save or self.finished_steps >= self._meet_step:
                self._meet(now, metrics, save)
            return
        is_due = self.finished_steps >= self._due_step or now >= self._due_seconds
        if save or self._signals.asked or (pending.done if pending is not None else is_due):
            self._attend(self._signals.take(), pending is not None and pending.done, is_due, metrics, save)

    def _meet(self, now: float, metrics: Mapping[str, float], save: bool) -> None:
        """All ranks tell each other, and come to the same decision."""
        pending = self._pending
        told = schedule.Told(
            signal=self._signals.take(),
            is_saving=pending is not None and not pending.done,
            is_due=self.finished_steps >= self._due_step or now >= self._due_seconds,
            steps_left=min(
                self._due_step - self.finished_steps, (self._due_seconds - now) / (self._step_seconds or 1.0)
            ),
            step_seconds=self._step_seconds,
        )
        numbers = self._ranks.main.numbers([float(each) for each in msgspec.structs.astuple(told)])
        decision = schedule.decide([schedule.Told(int(a), bool(b), bool(c), d, e) for a, b, c, d, e in numbers])
        self._meet_step = self.finished_steps + decision.meet_in_steps
        self._attend(decision.signal, decision.may_collect, decision.is_due, metrics, save)

    def _attend(self, asked: int, may_collect: bool, is_due: bool, metrics: Mapping[str, float], save: bool) -> None:
        error = self._end_pending(wait=save) if may_collect or save else None
        if save and (not asked or asked == signal.SIGUSR1):
            self._save(metrics)
        if asked:
            self._tell(error)
            self._answer(asked, metrics)
        elif error is not None:
            raise error
        elif is_due and self._pending is None:
            self._save(metrics)

    def _answer(self, asked: int, metrics: Mapping[str, float]) -> None:
        if asked == signal.SIGUSR1:
            self._save(metrics, in_memory=True)
            return
        self._life.ended_well = True
        self._save(metrics).wait()
        self.close()
        if asked == signal.SIGTERM:
            raise SystemExit(TERMINATED)
        raise KeyboardInterrupt

    # -- saving ----------------------------------------------------------------------------------

    def save(self, metrics: Mapping[str, float] | None = None, *, in_memory: bool = False) -> PendingSave:
        """Begin to save the state as it is now. Waits for a save that is still under way; if that failed, it is told.

        Without `metrics` those of the last `step`.
        `in_memory`: into the memory of this machine, where a later process of this run finds it; a reboot ends it.
        Where the ranks run on several machines, it goes to disk all the same.
        """
        return self._save(self._metrics if metrics is None else metrics, in_memory=in_memory, asked=True)

    def _save(self, metrics: Mapping[str, float], *, in_memory: bool = False, asked: bool = False) -> PendingSave:
        if self._proof is not None:
            return self._proof.instead_of_saving(self.finished_steps, asked, self._capture)
        if self not in _OPEN:
            raise Refused(
                f"run {self._name} was closed, or is that of the process this one was forked from; nothing was saved.",
                hint="Open another Run of this name, and resume() it.",
            )
        metrics = _checked(metrics)
        self._tell(self._end_pending(wait=True))  # this one takes its place
        began = self._clock.monotonic_seconds()
        in_memory = in_memory and self._ranks.is_one_host
        refused: Exception | None = None
        staged, parts = Staged(), dict[str, live.Part]()
        try:
            parts = self._capture()
            staged = self._stage.begin(saving.files_of(parts), overlap=self._overlap)
        except Exception as exc:
            staged.finish(exc)
            refused = exc
            if self._ranks.size == 1:
                raise
        facts = {**self._facts_of(began), "since": self._trail.facts(asked=asked)}
        step = self.finished_steps
        pending = PendingSave(step, staged, partial(self._tiers.verify, in_memory=in_memory), in_memory=in_memory)

        def captured() -> Captured:
            if staged.done:
                staged.check()
            if not self._has_begun and (made := self._tiers.disk.checkpoints()):
                raise Refused(
                    f"run {self._name} has checkpoints up to step {made[-1][0]}, and this process did not go on from "
                    "one; nothing was saved.",
                    hint="Call run.resume() first, or give the new run another name.",
                )
            self._has_begun = True
            return Captured(step, parts, staged.content, staged.check, {**facts, **self._unchanging_facts})

        def persist() -> Snapshot:
            snapshot = self._tiers.persist(captured, metrics, self._ranks, in_memory=in_memory)
            pending.write_seconds = self._clock.monotonic_seconds() - began
            return snapshot

        def drop() -> None:
            if self._ranks.is_first:
                self._tiers.drop(in_memory=in_memory)

        self._tell_of_unread()
        self._pending = pending  # before it starts: what interrupts that finds it
        pending.start(persist, drop)
        if refused is not None:
            pending.wait_done()  # the other ranks are told
            self._pending = None
            raise refused
        if not in_memory:
            self._trail.saving()
        self._last = self._saved_at = self._clock.monotonic_seconds()
        pending.cost_seconds = self._last - began
        self._due_step, self._due_seconds = self._next_due()
        return pending

    def _tell_of_unread(self) -> None:
        if self.finished_steps == self._first_step:
            return
        for key in self._unread:
            told = (
                f"state[{key!r}] gave no batch, so its place in the data is saved as it was: iterate "
                f"run.steps(loader, ...) or run.state[{key!r}], for of the loader itself nobody sees what it gives"
            )
            self._sink.event(Event("loader.unread", told, {"key": key}))
        self._unread.clear()

    def _facts_of(self, now: float) -> dict[str, object]:
        life = msgspec.structs.replace(self._life, run_seconds=self._life.run_seconds + now - self._began)
        return {
            "life": msgspec.to_builtins(life),
            "environment": environment.fingerprint(),
            "classes": {key: live.class_name(item) for key, item in self.state.items()},
            "parallel": {"ranks": self._ranks.size, "mesh": live.mesh(self.state)},
        }

    @cached_property
    def _unchanging_facts(self) -> dict[str, object]:
        return {"origin": environment.origin()}

    def _next_due(self) -> tuple[float, float]:
        """(step, moment): whichever of the two counts; the other is never."""
        if self._proof is not None:
            return self._proof.due_step, _NEVER
        after = schedule.interval(self._facts, self._policy)
        if after.steps:
            return (self.finished_steps // after.steps + 1) * after.steps, _NEVER
        return _NEVER, self._saved_at + after.seconds - self._step_seconds / 2

    def _capture(self) -> dict[str, live.Part]:
        return live.capture(self.state, gradients.needed(live.optimizers(self.state)))

    def _end_pending(self, *, wait: bool = False) -> BaseException | None:
        """What made the save under way fail, if it did and nobody was told."""
        pending = self._pending
        if pending is None:
            return None
        if wait:
            pending.wait_done()
        self._pending = None
        self._trail.saved(pending.snapshot)
        error = pending.take_error()
        if pending.snapshot is None:
            return error
        if not pending.in_memory:
            self._saved_step = pending.step
        run_seconds = self._life.run_seconds + self._clock.monotonic_seconds() - self._began
        self._facts = schedule.Facts(pending.cost_seconds, pending.write_seconds, self._life.failures, run_seconds)
        self._due_step, self._due_seconds = self._next_due()
        return error

    def close(self) -> None:
        """Save the last step, if it isn't yet, and wait until that is durable; raises what failed.

        Signals are no longer answered.
        """
        try:
            error = self._end_pending(wait=True)
            if self.finished_steps != self._saved_step and not self._is_inside_step:
                self._tell(error)
                self._life.ended_well = True
                self._save(self._metrics)
                error = self._end_pending(wait=True)
            if error is not None:
                raise error
            self._tiers.marker.end()
            asked = self._signals.take()
        finally:
            self._let_go()
        if asked == signal.SIGTERM:  # after the last step
            raise SystemExit(TERMINATED)
        if asked == signal.SIGINT:
            raise KeyboardInterrupt

    def _let_go(self) -> None:
        self._signals.stop()
        self._tiers.marker.let_go()
        _OPEN.discard(self)
        self._ranks.close()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _tell(self, error: BaseException | None) -> None:
        """Of a save that failed, where it can't be raised."""
        if error is not None:
            self._sink.event(Event("save.failed", f"a save failed: {error}"))

    def _tell_of_unsaved(self) -> None:
        if self._proof is None and self._has_begun and self.finished_steps != self._saved_step:
            told = (
                f"run {self._name} ended at step {self.finished_steps} without run.close(): what it goes on from is "
                f"step {self._saved_step}"
            )
            self._sink.event(Event("run.not_closed", told))

    def _on_uncaught(self, error: BaseException) -> None:
        """Save where the state is whole: between two steps, not inside one. Other ranks may be elsewhere: not then."""
        is_whole = not self._is_inside_step and self.finished_steps != self._saved_step
        if isinstance(error, Exception) and is_whole and self._ranks.size == 1:
            try:
                self._save(self._metrics).wait()
            except Exception as exc:  # noqa: BLE001  the first error is the one to tell of
                self._tell(exc)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After an exception the state is saved only where it is whole."""
        if error is None:
            self.close()
            return
        try:
            self._on_uncaught(error)
            self._tell(self._end_pending(wait=True))
        finally:
            self._let_go()


def _checked(metrics: Mapping[str, float]) -> dict[str, float]:
    """As they are now. Raises `InvalidInput`."""
    try:
        plain = {key: each.detach() if isinstance(each, torch.Tensor) else each for key, each in metrics.items()}
        return {key.encode().decode(): float(value) for key, value in plain.items()}
    except (TypeError, ValueError, AttributeError, RuntimeError) as exc:
        raise InvalidInput(f"metrics are names and numbers: {exc}.") from exc


def _end_open() -> None:
    """At the end of a process that never closed its runs: a save under way is waited for, and a failure is told."""
    for run in list(_OPEN):
        run._tell(run._end_pending(wait=True))
        run._tell_of_unsaved()


# Before thread pools refuse work, which is earlier than what `atexit` knows calls its functions.
threading._register_atexit(_end_open)  # type: ignore[attr-defined]


def _forget_open() -> None:
    """A forked process, such as a worker of a loader, has none of the threads that save: it would wait for ever."""
    for run in _OPEN:
        run._pending = run._unnoted = None
        run._stage.forget()
    _OPEN.clear()


os.register_at_fork(after_in_child=_forget_open)
