"""What a restore would do: which entries, how many bytes, what is right already. Reads, changes nothing."""

from __future__ import annotations

import os
import re
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Literal

import msgspec

from outlast import records
from outlast.backup.folder import Folder, Metadata, mount_below
from outlast.backup.nearest import Holder, Nearest, Source, places
from outlast.backup.selection import matcher
from outlast.backup.verify import Place, holes_are_zero, wrong_places
from outlast.errors import InvalidInput, NotFound, Refused
from outlast.events import Event
from outlast.records import Entry, Snapshot
from outlast.repo.manifest import validated
from outlast.repo.repository import chunk_offsets
from outlast.store.layers import own_folder

BATCH_CHUNKS = 1 << 17
BATCH_ENTRIES = 1 << 17
HASHING_THREADS = 4
_NAME_BYTES_MAX = 255

_KINDS = {
    "file": stat.S_IFREG,
    "hardlink": stat.S_IFREG,
    "dir": stat.S_IFDIR,
    "symlink": stat.S_IFLNK,
    "fifo": stat.S_IFIFO,
}

Action = tuple[str, int, int, Literal["new", "repair", "present", "skipped", "removed", "moved away"]]
"""(path, bytes, bytes to fetch, what happens to it)"""

Path = bytes
Selected = tuple[Path, Entry]


class RestorePlan(msgspec.Struct):
    """What `execute` will do. `bytes_to_fetch` counts a chunk once, at the first file that needs it."""

    snapshot: Snapshot
    target: Path
    files: int
    bytes: int
    bytes_present: int
    bytes_to_fetch: int
    kept_as: Path | None
    """where the folder that is there now would go"""
    include: list[str]
    overwrite: bool
    stamp: str
    mode: Literal["new", "swap", "merge"]
    """`swap`: the whole folder is replaced at one instant; `merge`: the chosen files inside it, one by one"""
    right: set[Path]
    """paths that are in the target as they should be, metadata included; kept only for `merge`"""
    reuse: set[Path]
    """files of the target of which at least a part is right"""
    unchanged: bool
    """the target is already what it should become"""
    kept: list[Selected] | None = None
    """all entries, when they are few enough to be kept in memory"""
    extra_files: int = 0
    """files and empty folders that only the target has, and that a swap removes or moves away"""
    extra_bytes: int = 0
    sources: list[Source] = []
    """how much would come from where, last what is in the target; `where` is "" of what no index tells of"""
    bytes_holes: int = 0
    """of sparse files: zeros that come from nowhere"""

    def entries(self, repository: Holder) -> Iterator[Selected]:
        """What is to be restored, in `path_order`."""
        if self.kept is not None:
            return iter(self.kept)
        return selected(repository, self.snapshot, self.include)

    @property
    def staging(self) -> Path:
        """The folder beside the target in which the restore is built, and continued when it was killed."""
        return beside(self.target, f".outlast-{self.snapshot.id[:12]}")

    @property
    def marker(self) -> Path:
        """The file that says: `staging` is being built. It is gone, durably, before the swap.

        After the swap `staging` is the name of the user's old folder, which nobody may take over.
        """
        return beside(self.target, f".outlast-{self.snapshot.id[:12]}.building")

    @property
    def is_building(self) -> bool:
        """Whether what has the name `staging` is an unfinished restore of this user, and nothing else."""
        try:
            marker, found = os.lstat(self.marker), os.lstat(self.staging)
        except FileNotFoundError:
            return False
        ours = marker.st_uid == found.st_uid == os.geteuid()
        return ours and stat.S_ISREG(marker.st_mode) and stat.S_ISDIR(found.st_mode)


def beside(path: bytes, ending: str) -> bytes:
    """The hidden name next to `path` that belongs to a restore to it."""
    folder, _, name = path.rpartition(b"/")
    return folder + b"/." + name[: _NAME_BYTES_MAX - 1 - len(ending)] + ending.encode()


def kept_name(path: bytes, stamp: str) -> bytes:
    """`PATH.before-<time>`, or the next free name like it."""
    folder, _, name = path.rpartition(b"/")
    for number in range(1, 1_000_000):
        ending = f".before-{stamp}" + (f"-{number}" if number > 1 else "")
        candidate = (folder + b"/" if folder else b"") + name[: _NAME_BYTES_MAX - len(ending)] + ending.encode()
        if not os.path.lexists(candidate):
            return candidate
    raise Refused(f"{shown(path)} has a million kept copies beside it already; nothing was changed.")


def kept_already(path: bytes) -> bytes:
    """The other name under which a restore that was killed has kept this very file; empty where there is none."""
    found = os.lstat(path)
    folder = os.path.dirname(path)
    for name in os.listdir(folder) if found.st_nlink > 1 and not stat.S_ISDIR(found.st_mode) else ():
        other = os.path.join(folder, name)
        if is_kept_name(path, other) and os.path.samestat(os.lstat(other), found):
            return other
    return b""


def is_kept_name(path: bytes, kept: bytes) -> bool:
    """Whether `kept_name` could have given `kept` for this path, at some time."""
    folder, _, name = path.rpartition(b"/")
    ending = re.search(rb"\.before-\d{8}T\d{6}Z(-\d{1,6})?\Z", kept)
    if ending is None:
        return False
    return kept == folder + b"/" + name[: _NAME_BYTES_MAX - len(ending[0])] + ending[0]


def stamp_text(now_ns: int) -> str:
    """UTC to the second, fit for file names.

    >>> stamp_text(1_750_000_000_000_000_000)
    '20250615T150640Z'
    """
    return records.time_text(now_ns).split(".")[0].replace("-", "").replace(":", "") + "Z"


def shown(path: bytes) -> str:
    """A path as messages and reports show it."""
    return records.path_text(path)


def plan(
    repository: Holder,
    snapshot: Snapshot | str,
    target: bytes | str,
    *,
    include: Sequence[str] = (),
    overwrite: bool = False,
    note: Callable[[Action], object] | None = None,
    need: Callable[[bytes], object] | None = None,
) -> RestorePlan:
    """Work out a restore of `snapshot` (or its id, or `latest`) to the folder `target`; changes nothing.

    A snapshot of one folder makes `target` that folder; one of files or of several folders puts
    them into it. With `include`, or into a folder that the snapshot does not describe as a whole,
    the chosen files are replaced one by one and everything else in the target stays.
    `note` is told what would happen to each path: a plan of millions of files doesn't keep that. `need` is
    told the id of each chunk that would be fetched, once.

    Raises `InvalidInput`, `NotFound` (nothing fits `include`), `Refused` (a target that can't be
    replaced safely) or `Corrupt` (a manifest that could reach outside the target).
    """
    path = real_target(target)
    if isinstance(snapshot, str):
        snapshot = repository.find_snapshot(snapshot)
    exists = _check_target(path)
    _warn_of_source(repository, snapshot, path)
    entries = selected(repository, snapshot, include)
    first = next(entries, None)
    if include and (first is None or (first[0] == b"." and next(entries, None) is None)):
        raise NotFound(
            f"no file of snapshot {snapshot.id[:12]} fits {', '.join(include)}; nothing was changed.",
            hint="`outlast show` lists the files.",
        )
    whole = not include and first is not None and first[0] == b"."
    mode: Literal["new", "swap", "merge"] = "new" if not exists else "swap" if whole else "merge"
    _check_repository(repository, path, mode)
    if mode == "swap" and os.stat(path).st_dev != os.stat(os.path.dirname(path)).st_dev:
        raise Refused(
            f"{shown(path)} is a mount point, which can't be replaced at one instant; nothing was changed.",
            hint="Restore into a folder inside it.",
        )
    mounted = mount_below(path) if mode == "swap" else None
    if mounted is not None:
        raise _mounted(path, mounted)
    stamp = stamp_text(repository.clock.now_ns())
    replaced = mode == "swap" and not overwrite and bool(os.listdir(path))
    result = RestorePlan(
        snapshot, path, 0, 0, 0, 0, kept_name(path, stamp) if replaced else None, list(include),
        overwrite, stamp, mode, set(), set(), False,
    )  # fmt: skip
    _Survey(repository, result, note, need).run()
    if result.unchanged:
        result.kept_as = None
    return result


def real_target(target: bytes | str) -> bytes:
    """The absolute path of a target, symlinks followed. Raises `InvalidInput`."""
    path = os.fsencode(target)
    if not path:
        raise InvalidInput("the target is empty; nothing was changed.", hint="Name a folder; `.` is the current one.")
    return os.path.realpath(path)


def _mounted(path: bytes, mounted: bytes) -> Refused:
    return Refused(
        f"{shown(path)} can't be replaced as a whole: something is mounted at {shown(mounted)}. Nothing was changed.",
        hint="Unmount it first, or restore to a new folder and move what you need.",
    )


def _check_target(path: bytes) -> bool:
    """Whether the target exists; raises when it can't be one."""
    if not os.path.basename(path):
        raise Refused("the root of the file system can't be a target; nothing was changed.")
    if os.path.lexists(path) and not os.path.isdir(path):
        raise InvalidInput(
            f"{shown(path)} is a file, not a folder; nothing was changed.",
            hint="Give a folder, or a path that does not exist yet.",
        )
    parent = os.path.dirname(path)
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        raise InvalidInput(f"{shown(path)} can't be made: {shown(parent)} is not a folder. Nothing was changed.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise Refused(
            f"the folder {shown(parent)} is read-only for this user; nothing was changed.",
            hint="A restore is built beside its target. Choose another place, or change the folder's permissions.",
        )
    return os.path.isdir(path)


def _check_repository(repository: Holder, path: bytes, mode: str) -> None:
    for each in places(repository):
        _check_place(own_folder(each.store), path, mode)


def _check_place(folder: bytes | None, path: bytes, mode: str) -> None:
    if folder is None:
        return
    if (path + b"/").startswith(folder + b"/"):
        raise Refused(
            f"{shown(path)} lies inside the repository itself; nothing was changed.", hint="Choose another target."
        )
    if mode == "swap" and (folder + b"/").startswith(path + b"/"):
        raise Refused(
            f"the repository lies inside {shown(path)}, which the restore would replace; nothing was changed.",
            hint="Restore beside it, and move what you need.",
        )


def _warn_of_source(repository: Holder, snapshot: Snapshot, path: bytes) -> None:
    if snapshot.host != socket.gethostname():
        return
    for source in snapshot.sources:
        if path.startswith(os.path.realpath(os.fsencode(source)).rstrip(b"/") + b"/"):
            reason = f"{shown(path)} lies inside {source}, a source of this snapshot; the next backup holds both."
            repository.sink.event(Event("restore.target_in_source", reason, {"target": shown(path), "source": source}))


def batches(entries: Iterator[Selected]) -> Iterator[list[Selected]]:
    """Entries in runs that bound memory: by their number and by their chunks."""
    batch: list[Selected] = []
    chunks = 0
    for item in entries:
        batch.append(item)
        chunks += len(item[1].chunks)
        if chunks >= BATCH_CHUNKS or len(batch) >= BATCH_ENTRIES:
            yield batch
            batch, chunks = [], 0
    if batch:
        yield batch


def selected(repository: Holder, snapshot: Snapshot, include: Sequence[str]) -> Iterator[Selected]:
    """(path, entry) in `path_order`, checked; with `include` those that fit and the folders they are in.

    A hard link that fits while its target does not takes the target's content over.
    """
    if not include:
        yield from checked(repository, snapshot)
        return
    fits = matcher(include)
    links = [each for each in checked(repository, snapshot) if each[1].type == "hardlink"]
    wanted = {entry.raw_target for raw, entry in links if fits(raw) and not fits(entry.raw_target)}
    originals: dict[bytes, Entry] = {}
    moved: dict[bytes, str] = {}
    folders: list[Selected] = []
    for raw, entry in checked(repository, snapshot):
        if raw == b".":
            yield raw, entry
        elif not fits(raw):
            if raw in wanted:
                originals[raw] = entry
            if entry.type == "dir":
                folders = [each for each in folders if raw.startswith(each[0] + b"/")] + [(raw, entry)]
        else:
            yield from (each for each in folders if raw.startswith(each[0] + b"/"))
            folders = []
            target = entry.raw_target
            if entry.type == "hardlink" and target in moved:
                entry = msgspec.structs.replace(entry, target=moved[target])
            elif entry.type == "hardlink" and target in originals:
                moved[target] = entry.path
                entry = msgspec.structs.replace(originals[target], path=entry.path)
            yield raw, entry


def checked(repository: Holder, snapshot: Snapshot) -> Iterator[Selected]:
    """The manifest, refused with `Corrupt` as soon as an entry could reach outside the target."""
    return validated(repository.entries(snapshot), snapshot.id)


def why_without_content(entry: Entry) -> str:
    """What a restore says about an entry of the type `unreadable`."""
    return f"it could not be read when it was backed up: {entry.reason}"


class _Survey:
    """Compares the selected entries with the target and with what a killed restore left."""

    def __init__(
        self,
        repository: Holder,
        result: RestorePlan,
        note: Callable[[Action], object] | None,
        need: Callable[[bytes], object] | None,
    ) -> None:
        self._repository = repository
        self._plan = result
        self._note = note or (lambda action: None)
        self._need = need or (lambda chunk: None)
        self._metadata = Metadata()
        self._target: Folder | None = None
        self._staging: Folder | None = None
        from_ = repository.sources({}) if isinstance(repository, Nearest) else [Source(repository.store.url)]
        self._sources = {each.where: each for each in from_}
        self._first = next(iter(self._sources.values()))
        self._present = Source(shown(result.target))
        self._counted: set[int] = set()
        """the first eight bytes of each chunk id, as a number: a third of the memory of its text"""
        self._unreadable: set[bytes] = set()
        self._names: set[bytes] = set()
        self._folders: set[bytes] = set()
        self._all_right = True

    def run(self) -> None:
        plan = self._plan
        try:
            if plan.mode != "new":
                self._target = Folder(plan.target)
            if plan.is_building:
                self._staging = Folder(plan.staging)
        except PermissionError as exc:
            raise Refused(f"{shown(plan.target)} can't be read: {exc.strerror}; nothing was changed.") from exc
        kept: list[Selected] | None = []
        try:
            with ThreadPoolExecutor(HASHING_THREADS, thread_name_prefix="hash") as pool:
                for number, batch in enumerate(batches(plan.entries(self._repository))):
                    self._survey(batch, pool)
                    kept = None if number else batch
            plan.kept = kept
            plan.sources = [*self._sources.values(), *([self._present] if self._present.chunks else [])]
            if plan.mode == "swap":
                self._note_extra(b"")
            if self._target is not None and self._all_right:
                plan.unchanged = plan.mode == "merge" or not plan.extra_files
        finally:
            for folder in (self._target, self._staging):
                if folder is not None:
                    folder.__exit__(None, None, None)

    def _survey(self, batch: list[Selected], pool: ThreadPoolExecutor) -> None:
        plan, keys = self._plan, self._repository.keys
        looked = [(raw, entry, list(chunk_offsets(entry))) for raw, entry in batch if entry.type == "file"]
        wrong: list[list[Place]] = [list(places) for _, _, places in looked]
        if self._target is not None:
            wrong = wrong_places(self._target, looked, keys, pool)
            for (raw, _, places), bad in zip(looked, wrong, strict=True):
                if len(bad) < len(places):
                    plan.reuse.add(raw)
        missing = wrong
        if self._staging is not None:
            rest = [(raw, entry, bad) for (raw, entry, _), bad in zip(looked, wrong, strict=True)]
            missing = wrong_places(self._staging, rest, keys, pool)
        contents = iter(zip(wrong, missing, strict=True))
        for raw, entry in batch:
            if plan.mode == "swap":
                (self._folders if entry.type == "dir" else self._names).add(raw)
            if entry.type == "file":
                in_target, to_fetch = next(contents)
                self._note_file(raw, entry, in_target, to_fetch)
            else:
                self._note_other(raw, entry)
        for folder in (self._target, self._staging):
            if folder is not None:
                folder.release()

    def _note_file(self, raw: bytes, entry: Entry, in_target: list[Place], to_fetch: list[Place]) -> None:
        plan = self._plan
        lacking = sum(length for _, (_, length) in to_fetch)
        fetched = 0
        for _, (chunk, length) in to_fetch:
            number = int(chunk[:16], 16)
            source = self._source(chunk)
            source.bytes += length
            if number not in self._counted:
                self._counted.add(number)
                source.chunks += 1
                self._need(bytes.fromhex(chunk))
                fetched += length
        present = not in_target and self._is_right(raw, entry)
        if not present:
            self._all_right = False
        plan.files += 1
        plan.bytes += entry.size
        content = sum(length for _, length in entry.chunks)
        plan.bytes_present += entry.size if present else content - lacking
        plan.bytes_holes += entry.size - content
        self._present.bytes += content - lacking
        self._present.chunks += len(entry.chunks) - len(to_fetch)
        plan.bytes_to_fetch += fetched
        new = lacking == content and raw not in plan.reuse
        self._note((entry.path, entry.size, fetched, "present" if present else "new" if new else "repair"))

    def _source(self, chunk: str) -> Source:
        if not isinstance(self._repository, Nearest):
            return self._first
        where = self._repository.where(bytes.fromhex(chunk))
        return self._sources.setdefault(where, Source(where))

    def _note_other(self, raw: bytes, entry: Entry) -> None:
        plan = self._plan
        if entry.type == "unreadable" or (entry.type == "hardlink" and entry.raw_target in self._unreadable):
            self._unreadable.add(raw)
            self._note((entry.path, 0, 0, "skipped"))
            return
        present = self._is_right(raw, entry)
        # The root and other folders of a merge keep what is in them, and so their own metadata.
        if not present and not (plan.mode == "merge" and entry.type == "dir" and self._is_folder(raw)):
            self._all_right = False
        if entry.type == "hardlink":
            plan.files += 1
        if entry.type != "dir":
            self._note((entry.path, 0, 0, "present" if present else "new"))

    def _note_extra(self, folder: bytes) -> None:
        """What is below a folder of the target and not in the snapshot."""
        plan = self._plan
        try:
            found = os.scandir(os.path.join(plan.target, folder))
        except PermissionError:
            return
        with found:
            for item in found:
                raw = os.path.join(folder, item.name)
                status = item.stat(follow_symlinks=False)
                if raw in self._unreadable:
                    continue  # it has no content in the snapshot, so that the one here stays
                if stat.S_ISDIR(status.st_mode):
                    if status.st_dev != os.stat(plan.target).st_dev:
                        raise _mounted(plan.target, item.path)
                    before = plan.extra_files
                    self._note_extra(raw)
                    if raw in self._folders or plan.extra_files > before:
                        continue
                elif raw in self._names:
                    continue
                size = status.st_size if stat.S_ISREG(status.st_mode) else 0
                plan.extra_files += 1
                plan.extra_bytes += size
                self._note((shown(raw), size, 0, "removed" if plan.overwrite else "moved away"))

    def _is_folder(self, raw: bytes) -> bool:
        found = self._target.status(raw) if self._target is not None else None
        return found is not None and stat.S_ISDIR(found.st_mode)

    def _is_right(self, raw: bytes, entry: Entry) -> bool:
        """Whether the target has this entry with its metadata; the bytes of files are looked at elsewhere."""
        target = self._target
        found = target.status(raw) if target is not None else None
        if target is None or found is None:
            return False
        if stat.S_IFMT(found.st_mode) != _KINDS[entry.type]:
            return False
        if entry.type == "hardlink":
            other = target.status(entry.raw_target)
            right = other is not None and os.path.samestat(found, other)
            right = right and (self._plan.mode != "merge" or entry.raw_target in self._plan.right)
        elif entry.type == "symlink":
            right = target.read_link(raw) == entry.raw_target and not self._metadata.differs(entry, found)
        elif entry.type == "file":
            right = found.st_size == entry.size and not self._metadata.differs(entry, found)
            right = right and (not entry.holes or holes_are_zero(target, raw, entry))
        else:
            right = not self._metadata.differs(entry, found)
        if right and self._plan.mode == "merge":
            self._plan.right.add(raw)
        return right


def first_few(names: Sequence[str], limit: int = 10) -> str:
    """A list for a message: the first names, and how many more there are."""
    more = len(names) - limit
    return ", ".join(islice(names, limit)) + (f" and {more} more" if more > 0 else "")
