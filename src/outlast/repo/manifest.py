"""What every entry of a manifest must be: one that can be restored, and nowhere outside its target."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from outlast import records
from outlast.errors import Corrupt
from outlast.records import Entry
from outlast.repo.difference import ITEM_BYTES, PARTS_MAX
from outlast.repo.pack import CHUNK_BYTES_MAX
from outlast.repo.repository import chunk_offsets

_SIZE_MAX = (1 << 63) - 1
_TIME_NS_MAX = (1 << 63) * 1_000_000_000 - 1
"""what time_t, in seconds, can hold"""
_RANGES = {
    "mode": (0, 0o177777),
    "uid": (0, (1 << 32) - 2),  # the last number means "leave it" to chown(2)
    "gid": (0, (1 << 32) - 2),
    "mtime_ns": (-_TIME_NS_MAX, _TIME_NS_MAX),
    "ctime_ns": (-_TIME_NS_MAX, _TIME_NS_MAX),
    "size": (0, _SIZE_MAX),
    "inode": (0, (1 << 64) - 1),
}
_UNORDERED = "is out of order or there twice"
_HOMELESS = "lies in something that is not a folder of the snapshot"


def validated(entries: Iterator[Entry], snapshot_id: str) -> Iterator[tuple[bytes, Entry]]:
    """(path, entry) for each; raises `Corrupt` at the first one that no backup could have written."""
    order = Order()
    first = True
    while True:
        try:
            entry = next(entries, None)
        except msgspec.DecodeError as exc:
            raise Corrupt(f"the manifest of snapshot {snapshot_id[:12]} can't be read: {exc}.") from exc
        if entry is None:
            return
        root = first and is_root(entry)
        first = False
        problem = entry_problem(entry, root=root) or ("" if root else order.add(entry))
        if problem:
            raise Corrupt(
                f"the entry {entry.path[:200]!r} of snapshot {snapshot_id[:12]} {problem}; nothing was replaced.",
                hint="No backup writes such an entry. Restore an older snapshot, or parts of this one with "
                "`--include`.",
            )
        yield entry.raw_path, entry


def is_root(entry: Entry) -> bool:
    """Whether this is the folder itself that was backed up, which only the first entry can be."""
    return entry.path == "." and entry.type == "dir"


def entry_problem(entry: Entry, *, root: bool = False) -> str:
    """What is wrong with an entry whatever stands around it, or ""."""
    if not root and not is_safe(entry.raw_path):
        return "is not a path inside a folder"
    for name, (low, high) in _RANGES.items():
        if not low <= getattr(entry, name) <= high:
            return f"has an impossible {name}, {getattr(entry, name)}"
    if entry.type == "file":
        return _content_problem(entry) or (_sums_problem(entry) if entry.sums else "")
    if entry.type == "symlink" and (not entry.target or b"\0" in entry.raw_target):
        return "is a symlink to a name that can't exist"
    if entry.type == "hardlink" and not _is_earlier(entry.raw_target, entry.raw_path):
        return f"is linked to {entry.target!r}, which is not an earlier file"
    return ""


def is_safe(raw: bytes) -> bool:
    """Whether a path stays below the folder that it is relative to, as far as its text tells."""
    if b"\0" in raw or not raw:
        return False
    return not any(part in (b"", b".", b"..") for part in raw.split(b"/"))


def chunk_spans(entry: Entry) -> Iterator[tuple[int, int]]:
    """(offset, length) of each chunk."""
    return ((offset, length) for offset, (_, length) in chunk_offsets(entry))


class Order:
    """Whether consecutive entries are in order and each lies in a folder that came before it.

    With `whole=False` the entries are a run from the middle of a manifest: what they ask of those
    before them is remembered, so that a run that many manifests share is looked at once and then
    joined to each of them.
    """

    def __init__(self, *, whole: bool = True) -> None:
        self._whole = whole
        self._first: tuple[bytes, str] | None = None
        self._last = b""
        self._open: list[bytes] = [b""] if whole else []
        self._asked: list[tuple[bytes, str]] = []

    def add(self, entry: Entry) -> str:
        """Take the next entry, one without a problem of its own; returns what is wrong here, or ""."""
        raw = entry.raw_path
        order = records.path_order(raw)
        if order <= self._last:
            return _UNORDERED
        if self._first is None:
            self._first = order, entry.path
        self._last = order
        problem = self._enter(raw.rpartition(b"/")[0], entry.path)
        if entry.type == "dir":
            self._open.append(raw)
        return problem

    def join(self, run: Order) -> list[tuple[str, str]]:
        """Take a run that follows; returns (path, problem) for each of its entries that does not fit here."""
        if run._first is None:
            return []
        order, path = run._first
        problems = [(path, _UNORDERED)] if order <= self._last else []
        problems += [(path, problem) for head, path in run._asked if (problem := self._enter(head, path))]
        self._first = self._first or run._first
        self._last = run._last
        self._open += run._open
        return problems

    def _enter(self, head: bytes, path: str) -> str:
        """Leave the open folders that `head` is not in; an entry that lies nowhere leaves none."""
        if head in self._open:
            while self._open[-1] != head:
                self._open.pop()
            return ""
        # The folder has to stand before the run; of those asked for, each holds the one before.
        deepest = self._asked[-1][0] if self._asked else None
        if self._whole or (deepest is not None and head not in (b"", deepest) and not deepest.startswith(head + b"/")):
            return _HOMELESS
        if head != deepest:
            self._asked.append((head, path))
        self._open.clear()
        return ""


def _is_earlier(target: bytes, raw: bytes) -> bool:
    return is_safe(target) and records.path_order(target) < records.path_order(raw)


def _content_problem(entry: Entry) -> str:
    if len(entry.chunks) == 1 and not entry.holes:
        chunk, length = entry.chunks[0]
        if length == entry.size and 0 < length <= CHUNK_BYTES_MAX and _is_id(chunk):
            return ""
        return "has chunks that don't make up its size"
    at = 0
    for offset, length in entry.holes:
        if offset < at or length <= 0:
            return "has holes that overlap"
        at = offset + length
    total = sum(length for _, length in entry.chunks) + sum(length for _, length in entry.holes)
    if total != entry.size or not at <= entry.size <= _SIZE_MAX:
        return "has chunks that don't make up its size"
    if not all(0 < length <= CHUNK_BYTES_MAX and _is_id(chunk) for chunk, length in entry.chunks):
        return "names chunks that can't exist"
    starts = {offset + length for offset, length in chunk_spans(entry)} | {0} | {a + b for a, b in entry.holes}
    if any(offset not in starts for offset, _ in entry.holes):
        return "has a hole in the middle of a chunk"
    return ""


def _sums_problem(entry: Entry) -> str:
    before = -1
    for number, item_bytes, parts in entry.sums:
        if not before < number < len(entry.chunks):
            return "names sums of chunks that it doesn't have"
        length = entry.chunks[number][1]
        if item_bytes not in ITEM_BYTES or length % item_bytes or not 2 <= len(parts) <= PARTS_MAX:
            return "names sums that can't exist"
        if not all(map(_is_id, parts)):
            return "names chunks that can't exist"
        before = number
    return ""


def _is_id(chunk: str) -> bool:
    try:
        return len(chunk) == 64 and len(bytes.fromhex(chunk)) == 32
    except ValueError:
        return False
