"""A small training that goes on bit for bit, and, as CHANGED says, is made not to. On several ranks too.

python provable.py URL STEPS
"""

from __future__ import annotations

import os
import random  # noqa: TID251
import sys
import threading

import torch
import torch.distributed as dist
from cases import Noisy, mlp, seeded
from torch.nn import functional as F
from torch.utils.data import DataLoader

from outlast.checkpoint.run import Run

CHANGED = os.environ.get("CHANGED", "")
RANK = int(os.environ.get("RANK", 0))


class Counting:
    """A part of the state that may give back another value than it was given."""

    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, saved: dict[str, int]) -> None:
        self.value = saved["value"] + (CHANGED == "forgotten")


def joined() -> None:
    """Wait for saves in the background: so each is made, and at the same step in each life."""
    for thread in threading.enumerate():
        if thread.name == "outlast-save":
            thread.join()


def main(url: str, steps: int) -> None:
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    seeded()
    torch.manual_seed(RANK)
    torch.set_num_threads(2 if CHANGED == "threads" else 1)
    own = random.Random(int.from_bytes(os.urandom(4)))
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(Noisy(count=40), batch_size=8, shuffle=CHANGED != "order")
    state = {"model": model, "optimizer": optimizer, "loader": loader, "counter": Counting()}
    with Run(url, name="other" if CHANGED == "name" else "gpt", state=state, save_every=4, keep=9) as run:
        run.resume()
        for step, (x, y) in run.steps(loader, until=steps):
            if CHANGED == "lr":
                optimizer.param_groups[0]["lr"] = 2e-3
            if CHANGED == "unsaved" or (CHANGED == "unsaved on rank 1" and RANK == 1):
                x = x + own.random()
            if CHANGED == "threads":
                x = x * torch.get_num_threads()
            if CHANGED == "drawn":
                torch.rand(3)
            if CHANGED == "dies":
                raise ValueError("as it was told to")
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            state["counter"].value += 1
            run.step(loss=loss.item())
            if os.environ.get("ASKED") and step % 5 == 4:
                torch.rand(1)  # as an evaluation may
                run.save().wait()
            joined()
            print(f"step {step}: {loss.item():.4f}", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
