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
from outlast.repo.scrub import Checked, Scrub, Task
from outlast.repo.seal import ID_BYTES
from outlast.repo.state import PROVEN, VERIFIED, State
from outlast.store.base import HOW_TO_THAW


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
    counts as proven since that time. Nor is an archived one that ever was, and that proof stands. A time to come is of
    a clock that was ahead, and is not trusted. Damage elsewhere in those packs hurts nobody here, and is noted by pack.
    Raises `Unavailable` when the store can't be read: then nothing is noted. Raises `Archived` when packs that nobody
    has ever read lie in archives: what was found of the other snapshots is noted.
    """
    report = ProofReport()
    now_ns = repository.clock.now_ns()
    now, trusted_since = records.time_text(now_ns), records.time_text(max(0, now_ns - int(trust_seconds * 1e9)))
    repository.refresh()
    repository.load_index()
    repository.learn_archived()
    needs: dict[str, set[str]] = {}
    for snapshot in snapshots:
        try:
            needs[snapshot.id] = {repository.locate(chunk).pack.name for chunk in _chunks(repository, snapshot)}
        except Corrupt as exc:
            report.damaged[snapshot.id] = exc.message
    needed = {pack for packs in needs.values() for pack in packs}
    state = repository.state
    read = {
        name
        for name in needed
        if name in state.damaged
        or not (
            state.verified.get(name)
            if name in repository.archived
            else trusted_since < state.verified.get(name, "") <= now
        )
    }
    report.packs_trusted = len(needed) - len(read)
    refs = [ref for name in sorted(read) if (ref := state.find(name)) is not None]
    scrub = Scrub(repository.store, repository.clock, repository.sink)
    damage = _Damage(repository)
    unread, unsound = set[str](), {name for name in read if state.find(name) is None}
    for checked in scrub.run([Task(ref, None, True) for ref in refs]):
        if checked.is_archived:
            unread.add(checked.ref.name)
        elif checked.problems:
            unsound.add(checked.ref.name)
            damage.take(checked)
    report.packs_read, report.bytes_read = len(refs) - len(unread), scrub.bytes_read
    since: dict[str, str] = {}
    for snapshot in snapshots:
        packs = needs.get(snapshot.id, set())
        if problem := damage.of(snapshot) if packs & unsound else "":
            report.damaged[snapshot.id] = problem
        elif packs and not packs & unread:
            report.proven.append(snapshot.id)
            trusted = packs - read - repository.archived.keys()
            since[snapshot.id] = min((state.verified.get(each, now) for each in trusted), default=now)
    for identity, problem in report.damaged.items():
        fields = {"snapshot": identity, "problem": problem}
        repository.sink.event(Event("snapshot.damaged", f"snapshot {identity[:8]} is damaged: {problem}", fields))
    _note(repository, report, since, sorted(read - unsound - unread), sorted(unsound))
    if unread:
        raise Archived(
            f"{len(unread):,} of the {len(needed):,} packs that are needed of {repository.store.url} are archived and "
            "were never verified; they could not be read. What was found of the others is in the log.",
            hint=HOW_TO_THAW,
        )
    return report


def _chunks(repository: Repository, snapshot: Snapshot) -> set[bytes]:
    """All that the snapshot needs. Raises `Corrupt`."""
    ids: set[bytes] = set()

    def take(joined: bytes) -> None:
        ids.update(joined[at : at + ID_BYTES] for at in range(0, len(joined), ID_BYTES))

    needed_chunks(repository, [snapshot], take)
    return ids


class _Damage:
    """What was found wrong in packs, and which snapshots it hurts: asked for those alone that need such a pack."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._bad: dict[bytes, str] = {}
        self._lost_packs: dict[str, str] = {}
        self._has_other: dict[bytes, bool] = {}

    def take(self, checked: Checked) -> None:
        self._bad.update(dict.fromkeys(checked.bad, checked.problems[0]))
        if checked.footer is None:
            self._lost_packs[checked.ref.name] = checked.problems[0]

    def of(self, snapshot: Snapshot) -> str:
        """Why it is damaged; "" where what is wrong does not concern it."""
        try:
            for chunk in sorted(_chunks(self._repository, snapshot)):
                name = self._repository.locate(chunk).pack.name
                problem = self._bad.get(chunk) or self._lost_packs.get(name)
                if problem and not self._can_be_had(chunk):
                    return f"pack {name[:16]}: {problem}"
        except Corrupt as exc:
            return exc.message
        return ""

    def _can_be_had(self, chunk: bytes) -> bool:
        """From another pack, or in a second try."""
        if chunk not in self._has_other:
            try:
                self._repository.get_stored(chunk)
                self._has_other[chunk] = True
            except (Archived, Corrupt) as exc:
                self._has_other[chunk] = isinstance(exc, Archived)
        return self._has_other[chunk]


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
