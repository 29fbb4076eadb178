"""Where the checkpoints of a run lie: its repository, and one in the memory of this machine."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from outlast import expect_encrypted, not_empty
from outlast.checkpoint import keep, references
from outlast.checkpoint import save as saving
from outlast.checkpoint.crash_marker import CrashMarker
from outlast.checkpoint.keep import Kept
from outlast.checkpoint.ranks import Ranks
from outlast.checkpoint.save import Captured
from outlast.clock import Clock
from outlast.errors import Busy, Corrupt, NoRepository, OutlastError, Refused
from outlast.events import Event, EventSink
from outlast.records import Snapshot
from outlast.repo import deltas, forget, prune
from outlast.repo.prune_plan import Policy as PrunePolicy
from outlast.repo.repository import Repository
from outlast.repo.state import RESUMED
from outlast.store.layers import open_store

_MEMORY = "/dev/shm"  # noqa: S108  private folders are made in it
# What is dropped is gone at once, but for what another run may be storing just now. Of what lies in packs that are
# still needed half may be waste, before such a pack is written anew.
_PRUNE = PrunePolicy(max_unused=0.5, max_delete=1.0, grace_seconds=0.0, unnamed_seconds=3600.0)
_TRIES = 3
DYING_SECONDS = 10.0

Secret = Callable[[], bytes]


class Candidate(msgspec.Struct, frozen=True):
    """A checkpoint that a run might go on from."""

    snapshot: str
    step: int
    in_memory: bool
    crashes: int
    """how often the run went on from it, and saved no later one"""


class Tier:
    """The checkpoints of one run in one repository, made when the first is saved."""

    def __init__(self, url: str, name: str, secret: Secret | None, clock: Clock, sink: EventSink) -> None:
        self._url, self._name, self._secret, self._clock, self._sink = url, name, secret, clock, sink
        self._opened: Repository | None = None
        self._dropped_bytes = 0
        self.was_damaged = False
        """Damage was seen: what new work would rely on is read first."""
        self.delta = False
        """Only differences from the checkpoint before are stored, where they are smaller."""

    def anew(self) -> Tier:
        """The same place, of which nothing is known."""
        tier = Tier(self._url, self._name, self._secret, self._clock, self._sink)
        tier.was_damaged = self.was_damaged
        return tier

    def open(self, *, make: bool) -> Repository | None:
        if self._opened is None:
            store = open_store(self._url)
            given: Any = {"secret": self._secret and not_empty(self._secret), "clock": self._clock, "sink": self._sink}
            try:
                self._opened = self._checked(Repository.open(store, **given))
            except NoRepository:
                if make:
                    try:
                        self._opened = Repository.create(store, compression="none", **given)
                    except Refused:  # another run made it meanwhile
                        self._opened = self._checked(Repository.open(store, **given))
        return self._opened

    def _checked(self, repository: Repository) -> Repository:
        if self._secret is not None:
            expect_encrypted(repository)
        return repository

    @property
    def repository(self) -> Repository:
        found = self.open(make=True)
        assert found is not None
        return found

    def checkpoints(self, *, fresh: bool = False) -> list[tuple[int, Snapshot]]:
        """(step, snapshot), in the order in which they were committed; `fresh`: those that others committed too."""
        repository = self.open(make=False)
        if repository is None:
            return []
        if fresh:
            repository.refresh()
        return references.checkpoints(repository, self._name)

    def note_resumed(self, snapshot: Snapshot, died_at: int) -> None:
        """Count it in the log, see `keep.crashes`. That this fails doesn't keep the run from going on."""
        try:
            self.repository.log.append(RESUMED, lambda _: {"snapshot": snapshot.id, "died_at": died_at})
        except OutlastError as exc:
            self._sink.event(Event("resume.not_counted", f"that the run went on is not in the log: {exc.message}"))

    def persist(self, captured: Callable[[], Captured], tags: Mapping[str, str], ranks: Ranks) -> Snapshot:
        ids = ranks.save.from_first(lambda: self.repository.format.id, str)
        found = ranks.save.exchange(lambda: self.repository.format.id, str)
        if set(found) != {ids}:
            raise Refused(
                f"the ranks of this run see different repositories at {self._url}; nothing was saved.",
                hint="Give the run a place that all of them share, such as s3:// or a network file system.",
            )
        if self.delta and not deltas.are_allowed(self.repository):
            self.delta = False
            told = f"{self._url} was made before there were differences, so checkpoints are stored whole"
            self._sink.event(Event("delta.not_allowed", told))
        for left in reversed(range(_TRIES)):
            trusting = not self.was_damaged
            try:
                made = saving.persist(
                    self.repository, self._name, captured, tags, ranks, trusting=trusting, delta=self.delta
                )
            except Busy:  # somebody's prune took what it relied on
                if not left:
                    raise
            else:
                self.was_damaged = False  # all that later ones will rely on was stored or read now
                return made
        raise AssertionError

    def verify(self, snapshot: Snapshot) -> None:
        """Read every chunk of a checkpoint. Raises `Corrupt`; then the next save stores again what is damaged."""
        self.repository.refresh()
        try:
            chunks = {chunk for entry in self.repository.entries(snapshot) for chunk, _ in entry.chunks}
            self.repository.fetch(map(bytes.fromhex, sorted(chunks)), lambda _, __: None)
        except Corrupt:
            self.was_damaged = True
            raise

    def drop(self, policy: keep.Policy) -> None:
        """Forget the checkpoints that the policy doesn't keep, and free their space when it is worth it."""
        found = self.checkpoints()
        kept = keep.reasons([_kept(step, each) for step, each in found], policy)
        gone = [each for _, each in found if each.id not in kept]
        if not gone:
            return
        repository = self.repository
        forget.execute(repository, forget.plan(repository, ids=[each.id for each in gone]), allow_empty=True)
        self._dropped_bytes += sum(each.bytes_stored for each in gone)
        live = sum(each.bytes for each in repository.state.packs.values())
        if self._dropped_bytes * 4 > live:
            prune.prune(repository, _PRUNE)
            self._dropped_bytes = 0


class Tiers:
    """The tiers of a run."""

    def __init__(
        self, url: str, name: str, policy: keep.Policy, secret: Secret | None, clock: Clock, sink: EventSink
    ) -> None:
        self._policy, self._clock, self._sink = policy, clock, sink
        self._user_folder = f"{_MEMORY}/outlast-{os.getuid()}"
        self._memory_folder = f"{self._user_folder}/{_own_name(url, name)}"
        self.disk = Tier(url, name, secret, clock, sink)
        self.memory = Tier(self._memory_folder, name, secret, clock, sink)
        self.marker = CrashMarker(f"{self._memory_folder}.step", name)

    def candidates(self, *, with_memory: bool) -> list[Candidate]:
        """Every checkpoint, the one that was saved last before all others. Those in memory stand by their time."""
        if _is_private(self._user_folder):
            self._refuse_other()
        began_at, died_at = self._last() or (None, None)
        found: list[tuple[str, Candidate]] = []
        tiers = [self.disk]
        if with_memory and _is_private(self._user_folder, self._memory_folder):
            tiers.append(self.memory)
        for tier in tiers:
            try:
                made = tier.checkpoints(fresh=True)
            except OutlastError as exc:
                if tier is self.disk:
                    raise
                self._sink.event(Event("checkpoint.skipped", f"what is saved in memory is skipped: {exc.message}"))
                continue
            for step, each in reversed(made):
                resumed = tier.repository.state.resumed.get(each.id, [])
                crashes = keep.crashes(resumed, died_at if began_at == step and resumed else None)
                candidate = Candidate(each.id, step, tier is self.memory, crashes)
                older = (at for at, (time, _) in enumerate(found) if time <= each.time)
                found.insert(next(older, len(found)) if tier is self.memory else len(found), (each.time, candidate))
        return [candidate for _, candidate in found]

    def _last(self) -> tuple[int, int] | None:
        """Of the life before, see `CrashMarker.last`, where nobody else could have written it."""
        return self.marker.last() if _is_private(self._user_folder) else None

    def _refuse_other(self) -> None:
        """Raises `Refused` where another process trains the run; one that was just killed takes a while to be gone."""
        until = self._clock.monotonic_seconds() + DYING_SECONDS
        while True:
            try:
                return self.marker.refuse_other()
            except Refused:
                if self._clock.monotonic_seconds() >= until:
                    raise
                self._clock.sleep(0.05)

    def begin(self, step: int, candidate: Candidate | None = None) -> None:
        """A life of the run begins at this step, of this checkpoint if it is not its first."""
        if candidate is not None:
            tier, snapshot = self.find(candidate)
            began_at, died_at = self._last() or (-1, -1)
            went_on = snapshot.id in tier.repository.state.resumed and began_at == step
            tier.note_resumed(snapshot, died_at if went_on else -1)
        try:
            _make_private(self._user_folder)
        except (OutlastError, OSError) as exc:
            self._sink.event(Event("run.unmarked", f"how far this life gets can't be marked: {exc}"))
        else:
            self.marker.begin(step)

    def tier(self, candidate: Candidate) -> Tier:
        return self.memory if candidate.in_memory else self.disk

    def find(self, candidate: Candidate) -> tuple[Tier, Snapshot]:
        tier = self.tier(candidate)
        return tier, tier.repository.find_snapshot(candidate.snapshot)

    def verify(self, snapshot: Snapshot, *, in_memory: bool) -> None:
        """Read every chunk of a checkpoint. Raises `Corrupt`."""
        (self.memory if in_memory else self.disk).verify(snapshot)

    def persist(
        self, captured: Callable[[], Captured], metrics: Mapping[str, float], ranks: Ranks, *, in_memory: bool
    ) -> Snapshot:
        """Commit what `captured` gives, once it is staged; every rank calls it and gets the same snapshot."""
        if in_memory:
            self.memory = self.memory.anew()  # what was there the first rank may have removed
            ranks.save.exchange(lambda: _make_private(self._user_folder, self._memory_folder), str)
        tier = self.memory if in_memory else self.disk
        return tier.persist(captured, {f"metric.{key}": repr(float(value)) for key, value in metrics.items()}, ranks)

    def drop(self, *, in_memory: bool) -> None:
        """What need not be kept any more, now that a newer one is durable. Failing at it is no failure of the save."""
        try:
            if in_memory:
                self.memory.drop(keep.Policy(1))
            else:
                self.disk.drop(self._policy)
                if _is_private(self._user_folder, self._memory_folder):
                    gone = f"{self._memory_folder}.gone"
                    shutil.rmtree(gone, ignore_errors=True)
                    os.rename(self._memory_folder, gone)  # it holds older ones alone
                    shutil.rmtree(gone)
                    self.memory = self.memory.anew()
        except (OutlastError, OSError) as exc:
            self._sink.event(Event("checkpoint.not_dropped", f"old checkpoints were not dropped: {exc}"))


def _own_name(url: str, name: str) -> str:
    place = os.path.realpath(url) if "://" not in url else url
    return hashlib.sha256(f"{place}\0{name}".encode()).hexdigest()[:24]


def _make_private(*folders: str) -> str:
    """The last folder; all are there now. Raises `Refused` where somebody else could write to one."""
    for folder in folders:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        if not _is_private(folder):
            raise Refused(f"{folder} belongs to somebody else, or others may write to it.")
    return folders[-1]


def _is_private(*folders: str) -> bool:
    """Whether they are there, and this user's alone."""
    try:
        found = [os.lstat(folder) for folder in folders]
    except FileNotFoundError:
        return False
    return all(each.st_uid == os.getuid() and stat.S_ISDIR(each.st_mode) and not each.st_mode & 0o022 for each in found)


def _kept(step: int, snapshot: Snapshot) -> Kept:
    metrics = references.metrics_of(snapshot)
    return Kept(snapshot.id, step, {name: math.nan if value is None else value for name, value in metrics.items()})
