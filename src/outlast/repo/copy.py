"""Copy snapshots to another repository: what it lacks, every chunk verified, one commit a snapshot.

Chunk ids are equal in two repositories that are not encrypted: a chunk that the target has is never
read. Where one of them is encrypted the same content has another id in each; which id stands for
which is learned by reading a chunk, or without reading it from the manifests of a snapshot that both
have. A chunk keeps its encoded form: it is opened, verified and sealed again, not compressed again;
unless deltas are asked for, which are made of the blocks of tensors, and those are compressed.
Blocks that are sums in the source are sums of the same parts in the target, or whole where it knows no sums.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import msgspec

from outlast.errors import Archived, Busy, Corrupt, Exists, NotFound, OutlastError, Refused
from outlast.events import Event, Progress
from outlast.records import ChunkRef, Entry, Snapshot
from outlast.repo import codec, deltas, formats, leftovers, seal
from outlast.repo.content import Content, RecentChunks
from outlast.repo.deltas import Block, Kept
from outlast.repo.formats import Span
from outlast.repo.manifest import validated
from outlast.repo.pairs import Pairs, pair_up
from outlast.repo.read import Range, ranges
from outlast.repo.repository import Repository, chunk_offsets
from outlast.repo.sums import Parts
from outlast.repo.write import Prepared

FILES_MAX = 100
_TRIES = 4
_BYTES_IN_FLIGHT = 64 << 20
_RANGES_IN_FLIGHT = 64
_BATCH_CHUNKS = 16 << 10
_BATCH_ENTRIES = 16 << 10
_AIM_BYTES_MIN = 64 << 10
"""in smaller files no tensors are looked for: to read their beginnings costs more than they can save"""
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
    source: Repository,
    target: Repository,
    references: Sequence[str] = (),
    *,
    name: str | None = None,
    delta: bool = False,
) -> CopyReport:
    """Copy the snapshots that the target lacks, in the order in which the source committed them.

    `references` are the beginnings of ids, or `latest`; without them all snapshots are meant. With
    `name` only those of that name are looked at. With `delta` tensors are stored as differences from those
    at their place in the snapshot before of that name in the target, where these are smaller; those of a full
    backup are stored whole, and nothing is a difference in a target that was made before there were any.

    A snapshot is the same one in the target: id, time, tags and parent are kept; `bytes_added`, `bytes_stored` and
    the chunk ids are the target's own.

    A snapshot with damage in the source is named in the report and not committed; the others go on.
    Whatever this raises, and whenever it is killed, the snapshots committed until then are whole and
    no pack that had become durable is uploaded again: the next copy finds those that were not committed.

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
        run = _Run(source, target, pool, delta=delta and deltas.are_allowed(target))
        if delta and not run.delta:
            what = "was made before there were deltas, so that whole blocks are stored."
            target.sink.event(Event("copy.no_deltas", f"the repository at {target.store.url} {what}"))
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

    def __init__(self, source: Repository, target: Repository, pool: ThreadPoolExecutor, *, delta: bool) -> None:
        self.delta = delta
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
        if new:
            leftovers.take_up(self.target)
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
            pair_up(pairs, self.source.entries(near, self.read_manifest_chunk), theirs)
        except (Corrupt, ValueError) as exc:
            self._tell("manifest.damaged", near, f"can't be compared, so more is read: {exc}")

    def _nearest(self, snapshot: Snapshot) -> Snapshot | None:
        if snapshot.parent in self.target.state.snapshots and snapshot.parent in self.source.state.snapshots:
            return self.source.state.snapshots[snapshot.parent]
        return self._newest.get(snapshot.name)


def _id_key(repository: Repository) -> bytes | None:
    return repository.keys.id_key if repository.keys else None


class _Read(msgspec.Struct):
    """What one range gave: chunks by their ids in the source, ready for the target."""

    bytes_read: int = 0
    chunks: list[tuple[bytes, Kept]] = []
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
        self._keeps_sums = deltas.are_allowed(run.target)
        self._delta = run.delta
        loses_sums = deltas.are_allowed(run.source) and not self._keeps_sums
        self._rewrites = run.pairs is not None or self._delta or loses_sums
        """the manifest is not the one of the source, chunk by chunk"""
        self._before = deltas.Earlier(run.target, self._last_in_target() if self._delta else None)
        self._aims: dict[bytes, tuple[int, Block | None]] = {}
        """chunks of the source, of tensors -> bytes of an element, and what the target has in the place so far"""
        self._sums: dict[bytes, tuple[int, int]] = {}
        """sums of the source that must be added up -> bytes of an element, plain bytes"""
        self._parts: dict[bytes, bool] = {}
        """of sums of the source -> whether it is a difference. In the target they are stored, and no sums"""
        self._kept: dict[bytes, Parts] = {}
        """chunks of the source -> what they are the sum of in the target"""
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
        if not self._rewrites:
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
        if not self._rewrites and self.writer.has([(chunk.hex(), 0)]):
            try:
                return run.target.get_chunk(chunk)
            except Corrupt as exc:
                run.target.sink.event(Event("pack.damaged", f"{exc.message} It is read from the source instead."))
        plain = run.read_manifest_chunk(chunk)
        if not self._rewrites:
            self._manifest_chunks.append(self.writer.prepare(plain))
        return plain

    def _take(self, entry: Entry) -> None:
        if self._delta and entry.type == "file" and entry.size >= _AIM_BYTES_MIN:
            self._aim(entry)
        for ref in self._refs(entry):
            self._want(ref)
            if len(self._wanted) >= _BATCH_CHUNKS:
                self._fetch()
        self._waiting.append(entry)
        if not (self._wanted or self._sums) or len(self._waiting) >= _BATCH_ENTRIES:
            self._settle()

    def _refs(self, entry: Entry) -> list[ChunkRef]:
        """What of an entry has to be in the target. Notes the sums whose bytes have to be known as well."""
        if not entry.sums:
            return entry.chunks
        run = self._run
        for number, item_bytes, parts in entry.sums:
            chunk, length = bytes.fromhex(entry.chunks[number][0]), entry.chunks[number][1]
            self._parts.update((bytes.fromhex(part), at > 0) for at, part in enumerate(parts))
            ours = chunk if run.pairs is None else run.pairs.get(chunk)
            if ours is None or not (self._keeps_sums or self.writer.has([(ours.hex(), length)])):
                self._sums[chunk] = item_bytes, length
        if self._keeps_sums:
            return entry.stored
        parts_of = entry.parts
        return [ref for ref in entry.chunks if ref[0] not in parts_of]

    def _last_in_target(self) -> Snapshot | None:
        """The snapshot before this one, as far as the target has it. A full backup is built on none."""
        mine = self._snapshot
        if mine.kind == "backup" and not mine.parent:
            return None
        every = self._run.target.snapshots()
        found = [each for each in every if (each.kind, each.name) == (mine.kind, mine.name) and each.time < mine.time]
        return max(found, key=lambda each: each.time, default=None)

    def _aim(self, entry: Entry) -> None:
        """Note what the chunks of a file's tensors may be built on, and which are there already as sums."""
        run = self._run
        try:
            spans = formats.spans(Content(entry, RecentChunks(run.source).get).read, entry.size) or []
        except (Corrupt, Archived):
            return  # told when the chunk is copied
        before = self._before.blocks(entry)
        starts = [span.offset for span in spans]
        summed = entry.parts
        for offset, (chunk, length) in chunk_offsets(entry):
            span = spans[bisect_right(starts, offset) - 1] if starts and starts[0] <= offset else Span(0, 0, 0)
            if chunk in summed or not span.item_bytes or offset + length > span.offset + span.length:
                continue
            raw, old = bytes.fromhex(chunk), before.get(offset)
            self._aims[raw] = span.item_bytes, old
            ours = raw if run.pairs is None else run.pairs.get(raw)
            if old is not None and old.id == ours and old.parts.item_bytes and deltas.has(self.writer, old):
                self._kept[raw] = old.parts

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
        elif chunk in self._kept and chunk not in self._parts:
            pass  # a sum of what the target has
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
            if self._lost and any(bytes.fromhex(chunk) in self._lost for chunk, _ in [*entry.chunks, *entry.stored]):
                self._files_lost += 1
                if len(self._files) < FILES_MAX:
                    self._files.append(entry.path)
            elif self._rewrites and not self._problem:
                self.writer.add_entry(self._translated(entry))
        self._waiting.clear()

    def _translated(self, entry: Entry) -> Entry:
        pairs = self._run.pairs

        def ours(chunk: str) -> str:
            return chunk if pairs is None else pairs[bytes.fromhex(chunk)].hex()

        chunks = [(ours(chunk), length) for chunk, length in entry.chunks]
        made = {chunk: self._kept.get(bytes.fromhex(chunk)) for chunk, _ in entry.chunks} if self._kept else {}
        kept = {ours(chunk): parts for chunk, parts in made.items() if parts}
        if self._keeps_sums:
            for number, item_bytes, parts in entry.sums:
                kept[chunks[number][0]] = Parts(item_bytes, tuple(bytes.fromhex(ours(part)) for part in parts))
        return deltas.with_sums(entry, chunks, kept) if chunks else entry

    def _fetch(self) -> None:
        """Read what is wanted, several ranges at once, and store it in the order of the ranges."""
        wanted, self._wanted = self._wanted, {}
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
        self._add_up()

    def _add_up(self) -> None:
        """Learn the ids that sums have in the target; store them whole where it knows no sums."""
        wanted, self._sums = list(self._sums.items()), {}
        while wanted:
            batch: dict[bytes, int] = {}
            batch_bytes = 0
            while wanted and batch_bytes < _BYTES_IN_FLIGHT:
                chunk, (item_bytes, length) = wanted.pop()
                batch[chunk] = item_bytes
                batch_bytes += length
            self._add_up_some(batch)

    def _add_up_some(self, batch: dict[bytes, int]) -> None:
        run = self._run
        found: list[tuple[bytes, Kept]] = []

        def take(chunk: bytes, plain: bytes | memoryview) -> None:
            if self._keeps_sums:
                prepared = Prepared(seal.chunk_id(plain, run.target.keys), len(plain))
            else:
                prepared = self.writer.prepare(plain, batch[chunk])
            found.append((chunk, deltas.whole(prepared)))

        done = run.source.fetch(batch, take, lambda chunk, exc: self._lose(exc.message, chunk))
        run.report.bytes_read += done.bytes
        self._add(found)

    def _store_next(self, queue: deque[tuple[int, Future[_Read]]]) -> int:
        size, future = queue.popleft()
        found = future.result()
        self._run.report.bytes_read += found.bytes_read
        self._add(found.chunks)
        for chunk, problem in found.lost:
            self._lose(problem, chunk)
        return size

    def _add(self, chunks: list[tuple[bytes, Kept]]) -> None:
        for chunk, kept in chunks:
            if self._run.pairs is not None:
                self._run.pairs.put(chunk, kept.id)
            self.writer.add(kept.prepared)
            if kept.parts is not None:
                self._kept[chunk] = kept.parts

    def _read(self, part: Range) -> _Read:
        """In a worker: read, verify, give what the target is to store."""
        source = self._run.source
        found = _Read()
        try:
            [data] = source.read_pack(part.pack, [(part.start, part.end - part.start)])
            found.bytes_read = len(data)
        except (NotFound, Corrupt, Archived):
            data = b""
        view = memoryview(data)
        for chunk, location in part.chunks:
            at = location.offset - part.start
            try:
                encoded, plain = source.unseal_chunk(chunk, location, view[at : at + location.stored_bytes])
                kept = self._prepared(chunk, location.codec, encoded, plain)
            except Corrupt:
                try:
                    plain = source.get_stored(chunk)  # another copy of it, or what a prune made of it
                except (Corrupt, Archived) as exc:
                    todo = f" {exc.hint}" if isinstance(exc, Archived) else ""
                    found.lost.append((chunk, exc.message + todo))
                    continue
                found.bytes_read += location.stored_bytes
                kept = self._prepared(chunk, -1, b"", plain)
            found.chunks.append((chunk, kept))
        return found

    def _prepared(self, chunk: bytes, used: int, encoded: bytes | memoryview, plain: bytes | memoryview) -> Kept:
        if chunk in self._aims and chunk not in self._parts:
            return deltas.prepare(self.writer, plain, *self._aims[chunk])
        if used not in self._allowed and (used < 0 or not self._parts.get(chunk)):
            return deltas.whole(self.writer.prepare(plain))
        ours = chunk if self._run.pairs is None else seal.chunk_id(plain, self._run.target.keys)
        # A slice would keep all of the range in memory.
        return deltas.whole(Prepared(ours, len(plain), used, bytes(encoded)))
