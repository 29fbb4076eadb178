"""Real processes, killed at random moments: nothing that was committed is ever damaged.

`OUTLAST_KILLS` sets how often (20), `OUTLAST_KILL_SEED` repeats the moments of an earlier run.
"""

from __future__ import annotations

import os
import random  # noqa: TID251  moments to kill at
import signal
import subprocess
import sys
import textwrap
import time  # noqa: TID251  the killer waits
from pathlib import Path

import pytest

from outlast.backup.create import create
from outlast.events import NULL_SINK
from outlast.records import Snapshot
from outlast.repo.chain import walk
from outlast.repo.check import open_and_check
from outlast.repo.content import Content, RecentChunks
from outlast.repo.log import Log
from outlast.repo.repository import Repository
from outlast.store.local import LocalStore

KILLS = int(os.environ.get("OUTLAST_KILLS", "20"))
SEED = int(os.environ.get("OUTLAST_KILL_SEED", "20250101"))
PACK_BYTES = 100_000

# What the child does for ever: change the folder, back it up, check, restore over the last restore.
# `contents` is the oracle: a snapshot's tag `round` tells what must be in it.
CHILD = textwrap.dedent(
    """
    import os, random, sys

    def contents(writer, round):
        made = {}
        for number in range(6):
            # Some files change in every round, some in every third.
            since = round if number < 3 else round - round % 3
            noise = random.Random(f"{writer} {number} {since}")
            made[f"part{number}"] = noise.randbytes(noise.randrange(200_000))
        made["log"] = f"round {round}\\n".encode() * round
        return made

    def rounds(repository_path, folder, writer, first, last):
        from outlast.backup import restore, restore_plan
        from outlast.backup.create import create
        from outlast.repo.check import open_and_check
        from outlast.repo.repository import Repository
        from outlast.store.local import LocalStore

        print("ready", flush=True)
        for round in range(first, last):
            for name, content in contents(writer, round).items():
                with open(os.path.join(folder, name), "wb") as file:
                    file.write(content)
            repository = Repository.open(LocalStore(repository_path))
            create(repository, [folder], name=writer, tags={"round": str(round), "writer": writer})
            report = open_and_check(LocalStore(repository_path), data="all")
            assert report.ok, report
            target = folder + ".restored"
            plan = restore_plan.plan(repository, repository.find_snapshot("latest", writer), target, overwrite=True)
            assert restore.execute(repository, plan).verified

    if __name__ == "__main__":
        rounds(*sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5]))
    """
)
_oracle: dict[str, object] = {"__name__": "oracle"}
exec(CHILD, _oracle)


@pytest.fixture
def child(tmp_path: Path) -> Path:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    return script


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    made = LocalStore(str(tmp_path / "repository"))
    Repository.create(made, pack_bytes=PACK_BYTES)
    return made


def start(child: Path, store: LocalStore, folder: Path, writer: str, first: int, last: int) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    arguments = [str(child), store.url, str(folder), writer, str(first), str(last)]
    return subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def assert_snapshot_is_right(repository: Repository, snapshot: Snapshot) -> None:
    expected = _oracle["contents"](snapshot.tags["writer"], int(snapshot.tags["round"]))  # type: ignore[operator]
    files = {entry.path.rpartition("/")[2]: entry for entry in repository.entries(snapshot) if entry.type == "file"}
    assert files.keys() == expected.keys()
    for name, content in expected.items():
        assert Content(files[name], RecentChunks(repository).get).read(0, len(content) + 1) == content, (snapshot, name)


def assert_all_is_right(store: LocalStore, already: set[str]) -> Repository:
    """Open, check every byte, read every snapshot that wasn't read before."""
    fresh = LocalStore(store.url)
    report = open_and_check(fresh, data="all")
    assert report.ok, report
    repository = Repository.open(fresh)
    for snapshot in repository.snapshots():
        if snapshot.id not in already:
            assert_snapshot_is_right(repository, snapshot)
            already.add(snapshot.id)
    return repository


def kill_at_random(
    child: Path, store: LocalStore, folder: Path, moments: random.Random, first: int, how: signal.Signals
) -> None:
    process = start(child, store, folder, "one", first, first + 1000)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(moments.uniform(0, 0.5))
    process.send_signal(how)
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0, errors
    if how == signal.SIGKILL:
        assert errors == "", "it was killed, not broken"


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill", "interrupt"])
def test_killed_at_random_moments(how: signal.Signals, child: Path, store: LocalStore, tmp_path: Path) -> None:
    print(f"OUTLAST_KILL_SEED={SEED} OUTLAST_KILLS={KILLS}")
    moments = random.Random(SEED)
    folder = tmp_path / "folder"
    read: set[str] = set()
    for kill in range(KILLS if how == signal.SIGKILL else max(3, KILLS // 4)):
        kill_at_random(child, store, folder, moments, 1000 * kill, how)
        repository = assert_all_is_right(store, read)
    assert read, "not one backup came through: the moments are too early to prove anything"
    before = len(repository.snapshots())
    for name, content in _oracle["contents"]("one", 7).items():  # type: ignore[operator]
        (folder / name).write_bytes(content)
    create(repository, [str(folder)], name="one", tags={"round": "7", "writer": "one"})
    repository = assert_all_is_right(store, set())
    assert len(repository.snapshots()) == before + 1


@pytest.mark.slow
def test_two_backups_at_once_both_succeed(child: Path, store: LocalStore, tmp_path: Path) -> None:
    processes = [start(child, store, tmp_path / writer, writer, 0, 6) for writer in ("one", "two")]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    repository = assert_all_is_right(store, set())
    made = sorted((snapshot.name, snapshot.tags["round"]) for snapshot in repository.snapshots())
    assert made == [(writer, str(turn)) for writer in ("one", "two") for turn in range(6)]
    found = walk(store, Log(store, None, repository.log.anchor, repository.clock, NULL_SINK))
    assert found.damage == []
    assert found.state == repository.state


@pytest.mark.slow
def test_control_c_at_the_command_line(store: LocalStore, tmp_path: Path) -> None:
    """Exit code 130 and a sentence, or done; whichever it is, the repository is whole and the next backup works."""
    print(f"OUTLAST_KILL_SEED={SEED}")
    moments = random.Random(SEED)
    folder = tmp_path / "folder"
    folder.mkdir()
    program = "import sys; from outlast.cli.main import main; print(flush=True); sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "--repo", store.url, "backup", str(folder)]
    snapshots = 0
    for turn in range(6):
        made = {f"part{number}": moments.randbytes(2_000_000) for number in range(20)}
        for name, content in made.items():
            (folder / name).write_bytes(content)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        if turn < 5:
            time.sleep(moments.uniform(0.05, 0.5))
            process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        assert "Traceback" not in errors
        done = "Snapshot" in output
        # Once the result is printed the interpreter is on its way out, and dies of the signal.
        assert process.returncode in ((0, 130, -signal.SIGINT) if done else (130,)), errors
        assert errors == "" or "What was committed is whole" in errors
        report = open_and_check(LocalStore(store.url), data="all")
        assert report.ok, report
        # Cancelled in the moment after the commit: then the snapshot is there though nothing says so.
        assert report.snapshots in ((snapshots + 1,) if done else (snapshots, snapshots + 1))
        snapshots = report.snapshots
        if done:
            repository = Repository.open(LocalStore(store.url))
            files = {
                entry.path.rpartition("/")[2]: Content(entry, RecentChunks(repository).get).read(0, entry.size)
                for entry in repository.entries(repository.find_snapshot("latest"))
                if entry.type == "file"
            }
            assert files == made
    assert process.returncode == 0
