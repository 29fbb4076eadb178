"""A restore destroys nothing and believes nobody: what manifests lack, what others planted, what fails midway."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest
from restoring import TIME_NS, back_up, beside, by_hand, make_source, occupied, run, small_repository
from trees import describe

from outlast import errors
from outlast.backup import folder, restore, restore_plan, staging
from outlast.events import ListSink
from outlast.records import Entry, Snapshot
from outlast.repo.repository import Repository


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return small_repository(tmp_path / "repository")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "source")


# -- links without a file, and what only the target has -----------------------------------------------


def file_entry(repository: Repository, path: str, content: bytes) -> Entry:
    writer = repository.writer()
    ref = writer.add(writer.prepare(content, 1))
    writer.commit(Snapshot("", "backup", "content", "2026-01-01T00:00:00.000000Z"))
    return Entry(path=path, type="file", mode=0o644, size=len(content), chunks=[ref])


@pytest.mark.parametrize("merging", [False, True])
def test_a_link_to_what_could_not_be_read_is_left_out_and_the_rest_comes(
    repository: Repository, tmp_path: Path, merging: bool
) -> None:
    snapshot = by_hand(
        repository,
        Entry(path=".", type="dir", mode=0o755),
        Entry(path="a", type="unreadable", reason="Permission denied"),
        file_entry(repository, "b", b"content"),
        Entry(path="c", type="hardlink", target="a"),
        Entry(path="d", type="hardlink", target="b"),
        Entry(path="e", type="hardlink", target="c"),
    )
    target = tmp_path / "target"
    if merging:
        target.mkdir()
        (target / "c").write_bytes(b"mine")
    report = run(repository, snapshot, target, include=["*"] if merging else [])
    assert sorted(os.listdir(target)) == (["b", "c", "d"] if merging else ["b", "d"])
    assert (target / "b").samefile(target / "d") and (target / "d").read_bytes() == b"content"
    assert [each.path for each in report.skipped] == ["a", "c", "e"]
    assert "Permission denied" in report.skipped[1].reason
    actions: list[restore_plan.Action] = []
    included = ["*"] if merging else []
    again = restore.plan(repository, snapshot, os.fsencode(target), include=included, note=actions.append)
    assert again.unchanged and [action[3] for action in actions].count("skipped") == 3


@pytest.mark.parametrize("merging", [False, True])
def test_a_link_to_what_is_no_file_is_named_before_anything_is_replaced(
    repository: Repository, tmp_path: Path, merging: bool
) -> None:
    snapshot = by_hand(
        repository,
        Entry(path=".", type="dir", mode=0o755),
        Entry(path="a", type="dir", mode=0o755),
        file_entry(repository, "b", b"content"),
        Entry(path="c", type="hardlink", target="a"),
    )
    target = tmp_path / "target"
    target.mkdir()
    (target / "b").write_bytes(b"mine")
    with pytest.raises(errors.Corrupt, match=r"1 of 2 files can't be restored: c\."):
        run(repository, snapshot, target, include=["*"] if merging else [])
    assert os.listdir(target) == ["b"] and (target / "b").read_bytes() == b"mine"
    run(repository, snapshot, target, include=["b"])
    assert (target / "b").read_bytes() == b"content"


@pytest.mark.parametrize("links", [True, False])
def test_overwrite_destroys_nothing_that_the_snapshot_has_no_content_for(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    snapshot = by_hand(
        repository,
        Entry(path=".", type="dir", mode=0o755),
        file_entry(repository, "a", b"content"),
        Entry(path="deep", type="dir", mode=0o755),
        Entry(path="deep/locked", type="unreadable", reason="Permission denied"),
        Entry(path="folder", type="unreadable", reason="Permission denied"),
    )
    target = tmp_path / "target"
    (target / "deep").mkdir(parents=True)
    (target / "deep" / "locked").write_bytes(b"the only copy")
    (target / "folder" / "below").mkdir(parents=True)
    (target / "folder" / "below" / "file").write_bytes(b"only here")
    (target / "folder").chmod(0o750)
    (target / "stranger").write_bytes(b"goes")
    if not links:
        monkeypatch.setattr(staging, "_link", no_links)
    report = run(repository, snapshot, target, overwrite=True)
    place = target if links else Path(report.kept_as)
    assert (place / "deep" / "locked").read_bytes() == b"the only copy"
    assert (place / "folder" / "below" / "file").read_bytes() == b"only here"
    assert stat.S_IMODE((place / "folder").stat().st_mode) == 0o750
    assert (target / "a").read_bytes() == b"content" and not (target / "stranger").exists()
    assert (report.kept_as == "") is links
    assert beside(target) == ([] if links else [os.path.basename(report.kept_as)])


def no_links(*arguments: object) -> None:
    raise OSError(errno.EPERM, "no links here")


# -- what others may have planted ---------------------------------------------------------------------


def journal(staging_path: Path, old: Path, kept_as: str = "") -> bytes:
    found = old.stat()
    return msgspec.json.encode(
        restore._Journal(os.fsencode(staging_path).hex(), found.st_dev, found.st_ino, os.fsencode(kept_as).hex())
    )


def test_a_planted_journal_removes_and_moves_nothing(repository: Repository, source: Path, tmp_path: Path) -> None:
    snapshot = back_up(repository, source)
    precious = tmp_path / "precious"
    target, lock = tmp_path / "target", tmp_path / ".target.outlast-lock"
    mine = tmp_path / ".target.outlast-0123456789ab"
    repository.sink = sink = ListSink()
    for folder_named, kept_as in [
        (precious, ""),
        (mine, os.fspath(tmp_path / "elsewhere")),
        (mine, os.fspath(tmp_path / "x" / "target.before-20260101T000000Z")),
        (tmp_path / "target" / ".." / "precious", ""),
    ]:
        (folder_named if folder_named == mine else precious).mkdir(exist_ok=True)
        lock.write_bytes(journal(folder_named, folder_named, kept_as))
        lock.chmod(0o600)
        run(repository, snapshot, target)
        assert precious.is_dir() and not (tmp_path / "elsewhere").exists()
    assert mine.is_dir()
    assert [event.kind for event in sink.events].count("restore.journal.ignored") == 4
    lock.write_bytes(journal(mine, mine))
    lock.chmod(0o600)
    run(repository, snapshot, target)
    assert not mine.exists() and not lock.exists(), "one of its own is followed"


@pytest.mark.parametrize("how", ["writable", "link", "symlink", "folder", "owner"])
def test_a_lock_that_another_may_have_written_is_refused(
    repository: Repository, source: Path, tmp_path: Path, how: str
) -> None:
    snapshot = back_up(repository, source)
    lock, other = tmp_path / ".target.outlast-lock", tmp_path / "other"
    other.write_bytes(b"")
    other.chmod(0o600)
    if how == "link":
        os.link(other, lock)
    elif how == "symlink":
        lock.symlink_to(other)
    elif how == "folder":
        lock.mkdir()
    else:
        lock.write_bytes(b"")
        lock.chmod(0o620 if how == "writable" else 0o600)
    if how == "owner":
        if os.geteuid() != 0:
            pytest.skip("needs a second user")
        os.chown(lock, 1234, 1234)
    with pytest.raises(errors.Refused, match=r"target\.outlast-lock is in the way"):
        run(repository, snapshot, tmp_path / "target")
    assert lock.exists() and not (tmp_path / "target").exists()


# -- what a failure says ------------------------------------------------------------------------------


def test_a_failure_says_how_far_it_came(
    repository: Repository, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = back_up(repository, source)
    target = occupied(tmp_path)

    def denied(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(restore, "sync_everything", denied)
        with pytest.raises(errors.Refused, match=r"target is untouched\."):
            run(repository, snapshot, target)
    with monkeypatch.context() as patch:
        patch.setattr(restore, "merge", denied)
        with pytest.raises(errors.Refused, match=r"some are restored already, the others as they were") as caught:
            run(repository, snapshot, target, include=["small.txt"])
        assert "untouched" not in caught.value.message
    with monkeypatch.context() as patch:
        patch.setattr(restore, "_put_away", denied)
        repository.sink = sink = ListSink()
        report = run(repository, snapshot, target, overwrite=True)
    assert describe(target) == describe(source)
    assert os.listdir(report.kept_as) == ["old"]
    [warning] = [event for event in sink.events if event.kind == "restore.old.kept"]
    assert report.kept_as in warning.reason and "could not be removed" in warning.reason


def test_where_nothing_can_be_exchanged_a_failed_second_step_is_taken_back(
    repository: Repository, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = back_up(repository, source)
    target = occupied(tmp_path)
    rename = os.rename

    def failing(old: Any, new: Any, **named: Any) -> None:
        if new == os.fsencode(target) and b".outlast-" in old:
            raise OSError(errno.EACCES, "Permission denied")
        rename(old, new, **named)

    monkeypatch.setattr(folder, "_system", object)
    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(errors.Refused, match=r"target is as it was\."):
        run(repository, snapshot, target)
    assert os.listdir(target) == ["old"]


def test_a_hole_is_believed_only_where_the_system_says_so(
    repository: Repository, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = back_up(repository, source)
    target = tmp_path / "target"
    run(repository, snapshot, target)
    seek = os.lseek

    def without_holes(fd: int, at: int, how: int) -> int:
        if how == os.SEEK_DATA:
            raise OSError(errno.EINVAL, "no such call here")
        return seek(fd, at, how)

    monkeypatch.setattr(os, "lseek", without_holes)
    assert restore.plan(repository, snapshot, os.fsencode(target)).unchanged
    with (target / "sparse").open("r+b") as file:
        file.seek(2 << 20)
        file.write(b"junk where there should be zeros")
    os.utime(target / "sparse", ns=(TIME_NS, TIME_NS))
    assert not restore.plan(repository, snapshot, os.fsencode(target)).unchanged
    run(repository, snapshot, target)
    monkeypatch.undo()
    assert describe(target) == describe(source)


# -- what a swap would take with it -------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_plan_names_what_only_the_target_has(
    repository: Repository, source: Path, tmp_path: Path, overwrite: bool
) -> None:
    snapshot = back_up(repository, source)
    target = tmp_path / "target"
    run(repository, snapshot, target)
    (target / "deep" / "mine").write_bytes(b"mine")
    (target / "small.txt").unlink()
    (target / "hollow" / "inner").mkdir(parents=True)
    what = "removed" if overwrite else "moved away"
    actions: list[restore_plan.Action] = []
    path = os.fspath(target)
    plan = restore.plan(repository, snapshot, path, overwrite=overwrite, note=actions.append)
    extra = sorted(action for action in actions if action[3] == what)
    assert extra == [("deep/mine", 4, 0, what), ("hollow/inner", 0, 0, what)]
    assert (plan.extra_files, plan.extra_bytes) == (2, 4)
    actions.clear()
    part = restore.plan(repository, snapshot, path, include=["small.txt"], overwrite=overwrite, note=actions.append)
    assert (part.extra_files, [each[3] for each in actions]) == (0, ["new"]), "a merge removes nothing"


def test_where_no_folder_can_be_exchanged_it_is_said_and_nothing_is_lost(
    repository: Repository, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = back_up(repository, source)
    target = occupied(tmp_path)

    def refused(first: bytes, second: bytes) -> bool:
        raise OSError(errno.EXDEV, "Invalid cross-device link", second)

    with monkeypatch.context() as patch:
        patch.setattr(restore, "exchange", refused)
        with pytest.raises(errors.Refused, match="can't be replaced as a whole on this file system"):
            run(repository, snapshot, target)
    assert os.listdir(target) == ["old"]
    assert not any(name.endswith("-lock") for name in beside(target)), "no journal of a swap that never was"

    def interrupted(first: bytes, second: bytes) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(restore, "exchange", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(repository, snapshot, target)
    report = run(repository, snapshot, target)
    assert report.bytes_fetched == 0, "what was built is used"
    assert describe(target) == describe(source) and os.listdir(report.kept_as) == ["old"]
    assert beside(target) == [os.path.basename(report.kept_as)]


def test_an_empty_target_is_not_the_current_folder_and_a_replaced_one_is_said(
    repository: Repository, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back_up(repository, source)
    target = tmp_path / "target"
    (target / "inner").mkdir(parents=True)
    monkeypatch.chdir(target / "inner")
    with pytest.raises(errors.InvalidInput, match="the target is empty"):
        restore.plan(repository, "latest", "")
    repository.sink = sink = ListSink()
    restore.execute(repository, restore.plan(repository, "latest", ".."))
    [event] = [event for event in sink.events if event.kind == "restore.current_folder"]
    assert "cd ." in event.reason and describe(target) == describe(source)


@pytest.mark.parametrize("change", ["longer", "shorter"])
def test_what_is_right_of_a_file_of_another_size_is_not_fetched(
    repository: Repository, source: Path, tmp_path: Path, change: str
) -> None:
    snapshot = back_up(repository, source)
    target = tmp_path / "target"
    run(repository, snapshot, target)
    with (target / "big.bin").open("r+b") as file:
        file.truncate(400_000 if change == "longer" else 200_000)
    actions: list[restore_plan.Action] = []
    plan = restore.plan(repository, snapshot, os.fspath(target), note=actions.append)
    assert next(action for action in actions if action[0] == "big.bin")[3] == "repair"
    report = restore.execute(repository, plan)
    assert report.bytes_fetched == plan.bytes_to_fetch <= (0 if change == "longer" else 100_000 + 16384)
    assert describe(target) == describe(source)
