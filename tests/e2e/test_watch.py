"""Following a trainer's folder: what becomes a snapshot, when, and what is left alone."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from shell import Shell

from outlast.backup import watch as watching
from outlast.backup.wakeups import Wakeups
from outlast.backup.watch import INCOMPLETE, Look, Taken, Watch
from outlast.clock import SYSTEM_CLOCK, ManualClock
from outlast.errors import Corrupt, InvalidInput, Refused, Unavailable
from outlast.events import ListSink
from outlast.records import Snapshot
from outlast.repo import forget
from outlast.repo.content import Content, RecentChunks
from outlast.repo.repository import Repository
from outlast.repo.retention import Policy
from outlast.store.local import LocalStore

QUIET = 10.0


class RealDates(ManualClock):
    """The date is that of the file system; how long something took is up to the test."""

    def now_ns(self) -> int:
        return SYSTEM_CLOCK.now_ns()


class World:
    """A folder, a repository and a clock that moves only here."""

    def __init__(self, tmp_path: Path, clock: ManualClock | None = None) -> None:
        self.out = tmp_path / "out"
        self.out.mkdir()
        self.clock = clock or ManualClock(now_ns=SYSTEM_CLOCK.now_ns())
        self.sink = ListSink()
        self.store = LocalStore(str(tmp_path / "repo"))
        self.repository = Repository.create(self.store, clock=self.clock, sink=self.sink)
        self.watch = self.again()

    def again(self, **options: Any) -> Watch:
        """As after a restart."""
        self.repository = Repository.open(LocalStore(self.store.url), clock=self.clock, sink=self.sink)
        self.watch = Watch(self.repository, str(self.out), quiet_seconds=QUIET, **options)
        return self.watch

    def look(self, seconds: float = 0.0) -> Look:
        self.clock.sleep(seconds)
        return self.watch.look()

    def taken(self, seconds: float = QUIET) -> list[str]:
        """What is backed up when nothing changes for so long."""
        looks = [self.look(), self.look(seconds)]
        return [each.checkpoint for look in looks for each in look.taken]

    def checkpoint(self, name: str, seed: int = 0) -> Path:
        folder = self.out / name
        folder.mkdir(exist_ok=True)
        weights(folder / "model.safetensors", seed)
        (folder / "config.json").write_text("{}")
        return folder

    def snapshots(self, name: str = "out") -> list[Snapshot]:
        self.repository.refresh()
        return [each for each in self.repository.snapshots() if each.name == name]

    def kept(self) -> list[str]:
        return [each.tags["checkpoint"] for each in self.snapshots()]

    def told(self, kind: str) -> list[str]:
        return [event.reason for event in self.sink.events if event.kind == kind]


def weights(path: Path, seed: int = 0) -> None:
    save_file({"w": np.random.default_rng(seed).standard_normal(2000)}, path)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def fingerprint(folder: Path) -> str:
    """Of all that there is of a folder, but when it was last read."""
    told = hashlib.sha256()
    for path in [folder, *sorted(folder.rglob("*"))]:
        status = path.lstat()
        names = ("st_mode", "st_ino", "st_nlink", "st_uid", "st_gid", "st_size", "st_mtime_ns", "st_ctime_ns")
        told.update(repr([path, *(getattr(status, name) for name in names)]).encode())
        if path.is_file():
            told.update(path.read_bytes())
    return told.hexdigest()


# -- when it is taken ------------------------------------------------------------------------------


def test_a_checkpoint_is_taken_once_when_nothing_of_it_changed_for_the_quiet_period(world: World) -> None:
    folder = world.checkpoint("checkpoint-500")
    first = world.look()
    assert not first.taken and first.waiting[0].checkpoint == "checkpoint-500"
    assert first.next_seconds == QUIET, "this is when it is worth looking again"
    assert not world.look(QUIET - 1).taken
    weights(folder / "optimizer.safetensors")
    assert not world.look(2).taken, "it changed, so it begins anew"
    [taken] = world.look(QUIET).taken
    assert (taken.checkpoint, taken.name, taken.files, taken.flaw) == ("checkpoint-500", "out", 3, "")
    [snapshot] = world.snapshots()
    assert snapshot.tags == {"checkpoint": "checkpoint-500", "step": "500"}
    assert not world.look(QUIET).taken and world.look().unchanged == 1
    assert not world.again().look().taken
    assert world.taken() == [], "a restart asks the log alone"
    assert len(world.snapshots()) == 1


def test_what_is_there_already_is_taken_oldest_first(world: World) -> None:
    for step in (1000, 500, 90):
        world.checkpoint(f"checkpoint-{step}", step)
    assert world.taken() == ["checkpoint-1000", "checkpoint-500", "checkpoint-90"]


def test_one_that_is_written_again_is_taken_again(world: World) -> None:
    weights(world.out / "last.safetensors", 1)
    assert world.taken() == ["last.safetensors"]
    world.again()
    weights(world.out / "last.safetensors", 2)
    assert world.taken() == ["last.safetensors"]
    assert world.kept() == ["last.safetensors"] * 2


def test_once_takes_the_time_since_the_change_from_the_file_system(world: World) -> None:
    world.checkpoint("checkpoint-1")
    young = world.again(once=True).look()
    assert [each.reason for each in young.waiting] == ["it is still changing"] and not young.taken
    world.clock.sleep(QUIET + 1)
    os.utime(world.out / "checkpoint-1" / "config.json", ns=(0, world.clock.now_ns() + 10**15))
    assert [each.checkpoint for each in world.again(once=True).look().taken] == ["checkpoint-1"]
    world.clock.sleep(-QUIET)
    assert world.again(once=True).look().waiting == (), "the repository has it, however young it is"


def test_rotation_is_no_change(world: World) -> None:
    folder = world.checkpoint("checkpoint-1")
    weights(folder / "optimizer.safetensors", 4)
    assert world.taken() == ["checkpoint-1"]
    (folder / "model.safetensors").unlink()
    assert world.taken() == [], "half deleted, it must not stand in for the whole one"
    shutil.rmtree(folder)
    assert world.taken() == [] and world.look().waiting == ()
    assert not world.told("checkpoint.lost") and len(world.snapshots()) == 1


def test_what_goes_before_it_was_backed_up_is_told(world: World) -> None:
    folder = world.checkpoint("checkpoint-1")
    world.look()
    shutil.rmtree(folder)
    world.look()
    assert world.told("checkpoint.lost") == ["checkpoint-1 is gone, and was never backed up."]


# -- while it is read ------------------------------------------------------------------------------


def during_the_backup(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object], times: int = 1) -> None:
    left = [times]
    original = watching.create

    def create(*arguments: Any, **options: Any) -> Any:
        before = options["before_commit"]

        def acting() -> None:
            if left[0]:
                left[0] -= 1
                act()
            before()

        return original(*arguments, **{**options, "before_commit": acting})

    monkeypatch.setattr(watching, "create", create)


def test_one_that_is_deleted_while_it_is_read_leaves_no_half_snapshot(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = world.checkpoint("checkpoint-1")
    world.checkpoint("checkpoint-2")
    during_the_backup(monkeypatch, lambda: shutil.rmtree(folder))
    assert world.taken() == ["checkpoint-2"], "the next one is not held up"
    assert world.kept() == ["checkpoint-2"]
    [told] = world.told("checkpoint.skipped")
    assert told.startswith("checkpoint-1: it was deleted while it was backed up")
    assert not world.look(QUIET).waiting


def test_one_that_changes_while_it_is_read_is_of_one_instant_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = world.checkpoint("best", 1)
    during_the_backup(monkeypatch, lambda: weights(folder / "model.safetensors", 2))
    assert world.taken() == []
    assert world.taken() == ["best"]
    [snapshot] = world.snapshots()
    entry = next(each for each in world.repository.entries(snapshot) if each.path == "model.safetensors")
    content = Content(entry, RecentChunks(world.repository).get).read(0, entry.size)
    assert content == (folder / "model.safetensors").read_bytes()


def test_one_that_never_holds_still_is_kept_under_another_name(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = world.checkpoint("best", 1)
    during_the_backup(monkeypatch, lambda: weights(folder / "model.safetensors", world.clock.now_ns() % 997), times=99)
    for _ in range(4):
        assert world.taken() == []
    assert world.taken() == ["best"]
    assert not world.snapshots() and world.snapshots("out" + INCOMPLETE)


# -- what is not whole -----------------------------------------------------------------------------


def test_what_stays_damaged_is_told_once_and_kept_under_another_name(world: World) -> None:
    world.again(patience_seconds=900)
    weights(world.out / "epoch_1.safetensors")
    os.truncate(world.out / "epoch_1.safetensors", 9000)
    weights(world.out / "epoch_2.safetensors", 2)
    assert world.taken() == ["epoch_2.safetensors"]
    assert world.taken(800) == []
    assert len(world.told("checkpoint.waiting")) == 1
    [taken] = world.look(200).taken
    assert taken.name == "out" + INCOMPLETE and "cut short" in taken.flaw
    assert world.kept() == ["epoch_2.safetensors"], "the retention and `latest` of the whole ones never meet it"
    assert len(world.told("checkpoint.damaged")) == 1
    assert world.taken(2000) == []
    world.again(patience_seconds=900)
    assert world.taken(2000) == [], "also after a restart"
    weights(world.out / "epoch_1.safetensors", 7)
    assert world.taken() == ["epoch_1.safetensors"]
    assert world.kept() == ["epoch_2.safetensors", "epoch_1.safetensors"]


@pytest.fixture
def private(world: World) -> Iterator[Path]:
    """A folder of somebody who can't read everything, as root can."""
    world.checkpoint("any")
    world.taken()  # all modules are loaded
    with tempfile.TemporaryDirectory() as folder:
        user = os.geteuid() or 65534
        os.chown(folder, user, -1)
        before = os.geteuid()
        os.seteuid(user)
        yield Path(folder)
        os.seteuid(before)


def test_what_cannot_be_read_is_taken_as_soon_as_it_can_be(private: Path) -> None:
    world = World(private)
    folder = world.checkpoint("checkpoint-1")
    (folder / "config.json").chmod(0)
    [taken] = [*world.look().taken, *world.look(QUIET).taken]
    assert taken.unsound == 1
    world.again()
    assert world.taken() == []
    (folder / "config.json").chmod(0o600)
    assert world.taken() == ["checkpoint-1"]
    (world.out / "checkpoint-2").mkdir(0)
    assert world.taken() == []
    assert "can't be looked at: Permission denied" in world.told("checkpoint.waiting")[0]


# -- retention -------------------------------------------------------------------------------------


def test_the_retention_is_applied_after_each_and_what_it_dropped_stays_dropped(tmp_path: Path) -> None:
    world = World(tmp_path, RealDates())
    policy = Policy(last=2)
    other = world.out.parent / "elsewhere"
    other.mkdir()
    weights(other / "a.safetensors")
    Watch(world.repository, str(other), quiet_seconds=0).look()
    world.again(policy=policy)
    for step in range(1, 5):
        world.checkpoint(f"checkpoint-{step}", step)
        assert world.taken() == [f"checkpoint-{step}"]
    assert world.kept() == ["checkpoint-3", "checkpoint-4"]
    assert len(world.snapshots("elsewhere")) == 1, "only of this name"
    world.again(policy=policy)
    assert world.taken() == [], "the trainer still has what was dropped: it must not come back, and push out others"
    assert world.kept() == ["checkpoint-3", "checkpoint-4"]
    weights(world.out / "checkpoint-1" / "model.safetensors", 9)
    assert world.taken() == ["checkpoint-1"], "but one that has changed since is another one"


def test_what_somebody_forgot_by_hand_does_not_come_back(world: World) -> None:
    world.checkpoint("checkpoint-1")
    world.checkpoint("checkpoint-2")
    world.clock.sleep(60)
    world.taken()
    first = world.snapshots()[0].id
    forget.execute(world.repository, forget.plan(world.repository, ids=[first]))
    world.again()
    assert world.taken() == [] and world.kept() == ["checkpoint-2"]


def test_two_folders_of_one_name_do_not_take_turns(world: World, tmp_path: Path) -> None:
    twin = tmp_path / "second" / "out"
    twin.mkdir(parents=True)
    world.checkpoint("checkpoint-1", 1)
    weights(twin / "model.safetensors")
    shutil.copytree(world.out / "checkpoint-1", twin / "checkpoint-1")
    weights(twin / "checkpoint-1" / "model.safetensors", 5)

    def looks() -> int:
        pair = [Watch(world.repository, str(folder), quiet_seconds=0) for folder in (world.out, twin)]
        return sum(len(each.look().taken) for each in pair)

    world.clock.sleep(60)
    assert looks() == 3
    assert looks() == 0


# -- the repository and the folder -----------------------------------------------------------------


def test_a_store_out_of_reach_is_tried_again_ever_more_seldom(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise Unavailable("the bucket does not answer.")

    world.checkpoint("checkpoint-1")
    monkeypatch.setattr(world.repository, "refresh", refuse)
    world.look()
    waits = []
    seconds = QUIET
    for _ in range(12):
        seconds = world.look(seconds).next_seconds
        waits.append(seconds)
    assert waits[:5] == [1, 2, 4, 8, 16] and max(waits) <= 30
    assert len(world.told("watch.failed")) == 1
    monkeypatch.undo()
    assert world.look(300).taken
    with pytest.raises(Unavailable):
        monkeypatch.setattr(Repository, "refresh", lambda self: refuse())
        world.checkpoint("checkpoint-2")
        world.clock.sleep(60)
        world.again(once=True).look()


def test_damage_ends_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise Corrupt("log entry 1 was changed.")

    world.checkpoint("checkpoint-1")
    monkeypatch.setattr(world.repository, "refresh", refuse)
    world.look()
    with pytest.raises(Corrupt):
        world.look(QUIET)


def test_a_folder_that_comes_goes_and_comes_again_is_waited_for(world: World) -> None:
    world.out.rmdir()
    world.again()
    assert world.look().waiting == () and world.look().waiting == ()
    assert len(world.told("folder.missing")) == 1
    world.out.mkdir()
    world.checkpoint("checkpoint-1")
    assert world.taken() == ["checkpoint-1"]
    shutil.rmtree(world.out)
    world.look()
    assert len(world.told("folder.missing")) == 2
    with pytest.raises(InvalidInput):
        world.again(once=True).look()


def test_the_repository_may_not_hold_the_folder_and_is_no_checkpoint_in_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    repository = Repository.create(LocalStore(str(out / "step-1")))
    weights(out / "model.safetensors")
    taken: list[Taken] = []
    Watch(repository, str(out), quiet_seconds=0, tell=taken.append).look()
    assert [each.checkpoint for each in taken] == ["model.safetensors"]
    with pytest.raises(Refused):
        Watch(repository, str(out / "step-1" / "packs"))
    with pytest.raises(InvalidInput):
        Watch(repository, str(out / "model.safetensors"))


# -- the command -----------------------------------------------------------------------------------

TRAINER = textwrap.dedent(
    """
    import sys, time
    import torch

    torch.set_num_threads(1)
    folder, count = sys.argv[1], int(sys.argv[2])
    for number in range(count):
        whole = f"{folder}/../whole.pt"
        torch.save({"w": torch.randn(300_000, generator=torch.Generator().manual_seed(number))}, whole)
        data = open(whole, "rb").read()
        with open(f"{folder}/epoch_{number}.pt", "wb", buffering=0) as file:
            for at in range(0, len(data), 200_000):  # in place, and slowly
                file.write(data[at : at + 200_000])
                time.sleep(0.05)
    """
)


def start(shell: Shell, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        shell.argv("watch", *arguments),
        cwd=shell.folder,
        env=shell.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for(what: Callable[[], bool], seconds: float = 60) -> None:
    end = SYSTEM_CLOCK.monotonic_seconds() + seconds
    while not what():
        assert SYSTEM_CLOCK.monotonic_seconds() < end, "it never came"
        SYSTEM_CLOCK.sleep(0.05)


def checkpoints(shell: Shell) -> list[str]:
    return [each["tags"]["checkpoint"] for each in shell("snapshots", "--json").json]


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_what_a_training_writes_slowly_is_backed_up_whole_and_the_folder_stays_as_it_is(
    end: signal.Signals, shell: Shell
) -> None:
    shell("init")
    out = shell.folder / "out"
    out.mkdir()
    watcher = start(shell, "out", "--quiet-period", "1s", "--json-lines")
    try:
        script = shell.folder / "train.py"
        script.write_text(TRAINER)
        subprocess.run([sys.executable, str(script), str(out), "3"], check=True, timeout=120)
        before = fingerprint(out)
        wait_for(lambda: len(checkpoints(shell)) >= 3)
        watcher.send_signal(end)
        told, errors = watcher.communicate(timeout=60)
    finally:
        watcher.kill()
    assert watcher.returncode == 0, errors
    *lines, result = [json.loads(line) for line in told.splitlines()]
    assert [each["checkpoint"] for each in result["backed_up"]] == ["epoch_0.pt", "epoch_1.pt", "epoch_2.pt"]
    assert [each["files"] for each in result["backed_up"]] == [1, 1, 1]
    assert sum(line.get("event", {}).get("kind") == "checkpoint.backed_up" for line in lines) == 3
    assert fingerprint(out) == before
    for each in result["backed_up"]:
        shell("restore", each["snapshot"], "--to", "back")
        name = each["checkpoint"]
        assert (shell.folder / "back" / name).read_bytes() == (out / name).read_bytes()
        shutil.rmtree(shell.folder / "back")
    assert "3 there already" in shell("watch", "out", "--once").out


def test_a_killed_watch_goes_on_and_backs_up_nothing_twice(shell: Shell) -> None:
    shell("init")
    out = shell.folder / "out"
    out.mkdir()
    rng = np.random.default_rng(3)
    for number in range(6):
        folder = out / f"step_{number}"
        folder.mkdir()
        for part in range(4):
            save_file({"w": rng.standard_normal(400_000)}, folder / f"part{part}.safetensors")
    packs = shell.folder / "repo" / "packs"
    for kills in range(4):
        had = sum(1 for _ in packs.rglob("*")) if packs.exists() else 0
        watcher = start(shell, "out", "--quiet-period", "1s")
        try:
            wait_for(lambda had=had: packs.exists() and sum(1 for _ in packs.rglob("*")) > had)  # type: ignore[misc]
        finally:
            watcher.send_signal(signal.SIGKILL)
            watcher.communicate(timeout=60)
        if len(checkpoints(shell)) == 6:
            break
        assert kills < 3 or checkpoints(shell)
    SYSTEM_CLOCK.sleep(1.1)
    ran = shell("watch", "out", "--once", "--quiet-period", "1s", "--json")
    assert ran.json["waiting"] == []
    assert sorted(checkpoints(shell)) == [f"step_{number}" for number in range(6)]
    shell("check", "--data", "all")


def test_a_store_that_went_and_came_back_is_waited_for(shell: Shell) -> None:
    shell("init")
    repo, away, out = (shell.folder / name for name in ("repo", "away", "out"))
    out.mkdir()
    watcher = start(shell, "out", "--quiet-period", "1s")
    try:
        assert watcher.stdout and watcher.stderr
        assert watcher.stdout.readline().startswith(b"Watching ")
        repo.rename(away)
        weights(out / "epoch_1.safetensors")
        assert b"It is tried again" in watcher.stderr.readline()
        away.rename(repo)
        assert b"epoch_1.safetensors of out, 1 file" in watcher.stdout.readline()
        watcher.send_signal(signal.SIGTERM)
        told, _ = watcher.communicate(timeout=60)
    finally:
        watcher.kill()
    assert (watcher.returncode, told) == (0, b"out: 1 checkpoint backed up.\n")


def test_once_tells_what_is_not_whole_by_its_exit_code(shell: Shell) -> None:
    shell("init")
    out = shell.folder / "out"
    (out / "step_1").mkdir(parents=True)
    (out / "step_1" / "__0_0.distcp").write_bytes(b"x")
    weights(out / "epoch_1.safetensors")
    (out / "notes.txt").write_text("")
    ran = shell("watch", "out", "--once", "--quiet-period", "0s", "--name", "run", "--keep-last", "3", "--json", code=3)
    document = ran.json
    assert [each["checkpoint"] for each in document["backed_up"]] == ["epoch_1.safetensors"]
    [waiting] = document["waiting"]
    assert waiting == {"checkpoint": "step_1", "reason": ".metadata, which is written last, isn't there yet"}
    assert document["others"] == ["notes.txt"] and document["name"] == "run"
    text = shell("watch", "out", "--once", "--quiet-period", "0s", "--name", "run", code=3).out
    assert text.splitlines() == [
        "Not backed up yet: step_1: .metadata, which is written last, isn't there yet.",
        "run: 0 checkpoints backed up, 1 there already, 1 not yet.",
    ]
    shutil.rmtree(out / "step_1")
    shell("watch", "out", "--once", "--quiet-period", "0s", "--name", "run", code=0)
    shell("watch", "nowhere", "--once", code=2)


def test_a_change_ends_the_waiting_at_once_also_in_a_new_folder_of_that_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    told: list[str] = []
    wakeups = Wakeups(os.fsencode(out), 0.2, told.append)
    wakeups.wait(600)  # there is no folder yet: it is polled
    for _ in range(2):
        out.mkdir()
        wakeups.wait(0.5)  # by now the thread watches
        waiting = threading.Thread(target=wakeups.wait, args=(600,))
        waiting.start()

        def changed(waiting: threading.Thread = waiting) -> bool:
            (out / "epoch_1.pt").write_bytes(os.urandom(8))
            return not waiting.is_alive()

        wait_for(changed)
        shutil.rmtree(out)
        wakeups.wait(0.2)
    wakeups.close()
    assert told == []
