"""The real command line, killed with SIGKILL at every moment at which it changes something.

After each kill: nothing is damaged, what was committed is there bit for bit, what the user had at the
target of a restore is still there, and the same command run again ends as if nothing had happened.
Where nothing has changed since the moment before (only an fsync came between) the same would be left,
so such moments are skipped. `OUTLAST_KILL_POINTS=all` takes them too; a number takes so many of each
command, from a different one on for each `OUTLAST_KILL_SEED`.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time  # noqa: TID251
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import kill_worlds as worlds
import killer
import pytest
from kill_worlds import ANOTHER, PASSPHRASE, Tree, World, in_snapshot, nothing, on_disk
from safetensors.numpy import load_file

from outlast.clock import ManualClock
from outlast.errors import NoRepository, WrongKey
from outlast.repo import keyring
from outlast.repo.check import open_and_check
from outlast.repo.pack import object_name
from outlast.repo.repository import Repository
from outlast.store.layers import ReadOnlyStore, open_store
from outlast.store.local import LocalStore

POINTS = os.environ.get("OUTLAST_KILL_POINTS", "")
SEED = int(os.environ.get("OUTLAST_KILL_SEED", "20250101"))
ON_S3 = 8
"""moments of each command there, unless told otherwise: each costs a new repository"""
KILLED = -9
LET_IT_RUN = -1
REFUSED = 21

_serial = itertools.count(1)


# -- what must hold ----------------------------------------------------------------------------------


def assert_whole(world: World, *, at_end: bool) -> None:
    """The repository opens, every byte of it is right, and every snapshot is what was backed up."""
    for name, tree in world.untouched.items():
        assert on_disk(world.folder / name) == tree, f"{name} was changed"
    secret = world.passphrases[0].encode() if world.passphrases else None
    store = world.store() if at_end else ReadOnlyStore(world.store())
    try:
        report = open_and_check(store, secret=(lambda: secret) if secret else None, data="all")
        repositories = [world.open(each, read_only=True) for each in world.passphrases or (None,)]
    except NoRepository:
        assert not at_end and not world.known, "there is no repository any more"
        return
    damaged = {damage.object for damage in report.damaged}
    assert damaged <= (frozenset() if at_end else world.damaged), report.damaged
    must = world.known | world.hurt if at_end else world.known
    repository = repositories[0]
    found = {snapshot.id: snapshot for snapshot in repository.snapshots()}
    assert must.keys() <= found.keys(), f"snapshots are gone: {must.keys() - found.keys()}"
    for each, snapshot in found.items():
        if each in world.hurt and not at_end and world.damaged:
            continue
        expected = (must | world.maybe).get(each, world.new)
        assert in_snapshot(repository, snapshot) == expected, f"snapshot {each} is not what was backed up"


def newest_is_the_source(world: World) -> None:
    repository = world.open(read_only=True)
    assert in_snapshot(repository, repository.find_snapshot("latest")) == world.new
    made = len(repository.snapshots()) - len(world.known)
    assert 1 <= made <= 3, f"{made} new snapshots"  # one more for each kill between the commit and the message


def all_or_none_forgotten(world: World) -> None:
    there = [each.id for each in world.open(read_only=True).snapshots() if each.id in world.maybe]
    assert len(there) in (0, len(world.maybe)), f"only a part was forgotten, {there} are left"


def forgotten(world: World) -> None:
    assert not [each.id for each in world.open(read_only=True).snapshots() if each.id in world.maybe]


def nothing_is_deleted_too_early(world: World) -> None:
    """Whatever the log doesn't say is swept can be read: a backup or a restore beside it may be about to."""
    repository = world.open(read_only=True)
    stored = {info.name for info in repository.store.list("packs/")}
    assert stored >= {object_name(name) for name in repository.state.readable_packs()}, "packs are missing"


def needed_chunks(repository: Repository) -> set[bytes]:
    needed = set()
    for snapshot in repository.snapshots():
        needed |= {chunk for chunk, _ in snapshot.manifest}
        needed |= {chunk for entry in repository.entries(snapshot) for chunk, _ in entry.chunks}
    return {bytes.fromhex(chunk) for chunk in needed}


def pruned(world: World) -> None:
    """In packs that are in use, each chunk is needed and is there once."""
    nothing_is_deleted_too_early(world)
    repository = world.open(read_only=True)
    state = repository.state
    needed = needed_chunks(repository)
    assert {repository.locate(chunk).pack.name for chunk in needed} <= state.packs.keys()
    held = sum(ref.chunks for ref in state.packs.values())
    assert held == len(needed), f"{held} chunks are in packs in use, {len(needed)} are needed"


def swept(world: World) -> None:
    """Nothing is stored but what is in use."""
    pruned(world)
    repository = world.open(read_only=True)
    assert not repository.state.condemned
    assert {info.name for info in repository.store.list("packs/")} == {
        object_name(each) for each in repository.state.packs
    }


def resealed(world: World) -> None:
    """Packs that were needed in part are sealed with the new key now."""
    pruned(world)
    repository = world.open(read_only=True)
    assert 2 in {repository.locate(chunk).pack.epoch for chunk in needed_chunks(repository)}


def opens_with_another(world: World) -> None:
    world.open(ANOTHER, read_only=True)


def opens_with_one_alone(world: World) -> None:
    with pytest.raises(WrongKey):
        world.open(ANOTHER, read_only=True)


def is_rotated(world: World) -> None:
    repository = world.open(read_only=True)
    assert repository.state.epoch > 1
    slots = keyring.slots(repository)
    assert len(slots) == 1, f"{len(slots)} keys are left"


# -- what must hold at the target of a restore -------------------------------------------------------


def restored(world: World) -> Tree:
    return world.known[world.notes["snapshot"]]


def beside(world: World) -> tuple[list[Path], list[Path]]:
    """What is beside the target and wasn't there before: hidden, and for everybody to see."""
    names = sorted(set(os.listdir(world.folder)) - world.visible - {"target", "deep"})
    hidden = [world.folder / name for name in names if name.startswith(".")]
    return hidden, [world.folder / name for name in names if not name.startswith(".")]


def new_or_absent(world: World) -> None:
    target = world.folder / "deep" / "er" / "target"
    assert not target.exists() or on_disk(target) == restored(world), "the target is there, and not whole"
    if target.parent.exists():
        assert all(name.startswith(".") for name in os.listdir(target.parent) if name != "target")
    assert beside(world) == ([], [])


def new_there(world: World) -> None:
    assert os.listdir(world.folder / "deep" / "er") == ["target"], "something was left beside the target"
    assert on_disk(world.folder / "deep" / "er" / "target") == restored(world)


def whole_old_or_new(world: World) -> None:
    _, visible = beside(world)
    found = on_disk(world.folder / "target")
    assert found in (world.old, restored(world)), "the target is a mixture"
    assert all(path.name.startswith("target.before-") for path in visible), f"{visible} are to be seen"
    assert len(visible) <= 1


def old_is_somewhere(world: World) -> None:
    whole_old_or_new(world)
    places = [world.folder / "target", *(path for each in beside(world) for path in each if path.is_dir())]
    assert any(on_disk(place) == world.old for place in places), "what the user had is gone"


def replaced(world: World) -> None:
    assert on_disk(world.folder / "target") == restored(world)
    assert beside(world) == ([], []), "something was left beside the target"


def replaced_and_kept(world: World) -> None:
    assert on_disk(world.folder / "target") == restored(world)
    hidden, visible = beside(world)
    assert hidden == [], f"{hidden} were left"
    [kept] = visible
    assert kept.name.startswith("target.before-")
    assert on_disk(kept) == world.old, "what was kept is not what was there"


class _Merged(NamedTuple):
    old: Tree
    new: Tree
    found: Tree
    kept: dict[str, list[tuple[Any, ...]]]
    """path -> what was kept of it as PATH.before-<time>"""


def _merged(world: World) -> _Merged:
    """Of the target all files, without those that were kept; links are followed to their content."""

    def files(tree: Tree) -> Tree:
        found = {path: tree[facts[1]] if facts[0] == "hardlink" else facts for path, facts in tree.items()}
        return {path: facts for path, facts in found.items() if facts[0] != "dir"}

    found: Tree = {}
    kept: dict[str, list[tuple[Any, ...]]] = {}
    for path, facts in files(on_disk(world.folder / "target")).items():
        name, is_kept, _ = path.partition(".before-")
        if is_kept:
            kept.setdefault(name, []).append(facts)
        else:
            found[path] = facts
    chosen = ("part", "model", "only", "same")
    new = {path: facts for path, facts in files(restored(world)).items() if path.rpartition("/")[2].startswith(chosen)}
    return _Merged(files(world.old), new, found, kept)


def each_old_or_new(world: World) -> None:
    merged = _merged(world)
    for path in merged.old.keys() | merged.found.keys():
        facts = merged.found.get(path)
        assert facts in (merged.old.get(path, facts), merged.new.get(path)), f"{path} is neither as before nor restored"
        assert facts or path not in merged.old, f"{path} is gone"
    assert beside(world)[1] == []


def each_old_is_somewhere(world: World) -> None:
    each_old_or_new(world)
    merged = _merged(world)
    for path, facts in merged.old.items():
        assert facts in [merged.found[path], *merged.kept.get(path, [])], f"what the user had as {path} is gone"


def merged(world: World) -> None:
    both = _merged(world)
    assert both.found == both.old | both.new
    assert both.kept == {}
    assert beside(world) == ([], [])


def merged_and_kept(world: World) -> None:
    both = _merged(world)
    assert both.found == both.old | both.new
    differing = {path: [facts] for path, facts in both.old.items() if both.new.get(path, facts) != facts}
    assert both.kept == differing, f"kept are {sorted(both.kept)}, not {sorted(differing)}, or not each once"
    assert beside(world) == ([], [])


def tensor_old_or_new(world: World) -> None:
    path = world.folder / "bias.safetensors"
    old = world.old[""][1]
    contents = [each.read_bytes() for each in world.folder.glob("bias.safetensors*")]
    assert old in contents, "what the user had is gone"
    assert path.read_bytes() == old or load_file(path)["bias"].tolist() == [1.0] * 64
    assert all(each.name.startswith("bias.safetensors.before-") for each in beside(world)[1])


def tensor_restored(world: World) -> None:
    assert load_file(world.folder / "bias.safetensors")["bias"].tolist() == [1.0] * 64
    hidden, visible = beside(world)
    assert hidden == []
    kept = [each.read_bytes() for each in visible]
    # Killed after its end but for the message: then the next run keeps what that one has restored.
    assert kept.count(world.old[""][1]) == 1
    assert len(kept) <= 3


# -- the table ---------------------------------------------------------------------------------------


def made_or_refused(world: World) -> int:
    return REFUSED if list(world.store().list("format")) else 0


def added_or_refused(world: World) -> int:
    try:
        world.open(ANOTHER, read_only=True)
    except WrongKey:
        return 0
    return REFUSED


def removed_or_not_found(world: World) -> int:
    return 0 if list(world.store().list(f"keys/{world.notes['key']}")) else 1


def done_again(world: World) -> int:
    return 0


@dataclass(frozen=True)
class Row:
    """A command, what it finds, and what must hold whenever it is killed, and when it has ended well after that."""

    name: str
    arguments: str
    world: Callable[[World], None]
    always: Callable[[World], None] = nothing
    done: Callable[[World], None] = nothing
    again: Callable[[World], int] = done_again
    """the exit code of the same command after a kill"""
    passphrases: tuple[str, ...] = ()

    @property
    def only_reads(self) -> bool:
        """Whether it changes nothing in the repository."""
        return self.name.startswith("restore")


SEALED = (PASSPHRASE,)
NEW = "restore {snapshot} --to deep/er/target"
OVER = "restore {snapshot} --to target"
MERGE = f"{OVER} --include part* --include model* --include only* --include same"
TENSOR = "restore {snapshot} --tensor bias --to bias.safetensors"
COPY = "copy --from {folder}/other --to {url}"
CONDEMN = "prune --max-unused 0% --max-delete 100%"
SWEEP = f"{CONDEMN} --grace 0"
ROWS = [
    Row("init", "init", nothing, again=made_or_refused),
    Row("init, encrypted", "init --encrypt", nothing, again=made_or_refused, passphrases=SEALED),
    Row("backup, first", "backup model", worlds.repository_alone, done=newest_is_the_source),
    Row("backup, changed", "backup model", worlds.one_snapshot, done=newest_is_the_source),
    Row("backup, encrypted", "backup model", worlds.one_snapshot, done=newest_is_the_source, passphrases=SEALED),
    Row("restore, new", NEW, worlds.to_restore, new_or_absent, new_there),
    Row("restore, over", OVER, worlds.to_restore_over, old_is_somewhere, replaced_and_kept),
    Row("restore, overwriting", f"{OVER} --overwrite", worlds.to_restore_over, whole_old_or_new, replaced),
    Row("restore, merge", MERGE, worlds.to_restore_over, each_old_is_somewhere, merged_and_kept),
    Row("restore, merge overwriting", f"{MERGE} --overwrite", worlds.to_restore_over, each_old_or_new, merged),
    Row("restore, tensor", TENSOR, worlds.to_restore_tensor, tensor_old_or_new, tensor_restored),
    Row("forget", "forget --keep-last 1", worlds.to_forget, all_or_none_forgotten, forgotten),
    Row("prune, condemning", CONDEMN, worlds.to_prune, nothing_is_deleted_too_early, pruned),
    Row("prune, sweeping", SWEEP, worlds.to_sweep, nothing_is_deleted_too_early, swept),
    Row("prune, all at once", SWEEP, worlds.to_prune, nothing_is_deleted_too_early, swept),
    Row("prune, resealing", SWEEP, worlds.to_reseal, nothing_is_deleted_too_early, resealed, passphrases=SEALED),
    Row("copy", COPY, worlds.to_copy),
    Row("copy, encrypting", COPY, worlds.to_copy, passphrases=SEALED),
    Row("check", "check --data all", worlds.three_snapshots),
    Row("check, repair", "check --repair --from {folder}/other", worlds.to_repair),
    Row("key add", "key add", worlds.one_snapshot, nothing, opens_with_another, added_or_refused, SEALED),
    Row("key remove", "key remove {key}", worlds.two_keys, nothing, opens_with_one_alone, removed_or_not_found, SEALED),
    Row("key rotate", "key rotate", worlds.one_snapshot, done=is_rotated, passphrases=SEALED),
]


# -- running them ------------------------------------------------------------------------------------


class Server:
    """Runs the command line in forks of one process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        command = [sys.executable, "-B", killer.__file__, "serve"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def run(self, row: Row, world: World, point: int, count: Path | None = None) -> int:
        """Kill it at a moment: 0 counts them. The exit code, `KILLED` if it was."""
        words = {**world.notes, "folder": str(world.folder), "url": world.url}
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ALLOW_HTTP", "AWS_ENDPOINT_URL")
        job = {
            "folder": str(world.folder),
            "environment": {name: os.environ[name] for name in names if name in os.environ} | world.environment(),
            "arguments": [word.format(**words) for word in row.arguments.split()],
            "point": point,
            "count": str(count) if count else None,
            "store_alone": world.url.startswith("s3://"),
            "output": str(self._folder / "output"),
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return int(self._read())

    def output(self) -> str:
        """What was said since the last time."""
        path = self._folder / "output"
        text = path.read_text() if path.exists() else ""
        path.unlink(missing_ok=True)
        return text

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder in memory, where there is one: a SIGKILL takes nothing from the page cache, so a disk adds nothing."""
    shared = Path("/dev/shm")
    found = Path(tempfile.mkdtemp(prefix="outlast-", dir=shared if os.access(shared, os.W_OK) else None))
    yield found
    shutil.rmtree(found)


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Server]:
    started = Server(place)
    yield started
    started.stop()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for path, value in killer.SMALL.items():
        module, _, name = path.rpartition(".")
        monkeypatch.setattr(import_module(module), name, value)


def template(row: Row, place: Path) -> World:
    """What the row's command finds, made once."""
    folder = place / f"template{next(_serial)}"
    folder.mkdir()
    world = World(folder, str(folder / "repository"), row.passphrases)
    row.world(world)
    return replace(world, visible=frozenset(os.listdir(folder)))


def unpacked(made: World, place: Path, bucket: str | None) -> World:
    """A fresh copy of it; the repository in the bucket, if there is one."""
    folder = place / "world"
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(["cp", "-a", made.folder, folder], check=True)
    if bucket is None:
        return replace(made, folder=folder, url=str(folder / "repository"))
    url = f"{bucket}/{next(_serial)}"
    source, target = LocalStore(str(folder / "repository")), open_store(url)
    for info in source.list(""):
        target.put_if_absent(info.name, [source.get(info.name)])
    shutil.rmtree(folder / "repository", ignore_errors=True)
    return replace(made, folder=folder, url=url)


def chosen(moments: list[dict[str, Any]], at_most: int) -> list[int]:
    """The moments to kill at, spread evenly."""
    if POINTS == "all":
        return list(range(1, len(moments) + 1))
    fresh = [number for number, moment in enumerate(moments, 1) if moment["fresh"]]
    limit = int(POINTS or at_most)
    if limit >= len(fresh):
        return fresh
    step = len(fresh) / limit
    offset = (SEED * 0.618) % step
    return [fresh[int(offset + number * step)] for number in range(limit)]


def kill_everywhere(row: Row, place: Path, server: Server, bucket: str | None = None) -> None:
    started = time.monotonic()
    made = template(row, place)
    # Threads race and names come by chance: what the shortest of three has, nearly all have.
    moments = min((counted_moments(row, unpacked(made, place, bucket), server, place) for _ in range(3)), key=len)
    points = chosen(moments, ON_S3 if bucket else len(moments))
    moves = ManualClock(seed=SEED)
    problems = []
    killed = 0
    for number, point in enumerate(points):
        # Every third is killed once more when it is run again, at any moment, which may come too late.
        second = [1 + int.from_bytes(moves.random_bytes(4), "big") % len(moments)] if number % 3 == 2 else []
        server.output()
        try:
            killed += kill_once(row, unpacked(made, place, bucket), server, [point, *second])
        except Exception as exc:
            problems.append(f"{row.name}, {[point, *second]}: {type(exc).__name__}: {exc}\n{server.output()}")
    counts = f"{len(moments)} moments, {len(points)} tried, {killed} killed, {len(problems)} problems"
    print(f"\n{row.name}, {'S3' if bucket else 'local'}: {counts}; {time.monotonic() - started:.1f} s")
    assert not problems, "\n".join(problems)
    # The last moments may be missed by those that are shorter still.
    assert killed >= 0.8 * len(points)


def counted_moments(row: Row, world: World, server: Server, place: Path) -> list[dict[str, Any]]:
    """Every moment of the command when nothing kills it."""
    assert server.run(row, world, 0, place / "count") == 0, server.output()
    counted = json.loads((place / "count").read_text())
    assert not counted["unseen"], "the killer does not know these calls"
    assert_whole(world, at_end=True)
    row.done(world)
    moments: list[dict[str, Any]] = counted["moments"]
    return moments


def kill_once(row: Row, world: World, server: Server, points: list[int]) -> bool:
    """Kill it at the first of the points, begin again, kill that one at the next, and let the last one end.

    Gives whether the first one was killed, and not over before.
    """
    expected = 0
    first = None
    for point in points:
        code = server.run(row, world, point)
        assert code in (KILLED, expected), f"it ended with {code}"
        first = code if first is None else first
        assert_whole(world, at_end=False)
        row.always(world)
        expected = row.again(world)
    code = server.run(row, world, LET_IT_RUN)
    assert code == expected, f"the same command again ended with {code}"
    assert_whole(world, at_end=True)
    row.done(world)
    return first == KILLED


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_killed_at_every_change(row: Row, place: Path, server: Server) -> None:
    kill_everywhere(row, place, server)


@pytest.mark.server
@pytest.mark.parametrize("row", [row for row in ROWS if not row.only_reads], ids=lambda row: row.name)
def test_killed_at_every_request_that_changes(row: Row, place: Path, server: Server, s3: str) -> None:
    kill_everywhere(row, place, server, s3)
