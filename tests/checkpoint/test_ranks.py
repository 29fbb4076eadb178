"""Several ranks of torch.distributed: one commit for all or none, and loading on another number of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpoint.ranks import shares
from outlast.checkpoint.schedule import Told, decide
from outlast.repo.check import check
from outlast.repo.repository import Repository
from outlast.store.local import LocalStore

TOGETHER = Path(__file__).with_name("together.py")


def scene(ranks: int, name: str, folder: Path) -> list[Any]:
    """What each rank said."""
    ran = subprocess.run(
        [sys.executable, str(TOGETHER), str(ranks), name, str(folder)], capture_output=True, text=True, timeout=300
    )
    found = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith(("{", "null"))]
    assert len(found) == ranks, ran.stderr
    if name != "one_dies":
        assert None not in found, ran.stderr[-4000:]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "saved_as, ranks, loaded_as, others",
    [
        ("save", 2, "load", 1),
        ("save", 1, "load", 3),
        ("save-sharded", 2, "load", 1),
        ("save-sharded", 2, "load-sharded", 3),
        ("save-sharded", 3, "load-sharded", 2),
        ("save", 1, "load-sharded", 2),
        ("save-sharded", 2, "load", 2),
    ],
)
def test_another_number_of_ranks_goes_on(
    saved_as: str, ranks: int, loaded_as: str, others: int, tmp_path: Path
) -> None:
    saved = scene(ranks, saved_as, tmp_path)
    loaded = scene(others, loaded_as, tmp_path)
    for each in loaded:
        assert each["step"] == 3
        assert each["contents"] == saved[0]["contents"]
    if ranks != others:
        told = f"saved with {ranks} rank{'s' * (ranks > 1)}"
        assert any(told in reason and "resharding" in reason for reason in loaded[0]["told"]), loaded[0]["told"]
        assert len({each["drawn"] for each in loaded}) == others, "ranks draw the same random numbers"


@pytest.mark.slow
@pytest.mark.parametrize(
    "saved_as, loaded_as, others", [("differences", "load", 1), ("differences-sharded", "load-sharded", 3)]
)
def test_differences_of_several_ranks(saved_as: str, loaded_as: str, others: int, tmp_path: Path) -> None:
    """A block that one rank keeps as a difference is the same to the others that have it."""
    saved = scene(2, saved_as, tmp_path)
    repository = Repository.open(LocalStore(str(tmp_path / "runs")))
    entries = {entry.path: entry for entry in repository.entries(repository.snapshots()[-1])}
    files = [f"rank-{rank:05d}/{part}.safetensors" for rank in range(2) for part in ("model", "optimizer")]
    sums = [{entries[file].chunks[number][0] for number, _, _ in entries[file].sums} for file in files]
    assert all(sums)
    assert (sums[:2] == sums[2:]) == (saved_as == "differences")
    assert check(repository, data="all").ok
    for each in scene(others, loaded_as, tmp_path):
        assert (each["step"], each["contents"]) == (3, saved[0]["contents"])


@pytest.mark.slow
def test_a_rank_that_dies_in_mid_save_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    told = scene(3, "one_dies", tmp_path)
    assert told[1] is None
    assert "Unavailable" in told[0]["error"]
    assert "what was saved before is whole" in told[0]["error"]
    assert [each["step"] for each in scene(3, "load-sharded", tmp_path)] == [1, 1, 1]


@pytest.mark.slow
def test_what_one_rank_can_not_keep_is_refused_on_all_and_the_run_goes_on(tmp_path: Path) -> None:
    told = scene(2, "one_refuses", tmp_path)
    for rank, each in enumerate(told):
        assert len(each["errors"]) == 2
        assert all("state['extra']['x']" in error for error in each["errors"]), each
        assert ("rank 1 failed" in each["errors"][0]) == (rank == 0)
        assert each["saved"] == "2"


@pytest.mark.slow
def test_a_signal_to_one_rank_saves_and_ends_all_at_the_same_step(tmp_path: Path) -> None:
    told = scene(2, "one_is_terminated", tmp_path)
    assert [each["code"] for each in told] == [143, 143]
    assert told[0]["step"] == told[1]["step"] == told[0]["saved"]


@pytest.mark.slow
def test_saves_into_memory_go_on_after_one_to_disk(tmp_path: Path) -> None:
    assert scene(2, "memory_and_disk", tmp_path) == [{"steps": [2, 5], "finished": 5}] * 2


@pytest.mark.slow
def test_ranks_of_different_speed_save_at_the_same_steps(tmp_path: Path) -> None:
    told = scene(2, "every_so_often", tmp_path)
    assert told[0]["steps"] == told[1]["steps"]
    assert len(told[0]["steps"]) > 2


def test_each_chunk_is_stored_once_and_the_work_is_shared() -> None:
    replicated = [(f"{number:02}", 4 << 20) for number in range(40)]
    mine = shares([[*replicated, (f"own{rank}", 1 << 20)] for rank in range(4)])
    assert set().union(*mine) == {chunk for chunk, _ in replicated} | {f"own{rank}" for rank in range(4)}
    assert sum(map(len, mine)) == 44
    assert [f"own{rank}" in mine[rank] for rank in range(4)] == [True] * 4
    assert {len(each) for each in mine} == {11}


def test_what_is_stored_by_one_is_known_to_it() -> None:
    mine = shares([[("a", 1)], [("a", 1), ("b", 9)], [("b", 9)]])
    assert mine[0] == {"a"} and mine[1] | mine[2] == {"b"}


def test_ranks_decide_by_what_all_were_told() -> None:
    slow, fast = Told(step_seconds=0.5, steps_left=10), Told(step_seconds=0.001, is_due=True, signal=10)
    decided = decide([slow, fast])
    assert not decided.is_due, "rank 0 says when"
    assert decided.meet_in_steps == 2
    assert decided.signal == 10
    assert decide([Told(signal=2), Told(signal=15)]).signal == 15
    assert not decide([Told(), Told(is_saving=True)]).may_collect
