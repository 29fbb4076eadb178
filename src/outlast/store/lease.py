"""Time-bounded ownership of a piece of work, with a fencing token that rises from owner to owner.

A lease is the object with the highest number under `leases/<name>/`; the number is the token. It is taken by creating
the next number, which one alone of several can do; kept alive by writing its own object anew, which nobody else writes;
and given up by saying so in it. It ends when its owner gave no sign of life for as long as it says itself, by the
store's own clock: nobody's host clock matters.

A lease is no fence. An owner that was stopped for longer goes on believing, so what it writes must name the token
where it is written (`Log.fence`): an owner that has been followed is refused there.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import msgspec

from outlast.clock import Clock
from outlast.errors import Busy, Corrupt, Exists, Fenced, NotFound, OutlastError
from outlast.store.base import ObjectStore

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_NUMBER = re.compile(r"[0-9]{20}")
_BYTES_MAX = 4096


class Record(msgspec.Struct, frozen=True):
    """What the object of a lease says."""

    owner: str
    seconds: float
    """so long it lasts after it was last written"""
    nonce: str
    """so that no two are alike: a store may take equal bytes for its own"""
    released: bool = False


class Lease:
    """One ownership. `token` is higher than that of every owner before.

    `was_left`: the owner before did not give it up, so it may still be at work, and has to be fenced.
    """

    def __init__(self, store: ObjectStore, name: str, token: int, record: Record, clock: Clock, was_left: bool) -> None:
        self.name, self.token, self.was_left = name, token, was_left
        self._store, self._record, self._clock = store, record, clock

    def renew(self) -> None:
        """Give a sign of life. Raises `Fenced` when there is a newer owner, `Unavailable`."""
        self._write(released=False)
        newest = max(_tokens(self._store, self.name), default=0)
        if newest > self.token:
            raise Fenced(
                f"the lease {self.name} has another owner by now; what it protects was left to them.",
                hint="This process was stopped, or cut off, for longer than the lease lasts.",
            )

    def release(self) -> None:
        """Give it up, so that nobody waits for its end. Failing to is no failure: it ends by itself."""
        with suppress(OutlastError):
            self._write(released=True)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Alive from here to the end, by a thread that renews it; given up in the end, whatever happens."""
        over = threading.Event()

        def renew() -> None:
            while not over.wait(self._record.seconds / 3):
                try:
                    self.renew()
                except Fenced:
                    return  # the next commit is refused, and says so
                except OutlastError:
                    continue  # the store is away; it may come back in time

        thread = threading.Thread(target=renew, name=f"lease {self.name}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.release()

    def _write(self, *, released: bool) -> None:
        nonce = self._clock.random_bytes(8).hex()
        record = msgspec.structs.replace(self._record, released=released, nonce=nonce)
        self._store.put(_object(self.name, self.token), [msgspec.json.encode(record)])


def acquire(store: ObjectStore, name: str, owner: str, seconds: float, clock: Clock, above: int = 0) -> Lease:
    """Take the lease `name`. Raises `Busy` while another has it, `Unavailable`.

    `name`: letters, digits and `._-`. `seconds`: how long after its last sign of life an owner counts as gone.
    `above`: a token that was used, as far as is known elsewhere; this one will be higher, should the objects be lost.
    """
    assert _NAME.fullmatch(name), name
    tokens = _tokens(store, name)
    last = max(tokens, default=0)
    was_left = _is_left(store, name, last) if last else above > 0  # its objects were lost, so nobody knows of its end
    token = max(last, above) + 1
    record = Record(owner, seconds, clock.random_bytes(8).hex())
    try:
        store.put_if_absent(_object(name, token), [msgspec.json.encode(record)])
    except Exists as exc:
        raise Busy(f"the lease {name} was taken by somebody else just now.") from exc
    for each in tokens:
        with suppress(OutlastError):  # only the highest one counts
            store.delete(_object(name, each))
    return Lease(store, name, token, record, clock, was_left)


def _is_left(store: ObjectStore, name: str, token: int) -> bool:
    """Whether the lease ended without being given up. Raises `Busy` while it lasts."""
    where = _object(name, token)
    try:
        modified = store.stat(where)
        if modified.size_bytes > _BYTES_MAX:
            raise Corrupt(f"{where} is far too large to be a lease.", hint="Delete that object; nothing else needs it.")
        record = msgspec.json.decode(store.get(where), type=Record)
    except NotFound as exc:
        raise Busy(f"the lease {name} changes hands just now.") from exc
    except (msgspec.DecodeError, msgspec.ValidationError):
        return True
    if record.released:
        return False
    left = modified.modified_seconds + record.seconds - store_time_seconds(store, record.nonce)
    # More than it lasts is left where the store's clock was set back since. An owner that lives writes it anew before
    # long; one that does not would keep it for as long as the clock went back.
    if 0 < left <= 2 * record.seconds:
        raise Busy(f"{record.owner} has the lease {name}, and lives: it ends {left:.0f} s after its last sign of life.")
    return True


def store_time_seconds(store: ObjectStore, text: str) -> float:
    """The store's own time, Unix epoch: that of an object written just now, which holds `text`."""
    store.put("clock", [text.encode()])
    return store.stat("clock").modified_seconds


def _tokens(store: ObjectStore, name: str) -> list[int]:
    prefix = f"leases/{name}/"
    found = (info.name.removeprefix(prefix) for info in store.list(prefix))
    return [int(each) for each in found if _NUMBER.fullmatch(each)]


def _object(name: str, token: int) -> str:
    return f"leases/{name}/{token:020d}"
