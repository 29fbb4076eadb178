"""Every kind of object, and each of flip, truncate, zero, swap and delete.

The repository has lived: there are entries of every kind in its log, condemned and quarantined packs, states,
segments, and more than one key. Whatever is done to one object is named, nothing is ever read wrong, and all
that isn't affected is read right.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from damaging import (
    PASSPHRASE,
    World,
    assert_reading_is_right,
    checked,
    fill,
    make_files,
    named_objects,
    open_for_reading,
    read_file,
)

from outlast.backup.create import create
from outlast.backup.origin import FolderOrigin
from outlast.backup.repair import repair
from outlast.errors import Corrupt, WrongKey
from outlast.records import Chunking
from outlast.repo import forget, keyring, log, pack, prune, seal, state, write
from outlast.repo.check import check, open_and_check
from outlast.repo.prune_plan import Policy
from outlast.repo.repository import Repository
from outlast.store.memory import MemoryStore

SECOND = b"another horse"
KINDS = [
    state.SNAPSHOT, state.PACKS, state.FORGET, state.CONDEMN, state.SWEEP, state.QUARANTINE, state.VERIFIED, state.KEY,
]  # fmt: skip
OBJECTS = [
    "format", "pack header", "pack payload", "pack footer", "condemned pack", "quarantined pack",
    "state", "index segment", *(f"log {kind}" for kind in KINDS),
]  # fmt: skip
CHANGES = ["flip", "truncate", "zero", "swap", "delete"]


def secret() -> bytes:
    return PASSPHRASE


class Life:
    """What was done to a repository, step by step."""

    def __init__(self, folder: Path, *, encrypted: bool) -> None:
        self.folder = folder
        self.store = MemoryStore()
        self.rng = np.random.default_rng(1)
        self.contents: dict[str, dict[str, bytes]] = {}
        self.chunks: dict[bytes, bytes] = {}
        make_files(folder, self.rng)
        Repository.create(
            self.store,
            secret=secret if encrypted else None,
            chunking=Chunking(block_bytes=128 << 10, min_bytes=4 << 10, avg_bytes=16 << 10, max_bytes=128 << 10),
            pack_bytes=150_000,
        )

    def open(self) -> Repository:
        return Repository.open(self.store, secret=secret)

    def backup(self) -> None:
        for number in range(4):
            (self.folder / "sub" / f"small{number}").write_bytes(self.rng.bytes(3000))
        (self.folder / "noise.npy").write_bytes(self.rng.bytes(100_000))
        snapshot = create(self.open(), [str(self.folder)], name="folder").snapshot
        repository = self.open()
        files = [entry for entry in repository.entries(repository.find_snapshot(snapshot)) if entry.type == "file"]
        self.contents[snapshot] = {entry.path: read_file(repository, entry) for entry in files}

    def forget_first(self) -> None:
        repository = self.open()
        forget.execute(repository, forget.plan(repository, ids=[repository.snapshots()[0].id]))

    def prune(self, grace_seconds: float) -> None:
        prune.prune(self.open(), Policy(max_unused=0.0, max_delete=1.0, grace_seconds=grace_seconds))

    def heal(self) -> None:
        repository = self.open()
        found = {entry.path: entry for entry in repository.entries(repository.snapshots()[-1])}
        place = repository.locate(bytes.fromhex(found["sub/noise.bin"].chunks[0][0]))
        name = f"packs/{place.pack.name[:2]}/{place.pack.name}"
        data = bytearray(self.store.get(name))
        data[place.offset] ^= 1
        self.store.put(name, [bytes(data)])
        assert repair(self.open(), origin=FolderOrigin(os.fsencode(self.folder))).ok

    def kinds(self) -> dict[str, list[str]]:
        repository = self.open()
        found: dict[str, list[str]] = {}
        for seq in range(1, repository.state.seq + 1):
            name = log.entry_name(seq)
            found.setdefault(repository.log.parse(self.store.get(name), seq).kind, []).append(name)
        return found


@pytest.fixture(scope="module", params=["plain", "encrypted"])
def lived(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, Life]]:
    encrypted = request.param == "encrypted"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seal, "ARGON2_MEMORY_KIB", 64)
        patch.setattr(seal, "ARGON2_ITERATIONS", 1)
        patch.setattr(log, "STATE_EVERY", 4)
        patch.setattr(write, "SEGMENT_PACKS", 3)
        life = Life(tmp_path_factory.mktemp("lived"), encrypted=encrypted)
        life.backup()
        life.backup()
        if encrypted:
            keyring.add(life.open(), SECOND, "second")
        life.forget_first()
        life.prune(grace_seconds=0)
        life.backup()
        open_and_check(life.store, secret=secret, data=0.5)
        life.backup()
        life.forget_first()
        life.prune(grace_seconds=1e9)
        life.heal()
        life.backup()
        if encrypted:
            keyring.rotate(life.open())
            keyring.add(life.open(), SECOND, "second")
        for _ in range(3):
            life.backup()
        foreign = MemoryStore()
        fill(foreign, tmp_path_factory.mktemp("foreign"), encrypted=encrypted, seed=2)
        repository = life.open()
        present = {snapshot.id for snapshot in repository.snapshots()}
        for snapshot in repository.snapshots():
            for entry in repository.entries(snapshot):
                for chunk, _ in entry.chunks:
                    life.chunks[bytes.fromhex(chunk)] = bytes(repository.get_chunk(bytes.fromhex(chunk)))
        world = World(
            {info.name: life.store.get(info.name) for info in life.store.list("")},
            encrypted,
            life.contents,
            life.chunks,
            {info.name: foreign.get(info.name) for info in foreign.list("")},
            frozenset(life.contents.keys() - present),
        )
        yield world, life


def objects(world: World, life: Life, what: str) -> list[str]:
    """The objects of that kind, the one to be damaged first."""
    kind, _, which = what.partition(" ")
    repository = life.open()
    places = repository.state
    if kind == "log":
        found = life.kinds().get(which, [])
        last = log.entry_name(places.seq)
        return [name for name in found if name != last]  # without its last entry a log is simply shorter
    prefixes = {"format": "format", "state": "state/", "index segment": "index/"}
    if what in prefixes:
        return world.names(prefixes[what])[::-1]
    of = {"condemned pack": places.condemned, "quarantined pack": places.quarantined}.get(what, places.packs)
    if of is not places.packs:
        return [pack.object_name(name) for name in sorted(of)]
    # The pack that holds most of what snapshots need is the one whose damage costs most.
    needed = [repository.locate(chunk).pack.name for chunk in world.chunks]
    return sorted((pack.object_name(name) for name in of), key=lambda name: -needed.count(name[-64:]))


def position(world: World, what: str, name: str) -> int:
    size = len(world.objects[name])
    if what == "pack header":
        return 12
    if what == "pack payload":
        return int(world.footer(name)[0].records["offset"][0])
    return size - 50 if what == "pack footer" else size // 2


def damaged(world: World, what: str, change: str, names: Sequence[str]) -> tuple[MemoryStore, set[str]]:
    """(the damaged copy, the objects that are not as they were)"""
    store, name = world.copy(), names[0]
    data, at = world.objects[name], position(world, what, names[0])
    if change == "swap":
        other = next((each for each in names[1:] if world.objects[each] != data), None)
        if other is not None:
            store.put(name, [world.objects[other]])
            store.put(other, [data])
            return store, {name, other}
        prefix = name.partition("/")[0]
        store.put(name, [next(data for each, data in world.foreign.items() if each.startswith(prefix))])
    elif change == "delete":
        store.delete(name)
    else:
        zeroed = data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :]
        changed = {"flip": data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :], "truncate": data[:at], "zero": zeroed}
        store.put(name, [changed[change]])
    return store, {name}


def test_the_repository_has_everything(lived: tuple[World, Life]) -> None:
    world, life = lived
    assert checked(world, world.copy()).ok
    for what in OBJECTS:
        if world.encrypted or what != "log key":
            assert objects(world, life, what), what
    assert len(world.forgotten) == 2


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("what", OBJECTS)
def test_whatever_happens_to_any_object(lived: tuple[World, Life], what: str, change: str) -> None:
    world, life = lived
    if not world.encrypted and what == "log key":
        return
    names = objects(world, life, what)
    store, touched = damaged(world, what, change, names)
    if what == "format":
        with pytest.raises((Corrupt, WrongKey), match=r"format|no key") as caught:
            report = checked(world, store)
            assert named_objects(report) >= {"format"}
            raise Corrupt("format")
        if isinstance(caught.value, WrongKey):
            assert change == "swap"
        return
    report = checked(world, store)
    costs_nothing = what in ("condemned pack", "quarantined pack")
    costs_nothing |= what in ("state", "index segment") and change == "delete"
    if costs_nothing:
        assert report.ok, report.damaged
    else:
        assert named_objects(report) >= touched
    lost = {"log snapshot": 2}.get(what, 1 if what.startswith("log") and change == "swap" else 0)
    failed = assert_reading_is_right(world, store, report, lost=lost)
    if not what.startswith("pack"):
        assert failed == set(), "only packs hold what files are made of"


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", [0, 1])
def test_whatever_happens_to_a_key(lived: tuple[World, Life], which: int, change: str) -> None:
    world, _ = lived
    if not world.encrypted:
        return
    first, second = world.names("keys/")[:: -1 if which else 1]
    store, _ = damaged(world, "key", change, [first, second])
    reports, refused = [], []
    for passphrase in (PASSPHRASE, SECOND):
        try:
            reports.append(open_and_check(store, secret=lambda given=passphrase: given, data="all"))
        except (Corrupt, WrongKey) as exc:
            refused.append(exc)
    if change == "swap":
        assert [report.ok for report in reports] == [True, True], "each opens as before, under another name"
        return
    [report], [exc] = reports, refused
    assert named_objects(report) == {first}
    assert first in exc.message if change != "delete" else isinstance(exc, WrongKey)
    assert report.snapshots == len(world.contents) - len(world.forgotten)


def test_a_repository_that_has_lived_is_read_in_full(lived: tuple[World, Life]) -> None:
    world, _ = lived
    repository = open_for_reading(world, world.copy())
    assert {snapshot.id for snapshot in repository.snapshots()} == world.contents.keys() - world.forgotten


def test_a_key_that_is_to_be_missing_is_told_no_more(lived: tuple[World, Life]) -> None:
    world, _ = lived
    if not world.encrypted:
        return
    for name in world.names("keys/"):
        store = world.copy()
        store.delete(name)
        for passphrase in (PASSPHRASE, SECOND):
            try:
                repository = Repository.open(store, secret=lambda given=passphrase: given)
            except WrongKey:
                continue
            keyring.remove(repository, name.removeprefix("keys/"))
            assert check(repository).ok
