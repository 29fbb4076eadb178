"""Many seeded worlds, each with several writers, prunes and others at once: nothing is ever lost.

`OUTLAST_SIM_SEEDS` sets how many (150), `OUTLAST_SIM_SEED` repeats one of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from msgspec import structs
from simulated import ALL_GOES, blob, run_town, small_world, store_snapshot

from outlast.clock import ManualClock
from outlast.errors import Busy, OutlastError
from outlast.records import Snapshot
from outlast.repo import forget, prune
from outlast.repo.check import open_and_check
from outlast.repo.log import Log
from outlast.repo.pack import object_name
from outlast.repo.repository import Repository
from outlast.repo.state import SNAPSHOT, SWEEP, State
from outlast.repo.write import Writer
from outlast.store.memory import MemoryStore
from outlast.testing.faults import FaultyStore, error
from outlast.testing.sim import Actor, Dice, Faults, Killed, Stuck, World

ONLY = os.environ.get("OUTLAST_SIM_SEED")
SEEDS = [int(ONLY)] if ONLY else list(range(int(os.environ.get("OUTLAST_SIM_SEEDS", "150"))))
MUTANT_SEEDS = range(160, 310)
"""worlds that a broken engine may live through at most before it is found out"""


@pytest.mark.slow
def test_nothing_is_lost_in_any_world(capsys: pytest.CaptureFixture[str]) -> None:
    met: Counter[str] = Counter()
    for seed, crowded in product(SEEDS, (False, True)):
        if crowded and seed % 4 and not ONLY:
            continue
        town = run_town(seed, crowded=crowded)
        met += Counter(step.fault for step in town.world.trace if step.fault)
        met["operations"] += len(town.world.trace)
        met["snapshots"] += len(town.oracles["main"].ever)
        met["reads of snapshots"] += town.reads
        met += town.oracles["main"].met
    with capsys.disabled():
        print(f"\n{len(SEEDS)} worlds: " + ", ".join(f"{count} {what}" for what, count in met.most_common()))
    if not ONLY:
        # Else the worlds are too quiet to prove anything.
        assert {"rescued", "sweep", "condemn", "died after", "lost reply", "lands", "waits"} <= met.keys()


# -- engines that are broken on purpose ----------------------------------------------------------------


@contextmanager
def _bodies(change: Callable[[str, State, dict[str, Any]], dict[str, Any]]) -> Iterator[None]:
    """Every entry's body is changed before it is committed."""
    append = Log.append

    def changed(self: Log, kind: str, make_body: Callable[[State], dict[str, Any]]) -> Any:
        return append(self, kind, lambda state: change(kind, state, make_body(state)))

    with patch.object(Log, "append", changed):
        yield


@contextmanager
def commits_without_rescue() -> Iterator[None]:
    def without(kind: str, state: State, body: dict[str, Any]) -> dict[str, Any]:
        if kind == SNAPSHOT:
            return {**body, "packs": [each for each in body["packs"] if each["name"] not in state.condemned]}
        return body

    with _bodies(without):
        yield


@contextmanager
def commits_whatever_is_gone() -> Iterator[None]:
    append = Writer._append

    def careless(self: Writer, kind: str, body: dict[str, Any], relied_on: set[str]) -> None:
        log = self.repository.log
        log.swept = set()
        append(self, kind, body, {name for name in relied_on if name in log.state.condemned})

    with patch.object(Writer, "_append", careless):
        yield


@contextmanager
def relies_on_condemned_packs() -> Iterator[None]:
    append = Writer._append

    def is_live(self: Repository, pack: str) -> bool:
        return pack in self.state.packs or pack in self.own_packs or pack in self.state.condemned

    def without_rescue(self: Writer, kind: str, body: dict[str, Any], relied_on: set[str]) -> None:
        append(self, kind, body, set())

    with patch.object(Repository, "_is_live", is_live), patch.object(Writer, "_append", without_rescue):
        yield


@contextmanager
def condemns_without_a_second_look() -> Iterator[None]:
    with patch.object(prune, "_holders", lambda *_: set()):
        yield


@contextmanager
def deletes_before_the_commit() -> Iterator[None]:
    append = Log.append

    def hasty(self: Log, kind: str, make_body: Callable[[State], dict[str, Any]]) -> Any:
        for name in make_body(self.state)["packs"] if kind == SWEEP else ():
            self._store.delete(object_name(name))
        return append(self, kind, make_body)

    with patch.object(Log, "append", hasty):
        yield


@contextmanager
def sweeps_what_was_rescued() -> Iterator[None]:
    """What it deletes is what it found condemned at first, not what is condemned where the commit comes to stand."""
    append = Log.append

    def stubborn(self: Log, kind: str, make_body: Callable[[State], dict[str, Any]]) -> Any:
        first = make_body(self.state)["packs"] if kind == SWEEP else ()
        entry = append(self, kind, make_body)
        for name in first:
            self._store.delete(object_name(name))
        return entry

    with patch.object(Log, "append", stubborn):
        yield


@contextmanager
def ignores_other_prunes() -> Iterator[None]:
    plan = prune.plan
    with patch.object(prune, "plan", lambda *given, **named: structs.replace(plan(*given, **named), live=frozenset())):
        yield


@contextmanager
def forgets_its_write_id() -> Iterator[None]:
    """After a lost reply it takes its own entry for another's."""
    refresh = Log.refresh

    def blind(self: Log) -> Any:
        refresh(self)
        return []

    with patch.object(Log, "refresh", blind):
        yield


MUTANTS = [
    commits_without_rescue,
    commits_whatever_is_gone,
    relies_on_condemned_packs,
    condemns_without_a_second_look,
    deletes_before_the_commit,
    sweeps_what_was_rescued,
    ignores_other_prunes,
    forgets_its_write_id,
]


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_broken_engine_is_found_out(mutant: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> None:
    with mutant():
        for seed, crowded in product(MUTANT_SEEDS, (False, True)):
            try:
                run_town(seed, crowded=crowded)
            except (AssertionError, OutlastError) as exc:
                with capsys.disabled():
                    print(f"\n{mutant.__name__}: seed {seed}: {exc}"[:200])
                return
    pytest.fail(f"{len(MUTANT_SEEDS)} worlds did not notice that the engine {mutant.__name__.replace('_', ' ')}")


def test_what_was_swept_once_is_never_relied_on_again() -> None:
    """Its object, which a slow prune left over, is condemned anew; that is no reason to rescue it."""
    with small_world():
        store, clock = MemoryStore(), ManualClock(seed=1)
        repository = Repository.create(store, clock=clock)
        old = store_snapshot(repository, "one", {"work": "1", "file0": "9"})
        slow = Repository.open(store, clock=ManualClock(seed=2))
        writer = slow.writer()
        writer.add(writer.prepare(blob(9)[:500]))
        assert writer.bytes_added == 0, "it relies on what the first snapshot stored"
        forget.execute(repository, forget.plan(repository, ids=[old.id]), allow_empty=True)
        undeletable = FaultyStore(store)
        undeletable.script(error(), "delete", "packs/", times=99)
        first = Repository.open(undeletable, clock=ManualClock(seed=3))
        prune.prune(first, ALL_GOES)
        assert first.log.swept and not first.state.condemned
        second = Repository.open(store, clock=ManualClock(seed=4))
        prune.execute(second, prune.plan(second, ALL_GOES), prune.PruneReport())
        assert second.state.condemned.keys() == first.log.swept
        with pytest.raises(Busy, match="were deleted or quarantined"):
            writer.commit(Snapshot("", "backup", "two", "2090-01-01T00:00:00.000000Z"))
        for name in first.log.swept:
            store.delete(object_name(name))  # the first prune comes round to it at last
        assert open_and_check(store, data="all").ok


# -- the world itself ----------------------------------------------------------------------------------

SHOW = """
import sys
sys.path.insert(0, sys.argv[1])
from simulated import ALL_GOES, blob, run_town, small_world, store_snapshot
for step in run_town(int(sys.argv[2])).world.trace:
    print(step)
"""


def trace_of(seed: int, hash_seed: str) -> list[str]:
    """In a process of its own, where sets of names come in another order."""
    command = [sys.executable, "-c", SHOW, str(Path(__file__).parent), str(seed)]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("seed", [3, 7])
def test_the_same_seed_gives_the_same_run_even_in_another_process(seed: int) -> None:
    first = trace_of(seed, "1")
    assert len(first) > 100
    assert first == trace_of(seed, "2")
    assert first != trace_of(seed + 100, "1")


def test_a_killed_actor_does_nothing_more() -> None:
    def work(actor: Actor) -> None:
        try:
            for number in range(100):
                actor.store().put(f"object{number}", [b"x"])
        finally:
            with pytest.raises(Killed):
                actor.store().put("after/its/death", [b"x"])
            with pytest.raises(Killed):
                actor.clock.sleep(1)

    world = World(5, Faults(killed=0.1))
    world.add("one", work)
    world.run()
    [actor] = world.actors
    assert (actor.killed, actor.error, actor.result) == (True, None, None)
    names = [info.name for info in world.store().list("")]
    assert 0 < len(names) < 100
    assert "after/its/death" not in names


def test_an_actor_that_waits_for_ever_is_named() -> None:
    def spin(actor: Actor) -> None:
        while True:
            with pytest.raises(OutlastError):
                actor.store().get("what/never/comes")

    world = World(1)
    world.add("one", spin)
    with pytest.raises(Stuck, match="one did not come to an end in 500 operations"):
        world.run(steps_max=500)


def test_a_create_that_was_given_up_lands_later_and_meets_what_is_there() -> None:
    def work(actor: Actor) -> str:
        try:
            actor.store().put_if_absent("entry", [b"first"])
        except OutlastError as exc:
            return exc.kind
        return "done"

    world = World(1, Faults(late=1.0))
    world.add("one", work)
    world.run()
    assert world.actors[0].result == "unavailable"
    assert world.store().get("entry") == b"first", "it landed after its actor was gone"

    world = World(1, Faults(late=1.0))
    world.add("one", work)
    world.add("two", lambda actor: actor.store().put_if_absent("entry", [b"second"]), Faults())
    world.run()
    assert world.store().get("entry") in (b"first", b"second")
    assert next(step.fault for step in world.trace if step.fault) == "late"


def test_what_a_watcher_objects_to_ends_the_run() -> None:
    def look(store: str, method: str, name: str) -> None:
        assert name != "bad", "it was written"

    world = World(1)
    world.watch(look)
    world.add("one", lambda actor: [actor.store().put(name, [b""]) for name in ("good", "bad", "never")])
    with pytest.raises(AssertionError, match="it was written"):
        world.run()
    assert [info.name for info in world.store().list("")] == ["bad", "good"]


def test_dice_are_fair_enough_and_repeat() -> None:
    one, two = Dice(9), Dice(9)
    drawn = [one.below(6) for _ in range(600)]
    assert drawn == [two.below(6) for _ in range(600)]
    assert min(Counter(drawn).values()) > 60
    assert not one.chance(0.0) and one.chance(1.0)
