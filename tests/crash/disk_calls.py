"""What a restore does to the disk, recorded below Python, and what a power cut may leave of it.

A restore reaches its target through descriptors of folders, by some twenty functions of `os` and two
system calls that Python lacks. Those are the seam: `RecordedCalls` stands in for `os` in the modules
that write to a target, and refuses every function of which it doesn't know whether it changes
anything, so that no new call goes unrecorded. A class of our own between them and `os` would only forward.

The model is that of `outlast.testing.powercut`, with modes, times and links, and with one promise more:
a rename within one folder, and an exchange, change both names at one instant, in a power cut too.
Without that nobody could replace a folder: it might be in two places, or in none.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

from crashing import Killed

from outlast.backup import folder, merge, restore, staging, tensors, verify
from outlast.clock import Clock
from outlast.testing.powercut import Step, UnsyncedFile

MODULES = (folder, merge, restore, staging, tensors, verify)
READING = {
    *("path", "fsencode", "fsdecode", "strerror", "lstat", "stat", "fstat", "listdir", "scandir", "fwalk", "readlink"),
    *("pread", "preadv", "lseek", "statvfs", "dup", "geteuid", "getegid", "getcwdb", "umask", "stat_result"),
}
SYNCING = ("sync_folder", "sync_everything", "_sync")
"""functions that do no more than to sync: what counts is who calls them"""
NOT_MODELLED = {"chown", "fchown"}
"""made, and not recorded: whose a file is changes nothing about what it holds"""

Kind = Literal["file", "folder", "link"]


class Item(NamedTuple):
    """What is behind a name. `content`: bytes of a file, target of a link. `mtime_ns`: None where nobody set it."""

    kind: Kind
    content: bytes
    mode: int
    mtime_ns: int | None
    inode: int

    @property
    def seen(self) -> tuple[Kind, bytes, int, int | None]:
        """What a user can tell: everything but the inode."""
        return self[:4]


Listing = dict[str, Item]
"""What is in a folder, by path relative to it; the folder itself is not in it."""


def read_listing(path: str) -> Listing:
    found: Listing = {}
    for where, folders, names in os.walk(path):
        for name in [*folders, *names]:
            full = os.path.join(where, name)
            found[full[len(path) + 1 :]] = read_item(full)
    return found


def read_item(path: str) -> Item:
    status = os.lstat(path)
    mode = stat.S_IMODE(status.st_mode)
    if stat.S_ISLNK(status.st_mode):
        return Item("link", os.fsencode(os.readlink(path)), 0, status.st_mtime_ns, status.st_ino)
    if stat.S_ISDIR(status.st_mode):
        return Item("folder", b"", mode, status.st_mtime_ns, status.st_ino)
    with open(path, "rb") as file:
        return Item("file", file.read(), mode, status.st_mtime_ns, status.st_ino)


def make_listing(listing: Listing, path: str) -> dict[int, int]:
    """Make the folder `path` with this content; returns which inode each folder has now. One file keeps its names."""
    os.mkdir(path)
    inodes: dict[int, int] = {}
    made: dict[Item, str] = {}
    for name, item in sorted(listing.items()):
        full = f"{path}/{name}"
        if item in made:
            os.link(made[item], full, follow_symlinks=False)
        elif item.kind == "folder":
            os.mkdir(full)
            inodes[item.inode] = os.lstat(full).st_ino
        elif item.kind == "link":
            os.symlink(item.content, full)
        else:
            with open(full, "xb") as file:
                file.write(item.content)
            made[item] = full
    for name, item in sorted(listing.items(), reverse=True):
        full = f"{path}/{name}"
        if item.kind != "link":
            os.chmod(full, item.mode)
        if item.mtime_ns is not None:
            os.utime(full, ns=(item.mtime_ns, item.mtime_ns), follow_symlinks=False)
    return inodes


# -- recording ---------------------------------------------------------------------------------------


class RecordedCalls:
    """Stands in for `os`: makes each change for real, and records those below `folder`. Syncs are not passed on."""

    def __init__(
        self, folder: str, *, has_exchange: bool = True, has_syncfs: bool = True, has_links: bool = True
    ) -> None:
        self.folder = folder
        self.initial = read_listing(folder)
        self.trace: list[Step] = []
        self.sites: dict[int, tuple[str, int]] = {}
        """number of a step -> the module and line that made it"""
        self.changes_left: int | None = None
        self.syncs_to_failure: int | None = None
        self._has_exchange = has_exchange
        self._has_syncfs = has_syncfs
        self._has_links = has_links
        self._fds: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        if name.isupper() or name in READING or name in NOT_MODELLED:
            return getattr(os, name)
        raise AssertionError(f"os.{name} is called: say in tests/crash/disk_calls.py whether it changes anything")

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, restores work with these calls. What a killed one had open is closed at the end."""
        with ExitStack() as stack:
            for module in MODULES:
                stack.enter_context(patch.object(module, "os", self))
            stack.enter_context(patch.object(folder, "shutil", SimpleNamespace(rmtree=self.rmtree)))
            stack.enter_context(patch.object(folder, "_system", self.system))
            stack.enter_context(patch.object(tensors, "open", self.open_as_file, create=True))
            try:
                yield
            finally:
                for fd in list(self._fds):
                    self.close(fd)

    def open(self, path: bytes, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        makes = bool(flags & os.O_CREAT) and not os.path.lexists(self._full(path, dir_fd))
        if makes:
            self._before("open")
        fd = os.open(path, flags, mode, dir_fd=dir_fd)
        self._fds.add(fd)
        if makes:
            found = os.fstat(fd)
            self._note("create", path, dir_fd, file=found.st_ino, offset=stat.S_IMODE(found.st_mode))
        return fd

    def close(self, fd: int) -> None:
        self._fds.discard(fd)
        os.close(fd)

    def open_as_file(self, fd: int, mode: str, buffering: int) -> _AsFile:
        assert (mode, buffering) == ("wb", 0)
        return _AsFile(self, fd)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        self._before("pwrite")
        count = os.pwrite(fd, data, offset)
        self._note("write", fd, offset=offset, data=bytes(memoryview(data).cast("B")[:count]))
        return count

    def copy_file_range(self, source: int, fd: int, count: int, from_offset: int, offset: int) -> int:
        self._before("copy_file_range")
        count = os.copy_file_range(source, fd, count, from_offset, offset)
        self._note("write", fd, offset=offset, data=os.pread(source, count, from_offset))
        return count

    def ftruncate(self, fd: int, size: int) -> None:
        self._before("ftruncate")
        size_before = os.fstat(fd).st_size
        os.ftruncate(fd, size)
        if size < size_before:
            self._note("truncate", fd, offset=size)
        elif size > size_before:
            self._note("write", fd, offset=size_before, data=bytes(size - size_before))

    def fsync(self, fd: int) -> None:
        self._before("fsync")
        if f"{self._full(fd, None)}/".startswith(f"{self.folder}/"):
            self._note("fsync", fd)

    def mkdir(self, path: bytes, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        self._before("mkdir")
        os.mkdir(path, mode, dir_fd=dir_fd)
        found = os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
        self._note("mkdir", path, dir_fd, file=found.st_ino, offset=stat.S_IMODE(found.st_mode))

    def symlink(self, target: bytes, path: bytes, *, dir_fd: int | None = None) -> None:
        self._before("symlink")
        os.symlink(target, path, dir_fd=dir_fd)
        found = os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
        self._note("symlink", path, dir_fd, file=found.st_ino, data=target)

    def link(self, path: bytes, target: bytes, *, follow_symlinks: bool, **fds: int) -> None:
        self._before("link")
        if not self._has_links:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        os.link(path, target, follow_symlinks=follow_symlinks, **fds)
        self._note("link", path, fds.get("src_dir_fd"), self._relative(target, fds.get("dst_dir_fd")))

    def rename(self, path: bytes, target: bytes, **fds: int) -> None:
        self._before("rename")
        before = self._relative(path, fds.get("src_dir_fd"))
        os.rename(path, target, **fds)
        self._step(Step("rename", before, self._relative(target, fds.get("dst_dir_fd"))))

    def unlink(self, path: bytes, *, dir_fd: int | None = None) -> None:
        self._before("unlink")
        os.unlink(path, dir_fd=dir_fd)
        self._note("unlink", path, dir_fd)

    def rmdir(self, path: bytes, *, dir_fd: int | None = None) -> None:
        self._before("rmdir")
        os.rmdir(path, dir_fd=dir_fd)
        self._note("unlink", path, dir_fd)

    def chmod(self, path: bytes, mode: int, *, dir_fd: int | None = None) -> None:
        self._before("chmod")
        os.chmod(path, mode, dir_fd=dir_fd)
        self._note("chmod", path, dir_fd, offset=mode)

    def fchmod(self, fd: int, mode: int) -> None:
        self._before("fchmod")
        os.fchmod(fd, mode)
        self._note("chmod", fd, offset=mode)

    def utime(self, path: bytes | int, *, ns: tuple[int, int], **options: Any) -> None:
        self._before("utime")
        os.utime(path, ns=ns, **options)
        self._note("utime", path, options.get("dir_fd"), offset=ns[1])

    def rmtree(self, path: bytes, dir_fd: int | None = None) -> None:
        """As shutil has it."""
        full = self._full(path, dir_fd)
        for name in sorted(os.listdir(full)):
            inside = os.fsencode(f"{full}/{name}")
            if stat.S_ISDIR(os.lstat(inside).st_mode):
                self.rmtree(inside)
            else:
                self.unlink(inside)
        self.rmdir(os.fsencode(full))

    def system(self) -> SimpleNamespace:
        """What `ctypes` would give, as far as this system is to have it."""
        calls: dict[str, Callable[..., int]] = {"sync_file_range": lambda *arguments: 0}
        if self._has_exchange:
            calls["renameat2"] = self._renameat2
        if self._has_syncfs:
            calls["syncfs"] = self._syncfs
        return SimpleNamespace(**calls)

    def _renameat2(self, at: int, path: bytes, to: int, target: bytes, flags: int) -> int:
        self._before("exchange")
        call = ctypes.CDLL(None, use_errno=True).renameat2
        assert call(at, path, to, target, flags) == 0, os.strerror(ctypes.get_errno())
        self._step(Step("exchange", self._relative(path, None), self._relative(target, None)))
        return 0

    def _syncfs(self, fd: int) -> int:
        try:
            self._before("fsync")
        except OSError as exc:
            ctypes.set_errno(exc.errno or 0)
            return -1
        self._note("syncfs", fd)
        return 0

    def _before(self, call: str) -> None:
        if self.changes_left is not None and call != "fsync":
            if self.changes_left == 0:
                raise Killed
            self.changes_left -= 1
        elif self.changes_left == 0:
            raise Killed
        if self.syncs_to_failure is not None and call == "fsync":
            self.syncs_to_failure -= 1
            if self.syncs_to_failure == -1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    def _full(self, path: bytes | int, dir_fd: int | None) -> str:
        if isinstance(path, int):
            return os.readlink(f"/proc/self/fd/{path}")
        return os.path.normpath(os.path.join(self._full(dir_fd, None) if dir_fd is not None else "", os.fsdecode(path)))

    def _relative(self, path: bytes | int, dir_fd: int | None) -> str:
        full = self._full(path, dir_fd)
        assert f"{full}/".startswith(f"{self.folder}/"), f"{full} is not to be touched"
        return full[len(self.folder) + 1 :]

    def _note(self, call: str, path: bytes | int, dir_fd: int | None = None, target: str = "", **more: Any) -> None:
        relative = self._relative(path, dir_fd)
        if not relative.endswith(" (deleted)"):
            self._step(Step(call, relative, target, **more))

    def _step(self, step: Step) -> None:
        frame = sys._getframe(2)
        while frame.f_code.co_filename in (__file__, folder.__file__) or frame.f_code.co_name in SYNCING:
            assert frame.f_back is not None
            frame = frame.f_back
        module = frame.f_globals.get("__name__", "").rpartition(".")[2]
        self.sites[len(self.trace)] = module, frame.f_lineno
        self.trace.append(step)


class _AsFile:
    """A file object that writes by recorded calls."""

    def __init__(self, calls: RecordedCalls, fd: int) -> None:
        self._calls = calls
        self._fd = fd
        self._at = 0

    def __enter__(self) -> _AsFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._calls.close(self._fd)

    def write(self, data: memoryview) -> int:
        count = self._calls.pwrite(self._fd, data, self._at)
        self._at += count
        return count

    def fileno(self) -> int:
        return self._fd


# -- what a power cut may leave ----------------------------------------------------------------------


class _Node:
    """A file, folder or link: what is durable of it, and what was done since."""

    def __init__(self, item: Item) -> None:
        self.kind = item.kind
        self.inode = item.inode
        self.content = UnsyncedFile(item.content)
        self.attributes = [(item.mode, item.mtime_ns)]
        self.groups: list[_Group] = []

    def items(self) -> list[Item]:
        """All that it may be: nothing of what is pending first, all of it last."""
        found = []
        for at, attributes in enumerate(dict.fromkeys((self.attributes[0], self.attributes[-1]))):
            variants = self.content.variants if at == 0 else dict.fromkeys((self.content.variants[0], self.now))
            found += [Item(self.kind, content, *attributes, self.inode) for content in variants]
        return found

    @property
    def now(self) -> bytes:
        return self.content.variants[-1]

    def sync(self) -> None:
        self.content.sync()
        del self.attributes[:-1]
        lasting = [(name, node) for group in self.groups for name, node in group.now().items() if node is not None]
        self.groups = [_Group((name,), [(node,)]) for name, node in lasting]
        for _, node in lasting:
            if node.kind == "link":  # which no call can sync but that for its folder
                node.sync()

    def touch(self) -> None:
        """It was changed, at a time that nobody has chosen."""
        self.attributes.append((self.attributes[-1][0], None))

    def get(self, name: str) -> _Node | None:
        group = next((each for each in self.groups if name in each.names), None)
        return group.now()[name] if group else None

    def set(self, changes: dict[str, _Node | None]) -> None:
        """Change names of a folder at one instant."""
        groups = [each for each in self.groups if not changes.keys().isdisjoint(each.names)]
        known = {name for each in groups for name in each.names}
        new = [_Group((name,), [(None,)]) for name in changes if name not in known]
        joined = _Group.joined([*groups, *new])
        joined.states.append(tuple({**joined.now(), **changes}.values()))
        self.groups = [each for each in self.groups if each not in groups] + [joined]
        self.touch()


class _Group:
    """Names of a folder that change together, and what they may stand for; what they do now is the last."""

    def __init__(self, names: tuple[str, ...], states: list[tuple[_Node | None, ...]]) -> None:
        self.names = names
        self.states = states

    def now(self) -> dict[str, _Node | None]:
        return dict(zip(self.names, self.states[-1], strict=True))

    @staticmethod
    def joined(groups: Iterable[_Group]) -> _Group:
        parts = list(groups)
        states = [sum(states, ()) for states in itertools.product(*(each.states for each in parts))]
        return _Group(sum((each.names for each in parts), ()), states)


class Leftovers:
    """What a power cut at one point of a trace may leave of a folder."""

    def __init__(self, initial: Listing) -> None:
        self._root = _Node(Item("folder", b"", 0o755, None, 0))
        by_inode: dict[int, _Node] = {}
        for path, item in sorted(initial.items()):
            node = by_inode.setdefault(item.inode, _Node(item))
            parent, name = self._place(path)
            parent.groups.append(_Group((name,), [(node,)]))

    def apply(self, step: Step) -> None:
        match step.call:
            case "create" | "mkdir" | "symlink":
                kind: Kind = {"create": "file", "mkdir": "folder", "symlink": "link"}[step.call]  # type: ignore[assignment]
                self._set(step.path, _Node(Item(kind, step.data, step.offset, None, step.file)))
            case "write" | "truncate":
                node = self._node(step.path)
                node.content.change(step.offset, None if step.call == "truncate" else step.data)
                node.touch()
            case "chmod":
                node = self._node(step.path)
                node.attributes.append((step.offset, node.attributes[-1][1]))
            case "utime":
                node = self._node(step.path)
                node.attributes.append((node.attributes[-1][0], step.offset))
            case "fsync":
                self._node(step.path).sync()
            case "syncfs":
                self._sync_all(self._node(step.path))
            case "link":
                self._set(step.target, self._node(step.path))
            case "unlink":
                self._set(step.path, None)
            case "rename" | "exchange":
                self._move(step)
            case "nothing":
                pass
            case other:
                raise AssertionError(f"{other} is no recorded call")

    def count(self) -> int:
        return self._count(self._root)

    def outcomes(self) -> Iterator[Listing]:
        return self._outcomes(self._root, "")

    def extremes(self) -> tuple[Listing, Listing]:
        """All that was done, and all lost that may be."""
        return self._drawn(self._root, "", lambda count: count - 1), self._drawn(self._root, "", lambda count: 0)

    def sample(self, clock: Clock) -> Listing:
        return self._drawn(self._root, "", lambda count: int.from_bytes(clock.random_bytes(4), "big") % count)

    def _move(self, step: Step) -> None:
        node, other = self._node(step.path), self._find(step.target)
        (parent, name), (new_parent, new_name) = self._place(step.path), self._place(step.target)
        if step.call == "rename" and node.kind != "folder" and parent is not new_parent:
            new_parent.set({new_name: node})
            parent.set({name: None})
            return
        assert parent is new_parent, f"{step}: a folder moves to another one"
        parent.set({name: other if step.call == "exchange" else None, new_name: node})

    def _sync_all(self, node: _Node) -> None:
        node.sync()
        for group in node.groups:
            for inside in group.states[-1]:
                if inside is not None:
                    self._sync_all(inside)

    def _count(self, folder: _Node) -> int:
        def of(node: _Node | None) -> int:
            if node is None:
                return 1
            return len(node.items()) * (self._count(node) if node.kind == "folder" else 1)

        return prod(sum(prod(map(of, state)) for state in set(group.states)) for group in folder.groups)

    def _outcomes(self, folder: _Node, base: str) -> Iterator[Listing]:
        choices: list[list[Listing]] = []
        for group in folder.groups:
            found: list[Listing] = []
            for state in dict.fromkeys(group.states):
                parts = [self._trees(node, base + name) for name, node in zip(group.names, state, strict=True)]
                found += [_united(chosen) for chosen in itertools.product(*parts)]
            choices.append(found)
        for chosen in itertools.product(*choices):
            yield _united(chosen)

    def _trees(self, node: _Node | None, path: str) -> list[Listing]:
        if node is None:
            return [{}]
        if node.kind != "folder":
            return [{path: item} for item in node.items()]
        inside = list(self._outcomes(node, f"{path}/"))
        return [{path: item, **tree} for item in node.items() for tree in inside]

    def _drawn(self, folder: _Node, base: str, draw: Callable[[int], int]) -> Listing:
        found: Listing = {}
        for group in folder.groups:
            state = group.states[draw(len(group.states))]
            for name, node in zip(group.names, state, strict=True):
                if node is not None:
                    items = node.items()
                    found[base + name] = items[draw(len(items))]
                    if node.kind == "folder":
                        found |= self._drawn(node, f"{base}{name}/", draw)
        return found

    def _set(self, path: str, node: _Node | None) -> None:
        folder, name = self._place(path)
        folder.set({name: node})

    def _node(self, path: str) -> _Node:
        node = self._find(path)
        assert node is not None, path
        return node

    def _find(self, path: str) -> _Node | None:
        if not path:
            return self._root
        folder, name = self._place(path)
        return folder.get(name)

    def _place(self, path: str) -> tuple[_Node, str]:
        head, _, name = path.rpartition("/")
        return self._node(head), name


def _united(parts: Iterable[Listing]) -> Listing:
    whole: Listing = {}
    for part in parts:
        whole |= part
    return whole


def cuts(initial: Listing, trace: Iterable[Step]) -> Iterator[tuple[int, Leftovers]]:
    """As `outlast.testing.powercut.cuts`."""
    leftovers = Leftovers(initial)
    yield 0, leftovers
    for number, step in enumerate(trace, 1):
        leftovers.apply(step)
        yield number, leftovers
