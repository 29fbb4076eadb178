"""Checking over time: what was read when, within a time limit, without the passphrase, and beside a prune."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shell import PASSPHRASE, Shell

from outlast.backup.create import create
from outlast.clock import ManualClock
from outlast.errors import InvalidInput, NotFound, Refused, Unavailable
from outlast.events import ListSink
from outlast.records import Chunking
from outlast.repo import forget, keyless, log, prune, seal
from outlast.repo.check import CheckReport, check, open_and_check
from outlast.repo.content import Content, RecentChunks
from outlast.repo.log import entry_name
from outlast.repo.prune_plan import Policy
from outlast.repo.repository import Repository
from outlast.repo.state import CONDEMN, QUARANTINE
from outlast.store.base import ObjectInfo
from outlast.store.layers import ReadOnlyStore
from outlast.store.memory import MemoryStore

CHUNKING = Chunking(block_bytes=16 << 10, min_bytes=4 << 10, avg_bytes=16 << 10, max_bytes=64 << 10)
EVERYTHING = Policy(max_unused=0.0, max_delete=1.0, grace_seconds=0.0)


@pytest.fixture(autouse=True)
def cheap_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, "ARGON2_MEMORY_KIB", 64)
    monkeypatch.setattr(seal, "ARGON2_ITERATIONS", 1)


def secret() -> bytes:
    return PASSPHRASE.encode()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(3)
    for number in range(10):
        (folder / f"file{number}").write_bytes(rng.bytes(100_000))
    return folder


def fill(store: Any, source: Path, *, encrypted: bool = False) -> Any:
    repository = Repository.create(store, secret=secret if encrypted else None, chunking=CHUNKING, pack_bytes=100_000)
    create(repository, [str(source)], name="data")
    return store


def packs(store: Any) -> list[str]:
    return [info.name for info in store.list("packs/")]


def spoil(store: Any, name: str, at: int = 100) -> None:
    data = bytearray(store.get(name))
    data[at] ^= 1
    store.put(name, [bytes(data)])


def verified(store: Any) -> dict[str, str]:
    return Repository.open(store, secret=secret).state.verified


# -- what was read is recorded -------------------------------------------------------------------


def test_parts_of_the_data_take_turns_until_all_was_read(source: Path) -> None:
    store, clock = fill(MemoryStore(), source), ManualClock(seed=1)
    seen: list[set[str]] = []
    for _ in range(4):
        before = set(verified(store))
        report = open_and_check(store, data=0.25, clock=clock)
        assert report.ok
        assert report.recorded
        seen.append(set(verified(store)) - before)
        clock.sleep(3600)
    assert all(seen)
    assert set().union(*seen) == {name.rpartition("/")[2] for name in packs(store)}, "nothing is left out"
    assert report.bytes_verified == report.bytes
    oldest = verified(store)
    assert report.verified_since == min(oldest.values())
    open_and_check(store, data=0.01, clock=clock)
    [again] = [name for name, time in verified(store).items() if time != oldest[name]]
    assert again in seen[0], "those not read for longest come first"


def test_only_what_was_read_and_is_sound_is_recorded(source: Path) -> None:
    store = fill(MemoryStore(), source)
    entries = len(list(store.list("log/")))
    report = open_and_check(store, data="none")
    assert (report.recorded, report.bytes_verified, report.verified_since) == (False, 0, "")
    assert report.packs_unread == report.packs
    assert len(list(store.list("log/"))) == entries
    damaged = packs(store)[0]
    spoil(store, damaged)
    report = open_and_check(store, data="all")
    assert not report.ok
    assert report.recorded
    assert set(verified(store)) == {name.rpartition("/")[2] for name in packs(store)[1:]}
    assert 0 < report.bytes_verified < report.bytes


def test_what_was_found_damaged_is_told_again_and_nothing_new_relies_on_it(source: Path) -> None:
    store = fill(MemoryStore(), source)
    spoil(store, packs(store)[0])
    damaged = [each.object for each in open_and_check(store, data="all").damaged]
    told = open_and_check(store, data="none")
    assert not told.ok
    assert [each.object for each in told.damaged] == damaged
    assert "was not read now" in told.damaged[0].problem
    repository = Repository.open(store)
    again = create(repository, [str(source)], name="data")
    assert again.bytes_added > 0, "what is in the damaged pack is stored again"
    latest = repository.find_snapshot("latest")
    recent = RecentChunks(repository)
    for entry in repository.entries(latest):
        if entry.type == "file":
            assert Content(entry, recent.get).read(0, entry.size) == (source / entry.path).read_bytes()


def test_a_pack_that_reads_well_again_is_no_longer_damaged(source: Path) -> None:
    store = fill(MemoryStore(), source)
    name = packs(store)[0]
    spoil(store, name)
    assert not open_and_check(store, data="all").ok
    spoil(store, name)
    assert open_and_check(store, data="all").ok
    assert open_and_check(store, data="none").ok


@pytest.mark.parametrize("why", [Refused, Unavailable])
def test_not_being_able_to_record_is_no_failure(source: Path, why: type[Exception]) -> None:
    store = fill(MemoryStore(), source)

    class Away(MemoryStore):
        def put_if_absent(self, name: str, parts: Any) -> None:
            raise Unavailable("It does not answer.")

        put = put_if_absent

    kept: Any = ReadOnlyStore(store)
    if why is Unavailable:
        kept = Away()
        for info in store.list(""):
            MemoryStore.put(kept, info.name, [store.get(info.name)])
    sink = ListSink()
    report = open_and_check(kept, data="all", sink=sink, clock=ManualClock())
    assert (report.ok, report.recorded) == (True, False)
    assert report.bytes_verified == report.bytes
    assert [event.kind for event in sink.events] == ["check.not_written"]


def test_nothing_is_recorded_in_a_damaged_log(source: Path) -> None:
    store = fill(MemoryStore(), source)
    spoil(store, entry_name(1))
    before = [info.name for info in store.list("log/")]
    report = open_and_check(store, data="all")
    assert (report.ok, report.recorded) == (False, False)
    assert [info.name for info in store.list("log/")] == before


class Slow(MemoryStore):
    """Every read takes a second."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock=clock)
        self.ticking = clock

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        self.ticking.sleep(1)
        return super().get_ranges(name, ranges)


def test_when_the_time_is_up_no_more_data_is_read_but_the_structure_is(source: Path) -> None:
    clock = ManualClock(seed=5)
    store = fill(Slow(clock), source)
    count = len(packs(store))
    repository = Repository.open(store, clock=clock)
    runs = []
    while not runs or runs[-1].bytes_verified < runs[-1].bytes:
        runs.append(check(repository, data="all", max_seconds=count / 2))
        assert runs[-1].ok
        assert runs[-1].chunks == runs[0].chunks
        assert len(runs) < 20
    assert len(runs) > 1, "one run is too short for all"
    assert 0 < runs[0].packs_unread < count
    for wrong in (0, -1, float("nan")):
        with pytest.raises(InvalidInput):
            check(repository, data="all", max_seconds=wrong)


# -- beside a prune ------------------------------------------------------------------------------


class Meanwhile(MemoryStore):
    """Something happens just before a listing or a read of a name that begins with `prefix`, `times` times."""

    prefix = "?"
    times = 0
    happens: Callable[[], None] = staticmethod(lambda: None)

    def _moment(self, name: str) -> None:
        if self.times and name.startswith(self.prefix):
            self.times -= 1
            kept, self.times = self.times, 0
            self.happens()
            self.times = kept

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        self._moment(prefix)
        return super().list(prefix, after)

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        self._moment(name)
        return super().get_ranges(name, ranges)


def churn(store: Meanwhile, source: Path) -> Callable[[], None]:
    """A new snapshot that shares half of the packs' chunks, the others forgotten, and everything pruned at once."""
    rng = np.random.default_rng(11)

    def work() -> None:
        for path in sorted(source.iterdir())[::2]:
            data = bytearray(path.read_bytes())
            data[:50_000] = rng.bytes(50_000)
            path.write_bytes(data)
        create(Repository.open(store), [str(source)], name="data")
        repository = Repository.open(store)
        old = [snapshot.id for snapshot in repository.snapshots()[:-1]]
        forget.execute(repository, forget.plan(repository, ids=old))
        prune.prune(repository, EVERYTHING)

    return work


@pytest.mark.parametrize("data", ["none", "all"])
@pytest.mark.parametrize("prefix", ["packs/", "index/", "state/", "log/"])
def test_a_prune_at_any_moment_is_no_damage(
    source: Path, prefix: str, data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "STATE_EVERY", 2)
    store = fill(Meanwhile(), source)
    churn(store, source)()
    before = set(packs(store))
    store.happens = churn(store, source)
    store.prefix, store.times = prefix, 3
    report = open_and_check(store, data=data)
    assert report.ok, report.damaged
    assert store.times < 3, "it happened"
    assert before - set(packs(store)), "packs were deleted meanwhile"


def test_real_damage_is_told_while_a_prune_works(source: Path) -> None:
    store = fill(Meanwhile(), source)
    repository = Repository.open(store)
    [file] = [entry for entry in repository.entries(repository.snapshots()[0]) if entry.path == "file1"]
    place = repository.locate(bytes.fromhex(file.chunks[0][0]))
    name = f"packs/{place.pack.name[:2]}/{place.pack.name}"
    store.happens = churn(store, source)
    store.prefix, store.times = "packs/", 1
    spoil(store, name, place.offset)
    reports = [open_and_check(store, data="all") for _ in range(2)]
    for report in reports:
        assert not report.ok
        assert any("file1" in damage.files for damage in report.damaged)


# -- packs in other places -----------------------------------------------------------------------


def place(store: Any, kind: str, names: Sequence[str]) -> None:
    repository = Repository.open(store)
    refs = [repository.state.packs[name.rpartition("/")[2]] for name in names]
    listed = [{"name": ref.name, "bytes": ref.bytes, "chunks": ref.chunks} for ref in refs]
    body = {"packs": listed if kind == CONDEMN else [ref.name for ref in refs]}
    repository.log.append(kind, lambda state: body)


@pytest.mark.parametrize("kind", [CONDEMN, QUARANTINE])
def test_packs_that_are_given_up_are_read_but_not_damage_of_their_own(source: Path, kind: str) -> None:
    store = fill(MemoryStore(), source)
    repository = Repository.open(store)
    manifest = repository.locate(bytes.fromhex(repository.snapshots()[0].manifest[0][0])).pack.name
    names = sorted(packs(store), key=lambda name: name.endswith(manifest))
    place(store, kind, names[:2])
    report = open_and_check(store, data="all")
    assert report.ok, report.damaged
    counts = (report.condemned_packs, report.quarantined_packs)
    assert counts == ((2, 0) if kind == CONDEMN else (0, 2))
    sizes = sum(len(store.get(name)) for name in names[:2])
    assert report.condemned_bytes + report.quarantined_bytes == sizes
    assert (report.packs, report.unreferenced_packs) == (len(names) - 2, 0)
    spoil(store, names[0], 5)  # the header: no chunk is hurt
    assert open_and_check(store, data="all").ok
    store.delete(names[0])
    [damage] = open_and_check(store, data="none").damaged
    assert damage.object == names[0]
    assert damage.files
    assert damage.snapshots


def test_what_nobody_needs_may_be_gone(source: Path) -> None:
    store = fill(MemoryStore(), source)
    (source / "file0").write_bytes(b"new" * 1000)
    create(Repository.open(store), [str(source)], name="data")
    repository = Repository.open(store)
    forget.execute(repository, forget.plan(repository, ids=[repository.snapshots()[0].id]))
    prune.prune(repository, Policy(max_unused=0.0, max_delete=1.0))
    given_up = list(Repository.open(store).state.condemned)
    assert given_up
    assert open_and_check(store, data="all").condemned_packs == len(given_up)
    for name in given_up:
        store.delete(f"packs/{name[:2]}/{name}")
    report = open_and_check(store, data="all")
    assert report.ok, report.damaged


# -- without the passphrase ----------------------------------------------------------------------


def keyless_named(store: Any) -> CheckReport:
    return keyless.scrub(store, data="all")


def test_without_keys_every_stored_byte_is_verified(source: Path) -> None:
    store = fill(MemoryStore(), source, encrypted=True)
    before = {info.name: store.get(info.name) for info in store.list("")}
    report = keyless_named(store)
    assert (report.ok, report.keyless, report.packs_unread) == (True, True, 0)
    assert report.bytes_read == report.bytes_verified == sum(len(before[name]) for name in packs(store))
    assert report.not_checked
    assert {info.name: store.get(info.name) for info in store.list("")} == before, "nothing is recorded"
    for name in ("format", next(name for name in before if name.startswith("keys/")), *packs(store)[:1]):
        for at in (0, len(before[name]) // 2, len(before[name]) - 1):
            spoil(store, name, at)
            try:
                report = keyless_named(store)
                assert [damage.object for damage in report.damaged] == [name]
            except Exception as exc:
                assert name == "format"
                assert "format" in str(exc)
            store.put(name, [before[name]])
    assert keyless_named(store).ok


def test_without_keys_gaps_and_foreign_objects_in_the_log_are_seen(source: Path) -> None:
    store = fill(MemoryStore(), source, encrypted=True)
    for _ in range(3):
        (source / "file0").write_bytes(np.random.default_rng(1).bytes(3000))
        create(Repository.open(store, secret=secret), [str(source)], name="data")
    kept = store.get(entry_name(2))
    store.delete(entry_name(2))
    assert [damage.object for damage in keyless_named(store).damaged] == [entry_name(2)]
    store.put(entry_name(2), [b"{}"])
    assert [damage.object for damage in keyless_named(store).damaged] == [entry_name(2)]
    store.put(entry_name(2), [b"X" + kept[1:]])
    assert [damage.object for damage in keyless_named(store).damaged] == [entry_name(2)]
    store.put(entry_name(2), [kept])
    store.put("packs/00/" + "0" * 64, [b"rubbish"])
    store.put("packs/odd", [b"rubbish"])
    assert len(keyless_named(store).damaged) == 2


def test_a_pack_that_is_deleted_meanwhile_is_no_damage_without_keys(source: Path) -> None:
    store = fill(Meanwhile(), source, encrypted=True)
    gone = packs(store)[0]
    store.happens = lambda: store.delete(gone)
    store.prefix, store.times = gone, 1
    report = keyless_named(store)
    assert report.ok, report.damaged
    with pytest.raises(NotFound):
        store.stat(gone)


# -- the command ---------------------------------------------------------------------------------


def test_the_command_scrubs(shell: Shell, source: Path) -> None:
    shell("init")
    shell("backup", "data")
    assert "was not read" in shell("check").out
    ran = shell("check", "--max-time", "1h30m")
    assert "All data was verified on " in ran.out
    report = shell("check", "--data", "10%", "--json").json
    assert (report["ok"], report["recorded"], report["keyless"]) == (True, True, False)
    for wrong in (["--max-time", "1x"], ["--max-time", "0s"], ["--max-time", "1h", "--data", "none"]):
        assert "nothing was" in shell("check", *wrong, code=2).err


def test_the_command_scrubs_without_the_passphrase(shell: Shell, source: Path) -> None:
    shell("init", "--encrypt", OUTLAST_PASSPHRASE=PASSPHRASE)
    shell("backup", "data", OUTLAST_PASSPHRASE=PASSPHRASE)
    shell("check", code=12)
    shell("check", "--data", "none", code=12)
    shell("check", "--data", "all", code=12, OUTLAST_PASSPHRASE="wrong")
    ran = shell("check", "--data", "all")
    assert "No damage found. Checked without the passphrase" in ran.out
    assert "the log: whether" in ran.out
    report = shell("check", "--data", "all", "--json").json
    assert (report["ok"], report["keyless"], report["recorded"]) == (True, True, False)
    [pack] = (shell.folder / "repo" / "packs").rglob("??/*")
    data = bytearray(pack.read_bytes())
    data[500] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(data)
    report = shell("check", "--data", "all", "--json", code=20).json
    assert [damage["object"] for damage in report["damaged"]] == [f"packs/{pack.parent.name}/{pack.name}"]
    assert "check --repair" in shell("check", "--data", "all", code=20, OUTLAST_PASSPHRASE=PASSPHRASE).out
