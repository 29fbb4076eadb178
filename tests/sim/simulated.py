"""A repository in a simulated world: who works at it, and what must hold whatever happens.

A snapshot's tags tell which blobs are in which file of it, so that every snapshot that exists can be
compared with what was meant, whether or not its commit was acknowledged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from unittest.mock import patch

from msgspec import structs

from outlast.clock import ManualClock
from outlast.errors import Busy, Corrupt, NotFound, OutlastError
from outlast.records import Chunking, Entry, LogEntry, Snapshot, canonical, path_order, time_text
from outlast.repo import forget, keyring, log, seal, write
from outlast.repo.chain import walk
from outlast.repo.check import open_and_check
from outlast.repo.copy import copy
from outlast.repo.log import Log
from outlast.repo.prune import prune
from outlast.repo.prune_plan import Policy
from outlast.repo.repository import Repository
from outlast.repo.state import CONDEMN, FORGET, PACKS, SNAPSHOT
from outlast.store.base import ObjectStore
from outlast.store.layers import RetryStore
from outlast.testing.sim import MAIN, Actor, Dice, Faults, World

REPLICA = "replica"
BLOBS = 14
FILES = 7
PIECE_BYTES = 500
PASSPHRASES = [b"correct horse", b"battery staple"]
ALL_GOES = Policy(max_unused=0.0, max_delete=1.0, grace_seconds=0.0)


@contextmanager
def small_world() -> Iterator[None]:
    """Everything so small that little data has many packs, commits on the way, index segments and states."""
    with ExitStack() as stack:
        for module, name, small in [
            (write, "SEGMENT_PACKS", 3),
            (write, "COMMIT_PACKS_BYTES", 6 << 10),
            (log, "STATE_EVERY", 2),
            (seal, "ARGON2_MEMORY_KIB", 8),
            (seal, "ARGON2_ITERATIONS", 1),
            (seal, "ARGON2_LANES", 1),
        ]:
            stack.enter_context(patch.object(module, name, small))
        yield


@cache
def blob(number: int) -> bytes:
    noise = ManualClock(seed=number)
    return noise.random_bytes(150 + 170 * number)


@dataclass
class Town:
    """A world with a repository, and another one for copies. `seed` decides everything.

    A `crowded` one has no faults but much going on at once: what is wrong with prune itself comes out sooner.
    """

    seed: int
    crowded: bool = False
    world: World = field(init=False)
    dice: Dice = field(init=False)
    secret: bool = field(init=False)
    grace_seconds: list[float] = field(init=False)
    acknowledged: list[str] = field(default_factory=list)
    reads: int = 0
    failed_reads: list[tuple[str, str]] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    works: int = 0
    oracles: dict[str, Oracle] = field(init=False)

    def __post_init__(self) -> None:
        self.dice = Dice(self.seed)
        quiet = self.dice.chance(0.3)
        rate = 0.0 if quiet else self.dice.share() * 0.03
        faults = Faults(
            refused=rate,
            lost_reply=rate,
            late=rate / 2,
            killed=0.0 if quiet else self.dice.share() * 0.004,
            slow=self.dice.pick([0.0, 0.01, 0.03]),
            stale_list=self.dice.pick([0.0, 0.0, 0.1, 0.3]),
            slow_seconds=self.dice.pick([5.0, 60.0, 3600.0]),
            late_seconds=self.dice.pick([1.0, 600.0]),
            skew_seconds=self.dice.pick([0.0, 0.0, 86400.0]),
        )
        self.world = World(self.dice.below(1 << 62), faults, haste=self.dice.pick([0.0, 0.5, 0.9, 0.97]))
        if self.crowded:
            self.world = World(self.dice.below(1 << 62), Faults(slow=0.02, slow_seconds=20.0), haste=0.3)
        self.secret = not self.crowded and self.dice.chance(0.25)
        # Without grace, or with one that is shorter than what a slow actor takes, or a long one.
        self.grace_seconds = self.dice.pick([[0.0], [0.0, 30.0], *([] if self.crowded else [[10 * 86400.0]])])
        for name, is_secret in ((MAIN, self.secret), (REPLICA, self.dice.chance(0.3))):
            Repository.create(
                self.world.store(name),
                secret=(lambda: PASSPHRASES[0]) if is_secret else None,
                chunking=Chunking(block_bytes=1024, min_bytes=256, avg_bytes=512, max_bytes=1024),
                pack_bytes=4096,
                clock=self.world.clock,
            )
        self.oracles = {name: Oracle(self.world.store(name)) for name in (MAIN, REPLICA)}
        self.world.watch(lambda store, method, name: self.oracles[store].look(method, name))

    def populate(self) -> None:
        dice = self.dice
        if self.crowded:
            for number in range(3):
                self.add(f"writer{number}", self._write, 5)
                self.add(f"pruner{number}", self._prune, 6)
                self.add(f"forgetter{number}", self._forget, 2)
            return
        for number in range(2 + dice.below(3)):
            self.add(f"writer{number}", self._write, 2 + dice.below(4))
        for number in range(1 + dice.below(2)):
            self.add(f"forgetter{number}", self._forget, 2 + dice.below(4))
        for number in range(1 + dice.below(3)):
            self.add(f"pruner{number}", self._prune, 2 + dice.below(5))
        for name, turn in [("reader", self._read), ("copier", self._copy)]:
            if dice.chance(0.5):
                self.add(name, turn, 1 + dice.below(3))
        if dice.chance(0.5):
            # What a check goes by is the listing, so it may say anything about a store whose listings lie.
            honest = structs.replace(self.world.faults, stale_list=0.0)
            self.add("checker", self._check, 1 + dice.below(3), honest)
        if self.secret and dice.chance(0.7):
            self.add("locksmith", self._change_keys, 2 + dice.below(3))

    def add(self, name: str, turn: Callable[[Actor], None], turns: int, faults: Faults | None = None) -> None:
        def work(actor: Actor) -> None:
            for _ in range(turns):
                try:
                    turn(actor)
                except OutlastError as exc:
                    # What goes wrong in such a world may be told; that it does no harm is for the oracle.
                    self.refusals.append(f"{actor.name}: {type(exc).__name__}: {exc}")
                actor.clock.sleep(actor.dice.pick([0.0, 1.0, 20.0]))

        self.world.add(name, work, faults)

    def open(self, actor: Actor, store: str = MAIN) -> Repository:
        retrying = RetryStore(actor.store(store), clock=actor.clock)
        return Repository.open(retrying, secret=lambda: PASSPHRASES[0], clock=actor.clock)

    # -- what actors do in one turn ------------------------------------------------------------------

    def _write(self, actor: Actor) -> None:
        repository = self.open(actor)
        self.works += 1
        tags = {"work": str(self.works)}
        for number in range(FILES):
            if actor.dice.chance(0.6):
                tags[f"file{number}"] = str(actor.dice.below(BLOBS))
        for attempt in range(3):
            try:
                self.acknowledged.append(store_snapshot(repository, actor.name, tags).id)
                return
            except Busy:
                if attempt == 2:
                    raise
                repository.refresh()

    def _forget(self, actor: Actor) -> None:
        repository = self.open(actor)
        gone = [each.id for each in repository.snapshots() if actor.dice.chance(0.5)]
        if gone:
            forget.execute(repository, forget.plan(repository, ids=gone), allow_empty=True)

    def _prune(self, actor: Actor) -> None:
        policy = Policy(
            max_unused=actor.dice.pick([0.0, 0.1, 0.5]),
            max_delete=1.0,
            grace_seconds=actor.dice.pick(self.grace_seconds),
        )
        prune(self.open(actor), policy)

    def _read(self, actor: Actor) -> None:
        repository = self.open(actor)
        repository.load_index()
        for snapshot in repository.snapshots():
            self.reads += 1
            try:
                assert_right(repository, snapshot)
            except (Corrupt, NotFound) as exc:
                self.failed_reads.append((snapshot.id, str(exc)))

    def _check(self, actor: Actor) -> None:
        store = RetryStore(actor.store(), clock=actor.clock)
        report = open_and_check(store, secret=lambda: PASSPHRASES[0], data="all", clock=actor.clock)
        if not report.ok:
            self.failed_reads += [("", f"check: {each.object}: {each.problem}") for each in report.damaged]

    def _copy(self, actor: Actor) -> None:
        ways = [(MAIN, REPLICA), (REPLICA, MAIN)]
        source, target = actor.dice.pick(ways)
        copy(self.open(actor, source), self.open(actor, target))

    def _change_keys(self, actor: Actor) -> None:
        repository = self.open(actor)
        match actor.dice.below(4):
            case 0:
                keyring.add(repository, PASSPHRASES[1], "second")
            case 1:
                second = [each for each in keyring.slots(repository) if each.label == "second"]
                if second:
                    keyring.remove(repository, second[0].id)
            case _:
                keyring.rotate(repository)

    # -- afterwards ----------------------------------------------------------------------------------

    def judge(self) -> None:
        """Everything that must hold once all is quiet."""
        for actor in self.world.actors:
            if actor.error is not None and not isinstance(actor.error, AssertionError):
                raise RuntimeError(f"{actor.name} broke") from actor.error
            if actor.error is not None:
                raise actor.error
        main = self.oracles[MAIN]
        main.catch_up()
        lost = set(self.acknowledged) - main.ever
        assert not lost, f"acknowledged, but not in the log: {lost}"
        if min(self.grace_seconds) > 3600 * 24:
            self._assert_readers_were_spared()
        for name in (MAIN, REPLICA):
            self.oracles[name].assert_all_is_well(self.world.store(name))
            self.world.clock.sleep(3600)
            self.oracles[name].assert_prune_leaves_what_is_needed(self.world.store(name))

    def _assert_readers_were_spared(self) -> None:
        left = self.oracles[MAIN].repository.state.snapshots
        troubled = [(each, why) for each, why in self.failed_reads if each in left or not each]
        assert not troubled, f"a reader that was quick enough was not served: {troubled[:3]}"


def store_snapshot(repository: Repository, name: str, tags: dict[str, str]) -> Snapshot:
    """What `backup.create` does, with content that is told by the tags, and nothing that depends on a disk."""
    parent = next((each for each in reversed(repository.snapshots()) if each.name == name), None)
    old: dict[str, Entry] = {}
    if parent is not None:
        try:
            old = {entry.path: entry for entry in repository.entries(parent)}
        except Corrupt:
            pass
    writer = repository.writer()
    try:
        for path in sorted((key for key in tags if key.startswith("file")), key=lambda key: path_order(key.encode())):
            content = blob(int(tags[path]))
            before = old.get(path)
            if before and parent and parent.tags.get(path) == tags[path] and writer.has(before.chunks):
                writer.add_entry(before)
                continue
            pieces = [content[at : at + PIECE_BYTES] for at in range(0, len(content), PIECE_BYTES)]
            chunks = [writer.add(writer.prepare(piece)) for piece in pieces]
            writer.add_entry(Entry(path, "file", 0o644, 0, 0, 0, size=len(content), chunks=chunks))
        return writer.commit(
            Snapshot(
                "", "backup", name, time_text(repository.clock.now_ns()), tags=tags, parent=parent.id if parent else ""
            )
        )
    except BaseException:
        writer.abandon()
        raise


def assert_right(repository: Repository, snapshot: Snapshot) -> None:
    """Every file of the snapshot, byte for byte; raises what reading raises."""
    expected = {path: blob(int(number)) for path, number in snapshot.tags.items() if path.startswith("file")}
    found = {
        entry.path: b"".join(bytes(repository.get_chunk(bytes.fromhex(chunk))) for chunk, _ in entry.chunks)
        for entry in repository.entries(snapshot)
    }
    assert found == expected, f"snapshot {snapshot.id[:8]} has other bytes than were stored"


class Oracle:
    """Looks at a repository after every change, past all faults, and knows what must not be lost."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self.repository = self._open()
        self.ever: set[str] = set()
        self.works: set[str] = set()
        self.write_ids: set[str] = set()
        self.needed: dict[str, set[bytes]] = {}
        self.met: Counter[str] = Counter()
        self._condemned: set[str] = set()
        self._holds: dict[str, set[bytes]] = {}

    def _open(self) -> Repository:
        return Repository.open(self.store, secret=lambda: PASSPHRASES[0], clock=ManualClock(seed=1))

    def look(self, method: str, name: str) -> None:
        if name.startswith("log/"):
            self.catch_up()
        elif method == "delete" and name.startswith("packs/"):
            self._assert_nothing_needed_is_missing()

    def catch_up(self) -> None:
        """Fold the new entries, one at a time: what holds must hold after each of them."""
        for entry in self.repository.log.refresh():
            assert entry.write_id not in self.write_ids, f"entry {entry.seq} was committed twice"
            self.write_ids.add(entry.write_id)
            self._count(entry)
            if entry.kind == FORGET:
                for snapshot in entry.body["snapshots"]:
                    self.needed.pop(snapshot, None)
            if entry.kind == SNAPSHOT:
                self._take(self.repository.state.snapshots[entry.body["snapshot"]["id"]])
        self._assert_nothing_needed_is_given_up()

    def _count(self, entry: LogEntry) -> None:
        self.met[entry.kind] += 1
        listed = [each if isinstance(each, str) else each["name"] for each in entry.body.get("packs", [])]
        if entry.kind == CONDEMN:
            self._condemned.update(listed)
        elif entry.kind in (SNAPSHOT, PACKS):
            self.met["rescued"] += len(self._condemned.intersection(listed))
            self._condemned.difference_update(listed)

    def _take(self, snapshot: Snapshot) -> None:
        assert snapshot.id not in self.ever or snapshot.id not in self.needed, f"{snapshot.id[:8]} is there twice"
        work = snapshot.tags["work"]
        assert work not in self.works or snapshot.id in self.ever, f"work {work} was committed twice"
        self.ever.add(snapshot.id)
        self.works.add(work)
        self.repository.refresh()
        assert_right(self.repository, snapshot)
        needed = {bytes.fromhex(chunk) for chunk, _ in snapshot.manifest}
        for line in self.repository.entries(snapshot):
            needed.update(bytes.fromhex(chunk) for chunk, _ in line.chunks)
        self.needed[snapshot.id] = needed

    def _chunks_in(self, packs: Iterator[str] | list[str]) -> set[bytes]:
        found: set[bytes] = set()
        for name in packs:
            if name not in self._holds:
                ref = self.repository.state.packs[name]
                self._holds[name] = set(self.repository.read_footer(ref).records["id"].tolist())
            found |= self._holds[name]
        return found

    def _assert_nothing_needed_is_given_up(self) -> None:
        held = self._chunks_in(list(self.repository.state.packs))
        for snapshot, needed in self.needed.items():
            assert needed <= held, f"snapshot {snapshot[:8]} needs chunks that are in no live pack"

    def _assert_nothing_needed_is_missing(self) -> None:
        there = {info.name.rpartition("/")[2] for info in self.store.list("packs/")}
        held = self._chunks_in([name for name in self.repository.state.packs if name in there])
        for snapshot, needed in self.needed.items():
            assert needed <= held, f"a pack was deleted that snapshot {snapshot[:8]} needs"

    def assert_all_is_well(self, store: ObjectStore) -> None:
        self.catch_up()
        report = open_and_check(store, secret=lambda: PASSPHRASES[0], data="all", clock=ManualClock(seed=2))
        assert report.ok, report.damaged
        fresh = self._open()
        found = walk(store, Log(store, fresh.keys, fresh.log.anchor, fresh.clock, fresh.sink))
        assert found.damage == []
        assert canonical(found.state) == canonical(fresh.state)
        assert set(fresh.state.snapshots) == set(self.needed)
        for snapshot in fresh.snapshots():
            assert_right(fresh, snapshot)

    def assert_prune_leaves_what_is_needed(self, store: ObjectStore) -> None:
        prune(self._open(), ALL_GOES)
        self.assert_all_is_well(store)
        state = self._open().state
        assert not state.condemned, "condemned packs are left over"
        there = sorted(info.name.rpartition("/")[2] for info in store.list("packs/"))
        assert there == sorted(state.packs), "packs that nothing needs are left over, or others are missing"
        needed = set[bytes]().union(*self.needed.values())
        assert self._chunks_in(list(state.packs)) == needed, "chunks that nothing needs are left over"


def run_town(seed: int, *, crowded: bool = False) -> Town:
    """Live through one seed; any failure names it and shows the end of what happened."""
    with small_world():
        town = Town(seed, crowded)
        town.populate()
        try:
            town.world.run(steps_max=60_000)
            town.judge()
        except BaseException as exc:
            tail = "\n".join(map(str, town.world.trace[-60:]))
            exc.add_note(f"{tail}\nseed {seed}, crowded {crowded}: repeat it with OUTLAST_SIM_SEED={seed}")
            raise
    return town
