"""The crash enumeration finds what it is for: without any one fsync, or in another order, it fails.

A mutant is made of the recorded traces: the steps of one line of code are left out, or two
neighbours change places, and what was acknowledged after a step is acknowledged after it in its new
place. For the code that is the same change, since it goes on alike whatever an fsync did.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from crashing import (
    ROOT,
    Killed,
    MortalDisk,
    Recording,
    States,
    examine,
    record,
    recordings_killed,
    small_world,
)
from test_enumeration import COMMANDS

from outlast.errors import Exists
from outlast.store import local
from outlast.store.local import LocalStore
from outlast.testing.faults import Mutation
from outlast.testing.powercut import Step, cuts

LEFT_OUT = Step("close")

# Derived objects may be lost, but not be half there. `format` is made durable a second time when
# its creation is tried out, and what is in `tmp/` need not last.
NEEDED_ORDERS = {
    *(("write", "fsync_file", kind) for kind in ("format", "keys", "packs", "log", "state", "index")),
    *(("fsync_file", "link", kind) for kind in ("format", "log")),  # elsewhere a folder is made between the two
    *(("mkdir", "fsync_dir", kind) for kind in ("above", "root", "keys", "packs", "log")),
    *(("link", "fsync_dir", kind) for kind in ("keys", "packs", "log")),
}

# What is written first, and what next. All others may change places as far as one process is concerned:
# derived objects don't need one another, deletions come when nobody needs the object, and a pack that comes
# sooner than an entry which does not name it is garbage for a while. That `sweep` is in the log before a
# pack is deleted matters to other writers only, and is for the tests with several of them to show.
NEEDED_ORDERS_OF_OBJECTS = {
    ("keys", "format"),  # else nobody could open what has just been made
    ("keys", "log"),  # nor what the entry says to seal with the new key
    ("log", "keys"),  # the number of a data key is reserved before the key is made
    ("packs", "log"),
    ("log", "log"),
    ("log", "state"),
    ("log", "-keys"),  # the log says that a key goes before it goes, else it would pass for lost
}


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with small_world():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutants")


class Recordings:
    """The undisturbed recordings first, then those of killed commands; each made when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self._made: list[Recording] = []
        self._source = self._make(folder)

    @staticmethod
    def _make(folder: Path) -> Iterator[Recording]:
        for command in COMMANDS:
            yield record(command, folder)
        for command in COMMANDS:
            yield from recordings_killed(command, folder)

    def __iter__(self) -> Iterator[Recording]:
        yield from self._made
        for recording in self._source:
            self._made.append(recording)
            yield recording


@pytest.fixture(scope="module")
def recordings(folder: Path) -> Recordings:
    return Recordings(folder)


def first_failure(mutants: Iterable[Recording], prefixes: bool = False) -> str:
    """What the enumeration finds first; empty when it finds nothing."""
    every = States()
    for mutant in mutants:
        for state in every.of_prefixes(mutant) if prefixes else every.of_cuts(mutant):
            try:
                examine(mutant, state)
            except AssertionError as exc:
                return str(exc)
    return ""


# -- every fsync -------------------------------------------------------------------------------------


def fsyncs() -> dict[str, int]:
    """The calls of fsync in store/local.py: "function fsync_dir 1" -> line."""
    found: dict[str, int] = {}
    for function in ast.walk(ast.parse(inspect.getsource(local))):
        if isinstance(function, ast.FunctionDef):
            calls = [
                node
                for node in ast.walk(function)
                if isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr.startswith("fsync_")
            ]
            for number, call in enumerate(sorted(calls, key=lambda node: node.lineno), 1):
                found[f"{function.name} {call.func.attr} {number}"] = call.lineno  # type: ignore[attr-defined]
    return found


def without(recording: Recording, line: int) -> Recording:
    steps = [LEFT_OUT if recording.sites[number] == line else step for number, step in enumerate(recording.steps)]
    return replace(recording, steps=steps)


# Those that matter to other writers, or to a store alone: each has a test of its own.
APART = {"_publish_new fsync_dir 1", "delete fsync_dir 1"}


@pytest.mark.parametrize("fsync", [each for each in fsyncs() if each not in APART])
def test_no_fsync_is_superfluous(fsync: str, recordings: Recordings) -> None:
    line = fsyncs()[fsync]
    failure = first_failure(without(recording, line) for recording in recordings if line in recording.sites.values())
    print(f"\n{fsync}: {failure[:200]}")
    assert failure, f"the enumeration does not notice that {fsync} is missing (line {line} of store/local.py)"


def lost_name(recording_of: MortalDisk, raised_at: int, steps: Sequence[Step]) -> bool:
    """Whether a cut can take an object of which somebody was told, by then, that it exists."""
    for number, remains in cuts(recording_of.initial, steps):
        if number >= raised_at and any("store/name" not in tree for tree in remains.outcomes()):
            return True
    return False


def test_a_name_that_somebody_was_told_is_taken_stays_taken(tmp_path: Path) -> None:
    """No command of today is harmed without this fsync: each goes on to write in the same folder. A lease is."""
    (tmp_path / "disk").mkdir()
    disk = MortalDisk(str(tmp_path / "disk"))
    first, second = (LocalStore(f"{disk.folder}/store", disk=disk) for _ in range(2))
    first.put_if_absent("other", [b""])
    second.put_if_absent("another", [b""])
    disk.changes_left = 2
    with pytest.raises(Killed):
        first.put_if_absent("name", [b"bytes"])
    disk.changes_left = None
    with pytest.raises(Exists):
        second.put_if_absent("name", [b"other bytes"])
    raised_at = len(disk.trace)
    assert not lost_name(disk, raised_at, disk.trace)
    line = fsyncs()["_publish_new fsync_dir 1"]
    mutant = [LEFT_OUT if disk.sites[number] == line else step for number, step in enumerate(disk.trace)]
    assert mutant != disk.trace
    assert lost_name(disk, raised_at, mutant)


def undone(disk: MortalDisk, steps: Sequence[Step]) -> bool:
    """Whether a cut can leave neither what was deleted, nor the reason for which it was."""
    outcomes = (tree for _, remains in cuts(disk.initial, steps) for tree in remains.outcomes())
    return any("store/packs" in tree and {"store/packs/old", "store/log/2"}.isdisjoint(tree) for tree in outcomes)


def test_what_was_read_is_durable_before_it_makes_something_go(tmp_path: Path) -> None:
    """A prune deletes what the entry of another one says: a cut must not undo that entry alone."""
    place = tmp_path / "disk" / "store"
    for name in ("log/1", "packs/old"):
        (place / name).parent.mkdir(parents=True)
        (place / name).write_bytes(b"bytes")
    disk = MortalDisk(str(tmp_path / "disk"))
    first, second = (LocalStore(str(place), disk=disk) for _ in range(2))
    first.put("tmp-is-there", [b""])
    disk.changes_left = 2
    with pytest.raises(Killed):
        first.put_if_absent("log/2", [b"packs/old is to go"])
    disk.changes_left = None
    assert second.get("log/2")
    second.delete("packs/old")
    assert not undone(disk, disk.trace)
    line = fsyncs()["delete fsync_dir 1"]
    mutant = [LEFT_OUT if disk.sites[number] == line else step for number, step in enumerate(disk.trace)]
    assert mutant != disk.trace
    assert undone(disk, mutant)


# -- every order -------------------------------------------------------------------------------------


def swapped_steps(recording: Recording, number: int) -> Recording:
    steps = list(recording.steps)
    steps[number : number + 2] = reversed(steps[number : number + 2])
    promises = [each._replace(steps=number + 2) if each.steps == number + 1 else each for each in recording.promises]
    return replace(recording, steps=steps, promises=promises)


def swapped_mutations(recording: Recording, number: int) -> Recording:
    mutations = list(recording.trace.mutations)
    mutations[number : number + 2] = reversed(mutations[number : number + 2])
    trace = msgspec.structs.replace(recording.trace, mutations=mutations)
    promises = [
        each._replace(mutations=number + 2) if each.mutations == number + 1 else each for each in recording.promises
    ]
    return replace(recording, trace=trace, promises=promises)


def test_no_two_objects_may_change_places_unless_it_is_known_why(folder: Path) -> None:
    neighbours: set[tuple[str, str]] = set()
    needed: set[tuple[str, str]] = set()
    for command in COMMANDS:
        recording = record(command, folder)
        for number, pair in enumerate(pairwise(map(kind_of_mutation, recording.trace.mutations))):
            neighbours.add(pair)
            if first_failure([swapped_mutations(recording, number)], prefixes=True):
                needed.add(pair)
    print(f"\n{len(neighbours)} kinds of neighbours, of which {len(needed)} have an order")
    assert needed == NEEDED_ORDERS_OF_OBJECTS


def kind_of_mutation(mutation: Mutation) -> str:
    return ("-" if mutation.method == "delete" else "") + mutation.name.partition("/")[0]


def kinds_of_steps(recording: Recording) -> list[str]:
    """What each step is about: the kind of object, `root` for the folder of the store, `above` for what it is in."""

    def kind(path: str) -> str:
        if not f"{path}/".startswith(f"{ROOT}/"):
            return "above"
        return path.removeprefix(ROOT).lstrip("/").partition("/")[0] or "root"

    files = {step.path: step.file for step in recording.steps if step.call == "open_temp"}
    objects = {files[step.path]: kind(step.target) for step in recording.steps if step.call == "link"}
    return [objects.get(step.file, "tmp") if step.file else kind(step.target or step.path) for step in recording.steps]


def test_no_two_calls_may_change_places_unless_it_is_known_why(folder: Path) -> None:
    needed: set[tuple[str, str, str]] = set()
    impossible = 0
    commands = [command for command in COMMANDS if command.name in {"init, encrypted", "first backup"}]
    for command in commands:
        recording = record(command, folder)
        kinds = kinds_of_steps(recording)
        for number, (first, second) in enumerate(pairwise(recording.steps)):
            if second.file == first.file and first.call == "open_temp":
                impossible += 1  # nothing can be written to a file that is not open
            elif first_failure([swapped_steps(recording, number)]):
                needed.add((first.call, second.call, kinds[number]))
    print(f"\n{len(needed)} orders are needed, {impossible} can't be changed")
    assert len(commands) == 2
    assert needed == NEEDED_ORDERS
