"""Prove snapshots: read every stored byte that they need, and note in the log which are whole and which are hurt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from outlast import records
from outlast.errors import Archived, Corrupt
from outlast.events import Event
from outlast.records import Snapshot
from outlast.repo.needs import needed_chunks
from outlast.repo.repository import Repository
from outlast.repo.scrub import Scrub, Task
from outlast.repo.seal import ID_BYTES
from outlast.repo.state import PROVEN, VERIFIED, State


class ProofReport(msgspec.Struct):
    """What was found; also in the log, but for those that were forgotten meanwhile."""

    proven: list[str] = []
    damaged: dict[str, str] = {}
    """snapshot -> what is wrong"""
    packs_read: int = 0
    bytes_read: int = 0
    packs_trusted: int = 0
    """not read, for they were read not long ago"""


def prove(repository: Repository, snapshots: Sequence[Snapshot], *, trust_seconds: float = 0.0) -> ProofReport:
    """Read the packs that hold what these snapshots need, each once, and commit what was found.

    A pack that the log says was read whole, and right, in the last `trust_seconds` is not read again; then the snapshot
    counts as proven since that time. Nor is an archived one that ever was, and that proof stands. An archived one
    that never was proves nothing, and is not noted. Damage elsewhere in those packs hurts nobody here, and is noted by
    pack.
    Raises `Unavailable` when the store can't be read: then nothing is noted.
    """
    report = ProofReport()
    now_ns = repository.clock.now_ns()
    now, trusted_since = records.time_text(now_ns), records.time_text(max(0, now_ns - int(trust_seconds * 1e9)))
    repository.refresh()
    repository.load_index()
    repository.learn_archived()
    needs: dict[str, dict[bytes, str]] = {}
    for snapshot in snapshots:
        try:
            needs[snapshot.id] = _packs(repository, snapshot)
        except Corrupt as exc:
            report.damaged[snapshot.id] = exc.message
    needed = {pack for packs in needs.values() for pack in packs.values()}
    state = repository.state
    read = {
        name
        for name in needed
        if name in state.damaged
        or state.verified.get(name, "") <= (trusted_since if name not in repository.archived else "")
    }
    report.packs_trusted = len(needed) - len(read)
    refs = [ref for name in sorted(read) if (ref := state.find(name)) is not None]
    scrub = Scrub(repository.store, repository.clock, repository.sink)
    bad: dict[bytes, str] = {}
    unread: set[str] = set()
    unsound: set[str] = {name for name in read if state.find(name) is None}
    for checked in scrub.run([Task(ref, None, True) for ref in refs]):
        if checked.is_archived:
            unread.add(checked.ref.name)
            bad.update(dict.fromkeys(_in_pack(needs, checked.ref.name), "It is archived, and was never read whole."))
        if checked.problems:
            unsound.add(checked.ref.name)
            bad.update(dict.fromkeys(checked.bad, checked.problems[0]))
            if checked.footer is None:
                bad.update(dict.fromkeys(_in_pack(needs, checked.ref.name), checked.problems[0]))
    report.packs_read, report.bytes_read = len(refs), scrub.bytes_read
    lost = {chunk: problem for chunk, problem in bad.items() if not _has_other(repository, chunk)}
    since: dict[str, str] = {}
    for identity, packs in needs.items():
        hurt = next((chunk for chunk in packs if chunk in lost), None)
        if hurt is not None:
            report.damaged[identity] = f"pack {packs[hurt][:16]}: {lost[hurt]}"
        else:
            report.proven.append(identity)
            trusted = set(packs.values()) - read - repository.archived.keys()
            since[identity] = min((state.verified.get(each, now) for each in trusted), default=now)
    for identity, problem in report.damaged.items():
        fields = {"snapshot": identity, "problem": problem}
        repository.sink.event(Event("snapshot.damaged", f"snapshot {identity[:8]} is damaged: {problem}", fields))
    _note(repository, report, since, sorted(read - unsound - unread), sorted(unsound))
    return report


def _packs(repository: Repository, snapshot: Snapshot) -> dict[bytes, str]:
    """chunk -> the pack that it is read from, for all that the snapshot needs. Raises `Corrupt`."""
    ids: set[bytes] = set()

    def take(joined: bytes) -> None:
        ids.update(joined[at : at + ID_BYTES] for at in range(0, len(joined), ID_BYTES))

    needed_chunks(repository, [snapshot], take)
    return {chunk: repository.locate(chunk).pack.name for chunk in ids}


def _in_pack(needs: dict[str, dict[bytes, str]], pack: str) -> list[bytes]:
    return [chunk for packs in needs.values() for chunk, name in packs.items() if name == pack]


def _has_other(repository: Repository, chunk: bytes) -> bool:
    """Whether it can be had all the same, from another pack, or in a second try."""
    try:
        repository.get_stored(chunk)
    except (Corrupt, Archived):
        return False
    return True


def _note(repository: Repository, report: ProofReport, since: dict[str, str], sound: list[str], bad: list[str]) -> None:
    def packs(state: State) -> dict[str, Any] | None:
        live = [name for name in sound if name in state.packs]
        hurt = [name for name in bad if name in state.packs]
        return {"packs": live, "damaged": hurt} if live or hurt else None

    def snapshots(state: State) -> dict[str, Any] | None:
        proven = [each for each in report.proven if each in state.snapshots]
        damaged = [each for each in report.damaged if each in state.snapshots]
        if not proven and not damaged:
            return None
        return {"snapshots": proven, "damaged": damaged, "since": {each: since[each] for each in proven}}

    repository.log.append(VERIFIED, packs)
    repository.log.append(PROVEN, snapshots)
