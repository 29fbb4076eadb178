"""Record a command on a small repository, cut it off everywhere, and see that nothing is lost.

`record` runs one `Command` on a local store and notes every system call and every change of an
object, and what was acknowledged when. `states` gives each different thing that may be left of it,
and `examine` opens one, checks every byte, reads every snapshot, goes on working and looks again.
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
import sys
import tempfile
import time  # noqa: TID251
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from outlast.backup.create import BackupReport, create
from outlast.clock import Clock, ManualClock
from outlast.errors import Corrupt, NoRepository, NotFound, OutlastError, WrongKey
from outlast.records import Chunking, LogEntry, Snapshot
from outlast.repo import log, read, scrub, seal, write
from outlast.repo.check import open_and_check
from outlast.repo.content import Content, RecentChunks
from outlast.repo.repository import Repository
from outlast.store.base import ObjectStore
from outlast.store.disk import Disk
from outlast.store.local import TEMPORARY, LocalStore
from outlast.store.memory import MemoryStore
from outlast.testing.faults import Recorder, Trace, holding
from outlast.testing.powercut import RecordingDisk, Step, Tree, cuts, materialise, read_tree

ROOT = "made/too/repository"
"""below a folder that is there; that the store makes what is missing on the way is part of the test"""
PASSPHRASE = b"correct horse"
# Files made by the tests must look old to a backup, or it would read them all again.
NOW_NS = 4_000_000_000_000_000_000
STATES_MAX = 5000
SAMPLES = 20
CHANGES_OF_NAMES = {"mkdir", "open_temp", "link", "rename_noreplace", "replace", "unlink"}
SEED = 20250101

POOLED = (
    *("backup.origin", "backup.read", "backup.restore", "backup.restore_plan"),
    *(f"repo.{name}" for name in ("copy", "log", "prune", "read", "repair", "repository", "scrub", "write")),
)

_seeds = itertools.count(1000)


class Done(Future[Any]):
    """A future that came true at once."""

    numbers = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.number = next(self.numbers)


def all_done(pending: Collection[Done], return_when: str = "") -> tuple[list[Done], set[Done]]:
    """What `concurrent.futures.wait` gives, in the order in which the work was handed over."""
    return sorted(pending, key=lambda each: each.number), set()


class Inline:
    """An executor that does the work at once, so that a command makes the same calls in the same order each time."""

    def __init__(self, *arguments: object, **options: object) -> None:
        pass

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future = Done()
        try:
            future.set_result(call(*arguments))
        except BaseException as exc:
            future.set_exception(exc)
        return future

    def map(self, call: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
        return iter([call(*each) for each in zip(*arguments, strict=False)])

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        pass

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *error: object) -> None:
        pass


@contextmanager
def small_world() -> Iterator[None]:
    """Everything so small that little data has many packs, commits on the way, index segments and states."""
    with ExitStack() as stack:
        for module_name in POOLED:
            stack.enter_context(patch(f"outlast.{module_name}.ThreadPoolExecutor", Inline))
        for module, name, small in [
            (read, "wait", all_done),
            (scrub, "wait", all_done),
            (write, "SEGMENT_PACKS", 3),
            (write, "COMMIT_PACKS_BYTES", 7 << 10),
            (log, "STATE_EVERY", 2),
            (seal, "ARGON2_MEMORY_KIB", 64),
            (seal, "ARGON2_ITERATIONS", 1),
            (seal, "ARGON2_LANES", 1),
        ]:
            stack.enter_context(patch.object(module, name, small))
        yield


def contents(round: int) -> dict[str, bytes]:
    """What is in the folder in some round: some files change in every one, some in every third."""
    made = {}
    for number in range(5):
        since = round if number < 3 else round - round % 3
        noise = ManualClock(seed=100 * number + since)
        made[f"part{number}"] = noise.random_bytes(1500 + 900 * number)
    made["log"] = b"a line\n" * 300 * (round + 1)
    return made


class Desk:
    """What a command works at: a store, a clock of its own, and folders to back up."""

    def __init__(self, store: ObjectStore, folder: Path, secret: bytes | None, seed: int) -> None:
        """`seed`: each process draws its own numbers. The same seed makes the same objects, which spares states."""
        self.store = store
        self.clock = ManualClock(seed=seed, now_ns=NOW_NS)
        self.secret = secret
        self._folder = folder
        self.acknowledge: Callable[[str], None] = lambda what: None
        """Say that from here on something is promised to the user, by a name of `Command.promises`."""

    def init(self, **options: Any) -> Repository:
        chunking = Chunking(block_bytes=1024, min_bytes=256, avg_bytes=512, max_bytes=1024)
        made = Repository.create(
            self.store,
            secret=(lambda: self.secret) if self.secret else None,  # type: ignore[arg-type,return-value]
            chunking=chunking,
            pack_bytes=4096,
            clock=self.clock,
            **options,
        )
        self.acknowledge("created")
        return made

    def open(self) -> Repository:
        secret = self.secret
        return Repository.open(self.store, secret=(lambda: secret) if secret else None, clock=self.clock)

    def source(self, round: int) -> Path:
        """The folder of this round."""
        folder = self._folder / str(round) / "data"
        if not folder.exists():
            folder.mkdir(parents=True)
            for file, content in contents(round).items():
                (folder / file).write_bytes(content)
        return folder

    def backup(self, round: int, name: str = "data") -> BackupReport:
        """Back the folder of this round up; what is in it is known again by the snapshot's tag `round`."""
        return create(self.open(), [str(self.source(round))], name=name, tags={"round": str(round)})

    def elsewhere(self) -> Repository:
        """Another repository, not encrypted, which has the rounds 0 and 1. Ask for it in `setup`, to have it made."""
        return _elsewhere(self._folder)


@functools.cache
def _elsewhere(folder: Path) -> Repository:
    desk = Desk(MemoryStore(), folder, None, seed=77)
    desk.init()
    for number in range(2):
        desk.backup(number)
    return desk.open()


def nothing(desk: Desk) -> None:
    pass


@dataclass(frozen=True)
class Command:
    """A row of the table: what is run, what was there before, and what must hold in every state.

    `again` goes on working in a state that is left (default: `action` once more), after which a backup is made too.
    `expect` asserts what holds in every state that opens. `promises`: by the name given to
    `desk.acknowledge`, what holds from then on. `secrets`: one of these passphrases must open every state.
    `damaged`: so is the repository from the beginning; no state may be worse, and where `mends` is true,
    `again` makes it whole.
    """

    name: str
    action: Callable[[Desk], object]
    setup: Callable[[Desk], object] = nothing
    again: Callable[[Desk], object] | None = None
    expect: Callable[[Repository], None] | None = None
    promises: dict[str, Callable[[Repository], None]] = field(default_factory=dict)
    secrets: tuple[bytes | None, ...] = (None,)
    damaged: bool = False
    mends: bool = True


class Promise(NamedTuple):
    """Something that was acknowledged, and after how many system calls and changes of objects."""

    steps: int
    mutations: int
    what: str


class Killed(BaseException):
    """The process is dead: nothing that it still tries has any effect."""


class MortalDisk(RecordingDisk):
    """A recording disk that can kill the process, or fail an fsync, and knows where in the code each call is."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.changes_left: int | None = None
        self.syncs_to_failure: int | None = None
        self.sites: dict[int, int] = {}
        """number of a step -> the line of code that made it"""

    def before(self, call: str, arguments: tuple[Any, ...]) -> None:
        if self.changes_left is not None:
            if self.changes_left == 0:
                if call == "close":
                    os.close(arguments[0])
                raise Killed
            self.changes_left -= call in CHANGES_OF_NAMES
        if self.syncs_to_failure is not None and call.startswith("fsync"):
            self.syncs_to_failure -= 1
            if self.syncs_to_failure == -1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))


def _mortal(call: str) -> Callable[..., Any]:
    perform = getattr(RecordingDisk, call)

    def method(self: MortalDisk, *arguments: Any) -> Any:
        with self._lock:
            self.before(call, arguments)
            number = len(self.trace)
            result = perform(self, *arguments)
            if len(self.trace) > number:
                self.sites[number] = sys._getframe(1).f_lineno
            return result

    return method


for _call in vars(Disk):
    if not _call.startswith("_"):
        setattr(MortalDisk, _call, _mortal(_call))


@dataclass(frozen=True)
class Recording:
    """What a command did. Traces may be replaced by others, to see what is made of them."""

    command: Command
    folder: Path
    initial: Tree
    steps: list[Step]
    sites: dict[int, int]
    trace: Trace
    promises: list[Promise]
    final: dict[str, bytes]
    """the objects at the end"""

    @functools.cached_property
    def readable(self) -> frozenset[tuple[str, str]]:
        """What of a damaged repository could be read before the command."""
        return readable(Desk(holding(self.trace.initial), self.folder, self.command.secrets[0], seed=1).open())


class State(NamedTuple):
    """What may be left: the objects, what had been promised, and how it comes about."""

    objects: dict[str, bytes]
    promised: frozenset[str]
    where: str


class Bench:
    """A directory with a repository as `Command.setup` makes it, at which commands are run and recorded."""

    def __init__(self, command: Command, folder: Path) -> None:
        self.command = command
        self.sources = folder / "sources"
        place = f"{tempfile.mkdtemp(dir=folder)}/disk"
        before = MemoryStore()
        command.setup(Desk(before, self.sources, command.secrets[0], seed=1))
        materialise(_as_tree({info.name: before.get(info.name) for info in before.list("")}), place)
        self.disk = MortalDisk(place)
        self.recorder: Recorder | None = None
        self._promises: list[Promise] = []
        self._runs = 1

    def run(self, action: Callable[[Desk], object]) -> None:
        """Run as a new process would: with a store object of its own."""
        self.recorder = Recorder(LocalStore(f"{self.disk.folder}/{ROOT}", disk=self.disk))
        self._runs += 1
        desk = Desk(self.recorder, self.sources, self.command.secrets[0], seed=self._runs)
        desk.acknowledge = self._acknowledge
        original = log.Log.append

        def append(this: log.Log, *arguments: Any, **options: Any) -> LogEntry:
            entry = original(this, *arguments, **options)
            if entry is not None:
                self._acknowledge(f"entry {entry.seq}")
            return entry

        with patch.object(log.Log, "append", append):
            action(desk)

    def _acknowledge(self, what: str) -> None:
        assert self.recorder is not None
        self._promises.append(Promise(len(self.disk.trace), len(self.recorder.trace.mutations), what))

    def recording(self) -> Recording:
        """What was done so far; of the changes of objects, what the last run did."""
        assert self.recorder is not None
        disk = self.disk
        final = as_objects(read_tree(disk.folder))
        return Recording(
            self.command, self.sources, disk.initial, disk.trace, disk.sites, self.recorder.trace, self._promises, final
        )


def record(command: Command, folder: Path) -> Recording:
    """Run a command undisturbed."""
    bench = Bench(command, folder)
    bench.run(command.action)
    return bench.recording()


def recordings_killed(command: Command, folder: Path) -> Iterator[Recording]:
    """Kill the command after each call that changes a name, and let another process begin it again.

    What the dead one wrote and never synced is what the second one finds, and must not believe to be durable.
    """
    for changes in itertools.count(1):
        bench = Bench(command, folder)
        bench.disk.changes_left = changes
        try:
            bench.run(command.action)
        except Killed:
            bench.disk.changes_left = None
            bench.run(command.again or command.action)
            yield bench.recording()
        else:
            return


def recordings_failing(command: Command, folder: Path) -> Iterator[Recording]:
    """Let each fsync fail, once, as a disk does that then forgets what it could not write."""
    for sync in itertools.count():
        bench = Bench(command, folder)
        bench.disk.syncs_to_failure = sync
        with suppress(OutlastError):
            bench.run(command.action)
        if bench.disk.syncs_to_failure >= 0:
            return
        yield bench.recording()


def _as_tree(objects: dict[str, bytes]) -> Tree:
    tree: Tree = {f"{ROOT}/{name}": content for name, content in objects.items()}
    for path in list(tree):
        parts = path.split("/")[:-1]
        for depth in range(len(parts)):
            tree["/".join(parts[: depth + 1])] = None
    return tree


def as_objects(tree: Tree) -> dict[str, bytes]:
    """The objects that a local store shows of such a directory."""
    start = ROOT + "/"
    hidden = f"{ROOT}/{TEMPORARY}/"
    return {
        path.removeprefix(start): content
        for path, content in tree.items()
        if content is not None and path.startswith(start) and not path.startswith(hidden)
    }


class Counts:
    """How many states there were; printed."""

    def __init__(self) -> None:
        self.cuts = self.outcomes = self.distinct = 0
        self.sampled = False

    def __str__(self) -> str:
        how = "a seeded sample" if self.sampled else "all"
        return f"{self.cuts} cuts, {self.outcomes} outcomes, {self.distinct} different states, {how} examined"


TOTAL = Counts()
"""of all tests of a run; printed at its end"""


def told(what: str, counts: Counts, started: float) -> None:
    """Print what was looked at, and count it."""
    TOTAL.cuts += counts.cuts
    TOTAL.outcomes += counts.outcomes
    TOTAL.distinct += counts.distinct
    print(f"\n{what}: {counts}; {time.monotonic() - started:.1f} s")


class States:
    """Everything that may be left of a recording, each different state once, over any number of recordings."""

    def __init__(self) -> None:
        self.counts = Counts()
        self._seen: set[tuple[frozenset[tuple[str, bytes]], frozenset[str]]] = set()

    def of(self, recording: Recording) -> Iterator[State]:
        """After each change of an object, and after each system call all that a power cut may leave."""
        yield from self.of_prefixes(recording)
        yield from self.of_cuts(recording)

    def of_prefixes(self, recording: Recording) -> Iterator[State]:
        trace = recording.trace
        for count in range(len(trace.mutations) + 1):
            self.counts.cuts += 1
            promised = frozenset(promise.what for promise in recording.promises if promise.mutations <= count)
            last = trace.mutations[count - 1] if count else None
            where = f"killed after {last.method} {last.name}" if last else "not begun"
            yield from self._fresh(State(trace.objects(count), promised, where))

    def of_cuts(self, recording: Recording) -> Iterator[State]:
        clock = ManualClock(seed=SEED)
        for steps, remains in cuts(recording.initial, recording.steps, skip=[f"{ROOT}/{TEMPORARY}"]):
            self.counts.cuts += 1
            promised = frozenset(promise.what for promise in recording.promises if promise.steps <= steps)
            where = f"power cut after {steps} calls, the last {recording.steps[steps - 1]}" if steps else "at first"
            if self.counts.distinct + remains.count() <= STATES_MAX:
                trees = remains.outcomes()
            else:
                self.counts.sampled = True
                trees = itertools.chain(remains.extremes(), (remains.sample(clock) for _ in range(SAMPLES)))
            for tree in trees:
                yield from self._fresh(State(as_objects(tree), promised, where))

    def _fresh(self, state: State) -> Iterator[State]:
        self.counts.outcomes += 1
        key = frozenset(state.objects.items()), state.promised
        if key not in self._seen:
            self._seen.add(key)
            self.counts.distinct += 1
            yield state


def folders(recording: Recording, count: int, clock: Clock) -> Iterator[tuple[State, Tree]]:
    """Whole directories that power cuts may leave, with what is in `tmp/`: a sample over all moments."""
    every = len(recording.steps) + 1
    wanted = {int.from_bytes(clock.random_bytes(4), "big") % every for _ in range(count)} | {every - 1}
    for steps, remains in cuts(recording.initial, recording.steps):
        if steps in wanted:
            tree = remains.sample(clock)
            promised = frozenset(promise.what for promise in recording.promises if promise.steps <= steps)
            yield State(as_objects(tree), promised, f"real folder, cut after {steps} calls"), tree


def examine(recording: Recording, state: State, store: ObjectStore | None = None) -> None:
    """Raise `AssertionError`, saying where, unless this state is sound and can be worked with."""
    store = store or holding(state.objects)
    try:
        _examine(recording, state, store)
    except (AssertionError, OutlastError) as exc:
        raise AssertionError(f"{recording.command.name}: {state.where}: {type(exc).__name__}: {exc}") from exc


def _examine(recording: Recording, state: State, store: ObjectStore) -> None:
    command = recording.command
    desk = Desk(store, recording.folder, None, seed=next(_seeds))
    for name, content in state.objects.items():
        if name.startswith("log/") and name in recording.final:
            assert content == recording.final[name], f"{name} is not what was written"
    repository = _open(desk, command)
    if repository is None:
        assert not state.promised, f"there is no repository, though {state.promised} was told"
    else:
        for what in state.promised:
            if what.startswith("entry "):
                assert repository.state.seq >= int(what[6:]), f"log {what} was acknowledged and is gone"
            elif what in command.promises:
                command.promises[what](repository)
        _assert_sound(desk, recording, repository, whole=not command.damaged)
    (command.again or command.action)(desk)
    desk.backup(7, name="afterwards")
    _assert_sound(desk, recording, desk.open(), whole=command.mends)


def _open(desk: Desk, command: Command) -> Repository | None:
    for secret in command.secrets:
        desk.secret = secret
        try:
            return desk.open()
        except WrongKey:
            if secret == command.secrets[-1]:
                raise
        except NoRepository:
            return None
    raise AssertionError("a command needs one secret, or None, at least")


def _assert_sound(desk: Desk, recording: Recording, repository: Repository, *, whole: bool) -> None:
    secret = desk.secret
    if whole:
        report = open_and_check(desk.store, secret=(lambda: secret) if secret else None, data="all", clock=desk.clock)
        assert report.ok, report.damaged
        assert_restores(repository)
    else:
        lost = recording.readable - readable(repository)
        assert not lost, f"could be read before, and can't any more: {sorted(lost)}"
    if recording.command.expect is not None:
        recording.command.expect(repository)


def assert_restores(repository: Repository) -> None:
    """Every snapshot of the repository has, bit for bit, what was backed up."""
    for snapshot in repository.snapshots():
        found = {name: content for name, content in _files(repository, snapshot) if content is not None}
        assert found == contents(int(snapshot.tags["round"])), f"snapshot {snapshot.id} has other content"


def readable(repository: Repository) -> frozenset[tuple[str, str]]:
    """Snapshot and name of each file that can be read; of none is any byte wrong."""
    found = set()
    for snapshot in repository.snapshots():
        made = contents(int(snapshot.tags["round"]))
        with suppress(Corrupt, NotFound):
            for name, content in _files(repository, snapshot):
                if content is not None:
                    assert content == made[name], f"{name} of snapshot {snapshot.id} is wrong"
                    found.add((snapshot.id, name))
    return frozenset(found)


def _files(repository: Repository, snapshot: Snapshot) -> Iterator[tuple[str, bytes | None]]:
    """The files of a snapshot; None for the content of those that can't be read."""
    for entry in repository.entries(snapshot):
        if entry.type == "file":
            content = None
            with suppress(Corrupt, NotFound):
                content = Content(entry, RecentChunks(repository).get).read(0, entry.size + 1)
            yield entry.path.rpartition("/")[2], content
