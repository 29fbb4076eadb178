"""The enumeration of restores finds what it is for: without any one sync, or with one too late, it fails."""

from __future__ import annotations

import ast
import inspect
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import pytest
from disk_calls import MODULES, SYNCING
from test_restore_enumeration import (
    ALTERNATIVES_FEW,
    MODES,
    TARGET,
    TENSORS,
    Mode,
    Place,
    Recording,
    States,
    World,
    examine,
    record,
    recordings_failing,
    recordings_killed,
    small,
    world,
)

from outlast.backup import folder
from outlast.testing.powercut import Step

__all__ = ["small", "world"]

# Syncs without which nothing is lost, and what they are for.
NOT_NEEDED = {
    "staging._complete os.fsync 1": "syncfs comes later; it only has less to do where big files are written already",
}
# No mutant of these is of use: the mode fails as it is.


def syncs() -> dict[str, tuple[str, int]]:
    """Every place from which a sync comes: "restore._put_in_place sync_folder 2" -> (module, line)."""
    found: dict[str, tuple[str, int]] = {}
    for module in MODULES:
        short = module.__name__.rpartition(".")[2]
        for function in ast.walk(ast.parse(inspect.getsource(module))):
            if short != "folder" and isinstance(function, ast.FunctionDef) and function.name not in SYNCING:
                calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and is_sync(node)]
                for number, call in enumerate(sorted(calls, key=lambda node: node.lineno), 1):
                    found[f"{short}.{function.name} {ast.unparse(call.func)} {number}"] = short, call.lineno
    return found


def is_sync(call: ast.Call) -> bool:
    return ast.unparse(call.func) in ("os.fsync", *SYNCING)


def first_failure(mutants: Iterable[Recording], world: World) -> str:
    """What the enumeration finds first; empty when it finds nothing."""
    every: dict[str, States] = {}
    for mutant in mutants:
        place = Place(mutant.mode, world)
        for state in every.setdefault(mutant.mode.name, States()).of(mutant):
            try:
                examine(mutant, state, place if state.alternatives <= ALTERNATIVES_FEW else None)
            except AssertionError as exc:
                return str(exc)
    return ""


class Recordings:
    """The undisturbed ones first, then those of failed and of killed restores; each made when it is first needed."""

    def __init__(self, world: World) -> None:
        self._made: list[Recording] = []
        undisturbed = (record(mode, world) for mode in MODES)
        failing = (recording for mode in MODES for recording in recordings_failing(mode, world))
        killed = (recording for mode in MODES for recording in recordings_killed(mode, world))
        self._source = chain(undisturbed, failing, killed)

    def __iter__(self) -> Iterator[Recording]:
        yield from self._made
        for recording in self._source:
            self._made.append(recording)
            yield recording


@pytest.fixture(scope="module")
def recordings(world: World) -> Recordings:
    return Recordings(world)


def without(recordings: Recordings, site: tuple[str, int]) -> Iterator[Recording]:
    """Those that have syncs at this place, without them."""
    for recording in recordings:
        numbers = {number for number, found in recording.sites.items() if found == site}
        if any(number >= recording.since for number in numbers):
            since = max(recording.since, min(numbers))  # before, all is as it is without the change
            trace = [Step("nothing") if number in numbers else step for number, step in enumerate(recording.trace)]
            yield recording._replace(trace=trace, since=since)


@pytest.mark.parametrize("sync", sorted(syncs().keys() - NOT_NEEDED.keys()))
def test_no_sync_is_superfluous(sync: str, world: World, recordings: Recordings) -> None:
    site = syncs()[sync]
    failure = first_failure(without(recordings, site), world)
    print(f"\n{sync}: {failure[:200]}")
    assert failure, f"the enumeration does not notice that {sync} is missing (line {site[1]})"


def test_where_there_is_no_syncfs_every_file_and_every_folder_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("x", "a/y", "a/b/z"):
        (tmp_path / name).write_text(name)
    (tmp_path / "link").symlink_to("x")
    real, synced = os.fsync, set()
    monkeypatch.setattr(folder, "_system", object)
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.add(os.fstat(fd).st_ino), real(fd)))
    with folder.Folder(os.fsencode(tmp_path)) as opened:
        folder.sync_everything(opened)
    wanted = {path.lstat().st_ino for path in [tmp_path, *tmp_path.rglob("*")] if not path.is_symlink()}
    assert synced == wanted


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_nothing_is_published_before_it_is_durable(mode: Mode, world: World) -> None:
    """The last sync of what was built changes places with the call that gives it its name."""
    recording = record(mode, world)
    published, built = places_of(recording)
    trace = list(recording.trace)
    trace.insert(published, trace.pop(built))
    failure = first_failure([recording._replace(trace=trace, since=built)], world)
    print(f"\n{mode.name}: {recording.trace[built]} after {recording.trace[published]}: {failure[:200]}")
    assert failure, f"the enumeration does not notice {recording.trace[built]} after {recording.trace[published]}"


def places_of(recording: Recording) -> tuple[int, int]:
    """Numbers of the step that first changes the target to something new, and of the sync before it."""

    def is_target(path: str) -> bool:
        return path in (TARGET, TENSORS) or path.endswith(f"/{TARGET}") or path.startswith(f"{TARGET}/")

    published = next(
        number
        for number, step in enumerate(recording.trace)
        if step.call in ("rename", "exchange") and is_target(step.target) and not is_target(step.path)
    )
    hidden = f".{recording.trace[published].path.partition('.')[2].partition('/')[0]}"
    built = max(
        number
        for number, step in enumerate(recording.trace[:published])
        if step.call in ("syncfs", "fsync") and hidden in step.path
    )
    return published, built
