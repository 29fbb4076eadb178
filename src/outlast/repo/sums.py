"""Blocks that are kept as the sum of a stored block and small differences, see `difference.py`.

Nothing of this is in packs or index: the parts are chunks like any other, and which blocks are sums of which parts
stands in manifests (`Entry.sums`). So it is known once a manifest was read, and nobody asks for a block before. The
proof of a sum is its chunk id. Sums are flat: parts are stored chunks, never sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from outlast.errors import Corrupt, OutlastError
from outlast.records import Entry, Sum
from outlast.repo import difference, read, seal
from outlast.repo.read import Deliver, Failed, Fetched

if TYPE_CHECKING:
    from outlast.repo.repository import Repository

_BYTES_AT_ONCE = 64 << 20
_ID_BYTES = 32


class Parts(NamedTuple):
    """What a block is the sum of: a block and differences. `item_bytes`: of an element; 0 for what is no sum."""

    item_bytes: int
    ids: tuple[bytes, ...]

    def listed(self, number: int) -> Sum:
        """As the manifest says it of chunk `number`."""
        return number, self.item_bytes, [part.hex() for part in self.ids]


class Sums:
    """Which blocks are sums, as far as manifests were read: some 200 bytes for each. Only `learn` changes it."""

    def __init__(self) -> None:
        self._known: dict[bytes, bytes] = {}

    def learn(self, entry: Entry) -> Entry:
        """Gives the entry back."""
        for number, item_bytes, parts in entry.sums:
            try:
                known = bytes([item_bytes]) + bytes.fromhex("".join(parts))
                if len(known) > _ID_BYTES:
                    self._known[bytes.fromhex(entry.chunks[number][0])] = known
            except (ValueError, IndexError):
                continue  # no backup writes such an entry; the chunk will not be found
        return entry

    def parts(self, chunk: bytes) -> Parts | None:
        known = self._known.get(chunk)
        if known is None:
            return None
        return Parts(known[0], tuple(known[at : at + _ID_BYTES] for at in range(1, len(known), _ID_BYTES)))

    def get(self, repository: Repository, chunk: bytes) -> bytes | memoryview:
        """The verified plain bytes, be the chunk stored, a sum, or both. Raises `Corrupt`."""
        known = self.parts(chunk)
        if known is None:
            return repository.get_stored(chunk)
        if repository.index.get(chunk) is not None:
            try:
                return repository.get_stored(chunk)
            except Corrupt:
                pass  # nobody promised that it is there: the sum is what the snapshot needs
        return added(repository, chunk, known)


class _Total:
    """A sum under way. Parts come in any order, from several threads."""

    def __init__(self, repository: Repository, chunk: bytes, parts: Parts) -> None:
        self._repository = repository
        self._chunk = chunk
        self._parts = parts
        self._left = len(parts.ids)
        self._total: difference.Bytes | None = None
        self._turn = Lock()
        self.failed = False

    def add(self, part: bytes, plain: bytes | memoryview) -> bool:
        """Whether the sum is complete. A part that stands in it several times is given once. Raises `Corrupt`."""
        item_bytes, ids = self._parts
        with self._turn:
            total = self._total
            if total is None:
                total = self._total = np.zeros(len(plain), np.uint8)
            if item_bytes not in difference.ITEM_BYTES or len(plain) != len(total) or len(total) % item_bytes:
                raise Corrupt(f"chunk {self._chunk.hex()[:16]} can't be the sum of the parts that its manifest names.")
            if part == ids[0]:
                wide = np.dtype(f"<u{item_bytes}")
                total.view(wide)[:] += np.frombuffer(plain, wide)
            for each in ids[1:]:
                if each == part:
                    difference.add(total, plain, item_bytes)
            self._left -= ids.count(part)
            return self._left == 0

    def result(self) -> memoryview:
        """Raises `Corrupt` unless it has its id."""
        total, self._total = self._total, None
        if total is None or self._left or seal.chunk_id(total.data, self._repository.keys) != self._chunk:
            raise Corrupt(
                f"chunk {self._chunk.hex()[:16]} is not the sum of the parts that its manifest names.",
                hint="Each of them is whole, so that the manifest is wrong: take another snapshot.",
            )
        return total.data


def added(repository: Repository, chunk: bytes, parts: Parts) -> memoryview:
    """The sum, verified. Raises `Corrupt`."""
    total = _Total(repository, chunk, parts)
    for part in dict.fromkeys(parts.ids):
        total.add(part, repository.get_stored(part))
    return total.result()


# -- reading many --------------------------------------------------------------------------------


def fetch(repository: Repository, chunks: Iterable[bytes], deliver: Deliver, failed: Failed | None) -> Fetched:
    """`read.fetch`, also for blocks that are sums."""
    sums, index = repository.sums, repository.index
    later: dict[bytes, Parts] = {}

    def stored() -> Iterator[bytes]:
        for chunk in chunks:
            parts = sums.parts(chunk)
            if parts is None or index.get(chunk) is not None:
                yield chunk
            else:
                later[chunk] = parts

    def or_sum(chunk: bytes, error: OutlastError) -> None:
        parts = sums.parts(chunk)
        if parts is not None:
            later[chunk] = parts
        elif failed is not None:
            failed(chunk, error)
        else:
            raise error

    done = read.fetch(repository, stored(), deliver, or_sum)
    for group in _groups(repository, later):
        found = _fetch_sums(repository, group, deliver, failed)
        done.chunks += found.chunks
        done.bytes += found.bytes
    return done


def _groups(repository: Repository, wanted: dict[bytes, Parts]) -> Iterator[dict[bytes, Parts]]:
    """The parts of one block lie in as many packs: all blocks at once would all be under way at once."""
    group: dict[bytes, Parts] = {}
    group_bytes = 0
    for chunk, parts in wanted.items():
        location = repository.index.get(parts.ids[0]) if parts.ids else None
        group[chunk] = parts
        group_bytes += location.plain_bytes if location else 0
        if group_bytes >= _BYTES_AT_ONCE:
            yield group
            group, group_bytes = {}, 0
    if group:
        yield group


def _fetch_sums(repository: Repository, group: dict[bytes, Parts], deliver: Deliver, failed: Failed | None) -> Fetched:
    totals = {chunk: _Total(repository, chunk, parts) for chunk, parts in group.items()}
    users: dict[bytes, dict[bytes, None]] = {}
    for chunk, parts in group.items():
        for part in parts.ids:
            users.setdefault(part, {})[chunk] = None

    def take(part: bytes, plain: bytes | memoryview) -> None:
        for chunk in users[part]:
            total = totals[chunk]
            if total.failed:
                continue
            try:
                whole = total.result() if total.add(part, plain) else None
            except Corrupt as exc:
                fail(chunk, exc)
                continue
            if whole is not None:
                deliver(chunk, whole)

    def fail(chunk: bytes, error: OutlastError) -> None:
        if failed is None:
            raise error
        if not totals[chunk].failed:
            totals[chunk].failed = True
            failed(chunk, error)

    def part_failed(part: bytes, error: OutlastError) -> None:
        for chunk in users[part]:
            fail(chunk, error)

    found = read.fetch(repository, users, take, part_failed)
    found.chunks = sum(not total.failed for total in totals.values())
    return found
