"""A folder reached only through descriptors, so that no symlink inside it is ever followed.

Paths are bytes relative to the folder, "/" between parts; `.` is the folder itself.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import stat
import threading
from types import TracebackType
from typing import Any

from outlast.records import Entry

_CACHED_PER_THREAD = 32
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2
_AT_FDCWD = -100

PRIVATE = 0o700


class Folder:
    """Operations below one folder. Every thread keeps its own few open descriptors of folders."""

    def __init__(self, path: bytes) -> None:
        """Raises `OSError`, also when `path` itself is a symlink."""
        self.path = path
        self.fd = os.open(path, _FOLDER)
        self._caches: dict[int, dict[bytes, int]] = {}

    def __enter__(self) -> Folder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
        os.close(self.fd)

    def release(self) -> None:
        """Close the descriptors of folders inside; call it when no other thread is at work."""
        caches, self._caches = self._caches, {}
        for cache in caches.values():
            for fd in cache.values():
                os.close(fd)

    def place(self, path: bytes) -> tuple[bytes, int]:
        """(name, descriptor of the folder it is in): the arguments of calls that take `dir_fd`."""
        head, _, name = path.rpartition(b"/")
        return name, self._folder(head) if head else self.fd

    def _folder(self, path: bytes) -> int:
        cache = self._caches.get(threading.get_ident())
        if cache is None:
            cache = self._caches.setdefault(threading.get_ident(), {})
        found = cache.get(path)
        if found is not None:
            return found
        known, fd = path, self.fd
        while known:
            known = known.rpartition(b"/")[0]
            if known in cache:
                fd = cache[known]
                break
        for name in path[len(known) :].lstrip(b"/").split(b"/"):
            known = known + b"/" + name if known else name
            fd = cache[known] = os.open(name, _FOLDER, dir_fd=fd)
            if len(cache) > _CACHED_PER_THREAD:
                os.close(cache.pop(next(iter(cache))))
        return fd

    def status(self, path: bytes) -> os.stat_result | None:
        """lstat(2), or None where there is nothing."""
        if path == b".":
            return os.fstat(self.fd)
        try:
            name, folder = self.place(path)
            return os.stat(name, dir_fd=folder, follow_symlinks=False)
        except OSError as exc:
            if exc.errno in _ABSENT:
                return None
            raise

    def open_file(self, path: bytes, flags: int, mode: int = 0o600) -> int:
        name, folder = self.place(path)
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, mode, dir_fd=folder)

    def read_link(self, path: bytes) -> bytes:
        name, folder = self.place(path)
        return os.readlink(name, dir_fd=folder)

    def make_folder(self, path: bytes) -> None:
        """Make sure that a folder which we may write into is there, whatever was in its place."""
        if path == b".":
            return
        name, folder = self.place(path)
        try:
            os.mkdir(name, PRIVATE, dir_fd=folder)
        except FileExistsError:
            found = self.status(path)
            if found is None or not stat.S_ISDIR(found.st_mode):
                self.remove(path)
                os.mkdir(name, PRIVATE, dir_fd=folder)
                return
            if stat.S_IMODE(found.st_mode) != PRIVATE:
                # Safe against a link put there meanwhile only because nobody else may write here.
                os.chmod(name, PRIVATE, dir_fd=folder)

    def remove(self, path: bytes) -> None:
        """Remove a file, a link or a whole folder; nothing there is fine."""
        name, folder = self.place(path)
        try:
            os.unlink(name, dir_fd=folder)
        except FileNotFoundError:
            return
        except OSError as exc:
            if exc.errno not in {errno.EISDIR, errno.EPERM}:
                raise
            remove_tree(name, folder)

    def names(self, path: bytes) -> list[bytes]:
        """What is directly in a folder."""
        fd = self.fd if path in (b"", b".") else self._folder(path)
        return [os.fsencode(name) for name in os.listdir(fd)]


def remove_tree(path: bytes, dir_fd: int | None = None) -> None:
    """Remove a folder with everything in it, read-only folders included; follows no symlinks.

    Raises `OSError` (EXDEV), with nothing removed, where something is mounted below it: the files
    there belong to another place.
    """
    mine = os.geteuid() != 0
    if mine:
        os.chmod(path, PRIVATE, dir_fd=dir_fd)
    top = os.open(path, _FOLDER, dir_fd=dir_fd)
    try:
        device = os.fstat(top).st_dev
        mounted = mount_below(b"/proc/self/fd/%d" % top)
        for where, folders, _, fd in os.fwalk(b".", dir_fd=top):
            for name in folders:
                found = os.stat(name, dir_fd=fd, follow_symlinks=False)
                if found.st_dev != device:
                    mounted = os.path.join(where, name)
                elif mine and not stat.S_ISLNK(found.st_mode):
                    os.chmod(name, PRIVATE, dir_fd=fd)
            if mounted is not None:
                raise OSError(errno.EXDEV, "something is mounted below it", mounted)
    finally:
        os.close(top)
    shutil.rmtree(path, dir_fd=dir_fd)


def mount_below(path: bytes) -> bytes | None:
    """A mount point below a folder, bind mounts too; None where there is none or no list of them (proc(5))."""
    start = os.path.realpath(path) + b"/"
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            points = [line.split(b" ")[4] for line in file]
    except OSError:
        return None
    for point in points:
        plain = re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), point)
        if plain.startswith(start):
            return plain
    return None


class Metadata:
    """Puts mode, owner and time of an entry on what was restored; remembers what could not be set."""

    def __init__(self) -> None:
        self._owner = os.geteuid(), os.getegid()
        self._may_give = self._owner[0] == 0
        self.failed: list[tuple[str, str]] = []

    def differs(self, entry: Entry, found: os.stat_result) -> bool:
        """Whether mode, time or (where it could be set) owner are not those of the entry."""
        if entry.type != "symlink" and stat.S_IMODE(found.st_mode) != stat.S_IMODE(entry.mode):
            return True
        if self._may_give and (found.st_uid, found.st_gid) != (entry.uid, entry.gid):
            return True
        return found.st_mtime_ns != entry.mtime_ns

    def put_on_file(self, fd: int, entry: Entry) -> None:
        """For an open file or folder that this process made, and that so belongs to it."""
        try:
            if self._may_give and (entry.uid, entry.gid) != self._owner:
                self._give(fd, entry, None)
            os.fchmod(fd, stat.S_IMODE(entry.mode))
            os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
        except OSError as exc:
            self._note(exc, entry, "mode or time")

    def put_on_name(self, name: bytes, folder: int, entry: Entry) -> None:
        """For links, FIFOs and the like, which can't be opened; symlinks are not followed."""
        try:
            if self._may_give and (entry.uid, entry.gid) != self._owner:
                self._give(name, entry, folder)
            if entry.type != "symlink":
                os.chmod(name, stat.S_IMODE(entry.mode), dir_fd=folder)
            os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=folder, follow_symlinks=False)
        except OSError as exc:
            self._note(exc, entry, "mode or time")

    def _give(self, what: int | bytes, entry: Entry, folder: int | None) -> None:
        try:
            if isinstance(what, int):
                os.fchown(what, entry.uid, entry.gid)
            else:
                os.chown(what, entry.uid, entry.gid, dir_fd=folder, follow_symlinks=False)
        except OSError as exc:
            self._note(exc, entry, f"owner {entry.uid}:{entry.gid}")

    def _note(self, exc: OSError, entry: Entry, what: str) -> None:
        if exc.errno in {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS}:
            raise exc
        self.failed.append((entry.path, f"its {what} could not be set: {exc.strerror}"))


def _system() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def begin_writeback(fd: int, offset: int, length: int) -> None:
    """Let the disk start on these bytes now, so that the fsync at the end is short. Linux only, a hint."""
    call = getattr(_system(), "sync_file_range", None)
    if call is not None:
        call(fd, ctypes.c_int64(offset), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)


def sync_at_once(folder: Folder) -> bool:
    """Make the whole file system of the folder durable by one call, syncfs(2); False where there is none."""
    call = getattr(_system(), "syncfs", None)
    if call is None:
        return False
    if call(folder.fd) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), folder.path)
    return True


def sync_everything(folder: Folder) -> None:
    """Make every byte and name below the folder durable: at once, or by fsync of one after the other."""
    if sync_at_once(folder):
        return
    for _, _, names, fd in os.fwalk(b".", dir_fd=folder.fd):
        for name in names:
            if stat.S_ISREG(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
                file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=fd)
                try:
                    os.fsync(file)
                finally:
                    os.close(file)
        os.fsync(fd)


def sync_folder(path: bytes) -> None:
    """Make the names in one folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def exchange(first: bytes, second: bytes) -> bool:
    """Swap two names at one instant; False where the system can't (renameat2(2), RENAME_EXCHANGE)."""
    rename = getattr(_system(), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}:
        return False
    raise OSError(code, os.strerror(code), second)
