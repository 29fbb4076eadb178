"""Four writers, one that forgets and one that prunes without grace, in processes of their own, at one repository.

`OUTLAST_WRITERS_SEED` repeats what they choose; what the machine makes of it is different each time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from outlast.clock import SYSTEM_CLOCK
from servers import LossyProxy
from workers import Judge, Process, Task, make_repository

SEED = int(os.environ.get("OUTLAST_WRITERS_SEED", "20250101"))
WRITERS = 4
DEADLINE_SECONDS = 120


def work_together(
    url: str, tmp_path: Path, snapshots: int, faults: int, disturb: Callable[[], None] = lambda: None
) -> None:
    """Until so many snapshots were committed and something was deleted; then all of them are killed at once."""
    print(f"OUTLAST_WRITERS_SEED={SEED}")
    make_repository(url, is_encrypted=False)
    roles = [*("write" for _ in range(WRITERS)), "forget", "prune"]
    tasks = [
        Task(role, url, f"{role}{at}", SEED + at, str(tmp_path / f"{role}{at}"), DEADLINE_SECONDS, faults=faults)
        for at, role in enumerate(roles)
    ]
    processes = [Process(task, tmp_path / task.name) for task in tasks]
    while all(process.is_running for process in processes):
        told = [line for process in processes for line in process.told()]
        if of(told, "snapshot") >= snapshots and sum(line.get("swept", 0) for line in told):
            break
        disturb()
        SYSTEM_CLOCK.sleep(0.1)
    for process in processes:
        if process.is_running:
            process.kill()
    told = [line for process in processes for line in process.end(1)]
    acknowledged = [line["id"] for line in told if line["did"] == "snapshot"]
    refused = [line for line in told if line["did"] == "refused"]
    swept = sum(line.get("swept", 0) for line in told)
    print(f"{len(acknowledged)} snapshots, {len(refused)} refusals, {swept} packs swept")
    assert len(acknowledged) == len(set(acknowledged))
    assert len(acknowledged) >= snapshots and swept, f"too little was done to prove anything: {refused[:3]}"
    assert {line["kind"] for line in refused} <= {"busy", "unavailable"}, refused
    judge = Judge(url)
    judge.assert_all_is_well(set(acknowledged))
    judge.assert_prune_leaves_it_well(set(acknowledged))


def of(told: list[dict[str, Any]], did: str) -> int:
    return sum(line["did"] == did for line in told)


@pytest.mark.slow
def test_on_a_local_disk(tmp_path: Path) -> None:
    work_together(str(tmp_path / "repository"), tmp_path, snapshots=30, faults=0)


@pytest.mark.slow
def test_on_a_local_disk_with_lost_replies_and_refusals(tmp_path: Path) -> None:
    work_together(str(tmp_path / "repository"), tmp_path, snapshots=24, faults=60)


@pytest.mark.slow
@pytest.mark.server
def test_on_s3_with_lost_replies_and_refusals(lossy_s3: tuple[str, LossyProxy], tmp_path: Path) -> None:
    url, proxy = lossy_s3
    work_together(url, tmp_path, snapshots=16, faults=30, disturb=lambda: proxy.lose_replies("PUT", 1))
    assert proxy.lost
