"""`outlast prune`: space comes back, and nothing that a snapshot needs ever goes, whoever else is at work."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from shell import Shell

from outlast.backup.create import create
from outlast.clock import ManualClock
from outlast.errors import Busy, Corrupt, Refused, Unavailable
from outlast.records import Chunking, Snapshot, canonical_object
from outlast.repo import prune as pruning
from outlast.repo.check import check
from outlast.repo.content import Content, RecentChunks
from outlast.repo.forget import execute as forget
from outlast.repo.forget import plan as forget_plan
from outlast.repo.index import Location
from outlast.repo.log import state_name
from outlast.repo.pack import object_name
from outlast.repo.prune import prune
from outlast.repo.prune_plan import Policy
from outlast.repo.repack import Repacked, repack
from outlast.repo.repository import Repository
from outlast.repo.state import CONDEMN, State
from outlast.repo.write import Writer
from outlast.store.memory import MemoryStore

SMALL = Chunking(block_bytes=4096, min_bytes=1024, avg_bytes=2048, max_bytes=8192)
NOW = Policy(grace_seconds=0, max_delete=1)
HOUR = 3600.0


class World:
    """A repository in memory with a clock of its own, and a folder to back up into it."""

    def __init__(self, folder: Path, seed: int = 1) -> None:
        self.clock = ManualClock(seed)
        self.store = MemoryStore(clock=self.clock)
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.repository = Repository.create(self.store, chunking=SMALL, pack_bytes=20_000, clock=self.clock)
        self.expected: dict[str, dict[str, bytes]] = {}

    def open(self, seed: int = 99) -> Repository:
        clock = ManualClock(seed)
        return Repository.open(self.store, clock=clock)

    def write(self, **sizes: int) -> None:
        """(Re)write files with noise."""
        for name, size in sizes.items():
            (self.folder / name).write_bytes(self.clock.random_bytes(size))

    def backup(self, repository: Repository | None = None, name: str = "w") -> str:
        made = create(repository or self.repository, [str(self.folder)], name=name).snapshot
        self.expected[made] = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        return made

    def forget(self, *ids: str) -> None:
        repository = self.open()
        forget(repository, forget_plan(repository, ids=ids), allow_empty=True)
        for each in ids:
            del self.expected[each]

    def packs(self) -> set[str]:
        return {info.name.rpartition("/")[2] for info in self.store.list("packs/")}

    def assert_whole(self) -> None:
        """Every snapshot that was not forgotten reads as it was, and check finds nothing."""
        repository = self.open()
        assert {snapshot.id for snapshot in repository.snapshots()} == self.expected.keys()
        for snapshot in repository.snapshots():
            assert contents(repository, snapshot) == self.expected[snapshot.id]
        report = check(repository, data="all")
        assert report.ok, report.damaged


def contents(repository: Repository, snapshot: Snapshot) -> dict[str, bytes]:
    recent = RecentChunks(repository)
    return {
        entry.path: Content(entry, recent.get).read(0, entry.size)
        for entry in repository.entries(snapshot)
        if entry.type == "file"
    }


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "folder")


def test_all_space_of_forgotten_snapshots_comes_back(world: World) -> None:
    world.write(a=50_000, b=50_000)
    first = world.backup()
    alone = sum(info.size_bytes for info in world.store.list("packs/"))
    world.write(b=50_000)
    second = world.backup()
    world.forget(first)
    report = prune(world.open(), Policy(grace_seconds=0, max_unused=0, max_delete=1))
    assert report.bytes_freed > 50_000
    world.assert_whole()
    assert sum(info.size_bytes for info in world.store.list("packs/")) < alone * 1.05
    world.forget(second)
    prune(world.open(), NOW)
    assert world.packs() == set()
    world.assert_whole()


def test_two_phases_by_the_clock_of_the_store(world: World) -> None:
    world.write(a=50_000)
    first = world.backup()
    before = world.packs()
    world.write(a=50_000)
    world.backup()
    world.forget(first)
    report = prune(world.open(), Policy(max_delete=1))
    assert report.condemned
    assert before <= world.packs(), "condemned is not deleted"
    world.assert_whole()
    world.clock.sleep(23 * HOUR)
    assert prune(world.open(), Policy(max_delete=1)).swept == 0
    world.clock.sleep(2 * HOUR)
    assert prune(world.open(), Policy(max_delete=1)).swept == report.condemned
    assert not before & world.packs()
    world.assert_whole()


def test_new_work_relies_on_no_pack_that_was_given_up(world: World) -> None:
    world.write(a=50_000)
    first = world.backup()
    data = (world.folder / "a").read_bytes()
    world.write(a=50_000)
    world.backup()
    world.forget(first)
    prune(world.open(), Policy(max_delete=1))
    condemned = set(world.open().state.condemned)
    (world.folder / "a").write_bytes(data)
    world.backup(world.open(7))
    assert condemned == set(world.open().state.condemned)
    world.clock.sleep(25 * HOUR)
    prune(world.open(), Policy(max_delete=1))
    world.assert_whole()


def test_a_backup_that_began_before_takes_back_what_it_relied_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It found its chunks in packs that a prune gives up before it commits."""
    world.write(a=50_000)
    first = world.backup()
    own = world.packs()
    slow = world.open(7)
    slow.load_index()

    commit = Writer.commit

    def late(writer: Writer, snapshot: Snapshot) -> Snapshot:
        world.forget(first)
        prune(world.open(8), Policy(max_delete=1))
        assert own & world.open().state.condemned.keys()
        return commit(writer, snapshot)

    monkeypatch.setattr(Writer, "commit", late)
    world.backup(slow, "other")
    monkeypatch.undo()
    assert own <= world.open().state.packs.keys() | world.open().state.condemned.keys()
    world.clock.sleep(25 * HOUR)
    prune(world.open(), Policy(max_delete=1))
    world.assert_whole()


def test_a_backup_that_slept_through_the_whole_prune_begins_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.write(a=50_000)
    first = world.backup()
    slow = world.open(7)
    commit = Writer.commit
    calls = []

    def late(writer: Writer, snapshot: Snapshot) -> Snapshot:
        calls.append(1)
        if len(calls) == 1:
            world.forget(first)
            prune(world.open(8), NOW)
        return commit(writer, snapshot)

    monkeypatch.setattr(Writer, "commit", late)
    world.backup(slow, "other")
    assert len(calls) == 2
    world.assert_whole()


def test_a_backup_that_can_never_commit_says_so_and_leaves_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.write(a=50_000)
    world.backup()
    commit = Writer.commit

    def late(writer: Writer, snapshot: Snapshot) -> Snapshot:
        for each in world.open().snapshots():
            world.forget(each.id)
        prune(world.open(8), NOW)
        writer._collect(wait=True)
        return commit(writer, snapshot)

    monkeypatch.setattr(Writer, "commit", late)
    slow = world.open(7)
    slow.load_index()
    monkeypatch.setattr(slow, "refresh", lambda: None)
    with pytest.raises(Busy, match="Run the same command again") as caught:
        raise_hint(lambda: world.backup(slow, "other"))
    assert caught.value.exit_code == 11
    world.assert_whole()


def raise_hint(call: object) -> None:
    try:
        call()  # type: ignore[operator]
    except Busy as exc:
        raise Busy(exc.message + exc.hint) from exc


def test_a_snapshot_committed_between_plan_and_condemn_keeps_its_packs(world: World) -> None:
    world.write(a=50_000)
    first = world.backup()
    slow = world.open(7)
    slow.load_index()
    world.forget(first)
    pruner = world.open(8)
    planned = pruning.plan(pruner, Policy(max_delete=1))
    assert planned.decided.of("condemn")
    world.backup(slow, "other")
    pruning.execute(pruner, planned, pruning.PruneReport())
    world.clock.sleep(25 * HOUR)
    prune(world.open(9), Policy(max_delete=1))
    world.assert_whole()


def test_a_snapshot_that_is_learned_of_while_it_plans_does_not_count_as_looked_at(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a manifest whose pack was moved reads the log again."""
    world.write(a=50_000)
    first = world.backup()
    slow, pruner, real = world.open(7), world.open(8), pruning.needed_chunks
    slow.load_index()
    world.forget(first)

    def needed(repository: Repository, *rest: Any) -> None:
        real(repository, *rest)
        monkeypatch.undo()
        world.backup(slow, "other")
        repository.refresh()

    monkeypatch.setattr(pruning, "needed_chunks", needed)
    assert prune(pruner, NOW).condemned == 0
    world.assert_whole()


def test_a_restore_that_runs_finds_what_was_moved(world: World) -> None:
    world.write(a=5_000, b=50_000, c=5_000)
    first = world.backup()
    world.write(b=50_000, c=5_000)
    second = world.backup()
    reader = world.open(7)
    reader.load_index()
    snapshot = reader.find_snapshot(second)
    world.forget(first)
    prune(world.open(8), Policy(grace_seconds=0, max_unused=0, max_delete=1))
    assert contents(reader, snapshot) == world.expected[second]


def test_leftovers_of_a_killed_backup_go_too(world: World) -> None:
    world.write(a=50_000)
    world.backup()
    before = world.packs()
    repository = world.open(7)
    writer = repository.writer()
    for _ in range(20):
        writer.add(writer.prepare(world.clock.random_bytes(5000)))
    writer._collect(wait=True)
    left = world.packs() - before
    assert left
    world.clock.sleep(25 * HOUR)
    prune(world.open(8), Policy(max_delete=1))
    assert left <= world.packs()
    world.clock.sleep(25 * HOUR)
    prune(world.open(8), Policy(max_delete=1))
    assert world.packs() == before
    world.assert_whole()


def test_when_the_copy_that_is_to_stay_is_damaged_the_other_is_taken_back(world: World) -> None:
    world.write(a=5_000, b=5_000)
    first = world.backup()
    world.write(b=5_000)
    world.backup()
    world.forget(first)
    before = world.packs()
    prune(world.open(), Policy(max_unused=0, max_delete=1))
    repository = world.open()
    [entry] = [each for each in repository.entries(repository.find_snapshot("latest")) if each.path == "a"]
    places = [repository.locate(bytes.fromhex(chunk)) for chunk, _ in entry.chunks]
    kept = next(place for place in places if place.pack.name not in before)
    damaged = bytearray(world.store.get(object_name(kept.pack.name)))
    damaged[kept.offset] ^= 1
    world.store.put(object_name(kept.pack.name), [damaged])
    world.clock.sleep(25 * HOUR)
    report = prune(world.open(), Policy(max_unused=1, max_delete=1))
    assert report.rescued
    for snapshot in world.open().snapshots():
        assert contents(world.open(), snapshot)["a"] == world.expected[snapshot.id]["a"]


def test_it_stops_before_it_deletes_too_much(world: World) -> None:
    world.write(a=50_000)
    first = world.backup()
    world.write(a=50_000)
    world.backup()
    world.forget(first)
    objects = {info.name: info for info in world.store.list("") if info.name != "clock"}
    with pytest.raises(Refused, match="max-delete"):
        prune(world.open(), Policy(max_delete=0.1))
    assert {info.name: info for info in world.store.list("") if info.name != "clock"} == objects


def test_nothing_is_pruned_when_it_is_unknown_what_a_snapshot_needs(world: World) -> None:
    world.write(a=50_000)
    snapshot = world.backup()
    world.write(a=50_000)
    world.backup()
    repository = world.open()
    manifest = bytes.fromhex(repository.find_snapshot(snapshot).manifest[0][0])
    holder = repository.locate(manifest).pack.name if repository.load_index() else ""
    world.store.delete(object_name(holder))
    before = world.packs()
    with pytest.raises(Corrupt, match="nothing was pruned"):
        prune(world.open(), NOW)
    assert world.packs() == before


def test_two_prunes_at_once(world: World) -> None:
    world.write(a=5_000, b=50_000, c=5_000)
    first = world.backup()
    world.write(b=50_000, c=5_000)
    world.backup()
    world.forget(first)
    mine, other = world.open(7), world.open(8)
    planned = pruning.plan(mine, Policy(max_unused=0, max_delete=1))
    prune(other, Policy(max_unused=0, max_delete=1, grace_seconds=0))
    with pytest.raises(pruning.Stale):
        pruning.execute(mine, planned, pruning.PruneReport())
    world.assert_whole()
    prune(mine, NOW)
    world.assert_whole()


def test_what_was_repacked_stays_when_another_prune_gives_up_the_new_copy(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.write(a=5_000, b=50_000, c=5_000)
    first = world.backup()
    world.write(b=50_000, c=5_000)
    world.backup()
    world.forget(first)
    mine, other = world.open(7), world.open(8)
    planned = pruning.plan(mine, Policy(max_unused=0, max_delete=1))

    def repacked(repository: Repository, wanted: Iterable[tuple[str, list[tuple[bytes, Location]]]]) -> Repacked:
        done = repack(repository, wanted)
        assert done.packs and done.written
        other.refresh()
        refs = [{"name": name, "bytes": other.state.packs[name].bytes, "chunks": 1} for name in done.written]
        other.log.append(CONDEMN, lambda state: {"packs": refs})
        return done

    monkeypatch.setattr(pruning, "repack", repacked)
    with pytest.raises(pruning.Stale):
        pruning.execute(mine, planned, pruning.PruneReport())
    monkeypatch.undo()
    prune(world.open(9), NOW)
    world.assert_whole()


def test_what_new_snapshots_need_is_read_while_others_may_read_the_log(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.write(a=50_000)
    first = world.backup()
    world.write(a=50_000)
    world.backup()
    world.forget(first)
    mine = world.open(7)
    planned = pruning.plan(mine, NOW)
    world.write(b=5_000)
    world.backup()
    holders, asked = pruning._holders, []

    def from_another_thread(*given: Any) -> set[str]:
        # As a reader does that finds a pack missing: it would wait for ever for whoever holds the log.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(mine.refresh).result(timeout=30)
        asked.append(given)
        return holders(*given)

    monkeypatch.setattr(pruning, "_holders", from_another_thread)
    pruning.execute(mine, planned, pruning.PruneReport())
    assert asked
    world.assert_whole()


def test_a_pack_that_was_never_committed_is_no_reason_to_give_up_its_twin(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable(*given: Any) -> None:
        raise Unavailable("nobody answers")

    failed = world.open(7)
    world.write(a=50_000)
    world.backup(failed)  # so that its index knows packs
    several = {name: world.clock.random_bytes(900) for name in "bcde"}
    writer = failed.writer()
    for data in several.values():
        writer.add(writer.prepare(data))
    with pytest.raises(Unavailable), monkeypatch.context() as patched:
        patched.setattr(failed.log, "append", unavailable)
        try:
            writer.finish()
        finally:
            writer.abandon()
    for name, data in several.items():
        (world.folder / name).write_bytes(data)
        world.backup(world.open(8))
    planned = pruning.plan(failed, Policy(max_unused=0))
    assert not planned.decided.of("condemn", "repack")


def test_the_index_is_rewritten_in_few_pieces(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from outlast.repo import write

    monkeypatch.setattr(write, "SEGMENT_PACKS", 1)
    for _ in range(12):
        world.write(a=9_000)
        last = world.backup()
    assert len(list(world.store.list("index/"))) == 12
    world.forget(*[each for each in world.expected if each != last])
    prune(world.open(), NOW)
    assert len(list(world.store.list("index/"))) == 1
    assert world.open().load_index().packs == world.packs()
    world.assert_whole()


def test_a_forged_state_deletes_nothing(world: World) -> None:
    """Whoever may only create objects could otherwise hide every snapshot from the one who may delete."""
    world.write(a=50_000)
    snapshot = world.backup()
    before, state = world.packs(), world.open().state
    forged = State(state.seq, state.head_hash, packs=state.packs)
    world.store.put_if_absent(state_name(state.seq), [canonical_object(forged)])
    assert world.open().snapshots() == [], "it is believed where that costs nothing"
    report = prune(world.open(), NOW)
    assert (report.condemned, report.swept) == (0, 0)
    assert world.packs() == before
    world.store.delete(state_name(state.seq))
    repository = world.open()
    assert contents(repository, repository.find_snapshot(snapshot)) == world.expected[snapshot]


def test_one_script_reads_a_dry_run_and_the_real_one(filled: Shell) -> None:
    (filled.folder / "model" / "config.json").write_text("something else")
    filled("backup", "model", "--name", "tiny")
    filled("forget", "--keep-last", "1")
    arguments = ["prune", "--max-unused", "0%", "--max-delete", "100%", "--json"]
    shown = filled(*arguments, "--dry-run").json
    assert shown["packs"] and shown["bytes_to_free"] > 0
    assert "condemn" in filled(*arguments[:-1], "--dry-run").out
    done = filled(*arguments).json
    assert shown.keys() <= done.keys()
    assert {**shown, "dry_run": False} == {field: done[field] for field in shown}
    assert done["condemned"] == sum(each["action"] in ("condemn", "repack") for each in shown["packs"]) > 0
    assert "Condemned and still readable: " in filled("prune").out
    shown = filled("prune", "--grace", "0", "--dry-run").out
    assert f"delete {done['bytes_condemned'] / 1024:.1f} KiB that was condemned before" in shown
    deleted = filled("prune", "--grace", "0").out
    assert f"Deleted {done['condemned']} pack" in deleted


def test_the_command(filled: Shell) -> None:
    filled("backup", "model", "--name", "tiny", "--full")
    filled("forget", "--keep-last", "1")
    shown = filled("prune", "--dry-run")
    assert "Nothing was changed" in shown.out
    assert filled("prune", "--dry-run", "--json").json["dry_run"] is True
    (filled.folder / "model" / "model.safetensors").write_bytes(b"now something else entirely" * 1000)
    filled("backup", "model", "--name", "tiny")
    filled("forget", "--keep-last", "1")
    refused = filled("prune", "--max-delete", "0%", "--max-unused", "0%", code=21)
    assert "--max-delete" in refused.err
    planned = filled("prune", "--dry-run", "--max-delete", "0", "--max-unused=0", "--json", code=21)
    assert planned.json["refused"]
    done = filled("prune", "--grace", "0", "--max-unused", "0%", "--max-delete", "100%", "--json").json
    assert done["bytes_freed"] > 0
    assert done["swept"] > 0
    assert filled("check", "--data", "all").code == 0
    filled("restore", "latest", "--to", "back")
    assert (filled.folder / "back" / "config.json").read_text() == "{}"
    filled("prune", "--max-unused", "200%", code=2)
    filled("prune", "--grace", "soon", code=2)
