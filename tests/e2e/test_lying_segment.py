"""An index segment whose bytes have the right hash and say wrong things: only packs and the log are trusted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from test_repair import assert_whole, holder, made, mend, spoil
from trees import content, entries

from outlast.errors import Corrupt
from outlast.events import ListSink
from outlast.repo import index, prune, write
from outlast.repo.check import open_and_check
from outlast.repo.pack import RECORD, TRAILER, object_name
from outlast.repo.prune_plan import Policy
from outlast.repo.repository import Repository


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(7)
    (folder / "weights").write_bytes(rng.bytes(600_000))
    (folder / "sub" / "noise.bin").write_bytes(rng.bytes(150_000))
    (folder / "notes.txt").write_text("all work and no play\n" * 900)
    return folder


def lies() -> dict[str, Callable[[list[index.IndexedPack], Any], Any]]:
    def elsewhere(packs: list[index.IndexedPack], rows: Any) -> Any:
        rows["pack"] = (rows["pack"] + 1) % len(packs)
        return rows

    def change(field: str, value: int) -> Callable[[list[index.IndexedPack], Any], Any]:
        def changed(packs: list[index.IndexedPack], rows: Any) -> Any:
            rows[field] += value
            return rows

        return changed

    def one_pack(packs: list[index.IndexedPack], rows: Any) -> Any:
        rows["pack"] = rows["pack"][0]
        return rows

    def sealed(packs: list[index.IndexedPack], rows: Any) -> Any:
        packs[:] = [msgspec.structs.replace(each, encrypted=True, epoch=1) for each in packs]
        return rows

    return {
        "offset": change("offset", 100),
        "far away": change("offset", 1 << 40),
        "stored": change("stored", 5),
        "plain": change("plain", 1),
        "codec": change("codec", 3),
        "another pack": elsewhere,
        "one pack": one_pack,
        "left out": lambda packs, rows: rows[::3],
        "nothing": lambda packs, rows: rows[:0],
        "sealed": sealed,
    }


@pytest.mark.parametrize("how", lies())
def test_an_index_segment_that_lies_is_named_and_everything_is_read_all_the_same(
    source: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "SEGMENT_PACKS", 2)
    store = made(source)
    [info] = store.list("index/")
    packs, rows = index.read_segment(store.get(info.name), info.name.removeprefix("index/"), None)
    rows = lies()[how](packs, rows.copy())
    store.delete(info.name)
    data = index._encode_segment(packs, [rows])
    name = f"index/{index.segment_name(data, None)}"
    store.put(name, [data])
    sink = ListSink()
    repository = Repository.open(store, sink=sink)
    found = entries(repository)
    fetched: set[bytes] = set()
    wanted = {bytes.fromhex(ref[0]) for entry in found.values() for ref in entry.chunks}
    repository.fetch(wanted, lambda chunk, plain: fetched.add(chunk))
    assert fetched == wanted
    for entry in found.values():
        if entry.type == "file":
            assert content(Repository.open(store), entry) == (source / entry.path).read_bytes()
    [event] = [event for event in sink.events if event.kind == "index.wrong"]
    assert name in event.reason
    assert "check --repair" in event.reason
    damage = open_and_check(store).damaged
    assert [each.object for each in damage] == [name]
    assert "check --repair" in damage[0].problem
    assert mend(store).ok
    assert_whole(store, source)
    after = ListSink()
    content(Repository.open(store, sink=after), found["weights"])
    assert not after.events, "it is ignored from now on"


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("how", lies())
def test_a_prune_never_deletes_by_what_a_segment_says_alone(
    source: Path, how: str, damaged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where a footer that tells otherwise is `damaged`; and a repair goes by neither of them alone."""
    monkeypatch.setattr(write, "SEGMENT_PACKS", 2)
    store = made(source)
    [info] = store.list("index/")
    repository = Repository.open(store)
    manifest = repository.locate(bytes.fromhex(repository.snapshots()[0].manifest[0][0])).pack.name
    packs, rows = index.read_segment(store.get(info.name), info.name.removeprefix("index/"), None)
    true = rows[[packs[number].name == manifest for number in rows["pack"]]]
    rest = rows[[packs[number].name != manifest for number in rows["pack"]]]
    lying = lies()[how](packs, rest.copy())
    store.delete(info.name)
    data = index._encode_segment(packs, [true, lying])
    store.put(f"index/{index.segment_name(data, None)}", [data])
    if damaged:
        name = next(pack.name for pack in packs if pack.name != manifest)
        name = object_name(name)
        spoil(
            store, name, len(store.get(name)) - TRAILER.size - RECORD.itemsize + 40
        )  # a stored hash: no chunk is hurt
    everything = Policy(max_unused=0.0, max_delete=1.0, grace_seconds=0.0)
    for _ in range(2):
        with suppress(Corrupt):
            prune.prune(Repository.open(store), everything)
    if damaged:
        assert mend(store).ok
    else:
        for each in list(store.list("index/")):
            store.delete(each.name)
    assert_whole(store, source)


def test_a_chunk_that_is_damaged_is_no_reason_to_read_every_footer(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "SEGMENT_PACKS", 2)
    store = made(source)
    name, at = holder(store, "weights", 300_000)
    spoil(store, name, at + 5)
    repository, read, real = Repository.open(store), [], Repository.read_footer
    monkeypatch.setattr(Repository, "read_footer", lambda self, ref: (read.append(ref.name), real(self, ref))[1])
    for _ in range(2):
        with pytest.raises(Corrupt):
            content(repository, entries(repository)["weights"])
    assert read == [name.rpartition("/")[2]], "only its own, and that once"
