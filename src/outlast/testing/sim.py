"""A seeded world: several actors at work on the same stores, one operation at a time.

Each actor is a function in a thread of its own, but only one of them runs at any moment. Whoever
calls a store, or sleeps, waits there until the world lets it go on; the seed decides who does. So a
run is one interleaving of store operations, and the same seed gives the same run again, operation by
operation. Time is the world's too: it passes when operations are made, and leaps when all sleep.

>>> def write(actor: Actor) -> None:
...     actor.store().put(f"from/{actor.name}", [b"hello"])
>>> world = World(seed=7)
>>> for name in ("one", "two"):
...     world.add(name, write)
>>> world.run()
>>> [info.name for info in world.store().list("")]
['from/one', 'from/two']

What befalls an operation is drawn too (`Faults`): it fails, its reply is lost, it takes effect long
after its caller gave it up, its actor dies on the spot, or stands still while the others go on.

Pools of threads that an actor makes do their work at once, in the actor's own thread: the order of
operations within one actor is the order in which they were asked for.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec

from outlast.clock import ManualClock
from outlast.errors import NotFound, OutlastError, Unavailable
from outlast.store.base import Buffer, Capabilities, ObjectInfo
from outlast.store.memory import MemoryStore

MAIN = "main"
NOW_NS = 4_000_000_000_000_000_000
"""when a world begins: late enough that files made today are old in it"""
_OPERATION_SECONDS = 0.05
_REMEMBERED = 64
_HUNG_SECONDS = 120.0
_CHANGES = {"put", "put_if_absent", "delete"}

T = TypeVar("T")


class Faults(msgspec.Struct, frozen=True):
    """How likely each fault is at one operation of an actor, between 0 and 1."""

    refused: float = 0.0
    """it fails, with nothing done"""
    lost_reply: float = 0.0
    """it is done, and fails all the same"""
    late: float = 0.0
    """a change fails, and is made some time later, whatever its actor does by then"""
    killed: float = 0.0
    """the actor dies before or after it; nothing that it began goes on"""
    slow: float = 0.0
    """the actor stands still before it, for up to `slow_seconds`"""
    stale_list: float = 0.0
    """a listing shows what was there a few changes ago"""
    slow_seconds: float = 3600.0
    late_seconds: float = 60.0
    skew_seconds: float = 0.0
    """how far an actor's clock may be off, either way"""


class Step(msgspec.Struct, frozen=True):
    """One operation of the trace. `fault` is "" when it went as it should."""

    number: int
    actor: str
    store: str
    method: str
    name: str
    fault: str = ""

    def __str__(self) -> str:
        said = f"{self.number:6d} {self.actor:12s} {self.store}: {self.method} {self.name}"
        return f"{said}  <- {self.fault}" if self.fault else said


class Killed(BaseException):
    """The actor is dead. It unwinds; whatever it asks of a store on the way raises this again."""


class Stuck(AssertionError):
    """The actors did not come to an end within the number of steps that was given them."""


class Dice:
    """Draws from a seed."""

    def __init__(self, seed: int) -> None:
        self._source = ManualClock(seed)

    def below(self, count: int) -> int:
        return int.from_bytes(self._source.random_bytes(8), "big") % count

    def share(self) -> float:
        """Evenly from 0 to 1."""
        return self.below(1 << 53) / (1 << 53)

    def chance(self, share: float) -> bool:
        return share > 0 and self.share() < share

    def pick(self, among: Sequence[T]) -> T:
        return among[self.below(len(among))]

    def bytes(self, count: int) -> bytes:
        return self._source.random_bytes(count)


class Actor:
    """Somebody at work. `result` is what its function gave, `error` what it raised, if it was not killed."""

    def __init__(self, world: World, name: str, work: Callable[[Actor], object], seed: int, faults: Faults) -> None:
        self.name = name
        self.dice = Dice(seed)
        self.faults = faults
        self.result: object = None
        self.error: BaseException | None = None
        self.killed = False
        self.wakes_ns = 0
        self.done = False
        self.go = threading.Semaphore(0)
        skew = (2 * self.dice.share() - 1) * faults.skew_seconds
        self.clock = _ActorClock(world, self, self.dice.below(1 << 62), int(skew * 1e9))
        self._world = world
        self._work = work
        self.thread = threading.Thread(target=self._live, name=name, daemon=True)

    def store(self, name: str = MAIN) -> ActorStore:
        """A store of the world, as this actor reaches it."""
        return ActorStore(self._world, self, name)

    def _live(self) -> None:
        self.go.acquire()
        try:
            if not self.killed:
                self.result = self._work(self)
        except Killed:
            pass
        except BaseException as exc:  # noqa: BLE001  whatever ends an actor is for the test to judge
            self.error = exc
        self.done = True
        self._world.turn_over()


class World:
    """Stores, the time, and the actors. `trace` tells what has happened."""

    def __init__(self, seed: int, faults: Faults | None = None, *, haste: float = 0.5) -> None:
        """`haste`: how likely the actor that has just made an operation also makes the next one."""
        self.dice = Dice(seed)
        self.faults = faults or Faults()
        self.trace: list[Step] = []
        self.actors: list[Actor] = []
        self.clock = ManualClock(self.dice.below(1 << 62), NOW_NS)
        self._haste = haste
        self._stores: dict[str, MemoryStore] = {}
        self._changes: dict[str, deque[tuple[str, ObjectInfo | None]]] = {}
        self._late: list[tuple[int, int, Callable[[], None]]] = []
        self._watchers: list[Callable[[str, str, str], None]] = []
        self._broken: BaseException | None = None
        self._back = threading.Semaphore(0)

    def store(self, name: str = MAIN) -> MemoryStore:
        """The store itself, for what happens before and after the run: no waiting, no faults."""
        if name not in self._stores:
            self._stores[name] = MemoryStore(clock=self.clock)
            self._changes[name] = deque(maxlen=_REMEMBERED)
        return self._stores[name]

    def add(self, name: str, work: Callable[[Actor], object], faults: Faults | None = None) -> None:
        """An actor that does `work` when the world runs; it meets the faults of the world, or these."""
        self.actors.append(Actor(self, name, work, self.dice.below(1 << 62), faults or self.faults))

    def watch(self, look: Callable[[str, str, str], None]) -> None:
        """Call `look(store, method, name)` after every change, while nobody moves. What it raises ends the run."""
        self._watchers.append(look)

    def run(self, steps_max: int = 100_000) -> None:
        """Until every actor has ended. Raises `Stuck`, or what a watcher raised."""
        waiting = [actor for actor in self.actors if not actor.done]
        for actor in waiting:
            actor.thread.start()
        with _pools_inline({actor.thread.ident for actor in waiting}):
            try:
                self._schedule(waiting, steps_max)
            finally:
                for actor in waiting:
                    actor.killed = actor.killed or not actor.done
                    while not actor.done:
                        self._let(actor)
        for _, _, perform in sorted(self._late, key=lambda each: each[:2]):
            perform()
        self._late.clear()
        if self._broken is not None:
            raise self._broken

    def _schedule(self, waiting: list[Actor], steps_max: int) -> None:
        last: Actor | None = None
        while self._broken is None:
            alive = [actor for actor in waiting if not actor.done]
            if not alive:
                return
            if len(self.trace) >= steps_max:
                names = ", ".join(actor.name for actor in alive)
                raise Stuck(f"{names} did not come to an end in {steps_max} operations.")
            now_ns = self.clock.now_ns()
            awake = [actor for actor in alive if actor.wakes_ns <= now_ns]
            if not awake:
                first = min(alive, key=lambda actor: actor.wakes_ns)
                self._pass((first.wakes_ns - now_ns) / 1e9)
                awake = [first]
            if last is None or last not in awake or not self.dice.chance(self._haste):
                last = self.dice.pick(awake)
            self._pass(_OPERATION_SECONDS * self.dice.share())
            self._let(last)

    def _let(self, actor: Actor) -> None:
        """Let an actor go on to its next operation."""
        actor.go.release()
        if not self._back.acquire(timeout=_HUNG_SECONDS):
            raise Stuck(f"{actor.name} neither ended nor asked a store for {_HUNG_SECONDS:.0f} seconds.")

    def turn_over(self) -> None:
        """By an actor: it has come to its next operation, or to its end."""
        self._back.release()

    def _pass(self, seconds: float) -> None:
        self.clock.sleep(seconds)
        due = [each for each in self._late if each[0] <= self.clock.now_ns()]
        if due:
            self._late = [each for each in self._late if each not in due]
            for _, _, perform in sorted(due, key=lambda each: each[:2]):
                perform()

    # -- what an actor's store and clock call --------------------------------------------------------

    def sleep(self, actor: Actor, seconds: float) -> None:
        if actor.killed:
            raise Killed
        actor.wakes_ns = self.clock.now_ns() + int(seconds * 1e9)
        self._wait(actor)

    def _wait(self, actor: Actor) -> None:
        self.turn_over()
        actor.go.acquire()
        if actor.killed:
            raise Killed

    def operate(self, actor: Actor, store: str, method: str, name: str, perform: Callable[[], T]) -> T:
        """Wait for this actor's turn, then make one operation on a store, or what is made of it."""
        if actor.killed:
            raise Killed
        dice, faults = self.dice, actor.faults
        if dice.chance(faults.slow):
            self._note(actor, store, method, name, "waits")
            self.sleep(actor, faults.slow_seconds * dice.share() ** 3)
        else:
            self._wait(actor)
        if dice.chance(faults.killed):
            actor.killed = True
            if dice.chance(0.5):
                self._note(actor, store, method, name, "died before")
            else:
                self._note(actor, store, method, name, "died after")
                self._perform(store, method, name, perform)
            raise Killed
        if dice.chance(faults.refused):
            self._note(actor, store, method, name, "refused")
            raise Unavailable(f"The store did not answer to {method} {name}.")
        if method in _CHANGES and dice.chance(faults.late):
            self._note(actor, store, method, name, "late")
            due_ns = self.clock.now_ns() + int(faults.late_seconds * dice.share() ** 3 * 1e9)
            self._late.append((due_ns, len(self.trace), lambda: self._land(actor, store, method, name, perform)))
            raise Unavailable(f"There was no reply to {method} {name}.")
        lost = dice.chance(faults.lost_reply)
        self._note(actor, store, method, name, "lost reply" if lost else "")
        result = self._perform(store, method, name, perform)
        if lost:
            raise Unavailable(f"The reply to {method} {name} was lost.")
        return result

    def listing(self, actor: Actor, store: str, prefix: str, after: str) -> list[ObjectInfo]:
        """As an operation: the listing of now, or of a few changes ago."""

        def perform() -> list[ObjectInfo]:
            found = {info.name: info for info in self.store(store).list(prefix, after)}
            if self.dice.chance(actor.faults.stale_list):
                back = list(self._changes[store])[-1 - self.dice.below(8) :]
                for name, before in reversed(back):
                    if not name.startswith(prefix) or name <= after:
                        continue
                    if before is None:
                        found.pop(name, None)
                    else:
                        found[name] = before
            return [found[name] for name in sorted(found)]

        return self.operate(actor, store, "list", prefix, perform)

    def _perform(self, store: str, method: str, name: str, perform: Callable[[], T]) -> T:
        if method not in _CHANGES:
            return perform()
        try:
            before: ObjectInfo | None = self.store(store).stat(name)
        except NotFound:
            before = None
        result = perform()
        self._changes[store].append((name, before))
        try:
            for look in self._watchers:
                look(store, method, name)
        except BaseException as exc:  # noqa: BLE001  `run` raises it
            self._broken = self._broken or exc
        return result

    def _land(self, actor: Actor, store: str, method: str, name: str, perform: Callable[[], object]) -> None:
        fault = "lands"
        try:
            self._perform(store, method, name, perform)
        except OutlastError as exc:
            fault = f"lands: {exc.kind}"
        self._note(actor, store, method, name, fault)

    def _note(self, actor: Actor, store: str, method: str, name: str, fault: str) -> None:
        self.trace.append(Step(len(self.trace) + 1, actor.name, store, method, name, fault))


class ActorStore:
    """A store of the world behind the turns and faults of one actor."""

    def __init__(self, world: World, actor: Actor, name: str) -> None:
        self._world = world
        self._actor = actor
        self._name = name
        self._store = world.store(name)

    @property
    def url(self) -> str:
        return f"memory://{self._name}"

    @property
    def capabilities(self) -> Capabilities:
        return self._store.capabilities

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        content = b"".join(parts)
        self._operate("put_if_absent", name, lambda: self._store.put_if_absent(name, [content]))

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        content = b"".join(parts)
        self._operate("put", name, lambda: self._store.put(name, [content]))

    def get(self, name: str) -> bytes:
        return self._operate("get", name, lambda: self._store.get(name))

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return self._operate("get_ranges", name, lambda: self._store.get_ranges(name, ranges))

    def stat(self, name: str) -> ObjectInfo:
        return self._operate("stat", name, lambda: self._store.stat(name))

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        yield from self._world.listing(self._actor, self._name, prefix, after)

    def delete(self, name: str) -> None:
        self._operate("delete", name, lambda: self._store.delete(name))

    def _operate(self, method: str, name: str, perform: Callable[[], T]) -> T:
        return self._world.operate(self._actor, self._name, method, name, perform)


class _ActorClock:
    """The world's time as an actor's machine tells it, with randomness of its own."""

    def __init__(self, world: World, actor: Actor, seed: int, skew_ns: int) -> None:
        self._world = world
        self._actor = actor
        self._random = ManualClock(seed)
        self._skew_ns = skew_ns

    def now_ns(self) -> int:
        return self._world.clock.now_ns() + self._skew_ns

    def monotonic_seconds(self) -> float:
        return self._world.clock.monotonic_seconds()

    def sleep(self, seconds: float) -> None:
        self._world.sleep(self._actor, seconds)

    def random_bytes(self, count: int) -> bytes:
        return self._random.random_bytes(count)


@contextmanager
def _pools_inline(threads: set[int | None]) -> Iterator[None]:
    """While this lasts, pools that are given work by one of these threads do it at once."""
    submit = ThreadPoolExecutor.submit

    def at_once(self: ThreadPoolExecutor, call: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:
        if threading.get_ident() not in threads:
            return submit(self, call, *given, **named)
        future: Future[Any] = Future()
        try:
            future.set_result(call(*given, **named))
        except BaseException as exc:  # noqa: BLE001  as the real one does
            future.set_exception(exc)
        return future

    ThreadPoolExecutor.submit = at_once  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        ThreadPoolExecutor.submit = submit  # type: ignore[method-assign]
