"""Back up folders and files: walk, read what changed, commit one snapshot."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial

import msgspec

from outlast import __version__, records
from outlast.backup.read import FileReader, Reading
from outlast.backup.selection import matcher
from outlast.backup.walk import Found, Root, roots, walk
from outlast.errors import Busy, Corrupt, InvalidInput, Refused
from outlast.events import Event, Progress
from outlast.records import Entry, Snapshot
from outlast.repo.repository import Repository
from outlast.repo.write import Writer
from outlast.store.layers import own_folder

_PROBLEMS_NAMED_MAX = 1000
_TRIES = 3
_RACE_NS = 20_000_000
"""A file changed this shortly before its last backup began may have changed again within one tick
of the file system's clock; it is read again instead of trusted."""


class Problem(msgspec.Struct, frozen=True):
    """Something of the source that is not in the snapshot as it was."""

    path: str
    kind: str
    reason: str


class BackupReport(msgspec.Struct):
    snapshot: str
    name: str
    files: int
    bytes: int
    bytes_added: int
    bytes_stored: int
    unreadable: int
    unstable: int
    seconds: float
    problems: list[Problem]


def create(
    repository: Repository,
    sources: Sequence[bytes | str] | bytes | str,
    *,
    name: str | None = None,
    tags: Mapping[str, str] | None = None,
    exclude: Sequence[str] = (),
    full: bool = False,
) -> BackupReport:
    """Back up `sources` into one snapshot and commit it.

    A file whose size, mtime, ctime and inode are those of the newest snapshot of the same name is
    taken from there without reading; `full` reads everything. Unreadable and unstable files don't
    stop the backup: they are counted, named in the report and marked in the manifest.

    Raises `InvalidInput` (no source exists, a name or tag is no text), `StoreFull`, `Unavailable`.
    Whatever it raises, and whenever it is killed, committed snapshots are untouched. What was uploaded
    is used next time; of what a kill -9 or a power cut ended, what was committed on the way, every GiB.
    """
    started = repository.clock.monotonic_seconds()
    if isinstance(sources, bytes | str):
        sources = [sources]
    name = None if name is None else _text("the name", name)
    tags = {_text("a tag", key): _text(f"the tag {key!r}", value) for key, value in (tags or {}).items()}
    found, missing = roots([os.fsencode(source) for source in sources])
    if not found:
        raise InvalidInput(
            f"nothing to back up: {', '.join(f'{os.fsdecode(path)} ({exc.strerror})' for path, exc in missing)}."
        )
    _refuse_own_objects(repository, found)
    gone = {path for path, _ in missing}
    first = next(path for path in map(os.fsencode, sources) if path not in gone)
    own_name = (os.path.basename(os.path.realpath(first)) or b"root").decode(errors="replace")
    for attempt in range(_TRIES):
        backup = _Backup(repository, found, name or own_name, exclude, full)
        for path, exc in missing:
            backup.problem(os.path.basename(path) or path, "unreadable", exc.strerror or str(exc))
        try:
            snapshot = backup.run(tags)
            break
        except Busy as exc:
            if attempt == _TRIES - 1:
                raise
            repository.sink.event(Event("backup.again", f"The backup begins again: {exc.message}"))
            repository.refresh()
    return BackupReport(
        snapshot=snapshot.id,
        name=snapshot.name,
        files=snapshot.files,
        bytes=snapshot.bytes,
        bytes_added=snapshot.bytes_added,
        bytes_stored=snapshot.bytes_stored,
        unreadable=snapshot.unreadable,
        unstable=snapshot.unstable,
        seconds=repository.clock.monotonic_seconds() - started,
        problems=backup.problems,
    )


def _text(what: str, given: object) -> str:
    """A name or a tag as text. What came as undecoded bytes, as from a shell in the C locale, is read as UTF-8."""
    if isinstance(given, str):
        with suppress(UnicodeError):
            given.encode()
            return given
        with suppress(UnicodeError):
            return os.fsencode(given).decode()
    raise InvalidInput(f"{what} has to be text in UTF-8, and {given!r} is not; nothing was backed up.")


def _refuse_own_objects(repository: Repository, found: list[Root]) -> None:
    folder = own_folder(repository.store)
    for root in found:
        if folder is not None and (root.location + b"/").startswith(folder + b"/"):
            raise Refused(
                f"{os.fsdecode(root.location)} lies inside the repository itself; nothing was backed up.",
                hint="To keep a second copy of a repository, copy its snapshots to another one.",
            )


class _Backup:
    """One run: what was found so far and the parent's entries that go along with the walk."""

    def __init__(
        self, repository: Repository, found: list[Root], name: str, exclude: Sequence[str], full: bool
    ) -> None:
        self._repository = repository
        self._roots = found
        self._name = name
        self._excluded = matcher(exclude)
        self._repository_inode = self._inode_of_repository()
        self._time_ns = repository.clock.now_ns()
        self._began_seconds = repository.clock.monotonic_seconds()
        self._full = full
        self._parent = None if full else self._newest(name)
        self._parent_entries = repository.entries(self._parent) if self._parent else iter(())
        self._parent_entry: Entry | None = None
        self._parent_key = b""
        self._trusted_before_ns = _time_ns(self._parent) - _RACE_NS if self._parent else 0
        self._met: set[tuple[int, int]] = set()
        self._names: dict[str, tuple[int, int]] = {}
        self._links: dict[tuple[int, int], str] = {}
        """(device, inode) of files with several names -> the name under which it was read"""
        self.problems: list[Problem] = []
        self._unreadable = self._unstable = self._files = self._bytes = 0
        self._total_files = self._total_bytes = 0

    def run(self, tags: dict[str, str]) -> Snapshot:
        writer = self._repository.writer(trusting=not self._full)
        if self._repository.sink.wants_progress:
            self._measure()
        try:
            with FileReader(writer, self._repository) as reader:
                for entry in self._entries(writer, reader):
                    self._take(writer, entry)
            return writer.commit(self._snapshot(tags))
        except BaseException:
            writer.abandon()
            raise

    def _snapshot(self, tags: dict[str, str]) -> Snapshot:
        return Snapshot(
            id="",
            kind="backup",
            name=self._name,
            time=records.time_text(self._time_ns),
            tags=tags,
            host=socket.gethostname(),
            sources=self._sources(),
            parent=self._parent.id if self._parent else "",
            files=self._files,
            bytes=self._bytes,
            unreadable=self._unreadable,
            unstable=self._unstable,
            program=f"outlast {__version__}",
            seconds=round(self._repository.clock.monotonic_seconds() - self._began_seconds, 3),
        )

    def _newest(self, name: str) -> Snapshot | None:
        """The parent: of the snapshots of this name the newest, of the same sources on this host if there is one."""
        same = [snapshot for snapshot in self._repository.snapshots() if snapshot.name == name]
        here = (socket.gethostname(), self._sources())
        nearest = [snapshot for snapshot in same if (snapshot.host, snapshot.sources) == here]
        return next(reversed(nearest or same), None)

    def _sources(self) -> list[str]:
        return [os.fsdecode(root.location).encode(errors="replace").decode() for root in self._roots]

    def _inode_of_repository(self) -> tuple[int, int] | None:
        folder = own_folder(self._repository.store)
        if folder is None:
            return None
        status = os.stat(folder)
        return status.st_dev, status.st_ino

    def _skip(self, path: bytes, status: os.stat_result) -> bool:
        if self._is_repository(status):
            self.problem(path, "skipped", "it is the repository itself")
            return True
        return self._excluded(path)

    def _is_repository(self, status: os.stat_result) -> bool:
        return (status.st_dev, status.st_ino) == self._repository_inode

    def _measure(self) -> None:
        """Walk once ahead, so that progress knows its end."""
        for root in self._roots:
            for found in walk(root, lambda path, status: self._is_repository(status) or self._excluded(path)):
                if stat.S_ISREG(found.status.st_mode):
                    self._total_files += 1
                    self._total_bytes += found.status.st_size

    def _entries(self, writer: Writer, reader: FileReader) -> Iterator[Entry]:
        """Entries in manifest order. Reading runs ahead of what is yielded, within a bound of bytes."""
        for root in self._roots:
            for found in walk(root, self._skip):
                if self._is_another_name(found):
                    yield from self._finished(reader.link_or_read(found, partial(self._link, found)))
                    continue
                entry = self._without_reading(writer, found)
                yield from self._finished(reader.keep_place(entry) if entry else reader.read(found))
        yield from self._finished(reader.rest())

    def _finished(self, readings: Iterator[Reading]) -> Iterator[Entry]:
        for reading in readings:
            if reading.entry is not None:
                if reading.entry.type == "unreadable":
                    self.problem(reading.entry.raw_path, "unreadable", reading.entry.reason)
                elif reading.entry.unstable:
                    self.problem(reading.entry.raw_path, "unstable", "it kept changing while it was read")
                inode = self._names.pop(reading.entry.path, None)
                if inode is not None and reading.entry.type == "file" and reading.entry.inode == inode[1]:
                    self._links.setdefault(inode, reading.entry.path)
                yield reading.entry

    def _is_another_name(self, found: Found) -> bool:
        """Whether a file was met before under another name. Whether it still is the same one is
        decided when that one has been read: names move while a backup runs."""
        if found.error is not None or found.status.st_nlink < 2 or not stat.S_ISREG(found.status.st_mode):
            return False
        inode = (found.status.st_dev, found.status.st_ino)
        known = inode in self._met
        self._met.add(inode)
        self._names[records.path_text(found.path)] = inode
        return known

    def _link(self, found: Found) -> Entry | None:
        first = self._links.get((found.status.st_dev, found.status.st_ino))
        return _entry(found, "hardlink", target=first) if first else None

    def _without_reading(self, writer: Writer, found: Found) -> Entry | None:
        """The entry, unless the content of a file has to be read for it."""
        mode = found.status.st_mode
        if found.error is not None:
            return _entry(found, "unreadable", reason=found.error.strerror or str(found.error))
        if stat.S_ISDIR(mode):
            return _entry(found, "dir")
        if stat.S_ISLNK(mode):
            try:
                return _entry(found, "symlink", target=records.path_text(os.readlink(found.location)))
            except OSError as exc:
                return _entry(found, "unreadable", reason=exc.strerror or str(exc))
        if stat.S_ISFIFO(mode):
            return _entry(found, "fifo")
        if not stat.S_ISREG(mode):
            return _entry(found, "unreadable", reason="it is a socket or a device, which has no content to back up")
        return self._unchanged(writer, found)

    def _unchanged(self, writer: Writer, found: Found) -> Entry | None:
        """The parent's entry for this file, if it is still true."""
        old = self._parent_at(records.path_order(found.path))
        status = found.status
        if (
            old is None
            or old.type != "file"
            or old.unstable
            or old.size != status.st_size
            or old.mtime_ns != status.st_mtime_ns
            or old.ctime_ns != status.st_ctime_ns
            or old.inode != status.st_ino
            or status.st_ctime_ns >= self._trusted_before_ns
            or not writer.has(old.stored)
        ):
            return None
        return old

    def _parent_at(self, key: bytes) -> Entry | None:
        """The parent's entry at this place; both run in the same order, so each is read once."""
        while self._parent_key < key:
            entry = self._next_of_parent()
            self._parent_entry = entry
            self._parent_key = records.path_order(entry.raw_path) if entry else b"\xff" * 8192
        return self._parent_entry if self._parent_key == key else None

    def _next_of_parent(self) -> Entry | None:
        try:
            return next(self._parent_entries, None)
        except Corrupt as exc:
            self._repository.sink.event(
                Event("parent.damaged", f"{exc.message} What the last snapshot holds from there on is read again.")
            )
            return None

    def _take(self, writer: Writer, entry: Entry) -> None:
        writer.add_entry(entry)
        if entry.type == "file":
            self._files += 1
            self._bytes += entry.size
            if self._files % 256 == 0 or entry.size > 1 << 20:
                self._tell()
        elif entry.type == "hardlink":
            self._files += 1

    def _tell(self) -> None:
        self._repository.sink.progress(
            Progress("backup", self._bytes, self._total_bytes, self._files, self._total_files)
        )

    def problem(self, path: bytes, kind: str, reason: str) -> None:
        if kind == "unreadable":
            self._unreadable += 1
        elif kind == "unstable":
            self._unstable += 1
        text = records.path_text(path)
        if len(self.problems) < _PROBLEMS_NAMED_MAX:
            self.problems.append(Problem(text, kind, reason))
        self._repository.sink.event(Event(f"file.{kind}", f"{text}: {reason}", {"path": text}))


def _time_ns(snapshot: Snapshot) -> int:
    """When the work on it began; 0, so that nothing is trusted, where somebody's program wrote no time."""
    try:
        return records.time_ns(snapshot.time)
    except ValueError:
        return 0


def _entry(found: Found, kind: records.EntryType, *, target: str = "", reason: str = "") -> Entry:
    status = found.status
    return Entry(
        path=records.path_text(found.path),
        type=kind,
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        mtime_ns=status.st_mtime_ns,
        target=target,
        reason=reason,
    )
