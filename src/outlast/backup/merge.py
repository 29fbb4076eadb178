"""Put restored files into a folder that has others: each one on its own, what it replaces kept beside it."""

from __future__ import annotations

import os
import stat
from collections.abc import Container, Iterator

from outlast.backup.folder import Folder, Metadata
from outlast.backup.restore_plan import RestorePlan, Selected, kept_name
from outlast.errors import Corrupt


def merge(plan: RestorePlan, entries: Iterator[Selected], skipped: Container[bytes], metadata: Metadata) -> int:
    """Move what was built in the staging folder to its places; returns how many old ones were kept.

    Every file is replaced by one rename, so that at any instant either version is there.
    """
    made: list[Selected] = []
    touched: set[bytes] = set()
    with Folder(plan.staging) as staging, Folder(plan.target) as target:
        step = _Merge(plan, staging, target)
        for raw, entry in entries:
            if raw in skipped or raw == b"." or raw in plan.right:
                continue
            if entry.type != "dir":
                step.replace(raw, entry.raw_target if entry.type == "hardlink" else None)
                touched.add(raw.rpartition(b"/")[0])
            elif step.make_folder(raw):
                made.append((raw, entry))
                touched.update((raw, raw.rpartition(b"/")[0]))
        for raw, entry in reversed(made):
            fd = target.open_file(raw, os.O_RDONLY | os.O_DIRECTORY)
            try:
                metadata.put_on_file(fd, entry)
            finally:
                os.close(fd)
        for folder in sorted(touched):
            fd = target.open_file(folder or b".", os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
    return step.kept_files


class _Merge:
    def __init__(self, plan: RestorePlan, staging: Folder, target: Folder) -> None:
        self._plan = plan
        self._staging = staging
        self._target = target
        self.kept_files = 0

    def make_folder(self, raw: bytes) -> bool:
        """Whether it had to be made."""
        found = self._target.status(raw)
        if found is not None and stat.S_ISDIR(found.st_mode):
            return False
        if found is not None:
            self._put_away(raw)
        name, at = self._target.place(raw)
        os.mkdir(name, 0o700, dir_fd=at)
        return True

    def replace(self, raw: bytes, linked_to: bytes | None) -> None:
        found = self._target.status(raw)
        if linked_to is not None:
            self._link(raw, linked_to)
        if found is not None and (stat.S_ISDIR(found.st_mode) or not self._plan.overwrite):
            self._put_away(raw, is_folder=stat.S_ISDIR(found.st_mode))
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

    def _put_away(self, raw: bytes, *, is_folder: bool = True) -> None:
        """Give the old one its other name; a file keeps this one too until it is replaced."""
        name, at = self._target.place(raw)
        if self._plan.overwrite:
            self._target.remove(raw)
            return
        kept = kept_name(os.path.join(self._plan.target, raw), self._plan.stamp).rpartition(b"/")[2]
        self.kept_files += 1
        if not is_folder:
            try:
                os.link(name, kept, src_dir_fd=at, dst_dir_fd=at, follow_symlinks=False)
                return
            except OSError:
                pass  # no hard links here
        os.rename(name, kept, src_dir_fd=at, dst_dir_fd=at)
