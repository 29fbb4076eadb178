"""Checkpoints kept as sums of a block and differences: exact, pruned, copied and checked like anything else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, pairwise
from typing import Literal

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast import records, rescue
from outlast.clock import ManualClock
from outlast.errors import Busy, Corrupt, Refused
from outlast.events import ListSink
from outlast.records import Chunking, Entry, Snapshot
from outlast.repo import copy as copying
from outlast.repo import deltas, difference, forget, form, formats, prune, seal, sums
from outlast.repo.check import check, open_and_check
from outlast.repo.content import Content, RecentChunks
from outlast.repo.copy import copy
from outlast.repo.manifest import entry_problem
from outlast.repo.pack import object_name
from outlast.repo.prune_plan import Policy
from outlast.repo.repository import Repository, chunk_offsets
from outlast.repo.stats import stats
from outlast.repo.write import Writer
from outlast.store.memory import MemoryStore

BLOCK = 16 << 10
SMALL = Chunking(block_bytes=BLOCK, min_bytes=1024, avg_bytes=4096, max_bytes=16384)
STEPS = 12
Bytes = bytes | memoryview
SEEDS = count(5)


@pytest.fixture(autouse=True, scope="module")
def cheap_passphrases() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seal, "ARGON2_MEMORY_KIB", 32)
        patch.setattr(seal, "ARGON2_ITERATIONS", 1)
        yield


class Place:
    def __init__(self, encrypted: bool = False, compression: str = "auto", old: bool = False) -> None:
        self.store = MemoryStore()
        self.secret = (lambda: b"secret of %d" % id(self)) if encrypted else None
        self.clock = ManualClock(seed=next(SEEDS))
        with pytest.MonkeyPatch.context() as patch:
            if old:
                patch.setattr(form, "FEATURES", [])
            Repository.create(
                self.store, secret=self.secret, chunking=SMALL, compression=compression, pack_bytes=100_000,
                clock=self.clock,
            )  # type: ignore[arg-type]  # fmt: skip

    def open(self) -> Repository:
        return Repository.open(self.store, secret=self.secret, clock=self.clock)

    @property
    def stored_bytes(self) -> int:
        return sum(info.size_bytes for info in self.store.list("packs/"))


def moved(values: np.ndarray, random: np.random.Generator, step: int) -> np.ndarray:
    """The next state: dense small steps, and every bit pattern that float arithmetic would lose."""
    with np.errstate(invalid="ignore"):
        after = values * np.float32(1 - 1e-4)
    after += random.normal(size=values.shape).astype(np.float32) * np.float32(1e-5)
    bits = after.view(np.uint32)
    odd = random.integers(0, len(values), 8)
    bits[odd] = [0x7FC00001 + step, 0xFFA00000, 0x80000000, 0, 1, 0x7F800000, 0xFF800000, 0xFFFFFFFF]
    return after


def series(steps: int = STEPS, size: int = 50_000) -> list[bytes]:
    """Files of three tensors: dense changes; few elements changed; never changed."""
    random = np.random.default_rng(3)
    dense = random.normal(size=size).astype(np.float32) * np.float32(0.02)
    sparse, frozen = dense[::-1].copy(), dense[: size // 2] + 1
    found = []
    for step in range(steps):
        tensors = [("dense", dense), ("sparse", sparse), ("frozen", frozen)]
        header = formats.safetensors_header([(name, "F32", each.shape, each.nbytes) for name, each in tensors])
        found.append(header + b"".join(each.tobytes() for _, each in tensors))
        dense, sparse = moved(dense, random, step), sparse.copy()
        sparse[random.integers(0, size, 50)] += 1
    return found


SERIES = series()


def save(repository: Repository, content: bytes, *, delta: bool = True, name: str = "run") -> Snapshot:
    """As a checkpoint is saved: built on the one before, where that is wanted."""
    mine = [each for each in repository.snapshots() if each.name == name]
    old = deltas.before(repository, mine[-1]).get("model.safetensors", {}) if mine and delta else {}
    return written(repository, {"model.safetensors": (content, old)}, name=name)


def written(
    repository: Repository,
    files: dict[str, tuple[bytes, dict[int, deltas.Block]]],
    *,
    name: str = "run",
    kind: Literal["checkpoint", "backup"] = "checkpoint",
    parent: str = "",
) -> Snapshot:
    """A snapshot of files, each with what it may be built on."""
    writer = repository.writer()
    for path, (content, old) in sorted(files.items()):
        spans = formats.spans(lambda at, length, content=content: content[at : at + length], len(content)) or []
        starts = [at for span in spans for at in range(span.offset, span.offset + span.length, BLOCK)]
        chunks, kept = [], {}
        for start, end in pairwise([0, *starts, len(content)]):
            each = deltas.prepare(writer, content[start:end], 4 if start else 0, old.get(start))
            writer.add(each.prepared)
            chunks.append((each.id.hex(), end - start))
            if each.parts:
                kept[each.id.hex()] = each.parts
        entry = Entry(path, "file", mode=0o644, size=len(content))
        writer.add_entry(deltas.with_sums(entry, chunks, kept))
    size = sum(len(content) for content, _ in files.values())
    time = records.time_text(1_750_000_000_000_000_000 + len(repository.snapshots()) * 10**9)
    return writer.commit(Snapshot("", kind, name, time, bytes=size, files=len(files), parent=parent))


def saved(place: Place, contents: list[bytes] = SERIES, *, delta: bool = True) -> list[Snapshot]:
    repository = place.open()
    return [save(repository, content, delta=delta) for content in contents]


def entry_of(repository: Repository, snapshot: Snapshot) -> Entry:
    [entry] = repository.entries(snapshot)
    return entry


def one_by_one(repository: Repository, entry: Entry) -> bytes:
    return Content(entry, RecentChunks(repository).get).read(0, entry.size)


def at_once(repository: Repository, entry: Entry) -> bytes:
    found = bytearray(entry.size)
    places: dict[bytes, list[int]] = {}
    for offset, (chunk, _) in chunk_offsets(entry):
        places.setdefault(bytes.fromhex(chunk), []).append(offset)

    def deliver(chunk: bytes, plain: Bytes) -> None:
        for offset in places[chunk]:
            found[offset : offset + len(plain)] = plain

    repository.fetch(list(places), deliver)
    return bytes(found)


READERS = [one_by_one, at_once]


def assert_all_there(place: Place, contents: list[bytes], read: Callable[[Repository, Entry], bytes] = at_once) -> None:
    repository = place.open()
    snapshots = repository.snapshots()
    assert len(snapshots) == len(contents)
    for snapshot, content in zip(snapshots, contents, strict=True):
        assert read(repository, entry_of(repository, snapshot)) == content


# -- the arithmetic ------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([2, 4, 8]), st.integers(0, 70_000), st.integers(0, 2**32), st.sampled_from(["any", "close", "same"])
)
def test_a_difference_is_undone_for_every_bit_pattern(width: int, size: int, seed: int, how: str) -> None:
    random = np.random.default_rng(seed)
    old = random.integers(0, 256, size * width, np.uint8)
    new = random.integers(0, 256, size * width, np.uint8) if how == "any" else old.copy()
    if how == "close" and size:
        new.view(f"<u{width}")[:] += random.integers(0, 5, size).astype(f"<u{width}") - np.array(2, f"<u{width}")
    folded = difference.difference(new.tobytes(), old, width)
    total = old.copy()
    difference.add(total, folded.tobytes(), width)
    assert np.array_equal(total, new)
    assert rescue.add(old.tobytes(), folded.tobytes(), width) == new.tobytes()
    if how == "close" and size:
        assert folded.view(f"<u{width}").max() <= 4  # of either sign


# -- reading back --------------------------------------------------------------------------------


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("compression", ["auto", "none", "zstd"])
def test_a_series_comes_back_bit_for_bit(
    compression: str, encrypted: bool, read: Callable[[Repository, Entry], bytes]
) -> None:
    place = Place(encrypted, compression)
    snapshots = saved(place)
    assert_all_there(place, SERIES, read)
    found = [entry_of(place.open(), each).sums for each in snapshots]
    assert not found[0]
    lengths = {len(parts) for each in found for _, _, parts in each}
    assert lengths == set(range(2, 2 + deltas.DIFFERENCES_MAX[4]))  # none is longer, and new blocks begin anew
    report = check(place.open(), data="all")
    assert report.ok, report.damaged


def test_a_series_is_smaller() -> None:
    whole, small = Place(), Place()
    saved(whole, delta=False)
    saved(small)
    assert small.stored_bytes < 0.7 * whole.stored_bytes
    assert small.stored_bytes < 0.5 * sum(map(len, SERIES))


def test_what_did_not_change_is_what_it_was() -> None:
    """An unchanged block is taken over with its parts, and one that was whole before is used again whole."""
    place = Place()
    contents = [SERIES[0], SERIES[1], SERIES[1], SERIES[0]]
    _, second, third, fourth = saved(place, contents)
    repository = place.open()
    assert entry_of(repository, second).sums == entry_of(repository, third).sums != []
    assert not entry_of(repository, fourth).sums
    assert third.bytes_added < 3000
    assert fourth.bytes_added < 3000
    assert_all_there(place, contents)


def test_an_old_repository_gets_no_sums() -> None:
    place = Place(old=True)
    assert place.open().format.features == []
    snapshots = saved(place)
    assert not any(entry_of(place.open(), each).sums for each in snapshots)
    assert_all_there(place, SERIES)


def test_an_older_program_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place()
    monkeypatch.setattr(form, "FEATURES", [])
    with pytest.raises(Refused, match="sums"):
        place.open()


def test_nothing_is_built_on_a_damaged_block() -> None:
    place = Place()
    saved(place, SERIES[:1])
    repository = place.open()
    for info in list(place.store.list("packs/")):
        data = bytearray(place.store.get(info.name))
        data[5000:-9000] = bytes(len(data) - 14_000)
        place.store.put(info.name, [bytes(data)])
    second = save(repository, SERIES[1])
    assert at_once(repository, entry_of(repository, second)) == SERIES[1]


# -- prune, check --------------------------------------------------------------------------------

PRUNE = Policy(max_unused=0.0, max_delete=1.0, grace_seconds=0.0)


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_prune_keeps_what_later_ones_need_and_frees_the_rest(encrypted: bool) -> None:
    place = Place(encrypted)
    snapshots = saved(place)
    for forgotten, first in (([1, 0], 2), (range(2, 6), 6), (range(6, 11), 11)):
        repository = place.open()
        before = place.stored_bytes
        forget.execute(repository, forget.plan(repository, ids=[snapshots[n].id for n in forgotten]))
        for _ in range(2):
            prune.prune(place.open(), PRUNE)
        assert place.stored_bytes < before or first == 2
        assert_all_there(place, SERIES[first:])
        assert open_and_check(place.store, secret=place.secret, data="all").ok
    entry = entry_of(place.open(), snapshots[-1])
    needed = {chunk for chunk, _ in [*entry.stored, *snapshots[-1].manifest]}
    held = {bytes(row["id"]).hex() for ref in place.open().state.packs.values()
            for row in place.open().read_footer(ref).records}  # fmt: skip
    assert held == needed


@pytest.mark.parametrize("grace_seconds", [0.0, 1e6])
def test_a_prune_in_the_middle_of_a_save(grace_seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is built on is kept, or nothing is committed."""
    place = Place()
    [first] = saved(place, SERIES[:1])
    commit = Writer.commit

    def prune_first(writer: Writer, snapshot: Snapshot) -> Snapshot:
        monkeypatch.undo()
        other = place.open()
        forget.execute(other, forget.plan(other, ids=[first.id]), allow_empty=True)
        policy = msgspec.structs.replace(PRUNE, grace_seconds=grace_seconds)
        assert prune.prune(other, policy).condemned
        return commit(writer, snapshot)

    repository = place.open()
    monkeypatch.setattr(Writer, "commit", prune_first)
    if grace_seconds:
        assert entry_of(repository, save(repository, SERIES[1])).sums
        assert_all_there(place, SERIES[1:2])
        assert open_and_check(place.store, data="all").ok
    else:
        with pytest.raises(Busy):
            save(repository, SERIES[1])
        assert not place.open().snapshots()


def test_damage_to_a_part_is_named_for_all_that_need_it() -> None:
    place = Place()
    snapshots = saved(place, SERIES[:4])
    repository = place.open()
    entries = [entry_of(repository, each) for each in snapshots]
    for broken in (entries[0].chunks[1][0], entries[1].sums[0][2][1], entries[3].sums[0][2][-1]):
        location = repository.locate(bytes.fromhex(broken))
        name = object_name(location.pack.name)
        whole = place.store.get(name)
        data = bytearray(whole)
        data[location.offset + 10] ^= 1
        place.store.put(name, [bytes(data)])
        report = open_and_check(place.store, data="all")
        damaged = {each.object: each for each in report.damaged}
        needing = [each.id for each, entry in zip(snapshots, entries, strict=True)
                   if broken in {chunk for chunk, _ in entry.stored}]  # fmt: skip
        assert damaged[name].snapshots == needing
        assert damaged[name].files == ["model.safetensors"]
        for snapshot, entry in zip(snapshots, entries, strict=True):
            for read in READERS:
                fresh = place.open()
                entry_of(fresh, snapshot)
                if snapshot.id in needing:
                    with pytest.raises(Corrupt):
                        read(fresh, entry)
                else:
                    assert read(fresh, entry) == SERIES[snapshots.index(snapshot)]
        place.store.put(name, [whole])


def test_a_wrong_sum_is_found_out() -> None:
    """A manifest that names other parts, of the right length, gives nothing."""
    place = Place()
    snapshots = saved(place, SERIES[:3])
    repository = place.open()
    right = entry_of(repository, snapshots[2])
    number, width, parts = right.sums[0]
    for wrong in (
        (number, width, parts[:-1]),
        (number, width, [*parts, parts[-1]]),
        (number, 8, parts),
        (number, width, [right.sums[1][2][0], *parts[1:]]),
        (number, width, [right.chunks[0][0], *parts[1:]]),
        (number, width, [right.chunks[number][0], *parts[1:]]),
        (number, 3, parts),
        (number, 0, parts),
        (number, 300, parts),
        (number, width, []),
    ):
        entry = msgspec.structs.replace(right, sums=[wrong, *right.sums[1:]])
        for read in READERS:
            fresh = place.open()
            fresh.sums.learn(entry)
            with pytest.raises(Corrupt):
                read(fresh, entry)


def test_manifests_name_sums_that_can_exist() -> None:
    chunk, other = "ab" * 32, "cd" * 32
    good = Entry("f", "file", size=24, chunks=[(chunk, 16), (other, 8)], sums=[(0, 4, [other, chunk])])
    assert not entry_problem(good)
    for bad in (
        [(2, 4, [other, chunk])],
        [(-1, 4, [other, chunk])],
        [(0, 3, [other, chunk])],
        [(0, 1, [other, chunk])],
        [(0, 4, [other])],
        [(0, 4, [other] * 9)],
        [(0, 4, [other, "zz" * 32])],
        [(0, 4, [other, "ab"])],
        [(0, 4, [other, chunk]), (0, 4, [other, chunk])],
        [(1, 4, [other, chunk]), (0, 4, [other, chunk])],
    ):
        assert entry_problem(msgspec.structs.replace(good, sums=bad))
    odd = msgspec.structs.replace(good, size=25, chunks=[(chunk, 17), (other, 8)])
    assert entry_problem(odd)


def test_stats_count_what_is_stored() -> None:
    place = Place()
    saved(place)
    found = stats(place.open())
    assert not found.problems
    assert found.bytes == sum(map(len, SERIES))
    assert found.bytes_stored < place.stored_bytes < 0.5 * found.bytes


# -- copies --------------------------------------------------------------------------------------


@pytest.fixture(params=["", "tiny"])
def bounds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        for name, bound in {"_BATCH_CHUNKS": 3, "_BATCH_ENTRIES": 2, "_BYTES_IN_FLIGHT": 1}.items():
            monkeypatch.setattr(copying, name, bound)
        monkeypatch.setattr(sums, "_BYTES_AT_ONCE", 1)


@pytest.mark.usefixtures("bounds")
@pytest.mark.parametrize("to_encrypted", [False, True])
@pytest.mark.parametrize("from_encrypted", [False, True])
@pytest.mark.parametrize("delta", [False, True])
def test_sums_are_copied_as_they_are(from_encrypted: bool, to_encrypted: bool, delta: bool) -> None:
    source, target = Place(from_encrypted), Place(to_encrypted, "none")
    saved(source)
    report = copy(source.open(), target.open(), delta=delta)
    assert not report.failed
    assert_all_there(target, SERIES)
    assert open_and_check(target.store, secret=target.secret, data="all").ok
    theirs, ours = source.open(), target.open()
    for one, other in zip(theirs.snapshots(), ours.snapshots(), strict=True):
        assert [len(each[2]) for each in entry_of(theirs, one).sums] == [
            len(each[2]) for each in entry_of(ours, other).sums
        ]
    assert target.stored_bytes < 1.7 * source.stored_bytes  # whole blocks may be raw there, differences are not
    again = copy(source.open(), target.open(), delta=delta)
    assert (again.copied, again.chunks) == ([], 0)


@pytest.mark.usefixtures("bounds")
@pytest.mark.parametrize("encrypted", [False, True])
def test_a_copy_to_an_old_repository_is_whole(encrypted: bool) -> None:
    source, target = Place(), Place(encrypted, old=True)
    saved(source)
    sink = ListSink()
    ours = Repository.open(target.store, secret=target.secret, sink=sink)
    assert not copy(source.open(), ours, delta=encrypted).failed
    assert_all_there(target, SERIES)
    assert not any(entry_of(target.open(), each).sums for each in target.open().snapshots())
    assert ("copy.no_deltas" in [each.kind for each in sink.events]) == encrypted


@pytest.mark.usefixtures("bounds")
@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("at_a_time", [1, STEPS])
def test_a_copy_makes_sums(at_a_time: int, encrypted: bool) -> None:
    source, target, plain = Place(compression="none"), Place(encrypted), Place(encrypted)
    made = saved(source, delta=False)
    for first in range(0, STEPS, at_a_time):
        ids = [each.id for each in made[first : first + at_a_time]]
        assert not copy(source.open(), target.open(), ids, delta=True).failed
    assert not copy(source.open(), plain.open()).failed
    assert_all_there(target, SERIES)
    assert open_and_check(target.store, secret=target.secret, data="all").ok
    assert target.stored_bytes < 0.5 * sum(map(len, SERIES))
    assert target.stored_bytes < 0.6 * plain.stored_bytes
    assert [each.id for each in target.open().snapshots()] == [each.id for each in made]


@pytest.mark.usefixtures("bounds")
@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("names", ["ab", "ba"])
def test_a_copy_stores_what_other_sums_are_built_on(names: str, encrypted: bool) -> None:
    """What is whole in one file and a part of a sum in another stays whole, whichever of them comes first."""
    whole, summed = names
    source, target = Place(), Place(encrypted)
    repository = source.open()
    written(repository, {whole: (SERIES[1], {})})
    old = written(repository, {whole: (SERIES[0], {})}, name="other")
    blocks = deltas.before(repository, old)[whole]
    written(repository, {whole: (SERIES[0], {}), summed: (SERIES[2], blocks)})
    assert not copy(source.open(), target.open(), name="run", delta=True).failed
    assert open_and_check(target.store, secret=target.secret, data="all").ok
    ours = target.open()
    last = {entry.path: entry for entry in ours.entries(ours.snapshots()[-1])}
    assert last[summed].sums
    fresh = target.open()
    assert at_once(fresh, {each.path: each for each in fresh.entries(fresh.snapshots()[-1])}[summed]) == SERIES[2]
    assert at_once(ours, last[whole]) == SERIES[0]


def behind_a_longer_header(content: bytes, more_bytes: int) -> bytes:
    """The same tensors further back."""
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length] + b" " * more_bytes
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


@pytest.mark.usefixtures("bounds")
@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("more_bytes", [0, 80])
def test_a_copy_makes_sums_of_backed_up_files_until_a_full_backup(more_bytes: int, encrypted: bool) -> None:
    source, target = Place(compression="none"), Place(encrypted)
    repository, parent = source.open(), ""
    contents = [behind_a_longer_header(SERIES[turn], turn * more_bytes) for turn in range(5)]
    for turn, content in enumerate(contents):
        files = {"a.json": (b"{}", {}), "model.safetensors": (content, {}), "z.txt": (b"%d" % turn, {})}
        if turn % 2:
            files["b.txt"] = (b"new", {})
        full = turn == 3
        parent = written(repository, files, kind="backup", parent="" if full else parent).id
    assert not copy(source.open(), target.open(), delta=True).failed
    ours = target.open()
    models = [each for snapshot in ours.snapshots() for each in ours.entries(snapshot) if each.path.startswith("model")]
    assert [max((len(parts) for _, _, parts in each.sums), default=0) for each in models] == [0, 2, 3, 0, 2]
    assert [at_once(ours, each) for each in models] == contents
    assert open_and_check(target.store, secret=target.secret, data="all").ok


def test_a_copy_names_what_is_lost_with_a_part() -> None:
    source = Place()
    snapshots = saved(source, SERIES[:3])
    repository = source.open()
    entry = entry_of(repository, snapshots[1])
    location = repository.locate(bytes.fromhex(entry.sums[0][2][1]))
    data = bytearray(source.store.get(object_name(location.pack.name)))
    data[location.offset + 10] ^= 1
    source.store.put(object_name(location.pack.name), [bytes(data)])
    for old in (False, True):
        for encrypted in (False, True):
            target = Place(encrypted, old=old)
            report = copy(source.open(), target.open())
            assert [each.snapshot for each in report.failed] == [each.id for each in snapshots[1:]]
            assert report.failed[0].files == ["model.safetensors"]
            assert_all_there(target, SERIES[:1])
