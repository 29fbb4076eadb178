"""A store in a directory: what it acknowledges survives kill -9 and a power cut.

An object is written to `<root>/tmp/<random>`, fsynced, published under its name by one atomic
system call, and then the directory that holds the name is fsynced, as are the parents of every
directory on the way that this process has not yet seen made durable. Nothing is published before
its bytes are durable, and no put returns before its name is.

A store object that has found or made its root once stays with that directory: when it is unmounted or
removed, every call says so, and nothing is written to whatever stands at its path afterwards. Files
are made for their owner alone (0600, folders 0700), for they hold what may be private at its source.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

from outlast.clock import SYSTEM_CLOCK, Clock
from outlast.errors import Corrupt, Exists, InvalidInput, NotFound, OutlastError, Refused, StoreFull, Unavailable
from outlast.store.base import Buffer, Capabilities, ObjectInfo, check_name
from outlast.store.disk import Disk

TEMPORARY = "tmp"
LEFTOVER_SECONDS = 24 * 3600
DIRECT_BYTES_MIN = 1 << 20
BOUNCE_BYTES = 4 << 20
BLOCK_BYTES = 4096
READ_BYTES_MAX = 1 << 30
_OUR_LEFTOVER = re.compile(r"[0-9a-f]{32}")
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EROFS, errno.EACCES, errno.EPERM}
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR}
T = TypeVar("T")
_Publish = Callable[[int, str, str], bool]


class _Unsynced(Unavailable):
    """Reading back would find the object, and prove nothing: the system forgets what an fsync has failed for."""

    retryable = False


class LocalStore:
    """Objects as files under `root`, which the first put creates.

    Names that start with `tmp/` are refused: that folder holds what is being written. Symbolic
    links under `root` are neither listed nor written through.
    """

    def __init__(self, root: str | bytes, clock: Clock = SYSTEM_CLOCK, disk: Disk | None = None) -> None:
        self._root = os.path.abspath(os.fsdecode(root))
        self._clock = clock
        self._disk = disk or Disk()
        self._lock = threading.Lock()
        self._durable: set[str] = set()
        self._read_from: set[str] = set()
        self._bounce: list[mmap.mmap] = []
        self._direct = hasattr(os, "O_DIRECT")
        self._swept = False
        self._identity: tuple[int, int] | None = None

    @property
    def url(self) -> str:
        return os.fsencode(self._root).decode("utf-8", "backslashreplace")

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(memory_map=True, concurrency=4, read_bytes=4 << 20, object_bytes_max=8 << 40)

    def local_path(self, name: str) -> str:
        """The file that holds, or would hold, the object; for mapping, never for writing."""
        if check_name(name).split("/", 1)[0] == TEMPORARY:
            raise InvalidInput(f"{name!r} is not a legal object name here: {TEMPORARY}/ is the store's own.")
        return f"{self._root}/{name}"

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        self._put(name, parts, self._publish_new)

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        self._put(name, parts, self._publish_over)

    def get(self, name: str) -> bytes:
        with self._reading(name) as (fd, size_bytes):
            return _read(fd, 0, size_bytes, name)

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        with self._reading(name) as (fd, size_bytes):
            for offset, length in ranges:
                check_range(name, offset, length, size_bytes)
            return [_read(fd, offset, length, name) for offset, length in ranges]

    def stat(self, name: str) -> ObjectInfo:
        path = self.local_path(name)
        with self._staying(), _translated("read", name):
            found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode):
            raise NotFound(f"There is no object {name}.")
        return ObjectInfo(name, found.st_size, found.st_mtime_ns / 1e9)

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        folder = prefix[: prefix.rfind("/") + 1]
        try:
            start = self.local_path(folder[:-1]) if folder else self._root
        except InvalidInput:
            return  # no object can have such a name
        self._check_root()
        if not self._is_below_link(folder):
            yield from _walk(start, folder, prefix, after)
            self._check_root()  # a listing that broke off must not pass for a short one

    def _is_below_link(self, folder: str) -> bool:
        return any(os.path.islink(f"{self._root}/{folder[:end]}") for end, each in enumerate(folder) if each == "/")

    def delete(self, name: str) -> None:
        """Remove the object, durably: a key that was removed must not come back."""
        path = self.local_path(name)
        try:
            with self._lock:
                while self._read_from:  # what we have read may be why it goes, so it must not be undone alone
                    with suppress(FileNotFoundError):
                        self._disk.fsync_dir(self._read_from.pop())
            self._disk.unlink(path)
            self._disk.fsync_dir(os.path.dirname(path))
        except OSError as exc:
            self._check_root()
            if exc.errno not in _ABSENT:
                raise _translate(exc, "delete", name) from exc

    def _put(self, name: str, parts: Sequence[Buffer], publish: _Publish) -> None:
        target = self.local_path(name)
        staging = f"{self._root}/{TEMPORARY}"
        temporary = f"{staging}/{self._clock.random_bytes(16).hex()}"
        self._check_root()
        with _translated("write", name):
            self._refuse_strangers(staging)
            fd = self._within(staging, lambda: self._disk.open_temp(temporary))
            moved = False
            try:
                self._write_parts(fd, parts)
                self._disk.fsync_file(fd)
                self._sweep_leftovers(fd)
                folder = os.path.dirname(target)
                moved = self._within(folder, lambda: self._publish_after(folder, publish, fd, temporary, target))
                try:
                    self._disk.fsync_dir(folder)
                except OSError as exc:
                    why = f"{name} was written, and may be gone after a power cut: {exc.strerror}."
                    raise _Unsynced(why, hint="Check the disk and the system's log.") from exc
                self._check_root()
            finally:
                # Closed last: while the descriptor is open its inode tells whether a link was ours.
                try:
                    if not moved:
                        with suppress(FileNotFoundError):
                            self._disk.unlink(temporary)
                finally:
                    self._disk.close(fd)

    def _within(self, folder: str, call: Callable[[], T]) -> T:
        """Make `folder` durable and call; again, once, when somebody has removed the folder since."""
        self._make_durable(folder)
        try:
            return call()
        except FileNotFoundError:
            self._check_root()
            if not os.path.isdir(f"{self._root}/{TEMPORARY}"):
                # Nobody has a reason to remove this one alone.
                raise self._gone() from None
            with self._lock:
                self._durable.clear()
            self._make_durable(folder)
            return call()

    def _check_root(self) -> None:
        """Raise `Unavailable` when another directory, or none, is now where the root was."""
        try:
            found = os.stat(self._root)
        except OSError:
            if self._identity is not None:
                raise self._gone() from None
            return  # a store that is still to be made, or whose error is told where it matters
        if self._identity is None:
            self._identity = found.st_dev, found.st_ino
        elif self._identity != (found.st_dev, found.st_ino):
            raise self._gone()

    def _gone(self) -> Unavailable:
        return Unavailable(
            f"The folder of the store, {self.url}, was removed or unmounted; nothing was written elsewhere.",
            hint="Mount it again, or bring it back, and run the same command again.",
        )

    @contextmanager
    def _staying(self) -> Iterator[None]:
        """An object that is missing because the whole store is must not pass for lost."""
        if self._identity is None:
            self._check_root()
        try:
            yield
        except NotFound:
            self._check_root()
            raise

    def _publish_after(self, folder: str, publish: _Publish, fd: int, temporary: str, target: str) -> bool:
        """Publish, but not before the names that we have read in this folder, and may build on, are durable."""
        with self._lock:  # whoever comes second waits until it is
            if folder in self._read_from:
                self._read_from.discard(folder)
                self._disk.fsync_dir(folder)
        return publish(fd, temporary, target)

    def _publish_new(self, fd: int, temporary: str, target: str) -> bool:
        """Give the finished file its name unless it is taken; True when the temporary name is gone."""
        try:
            try:
                self._disk.link(temporary, target)
            except OSError as exc:
                if exc.errno not in _NO_LINKS:
                    raise
                self._rename_new(temporary, target)
                return True
        except FileExistsError as exc:
            if _is_same_file(fd, target):
                return False  # A network file system applied our link and lost the reply.
            # Whoever is told that the name is taken may build on it, so it must be durable by then.
            self._disk.fsync_dir(os.path.dirname(target))
            raise Exists(f"{target[len(self._root) + 1 :]} already exists; it was left as it is.") from exc
        return False

    def _rename_new(self, temporary: str, target: str) -> None:
        try:
            self._disk.rename_noreplace(temporary, target)
        except OSError as exc:
            if exc.errno not in {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}:
                raise
            raise Refused(
                f"The file system of {self.url} has neither hard links nor a rename that spares what exists, so "
                f"two writers could overwrite each other; {target[len(self._root) + 1 :]} was not written.",
                hint="Put the store on a Linux file system such as ext4, XFS, Btrfs or ZFS.",
            ) from exc

    def _publish_over(self, fd: int, temporary: str, target: str) -> bool:
        self._disk.replace(temporary, target)
        return True

    def _make_durable(self, folder: str) -> None:
        """See to it that `folder` exists and that its name, up to the mount point, is durable.

        A directory that was there already may have been made a moment ago by another process that
        has not fsynced it yet, so it is treated like one of our own the first time it is met.
        """
        if folder in self._durable:
            return
        with self._lock:
            self._make_durable_locked(folder)

    def _make_durable_locked(self, folder: str) -> None:
        parent = os.path.dirname(folder)
        if folder in self._durable or parent == folder:
            return
        inside = folder.startswith(self._root + "/")
        try:
            found = os.lstat(folder) if inside else os.stat(folder)
        except (FileNotFoundError, NotADirectoryError):
            found = None  # the latter is explained when the recursion meets the file in the way
        if found is not None and stat.S_ISLNK(found.st_mode):
            raise Refused(
                f"{folder} is a symbolic link; nothing is written through it.",
                hint="Replace the link by a directory, or mount the other disk there.",
            )
        if found is not None and not stat.S_ISDIR(found.st_mode):
            raise InvalidInput(f"{folder} is a file where a directory is needed; nothing was written.")
        if found is None:
            self._make_durable_locked(parent)
            if folder == self._root and self._identity is not None:
                raise self._gone()
            private = inside or folder == self._root
            with suppress(FileExistsError):  # another process was quicker; the parent is fsynced all the same
                self._disk.mkdir(folder, 0o700 if private else 0o777)
            self._disk.fsync_dir(parent)
        elif inside:
            self._make_durable_locked(parent)
            self._disk.fsync_dir(parent)
        elif os.stat(parent).st_dev == found.st_dev:
            self._make_durable_locked(parent)
            # Above the root a directory may be closed to us; whoever made it there had to be able to sync it.
            with suppress(PermissionError):
                self._disk.fsync_dir(parent)
        self._durable.add(folder)
        if folder == self._root:
            self._check_root()

    def _refuse_strangers(self, staging: str) -> None:
        """No store is begun around a folder `tmp` that is somebody else's."""
        if self._swept or not os.path.isdir(staging):
            return
        # A hidden name may be what a network file system makes of a file that we removed while it was open.
        strangers = (each for each in os.listdir(staging) if not _OUR_LEFTOVER.fullmatch(each) and each[0] != ".")
        found = next(strangers, None)
        if found is not None and next(self.list(""), None) is None:
            shown = os.fsencode(f"{staging}/{found}").decode("utf-8", "backslashreplace")
            raise Refused(
                f"{self.url} is not empty ({shown} is there); nothing was changed.",
                hint="Make the repository in a folder of its own.",
            )

    def _sweep_leftovers(self, fd: int) -> None:
        """At the first put remove what killed processes left behind, by the file system's own clock."""
        with self._lock:
            if self._swept:
                return
            self._swept = True
        oldest_seconds = os.fstat(fd).st_mtime - LEFTOVER_SECONDS
        with os.scandir(f"{self._root}/{TEMPORARY}") as entries:
            for entry in entries:
                if not _OUR_LEFTOVER.fullmatch(entry.name):
                    continue
                # Housekeeping: another process may sweep too, and what belongs to another user stays.
                with suppress(OSError):
                    found = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(found.st_mode) and found.st_mtime < oldest_seconds:
                        self._disk.unlink(entry.path)

    def _write_parts(self, fd: int, parts: Sequence[Buffer]) -> None:
        views = [part if isinstance(part, bytes) else memoryview(part).cast("B") for part in parts]
        size_bytes = sum(map(len, views))
        if size_bytes < DIRECT_BYTES_MIN:
            self._write_all(fd, b"".join(views), 0)
            return
        direct = self._direct and _set_direct(fd, True)
        if not direct:
            self._direct = False
        bounce = self._borrow_bounce()
        try:
            with memoryview(bounce) as block:
                self._write_blocks(fd, views, block, direct)
        finally:
            self._return_bounce(bounce)
        if direct and size_bytes % BLOCK_BYTES:
            self._disk.truncate(fd, size_bytes)

    def _write_blocks(self, fd: int, views: Sequence[Buffer], block: memoryview, direct: bool) -> None:
        """Write the joined views through one page-aligned buffer.

        O_DIRECT takes whole blocks only, so the last one is written whole and the caller cuts the
        file to its true size. A file system that accepts the flag but not the write gets the same bytes
        through its page cache.
        """
        offset = 0
        for filled in _fill(views, block):
            length = -(-filled // BLOCK_BYTES) * BLOCK_BYTES if direct else filled
            try:
                self._write_all(fd, block[:length], offset)
            except OSError as exc:
                if not direct or exc.errno != errno.EINVAL:
                    raise
                self._direct = False
                _set_direct(fd, False)
                self._write_all(fd, block[:length], offset)
            offset += filled

    def _write_all(self, fd: int, block: Buffer, offset: int) -> None:
        with memoryview(block) as view:
            done = 0
            while done < len(view):
                done += self._disk.write(fd, view[done:], offset + done)

    def _borrow_bounce(self) -> mmap.mmap:
        with self._lock:
            if self._bounce:
                return self._bounce.pop()
        return mmap.mmap(-1, BOUNCE_BYTES)  # anonymous memory starts on a page, as O_DIRECT wants

    def _return_bounce(self, bounce: mmap.mmap) -> None:
        with self._lock:
            if len(self._bounce) < self.capabilities.concurrency:
                self._bounce.append(bounce)

    @contextmanager
    def _reading(self, name: str) -> Iterator[tuple[int, int]]:
        path = self.local_path(name)
        self._read_from.add(os.path.dirname(path))
        with self._staying(), _translated("read", name):
            # O_NONBLOCK: a pipe that somebody put there must not hang the reader.
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                found = os.fstat(fd)
                if not stat.S_ISREG(found.st_mode):
                    raise NotFound(f"There is no object {name}.")
                yield fd, found.st_size
            finally:
                os.close(fd)


def check_range(name: str, offset: int, length: int, size_bytes: int) -> None:
    """Raise unless the range lies within an object of `size_bytes`; done before any memory is set aside."""
    if offset < 0 or length < 0:
        raise InvalidInput(f"({offset}, {length}) is not a range of {name}.")
    if offset + length > size_bytes:
        raise Corrupt(
            f"{name} has {size_bytes} bytes, but bytes {offset} to {offset + length} were expected in it; "
            "it is shorter than what was written, or the record that points into it is wrong."
        )


def _set_direct(fd: int, direct: bool) -> bool:
    """Switch O_DIRECT; False when the file system has no such thing.

    Not done at open: Linux creates the file first and refuses the flag afterwards.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT)
    except OSError as exc:
        if exc.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:
            raise
        return False
    return True


def _fill(views: Sequence[Buffer], block: memoryview) -> Iterator[int]:
    """Copy the views end to end into `block`, yielding how full it is each time it must be emptied."""
    capacity, filled = len(block), 0
    for view in views:
        end = filled + len(view)
        if end < capacity:  # the common case of many small parts, kept short
            block[filled:end] = view
            filled = end
            continue
        taken = 0
        while taken < len(view):
            step = min(capacity - filled, len(view) - taken)
            block[filled : filled + step] = memoryview(view)[taken : taken + step]
            taken += step
            filled += step
            if filled == capacity:
                yield filled
                filled = 0
    if filled:
        yield filled


def _read(fd: int, offset: int, length: int, name: str) -> bytes:
    pieces: list[bytes] = []
    end = offset + length
    while offset < end:
        piece = os.pread(fd, min(end - offset, READ_BYTES_MAX), offset)
        if not piece:
            raise Corrupt(f"{name} became shorter while it was read.")
        pieces.append(piece)
        offset += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _walk(folder: str, base: str, prefix: str, after: str) -> Iterator[ObjectInfo]:
    """Objects below `folder`, whose names start with `base`, in ascending order of whole names."""
    try:
        with _translated("list", base or "the store"), os.scandir(folder) as entries:
            found = sorted(
                ((_sort_name(base, entry), entry) for entry in entries if _may_hold_objects(entry.name, base)),
                key=lambda pair: pair[0],
            )
    except NotFound:
        return
    for name, entry in found:
        if name.endswith("/"):
            wanted = name.startswith(prefix) or prefix.startswith(name)
            if wanted and (after < name or after.startswith(name)):
                yield from _walk(entry.path, name, prefix, after)
        elif name.startswith(prefix) and name > after:
            try:
                with _translated("list", name):
                    status = entry.stat(follow_symlinks=False)
            except NotFound:
                continue
            if stat.S_ISREG(status.st_mode):
                yield ObjectInfo(name, status.st_size, status.st_mtime_ns / 1e9)


def _sort_name(base: str, entry: os.DirEntry[str]) -> str:
    """The whole name; a directory's with its slash, since "a.b" comes before "a/b"."""
    return f"{base}{entry.name}/" if entry.is_dir(follow_symlinks=False) else f"{base}{entry.name}"


def _may_hold_objects(entry_name: str, base: str) -> bool:
    if not base and entry_name == TEMPORARY:
        return False
    try:
        check_name(base + entry_name)
    except InvalidInput:
        return False  # not ours: `lost+found`, `.DS_Store` and the like
    return True


def _is_same_file(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


@contextmanager
def _translated(action: str, name: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise _translate(exc, action, name) from exc


def _translate(exc: OSError, action: str, name: str) -> OutlastError:
    """The one place where the operating system's errors become ours."""
    code, reason = exc.errno or 0, exc.strerror or str(exc)
    if code in _FULL:
        return StoreFull(
            f"There is no room left to {action} {name}: {reason}. What was stored before is unchanged.",
            hint="Free space or raise the quota, then run the same command again.",
        )
    if code in _DENIED:
        return Refused(
            f"The system does not let us {action} {name}: {reason}. What was stored before is unchanged.",
            hint="Check who owns the directory, its mode, and whether the disk is mounted read-only.",
        )
    if action == "write" and code in {errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.EEXIST}:
        return InvalidInput(f"{name} can't be an object here: part of its name is taken by a file or folder.")
    if action != "write" and code in _ABSENT:
        return NotFound(f"There is no object {name}.")
    return Unavailable(f"The disk did not {action} {name}: {reason}.", hint="Check the disk and the system's log.")
