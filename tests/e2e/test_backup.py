"""What a backup takes, what it leaves out, and what it says of it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from trees import content, entries

from outlast.backup import read
from outlast.backup.create import create
from outlast.errors import InvalidInput, Refused, StoreFull
from outlast.events import ListSink
from outlast.records import Chunking, Snapshot, time_text
from outlast.repo.repository import Repository
from outlast.store.layers import QuotaStore
from outlast.store.local import LocalStore
from outlast.store.memory import MemoryStore


@pytest.fixture
def repository() -> Repository:
    return Repository.create(MemoryStore())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def settle(folder: Path) -> None:
    """Make every file old enough to be trusted: ctime can't be set, so wait past the margin."""
    threading.Event().wait(0.05)


def test_unchanged_files_are_not_read_again(
    repository: Repository, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "a.bin").write_bytes(os.urandom(200_000))
    (source / "b.txt").write_text("small")
    settle(source)
    create(repository, [str(source)])
    opened: list[bytes] = []
    real = os.open

    def spy(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        opened.append(os.fsencode(path))
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(read.os, "open", spy)
    report = create(repository, [str(source)])
    assert report.bytes_added == 0
    assert [path for path in opened if path.startswith(os.fsencode(source))] == []
    report = create(repository, [str(source)], full=True)
    assert sorted(path for path in opened if path.startswith(os.fsencode(source))) == [
        os.fsencode(source / "a.bin"),
        os.fsencode(source / "b.txt"),
    ]


def test_a_change_that_keeps_size_and_mtime_is_seen(repository: Repository, source: Path) -> None:
    file = source / "weights.bin"
    file.write_bytes(b"a" * 100_000)
    settle(source)
    create(repository, [str(source)])
    before = file.stat()
    file.write_bytes(b"b" * 100_000)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    create(repository, [str(source)])
    assert content(repository, entries(repository)["weights.bin"]) == b"b" * 100_000


def test_chunks_missing_from_the_repository_are_stored_again(source: Path, tmp_path: Path) -> None:
    (source / "a.bin").write_bytes(os.urandom(300_000))
    settle(source)
    store = LocalStore(str(tmp_path / "repo"))
    create(Repository.create(store), [str(source)])
    for info in list(store.list("packs/")):
        store.delete(info.name)
    sink = ListSink()
    again = Repository.open(store, sink=sink)
    report = create(again, [str(source)], full=True)
    assert report.bytes_added >= 300_000
    assert content(again, entries(again)["a.bin"]) == (source / "a.bin").read_bytes()
    assert any(event.kind == "pack.damaged" for event in sink.events)


def test_the_same_tensors_in_another_format_add_nothing(repository: Repository, source: Path) -> None:
    random = np.random.default_rng(5)
    weights = {f"layer.{n}.weight": random.standard_normal((512, 700), np.float32) for n in range(12)}
    torch.save({name: torch.from_numpy(array) for name, array in weights.items()}, source / "model.pt")
    first = create(repository, [str(source)])
    save_file(weights, source / "model.safetensors")
    second = create(repository, [str(source)])
    assert second.bytes_added < 0.01 * first.bytes_added


def test_two_changed_blocks_of_twelve_add_what_changed(repository: Repository, source: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    names = ("weight", "exp_avg", "exp_avg_sq")
    state = {f"{block}.{name}": torch.randn(900, 1000, generator=generator) for block in range(12) for name in names}
    torch.save(state, source / "checkpoint.pt")
    create(repository, [str(source)])
    changed = 0
    for block in (4, 9):
        for name in names:
            state[f"{block}.{name}"].add_(0.01)
            changed += state[f"{block}.{name}"].nbytes
    torch.save(state, source / "checkpoint.pt")
    report = create(repository, [str(source)])
    assert changed <= report.bytes_added <= 1.03 * changed


class Restless:
    """Writes to a file for as long as somebody reads it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, file: Path, times: int) -> None:
        self.left = times
        real = os.pread

        def pread(fd: int, length: int, offset: int) -> bytes:
            data = real(fd, length, offset)
            if self.left and os.fstat(fd).st_ino == file.stat().st_ino:
                self.left -= 1
                with open(file, "r+b") as handle:
                    handle.write(b"%08d" % self.left)
            return data

        monkeypatch.setattr(read.os, "pread", pread)


def test_a_file_that_changes_once_is_read_again(
    repository: Repository, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = source / "growing.bin"
    file.write_bytes(os.urandom(400_000))
    Restless(monkeypatch, file, times=1)
    report = create(repository, [str(source)])
    assert report.unstable == 0
    assert content(repository, entries(repository)["growing.bin"]) == file.read_bytes()


def test_a_file_that_never_holds_still_is_marked(
    repository: Repository, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = source / "restless.bin"
    file.write_bytes(os.urandom(400_000))
    (source / "calm.bin").write_bytes(b"calm" * 50_000)
    Restless(monkeypatch, file, times=10_000)
    monkeypatch.setattr(read, "_PAUSE_SECONDS", 0.0)
    report = create(repository, [str(source)])
    assert (report.unstable, report.unreadable) == (1, 0)
    assert [(problem.path, problem.kind) for problem in report.problems] == [("restless.bin", "unstable")]
    assert entries(repository)["restless.bin"].unstable
    assert not entries(repository)["calm.bin"].unstable


def test_a_small_file_that_changes_is_read_again(
    repository: Repository, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = source / "config.json"
    file.write_text("{}")
    real = os.read
    left = [2]

    def grow(fd: int, length: int) -> bytes:
        if left[0] and os.fstat(fd).st_ino == file.stat().st_ino:
            left[0] -= 1
            file.write_text("{" + " " * (10 - left[0]) + "}")
        return real(fd, length)

    monkeypatch.setattr(read.os, "read", grow)
    report = create(repository, [str(source)])
    assert report.unstable == 0
    assert content(repository, entries(repository)["config.json"]) == file.read_bytes()


@pytest.mark.parametrize(
    "given",
    [{"name": 5}, {"name": "\udcff"}, {"tags": {"step": 1000}}, {"tags": {"a": None}}, {"tags": {1: "a"}}],
    ids=str,
)
def test_names_and_tags_that_are_no_text_are_refused(repository: Repository, source: Path, given: Any) -> None:
    before = repository.snapshots()
    with pytest.raises(InvalidInput, match="text in UTF-8"):
        create(repository, [str(source)], **given)
    assert Repository.open(repository.store).snapshots() == before


def test_what_could_not_be_read_again_is_not_committed(repository: Repository) -> None:
    odd: Any = {"step": 1000}
    with pytest.raises(InvalidInput, match="not committed"):
        repository.writer().commit(Snapshot("", "backup", "odd", time_text(0), tags=odd))
    assert Repository.open(repository.store).snapshots() == []


def test_unreadable_things_are_named_and_the_rest_is_there(
    repository: Repository, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "good.bin").write_bytes(b"good")
    (source / "bad.bin").write_bytes(b"bad")
    (source / "big_bad.bin").write_bytes(bytes(100_000))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(source / "socket"))
        real = os.open

        def refuse(path: Any, flags: int, *rest: Any, **named: Any) -> int:
            if os.fsencode(path).endswith(b"bad.bin"):
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return real(path, flags, *rest, **named)

        monkeypatch.setattr(read.os, "open", refuse)
        report = create(repository, [str(source)])
    assert report.unreadable == 3
    assert {problem.path for problem in report.problems} == {"bad.bin", "big_bad.bin", "socket"}
    found = entries(repository)
    assert found["bad.bin"].type == "unreadable" and "Permission denied" in found["bad.bin"].reason
    assert content(repository, found["good.bin"]) == b"good"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody who may not read")
def test_a_folder_without_permission_is_named(request: pytest.FixtureRequest) -> None:
    scratch = tempfile.mkdtemp()
    request.addfinalizer(lambda: shutil.rmtree(scratch))
    os.chmod(scratch, 0o755)
    source = Path(scratch) / "source"
    (source / "locked").mkdir(parents=True)
    (source / "locked" / "inside").write_text("secret")
    (source / "open.txt").write_text("open")
    source.chmod(0o755)
    (source / "open.txt").chmod(0o644)
    (source / "locked").chmod(0)
    # Made before: the package itself may lie where only root can read.
    repository = Repository.create(MemoryStore())
    create(repository, [str(source / "open.txt")])
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setuid(65534)
            report = create(repository, [str(source)])
            os.write(write_end, repr((report.unreadable, report.files, [p.path for p in report.problems])).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    said = os.read(read_end, 10_000)
    os.waitpid(child, 0)
    os.close(read_end)
    assert said == b"(1, 1, ['locked'])"


def test_missing_sources(repository: Repository, source: Path) -> None:
    (source / "a").write_text("a")
    with pytest.raises(InvalidInput, match=r"nothing to back up: /nowhere/at/all \(No such file"):
        create(repository, ["/nowhere/at/all"])
    assert repository.snapshots() == []
    report = create(repository, ["/nowhere/at/all", str(source)])
    assert (report.files, report.unreadable) == (1, 1)


def test_several_sources_keep_their_names_and_may_not_collide(repository: Repository, tmp_path: Path) -> None:
    for path in ("x/data", "y/data", "weights"):
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path / "file").write_text(path)
    (tmp_path / "notes.txt").write_text("n")
    create(repository, [str(tmp_path / "weights"), str(tmp_path / "notes.txt"), str(tmp_path / "x/data")])
    assert list(entries(repository)) == ["data", "data/file", "notes.txt", "weights", "weights/file"]
    with pytest.raises(InvalidInput, match="two sources are both called 'data'"):
        create(repository, [str(tmp_path / "x/data"), str(tmp_path / "y/data")])


def test_the_repository_inside_the_source_is_left_out(source: Path) -> None:
    (source / "model.bin").write_bytes(b"m" * 1000)
    repository = Repository.create(LocalStore(str(source / "backups" / "repo")))
    report = create(repository, [str(source)])
    assert set(entries(repository)) == {".", "backups", "model.bin"}
    assert [(problem.path, problem.kind) for problem in report.problems] == [("backups/repo", "skipped")]
    assert (report.unreadable, report.unstable) == (0, 0)


def test_a_source_inside_the_repository_is_refused(tmp_path: Path) -> None:
    repository = Repository.create(LocalStore(str(tmp_path / "repo")))
    with pytest.raises(Refused, match="lies inside the repository"):
        create(
            repository,
            [str(tmp_path / "repo" / "packs")] if (tmp_path / "repo" / "packs").exists() else [str(tmp_path / "repo")],
        )


def test_excludes(repository: Repository, source: Path) -> None:
    for path in ("keep.pt", "cache/a", "deep/cache/b", "deep/x.tmp", "logs/1.txt", "deep/logs/2.txt"):
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_text(path)
    create(repository, [str(source)], exclude=["cache", "*.tmp", "/logs"])
    assert [path for path, entry in entries(repository).items() if entry.type == "file"] == [
        "deep/logs/2.txt",
        "keep.pt",
    ]


def test_a_full_disk_ends_the_backup_and_loses_nothing(source: Path) -> None:
    (source / "first.bin").write_bytes(os.urandom(100_000))
    memory = MemoryStore()
    repository = Repository.create(memory, pack_bytes=1 << 20)
    create(repository, [str(source)])
    before = repository.find_snapshot("latest")
    (source / "second.bin").write_bytes(os.urandom(8_000_000))
    full = Repository.open(QuotaStore(memory, 3_000_000))
    with pytest.raises(StoreFull):
        create(full, [str(source)])
    again = Repository.open(memory)
    assert again.find_snapshot("latest") == before
    report = create(again, [str(source)])
    assert report.bytes_added < 8_000_000, "packs uploaded before the disk was full are used"
    assert content(again, entries(again)["second.bin"]) == (source / "second.bin").read_bytes()


@pytest.mark.parametrize(("limit", "value"), [("COMMIT_PACKS_BYTES", 2 << 20), ("COMMIT_PACKS_CHUNKS", 1)])
def test_a_long_backup_commits_its_packs_on_the_way(
    source: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    from outlast.repo import write

    monkeypatch.setattr(write, limit, value)
    (source / "data.bin").write_bytes(os.urandom(20_000_000))
    repository = Repository.create(MemoryStore(), pack_bytes=1 << 20)
    create(repository, [str(source)])
    kinds = [json.loads(repository.store.get(info.name))["kind"] for info in repository.store.list("log/")]
    assert kinds.count("packs") >= 2 and kinds[-1] == "snapshot"


def test_many_small_files_are_indexed_in_segments_on_the_way(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from outlast.repo import write

    for name, value in (("PACK_CHUNKS_MAX", 20), ("COMMIT_PACKS_CHUNKS", 50), ("SEGMENT_CHUNKS", 100)):
        monkeypatch.setattr(write, name, value)
    for number in range(500):
        (source / f"{number}.txt").write_text(f"file {number}")
    repository = Repository.create(MemoryStore())
    create(repository, [str(source)])
    assert len(list(repository.store.list("index/"))) >= 2, "footers of all packs at once would not fit in memory"
    assert sum(len(footer.records) for footer in repository.uncovered) < 200
    again = Repository.open(repository.store)
    assert content(again, entries(again)["499.txt"]) == b"file 499"


def test_holes_are_found_and_not_stored(repository: Repository, source: Path) -> None:
    with open(source / "sparse.img", "wb") as file:
        file.truncate(50_000_000)
        file.seek(20_000_000 - 20_000_000 % 4096)
        file.write(b"island" * 10_000)
    report = create(repository, [str(source)])
    assert report.bytes == 50_000_000
    assert report.bytes_added < 1_000_000
    entry = entries(repository)["sparse.img"]
    assert sum(length for _, length in entry.holes) + sum(length for _, length in entry.chunks) == 50_000_000


def test_a_manifest_of_many_files_is_cut_and_deduplicated(source: Path) -> None:
    small = Chunking(min_bytes=16 << 10, avg_bytes=64 << 10, max_bytes=256 << 10)
    repository = Repository.create(MemoryStore(), chunking=small)
    for number in range(3000):
        (source / f"{number:05d}.txt").write_text(str(number))
    first = create(repository, [str(source)])
    settle(source)
    (source / "00007.txt").write_text("changed")
    second = create(repository, [str(source)])
    assert first.files == second.files == 3000
    assert len(repository.find_snapshot("latest").manifest) > 1
    assert second.bytes_added < first.bytes_added
    order = [entry.raw_path for entry in repository.entries(repository.find_snapshot("latest"))]
    assert len(order) == 3001 and order[0] == b"."
    assert order[1:] == sorted(order[1:])


@pytest.fixture(autouse=True)
def _no_fd_leak() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= before + 1, "the backup left files open"


def test_special_entries(repository: Repository, source: Path) -> None:
    (source / "file").write_text("x")
    os.link(source / "file", source / "same")
    os.symlink("file", source / "link")
    os.symlink("nowhere", source / "dangling")
    os.mkfifo(source / "pipe")
    (source / "empty").mkdir()
    (source / os.fsdecode(b"odd\n\xff%41")).write_text("odd")
    create(repository, [str(source)])
    found = entries(repository)
    assert (found["same"].type, found["same"].target) == ("hardlink", "file")
    assert (found["link"].type, found["link"].target) == ("symlink", "file")
    assert found["dangling"].type == "symlink"
    assert found["pipe"].type == "fifo"
    assert found["empty"].type == "dir" and stat.S_ISDIR(os.lstat(source / "empty").st_mode)
    assert found["odd\n%FF%2541"].raw_path == b"odd\n\xff%41"
