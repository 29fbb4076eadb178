"""What the log says: the kinds of its entries, and the state they fold to. Pure.

A pack is in one of these places, and moves only by an entry:

    live         snapshots may need it, and new work may rely on it
    condemned    to be deleted unless somebody needs it: it can be read, but new work doesn't rely on it
    quarantined  damaged: what can be read of it is read where there is no other copy
    swept        gone. It is in the log before the object is deleted, so whoever relied on it learns of it

Why no snapshot ever loses a chunk to this, whatever runs at the same time: entries are totally
ordered, and each is made for the state just before it. `condemn` is made where no snapshot of that
state needs the pack: what one needs of it has another copy, in a pack that is live in that state, a
repacked one included. A snapshot committed after it lists what it needs of the condemned packs
again, which makes them live; `sweep` applies to packs that are condemned at that moment, so not to
those; and a snapshot that needs a pack swept before is not committed at all, even where the object,
not deleted yet, was condemned anew as one that nothing names: whoever swept it may be about to delete it.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from outlast.errors import Corrupt
from outlast.records import LogEntry, PackRef, Snapshot

_HEX_64 = re.compile("[0-9a-f]{64}")
_HEX_32 = re.compile("[0-9a-f]{32}")
_EPOCH_MAX = (1 << 32) - 1

SNAPSHOT = "snapshot"
PACKS = "packs"
FORGET = "forget"
CONDEMN = "condemn"
SWEEP = "sweep"
QUARANTINE = "quarantine"
VERIFIED = "verified"
KEY = "key"
RESUMED = "resumed"
PROVEN = "proven"
DRILL = "drill"
LEASE = "lease"
KINDS = (SNAPSHOT, PACKS, FORGET, CONDEMN, SWEEP, QUARANTINE, VERIFIED, KEY, RESUMED, PROVEN, DRILL, LEASE)


class Condemned(msgspec.Struct, frozen=True):
    """A pack that nobody needs, since entry `seq`."""

    name: str
    bytes: int
    chunks: int
    seq: int


class Drill(msgspec.Struct, frozen=True, omit_defaults=True):
    """A rehearsed restore, as the log tells it. Levels: 0 bytes, 1 structure, 2 values, 3 golden outputs, 4 quality on
    a pinned test set, 5 resumed training; each needs those below it, but for 3 and 4 without a command."""

    snapshot: str
    name: str
    """of the snapshot: the source or the run"""
    asked: int
    """the level that was to be reached"""
    level: int
    """the one that was reached, -1 where not even the bytes were right"""
    rto_seconds: float
    """from the beginning to where the level below the failure, or the last one, was reached"""
    rpo_seconds: float
    """the age of the snapshot when the drill began"""
    bytes: int
    """restored"""
    time: str = ""
    """of its entry, RFC 3339"""
    problem: str = ""
    """why the next level was not reached"""

    @property
    def passed(self) -> bool:
        return self.level >= self.asked


class State(msgspec.Struct, omit_defaults=True):
    """What the log says, as of entry `seq`. `head_hash` is what the next entry chains to."""

    seq: int
    head_hash: str
    snapshots: dict[str, Snapshot] = {}
    packs: dict[str, PackRef] = {}
    """the live ones"""
    condemned: dict[str, Condemned] = {}
    quarantined: dict[str, PackRef] = {}
    ignored: list[str] = []
    """damaged derived objects that need not be told again"""
    damaged: dict[str, str] = {}
    """live packs that were last read to be damaged -> when it was first seen, RFC 3339; new work won't rely on them"""
    verified: dict[str, str] = {}
    """pack -> when every stored byte of it was last read and found right, RFC 3339"""
    epoch: int = 1
    """the data key that the next entry and all new packs are sealed with"""
    epochs_given: int = 1
    """the highest epoch that was given out, so that two rotations never make two keys of one number"""
    slots: dict[str, int] = {}
    """key slot -> the newest epoch that it holds, 0 when it was removed; the first slot is in no entry"""
    resumed: dict[str, list[int]] = {}
    """checkpoint -> for each time that its run went on from it, and saved no later one: the step at which the life
    before that died, if it went on from it too, or -1"""
    proven: dict[str, str] = {}
    """snapshot -> since when every byte of it was read here and right, RFC 3339; none that was found damaged since"""
    hurt: dict[str, str] = {}
    """snapshot -> when it was last found damaged here, RFC 3339; none that was proven since"""
    drills: dict[str, Drill] = {}
    """name of snapshots -> the last drill with one of them"""
    fences: dict[str, int] = {}
    """lease -> the highest fencing token of an entry: its earlier owners commit nothing any more"""

    def apply(self, entry: LogEntry, entry_hash: str) -> None:
        """Fold one entry. Kinds this version doesn't know change nothing here; `Corrupt` when it can't be read."""
        fold = _FOLDS.get(entry.kind)
        if fold is not None:
            try:
                fold(self, entry)
                _fence(self, entry)
            except (msgspec.ValidationError, KeyError) as exc:
                raise Corrupt(f"log entry {entry.seq} ({entry.kind}) can't be read: {exc}.") from exc
        self.seq = entry.seq
        self.head_hash = entry_hash

    def validate(self) -> None:
        """Raise `Corrupt` unless every name is one that may become the name of an object, a file or a folder."""
        for snapshot in self.snapshots.values():
            _check_snapshot(snapshot)
        for place in (self.packs, self.condemned, self.quarantined):
            for name, pack in place.items():
                _check_pack(pack.name, pack.bytes, pack.chunks)
                if name != pack.name:
                    raise Corrupt(f"pack {pack.name[:16]} stands under another name.")

    def readable_packs(self) -> dict[str, PackRef]:
        """Every pack that may hold what a snapshot needs: all but those that were swept."""
        condemned = {name: PackRef(name, each.bytes, each.chunks) for name, each in self.condemned.items()}
        return {**self.quarantined, **condemned, **self.packs} if condemned or self.quarantined else self.packs

    def find(self, pack: str) -> PackRef | None:
        """A pack that was not swept."""
        found = self.packs.get(pack) or self.quarantined.get(pack)
        condemned = self.condemned.get(pack)
        return found or (PackRef(pack, condemned.bytes, condemned.chunks) if condemned else None)


def _check_snapshot(snapshot: Snapshot) -> None:
    # Parts of the id become parts of the names of folders.
    if not _HEX_32.fullmatch(snapshot.id) or not all(_HEX_64.fullmatch(chunk) for chunk, _ in snapshot.manifest):
        raise Corrupt(f"the snapshot {snapshot.id[:32]!r} has an id, or manifest chunks, that can't exist.")


def _check_pack(name: str, size_bytes: int, chunks: int) -> None:
    if not _HEX_64.fullmatch(name) or size_bytes < 0 or chunks < 0:
        raise Corrupt(f"a pack named {name[:64]!r}, of {size_bytes} bytes and {chunks} chunks, can't exist.")


def _packs(state: State, entry: LogEntry) -> None:
    for pack in msgspec.convert(entry.body.get("packs", []), list[PackRef]):
        _check_pack(pack.name, pack.bytes, pack.chunks)
        state.packs[pack.name] = pack
        state.condemned.pop(pack.name, None)
        state.quarantined.pop(pack.name, None)


def _snapshot(state: State, entry: LogEntry) -> None:
    snapshot = msgspec.convert(entry.body["snapshot"], Snapshot)
    _check_snapshot(snapshot)
    _packs(state, entry)
    if snapshot.kind == "checkpoint":
        # The run has come further than what it went on from: that doesn't crash it.
        passed = [each for each in state.resumed if _is_passed(state.snapshots[each], snapshot)]
        for each in passed:
            del state.resumed[each]
    state.snapshots[snapshot.id] = snapshot


def _is_passed(earlier: Snapshot, later: Snapshot) -> bool:
    """Whether a run has come as far again. One that went back behind a checkpoint says nothing of that."""
    steps = [each.tags.get("step", "") for each in (earlier, later)]
    return earlier.name == later.name and all(map(str.isdecimal, steps)) and int(steps[0]) <= int(steps[1])


def _resumed(state: State, entry: LogEntry) -> None:
    snapshot = msgspec.convert(entry.body["snapshot"], str)
    if snapshot in state.snapshots:
        died_at = msgspec.convert(entry.body.get("died_at", -1), int)
        state.resumed[snapshot] = [*state.resumed.get(snapshot, []), died_at]


def _forget(state: State, entry: LogEntry) -> None:
    for snapshot in _names(entry, "snapshots"):
        state.snapshots.pop(snapshot, None)
        state.resumed.pop(snapshot, None)
        state.proven.pop(snapshot, None)
        state.hurt.pop(snapshot, None)


def _condemn(state: State, entry: LogEntry) -> None:
    for pack in msgspec.convert(entry.body["packs"], list[PackRef]):
        _check_pack(pack.name, pack.bytes, pack.chunks)
        state.packs.pop(pack.name, None)
        state.quarantined.pop(pack.name, None)
        state.damaged.pop(pack.name, None)
        state.condemned[pack.name] = Condemned(pack.name, pack.bytes, pack.chunks, entry.seq)


def _sweep(state: State, entry: LogEntry) -> None:
    for name in _names(entry, "packs"):
        if state.condemned.pop(name, None):
            state.verified.pop(name, None)


def _quarantine(state: State, entry: LogEntry) -> None:
    for name in _names(entry, "packs"):
        pack = state.packs.pop(name, None)
        if pack is not None:
            state.quarantined[name] = pack
            state.verified.pop(name, None)
            state.damaged.pop(name, None)
    ignored = dict.fromkeys([*state.ignored, *_names(entry, "objects")])
    state.ignored = list(ignored)


def _verified(state: State, entry: LogEntry) -> None:
    for name in _names(entry, "packs"):
        if name in state.packs:
            state.verified[name] = entry.time
            state.damaged.pop(name, None)
    for name in _names(entry, "damaged"):
        if name in state.packs:
            state.damaged.setdefault(name, entry.time)
            state.verified.pop(name, None)


def _proven(state: State, entry: LogEntry) -> None:
    since = msgspec.convert(entry.body.get("since", {}), dict[str, str])
    for snapshot in _names(entry, "snapshots"):
        _prove(state, snapshot, min(since.get(snapshot, entry.time), entry.time))
    for snapshot in _names(entry, "damaged"):
        _hurt(state, snapshot, entry.time)


def _fence(state: State, entry: LogEntry) -> None:
    if "fence" in entry.body:
        name, token = msgspec.convert(entry.body["fence"], tuple[str, int])
        state.fences[name] = max(token, state.fences.get(name, 0))


def _lease(state: State, entry: LogEntry) -> None:
    """Its fence is all that it says."""


def _prove(state: State, snapshot: str, time: str) -> None:
    if snapshot in state.snapshots:
        state.proven[snapshot] = time
        state.hurt.pop(snapshot, None)


def _hurt(state: State, snapshot: str, time: str) -> None:
    if snapshot in state.snapshots:
        state.hurt[snapshot] = time
        state.proven.pop(snapshot, None)


def _drill(state: State, entry: LogEntry) -> None:
    drill = msgspec.structs.replace(msgspec.convert(entry.body["drill"], Drill), time=entry.time)
    state.drills[drill.name] = drill
    if drill.level < 0:
        _hurt(state, drill.snapshot, entry.time)
    else:
        _prove(state, drill.snapshot, entry.time)


class _KeyChange(msgspec.Struct):
    action: str = ""
    slot: str = ""
    epoch: int = 0
    replaces: list[str] = []


def _key(state: State, entry: LogEntry) -> None:
    change = msgspec.convert(entry.body, _KeyChange)
    slots = [*([change.slot] if change.slot else []), *change.replaces]
    if not 0 <= change.epoch <= _EPOCH_MAX or not all(_HEX_32.fullmatch(slot) for slot in slots):
        raise Corrupt(f"log entry {entry.seq} (key) names a slot or an epoch that can't exist.")
    state.epochs_given = max(state.epochs_given, change.epoch)
    if change.action in ("add", "rotate"):
        state.slots[change.slot] = change.epoch
    elif change.action == "remove":
        state.slots[change.slot] = 0
    if change.action == "rotate":
        state.epoch = change.epoch
    for slot in change.replaces:
        state.slots[slot] = 0


def _names(entry: LogEntry, field: str) -> list[str]:
    return msgspec.convert(entry.body.get(field, []), list[str])


_FOLDS: dict[str, Any] = {
    SNAPSHOT: _snapshot,
    PACKS: _packs,
    FORGET: _forget,
    CONDEMN: _condemn,
    SWEEP: _sweep,
    QUARANTINE: _quarantine,
    VERIFIED: _verified,
    KEY: _key,
    RESUMED: _resumed,
    PROVEN: _proven,
    DRILL: _drill,
    LEASE: _lease,
}
