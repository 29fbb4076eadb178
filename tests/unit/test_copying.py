"""Copying snapshots between repositories in memory: what is read, what is stored, what is refused."""

from __future__ import annotations

import random  # noqa: TID251  seeded
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.clock import ManualClock
from outlast.errors import Busy, Refused, StoreFull
from outlast.events import ListSink
from outlast.records import Chunking, Entry, Snapshot
from outlast.repo import codec, log, seal
from outlast.repo import copy as copying
from outlast.repo import pairs as pairing
from outlast.repo.check import open_and_check
from outlast.repo.copy import CopyReport, Pairs, copy
from outlast.repo.pack import EncodedChunk, object_name
from outlast.repo.repository import Repository
from outlast.repo.state import CONDEMN, FORGET, SWEEP
from outlast.store.base import Buffer, ObjectStore
from outlast.store.layers import Layer, ReadOnlyStore
from outlast.store.memory import MemoryStore
from outlast.testing.faults import Recorder

SMALL = Chunking(block_bytes=4096, min_bytes=1024, avg_bytes=4096, max_bytes=16384)
CHUNK_BYTES = 2000
Files = dict[str, bytes]
DOMAINS = [(False, False), (False, True), (True, False), (True, True)]


@pytest.fixture(autouse=True, scope="module")
def cheap_passphrases() -> Iterator[None]:
    """Deriving keys is slow on purpose, and nothing here depends on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seal, "ARGON2_MEMORY_KIB", 32)
        patch.setattr(seal, "ARGON2_ITERATIONS", 1)
        yield


class Watched(Layer):
    """Notes the ranges that are read, and calls `before_put` ahead of each object that is made."""

    def __init__(self, store: ObjectStore) -> None:
        super().__init__(store)
        self.ranges: list[tuple[str, int, int]] = []
        self.before_put: Callable[[str], None] = lambda name: None

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        self.ranges += [(name, *each) for each in ranges]
        return super().get_ranges(name, ranges)

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        self.before_put(name)
        super().put_if_absent(name, parts)


class Place:
    """A repository and the way to open it again."""

    def __init__(self, encrypted: bool = False, **settings: Any) -> None:
        self.store = Watched(MemoryStore())
        self._secret = (lambda: b"secret of %d" % id(self)) if encrypted else None
        settings = {"chunking": SMALL, "pack_bytes": 20_000, **settings}
        Repository.create(self.store, secret=self._secret, **settings)

    def open(self, *, readonly: bool = False) -> Repository:
        store = ReadOnlyStore(self.store) if readonly else self.store
        return Repository.open(store, secret=self._secret, sink=ListSink())

    def is_whole(self) -> bool:
        return open_and_check(self.store, secret=self._secret, data="all").ok

    def add(self, files: Files, name: str = "run", **fields: Any) -> Snapshot:
        """Commit a snapshot of these files."""
        repository = self.open()
        writer = repository.writer()
        for path, content in sorted(files.items()):
            pieces = [content[at : at + CHUNK_BYTES] for at in range(0, len(content), CHUNK_BYTES)]
            chunks = [writer.add(writer.prepare(piece, 4 if path.endswith(".f32") else 0)) for piece in pieces]
            writer.add_entry(Entry(path, "file", 0o644, size=len(content), chunks=chunks))
        size = sum(map(len, files.values()))
        given = {"files": len(files), "bytes": size, "time": "2026-01-01T00:00:00.000000Z", **fields}
        return writer.commit(Snapshot("", "backup", name, **given))


def content(repository: Repository, snapshot: str) -> Files:
    entries = repository.entries(repository.state.snapshots[snapshot])
    return {
        entry.path: b"".join(bytes(repository.get_chunk(bytes.fromhex(chunk))) for chunk, _ in entry.chunks)
        for entry in entries
    }


def noise(seed: int, size: int = 30_000) -> bytes:
    return random.Random(seed).randbytes(size)


def run(source: Place, target: Place, *references: str, name: str | None = None) -> CopyReport:
    return copy(source.open(readonly=True), target.open(), references, name=name)


def chunks_read(place: Place) -> set[bytes]:
    """The chunks whose payloads were read, whatever joined ranges they were in."""
    repository = place.open()
    names = {object_name(name): name for name in repository.state.packs}
    read = set()
    for name, offset, length in [each for each in place.store.ranges if each[0] in names]:
        for chunk, _, at, stored, *_ in repository.read_footer(repository.state.packs[names[name]]).records.tolist():
            if offset <= at and at + stored <= offset + length:
                read.add(chunk)
    return read


def manifest_ids(*snapshots: Snapshot) -> set[bytes]:
    return {bytes.fromhex(chunk) for snapshot in snapshots for chunk, _ in snapshot.manifest}


def flip(place: Place, chunk: str) -> None:
    """Damage the stored bytes of a chunk, in the newest pack that holds it."""
    location = place.open().locate(bytes.fromhex(chunk))
    name = object_name(location.pack.name)
    data = bytearray(place.store.get(name))
    data[location.offset + location.stored_bytes // 2] ^= 1
    place.store.put(name, [data])


# -- what a copy is --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", ["as they are", "tiny"])
@pytest.mark.parametrize(("from_encrypted", "to_encrypted"), DOMAINS)
def test_a_copy_is_the_same_snapshot(
    from_encrypted: bool, to_encrypted: bool, bounds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bounds == "tiny":
        for name, bound in {"_BATCH_CHUNKS": 3, "_BATCH_ENTRIES": 2, "_BYTES_IN_FLIGHT": 1}.items():
            monkeypatch.setattr(copying, name, bound)
        monkeypatch.setattr(pairing, "_RECENT_PAIRS", 4)
    source, target = Place(from_encrypted), Place(to_encrypted)
    text = b"".join(b"line %d\n" % number for number in range(9000))
    files = {"a": noise(1), "b": noise(1) + noise(2), "empty": b"", "text": text, "z": b"z"}
    first = source.add(files, tags={"a": "1"}, host="far", sources=["/far"], program="p")
    second = source.add({**files, "new": noise(3)}, parent=first.id, unreadable=2)
    report = run(source, target)
    assert (report.copied, report.skipped, report.failed) == ([first.id, second.id], [], [])
    repository = target.open()
    assert content(repository, first.id) == files
    assert content(repository, second.id) == {**files, "new": noise(3)}
    theirs = {name: [getattr(each, name) for each in repository.snapshots()] for name in Snapshot.__struct_fields__}
    ours = {name: [getattr(each, name) for each in (first, second)] for name in Snapshot.__struct_fields__}
    own = {"manifest", "bytes_added", "bytes_stored"}
    assert {name: theirs[name] for name in theirs.keys() - own} == {name: ours[name] for name in ours.keys() - own}
    assert sum(theirs["bytes_added"]) == report.bytes_added
    if not from_encrypted and not to_encrypted:
        assert theirs["manifest"] == ours["manifest"]
    assert report.chunks == len(repository.load_index())
    assert target.is_whole()


@pytest.mark.parametrize(("from_encrypted", "to_encrypted"), DOMAINS)
def test_copying_again_changes_and_reads_nothing(from_encrypted: bool, to_encrypted: bool) -> None:
    source, target = Place(from_encrypted), Place(to_encrypted)
    ids = [source.add({"a": noise(seed)}).id for seed in range(3)]
    run(source, target)
    source.store.ranges.clear()
    recorder = Recorder(target.store)
    report = copy(source.open(readonly=True), Repository.open(recorder, secret=target._secret))
    assert (report.copied, report.skipped, report.bytes_read, report.chunks) == ([], ids, 0, 0)
    assert recorder.trace.mutations == []
    assert chunks_read(source) == set()


@pytest.mark.parametrize("has_parent", [True, False])
@pytest.mark.parametrize(("from_encrypted", "to_encrypted"), DOMAINS)
def test_only_what_is_new_is_read_from_the_source(from_encrypted: bool, to_encrypted: bool, has_parent: bool) -> None:
    source, target = Place(from_encrypted), Place(to_encrypted)
    old = {f"{number:02}": noise(number) for number in range(20)}
    first = source.add(old)
    run(source, target)
    second = source.add({**old, "99": noise(99)}, parent=first.id if has_parent else "")
    [*_, new] = source.open().entries(second)
    source.store.ranges.clear()
    report = run(source, target)
    allowed = manifest_ids(first, second) if from_encrypted or to_encrypted else manifest_ids(second)
    fresh = {bytes.fromhex(chunk) for chunk, _ in new.chunks}
    assert fresh <= chunks_read(source) <= fresh | allowed
    assert report.bytes_added < 50_000
    assert content(target.open(), second.id) == {**old, "99": noise(99)}
    assert target.is_whole()


@pytest.mark.parametrize("to_encrypted", [False, True])
def test_a_chunk_is_read_once_however_often_it_is_needed(to_encrypted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_BATCH_CHUNKS", 2)
    source, target = Place(), Place(to_encrypted, pack_bytes=1 << 20)
    source.add({f"{number}": noise(1, 6000) for number in range(10)})
    assert run(source, target).bytes_read < 10_000


def test_chunks_keep_their_encoded_form() -> None:
    source, target = Place(True), Place(True)
    floats = np.random.default_rng(1).normal(size=500).astype(np.float32).tobytes()
    source.add({"a.f32": floats, "b": b"abc" * 500, "c": noise(1, 1500)})
    run(source, target)

    def forms(place: Place) -> list[tuple[str, int, int, int]]:
        repository = place.open()
        [snapshot] = repository.snapshots()
        found = []
        for entry in repository.entries(snapshot):
            location = repository.locate(bytes.fromhex(entry.chunks[0][0]))
            found.append((entry.path, location.codec, location.stored_bytes, location.plain_bytes))
        return found

    assert forms(source) == forms(target)
    assert [used for _, used, *_ in forms(source)] == [codec.PLANES, codec.ZSTD, codec.RAW]


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_the_compression_of_the_target_is_respected(compression: str) -> None:
    source, target = Place(), Place(compression=compression)
    floats = np.random.default_rng(1).normal(size=500).astype(np.float32).tobytes()
    first = source.add({"a.f32": floats, "b": b"abc" * 500})
    run(source, target)
    repository = target.open()
    assert content(repository, first.id) == {"a.f32": floats, "b": b"abc" * 500}
    refs = [ref for entry in repository.entries(repository.state.snapshots[first.id]) for ref in entry.chunks]
    used = {repository.locate(bytes.fromhex(chunk)).codec for chunk, _ in refs}
    assert used <= ({codec.RAW} if compression == "none" else {codec.RAW, codec.ZSTD})


def test_which_snapshots_are_copied_and_in_which_order() -> None:
    source, target = Place(), Place()
    made = [source.add({"a": noise(seed, 100)}, name) for seed, name in enumerate("xyxy")]
    report = run(source, target, made[3].id[:8], "latest", made[1].id, name="y")
    assert report.copied == [made[1].id, made[3].id]
    assert run(source, target, name="x").copied == [made[0].id, made[2].id]
    assert run(source, target).skipped == [each.id for each in made]


def test_a_repository_is_not_copied_to_itself() -> None:
    place = Place()
    place.add({"a": b"a"})
    with pytest.raises(Refused, match="are the same repository; nothing was copied"):
        run(place, place)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 9), max_size=5), min_size=1, max_size=4),
    st.sampled_from([(False, True, False), (True, False, False), (False, False, True)]),
    st.integers(0, 3),
)
def test_any_history_comes_through_any_chain_of_repositories(
    trees: list[dict[str, int]], encrypted: tuple[bool, ...], first_part: int
) -> None:
    places = [Place(each) for each in encrypted]
    made: dict[str, Files] = {}
    for tree in trees:
        files = {path: noise(seed, seed * 1500) for path, seed in tree.items()}
        snapshot = places[0].add(files, parent=next(reversed(made), ""))
        made[snapshot.id] = files
        if len(made) == first_part:
            run(places[0], places[1])
    run(places[0], places[1])
    run(places[1], places[2])
    repository = places[2].open()
    assert {each.id: content(repository, each.id) for each in repository.snapshots()} == made
    assert list(repository.state.snapshots) == list(made)


# -- damage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("from_encrypted", "to_encrypted"), DOMAINS)
def test_a_damaged_chunk_stops_only_the_snapshots_that_need_it(from_encrypted: bool, to_encrypted: bool) -> None:
    source, target = Place(from_encrypted), Place(to_encrypted)
    shared = {"big": noise(1), "small": b"small"}
    before = source.add(shared)
    hurt = source.add({**shared, "hurt one": noise(2), "hurt two": noise(2)})
    after = source.add({**shared, "other": noise(3)})
    entries = {entry.path: entry for entry in source.open().entries(hurt)}
    flip(source, entries["hurt one"].chunks[7][0])
    report = run(source, target)
    assert report.copied == [before.id, after.id]
    [failed] = report.failed
    assert (failed.snapshot, failed.name, failed.files) == (hurt.id, "run", ["hurt one", "hurt two"])
    assert "damaged" in failed.problem
    repository = target.open()
    assert [each.id for each in repository.snapshots()] == [before.id, after.id]
    assert content(repository, after.id) == {**shared, "other": noise(3)}
    assert target.is_whole()


def test_a_missing_pack_is_damage_and_not_the_end() -> None:
    source, target = Place(pack_bytes=1 << 20), Place()
    lost = source.add({"lost": noise(1)})
    kept = source.add({"kept": noise(2)})
    [name] = {location.pack.name for location in [source.open().locate(chunk) for chunk in manifest_ids(lost)]}
    source.store.delete(object_name(name))
    report = run(source, target)
    assert report.copied == [kept.id]
    assert [each.snapshot for each in report.failed] == [lost.id]


def test_another_sound_copy_in_the_source_is_used() -> None:
    source, target = Place(), Place(True)
    snapshot = source.add({"a": noise(1, 1500)})
    [entry] = source.open().entries(snapshot)
    writer = source.open().writer()
    writer.store_again(EncodedChunk(bytes.fromhex(entry.chunks[0][0]), codec.RAW, 1500, noise(1, 1500)))
    writer.finish()
    flip(source, entry.chunks[0][0])
    assert run(source, target).copied == [snapshot.id]
    assert content(target.open(), snapshot.id) == {"a": noise(1, 1500)}


def test_what_the_target_has_may_be_damaged_in_the_source() -> None:
    source, target = Place(), Place()
    source.add({"a": noise(1)})
    run(source, target)
    second = source.add({"a": noise(1), "b": noise(2)})
    flip(source, next(source.open().entries(second)).chunks[3][0])
    assert run(source, target).copied == [second.id]
    assert content(target.open(), second.id) == {"a": noise(1), "b": noise(2)}
    assert target.is_whole()


@pytest.mark.parametrize("to_encrypted", [False, True])
@pytest.mark.parametrize(
    ("entry", "problem", "files"),
    [
        (Entry("../out", "fifo"), "not a path inside a folder", []),
        (Entry("short", "file", size=3, chunks=[("ID", 3)]), "is 6 bytes long, not 3", ["short"]),
        (Entry("gone", "file", size=3, chunks=[("ab" * 32, 3)]), "is in no readable pack", ["gone"]),
    ],
    ids=lambda given: given.path if isinstance(given, Entry) else "",
)
def test_what_no_backup_writes_is_not_copied(entry: Entry, problem: str, files: list[str], to_encrypted: bool) -> None:
    source, target = Place(), Place(to_encrypted)
    writer = source.open().writer()
    chunk, _ = writer.add(writer.prepare(b"sixsix"))
    chunks = [(chunk if given == "ID" else given, length) for given, length in entry.chunks]
    writer.add_entry(Entry(entry.path, entry.type, size=entry.size, chunks=chunks))
    writer.commit(Snapshot("", "backup", "odd", "2026-01-01T00:00:00.000000Z"))
    report = run(source, target)
    assert (report.copied, [each.files for each in report.failed]) == ([], [files])
    assert problem in report.failed[0].problem
    assert target.open().snapshots() == []


def test_a_snapshot_that_was_forgotten_meanwhile_is_told_apart_from_damage() -> None:
    source, target = Place(), Place()
    snapshot = source.add({"a": noise(1)})
    opened = source.open(readonly=True)
    source.open().log.append(FORGET, lambda state: {"snapshots": [snapshot.id]})
    for name in source.open().state.packs:
        source.store.delete(object_name(name))
    [failed] = copy(opened, target.open()).failed
    assert failed.problem == "it was forgotten in the source meanwhile."


# -- others at work --------------------------------------------------------------------------------------


@pytest.mark.parametrize("to_encrypted", [False, True])
def test_two_copies_at_once_commit_each_snapshot_once(to_encrypted: bool) -> None:
    """The second copy does all of its work in the moment before the first one commits."""
    source, target = Place(), Place(to_encrypted)
    made = [source.add({"a": noise(1), "b": noise(10 + number)}) for number in range(3)]
    others: list[CopyReport] = []

    def before_put(name: str) -> None:
        if name.startswith("log/") and not others:
            others.append(CopyReport("", ""))
            others[0] = copy(source.open(readonly=True), target.open(), [made[0].id, made[1].id])

    target.store.before_put = before_put
    report = run(source, target)
    assert others[0].copied == [made[0].id, made[1].id]
    assert (report.copied, report.skipped) == ([made[2].id], [made[0].id, made[1].id])
    repository = target.open()
    assert list(repository.state.snapshots) == [each.id for each in made]
    for number, snapshot in enumerate(made):
        assert content(repository, snapshot.id) == {"a": noise(1), "b": noise(10 + number)}
    assert report.bytes_read < 3 * 30_000 + 10_000, "what the other one has copied meanwhile is not even read"
    assert sum(pack.chunks for pack in repository.state.packs.values()) == len({*every_chunk(repository)})
    assert target.is_whole()


def every_chunk(repository: Repository) -> Iterator[bytes]:
    for pack in repository.state.packs.values():
        yield from repository.read_footer(pack).records["id"].tolist()


def test_after_a_full_store_the_same_repository_object_goes_on() -> None:
    """What was uploaded and could not be committed must not be relied on by what comes next."""
    source, target = Place(), Place()
    snapshot = source.add({"a": noise(1)})
    repository = target.open()

    def no_room(name: str) -> None:
        if name.startswith("log/"):
            raise StoreFull("there is no room.")

    target.store.before_put = no_room
    with pytest.raises(StoreFull):
        copy(source.open(), repository)
    target.store.before_put = lambda name: None
    assert copy(source.open(), repository).copied == [snapshot.id]
    assert content(target.open(), snapshot.id) == {"a": noise(1)}
    assert target.is_whole()


def sweep_all(place: Place) -> None:
    """What a prune without any grace does to packs that no snapshot needs."""
    repository = place.open()
    packs = list(repository.state.packs.values())
    listed = [{"name": each.name, "bytes": each.bytes, "chunks": each.chunks} for each in packs]
    repository.log.append(CONDEMN, lambda state: {"packs": listed})
    repository.log.append(SWEEP, lambda state: {"packs": [each.name for each in packs]})
    for each in packs:
        place.store.delete(object_name(each.name))


@pytest.mark.parametrize("to_encrypted", [False, True])
@pytest.mark.parametrize("times", [1, 9])
def test_what_a_prune_takes_away_is_copied_again(times: int, to_encrypted: bool) -> None:
    source, target = Place(), Place(to_encrypted)
    snapshot = source.add({"a": noise(1), "b": noise(2)})
    left = [times]

    def store_and_forget() -> None:
        """Packs that no snapshot needs, which the copy will rely on."""
        run(source, target)
        target.open().log.append(FORGET, lambda state: {"snapshots": [snapshot.id]})

    def before_put(name: str) -> None:
        if name.startswith("log/") and left[0]:
            target.store.before_put = lambda name: None
            left[0] -= 1
            sweep_all(target)
            if left[0]:
                store_and_forget()
            target.store.before_put = before_put

    store_and_forget()
    target.store.before_put = before_put
    if times == 1:
        assert run(source, target).copied == [snapshot.id]
        assert content(target.open(), snapshot.id) == {"a": noise(1), "b": noise(2)}
    else:
        with pytest.raises(Busy, match="deleted or quarantined"):
            run(source, target)
        assert target.open().snapshots() == []
    assert target.is_whole()


def cut_off(source: Place, target: Place) -> list[str]:
    """A copy that ended before it could commit anything: the packs that it left."""

    def no_room(name: str) -> None:
        if name.startswith("log/"):
            raise StoreFull("there is no room.")

    target.store.before_put = no_room
    with pytest.raises(StoreFull):
        run(source, target)
    target.store.before_put = lambda name: None
    left = [info.name.rpartition("/")[2] for info in target.store.list("packs/")]
    assert left and not target.open().state.packs
    return left


@pytest.mark.parametrize("to_encrypted", [False, True])
def test_what_was_left_by_a_copy_that_was_cut_off_is_used(to_encrypted: bool) -> None:
    source, target = Place(), Place(to_encrypted)
    snapshot = source.add({"a": noise(1), "b": noise(2)})
    left = cut_off(source, target)
    assert run(source, target).chunks == 0
    assert sorted(target.open().state.packs) == sorted(left)
    assert content(target.open(), snapshot.id) == {"a": noise(1), "b": noise(2)}
    assert target.is_whole()


@pytest.mark.parametrize("from_a_state", [False, True])
def test_what_was_swept_is_no_leftover_though_its_object_is_there(
    from_a_state: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever swept it may delete it at any moment. A state does not tell of it, only the log does."""
    source, target = Place(), Place()
    snapshot = source.add({"a": noise(1)})
    left = cut_off(source, target)
    if from_a_state:
        monkeypatch.setattr(log, "STATE_EVERY", 1)
    repository = target.open()
    repository.log.append(CONDEMN, lambda state: {"packs": [{"name": each, "bytes": 1, "chunks": 0} for each in left]})
    repository.log.append(SWEEP, lambda state: {"packs": left})
    repository.log.save_state()
    assert any(target.store.list("state/")) == from_a_state
    assert run(source, target).chunks > 0
    for each in left:
        target.store.delete(object_name(each))
    assert not set(left) & target.open().state.packs.keys()
    assert content(target.open(), snapshot.id) == {"a": noise(1)}
    assert target.is_whole()


def test_a_leftover_that_is_swept_meanwhile_is_copied_again() -> None:
    source, target = Place(), Place()
    snapshot = source.add({"a": noise(1)})
    left = cut_off(source, target)

    def sweep(name: str) -> None:
        if name.startswith("log/"):
            target.store.before_put = lambda name: None
            other = target.open()
            listed = [{"name": each, "bytes": 1, "chunks": 0} for each in left]
            other.log.append(CONDEMN, lambda state: {"packs": listed})
            other.log.append(SWEEP, lambda state: {"packs": left})
            for each in left:
                target.store.delete(object_name(each))

    target.store.before_put = sweep
    assert run(source, target).copied == [snapshot.id]
    assert content(target.open(), snapshot.id) == {"a": noise(1)}
    assert target.is_whole()


def test_a_leftover_whose_chunks_are_false_is_not_relied_on_in_an_encrypted_repository() -> None:
    """Whoever can write to the store, and has no key, could have put it there."""
    source, target = Place(), Place(encrypted=True)
    snapshot = source.add({"a": noise(1)})
    for each in cut_off(source, target):
        data = bytearray(target.store.get(object_name(each)))
        data[500] ^= 1
        target.store.put(object_name(each), [bytes(data)])
    assert run(source, target).chunks > 0
    assert content(target.open(), snapshot.id) == {"a": noise(1)}
    assert target.is_whole()


# -- pairs of ids ------------------------------------------------------------------------------------------


def test_pairs_are_found_wherever_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairing, "_RECENT_PAIRS", 50)
    clock = ManualClock(seed=5)
    expected = {clock.random_bytes(32): clock.random_bytes(32) for _ in range(2000)}
    alike = bytes(31)
    expected |= {alike + bytes([last]): clock.random_bytes(32) for last in range(20)}
    pairs = Pairs()
    for old, new in expected.items():
        pairs.put(old, new)
        pairs.put(old, b"something else that is ignored..")
    assert len(pairs) == len(expected)
    assert {old: pairs[old] for old in expected} == expected
    assert pairs.get(alike + b"\xff") is None
    assert pairs.get(clock.random_bytes(32)) is None
