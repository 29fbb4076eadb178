"""Restore from several repositories: each byte from the nearest that has it whole, and the report says which."""

from __future__ import annotations

import os
import random  # noqa: TID251  seeded
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from restoring import SMALL, back_up, beside, make_source, occupied, run
from shell import Shell
from trees import describe

from outlast.backup import restore, staging
from outlast.backup.nearest import Nearest, Source
from outlast.backup.tensors import restore_tensors
from outlast.errors import Archived, Corrupt, InvalidInput, NotFound, OutlastError, Unavailable
from outlast.events import ListSink
from outlast.records import Entry, Snapshot
from outlast.repo import deltas, formats, seal
from outlast.repo.copy import copy
from outlast.repo.pack import object_name
from outlast.repo.repository import Repository
from outlast.store.layers import Layer
from outlast.store.local import LocalStore
from outlast.testing.faults import FaultyStore, error

BLOCK = 16 << 10
_ALL = slice(None)


@pytest.fixture(autouse=True, scope="module")
def cheap_passphrases() -> Iterator[None]:
    """Deriving keys is slow on purpose, and nothing here depends on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seal, "ARGON2_MEMORY_KIB", 32)
        patch.setattr(seal, "ARGON2_ITERATIONS", 1)
        yield


class Tier:
    """A repository in a folder, and the way to open it again."""

    def __init__(self, folder: Path, *, encrypted: bool = False) -> None:
        self.folder = folder
        self._secret = (lambda: os.fsencode(folder)) if encrypted else None
        self.store = LocalStore(str(folder))
        Repository.create(self.store, secret=self._secret, chunking=SMALL, pack_bytes=64 << 10)

    def open(self, layer: Callable[[LocalStore], Layer] | None = None) -> Repository:
        store = layer(self.store) if layer else self.store
        return Repository.open(store, secret=self._secret, sink=ListSink())

    @property
    def packs(self) -> list[Path]:
        return sorted(path for path in (self.folder / "packs").rglob("*") if path.is_file())

    def damage(self, path: str, part: slice = _ALL) -> None:
        """Turn over a bit of each of these chunks of a file of the latest snapshot."""
        repository = self.open()
        [entry] = [each for each in repository.entries(repository.find_snapshot("latest")) if each.path == path]
        for chunk, _ in entry.chunks[part]:
            location = repository.locate(bytes.fromhex(chunk))
            pack = Path(self.store.local_path(object_name(location.pack.name)))
            pack.chmod(0o600)
            with pack.open("r+b") as file:
                file.seek(location.offset)
                first = file.read(1)[0]
                file.seek(location.offset)
                file.write(bytes([first ^ 1]))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "source")


def add_up(report: restore.RestoreReport) -> dict[str, int]:
    """Where the bytes came from, by the last part of the place's name."""
    assert sum(each.bytes for each in report.sources) + report.bytes_holes == report.bytes
    return {os.path.basename(each.where): each.bytes for each in report.sources}


def told(repository: Repository) -> list[str]:
    assert isinstance(repository.sink, ListSink)
    return [event.fields["place"] for event in repository.sink.events if event.kind == "restore.place.failed"]


def bring(nearest: Nearest, target: Path, **options: Any) -> restore.RestoreReport:
    return restore.execute(nearest, restore.plan(nearest, nearest.snapshot, os.fsencode(target), **options))


# -- what there is to be had ---------------------------------------------------------------------


def test_what_is_near_comes_from_near_and_damage_is_got_over(source: Path, tmp_path: Path) -> None:
    hot, warm, cold = (Tier(tmp_path / name) for name in ("hot", "warm", "cold"))
    back_up(hot.open(), source)  # hot has most chunks, and not the snapshot
    (source / "new.bin").write_bytes(random.Random(3).randbytes(200_000))
    (source / "twice.bin").write_bytes((source / "new.bin").read_bytes())
    snapshot = back_up(cold.open(), source)
    assert not copy(cold.open(), warm.open()).failed
    warm.damage("new.bin", slice(5))

    places = [each.open() for each in (hot, warm, cold)]
    nearest = Nearest(places, "latest")
    planned = restore.plan(nearest, nearest.snapshot, os.fsencode(tmp_path / "target"))
    assert [each.where for each in planned.sources] == [each.store.url for each in places]
    assert sum(each.bytes for each in planned.sources) + planned.bytes_holes == planned.bytes
    report = restore.execute(nearest, planned)

    assert describe(tmp_path / "target") == describe(source)
    assert report.snapshot == snapshot.id
    given = add_up(report)
    assert given["hot"] > 400_000 and given["warm"] + given["cold"] == 400_000 and min(given.values()) > 0
    assert report.sources[0].failed == 0 and report.sources[1].failed > 0 and report.sources[2].failed == 0
    assert report.sources[2].chunks == report.sources[1].failed, "what warm could not give, cold gave"
    assert told(places[0]) == [warm.store.url]
    assert planned.sources[0].bytes == given["hot"]


def test_of_a_folder_only_what_is_wrong_is_fetched_and_all_is_counted(source: Path, tmp_path: Path) -> None:
    hot, cold = Tier(tmp_path / "hot"), Tier(tmp_path / "cold")
    back_up(cold.open(), source)
    assert not copy(cold.open(), hot.open()).failed
    target = tmp_path / "target"
    shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("pipe"))
    changed = bytearray((target / "big.bin").read_bytes())
    changed[150_000] ^= 1
    (target / "big.bin").write_bytes(changed)
    report = bring(Nearest([hot.open(), cold.open()], "latest"), target)
    assert describe(target) == describe(source)
    given = add_up(report)
    assert 0 < given["hot"] <= SMALL.max_bytes and given["cold"] == 0
    assert given["target"] == report.bytes - report.bytes_holes - given["hot"]

    again = bring(Nearest([hot.open(), cold.open()], "latest"), target)
    assert add_up(again) == {"hot": 0, "cold": 0, "target": again.bytes - again.bytes_holes}
    alone = run(hot.open(), hot.open().find_snapshot("latest"), tmp_path / "alone")
    assert add_up(alone) == {"hot": alone.bytes - alone.bytes_holes}


def test_chosen_files_are_merged_from_several(source: Path, tmp_path: Path) -> None:
    hot, cold = Tier(tmp_path / "hot"), Tier(tmp_path / "cold")
    back_up(hot.open(), source / "deep")
    back_up(cold.open(), source)
    target = occupied(tmp_path)
    options = {"include": ["deep/er/mid.bin", "sparse", "secret"]}
    report = bring(Nearest([hot.open(), cold.open()], "latest"), target, **options)
    given = add_up(report)
    assert given["hot"] == 40_000 and 0 < given["cold"] < 200_000 and report.bytes_holes > 2 << 20
    assert (target / "deep" / "er" / "mid.bin").read_bytes() == (source / "deep" / "er" / "mid.bin").read_bytes()
    again = bring(Nearest([hot.open(), cold.open()], "latest"), target, **options)
    assert add_up(again)["target"] == sum(given.values())


def test_the_latest_is_the_latest_of_all_and_an_id_is_found_in_any(source: Path, tmp_path: Path) -> None:
    hot, cold = Tier(tmp_path / "hot"), Tier(tmp_path / "cold")
    old = back_up(hot.open(), source)
    (source / "small.txt").write_bytes(b"newer")
    new = back_up(cold.open(), source)
    places = [hot.open(), cold.open()]
    assert Nearest(places, "latest").snapshot == new
    assert Nearest(places, old.id[:10]).snapshot == old
    assert Nearest(places, old).snapshot == old
    with pytest.raises(NotFound, match="no snapshot is named other"):
        Nearest(places, "latest", name="other")
    with pytest.raises(NotFound, match=r"is not in .*hot, .*cold"):
        Nearest(places, msgspec.structs.replace(old, id="0" * 32))
    with pytest.raises(InvalidInput, match="this is about"):
        restore.plan(Nearest(places, old), new, os.fsencode(tmp_path / "target"))


def test_a_target_in_any_of_them_is_refused(source: Path, tmp_path: Path) -> None:
    hot, cold = Tier(tmp_path / "hot"), Tier(tmp_path / "cold")
    back_up(hot.open(), source)
    nearest = Nearest([hot.open(), cold.open()], "latest")
    with pytest.raises(OutlastError, match="inside the repository"):
        restore.plan(nearest, nearest.snapshot, os.fsencode(cold.folder / "inside"))


# -- other keys ----------------------------------------------------------------------------------


@pytest.mark.parametrize("encrypted", [(True, True, True), (False, True, False), (True, False, True)])
def test_places_with_other_keys_help_each_other(
    source: Path, tmp_path: Path, encrypted: tuple[bool, bool, bool]
) -> None:
    """Hot doesn't have the snapshot; it helps where it names chunks as one does that has it."""
    hot, warm, cold = (
        Tier(tmp_path / name, encrypted=each) for name, each in zip(("hot", "warm", "cold"), encrypted, strict=True)
    )
    back_up(hot.open(), source / "deep")
    back_up(cold.open(), source)
    assert not copy(cold.open(), warm.open()).failed
    warm.damage("big.bin", slice(5))
    nearest = Nearest([hot.open(), warm.open(), cold.open()], "latest")
    report = bring(nearest, tmp_path / "target")
    assert describe(tmp_path / "target") == describe(source)
    given = add_up(report)
    assert (given["hot"] >= 40_000) == (encrypted[0] == encrypted[2] is False)
    assert given["warm"] > 0 and (given["cold"] > 0 or given["hot"] > 300_000)
    shutil.rmtree(warm.folder / "packs")
    assert add_up(bring(Nearest([hot.open(), warm.open(), cold.open()], "latest"), tmp_path / "second"))["warm"] == 0
    assert describe(tmp_path / "second") == describe(source)


def test_a_plan_made_by_one_manifest_is_carried_out_by_it(source: Path, tmp_path: Path) -> None:
    warm, cold = Tier(tmp_path / "warm", encrypted=True), Tier(tmp_path / "cold")
    back_up(cold.open(), source)
    assert not copy(cold.open(), warm.open()).failed
    away = tmp_path / "away"
    shutil.move(warm.folder / "packs", away)
    nearest = Nearest([warm.open(), cold.open()], "latest")
    assert nearest.keys is None, "the manifest of warm can't be read"
    planned = restore.plan(nearest, nearest.snapshot, os.fsencode(tmp_path / "target"))
    shutil.move(away, warm.folder / "packs")
    report = restore.execute(Nearest([warm.open(), cold.open()], planned.snapshot), planned)
    assert describe(tmp_path / "target") == describe(source)
    assert add_up(report)["cold"] == 0, "and what warm has comes from there again"


def test_what_another_key_gives_is_believed_only_with_the_right_bytes(source: Path, tmp_path: Path) -> None:
    """The manifest elsewhere is a lie: whole in itself, with other content under the same id."""
    warm, cold = Tier(tmp_path / "warm", encrypted=True), Tier(tmp_path / "cold")
    snapshot = back_up(warm.open(), source / "big.bin")
    forged = cold.open()
    writer = forged.writer()
    [entry] = warm.open().entries(snapshot)
    rng = random.Random(5)
    chunks = [writer.add(writer.prepare(rng.randbytes(length), 0)) for _, length in entry.chunks]
    writer.add_entry(msgspec.structs.replace(entry, chunks=chunks))
    writer.commit(msgspec.structs.replace(snapshot, manifest=[]))
    nearest = Nearest([warm.open(), cold.open()], snapshot.id)
    warm.damage("big.bin", slice(1))
    with pytest.raises(Corrupt, match="other bytes than the snapshot elsewhere"):
        bring(nearest, tmp_path / "target")
    assert not (tmp_path / "target").exists()


# -- what fails on the way -----------------------------------------------------------------------


class Vanishing(Layer):
    """Loses all its packs for good after some reads, as a tier does that is wiped in mid-restore."""

    def __init__(self, tier: Tier, reads: int) -> None:
        super().__init__(tier.store)
        self._tier = tier
        self._left = reads
        self.is_armed = False

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        self._left -= self.is_armed
        if self._left == 0 and self._tier.packs:
            shutil.rmtree(self._tier.folder / "packs")
        return super().get_ranges(name, ranges)


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("reads", [1, 12])
def test_a_place_that_loses_its_packs_in_the_middle(source: Path, tmp_path: Path, reads: int, encrypted: bool) -> None:
    hot, cold = Tier(tmp_path / "hot", encrypted=encrypted), Tier(tmp_path / "cold")
    rng = random.Random(7)
    for number in range(40):
        (source / f"n{number}").write_bytes(rng.randbytes(40_000))
    back_up(cold.open(), source)
    assert not copy(cold.open(), hot.open()).failed
    vanishing = Vanishing(hot, reads)
    places = [hot.open(lambda store: vanishing), cold.open()]
    nearest = Nearest(places, "latest")
    planned = restore.plan(nearest, nearest.snapshot, os.fsencode(tmp_path / "target"))
    vanishing.is_armed = True
    report = restore.execute(nearest, planned)
    assert describe(tmp_path / "target") == describe(source)
    given = add_up(report)
    assert (given["hot"] > 0) == (reads > 1) and given["cold"] > 0 and report.sources[0].failed > 0
    assert not hot.packs and told(places[0]) == [hot.store.url]


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_place_that_stops_answering_in_the_middle(source: Path, tmp_path: Path, encrypted: bool) -> None:
    hot, cold = Tier(tmp_path / "hot", encrypted=encrypted), Tier(tmp_path / "cold")
    back_up(cold.open(), source)
    assert not copy(cold.open(), hot.open()).failed
    faulty = FaultyStore(hot.store)
    places = [hot.open(lambda store: faulty), cold.open()]
    nearest = Nearest(places, "latest")
    planned = restore.plan(nearest, nearest.snapshot, os.fsencode(tmp_path / "target"))
    faulty.script(error(), "get_ranges", times=10**6, skip=2)
    report = restore.execute(nearest, planned)
    assert describe(tmp_path / "target") == describe(source)
    given = add_up(report)
    assert given["hot"] > 0 and given["cold"] > 0 and report.sources[0].failed > 0
    assert told(places[0]) == [hot.store.url]


def test_what_nobody_has_is_named_with_what_each_place_says(source: Path, tmp_path: Path) -> None:
    hot, warm, cold = (Tier(tmp_path / name) for name in ("hot", "warm", "cold"))
    back_up(hot.open(), source / "deep")
    back_up(warm.open(), source)
    assert not copy(warm.open(), cold.open()).failed
    places = [hot.open(), warm.open(), cold.open()]
    nearest = Nearest(places, "latest")
    warm.damage("small.txt")
    cold.damage("small.txt")
    with pytest.raises(Corrupt) as raised:
        bring(nearest, tmp_path / "target")
    said = raised.value.message
    assert said.startswith("1 of ") and "can't be restored: small.txt." in said
    at = [said.index(f"{each.store.url}: ") for each in places]
    assert at == sorted(at) and "is in no readable pack" in said and said.count("is damaged at offset") == 2
    assert not (tmp_path / "target").exists()

    faulty = FaultyStore(warm.store)
    nearest = Nearest([hot.open(), warm.open(lambda store: faulty), cold.open()], nearest.snapshot)
    planned = restore.plan(nearest, nearest.snapshot, os.fsencode(tmp_path / "target"))
    faulty.script(error(), "get_ranges", times=10**6)
    with pytest.raises(Unavailable, match=r"can't be restored: small\.txt\. .* did not answer"):
        restore.execute(nearest, planned)

    thawing = FaultyStore(warm.store)
    nearest = Nearest([hot.open(), warm.open(lambda store: thawing), cold.open()], nearest.snapshot)
    planned = restore.plan(nearest, nearest.snapshot, os.fsencode(tmp_path / "target"))
    thawing.script(error(Archived("it is archived.", hint="Thaw it.")), "get_ranges", times=10**6)
    with pytest.raises(Archived, match=r"1 of .* archived and not thawed yet: small\.txt"):
        restore.execute(nearest, planned)


def test_what_no_index_tells_of_is_still_looked_for(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hot, cold = Tier(tmp_path / "hot"), Tier(tmp_path / "cold")
    snapshot = back_up(hot.open(), source)
    nearest = Nearest([cold.open(), hot.open()], snapshot)
    monkeypatch.setattr("outlast.backup.nearest._Place.has", lambda place, chunk: False)
    planned = restore.plan(nearest, snapshot, os.fsencode(tmp_path / "target"))
    assert planned.sources[-1] == Source("", planned.bytes - planned.bytes_holes, planned.sources[-1].chunks)
    report = restore.execute(nearest, planned)
    assert describe(tmp_path / "target") == describe(source)
    assert add_up(report) == {"cold": 0, "hot": report.bytes - report.bytes_holes}


def test_an_error_of_the_disk_is_not_taken_for_one_of_a_place(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hot, cold = Tier(tmp_path / "hot"), Tier(tmp_path / "cold")
    snapshot = back_up(hot.open(), source)
    places = [hot.open(), cold.open()]

    def full(*arguments: Any) -> None:
        raise Unavailable("the disk failed")

    monkeypatch.setattr(staging.Staging, "_deliver", full)
    with pytest.raises(Unavailable, match="the disk failed"):
        bring(Nearest(places, snapshot), tmp_path / "target")
    assert told(places[0]) == []


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_killed_restore_goes_on_though_the_nearest_is_gone(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encrypted: bool
) -> None:
    hot, cold = Tier(tmp_path / "hot", encrypted=encrypted), Tier(tmp_path / "cold")
    back_up(cold.open(), source)
    assert not copy(cold.open(), hot.open()).failed
    target = occupied(tmp_path)
    deliver = staging.Staging._deliver
    left = [60]

    def killing(self: staging.Staging, *arguments: Any) -> None:
        deliver(self, *arguments)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(staging.Staging, "_deliver", killing)
    pid = os.fork()
    if pid == 0:
        try:
            bring(Nearest([hot.open(), cold.open()], "latest"), target)
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    monkeypatch.undo()
    assert os.listdir(target) == ["old"]
    shutil.rmtree(hot.folder / "packs")
    report = bring(Nearest([hot.open(), cold.open()], "latest"), target)
    assert describe(target) == describe(source)
    given = add_up(report)
    assert given["target"] > 50_000 and given["hot"] == 0 and given["cold"] > 0
    assert beside(target) == [os.path.basename(report.kept_as)]


# -- checkpoints that are differences ------------------------------------------------------------


def checkpoints(repository: Repository, count: int = 3) -> list[bytes]:
    """Dense states of one tensor, stored whole."""
    rng = np.random.default_rng(3)
    values = rng.normal(size=60_000).astype(np.float32) * np.float32(0.02)
    contents = []
    for step in range(count):
        header = formats.safetensors_header([("dense", "F32", values.shape, values.nbytes)])
        content = header + values.tobytes()
        writer = repository.writer()
        cuts = [0, *range(len(header), len(content), BLOCK), len(content)]
        pieces = [(content[start:end], 4 * bool(start)) for start, end in pairwise(cuts)]
        chunks = [writer.add(writer.prepare(*piece)) for piece in pieces]
        writer.add_entry(Entry("model.safetensors", "file", 0o644, size=len(content), chunks=chunks))
        time = f"2026-01-01T00:00:0{step}.000000Z"
        writer.commit(Snapshot("", "checkpoint", "run", time, bytes=len(content), files=1))
        contents.append(content)
        values = values + rng.normal(size=values.shape).astype(np.float32) * np.float32(1e-5)
    return contents


@pytest.mark.parametrize("encrypted", [(False, False), (False, True), (True, False)])
def test_differences_there_and_whole_blocks_here(tmp_path: Path, encrypted: tuple[bool, bool]) -> None:
    hot, cold = (Tier(tmp_path / name, encrypted=each) for name, each in zip(("hot", "cold"), encrypted, strict=True))
    contents = checkpoints(hot.open())
    assert not copy(hot.open(), cold.open(), delta=True).failed
    assert any(deltas.blocks(entry) and entry.sums for entry in cold.open().entries(cold.open().snapshots()[-1]))
    nearest = Nearest([hot.open(), cold.open()], "latest")
    hot.damage("model.safetensors", slice(3, 7))
    report = bring(nearest, tmp_path / "target")
    assert (tmp_path / "target" / "model.safetensors").read_bytes() == contents[-1]
    given = add_up(report)
    assert given["hot"] > 0 and given["cold"] > 0

    [other] = [each for each in cold.open().snapshots() if each.id == nearest.snapshot.id]
    backwards = bring(Nearest([cold.open(), hot.open()], other), tmp_path / "second")
    assert (tmp_path / "second" / "model.safetensors").read_bytes() == contents[-1]
    assert add_up(backwards) == {"cold": len(contents[-1]), "hot": 0}


def test_a_place_without_the_snapshot_adds_up_what_it_has_of_it(tmp_path: Path) -> None:
    """Hot has lost the snapshot and kept its parts, which others still need; only cold's manifest says what of."""
    hot, cold, raw = Tier(tmp_path / "hot"), Tier(tmp_path / "cold"), Tier(tmp_path / "raw")
    contents = checkpoints(raw.open())
    assert not copy(raw.open(), hot.open(), delta=True).failed
    assert not copy(hot.open(), cold.open()).failed
    hot_one = hot.open()
    last = hot_one.snapshots()[-1]
    hot_one.state.snapshots.pop(last.id)
    report = bring(Nearest([hot_one, cold.open()], last.id), tmp_path / "target")
    assert (tmp_path / "target" / "model.safetensors").read_bytes() == contents[-1]
    assert add_up(report) == {"hot": len(contents[-1]), "cold": 0}


def test_a_manifest_that_breaks_off_is_followed_elsewhere(tmp_path: Path) -> None:
    """The manifests differ, since one has sums: the second is another text with the same entries."""
    hot, cold = Tier(tmp_path / "hot"), Tier(tmp_path / "cold")
    contents = checkpoints(hot.open())
    assert not copy(hot.open(), cold.open(), delta=True).failed
    place = hot.open()
    last = place.snapshots()[-1]
    Path(hot.store.local_path(object_name(place.locate(bytes.fromhex(last.manifest[0][0])).pack.name))).unlink()
    report = bring(Nearest([hot.open(), cold.open()], "latest"), tmp_path / "target")
    assert (tmp_path / "target" / "model.safetensors").read_bytes() == contents[-1]
    assert add_up(report)["cold"] > 0


def test_tensors_come_from_the_nearest_too(tmp_path: Path) -> None:
    hot, cold = Tier(tmp_path / "hot", encrypted=True), Tier(tmp_path / "cold")
    contents = checkpoints(hot.open())
    assert not copy(hot.open(), cold.open(), delta=True).failed
    nearest = Nearest([hot.open(), cold.open()], "latest")
    hot.damage("model.safetensors", slice(3, 7))
    report = restore_tensors(nearest, nearest.snapshot, ["dense"], os.fsencode(tmp_path / "dense.safetensors"))
    tensor = contents[-1][-240_000:]
    assert (tmp_path / "dense.safetensors").read_bytes().endswith(tensor)
    assert sum(each.bytes for each in report.sources) == report.bytes_fetched
    assert all(each.bytes for each in report.sources) and report.sources[0].failed > 0


# -- the command line ----------------------------------------------------------------------------


def test_the_command_says_where_each_byte_came_from(filled: Shell) -> None:
    filled("init", "--repo", "cold")
    filled("copy", "--from", "repo", "--to", "cold")
    for pack in (filled.folder / "repo" / "packs").rglob("*"):
        if pack.is_file():
            pack.chmod(0o600)
            pack.write_bytes(bytes(each ^ 1 for each in pack.read_bytes()))
    planned = filled("restore", "latest", "--to", "out", "--also", "cold", "--dry-run")
    assert "It would come from " in planned.out and "/cold: " in planned.out
    ran = filled("restore", "latest", "--to", "out", "--also", "nowhere", "--also", "cold", "--json")
    assert (filled.folder / "out" / "model.safetensors").read_bytes() == (
        filled.folder / "model" / "model.safetensors"
    ).read_bytes()
    sources = [Source(**each) for each in ran.json["sources"]]
    assert [os.path.basename(each.where) for each in sources] == ["repo", "cold"]
    assert sources[1].bytes == ran.json["bytes"] and "no repository at" in ran.json["warnings"][0]
    (filled.folder / "out" / "config.json").write_text("changed")
    told = filled("restore", "latest", "--to", "out", "--repo", "cold", "--overwrite").out
    assert "From " in told and "; already there: " in told
    filled("restore", "latest", "--to", "out", "--repo", "nowhere", "--also", "nor-here", code=10)
    filled("restore", "tiny", "--to", "out", "--also", "cold", code=1)
