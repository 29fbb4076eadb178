"""Any folder comes back as it was: made-up trees, then the sizes that break programs."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trees import describe

from outlast.backup import restore
from outlast.backup.create import create
from outlast.records import Chunking
from outlast.repo.repository import Repository
from outlast.store.local import LocalStore

TREES = int(os.environ.get("OUTLAST_TREES", "200"))
SMALL = Chunking(block_bytes=4096, min_bytes=1024, avg_bytes=4096, max_bytes=16384)

names = st.one_of(
    st.sampled_from([b"a", b"a.txt", b"a b", b"%41", b"\xff\xfe", b"new\nline", b"-rf", b"~", b"\x01", b"caf\xc3\xa9"]),
    st.binary(min_size=1, max_size=30).filter(
        lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b"..")
    ),
)
contents = st.one_of(
    st.binary(max_size=200),
    st.tuples(st.integers(0, 70_000), st.integers(0, 255)).map(lambda pair: bytes([pair[1]]) * pair[0]),
    st.tuples(st.integers(0, 90_000), st.integers(0, 9)).map(
        lambda pair: (b"%d" % pair[1] + bytes(range(256)) * 400)[: pair[0]]
    ),
)
times = st.integers(0, 4_000_000_000_000_000_000)
files = st.fixed_dictionaries(
    {
        "kind": st.just("file"),
        "content": contents,
        "mode": st.sampled_from([0o644, 0o600, 0o755, 0o444, 0o4755]),
        "mtime": times,
    }
)
sparse = st.fixed_dictionaries(
    {"kind": st.just("sparse"), "size": st.integers(1, 9_000_000), "island": st.binary(max_size=99)}
)
links = st.fixed_dictionaries(
    {"kind": st.just("symlink"), "target": st.one_of(names, st.just(b"../outside"), st.just(b"/etc"))}
)
same = st.fixed_dictionaries({"kind": st.just("hardlink")})
pipes = st.fixed_dictionaries({"kind": st.just("fifo")})
things = st.recursive(
    st.one_of(files, files, files, sparse, links, same, pipes),
    lambda below: st.fixed_dictionaries(
        {
            "kind": st.just("dir"),
            "below": st.dictionaries(names, below, max_size=6),
            "mode": st.sampled_from([0o755, 0o700, 0o1777]),
        }
    ),
    max_leaves=25,
)


def grow(folder: bytes, tree: dict[bytes, dict[str, Any]], made: list[bytes]) -> None:
    for name, thing in tree.items():
        path = os.path.join(folder, name)
        match thing["kind"]:
            case "dir":
                os.mkdir(path)
                grow(path, thing["below"], made)
                os.chmod(path, thing["mode"])
            case "symlink":
                os.symlink(thing["target"], path)
            case "fifo":
                os.mkfifo(path)
            case "hardlink" if made:
                os.link(made[len(made) // 2], path)
            case "sparse":
                with open(path, "wb") as file:
                    file.truncate(thing["size"])
                    file.seek(thing["size"] // 2)
                    file.write(thing["island"])
            case _:
                with open(path, "wb") as file:
                    file.write(thing.get("content", b""))
                os.chmod(path, thing.get("mode", 0o644))
                os.utime(path, ns=(thing.get("mtime", 0), thing.get("mtime", 0)))
                made.append(path)


def back_and_forth(source: bytes, scratch: bytes, secret: bytes | None) -> None:
    """Back up, restore into a new folder, restore over the result again: all three are the same."""
    given_secret = (lambda: secret) if secret else None
    store = LocalStore(os.path.join(scratch, b"repo"))
    repository = Repository.create(store, secret=given_secret, chunking=SMALL, pack_bytes=1 << 20)
    create(repository, [source])
    expected = describe(source)
    target = os.path.join(scratch, b"target")
    fresh = Repository.open(store, secret=given_secret)
    report = restore.execute(fresh, restore.plan(fresh, fresh.find_snapshot("latest"), target))
    assert report.verified
    assert describe(target) == expected
    again = restore.execute(fresh, restore.plan(fresh, fresh.find_snapshot("latest"), target))
    assert again.bytes_fetched == 0
    assert describe(target) == expected
    assert sorted(os.listdir(scratch)) == [b"repo", b"source", b"target"], "nothing is left behind"


@settings(max_examples=TREES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(tree=st.dictionaries(names, things, max_size=8), encrypted=st.integers(0, 19).map(lambda n: n == 0))
def test_any_tree_comes_back(tree: dict[bytes, dict[str, Any]], encrypted: bool) -> None:
    with tempfile.TemporaryDirectory() as text:
        scratch = os.fsencode(text)
        source = os.path.join(scratch, b"source")
        os.mkdir(source)
        grow(source, tree, [])
        back_and_forth(source, scratch, b"passphrase" if encrypted else None)


def _room(path: Path, needed_bytes: int) -> None:
    if shutil.disk_usage(path).free < needed_bytes:
        pytest.skip(f"needs {needed_bytes >> 30} GiB of free disk")


@pytest.mark.slow
def test_a_hundred_thousand_small_files(tmp_path: Path) -> None:
    _room(tmp_path, 3 << 30)
    source = tmp_path / "source"
    block = os.urandom(4096 + 100_000)
    for folder in range(100):
        (source / f"{folder:02d}").mkdir(parents=True)
        for number in range(1000):
            start = folder * 1000 + number
            (source / f"{folder:02d}" / f"{number:03d}").write_bytes(block[start : start + 4096])
    repository = Repository.create(LocalStore(str(tmp_path / "repo")))
    report = create(repository, [str(source)])
    assert report.files == 100_000
    done = restore.execute(
        repository, restore.plan(repository, repository.find_snapshot("latest"), str(tmp_path / "target"))
    )
    assert done.verified and done.files == 100_000
    assert describe(str(tmp_path / "target")) == describe(str(source))


@pytest.mark.slow
def test_a_file_of_five_gigabytes(tmp_path: Path) -> None:
    _room(tmp_path, 17 << 30)
    source = tmp_path / "source"
    source.mkdir()
    block = os.urandom(64 << 20)
    with open(source / "big.bin", "wb") as file:
        for number in range(75):
            file.write(number.to_bytes(8, "big") + block[8:])
    repository = Repository.create(LocalStore(str(tmp_path / "repo")))
    report = create(repository, [str(source)])
    assert report.bytes == 75 * (64 << 20) > 5_000_000_000
    done = restore.execute(
        repository, restore.plan(repository, repository.find_snapshot("latest"), str(tmp_path / "target"))
    )
    assert done.verified
    assert describe(str(tmp_path / "target")) == describe(str(source))
    shutil.rmtree(tmp_path)
