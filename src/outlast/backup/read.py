"""Read files into chunks, several at once, and give the results back in the order of asking.

A file that changes while it is read is read again; one that won't hold still is marked unstable.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType

import msgspec

from outlast import records
from outlast.backup.walk import Found
from outlast.records import ChunkRef, Entry, Hole
from outlast.repo import formats
from outlast.repo.chunker import Piece, pieces
from outlast.repo.repository import Repository
from outlast.repo.write import Prepared, Writer

SMALL_BYTES = 64 << 10
"""Up to here a file is one chunk and is read in a batch with its neighbours."""
_BATCH_FILES = 64
_BYTES_IN_FLIGHT = 64 << 20
_ITEMS_IN_FLIGHT = 4096
_QUEUED_FILE_BYTES = 2 << 10
"""What a small file weighs in the queue besides its content."""
_OPEN_FILE_BYTES = 512 << 10
"""What an open file weighs in the queue, which so holds at most 128 of them."""
_SEGMENT_BYTES = 16 << 20
_TRIES = 4
_PAUSE_SECONDS = 0.1
# Without blocking: what the walk saw as a file may be a pipe by now.
_OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class Reading(msgspec.Struct):
    """What came of one file; None when it vanished before it was opened."""

    entry: Entry | None


class _ChangedError(Exception):
    """The file is not what it was when reading began."""


class _File:
    """A large file being read: its pieces are futures in the queue, their chunks gather here."""

    def __init__(self, found: Found, fd: int, status: os.stat_result) -> None:
        self.found = found
        self.fd = fd
        self.status = status
        self.holes: list[Hole] = []
        self.chunks: list[ChunkRef] = []
        self.changed = False


class _Small(msgspec.Struct):
    """A small file that was read whole."""

    status: os.stat_result
    prepared: Prepared | None


class _Item(msgspec.Struct):
    """A place in the queue: `finish` gives what may be passed on, in order."""

    bytes: int
    finish: Callable[[], Iterator[Reading]]


class FileReader:
    """A queue of files under way. Results come out in the order in which files went in.

    Memory is bounded by `_BYTES_IN_FLIGHT`: asking for one more file first finishes the oldest.
    """

    def __init__(self, writer: Writer, repository: Repository) -> None:
        self._writer = writer
        self._chunking = repository.format.chunking
        self._clock = repository.clock
        self._cut = repository.cutter()
        self._of_thread = threading.local()
        self._pool = ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 2)), thread_name_prefix="read")
        self._queue: deque[_Item] = deque()
        self._queued_bytes = 0
        self._batch: list[Found] = []

    def __enter__(self) -> FileReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def keep_place(self, entry: Entry) -> Iterator[Reading]:
        """Pass an entry through that needs no reading, after those asked for before it."""
        if not self._queue and not self._batch:
            yield Reading(entry)
            return
        yield from self._submit_batch()
        yield from self._push(0, lambda: iter((Reading(entry),)))

    def link_or_read(self, found: Found, link: Callable[[], Entry | None]) -> Iterator[Reading]:
        """Another name of a file asked for before: `link()` once that one is finished, or its content."""
        yield from self._submit_batch()

        def finish() -> Iterator[Reading]:
            entry = link()
            yield self._read_now(found) if entry is None else Reading(entry)

        yield from self._push(0, finish)

    def read(self, found: Found) -> Iterator[Reading]:
        """Ask for a file; yields whatever has been finished meanwhile."""
        if found.status.st_size <= SMALL_BYTES:
            self._batch.append(found)
            if len(self._batch) >= _BATCH_FILES:
                yield from self._submit_batch()
            return
        yield from self._submit_batch()
        yield from self._read_large(found)

    def rest(self) -> Iterator[Reading]:
        """Finish everything."""
        yield from self._submit_batch()
        while self._queue:
            yield from self._pop()

    def _push(self, size: int, finish: Callable[[], Iterator[Reading]]) -> Iterator[Reading]:
        self._queue.append(_Item(size, finish))
        self._queued_bytes += size
        while self._queue and (self._queued_bytes > _BYTES_IN_FLIGHT or len(self._queue) > _ITEMS_IN_FLIGHT):
            yield from self._pop()

    def _pop(self) -> Iterator[Reading]:
        item = self._queue.popleft()
        self._queued_bytes -= item.bytes
        yield from item.finish()

    # -- small files -----------------------------------------------------------------------------

    def _submit_batch(self) -> Iterator[Reading]:
        if not self._batch:
            return iter(())
        batch, self._batch = self._batch, []
        future = self._pool.submit(lambda: [self._read_small(found) for found in batch])
        size = sum(_QUEUED_FILE_BYTES + found.status.st_size for found in batch)
        return self._push(size, lambda: self._finish_batch(batch, future))

    def _read_small(self, found: Found) -> _Small | Reading | None:
        """In a worker: one read, then a look whether the file is still what the walk saw.

        None when it has changed: the caller reads it again, with patience.
        """
        before = found.status
        try:
            fd = os.open(found.location, _OPEN_FLAGS)
            try:
                content = os.read(fd, before.st_size + 1)
                after = os.fstat(fd)
            finally:
                os.close(fd)
        except OSError as exc:
            return _unreadable(found, exc)
        if not _same(before, after):
            return None
        if len(content) != before.st_size:
            return _lying(found)
        return _Small(after, self._writer.prepare(content) if content else None)

    def _finish_batch(self, batch: list[Found], future: Future[list[_Small | Reading | None]]) -> Iterator[Reading]:
        for found, result in zip(batch, future.result(), strict=True):
            if result is None:
                yield self._read_now(found)
            elif isinstance(result, Reading):
                yield result
            else:
                chunks = [self._writer.add(result.prepared)] if result.prepared else []
                yield Reading(_file_entry(found, result.status, chunks, []))

    # -- large files -----------------------------------------------------------------------------

    def _read_large(self, found: Found) -> Iterator[Reading]:
        file = self._open(found)
        if file is None:
            yield from self.rest()
            file = self._open(found) or _unreadable(found, OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
        if isinstance(file, Reading):
            reading = file
            yield from self._push(0, lambda: iter((reading,)))
            return
        try:
            for size, future in self._prepare_file(file):
                yield from self._push(size, _finish_piece(self._writer, file, future))
        except (_ChangedError, OSError):
            file.changed = True
        yield from self._push(_OPEN_FILE_BYTES, lambda: self._finish_file(file))

    def _open(self, found: Found) -> _File | Reading | None:
        """The open file, or why it can't be read; None when this process has too many open already."""
        try:
            fd = os.open(found.location, _OPEN_FLAGS)
        except OSError as exc:
            return None if exc.errno == errno.EMFILE else _unreadable(found, exc)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            return _unreadable(found, OSError(errno.EINVAL, "it is no longer a file"))
        return _File(found, fd, status)

    def _prepare_file(self, file: _File) -> Iterator[tuple[int, Future[Prepared]]]:
        """Submit every piece of the file; yields (bytes, future) in order. Raises `_ChangedError` at a short read."""
        size = file.status.st_size
        file.holes = _holes(file.fd, size) if _may_be_sparse(file.status) else []
        spans = formats.spans(lambda offset, length: _pread(file.fd, length, offset), size)
        for piece in pieces(size, spans, file.holes, self._chunking):
            if piece.cut:
                yield from self._prepare_opaque(file, piece.offset, piece.offset + piece.length)
            else:
                yield piece.length, self._pool.submit(self._prepare_block, file.fd, piece)

    def _prepare_block(self, fd: int, piece: Piece) -> Prepared:
        """In a worker: into one buffer per thread, for most blocks of a checkpoint are known already
        and fresh memory for each would cost more than hashing it."""
        buffer: bytearray | None = getattr(self._of_thread, "buffer", None)
        if buffer is None or len(buffer) < piece.length:
            buffer = self._of_thread.buffer = bytearray(max(piece.length, self._chunking.block_bytes))
        block = memoryview(buffer)[: piece.length]
        done = 0
        while done < piece.length:
            count = os.preadv(fd, [block[done:]], piece.offset + done)
            if not count:
                raise _ChangedError
            done += count
        return self._writer.prepare(block, piece.item_bytes)

    def _prepare_opaque(self, file: _File, at: int, end: int) -> Iterator[tuple[int, Future[Prepared]]]:
        while at < end:
            data = memoryview(_pread(file.fd, min(_SEGMENT_BYTES, end - at), at))
            if len(data) < min(_SEGMENT_BYTES, end - at):
                raise _ChangedError
            start = 0
            for length in self._cut(data, at + len(data) == end):
                yield length, self._pool.submit(self._writer.prepare, data[start : start + length])
                start += length
            at += start

    def _finish_file(self, file: _File) -> Iterator[Reading]:
        after = os.fstat(file.fd)
        os.close(file.fd)
        if file.changed or not _same(file.status, after):
            yield self._read_now(file.found)
        else:
            yield Reading(_file_entry(file.found, file.status, file.chunks, file.holes))

    def _read_now(self, found: Found) -> Reading:
        """Read a file that has changed under us again, at once; the last try takes it as it comes."""
        reading = Reading(None)
        for attempt in range(_TRIES):
            if attempt:
                self._clock.sleep(_PAUSE_SECONDS * 2**attempt)
            file = self._open(found) or _unreadable(found, OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
            if isinstance(file, Reading):
                return file
            window: deque[Future[Prepared]] = deque()
            try:
                for _, future in self._prepare_file(file):
                    window.append(future)
                    if len(window) > 8:
                        file.chunks.append(self._writer.add(window.popleft().result()))
                while window:
                    file.chunks.append(self._writer.add(window.popleft().result()))
                after = os.fstat(file.fd)
                longer = os.pread(file.fd, 1, file.status.st_size)
            except _ChangedError:
                if _same(file.status, os.fstat(file.fd)):
                    return _lying(found)
                reading = _unreadable(found, OSError(errno.EIO, "it shrinks each time it is read"))
                continue
            except OSError as exc:
                return _unreadable(found, exc)
            finally:
                wait(window)
                os.close(file.fd)
            entry = _file_entry(found, file.status, file.chunks, file.holes)
            if _same(file.status, after):
                return _lying(found) if longer else Reading(entry)
            reading = Reading(msgspec.structs.replace(entry, unstable=True))
        return reading


def _finish_piece(writer: Writer, file: _File, future: Future[Prepared]) -> Callable[[], Iterator[Reading]]:
    def finish() -> Iterator[Reading]:
        try:
            file.chunks.append(writer.add(future.result()))
        except (_ChangedError, OSError):
            file.changed = True
        return iter(())

    return finish


def _pread(fd: int, length: int, offset: int) -> bytes:
    """Up to `length` bytes; fewer only at the end of the file."""
    data = os.pread(fd, length, offset)
    while len(data) < length:
        more = os.pread(fd, length - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def _same(before: os.stat_result, after: os.stat_result) -> bool:
    return (
        before.st_ino == after.st_ino
        and before.st_dev == after.st_dev
        and before.st_size == after.st_size
        and before.st_mtime_ns == after.st_mtime_ns
        and before.st_ctime_ns == after.st_ctime_ns
    )


def _may_be_sparse(status: os.stat_result) -> bool:
    return status.st_blocks * 512 < status.st_size


def _holes(fd: int, size: int) -> list[Hole]:
    """The holes of a sparse file, in order; none where the file system can't tell."""
    found: list[Hole] = []
    at = 0
    try:
        while at < size:
            try:
                data = os.lseek(fd, at, os.SEEK_DATA)
            except OSError as exc:
                if exc.errno != errno.ENXIO:
                    raise
                data = size
            if data > at:
                found.append((at, data - at))
            at = os.lseek(fd, data, os.SEEK_HOLE) if data < size else size
    except OSError:
        return []
    return found


def _unreadable(found: Found, exc: OSError) -> Reading:
    if exc.errno == errno.ENOENT:
        return Reading(None)
    reason = exc.strerror or str(exc)
    return Reading(Entry(path=records.path_text(found.path), type="unreadable", reason=reason))


def _lying(found: Found) -> Reading:
    """As in /proc: what can be read is not as long as the file system says."""
    return _unreadable(found, OSError(errno.EIO, "it does not hold as many bytes as its size says"))


def _file_entry(found: Found, status: os.stat_result, chunks: list[ChunkRef], holes: list[Hole]) -> Entry:
    return Entry(
        path=records.path_text(found.path),
        type="file",
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        mtime_ns=status.st_mtime_ns,
        size=status.st_size,
        ctime_ns=status.st_ctime_ns,
        inode=status.st_ino,
        chunks=chunks,
        holes=holes,
    )
