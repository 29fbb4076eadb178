"""A restore, cut off after every change and by every power cut: what was there, or what was to come, whole.

The target is recorded, not the repository. In each state that may be left the old folder is there bit for
bit, under its own name or the one that the manual gives, or the restored one is; the same command then
goes on and ends with the restored one. Once it was said to be restored, no power cut takes any of it back.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time  # noqa: TID251
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
from crashing import NOW_NS, SAMPLES, SEED, STATES_MAX, Counts, Killed, small_world, told
from disk_calls import Listing, RecordedCalls, cuts, make_listing, read_item, read_listing
from safetensors.numpy import save

from outlast.backup import merge, restore, staging
from outlast.backup.create import create
from outlast.backup.tensors import restore_tensors
from outlast.clock import ManualClock
from outlast.errors import OutlastError
from outlast.records import Chunking
from outlast.repo.repository import Repository
from outlast.store.memory import MemoryStore
from outlast.testing.powercut import Step

Look = tuple[Any, ...]
Seen = dict[str, Look]
"""what a user sees, by path"""

Done = Literal["", "warned", "again", "at once"]
"""whether, by then, somebody was told that all is restored, and by whom: by one that was never disturbed, by one
that went on, or by one that could not put the old folder away for good, and said so"""

TIME_NS = 1_600_000_000_123_456_789
TARGET = "data"
TENSORS = "out.safetensors"
LOCK = f".{TARGET}.outlast-lock"
KEPT = ".before-"
RERUNS_MAX = 200
ALTERNATIVES_FEW = 40
FILES = {  # name -> what is there before, what is restored: bytes of a file, a mode and the content of a folder
    "changed": (b"begin" * 300 + b"old" * 400, b"begin" * 300 + b"new" * 500),
    "fresh/new": (None, b"n" * 1300),
    "same": (b"s" * 700, b"s" * 700),
    "only-old": (b"o" * 500, None),
    "sub/inner": (b"i" * 400, b"I" * 900),
    "turned": (b"a file", None),
    "turned/into": (None, b"a folder"),
    "was/folder": (b"f", None),
    "was": (None, b"is a file"),
}
INCLUDED = ("changed", "fresh", "sub", "turned", "was", "link", "twin")
FEW = ("changed", "fresh", "sub")
UNLINKED = ("changed", "fresh", "turned")


def make_folder(root: Path, version: int) -> Path:
    """What is there before (0), what is restored (1), what is restored after that (2)."""
    root.mkdir()
    for name, contents in FILES.items():
        content = contents[min(version, 1)]
        if content is not None:
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_bytes(content if version < 2 else content[::-1])
    os.link(root / "changed", root / "twin")
    (root / "link").symlink_to(f"to-{version}")
    (root / "changed").chmod(0o640 if version else 0o600)
    (root / "sub").chmod(0o750)
    root.chmod(0o751 if version else 0o711)
    for number, (where, _, names) in enumerate(os.walk(root, topdown=False)):
        for name in sorted(names):
            os.utime(f"{where}/{name}", ns=(TIME_NS, TIME_NS + version), follow_symlinks=False)
        os.utime(where, ns=(TIME_NS, TIME_NS + 10 * number + version))
    os.utime(root / "same", ns=(TIME_NS, TIME_NS))
    return root


def seen(listing: Listing, path: str) -> Seen:
    """What a user sees at a path: of a folder all that is in it, the folder itself as the empty name."""
    found: Seen = {
        name.removeprefix(path + "/"): item.seen for name, item in listing.items() if name.startswith(path + "/")
    }
    if path in listing:
        found[""] = listing[path].seen
    return found


def of_folder(folder: Path) -> Seen:
    return {name: item.seen for name, item in read_listing(str(folder)).items()} | {"": read_item(str(folder)).seen}


class World:
    """A repository with two snapshots, and what is where; made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.old, new, other = (
            make_folder(folder / name, version) for version, name in enumerate(("old", "new", "other"))
        )
        chunking = Chunking(block_bytes=1024, min_bytes=256, avg_bytes=512, max_bytes=1024)
        self.clock = ManualClock(seed=1, now_ns=NOW_NS)
        self.repository = Repository.create(MemoryStore(), chunking=chunking, pack_bytes=4096, clock=self.clock)
        self.before, self.restored, self.other = of_folder(self.old), of_folder(new), of_folder(other)
        self.snapshots = [self._back_up(each) for each in (new, other)]
        models = folder / "models"
        models.mkdir()
        (models / "m.safetensors").write_bytes(save({"one": np.arange(600.0), "two": np.arange(300)}))
        self.model = self._back_up(models)
        restore_model(self, str(folder))
        self.tensors = (folder / TENSORS).read_bytes()

    def _back_up(self, folder: Path) -> str:
        return create(self.repository, [str(folder)], name=folder.name).snapshot


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with small_world(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "BIG_BYTES", 1200)
        patch.setattr(merge, "FOLDERS_FEW", 2)
        yield


@pytest.fixture(scope="module")
def world(small: None, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("restoring"))


Run = Callable[[World, str], object]


@dataclass(frozen=True)
class Mode:
    """One way to restore. `look` asserts what holds in a state; it is told whether all was acknowledged."""

    name: str
    run: Run
    look: Callable[[World, Mode, Listing, Done], None]
    exists: bool = True
    overwrite: bool = False
    include: tuple[str, ...] = ()
    has_exchange: bool = True
    has_syncfs: bool = True
    has_links: bool = True
    other: Run | None = None
    """a restore of something else to the same place, which must find what this one left"""


class Recording(NamedTuple):
    mode: Mode
    world: World
    base: str
    initial: Listing
    trace: list[Step]
    sites: dict[int, tuple[str, int]]
    acknowledged: int | None
    """after how many steps it was said to be done; None: it never was"""
    how: Done = "again"
    since: int = 0
    """what the first steps may leave is not looked at: another recording has them too"""


class Place:
    """The folder in which restores run: what is in it can be exchanged, its path stays, for journals hold it."""

    def __init__(self, mode: Mode, world: World) -> None:
        self.mode = mode
        self.world = world
        self.base = f"{world.folder}/place"
        shutil.rmtree(self.base, ignore_errors=True)
        Path(self.base).mkdir()
        Path(self.base, "neighbour").write_bytes(b"not to be touched")
        if mode.exists:
            shutil.copytree(world.old, f"{self.base}/{TARGET}", symlinks=True)
            os.unlink(f"{self.base}/{TARGET}/twin")
            os.link(f"{self.base}/{TARGET}/changed", f"{self.base}/{TARGET}/twin")
            os.utime(f"{self.base}/{TARGET}", ns=(TIME_NS, world.before[""][3]))
            Path(self.base, TENSORS).write_bytes(b"old")
        self.calls = self.with_calls()

    def with_calls(self) -> RecordedCalls:
        mode = self.mode
        return RecordedCalls(
            self.base, has_exchange=mode.has_exchange, has_syncfs=mode.has_syncfs, has_links=mode.has_links
        )

    def run(self, calls: RecordedCalls, run: Run) -> None:
        self.world.clock.sleep(60)
        with calls.in_place():
            run(self.world, self.base)

    def hold(self, listing: Listing) -> None:
        """Let this be left after a power cut. The journal of a swap names an inode: it is the same folder's new one."""
        shutil.rmtree(self.base)
        inodes = make_listing(listing, self.base)
        lock = f"{self.base}/{LOCK}"
        with suppress(OSError, ValueError, KeyError, TypeError):
            journal = json.loads(Path(lock).read_bytes())
            journal |= {"inode": inodes.get(journal["inode"], 0), "device": os.stat(self.base).st_dev}
            Path(lock).write_text(json.dumps(journal))

    def recording(self, acknowledged: int | None, how: Done, since: int = 0) -> Recording:
        calls = self.calls
        return Recording(
            self.mode, self.world, self.base, calls.initial, list(calls.trace), calls.sites, acknowledged, how, since
        )


def record(mode: Mode, world: World) -> Recording:
    place = Place(mode, world)
    place.run(place.calls, mode.run)
    recording = place.recording(len(place.calls.trace), "at once")
    *_, (_, leftovers) = cuts(recording.initial, recording.trace)
    everything, _ = leftovers.extremes()
    real = read_listing(place.base)
    assert {name: item[:3] for name, item in everything.items()} == {name: item[:3] for name, item in real.items()}
    return recording


def recordings_killed(mode: Mode, world: World) -> Iterator[Recording]:
    """Killed after each change, and begun again by another process, which finds what was never synced."""
    for changes in itertools.count(1):
        place = Place(mode, world)
        place.calls.changes_left = changes
        try:
            place.run(place.calls, mode.run)
        except Killed:
            place.calls.changes_left = None
            killed = len(place.calls.trace)
            place.run(place.calls, mode.run)
            yield place.recording(len(place.calls.trace), "again", since=killed)
        else:
            return


def recordings_failing(mode: Mode, world: World) -> Iterator[Recording]:
    """Each fsync fails, once; and then the same command is run again."""
    for sync in itertools.count():
        place = Place(mode, world)
        place.calls.syncs_to_failure = sync
        try:
            place.run(place.calls, mode.run)
            acknowledged = len(place.calls.trace)
        except OutlastError:
            acknowledged = None
        if place.calls.syncs_to_failure >= 0:
            return
        failed = len(place.calls.trace)
        yield place.recording(acknowledged, "warned")
        if acknowledged is None:
            place.run(place.calls, mode.run)
            yield place.recording(len(place.calls.trace), "again", since=failed)


# -- the ways to restore, and what holds -------------------------------------------------------------


def restoring(snapshot: int, *, include: Iterable[str] = (), overwrite: bool = False, below: str = "") -> Run:
    def run(world: World, base: str) -> object:
        repository = world.repository
        target = f"{base}/{below}{TARGET}"
        plan = restore.plan(repository, world.snapshots[snapshot], target, include=list(include), overwrite=overwrite)
        return restore.execute(repository, plan)

    return run


def restore_model(world: World, base: str) -> object:
    snapshot = world.repository.find_snapshot(world.model)
    return restore_tensors(world.repository, snapshot, ["*"], f"{base}/{TENSORS}")


def look_at_whole(world: World, mode: Mode, listing: Listing, done: Done) -> None:
    """The folder is the old one or the restored one; the old one is somewhere, unless it was to be overwritten."""
    now = seen(listing, TARGET)
    kept = [seen(listing, name) for name in listing if "/" not in name and name.startswith(TARGET + KEPT)]
    hidden = [seen(listing, name) for name in listing if "/" not in name and name.startswith(f".{TARGET}.outlast-")]
    hidden = [each for each in hidden if each[""][0] == "folder"]
    old = world.before if mode.exists else {}
    assert all(each in (old, world.restored) for each in kept), "what is kept is not what was there"
    if now != world.restored:
        moved = not now and not mode.has_exchange and old in kept
        assert not done, "it was said to be restored, and is not"
        assert now == old or moved, "the target is neither what was there nor what was to come"
    elif mode.exists and not mode.overwrite:
        assert old in kept or (done in ("", "warned") and old in hidden), "what was there before is lost"
    assert not (done in ("again", "at once") and hidden), f"a folder of the restore is left: {sorted(hidden[0])}"


def look_below(world: World, mode: Mode, listing: Listing, done: Done) -> None:
    now = seen(listing, f"made/too/{TARGET}")
    assert now in ({}, world.restored), "the target is neither absent nor what was to come"
    assert not done or now, "it was said to be restored, and is not"


def look_at_files(world: World, mode: Mode, listing: Listing, done: Done) -> None:
    """Each file is the old one or the restored one, and where it is the restored one the old one is kept."""
    now, old, new = seen(listing, TARGET), world.before, world.restored
    copies = [name for name in now if KEPT in name.rpartition("/")[2]]
    for name in copies:
        assert subtree(now, name) == subtree(old, name.partition(KEPT)[0]), f"{name} is not what was there"
    kept = {name.partition(KEPT)[0] for name in copies}
    for name, item in now.items():
        if KEPT not in name:
            chosen = new.get(name) if name.partition("/")[0] in mode.include else None
            look_at_name(name, item, old.get(name), chosen)
    for name, item in old.items():
        above = name.rpartition("/")[0]
        if now.get(name) != item and not (name in now and item[0] == now[name][0] == "folder"):
            is_kept = name in kept or above in kept
            assert is_kept or (mode.overwrite and name in now), f"{name} was replaced and is not kept"
            assert name in now or not done or above in kept, f"{name} is gone"
    for name, item in new.items():
        if done and name.partition("/")[0] in mode.include and not (item[0] == "folder" and name in old):
            # A folder that an interrupted restore has made is not this one's: its time is what it is.
            exact = 3 if item[0] == "folder" and done == "again" else 4
            assert now.get(name, ())[:exact] == item[:exact], f"{name} was said to be restored, and is not"
    left = [name for name, item in listing.items() if name.startswith(f".{TARGET}.outlast-") and item.kind == "folder"]
    assert not (done and left), f"a folder of the restore is left: {left}"


def look_at_name(name: str, now: Look, old: Look | None, new: Look | None) -> None:
    if now[0] == "folder":
        # Its time changes with what is put into it.
        assert any(each is not None and each[:3] == now[:3] for each in (old, new)), f"the folder {name} is wrong"
    else:
        assert now in (old, new), f"{name} is neither what was there nor what was to come"


def subtree(listing: Seen, name: str) -> Seen:
    return {path[len(name) :]: item for path, item in listing.items() if f"{path}/".startswith(f"{name}/")}


def look_at_tensors(world: World, mode: Mode, listing: Listing, done: Done) -> None:
    now = listing.get(TENSORS)
    kept = [item.content for name, item in listing.items() if name.startswith(TENSORS + KEPT)]
    assert all(each in (b"old", world.tensors) for each in kept), "what is kept is not what was there"
    if now is None or now.content == b"old":
        assert not done, "it was said to be restored, and is not"
        assert mode.exists == (now is not None), "what was there before is gone"
    else:
        assert now.content == world.tensors, "the file is neither what was there nor what was to come"
        assert b"old" in kept or not mode.exists, "what was there before is lost"


MODES = [
    Mode("new", restoring(0), look_at_whole, exists=False),
    Mode("new, below what is missing", restoring(0, below="made/too/"), look_below, exists=False),
    Mode("new, without syncfs", restoring(0), look_at_whole, exists=False, has_syncfs=False),
    Mode("swap", restoring(0), look_at_whole, other=restoring(1)),
    Mode("swap, without an exchange", restoring(0), look_at_whole, has_exchange=False),
    Mode("swap, overwriting", restoring(0, overwrite=True), look_at_whole, overwrite=True),
    Mode("merge", restoring(0, include=INCLUDED), look_at_files, include=INCLUDED),
    Mode("merge, overwriting", restoring(0, include=FEW, overwrite=True), look_at_files, overwrite=True, include=FEW),
    Mode("merge, without links", restoring(0, include=UNLINKED), look_at_files, include=UNLINKED, has_links=False),
    Mode("tensors, new", restore_model, look_at_tensors, exists=False),
    Mode("tensors, over a file", restore_model, look_at_tensors),
]


# What is kept of the file is not durable before it is replaced.
PARAMETERS = [pytest.param(each, id=each.name) for each in MODES]


# -- the enumeration ---------------------------------------------------------------------------------


class State(NamedTuple):
    listing: Listing
    done: Done
    where: str
    alternatives: int
    """how many outcomes that cut has"""


class States:
    """Each different state once, over any number of recordings."""

    def __init__(self, samples: int = SAMPLES) -> None:
        self.counts = Counts()
        self._samples = samples
        self._seen: set[tuple[frozenset[tuple[str, Look]], Done]] = set()

    def of(self, recording: Recording) -> Iterator[State]:
        clock = ManualClock(seed=SEED)
        for steps, leftovers in cuts(recording.initial, recording.trace):
            if steps < recording.since:
                continue
            self.counts.cuts += 1
            done = recording.how if recording.acknowledged is not None and steps >= recording.acknowledged else ""
            where = f"power cut after {steps} calls, the last {recording.trace[steps - 1]}" if steps else "at first"
            count = leftovers.count()
            if self.counts.distinct + count <= STATES_MAX:
                listings = leftovers.outcomes()
            else:
                self.counts.sampled = True
                listings = itertools.chain(
                    leftovers.extremes(), (leftovers.sample(clock) for _ in range(self._samples))
                )
            for listing in listings:
                self.counts.outcomes += 1
                key = frozenset[tuple[str, Look]]((name, item.seen) for name, item in listing.items()), done
                if key not in self._seen:
                    self._seen.add(key)
                    self.counts.distinct += 1
                    yield State(listing, done, where, count)


def examine(recording: Recording, state: State, place: Place | None) -> None:
    """Raise `AssertionError` unless the state is sound and, at the place, the same command ends well."""
    mode, world = recording.mode, recording.world
    try:
        assert state.listing["neighbour"].content == b"not to be touched"
        mode.look(world, mode, state.listing, state.done)
        if place is None:
            return
        for run in (mode.run, mode.other):
            if run is not None:
                place.hold(state.listing)
                place.run(place.with_calls(), run)
                after = read_listing(place.base)
                if run is mode.run:
                    mode.look(world, mode, after, "again")
                else:
                    look_at_other(world, state.listing, after)
    except (AssertionError, OutlastError, OSError) as exc:
        raise AssertionError(f"restore, {mode.name}: {state.where}: {type(exc).__name__}: {exc}") from exc


def look_at_other(world: World, before: Listing, after: Listing) -> None:
    """Something else was restored there: what a swap left is found all the same."""
    assert seen(after, TARGET) == world.other, "the other snapshot is not restored"
    kept = [seen(after, name) for name in after if "/" not in name and name.startswith(TARGET + KEPT)]
    assert world.before in kept, "what was there at first is not kept under the name that the manual gives"


def chosen_to_go_on(states: list[State]) -> set[int]:
    """By number: all that the moments leave at which little is pending, and a part of what half of a build leaves."""
    few = {number for number, state in enumerate(states) if state.alternatives <= ALTERNATIVES_FEW}
    step = max(1, len(states) // RERUNS_MAX)
    return few | set(range(0, len(states), step))


@pytest.mark.parametrize("mode", PARAMETERS)
def test_what_was_there_or_what_was_to_come(mode: Mode, world: World) -> None:
    started = time.monotonic()
    recording = record(mode, world)
    every = States()
    states = list(every.of(recording))
    again = chosen_to_go_on(states)
    place = Place(mode, world)
    for number, state in enumerate(states):
        examine(recording, state, place if number in again else None)
    told(f"restore, {mode.name}, cut off ({len(again)} gone on from)", every.counts, started)


@pytest.mark.parametrize("mode", PARAMETERS)
def test_a_restore_that_goes_on_trusts_nothing_that_was_never_synced(mode: Mode, world: World) -> None:
    started = time.monotonic()
    every = States(samples=6)
    for recording in recordings_killed(mode, world):
        for state in every.of(recording):
            examine(recording, state, None)
    told(f"restore, {mode.name}, killed and begun again", every.counts, started)


@pytest.mark.parametrize("mode", PARAMETERS)
def test_a_restore_whose_fsync_failed_is_not_said_to_be_done(mode: Mode, world: World) -> None:
    started = time.monotonic()
    every = States()
    for recording in recordings_failing(mode, world):
        for state in every.of(recording):
            examine(recording, state, None)
    told(f"restore, {mode.name}, each fsync failing", every.counts, started)
