"""The directory store: durable before it returns, atomic when killed, honest when the disk is not."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from outlast.clock import SYSTEM_CLOCK, ManualClock
from outlast.errors import Corrupt, Exists, InvalidInput, NotFound, OutlastError, Refused, StoreFull, Unavailable
from outlast.store.base import Buffer
from outlast.store.disk import Disk
from outlast.store.local import BOUNCE_BYTES, DIRECT_BYTES_MIN, LocalStore

MIB = 1 << 20


def temporary_files(root: Path) -> list[str]:
    return os.listdir(root / "tmp")


def noise(size: int) -> bytes:
    return ManualClock(seed=7).random_bytes(size)


class FailingDisk(Disk):
    """Raises `OSError(code)` from the named call, after letting `after` of them through."""

    def __init__(self, call: str, code: int, after: int = 0) -> None:
        self._left = after
        original = getattr(self, call)

        def failing(*arguments: object) -> object:
            if self._left == 0:
                raise OSError(code, os.strerror(code))
            self._left -= 1
            return original(*arguments)

        setattr(self, call, failing)


class PowerCutDisk(Disk):
    """Remembers what a power cut would leave: entries of fsynced folders, bytes of fsynced files."""

    def __init__(self) -> None:
        self.entries: dict[str, bool] = {}
        self.dirty: set[int] = set()
        self.published_dirty: list[str] = []

    def _made(self, path: str) -> None:
        self.entries[path] = False

    def mkdir(self, path: str, mode: int = 0o777) -> None:
        super().mkdir(path, mode)
        self._made(path)

    def open_temp(self, path: str) -> int:
        self._made(path)
        fd = super().open_temp(path)
        self.dirty.add(os.fstat(fd).st_ino)
        return fd

    def write(self, fd: int, block: Buffer, offset: int) -> int:
        self.dirty.add(os.fstat(fd).st_ino)
        return super().write(fd, block, offset)

    def truncate(self, fd: int, size_bytes: int) -> None:
        self.dirty.add(os.fstat(fd).st_ino)
        super().truncate(fd, size_bytes)

    def fsync_file(self, fd: int) -> None:
        super().fsync_file(fd)
        self.dirty.discard(os.fstat(fd).st_ino)

    def link(self, source: str, target: str) -> None:
        if os.stat(source).st_ino in self.dirty:
            self.published_dirty.append(target)
        super().link(source, target)
        self._made(target)

    def replace(self, source: str, target: str) -> None:
        if os.stat(source).st_ino in self.dirty:
            self.published_dirty.append(target)
        super().replace(source, target)
        self._made(target)

    def fsync_dir(self, path: str) -> None:
        super().fsync_dir(path)
        for entry in self.entries:
            if os.path.dirname(entry) == path:
                self.entries[entry] = True

    def survives(self, path: str) -> bool:
        return self.entries.get(path, True) and (path == "/" or self.survives(os.path.dirname(path)))


@pytest.mark.parametrize("size", [0, 100, DIRECT_BYTES_MIN + 5, BOUNCE_BYTES + 1])
@pytest.mark.parametrize("verb", ["put", "put_if_absent"])
def test_what_put_returned_for_survives_a_power_cut(tmp_path: Path, size: int, verb: str) -> None:
    disk = PowerCutDisk()
    root = tmp_path / "new" / "root"
    store = LocalStore(str(root), disk=disk)
    for name in ["log/0001", "packs/aa/bb", "packs/aa/cc", "packs/dd/ee", "format"]:
        getattr(store, verb)(name, [b"x" * size])
        assert disk.survives(str(root / name)), f"{name} is lost"
    assert disk.published_dirty == [], "a name was given to bytes that were not durable"


def test_a_folder_made_by_another_process_is_made_durable_too(tmp_path: Path) -> None:
    disk = PowerCutDisk()
    for folder in [tmp_path / "root", tmp_path / "root" / "packs", tmp_path / "root" / "packs" / "aa"]:
        disk.mkdir(str(folder))  # by a process that was not quick enough to fsync
    LocalStore(str(tmp_path / "root"), disk=disk).put_if_absent("packs/aa/bb", [b"x"])
    assert disk.survives(str(tmp_path / "root" / "packs" / "aa" / "bb"))


def test_who_is_told_exists_finds_a_durable_object(tmp_path: Path) -> None:
    winner, loser = PowerCutDisk(), PowerCutDisk()
    winner.fsync_dir = lambda path: None  # type: ignore[method-assign]  # killed before it got there
    loser.entries = winner.entries
    LocalStore(str(tmp_path), disk=winner).put_if_absent("log/0001", [b"winner"])
    assert not winner.survives(str(tmp_path / "log" / "0001"))
    with pytest.raises(Exists):
        LocalStore(str(tmp_path), disk=loser).put_if_absent("log/0001", [b"loser"])
    assert loser.survives(str(tmp_path / "log" / "0001"))


def sizes() -> Iterator[int]:
    for boundary in (4096, DIRECT_BYTES_MIN, BOUNCE_BYTES, 2 * BOUNCE_BYTES):
        yield from (boundary - 1, boundary, boundary + 1)
    yield DIRECT_BYTES_MIN + 4096
    yield BOUNCE_BYTES + 4095


@pytest.mark.parametrize("size", list(sizes()))
def test_direct_and_buffered_writes_give_the_same_bytes(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = noise(size)
    cuts = sorted(int.from_bytes(noise(5)[n : n + 1], "big") * size // 256 for n in range(5))
    parts = [memoryview(content)[start:end] for start, end in zip([0, *cuts], [*cuts, size], strict=True)]
    LocalStore(str(tmp_path)).put_if_absent("direct", parts)
    monkeypatch.setattr("outlast.store.local._set_direct", lambda fd, direct: False)
    LocalStore(str(tmp_path)).put_if_absent("buffered", parts)
    assert (tmp_path / "direct").read_bytes() == content
    assert (tmp_path / "buffered").read_bytes() == content


def test_big_objects_go_past_the_page_cache(tmp_path: Path) -> None:
    flags = []

    class Watching(Disk):
        def write(self, fd: int, block: Buffer, offset: int) -> int:
            flags.append(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
            return super().write(fd, block, offset)

    store = LocalStore(str(tmp_path), disk=Watching())
    store.put("small", [b"x"])
    assert flags == [0]
    store.put("big", [b"x" * (2 * MIB)])
    if not store._direct:
        pytest.skip("this file system knows no O_DIRECT")
    assert flags == [0, os.O_DIRECT]


def test_a_file_system_that_takes_the_direct_flag_but_not_the_write(tmp_path: Path) -> None:
    class NoDirect(Disk):
        def write(self, fd: int, block: Buffer, offset: int) -> int:
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return super().write(fd, block, offset)

    content = noise(5 * MIB + 77)
    store = LocalStore(str(tmp_path), disk=NoDirect())
    for name in ("first", "second"):
        store.put_if_absent(name, [content])
        assert store.get(name) == content


@pytest.mark.parametrize("step", [777, 4096, 100_000])
def test_partial_writes_are_carried_on(tmp_path: Path, step: int) -> None:
    class Stingy(Disk):
        def write(self, fd: int, block: Buffer, offset: int) -> int:
            return super().write(fd, memoryview(block)[:step], offset)

    for size in (5000, 2 * MIB + 9):
        content = noise(size)
        store = LocalStore(str(tmp_path / str(size)), disk=Stingy())
        store.put("object", [content])
        assert store.get("object") == content


@pytest.mark.parametrize("call", ["open_temp", "write", "fsync_file", "link", "mkdir"])
@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, StoreFull),
        (errno.EDQUOT, StoreFull),
        (errno.EROFS, Refused),
        (errno.EACCES, Refused),
        (errno.EIO, Unavailable),
    ],
)
@pytest.mark.parametrize("size", [10, 6 * MIB])
def test_a_failing_disk_leaves_nothing_behind(
    tmp_path: Path, call: str, code: int, kind: type[OutlastError], size: int
) -> None:
    LocalStore(str(tmp_path)).put("old", [b"unchanged"])
    store = LocalStore(str(tmp_path), disk=FailingDisk(call, code, after=1 if call == "write" and size > MIB else 0))
    with pytest.raises(kind) as caught:
        store.put_if_absent("folder/new", [b"x" * size])
    assert "folder/new" in str(caught.value)
    assert [info.name for info in LocalStore(str(tmp_path)).list("")] == ["old"]
    assert temporary_files(tmp_path) == []


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    with mounted_tmpfs(tmp_path, "6m"):
        store = LocalStore(str(tmp_path))
        store.put_if_absent("first", [b"1" * (4 * MIB)])
        with pytest.raises(StoreFull) as caught:
            store.put_if_absent("second", [b"2" * (4 * MIB)])
        assert "Free space" in caught.value.hint
        assert [info.name for info in store.list("")] == ["first"]
        assert temporary_files(tmp_path) == []
        store.delete("first")
        store.put_if_absent("second", [b"2" * (4 * MIB)])


@contextmanager
def mounted_tmpfs(where: Path, size: str) -> Iterator[None]:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(where)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(where)], check=True)


def test_a_file_size_limit_counts_as_full(tmp_path: Path) -> None:
    program = (
        "import resource, sys; from outlast.store.local import LocalStore; from outlast.errors import StoreFull\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))\n"
        "try: LocalStore(sys.argv[1]).put_if_absent('big', [b'x' * (5 << 20)])\n"
        "except StoreFull as exc: print(exc)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "no room left to write big" in done.stdout
    assert temporary_files(tmp_path) == []


def create_each(root: str, count: int, worker: int, won: multiprocessing.Queue[list[int]]) -> None:
    store, mine = LocalStore(root), []
    for number in range(count):
        try:
            store.put_if_absent(f"log/{number:04d}", [f"{worker}".encode()])
            mine.append(number)
        except Exists:
            continue
    won.put(mine)


def test_of_two_processes_one_wins_each_name(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    won: multiprocessing.Queue[list[int]] = context.Queue()
    workers = [context.Process(target=create_each, args=(str(tmp_path), 200, n, won)) for n in range(2)]
    for worker in workers:
        worker.start()
    claims = [won.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(claims[0] + claims[1]) == list(range(200))
    assert len(list(LocalStore(str(tmp_path)).list("log/"))) == 200


ENDLESS_WRITER = """
import hashlib, itertools, random, sys
from outlast.store.local import LocalStore
store, dice = LocalStore(sys.argv[1]), random.Random(int(sys.argv[2]))
print("ready", flush=True)
for number in itertools.count():
    content = dice.randbytes(dice.choice([100, 1 << 20, 3_000_000, 9_000_000]))
    store.put_if_absent(f"{hashlib.sha256(content).hexdigest()}", [content])
    store.put("current", [content, hashlib.sha256(content).digest()])
"""


def test_kill_9_in_mid_put_leaves_nothing_half_visible(tmp_path: Path) -> None:
    for attempt in range(8):
        writer = subprocess.Popen(
            [sys.executable, "-c", ENDLESS_WRITER, str(tmp_path), str(attempt)], stdout=subprocess.PIPE
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        SYSTEM_CLOCK.sleep(0.01 + 0.15 * noise(8)[attempt] / 256)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        store = LocalStore(str(tmp_path))
        for info in store.list(""):
            content = store.get(info.name)
            if info.name == "current":
                assert hashlib.sha256(content[:-32]).digest() == content[-32:]
            else:
                assert hashlib.sha256(content).hexdigest() == info.name
    store.put_if_absent("after", [b"works"])


def test_leftovers_of_killed_processes_go_after_a_day(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    old, young = "a" * 32, "b" * 32
    for name, age_seconds in [(old, 25 * 3600), (young, 23 * 3600)]:
        (tmp_path / "tmp" / name).write_bytes(b"x")
        then = SYSTEM_CLOCK.now_ns() - age_seconds * 10**9
        os.utime(tmp_path / "tmp" / name, ns=(then, then))
    store = LocalStore(str(tmp_path), clock=ManualClock())  # a host clock that is years off changes nothing
    assert list(store.list("")) == []
    assert sorted(temporary_files(tmp_path)) == [old, young], "a read must not clean up"
    store.put("object", [b"x"])
    assert temporary_files(tmp_path) == [young]


def test_only_our_own_leftovers_are_ever_removed(tmp_path: Path) -> None:
    """Once a repository in the root directory emptied /tmp."""
    LocalStore(str(tmp_path)).put("format", [b"x"])
    for name in ("thesis.tex", "A" * 32, "a" * 33, ".hidden"):
        (tmp_path / "tmp" / name).write_bytes(b"precious")
        os.utime(tmp_path / "tmp" / name, ns=(0, 0))
    (tmp_path / "tmp" / ("c" * 32)).mkdir()
    os.utime(tmp_path / "tmp" / ("c" * 32), ns=(0, 0))
    before = sorted(temporary_files(tmp_path))
    LocalStore(str(tmp_path)).put("object", [b"x"])
    assert sorted(temporary_files(tmp_path)) == before


def test_no_store_is_begun_around_a_foreign_folder_tmp(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / "thesis.tex").write_bytes(b"precious")
    with pytest.raises(Refused, match=r"is not empty \(.*/tmp/thesis.tex is there\); nothing was changed"):
        LocalStore(str(tmp_path)).put_if_absent("format", [b"x"])
    assert [path.name for path in tmp_path.rglob("*")] == ["tmp", "thesis.tex"]


def test_nothing_is_created_before_the_first_put(tmp_path: Path) -> None:
    store = LocalStore(os.fsencode(tmp_path / "root"))
    assert list(store.list("")) == []
    with pytest.raises(NotFound):
        store.get("format")
    store.delete("format")
    assert not (tmp_path / "root").exists()


def test_a_root_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    with pytest.raises(InvalidInput, match="file is a file where a directory is needed"):
        LocalStore(str(tmp_path / "file")).put("format", [b"x"])
    assert (tmp_path / "file").read_bytes() == b"precious"
    assert list(LocalStore(str(tmp_path / "file")).list("")) == []


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "victim").write_bytes(b"precious")
    root = tmp_path / "root"
    root.mkdir()
    (root / "packs").symlink_to(outside)
    (root / "object").symlink_to(outside / "victim")
    store = LocalStore(str(root))
    with pytest.raises(Refused, match="symbolic link"):
        store.put("packs/victim", [b"x"])
    with pytest.raises(Exists):
        store.put_if_absent("object", [b"x"])
    with pytest.raises(NotFound):
        store.get("object")
    store.put("object", [b"new"])
    assert (outside / "victim").read_bytes() == b"precious"
    assert [info.name for info in store.list("")] == ["object"]
    assert list(store.list("packs/")) == []


def test_the_folder_of_unfinished_writes_is_out_of_reach(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    store.put("object", [b"x"])
    (tmp_path / "tmp" / "unfinished").write_bytes(b"x")
    assert [info.name for info in store.list("")] == ["object"]
    assert list(store.list("tmp/")) == []
    for call in (lambda: store.get("tmp/unfinished"), lambda: store.put("tmp/x", [b""])):
        with pytest.raises(InvalidInput):
            call()


def test_a_listing_shows_objects_only(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    store.put("packs/aa", [b"x"])
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "lost+found" / "x").write_bytes(b"x")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    assert [info.name for info in store.list("")] == ["packs/aa"]
    with pytest.raises(NotFound):
        store.get("pipe")
    with pytest.raises(NotFound):
        store.get("packs")
    assert list(store.list("../")) == []


def test_a_listing_goes_on_when_objects_vanish(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    for name in ("a/1", "a/2", "b/1", "c"):
        store.put(name, [b"x"])
    found = store.list("")
    assert next(found).name == "a/1"
    store.delete("a/2")
    store.delete("b/1")
    (tmp_path / "b").rmdir()
    assert [info.name for info in found] == ["c"]


def test_an_inner_folder_that_somebody_removed_is_made_again(tmp_path: Path) -> None:
    disk = PowerCutDisk()
    root = tmp_path / "root"
    store = LocalStore(str(root), disk=disk)
    store.put("packs/aa", [b"x"])
    subprocess.run(["rm", "-r", str(root / "packs")], check=True)
    disk.entries.clear()
    store.put("packs/bb", [b"y"])
    assert store.get("packs/bb") == b"y"
    assert disk.survives(str(root / "packs" / "bb"))


def assert_gone(store: LocalStore) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.put("packs/bb", [b"y"]),
        lambda: store.put_if_absent("log/2", [b"y"]),
        lambda: store.get("format"),
        lambda: store.stat("format"),
        lambda: list(store.list("")),
        lambda: store.delete("format"),
    ]
    for call in calls:
        with pytest.raises(Unavailable, match="removed or unmounted; nothing was written elsewhere"):
            call()


@pytest.mark.parametrize("first", ["put", "get", "stat", "list"])
@pytest.mark.parametrize("leave", ["nothing", "an empty folder"])
def test_a_root_that_disappears_is_never_made_again(tmp_path: Path, first: str, leave: str) -> None:
    root = tmp_path / "root"
    LocalStore(str(root)).put("format", [b"x"])
    store = LocalStore(str(root))
    if first == "put":
        store.put("format", [b"x"])
    elif first == "list":
        assert [info.name for info in store.list("")] == ["format"]
    else:
        getattr(store, first)("format")
    root.rename(tmp_path / "elsewhere")  # keeps the inode number from being used again
    if leave == "an empty folder":
        root.mkdir()
    assert_gone(store)
    assert not root.exists() or list(root.iterdir()) == []
    assert sorted(each.name for each in (tmp_path / "elsewhere").iterdir()) == ["format", "tmp"]


def test_a_folder_of_unfinished_writes_that_disappears_is_never_made_again(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    store.put("format", [b"x"])
    (tmp_path / "tmp").rmdir()
    with pytest.raises(Unavailable, match="removed or unmounted"):
        store.put("packs/bb", [b"y"])
    assert [each.name for each in tmp_path.iterdir()] == ["format"]


def test_a_disk_that_goes_in_the_middle_of_a_put_gets_no_success(tmp_path: Path) -> None:
    root = tmp_path / "root"

    class Pulled(Disk):
        armed = False

        def link(self, source: str, target: str) -> None:
            if self.armed:
                root.rename(tmp_path / "elsewhere")
                for folder in ("tmp", "packs"):
                    (root / folder).mkdir(parents=True)
                (root / "tmp" / os.path.basename(source)).write_bytes(b"x")
            super().link(source, target)

    disk = Pulled()
    store = LocalStore(str(root), disk=disk)
    store.put("packs/aa", [b"x"])
    disk.armed = True
    with pytest.raises(Unavailable, match="removed or unmounted"):
        store.put_if_absent("packs/bb", [b"y"])


def test_an_unmounted_store_is_not_written_under_its_mount_point(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    with mounted_tmpfs(tmp_path, "6m"):
        store = LocalStore(str(tmp_path))
        store.put("format", [b"x"])
    assert_gone(store)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_without_the_folder_of_unfinished_writes_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "format").write_bytes(b"x")
    store = LocalStore(str(tmp_path))
    assert store.get("format") == b"x"
    store.put("packs/bb", [b"y"])
    assert store.get("packs/bb") == b"y"


def test_what_is_stored_is_for_its_owner_alone(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        store = LocalStore(str(tmp_path / "above" / "root"))
        store.put("format", [b"x"])
        store.put_if_absent("packs/aa/bb", [b"x" * (2 * MIB)])
    finally:
        os.umask(umask)
    root = tmp_path / "above" / "root"
    modes = {str(path.relative_to(root)): path.stat().st_mode & 0o777 for path in [root, *root.rglob("*")]}
    files = {"format": 0o600, "packs/aa/bb": 0o600}
    assert modes == dict.fromkeys((".", "tmp", "packs", "packs/aa"), 448) | files
    assert root.parent.stat().st_mode & 0o777 == 0o755, "what is above the store is as the user has it"


def test_a_link_whose_reply_was_lost_is_ours(tmp_path: Path) -> None:
    class LosesReplies(Disk):
        def link(self, source: str, target: str) -> None:
            super().link(source, target)
            raise FileExistsError(errno.EEXIST, "File exists", target)

    store = LocalStore(str(tmp_path), disk=LosesReplies())
    store.put_if_absent("object", [b"ours"])
    assert store.get("object") == b"ours"
    with pytest.raises(Exists):
        LocalStore(str(tmp_path)).put_if_absent("object", [b"ours"])


def test_a_file_system_that_cannot_create_safely_is_refused(tmp_path: Path) -> None:
    class Fat(Disk):
        def link(self, source: str, target: str) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        def rename_noreplace(self, source: str, target: str) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    with pytest.raises(Refused, match="two writers could overwrite each other"):
        LocalStore(str(tmp_path), disk=Fat()).put_if_absent("format", [b"x"])
    assert temporary_files(tmp_path) == []


def test_a_lying_length_costs_no_memory(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    store.put("object", [b"short"])
    with pytest.raises(Corrupt, match="has 5 bytes"):
        store.get_ranges("object", [(0, 1 << 60)])
    with pytest.raises(InvalidInput):
        store.get_ranges("object", [(-1, 2)])


def test_a_name_in_the_way_is_said(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    store.put("a", [b"x"])
    store.put("folder/b", [b"x"])
    with pytest.raises(InvalidInput):
        store.put("a/b", [b"x"])
    with pytest.raises(InvalidInput):
        store.put("folder", [b"x"])
    with pytest.raises(NotFound):
        store.get("a/b")
    assert store.get("a") == b"x"


def test_many_small_parts(tmp_path: Path) -> None:
    part = bytes(range(256)) * 4
    parts: list[Buffer] = [part, memoryview(part), bytearray(part)] * 7000 + [b"", b"end"]
    LocalStore(str(tmp_path)).put_if_absent("object", parts)
    assert (tmp_path / "object").read_bytes() == part * 21000 + b"end"
