"""Bring a snapshot back: build it beside the target, verify every chunk, make it durable, swap.

Until the swap nothing in the target changes. A restore that was killed is continued: what it left
in its staging folder is hashed and, where right, used. The swap is one system call where the
system has it; a journal in the lock file tells the next restore whether it had happened.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import msgspec

from outlast.backup.folder import Folder, Metadata, exchange, remove_tree, sync_everything, sync_folder
from outlast.backup.merge import merge
from outlast.backup.restore_plan import (
    HASHING_THREADS,
    RestorePlan,
    batches,
    beside,
    first_few,
    kept_name,
    plan,
    shown,
)
from outlast.backup.staging import Staging
from outlast.errors import Busy, Corrupt, OutlastError, Refused, StoreFull, Unavailable
from outlast.events import Event
from outlast.repo.repository import Repository

__all__ = ["RestorePlan", "RestoreReport", "Skipped", "execute", "plan"]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EROFS, errno.EACCES, errno.EPERM}
_JOURNAL_BYTES_MAX = 1 << 16


class Skipped(msgspec.Struct, frozen=True):
    """Something of the snapshot that is not in the result as it was when backed up."""

    path: str
    reason: str


class RestoreReport(msgspec.Struct):
    """What a restore did. It ends with an error or with `verified` content: every byte was hashed."""

    snapshot: str
    files: int
    bytes: int
    bytes_fetched: int
    verified: bool
    seconds: float
    kept_as: str
    skipped: list[Skipped] = []


class _Journal(msgspec.Struct):
    """A swap that is about to happen: once `staging` has the inode of the old folder, it did."""

    staging: str
    device: int
    inode: int
    kept_as: str
    """where the old folder is to go; empty: it is removed"""


def execute(repository: Repository, plan: RestorePlan) -> RestoreReport:
    """Carry out a plan. Whatever it raises, the target is as it was and the next try continues.

    Raises `Busy`, `Corrupt` (naming the files that can't be had), `StoreFull`, `Refused`, `Unavailable`.
    """
    started = repository.clock.monotonic_seconds()
    with translated(plan.target, plan.bytes, plan.staging), exclusive(plan.target) as lock:
        kept = _finish_swap(plan, lock)
        metadata = Metadata()
        fetched = 0
        if not plan.unchanged:
            if (plan.mode == "new") == os.path.lexists(plan.target):
                raise Refused(
                    f"{shown(plan.target)} was made or removed since the restore was planned.", hint="Run it again."
                )
            fetched = _build(repository, plan, metadata)
            kept = _put_in_place(repository, plan, lock, metadata) or kept
        elif os.path.lexists(plan.staging):
            remove_tree(plan.staging)
    return RestoreReport(
        snapshot=plan.snapshot.id,
        files=plan.files,
        bytes=plan.bytes,
        bytes_fetched=fetched,
        verified=True,
        seconds=repository.clock.monotonic_seconds() - started,
        kept_as=shown(kept),
        skipped=[Skipped(path, reason) for path, reason in metadata.failed],
    )


# -- one restore at a time ---------------------------------------------------------------------------


@contextmanager
def exclusive(target: bytes) -> Iterator[int]:
    """Hold the lock of a target; yields the descriptor of the lock file. Raises `Busy`."""
    make_parents(os.path.dirname(target))
    path = beside(target, ".outlast-lock")
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one who held it before may have removed the file after we opened it.
            if os.path.samestat(os.fstat(fd), os.lstat(path)):
                break
        except FileNotFoundError:
            pass
        except BlockingIOError as exc:
            os.close(fd)
            raise Busy(
                f"another restore to {shown(target)} is under way; this one changed nothing.",
                hint="Wait for it to end, or restore to another folder.",
            ) from exc
        os.close(fd)
    try:
        yield fd
    except BaseException:
        if not os.fstat(fd).st_size:  # else the journal of a swap that was cut short: the next one needs it
            os.unlink(path)
        os.close(fd)
        raise
    with suppress(FileNotFoundError):
        os.unlink(path)
    os.close(fd)


def make_parents(path: bytes) -> None:
    """Make a folder and those above it, durably."""
    missing = []
    while not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    for folder in reversed(missing):
        with suppress(FileExistsError):
            os.mkdir(folder)
        sync_folder(os.path.dirname(folder))


def _finish_swap(plan: RestorePlan, lock: int) -> bytes:
    """Put away the old folder of a restore that was killed right after its swap; returns where it went."""
    text = os.pread(lock, _JOURNAL_BYTES_MAX, 0)
    if not text:
        return b""
    try:
        journal = msgspec.json.decode(text, type=_Journal)
    except msgspec.DecodeError:
        os.ftruncate(lock, 0)  # cut short while it was written, so no swap has followed it
        return b""
    staging, kept = bytes.fromhex(journal.staging), bytes.fromhex(journal.kept_as)
    kept_as = b""
    with suppress(FileNotFoundError):
        found = os.lstat(staging)
        if (found.st_dev, found.st_ino) == (journal.device, journal.inode):
            taken = os.path.lexists(kept)
            kept_as = _put_away(staging, kept_name(plan.target, plan.stamp) if kept and taken else kept)
    os.ftruncate(lock, 0)
    return kept_as


def _put_away(old: bytes, kept_as: bytes) -> bytes:
    if kept_as:
        os.rename(old, kept_as)
        sync_folder(os.path.dirname(old))
    else:
        remove_tree(old)
    return kept_as


# -- build and swap ----------------------------------------------------------------------------------


def _build(repository: Repository, plan: RestorePlan, metadata: Metadata) -> int:
    """Everything into the staging folder, durable; returns how many plain bytes were fetched."""
    resumed = _open_staging(plan)
    _warn_of_space(repository, plan)
    with Folder(plan.staging) as folder, ThreadPoolExecutor(HASHING_THREADS, thread_name_prefix="hash") as pool:
        old = Folder(plan.target) if plan.mode != "new" else None
        staging = Staging(repository, plan, folder, old, metadata, pool, resumed=resumed)
        try:
            for batch in batches(plan.entries(repository)):
                staging.add(batch)
            if staging.lost:
                raise _lost(plan, staging.lost)
            staging.finish()
            sync_everything(folder)
        finally:
            staging.meter.report()
            if old is not None:
                old.__exit__(None, None, None)
        return staging.bytes_fetched


def _open_staging(plan: RestorePlan) -> bool:
    """Make the staging folder, or take over the one of a killed restore; returns whether it was there."""
    try:
        os.mkdir(plan.staging, 0o700)
        os.chmod(plan.staging, 0o700)  # a parent with setgid would pass it on
        with suppress(PermissionError):
            os.chown(plan.staging, -1, os.getegid())
        return False
    except FileExistsError:
        found = os.lstat(plan.staging)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise Refused(
                f"{shown(plan.staging)} is in the way: it is no folder of a restore by this user.",
                hint="See what it is, and move it away.",
            ) from None
        os.chmod(plan.staging, 0o700)
        return True


def _warn_of_space(repository: Repository, plan: RestorePlan) -> None:
    free = _free_bytes(plan.target)
    if plan.bytes_to_fetch > free:
        reason = f"{plan.bytes_to_fetch} bytes are to be written, and {free} are free at {shown(plan.target)}."
        repository.sink.event(Event("restore.space", reason, {"needed": plan.bytes_to_fetch, "free": free}))


def _free_bytes(target: bytes) -> int:
    room = os.statvfs(os.path.dirname(target))
    return room.f_bavail * room.f_frsize


def _lost(plan: RestorePlan, lost: dict[str, OutlastError]) -> OutlastError:
    for error in lost.values():
        if error.retryable:
            return error
    cause = next(iter(lost.values()))
    return Corrupt(
        f"{len(lost)} of {plan.files} files can't be restored: {first_few(sorted(lost))}. "
        f"The first reason: {cause.message} {shown(plan.target)} is untouched.",
        hint=f"{cause.hint} The others can be restored with `--include`; what was fetched is kept in "
        f"{shown(plan.staging)} and used by the next restore of this snapshot to this place.".strip(),
    )


def _put_in_place(repository: Repository, plan: RestorePlan, lock: int, metadata: Metadata) -> bytes:
    """The moment at which the target changes; returns where what it replaced is kept."""
    parent = os.path.dirname(plan.target)
    if plan.mode == "merge":
        kept_any = merge(plan, plan.entries(repository), metadata)
        remove_tree(plan.staging)
        sync_folder(parent)
        return plan.target + b"/**/*.before-" + plan.stamp.encode() if kept_any else b""
    if plan.mode == "new":
        os.rename(plan.staging, plan.target)
        sync_folder(parent)
        return b""
    # Whatever came into an empty target since the plan was made is kept too.
    keep = not plan.overwrite and (plan.kept_as is not None or bool(os.listdir(plan.target)))
    kept_as = kept_name(plan.target, plan.stamp) if keep else b""
    found = os.lstat(plan.target)
    journal = _Journal(plan.staging.hex(), found.st_dev, found.st_ino, kept_as.hex())
    os.pwrite(lock, msgspec.json.encode(journal), 0)
    os.fsync(lock)
    sync_folder(parent)
    if exchange(plan.staging, plan.target):
        sync_folder(parent)
        _put_away(plan.staging, kept_as)
    else:
        aside = kept_as or kept_name(plan.target, plan.stamp)
        os.rename(plan.target, aside)
        os.rename(plan.staging, plan.target)
        sync_folder(parent)
        if not keep:
            remove_tree(aside)
    return kept_as


@contextmanager
def translated(target: bytes, needed_bytes: int, staging: bytes = b"") -> Iterator[None]:
    """Errors of the operating system, in the words of this package."""
    try:
        yield
    except OSError as exc:
        what, reason = shown(target), exc.strerror or str(exc)
        named = f" ({os.fsdecode(exc.filename)})" if isinstance(exc.filename, str | bytes) else ""
        kept = f" What was restored so far is kept in {shown(staging)} and used by the next try." if staging else ""
        if exc.errno in _FULL:
            raise StoreFull(
                f"there is no room for the restore to {what}: {reason}. It takes {needed_bytes} bytes, "
                f"{_free_bytes(target)} are free now. {what} is untouched.",
                hint=f"Free space or raise the limit, then run the same command again.{kept}",
            ) from exc
        if exc.errno in _DENIED:
            raise Refused(
                f"the system does not let us restore to {what}: {reason}{named}. It is untouched.",
                hint="Check who owns the folder above it, its mode, and whether the disk is read-only.",
            ) from exc
        if exc.errno == errno.EEXIST:
            raise Refused(
                f"two names of the snapshot are one name on the disk of {what}{named}. It is untouched.",
                hint="Restore to a file system that tells capital letters from small ones.",
            ) from exc
        raise Unavailable(f"the disk failed while restoring to {what}: {reason}{named}.", hint=kept.strip()) from exc
