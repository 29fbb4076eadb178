"""Restore: byte for byte, only what is wrong is fetched, and whatever happens the target stays whole."""

from __future__ import annotations

import ctypes
import os
import random  # noqa: TID251  seeded
import resource
import signal
import stat
import subprocess
import time  # noqa: TID251  a child process is killed after a while
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from restoring import SMALL, TIME_NS, back_up, beside, by_hand, make_source, occupied, run, small_repository
from trees import describe

from outlast import errors
from outlast.backup import folder, restore, restore_plan, staging
from outlast.events import ListSink
from outlast.records import Entry
from outlast.repo.repository import Repository
from outlast.store.layers import RetryStore
from outlast.store.memory import MemoryStore


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return small_repository(tmp_path / "repository")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "source")


def in_child(work: Callable[[], object]) -> int:
    """Run in a process of its own that ends with 0, or with the exit code of our error."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            work()
            code = 0
        except errors.OutlastError as exc:
            code = exc.exit_code
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# -- it comes back ------------------------------------------------------------------------------------


def test_everything_comes_back_as_it_was(repository: Repository, source: Path, tmp_path: Path) -> None:
    snapshot = back_up(repository, source)
    target = tmp_path / "made" / "on" / "the way"
    report = run(repository, snapshot, target)
    assert describe(os.fspath(target)) == describe(os.fspath(source))
    assert (target / "sparse").stat().st_blocks * 512 < 1 << 20, "the holes take no space"
    assert (report.files, report.bytes, report.verified, report.kept_as) == (
        snapshot.files,
        snapshot.bytes,
        True,
        "",
    )
    assert beside(target) == []


def test_single_files_are_put_into_the_folder(repository: Repository, source: Path, tmp_path: Path) -> None:
    snapshot = back_up(repository, source / "small.txt", source / "deep" / "er")
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").write_bytes(b"mine")
    run(repository, snapshot, target)
    assert sorted(os.listdir(target)) == ["er", "mine", "small.txt"]
    assert describe(target / "er") == describe(source / "deep" / "er")


def test_a_plan_changes_nothing_and_says_what_will_happen(repository: Repository, source: Path, tmp_path: Path) -> None:
    snapshot = back_up(repository, source)
    before = sorted(os.listdir(tmp_path))
    actions: list[restore_plan.Action] = []
    plan = restore.plan(repository, snapshot, os.fsencode(tmp_path / "target"), note=actions.append)
    assert sorted(os.listdir(tmp_path)) == before
    assert (plan.files, plan.bytes) == (snapshot.files, snapshot.bytes)
    fetched = restore.execute(repository, plan).bytes_fetched
    assert plan.bytes_to_fetch == fetched == sum(each[2] for each in actions)


def test_from_an_encrypted_store_that_is_not_a_folder(source: Path, tmp_path: Path) -> None:
    store = RetryStore(MemoryStore())
    repository = Repository.create(store, secret=lambda: b"passphrase", chunking=SMALL)
    run(repository, back_up(repository, source), tmp_path / "target")
    assert describe(tmp_path / "target") == describe(source)
    (tmp_path / "target" / "small.txt").write_bytes(b"SMALL")
    assert run(repository, back_up(repository, source), tmp_path / "target").bytes_fetched == 5


# -- into a folder that is there ----------------------------------------------------------------------


def test_only_the_wrong_chunk_is_fetched_and_the_old_folder_is_kept(
    repository: Repository, source: Path, tmp_path: Path
) -> None:
    snapshot = back_up(repository, source)
    target = tmp_path / "target"
    run(repository, snapshot, target)
    [entry] = [each for each in repository.entries(snapshot) if each.path == "big.bin"]
    with (target / "big.bin").open("r+b") as file:
        file.seek(sum(length for _, length in entry.chunks[:3]) + 7)
        file.write(b"\0flip")
    (target / "stranger").write_bytes(b"not in the snapshot")
    damaged = describe(target)
    plan = restore.plan(repository, snapshot, os.fsencode(target))
    assert plan.bytes_to_fetch == entry.chunks[3][1]
    assert describe(target) == damaged
    report = restore.execute(repository, plan)
    assert report.bytes_fetched == entry.chunks[3][1]
    assert describe(target) == describe(source)
    assert report.kept_as.startswith(os.fspath(target) + ".before-2")
    assert describe(report.kept_as) == damaged
    assert beside(target) == [os.path.basename(report.kept_as)]


def test_a_folder_that_is_right_is_left_alone(repository: Repository, source: Path, tmp_path: Path) -> None:
    snapshot = back_up(repository, source)
    target = tmp_path / "target"
    run(repository, snapshot, target)
    inode = target.stat().st_ino
    report = run(repository, snapshot, target)
    assert (report.bytes_fetched, report.kept_as, report.verified) == (0, "", True)
    assert target.stat().st_ino == inode and beside(target) == []


@pytest.mark.parametrize("change", ["mode", "mtime", "stranger", "gone", "unlinked", "link", "hole"])
def test_any_difference_is_put_right(repository: Repository, source: Path, tmp_path: Path, change: str) -> None:
    snapshot = back_up(repository, source)
    target = tmp_path / "target"
    run(repository, snapshot, target)
    if change == "mode":
        (target / "deep").chmod(0o700)
    elif change == "mtime":
        os.utime(target / "small.txt")
    elif change == "stranger":
        (target / "deep" / "new").write_bytes(b"")
    elif change == "gone":
        (target / "small.txt").unlink()
    elif change == "unlinked":
        content = (target / "big.bin").read_bytes()
        (target / "deep" / "same.bin").unlink()
        (target / "deep" / "same.bin").write_bytes(content)
    elif change == "link":
        (target / "link").unlink()
        (target / "link").symlink_to("elsewhere")
    else:
        with (target / "sparse").open("r+b") as file:
            file.seek(2 << 20)
            file.write(b"junk where there should be zeros")
        os.utime(target / "sparse", ns=(TIME_NS, TIME_NS))
    os.utime(target, ns=(TIME_NS + 1, TIME_NS + 1))
    report = run(repository, snapshot, target)
    assert describe(target) == describe(source)
    assert report.bytes_fetched <= 5 + len("island") + 16384


def test_overwrite_keeps_nothing(repository: Repository, source: Path, tmp_path: Path) -> None:
    snapshot = back_up(repository, source)
    target = occupied(tmp_path)
    report = run(repository, snapshot, target, overwrite=True)
    assert report.kept_as == "" and beside(target) == []
    assert describe(target) == describe(source)


def test_an_empty_folder_is_replaced_without_a_copy(repository: Repository, source: Path, tmp_path: Path) -> None:
    snapshot = back_up(repository, source)
    target = tmp_path / "target"
    target.mkdir()
    assert run(repository, snapshot, target).kept_as == ""
    assert describe(target) == describe(source) and beside(target) == []


def test_it_works_without_the_system_calls_of_linux(
    repository: Repository, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "_system", object)
    snapshot = back_up(repository, source)
    target = occupied(tmp_path)
    report = run(repository, snapshot, target)
    assert describe(target) == describe(source)
    assert os.listdir(report.kept_as) == ["old"]


# -- a part of it -------------------------------------------------------------------------------------


def test_include_makes_a_folder_with_just_that(repository: Repository, source: Path, tmp_path: Path) -> None:
    snapshot = back_up(repository, source)
    target = tmp_path / "target"
    report = run(repository, snapshot, target, include=["mid.bin", "small.*"])
    whole = describe(source)
    assert describe(target) == {
        path: whole[path] for path in (b".", b"deep", b"deep/er", b"deep/er/mid.bin", b"small.txt")
    }
    assert report.files == 2 and report.bytes == report.bytes_fetched == 40_005


def test_include_brings_a_hard_link_without_its_other_name(
    repository: Repository, source: Path, tmp_path: Path
) -> None:
    snapshot = back_up(repository, source)
    target = tmp_path / "target"
    run(repository, snapshot, target, include=["deep/same.bin"])
    assert (target / "deep" / "same.bin").read_bytes() == (source / "big.bin").read_bytes()
    assert not (target / "big.bin").exists()


def test_include_into_a_folder_replaces_those_files_and_no_other(
    repository: Repository, source: Path, tmp_path: Path
) -> None:
    snapshot = back_up(repository, source)
    target = tmp_path / "target"
    run(repository, snapshot, target)
    (target / "small.txt").write_bytes(b"changed")
    (target / "deep" / "mine").write_bytes(b"mine")
    (target / "secret").unlink()
    os.utime(target / "deep", ns=(TIME_NS, TIME_NS))
    report = run(repository, snapshot, target, include=["small.txt", "secret", "deep/er", "big.bin"])
    assert report.bytes_fetched == len("small") + len("secret")
    kept = [name for name in os.listdir(target) if ".before-" in name]
    assert [(target / name).read_bytes() for name in kept] == [b"changed"]
    assert (report.kept_files, report.kept_as) == (1, ""), "they are in many places, so no one path is named"
    found, whole = describe(target), describe(source)
    assert found.pop(b"deep/mine") and found.pop(os.fsencode(kept[0]))
    # The folders that hold something of the user's keep their own times.
    assert {path for path in whole if found[path] != whole[path]} <= {b".", b"deep"}
    assert beside(target) == []


def test_include_puts_aside_what_is_of_another_kind(repository: Repository, source: Path, tmp_path: Path) -> None:
    snapshot = back_up(repository, source)
    target = tmp_path / "target"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    target.mkdir()
    (target / "deep").symlink_to(elsewhere)
    (target / "small.txt").mkdir()
    (target / "small.txt" / "mine").write_bytes(b"mine")
    run(repository, snapshot, target, include=["small.txt", "deep/er/mid.bin"])
    assert os.listdir(elsewhere) == []
    assert (target / "small.txt").read_bytes() == b"small"
    assert (target / "deep" / "er" / "mid.bin").stat().st_size == 40_000
    [kept] = [name for name in os.listdir(target) if name.startswith("small.txt.before-")]
    assert (target / kept / "mine").read_bytes() == b"mine"


def test_include_that_fits_nothing_says_so(repository: Repository, source: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.NotFound, match=r"\*\.gguf"):
        restore.plan(repository, back_up(repository, source), os.fsencode(tmp_path / "target"), include=["*.gguf"])


# -- killed, full, at once ----------------------------------------------------------------------------


def test_a_killed_restore_is_continued(
    repository: Repository, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(20260101)
    for number in range(150):
        (source / f"n{number}").write_bytes(rng.randbytes(rng.randrange(1, 30_000)))
    snapshot = back_up(repository, source)
    target = occupied(tmp_path)
    killed = 0
    to_fetch = [restore.plan(repository, snapshot, os.fsencode(target)).bytes_to_fetch]
    deliver = staging.Staging._deliver

    def slowly(*arguments: Any) -> None:
        time.sleep(0.002)
        deliver(*arguments)

    monkeypatch.setattr(staging.Staging, "_deliver", slowly)
    for _ in range(12):
        pid = in_child(lambda: run(repository, snapshot, target))
        time.sleep(rng.uniform(0.01, 0.15))
        os.kill(pid, signal.SIGKILL)
        ended(pid)
        if os.listdir(target) != ["old"]:
            break  # it had swapped already: then it must be whole, which is seen below
        killed += 1
        to_fetch.append(restore.plan(repository, snapshot, os.fsencode(target)).bytes_to_fetch)
    monkeypatch.undo()
    assert killed and to_fetch == sorted(to_fetch, reverse=True)
    assert len(to_fetch) < 3 or to_fetch[-1] < to_fetch[0]
    report = run(repository, snapshot, target)
    assert report.bytes_fetched <= to_fetch[-1]
    assert describe(target) == describe(source)
    assert [os.listdir(tmp_path / name) for name in beside(target)] == [["old"]]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
@pytest.mark.parametrize("bound", [False, True])
def test_what_is_mounted_below_the_target_is_never_emptied(
    repository: Repository, source: Path, tmp_path: Path, bound: bool
) -> None:
    snapshot = back_up(repository, source)
    target, elsewhere = tmp_path / "target", tmp_path / "else where"
    (target / "disk").mkdir(parents=True)
    elsewhere.mkdir()
    what = ["--bind", os.fspath(elsewhere)] if bound else ["-t", "tmpfs", "none"]

    def work() -> None:
        ctypes.CDLL(None).unshare(0x00020000)  # CLONE_NEWNS: what is mounted ends with this child
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", *what, target / "disk"], check=True)
        (target / "disk" / "file").write_bytes(b"of another place")
        with pytest.raises(errors.Refused, match=r"mounted at .*target/disk\."):
            run(repository, snapshot, target, overwrite=True)
        with pytest.raises(OSError, match="mounted below"):
            folder.remove_tree(os.fsencode(target))
        assert (target / "disk" / "file").read_bytes() == b"of another place"

    assert ended(in_child(work)) == 0


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_right_after_the_swap_and_without_its_journal_the_old_folder_is_not_lost(
    repository: Repository, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    snapshot = back_up(repository, source)
    target = occupied(tmp_path)
    monkeypatch.setattr(restore, "_put_away", lambda old, kept: os.kill(os.getpid(), signal.SIGKILL))
    assert ended(in_child(lambda: run(repository, snapshot, target))) == -signal.SIGKILL
    monkeypatch.undo()
    (tmp_path / ".target.outlast-lock").unlink()
    if overwrite:
        (target / "small.txt").unlink()
    report = run(repository, snapshot, target, overwrite=overwrite)
    assert describe(target) == describe(source) and os.listdir(report.kept_as) == ["old"]
    assert beside(target) == [os.path.basename(report.kept_as)]


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_right_after_the_swap_the_old_folder_is_not_lost(
    repository: Repository, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    snapshot = back_up(repository, source)
    target = occupied(tmp_path)
    monkeypatch.setattr(restore, "_put_away", lambda old, kept: os.kill(os.getpid(), signal.SIGKILL))
    assert ended(in_child(lambda: run(repository, snapshot, target, overwrite=overwrite))) == -signal.SIGKILL
    monkeypatch.undo()
    report = run(repository, snapshot, target, overwrite=overwrite)
    assert describe(target) == describe(source)
    assert report.bytes_fetched == 0
    assert [os.listdir(tmp_path / name) for name in beside(target)] == ([] if overwrite else [["old"]])
    assert bool(report.kept_as) is not overwrite


def test_what_a_killed_restore_left_is_not_trusted(repository: Repository, source: Path, tmp_path: Path) -> None:
    snapshot = back_up(repository, source)
    target, outside = tmp_path / "target", tmp_path / "outside"
    outside.mkdir()
    (outside / "victim").write_bytes(bytes(300_000))
    left = Path(os.fsdecode(restore.plan(repository, snapshot, os.fsencode(target)).staging))
    left.mkdir()
    left.with_name(left.name + ".building").touch()
    (left / "deep").symlink_to(outside)
    (left / "big.bin").symlink_to(outside / "victim")
    (left / "small.txt").mkdir()
    (left / "small.txt" / "x").write_bytes(b"x")
    (left / "empty").mkdir()
    (left / "empty" / "stranger").write_bytes(b"x")
    os.link(outside / "victim", left / "zeros")
    (left / "sparse").write_bytes(b"j" * (3 << 20))
    run(repository, snapshot, target)
    assert describe(target) == describe(source)
    assert os.listdir(outside) == ["victim"] and (outside / "victim").read_bytes() == bytes(300_000)


def test_a_full_disk_leaves_the_target_and_the_work_done(repository: Repository, source: Path, tmp_path: Path) -> None:
    (source / "zz-huge.bin").write_bytes(random.Random(5).randbytes(4 << 20))
    snapshot = back_up(repository, source)
    target = occupied(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_500_000, hard))
    try:
        with pytest.raises(errors.StoreFull, match=rf"no room.*{snapshot.bytes} bytes") as caught:
            run(repository, snapshot, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(target) == ["old"] and "run the same command again" in caught.value.hint
    run(repository, snapshot, target)
    assert describe(target) == describe(source)


def test_two_at_once_the_second_says_busy(repository: Repository, source: Path, tmp_path: Path) -> None:
    snapshot, other = back_up(repository, source), back_up(repository, source / "deep")
    target = tmp_path / "target"
    with restore.exclusive(os.fsencode(target)):
        for each in (snapshot, other):
            with pytest.raises(errors.Busy, match="another restore"):
                run(repository, each, target)
    run(repository, snapshot, target)
    assert describe(target) == describe(source) and beside(target) == []


def test_many_at_once_end_with_one_whole_folder(repository: Repository, source: Path, tmp_path: Path) -> None:
    snapshot = back_up(repository, source)
    target = tmp_path / "target"
    codes = [ended(pid) for pid in [in_child(lambda: run(repository, snapshot, target)) for _ in range(6)]]
    assert 0 in codes and set(codes) <= {0, errors.Busy.exit_code, errors.Refused.exit_code}
    assert describe(target) == describe(source)


# -- damage -------------------------------------------------------------------------------------------


def test_a_damaged_pack_names_its_files_and_the_others_come(
    repository: Repository, source: Path, tmp_path: Path
) -> None:
    snapshot = back_up(repository, source)
    [entry] = [each for each in repository.entries(snapshot) if each.path == "deep/er/mid.bin"]
    place = repository.locate(bytes.fromhex(entry.chunks[0][0]))
    pack = tmp_path / "repository" / "packs" / place.pack.name[:2] / place.pack.name
    pack.chmod(0o644)
    with pack.open("r+b") as file:
        file.seek(place.offset)
        old = file.read(1)
        file.seek(place.offset)
        file.write(bytes([old[0] ^ 1]))
    target = occupied(tmp_path)
    with pytest.raises(errors.Corrupt, match=r"1 of 9 files can't be restored: deep/er/mid\.bin") as caught:
        run(repository, snapshot, target)
    assert "--include" in caught.value.hint and os.listdir(target) == ["old"]
    report = run(repository, snapshot, target, include=["big.bin"])
    assert (target / "big.bin").read_bytes() == (source / "big.bin").read_bytes()
    assert report.bytes_fetched == 0, "what the failed restore had fetched is used"
    with pack.open("r+b") as file:
        file.seek(place.offset)
        file.write(old)
    run(repository, snapshot, target)
    assert describe(target) == describe(source)


@pytest.mark.parametrize(
    "path",
    ["../escape", "a/../../escape", "/etc/escape", "a//b", ".", "a%00b", "link/escape", "nowhere/escape", "a/./b"],
)
def test_a_manifest_that_reaches_outside_is_corrupt(repository: Repository, tmp_path: Path, path: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    root = Entry(path=".", type="dir", mode=0o755)
    a = Entry(path="a", type="dir", mode=0o755)
    link = Entry(path="link", type="symlink", target=os.fspath(outside))
    bad = Entry(path=path, type="file", mode=0o644)
    order = [root, bad] if path.startswith(("/", "..")) else [root, a, bad, link]
    order = [root, a, link, bad] if path.startswith(("link", "nowhere")) else order
    snapshot = by_hand(repository, *order)
    with pytest.raises(errors.Corrupt, match="the entry"):
        run(repository, snapshot, tmp_path / "target")
    assert os.listdir(outside) == [] and sorted(os.listdir(tmp_path)) == ["outside", "repository"]


@pytest.mark.parametrize(
    "entry",
    [
        Entry(path="x", type="file", size=1 << 62),
        Entry(path="x", type="file", size=5, chunks=[("00" * 32, 4)]),
        Entry(path="x", type="file", size=4, chunks=[("zz" * 32, 4)]),
        Entry(path="x", type="file", size=-4, chunks=[("00" * 32, -4)]),
        Entry(path="x", type="file", size=10, chunks=[("00" * 32, 4)], holes=[(2, 6)]),
        Entry(path="x", type="file", size=10, holes=[(0, 6), (3, 4)]),
        Entry(path="x", type="hardlink", target="../../etc/passwd"),
        Entry(path="x", type="hardlink", target="y"),
        Entry(path="x", type="file", mtime_ns=1 << 100),
        Entry(path="x", type="file", mtime_ns=-(1 << 100)),
        Entry(path="x", type="dir", uid=1 << 32),
        Entry(path="x", type="dir", uid=(1 << 32) - 1),
        Entry(path="x", type="symlink", target="y", gid=-1),
        Entry(path="x", type="fifo", mode=1 << 20),
        Entry(path="x", type="dir", size=-1),
        Entry(path="x", type="dir", inode=1 << 64),
        Entry(path="x", type="symlink", target="a%00b"),
        Entry(path="x", type="file", size=8, chunks=[("00" * 32, 12), ("11" * 32, -4)]),
        Entry(path="x", type="file", size=8, chunks=[("00" * 32, 4)], holes=[(6, 4)]),
        Entry(path="x", type="file", size=8, chunks=[("00" * 32, 4)], holes=[(0, -4), (4, 8)]),
    ],
)
def test_a_manifest_that_contradicts_itself_is_corrupt(repository: Repository, tmp_path: Path, entry: Entry) -> None:
    snapshot = by_hand(repository, Entry(path=".", type="dir", mode=0o755), entry)
    with pytest.raises(errors.Corrupt, match="the entry 'x'"):
        restore.plan(repository, snapshot, os.fsencode(tmp_path / "target"))


def test_a_chunk_that_is_not_there_names_the_file(repository: Repository, tmp_path: Path) -> None:
    snapshot = by_hand(repository, Entry(path="x", type="file", size=4, chunks=[("00" * 32, 4)]))
    with pytest.raises(errors.Corrupt, match="1 of 1 files can't be restored: x"):
        run(repository, snapshot, tmp_path / "target")


# -- places that can't be targets ---------------------------------------------------------------------


def test_places_that_make_no_target(repository: Repository, source: Path, tmp_path: Path) -> None:
    snapshot = back_up(repository, source)
    with pytest.raises(errors.InvalidInput, match="is a file"):
        run(repository, snapshot, source / "small.txt")
    with pytest.raises(errors.InvalidInput, match="is not a folder"):
        run(repository, snapshot, source / "small.txt" / "below")
    with pytest.raises(errors.Refused, match="inside the repository"):
        run(repository, snapshot, tmp_path / "repository" / "packs" / "x")
    with pytest.raises(errors.Refused, match="repository lies inside"):
        run(repository, snapshot, tmp_path)
    with pytest.raises(errors.Refused, match="root of the file system"):
        run(repository, snapshot, Path("/"))
    assert sorted(os.listdir(tmp_path)) == ["repository", "source"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a second user")
def test_a_read_only_place_is_refused_and_owners_are_only_for_root(
    repository: Repository, source: Path, tmp_path: Path
) -> None:
    os.chown(source / "small.txt", 1234, 4321)
    (source / "secret").chmod(0o444)
    snapshot = back_up(repository, source)
    for parent in [tmp_path, *tmp_path.parents[:3]]:
        parent.chmod(0o755)
    locked, free = tmp_path / "locked", tmp_path / "free"
    locked.mkdir()
    free.mkdir()
    os.chown(free, 65534, 65534)

    def as_nobody(target: Path, **options: Any) -> int:
        def work() -> None:
            os.setgid(65534)
            os.setuid(65534)
            assert run(repository, snapshot, target, **options).skipped == [], "that others own it is no flaw"

        return ended(in_child(work))

    assert as_nobody(locked / "target") == errors.Refused.exit_code and os.listdir(locked) == []
    # The root and a folder of the snapshot are read-only: twice, so that one of those is replaced.
    source.chmod(0o555)
    snapshot = back_up(repository, source)
    for path in [tmp_path / "repository", *(tmp_path / "repository").rglob("*")]:
        path.chmod(path.stat().st_mode | 0o055)
    assert as_nobody(free / "target") == 0
    os.utime(free / "target" / "small.txt")
    assert as_nobody(free / "target", overwrite=True) == 0
    assert describe(free / "target") == describe(source)
    run(repository, snapshot, tmp_path / "mine")
    assert ((tmp_path / "mine" / "small.txt").stat().st_uid, (free / "target" / "small.txt").stat().st_uid) == (
        1234,
        65534,
    )


def test_a_target_in_the_source_is_said(repository: Repository, source: Path) -> None:
    repository.sink = sink = ListSink()
    run(repository, back_up(repository, source), source / "copy")
    assert "restore.target_in_source" in [event.kind for event in sink.events]


def test_what_could_not_be_backed_up_is_named(repository: Repository, tmp_path: Path) -> None:
    snapshot = by_hand(
        repository,
        Entry(path=".", type="dir", mode=0o755),
        Entry(path="locked", type="unreadable", reason="Permission denied"),
    )
    report = run(repository, snapshot, tmp_path / "target")
    assert [(each.path, "Permission denied" in each.reason) for each in report.skipped] == [("locked", True)]
    assert stat.S_IMODE((tmp_path / "target").stat().st_mode) == 0o755
    assert msgspec.json.encode(report)
    again = run(repository, snapshot, tmp_path / "target")
    assert again.skipped == report.skipped, "also where nothing is left to do"
