"""The log: numbered, hash-chained entries, each created by one create-if-absent write.

Creating the entry is the commit; before it there is only garbage. Whatever a store answers to that
write (412, 409, a time-out, nothing at all), one rule decides: **read the entry back**. Our own
write id there means success, another's means that we lost this number and take the next one,
absence means that nothing happened and we may try again.

Folding the entries in order gives the `State`. `state/<seq>` objects hold it as of an entry, so
that opening doesn't read the whole log; they are derived and can be deleted without loss.
"""

from __future__ import annotations

import getpass
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from outlast import records
from outlast.clock import Clock
from outlast.errors import Corrupt, Exists, Fenced, InvalidInput, NotFound, OutlastError, Unavailable
from outlast.events import Event, EventSink
from outlast.records import LogEntry
from outlast.repo import seal
from outlast.repo.seal import Keys
from outlast.repo.state import KEY, SWEEP, State
from outlast.store.base import ObjectStore

ENTRY_BYTES_MAX = 256 << 20
STATE_BYTES_MAX = 1 << 30
STATE_EVERY = 64
_APPEND_TRIES = 10
_READ_AHEAD = 256
_ENTRY_NAME = re.compile(r"log/[0-9]{20}")
_MISSING_HINT = (
    "Everything else can still be read. Copy the object back from a replica if there is one: it is small "
    "and never changes. `outlast check` tells what is affected."
)


def entry_name(seq: int) -> str:
    return f"log/{seq:020d}"


def state_name(seq: int) -> str:
    return f"state/{seq:020d}"


class Log:
    """The entries of one repository and the state they fold to. `append` and `refresh` are for any thread."""

    def __init__(self, store: ObjectStore, keys: Keys | None, anchor: str, clock: Clock, sink: EventSink) -> None:
        self._store = store
        self._keys = keys
        self.anchor = anchor
        self._clock = clock
        self._sink = sink
        self._state_seq = 0
        self._believed_state = True
        self._own_seq = 0
        """the newest entry that this process made durable itself"""
        self._lock = threading.RLock()
        self.state = State(0, anchor)
        self.swept: set[str] = set()
        """packs that were swept since this log was loaded: a session that relies on one has to begin again"""
        self.fence: tuple[str, int] | None = None
        """the lease under which entries are made, and its token: where a newer owner made one, they are refused"""
        self.damage = ""
        """why nothing can be committed: what some entries said is unknown"""

    @property
    def encrypted(self) -> bool:
        return self._keys is not None

    def load(self) -> None:
        """Read the newest usable state and every entry after it."""
        self._load(self._newest_state())

    def prove(self) -> None:
        """If a state was believed so far, read every entry there is.

        A state saves time. Whoever can write to the store could make a false one, so what leads to
        deleting anything goes by the entries alone.
        """
        if self._believed_state:
            self._load(None)

    def _load(self, known: State | None) -> None:
        self._believed_state = known is not None
        self.state = known or State(0, self.anchor)
        self._state_seq = self.state.seq
        if self._keys is not None:
            self._keys.use(self.state.epoch)
        self.refresh()

    def refresh(self) -> list[LogEntry]:
        """Fold what others committed since; returns the new entries.

        A listing may lag behind, so reading goes on past it until a number is really absent.
        """
        with self._lock:
            return self._refresh()

    def _refresh(self) -> list[LogEntry]:
        fresh: list[LogEntry] = []
        listed = self.listed(after=self.state.seq)
        for seq, data in zip(listed, self.read_many(listed), strict=True):
            if seq != self.state.seq + 1 or data is None:
                break
            fresh.append(self._fold(data))
        while True:
            name = entry_name(self.state.seq + 1)
            try:
                if self._store.stat(name).size_bytes > ENTRY_BYTES_MAX:
                    raise Corrupt(f"{name} is far too large to be a log entry.", hint=_MISSING_HINT)
                data = self._store.get(name)
            except NotFound:
                break
            fresh.append(self._fold(data))
        if listed and listed[-1] > self.state.seq:
            raise Corrupt(f"log entry {self.state.seq + 1} is missing; later entries exist.", hint=_MISSING_HINT)
        return fresh

    def listed(self, after: int = 0) -> list[int]:
        """The numbers of the entries that the store lists, ascending."""
        found = []
        for info in self._store.list("log/", after=entry_name(after)):
            if _ENTRY_NAME.fullmatch(info.name):
                if info.size_bytes > ENTRY_BYTES_MAX:
                    raise Corrupt(f"{info.name} is far too large to be a log entry.", hint=_MISSING_HINT)
                found.append(int(info.name[4:]))
        return found

    def read_many(self, seqs: list[int]) -> Iterator[bytes | None]:
        """The stored bytes of these entries; None for one that is missing."""
        if len(seqs) < 8:
            yield from map(self._read, seqs)
            return
        with ThreadPoolExecutor(self._store.capabilities.concurrency) as pool:
            for at in range(0, len(seqs), _READ_AHEAD):
                yield from pool.map(self._read, seqs[at : at + _READ_AHEAD])

    def _read(self, seq: int) -> bytes | None:
        try:
            return self._store.get(entry_name(seq))
        except NotFound:
            return None

    def _fold(self, data: bytes) -> LogEntry:
        entry = self.parse(data, self.state.seq + 1)
        if entry.prev_hash != self.state.head_hash:
            raise Corrupt(
                f"log entry {entry.seq} does not chain to the entry before it: one of the two was changed.",
                hint=_MISSING_HINT,
            )
        if self._keys is not None and seal.sealed_epoch(data) != self.state.epoch:
            # Else whoever had a key before it was rotated could go on writing the log with it.
            raise Corrupt(
                f"log entry {entry.seq} is sealed with data key epoch {seal.sealed_epoch(data)} where "
                f"{self.state.epoch} is due.",
                hint=_MISSING_HINT,
            )
        self._apply(entry, data)
        return entry

    def _apply(self, entry: LogEntry, data: bytes) -> None:
        condemned = set(self.state.condemned) if entry.kind == SWEEP else set()
        self.state.apply(entry, seal.digest(data).hex())
        if self._keys is not None:
            self._keys.use(self.state.epoch)
        self.swept |= condemned - self.state.condemned.keys()

    def parse(self, data: bytes, seq: int) -> LogEntry:
        """Decode the stored bytes of entry `seq`; `Corrupt` names it.

        `WrongKey` when it tells of a rotation whose key this passphrase's slots don't hold.
        """
        name = entry_name(seq)
        try:
            if self._keys is not None:
                data = seal.open_object(self._keys, name, data)
            entry = records.parse_object(data, LogEntry, f"log entry {seq}")
        except Corrupt as exc:
            raise Corrupt(exc.message, hint=_MISSING_HINT) from exc
        if entry.seq != seq:
            raise Corrupt(f"{name} holds entry {entry.seq}: objects of the log were swapped.")
        epoch = entry.body.get("epoch")
        if self._keys is not None and entry.kind == KEY and entry.body.get("action") == "rotate":
            self._keys.use(epoch if isinstance(epoch, int) else 0)  # what comes next is sealed under it
        return entry

    def append(self, kind: str, make_body: Callable[[State], dict[str, Any] | None]) -> LogEntry | None:
        """Commit an entry. `make_body` is asked again with the new state each time another got in first.

        Where it gives None nothing is left to say, and nothing is committed. It must not read chunks: that
        may read the log on, past the state that it was asked for.

        Raises `Unavailable` when the store stays out of reach; then nothing is known to be committed,
        and an entry with our write id, should it appear, is whole. `Corrupt` when the log is damaged.
        """
        if self.damage:
            raise Corrupt(f"nothing was committed, for the log is damaged: {self.damage}", hint=_MISSING_HINT)
        with self._lock:
            return self._append(kind, make_body)

    def _append(self, kind: str, make_body: Callable[[State], dict[str, Any] | None]) -> LogEntry | None:
        write_id = self._clock.random_bytes(16).hex()
        failure: OutlastError | None = None
        for attempt in range(_APPEND_TRIES):
            before = self.state.seq
            body = make_body(self.state)
            assert self.state.seq == before, "an entry would follow a state that it was not made for"
            if body is None:
                return None
            body = self._fenced(body)
            entry = self._entry(kind, body, write_id)
            name, data = entry_name(entry.seq), self._encode(entry)
            try:
                self._store.put_if_absent(name, [data])
            except (Exists, Unavailable) as exc:
                if isinstance(exc, Unavailable) and not exc.retryable:
                    raise
                failure = exc
                self._clock.sleep(0.02 * 2**attempt * (1 + self._clock.random_bytes(1)[0] / 256))
                # Our entry may be there already (a lost reply), or land while we look: every entry
                # that appears from here on is compared by write id, so it is never committed twice.
                for other in self.refresh():
                    if other.write_id == write_id:
                        return other
                continue
            self._apply(entry, data)
            self._own_seq = entry.seq
            return entry
        assert failure is not None
        raise Unavailable(
            f"the commit was not accepted after {_APPEND_TRIES} tries: {failure.message}",
            hint="Nothing was lost: what was uploaded is kept. Run the command again.",
        ) from failure

    def _fenced(self, body: dict[str, Any]) -> dict[str, Any]:
        if self.fence is None:
            return body
        name, token = self.fence
        if self.state.fences.get(name, 0) > token:
            raise Fenced(
                f"the lease {name} has a newer owner, who has committed already; nothing was committed.",
                hint="This process was stopped, or cut off, for longer than the lease lasts. Others do its work now.",
            )
        return {**body, "fence": [name, token]}

    def _entry(self, kind: str, body: dict[str, Any], write_id: str) -> LogEntry:
        return LogEntry(
            seq=self.state.seq + 1,
            write_id=write_id,
            prev_hash=self.state.head_hash,
            time=records.time_text(self._clock.now_ns()),
            actor=_actor(),
            kind=kind,
            body=body,
        )

    def _encode(self, entry: LogEntry) -> bytes:
        data = records.canonical_object(entry)
        _check_readable(data, entry.kind)
        if self._keys is None:
            return data
        return seal.seal_object(self._keys, entry_name(entry.seq), data, self._clock.random_bytes(seal.SALT_BYTES))

    def save_state(self) -> None:
        """Write `state/<seq>` when enough entries came since the last one. Failing to is no failure.

        Only for an entry of our own: one that was read may be of a process that died before it was durable,
        and a power cut could leave the state without it.
        """
        # Spaced by an eighth of the log, so that all states together stay in proportion to the log.
        if self.state.seq != self._own_seq or self.state.seq - self._state_seq < max(STATE_EVERY, self._state_seq // 8):
            return
        name = state_name(self.state.seq)
        data = records.canonical_object(self.state)
        if self._keys is not None:
            data = seal.seal_object(self._keys, name, data, self._clock.random_bytes(seal.SALT_BYTES))
        try:
            self._store.put_if_absent(name, [data])
        except OutlastError as exc:
            self._sink.event(Event("state.not_written", f"{name} was not written: {exc.message}"))
        self._state_seq = self.state.seq

    def _newest_state(self) -> State | None:
        for info in sorted(self._store.list("state/"), key=lambda info: info.name, reverse=True):
            try:
                if info.size_bytes > STATE_BYTES_MAX:
                    raise Corrupt(f"{info.name} is far too large to be a state.")
                state = self.read_state(info.name)
                if self._keys is not None and state.epoch != max(self._keys.epochs):
                    raise Corrupt("it is from before the keys were rotated")
                return state
            except (Corrupt, NotFound) as exc:
                self._sink.event(
                    Event(
                        "state.ignored",
                        f"{info.name} is not usable and is ignored; the log has it all: {exc}",
                    )
                )
        return None

    def read_state(self, name: str) -> State:
        """A state object; `Corrupt` unless it is whole and its head is the hash of that entry as it is now."""
        data = self._store.get(name)
        epoch = None
        if self._keys is not None:
            data, epoch = seal.open_object(self._keys, name, data), seal.sealed_epoch(data)
        state = records.parse_object(data, State, name)
        state.validate()
        if epoch is not None and epoch != state.epoch:
            raise Corrupt(f"{name} is sealed with data key epoch {epoch}, not {state.epoch}.")
        if (
            name != state_name(state.seq)
            or seal.digest(self._store.get(entry_name(state.seq))).hex() != state.head_hash
        ):
            raise Corrupt(f"{name} does not belong to this log.")
        return state


def _check_readable(data: bytes, kind: str) -> None:
    """Refuse to commit what could not be folded afterwards: it would end the log for every reader."""
    what = f"the new log entry ({kind})"
    try:
        State(0, "").apply(records.parse_object(data, LogEntry, what), "")
    except Corrupt as exc:
        raise InvalidInput(f"{what} would not be readable, so it was not committed: {exc.message}") from exc


def _actor() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
