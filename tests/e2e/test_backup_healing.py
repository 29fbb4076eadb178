"""What a backup does about damage, names that move, limits of the system and stores that lie."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from trees import content, entries

from outlast import records
from outlast.backup import read, restore
from outlast.backup.create import create
from outlast.errors import Corrupt, InvalidInput, OutlastError, Refused, Unavailable
from outlast.events import ListSink
from outlast.records import Chunking
from outlast.repo.check import check
from outlast.repo.repository import Repository
from outlast.store.local import LocalStore
from outlast.store.memory import MemoryStore


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def damage(store: MemoryStore, name: str, at: int) -> None:
    data = bytearray(store.get(name))
    data[at : at + 64] = bytes(64)
    store.put(name, [data])


def test_a_full_backup_stores_damaged_chunks_again(source: Path) -> None:
    (source / "weights.bin").write_bytes(os.urandom(3_000_000))
    store = MemoryStore()
    create(Repository.create(store), source.as_posix())
    [pack] = list(store.list("packs/"))
    damage(store, pack.name, 1_000_000)
    assert not check(Repository.open(store), data="all").ok
    sink = ListSink()
    healing = Repository.open(store, sink=sink)
    create(healing, source.as_posix(), full=True)
    assert any(event.kind == "pack.damaged" for event in sink.events)
    again = Repository.open(store)
    for snapshot in again.snapshots():
        found = {entry.path: entry for entry in again.entries(snapshot)}
        assert content(again, found["weights.bin"]) == (source / "weights.bin").read_bytes()


def test_a_damaged_manifest_of_the_parent_does_not_stop_the_next_backup(source: Path) -> None:
    for number in range(50):
        (source / f"{number:02d}").write_bytes(os.urandom(5000))
    threading.Event().wait(0.05)
    store = MemoryStore()
    repository = Repository.create(store)
    create(repository, source.as_posix())
    location = repository.locate(bytes.fromhex(repository.find_snapshot("latest").manifest[0][0]))
    [pack] = list(store.list("packs/"))
    damage(store, pack.name, location.offset + 20)
    sink = ListSink()
    report = create(Repository.open(store, sink=sink), source.as_posix())
    assert report.files == 50
    assert [event.kind for event in sink.events if event.kind == "parent.damaged"]
    again = Repository.open(store)
    assert content(again, entries(again)["07"]) == (source / "07").read_bytes()


def test_a_name_that_moves_to_another_file_is_not_taken_for_a_link(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer replaces best.pt, until then a link to step.pt, while the backup runs."""
    (source / "best.pt").write_bytes(b"old" * 50_000)
    os.link(source / "best.pt", source / "step.pt")
    (source / "new").write_bytes(b"new" * 50_000)
    real = os.open

    def replace_first(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if os.fsencode(path).endswith(b"best.pt") and (source / "new").exists():
            os.replace(source / "new", source / "best.pt")
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(read.os, "open", replace_first)
    repository = Repository.create(MemoryStore())
    create(repository, source.as_posix())
    monkeypatch.undo()
    found = entries(repository)
    assert content(repository, found["step.pt"]) == b"old" * 50_000
    assert content(repository, found["best.pt"]) == b"new" * 50_000


def test_links_stay_links_when_nothing_has_changed(source: Path) -> None:
    (source / "a").write_bytes(os.urandom(100_000))
    for name in ("b", "c"):
        os.link(source / "a", source / name)
    threading.Event().wait(0.05)
    repository = Repository.create(MemoryStore())
    for _ in range(2):
        create(repository, source.as_posix())
        assert [(entry.type, entry.target) for entry in entries(repository).values()][1:] == [
            ("file", ""),
            ("hardlink", "a"),
            ("hardlink", "a"),
        ]


def test_more_large_files_than_this_process_may_open(source: Path) -> None:
    for number in range(300):
        (source / f"{number:03d}").write_bytes(os.urandom(read.SMALL_BYTES + 1))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        report = create(Repository.create(MemoryStore()), source.as_posix())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (report.files, report.unreadable) == (300, 0)


def test_chunks_that_readers_would_refuse_are_refused_at_once() -> None:
    with pytest.raises(InvalidInput, match="out of bounds"):
        Repository.create(MemoryStore(), chunking=Chunking(block_bytes=48 << 20))


class Overwriting(MemoryStore):
    """An S3 look-alike that does not know `If-None-Match`."""

    def put_if_absent(self, name: str, parts: Any) -> None:
        self.put(name, parts)


def test_a_store_that_overwrites_is_found_out_at_init() -> None:
    with pytest.raises(Refused, match="overwrites objects"):
        Repository.create(Overwriting())


def test_a_format_that_was_replaced_is_found_out_in_an_encrypted_repository(source: Path) -> None:
    (source / "a").write_text("a")
    store = MemoryStore()
    repository = Repository.create(store, secret=lambda: b"x")
    forged = msgspec.structs.replace(repository.format, compression="none")
    store.put("format", [records.canonical_object(forged)])
    with pytest.raises(Corrupt, match="not the one it was made with"):
        Repository.open(store, secret=lambda: b"x")


def test_the_cuts_of_an_encrypted_repository_are_its_own(source: Path) -> None:
    (source / "noise").write_bytes(os.urandom(6_000_000))
    cuts = []
    for _ in range(2):
        repository = Repository.create(MemoryStore(), secret=lambda: b"x")
        create(repository, source.as_posix())
        cuts.append([length for _, length in entries(repository)["noise"].chunks])
        assert repository.format.chunking.seed == 0
    assert cuts[0] != cuts[1]


class Failing(MemoryStore):
    """Refuses the commit for as long as `broken`."""

    broken = True

    def put_if_absent(self, name: str, parts: Any) -> None:
        if self.broken and name.startswith("log/"):
            raise Unavailable("the store is away.")
        super().put_if_absent(name, parts)


def test_packs_whose_commit_failed_are_offered_again(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from outlast.repo import log

    monkeypatch.setattr(log, "_APPEND_TRIES", 2)
    (source / "a").write_bytes(os.urandom(500_000))
    store = Failing()
    repository = Repository.create(store)
    tried: list[str] = []
    append: Callable[..., Any] = repository.log.append

    def heal_then_append(kind: str, body: Any) -> Any:
        tried.append(kind)
        store.broken = len(tried) == 1
        return append(kind, body)

    monkeypatch.setattr(repository.log, "append", heal_then_append)
    with pytest.raises(OutlastError, match="was not accepted"):
        create(repository, source.as_posix())
    assert tried == ["snapshot", "packs"]
    report = create(Repository.open(store), source.as_posix())
    assert report.bytes_added < 100_000, "what was uploaded is used"


def test_two_folders_of_one_name_keep_their_own_parents(tmp_path: Path) -> None:
    repository = Repository.create(MemoryStore())
    for place in ("x", "y"):
        (tmp_path / place / "run").mkdir(parents=True)
        (tmp_path / place / "run" / "file").write_text(place)
    snapshots = [create(repository, str(tmp_path / place / "run")).snapshot for place in ("x", "y", "x", "y")]
    parents = {snapshot.id: snapshot.parent for snapshot in repository.snapshots()}
    assert parents[snapshots[2]] == snapshots[0]
    assert parents[snapshots[3]] == snapshots[1]


def test_the_default_name_is_that_of_the_first_path(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).write_text(name)
    assert create(Repository.create(MemoryStore()), [str(tmp_path / "b"), str(tmp_path / "a")]).name == "b"


def test_many_new_chunks_are_folded_away_and_found(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from outlast.repo import index

    monkeypatch.setattr(index, "RECENT_MAX", 50)
    for number in range(500):
        (source / f"{number:03d}").write_bytes(os.urandom(3000))
    repository = Repository.create(LocalStore(str(tmp_path / "repo")), pack_bytes=1 << 17)
    create(repository, source.as_posix())
    assert create(repository, source.as_posix(), full=True).bytes_added < 200_000
    done = restore.execute(
        repository, restore.plan(repository, repository.find_snapshot("latest"), str(tmp_path / "target"))
    )
    assert done.files == 500


def test_files_that_lie_about_their_size_are_named(source: Path) -> None:
    repository = Repository.create(MemoryStore())
    report = create(repository, ["/proc/self/status", "/proc/meminfo"])
    assert (report.files, report.unreadable) == (0, 2)
    assert all("as its size says" in problem.reason for problem in report.problems)


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(InvalidInput, match="is empty"):
        create(Repository.create(MemoryStore()), [""])


def test_a_repository_is_not_made_among_other_files(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "model.pt").write_text("precious")
    with pytest.raises(Refused, match=r"is not empty \(model.pt is there\)"):
        Repository.create(LocalStore(str(tmp_path)))


@pytest.mark.parametrize(
    "line", [b"\n", b"[]\n", b"{\n", b'{"path":"\xff","type":"file"}\n', b"[" * 100_000 + b"\n", b'{"path":NaN}\n']
)
def test_a_manifest_that_makes_no_sense_is_corrupt(line: bytes) -> None:
    repository = Repository.create(MemoryStore())
    writer = repository.writer()
    writer._lines = [line]  # what no writer of ours writes
    snapshot = writer.commit(records.Snapshot(id="", kind="backup", name="n", time="2026-01-01T00:00:00.000000Z"))
    with pytest.raises(Corrupt, match="the manifest of snapshot"):
        list(repository.entries(snapshot))
