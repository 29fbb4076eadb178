"""Store chunks: hash, look up, encode in worker threads; fill packs; make them durable; commit once."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import msgspec

from outlast import records
from outlast.errors import Busy, Exists, OutlastError
from outlast.events import Event
from outlast.records import ChunkRef, Entry, PackRef, Snapshot
from outlast.repo import codec, pack, seal
from outlast.repo.index import build_segment, segment_name
from outlast.repo.pack import BuiltPack, EncodedChunk, Footer
from outlast.repo.state import PACKS, SNAPSHOT, State

if TYPE_CHECKING:
    from outlast.repo.repository import Repository

PACK_WRITERS = 2
PACK_WRITERS_AFAR = 4
"""Where one connection rarely fills the line. Each holds a pack in memory."""
PACK_CHUNKS_MAX = 50_000
# Packs of a long backup are committed this often, so that one that is killed doesn't begin anew.
COMMIT_PACKS_BYTES = 1 << 30
COMMIT_PACKS_CHUNKS = 256 << 10
# An index segment is written when so many packs, or chunks in them, are in none.
SEGMENT_PACKS = 64
SEGMENT_CHUNKS = 256 << 10


class Prepared(msgspec.Struct, frozen=True, gc=False):
    """A chunk that was hashed, looked up and, unless the repository has it, encoded."""

    id: bytes
    plain_bytes: int
    codec: int = 0
    encoded: bytes | memoryview | None = None


class Contribution(msgspec.Struct, frozen=True):
    """What one of several processes stored for a snapshot that another of them commits. It can be sent as JSON."""

    packs: list[PackRef]
    """durable, and in no entry of the log yet"""
    relied_on: list[str]
    bytes_added: int
    bytes_stored: int


class Writer:
    """One session of storing. `prepare` and `has` are for any thread, everything else for one.

    Order of durable writes, the only thing that safety rests on: packs, then one log entry that
    names them. Whatever ends the session earlier leaves garbage and no damage.

    A session notes every pack that it relies on. When one of them was condemned meanwhile, the
    commit lists it again, which makes it live; when one is gone, the session has to begin again.
    """

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self._open_pack: list[EncodedChunk] = []
        self._open_bytes = 0
        self._pending: set[bytes] = set()
        writers = PACK_WRITERS if repository.store.capabilities.memory_map else PACK_WRITERS_AFAR
        self._pool = ThreadPoolExecutor(writers, thread_name_prefix="pack")
        self._slots = threading.BoundedSemaphore(writers)
        self._in_flight: list[Future[BuiltPack]] = []
        self._durable: list[PackRef] = []
        self._footers: list[Footer] = []
        self.relied_on: set[str] = set()
        """packs, those of this session included"""
        self._manifest: list[ChunkRef] = []
        self._lines: list[bytes] = []
        self._line_bytes = 0
        self._of_thread = threading.local()
        self._cut = repository.cutter()
        self.chunks_added = 0
        self.bytes_added = 0
        self.bytes_stored = 0

    def identify(self, plain: bytes | memoryview) -> bytes:
        """The id of a chunk."""
        return seal.chunk_id(plain, self.repository.keys)

    def prepare(
        self,
        plain: bytes | memoryview,
        item_bytes: int = 0,
        *,
        lasting: bool = False,
        chunk: bytes = b"",
        compress: bool = False,
    ) -> Prepared:
        """Hash, look up, encode. A memoryview may be reused afterwards, for what is kept of it is copied;
        unless it is `lasting`: then its bytes stay as they are until the session is over. `chunk`: its id, if known.
        `compress`: whatever the repository says."""
        chunk = chunk or self.identify(plain)
        if self._has(chunk):
            return Prepared(chunk, len(plain))
        number, encoded = self._encoder(compress).encode(plain, item_bytes)
        if encoded is plain and isinstance(plain, memoryview) and not lasting:
            encoded = bytes(plain)  # a slice would keep all of what it was cut from in memory
        return Prepared(chunk, len(plain), number, encoded)

    def _encoder(self, compress: bool) -> codec.Encoder:
        name = "auto" if compress else self.repository.format.compression
        encoder: codec.Encoder | None = getattr(self._of_thread, name, None)
        if encoder is None:
            encoder = codec.Encoder(name)
            setattr(self._of_thread, name, encoder)
        return encoder

    def add(self, prepared: Prepared) -> ChunkRef:
        """Take a prepared chunk into the open pack, unless it is there or known already."""
        if (
            prepared.encoded is not None
            and prepared.id not in self._pending
            and not self._has(prepared.id)  # its twin's pack may have become durable meanwhile
        ):
            self.chunks_added += 1
            self.bytes_added += prepared.plain_bytes
            self.store_again(EncodedChunk(prepared.id, prepared.codec, prepared.plain_bytes, prepared.encoded))
        return prepared.id.hex(), prepared.plain_bytes

    def store_again(self, chunk: EncodedChunk) -> None:
        """Take an encoded chunk into the open pack, whether or not the repository has it."""
        self._pending.add(chunk.id)
        self._open_pack.append(chunk)
        self._open_bytes += len(chunk.encoded) + pack.RECORD.itemsize
        if self._open_bytes >= self.repository.format.pack_bytes or len(self._open_pack) >= PACK_CHUNKS_MAX:
            self._close_pack()

    def has(self, refs: Iterable[ChunkRef]) -> bool:
        """Whether every chunk is known, so that an unchanged file may be taken from its parent."""
        ids = (bytes.fromhex(chunk) for chunk, _ in refs)
        return all(chunk in self._pending or self._has(chunk) for chunk in ids)

    def _has(self, chunk: bytes) -> bool:
        holder = self.repository.holder(chunk)
        if holder is None:
            return False
        self.relied_on.add(holder)
        return True

    def add_entry(self, entry: Entry) -> None:
        """Append to the manifest; entries must come in `path_order`."""
        line = records.canonical(entry) + b"\n"
        self._lines.append(line)
        self._line_bytes += len(line)
        if self._line_bytes >= 4 * self.repository.format.chunking.max_bytes:
            self._cut_manifest(at_end=False)

    def _cut_manifest(self, *, at_end: bool) -> None:
        text = b"".join(self._lines)
        at = 0
        for length in self._cut(text, at_end) if text else []:
            self._manifest.append(self.add(self.prepare(text[at : at + length])))
            at += length
        self._lines = [text[at:]]
        self._line_bytes = len(text) - at

    def _close_pack(self) -> None:
        """Hand the open pack to a pack writer; waits while all of them are busy, which bounds memory."""
        if not self._open_pack:
            return
        self._slots.acquire()
        chunks, self._open_pack, self._open_bytes = self._open_pack, [], 0
        future = self._pool.submit(self._write_pack, chunks)
        self._in_flight.append(future)
        # A slot is free when the pack can be collected, not a moment before: packs in flight are what the slots bound.
        future.add_done_callback(lambda _: self._slots.release())
        self._collect(wait=False)
        durable = self._durable
        if (
            sum(ref.bytes for ref in durable) >= COMMIT_PACKS_BYTES
            or sum(ref.chunks for ref in durable) >= COMMIT_PACKS_CHUNKS
        ):
            self.commit_packs()

    def _write_pack(self, chunks: list[EncodedChunk]) -> BuiltPack:
        repository = self.repository
        built = pack.build(chunks, repository.keys, repository.clock.random_bytes(seal.SALT_BYTES))
        try:
            repository.store.put_if_absent(pack.object_name(built.name), built.parts)
        except Exists as exc:
            # Names are unique, so it was ours, its reply was lost, and it is not there any more.
            raise Busy(
                f"pack {built.name[:16]} was removed by a prune while it was uploaded; every snapshot is whole.",
                hint="Run the same command again: what was stored and is still there is not stored again.",
            ) from exc
        built.parts.clear()
        return built

    def _collect(self, *, wait: bool) -> None:
        """Note the packs that became durable; raises what a pack writer raised."""
        waiting, self._in_flight = self._in_flight, []
        while waiting:
            future = waiting.pop(0)
            if not wait and not future.done():
                self._in_flight.append(future)
                continue
            try:
                built = future.result()
            except BaseException:
                self._in_flight += waiting
                raise
            self.repository.index.add_recent(built.footer)
            self._pending.difference_update(built.footer.records["id"].tolist())
            self._footers.append(built.footer)
            self.relied_on.add(built.name)
            self.repository.own_packs.add(built.name)
            self._durable.append(PackRef(built.name, built.bytes, len(built.footer.records)))
            self.bytes_stored += built.bytes

    def commit_packs(self) -> None:
        """Commit the packs that are durable, without a snapshot: work done so far isn't done again."""
        self._collect(wait=False)
        if self._durable:
            self._append(PACKS, {}, set())
            self._speed_up_next_open()

    def _append(self, kind: str, body: dict[str, Any], relied_on: set[str]) -> None:
        """Commit the packs that are durable, and with them those relied on that are condemned, or in no entry."""
        durable = {ref.name: ref for ref in self._durable}
        leftovers = self.repository.leftovers

        def whole_body(state: State) -> dict[str, Any]:
            if kind == SNAPSHOT and body["snapshot"]["id"] in state.snapshots:
                raise Exists(f"snapshot {body['snapshot']['id'][:8]} was copied by somebody else meanwhile.")
            # One that was swept may be condemned again, as an object that nothing names and that was left over
            # then: whoever swept it may be about to delete it, so it is never rescued.
            swept = self.repository.log.swept
            gone = [name for name in durable if name in swept]
            rescued: list[PackRef] = []
            for name in sorted(relied_on - durable.keys()):
                if name in swept:
                    gone.append(name)
                elif name not in state.packs:
                    ref = None if name in state.quarantined else state.find(name) or leftovers.get(name)
                    if ref is None:
                        gone.append(name)
                    else:
                        rescued.append(ref)
            if gone:
                raise Busy(
                    f"{len(gone)} packs that this work relied on were deleted or quarantined meanwhile; nothing was "
                    "committed, and every snapshot is whole.",
                    hint="Run the same command again: what was stored and is still there is not stored again.",
                )
            return {**body, "packs": msgspec.to_builtins([*durable.values(), *rescued])}

        self.repository.log.append(kind, whole_body)
        self.repository.own_packs.difference_update(durable)
        self._durable.clear()

    def finish(self) -> None:
        """Make everything durable and commit the packs, without a snapshot; the session is over."""
        self._close_pack()
        self._collect(wait=True)
        self._pool.shutdown()
        self.commit_packs()

    def contribute(self) -> Contribution:
        """Make everything durable, for another process to commit. `settle` or `abandon` ends the session."""
        self._close_pack()
        self._collect(wait=True)
        return Contribution(list(self._durable), sorted(self.relied_on), self.bytes_added, self.bytes_stored)

    def take(self, contribution: Contribution) -> None:
        """Commit with the snapshot what another process contributed to it."""
        self._durable += contribution.packs
        self.relied_on.update(contribution.relied_on)
        self.bytes_added += contribution.bytes_added
        self.bytes_stored += contribution.bytes_stored

    def settle(self) -> None:
        """The other process has committed what was contributed; the session is over."""
        self._pool.shutdown()
        self.repository.own_packs.difference_update(ref.name for ref in self._durable)
        self._durable.clear()
        self._speed_up_next_open()

    def commit(self, snapshot: Snapshot) -> Snapshot:
        """Make everything durable and commit the snapshot: the only moment at which it comes to exist.

        `manifest`, `bytes_added`, `bytes_stored` and `id` are filled in here; a snapshot that is copied
        has its `id`, and may have a `manifest` whose chunks were added. Raises `Exists` when another
        copy has committed this id: then the packs of this session are left to prune.
        """
        self._cut_manifest(at_end=True)
        self._close_pack()
        self._collect(wait=True)
        self._pool.shutdown()
        snapshot = msgspec.structs.replace(
            snapshot,
            manifest=self._manifest or snapshot.manifest,
            bytes_added=self.bytes_added,
            bytes_stored=self.bytes_stored,
        )
        if not snapshot.id:
            salt = self.repository.clock.random_bytes(16)
            snapshot = msgspec.structs.replace(snapshot, id=seal.digest(salt + records.canonical(snapshot))[:16].hex())
        try:
            self._append(SNAPSHOT, {"snapshot": msgspec.to_builtins(snapshot)}, self.relied_on)
        except Exists:
            self._give_up_packs()
            raise
        self._speed_up_next_open()
        return snapshot

    def abandon(self) -> None:
        """End without a snapshot: wait for packs under way and keep what is durable for the next try."""
        self._open_pack.clear()
        self._pool.shutdown(wait=True)
        self._in_flight = [future for future in self._in_flight if future.exception() is None]
        self._durable = [ref for ref in self._durable if ref.name not in self.repository.log.swept]
        try:
            self.commit_packs()
        except OutlastError as exc:
            self.repository.sink.event(
                Event("packs.not_committed", f"packs already uploaded were not committed: {exc.message}")
            )
            self._give_up_packs()

    def _give_up_packs(self) -> None:
        """Uploaded and never committed: nothing later may rely on them."""
        self.repository.own_packs.difference_update(ref.name for ref in self._durable)
        self._durable.clear()
        self._footers.clear()

    def _speed_up_next_open(self) -> None:
        """Write the derived objects that are due. They only save time, so failing is no failure."""
        repository = self.repository
        repository.log.save_state()
        repository.uncovered.extend(self._footers)
        self._footers.clear()
        chunks = sum(len(footer.records) for footer in repository.uncovered)
        if len(repository.uncovered) < SEGMENT_PACKS and chunks < SEGMENT_CHUNKS:
            return
        segment = build_segment(repository.uncovered)
        try:
            repository.store.put_if_absent(f"index/{segment_name(segment, repository.keys)}", [segment])
            repository.uncovered.clear()
        except OutlastError as exc:
            repository.sink.event(Event("index.not_written", f"an index segment was not written: {exc.message}"))
