"""Walk the whole log, entry by entry, trusting nothing, and go on past whatever is damaged.

Opening a repository stops at a damaged entry, for it can't know what that entry said. A check, and
a restore from a repository whose log is damaged, want all that is still there.
"""

from __future__ import annotations

import msgspec

from outlast.errors import Corrupt, NotFound
from outlast.records import LogEntry
from outlast.repo import seal
from outlast.repo.log import ENTRY_BYTES_MAX, STATE_BYTES_MAX, Log, entry_name, state_name
from outlast.repo.state import State
from outlast.store.base import ObjectStore

_DERIVED = "it is derived from the log and its loss costs nothing: delete it"


class LogDamage(msgspec.Struct, frozen=True):
    """An object of the log that is not what was written."""

    object: str
    problem: str


class Walk(msgspec.Struct):
    """What the log still says. `lost`: what some entries committed is unknown."""

    state: State
    damage: list[LogDamage]
    lost: bool = False


class _Link(msgspec.Struct):
    """One stored entry: its hash, and what it says or why that can't be known."""

    seq: int
    hash: str = ""
    entry: LogEntry | None = None
    problem: str = ""
    epoch: int = 0
    """of the data key that it is sealed with; 0 where it isn't"""


def walk(store: ObjectStore, log: Log) -> Walk:
    """Verify every entry, the chain from `format` on and every `state/` object; fold what is sound.

    An entry is sound when its own bytes are whole and it chains to a neighbour: to the one before, or
    the one after it to this one. A state object that is whole stands in for lost entries before it.
    """
    found = Walk(State(0, log.anchor), [])
    # First the states: each is written after its entry, so what is listed here has an entry below.
    states = {info.name: info.size_bytes for info in store.list("state/")}
    links = _read_links(store, log)
    before: _Link | None = _Link(0, log.anchor)
    for number, link in enumerate(links):
        after = links[number + 1] if number + 1 < len(links) else None
        expected = before.seq + 1 if before else 1
        if link.seq > expected:
            _note_gap(found, expected, link.seq - 1)
            before = None
        problem = _problem(link, before, after, found)
        if problem:
            found.damage.append(LogDamage(entry_name(link.seq), problem))
            found.lost = True
        if state_name(link.seq) in states:
            name = state_name(link.seq)
            _compare_state(log, name, states.pop(name), found)
        before = link
    found.damage += [LogDamage(name, f"it belongs to no entry of the log; {_DERIVED}.") for name in sorted(states)]
    return found


def _read_links(store: ObjectStore, log: Log) -> list[_Link]:
    """Every listed entry; one that is too large to be one is not read."""
    listed, links = [], []
    for info in store.list("log/"):
        number = info.name.removeprefix("log/")
        if not (number.isdigit() and info.name == entry_name(int(number)) and int(number)):
            continue
        if info.size_bytes <= ENTRY_BYTES_MAX:
            listed.append(int(number))
        else:
            links.append(_Link(int(number), problem=f"{info.name} is far too large to be a log entry."))
    for seq, data in zip(listed, log.read_many(listed), strict=True):
        if data is None:
            continue  # it went away since it was listed: a gap
        link = _Link(seq, seal.digest(data).hex())
        try:
            link.entry = log.parse(data, seq)
            link.epoch = seal.sealed_epoch(data) if log.encrypted else 0
        except Corrupt as exc:
            link.problem = exc.message
        links.append(link)
    return sorted(links, key=lambda link: link.seq)


def _note_gap(found: Walk, first: int, last: int) -> None:
    what = f"log entry {first} is missing" if first == last else f"log entries {first} to {last} are missing"
    found.damage.append(LogDamage(entry_name(first), f"{what}; later entries exist."))
    found.lost = True


def _problem(link: _Link, before: _Link | None, after: _Link | None, found: Walk) -> str:
    """Why the entry is not sound, or "" after folding it. A broken link between sound ones is noted too."""
    if link.entry is None:
        return link.problem
    if link.epoch not in (0, found.state.epoch) and not found.lost:
        link.problem = f"log entry {link.seq} is sealed with data key epoch {link.epoch}, not {found.state.epoch}."
        return link.problem
    follows = None if before is None or before.problem else before.hash == link.entry.prev_hash
    confirmed = None
    if after is not None and after.seq == link.seq + 1 and after.entry is not None:
        confirmed = after.entry.prev_hash == link.hash
    if follows is not True and confirmed is not True and False in (follows, confirmed):
        link.problem = (
            f"log entry {link.seq} does not chain to its neighbours: it is not the one that was committed here."
        )
        return link.problem
    try:
        found.state.apply(link.entry, link.hash)
    except Corrupt as exc:
        link.problem = exc.message
        return exc.message
    if follows is False:
        name = "format" if link.seq == 1 else entry_name(link.seq)
        found.damage.append(LogDamage(name, f"log entry {link.seq} does not chain to what comes before it."))
    return ""


def _compare_state(log: Log, name: str, size_bytes: int, found: Walk) -> None:
    try:
        if size_bytes > STATE_BYTES_MAX:
            raise Corrupt(f"{name} is far too large to be a state.")
        state = log.read_state(name)
    except NotFound:
        return  # a prune has deleted it since it was listed
    except Corrupt as exc:
        found.damage.append(LogDamage(name, f"{exc.message} It can't be used, but {_DERIVED}."))
        return
    if found.lost:
        found.state = state
        found.lost = False
    elif state != found.state:
        found.damage.append(LogDamage(name, f"{name} is not what the log folds to; {_DERIVED}."))
