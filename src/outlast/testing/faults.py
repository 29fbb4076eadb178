"""Stores that record, lie, stall and break, to show that what stands on them does not.

All of them are layers around any store and can be stacked. `Recorder` belongs directly around the
real store; the faults around it. Nothing here is random on its own: what is drawn comes from the
clock that is given, so a `ManualClock` with a printed seed repeats a run exactly.

Losing one commit in a store that fails now and then, loses replies and refuses, is a failed test:

>>> store = FaultyStore(MemoryStore())
>>> store.script(lost_reply(), "put_if_absent", "log/")
>>> store.put_if_absent("log/1", [b"entry"])
Traceback (most recent call last):
outlast.errors.Unavailable: The reply to put_if_absent log/1 was lost.
>>> store.get("log/1")
b'entry'

Other faults are layers of their own: `StaleListStore`, `SkewedStore`, and `QuotaStore` of
`outlast.store.layers` for a disk that is full. `damage` changes what is stored; `powercut` is for
what the power supply does to a local store.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from outlast.clock import Clock, ManualClock
from outlast.errors import Exists, InvalidInput, NotFound, OutlastError, Refused, StoreFull, Unavailable
from outlast.store.base import Buffer, Capabilities, ObjectInfo, ObjectStore
from outlast.store.layers import Layer
from outlast.store.memory import MemoryStore

Method = Literal["*", "put_if_absent", "put", "get", "get_ranges", "stat", "list", "delete"]

KINDS = {
    "format": "format",
    "keys": "keys/",
    "packs": "packs/",
    "log": "log/",
    "index": "index/",
    "state": "state/",
}
"""The kinds of objects of a repository and what their names start with."""


# -- recording ---------------------------------------------------------------------------------------


class Mutation(NamedTuple):
    """One change that a store made; `content` is empty for a deletion."""

    method: Literal["put_if_absent", "put", "delete"]
    name: str
    content: bytes = b""


class Trace(msgspec.Struct):
    """What a store held at first, and every change since, in the order in which they took effect."""

    initial: dict[str, bytes] = {}
    mutations: list[Mutation] = []

    def objects(self, count: int) -> dict[str, bytes]:
        """What a store holds after the first `count` changes."""
        found = dict(self.initial)
        for mutation in self.mutations[:count]:
            if mutation.method == "delete":
                found.pop(mutation.name, None)
            else:
                found[mutation.name] = mutation.content
        return found


class Recorder(Layer):
    """Records every mutation that the store below has made, with its bytes.

    Around a local store give it a `RecordingDisk` too, to know what a power cut leaves of each.
    A write of which the store below did not say that it happened is not recorded.
    """

    def __init__(self, store: ObjectStore) -> None:
        super().__init__(store)
        self.trace = Trace({info.name: store.get(info.name) for info in store.list("")})
        self._lock = threading.Lock()

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        content = b"".join(parts)
        self._store.put_if_absent(name, parts)
        self._note(Mutation("put_if_absent", name, content))

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        content = b"".join(parts)
        self._store.put(name, parts)
        self._note(Mutation("put", name, content))

    def delete(self, name: str) -> None:
        self._store.delete(name)
        self._note(Mutation("delete", name))

    def _note(self, mutation: Mutation) -> None:
        with self._lock:
            self.trace.mutations.append(mutation)


def replay(trace: Trace, count: int, clock: Clock | None = None) -> MemoryStore:
    """A store as it was after the first `count` mutations, as the death of the process leaves it."""
    return holding(trace.objects(count), clock)


def holding(objects: dict[str, bytes], clock: Clock | None = None) -> MemoryStore:
    """A store in memory with these objects."""
    store = MemoryStore(clock=clock) if clock else MemoryStore()
    for name, content in objects.items():
        store.put(name, [content])
    return store


# -- faults by script --------------------------------------------------------------------------------


class Call(msgspec.Struct, frozen=True):
    """One call on its way to the store. `name` is the prefix when `method` is `list`."""

    method: str
    name: str
    store: ObjectStore
    clock: Clock
    perform: Callable[[], Any]
    """makes the call and returns its result"""
    content: bytes = b""
    """of a put"""


Effect = Callable[[Call], Any]
"""What happens instead of the call: it may `perform` it, before or after, and gives the result or raises."""


def error(raised: OutlastError | None = None) -> Effect:
    """Fail, with nothing done; `Unavailable` unless told otherwise."""

    def effect(call: Call) -> Any:
        raise raised or Unavailable(f"The store did not answer to {call.method} {call.name}.")

    return effect


def lost_reply() -> Effect:
    """Do it, and then fail as if it was not known."""

    def effect(call: Call) -> Any:
        call.perform()
        raise Unavailable(f"The reply to {call.method} {call.name} was lost.")

    return effect


def delay(seconds: float) -> Effect:
    """Wait on the clock, then do it."""

    def effect(call: Call) -> Any:
        call.clock.sleep(seconds)
        return call.perform()

    return effect


def refusal(status: int) -> Effect:
    """Answer with an HTTP status and nothing done, in the terms to which `outlast.store.cloud` puts it.

    A 409 or 412 to a create proves nothing, so the object is read back: ours is success, another's
    `Exists`, none `Unavailable`.
    """

    def effect(call: Call) -> Any:
        said = f"The store answered to {call.method} {call.name} with HTTP {status}"
        if status in {409, 412} and call.method == "put_if_absent":
            try:
                if call.store.get(call.name) == call.content:
                    return None
            except NotFound:
                raise Unavailable(f"{said}, and nothing is there.") from None
            raise Exists(f"{said}; it exists with other content.")
        if status in {401, 403}:
            raise Refused(f"{said}. Nothing was changed.")
        if status == 404:
            raise NotFound(f"{said}.")
        if status == 507:
            raise StoreFull(f"{said}. What was stored before is unchanged.")
        raise Unavailable(f"{said}.")

    return effect


def shortened() -> Effect:
    """Read, and give only the first half, as a reader does that takes a broken line for the end."""
    return _on_read(lambda content, clock: content[: len(content) // 2])


def garbled() -> Effect:
    """Read, and give other bytes of the same number."""
    return _on_read(lambda content, clock: clock.random_bytes(len(content)))


def flipped() -> Effect:
    """Read, and give the bytes with one bit turned over."""
    return _on_read(_with_flipped_bit)


def _on_read(change: Callable[[bytes, Clock], bytes]) -> Effect:
    def effect(call: Call) -> Any:
        result = call.perform()
        if isinstance(result, bytes):
            return change(result, call.clock)
        if isinstance(result, list):
            return [change(part, call.clock) for part in result]
        raise InvalidInput(f"{call.method} reads no bytes, so they can't be changed.")

    return effect


def _with_flipped_bit(content: bytes, clock: Clock) -> bytes:
    if not content:
        return content
    at = int.from_bytes(clock.random_bytes(8), "big") % (8 * len(content))
    changed = bytearray(content)
    changed[at // 8] ^= 1 << at % 8
    return bytes(changed)


class _Rule(msgspec.Struct):
    effect: Effect
    method: Method
    prefix: str
    skip: int
    times: int


class FaultyStore(Layer):
    """A store that follows a script of faults; without one it is the store below.

    Each call meets the first rule that fits it and has not run out. Reads are never of local files
    here, so that no fault is passed by.
    """

    def __init__(self, store: ObjectStore, clock: Clock | None = None) -> None:
        super().__init__(store)
        self._clock = clock or ManualClock()
        self._rules: list[_Rule] = []
        self._lock = threading.Lock()
        self.struck = 0
        """how many calls a fault has met so far"""

    @property
    def capabilities(self) -> Capabilities:
        return msgspec.structs.replace(self._store.capabilities, memory_map=False)

    def script(self, effect: Effect, method: Method = "*", prefix: str = "", *, times: int = 1, skip: int = 0) -> None:
        """Let `effect` strike calls of `method` for names with `prefix`: after `skip` of them, `times` times.

        A call of `list` counts as one for its prefix; its fault strikes before the first object.
        """
        with self._lock:
            self._rules.append(_Rule(effect, method, prefix, skip, times))

    def clear(self) -> None:
        """Forget the script: the store is sound from here on."""
        with self._lock:
            self._rules.clear()

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        self._strike("put_if_absent", name, lambda: self._store.put_if_absent(name, parts), parts)

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        self._strike("put", name, lambda: self._store.put(name, parts), parts)

    def get(self, name: str) -> bytes:
        content: bytes = self._strike("get", name, lambda: self._store.get(name))
        return content

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        contents: list[bytes] = self._strike("get_ranges", name, lambda: self._store.get_ranges(name, ranges))
        return contents

    def stat(self, name: str) -> ObjectInfo:
        info: ObjectInfo = self._strike("stat", name, lambda: self._store.stat(name))
        return info

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        yield from self._strike("list", prefix, lambda: self._store.list(prefix, after))

    def delete(self, name: str) -> None:
        self._strike("delete", name, lambda: self._store.delete(name))

    def _strike(self, method: str, name: str, perform: Callable[[], Any], parts: Sequence[Buffer] = ()) -> Any:
        effect = self._next_effect(method, name)
        if effect is None:
            return perform()
        return effect(Call(method, name, self._store, self._clock, perform, b"".join(parts)))

    def _next_effect(self, method: str, name: str) -> Effect | None:
        with self._lock:
            for rule in self._rules:
                if rule.method not in ("*", method) or not name.startswith(rule.prefix) or not rule.times:
                    continue
                if rule.skip:
                    rule.skip -= 1
                    continue
                rule.times -= 1
                self.struck += 1
                return rule.effect
        return None


# -- faults that are layers of their own -------------------------------------------------------------


class StaleListStore(Layer):
    """Lists what was there `lag_seconds` ago: new objects are missing, deleted ones still appear.

    Only changes made through this layer are late; reads by name are up to date, as in stores whose
    listings are eventually consistent.
    """

    def __init__(self, store: ObjectStore, lag_seconds: float, clock: Clock) -> None:
        super().__init__(store)
        self._lag_seconds = lag_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._late: dict[str, tuple[float, ObjectInfo | None]] = {}
        """by name: when it was changed, and what a listing goes on to say about it"""

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        self._store.put_if_absent(name, parts)
        self._note(name, None)

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        before = self._stat_or_none(name)
        self._store.put(name, parts)
        self._note(name, before)

    def delete(self, name: str) -> None:
        before = self._stat_or_none(name)
        self._store.delete(name)
        self._note(name, before)

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        now = self._clock.monotonic_seconds()
        with self._lock:
            late = {name: info for name, (at, info) in self._late.items() if now - at < self._lag_seconds}
        found = {info.name: info for info in self._store.list(prefix, after) if info.name not in late}
        for name, info in late.items():
            if info is not None and name.startswith(prefix) and name > after:
                found[name] = info
        for name in sorted(found):
            yield found[name]

    def _note(self, name: str, before: ObjectInfo | None) -> None:
        with self._lock:
            now = self._clock.monotonic_seconds()
            at, listed = self._late.get(name, (0.0, None))
            # Of several changes within the lag, listings know what was there before the first.
            still = name in self._late and now - at < self._lag_seconds
            self._late[name] = now, listed if still else before

    def _stat_or_none(self, name: str) -> ObjectInfo | None:
        try:
            return self._store.stat(name)
        except NotFound:
            return None


class SkewedStore(Layer):
    """A store whose own clock is `seconds` ahead of what it really is; negative: behind."""

    def __init__(self, store: ObjectStore, seconds: float) -> None:
        super().__init__(store)
        self._seconds = seconds

    def stat(self, name: str) -> ObjectInfo:
        return self._shifted(self._store.stat(name))

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        return map(self._shifted, self._store.list(prefix, after))

    def _shifted(self, info: ObjectInfo) -> ObjectInfo:
        return msgspec.structs.replace(info, modified_seconds=info.modified_seconds + self._seconds)


# -- damage at rest ----------------------------------------------------------------------------------

Harm = Literal["flip", "truncate", "zero", "delete"]


def damage(store: ObjectStore, name: str, harm: Harm, clock: Clock) -> None:
    """Change a stored object as a bad disk does: one bit, its second half gone, or zero, or all of it gone.

    Raises `NotFound`.
    """
    content = store.get(name)
    half = len(content) // 2
    match harm:
        case "flip":
            store.put(name, [_with_flipped_bit(content, clock)])
        case "truncate":
            store.put(name, [content[:half]])
        case "zero":
            store.put(name, [content[:half], bytes(len(content) - half)])
        case "delete":
            store.delete(name)
