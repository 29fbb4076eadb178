"""Whatever a user does in whatever order, a repository holds what a plain dictionary would hold.

Hypothesis makes up the order and, when it finds one that fails, the shortest. `OUTLAST_MACHINE_EXAMPLES`
sets how many orders are tried (60).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from simulated import blob, small_world

from outlast.backup import restore
from outlast.backup.create import create
from outlast.clock import ManualClock
from outlast.errors import Busy
from outlast.records import Chunking, ChunkRef, Entry, Snapshot
from outlast.repo import forget, keyring
from outlast.repo.check import open_and_check
from outlast.repo.content import Content, RecentChunks
from outlast.repo.copy import copy
from outlast.repo.prune import prune
from outlast.repo.prune_plan import Policy
from outlast.repo.repository import Repository
from outlast.repo.write import Writer
from outlast.store.local import LocalStore
from outlast.store.memory import MemoryStore
from outlast.testing.faults import holding

GOLDEN = Path(__file__).parent.parent / "formats" / "v1"
GOLDEN_PASSPHRASE = b"correct horse battery staple"
SECOND_PASSPHRASE = b"another one"
NOW_NS = 4_000_000_000_000_000_000
"""so late that files made now are old, and a backup takes unchanged ones from its parent"""

Files = dict[str, bytes]
paths = st.sampled_from(["a", "b", "c/d", "c/e"])


def read(repository: Repository, snapshot: Snapshot) -> Files:
    """The content of every file, by its path."""
    return {
        entry.path: Content(entry, RecentChunks(repository).get).read(0, entry.size)
        for entry in repository.entries(snapshot)
        if entry.type == "file"
    }


@cache
def golden(kind: str) -> tuple[dict[str, bytes], dict[str, Files]]:
    """(its objects, what is in its snapshots); that the latter is right is for tests/formats."""
    store = LocalStore(str(GOLDEN / kind))
    repository = Repository.open(store, secret=lambda: GOLDEN_PASSPHRASE)
    objects = {info.name: store.get(info.name) for info in store.list("")}
    return objects, {snapshot.id: read(repository, snapshot) for snapshot in repository.snapshots()}


class Session:
    """A backup that has stored everything and not committed yet."""

    def __init__(self, repository: Repository, numbers: list[int]) -> None:
        self.tags = {f"file{at}": str(number) for at, number in enumerate(numbers)}
        self.repository = repository
        self.writer: Writer = repository.writer()
        for number in numbers:
            self.writer.add(self.writer.prepare(blob(number)[:500]))
        self.writer._close_pack()


def _entry(path: str, chunk: ChunkRef) -> Entry:
    return Entry(path, "file", 0o644, 0, 0, 0, size=chunk[1], chunks=[chunk])


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.stack.enter_context(small_world())
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory())) / "folder"
        self.folder.mkdir()
        self.clock = ManualClock(seed=77, now_ns=NOW_NS)
        self.files: Files = {}
        self.model: dict[str, Files] = {}
        self.kept_in_copy: dict[str, Files] = {}
        self.sessions: list[Session] = []

    @initialize(kind=st.sampled_from(["plain", "encrypted", "golden plain", "golden encrypted"]))
    def make(self, kind: str) -> None:
        self.secret = GOLDEN_PASSPHRASE
        self.is_encrypted = "encrypted" in kind
        if "golden" in kind:
            objects, snapshots = golden(kind.removeprefix("golden "))
            self.store = holding(objects, self.clock)
            self.model.update(snapshots)
        else:
            self.store = MemoryStore(clock=self.clock)
            self._init(self.store, self.is_encrypted)
        self.long_open = self._open()
        if kind == "golden encrypted":
            keyring.rotate(self.long_open)  # its first key is a costly one to open
        self.other_store = MemoryStore(clock=self.clock)
        self._init(self.other_store, False)
        self.write("a", 3)

    def _init(self, store: MemoryStore, is_encrypted: bool) -> None:
        Repository.create(
            store,
            secret=(lambda: self.secret) if is_encrypted else None,
            chunking=Chunking(block_bytes=1024, min_bytes=256, avg_bytes=512, max_bytes=1024),
            pack_bytes=4096,
            clock=self.clock,
        )

    def _open(self) -> Repository:
        return Repository.open(self.store, secret=lambda: self.secret, clock=self.clock)

    def _any(self, fresh: bool) -> Repository:
        """A repository that was just opened, or the one that has been open for long and is brought up to date."""
        if fresh:
            return self._open()
        self.long_open.refresh()
        return self.long_open

    # -- the folder ----------------------------------------------------------------------------------

    @rule(path=paths, number=st.integers(0, 13))
    def write(self, path: str, number: int) -> None:
        file = self.folder / path
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(blob(number))
        self.files[path] = blob(number)

    @rule(path=paths)
    def remove(self, path: str) -> None:
        if self.files.pop(path, None) is not None:
            (self.folder / path).unlink()

    # -- the repository ------------------------------------------------------------------------------

    @rule(name=st.sampled_from(["one", "two"]), fresh=st.booleans(), full=st.booleans())
    def back_up(self, name: str, fresh: bool, full: bool) -> None:
        self.clock.sleep(1)
        report = create(self._any(fresh), [str(self.folder)], name=name, full=full)
        assert report.snapshot not in self.model
        self.model[report.snapshot] = dict(self.files)

    @rule(fresh=st.booleans(), which=st.sets(st.integers(0, 20), min_size=1))
    def forget(self, fresh: bool, which: set[int]) -> None:
        gone = [each for at, each in enumerate(self.model) if at in which]
        if gone:
            repository = self._any(fresh)
            forget.execute(repository, forget.plan(repository, ids=gone), allow_empty=True)
            for each in gone:
                del self.model[each]

    @rule(fresh=st.booleans(), grace_seconds=st.sampled_from([0.0, 0.0, 100.0]), unused=st.sampled_from([0.0, 0.5]))
    def prune(self, fresh: bool, grace_seconds: float, unused: float) -> None:
        prune(self._any(fresh), Policy(unused, 1.0, grace_seconds))

    @rule(seconds=st.sampled_from([10, 200]))
    def wait(self, seconds: float) -> None:
        self.clock.sleep(seconds)

    @rule()
    def reopen(self) -> None:
        self.long_open = self._open()

    @rule()
    def check(self) -> None:
        report = open_and_check(self.store, secret=lambda: self.secret, data="all", clock=self.clock)
        assert report.ok, report.damaged
        assert report.snapshots == len(self.model)

    @rule(fresh=st.booleans(), which=st.integers(0, 100))
    def restore(self, fresh: bool, which: int) -> None:
        if not self.model:
            return
        wanted = list(self.model)[which % len(self.model)]
        repository = self._any(fresh)
        target = self.folder.parent / "restored"
        plan = restore.plan(repository, repository.find_snapshot(wanted), str(target))
        assert restore.execute(repository, plan).verified
        for path, content in self.model[wanted].items():
            if "%" not in path:
                assert (target / path).read_bytes() == content, path
        shutil.rmtree(target)

    # -- a backup that takes its time ----------------------------------------------------------------

    @precondition(lambda self: len(self.sessions) < 2)
    @rule(numbers=st.lists(st.integers(0, 13), min_size=1, max_size=4))
    def begin(self, numbers: list[int]) -> None:
        self.sessions.append(Session(self._open(), numbers))

    @precondition(lambda self: self.sessions)
    @rule()
    def commit(self) -> None:
        session = self.sessions.pop(0)
        for path, number in session.tags.items():
            content = blob(int(number))[:500]
            session.writer.add_entry(_entry(path, session.writer.add(session.writer.prepare(content))))
        try:
            done = session.writer.commit(Snapshot("", "backup", "slow", "2090-01-01T00:00:00.000000Z"))
        except Busy:
            session.writer.abandon()  # a prune took what it relied on: told, and nothing is committed
            return
        self.model[done.id] = {path: blob(int(number))[:500] for path, number in session.tags.items()}

    # -- copies and keys -----------------------------------------------------------------------------

    @rule(fresh=st.booleans())
    def copy_away(self, fresh: bool) -> None:
        target = Repository.open(self.other_store, clock=self.clock)
        report = copy(self._any(fresh), target)
        assert not report.failed
        assert set(report.copied) == self.model.keys() - self.kept_in_copy.keys()
        self.kept_in_copy.update(self.model)

    @rule(fresh=st.booleans())
    def copy_back(self, fresh: bool) -> None:
        report = copy(Repository.open(self.other_store, clock=self.clock), self._any(fresh))
        assert set(report.copied) == self.kept_in_copy.keys() - self.model.keys()
        self.model.update(self.kept_in_copy)

    @precondition(lambda self: self.is_encrypted)
    @rule(fresh=st.booleans())
    def rotate_key(self, fresh: bool) -> None:
        keyring.rotate(self._any(fresh))

    @precondition(lambda self: self.is_encrypted)
    @rule(fresh=st.booleans())
    def add_or_remove_key(self, fresh: bool) -> None:
        repository = self._any(fresh)
        second = [slot for slot in keyring.slots(repository) if slot.label == "second"]
        if second:
            keyring.remove(repository, second[0].id)
            return
        keyring.add(repository, SECOND_PASSPHRASE, "second")
        again = Repository.open(self.store, secret=lambda: SECOND_PASSPHRASE, clock=self.clock)
        assert again.state.snapshots.keys() == self.model.keys()

    # -- what must hold ------------------------------------------------------------------------------

    @invariant()
    def the_same_snapshots_are_there(self) -> None:
        if hasattr(self, "store"):
            assert self._open().state.snapshots.keys() == self.model.keys()

    def teardown(self) -> None:
        try:
            if hasattr(self, "store"):
                self._assert_all_reads_back(self.store, self.model)
                self._assert_all_reads_back(self.other_store, self.kept_in_copy)
                prune(self._open(), Policy(0.0, 1.0, 0.0))
                self._assert_all_reads_back(self.store, self.model)
                assert not self._open().state.condemned
        finally:
            self.stack.close()

    def _assert_all_reads_back(self, store: MemoryStore, model: dict[str, Files]) -> None:
        report = open_and_check(store, secret=lambda: self.secret, data="all", clock=self.clock)
        assert report.ok, report.damaged
        repository = Repository.open(store, secret=lambda: self.secret, clock=self.clock)
        assert {each.id: read(repository, each) for each in repository.snapshots()} == model


Machine.TestCase.settings = settings(
    max_examples=int(os.environ.get("OUTLAST_MACHINE_EXAMPLES", "60")),
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
TestMachine = pytest.mark.slow(Machine.TestCase)
