"""The example of a training with Accelerate, to be killed: `python cases_accelerate.py CASE KILLS SEED FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import killing
import torch
from cases import digest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from accelerate_train import train

from outlast.checkpoint.run import Run

torch.set_num_threads(1)
resume = Run.resume
Run.resume = lambda run: resume(run, crashes_max=99)  # type: ignore[method-assign,assignment]


def accelerated(url: str) -> str:
    return digest(train(url, save_every=2))


CASES = {"accelerated": accelerated}

if __name__ == "__main__":
    killing.CASES.clear()
    killing.CASES.update(CASES)
    sys.exit(killing.main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])))
