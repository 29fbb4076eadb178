"""Where the checkpoints of a run lie: its repository, and one in the memory of this machine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping

from outlast.checkpoint import keep
from outlast.checkpoint import save as saving
from outlast.checkpoint.keep import Kept
from outlast.checkpoint.stage import Place
from outlast.checkpoint.state import Part
from outlast.clock import Clock
from outlast.errors import NoRepository, OutlastError
from outlast.events import Event, EventSink
from outlast.records import Snapshot
from outlast.repo import forget, prune
from outlast.repo.prune_plan import Policy as PrunePolicy
from outlast.repo.repository import Repository
from outlast.repo.state import RESUMED
from outlast.store.layers import open_store

_MEMORY = "/dev/shm"  # noqa: S108  private folders are made in it
# Of what lies in packs that are still needed half may be waste, before such a pack is written anew.
_PRUNE = PrunePolicy(max_unused=0.5, max_delete=1.0, grace_seconds=0.0)


class Tier:
    """The checkpoints of one run in one repository, made when the first is saved."""

    def __init__(self, url: str, name: str, clock: Clock, sink: EventSink) -> None:
        self._url, self._name, self._clock, self._sink = url, name, clock, sink
        self._opened: Repository | None = None
        self._dropped_bytes = 0

    def open(self, *, make: bool) -> Repository | None:
        if self._opened is None:
            store = open_store(self._url)
            try:
                self._opened = Repository.open(store, clock=self._clock, sink=self._sink)
            except NoRepository:
                if make:
                    self._opened = Repository.create(store, compression="none", clock=self._clock, sink=self._sink)
        return self._opened

    @property
    def repository(self) -> Repository:
        found = self.open(make=True)
        assert found is not None
        return found

    def checkpoints(self) -> list[tuple[int, Snapshot]]:
        """(step, snapshot), in order of step."""
        repository = self.open(make=False)
        every = repository.snapshots() if repository else []
        mine = [each for each in every if each.kind == "checkpoint" and each.name == self._name]
        found = [(int(each.tags["step"]), each) for each in mine if each.tags.get("step", "").isdigit()]
        return sorted(found, key=lambda each: (each[0], each[1].time))

    def crashes(self, snapshot: Snapshot) -> int:
        return self.repository.state.resumed.get(snapshot.id, 0)

    def note_resumed(self, snapshot: Snapshot) -> None:
        """Count it in the log. That it fails (a store that is read-only) doesn't keep the run from going on."""
        try:
            self.repository.log.append(RESUMED, lambda _: {"snapshot": snapshot.id})
        except OutlastError as exc:
            self._sink.event(Event("resume.not_counted", f"that the run went on is not in the log: {exc.message}"))

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


class Home:
    """The tiers of a run."""

    def __init__(self, url: str, name: str, policy: keep.Policy, clock: Clock, sink: EventSink) -> None:
        self._name, self._policy, self._sink = name, policy, sink
        self.disk = Tier(url, name, clock, sink)
        self.memory = Tier(_memory_url(url, name), name, clock, sink)
        self.failures_before = 0
        self.run_seconds_before = 0.0

    def candidates(self) -> Iterator[tuple[Tier, int, Snapshot]]:
        """Every checkpoint, newest first; of the same step that in memory."""
        found = [(step, tier is self.memory, tier, each) for tier in (self.disk, self.memory)
                 for step, each in tier.checkpoints()]  # fmt: skip
        for step, _, tier, snapshot in sorted(found, key=lambda each: (each[0], each[1], each[3].time), reverse=True):
            yield tier, step, snapshot

    def persist(
        self,
        step: int,
        parts: Mapping[str, Part],
        contents: Mapping[Place, memoryview],
        metrics: Mapping[str, float],
        *,
        in_memory: bool,
    ) -> Snapshot:
        tier = self.memory if in_memory else self.disk
        repository = tier.repository
        repository.refresh()
        tags = {f"metric.{key}": repr(float(value)) for key, value in metrics.items()}
        snapshot = saving.persist(repository, self._name, step, parts, contents, tags)
        try:
            tier.drop(keep.Policy(1) if in_memory else self._policy)
        except OutlastError as exc:
            self._sink.event(Event("checkpoint.not_dropped", f"old checkpoints were not dropped: {exc.message}"))
        return snapshot


def _memory_url(url: str, name: str) -> str:
    """A folder of this user for this run. In it nobody else can write."""
    own = hashlib.sha256(f"{os.path.abspath(url) if '://' not in url else url}\0{name}".encode()).hexdigest()[:24]
    return f"{_MEMORY}/outlast-{os.getuid()}/{own}"


def _kept(step: int, snapshot: Snapshot) -> Kept:
    metrics = {}
    for tag, text in snapshot.tags.items():
        if tag.startswith("metric."):
            metrics[tag.removeprefix("metric.")] = float(text)
    return Kept(snapshot.id, step, metrics)
