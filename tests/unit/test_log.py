"""A commit happens once or not at all, whatever the store answers; a damaged log is noticed and named."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from outlast import records
from outlast.clock import ManualClock
from outlast.errors import Corrupt, Exists, OutlastError, Unavailable
from outlast.events import NULL_SINK, ListSink
from outlast.records import PackRef
from outlast.repo import log, seal
from outlast.repo.chain import walk
from outlast.repo.log import Log, entry_name
from outlast.repo.state import PACKS, State
from outlast.store.base import Buffer
from outlast.store.memory import MemoryStore

KEYS = seal.new_keys(b"r" * 16, bytes(range(64)))
ANCHOR = "f0" * 32


class Unreliable(MemoryStore):
    """Before or after applying a put it does what `trouble` says, once per item."""

    def __init__(self) -> None:
        super().__init__()
        self.trouble: list[str] = []
        self.late: list[Callable[[], None]] = []

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        content = [bytes(part) for part in parts]
        what = self.trouble.pop(0) if self.trouble else ""
        if what == "conflict without object":
            raise Exists(f"{name} is being written by somebody.")
        if what == "lost request":
            raise Unavailable("connection reset")
        if what == "late":
            self.late.append(lambda: MemoryStore.put_if_absent(self, name, content))
            raise Unavailable("time-out")
        super().put_if_absent(name, content)
        if what == "lost reply":
            raise Unavailable("connection reset")
        if what == "refused reply":
            raise Exists(f"{name} already exists.")


def open_log(store: MemoryStore, keys: seal.Keys | None = None, seed: int = 0) -> Log:
    opened = Log(store, keys, ANCHOR, ManualClock(seed), NULL_SINK)
    opened.load()
    return opened


def pack(name: str) -> str:
    """What a pack of this name is called in the log."""
    return name.encode().hex().ljust(64, "0")


def body(name: str) -> Callable[[State], dict[str, Any]]:
    return lambda state: {"packs": [{"name": pack(name), "bytes": 1000, "chunks": 1}]}


def names(store: MemoryStore) -> list[str]:
    return [info.name for info in store.list("log/")]


def fill(store: MemoryStore, count: int, keys: seal.Keys | None = None) -> Log:
    opened = open_log(store, keys)
    for number in range(count):
        opened.append(PACKS, body(f"pack{number}"))
    return opened


@pytest.mark.parametrize("keys", [None, KEYS], ids=["plain", "sealed"])
def test_what_was_committed_is_read_by_others(keys: seal.Keys | None) -> None:
    store = MemoryStore()
    mine = fill(store, 12, keys)
    other = open_log(store, keys, seed=1)
    assert other.state == mine.state
    assert set(other.state.packs) == {pack(f"pack{number}") for number in range(12)}
    assert names(store) == [entry_name(seq) for seq in range(1, 13)]


@pytest.mark.parametrize("keys", [None, KEYS], ids=["plain", "sealed"])
@pytest.mark.parametrize(
    "trouble",
    [
        ["lost reply"],
        ["refused reply"],
        ["lost request"],
        ["lost request", "lost reply"],
        ["conflict without object"],
        ["conflict without object"] * 4 + ["lost reply"],
    ],
    ids="+".join,
)
def test_one_commit_is_one_entry(trouble: list[str], keys: seal.Keys | None) -> None:
    store = Unreliable()
    mine = fill(store, 2, keys)
    store.trouble = list(trouble)
    entry = mine.append(PACKS, body("mine"))
    assert entry.seq == 3
    assert names(store) == [entry_name(seq) for seq in (1, 2, 3)]
    mine.append(PACKS, body("next"))
    assert open_log(store, keys, seed=1).state == mine.state


def test_a_write_that_lands_late_is_not_committed_twice() -> None:
    store = Unreliable()
    mine = fill(store, 1)
    store.trouble = ["late"]
    mine.append(PACKS, body("mine"))
    for land in store.late:
        with pytest.raises(Exists):
            land()
    assert [*open_log(store).state.packs] == [pack("pack0"), pack("mine")]
    assert len(names(store)) == 2


def test_a_write_that_lands_while_the_outcome_is_read_is_our_own() -> None:
    store = Unreliable()
    mine = fill(store, 1)
    store.trouble = ["late"]
    slept = mine._clock.sleep

    def land_then_sleep(seconds: float) -> None:
        while store.late:
            store.late.pop()()
        slept(seconds)

    mine._clock.sleep = land_then_sleep  # type: ignore[method-assign]
    mine.append(PACKS, body("mine"))
    assert len(names(store)) == 2
    assert open_log(store).state == mine.state


def test_a_store_that_stays_away_is_said_to() -> None:
    store = Unreliable()
    mine = fill(store, 1)
    store.trouble = ["lost request"] * 100
    with pytest.raises(Unavailable, match="not accepted"):
        mine.append(PACKS, body("mine"))
    assert len(names(store)) == 1


def test_two_writers_take_turns_and_each_sees_the_other() -> None:
    store = MemoryStore()
    first, second = open_log(store, seed=1), open_log(store, seed=2)
    seen: list[int] = []

    def counting(name: str) -> Callable[[State], dict[str, Any]]:
        def make(state: State) -> dict[str, Any]:
            seen.append(len(state.packs))
            return body(name)(state)

        return make

    for number in range(5):
        first.append(PACKS, counting(f"first{number}"))
        second.append(PACKS, counting(f"second{number}"))
    fresh = open_log(store, seed=3)
    assert len(fresh.state.packs) == 10
    assert fresh.state == second.state
    assert seen[:3] == [0, 0, 1], "the loser is asked again, with the winner's entry folded in"


def test_writers_in_threads_lose_nothing() -> None:
    store = MemoryStore()
    failures: list[OutlastError] = []

    def work(writer: int) -> None:
        try:
            mine = open_log(store, seed=writer)
            for number in range(10):
                mine.append(PACKS, body(f"{writer}-{number}"))
        except OutlastError as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    found = walk(store, open_log(store))
    assert found.damage == []
    assert len(found.state.packs) == 40


@pytest.mark.parametrize("keys", [None, KEYS], ids=["plain", "sealed"])
@pytest.mark.parametrize("count", [4, 20])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_each_damaged_entry_is_named_and_the_others_are_kept(at: int, count: int, keys: seal.Keys | None) -> None:
    whole = MemoryStore()
    fill(whole, count, keys)
    data = whole.get(entry_name(at))
    for position in range(0, len(data), 7):
        store = MemoryStore()
        fill(store, count, keys)
        damaged = bytearray(data)
        damaged[position] ^= 1
        store.put(entry_name(at), [bytes(damaged)])
        with pytest.raises(Corrupt, match=f"log/0*{at} |log entry {at} "):
            open_log(store, keys)
        found = walk(store, Log(store, keys, ANCHOR, ManualClock(), NULL_SINK))
        assert [damage.object for damage in found.damage] == [entry_name(at)]
        assert found.lost
        assert set(found.state.packs) == {pack(f"pack{number}") for number in range(count) if number != at - 1}


@pytest.mark.parametrize("keys", [None, KEYS], ids=["plain", "sealed"])
@pytest.mark.parametrize("count", [4, 20])
def test_a_missing_entry_is_called_missing(count: int, keys: seal.Keys | None) -> None:
    store = MemoryStore()
    fill(store, count, keys)
    store.delete(entry_name(2))
    with pytest.raises(Corrupt, match="log entry 2 is missing"):
        open_log(store, keys)
    found = walk(store, Log(store, keys, ANCHOR, ManualClock(), NULL_SINK))
    assert [damage.object for damage in found.damage] == [entry_name(2)]
    assert len(found.state.packs) == count - 1


def test_a_huge_number_costs_no_time() -> None:
    store = MemoryStore()
    fill(store, 2)
    store.put("log/99999999999999999999", [store.get(entry_name(2))])
    with pytest.raises(Corrupt, match="log entry 3 is missing"):
        open_log(store)
    assert len(walk(store, Log(store, None, ANCHOR, ManualClock(), NULL_SINK)).damage) == 2


def test_foreign_objects_among_the_entries_are_no_entries() -> None:
    store = MemoryStore()
    fill(store, 2)
    store.put("log/README", [b"hello"])
    assert open_log(store).state.seq == 2


@pytest.mark.parametrize("keys", [None, KEYS], ids=["plain", "sealed"])
def test_swapped_entries_are_both_named(keys: seal.Keys | None) -> None:
    store = MemoryStore()
    fill(store, 5, keys)
    second, third = store.get(entry_name(2)), store.get(entry_name(3))
    store.put(entry_name(2), [third])
    store.put(entry_name(3), [second])
    with pytest.raises(Corrupt, match=r"log/0*2 "):
        open_log(store, keys)
    found = walk(store, Log(store, keys, ANCHOR, ManualClock(), NULL_SINK))
    assert [damage.object for damage in found.damage] == [entry_name(2), entry_name(3)]


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_whole_entry_of_another_history_breaks_the_chain_and_is_named(at: int) -> None:
    store, foreign = MemoryStore(), MemoryStore()
    fill(store, 5)
    other = Log(foreign, None, "0e" * 32, ManualClock(5), NULL_SINK)
    for number in range(5):
        other.append(PACKS, body(f"foreign{number}"))
    store.put(entry_name(at), [foreign.get(entry_name(at))])
    with pytest.raises(Corrupt, match="does not chain"):
        open_log(store)
    found = walk(store, Log(store, None, ANCHOR, ManualClock(), NULL_SINK))
    assert [damage.object for damage in found.damage] == [entry_name(at)]
    assert not any(bytes.fromhex(name).startswith(b"foreign") for name in found.state.packs)


def test_a_replaced_format_is_blamed_and_not_the_entries() -> None:
    store = MemoryStore()
    mine = fill(store, 3)
    found = walk(store, Log(store, None, "00" * 32, ManualClock(), NULL_SINK))
    assert [damage.object for damage in found.damage] == ["format"]
    assert found.state.packs == mine.state.packs


@pytest.mark.parametrize("keys", [None, KEYS], ids=["plain", "sealed"])
def test_a_state_saves_reading_and_a_damaged_one_costs_nothing(keys: seal.Keys | None) -> None:
    store = MemoryStore()
    mine = fill(store, log.STATE_EVERY, keys)
    mine.save_state()
    [info] = store.list("state/")
    data = store.get(info.name)
    assert open_log(store, keys).state == mine.state
    assert walk(store, mine).damage == []
    for at in range(0, len(data), max(1, len(data) // 60)):
        damaged = bytearray(data)
        damaged[at] ^= 1
        store.put(info.name, [bytes(damaged)])
        sink = ListSink()
        again = Log(store, keys, ANCHOR, ManualClock(), sink)
        again.load()
        assert again.state == mine.state
        assert [event.kind for event in sink.events] == ["state.ignored"]
        found = walk(store, again)
        assert [damage.object for damage in found.damage] == [info.name]
        assert "costs nothing" in found.damage[0].problem
        assert found.state == mine.state


def test_a_state_that_lies_is_found_out_by_folding() -> None:
    store = MemoryStore()
    mine = fill(store, log.STATE_EVERY)
    mine.state.packs[pack("invented")] = PackRef(pack("invented"), 1, 1)
    mine.save_state()
    found = walk(store, open_log(store))
    assert [damage.object for damage in found.damage] == [f"state/{log.STATE_EVERY:020d}"]
    assert pack("invented") not in found.state.packs


def test_a_state_under_another_number_is_not_used() -> None:
    store = MemoryStore()
    mine = fill(store, log.STATE_EVERY)
    mine.save_state()
    [info] = store.list("state/")
    store.put(f"state/{3:020d}", [store.get(info.name)])
    store.delete(info.name)
    assert [damage.object for damage in walk(store, open_log(store)).damage] == [f"state/{3:020d}"]


def test_a_state_stands_in_for_entries_that_were_lost_before_it() -> None:
    store = MemoryStore()
    mine = fill(store, log.STATE_EVERY)
    mine.save_state()
    mine.append(PACKS, body("after"))
    store.put(entry_name(7), [b"rubbish"])
    assert open_log(store).state == mine.state
    found = walk(store, open_log(store))
    assert [damage.object for damage in found.damage] == [entry_name(7)]
    assert found.state == mine.state
    assert not found.lost


def test_an_unreadable_body_is_named_and_later_kinds_are_let_through() -> None:
    store = MemoryStore()
    mine = fill(store, 1)
    mine.append("a kind of the future", lambda state: {"anything": [1, 2]})
    assert open_log(store).state.seq == 2
    entry = records.LogEntry(3, "", mine.state.head_hash, "", "", PACKS, {"packs": [{"name": 5}]})
    store.put(entry_name(3), [records.canonical_object(entry)])
    with pytest.raises(Corrupt, match="log entry 3"):
        open_log(store)
    assert [damage.object for damage in walk(store, mine).damage] == [entry_name(3)]


@pytest.mark.parametrize(
    ("kind", "forged"),
    [
        ("packs", {"packs": [{"name": "../../x", "bytes": 1, "chunks": 1}]}),
        ("packs", {"packs": [{"name": "a" * 64, "bytes": -1, "chunks": 1}]}),
        ("condemn", {"packs": [{"name": "", "bytes": 1, "chunks": 1}]}),
        ("snapshot", {"snapshot": {"id": "../../../home", "kind": "backup", "name": "x", "time": ""}}),
        (
            "snapshot",
            {"snapshot": {"id": "a" * 32, "kind": "backup", "name": "x", "time": "", "manifest": [["zz", 1]]}},
        ),
        ("key", {"action": "rotate", "slot": "../x", "epoch": 2}),
        ("key", {"action": "rotate", "slot": "", "epoch": 1 << 40}),
        ("sweep", {"packs": 5}),
    ],
)
def test_names_that_could_lead_elsewhere_are_never_folded(kind: str, forged: dict[str, Any]) -> None:
    entry = records.LogEntry(1, "", "", "", "", kind, forged)
    with pytest.raises(Corrupt):
        State(0, "").apply(entry, "")


def test_a_sweep_takes_only_what_was_condemned() -> None:
    store = MemoryStore()
    mine = open_log(store)
    mine.append(PACKS, body("live"))
    mine.append("sweep", lambda state: {"packs": [pack("live")]})
    assert pack("live") in mine.state.packs
    assert mine.swept == set()
