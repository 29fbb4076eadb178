"""A snapshot out of several repositories, nearest first: each chunk from the first that has it whole.

A snapshot keeps its id when it is copied, so a chunk is asked for by its id wherever chunks have the same names as
where the manifest comes from, whether the snapshot is there or not. Where other keys give other names, the manifests
of the snapshot tell which stands for which. Nothing that a place says is believed: a chunk counts only when its bytes
have the id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from threading import Lock

import msgspec

from outlast.errors import Archived, Corrupt, InvalidInput, NotFound, OutlastError, Unavailable
from outlast.events import Event
from outlast.records import Entry, Snapshot
from outlast.repo import deltas, seal
from outlast.repo.naming import Together
from outlast.repo.pairs import Pairs, pair_up
from outlast.repo.read import Failed
from outlast.repo.repository import Repository
from outlast.repo.seal import Keys

Plain = bytes | memoryview

DeliverFrom = Callable[[bytes, Plain, str], None]
"""chunk, its plain bytes, where they come from"""

_Reasons = dict[bytes, list[tuple[str, OutlastError]]]
"""chunk -> (where, why it can't be had there)"""


class Source(msgspec.Struct):
    """What one place gave to a restore, or will."""

    where: str
    """the URL of a repository; or the target, for what was right there already or left by a restore that was killed"""
    bytes: int = 0
    """of files: a chunk that stands in several places counts in each"""
    chunks: int = 0
    """of a repository each counts once, of the target wherever it stands"""
    failed: int = 0
    """chunks that should have been there and could not be had"""


class _Names:
    """Repositories in which equal content has equal chunk ids."""

    def __init__(self) -> None:
        self.holders: list[_Place] = []
        """those that have the snapshot"""
        self.pairs: Pairs | None = Pairs()
        """our chunk id -> theirs; None where ours are the same"""


class _Place:
    """One of the repositories, and how it does."""

    def __init__(self, repository: Repository, names: _Names, snapshot: Snapshot | None) -> None:
        self.repository = repository
        self.where = repository.store.url
        """unique among them"""
        self.names = names
        self.snapshot = snapshot
        self.read = Source("")
        """what `get_chunk` took from here"""
        self.failed = 0
        self.problem: OutlastError | None = None
        """why it is asked no more, except for what nobody else has"""
        self.is_told = False
        self.is_ready = False

    @property
    def snapshot_there(self) -> Snapshot:
        assert self.snapshot is not None
        return self.snapshot

    def called(self, chunks: Iterable[bytes], names: _Names) -> dict[bytes, bytes]:
        """What chunks that have these `names` are called here, as far as that is known: theirs -> ours."""
        if self.names is names:
            return {chunk: chunk for chunk in chunks}
        pairs = self.names.pairs
        return {theirs: chunk for chunk in chunks if pairs is not None and (theirs := pairs.get(chunk)) is not None}

    def has(self, chunk: bytes) -> bool:
        """Whether it is stored, or the sum of what is, as far as the index tells."""
        index, sums = self.repository.index, self.repository.sums
        if index.get(chunk) is not None:
            return True
        known = sums.parts(chunk)
        if known is not None and all(index.get(part) is not None for part in known.ids):
            return True
        taught = self.names.holders[0].repository.sums.parts(chunk) if self.names.holders else None
        if taught is None or any(index.get(part) is None for part in taught.ids):
            return False
        sums.learn(Entry("", "file", chunks=[(chunk.hex(), 0)], sums=[taught.listed(0)]))
        return True


class Nearest:
    """Several open repositories as one with one snapshot. For one restore: it remembers what failed.

    Beside their indexes it takes some 80 bytes a chunk of the snapshot for each other way of naming chunks.
    """

    def __init__(
        self, repositories: Sequence[Repository], snapshot: Snapshot | str, *, name: str | None = None
    ) -> None:
        """`repositories`: nearest first. `snapshot`: the record of one, or a reference as `find_snapshot` takes it.

        `latest` is the one of the latest time in all of them. Raises `NotFound` or `InvalidInput`.
        """
        found = Together(repositories).find_snapshot(snapshot, name) if isinstance(snapshot, str) else snapshot
        once = {(each.format.id, each.store.url): each for each in reversed(repositories)}
        self.repositories = list(once.values())[::-1]
        names: dict[bytes | None, _Names] = {}
        self._places: list[_Place] = []
        for each in self.repositories:
            mine = names.setdefault(each.keys.id_key if each.keys else None, _Names())
            place = _Place(each, mine, each.state.snapshots.get(found.id))
            same = sum(other.repository.store.url == place.where for other in self._places)
            place.where += f" ({same + 1})" if same else ""  # as with stores in memory
            self._places.append(place)
            if place.snapshot is not None:
                mine.holders.append(place)
        leaders = [each for each in names.values() if each.holders]
        if not leaders:
            where = ", ".join(each.where for each in self._places) or "no repository"
            raise NotFound(f"snapshot {found.id[:12]} is not in {where}.", hint="`outlast snapshots` lists what is.")
        self.clock, self.sink = repositories[0].clock, repositories[0].sink
        self.keys: Keys | None = None
        self._turn = Lock()
        # First the one whose names a plan that was made earlier may hold.
        leaders.sort(key=lambda each: found.manifest not in [place.snapshot_there.manifest for place in each.holders])
        self._lead = leaders[0]
        if len(leaders) > 1:
            self._lead = next((each for each in leaders if self._can_lead(each, leaders)), leaders[0])
        self._lead.pairs = None
        self._others = [each for each in leaders if each is not self._lead]
        first = self._lead.holders[0]
        self.snapshot = first.snapshot_there
        self.keys, self.sums = first.repository.keys, first.repository.sums

    @property
    def read(self) -> list[Source]:
        """What `get_chunk` took from where."""
        return [msgspec.structs.replace(each.read, where=each.where, failed=each.failed) for each in self._places]

    def sources(self, given: dict[str, Source]) -> list[Source]:
        """All places in their order, with what each of them gave and how often it failed."""
        return [
            msgspec.structs.replace(given.get(each.where, Source(each.where)), failed=each.failed)
            for each in self._places
        ]

    # -- the manifest --------------------------------------------------------------------------------

    def entries(self, snapshot: Snapshot) -> Iterator[Entry]:
        """As `Repository.entries`. Raises `InvalidInput` for another snapshot than the one chosen."""
        if snapshot.id != self.snapshot.id:
            raise InvalidInput(f"this is about snapshot {self.snapshot.id[:12]}, not {snapshot.id[:12]}.")
        done = 0
        try:
            for entry in self._entries(self._lead):
                done += 1
                yield entry
            return
        except OutlastError as exc:
            problem = exc
        for other in self._others:
            with suppress(OutlastError, KeyError):
                back = other.pairs.reversed() if other.pairs else Pairs()
                for entry in islice(self._entries(other), done, None):
                    chunks = [(back[bytes.fromhex(chunk)].hex(), length) for chunk, length in entry.chunks]
                    done += 1
                    yield msgspec.structs.replace(entry, chunks=chunks, sums=[])
                return
        raise problem

    def find_snapshot(self, reference: str, name: str | None = None) -> Snapshot:
        """The one chosen, as the place has it whose manifest is followed, if it is what the reference means."""
        found = Together(self.repositories).find_snapshot(reference, name)
        return self.snapshot if found.id == self.snapshot.id else found

    def _entries(self, names: _Names) -> Iterator[Entry]:
        """From the nearest that has a manifest that can be read; in its middle another one may take over."""
        first, *_ = names.holders
        done = 0
        tried = []
        problem: OutlastError | None = None
        for place in names.holders:
            snapshot = place.snapshot_there
            if snapshot.manifest in tried:
                continue  # the same chunks, which were looked for everywhere
            tried.append(snapshot.manifest)
            try:
                entries = place.repository.entries(snapshot, lambda chunk: self._get(chunk, names)[0])
                for entry in islice(entries, done, None):
                    done += 1
                    yield first.repository.sums.learn(entry)
                return
            except OutlastError as exc:
                problem = problem or exc
                self._tell(place, f"its manifest of snapshot {snapshot.id[:12]} can't be read: {exc.message}")
        assert problem is not None
        raise problem

    def _can_lead(self, names: _Names, leaders: Sequence[_Names]) -> bool:
        """Learn what its chunks are called elsewhere; False where its own manifest can't be read."""
        self.keys = names.holders[0].repository.keys
        for other in leaders:
            if other is names:
                continue
            failures: list[OutlastError] = []
            elsewhere: list[OutlastError] = []
            other.pairs = Pairs()
            try:
                pair_up(other.pairs, _until(self._entries(names), failures), _until(self._entries(other), elsewhere))
            except ValueError:  # one of them ended early
                pass
            if failures:
                return False
        return True

    # -- chunks --------------------------------------------------------------------------------------

    def where(self, chunk: bytes) -> str:
        """The place that is the first to be asked for a chunk; "" where no index tells of it."""
        found = self._first(chunk)
        return found[0].where if found else ""

    def called_in(self, repository: Repository, chunk: bytes) -> bytes | None:
        """What a chunk is called in a repository, if that is the first to be asked for it."""
        found = self._first(chunk)
        return found[1] if found and found[0].repository is repository else None

    def _first(self, chunk: bytes) -> tuple[_Place, bytes] | None:
        for place in self._places:
            if place.problem is None and (known := self._known(place, [chunk], self._lead)):
                return place, next(iter(known))
        return None

    def get_chunk(self, chunk: bytes) -> Plain:
        """The verified plain bytes. Raises `Corrupt`, `Archived` or `Unavailable` where no place has them whole."""
        plain, place = self._get(chunk, self._lead)
        place.read.bytes += len(plain)
        place.read.chunks += 1
        return plain

    def _get(self, chunk: bytes, names: _Names) -> tuple[Plain, _Place]:
        """A chunk by what it is called in `names`."""
        found: list[tuple[Plain, _Place]] = []
        failures: list[tuple[bytes, OutlastError]] = []

        def deliver(chunk: bytes, plain: Plain, where: str) -> None:
            found.extend((plain, place) for place in self._places if place.where == where)

        self._fetch([chunk], deliver, lambda *failure: failures.append(failure), names)
        for _, error in failures:
            raise error
        return found[0]

    def fetch(self, chunks: Iterable[bytes], deliver: DeliverFrom, failed: Failed) -> None:
        """As `Repository.fetch`. A chunk that no place has whole goes to `failed`, with what each says of it."""
        self._fetch(chunks, deliver, failed, self._lead)

    def _fetch(self, chunks: Iterable[bytes], deliver: DeliverFrom, failed: Failed, names: _Names) -> None:
        wanted = dict.fromkeys(chunks)
        for place in self._places:
            if wanted and place.problem is None:
                known = self._known(place, wanted, names)
                self._take(place, known, wanted, deliver, None)
                place.failed += sum(ours in wanted for ours in known.values())
        reasons: _Reasons = {}
        for place in self._places if wanted else ():
            # Also what no index tells of, and whoever failed before.
            called = place.called(wanted, names)
            for chunk in wanted.keys() - set(called.values()):
                unknown = "it has another key, and no manifest that says what the chunk is called there."
                reasons.setdefault(chunk, []).append((place.where, NotFound(unknown)))
            self._take(place, called, wanted, deliver, reasons)
        for chunk in wanted:
            failed(chunk, _nowhere(chunk, reasons.get(chunk, [])))

    def _known(self, place: _Place, wanted: Iterable[bytes], names: _Names) -> dict[bytes, bytes]:
        """Of these chunks those that a place has, as far as it can tell: theirs -> ours."""
        called = place.called(wanted, names)
        try:
            if called:
                self._prepare(place)
        except OutlastError as exc:
            self._give_up(place, exc)
            return {}
        return {theirs: ours for theirs, ours in called.items() if place.has(theirs)}

    def _prepare(self, place: _Place) -> None:
        """Make `has` tell. Raises what reading the index raises."""
        if place.is_ready:
            return
        repository, snapshot = place.repository, place.snapshot
        repository.load_index()
        differs = snapshot is not None and snapshot.manifest != place.names.holders[0].snapshot_there.manifest
        if snapshot is not None and differs and deltas.are_allowed(repository):
            # Which chunks are sums, and of what, is for each repository to say.
            failures: list[OutlastError] = []
            for _ in _until(repository.entries(snapshot), failures):
                pass
            for exc in failures:
                self._tell(place, f"its manifest of snapshot {snapshot.id[:12]} can't be read: {exc.message}")
        place.is_ready = True

    def _take(
        self,
        place: _Place,
        called: dict[bytes, bytes],
        wanted: dict[bytes, None],
        deliver: DeliverFrom,
        reasons: _Reasons | None,
    ) -> None:
        """Ask for chunks (theirs -> ours). What is given leaves `wanted`; failures are told, or go to `reasons`."""
        broken: list[BaseException] = []

        def take(theirs: bytes, plain: Plain) -> None:
            ours = called[theirs]
            if ours != theirs and seal.chunk_id(plain, self.keys) != ours:
                lose(theirs, Corrupt(f"chunk {theirs.hex()[:16]} there has other bytes than the snapshot elsewhere."))
                return
            try:
                deliver(ours, plain, place.where)
            except BaseException as exc:
                broken.append(exc)
                raise
            del wanted[ours]

        def lose(theirs: bytes, error: OutlastError) -> None:
            with self._turn:
                if reasons is not None:
                    reasons.setdefault(called[theirs], []).append((place.where, error))
                elif error.retryable:
                    self._give_up(place, error)
                else:
                    self._tell(place, error.message)

        if not called:
            return
        try:
            place.repository.fetch(called, take, lose)
        except OutlastError as exc:
            if exc in broken:
                raise
            if reasons is None:
                self._give_up(place, exc)
                return
            for ours in wanted.keys() & set(called.values()):
                reasons.setdefault(ours, []).append((place.where, exc))

    def _give_up(self, place: _Place, problem: OutlastError) -> None:
        place.problem = problem
        self._tell(place, problem.message)

    def _tell(self, place: _Place, problem: str) -> None:
        """Once for each place."""
        if place.is_told:
            return
        place.is_told = True
        reason = f"{place.where} can't give all that it should; what it lacks is taken from elsewhere: {problem}"
        self.sink.event(Event("restore.place.failed", reason, {"place": place.where}))


def _until(entries: Iterator[Entry], failures: list[OutlastError]) -> Iterator[Entry]:
    """Entries up to the one that can't be had; why goes to `failures`."""
    try:
        yield from entries
    except OutlastError as exc:
        failures.append(exc)


def _nowhere(chunk: bytes, reasons: list[tuple[str, OutlastError]]) -> OutlastError:
    """With what each place says. To be tried again, if one of them is only out of reach; or once it was thawed."""
    kind: type[OutlastError] = Corrupt
    if any(error.retryable for _, error in reasons):
        kind = Unavailable
    elif any(isinstance(error, Archived) for _, error in reasons):
        kind = Archived
    told = " ".join(f"{where}: {error.message}" for where, error in reasons)
    hints = [error.hint for _, error in reasons if isinstance(error, kind)] or [error.hint for _, error in reasons]
    hint = next(filter(None, hints), "")
    return kind(f"no place can give chunk {chunk.hex()[:16]} whole. {told}", hint=hint)


Holder = Repository | Nearest
"""What a snapshot is restored from."""


def places(holder: Holder) -> list[Repository]:
    return holder.repositories if isinstance(holder, Nearest) else [holder]
