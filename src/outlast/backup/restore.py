"""Bring a snapshot back: build it beside the target, verify every chunk, make it durable, swap.

Until the swap nothing in the target changes. A restore that was killed is continued: what it left
in its staging folder is hashed and, where right, used. The swap is one system call where the
system has it; a journal in the lock file tells the next restore whether it had happened.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import msgspec

from outlast.backup.folder import Folder, Metadata, exchange, remove_tree, sync_everything, sync_folder
from outlast.backup.merge import make_durable, merge
from outlast.backup.nearest import Holder, Nearest, Source
from outlast.backup.restore_plan import (
    HASHING_THREADS,
    RestorePlan,
    batches,
    beside,
    first_few,
    is_kept_name,
    kept_name,
    plan,
    shown,
    why_without_content,
)
from outlast.backup.staging import Staging
from outlast.errors import Archived, Busy, Corrupt, OutlastError, Refused, StoreFull, Unavailable
from outlast.events import Event

__all__ = ["RestorePlan", "RestoreReport", "Skipped", "execute", "plan"]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EXDEV}
_JOURNAL_BYTES_MAX = 1 << 16


class Skipped(msgspec.Struct, frozen=True):
    """Something of the snapshot that is not in the result as it was when backed up."""

    path: str
    reason: str


class RestoreReport(msgspec.Struct):
    """What a restore did.

    `verified` is always true: a restore in which a file's content could not be verified ends with an
    error. It says that in this run every chunk of every file was hashed against its id: fetched
    ones after they were decoded, those that were on the disk already where they lie, copied ones
    after the copying. `skipped` has no content, or lacks some metadata.
    """

    snapshot: str
    files: int
    bytes: int
    bytes_fetched: int
    verified: bool
    seconds: float
    kept_as: str
    """where the folder or file that was there before is; empty where there is none, and after a merge"""
    skipped: list[Skipped] = []
    kept_files: int = 0
    """of a merge: how many old files and folders are kept beside their originals, as `NAME.before-<time>`"""
    path: str = ""
    """the folder or file that was restored"""
    tensors: list[str] = []
    """of a restore of tensors: their names in the file"""
    renamed: dict[str, str] = {}
    """of those tensors, the ones that have another name there than in the snapshot, and that name"""
    sources: list[Source] = []
    """how much came from where: the repositories in the order given, and last the target, where something was right
    there already. With `bytes_holes` they add up to `bytes`; of tensors they say what was read"""
    bytes_holes: int = 0
    """of sparse files: zeros that come from nowhere"""


class _Journal(msgspec.Struct):
    """A swap that is about to happen: once `staging` has the inode of the old folder, it did."""

    staging: str
    device: int
    inode: int
    kept_as: str
    """where the old folder is to go; empty: it is removed"""


def execute(repository: Holder, plan: RestorePlan) -> RestoreReport:
    """Carry out a plan. Whatever it raises, the target is as it was and the next try continues.

    Raises `Busy`, `Corrupt` (naming the files that can't be had), `StoreFull`, `Refused`, `Unavailable`.
    """
    started = repository.clock.monotonic_seconds()
    metadata = Metadata()
    skipped: dict[bytes, str] = {}
    fetched = kept_files = 0
    with translated(plan.target, plan.bytes, plan.staging) as stage, exclusive(plan.target) as lock:
        kept = _finish_swap(repository, plan, lock) or _rescue(repository, plan)
        if not plan.unchanged:
            if (plan.mode == "new") == os.path.lexists(plan.target):
                raise Refused(
                    f"{shown(plan.target)} was made or removed since the restore was planned.", hint="Run it again."
                )
            built = _build(repository, plan, metadata)
            fetched, skipped = built.bytes_fetched, built.skipped
            sources = _sources(repository, built)
            if plan.mode == "merge":
                kept_files = _merge(repository, plan, built, metadata, stage)
            else:
                kept = _put_in_place(repository, plan, lock, built, stage) or kept
        else:
            skipped = _without_content(repository, plan)
            sources = plan.sources
            if plan.is_building:
                remove_tree(plan.staging)
            if plan.mode == "merge":
                make_durable(plan, plan.entries(repository), skipped)
            # What is right may have been put there by a restore that was killed before it was durable.
            sync_folder(os.path.dirname(plan.target))
        with suppress(FileNotFoundError):
            os.unlink(plan.marker)
    return RestoreReport(
        snapshot=plan.snapshot.id,
        files=plan.files,
        bytes=plan.bytes,
        bytes_fetched=fetched,
        verified=True,
        seconds=repository.clock.monotonic_seconds() - started,
        kept_as=shown(kept),
        skipped=[
            *(Skipped(shown(raw), reason) for raw, reason in skipped.items()),
            *(Skipped(path, reason) for path, reason in metadata.failed),
        ],
        kept_files=kept_files,
        path=shown(plan.target),
        sources=sources,
        bytes_holes=plan.bytes_holes,
    )


def _sources(repository: Holder, built: Staging) -> list[Source]:
    if isinstance(repository, Nearest):
        found = repository.sources(built.given)
    else:
        found = [msgspec.structs.replace(built.given.get("", Source("")), where=repository.store.url)]
    return [*found, built.present] if built.present.chunks else found


# -- one restore at a time ---------------------------------------------------------------------------


@contextmanager
def exclusive(target: bytes) -> Iterator[int]:
    """Hold the lock of a target; yields the descriptor of the lock file. Raises `Busy`."""
    make_parents(os.path.dirname(target))
    path = beside(target, ".outlast-lock")
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
        except OSError as exc:
            if exc.errno in {errno.ELOOP, errno.EISDIR, errno.ENXIO}:
                raise _foreign(path) from exc
            raise
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
    if not _is_ours(os.fstat(fd)):
        os.close(fd)
        raise _foreign(path)
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


def _is_ours(found: os.stat_result) -> bool:
    """Whether nobody else can have written what a lock file says."""
    mine = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
    return mine and found.st_nlink == 1 and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _foreign(path: bytes) -> Refused:
    return Refused(
        f"{shown(path)} is in the way: it is not the lock of a restore by this user. Nothing was changed.",
        hint="See what it is and who made it, and remove it.",
    )


def make_parents(path: bytes) -> None:
    """Make a folder and those above it, durably; those that are there may have been made a moment ago."""
    missing = []
    while not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    for folder in reversed(missing):
        with suppress(FileExistsError):
            os.mkdir(folder)
        sync_folder(os.path.dirname(folder))
    while os.stat(path).st_dev == os.stat(above := os.path.dirname(path)).st_dev and above != path:
        with suppress(PermissionError):  # closed to us: whoever made it there had to be able to sync it
            sync_folder(above)
        path = above


def _finish_swap(repository: Holder, plan: RestorePlan, lock: int) -> bytes:
    """Put away the old folder of a restore that was killed right after its swap; returns where it went."""
    text = os.pread(lock, _JOURNAL_BYTES_MAX, 0)
    if not text:
        return b""
    try:
        journal = msgspec.json.decode(text, type=_Journal)
    except msgspec.DecodeError:
        os.ftruncate(lock, 0)  # cut short while it was written, so no swap has followed it
        return b""
    named = _named(plan.target, journal)
    if named is None:
        os.ftruncate(lock, 0)
        reason = f"the journal of a restore to {shown(plan.target)} names what no restore to it makes; it is not used."
        repository.sink.event(Event("restore.journal.ignored", reason, {"target": shown(plan.target)}))
        return b""
    staging, kept = named
    kept_as = b""
    with suppress(FileNotFoundError):
        found = os.lstat(staging)
        if (found.st_dev, found.st_ino) == (journal.device, journal.inode):
            sync_folder(os.path.dirname(staging))  # the swap may still be undone, and then this is the target
            taken = os.path.lexists(kept)
            kept_as = _clear_away(
                repository, plan, staging, kept_name(plan.target, plan.stamp) if kept and taken else kept
            )
        elif staging == plan.staging:
            _mark(plan)  # killed just before the swap, so this is what was built
    os.ftruncate(lock, 0)
    return kept_as


def _named(target: bytes, journal: _Journal) -> tuple[bytes, bytes] | None:
    """The two paths of a journal, if they are such as a restore to this target gives."""
    try:
        staging, kept = bytes.fromhex(journal.staging), bytes.fromhex(journal.kept_as)
    except ValueError:
        return None
    digits = b"0" * 12
    start = beside(target, f".outlast-{digits.decode()}").removesuffix(digits)
    if not staging.startswith(start) or not re.fullmatch(rb"[0-9a-f]{12}", staging[len(start) :]):
        return None
    return (staging, kept) if not kept or is_kept_name(target, kept) else None


def _without_content(repository: Holder, plan: RestorePlan) -> dict[bytes, str]:
    """What of the snapshot is not in a target that is otherwise right, and why."""
    found: dict[bytes, str] = {}
    for raw, entry in plan.entries(repository):
        if entry.type == "unreadable":
            found[raw] = why_without_content(entry)
        elif entry.type == "hardlink" and entry.raw_target in found:
            found[raw] = f"it is one file with {entry.target}: {found[entry.raw_target]}"
    return found


def _rescue(repository: Holder, plan: RestorePlan) -> bytes:
    """Put away what has the name of the staging folder and isn't one; returns where it went.

    It is the user's old folder, if a restore was killed after its swap and the journal is lost.
    """
    try:
        found = os.lstat(plan.staging)
    except FileNotFoundError:
        return b""
    if plan.is_building or not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        return b""
    with suppress(OSError):
        os.rmdir(plan.staging)
        return b""
    kept_as = _put_away(plan.staging, kept_name(plan.target, plan.stamp))
    reason = f"{shown(plan.staging)} may be what an earlier restore replaced; it is kept as {shown(kept_as)}."
    repository.sink.event(Event("restore.old.kept", reason, {"kept_as": shown(kept_as)}))
    return kept_as


def _mark(plan: RestorePlan) -> None:
    """Say, durably, that the staging folder is being built, see `RestorePlan.marker`."""
    with suppress(FileNotFoundError):
        os.unlink(plan.marker)
    os.close(os.open(plan.marker, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    sync_folder(os.path.dirname(plan.marker))


def _clear_away(repository: Holder, plan: RestorePlan, old: bytes, kept_as: bytes) -> bytes:
    """Put the old folder away after a swap: the target is right, so a failure is only a warning."""
    try:
        return _put_away(old, kept_as)
    except OSError as exc:
        where = old
        with suppress(OSError):
            aside = kept_name(plan.target, plan.stamp)
            os.rename(old, aside)
            where = aside
        if not os.path.lexists(where):
            where = kept_as
        reason = (
            f"{shown(plan.target)} is restored as a whole, but what it replaced could not be "
            f"{'moved' if kept_as else 'removed'}: {exc.strerror or exc}."
        )
        if where:
            reason += f" It is kept as {shown(where)}."
        repository.sink.event(Event("restore.old.kept", reason, {"kept_as": shown(where)}))
        return where


def _put_away(old: bytes, kept_as: bytes) -> bytes:
    if kept_as:
        os.rename(old, kept_as)
    else:
        remove_tree(old)
    sync_folder(os.path.dirname(old))
    return kept_as


# -- build and swap ----------------------------------------------------------------------------------


def _build(repository: Holder, plan: RestorePlan, metadata: Metadata) -> Staging:
    """Everything into the staging folder, durable."""
    resumed = _open_staging(plan)
    _warn_of_space(repository, plan)
    with Folder(plan.staging) as folder, ThreadPoolExecutor(HASHING_THREADS, thread_name_prefix="hash") as pool:
        old = Folder(plan.target) if plan.mode != "new" else None
        staging = Staging(repository, plan, folder, old, metadata, pool, resumed=resumed)
        try:
            for batch in batches(plan.entries(repository)):
                staging.add(batch)
            staging.check_links()
            if staging.lost:
                raise _lost(plan, staging.lost)
            staging.finish()
            sync_everything(folder)
        finally:
            staging.meter.report()
            if old is not None:
                old.__exit__(None, None, None)
        return staging


def _open_staging(plan: RestorePlan) -> bool:
    """Make the staging folder, or take over the one of a killed restore; returns whether it was there."""
    resumed = plan.is_building
    if not resumed:
        if os.path.lexists(plan.staging):
            raise Refused(
                f"{shown(plan.staging)} is in the way: it is no folder of a restore by this user.",
                hint="See what it is, and move it away.",
            )
        _mark(plan)
        os.mkdir(plan.staging, 0o700)
        os.chmod(plan.staging, 0o700)  # a parent with setgid would pass it on
        with suppress(PermissionError):
            os.chown(plan.staging, -1, os.getegid())
    os.chmod(plan.staging, 0o700)
    return resumed


def _warn_of_space(repository: Holder, plan: RestorePlan) -> None:
    free = _free_bytes(plan.target)
    if plan.bytes_to_fetch > free:
        reason = f"{plan.bytes_to_fetch} bytes are to be written, and {free} are free at {shown(plan.target)}."
        repository.sink.event(Event("restore.space", reason, {"needed": plan.bytes_to_fetch, "free": free}))


def _free_bytes(target: bytes) -> int:
    room = os.statvfs(os.path.dirname(target))
    return room.f_bavail * room.f_frsize


def _lost(plan: RestorePlan, lost: dict[str, OutlastError]) -> OutlastError:
    archived = [path for path, error in lost.items() if isinstance(error, Archived)]
    if len(archived) == len(lost):
        return Archived(
            f"{len(lost)} of {plan.files} files are in packs that are archived and not thawed yet: "
            f"{first_few(sorted(lost))}. {shown(plan.target)} is untouched.",
            hint=f"`--thaw` starts the thaw. What was fetched is kept in {shown(plan.staging)} and used by the "
            "next restore of this snapshot to this place.",
        )
    real = [each for each in lost.values() if not isinstance(each, Archived)]
    cause = next((each for each in real if each.retryable), real[0])
    kind = type(cause) if cause.retryable else Corrupt
    rest = "What" if cause.retryable else "The others can be restored with `--include`; what"
    return kind(
        f"{len(lost)} of {plan.files} files can't be restored: {first_few(sorted(lost))}. "
        f"{'The' if cause.retryable else 'The first'} reason: {cause.message} {shown(plan.target)} is untouched.",
        hint=f"{cause.hint} {rest} was fetched is kept in "
        f"{shown(plan.staging)} and used by the next restore of this snapshot to this place.".strip(),
    )


def _merge(repository: Holder, plan: RestorePlan, built: Staging, metadata: Metadata, stage: Stage) -> int:
    """The files go to their places one by one; returns how many old ones are kept."""
    what = shown(plan.target)
    stage.safe = f"Each file in {what} is whole: some are restored already, the others as they were."
    kept_files = merge(plan, plan.entries(repository), built.skipped, metadata)
    remove_tree(plan.staging)
    sync_folder(os.path.dirname(plan.target))
    return kept_files


def _put_in_place(repository: Holder, plan: RestorePlan, lock: int, built: Staging, stage: Stage) -> bytes:
    """The moment at which the target changes; returns where what it replaced is kept."""
    parent, what = os.path.dirname(plan.target), shown(plan.target)
    if plan.mode == "new":
        os.rename(plan.staging, plan.target)
        stage.safe = f"{what} is restored as a whole."
        sync_folder(parent)
        return b""
    # Whatever came into an empty target since the plan was made is kept too.
    keep = not plan.overwrite and (plan.kept_as is not None or bool(os.listdir(plan.target)))
    keep = keep or not built.carried_over
    kept_as = kept_name(plan.target, plan.stamp) if keep else b""
    found = os.lstat(plan.target)
    journal = _Journal(plan.staging.hex(), found.st_dev, found.st_ino, kept_as.hex())
    os.pwrite(lock, msgspec.json.encode(journal), 0)
    os.fsync(lock)
    os.unlink(plan.marker)
    sync_folder(parent)
    within = _is_current_folder(plan.target)
    try:
        old = _swap(plan, kept_as, stage)
    except OSError as exc:
        if os.path.lexists(plan.target) and os.path.samestat(os.lstat(plan.target), found):
            _mark(plan)
            os.ftruncate(lock, 0)
            if exc.errno in {errno.EXDEV, errno.EBUSY}:
                raise Refused(
                    f"{what} can't be replaced as a whole on this file system: {exc.strerror}. {stage.safe}",
                    hint=f"Restore to a new folder. {shown(plan.staging)} is what was built, and can be removed.",
                ) from exc
        raise
    if within:
        reason = f"{what}, in which this command runs, was replaced; run `cd .` to be in the restored one."
        repository.sink.event(Event("restore.current_folder", reason, {"target": what}))
    sync_folder(parent)
    return kept_as if old == kept_as else _clear_away(repository, plan, old, kept_as)


def _swap(plan: RestorePlan, kept_as: bytes, stage: Stage) -> bytes:
    """Exchange the staging folder and the target; returns where the old folder now is."""
    what = shown(plan.target)
    restored = f"{what} is restored as a whole; what it replaced is still in "
    if exchange(plan.staging, plan.target):
        stage.safe = f"{restored}{shown(plan.staging)}, and the next restore to this place puts it away."
        return plan.staging
    aside = kept_as or kept_name(plan.target, plan.stamp)
    os.rename(plan.target, aside)
    try:
        os.rename(plan.staging, plan.target)
    except OSError:
        stage.safe = f"What was there is in {shown(aside)}."
        os.rename(aside, plan.target)
        stage.safe = f"{what} is as it was."
        raise
    stage.safe = f"{restored}{shown(aside)}."
    return aside


def _is_current_folder(target: bytes) -> bool:
    """Whether this process, and so most likely the shell it was started from, is in that folder."""
    try:
        return (os.getcwdb() + b"/").startswith(target + b"/")
    except FileNotFoundError:
        return False


class Stage:
    """How far a restore is: `safe` tells what the user has if it fails now."""

    def __init__(self, target: bytes) -> None:
        self.safe = f"{shown(target)} is untouched."


@contextmanager
def translated(target: bytes, needed_bytes: int, staging: bytes = b"") -> Iterator[Stage]:
    """Errors of the operating system, in the words of this package."""
    stage = Stage(target)
    try:
        yield stage
    except OSError as exc:
        what, reason = shown(target), exc.strerror or str(exc)
        named = f" ({os.fsdecode(exc.filename)})" if isinstance(exc.filename, str | bytes) else ""
        kept = f" What was restored so far is kept in {shown(staging)} and used by the next try." if staging else ""
        if exc.errno in _FULL:
            raise StoreFull(
                f"there is no room for the restore to {what}: {reason}. It takes {needed_bytes} bytes, "
                f"{_free_bytes(target)} are free now. {stage.safe}",
                hint=f"Free space or raise the limit, then run the same command again.{kept}",
            ) from exc
        if exc.errno in _DENIED:
            raise Refused(
                f"the system does not let us restore to {what}: {reason}{named}. {stage.safe}",
                hint="Check who owns the folder above it, its mode, and whether the disk is read-only.",
            ) from exc
        if exc.errno == errno.EEXIST:
            raise Refused(
                f"two names of the snapshot are one name on the disk of {what}{named}. {stage.safe}",
                hint="Restore to a file system that tells capital letters from small ones.",
            ) from exc
        raise Unavailable(
            f"the disk failed while restoring to {what}: {reason}{named}. {stage.safe}", hint=kept.strip()
        ) from exc
