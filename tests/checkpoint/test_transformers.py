"""Hugging Face's Trainer: killed at any moment and run again, it ends in the same state, bit for bit.

OUTLAST_KILLS=50 kills each training so often; the seed is printed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
from cases_transformers import CASES, Text, trainer
from transformers import EarlyStoppingCallback

from outlast.checkpoint.run import Run
from outlast.errors import InvalidInput, Refused
from outlast.integrations.transformers import OutlastCallback


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed(case: str, tmp_path: Path) -> None:
    kills, seed = os.environ.get("OUTLAST_KILLS", "3"), int.from_bytes(os.urandom(3), "big")
    program = Path(__file__).with_name("cases_transformers.py")
    ran = subprocess.run(
        [sys.executable, str(program), case, kills, str(seed), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    print(ran.stdout)
    assert ran.returncode == 0, f"seed {seed}\n{ran.stdout}\n{ran.stderr[-3000:]}"


def steps_of(url: str, name: str) -> list[int]:
    found = Run(url, name=name, state={"nothing": {}})
    return [step for step, _ in found.checkpoints()]


def test_a_run_that_is_done_is_not_trained_again(tmp_path: Path) -> None:
    url = str(tmp_path / "runs")
    first = trainer(url, max_steps=5)
    OutlastCallback(url, name="x", save_every=100).attach(first).train()
    assert steps_of(url, "x") == [5], "the end is saved"
    again = trainer(url, max_steps=5)
    OutlastCallback(url, name="x").attach(again).train()
    assert again.state.global_step == 5
    assert again.state.log_history[-1]["train_loss"] == first.state.log_history[-1]["train_loss"]
    assert all(map(torch.equal, again.model.parameters(), first.model.parameters()))
    longer = trainer(url, max_steps=7)
    OutlastCallback(url, name="x").attach(longer).train()
    assert longer.state.global_step == 7, "but it goes on when it is told to"


def test_a_run_that_was_stopped_early_stays_stopped(tmp_path: Path) -> None:
    url = str(tmp_path / "runs")

    def train() -> int:
        made = trainer(url, max_steps=20, eval_strategy="steps", eval_steps=2, metric_for_best_model="eval_loss",
                       greater_is_better=True)  # fmt: skip
        made.add_callback(EarlyStoppingCallback(2))
        OutlastCallback(url, name="x", save_every=3).attach(made).train()
        return made.state.global_step

    assert train() == train() < 20


def test_the_best_evaluation_is_kept(tmp_path: Path) -> None:
    url = str(tmp_path / "runs")
    made = trainer(url, max_steps=12, eval_strategy="steps", eval_steps=3)
    OutlastCallback(url, name="x", save_every=10**6, keep=1, best="eval_loss:min").attach(made).train()
    losses = {each["step"]: each["eval_loss"] for each in made.state.log_history if "eval_loss" in each}
    assert steps_of(url, "x") == sorted({min(losses, key=losses.__getitem__), 12})


def test_other_sizes_of_batches_are_refused(tmp_path: Path) -> None:
    url = str(tmp_path / "runs")
    OutlastCallback(url, name="x", save_every=2).attach(trainer(url, max_steps=4)).train()
    made: Any = trainer(url, max_steps=8, gradient_accumulation_steps=2)
    with pytest.raises(InvalidInput, match="gradient accumulation: was 1, is 2"):
        OutlastCallback(url, name="x").attach(made).train()
    made = trainer(url, max_steps=8)
    made.train_dataset = Text(30)
    with pytest.raises(InvalidInput, match="samples: was 31, is 30"):
        OutlastCallback(url, name="x").attach(made).train()


def test_what_would_not_be_exact_is_refused(tmp_path: Path) -> None:
    url = str(tmp_path / "runs")
    with pytest.raises(Refused, match="ignore_data_skip"):
        OutlastCallback(url, name="x").attach(trainer(url, max_steps=4, ignore_data_skip=True))
    made = trainer(url, max_steps=4)
    made.add_callback(OutlastCallback(url, name="x"))
    with pytest.raises(InvalidInput, match="not attached"):
        made.train()
    made = OutlastCallback(url, name="x").attach(trainer(url, max_steps=4))
    with pytest.raises(InvalidInput, match="resume_from_checkpoint"):
        made.train(resume_from_checkpoint=True)
