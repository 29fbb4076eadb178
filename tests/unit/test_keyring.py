"""Keys change while others work: nobody is locked out, nothing is sealed with a key that could get lost."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence

import pytest

from outlast import records
from outlast.clock import ManualClock
from outlast.errors import Corrupt, Refused, Unavailable, WrongKey
from outlast.events import NULL_SINK
from outlast.records import Snapshot
from outlast.repo import keyring, seal
from outlast.repo.check import open_and_check
from outlast.repo.log import STATE_EVERY, entry_name
from outlast.repo.repository import Repository
from outlast.store.base import Buffer
from outlast.store.memory import MemoryStore

ONE, TWO = b"passphrase one", b"passphrase two"
_seeds = itertools.count(1)


@pytest.fixture(autouse=True)
def cheap_argon2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, "ARGON2_MEMORY_KIB", 64)
    monkeypatch.setattr(seal, "ARGON2_ITERATIONS", 1)
    monkeypatch.setattr(seal, "ARGON2_LANES", 1)


def make(store: MemoryStore) -> Repository:
    return Repository.create(store, secret=lambda: ONE, clock=ManualClock(next(_seeds)))


def reopen(store: MemoryStore, passphrase: bytes = ONE) -> Repository:
    return Repository.open(store, secret=lambda: passphrase, clock=ManualClock(next(_seeds)), sink=NULL_SINK)


def save(repository: Repository, plain: bytes) -> None:
    """Commit a snapshot whose manifest is this one chunk."""
    writer = repository.writer()
    chunk = writer.add(writer.prepare(plain))
    writer._manifest.append(chunk)
    writer.commit(Snapshot(id="", kind="backup", name=plain.decode(), time=""))


def saved(repository: Repository) -> dict[str, bytes]:
    """Every snapshot with the bytes that its chunk has now."""
    repository.load_index()
    found = {}
    for snapshot in repository.snapshots():
        [(chunk, _)] = snapshot.manifest
        found[snapshot.name] = bytes(repository.get_chunk(bytes.fromhex(chunk)))
    return found


def whole(*texts: str) -> dict[str, bytes]:
    return {text: text.encode() for text in texts}


def slot_names(store: MemoryStore) -> list[str]:
    return [info.name for info in store.list("keys/")]


def test_a_session_under_way_goes_on_through_a_rotation() -> None:
    store = MemoryStore()
    make(store)
    running, rotating = reopen(store), reopen(store)
    save(running, b"before")
    assert keyring.rotate(rotating).epoch == 2
    save(running, b"after")  # its first try meets the rotation
    save(rotating, b"by the other")
    for repository in (running, rotating, reopen(store)):
        repository.refresh()
        assert saved(repository) == whole("before", "after", "by the other")
    sealed = [seal.sealed_epoch(store.get(entry_name(seq))) for seq in range(1, 6)]
    assert sealed == [1, 1, 1, 2, 2], "each entry is sealed with the key in use just before it"


def test_a_pack_begun_before_a_rotation_is_committed_after_it() -> None:
    store = MemoryStore()
    running = make(store)
    writer = running.writer()
    chunk = writer.add(writer.prepare(b"begun early"))
    writer._close_pack()
    keyring.rotate(reopen(store))
    writer._manifest.append(chunk)
    writer.commit(Snapshot(id="", kind="backup", name="begun early", time=""))
    assert saved(reopen(store)) == whole("begun early")


def test_a_reader_under_way_reads_what_came_after_a_rotation() -> None:
    store = MemoryStore()
    save(make(store), b"first")
    reader = reopen(store)
    writer = reopen(store)
    keyring.rotate(writer)
    keyring.rotate(writer)
    save(writer, b"second")
    reader.refresh()
    assert saved(reader) == whole("first", "second")


@pytest.mark.parametrize("how", ["at work", "opening", "checking"])
def test_who_is_left_behind_is_told_so_and_not_of_damage(how: str) -> None:
    store = MemoryStore()
    first = make(store)
    keyring.add(first, TWO)
    second = reopen(store, TWO)
    change = keyring.rotate(first)
    assert [slot.epoch for slot in change.left_behind] == [1]
    save(first, b"new")
    with pytest.raises(WrongKey, match="before a rotation"):
        if how == "at work":
            save(second, b"late")
        elif how == "opening":
            reopen(store, TWO)
        else:
            open_and_check(store, secret=lambda: TWO)
    assert saved(reopen(store)) == whole("new")


@pytest.mark.parametrize("entries", [2, STATE_EVERY - 3, STATE_EVERY + 1], ids=["no state", "at its end", "after it"])
def test_a_rotation_is_known_from_the_log_and_from_a_state_alike(entries: int) -> None:
    store = MemoryStore()
    first = make(store)
    keyring.add(first, TWO)
    keyring.rotate(first)
    for number in range(entries):
        first.log.append("packs", lambda state, number=number: {"packs": []})
        first.log.save_state()
    assert bool(list(store.list("state/"))) == (entries > 2)
    again = reopen(store)
    assert again.keys and again.keys.epoch == again.state.epoch == 2
    assert again.state == first.state
    with pytest.raises(WrongKey, match="before a rotation"):
        reopen(store, TWO)


class Killed(BaseException):
    pass


class Mortal(MemoryStore):
    """Dies before its nth change."""

    def __init__(self, name: str, lives: int) -> None:
        super().__init__(name)
        self.lives = lives

    def _spend(self) -> None:
        if not self.lives:
            raise Killed
        self.lives -= 1

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        self._spend()
        super().put_if_absent(name, parts)

    def delete(self, name: str) -> None:
        self._spend()
        super().delete(name)


CHANGES: dict[str, Callable[[Repository], object]] = {
    "add": lambda repository: keyring.add(repository, TWO),
    "rotate": keyring.rotate,
    "remove": lambda repository: keyring.remove(repository, _other_slot(repository)),
}


def _other_slot(repository: Repository) -> str:
    return next(slot.id for slot in keyring.slots(repository) if slot.epochs is None)


@pytest.mark.parametrize("what", CHANGES)
def test_killed_at_any_point_the_passphrase_still_opens_everything(what: str) -> None:
    for lives in itertools.count():
        name = f"killed-{what}-{lives}"
        store = MemoryStore(name)
        begun = make(store)
        if what == "remove":
            keyring.add(begun, TWO)
        save(begun, b"before")
        try:
            CHANGES[what](reopen(Mortal(name, lives)))
            finished = True
        except Killed:
            finished = False
        survivor = reopen(store)
        save(survivor, b"after")
        assert saved(reopen(store)) == whole("before", "after")
        wanted = 2 if what == "add" else 1
        if not finished and (what == "rotate" or len(slot_names(store)) != wanted):
            CHANGES[what](survivor)  # the same command brings it to its end, whatever was left
            save(survivor, b"at last")
            assert saved(reopen(store)) == whole("before", "after", "at last")
        assert len(slot_names(store)) == wanted
        if finished:
            break
    assert lives >= 2, "the change makes several steps, and each was its last once"


def test_what_a_killed_rotation_left_is_never_used() -> None:
    store = MemoryStore("unfinished")
    first = make(store)
    with pytest.raises(Killed):
        keyring.rotate(reopen(Mortal("unfinished", 2)))  # the epoch is reserved and the slot there, but no entry
    assert len(slot_names(store)) == 2
    again = reopen(store)
    assert again.keys and sorted(again.keys.epochs) == [1, 2]
    assert again.keys.epoch == 1
    save(again, b"with the old key")
    for name in slot_names(store):
        if name != f"keys/{keyring.slots(first)[0].id}":
            store.delete(name)
    assert saved(reopen(store)) == whole("with the old key")
    assert keyring.rotate(reopen(store)).epoch == 3, "no number is given twice"


@pytest.mark.parametrize("second", [ONE, TWO], ids=["same", "different"])
@pytest.mark.parametrize("at", range(1, 6))
def test_two_rotations_at_once_leave_one_readable_history(second: bytes, at: int) -> None:
    """The second begins and ends where the first is about to make its nth call that changes something."""
    name = f"racing-{second!r}-{at}"
    store = MemoryStore(name)
    begun = make(store)
    if second == TWO:
        keyring.add(begun, TWO)
    save(begun, b"before")
    ended: list[str] = []

    def rotate_and_save(store: MemoryStore, passphrase: bytes, text: str) -> None:
        try:
            mine = reopen(store, passphrase)
            keyring.rotate(mine)
            save(mine, text.encode())
            ended.append(text)
        except WrongKey:
            assert second == TWO

    class Interrupted(Mortal):
        def _spend(self) -> None:
            self.lives -= 1
            if not self.lives:
                rotate_and_save(store, second, "by the second")

    rotate_and_save(Interrupted(name, at), ONE, "by the first")
    assert len(ended) == (2 if second == ONE else 1), "of different passphrases the second has its own data key"
    winner = ONE if "by the first" in ended else TWO
    assert saved(reopen(store, winner)) == whole("before", *ended)
    assert "by the first" in ended or second == TWO
    if second == ONE:
        assert len(slot_names(store)) == 1
    else:
        with pytest.raises(WrongKey, match="before a rotation"):
            reopen(store, ONE if winner == TWO else TWO)


@pytest.mark.parametrize("during", ["the making", "the commit"])
def test_a_key_removed_while_its_rotation_runs_is_not_used(during: str) -> None:
    """Else everything would be sealed with a key that no slot holds."""
    name = f"removed-during-{during}".replace(" ", "-")
    store = MemoryStore(name)
    begun = make(store)
    [first] = [slot.id for slot in keyring.slots(begun)]

    class Interrupted(MemoryStore):
        new = ""
        removed = False

        def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
            if during == "the commit" and name.startswith("log/") and self.new:
                self.remove_once()
            super().put_if_absent(name, parts)
            if name.startswith("keys/"):
                self.new = name.removeprefix("keys/")
                if during == "the making":
                    self.remove_once()

        def remove_once(self) -> None:
            if not self.removed:
                self.removed = True
                keyring.remove(reopen(store), self.new)

    rotated = reopen(Interrupted(name))
    change = keyring.rotate(rotated)
    assert change.epoch == 3, "it was made once more, with another slot"
    assert slot_names(store) == [f"keys/{change.slot}"]
    assert first in change.replaced
    save(rotated, b"after")
    assert saved(reopen(store)) == whole("after")


def test_rotations_backups_and_additions_in_threads_lose_nothing() -> None:
    store = MemoryStore("threads")
    make(store)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            mine = reopen(store)
            for turn in range(4):
                if number == 0:
                    keyring.rotate(mine)
                elif number == 1:
                    keyring.add(mine, f"{turn}".encode())
                else:
                    save(mine, f"{number}-{turn}".encode())
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    again = reopen(store)
    assert saved(again) == whole(*(f"{number}-{turn}" for number in (2, 3) for turn in range(4)))
    assert again.state.epoch >= 5


def test_two_removals_at_once_leave_a_key() -> None:
    store = MemoryStore("removals")
    begun = make(store)
    [first] = [slot.id for slot in keyring.slots(begun)]
    second = keyring.add(begun, TWO).slot

    class Interrupted(MemoryStore):
        removed = False

        def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
            if name.startswith("log/") and not self.removed:
                self.removed = True
                keyring.remove(reopen(store, TWO), first)
            super().put_if_absent(name, parts)

    with pytest.raises(Refused, match="no other key"):
        keyring.remove(reopen(Interrupted("removals")), second)
    assert slot_names(store) == [f"keys/{second}"]
    reopen(store, TWO)


def test_whoever_has_an_old_data_key_can_not_go_on_with_the_log() -> None:
    store = MemoryStore()
    first = make(store)
    save(first, b"before")
    assert first.keys
    leaked = seal.Keys(first.keys.repository, first.keys.id_key, dict(first.keys.epochs), first.keys.anchor)
    keyring.rotate(first)
    entry = first.log._entry("forget", {"snapshots": list(first.state.snapshots)}, "00" * 16)
    forged = seal.seal_object(leaked, entry_name(entry.seq), records.canonical_object(entry), bytes(32))
    store.put(entry_name(entry.seq), [forged])
    with pytest.raises(Corrupt, match="epoch 1 where 2 is due"):
        reopen(store)


def test_a_lost_reply_does_not_lose_the_new_key() -> None:
    store = MemoryStore("lossy")
    make(store)

    class Lossy(MemoryStore):
        def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
            super().put_if_absent(name, parts)
            if name.startswith("log/"):
                raise Unavailable("connection reset")

    rotated = reopen(Lossy("lossy"))
    assert keyring.rotate(rotated).epoch == 2
    save(reopen(store), b"after")
    rotated.refresh()
    assert saved(rotated) == whole("after")
    assert len(slot_names(store)) == 1


def test_a_store_that_deletes_nothing_keeps_working_through_changes_of_keys() -> None:
    class WriteOnce(MemoryStore):
        def put(self, name: str, parts: Sequence[Buffer]) -> None:
            raise Refused("no overwriting here")

        def delete(self, name: str) -> None:
            raise Refused("no deleting here")

    store = WriteOnce()
    first = make(store)
    keyring.add(first, TWO)
    change = keyring.rotate(first)
    save(first, b"after")
    assert saved(reopen(store)) == whole("after")
    again = keyring.add(first, TWO)
    assert len(again.replaced) == 1
    assert saved(reopen(store, TWO)) == whole("after")
    removed = {slot.id for slot in keyring.slots(first) if slot.is_removed}
    assert removed == {*change.replaced, *again.replaced}


def test_several_threads_open_one_repository_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the jobs of an agent do. Unordered, derivations over several lanes wait for each other for ever."""
    monkeypatch.setattr(seal, "ARGON2_LANES", 4)
    store = MemoryStore("shared")
    make(store)
    opened: list[Repository] = []
    threads = [threading.Thread(target=lambda: opened.append(reopen(store)), daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(opened) == 8
