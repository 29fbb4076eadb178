"""Repositories of every format version ever released open, check and restore."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from make import PASSPHRASE, contents

from outlast import rescue
from outlast.backup import restore
from outlast.backup.tensors import restore_tensors
from outlast.repo.check import check
from outlast.repo.repository import Repository
from outlast.store.local import LocalStore

HERE = Path(__file__).parent


@pytest.mark.parametrize("kind", ["plain", "encrypted"])
@pytest.mark.parametrize("version", sorted(path.name for path in HERE.glob("v*")))
def test_an_old_repository_is_read_for_ever(version: str, kind: str, tmp_path: Path) -> None:
    shutil.copytree(HERE / version / kind, tmp_path / "repo")
    repository = Repository.open(LocalStore(str(tmp_path / "repo")), secret=lambda: PASSPHRASE)
    report = check(repository, data="all")
    assert (report.ok, report.snapshots, report.damaged) == (True, 2, [])
    golden = repository.find_snapshot("latest", "golden")
    assert golden.tags == {"step": "1"}
    done = restore.execute(repository, restore.plan(repository, golden, str(tmp_path / "target")))
    assert done.verified
    expected = json.loads((HERE / version / "contents.json").read_text())
    assert contents(tmp_path / "target") == expected
    assert (tmp_path / "target" / "link").readlink() == Path("model.pt")
    assert (tmp_path / "target" / "same.txt").stat().st_nlink == 2
    assert (tmp_path / "target" / "model.pt").stat().st_mtime_ns == 1_700_000_000_123_456_789
    restore_tensors(repository, golden, ["embed.weight"], str(tmp_path / "one.safetensors"))
    assert (tmp_path / "one.safetensors").stat().st_size > 64 * 96 * 4


@pytest.mark.parametrize("version", sorted(path.parent.name for path in HERE.glob("v*/sums")))
def test_old_sums_are_read_for_ever(version: str, tmp_path: Path) -> None:
    shutil.copytree(HERE / version / "sums", tmp_path / "repo")
    repository = Repository.open(LocalStore(str(tmp_path / "repo")), secret=lambda: PASSPHRASE)
    assert check(repository, data="all").ok
    expected = json.loads((HERE / version / "sums.json").read_text())
    lengths = set()
    for number, snapshot in enumerate(repository.snapshots()):
        lengths |= {len(parts) for entry in repository.entries(snapshot) for _, _, parts in entry.sums}
        done = restore.execute(repository, restore.plan(repository, snapshot, str(tmp_path / str(number))))
        assert done.verified
        ran = subprocess.run(
            [sys.executable, rescue.__file__, str(tmp_path / "repo"), snapshot.id, str(tmp_path / f"rescued{number}")],
            env={"OUTLAST_PASSPHRASE": PASSPHRASE.decode()},
            capture_output=True,
        )
        assert ran.returncode == 0, ran.stderr
        for way in (str(number), f"rescued{number}"):
            found = hashlib.sha256((tmp_path / way / "model.safetensors").read_bytes()).hexdigest()
            assert found == expected[number]
    assert lengths == {2, 3, 4}
