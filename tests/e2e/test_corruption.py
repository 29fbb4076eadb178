"""Whatever happens to an object of a repository: `check` names it, and reading never gives wrong data.

Every kind of object is flipped, cut short, zeroed, deleted and swapped, in a plain and in an encrypted
repository. What isn't affected must still come back bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
from damaging import (
    PASSPHRASE,
    World,
    assert_fetching_is_right,
    assert_reading_is_right,
    checked,
    fill,
    flip,
    named_objects,
    read_file,
    store_of,
)

from outlast.backup.create import create
from outlast.clock import ManualClock
from outlast.errors import Corrupt, NotFound, OutlastError, Unavailable, WrongKey
from outlast.events import ListSink, Progress
from outlast.records import Entry, Snapshot
from outlast.repo import log, pack, seal, write
from outlast.repo.check import check, open_and_check
from outlast.repo.repository import Repository
from outlast.store.base import ObjectInfo
from outlast.store.memory import MemoryStore


@pytest.fixture(scope="module", params=["plain", "encrypted"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    encrypted = request.param == "encrypted"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seal, "ARGON2_MEMORY_KIB", 64)
        patch.setattr(seal, "ARGON2_ITERATIONS", 1)
        patch.setattr(log, "STATE_EVERY", 4)
        patch.setattr(write, "SEGMENT_PACKS", 4)
        store, foreign = MemoryStore(), MemoryStore()
        fill(store, tmp_path_factory.mktemp("folder"), encrypted=encrypted, seed=1)
        fill(foreign, tmp_path_factory.mktemp("foreign"), encrypted=encrypted, seed=2)
    objects = {info.name: store.get(info.name) for info in store.list("")}
    repository = Repository.open(store, secret=lambda: PASSPHRASE)
    contents: dict[str, dict[str, bytes]] = {}
    chunks: dict[bytes, bytes] = {}
    for snapshot in repository.snapshots():
        files = [entry for entry in repository.entries(snapshot) if entry.type == "file"]
        contents[snapshot.id] = {entry.path: read_file(repository, entry) for entry in files}
        for chunk in {bytes.fromhex(ref[0]) for entry in files for ref in entry.chunks}:
            chunks[chunk] = bytes(repository.get_chunk(chunk))
    others = {info.name: foreign.get(info.name) for info in foreign.list("")}
    made = World(objects, encrypted, contents, chunks, others)
    assert len(contents) == 6
    assert all(made.names(prefix) for prefix in ("packs/", "log/", "state/", "index/"))
    yield made


CHANGES: dict[str, Callable[[bytes], bytes | None]] = {
    "flip first": flip(0),
    "flip early": flip(0.1),
    "flip middle": flip(0.5),
    "flip late": flip(0.9),
    "flip last": flip(1),
    "half": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "one byte more": lambda data: data + b"\0",
    "empty": lambda data: b"",
    "zero": lambda data: bytes(len(data)),
    "delete": lambda data: None,
}


def changed(world: World, name: str, change: str) -> MemoryStore:
    store = world.copy()
    data = CHANGES[change](world.objects[name])
    if data is None:
        store.delete(name)
    else:
        store.put(name, [data])
    return store


def test_a_sound_repository_is_ok(world: World) -> None:
    store = world.copy()
    report = checked(world, store)
    assert report.ok
    assert report.damaged == []
    assert report.snapshots == 6
    assert report.packs == len(world.names("packs/"))
    assert report.bytes_read == sum(len(world.objects[name]) for name in world.names("packs/"))
    assert report.chunks >= len(world.chunks)
    assert assert_reading_is_right(world, store, report) == set()


@pytest.mark.parametrize("change", CHANGES)
def test_a_pack(world: World, change: str) -> None:
    for name in (world.pack_with_padding(), world.pack_of_manifest(next(iter(world.contents)))):
        store = changed(world, name, change)
        report = checked(world, store)
        assert not report.ok
        assert name in named_objects(report), report
        assert_reading_is_right(world, store, report)


@pytest.mark.parametrize("region", ["header", "payload", "padding", "table", "trailer", "spare"])
def test_a_bit_in_each_part_of_a_pack(world: World, region: str) -> None:
    name = world.pack_with_padding()
    footer, size = world.footer(name)
    if region == "padding" and world.encrypted:
        assert pack.gaps(footer, size) == []
        return
    table = size - pack.TRAILER.size - len(footer.records) * pack.RECORD.itemsize
    first = footer.records[0]
    positions = {
        "header": [0, 9, 20, 63],
        "payload": [int(first["offset"]), int(first["offset"]) + int(first["stored"]) - 1, table - 1],
        "padding": [offset for run in pack.gaps(footer, size)[:1] for offset in (run[0], sum(run) - 1)],
        "table": [table, table + 40, table + 70, size - pack.TRAILER.size - 1],
        "trailer": [size - 128, size - 60, size - 30, size - 12],
        "spare": [size - 8, size - 1],
    }[region]
    assert positions
    for position in positions:
        store = world.copy()
        data = bytearray(world.objects[name])
        data[position] ^= 1
        store.put(name, [bytes(data)])
        report = checked(world, store)
        assert named_objects(report) == {name}
        [damage] = report.damaged
        failed = assert_reading_is_right(world, store, report)
        if region in ("header", "padding"):
            assert (damage.snapshots, damage.files, failed) == ([], [], set())
        if region == "payload":
            assert damage.snapshots
            assert set(damage.files) == failed, "what is called affected is, and nothing else"


def test_without_reading_data_a_flip_in_a_payload_is_not_seen_but_never_read_as_right(world: World) -> None:
    name = world.pack_with_padding()
    offset = int(world.footer(name)[0].records["offset"][0])
    store = world.copy()
    data = bytearray(world.objects[name])
    data[offset] ^= 1
    store.put(name, [bytes(data)])
    quick = open_and_check(store, secret=world.secret, data="none")
    assert quick.ok
    assert quick.bytes_read < checked(world, store).bytes_read / 4
    assert_reading_is_right(world, store, checked(world, store))


# A log without its last entry is simply shorter: that commit never happened.
@pytest.mark.parametrize(
    ("seq", "change"), [(seq, change) for seq in (1, 3, 6) for change in CHANGES if (seq, change) != (6, "delete")]
)
def test_a_log_entry(world: World, seq: int, change: str) -> None:
    name = log.entry_name(seq)
    store = changed(world, name, change)
    report = checked(world, store)
    assert name in named_objects(report)
    assert_reading_is_right(world, store, report, lost=1)
    # The state saved at entry 4 knows what earlier entries said, and packs describe themselves.
    assert not any(damage.snapshots for damage in report.damaged)


def test_a_log_entry_before_the_state_is_lost_and_nothing_with_it(world: World) -> None:
    store = changed(world, log.entry_name(2), "zero")
    report = checked(world, store)
    assert report.snapshots == 6
    assert assert_reading_is_right(world, store, report, lost=0) == set()


def test_without_any_state_one_lost_entry_costs_one_snapshot(world: World) -> None:
    store = changed(world, log.entry_name(2), "flip middle")
    for name in world.names("state/"):
        store.delete(name)
    sink = ListSink()
    with pytest.raises(Corrupt, match=r"log entry 2|log/0*2 "):
        Repository.open(store, secret=world.secret)
    repository = Repository.open_damaged(store, secret=world.secret, sink=sink)
    assert len(repository.snapshots()) == 5
    assert [event.fields["object"] for event in sink.events] == [log.entry_name(2)]
    assert assert_reading_is_right(world, store, checked(world, store), lost=1) == set()


@pytest.mark.parametrize("seq", [2, 6])
def test_nothing_is_committed_to_a_log_that_is_damaged(world: World, tmp_path: Path, seq: int) -> None:
    store = changed(world, log.entry_name(seq), "flip middle")
    for name in world.names("state/"):
        store.delete(name)
    before = {info.name for info in store.list("log/")}
    (tmp_path / "file").write_bytes(b"x" * 1000)
    repository = Repository.open_damaged(store, secret=world.secret)
    with pytest.raises(Corrupt, match="log"):
        create(repository, [str(tmp_path)], name="later")
    assert {info.name for info in store.list("log/")} == before


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["index/", "state/"])
def test_derived_objects_cost_nothing(world: World, kind: str, change: str) -> None:
    name = world.names(kind)[-1]
    store = changed(world, name, change)
    report = checked(world, store)
    if change == "delete":
        assert report.ok
    else:
        assert named_objects(report) == {name}
        assert "costs nothing" in report.damaged[0].problem
        assert report.damaged[0].snapshots == []
        store.delete(name)
        assert checked(world, store).ok
        store = changed(world, name, change)
    assert assert_reading_is_right(world, store, report) == set()


def test_an_index_segment_that_lies_is_named(world: World) -> None:
    """Its own hash is right, but the packs say otherwise."""
    if world.encrypted:
        return  # nobody without the key can make one
    [name] = world.names("index/")[:1]
    data = bytearray(world.objects[name])
    data[-20] ^= 1
    store = world.copy()
    store.delete(name)
    lying = f"index/{seal.digest(bytes(data)).hex()}"
    store.put(lying, [bytes(data)])
    assert named_objects(checked(world, store)) == {lying}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["format", "keys/"])
def test_format_and_key_are_named_when_opening(world: World, kind: str, change: str) -> None:
    if kind == "keys/" and not world.encrypted:
        return
    name = world.names(kind)[0]
    store = changed(world, name, change)
    with pytest.raises(Corrupt) as caught:
        checked(world, store)
    assert kind in caught.value.message
    with pytest.raises(Corrupt):
        Repository.open(store, secret=world.secret)
    with pytest.raises(OutlastError):
        Repository.create(store)


def test_a_damaged_key_beside_a_good_one_is_named_and_costs_nothing(world: World) -> None:
    if not world.encrypted:
        return
    store = world.copy()
    store.put("keys/" + "0" * 32, [b"rubbish"])
    report = checked(world, store)
    assert named_objects(report) == {"keys/" + "0" * 32}
    assert assert_reading_is_right(world, store, report) == set()


def test_a_wrong_passphrase_is_not_called_damage(world: World) -> None:
    if world.encrypted:
        with pytest.raises(WrongKey):
            open_and_check(world.copy(), secret=lambda: b"wrong")
        with pytest.raises(WrongKey):
            open_and_check(world.copy())


@pytest.mark.parametrize("kind", ["packs/", "log/", "index/"])
def test_swapped_objects_are_named(world: World, kind: str) -> None:
    first, second = world.names(kind)[0], world.names(kind)[-1]
    assert first != second
    store = world.copy()
    store.put(first, [world.objects[second]])
    store.put(second, [world.objects[first]])
    report = checked(world, store)
    assert named_objects(report) >= {first, second}
    assert_reading_is_right(world, store, report, lost=2)


@pytest.mark.parametrize("kind", ["format", "log/", "state/"])
def test_objects_of_another_repository_are_named(world: World, kind: str) -> None:
    name = world.names(kind)[0]
    store = world.copy()
    store.put(name, [world.foreign[name]])
    if kind == "format" and world.encrypted:
        with pytest.raises(WrongKey):
            checked(world, store)
        return
    report = checked(world, store)
    assert name in named_objects(report)
    assert_reading_is_right(world, store, report, lost=1)


def test_a_pack_that_nobody_names_is_no_damage(world: World) -> None:
    store = world.copy()
    name = next(name for name in world.foreign if name.startswith("packs/"))
    store.put(name, [world.foreign[name][:100]])
    report = checked(world, store)
    assert report.ok
    assert report.packs == len(world.names("packs/"))
    assert (report.unreferenced_packs, report.unreferenced_bytes) == (1, 100)


def test_packs_without_any_log_are_counted(world: World) -> None:
    """As after a first backup that was killed, which is no damage, or after the loss of all of log/."""
    packs = world.names("packs/")
    store = store_of({name: data for name, data in world.objects.items() if name.startswith(("f", "k", "packs/"))})
    report = checked(world, store)
    assert (report.ok, report.snapshots, report.unreferenced_packs) == (True, 0, len(packs))


def test_a_second_copy_of_a_chunk_is_used_and_counted(world: World, tmp_path: Path) -> None:
    """A pack goes missing, the next backup stores its chunks again: everything is readable once more."""
    name = world.pack_with_padding()
    lost = {row["id"].tobytes() for row in world.footer(name)[0].records} & world.chunks.keys()
    store = changed(world, name, "delete")
    repository = Repository.open(store, secret=world.secret)
    writer = repository.writer()
    for chunk in sorted(lost):
        writer.add(writer.prepare(world.chunks[chunk]))
    writer.commit(msgspec.structs.replace(repository.snapshots()[0], id=""))
    for mode in ("all", "none"):
        report = open_and_check(store, secret=world.secret, data=mode)
        assert named_objects(report) == {name}
        assert report.damaged[0].files == []
    again = Repository.open(store, secret=world.secret)
    for chunk in lost:
        assert bytes(again.get_chunk(chunk)) == world.chunks[chunk]
    assert_fetching_is_right(world, again)


def test_many_files_affected_are_counted_and_not_all_listed() -> None:
    store = MemoryStore()
    repository = Repository.create(store)
    writer = repository.writer()
    shared = writer.add(writer.prepare(b"shared" * 100))
    for number in range(250):
        writer.add_entry(Entry(path=f"file{number:03d}", type="file", size=600, chunks=[shared]))
    snapshot = writer.commit(Snapshot(id="", kind="backup", name="n", time=""))
    [info] = store.list("packs/")
    data = bytearray(store.get(info.name))
    data[64] ^= 1
    store.put(info.name, [bytes(data)])
    [damage] = check(repository, data="all").damaged
    assert damage.snapshots == [snapshot.id]
    assert len(damage.files) == 100
    assert "250 files" in damage.problem


class _HugeObject(MemoryStore):
    """One object is listed with a size that no memory has."""

    huge = ""

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        for info in super().list(prefix, after):
            yield msgspec.structs.replace(info, size_bytes=1 << 50) if info.name == self.huge else info

    def get(self, name: str) -> bytes:
        if name == self.huge:
            raise MemoryError(name)
        return super().get(name)


@pytest.mark.parametrize("kind", ["log/", "state/", "index/"])
def test_an_object_of_impossible_size_is_named_and_not_read(world: World, kind: str) -> None:
    store = _HugeObject()
    for name, data in world.objects.items():
        store.put(name, [data])
    store.huge = world.names(kind)[0]
    report = checked(world, store)
    assert named_objects(report) == {store.huge}
    assert "too large" in report.damaged[0].problem


def test_a_part_of_the_data_is_chosen_at_random_and_is_about_that_part(world: World) -> None:
    packs = world.names("packs/")
    total = sum(len(world.objects[name]) for name in packs)
    largest = max(len(world.objects[name]) for name in packs)
    read = set()
    for seed in range(8):
        report = open_and_check(world.copy(), secret=world.secret, data=0.4, clock=ManualClock(seed))
        assert report.ok
        footers = 300 * report.chunks
        assert 0.4 * total <= report.bytes_read <= 0.4 * total + largest + footers
        read.add(report.bytes_read)
    assert len(read) > 1, "other times, other packs"
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(OutlastError):
            open_and_check(world.copy(), secret=world.secret, data=wrong)


def test_there_is_no_repository(world: World) -> None:
    with pytest.raises(OutlastError) as caught:
        open_and_check(MemoryStore())
    assert caught.value.exit_code == 10


def test_deleting_every_pack_leaves_a_report_and_no_traceback(world: World) -> None:
    store = world.copy()
    for name in world.names("packs/"):
        store.delete(name)
    report = checked(world, store)
    assert set(world.names("packs/")) <= named_objects(report)
    assert {snapshot for damage in report.damaged for snapshot in damage.snapshots} == world.contents.keys()
    repository = Repository.open(store, secret=world.secret)
    for chunk in world.chunks:
        with pytest.raises((Corrupt, NotFound)):
            repository.get_chunk(chunk)


class _BadSector(MemoryStore):
    """Reading one object fails, or, once `away`, reading anything."""

    bad = ""
    away = False

    def get(self, name: str) -> bytes:
        self._fail(name)
        return super().get(name)

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        self._fail(name)
        return super().get_ranges(name, ranges)

    def stat(self, name: str) -> ObjectInfo:
        self._fail(name)
        return super().stat(name)

    def _fail(self, name: str) -> None:
        if self.away or name == self.bad:
            raise Unavailable(f"The disk did not read {name}: Input/output error.")


def test_a_bad_sector_is_damage_and_a_store_that_is_away_is_not(world: World) -> None:
    store = _BadSector()
    for name, data in world.objects.items():
        store.put(name, [data])
    repository = Repository.open(store, secret=world.secret)
    for bad in (world.pack_with_padding(), world.pack_of_manifest(next(iter(world.contents)))):
        store.bad = bad
        report = check(repository, data="all")
        assert named_objects(report) == {store.bad}
        assert "Input/output error" in report.damaged[0].problem
        assert report.damaged[0].snapshots
    store.away = True
    with pytest.raises(Unavailable):
        check(repository, data="all")


def test_progress_ends_at_its_total(world: World) -> None:
    told: list[Progress] = []

    class Sink(ListSink):
        def progress(self, progress: Progress) -> None:
            told.append(progress)

    report = open_and_check(world.copy(), secret=world.secret, data="all", sink=Sink())
    assert told[-1] == Progress("check", report.bytes_read, report.bytes_read, report.packs, report.packs)
