"""Which chunks of files on disk have the bytes that they should: hashed in parallel, nothing trusted."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from outlast.backup.folder import Folder
from outlast.records import ChunkRef, Entry
from outlast.repo import seal
from outlast.repo.seal import Keys

Place = tuple[int, ChunkRef]
"""(offset in the file, chunk)"""

Checked = tuple[bytes, Entry, Sequence[Place]]
"""(path, entry, the places to look at)"""

_TASK_BYTES = 16 << 20
_TASK_PARTS = 256
_ZEROS = bytes(1 << 20)


def wrong_places(
    folder: Folder, files: Sequence[Checked], keys: Keys | None, pool: ThreadPoolExecutor
) -> list[list[Place]]:
    """For each file those of its places that are not right: all, where there is no such file."""
    wrong: list[list[Place]] = [[] for _ in files]
    for found in pool.map(lambda task: _look(folder, files, task, keys), _tasks(files)):
        for number, places in found:
            wrong[number].extend(places)
    folder.release()
    return wrong


def _tasks(files: Sequence[Checked]) -> Iterator[list[tuple[int, int, int]]]:
    """Equal pieces of work: (number of the file, first place, end), many small or a part of a big one."""
    task: list[tuple[int, int, int]] = []
    task_bytes = 0
    for number, (_, _, places) in enumerate(files):
        first = 0
        for at, (_, (_, length)) in enumerate(places, 1):
            task_bytes += length
            if task_bytes >= _TASK_BYTES:
                yield [*task, (number, first, at)]
                task, task_bytes, first = [], 0, at
        if first < len(places) or not places:
            task.append((number, first, len(places)))
        if len(task) >= _TASK_PARTS:
            yield task
            task, task_bytes = [], 0
    if task:
        yield task


def _look(
    folder: Folder, files: Sequence[Checked], task: list[tuple[int, int, int]], keys: Keys | None
) -> list[tuple[int, list[Place]]]:
    found = []
    buffer = bytearray()
    for number, first, end in task:
        path, _, places = files[number]
        part = places[first:end]
        try:
            fd = folder.open_file(path, os.O_RDONLY)
        except OSError:
            found.append((number, list(part)))
            continue
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                found.append((number, list(part)))
                continue
            longest = max((length for _, (_, length) in part), default=0)
            if longest > len(buffer):
                buffer = bytearray(longest)
            wrong = [place for place in part if not _is_right(fd, place, memoryview(buffer), keys)]
            if wrong:
                found.append((number, wrong))
        finally:
            os.close(fd)
    return found


def _is_right(fd: int, place: Place, buffer: memoryview, keys: Keys | None) -> bool:
    offset, (chunk, length) = place
    view = buffer[:length]
    filled = 0
    try:
        while filled < length:
            count = os.preadv(fd, [view[filled:]], offset + filled)
            if not count:
                return False
            filled += count
    except OSError:
        return False  # a bad sector in the old copy is one more reason to fetch
    return seal.chunk_id(view, keys).hex() == chunk


def holes_are_zero(folder: Folder, path: bytes, entry: Entry) -> bool:
    """Whether the file has nothing but zeros where the entry has holes."""
    try:
        fd = folder.open_file(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return all(_is_zero(fd, offset, offset + length) for offset, length in entry.holes)
    finally:
        os.close(fd)


def _is_zero(fd: int, at: int, end: int) -> bool:
    while at < end:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return True  # a hole up to the end of the file
            # No such call on this file system, or a bad sector: the bytes themselves tell.
        if at >= end:
            return True
        try:
            piece = os.pread(fd, min(end - at, len(_ZEROS)), at)
        except OSError:
            return False
        if not piece or piece != _ZEROS[: len(piece)]:
            return False
        at += len(piece)
    return True
