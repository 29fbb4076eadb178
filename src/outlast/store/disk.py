"""Every system call by which a local store changes anything, in one place."""

from __future__ import annotations

import ctypes
import errno
import os

from outlast.store.base import Buffer

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


class Disk:
    """Every system call by which a local store changes anything: the seam for fault injection.

    A subclass sees each mutation in the order the store makes it, with absolute paths, and may
    record it, delay it, fail it (`OSError` with an errno) or end the process there. What a power
    cut keeps of a recorded sequence: file bytes up to the last `fsync_file` of that descriptor,
    directory entries up to the last `fsync_dir` of that directory; anything later may or may not
    have happened, each entry on its own. Reads do not pass through here: they change nothing.
    """

    def mkdir(self, path: str, mode: int) -> None:
        """Make one directory; `FileExistsError` when the name is taken."""
        os.mkdir(path, mode)

    def open_temp(self, path: str) -> int:
        """Create an empty file that did not exist and return its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def write(self, fd: int, block: Buffer, offset: int) -> int:
        """Write at `offset`; returns how many bytes were taken, which may be fewer."""
        return os.pwrite(fd, block, offset)

    def truncate(self, fd: int, size_bytes: int) -> None:
        os.ftruncate(fd, size_bytes)

    def fsync_file(self, fd: int) -> None:
        os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def link(self, source: str, target: str) -> None:
        """Give the file a second name; `FileExistsError` when that name is taken."""
        os.link(source, target, follow_symlinks=False)

    def rename_noreplace(self, source: str, target: str) -> None:
        """renameat2(2) with RENAME_NOREPLACE, for file systems without hard links."""
        rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if rename is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), target)
        names = os.fsencode(source), os.fsencode(target)
        if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_NOREPLACE) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), target)

    def replace(self, source: str, target: str) -> None:
        os.replace(source, target)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def fsync_dir(self, path: str) -> None:
        """Make the names in this directory durable, whoever created or removed them."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as exc:
            if exc.errno != errno.EINVAL:  # some network file systems have no such call: the server answers for it
                raise
        finally:
            os.close(fd)
