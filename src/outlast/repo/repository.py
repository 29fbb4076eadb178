"""The content-addressed repository: create, open, read chunks, list snapshots. The deep module.

Writing goes through `repository.writer()` (see `write.py`), bulk reading through
`repository.fetch()` (see `read.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import msgspec

from outlast import records
from outlast.clock import SYSTEM_CLOCK, Clock
from outlast.errors import Archived, Corrupt, Exists, InvalidInput, NoRepository, NotFound, OutlastError, Refused
from outlast.events import NULL_SINK, Event, EventSink
from outlast.records import FORMAT_VERSION, Chunking, ChunkRef, Encryption, Entry, Format, PackRef, Snapshot
from outlast.repo import chain, codec, footers, naming, seal
from outlast.repo import form as form_of
from outlast.repo.chain import Walk
from outlast.repo.chunker import cutter
from outlast.repo.index import Index, IndexedPack, Location
from outlast.repo.keyring import Secret, make_keys, open_keys
from outlast.repo.log import Log
from outlast.repo.pack import Footer, object_name
from outlast.repo.read import Fetched
from outlast.repo.seal import ChunkSealer, Keys
from outlast.repo.state import State
from outlast.repo.sums import Sums, fetch
from outlast.repo.write import Writer
from outlast.store.base import HOW_TO_THAW, ObjectStore
from outlast.store.lock import locking, prove_lockable

PACK_BYTES = 64 << 20
SEGMENT_BYTES_MAX = 4 << 30


class Repository:
    """An open repository.

    One thread at a time, except `get_chunk`, `knows` and what `writer` and `fetch` do inside.
    """

    def __init__(
        self,
        store: ObjectStore,
        form: Format,
        keys: Keys | None,
        anchor: str,
        clock: Clock,
        sink: EventSink,
    ) -> None:
        self.store = store
        self.format = form
        self.keys = keys
        self.clock = clock
        self.sink = sink
        self.log = Log(store, keys, anchor, clock, sink)
        self.index = Index()
        self.uncovered: list[Footer] = []
        """footers of known packs that no index segment covers"""
        self._segments: dict[str, set[str]] = {}
        """index segment -> packs whose chunks were taken from it"""
        self._segments_wrong: set[str] = set()
        self._footers = Index()
        """what such packs say themselves, where a segment may have said something wrong"""
        self._footers_asked: set[str] = set()
        self.own_packs: set[str] = set()
        """packs that this process made durable and no entry names yet"""
        self.archived: dict[str, bool] = {}
        """packs in a storage class for archives -> whether reading it was refused, so that it isn't asked again"""
        self.leftovers: dict[str, PackRef] = {}
        """packs of killed sessions that new work may rely on, and lists when it commits; see `leftovers.py`"""
        self._asked_after: set[str] = set()
        """missing packs for whose sake the log was read again"""
        self.sums = Sums()
        self._indexed = False
        self._reads_packs = False
        self._present: dict[str, bool] = {}
        self._sealers: dict[IndexedPack, ChunkSealer] = {}
        self._lock = threading.Lock()

    # -- create and open -------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        store: ObjectStore,
        *,
        secret: Secret | None = None,
        compression: Literal["auto", "none", "zstd"] = "auto",
        chunking: Chunking | None = None,
        pack_bytes: int = PACK_BYTES,
        lock_days: int = 0,
        clock: Clock = SYSTEM_CLOCK,
        sink: EventSink = NULL_SINK,
    ) -> Repository:
        """Make a repository; encrypted when `secret` is given. Raises `Refused` where one exists.

        With `lock_days` nobody can delete what is written for so long: S3 with Object Lock alone can
        do it, others raise `Refused`.

        The way to read it without Outlast and the key slot are written first and `format` last: its
        creation is the creation of the repository, and of two that try at once exactly one wins.
        """
        form_of.refuse_taken(store)
        if lock_days:
            form_of.check_lock_days(lock_days)
            store = locking(store, lock_days, clock)
            prove_lockable(store)
        created = records.time_text(clock.now_ns())
        repository_id = clock.random_bytes(16)
        keys = None
        if secret is not None:
            passphrase = secret()
            if not passphrase:
                raise InvalidInput("the passphrase is empty; nothing was made.")
        form = Format(
            magic="outlast repository",
            version=FORMAT_VERSION,
            id=repository_id.hex(),
            created=created,
            features=form_of.FEATURES,
            chunking=chunking or Chunking(),
            compression=compression,
            pack_bytes=pack_bytes,
            encryption=Encryption() if secret else None,
            lock_days=lock_days or msgspec.UNSET,
        )
        form_of.check_sizes(form)
        data = records.canonical_object(form)
        anchor = seal.digest(data).hex()
        form_of.leave_a_way_out(store)
        if secret is not None:
            keys = make_keys(store, repository_id, anchor, passphrase, clock)
        try:
            store.put_if_absent("format", [data])
        except Exists as exc:
            raise Refused(f"{store.url} holds a repository already; nothing was changed.") from exc
        form_of.prove_create_if_absent(store, data)
        return cls(store, form, keys, anchor, clock, sink)

    @classmethod
    def open(
        cls,
        store: ObjectStore,
        *,
        secret: Secret | None = None,
        clock: Clock = SYSTEM_CLOCK,
        sink: EventSink = NULL_SINK,
    ) -> Repository:
        """Open a repository and read its log.

        Raises `NoRepository`, `WrongKey`, `Refused` (a newer format), `Corrupt` or `Unavailable`.
        """
        repository = cls.connect(store, secret=secret, clock=clock, sink=sink)
        repository.log.load()
        return repository

    @classmethod
    def open_damaged(
        cls,
        store: ObjectStore,
        *,
        secret: Secret | None = None,
        clock: Clock = SYSTEM_CLOCK,
        sink: EventSink = NULL_SINK,
    ) -> Repository:
        """Open, for reading, a repository whose log has damaged entries: they are told as events and skipped.

        Commits to such a repository fail with `Corrupt` before anything is added to its log.
        """
        repository = cls.connect(store, secret=secret, clock=clock, sink=sink)
        found = chain.walk(store, repository.log)
        for damage in found.damage:
            sink.event(Event("log.damaged", damage.problem, {"object": damage.object}))
        repository.adopt(found)
        return repository

    def adopt(self, found: Walk) -> None:
        """Go by what a walk of the log found. Packs that only a lost entry named are taken from the store."""
        self.log.state = found.state
        self.log.damage = next((each.problem for each in found.damage if not each.object.startswith("state/")), "")
        if not found.lost:
            return
        for info in self.store.list("packs/"):
            name = info.name.rpartition("/")[2]
            if self.state.find(name) is None and info.name == object_name(name):
                self.state.packs[name] = PackRef(name, info.size_bytes, 0)

    @classmethod
    def connect(
        cls,
        store: ObjectStore,
        *,
        secret: Secret | None = None,
        clock: Clock = SYSTEM_CLOCK,
        sink: EventSink = NULL_SINK,
    ) -> Repository:
        """What `open` does without reading the log: no snapshot and no pack is known yet."""
        data = form_of.get_or_none(store, "format")
        if data is None:
            if next(store.list("log/"), None) is not None:
                raise Corrupt(
                    f"the object `format` of {store.url} is missing, but the repository's log is there.",
                    hint="Copy `format` back from a replica: it is small and never changes.",
                )
            raise NoRepository(f"there is no repository at {store.url}.", hint="Make one with `outlast init`.")
        form = form_of.parse_format(data, store.url)
        anchor = seal.digest(data).hex()
        keys = open_keys(store, form, secret) if form.encryption else None
        if keys and keys.anchor != anchor:
            raise Corrupt(
                f"the object `format` of {store.url} is not the one it was made with; nothing was touched.",
                hint="Copy `format` back from a replica: it is small and never changes.",
            )
        return cls(locking(store, form.lock_days or 0, clock), form, keys, anchor, clock, sink)

    # -- snapshots -------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        return self.log.state

    def snapshots(self) -> list[Snapshot]:
        """Every committed snapshot, in the order of commit."""
        return list(self.state.snapshots.values())

    def find_snapshot(self, reference: str, name: str | None = None) -> Snapshot:
        """The snapshot whose id begins with `reference`, in any case, or for `latest` the one of the latest time.

        Not the one committed last: that may be a copy of an old one.

        Raises `NotFound` or, when several fit or `reference` is too short, `InvalidInput`.
        """
        return naming.find(self.snapshots(), reference, name)

    def entries(self, snapshot: Snapshot, get: Callable[[bytes], bytes | memoryview] | None = None) -> Iterator[Entry]:
        """The manifest's entries in `path_order`, streamed: a manifest may be larger than memory.

        `get` gives the verified plain bytes of its chunks, where they are not to be read from here.
        """
        get = get or self.get_chunk
        what = f"the manifest of snapshot {snapshot.id[:12]}"
        rest: list[bytes] = []
        rest_bytes = 0
        for chunk, _ in snapshot.manifest:
            first, *lines = bytes(get(bytes.fromhex(chunk))).split(b"\n")
            rest.append(first)
            rest_bytes += len(first)
            if rest_bytes > _LINE_BYTES_MAX:
                raise Corrupt(f"{what} has a line of more than {_LINE_BYTES_MAX} bytes.")
            if lines:
                *whole, last = lines
                for line in (b"".join(rest), *whole):
                    yield self.sums.learn(records.parse(line, _entry_decoder, what))
                rest, rest_bytes = [last], len(last)
        if rest_bytes:
            raise Corrupt(f"{what} ends in the middle of a line.")

    # -- chunks ----------------------------------------------------------------------------------

    def load_index(self) -> Index:
        """Fold segments, and the footers of packs that no segment covers. Idempotent and cheap when done.

        A damaged segment is ignored; a damaged footer leaves its pack's chunks unknown. Both are
        told as events: what needs those chunks will name them.
        """
        wanted = self.state.readable_packs()
        if not self._indexed:
            self.learn_archived()
            for info in self.store.list("index/"):
                name = info.name.removeprefix("index/")
                if info.name in self.state.ignored:
                    continue  # one that lies has the hash that its name promises
                try:
                    if info.size_bytes > SEGMENT_BYTES_MAX:
                        raise Corrupt(f"{info.name} is far too large to be an index segment.")
                    told = self.index.add_segment(self.store.get(info.name), name, self.keys, wanted)
                    self._segments[info.name] = told
                except (Corrupt, NotFound) as exc:
                    what = f"{exc} It is not needed; `outlast check --repair` writes it anew."
                    self.sink.event(Event("index.ignored", what, {"object": info.name}))
        missing = [ref for name, ref in wanted.items() if name not in self.index.packs]
        found = [footer for footer in self._read_many(missing) if footer is not None]
        self.index.add(found)
        self.uncovered.extend(found)
        self.index.sort()
        self._indexed = True
        return self.index

    def refresh(self) -> None:
        """Learn what others committed since: new packs, and those that are gone. Raises as `open` does."""
        self.log.refresh()
        self.index.forget_packs(self.log.swept)
        self.uncovered = [footer for footer in self.uncovered if footer.name not in self.log.swept]
        self.archived = dict.fromkeys(self.archived, False)
        if self._indexed:
            self.load_index()

    def learn_archived(self) -> None:
        """Learn which packs were archived, or are about to be; what was refused before may be asked for again."""
        self.archived = dict.fromkeys([*self.archived, *footers.kept(self.store)], False)

    def use_index(self, index: Index) -> None:
        """Look chunks up in this index, which the caller has verified, instead of loading one."""
        self.index = index
        self._indexed = True

    def _read_many(self, refs: list[PackRef]) -> list[Footer | None]:
        if len(refs) < (64 if self.store.capabilities.memory_map else 8):
            return [self._footer_or_none(ref) for ref in refs]
        with ThreadPoolExecutor(self.store.capabilities.concurrency) as threads:
            return list(threads.map(self._footer_or_none, refs))

    def _footer_or_none(self, ref: PackRef) -> Footer | None:
        try:
            return self.read_footer(ref)
        except (Corrupt, NotFound, Archived) as exc:
            kind = "pack.archived" if isinstance(exc, Archived) else "pack.damaged"
            self.sink.event(Event(kind, str(exc), {"object": object_name(ref.name)}))
            return None

    def read_footer(self, ref: PackRef) -> Footer:
        """The verified footer of a pack; see `footers.read`."""
        return footers.read(self.store, ref, is_kept=ref.name in self.archived)

    def locate(self, chunk: bytes) -> Location:
        """Where a chunk lies. Raises `Corrupt` when no pack that can be read holds it."""
        if not self._indexed:
            with self._lock:  # twice at once, the second would note that no segment told of anything
                self.load_index()
        location = self.index.get(chunk)
        location = location or next(iter(self._elsewhere(chunk, [])), None)
        if location is None:
            raise Corrupt(
                f"chunk {chunk.hex()[:16]} is in no readable pack of {self.store.url}.",
                hint="Run `outlast check` to see which packs are damaged and which snapshots are affected.",
            )
        if self._is_live(location.pack.name) and location.pack.name not in self.archived:
            return location
        copies = (copy for copy in self.index.copies(chunk) if self._is_live(copy.pack.name))
        return min(copies, key=lambda copy: copy.pack.name in self.archived, default=location)

    def holder(self, chunk: bytes) -> str | None:
        """The pack by which new work may rely on the repository having this chunk, or None.

        Existence is not integrity: the pack's size is checked, once per pack and process.
        """
        location = self.index.get(chunk)
        if location is None:
            return None
        if self._is_present(location.pack.name):
            return location.pack.name
        copies = (copy.pack.name for copy in self.index.copies(chunk))
        return next((name for name in copies if self._is_present(name)), None)

    def _is_live(self, pack: str) -> bool:
        return pack in self.state.packs or pack in self.own_packs or pack in self.leftovers

    def _is_present(self, name: str) -> bool:
        if not self._is_live(name):
            return False
        present = self._present.get(name)
        if present is None:
            with self._lock:
                present = self._present.get(name)
                if present is None:
                    present = self._present[name] = self._pack_is_whole(name)
        return present

    def _pack_is_whole(self, name: str) -> bool:
        ref = self.state.packs.get(name)
        if ref is None:
            return True  # durable, not committed yet
        try:
            size = self.store.stat(object_name(name)).size_bytes
        except NotFound:
            size = -1
        known = name in self.state.damaged
        if size == ref.bytes and not known and not (self._reads_packs and footers.is_damaged(self.store, ref)):
            return True
        found = (
            "is missing" if size < 0 else "is damaged" if size == ref.bytes else f"has {size} bytes, not {ref.bytes}"
        )
        self.sink.event(
            Event(
                "pack.damaged",
                f"pack {name[:16]} {found}; its chunks are stored again.",
                {"object": object_name(name)},
            )
        )
        return False

    def get_chunk(self, chunk: bytes) -> bytes | memoryview:
        """The verified plain bytes of a chunk, be it stored or a sum of which a manifest has told. Raises `Corrupt`."""
        return self.sums.get(self, chunk)

    def get_stored(self, chunk: bytes) -> bytes | memoryview:
        """The same of one that is stored. Where one copy is damaged and there is another, that one's."""
        missing: list[str] = []
        try:
            return self._read_chunk(chunk, missing)
        except Corrupt as exc:
            # A prune may have moved the chunk to another pack since the index was loaded.
            if not self._learned_more(missing):
                raise
            try:
                return self._read_chunk(chunk, missing)
            except Corrupt:
                raise exc from None

    def _read_chunk(self, chunk: bytes, missing: list[str]) -> bytes | memoryview:
        failure: OutlastError | None = None
        for location in self._places(chunk, missing):
            name = object_name(location.pack.name)
            try:
                [stored] = self.read_pack(location.pack.name, [(location.offset, location.stored_bytes)])
                return self.open_chunk(chunk, location, stored)
            except Corrupt as exc:
                failure = failure or exc
            except Archived as exc:
                missing.append(location.pack.name)  # nobody lied about it
                failure = failure or exc
            except NotFound:
                missing.append(location.pack.name)
                failure = failure or Corrupt(
                    f"pack {location.pack.name[:16]} is missing.", hint=f"The object is {name}."
                )
        assert failure is not None
        raise failure

    def read_pack(self, pack: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Ranges of a pack. Raises `NotFound`, `Corrupt`, and `Archived`, from then on without asking."""
        if self.archived.get(pack):
            raise Archived(f"pack {pack[:16]} of {self.store.url} is archived. It is whole.", hint=HOW_TO_THAW)
        try:
            return self.store.get_ranges(object_name(pack), ranges)
        except Archived:
            self.archived[pack] = True
            raise

    def _places(self, chunk: bytes, missing: list[str]) -> Iterator[Location]:
        first = self.locate(chunk)
        yield first
        yield from (copy for copy in self.index.copies(chunk) if copy != first)
        yield from self._elsewhere(chunk, missing)

    def _elsewhere(self, chunk: bytes, missing: list[str]) -> list[Location]:
        """Other places where the chunk lies by the footers of packs that a segment told of: it may be wrong.

        First those packs are asked that the index names, then all of them; each once. Where one of the
        former is `missing` a prune has deleted it, or it is lost, and the segment is not to blame.
        """
        if missing or not self._segments:
            return []
        told = self.index.copies(chunk)
        with self._lock:
            for is_wider in (False, True):
                packs = set().union(*self._segments.values()) if is_wider else {copy.pack.name for copy in told}
                refs = [self.state.find(name) for name in sorted(packs - self._footers_asked)]
                self._footers_asked |= packs
                self._footers.add(filter(None, self._read_many([ref for ref in refs if ref is not None])))
                self._footers.sort()
                found = self._footers.copies(chunk)
                if found:
                    break
            others = [place for place in found if place not in told]
            wrong = {place.pack.name for place in others}
            for segment, packs in self._segments.items():
                if packs & wrong and segment not in self._segments_wrong:
                    self._segments_wrong.add(segment)
                    what = f"{segment} is wrong about where chunks lie; the packs themselves are asked instead."
                    hint = "`outlast check --repair` writes it anew."
                    self.sink.event(Event("index.wrong", f"{what} {hint}", {"object": segment}))
        return others

    def _learned_more(self, missing: list[str]) -> bool:
        """Whether others committed something since, which may tell where the content of missing packs is now."""
        with self._lock:
            if not missing or self._asked_after.issuperset(missing):
                return False
            self._asked_after.update(missing)
            before = self.state.seq
            try:
                self.refresh()
            except OutlastError:
                return False  # the log is damaged or out of reach: what was asked for first is the news
            return self.state.seq != before

    def open_chunk(self, chunk: bytes, location: Location, stored: bytes | memoryview) -> bytes | memoryview:
        """Stored bytes -> plain bytes; `Corrupt` unless they hash to the chunk's id."""
        return self.unseal_chunk(chunk, location, stored)[1]

    def unseal_chunk(
        self, chunk: bytes, location: Location, stored: bytes | memoryview
    ) -> tuple[bytes | memoryview, bytes | memoryview]:
        """Stored bytes -> (encoded bytes, plain bytes); `Corrupt` unless the latter hash to the chunk's id."""
        try:
            encoded: bytes | memoryview = stored
            if location.pack.encrypted:
                encoded = self._sealer(location.pack).open(
                    stored, chunk, location.codec, location.plain_bytes, location.offset
                )
            plain = codec.decode(location.codec, encoded, location.plain_bytes)
            if seal.chunk_id(plain, self.keys) != chunk:
                raise Corrupt(f"chunk {chunk.hex()[:16]} does not have the bytes that its id promises.")
        except Corrupt as exc:
            self._present[location.pack.name] = False  # nothing new relies on a pack that has shown damage
            raise Corrupt(
                f"pack {location.pack.name[:16]} is damaged at offset {location.offset}: {exc.message}",
                hint=f"The object is {object_name(location.pack.name)}. `outlast check --data all` names all affected.",
            ) from exc
        return encoded, plain

    def _sealer(self, of: IndexedPack) -> ChunkSealer:
        sealer = self._sealers.get(of)  # not by its name: a segment may say something wrong of its salt
        if sealer is None:
            if self.keys is None:
                raise Corrupt(f"pack {of.name[:16]} is encrypted, but the repository is not.")
            sealer = ChunkSealer(self.keys, of.epoch, bytes.fromhex(of.salt))
            self._sealers[of] = sealer
        return sealer

    def fetch(
        self,
        chunks: Iterable[bytes],
        deliver: Callable[[bytes, bytes | memoryview], None],
        failed: Callable[[bytes, OutlastError], None] | None = None,
    ) -> Fetched:
        """Read many chunks in parallel; see `sums.fetch`."""
        self.load_index()
        return fetch(self, chunks, deliver, failed)

    def writer(self, *, trusting: bool = True) -> Writer:
        """Begin storing chunks; see `Writer`.

        Unless `trusting`, a pack is read and verified before new work relies on it, once: chunks
        that were damaged since are stored again.
        """
        self.load_index()
        if not trusting:
            self._reads_packs = True
            self._present.clear()
        return Writer(self)

    def cutter(self) -> Callable[[bytes | memoryview, bool], list[int]]:
        """The content-defined cutter of this repository; see `chunker.cutter`."""
        chunking = self.format.chunking
        return cutter(chunking, self.keys.chunking_seed if self.keys else chunking.seed)


_entry_decoder = msgspec.json.Decoder(Entry)
_LINE_BYTES_MAX = 256 << 20
"""Enough for a file of 12 TB in blocks of 4 MiB."""


def chunk_offsets(entry: Entry) -> Iterator[tuple[int, ChunkRef]]:
    """Each chunk of a file with its offset: chunks end to end, jumping over the holes."""
    holes = iter([*entry.holes, (entry.size, 0)])
    hole_start, hole_bytes = next(holes)
    at = 0
    for ref in entry.chunks:
        while at == hole_start and hole_bytes:
            at += hole_bytes
            hole_start, hole_bytes = next(holes)
        yield at, ref
        at += ref[1]
