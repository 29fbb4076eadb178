"""Every command, cut off after every change and by every power cut: nothing that was committed is lost."""

from __future__ import annotations

import time  # noqa: TID251
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crashing import (
    PASSPHRASE,
    ROOT,
    SEED,
    Command,
    Desk,
    States,
    examine,
    folders,
    record,
    recordings_failing,
    recordings_killed,
    small_world,
    told,
)

from outlast.backup import repair
from outlast.backup.origin import FolderOrigin, RepositoryOrigin
from outlast.clock import ManualClock
from outlast.errors import Unavailable, WrongKey
from outlast.repo import check, copy, forget, keyring, pack, prune, prune_plan
from outlast.repo.repository import Repository
from outlast.store.disk import Disk
from outlast.store.local import LocalStore
from outlast.store.memory import MemoryStore
from outlast.testing.faults import FaultyStore, damage, error
from outlast.testing.powercut import materialise

FOLDERS = 12
OTHER_PASSPHRASE = b"battery staple"


def begin(desk: Desk) -> None:
    desk.init()


def one_backup(desk: Desk) -> None:
    desk.init()
    desk.backup(0)


def init_again(desk: Desk) -> None:
    """An `init` that was cut off is made good by another one; one that was not must still be there."""
    if not list(desk.store.list("format")):
        desk.init()


def three_backups(desk: Desk) -> None:
    desk.init()
    for number in range(3):
        desk.backup(number)


def forget_first(desk: Desk) -> None:
    repository = desk.open()
    oldest = repository.snapshots()[0]
    if oldest.tags["round"] == "0":
        forget.execute(repository, forget.plan(repository, ids=[oldest.id]))


def forgotten(desk: Desk) -> None:
    three_backups(desk)
    forget_first(desk)


def prune_now(desk: Desk) -> None:
    """All phases at once; whatever is mostly waste is repacked."""
    prune.prune(desk.open(), prune_plan.Policy(max_unused=0, max_delete=1, grace_seconds=0))


def condemn(desk: Desk) -> None:
    prune.prune(desk.open(), prune_plan.Policy(max_unused=0, max_delete=1))


def condemned(desk: Desk) -> None:
    forgotten(desk)
    condemn(desk)


def add_key(desk: Desk) -> None:
    repository = desk.open()
    if len(keyring.slots(repository)) == 1:
        keyring.add(repository, OTHER_PASSPHRASE, "other")
        desk.acknowledge("key added")


def two_keys(desk: Desk) -> None:
    one_backup(desk)
    add_key(desk)


def remove_key(desk: Desk) -> None:
    repository = desk.open()
    other = [slot.id for slot in keyring.slots(repository) if slot.label == "other"]
    for slot in other:
        keyring.remove(repository, slot)
        desk.acknowledge("key removed")


def rotate_key(desk: Desk) -> None:
    keyring.rotate(desk.open())
    desk.backup(1)


def other_opens(repository: Repository) -> None:
    Repository.open(repository.store, secret=lambda: OTHER_PASSPHRASE)


def other_opens_no_more(repository: Repository) -> None:
    try:
        other_opens(repository)
    except WrongKey:
        return
    raise AssertionError("a passphrase that was removed opens the repository again")


def begin_beside_another(desk: Desk) -> None:
    desk.init()
    desk.elsewhere()


def copy_all(desk: Desk) -> None:
    report = copy.copy(desk.elsewhere(), desk.open())
    assert len(report.copied) + len(report.skipped) == 2
    rounds_are_there(desk.open(), {"0", "1"})


def copied_in_part(desk: Desk) -> None:
    """One snapshot, and the packs of the next one, committed on the way."""
    desk.init()
    source, target = desk.elsewhere(), desk.open()
    copy.copy(source, target, [source.snapshots()[0].id])
    stopping = FaultyStore(desk.store)
    stopping.script(error(), "put_if_absent", "log/", skip=1, times=100)
    with pytest.raises(Unavailable):
        copy.copy(source, Repository.open(stopping, clock=desk.clock))
    assert len(desk.open().snapshots()) == 1
    assert desk.open().state.seq == 3, "the packs of the second snapshot are not committed"


def rounds_are_there(repository: Repository, rounds: set[str]) -> None:
    found = {snapshot.tags["round"] for snapshot in repository.snapshots()}
    assert found >= rounds, f"only the rounds {sorted(found)} are there"


def check_all(desk: Desk) -> None:
    assert check.check(desk.open(), data="all").ok


def harmed(*harms: Callable[[MemoryStore], None]) -> Callable[[Desk], None]:
    """Two backups, and then damage."""

    def setup(desk: Desk) -> None:
        one_backup(desk)
        desk.backup(1)
        desk.elsewhere()
        assert isinstance(desk.store, MemoryStore)
        for harm in harms:
            harm(desk.store)
        assert not check.check(desk.open(), data="all").ok

    return setup


def pack_of_round_0(store: MemoryStore) -> tuple[str, bytes]:
    """One that holds data."""
    name = min((info for info in store.list("packs/")), key=lambda info: (-info.size_bytes, info.name)).name
    return name, store.get(name)


def flip_payload(store: MemoryStore) -> None:
    name, content = pack_of_round_0(store)
    at = pack.HEADER.size + 40
    store.put(name, [content[:at], bytes([content[at] ^ 1]), content[at + 1 :]])


def flip_footer(store: MemoryStore) -> None:
    name, content = pack_of_round_0(store)
    at = len(content) - pack.TRAILER.size - 8
    store.put(name, [content[:at], bytes([content[at] ^ 1]), content[at + 1 :]])


def lose_pack(store: MemoryStore) -> None:
    store.delete(pack_of_round_0(store)[0])


def flip_segments(store: MemoryStore) -> None:
    names = [info.name for info in store.list("index/")]
    assert names
    for name in names:
        damage(store, name, "flip", ManualClock(seed=SEED))


def repair_alone(desk: Desk) -> None:
    repair.repair(desk.open())


def repair_from_repository(desk: Desk) -> None:
    assert repair.repair(desk.open(), origin=RepositoryOrigin(desk.elsewhere())).ok


def repair_from_folder(desk: Desk) -> None:
    assert repair.repair(desk.open(), origin=FolderOrigin(bytes(desk.source(0)))).ok


def the_others_are_there(repository: Repository) -> None:
    rounds = {snapshot.tags["round"] for snapshot in repository.snapshots()}
    assert rounds >= {"1", "2"}, "a snapshot that was not forgotten is gone"


COMMANDS = [
    Command("init", begin, again=init_again),
    Command("init, encrypted", begin, again=init_again, secrets=(PASSPHRASE,)),
    Command("first backup", lambda desk: desk.backup(0), setup=begin),
    Command("second backup", lambda desk: desk.backup(1), setup=one_backup),
    Command("backup, encrypted", lambda desk: desk.backup(1), setup=one_backup, secrets=(PASSPHRASE,)),
    Command("forget", forget_first, setup=three_backups, expect=the_others_are_there),
    Command("prune, condemning", condemn, setup=forgotten, expect=the_others_are_there),
    Command("prune, sweeping", prune_now, setup=condemned, expect=the_others_are_there),
    Command("prune, all at once", prune_now, setup=forgotten, expect=the_others_are_there),
    Command("backup after condemning", lambda desk: desk.backup(0), setup=condemned, expect=the_others_are_there),
    Command("key add", add_key, setup=one_backup, secrets=(PASSPHRASE,), promises={"key added": other_opens}),
    Command(
        "key remove", remove_key, setup=two_keys, secrets=(PASSPHRASE,), promises={"key removed": other_opens_no_more}
    ),
    Command("key rotate", rotate_key, setup=one_backup, secrets=(PASSPHRASE,)),
    Command("check", check_all, setup=one_backup),
    Command("copy", copy_all, setup=begin_beside_another),
    Command("copy, resumed", copy_all, setup=copied_in_part),
    Command("copy, to encrypted", copy_all, setup=begin_beside_another, secrets=(PASSPHRASE,)),
    Command("repair, payload from a repository", repair_from_repository, setup=harmed(flip_payload), damaged=True),
    Command("repair, pack from a folder", repair_from_folder, setup=harmed(lose_pack), damaged=True),
    Command("repair, footer from a repository", repair_from_repository, setup=harmed(flip_footer), damaged=True),
    Command("repair, index segments", repair_alone, setup=harmed(flip_segments), damaged=True),
    Command("repair, what is lost", repair_alone, setup=harmed(flip_payload), damaged=True, mends=False),
]


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with small_world():
        yield


class Hasty(Disk):
    """Waits for no disk: what is examined here needs no power."""

    def fsync_file(self, fd: int) -> None:
        pass

    def fsync_dir(self, path: str) -> None:
        pass


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_nothing_is_lost(command: Command, tmp_path: Path) -> None:
    started = time.monotonic()
    recording = record(command, tmp_path)
    every = States()
    for state in every.of(recording):
        examine(recording, state)
    told(f"{command.name}, cut off", every.counts, started)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_nothing_is_lost_when_it_is_killed_and_begun_again(command: Command, tmp_path: Path) -> None:
    """What a dead process left in the page cache is there for the next one, and gone after a power cut."""
    started = time.monotonic()
    every = States()
    for recording in recordings_killed(command, tmp_path):
        for state in every.of_cuts(recording):
            examine(recording, state)
    told(f"{command.name}, killed and begun again", every.counts, started)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_nothing_is_lost_when_an_fsync_fails(command: Command, tmp_path: Path) -> None:
    """After a failed fsync the kernel may have dropped what it could not write; nobody is told otherwise."""
    started = time.monotonic()
    every = States()
    for recording in recordings_failing(command, tmp_path):
        for state in every.of_cuts(recording):
            examine(recording, state)
    told(f"{command.name}, each fsync failing", every.counts, started)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_the_folders_that_are_left_can_be_used(command: Command, tmp_path: Path) -> None:
    """The same on real directories, with what is left in `tmp/` and empty folders: a seeded sample."""
    recording = record(command, tmp_path)
    for number, (state, tree) in enumerate(folders(recording, FOLDERS, ManualClock(seed=SEED))):
        place = tmp_path / f"left{number}"
        materialise(tree, str(place))
        examine(recording, state, LocalStore(f"{place}/{ROOT}", disk=Hasty()))
