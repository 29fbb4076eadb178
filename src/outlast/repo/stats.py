"""What a repository holds and what that takes: by name, by kind of object, by tensor.

Each needed chunk counts once, and of several copies one. Manifests are counted apart, so that the
ratios compare the content of files with what is stored for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from outlast.errors import Corrupt
from outlast.events import Progress
from outlast.records import Entry, Snapshot
from outlast.repo.content import Content
from outlast.repo.index import Index
from outlast.repo.layout import Tensor
from outlast.repo.needs import needed_chunks
from outlast.repo.pack import object_name
from outlast.repo.repository import Repository
from outlast.repo.usage import Usage

_OWNER_NONE = -1
_Rows = NDArray[np.intp]


class NameStats(msgspec.Struct, frozen=True):
    """The snapshots of one name. `bytes_own`: of chunks that no snapshot of another name needs."""

    name: str
    snapshots: int
    bytes: int
    bytes_unique: int
    bytes_stored: int
    bytes_own: int
    bytes_own_stored: int
    bytes_shared: int
    dedup_ratio: float | None
    compression_ratio: float | None


class Objects(msgspec.Struct):
    """How many objects of a kind the store lists, and their size."""

    objects: int = 0
    bytes: int = 0


class Places(msgspec.Struct):
    """What the objects are. `unreferenced`: packs that no entry names, such as those of a backup under way."""

    live: Objects = msgspec.field(default_factory=Objects)
    condemned: Objects = msgspec.field(default_factory=Objects)
    quarantined: Objects = msgspec.field(default_factory=Objects)
    unreferenced: Objects = msgspec.field(default_factory=Objects)
    index: Objects = msgspec.field(default_factory=Objects)
    log: Objects = msgspec.field(default_factory=Objects)
    states: Objects = msgspec.field(default_factory=Objects)


class Stats(msgspec.Struct):
    """`bytes`: of all files of all snapshots; `bytes_unique`: of their chunks, each once, as plain bytes;
    `bytes_stored`: of the same, as stored. Ratios are None where there is nothing to divide by."""

    snapshots: int
    bytes: int
    bytes_unique: int
    bytes_stored: int
    dedup_ratio: float | None
    compression_ratio: float | None
    manifest_bytes: int
    manifest_bytes_stored: int
    places: Places
    names: list[NameStats]
    problems: list[str]
    """what could not be counted: it is damaged"""


class TensorStats(msgspec.Struct, frozen=True):
    """A tensor of a file. `bytes_stored`: its share of the chunks that it lies in, of sums of the last difference.
    `snapshots`: how many
    of the name's snapshots, this one included, hold all of these chunks, in whatever file."""

    path: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    bytes_stored: int
    compression_ratio: float | None
    snapshots: int


def stats(repository: Repository) -> Stats:
    """Read every manifest and list every object; no content of files is read. Damage is in `problems`."""
    every = repository.snapshots()
    names: dict[str, list[Snapshot]] = {}
    for snapshot in every:
        names.setdefault(snapshot.name, []).append(snapshot)
    problems: list[str] = []
    chunks = _Chunks(repository.load_index())
    manifests = chunks.counted(b"".join({bytes.fromhex(chunk) for each in every for chunk, _ in each.manifest}))
    is_content = np.ones(chunks.count, bool)
    is_content[manifests] = False
    first = np.full(chunks.count, _OWNER_NONE, np.int32)
    """by chunk: the number of the first name that needs it"""
    is_shared = np.zeros(chunks.count, bool)
    needed: list[_Rows] = []
    read = 0
    for number, (name, snapshots) in enumerate(names.items()):
        rows = _needed(repository, name, snapshots, chunks, problems)
        rows = rows[is_content[rows]]
        is_shared[rows[first[rows] != _OWNER_NONE]] = True
        first[rows[first[rows] == _OWNER_NONE]] = number
        needed.append(rows)
        read += len(snapshots)
        repository.sink.progress(Progress("stats", done_files=read, total_files=len(every)))
    found = [
        _name_stats(name, snapshots, chunks, rows, rows[~is_shared[rows]])
        for (name, snapshots), rows in zip(names.items(), needed, strict=True)
    ]
    content = np.flatnonzero(first != _OWNER_NONE)
    total, unique, stored = sum(each.bytes for each in every), chunks.plain_bytes(content), chunks.stored_bytes(content)
    return Stats(
        snapshots=len(every),
        bytes=total,
        bytes_unique=unique,
        bytes_stored=stored,
        dedup_ratio=_ratio(total, unique),
        compression_ratio=_ratio(unique, stored),
        manifest_bytes=chunks.plain_bytes(manifests),
        manifest_bytes_stored=chunks.stored_bytes(manifests),
        places=_places(repository, problems),
        names=sorted(found, key=lambda each: each.name),
        problems=problems,
    )


def tensor_stats(
    repository: Repository, name: str, files: Iterable[tuple[Entry, Sequence[Tensor]]]
) -> list[TensorStats]:
    """Each tensor of these files, and how many snapshots of `name` hold it too.

    Reads the manifests of all of them, one after the other. Raises `Corrupt` where one can't be read.
    """
    index = repository.load_index()
    found: list[tuple[Entry, Tensor, float]] = []
    ids: list[bytes] = []
    starts: list[int] = []
    for entry, tensors in files:
        content = Content(entry, _unread)
        for tensor in tensors:
            held = _held(content, index, tensor)
            found.append((entry, tensor, sum(stored for _, stored in held)))
            starts.append(len(ids))
            ids += [chunk for chunk, _ in held]
    counts = _holders(repository, name, ids, starts)
    return [
        TensorStats(
            path=entry.path,
            name=tensor.name,
            dtype=tensor.dtype,
            shape=tensor.shape,
            bytes=tensor.length,
            bytes_stored=round(stored),
            compression_ratio=_ratio(tensor.length, round(stored)),
            snapshots=count,
        )
        for (entry, tensor, stored), count in zip(found, counts, strict=True)
    ]


class _Chunks(Usage):
    """Numbers the chunks of an index and knows their sizes."""

    def __init__(self, index: Index) -> None:
        super().__init__(index)
        _, parts = index.ordered()
        plain = np.concatenate([np.empty(0, np.uint32), *(part.rows["plain"] for part in parts)])
        self._plain = plain[self._first]
        self._stored_once = self._stored[self._first]
        self.count = len(self._first)
        self.unknown: set[bytes] = set()
        """counted chunks that no pack holds"""

    def count_in(self, ids: bytes) -> None:
        self.unknown.update(self.mark(ids))

    def taken(self) -> _Rows:
        """The numbers of the chunks that were counted in since this was last asked, each once."""
        rows = np.flatnonzero(self._marked)
        self._marked[rows] = False
        return rows

    def counted(self, ids: bytes) -> _Rows:
        self.count_in(ids)
        return self.taken()

    def plain_bytes(self, rows: _Rows) -> int:
        return int(self._plain[rows].sum(dtype=np.uint64))

    def stored_bytes(self, rows: _Rows) -> int:
        return int(self._stored_once[rows].sum(dtype=np.uint64))


def _needed(
    repository: Repository, name: str, snapshots: list[Snapshot], chunks: _Chunks, problems: list[str]
) -> _Rows:
    """Without what can't be counted because a manifest, or a chunk, is not there."""
    chunks.unknown.clear()
    try:
        needed_chunks(repository, snapshots, chunks.count_in)
    except Corrupt:
        for snapshot in snapshots:
            try:
                needed_chunks(repository, [snapshot], chunks.count_in)
            except Corrupt as exc:
                problems.append(f"snapshot {snapshot.id[:8]} of {name} is not counted in full: {exc.message}")
    lost = len(chunks.unknown - {bytes.fromhex(chunk) for each in snapshots for chunk, _ in each.manifest})
    if lost:
        problems.append(f"chunks that snapshots of {name} need and no readable pack holds: {lost:,}.")
    return chunks.taken()


def _name_stats(name: str, snapshots: list[Snapshot], chunks: _Chunks, rows: _Rows, own: _Rows) -> NameStats:
    total = sum(each.bytes for each in snapshots)
    unique, stored, bytes_own = chunks.plain_bytes(rows), chunks.stored_bytes(rows), chunks.plain_bytes(own)
    return NameStats(
        name=name,
        snapshots=len(snapshots),
        bytes=total,
        bytes_unique=unique,
        bytes_stored=stored,
        bytes_own=bytes_own,
        bytes_own_stored=chunks.stored_bytes(own),
        bytes_shared=unique - bytes_own,
        dedup_ratio=_ratio(total, unique),
        compression_ratio=_ratio(unique, stored),
    )


def _places(repository: Repository, problems: list[str]) -> Places:
    found = Places()
    state = repository.state
    missing = set(state.packs)
    for info in repository.store.list("packs/"):
        name = info.name.rpartition("/")[2]
        if info.name != object_name(name):
            place = found.unreferenced
        elif name in state.packs:
            missing.discard(name)
            place = found.live
        elif name in state.condemned:
            place = found.condemned
        elif name in state.quarantined:
            place = found.quarantined
        else:
            place = found.unreferenced
        place.objects += 1
        place.bytes += info.size_bytes
    for prefix, place in (("index/", found.index), ("log/", found.log), ("state/", found.states)):
        for info in repository.store.list(prefix):
            place.objects += 1
            place.bytes += info.size_bytes
    if missing:
        problems.append(f"packs that the log names and the store lacks: {len(missing):,}, such as {min(missing)[:16]}.")
    return found


# -- tensors -------------------------------------------------------------------------------------


def _unread(chunk: str) -> bytes:
    raise AssertionError(f"chunk {chunk} was asked for, but only where it lies is of interest")


def _held(content: Content, index: Index, tensor: Tensor) -> list[tuple[bytes, float]]:
    """(chunk, stored bytes of the part that lies in the tensor's extent) of each chunk that a tensor touches."""
    reach = tensor.reach_bytes
    held = []
    parts = content.entry.parts
    for start, chunk in content.chunks(tensor.offset, reach):
        raw = bytes.fromhex(chunk)
        location = index.get(bytes.fromhex(parts[chunk][-1]) if parts.get(chunk) else raw)
        if location is None or not location.plain_bytes:
            held.append((raw, 0.0))
            continue
        inside = min(start + location.plain_bytes, reach) - max(start, 0)
        held.append((raw, location.stored_bytes * inside / location.plain_bytes))
    return held


def _holders(repository: Repository, name: str, ids: Sequence[bytes], starts: Sequence[int]) -> list[int]:
    """For each tensor the number of snapshots of `name` that hold all of its chunks, ids[start:next start]."""
    ordered, where = np.unique(np.frombuffer(b"".join(ids), "S32"), return_inverse=True)
    edges = np.array([*starts, len(ids)], np.intp)
    counts = np.zeros(len(starts), np.int64)
    snapshots = [each for each in repository.snapshots() if each.name == name]
    if not len(ordered):
        return [len(snapshots)] * len(starts)  # there is nothing to lack
    for number, snapshot in enumerate(snapshots):
        is_there = np.zeros(len(ordered), bool)

        def take(chunks: bytes, is_there: NDArray[np.bool_] = is_there) -> None:
            wanted = np.frombuffer(chunks, "S32")
            at = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
            is_there[at[ordered[at] == wanted]] = True

        needed_chunks(repository, [snapshot], take, content=True)
        lacking = np.concatenate([[0], np.cumsum(~is_there[where])])
        counts += lacking[edges[1:]] == lacking[edges[:-1]]
        repository.sink.progress(Progress("stats", done_files=number + 1, total_files=len(snapshots)))
    return [int(count) for count in counts]


def _ratio(one: int, other: int) -> float | None:
    return round(one / other, 4) if other else None
