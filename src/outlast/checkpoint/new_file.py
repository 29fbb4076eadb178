"""Files and folders that appear whole, at one instant, and only where nothing was before."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from outlast.errors import Refused
from outlast.store.disk import Disk

_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}


def refuse_taken(path: str) -> None:
    """Raises `Refused` where something is at `path`."""
    if os.path.lexists(path):
        raise Refused(
            f"{path} exists already; it is as it was, and nothing was written.",
            hint="Give another name, or move it away.",
        )


@contextmanager
def fresh(path: str) -> Iterator[str]:
    """Give a name beside `path` to make a file or a folder at. On a good end it gets its name, durable.

    Raises `Refused` where something is at `path` before, or by then; what was made is then gone.
    """
    refuse_taken(path)
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    part = os.path.join(folder, f".{name[:200]}.part-{os.getpid()}")
    _remove(part)
    try:
        yield part
        _sync(part)
        _name(part, path)
    finally:
        _remove(part)
    Disk().fsync_dir(folder)


def _name(part: str, path: str) -> None:
    try:
        Disk().rename_noreplace(part, path)
    except OSError as exc:
        if exc.errno in _UNSUPPORTED:  # of the file system; no one else works here at this instant, as far as we know
            refuse_taken(path)
            os.rename(part, path)
        elif exc.errno == errno.EEXIST:
            refuse_taken(path)
            raise
        else:
            raise


def _sync(part: str) -> None:
    disk = Disk()
    if not os.path.isdir(part):
        _sync_file(part)
        return
    for folder, _, files in os.walk(part):
        for file in files:
            _sync_file(os.path.join(folder, file))
        disk.fsync_dir(folder)


def _sync_file(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError):
            os.unlink(path)
