"""Processes that work at one repository at once, each with a role, and the judge of what they leave.

As a program it is one of them: `python tests/workers.py` with a `Task` as JSON on standard input. It tells
what it has done as JSON lines. A snapshot's tags say what is in it, so every one can be compared byte for byte.
"""

from __future__ import annotations

import faulthandler
import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from outlast.clock import SYSTEM_CLOCK, ManualClock
from outlast.errors import OutlastError, StoreFull
from outlast.events import NULL_SINK
from outlast.records import Chunking, Snapshot
from outlast.repo import forget, keyring, seal
from outlast.repo.chain import walk
from outlast.repo.check import open_and_check
from outlast.repo.content import Content, RecentChunks
from outlast.repo.log import Log
from outlast.repo.prune import prune
from outlast.repo.prune_plan import Policy
from outlast.repo.repository import Repository
from outlast.store.base import ObjectStore
from outlast.store.layers import QuotaStore, RetryStore, open_store
from outlast.testing.faults import FaultyStore, delay, error, lost_reply, refusal
from outlast.testing.sim import Dice

PASSPHRASE = b"correct horse"
BLOBS = 30
FILES = 6
METHODS = ["put_if_absent", "put_if_absent", "put", "get", "get_ranges", "stat", "list", "delete"]


class Task(msgspec.Struct):
    """What a process is to do. `faults`: how many calls of its store go wrong, early or late."""

    role: str
    url: str
    name: str
    seed: int
    folder: str
    """its own, to make files in"""
    seconds: float
    other_url: str = ""
    faults: int = 0
    quota_bytes: int = 0
    grace_seconds: float = 0.0


@cache
def blob(number: int) -> bytes:
    noise = ManualClock(seed=number)
    return noise.random_bytes(900 * (number % 10 + 1) ** 2)


def cheap_keys() -> None:
    seal.ARGON2_MEMORY_KIB, seal.ARGON2_ITERATIONS, seal.ARGON2_LANES = 8, 1, 1


def make_repository(url: str, *, is_encrypted: bool) -> None:
    cheap_keys()
    Repository.create(
        open_store(url),
        secret=(lambda: PASSPHRASE) if is_encrypted else None,
        chunking=Chunking(block_bytes=16384, min_bytes=1024, avg_bytes=8192, max_bytes=32768),
        pack_bytes=100_000,
    )


# -- one process ---------------------------------------------------------------------------------------


class Worker:
    def __init__(self, task: Task) -> None:
        self.task = task
        self.dice = Dice(task.seed)
        self.round = 0
        self.store = self._store(task.url)

    def _store(self, url: str) -> ObjectStore:
        store = open_store(url)
        if self.task.quota_bytes:
            store = QuotaStore(store, self.task.quota_bytes)
        if self.task.faults:
            faulty = FaultyStore(store, SYSTEM_CLOCK)
            for _ in range(self.task.faults):
                effect = self.dice.pick([error(), lost_reply(), lost_reply(), refusal(409), refusal(503), delay(0.2)])
                method: Any = self.dice.pick(METHODS)
                prefix = self.dice.pick(["", "log/", "packs/"])
                if effect.__qualname__.startswith("refusal") and method != "put_if_absent":
                    effect = error()
                faulty.script(effect, method, prefix, skip=self.dice.below(40 * self.task.faults))
            store = RetryStore(faulty, attempts=3, base_seconds=0.01)
        return store

    def run(self) -> None:
        turn: Callable[[], None] = getattr(self, self.task.role)
        end = SYSTEM_CLOCK.monotonic_seconds() + self.task.seconds
        self.say("ready")
        while SYSTEM_CLOCK.monotonic_seconds() < end:
            self.round += 1
            try:
                turn()
            except OutlastError as exc:
                self.say("refused", kind=exc.kind, why=str(exc)[:300])
                if isinstance(exc, StoreFull):
                    self.task.quota_bytes *= 2
                    self.store = self._store(self.task.url)  # somebody made room
            SYSTEM_CLOCK.sleep(0.05 * self.dice.share())
        self.say("ended")

    def say(self, did: str, **facts: object) -> None:
        print(json.dumps({"did": did, "round": self.round, **facts}), flush=True)

    def open(self, url: str = "") -> Repository:
        return Repository.open(self._store(url) if url else self.store, secret=lambda: PASSPHRASE)

    # -- roles ---------------------------------------------------------------------------------------

    def write(self) -> None:
        from outlast.backup.create import create

        folder = Path(self.task.folder)
        folder.mkdir(exist_ok=True)
        # Which work it is: no two commits may ever tell of the same one.
        tags = {"work": f"{self.task.name} {self.task.seed} {self.round}"}
        for number in range(FILES):
            path, noted = folder / f"file{number}", folder.parent / f"{folder.name}.file{number}"
            if self.dice.chance(0.5) or not noted.exists():
                chosen = folder.parent / f"{noted.name}.new"
                chosen.write_text(str(self.dice.below(BLOBS)))
                chosen.replace(noted)
            tags[path.name] = noted.read_text()
            content = blob(int(tags[path.name]))
            if not path.exists() or path.read_bytes() != content:  # new, or killed before it was written
                path.write_bytes(content)
        report = create(self.open(), [str(folder)], name=self.task.name, tags=tags)
        self.say("snapshot", id=report.snapshot, work=tags["work"])

    def forget(self) -> None:
        repository = self.open()
        gone = [each.id for each in repository.snapshots() if self.dice.chance(0.4)]
        if gone:
            done = forget.execute(repository, forget.plan(repository, ids=gone), allow_empty=True)
            self.say("forgot", count=len(done.forgotten))
        SYSTEM_CLOCK.sleep(self.dice.share())

    def prune(self) -> None:
        policy = Policy(self.dice.pick([0.0, 0.1, 0.5]), 1.0, self.task.grace_seconds)
        report = prune(self.open(), policy)
        self.say("pruned", swept=report.swept, condemned=report.condemned)

    def check(self) -> None:
        report = open_and_check(self.store, secret=lambda: PASSPHRASE, data="all")
        self.say("checked", problems=[f"{each.object}: {each.problem}" for each in report.damaged][:5])

    def restore(self) -> None:
        from outlast.backup import restore

        repository = self.open()
        if not repository.snapshots():
            return
        snapshot = self.dice.pick(repository.snapshots())
        target = Path(self.task.folder)
        shutil.rmtree(target, ignore_errors=True)
        plan = restore.plan(repository, snapshot, str(target))
        report = restore.execute(repository, plan)
        for path, content in expected(snapshot).items():
            # What could not be had is told in the report, and that is the only way in which it may be missing.
            if report.verified and (target / path).read_bytes() != content:
                raise AssertionError(f"{path} of snapshot {snapshot.id} has other bytes than were stored")
        self.say("restored", bytes=sum(map(len, expected(snapshot).values())))

    def copy(self) -> None:
        from outlast.repo.copy import copy

        report = copy(self.open(), self.open(self.task.other_url))
        self.say("copied", count=len(report.copied))

    def rotate(self) -> None:
        keyring.rotate(self.open())
        self.say("rotated")
        SYSTEM_CLOCK.sleep(1)


class Process:
    """A worker in a process of its own. Its output goes to files, so that it never waits for a reader."""

    def __init__(self, task: Task, log: Path) -> None:
        self.task = task
        self.killed = False
        self._output, self._errors = log.with_suffix(".out"), log.with_suffix(".err")
        with self._output.open("wb") as output, self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=output, stderr=errors
            )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(task))
        self._process.stdin.close()

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self.killed = True
        self._process.kill()
        self._process.wait()

    def end(self, deadline_seconds: float) -> list[dict[str, Any]]:
        """What it told, once it has ended. `AssertionError` when it is stuck or broke."""
        who = f"{self.task.role} {self.task.name} (seed {self.task.seed})"
        try:
            code = self._process.wait(deadline_seconds)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGUSR1)
            SYSTEM_CLOCK.sleep(1)
            self.kill()
            raise AssertionError(f"{who} is stuck:\n{self._errors.read_text()}\n{self._tail()}") from None
        errors = self._errors.read_text()
        assert self.killed or (code == 0 and not errors), f"{who} broke ({code}):\n{errors}\n{self._tail()}"
        return self.told()

    def told(self) -> list[dict[str, Any]]:
        """What it has told so far; the last line may be cut short."""
        lines = self._output.read_bytes().split(b"\n")
        return [json.loads(line) for line in lines[:-1]]

    def _tail(self) -> str:
        return self._output.read_text()[-2000:]


# -- the judge -----------------------------------------------------------------------------------------


def expected(snapshot: Snapshot) -> dict[str, bytes]:
    return {path: blob(int(number)) for path, number in snapshot.tags.items() if path.startswith("file")}


class Judge:
    """Looks at a repository through a sound store. `seen` counts what it has looked at."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.seen: Counter[str] = Counter()
        self._compared: set[str] = set()

    def assert_all_is_well(self, acknowledged: set[str]) -> None:
        """The chain is whole, no commit is lost or doubled, and every snapshot reads back byte for byte."""
        store = open_store(self.url)
        report = open_and_check(store, secret=lambda: PASSPHRASE, data="all")
        assert report.ok, report.damaged[:5]
        repository = Repository.open(store, secret=lambda: PASSPHRASE)
        found = walk(store, Log(store, repository.keys, repository.log.anchor, repository.clock, NULL_SINK))
        assert found.damage == []
        assert found.state.snapshots == repository.state.snapshots
        committed = self._assert_each_commit_is_there_once(repository)
        lost = acknowledged - committed
        assert not lost, f"{len(lost)} snapshots were acknowledged and are not in the log: {sorted(lost)[:5]}"
        for snapshot in repository.snapshots():
            self._compare(repository, snapshot)

    def _assert_each_commit_is_there_once(self, repository: Repository) -> set[str]:
        log = repository.log
        seqs = list(range(1, log.state.seq + 1))
        entries = [log.parse(data or b"", seq) for seq, data in zip(seqs, log.read_many(seqs), strict=True)]
        twice = [each for each, count in Counter(entry.write_id for entry in entries).items() if count > 1]
        assert not twice, f"committed twice: {twice}"
        snapshots = [entry.body["snapshot"] for entry in entries if entry.kind == "snapshot"]
        works = Counter(each["tags"]["work"] for each in snapshots)
        doubled = [work for work, count in works.items() if count > 1]
        assert not doubled, f"there are several snapshots of one work: {doubled}"
        self.seen["entries"] += len(entries)
        return {each["id"] for each in snapshots}

    def _compare(self, repository: Repository, snapshot: Snapshot) -> None:
        files = {entry.path: entry for entry in repository.entries(snapshot) if entry.type == "file"}
        wanted = expected(snapshot)
        assert files.keys() == wanted.keys(), f"snapshot {snapshot.id} has other files than were stored"
        for path, content in wanted.items():
            found = Content(files[path], RecentChunks(repository).get).read(0, len(content) + 1)
            assert found == content, f"{path} of snapshot {snapshot.id} has other bytes than were stored"
            self.seen["bytes compared"] += len(content)
        self.seen["snapshots compared"] += 1

    def assert_prune_leaves_it_well(self, acknowledged: set[str]) -> None:
        prune(Repository.open(open_store(self.url), secret=lambda: PASSPHRASE), Policy(0.0, 1.0, 0.0))
        self.assert_all_is_well(acknowledged)


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1)
    cheap_keys()
    Worker(msgspec.json.decode(sys.stdin.buffer.read(), type=Task)).run()
