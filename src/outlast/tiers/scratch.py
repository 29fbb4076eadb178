"""A private folder that is gone when it was used, and of which a killed process leaves nothing for long.

Beside the folder `outlast-drill-<id>` stands the file `outlast-drill-<id>.lock`, made first and removed last, and
locked by who uses the folder. A lock that nobody holds means that its holder was killed: the next one removes the
folder of that name. A folder without such a file is none of ours.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from outlast.backup.folder import PRIVATE, remove_tree
from outlast.clock import Clock
from outlast.errors import InvalidInput
from outlast.events import Event, EventSink
from outlast.records import path_text

_NAME = re.compile(rb"(outlast-drill-[0-9a-f]{16})\.lock")
_MARK = b"the lock of a scratch folder of outlast drill\n"
_OPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


@contextmanager
def scratch_folder(parent: str | bytes | None, clock: Clock, sink: EventSink) -> Iterator[bytes]:
    """A new folder in `parent`, by default where temporary files go; what killed ones left there is removed.

    Raises `InvalidInput` where `parent` is no folder.
    """
    place = os.path.realpath(os.fsencode(parent if parent is not None else tempfile.gettempdir()))
    if not os.path.isdir(place):
        raise InvalidInput(
            f"{path_text(place)} is not a folder, so nothing can be restored into it; nothing was done.",
            hint="Make it, or name another with --scratch.",
        )
    sweep(place, sink)
    path, lock = _make(place, clock)
    try:
        yield path
    finally:
        _remove(path, sink)
        os.close(lock)


def sweep(place: bytes, sink: EventSink) -> None:
    """Remove the folders of those that were killed."""
    for name in os.listdir(place):
        found = _NAME.fullmatch(name)
        if found is None:
            continue
        lock = _taken(os.path.join(place, name))
        if lock is not None:
            _remove(os.path.join(place, found[1]), sink)
            os.close(lock)


def _make(place: bytes, clock: Clock) -> tuple[bytes, int]:
    while True:
        path = os.path.join(place, b"outlast-drill-" + clock.random_bytes(8).hex().encode())
        with suppress(FileExistsError):
            lock = os.open(path + b".lock", _OPEN | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_named(lock, path + b".lock"):  # else another one swept it just now
                os.write(lock, _MARK)
                os.mkdir(path, PRIVATE)
                os.chmod(path, PRIVATE)  # a parent with setgid would pass it on
                return path, lock
            os.close(lock)


def _taken(path: bytes) -> int | None:
    """The lock of one that was killed, held; None where somebody holds it, or it is not of this user's making."""
    try:
        lock = os.open(path, _OPEN)
    except OSError:
        return None
    found = os.fstat(lock)
    mine = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_nlink == 1
    if mine and not found.st_mode & (stat.S_IRWXG | stat.S_IRWXO) and found.st_size in (0, len(_MARK)):
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_named(lock, path) and os.pread(lock, len(_MARK), 0) in (b"", _MARK):
                return lock
    os.close(lock)
    return None


def _is_named(lock: int, path: bytes) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), os.lstat(path))
    except FileNotFoundError:
        return False


def _remove(path: bytes, sink: EventSink) -> None:
    """The folder, and then its lock. Where that fails, the next one tries again."""
    try:
        found = os.lstat(path)
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
            remove_tree(path)
    except FileNotFoundError:
        pass
    except OSError as exc:
        told = f"the scratch folder {path_text(path)} could not be removed: {exc.strerror}; the next drill tries again."
        sink.event(Event("drill.scratch.failed", told, {"path": path_text(path)}))
        return
    with suppress(FileNotFoundError):
        os.unlink(path + b".lock")
