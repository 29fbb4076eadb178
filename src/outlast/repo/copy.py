"""Copy snapshots to another repository: what it lacks, every chunk verified, one commit a snapshot.

Chunk ids are equal in two repositories that are not encrypted: a chunk that the target has is never
read. Where one of them is encrypted the same content has another id in each; which id stands for
which is learned by reading a chunk, or without reading it from the manifests of a snapshot that both
have. A chunk keeps its encoded form: it is opened, verified and sealed again, not compressed again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import msgspec
import numpy as np

from outlast.errors import Busy, Corrupt, Exists, NotFound, OutlastError, Refused
from outlast.events import Event, Progress
from outlast.records import ChunkRef, Entry, Snapshot
from outlast.repo import codec, seal
from outlast.repo.manifest import validated
from outlast.repo.pack import object_name
from outlast.repo.read import Range, ranges
from outlast.repo.repository import Repository
from outlast.repo.write import Prepared

FILES_MAX = 100
_TRIES = 4
_BYTES_IN_FLIGHT = 64 << 20
_RANGES_IN_FLIGHT = 64
_BATCH_CHUNKS = 16 << 10
_BATCH_ENTRIES = 16 << 10
_RECENT_PAIRS = 32 << 10
_CODECS = {"auto": {codec.RAW, codec.ZSTD, codec.PLANES}, "zstd": {codec.RAW, codec.ZSTD}, "none": {codec.RAW}}
"""what the compression of a repository allows in it"""


class Uncopied(msgspec.Struct, frozen=True):
    """A snapshot that was not copied, because not all of it can be had from the source."""

    snapshot: str
    name: str
    problem: str
    files: list[str]
    """those that can't be had whole, the first by name, at most `FILES_MAX`"""
    more_files: int = 0


class CopyReport(msgspec.Struct):
    """What `copy` did. The three lists hold ids, each snapshot that was asked for in one of them."""

    source: str
    target: str
    copied: list[str] = []
    skipped: list[str] = []
    """those that the target had"""
    failed: list[Uncopied] = []
    chunks: int = 0
    """stored in the target, those of manifests included"""
    bytes_read: int = 0
    """from the packs of the source"""
    bytes_added: int = 0
    """plain bytes of those chunks"""
    bytes_stored: int = 0
    """of the packs written to the target"""
    seconds: float = 0.0


def copy(
    source: Repository, target: Repository, references: Sequence[str] = (), *, name: str | None = None
) -> CopyReport:
    """Copy the snapshots that the target lacks, in the order in which the source committed them.

    `references` are the beginnings of ids, or `latest`; without them all snapshots are meant. With
    `name` only those of that name are looked at. A snapshot is the same one in the target: id, time,
    tags and parent are kept; `bytes_added`, `bytes_stored` and the chunk ids are the target's own.

    A snapshot with damage in the source is named in the report and not committed; the others go on.
    Whatever this raises, and whenever it is killed, the snapshots committed until then are whole and
    what was uploaded and committed is not uploaded again.

    Raises `Refused` when both are one repository, `NotFound` and `InvalidInput` as `find_snapshot`
    does, `Unavailable`, `StoreFull`, and `Busy` when prunes of the target kept removing what the copy
    relied on. `source` is only read.
    """
    if source.format.id == target.format.id:
        raise Refused(
            f"{source.store.url} and {target.store.url} are the same repository; nothing was copied.",
            hint="Make a repository of its own for the copies, with `outlast init`.",
        )
    started = target.clock.monotonic_seconds()
    with ThreadPoolExecutor(_workers(source), thread_name_prefix="copy") as pool:
        run = _Run(source, target, pool)
        run.copy(_chosen(source, references, name))
    run.report.seconds = target.clock.monotonic_seconds() - started
    return run.report


def _workers(source: Repository) -> int:
    return max(2, min(8, source.store.capabilities.concurrency))


def _chosen(source: Repository, references: Sequence[str], name: str | None) -> list[Snapshot]:
    """In the order of commit."""
    every = source.snapshots()
    if references:
        named = {source.find_snapshot(each, name).id for each in references}
        return [snapshot for snapshot in every if snapshot.id in named]
    if name is not None:
        source.find_snapshot("latest", name)  # raises where there is none of that name
    return [snapshot for snapshot in every if name is None or snapshot.name == name]


class _Run:
    """One call of `copy`: what is known from one snapshot to the next."""

    def __init__(self, source: Repository, target: Repository, pool: ThreadPoolExecutor) -> None:
        self.source = source
        self.target = target
        self.pool = pool
        self.report = CopyReport(source.store.url, target.store.url)
        self.pairs = None if _id_key(source) == _id_key(target) else Pairs()
        """source id -> target id; None where they are the same"""
        self._learned: set[str] = set()
        self._newest = {each.name: each for each in source.snapshots() if each.id in target.state.snapshots}
        """name -> of the snapshots that both have the last one"""
        self._done_bytes = self._done_files = self._total_bytes = self._total_files = 0

    def copy(self, chosen: list[Snapshot]) -> None:
        self.source.load_index()
        self.target.refresh()
        new = [snapshot for snapshot in chosen if snapshot.id not in self.target.state.snapshots]
        for snapshot in chosen:
            if snapshot.id in self.target.state.snapshots:
                self._skip(snapshot)
        self._total_bytes, self._total_files = sum(each.bytes for each in new), sum(each.files for each in new)
        for snapshot in new:
            self._copy_one(snapshot)
            self._done_bytes += snapshot.bytes
            self._done_files += snapshot.files

    def _copy_one(self, snapshot: Snapshot) -> None:
        if snapshot.id in self.target.state.snapshots:  # the commit of the one before has told of it
            self._skip(snapshot)
            return
        for attempt in range(_TRIES):
            try:
                self._try(snapshot)
                return
            except Exists:
                self._skip(snapshot)
                return
            except Busy as exc:
                if attempt == _TRIES - 1:
                    raise
                self._tell("snapshot.again", snapshot, f"is copied again from the beginning: {exc.message}")
                self.target.refresh()

    def _try(self, snapshot: Snapshot) -> None:
        if self.pairs is not None:
            self._learn(snapshot, self.pairs)
        session = _Session(self, snapshot)
        writer = session.writer
        try:
            failure = session.store()
            if failure is None:
                writer.commit(msgspec.structs.replace(snapshot, manifest=session.manifest))
            else:
                writer.abandon()
        except BaseException:
            writer.abandon()
            raise
        finally:
            self.report.chunks += writer.chunks_added
            self.report.bytes_added += writer.bytes_added
            self.report.bytes_stored += writer.bytes_stored
        if failure is not None:
            if self._is_forgotten(snapshot):
                failure = msgspec.structs.replace(failure, problem="it was forgotten in the source meanwhile.")
            self.report.failed.append(failure)
            self._tell("snapshot.not_copied", snapshot, f"was not copied: {failure.problem}")
            return
        self._learned.add(snapshot.id)
        self._newest[snapshot.name] = snapshot
        self.report.copied.append(snapshot.id)
        self._tell("snapshot.copied", snapshot, "was copied.")

    def _is_forgotten(self, snapshot: Snapshot) -> bool:
        with suppress(OutlastError):  # a log that is damaged, or out of reach, was told of already
            self.source.refresh()
        return snapshot.id not in self.source.state.snapshots

    def _skip(self, snapshot: Snapshot) -> None:
        self.report.skipped.append(snapshot.id)
        self._tell("snapshot.present", snapshot, f"is at {self.target.store.url} already.")

    def _tell(self, kind: str, snapshot: Snapshot, what: str) -> None:
        fields = {"snapshot": snapshot.id, "name": snapshot.name}
        self.target.sink.event(Event(kind, f"snapshot {snapshot.id[:8]} of {snapshot.name} {what}", fields))

    def progress(self, done_bytes: int, done_files: int) -> None:
        """How far the snapshot is that is being copied."""
        done = self._done_bytes + done_bytes, self._total_bytes, self._done_files + done_files, self._total_files
        self.target.sink.progress(Progress("copy", *done))

    def read_manifest_chunk(self, chunk: bytes) -> bytes | memoryview:
        """Of the source, counted. Raises `Corrupt`."""
        plain = self.source.get_chunk(chunk)
        location = self.source.index.get(chunk)
        self.report.bytes_read += location.stored_bytes if location else 0
        return plain

    def _learn(self, snapshot: Snapshot, pairs: Pairs) -> None:
        """Pair the ids of a snapshot that both have and that is much like this one."""
        near = self._nearest(snapshot)
        known = self.target.state.snapshots.get(near.id) if near else None
        if near is None or known is None or near.id in self._learned:
            return
        self._learned.add(near.id)
        theirs = self.target.entries(known)
        try:
            for old, new in zip(self.source.entries(near, self.read_manifest_chunk), theirs, strict=True):
                if _without_ids(old) != _without_ids(new):
                    return
                for (old_chunk, _), (new_chunk, _) in zip(old.chunks, new.chunks, strict=True):
                    pairs.put(bytes.fromhex(old_chunk), bytes.fromhex(new_chunk))
        except (Corrupt, ValueError) as exc:
            self._tell("manifest.damaged", near, f"can't be compared, so more is read: {exc}")

    def _nearest(self, snapshot: Snapshot) -> Snapshot | None:
        if snapshot.parent in self.target.state.snapshots and snapshot.parent in self.source.state.snapshots:
            return self.source.state.snapshots[snapshot.parent]
        return self._newest.get(snapshot.name)


def _id_key(repository: Repository) -> bytes | None:
    return repository.keys.id_key if repository.keys else None


def _without_ids(entry: Entry) -> tuple[Entry, list[int]]:
    return msgspec.structs.replace(entry, chunks=[]), [length for _, length in entry.chunks]


class _Read(msgspec.Struct):
    """What one range gave: chunks by their ids in the source, ready for the target."""

    bytes_read: int = 0
    chunks: list[tuple[bytes, Prepared]] = []
    lost: list[tuple[bytes, str]] = []


class _Session:
    """One snapshot on its way. Entries wait until their chunks are stored; both are bounded in number."""

    def __init__(self, run: _Run, snapshot: Snapshot) -> None:
        self.writer = run.target.writer()
        self.manifest: list[ChunkRef] = []
        """the snapshot's manifest in the target, unless it is the writer's"""
        self._run = run
        self._snapshot = snapshot
        self._allowed = _CODECS[run.target.format.compression]
        self._manifest_chunks: list[Prepared] = []
        self._wanted: dict[bytes, int] = {}
        """chunks to read -> plain bytes"""
        self._waiting: list[Entry] = []
        self._lost: set[bytes] = set()
        self._problem = ""
        self._files: list[str] = []
        self._files_lost = 0

    def store(self) -> Uncopied | None:
        """Make the target have every chunk and the manifest; or say what can't be had."""
        run = self._run
        done_bytes = done_files = 0
        entries = validated(run.source.entries(self._snapshot, self._manifest_chunk), self._snapshot.id)
        while (entry := self._next(entries)) is not None:
            self._take(entry)
            done_bytes += entry.size
            done_files += entry.type in ("file", "hardlink")
            if done_files % 256 == 0 or entry.size > 1 << 20:
                run.progress(done_bytes, done_files)
        self._settle()
        if run.pairs is None:
            self.manifest = self._snapshot.manifest
        if not self._problem:
            return None
        return Uncopied(
            self._snapshot.id,
            self._snapshot.name,
            self._problem,
            self._files,
            self._files_lost - len(self._files),
        )

    def _next(self, entries: Iterator[tuple[bytes, Entry]]) -> Entry | None:
        try:
            _, entry = next(entries, (b"", None))
        except Corrupt as exc:
            self._lose(f"its manifest is damaged: {exc.message}")
            return None
        for prepared in self._manifest_chunks:
            self.writer.add(prepared)
        self._manifest_chunks.clear()
        return entry

    def _manifest_chunk(self, chunk: bytes) -> bytes | memoryview:
        run = self._run
        if run.pairs is None and self.writer.has([(chunk.hex(), 0)]):
            try:
                return run.target.get_chunk(chunk)
            except Corrupt as exc:
                run.target.sink.event(Event("pack.damaged", f"{exc.message} It is read from the source instead."))
        plain = run.read_manifest_chunk(chunk)
        if run.pairs is None:
            self._manifest_chunks.append(self.writer.prepare(plain))
        return plain

    def _take(self, entry: Entry) -> None:
        for ref in entry.chunks:
            self._want(ref)
            if len(self._wanted) >= _BATCH_CHUNKS:
                self._fetch()
        self._waiting.append(entry)
        if not self._wanted or len(self._waiting) >= _BATCH_ENTRIES:
            self._settle()

    def _want(self, ref: ChunkRef) -> None:
        """Note what has to be read: nothing, where the target is known to have the chunk."""
        run = self._run
        chunk = bytes.fromhex(ref[0])
        ours = chunk if run.pairs is None else run.pairs.get(chunk)
        location = run.source.index.get(chunk) or (run.target.index.get(ours) if ours else None)
        if location is None:
            self._lose(f"chunk {ref[0][:16]} is in no readable pack.", chunk)
        elif location.plain_bytes != ref[1]:
            self._lose(f"chunk {ref[0][:16]} is {location.plain_bytes} bytes long, not {ref[1]}.", chunk)
        elif ours is None or not self.writer.has([(ours.hex(), ref[1])]):
            self._wanted[chunk] = ref[1]

    def _lose(self, problem: str, chunk: bytes | None = None) -> None:
        self._problem = self._problem or problem
        if chunk is not None:
            self._lost.add(chunk)

    def _settle(self) -> None:
        """Store the chunks of the entries that wait, and let the entries go."""
        self._fetch()
        for entry in self._waiting:
            if self._lost and any(bytes.fromhex(chunk) in self._lost for chunk, _ in entry.chunks):
                self._files_lost += 1
                if len(self._files) < FILES_MAX:
                    self._files.append(entry.path)
            elif self._run.pairs is not None and not self._problem:
                self.writer.add_entry(self._translated(entry, self._run.pairs))
        self._waiting.clear()

    def _translated(self, entry: Entry, pairs: Pairs) -> Entry:
        chunks = [(pairs[bytes.fromhex(chunk)].hex(), length) for chunk, length in entry.chunks]
        return msgspec.structs.replace(entry, chunks=chunks) if chunks else entry

    def _fetch(self) -> None:
        """Read what is wanted, several ranges at once, and store it in the order of the ranges."""
        wanted, self._wanted = self._wanted, {}
        if not wanted:
            return
        queue: deque[tuple[int, Future[_Read]]] = deque()
        in_flight = 0
        try:
            for part in ranges(self._run.source, wanted, lambda chunk, exc: self._lose(exc.message, chunk)):
                size = part.end - part.start
                while queue and (in_flight + size > _BYTES_IN_FLIGHT or len(queue) >= _RANGES_IN_FLIGHT):
                    in_flight -= self._store_next(queue)
                queue.append((size, self._run.pool.submit(self._read, part)))
                in_flight += size
            while queue:
                in_flight -= self._store_next(queue)
        finally:
            for _, future in queue:
                future.cancel()

    def _store_next(self, queue: deque[tuple[int, Future[_Read]]]) -> int:
        size, future = queue.popleft()
        found = future.result()
        self._run.report.bytes_read += found.bytes_read
        for chunk, prepared in found.chunks:
            if self._run.pairs is not None:
                self._run.pairs.put(chunk, prepared.id)
            self.writer.add(prepared)
        for chunk, problem in found.lost:
            self._lose(problem, chunk)
        return size

    def _read(self, part: Range) -> _Read:
        """In a worker: read, verify, give what the target is to store."""
        source = self._run.source
        found = _Read()
        try:
            [data] = source.store.get_ranges(object_name(part.pack), [(part.start, part.end - part.start)])
            found.bytes_read = len(data)
        except (NotFound, Corrupt):
            data = b""
        view = memoryview(data)
        for chunk, location in part.chunks:
            at = location.offset - part.start
            try:
                encoded, plain = source.unseal_chunk(chunk, location, view[at : at + location.stored_bytes])
                prepared = self._prepared(chunk, location.codec, encoded, plain)
            except Corrupt:
                try:
                    plain = source.get_chunk(chunk)  # another copy of it, or what a prune made of it
                except Corrupt as exc:
                    found.lost.append((chunk, exc.message))
                    continue
                found.bytes_read += location.stored_bytes
                prepared = self.writer.prepare(plain)
            found.chunks.append((chunk, prepared))
        return found

    def _prepared(self, chunk: bytes, used: int, encoded: bytes | memoryview, plain: bytes | memoryview) -> Prepared:
        if used not in self._allowed:
            return self.writer.prepare(plain)
        ours = chunk if self._run.pairs is None else seal.chunk_id(plain, self._run.target.keys)
        return Prepared(ours, len(plain), used, bytes(encoded))  # a slice would keep all of the range in memory


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
