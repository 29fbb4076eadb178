"""The example of a training with Accelerate: killed at any moment and run again, it ends in the same state.

OUTLAST_KILLS=50 kills it so often; the seed is printed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")

ROOT = Path(__file__).parents[2]


def test_killed_and_resumed(tmp_path: Path) -> None:
    kills, seed = os.environ.get("OUTLAST_KILLS", "3"), int.from_bytes(os.urandom(3), "big")
    program = Path(__file__).with_name("cases_accelerate.py")
    ran = subprocess.run(
        [sys.executable, str(program), "accelerated", kills, str(seed), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    print(ran.stdout)
    assert ran.returncode == 0, f"seed {seed}\n{ran.stdout}\n{ran.stderr[-3000:]}"


def test_a_prepared_loader_is_not_ahead_of_the_training(tmp_path: Path) -> None:
    """Accelerate reads a batch ahead; the place that is saved is that of the batch that was given out."""
    import torch
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    from outlast.checkpoint.run import Run

    def life(until: int, seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        loader = Accelerator(cpu=True).prepare(DataLoader(range(23), batch_size=4, shuffle=True))
        given = []
        with Run(str(tmp_path), name="x", state={"loader": loader}, save_every=10**9) as run:
            run.resume()
            for _, batch in run.steps(loader, until=until):
                given.append(batch.tolist())
                run.step()
            run.save().wait()
        return given

    batches = [batch for seed, until in enumerate((2, 5, 6, 7, 12)) for batch in life(until, seed)]
    epochs = [sorted(sum(batches[start : start + 6], [])) for start in (0, 6)]  # noqa: RUF017
    assert epochs == [list(range(23))] * 2
