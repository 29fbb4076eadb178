"""What a power cut may leave of a directory: every legal outcome, after every system call.

`RecordingDisk` goes below a `LocalStore` and writes down each call that changes something.
`cuts` then plays the trace back; at each point it knows what the disk has promised and what it has
not, and enumerates everything in between. The model is that of POSIX, which promises least:

* Bytes of a file are durable after an `fsync` of that file. Later ones may be lost, torn (only the
  first half arrived), zero, or right behind a hole of zeros: blocks are written in any order.
* A name in a directory is durable after an `fsync` of that directory. What was made, removed or renamed
  since may have happened or not, **each name on its own**, and at each state that the name had since. A
  rename replaces what the target's name stands for at once; its two names are two names.
* An `fsync` of a file says nothing about its name, and one of a directory nothing about the bytes
  behind its names, nor about the directory's own name.

File systems keep promises of their own on top (ext4 orders renames after data, for one); code that
is safe here needs none of them (Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014).

>>> disk = RecordingDisk("/srv/repository")                               # doctest: +SKIP
>>> LocalStore("/srv/repository", disk=disk).put("name", [b"bytes"])      # doctest: +SKIP
>>> for number, remains in cuts(disk.initial, disk.trace):                                      # doctest: +SKIP
...     for tree in remains.outcomes():
...         materialise(tree, "/srv/what-is-left")
"""

from __future__ import annotations

import itertools
import os
import stat
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from math import prod
from typing import NamedTuple

from outlast.clock import Clock
from outlast.store.base import Buffer
from outlast.store.disk import Disk

Tree = dict[str, bytes | None]
"""What is in a directory, by path relative to it: the bytes of files, None for directories."""


class Step(NamedTuple):
    """One recorded call. `file` numbers the files of a trace in the order in which they were opened."""

    call: str
    path: str = ""
    target: str = ""
    file: int = 0
    offset: int = 0
    data: bytes = b""

    def __str__(self) -> str:
        what = [self.path or f"file {self.file}", self.target, f"{len(self.data)} bytes" if self.data else ""]
        return f"{self.call}({', '.join(part for part in what if part)})"


class RecordingDisk(Disk):
    """Makes every change for real below `folder`, which must exist, and records it in `trace`.

    What is in `folder` at the beginning counts as durable. An fsync is recorded and not passed on: the
    real disk's promises are of no interest here. Changes outside of `folder` are made and not recorded.
    Any number of stores may share one disk, as processes do; `trace` has their calls in the order
    in which they took effect.
    """

    def __init__(self, folder: str) -> None:
        self.folder = os.path.abspath(folder)
        self.initial = read_tree(self.folder)
        self.trace: list[Step] = []
        self._files: dict[int, int] = {}
        self._opened = 0
        self._lock = threading.RLock()

    def mkdir(self, path: str, mode: int) -> None:
        with self._lock:
            super().mkdir(path, mode)
            self._note("mkdir", path)

    def open_temp(self, path: str) -> int:
        with self._lock:
            fd = super().open_temp(path)
            self._opened += 1
            self._files[fd] = self._opened
            self._note("open_temp", path, file=self._opened)
            return fd

    def write(self, fd: int, block: Buffer, offset: int) -> int:
        with self._lock:
            count = super().write(fd, block, offset)
            data = bytes(memoryview(block).cast("B")[:count])
            self.trace.append(Step("write", file=self._files[fd], offset=offset, data=data))
            return count

    def truncate(self, fd: int, size_bytes: int) -> None:
        with self._lock:
            super().truncate(fd, size_bytes)
            self.trace.append(Step("truncate", file=self._files[fd], offset=size_bytes))

    def fsync_file(self, fd: int) -> None:
        with self._lock:
            self.trace.append(Step("fsync_file", file=self._files[fd]))

    def close(self, fd: int) -> None:
        with self._lock:
            super().close(fd)
            self.trace.append(Step("close", file=self._files.pop(fd)))

    def link(self, source: str, target: str) -> None:
        with self._lock:
            super().link(source, target)
            self._note("link", source, target)

    def rename_noreplace(self, source: str, target: str) -> None:
        with self._lock:
            super().rename_noreplace(source, target)
            self._note("rename", source, target)

    def replace(self, source: str, target: str) -> None:
        with self._lock:
            super().replace(source, target)
            self._note("rename", source, target)

    def unlink(self, path: str) -> None:
        with self._lock:
            super().unlink(path)
            self._note("unlink", path)

    def fsync_dir(self, path: str) -> None:
        with self._lock:
            self._note("fsync_dir", path)

    def _note(self, call: str, path: str, target: str = "", file: int = 0) -> None:
        if (path + "/").startswith(self.folder + "/"):
            self.trace.append(Step(call, self._relative(path), self._relative(target), file))

    def _relative(self, path: str) -> str:
        return path[len(self.folder) + 1 :]


class UnsyncedFile:
    """The bytes of a file: those that are durable, and what was done to them since."""

    def __init__(self, durable: bytes) -> None:
        self._durable = durable
        self._pending: list[tuple[int, bytes | None]] = []
        self._variants: list[bytes] = [durable]

    def change(self, offset: int, data: bytes | None) -> None:
        """Write `data` at `offset`, or, when it is None, cut there."""
        self._pending.append((offset, data))
        self._variants = []

    def sync(self) -> None:
        self._durable = self._applied(self._pending)
        self._pending = []
        self._variants = [self._durable]

    @property
    def variants(self) -> list[bytes]:
        """Every content that may be found after a cut: nothing of what is pending first, all of it last."""
        if not self._variants:
            half = -(-len(self._pending) // 2)
            *first, (at, middle) = self._pending[:half]
            found = [
                self._durable,
                self._applied([*first, (at, middle and middle[: len(middle) // 2])]),
                self._applied([(offset, data and bytes(len(data))) for offset, data in self._pending]),
                self._applied([(offset, data and _with_hole(data)) for offset, data in self._pending]),
                self._applied(self._pending),
            ]
            self._variants = list(dict.fromkeys(reversed(found)))[::-1]
        return self._variants

    def _applied(self, changes: list[tuple[int, bytes | None]]) -> bytes:
        content = bytearray(self._durable)
        for offset, data in changes:
            if data is None:
                content[offset:] = b""
            else:
                content.extend(bytes(max(0, offset - len(content))))
                content[offset : offset + len(data)] = data
        return bytes(content)


def _with_hole(data: bytes) -> bytes:
    half = len(data) // 2
    return bytes(half) + data[half:]


class _Folder:
    """A directory: for each name what it stands for, the durable meaning first, the present one last."""

    def __init__(self) -> None:
        self.names: dict[str, list[_Node]] = {}

    def set(self, name: str, node: _Node) -> None:
        self.names.setdefault(name, [None]).append(node)

    def sync(self) -> None:
        self.names = {name: [meanings[-1]] for name, meanings in self.names.items() if meanings[-1] is not None}


_Node = UnsyncedFile | _Folder | None


class Remains:
    """What a power cut at one point of a trace may leave. `skip`: folders whose content is left out."""

    def __init__(self, initial: Tree, skip: Collection[str] = ()) -> None:
        self._root = _Folder()
        self._skip = frozenset(f"{path}/" for path in skip)
        self._files: dict[int, UnsyncedFile] = {}
        for path, content in sorted(initial.items()):
            folder, name = self._place(path)
            folder.names[name] = [_Folder() if content is None else UnsyncedFile(content)]

    def apply(self, step: Step) -> None:
        """Go on by one recorded call."""
        match step.call:
            case "mkdir":
                self._set(step.path, _Folder())
            case "open_temp":
                self._files[step.file] = UnsyncedFile(b"")
                self._set(step.path, self._files[step.file])
            case "write":
                self._files[step.file].change(step.offset, step.data)
            case "truncate":
                self._files[step.file].change(step.offset, None)
            case "fsync_file":
                self._files[step.file].sync()
            case "link":
                self._set(step.target, self._now(step.path))
            case "rename":
                self._set(step.target, self._now(step.path))
                self._set(step.path, None)
            case "unlink":
                self._set(step.path, None)
            case "fsync_dir":
                folder = self._now(step.path)
                assert isinstance(folder, _Folder)
                folder.sync()
            case "close":
                pass
            case other:
                raise AssertionError(f"{other} is no call of a disk")

    def count(self) -> int:
        """How many outcomes there are, not counting which of them are alike."""
        return self._count(self._root, "")

    def outcomes(self) -> Iterator[Tree]:
        """Every outcome. A file with several names that was not synced is taken apart under each of them."""
        return self._outcomes(self._root, "")

    def extremes(self) -> tuple[Tree, Tree]:
        """What is left when nothing is lost, as when only the process dies; and when all is lost that may be."""
        return self._drawn(self._root, "", lambda count: count - 1), self._drawn(self._root, "", lambda count: 0)

    def sample(self, clock: Clock) -> Tree:
        """One outcome, drawn by the clock's randomness."""
        return self._drawn(self._root, "", lambda count: int.from_bytes(clock.random_bytes(4), "big") % count)

    def _outcomes(self, folder: _Folder, base: str) -> Iterator[Tree]:
        fixed: Tree = {}
        choices: list[list[Tree]] = []
        for name, node_choices in self._choices(folder, base):
            found = [tree for node in node_choices for tree in self._trees(node, base + name)]
            if len(found) == 1:
                fixed |= found[0]
            else:
                choices.append(found)
        for chosen in itertools.product(*choices):
            tree = dict(fixed)
            for part in chosen:
                tree |= part
            yield tree

    def _trees(self, node: _Node, path: str) -> list[Tree]:
        if node is None:
            return [{}]
        if isinstance(node, UnsyncedFile):
            return [{path: content} for content in node.variants]
        return [{path: None, **tree} for tree in self._outcomes(node, path + "/")]

    def _count(self, folder: _Folder, base: str) -> int:
        def of(node: _Node, path: str) -> int:
            if isinstance(node, _Folder):
                return self._count(node, path + "/")
            return 1 if node is None else len(node.variants)

        return prod(sum(of(node, base + name) for node in nodes) for name, nodes in self._choices(folder, base))

    def _drawn(self, folder: _Folder, base: str, draw: Callable[[int], int]) -> Tree:
        tree: Tree = {}
        for name, meanings in folder.names.items() if base not in self._skip else ():
            node = meanings[draw(len(meanings))]
            if isinstance(node, UnsyncedFile):
                tree[base + name] = node.variants[draw(len(node.variants))]
            elif node is not None:
                tree[base + name] = None
                tree |= self._drawn(node, f"{base}{name}/", draw)
        return tree

    def _choices(self, folder: _Folder, base: str) -> Iterator[tuple[str, list[_Node]]]:
        """Each name with what it may stand for after the cut, every meaning once."""
        for name, meanings in folder.names.items() if base not in self._skip else ():
            yield name, list({id(node): node for node in meanings}.values())

    def _set(self, path: str, node: _Node) -> None:
        folder, name = self._place(path)
        folder.set(name, node)

    def _now(self, path: str) -> UnsyncedFile | _Folder:
        if not path:
            return self._root
        folder, name = self._place(path)
        node = folder.names[name][-1]
        assert node is not None, path
        return node

    def _place(self, path: str) -> tuple[_Folder, str]:
        head, _, name = path.rpartition("/")
        folder = self._now(head)
        assert isinstance(folder, _Folder)
        return folder, name


def cuts(initial: Tree, trace: Sequence[Step], skip: Collection[str] = ()) -> Iterator[tuple[int, Remains]]:
    """(how many steps were made, what may remain) before the first step, and after each.

    It is one object that goes along: take its outcomes before asking for the next. A trace may be changed
    before it is played, to learn whether a step, or the order of two, is needed.
    """
    remains = Remains(initial, skip)
    yield 0, remains
    for number, step in enumerate(trace, 1):
        remains.apply(step)
        yield number, remains


def read_tree(folder: str) -> Tree:
    """What is in a directory. Raises `ValueError` where there is more than files and directories."""
    tree: Tree = {}
    for where, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = os.path.join(where, name)
            mode = os.lstat(path).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise ValueError(f"{path} is neither a file nor a directory")
            if stat.S_ISREG(mode):
                with open(path, "rb") as file:
                    tree[path[len(folder) + 1 :]] = file.read()
            else:
                tree[path[len(folder) + 1 :]] = None
    return tree


def materialise(tree: Tree, folder: str) -> None:
    """Make the directory `folder`, which must not exist, with this content."""
    os.mkdir(folder)
    for path, content in sorted(tree.items()):
        if content is None:
            os.mkdir(f"{folder}/{path}")
        else:
            with open(f"{folder}/{path}", "xb") as file:
                file.write(content)
