"""The folder in which a restore is built: reuse what is right, fetch the rest, write it in parallel."""

from __future__ import annotations

import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor

from outlast.backup.folder import Folder, Metadata, begin_writeback
from outlast.backup.nearest import Holder, Source
from outlast.backup.restore_plan import RestorePlan, Selected, shown, why_without_content
from outlast.backup.verify import Place, holes_are_zero, wrong_places
from outlast.clock import Clock
from outlast.errors import Corrupt, OutlastError
from outlast.events import EventSink, Progress
from outlast.records import Entry
from outlast.repo.repository import chunk_offsets

BIG_BYTES = 1 << 20
"""Files from this size on are flushed while others are still being fetched."""

_PROGRESS_EVERY_SECONDS = 0.05
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL


class Meter:
    """Counts what is done and tells the sink, at most twenty times a second."""

    def __init__(self, sink: EventSink, clock: Clock, total_bytes: int, total_files: int) -> None:
        self._sink = sink
        self._clock = clock
        self._total = total_bytes, total_files
        self._done_bytes = self._done_files = 0
        self._next = 0.0

    def add(self, done_bytes: int, done_files: int) -> None:
        """One caller at a time."""
        self._done_bytes += done_bytes
        self._done_files += done_files
        now = self._clock.monotonic_seconds()
        if now >= self._next:
            self._next = now + _PROGRESS_EVERY_SECONDS
            self.report()

    def report(self) -> None:
        self._sink.progress(Progress("restore", self._done_bytes, self._total[0], self._done_files, self._total[1]))


class _File:
    """A file that lacks chunks."""

    __slots__ = ("entry", "left", "path")

    def __init__(self, path: bytes, entry: Entry, left: int) -> None:
        self.path = path
        self.entry = entry
        self.left = left
        """chunks still to be written; 0: the file isn't there yet and comes whole, in one chunk"""


class Staging:
    """Builds the entries of a snapshot in `folder`; `old` is the folder to be replaced."""

    def __init__(
        self,
        repository: Holder,
        plan: RestorePlan,
        folder: Folder,
        old: Folder | None,
        metadata: Metadata,
        pool: ThreadPoolExecutor,
        *,
        resumed: bool,
    ) -> None:
        self._repository = repository
        self._plan = plan
        self._folder = folder
        self._old = old
        self._metadata = metadata
        self._pool = pool
        self._resumed = resumed
        self._folders: list[Selected] = []
        self._links: list[Selected] = []
        self._open: list[tuple[bytes, set[bytes]]] = [(b"", set())]
        self._wanted: dict[bytes, list[tuple[_File, int, int]]] = {}
        self._lock = threading.Lock()
        self.lost: dict[str, OutlastError] = {}
        """path -> why it can't be had"""
        self.skipped: dict[bytes, str] = {}
        """what is not in the result because the snapshot has no content for it, and why"""
        self.carried_over = True
        """whether everything that the snapshot has no content for was taken along from the old folder"""
        self.bytes_fetched = 0
        self.present = Source(shown(plan.target))
        """what was right in the target already, or in what a killed restore left"""
        self.given: dict[str, Source] = {}
        self.meter = Meter(repository.sink, repository.clock, plan.bytes, plan.files)

    def add(self, batch: list[Selected]) -> None:
        """Bring a run of entries, in `path_order`, into the folder; contents that can't be had go to `lost`."""
        files = []
        for raw, entry in batch:
            if self._resumed and raw != b"." and entry.type != "unreadable":
                self._sweep(raw, entry)
            if entry.type == "dir":
                self._folder.make_folder(raw)
                self._folders.append((raw, entry))
            elif entry.type == "unreadable":
                self.skipped[raw] = why_without_content(entry)
            elif raw in self._plan.right:
                self.meter.add(entry.size, 1)
                self._note_present(entry, [])
            elif entry.type == "file":
                files.append((raw, entry))
            elif entry.type == "hardlink":
                self._clear(raw)  # now, so that its file has one name again and can be reused
                self._links.append((raw, entry))
            else:
                self._make_special(raw, entry)
        for (raw, entry), (places, there) in zip(files, self._reuse(files), strict=True):
            self._note_present(entry, places)
            self._want(raw, entry, places, there=there)
        wanted = self._wanted
        if wanted:
            self._repository.fetch(list(wanted), self._deliver, self._failed)
        self._wanted = {}
        self._folder.release()

    def _note_present(self, entry: Entry, lacking: list[Place]) -> None:
        if len(lacking) < len(entry.chunks):
            content = sum(length for _, length in entry.chunks)
            self.present.bytes += content - sum(length for _, (_, length) in lacking)
            self.present.chunks += len(entry.chunks) - len(lacking)

    def check_links(self) -> None:
        """Hard links whose first name can't be had go to `skipped` or to `lost`; call it after the last `add`."""
        sound: dict[bytes, Entry] = {}
        for raw, entry in self._links:
            first = entry.raw_target
            if first in self.skipped:
                self.skipped[raw] = f"it is one file with {entry.target}: {self.skipped[first]}"
            elif first not in sound and not self._is_file(first):
                what = f"it is a hard link to {entry.target}, which is not a file of the snapshot."
                self.lost[entry.path] = Corrupt(what, hint="`outlast check` tells whether the snapshot is damaged.")
            else:
                sound[raw] = entry
        self._links = list(sound.items())

    def _is_file(self, raw: bytes) -> bool:
        in_place = self._old is not None and raw in self._plan.right
        found = (self._old if in_place and self._old is not None else self._folder).status(raw)
        return found is not None and stat.S_ISREG(found.st_mode)

    def finish(self) -> None:
        """Links, what a killed restore left over, and the metadata of folders, deepest first."""
        folder = self._folder
        # In a merge the other name may be in the target already: links are made there.
        for raw, entry in self._links if self._plan.mode != "merge" else []:
            self._clear(raw)
            _link(folder, entry.raw_target, folder, raw)
            self.meter.add(0, 1)
        if self._resumed:
            while self._open:
                self._drop_strangers(*self._open.pop())
        folder.release()
        if self._plan.mode == "merge":
            return  # these folders only carry the files; the real ones get their metadata in place
        if self._plan.mode == "swap" and self._plan.overwrite:
            self._carry_over()
        for raw, entry in reversed(self._folders):
            if raw == b".":
                self._metadata.put_on_file(folder.fd, entry)
                continue
            fd = folder.open_file(raw, os.O_RDONLY | os.O_DIRECTORY)
            try:
                self._metadata.put_on_file(fd, entry)
            finally:
                os.close(fd)
        if not self._folders or self._folders[0][0] != b".":
            os.fchmod(folder.fd, 0o777 & ~_umask())

    def _carry_over(self) -> None:
        """Take along what the snapshot says was there but has no content for: else nobody would have it."""
        assert self._old is not None
        for raw in self.skipped:
            if self._old.status(raw) is None:
                continue
            try:
                _link_tree(self._old, self._folder, raw)
            except OSError:
                # No hard links here, or not to this file: then the whole old folder is kept.
                self._folder.remove(raw)
                self.carried_over = False
                continue
            self.skipped[raw] += " (what was there before is still there)"

    # -- what is there already -----------------------------------------------------------------------

    def _sweep(self, raw: bytes, entry: Entry) -> None:
        """Note the names that belong; of folders that are complete, remove what doesn't."""
        head, _, name = raw.rpartition(b"/")
        while self._open[-1][0] != head:
            self._drop_strangers(*self._open.pop())
        self._open[-1][1].add(name)
        if entry.type == "dir":
            self._open.append((raw, set()))

    def _drop_strangers(self, raw: bytes, known: set[bytes]) -> None:
        for name in self._folder.names(raw):
            if name not in known:
                self._folder.remove(raw + b"/" + name if raw else name)

    def _clear(self, raw: bytes) -> None:
        if self._resumed:
            self._folder.remove(raw)

    def _reuse(self, files: list[Selected]) -> list[tuple[list[Place], bool]]:
        """For each file the places that must be fetched, and whether a file with the rest is in the folder."""
        places = [list(chunk_offsets(entry)) for _, entry in files]
        there = [False] * len(files)
        keys = self._repository.keys
        if self._resumed:
            wrong = wrong_places(
                self._folder, [(*item, each) for item, each in zip(files, places, strict=True)], keys, self._pool
            )
            for number, (raw, entry) in enumerate(files):
                there[number] = self._is_usable(raw, entry) and (
                    not entry.chunks or len(wrong[number]) < len(entry.chunks)
                )
                if there[number]:
                    places[number] = wrong[number]
                else:
                    self._clear(raw)
        if self._old is not None and self._plan.reuse:
            copied = [
                number
                for number, (raw, entry) in enumerate(files)
                if places[number] and raw in self._plan.reuse and self._copy(raw, entry, places[number], there[number])
            ]
            checked = [(*files[number], places[number]) for number in copied]
            wrong = wrong_places(self._folder, checked, keys, self._pool)
            for number, still_wrong in zip(copied, wrong, strict=True):
                places[number], there[number] = still_wrong, True
        return list(zip(places, there, strict=True))

    def _is_usable(self, raw: bytes, entry: Entry) -> bool:
        found = self._folder.status(raw)
        if found is None or not stat.S_ISREG(found.st_mode) or found.st_size != entry.size or found.st_nlink != 1:
            return False
        if entry.holes and not holes_are_zero(self._folder, raw, entry):
            return False
        name, at = self._folder.place(raw)
        os.chmod(name, 0o600, dir_fd=at)
        return True

    def _copy(self, raw: bytes, entry: Entry, places: list[Place], there: bool) -> bool:
        """Copy ranges of the old file, unverified: the caller hashes what has arrived."""
        assert self._old is not None
        try:
            source = self._old.open_file(raw, os.O_RDONLY)
        except OSError:
            return False
        try:
            found = os.fstat(source)
            if not stat.S_ISREG(found.st_mode):
                return False
            if not there:
                self._clear(raw)
            fd = self._folder.open_file(raw, os.O_WRONLY if there else _NEW_FILE)
            try:
                os.ftruncate(fd, entry.size)
                for offset, length in _joined(places):
                    _copy_range(source, fd, offset, length)
                    if length >= BIG_BYTES:
                        begin_writeback(fd, offset, length)
            finally:
                os.close(fd)
            return True
        finally:
            os.close(source)

    # -- what must be fetched ------------------------------------------------------------------------

    def _want(self, raw: bytes, entry: Entry, places: list[Place], *, there: bool) -> None:
        size = entry.size
        self._repository.sums.learn(entry)  # whoever made the plan may have opened the repository anew since
        if not there and len(places) == 1 and places[0][1][1] == size:
            chunk, length = places[0][1]
            self._wanted.setdefault(bytes.fromhex(chunk), []).append((_File(raw, entry, 0), 0, length))
            return
        if not there or not places:
            fd = self._folder.open_file(raw, os.O_WRONLY if there else _NEW_FILE)
            try:
                if not there:
                    os.ftruncate(fd, size)
                if not places:
                    self._complete(fd, entry)
            finally:
                os.close(fd)
        lacking = sum(length for _, (_, length) in places)
        self.meter.add(size - lacking, 0 if places else 1)
        file = _File(raw, entry, len(places))
        for offset, (chunk, length) in places:
            self._wanted.setdefault(bytes.fromhex(chunk), []).append((file, offset, length))

    def _deliver(self, chunk: bytes, plain: bytes | memoryview, where: str = "") -> None:
        """Write a chunk everywhere it belongs; called from several threads."""
        done_bytes = done_files = 0
        for file, offset, length in self._wanted[chunk]:
            if len(plain) != length:
                self._failed(chunk, Corrupt(f"chunk {chunk.hex()[:16]} has {len(plain)} bytes, not {length}."))
                return
            done_bytes += length
            if file.left == 0:
                self._write_whole(file, plain)
                done_files += 1
            else:
                done_files += self._write_part(file, offset, plain)
        with self._lock:
            self.bytes_fetched += len(plain)
            source = self.given.get(where) or self.given.setdefault(where, Source(where))
            source.bytes += done_bytes
            source.chunks += 1
            self.meter.add(done_bytes, done_files)

    def _write_whole(self, file: _File, plain: bytes | memoryview) -> None:
        fd = self._folder.open_file(file.path, _NEW_FILE)
        try:
            _write_all(fd, plain, 0)
            self._complete(fd, file.entry)
        finally:
            os.close(fd)

    def _write_part(self, file: _File, offset: int, plain: bytes | memoryview) -> bool:
        fd = self._folder.open_file(file.path, os.O_WRONLY)
        try:
            _write_all(fd, plain, offset)
            if len(plain) >= BIG_BYTES:
                begin_writeback(fd, offset, len(plain))
            with self._lock:
                file.left -= 1
                complete = file.left == 0
            if complete:
                self._complete(fd, file.entry)
            return complete
        finally:
            os.close(fd)

    def _complete(self, fd: int, entry: Entry) -> None:
        if entry.size >= BIG_BYTES:
            os.fsync(fd)
        self._metadata.put_on_file(fd, entry)

    def _failed(self, chunk: bytes, error: OutlastError) -> None:
        with self._lock:
            for file, _, _ in self._wanted[chunk]:
                self.lost.setdefault(file.entry.path, error)

    def _make_special(self, raw: bytes, entry: Entry) -> None:
        self._clear(raw)
        name, at = self._folder.place(raw)
        if entry.type == "symlink":
            os.symlink(entry.raw_target, name, dir_fd=at)
        else:
            os.mkfifo(name, 0o600, dir_fd=at)
        self._metadata.put_on_name(name, at, entry)


def _link(source: Folder, first: bytes, folder: Folder, raw: bytes) -> None:
    name, at = source.place(first)
    at = os.dup(at)  # looking up the second place may close the first
    try:
        new, to = folder.place(raw)
        os.link(name, new, src_dir_fd=at, dst_dir_fd=to, follow_symlinks=False)
    finally:
        os.close(at)


def _link_tree(old: Folder, new: Folder, raw: bytes) -> None:
    """The same files under the same name in another folder; folders are made anew, with their metadata."""
    found = old.status(raw)
    if found is None or not stat.S_ISDIR(found.st_mode):
        _link(old, raw, new, raw)
        return
    new.make_folder(raw)
    for name in old.names(raw):
        _link_tree(old, new, raw + b"/" + name)
    fd = new.open_file(raw, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if os.geteuid() == 0:
            os.fchown(fd, found.st_uid, found.st_gid)
        os.fchmod(fd, stat.S_IMODE(found.st_mode))
        os.utime(fd, ns=(found.st_atime_ns, found.st_mtime_ns))
    finally:
        os.close(fd)


def _joined(places: list[Place]) -> list[tuple[int, int]]:
    """Neighbouring places as one (offset, length): longer copies, and whole extents where they can be shared."""
    joined: list[tuple[int, int]] = []
    for offset, (_, length) in places:
        if joined and sum(joined[-1]) == offset:
            joined[-1] = joined[-1][0], joined[-1][1] + length
        else:
            joined.append((offset, length))
    return joined


def _copy_range(source: int, fd: int, offset: int, length: int) -> None:
    end = offset + length
    copy = getattr(os, "copy_file_range", None)
    while copy is not None and offset < end:
        try:
            count = copy(source, fd, end - offset, offset, offset)
        except OSError:
            break  # not between these file systems; the plain way tells what is wrong
        if count == 0:
            return
        offset += count
    while offset < end:
        try:
            piece = os.pread(source, min(end - offset, 4 << 20), offset)
        except OSError:
            return  # unreadable here: the hash will not fit, and the rest is fetched
        if not piece:
            return
        _write_all(fd, piece, offset)
        offset += len(piece)


def _write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    count = os.pwrite(fd, data, offset)
    while count < len(data):
        data = memoryview(data)[count:]
        offset += count
        count = os.pwrite(fd, data, offset)


def _umask() -> int:
    """The umask of the process, which can't be read except by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
