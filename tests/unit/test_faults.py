"""The stores that lie do so as told, and the model of the power cut promises no more than a disk does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from outlast.clock import ManualClock
from outlast.errors import Exists, NotFound, OutlastError, Refused, StoreFull, Unavailable
from outlast.store.layers import QuotaStore, RetryStore
from outlast.store.local import LocalStore
from outlast.store.memory import MemoryStore
from outlast.testing.faults import (
    FaultyStore,
    Harm,
    Recorder,
    SkewedStore,
    StaleListStore,
    damage,
    delay,
    error,
    flipped,
    garbled,
    holding,
    lost_reply,
    refusal,
    replay,
    shortened,
)
from outlast.testing.powercut import RecordingDisk, Remains, Step, Tree, cuts, materialise, read_tree


def names(store: MemoryStore | StaleListStore | FaultyStore) -> list[str]:
    return [info.name for info in store.list("")]


# -- recording ---------------------------------------------------------------------------------------


def test_any_prefix_can_be_replayed() -> None:
    recorder = Recorder(holding({"old": b"1", "gone": b"2"}))
    recorder.put_if_absent("a", [b"x", bytearray(b"y")])
    recorder.put("old", [b"3"])
    recorder.delete("gone")
    with pytest.raises(Exists):
        recorder.put_if_absent("a", [b"refused writes are none"])
    left = [replay(recorder.trace, count) for count in range(4)]
    assert [{name: store.get(name) for name in names(store)} for store in left] == [
        {"gone": b"2", "old": b"1"},
        {"a": b"xy", "gone": b"2", "old": b"1"},
        {"a": b"xy", "gone": b"2", "old": b"3"},
        {"a": b"xy", "old": b"3"},
    ]
    assert len(recorder.trace.mutations) == 3


# -- faults by script --------------------------------------------------------------------------------


def test_a_lost_reply_is_no_lost_write() -> None:
    store = FaultyStore(MemoryStore())
    store.script(lost_reply(), "put_if_absent", "log/")
    store.put_if_absent("packs/1", [b"met no fault"])
    with pytest.raises(Unavailable, match="reply"):
        store.put_if_absent("log/1", [b"entry"])
    assert store.get("log/1") == b"entry"
    with pytest.raises(Exists):
        store.put_if_absent("log/1", [b"entry"])
    assert store.struck == 1


def test_errors_come_as_often_as_told_and_only_where_told() -> None:
    store = FaultyStore(holding({"a/1": b"1", "b/1": b"2"}))
    store.script(error(), "get", "a/", skip=1, times=2)
    assert store.get("a/1") == b"1"
    for _ in range(2):
        with pytest.raises(Unavailable):
            store.get("a/1")
        assert store.get("b/1") == b"2"
        assert store.stat("a/1").size_bytes == 1
    assert store.get("a/1") == b"1"


def test_retries_come_through_a_storm_and_take_their_time() -> None:
    clock = ManualClock()
    faulty = FaultyStore(MemoryStore(), clock)
    faulty.script(error(), "*", times=2)
    faulty.script(lost_reply(), "put_if_absent", times=1)
    faulty.script(delay(5), "*", times=1)
    store = RetryStore(faulty, base_seconds=0.01, clock=clock)
    store.put_if_absent("name", [b"bytes"])
    assert store.get("name") == b"bytes"
    assert faulty.struck == 4
    assert clock.monotonic_seconds() >= 5


REFUSALS = [
    *[(status, Unavailable) for status in (409, 412, 429, 500, 503)],
    (403, Refused),
    (404, NotFound),
    (507, StoreFull),
]


@pytest.mark.parametrize(("status", "kind"), REFUSALS)
def test_refusals_are_what_the_cloud_store_makes_of_them(status: int, kind: type[OutlastError]) -> None:
    store = FaultyStore(MemoryStore())
    store.script(refusal(status), "put_if_absent")
    with pytest.raises(kind, match=str(status)) as caught:
        store.put_if_absent("name", [b"bytes"])
    assert type(caught.value) is kind
    assert names(store) == []


def test_a_refused_create_is_settled_by_reading_back() -> None:
    store = FaultyStore(holding({"ours": b"bytes", "theirs": b"other bytes"}))
    store.script(refusal(412), "put_if_absent", times=2)
    store.put_if_absent("ours", [b"by", b"tes"])
    with pytest.raises(Exists):
        store.put_if_absent("theirs", [b"bytes"])


@pytest.mark.parametrize("effect", [shortened, garbled, flipped])
def test_reads_are_wrong_once_and_then_right(effect: Callable[[], object]) -> None:
    content = ManualClock(seed=3).random_bytes(1000)
    store = FaultyStore(holding({"packs/1": content}), ManualClock(seed=4))
    store.script(effect(), "get", "packs/")  # type: ignore[arg-type]
    store.script(effect(), "get_ranges", "packs/")  # type: ignore[arg-type]
    wrong, [wrong_range] = store.get("packs/1"), store.get_ranges("packs/1", [(0, 1000)])
    assert wrong != content != wrong_range
    assert len(wrong) == (500 if effect is shortened else 1000)
    if effect is flipped:
        assert sum((a ^ b).bit_count() for a, b in zip(wrong, content, strict=True)) == 1
    assert store.get("packs/1") == content == store.get_ranges("packs/1", [(0, 1000)])[0]


def test_the_same_seed_tells_the_same_lies() -> None:
    stores = [FaultyStore(holding({"a": bytes(100)}), ManualClock(seed=seed)) for seed in (1, 1, 2)]
    for store in stores:
        store.script(garbled(), "get")
    first, second, third = (store.get("a") for store in stores)
    assert first == second != third


def test_a_listing_fails_too() -> None:
    store = FaultyStore(holding({"a": b""}))
    store.script(error(), "list")
    with pytest.raises(Unavailable):
        names(store)
    assert names(store) == ["a"]


def test_mapped_files_do_not_pass_the_faults_by(tmp_path: Path) -> None:
    assert not FaultyStore(LocalStore(str(tmp_path))).capabilities.memory_map


# -- other layers ------------------------------------------------------------------------------------


def test_a_stale_listing_catches_up() -> None:
    clock = ManualClock()
    store = StaleListStore(holding({"a": b"", "b": b""}), 60, clock)
    store.put_if_absent("c", [b""])
    store.delete("b")
    store.put("a", [b"longer"])
    assert names(store) == ["a", "b"]
    assert [info.size_bytes for info in store.list("")] == [0, 0]
    assert store.get("c") == b"", "a read by name is never stale"
    clock.sleep(59)
    store.delete("c")
    store.put("b", [b"again"])
    assert names(store) == ["a", "b"]
    clock.sleep(2)
    assert [info.size_bytes for info in store.list("")] == [6, 0]
    clock.sleep(60)
    assert [info.size_bytes for info in store.list("")] == [6, 5]


def test_a_skewed_clock_is_wrong_everywhere() -> None:
    clock = ManualClock()
    store = SkewedStore(MemoryStore(clock=clock), -3600)
    store.put("a", [b""])
    assert store.stat("a").modified_seconds == clock.now_ns() / 1e9 - 3600
    assert [info.modified_seconds for info in store.list("")] == [clock.now_ns() / 1e9 - 3600]


def test_layers_stack() -> None:
    recorder = Recorder(QuotaStore(MemoryStore(), 10))
    store = FaultyStore(recorder)
    store.script(lost_reply(), "put")
    with pytest.raises(Unavailable):
        store.put("a", [b"12345678"])
    with pytest.raises(StoreFull):
        store.put("b", [b"12345678"])
    assert [mutation.name for mutation in recorder.trace.mutations] == ["a"]


@pytest.mark.parametrize("harm", ["flip", "truncate", "zero", "delete"])
def test_damage_at_rest_stays(harm: Harm) -> None:
    content = b"content" * 10
    store = holding({"a": content, "b": content})
    damage(store, "a", harm, ManualClock(seed=5))
    if harm == "delete":
        assert names(store) == ["b"]
    else:
        assert store.get("a") != content
        assert len(store.get("a")) == (35 if harm == "truncate" else 70)
    assert store.get("b") == content


# -- power cut ---------------------------------------------------------------------------------------


def outcomes(*steps: Step, initial: Tree | None = None) -> list[Tree]:
    remains = Remains(initial or {})
    for step in steps:
        remains.apply(step)
    found = list(remains.outcomes())
    assert len(found) == remains.count()
    assert all(extreme in found for extreme in remains.extremes())
    assert remains.sample(ManualClock(seed=6)) in found
    return found


CREATED = (Step("open_temp", "a", file=1), Step("write", file=1, data=b"1234"))


def test_bytes_without_fsync_may_be_lost_torn_or_zero() -> None:
    found = outcomes(*CREATED, Step("fsync_dir", ""))
    assert [tree["a"] for tree in found] == [b"", b"12", bytes(4), b"\0\x0034", b"1234"]


def test_fsync_of_a_file_says_nothing_about_its_name_nor_the_other_way_round() -> None:
    assert outcomes(*CREATED, Step("fsync_file", file=1)) == [{}, {"a": b"1234"}]
    assert outcomes(*CREATED, Step("fsync_file", file=1), Step("fsync_dir", "")) == [{"a": b"1234"}]


def test_only_what_came_after_the_last_fsync_is_at_risk() -> None:
    found = outcomes(
        *CREATED,
        Step("fsync_file", file=1),
        Step("fsync_dir", ""),
        Step("write", file=1, offset=4, data=b"56"),
    )
    assert [tree["a"] for tree in found] == [b"1234", b"12345", b"1234\0\0", b"1234\x006", b"123456"]
    assert [tree["a"] for tree in outcomes(*CREATED, Step("truncate", file=1, offset=2), Step("fsync_dir", ""))][
        -1
    ] == b"12"


def test_names_are_lost_one_by_one() -> None:
    start: Tree = {"a": b"1", "b": b"2"}
    found = outcomes(Step("unlink", "a"), Step("unlink", "b"), initial=start)
    assert sorted(map(sorted, found)) == [[], ["a"], ["a", "b"], ["b"]]
    assert outcomes(Step("unlink", "a"), Step("unlink", "b"), Step("fsync_dir", ""), initial=start) == [{}]


def test_a_rename_replaces_at_once() -> None:
    found = outcomes(Step("rename", "tmp/a", "b"), initial={"tmp": None, "tmp/a": b"new", "b": b"old"})
    assert {tree["b"] for tree in found} == {b"old", b"new"}, "there is never nothing"
    assert any("tmp/a" in tree for tree in found)


def test_what_is_in_a_lost_folder_is_lost() -> None:
    made = (Step("mkdir", "d"), Step("open_temp", "d/a", file=1), Step("fsync_file", file=1), Step("fsync_dir", "d"))
    assert outcomes(*made) == [{}, {"d": None, "d/a": b""}]


def test_a_name_that_was_used_twice_may_be_in_any_of_its_states() -> None:
    twice = (*CREATED, Step("fsync_file", file=1), Step("unlink", "a"), Step("open_temp", "a", file=2))
    assert outcomes(*twice, Step("write", file=2, data=b"9"), Step("fsync_file", file=2)) == [
        {},
        {"a": b"1234"},
        {"a": b"9"},
    ]


def test_a_recorded_store_plays_back_to_what_is_on_the_disk(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    disk = RecordingDisk(str(tmp_path / "disk"))
    store = LocalStore(f"{disk.folder}/store", clock=ManualClock(seed=8), disk=disk)
    store.put_if_absent("a/b", [bytes(2 << 20), b"and an odd end"])
    store.put("a/b", [b"over"])
    store.put("a/c", [b"more"])
    store.delete("a/c")
    store.put("a/d", [b"last"])
    last = [remains for _, remains in cuts(disk.initial, disk.trace)][-1]
    kept, lost = last.extremes()
    assert kept == read_tree(disk.folder)
    assert lost["store/a/b"] == b"over"
    assert "store/a/c" not in lost, "a deletion is durable"
    materialise(lost, str(tmp_path / "lost"))
    assert read_tree(str(tmp_path / "lost")) == lost
    assert [info.name for info in LocalStore(str(tmp_path / "lost" / "store")).list("")] == ["a/b", "a/d"]
