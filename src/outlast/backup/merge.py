"""Put restored files into a folder that has others: each one on its own, what it replaces kept beside it."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Container, Iterable, Iterator

from outlast.backup.folder import PRIVATE, Folder, Metadata, sync_at_once
from outlast.backup.restore_plan import RestorePlan, Selected, batches, kept_already, kept_name
from outlast.errors import Corrupt

FOLDERS_FEW = 16
"""up to here they are synced one by one"""


def merge(plan: RestorePlan, entries: Iterator[Selected], skipped: Container[bytes], metadata: Metadata) -> int:
    """Move what was built in the staging folder to its places; returns how many old ones were kept.

    Every file is replaced by one rename, so that at any instant either version is there, and not
    before the name under which the old one is kept is durable.
    """
    made: list[Selected] = []
    touched: set[bytes] = set()
    with Folder(plan.staging) as staging, Folder(plan.target) as target:
        step = _Merge(plan, staging, target)
        for batch in batches(entries):
            chosen = [each for each in batch if each[0] not in skipped and each[0] != b"."]
            touched |= _folders(chosen)
            wanted = [each for each in chosen if each[0] not in plan.right]
            step.keep(raw for raw, _ in wanted)
            for raw, entry in wanted:
                if entry.type != "dir":
                    step.replace(raw, entry.raw_target if entry.type == "hardlink" else None)
                elif step.make_folder(raw, entry.mode):
                    made.append((raw, entry))
        for raw, entry in reversed(made):
            fd = target.open_file(raw, os.O_RDONLY | os.O_DIRECTORY)
            try:
                metadata.put_on_file(fd, entry)
            finally:
                os.close(fd)
        _sync(target, touched)
    return step.kept_files


def make_durable(plan: RestorePlan, entries: Iterator[Selected], skipped: Container[bytes]) -> None:
    """See to it that names last which are right: a restore that was killed may have given them and not synced."""
    with Folder(plan.target) as target:
        for batch in batches(entries):
            _sync(target, _folders(each for each in batch if each[0] not in skipped and each[0] != b"."))


def _folders(entries: Iterable[Selected]) -> set[bytes]:
    """Those that hold entries, and those that are some."""
    found = set()
    for raw, entry in entries:
        found.add(raw.rpartition(b"/")[0])
        if entry.type == "dir":
            found.add(raw)
    return found


def _sync(target: Folder, folders: Collection[bytes]) -> None:
    """Make the names in these folders durable."""
    if len(folders) > FOLDERS_FEW and sync_at_once(target):
        return
    for folder in sorted(folders):
        fd = target.open_file(folder or b".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class _Merge:
    def __init__(self, plan: RestorePlan, staging: Folder, target: Folder) -> None:
        self._plan = plan
        self._staging = staging
        self._target = target
        self._kept: set[bytes] = set()
        """of this batch: what has its other name already, durably"""
        self.kept_files = 0

    def keep(self, paths: Iterable[bytes]) -> None:
        """Give old files their second names, and make those durable, before anything is replaced."""
        self._kept.clear()
        if self._plan.overwrite:
            return
        for raw in paths:
            found = self._target.status(raw)
            if found is None or stat.S_ISDIR(found.st_mode):
                continue
            name, at = self._target.place(raw)
            try:
                if not kept_already(os.path.join(self._plan.target, raw)):
                    os.link(name, self._kept_name(raw), src_dir_fd=at, dst_dir_fd=at, follow_symlinks=False)
            except OSError:
                continue  # no hard links here: it is renamed when its turn has come
            self._kept.add(raw)
            self.kept_files += 1
        _sync(self._target, {raw.rpartition(b"/")[0] for raw in self._kept})

    def _kept_name(self, raw: bytes) -> bytes:
        return kept_name(os.path.join(self._plan.target, raw), self._plan.stamp).rpartition(b"/")[2]

    def make_folder(self, raw: bytes, mode: int) -> bool:
        """Whether it had to be made; with its mode at once, for should we be killed, the next try takes it as it is."""
        found = self._target.status(raw)
        if found is not None and stat.S_ISDIR(found.st_mode):
            return False
        if raw in self._kept:
            self._target.remove(raw)
        elif found is not None:
            self._put_away(raw)
        name, at = self._target.place(raw)
        os.mkdir(name, PRIVATE | (mode & 0o777 if stat.S_IMODE(mode) < 0o1000 else 0), dir_fd=at)
        return True

    def replace(self, raw: bytes, linked_to: bytes | None) -> None:
        if linked_to is not None:
            self._link(raw, linked_to)
        if raw not in self._kept:
            found = self._target.status(raw)
            if found is not None and (stat.S_ISDIR(found.st_mode) or not self._plan.overwrite):
                self._put_away(raw)
        name, source = self._staging.place(raw)
        _, at = self._target.place(raw)
        os.rename(name, name, src_dir_fd=source, dst_dir_fd=at)

    def _link(self, raw: bytes, linked_to: bytes) -> None:
        """In the staging folder, to the file that is in its place already."""
        found = self._target.status(linked_to)
        if found is None or not stat.S_ISREG(found.st_mode):
            raise Corrupt(f"{os.fsdecode(raw)} is a hard link to {os.fsdecode(linked_to)}, which is not a file.")
        self._staging.remove(raw)
        old, at = self._target.place(linked_to)
        name, to = self._staging.place(raw)
        os.link(old, name, src_dir_fd=at, dst_dir_fd=to, follow_symlinks=False)

    def _put_away(self, raw: bytes) -> None:
        """Move a folder aside, or a file that can't have two names."""
        if self._plan.overwrite:
            self._target.remove(raw)
            return
        name, at = self._target.place(raw)
        os.rename(name, self._kept_name(raw), src_dir_fd=at, dst_dir_fd=at)
        self.kept_files += 1
        _sync(self._target, [raw.rpartition(b"/")[0]])
