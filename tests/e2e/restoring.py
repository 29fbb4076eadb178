"""What the tests of restore work with: a folder to back up, a repository, and the two steps."""

from __future__ import annotations

import os
import random  # noqa: TID251  seeded
from pathlib import Path
from typing import Any

from outlast.backup import restore
from outlast.backup.create import create
from outlast.records import Chunking, Entry, Snapshot
from outlast.repo.repository import Repository
from outlast.store.local import LocalStore

SMALL = Chunking(block_bytes=4096, min_bytes=1024, avg_bytes=4096, max_bytes=16384)
TIME_NS = 1_600_000_000_123_456_789


def small_repository(path: Path) -> Repository:
    """With chunks so small that a few files have many, and packs so small that there are several."""
    return Repository.create(LocalStore(str(path)), chunking=SMALL, pack_bytes=256 << 10)


def make_source(root: Path) -> Path:
    """A folder with everything that a restore must bring back."""
    (root / "deep" / "er").mkdir(parents=True)
    (root / "empty").mkdir(mode=0o750)
    rng = random.Random(1)
    (root / "big.bin").write_bytes(rng.randbytes(300_000))
    (root / "deep" / "er" / "mid.bin").write_bytes(rng.randbytes(40_000))
    (root / "small.txt").write_bytes(b"small")
    (root / "nothing").write_bytes(b"")
    (root / "zeros").write_bytes(bytes(100_000))
    (root / os.fsdecode(b"odd\n\xff%41 name")).write_bytes(b"odd")
    (root / "secret").write_bytes(b"secret")
    (root / "secret").chmod(0o400)
    (root / "link").symlink_to("../outside")
    (root / "dangling").symlink_to("/nowhere/at/all")
    os.link(root / "big.bin", root / "deep" / "same.bin")
    os.mkfifo(root / "pipe", 0o620)
    with (root / "sparse").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"island")
        file.truncate(3 << 20)
    (root / "empty").chmod(0o555)
    for parent, _, files in os.walk(root, topdown=False):
        for name in files:
            os.utime(os.path.join(parent, name), ns=(TIME_NS, TIME_NS), follow_symlinks=False)
        os.utime(parent, ns=(TIME_NS + 1, TIME_NS + 1))
    return root


def occupied(folder: Path) -> Path:
    """A target that a restore has to replace."""
    target = folder / "target"
    target.mkdir()
    (target / "old").write_bytes(b"old")
    return target


def back_up(repository: Repository, *sources: Path) -> Snapshot:
    return repository.find_snapshot(create(repository, [os.fsencode(each) for each in sources]).snapshot)


def run(repository: Repository, snapshot: Snapshot, target: Path, **options: Any) -> restore.RestoreReport:
    return restore.execute(repository, restore.plan(repository, snapshot, os.fsencode(target), **options))


def beside(target: Path) -> list[str]:
    """What lies beside the target and has to do with it, hidden or not."""
    return sorted(name for name in os.listdir(target.parent) if target.name in name and name != target.name)


def by_hand(repository: Repository, *entries: Entry) -> Snapshot:
    """A snapshot with a manifest that no backup would write."""
    writer = repository.writer()
    for entry in entries:
        writer.add_entry(entry)
    return writer.commit(Snapshot("", "backup", "by hand", "2026-01-01T00:00:00.000000Z"))
