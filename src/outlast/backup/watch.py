"""Follow the folder that a trainer writes its checkpoints to: each becomes a snapshot once it is whole.

Nothing is kept besides the log: a checkpoint is backed up when no snapshot of that name and tag tells of the same
files. So this can be killed, moved and started again. In the folder nothing is ever opened for writing.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

import msgspec

from outlast import records
from outlast.backup import trained, wholeness
from outlast.backup.create import create
from outlast.backup.trained import Contents, Found, Seen
from outlast.backup.walk import Root, walk
from outlast.errors import Corrupt, InvalidInput, NoRepository, OutlastError, Refused, StoreFull, Unavailable
from outlast.events import Event
from outlast.records import Snapshot
from outlast.repo import forget
from outlast.repo.repository import Repository
from outlast.repo.retention import Policy
from outlast.repo.state import SNAPSHOT
from outlast.store.layers import own_folder

TAG = "checkpoint"
"""The tag that tells which child of the folder a snapshot is of; "." for the folder itself."""
INCOMPLETE = ".incomplete"
"""The name of snapshots that may not be whole ends with it, so that `latest` and the retention of the others never meet
them."""
QUIET_SECONDS = 10.0
PATIENCE_SECONDS = 900.0

_LOOK_EVERY_SECONDS = 30.0
"""Also where nothing tells of changes, as of those that another machine makes over NFS."""
_RETRY_SECONDS = (1.0, 300.0)
_SPOILT_MAX = 3

_Place = tuple[str, tuple[str, ...]]
"""(host, sources) of a snapshot"""


class Taken(msgspec.Struct, frozen=True):
    """A checkpoint that was backed up."""

    checkpoint: str
    snapshot: str
    name: str
    files: int
    bytes: int
    bytes_added: int
    bytes_stored: int
    seconds: float
    flaw: str = ""
    """why it may not be whole; "" for all but those that never became so"""
    unsound: int = 0
    """files in it that could not be read, or kept changing"""
    forgotten: tuple[str, ...] = ()
    """ids that the retention dropped after it"""


class Waiting(msgspec.Struct, frozen=True):
    """A checkpoint that is not backed up yet, and why."""

    checkpoint: str
    reason: str


class Look(msgspec.Struct, frozen=True):
    """What one look at the folder came to."""

    taken: tuple[Taken, ...]
    waiting: tuple[Waiting, ...]
    unchanged: int
    """checkpoints that the repository has already"""
    others: tuple[str, ...]
    """children of the folder that are no checkpoints"""
    next_seconds: float
    """until when it is worth looking again, unless something changes"""


class _Spoilt(Exception):
    """The checkpoint changed, or went, while it was read; in the latter case there is nothing left to wait for."""

    def __init__(self, reason: str, is_gone: bool) -> None:
        super().__init__(reason)
        self.is_gone = is_gone


class _Due(msgspec.Struct, frozen=True):
    """Whether a checkpoint is to be taken now: it is where there is no `reason` to wait for `seconds` more."""

    reason: str = ""
    seconds: float = 0.0
    flaw: str = ""


class _Followed:
    """What is known of one checkpoint since this process began."""

    def __init__(self) -> None:
        self.seen: tuple[Seen, ...] = ()
        self.since_seconds = 0.0
        self.settled: tuple[Seen, ...] | None = None
        """as it was when the repository had it, or was to have no more of it"""
        self.spoilt = 0
        self.told = ""
        """the last thing that was told of it"""


class Watch:
    """Follows one folder. `look` does all that is due now, and is to be called again and again.

    A checkpoint is whole when nothing of it has changed for `quiet_seconds` and `wholeness` finds no flaw. With `once`
    the time since it changed is that of the file system; else what was seen here counts, for clocks of file servers
    differ. One that has a flaw and stays as it is for `patience_seconds` is taken all the same, under a name of its
    own. `policy` is applied to the snapshots of this name after each backup.
    """

    def __init__(
        self,
        repository: Repository,
        folder: bytes | str,
        *,
        name: str | None = None,
        policy: Policy | None = None,
        quiet_seconds: float = QUIET_SECONDS,
        patience_seconds: float = PATIENCE_SECONDS,
        once: bool = False,
        tell: Callable[[Taken], None] = lambda taken: None,
    ) -> None:
        """Raises `InvalidInput` for what is no folder, `Refused` for a folder inside the repository."""
        self._repository = repository
        self._clock = repository.clock
        self.folder = os.path.realpath(os.fsencode(folder))
        own_name = os.path.basename(self.folder) or b"root"
        self.name = own_name.decode(errors="replace") if name is None else name
        self._policy = policy
        self._quiet_seconds = quiet_seconds
        self._patience_seconds = patience_seconds
        self._once = once
        self._tell_taken = tell
        self._followed: dict[bytes, _Followed] = {}
        self._made: dict[tuple[str, str], dict[_Place, Snapshot]] = {}
        """(name, checkpoint) -> the last snapshot from each place, also where that was forgotten"""
        self._read_whole_log = False
        self._retry_seconds = 0.0
        self._retry_at = 0.0
        self._out_of_reach = ""
        self._is_missing = False
        if os.path.exists(self.folder) and not os.path.isdir(self.folder):
            raise InvalidInput(f"{os.fsdecode(self.folder)} is no folder; nothing was backed up.")
        inside = own_folder(repository.store)
        if inside is not None and (self.folder + b"/").startswith(inside + b"/"):
            raise Refused(f"{os.fsdecode(self.folder)} lies inside the repository itself; nothing was backed up.")

    # -- looking ---------------------------------------------------------------------------------

    def look(self) -> Look:
        """Back up what is whole now and not in the repository.

        A store that is out of reach is told, and tried again by a later look; with `once` the error is raised.
        """
        contents = self._contents()
        for gone in self._followed.keys() - {found.name for found in contents.checkpoints}:
            self._tell_gone(gone)
        taken: list[Taken] = []
        waiting: list[Waiting] = []
        unchanged = 0
        next_seconds = _LOOK_EVERY_SECONDS
        for found in contents.checkpoints:
            followed = self._observe(found)
            if followed.settled == found.seen:
                unchanged += 1
                continue
            due = self._due(found, followed, contents)
            if due.reason and self._once and self._is_known(found, self.name):
                unchanged += 1  # if it is about to change, the next one will see that
                continue
            if not due.reason:
                try:
                    done = self._settle(found, followed, due.flaw)
                    unchanged += done is None
                    taken += [done] if done else []
                except OutlastError as exc:
                    due = self._put_off(exc)
                except _Spoilt as exc:
                    due = _Due("" if exc.is_gone else str(exc), self._quiet_seconds)
            if due.reason:
                waiting.append(Waiting(_text(found.name), due.reason))
                next_seconds = min(next_seconds, due.seconds)
        others = tuple(map(_text, contents.others))
        return Look(tuple(taken), tuple(waiting), unchanged, others, max(next_seconds, 0.1))

    def _contents(self) -> Contents:
        try:
            root = Root(b".", self.folder, os.stat(self.folder))
            seen = list(self._walk(root))
            if seen and seen[0].path == b".":
                raise OSError(errno.EACCES, seen[0].reason)
        except OSError as exc:
            problem = f"{os.fsdecode(self.folder)} can't be looked at: {exc.strerror}."
            if self._once:
                raise InvalidInput(f"{problem} Nothing was backed up.") from exc
            if not self._is_missing:
                self._tell("folder.missing", f"{problem} It is waited for.")
            self._is_missing = True
            return Contents([], [], {})
        self._is_missing = False
        return trained.contents(seen, os.path.basename(self.folder))

    def _walk(self, root: Root) -> Iterator[Seen]:
        own = own_folder(self._repository.store)

        def skip(path: bytes, status: os.stat_result) -> bool:
            if own is not None and self._location(path) == own:
                return True
            # What has a passing name is looked at once it has its own; hidden files may be marks, folders are not.
            is_hidden_folder = stat.S_ISDIR(status.st_mode) and path.startswith(b".")
            return b"/" not in path and (is_hidden_folder or trained.is_being_written(path))

        for found in walk(root, skip):
            if found.path == b"." and found.error is None:
                continue  # the folder itself
            yield _seen(found.path, found.status, found.error)

    def _observe(self, found: Found) -> _Followed:
        followed = self._followed.setdefault(found.name, _Followed())
        if followed.seen != found.seen:
            followed.seen = found.seen
            followed.since_seconds = self._clock.monotonic_seconds()
        return followed

    def _unchanged_seconds(self, found: Found, followed: _Followed) -> float:
        if not self._once:
            return self._clock.monotonic_seconds() - followed.since_seconds
        # Somebody may have set the time of a file ahead, but not when that was done.
        now_ns = self._clock.now_ns()
        times = (time for each in found.seen for time in (each.mtime_ns, each.ctime_ns))
        newest_ns = max((time for time in times if time <= now_ns), default=0)
        ahead_ns = max((each.ctime_ns for each in found.seen), default=0)
        return (now_ns - max(newest_ns, ahead_ns)) / 1e9

    def _due(self, found: Found, followed: _Followed, contents: Contents) -> _Due:
        wait_seconds = self._retry_at - self._clock.monotonic_seconds()
        if wait_seconds > 0:
            return _Due(self._out_of_reach, wait_seconds)
        unchanged_seconds = self._unchanged_seconds(found, followed)
        if unchanged_seconds < self._quiet_seconds:
            return _Due("it is still changing", self._quiet_seconds - unchanged_seconds)
        flaw = self._flaw(found, contents)
        if not flaw and followed.spoilt > _SPOILT_MAX:
            return _Due(flaw="it changed each time while it was read")
        if not flaw or unchanged_seconds >= self._patience_seconds:
            return _Due(flaw=flaw)
        if flaw != followed.told and not self._once:
            followed.told = flaw
            self._tell("checkpoint.waiting", f"{_text(found.name)} is not whole yet: {flaw}.", found)
        return _Due(flaw, self._patience_seconds - unchanged_seconds)

    def _flaw(self, found: Found, contents: Contents) -> str:
        try:
            return wholeness.flaw(found, contents.pointers, self._read)
        except FileNotFoundError:
            return "files of it are vanishing"
        except OSError as exc:
            name = os.fsdecode(exc.filename) if exc.filename else "a file of it"
            return f"{name} can't be read: {exc.strerror}"

    def _read(self, path: bytes, offset: int, length: int) -> bytes:
        location = self._location(path)
        # Without blocking: what was a file may be a pipe by now.
        fd = os.open(location, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            pieces = []
            while length and (piece := os.pread(fd, length, offset)):
                pieces.append(piece)
                offset, length = offset + len(piece), length - len(piece)
            return b"".join(pieces)
        finally:
            os.close(fd)

    def _location(self, path: bytes) -> bytes:
        return os.path.join(self.folder, path)

    # -- the log ---------------------------------------------------------------------------------

    def _settle(self, found: Found, followed: _Followed, flaw: str) -> Taken | None:
        """Back it up, unless the repository has it. Raises `_Spoilt`, `OutlastError`."""
        if self._now(found) != found.seen:
            raise _Spoilt("it is still changing", is_gone=False)  # since this look began, which may be long ago
        self._repository.refresh()
        is_known = self._is_known(found, self.name + INCOMPLETE if flaw else self.name)
        taken = None if is_known else self._back_up(found, followed, flaw)
        self._retry_seconds = self._retry_at = 0.0
        self._out_of_reach = ""
        followed.settled = found.seen
        followed.spoilt = 0
        return taken

    def _is_known(self, found: Found, name: str) -> bool:
        """Whether a snapshot of it tells of the same files, or did before it was forgotten."""
        here = socket.gethostname(), tuple(self._sources(found))
        for place, last in self._last(name, _text(found.name)).items():
            if last.id not in self._repository.state.snapshots:
                if place == here and found.touched_ns < _time_ns(last):
                    return True
                continue
            readable = [each.path for each in found.files if last.unreadable and self._is_readable(each.path)]
            try:
                relation = trained.compare(found, self._repository.entries(last), readable)
            except Corrupt:
                continue  # a backup stores again what was damaged
            if relation == "fewer" and place == here:
                kept = f"snapshot {last.id[:8]} has them"
                self._tell("checkpoint.thinned", f"files of {_text(found.name)} were deleted; {kept}.", found)
            if relation == "same" or (relation == "fewer" and place == here):
                return True
        return False

    def _sources(self, found: Found) -> list[str]:
        """As they stand in a snapshot."""
        return [os.fsdecode(self._location(source)).encode(errors="replace").decode() for source in found.sources]

    def _is_readable(self, path: bytes) -> bool:
        return os.access(self._location(path), os.R_OK, effective_ids=os.access in os.supports_effective_ids)

    def _last(self, name: str, checkpoint: str) -> dict[_Place, Snapshot]:
        """The last snapshots of a checkpoint, one from each place that it was in."""
        self._note(self._repository.snapshots())
        if (name, checkpoint) not in self._made and not self._read_whole_log:
            self._made.clear()
            self._note(self._ever())
            self._note(self._repository.snapshots())
            self._read_whole_log = True
        return self._made.get((name, checkpoint), {})

    def _note(self, snapshots: Iterable[Snapshot]) -> None:
        for each in snapshots:
            if TAG in each.tags and each.name in (self.name, self.name + INCOMPLETE):
                self._made.setdefault((each.name, each.tags[TAG]), {})[each.host, tuple(each.sources)] = each

    def _ever(self) -> Iterator[Snapshot]:
        """Every snapshot that the log tells of, those that were forgotten included."""
        log = self._repository.log
        seqs = log.listed()
        for seq, data in zip(seqs, log.read_many(seqs), strict=True):
            with suppress(Corrupt):  # at worst something forgotten is backed up again
                entry = log.parse(data, seq) if data is not None else None
                if entry is not None and entry.kind == SNAPSHOT:
                    yield msgspec.convert(entry.body["snapshot"], Snapshot)

    # -- backing up ------------------------------------------------------------------------------

    def _back_up(self, found: Found, followed: _Followed, flaw: str) -> Taken:
        name = self.name + INCOMPLETE if flaw else self.name

        def same() -> None:
            if not flaw:
                self._assert_same(found, followed)

        try:
            report = create(
                self._repository,
                [self._location(source) for source in found.sources],
                name=name,
                tags={TAG: _text(found.name), **trained.tags(found.name), **({"flaw": flaw} if flaw else {})},
                before_commit=same,
            )
        except InvalidInput:
            self._assert_same(found, followed)  # it is gone
            raise
        if flaw:
            what = f"{_text(found.name)} was backed up as {name}, for it is not whole: {flaw}."
            self._tell("checkpoint.damaged", what, found)
        taken = Taken(
            checkpoint=_text(found.name),
            snapshot=report.snapshot,
            name=name,
            files=report.files,
            bytes=report.bytes,
            bytes_added=report.bytes_added,
            bytes_stored=report.bytes_stored,
            seconds=report.seconds,
            flaw=flaw,
            unsound=report.unreadable + report.unstable,
            forgotten=self._forget(name),
        )
        fields = msgspec.to_builtins(taken)
        self._repository.sink.event(Event("checkpoint.backed_up", f"{taken.checkpoint} was backed up.", fields))
        self._tell_taken(taken)
        return taken

    def _assert_same(self, found: Found, followed: _Followed) -> None:
        """Raise `_Spoilt` unless every file of a checkpoint is as it was, so that the snapshot is of one instant."""
        now = self._now(found)
        if now == found.seen:
            return
        is_gone = not {each.path for each in now} >= {each.path for each in found.seen}
        if is_gone:
            reason = "it was deleted while it was backed up"
            followed.settled = followed.seen
        else:
            reason = "it changed while it was backed up"
            followed.spoilt += 1
        self._tell("checkpoint.skipped", f"{_text(found.name)}: {reason}; that is not in the repository.", found)
        raise _Spoilt(reason, is_gone)

    def _now(self, found: Found) -> tuple[Seen, ...]:
        seen: list[Seen] = []
        for source in found.sources:
            with suppress(FileNotFoundError):
                location = self._location(source)
                seen += self._walk(Root(source, location, os.lstat(location)))
        return tuple(seen)

    def _forget(self, name: str) -> tuple[str, ...]:
        """Apply the retention. Where it can't be, that is told: the backup before it is done."""
        if self._policy is None:
            return ()
        try:
            plan = forget.plan(self._repository, name=name, policy=self._policy)
            return forget.execute(self._repository, plan).forgotten if plan.forgotten() else ()
        except (Refused, Unavailable) as exc:
            self._tell("retention.failed", exc.message)
            return ()

    def _put_off(self, exc: OutlastError) -> _Due:
        """Note that the repository can't be used now, or raise what waiting would not change."""
        if self._once or not (exc.retryable or isinstance(exc, StoreFull | NoRepository)):
            raise exc
        first, last = _RETRY_SECONDS
        self._retry_seconds = min(max(first, 2 * self._retry_seconds), last)
        self._retry_at = self._clock.monotonic_seconds() + self._retry_seconds
        if not self._out_of_reach:
            self._tell("watch.failed", f"{exc.message} It is tried again, at first after {first:g} s.")
        self._out_of_reach = exc.message
        return _Due(exc.message, self._retry_seconds)

    # -- telling ---------------------------------------------------------------------------------

    def _tell_gone(self, name: bytes) -> None:
        followed = self._followed.pop(name)
        if followed.settled is None and not self._is_missing:
            reason = f"{_text(name)} is gone, and was never backed up."
            self._repository.sink.event(Event("checkpoint.lost", reason, {TAG: _text(name)}))

    def _tell(self, kind: str, reason: str, found: Found | None = None) -> None:
        fields = {TAG: _text(found.name)} if found else {}
        self._repository.sink.event(Event(kind, reason, fields))


def _seen(path: bytes, status: os.stat_result, error: OSError | None) -> Seen:
    if error is not None:
        return Seen(path, "unreadable", reason=error.strerror or str(error))
    mode = status.st_mode
    if stat.S_ISDIR(mode):
        return Seen(path, "dir", inode=status.st_ino)
    return Seen(
        path=path,
        kind="file" if stat.S_ISREG(mode) else "link" if stat.S_ISLNK(mode) else "other",
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        ctime_ns=status.st_ctime_ns,
        inode=status.st_ino,
    )


def _time_ns(snapshot: Snapshot) -> int:
    try:
        return records.time_ns(snapshot.time)
    except ValueError:
        return 0


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
