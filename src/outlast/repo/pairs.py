"""Which chunk of one repository stands for which of another, where they name chunks differently."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

import msgspec
import numpy as np

from outlast.records import Entry

_RECENT_PAIRS = 32 << 10


class Pairs:
    """Chunk id -> chunk id, at some 80 bytes a pair: sorted rows, and those that came last in a dict."""

    def __init__(self) -> None:
        self._rows = np.empty((0, 64), np.uint8)
        self._heads = memoryview(b"").cast("Q")
        self._recent: dict[bytes, bytes] = {}

    def __len__(self) -> int:
        return len(self._rows) + len(self._recent)

    def __getitem__(self, old: bytes) -> bytes:
        new = self.get(old)
        if new is None:
            raise KeyError(old)
        return new

    def get(self, old: bytes) -> bytes | None:
        recent = self._recent.get(old)
        if recent is not None:
            return recent
        head = int.from_bytes(old[:8], "big")
        at = bisect_left(self._heads, head)
        while at < len(self._heads) and self._heads[at] == head:
            row: bytes = self._rows[at].tobytes()
            if row[:32] == old:
                return row[32:]
            at += 1
        return None

    def reversed(self) -> Pairs:
        """New -> old."""
        found = Pairs()
        for row in self._rows:
            found.put(row[32:].tobytes(), row[:32].tobytes())
        for old, new in self._recent.items():
            found.put(new, old)
        return found

    def put(self, old: bytes, new: bytes) -> None:
        if self.get(old) is None:
            self._recent[old] = new
            if len(self._recent) >= max(_RECENT_PAIRS, len(self._rows) // 8):
                self._sort()

    def _sort(self) -> None:
        recent = np.frombuffer(b"".join(old + new for old, new in self._recent.items()), np.uint8).reshape(-1, 64)
        rows = np.concatenate([self._rows, recent])
        heads = rows[:, :8].copy().view(">u8").ravel().astype(np.uint64)
        order = np.argsort(heads, kind="stable")
        self._rows = rows[order]
        self._heads = heads[order].data
        self._recent = {}


def pair_up(pairs: Pairs, ours: Iterable[Entry], theirs: Iterable[Entry]) -> None:
    """Pair the chunks of a snapshot by its manifests in two repositories, up to the first entry that differs.

    Raises `ValueError` where one of the manifests is shorter, and what reading them raises.
    """
    for old, new in zip(ours, theirs, strict=True):
        if _without_ids(old) != _without_ids(new):
            return
        alike = [each[:2] for each in old.sums] == [each[:2] for each in new.sums]
        refs = zip(old.stored, new.stored, strict=True) if alike else ()
        for (old_chunk, _), (new_chunk, _) in [*zip(old.chunks, new.chunks, strict=True), *refs]:
            pairs.put(bytes.fromhex(old_chunk), bytes.fromhex(new_chunk))


def _without_ids(entry: Entry) -> tuple[Entry, list[int]]:
    return msgspec.structs.replace(entry, chunks=[], sums=[]), [length for _, length in entry.chunks]
