"""An entry of the log in words. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec

from outlast.records import LogEntry, PackRef, Snapshot
from outlast.repo.state import (
    CONDEMN,
    DRILL,
    FORGET,
    KEY,
    LEASE,
    PACKS,
    PROVEN,
    QUARANTINE,
    RESUMED,
    SNAPSHOT,
    SWEEP,
    VERIFIED,
    Drill,
    State,
)

_NAMED_MAX = 3
_ID_CHARACTERS = 8

SizeText = Callable[[int], str]
"""how a number of bytes is written"""


def sentence(entry: LogEntry, before: State, size_text: SizeText) -> str:
    """What a sound entry did. `before`: the state that it was folded into.

    Text from the entry, such as names, is in it as it is.
    """
    tell = _SENTENCES.get(entry.kind)
    if tell is None:
        return f"an entry of kind {entry.kind!r}, which this version does not know"
    return tell(entry, before, size_text)


def concerns(entry: LogEntry, before: State) -> set[str]:
    """The names whose snapshots a sound entry makes or forgets."""
    if entry.kind == SNAPSHOT:
        return {msgspec.convert(entry.body["snapshot"], Snapshot).name}
    if entry.kind == RESUMED:
        made = before.snapshots.get(msgspec.convert(entry.body["snapshot"], str))
        return {made.name} if made else set()
    if entry.kind == DRILL:
        return {msgspec.convert(entry.body["drill"], Drill).name}
    if entry.kind == PROVEN:
        return {before.snapshots[each].name for each in _listed(entry, "snapshots") if each in before.snapshots}
    if entry.kind == FORGET:
        return {before.snapshots[each].name for each in _listed(entry, "snapshots") if each in before.snapshots}
    return set()


def _snapshot(entry: LogEntry, before: State, size_text: SizeText) -> str:
    made = msgspec.convert(entry.body["snapshot"], Snapshot)
    parts = [
        _count(made.files, "file"),
        size_text(made.bytes),
        f"{size_text(made.bytes_added)} new",
        *_rescued(entry, before, size_text),
    ]
    return f"{made.kind} {_short(made.id)} of {made.name}: {', '.join(parts)}"


def _resumed(entry: LogEntry, before: State, size_text: SizeText) -> str:
    snapshot = msgspec.convert(entry.body["snapshot"], str)
    made = before.snapshots.get(snapshot)
    where = f" of {made.name}, step {made.tags.get('step', 'unknown')}" if made else ""
    return f"a run went on from checkpoint {_short(snapshot)}{where}"


def _packs(entry: LogEntry, before: State, size_text: SizeText) -> str:
    refs = _refs(entry)
    fresh = [ref.bytes for ref in refs if before.find(ref.name) is None]
    parts = [f"stored {_packs_text(fresh, size_text)}, ahead of a snapshot"] if fresh else []
    parts += _rescued(entry, before, size_text)
    return ", ".join(parts) or "listed packs that were live already"


def _rescued(entry: LogEntry, before: State, size_text: SizeText) -> Iterator[str]:
    refs = _refs(entry)
    condemned = [ref.bytes for ref in refs if ref.name in before.condemned]
    damaged = [ref.bytes for ref in refs if ref.name in before.quarantined]
    if condemned:
        yield f"took back {_packs_text(condemned, size_text)}, condemned before"
    if damaged:
        yield f"took {_packs_text(damaged, size_text)} out of quarantine"


def _forget(entry: LogEntry, before: State, size_text: SizeText) -> str:
    gone = _listed(entry, "snapshots")
    known = (before.snapshots.get(each) for each in gone)
    told = [
        f"{_short(each)} of {snapshot.name}" if snapshot else _short(each)
        for each, snapshot in zip(gone, known, strict=True)
    ]
    return f"forgot {_count(len(gone), 'snapshot')}: {_some(told)}"


def _condemn(entry: LogEntry, before: State, size_text: SizeText) -> str:
    return f"condemned {_packs_text([ref.bytes for ref in _refs(entry)], size_text)}"


def _sweep(entry: LogEntry, before: State, size_text: SizeText) -> str:
    names = _listed(entry, "packs")
    sizes = [before.condemned[name].bytes for name in names if name in before.condemned]
    if len(sizes) == len(names):
        return f"deleted {_packs_text(sizes, size_text)}"
    # A pack that was taken back in between stays, whatever this entry lists.
    return f"deleted {_packs_text(sizes, size_text)}, of {_count(len(names), 'pack')} listed"


def _quarantine(entry: LogEntry, before: State, size_text: SizeText) -> str:
    sizes = [before.packs[name].bytes for name in _listed(entry, "packs") if name in before.packs]
    objects = _listed(entry, "objects")
    parts = [f"quarantined {_packs_text(sizes, size_text)}, damaged"] if sizes else []
    parts += [f"quarantined {_count(len(objects), 'damaged object')}: {_some(objects)}"] if objects else []
    return ", ".join(parts) or "quarantined nothing"


def _verified(entry: LogEntry, before: State, size_text: SizeText) -> str:
    names, damaged = _listed(entry, "packs"), _listed(entry, "damaged")
    found = (before.find(name) for name in names)
    sizes = [ref.bytes for ref in found if ref]
    parts = []
    if names:
        parts.append(f"verified {_count(len(names), 'pack')}, {size_text(sum(sizes))}: every stored byte was right")
    if damaged:
        parts.append(f"found {_count(len(damaged), 'pack')} damaged: {_some(map(_short, damaged))}")
    return "; ".join(parts) or "verified nothing"


def _proven(entry: LogEntry, before: State, size_text: SizeText) -> str:
    right, damaged = _listed(entry, "snapshots"), _listed(entry, "damaged")
    parts = []
    if right:
        sizes = [before.snapshots[each].bytes for each in right if each in before.snapshots]
        parts.append(f"proved {_count(len(right), 'snapshot')}, {size_text(sum(sizes))}: every byte was read and right")
    if damaged:
        parts.append(f"found {_count(len(damaged), 'snapshot')} damaged: {_some(map(_short, damaged))}")
    return "; ".join(parts) or "proved nothing"


def _drill(entry: LogEntry, before: State, size_text: SizeText) -> str:
    drill = msgspec.convert(entry.body["drill"], Drill)
    came = f"restored {size_text(drill.bytes)} in {drill.rto_seconds:.1f} s"
    reached = f"level L{drill.level}" if drill.level >= 0 else "no level"
    failed = "" if drill.passed else f", of L{drill.asked}: {drill.problem}"
    return f"drill with snapshot {_short(drill.snapshot)} of {drill.name}: {came}, {reached} reached{failed}"


def _lease(entry: LogEntry, before: State, size_text: SizeText) -> str:
    return f"the lease {entry.body.get('lease', '')} was taken over: whoever had it before commits nothing any more"


def _key(entry: LogEntry, before: State, size_text: SizeText) -> str:
    def text(field: str) -> str:
        return str(entry.body.get(field, ""))

    label = f" ({text('label')})" if text("label") else ""
    key = f"key {_short(text('slot'))}{label}"
    replaces = _listed(entry, "replaces")
    instead = f", instead of {_some([_short(each) for each in replaces])}" if replaces else ""
    match text("action"):
        case "add":
            return f"{key} added{instead}"
        case "remove":
            return f"{key} removed"
        case "rotate":
            return f"keys rotated: data key {text('epoch')} is in use from here on; {key} holds it{instead}"
        case "prepare":
            return f"data key {text('epoch')} reserved for a rotation"
        case other:
            return f"a change of keys, {other!r}, which this version does not know"


_SENTENCES: dict[str, Callable[[LogEntry, State, SizeText], str]] = {
    SNAPSHOT: _snapshot,
    PACKS: _packs,
    FORGET: _forget,
    CONDEMN: _condemn,
    SWEEP: _sweep,
    QUARANTINE: _quarantine,
    VERIFIED: _verified,
    RESUMED: _resumed,
    PROVEN: _proven,
    DRILL: _drill,
    LEASE: _lease,
    KEY: _key,
}


def _refs(entry: LogEntry) -> list[PackRef]:
    return msgspec.convert(entry.body.get("packs", []), list[PackRef])


def _listed(entry: LogEntry, field: str) -> list[str]:
    found: Any = entry.body.get(field, [])
    return msgspec.convert(found, list[str])


def _packs_text(sizes: Sequence[int], size_text: SizeText) -> str:
    return f"{_count(len(sizes), 'pack')}, {size_text(sum(sizes))}"


def _count(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def _some(items: Iterable[str]) -> str:
    """
    >>> _some(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    every = list(items)
    more = f" and {len(every) - _NAMED_MAX:,} more" if len(every) > _NAMED_MAX else ""
    return ", ".join(every[:_NAMED_MAX]) + more


def _short(identifier: str) -> str:
    return identifier[:_ID_CHARACTERS]
