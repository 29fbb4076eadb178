"""`check --repair`: what can be had is stored again, damage is quarantined, what is lost is named to the tensor."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from shell import PASSPHRASE, Shell
from trees import content, entries

from outlast.backup.create import create
from outlast.backup.origin import FolderOrigin, RepositoryOrigin
from outlast.backup.repair import RepairReport, repair
from outlast.errors import Corrupt, Refused
from outlast.records import Chunking
from outlast.repo import log, pack, seal, write
from outlast.repo.check import open_and_check
from outlast.repo.log import entry_name
from outlast.repo.repair import Origin
from outlast.repo.repository import Repository
from outlast.repo.state import VERIFIED
from outlast.store.layers import ReadOnlyStore
from outlast.store.memory import MemoryStore

CHUNKING = Chunking(block_bytes=16 << 10, min_bytes=4 << 10, avg_bytes=16 << 10, max_bytes=64 << 10)
TENSOR_BYTES = 200_000


@pytest.fixture(autouse=True)
def cheap_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, "ARGON2_MEMORY_KIB", 64)
    monkeypatch.setattr(seal, "ARGON2_ITERATIONS", 1)


def secret() -> bytes:
    return PASSPHRASE.encode()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(7)
    tensors = {f"layer{number}": rng.integers(0, 256, TENSOR_BYTES, np.uint8) for number in range(3)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "sub" / "noise.bin").write_bytes(rng.bytes(150_000))
    (folder / "notes.txt").write_text("all work and no play\n" * 900)
    return folder


def made(folder: Path, *, encrypted: bool = False, pack_bytes: int = 100_000) -> MemoryStore:
    store = MemoryStore()
    repository = Repository.create(
        store, secret=secret if encrypted else None, chunking=CHUNKING, pack_bytes=pack_bytes
    )
    create(repository, [str(folder)], name="model")
    return store


def connect(store: Any) -> Repository:
    return Repository.connect(store, secret=secret)


def mend(store: Any, origin: Origin | None = None, **options: Any) -> RepairReport:
    return repair(connect(store), origin=origin, **options)


def holder(store: MemoryStore, path: str, offset: int) -> tuple[str, int]:
    """(object, offset in it) of the chunk that a file has there."""
    repository = Repository.open(store, secret=secret)
    entry, at = entries(repository)[path], 0
    for chunk, length in entry.chunks:
        if at + length > offset:
            place = repository.locate(bytes.fromhex(chunk))
            return f"packs/{place.pack.name[:2]}/{place.pack.name}", place.offset
        at += length
    raise AssertionError(path)


def spoil(store: MemoryStore, name: str, at: int) -> None:
    data = bytearray(store.get(name))
    data[at] ^= 0x40
    store.put(name, [bytes(data)])


def assert_whole(store: MemoryStore, folder: Path) -> None:
    repository = Repository.open(store, secret=secret)
    for snapshot in repository.snapshots():
        for entry in repository.entries(snapshot):
            if entry.type == "file":
                assert content(repository, entry) == (folder / entry.path).read_bytes()
    report = open_and_check(store, secret=secret, data="all")
    assert report.ok, report.damaged


def names(store: MemoryStore) -> set[str]:
    return {info.name for info in store.list("")}


def assert_only_recorded(store: MemoryStore, before: set[str]) -> None:
    """Nothing was written but the one entry that says what was read."""
    [name] = names(store) - before
    entry = Repository.open(store, secret=secret).log.parse(store.get(name), int(name.removeprefix("log/")))
    assert entry.kind == VERIFIED


@pytest.mark.parametrize("encrypted", [False, True])
def test_what_else_a_damaged_pack_holds_is_stored_again_and_the_rest_comes_from_the_folder(
    source: Path, encrypted: bool
) -> None:
    store = made(source, encrypted=encrypted)
    name, at = holder(store, "model.safetensors", 300_000)
    spoil(store, name, at + 5)
    before = names(store)
    objects = {each: store.get(each) for each in before}
    report = mend(store, FolderOrigin(os.fsencode(source)))
    assert report.ok, report
    assert (report.chunks_found, report.lost) == (1, [])
    assert report.chunks_rescued > 0
    assert report.quarantined == [name.rpartition("/")[2]]
    assert {each: store.get(each) for each in before} == objects, "nothing is edited and nothing deleted"
    assert_whole(store, source)
    after = names(store)
    again = mend(store, FolderOrigin(os.fsencode(source)))
    assert again.ok
    assert_only_recorded(store, after)


def damages() -> dict[str, Callable[[MemoryStore, str], None]]:
    def cut(store: MemoryStore, name: str) -> None:
        store.put(name, [store.get(name)[:-1000]])

    def more(store: MemoryStore, name: str) -> None:
        store.put(name, [store.get(name) + b"x"])

    return {
        "header": lambda store, name: spoil(store, name, 3),
        "footer": lambda store, name: spoil(store, name, len(store.get(name)) - 60),
        "cut": cut,
        "more": more,
        "missing": lambda store, name: store.delete(name),
        "zero": lambda store, name: store.put(name, [bytes(len(store.get(name)))]),
    }


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("how", damages())
def test_whatever_is_wrong_with_a_pack(source: Path, how: str, indexed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if indexed:
        monkeypatch.setattr(write, "SEGMENT_PACKS", 2)
    store = made(source)
    assert bool(list(store.list("index/"))) == indexed
    name, _ = holder(store, "sub/noise.bin", 0)
    damages()[how](store, name)
    report = mend(store, FolderOrigin(os.fsencode(source)))
    assert report.ok, report.check.damaged
    if how in ("header", "more") or (how == "footer" and indexed):
        assert report.chunks_found == 0, "every chunk can still be read"
    assert_whole(store, source)


@pytest.fixture
def few_chunks(tmp_path: Path) -> Path:
    folder = tmp_path / "few"
    folder.mkdir()
    (folder / "text").write_text("many a word, " * 700)
    for number in range(2):
        (folder / f"noise{number}").write_bytes(np.random.default_rng(number).bytes(3000))
    return folder


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_bit_in_the_footer_of_a_pack_costs_nothing(few_chunks: Path, encrypted: bool) -> None:
    """No index segment tells of the pack. A bit of each byte of the footer is flipped in turn."""
    whole = made(few_chunks, encrypted=encrypted, pack_bytes=4 << 20)
    objects = {name: whole.get(name) for name in names(whole)}
    [name] = [each for each in objects if each.startswith("packs/")]
    assert not list(whole.list("index/"))
    footer = pack.TRAILER.size + 4 * pack.RECORD.itemsize
    for at in range(1, footer + 1):
        store = MemoryStore()
        for each, data in objects.items():
            store.put(each, [data])
        changed = bytearray(objects[name])
        changed[-at] ^= 1 << (at * 5 % 8)
        store.put(name, [bytes(changed)])
        report = mend(store)
        assert report.ok, (at, report)
        assert report.quarantined == [name.rpartition("/")[2]]
        assert report.chunks_rescued == 4
        store.delete(name)
        assert_whole(store, few_chunks)


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("which", range(4))
def test_of_a_record_that_is_beyond_mending_the_file_or_the_snapshot_is_named(
    few_chunks: Path, which: int, encrypted: bool
) -> None:
    store = made(few_chunks, encrypted=encrypted, pack_bytes=4 << 20)
    [info] = store.list("packs/")
    repository = Repository.open(store, secret=secret)
    [snapshot] = repository.snapshots()
    footer = repository.read_footer(repository.state.packs[info.name.rpartition("/")[2]])
    hurt, found = footer.records["id"].tolist()[which], entries(repository)
    at = info.size_bytes - pack.TRAILER.size - (4 - which) * pack.RECORD.itemsize
    spoil(store, info.name, at + 3)
    spoil(store, info.name, at + 20)
    spoil(store, info.name, at + 76)
    report = mend(store)
    [damage] = report.check.damaged
    assert damage.object == info.name
    assert report.chunks_lost == 1
    if hurt.hex() == snapshot.manifest[0][0]:
        assert [each.id for each in report.check.unlisted] == [snapshot.id]
        return
    [path] = [path for path, entry in found.items() if hurt.hex() in {ref[0] for ref in entry.chunks}]
    assert damage.files == [path] == [lost.path for lost in report.lost]
    assert report.chunks_rescued == 3
    store.delete(info.name)
    left = Repository.open(store, secret=secret)
    for path, entry in found.items():
        if entry.type == "file" and path not in damage.files:
            assert content(left, entry) == (few_chunks / path).read_bytes()


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("how", ["trailer", "table", "header and trailer", "noise"])
def test_a_footer_of_which_little_is_left(few_chunks: Path, how: str, encrypted: bool) -> None:
    store = made(few_chunks, encrypted=encrypted, pack_bytes=4 << 20)
    [info] = store.list("packs/")
    data, noise = bytearray(store.get(info.name)), np.random.default_rng(5)
    table = 4 * pack.RECORD.itemsize
    if how in ("trailer", "header and trailer"):
        data[-pack.TRAILER.size :] = noise.bytes(pack.TRAILER.size)
    if how == "header and trailer":
        data[: pack.HEADER.size] = bytes(pack.HEADER.size)
    if how == "table":
        data[-pack.TRAILER.size - table : -pack.TRAILER.size] = noise.bytes(table)
    if how == "noise":
        data[:] = noise.bytes(len(data))
    store.put(info.name, [bytes(data)])
    report = mend(store)
    assert report.ok == (how == "trailer")
    if report.ok:
        assert_whole(store, few_chunks)
    else:
        assert len(report.check.unlisted) == 1


def test_every_pack_of_data_is_gone_and_another_repository_has_them_by_id(source: Path) -> None:
    store, other = made(source), made(source)
    for info in list(store.list("packs/")):
        store.delete(info.name)
    report = mend(store, RepositoryOrigin(Repository.open(other)))
    assert report.ok, report.check.damaged
    assert report.chunks_found > 30
    assert_whole(store, source)


def test_another_repository_with_other_ids_has_them_by_path(source: Path) -> None:
    store, other = made(source, encrypted=True), made(source)
    name, at = holder(store, "model.safetensors", 300_000)
    spoil(store, name, at + 5)
    report = mend(store, RepositoryOrigin(Repository.open(other)))
    assert (report.ok, report.chunks_found) == (True, 1)
    assert_whole(store, source)


def test_an_origin_that_has_other_bytes_there_is_not_believed(source: Path, tmp_path: Path) -> None:
    store = made(source)
    name, at = holder(store, "model.safetensors", 300_000)
    spoil(store, name, at + 5)
    wrong = tmp_path / "wrong"
    shutil.copytree(source, wrong)
    data = bytearray((wrong / "model.safetensors").read_bytes())
    data[200_000:500_000] = bytes(300_000)
    (wrong / "model.safetensors").write_bytes(data)
    (wrong / "notes.txt").unlink()
    (wrong / "notes.txt").symlink_to(source / "notes.txt")
    for origin in (FolderOrigin(os.fsencode(wrong)), RepositoryOrigin(Repository.open(made(wrong)))):
        report = mend(store, origin)
        assert (report.ok, report.chunks_found, report.chunks_lost) == (False, 0, 1)
    assert mend(store, FolderOrigin(os.fsencode(source))).ok, "a later repair still mends it"
    assert_whole(store, source)


def test_a_folder_is_read_with_and_without_the_name_of_the_source(source: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "file").write_bytes(b"more" * 5000)
    for origin in (source, tmp_path):
        store = MemoryStore()
        repository = Repository.create(store, chunking=CHUNKING, pack_bytes=100_000)
        create(repository, [str(source), str(tmp_path / "more")])
        name, at = holder(store, "model/model.safetensors", 300_000)
        spoil(store, name, at + 5)
        assert mend(store, FolderOrigin(os.fsencode(origin))).ok
        assert_whole(store, tmp_path)


def test_what_is_beyond_repair_is_named_to_the_tensor(source: Path) -> None:
    store = made(source)
    create(Repository.open(store), [str(source)], name="again")
    name, at = holder(store, "model.safetensors", 300_000)
    spoil(store, name, at + 5)
    report = mend(store)
    [lost] = report.lost
    assert not report.ok
    assert lost.path == "model.safetensors"
    assert lost.snapshots == [snapshot.id for snapshot in Repository.open(store).snapshots()]
    assert (lost.tensors, lost.tensors_whole, lost.format) == (["layer1"], 2, "safetensors")
    assert (report.chunks_lost, report.bytes_lost) == (1, lost.bytes_lost)
    [damage] = report.check.damaged
    assert damage.object == name
    assert "quarantined" in damage.problem
    assert damage.files == ["model.safetensors"]
    before = names(store)
    again = mend(store)
    assert_only_recorded(store, before)
    assert (again.ok, again.chunks_lost, again.quarantined) == (False, 1, [])
    found = entries(Repository.open(store))
    assert content(Repository.open(store), found["sub/noise.bin"]) == (source / "sub" / "noise.bin").read_bytes()
    with pytest.raises(Corrupt):
        content(Repository.open(store), found["model.safetensors"])


def test_where_the_header_is_lost_no_tensor_can_be_told(source: Path) -> None:
    store = made(source)
    name, at = holder(store, "model.safetensors", 0)
    spoil(store, name, at)
    [lost] = mend(store).lost
    assert (lost.path, lost.tensors) == ("model.safetensors", None)
    assert "lost too" in lost.problem


def test_a_lost_manifest_comes_back_by_its_id_and_then_the_files_do(source: Path) -> None:
    store, other = made(source, pack_bytes=4 << 20), made(source)
    [info] = store.list("packs/")
    store.delete(info.name)
    assert not mend(store, FolderOrigin(os.fsencode(source))).ok, "a folder has no manifest"
    report = mend(store, RepositoryOrigin(Repository.open(other)))
    assert report.ok, report.check.damaged
    assert_whole(store, source)


@pytest.mark.parametrize("encrypted", [False, True])
def test_damaged_derived_objects_are_written_anew_and_told_no_more(
    source: Path, encrypted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "SEGMENT_PACKS", 2)
    monkeypatch.setattr(log, "STATE_EVERY", 2)
    store = made(source, encrypted=encrypted)
    (source / "later").write_bytes(os.urandom(50_000))
    create(Repository.open(store, secret=secret), [str(source)], name="model")
    damaged = [info.name for prefix in ("index/", "state/") for info in store.list(prefix)]
    assert {name.partition("/")[0] for name in damaged} == {"index", "state"}
    for name in damaged:
        spoil(store, name, 100)
    spoiled = {name: store.get(name) for name in damaged}
    report = mend(store)
    assert report.ok
    assert sorted(report.ignored) == sorted(damaged)
    assert report.segments == 1
    assert {name: store.get(name) for name in damaged} == spoiled
    read = Repository.open(store, secret=secret)
    told: list[str] = []
    monkeypatch.setattr(Repository, "read_footer", lambda self, ref: told.append(ref.name))
    read.load_index()
    assert told == [], "the new segment tells of every pack"
    monkeypatch.undo()
    before = names(store)
    assert mend(store).ok
    assert_only_recorded(store, before)


def test_nothing_is_written_where_the_log_is_damaged(source: Path) -> None:
    store = made(source)
    spoil(store, entry_name(1), 40)
    name = next(info.name for info in store.list("packs/"))
    spoil(store, name, 3)
    before = {each: store.get(each) for each in names(store)}
    report = mend(store, FolderOrigin(os.fsencode(source)))
    assert not report.ok
    assert "log" in report.refused
    assert {each: store.get(each) for each in names(store)} == before


def test_what_a_repair_read_is_recorded_and_nothing_else_is_written_where_nothing_is_damaged(source: Path) -> None:
    store = made(source)
    before = names(store)
    report = mend(store)
    assert report.ok
    assert (report.check.recorded, report.check.bytes_verified) == (True, report.check.bytes)
    assert_only_recorded(store, before)
    state = Repository.open(store).state
    assert state.verified.keys() == state.packs.keys()
    entries_before = names(store)
    assert not mend(store, data="none").check.recorded
    assert names(store) == entries_before


def test_a_repair_records_the_packs_that_it_wrote_and_read_and_not_those_that_are_damaged(source: Path) -> None:
    store = made(source)
    name, at = holder(store, "model.safetensors", 300_000)
    spoil(store, name, at + 5)
    assert mend(store, FolderOrigin(os.fsencode(source))).ok
    state = Repository.open(store).state
    assert state.verified.keys() == state.packs.keys()
    assert not state.damaged


def test_a_store_that_may_not_be_written_refuses(source: Path) -> None:
    store = made(source)
    spoil(store, next(info.name for info in store.list("packs/")), 3)
    with pytest.raises(Refused):
        mend(ReadOnlyStore(store))


def test_after_a_full_backup_healed_it_the_damaged_pack_is_quarantined(source: Path) -> None:
    store = made(source)
    name, at = holder(store, "model.safetensors", 300_000)
    spoil(store, name, at + 5)
    create(Repository.open(store), [str(source)], full=True)
    assert not open_and_check(store, data="all").ok
    report = mend(store)
    assert report.ok
    assert (report.chunks_found, len(report.quarantined)) == (0, 1)
    assert_whole(store, source)
    create(Repository.open(store), [str(source)])
    assert_whole(store, source)


def test_a_repair_that_is_cut_short_anywhere_leaves_all_as_good_as_before(source: Path) -> None:
    class Power(MemoryStore):
        left = 1 << 30

        def put_if_absent(self, name: str, parts: Any) -> None:
            if self.left <= 0:
                raise KeyboardInterrupt
            self.left -= 1
            super().put_if_absent(name, parts)

    def damaged() -> Power:
        store = Power()
        for each, data in objects.items():
            store.put(each, [data])
        return store

    objects = {info.name: sound.get(info.name) for sound in [made(source)] for info in sound.list("")}
    first = damaged()
    name, at = holder(first, "model.safetensors", 300_000)
    spoil(first, name, at + 5)
    objects[name] = first.get(name)
    last_lost = 1
    for writes in range(100):
        store = damaged()
        store.left = writes
        try:
            mend(store, FolderOrigin(os.fsencode(source)))
            break
        except KeyboardInterrupt:
            pass
        store.left = 1 << 30
        report = repair(connect(store))
        lost = report.chunks_lost
        assert lost <= last_lost, "never worse than one write before"
        last_lost = lost
        assert mend(store, FolderOrigin(os.fsencode(source))).ok
        assert_whole(store, source)
    assert 3 <= writes < 100
    assert last_lost == 0


def test_a_snapshot_that_comes_while_it_repairs_loses_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = made(source)
    name, at = holder(store, "model.safetensors", 300_000)
    spoil(store, name, at + 5)
    real = log.Log.append
    extra: list[str] = []

    def racing(self: log.Log, kind: str, make_body: Any) -> Any:
        if kind == "quarantine" and not extra:
            extra.append(create(Repository.open(store), [str(source)], name="beside", full=True).snapshot)
        return real(self, kind, make_body)

    monkeypatch.setattr(log.Log, "append", racing)
    assert mend(store, FolderOrigin(os.fsencode(source))).ok
    assert extra
    assert_whole(store, source)


def test_the_command_repairs_and_says_what_it_did(filled: Shell) -> None:
    shell = filled
    [pack] = (shell.folder / "repo" / "packs").rglob("??/*")
    os.chmod(pack, 0o600)
    data = bytearray(pack.read_bytes())
    data[100] ^= 1
    pack.write_bytes(data)
    lost = shell("check", "--repair", code=20)
    assert "Beyond repair so far: 1 chunk" in lost.out
    assert "Lost: " in lost.out
    assert "tensors: " in lost.out or "model.safetensors" not in lost.out
    assert shell("check", "--repair", "--json", code=20).json["lost"][0]["bytes_lost"] > 0
    done = shell("check", "--repair", "--from", "model")
    assert "Stored again, from" in done.out
    assert "No damage found" in done.out
    assert shell("check", "--data", "all", "--json").json["quarantined_packs"] == 1
    assert "Nothing was to be repaired." in shell("check", "--repair").out
    shell("restore", "latest", "--to", "out")
    for path in ("model.safetensors", "config.json", "tab\there"):
        assert (shell.folder / "out" / path).read_bytes() == (shell.folder / "model" / path).read_bytes()
    assert "--from goes with --repair" in shell("check", "--from", "model", code=2).err
    assert "is the repository that is to be repaired" in shell("check", "--repair", "--from", "repo", code=2).err
    assert "neither a repository nor a folder" in shell("check", "--repair", "--from", "nothing", code=2).err


def test_a_pack_that_is_gone_is_told_of_once_and_the_snapshot_that_it_costs_is_named(filled: Shell) -> None:
    shell = filled
    [snapshot] = shell("snapshots", "--json").json
    [pack] = (shell.folder / "repo" / "packs").rglob("??/*")
    kept = pack.read_bytes()
    pack.unlink()
    for arguments in (["check"], ["check", "--repair"], ["check"]):
        told = shell(*arguments, code=20).out
        assert told.lower().count("missing") == 1, told
        assert told.count(pack.name) == 1, told
        assert "quarantined" not in told
        assert f"Snapshot {snapshot['id'][:8]} of " in told
        assert "can't be restored whole: its list of files is damaged" in told
    [unlisted] = shell("check", "--json", code=20).json["unlisted"]
    assert unlisted["id"] == snapshot["id"]
    pack.write_bytes(kept)
    assert shell("check", "--data", "all", "--json").json["quarantined_packs"] == 1
    assert "1 damaged pack" in shell("check").out


def test_a_pack_that_is_gone_and_is_mended_from_elsewhere_is_told_of_once(filled: Shell) -> None:
    shell = filled
    shutil.copytree(shell.folder / "repo", shell.folder / "twin")
    [pack] = (shell.folder / "repo" / "packs").rglob("??/*")
    pack.unlink()
    told = shell("check", "--repair", "--from", "twin").out
    assert told.count(f"Missing: packs/{pack.parent.name}/{pack.name}.") == 1
    assert told.lower().count("missing") == 1
    assert "No damage found" in told
