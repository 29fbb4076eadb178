"""A repository to be damaged, and the proof that reading it never gives wrong data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from outlast.backup.create import create
from outlast.errors import Corrupt, OutlastError
from outlast.records import Chunking, Entry
from outlast.repo import pack
from outlast.repo.check import CheckReport, open_and_check
from outlast.repo.repository import Repository
from outlast.store.memory import MemoryStore

PASSPHRASE = b"correct horse"


class World(msgspec.Struct):
    """A sound repository and what is in it."""

    objects: dict[str, bytes]
    encrypted: bool
    contents: dict[str, dict[str, bytes]]
    """snapshot -> path -> bytes"""
    chunks: dict[bytes, bytes]
    foreign: dict[str, bytes]
    """another repository's objects"""
    forgotten: frozenset[str] = frozenset()
    """those of the snapshots that exist no more"""

    def secret(self) -> bytes:
        return PASSPHRASE

    def copy(self) -> MemoryStore:
        return store_of(self.objects)

    def names(self, prefix: str) -> list[str]:
        return [name for name in sorted(self.objects) if name.startswith(prefix)]

    def pack_with_padding(self) -> str:
        return max(self.names("packs/"), key=lambda name: sum(length for _, length in pack.gaps(*self.footer(name))))

    def pack_of_manifest(self, snapshot: str) -> str:
        repository = Repository.open(self.copy(), secret=self.secret)
        place = repository.locate(bytes.fromhex(repository.find_snapshot(snapshot).manifest[0][0]))
        return f"packs/{place.pack.name[:2]}/{place.pack.name}"

    def footer(self, name: str) -> tuple[pack.Footer, int]:
        data = self.objects[name]
        return pack.parse_footer(data, name.rpartition("/")[2], len(data)), len(data)


def store_of(objects: dict[str, bytes]) -> MemoryStore:
    store = MemoryStore()
    for name, data in objects.items():
        store.put(name, [data])
    return store


def make_files(folder: Path, rng: np.random.Generator) -> None:
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    (folder / "empty").write_bytes(b"")
    (folder / "notes.txt").write_text("all work and no play\n" * 900)
    (folder / "sub" / "noise.bin").write_bytes(rng.bytes(200_000))
    for number in range(12):
        (folder / "sub" / f"small{number}").write_bytes(rng.bytes(50 + 700 * number))
    np.save(folder / "noise.npy", rng.integers(0, 256, 300_000, np.uint8))
    np.save(folder / "weights.npy", rng.normal(0, 0.02, 60_000).astype("<f4"))


def fill(store: MemoryStore, folder: Path, *, encrypted: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    make_files(folder, rng)
    repository = Repository.create(
        store,
        secret=(lambda: PASSPHRASE) if encrypted else None,
        chunking=Chunking(block_bytes=128 << 10, min_bytes=4 << 10, avg_bytes=16 << 10, max_bytes=128 << 10),
        pack_bytes=150_000,
    )
    for number in range(6):
        repository = Repository.open(store, secret=lambda: PASSPHRASE)
        create(repository, [str(folder)], name="folder")
        (folder / "sub" / f"small{number}").write_bytes(rng.bytes(3000))
        (folder / f"new{number}.bin").write_bytes(rng.bytes(70_000))


def read_file(repository: Repository, entry: Entry) -> bytes:
    assert not entry.holes
    return b"".join(bytes(repository.get_chunk(bytes.fromhex(chunk))) for chunk, _ in entry.chunks)


def checked(world: World, store: MemoryStore) -> CheckReport:
    return open_and_check(store, secret=world.secret, data="all")


def open_for_reading(world: World, store: MemoryStore) -> Repository:
    try:
        return Repository.open(store, secret=world.secret)
    except Corrupt:
        return Repository.open_damaged(store, secret=world.secret)


def assert_reading_is_right(world: World, store: MemoryStore, report: CheckReport, *, lost: int = 0) -> set[str]:
    """Compare everything; what can't be read must be something that the report names. Returns those paths."""
    named = {snapshot: damage for damage in report.damaged for snapshot in damage.snapshots}
    files = {path for damage in report.damaged for path in damage.files}
    repository = open_for_reading(world, store)
    present = {snapshot.id: snapshot for snapshot in repository.snapshots()}
    assert present.keys() <= world.contents.keys()
    assert len(world.contents.keys() - world.forgotten - present.keys()) <= lost
    failed: set[str] = set()
    for identity, snapshot in present.items():
        seen = set()
        try:
            for entry in repository.entries(snapshot):
                if entry.type != "file":
                    continue
                seen.add(entry.path)
                try:
                    assert read_file(repository, entry) == world.contents[identity][entry.path]
                except OutlastError as exc:
                    assert entry.path in files, (entry.path, exc)
                    assert identity in named
                    failed.add(entry.path)
            assert seen == world.contents[identity].keys()
        except OutlastError:
            assert identity in named
    assert_fetching_is_right(world, repository)
    return failed


def assert_fetching_is_right(world: World, repository: Repository) -> None:
    """The parallel path agrees with the simple one."""
    delivered: dict[bytes, bytes] = {}
    failed: set[bytes] = set()
    repository.fetch(
        world.chunks,
        lambda chunk, plain: delivered.__setitem__(chunk, bytes(plain)),
        lambda chunk, exc: failed.add(chunk),
    )
    assert delivered.keys() | failed == world.chunks.keys()
    assert not delivered.keys() & failed
    assert all(world.chunks[chunk] == plain for chunk, plain in delivered.items())
    for chunk in failed:
        with pytest.raises(OutlastError):
            repository.get_chunk(chunk)


def flip(at: float) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        position = min(len(data) - 1, int(at * len(data)))
        return data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :]

    return change


def named_objects(report: CheckReport) -> set[str]:
    return {damage.object for damage in report.damaged}
