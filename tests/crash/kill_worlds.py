"""The folders in which `test_kill_everywhere` runs commands: what they find, and what is promised about it."""

from __future__ import annotations

import os
import shutil
import stat
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import killer
import numpy as np
from safetensors.numpy import save_file

from outlast.backup.create import create
from outlast.clock import ManualClock
from outlast.records import Chunking, Snapshot, path_order, path_text
from outlast.repo import forget, keyring, prune
from outlast.repo.content import Content, RecentChunks
from outlast.repo.pack import object_name
from outlast.repo.prune_plan import Policy
from outlast.repo.repository import Repository
from outlast.store.base import ObjectStore
from outlast.store.layers import ReadOnlyStore, open_store
from outlast.store.local import LocalStore

TIME_NS = 1_600_000_000_123_456_789
PASSPHRASE, ANOTHER = "correct horse", "battery staple"

Tree = dict[str, tuple[Any, ...]]


# -- folders -----------------------------------------------------------------------------------------


def make_model(folder: Path, version: int) -> None:
    """A small model folder with one of everything; of its files some change from version to version."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "sub" / "empty").mkdir(parents=True)
    for name, size, seed in [("part0", 9_000, 0), ("part1", 5_000, version), ("sub/part2", 3_000, version)]:
        (folder / name).write_bytes(ManualClock(seed=seed).random_bytes(size))
    tensors = {"weight": np.arange(3000, dtype=np.float32), "bias": np.full(64, version, np.float32)}
    save_file(tensors, folder / "model.safetensors")
    (folder / f"only-in-{version}").write_bytes(b"a line\n" * version)
    (folder / "nothing").touch(0o640)
    (folder / "link").symlink_to("part0")
    os.link(folder / "part0", folder / "same")
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            os.utime(os.path.join(parent, name), ns=(TIME_NS, TIME_NS + version), follow_symlinks=False)
        os.utime(parent, ns=(TIME_NS, TIME_NS + version))


def on_disk(root: Path) -> Tree:
    """All that a restore must bring back, by path: what it is, its mode and time, and what is in it."""
    found: Tree = {}
    first: dict[int, str] = {}
    paths = [b"."]
    for parent, folders, files in os.walk(os.fsencode(root)):
        paths += [os.path.relpath(os.path.join(parent, name), os.fsencode(root)) for name in folders + files]
    for raw in sorted(paths, key=path_order):
        path, full = path_text(raw), os.path.join(os.fsencode(root), raw)
        status = os.lstat(full)
        facts = stat.S_IMODE(status.st_mode), status.st_mtime_ns
        if stat.S_ISLNK(status.st_mode):
            found[path] = "symlink", path_text(os.readlink(full))
        elif stat.S_ISDIR(status.st_mode):
            found[path] = "dir", *facts
        elif status.st_nlink > 1 and status.st_ino in first:
            found[path] = "hardlink", first[status.st_ino]
        else:
            first[status.st_ino] = path
            found[path] = "file", *facts, Path(os.fsdecode(full)).read_bytes()
    return found


def in_snapshot(repository: Repository, snapshot: Snapshot) -> Tree:
    """The same of a snapshot, every byte read and verified."""
    found: Tree = {}
    get = RecentChunks(repository).get
    for entry in repository.entries(snapshot):
        facts = stat.S_IMODE(entry.mode), entry.mtime_ns
        if entry.type == "file":
            found[entry.path] = "file", *facts, Content(entry, get).read(0, entry.size + 1)
        else:
            found[entry.path] = ("dir", *facts) if entry.type == "dir" else (entry.type, entry.target)
    return found


# -- worlds: what a command finds --------------------------------------------------------------------


@dataclass
class World:
    """A folder in which a command runs, and what is promised about it."""

    folder: Path
    url: str
    passphrases: tuple[str, ...] = ()
    """each of them opens the repository at every moment"""
    known: dict[str, Tree] = field(default_factory=dict)
    """snapshots that must be there"""
    maybe: dict[str, Tree] = field(default_factory=dict)
    """snapshots that may be there, and are whole then"""
    hurt: dict[str, Tree] = field(default_factory=dict)
    """snapshots that must be there at the end alone"""
    damaged: frozenset[str] = frozenset()
    """objects that may be damaged until the end"""
    new: Tree | None = None
    """what a snapshot with any other id must be"""
    untouched: dict[str, Tree] = field(default_factory=dict)
    """folders that nobody may change"""
    old: Tree = field(default_factory=dict)
    """what is at the target of a restore"""
    visible: frozenset[str] = frozenset()
    """the names in the folder"""
    notes: dict[str, str] = field(default_factory=dict)
    """words to put into the arguments"""

    def store(self) -> ObjectStore:
        return open_store(self.url)

    def open(self, passphrase: str | None = None, *, read_only: bool = False) -> Repository:
        secret = passphrase or next(iter(self.passphrases), None)
        store = ReadOnlyStore(self.store()) if read_only else self.store()
        return Repository.open(store, secret=(lambda: secret.encode()) if secret else None)

    def init(self, url: str | None = None) -> Repository:
        secret = self.passphrases[0] if self.passphrases else None
        return Repository.create(
            open_store(url or self.url),
            secret=(lambda: secret.encode()) if secret else None,
            chunking=Chunking(**killer.CUTTING),
            pack_bytes=killer.PACK_BYTES,
        )

    def backup(self, version: int, repository: Repository | None = None) -> str:
        """Make the model of this version, and back it up; the id of the snapshot, which is known from then on."""
        repository = repository or self.open()
        make_model(self.folder / "model", version)
        made = create(repository, [str(self.folder / "model")], tags={"version": str(version)}).snapshot
        self.known[made] = on_disk(self.folder / "model")
        return made

    def forget(self, *snapshots: str) -> None:
        repository = self.open()
        forget.execute(repository, forget.plan(repository, ids=snapshots))
        for each in snapshots:
            del self.known[each]

    def environment(self) -> dict[str, str]:
        passphrase = {"OUTLAST_PASSPHRASE": self.passphrases[0]} if self.passphrases else {}
        return {"OUTLAST_REPO": self.url, "OUTLAST_NEW_PASSPHRASE": ANOTHER, **passphrase}


def nothing(world: World) -> None:
    pass


def repository_alone(world: World) -> None:
    world.init()
    make_model(world.folder / "model", 1)
    world.new = on_disk(world.folder / "model")


def one_snapshot(world: World) -> None:
    world.init()
    world.backup(1)
    make_model(world.folder / "model", 2)
    world.new = on_disk(world.folder / "model")


def three_snapshots(world: World) -> None:
    world.init()
    for version in (1, 2, 3):
        world.backup(version)


def to_forget(world: World) -> None:
    three_snapshots(world)
    first, second, third = world.known
    world.maybe = {each: world.known[each] for each in (first, second)}
    world.known = {third: world.known[third]}


def to_prune(world: World) -> None:
    """Packs that nothing needs, packs that are needed in part, and packs that no entry names."""
    three_snapshots(world)
    world.forget(*list(world.known)[:2])
    left = Repository.create(
        LocalStore(str(world.folder / "elsewhere")), chunking=Chunking(**killer.CUTTING), pack_bytes=killer.PACK_BYTES
    )
    make_model(world.folder / "model", 9)
    create(left, [str(world.folder / "model")])
    for info in left.store.list("packs/") if not world.passphrases else ():
        world.store().put_if_absent(info.name, [left.store.get(info.name)])
    shutil.rmtree(world.folder / "elsewhere")


def to_sweep(world: World) -> None:
    to_prune(world)
    prune.prune(world.open(), Policy(max_unused=0.0, max_delete=1.0))


def to_reseal(world: World) -> None:
    three_snapshots(world)
    keyring.rotate(world.open())
    world.forget(next(iter(world.known)))


def to_copy(world: World) -> None:
    world.init()
    elsewhere = replace(world, url=str(world.folder / "other"), passphrases=(), known={})
    elsewhere.init()
    for version in (1, 2, 3):
        elsewhere.backup(version)
    world.maybe = world.hurt = elsewhere.known
    world.untouched = {"other": on_disk(world.folder / "other")}


def to_repair(world: World) -> None:
    """A pack with a flipped bit, and another repository that still has what was in it."""
    three_snapshots(world)
    shutil.copytree(world.folder / "repository", world.folder / "other")
    repository = world.open()
    last = repository.find_snapshot("latest")
    own = {chunk for entry in repository.entries(last) if entry.path == "part1" for chunk, _ in entry.chunks}
    pack = object_name(repository.load_index().get(bytes.fromhex(own.pop())).pack.name)  # type: ignore[union-attr]
    path = world.folder / "repository" / pack
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    world.damaged = frozenset([pack])
    world.known, world.hurt = {}, world.known
    world.untouched = {"other": on_disk(world.folder / "other")}


def two_keys(world: World) -> None:
    one_snapshot(world)
    world.notes["key"] = keyring.add(world.open(), ANOTHER.encode()).slot


def to_restore(world: World) -> None:
    """Two versions were backed up, the first of them is to be restored; nothing is at the target."""
    world.init()
    world.notes["snapshot"] = world.backup(1)
    world.backup(2)
    shutil.rmtree(world.folder / "model")


def to_restore_over(world: World) -> None:
    """The same over a folder with files that are right, files that are not, and files of the user's own."""
    to_restore(world)
    target = world.folder / "target"
    make_model(target, 2)
    (target / "mine").mkdir()
    (target / "mine" / "notes").write_bytes(b"mine alone")
    world.old = on_disk(target)


def to_restore_tensor(world: World) -> None:
    to_restore(world)
    save_file({"bias": np.zeros(3, np.float32)}, world.folder / "bias.safetensors")
    world.old = {"": ("file", (world.folder / "bias.safetensors").read_bytes())}
