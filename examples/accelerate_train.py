"""Training with Accelerate that can be killed at any moment: run it, `kill -9` it, run it again.

    python examples/accelerate_train.py ./runs

Accelerate's `prepare` may wrap everything; Outlast takes it as it is. Only the accelerator's own count of batches is
to be named, where gradients are accumulated.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, Dataset

from outlast.checkpoint.run import Run


class Noisy(Dataset[Any]):
    """A sample is random in part, as after augmentation."""

    def __len__(self) -> int:
        return 103

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(16) + index / 103, torch.tensor(index % 4)


class Counter:
    """How many batches the accelerator has seen since the last step of the optimizer."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def state_dict(self) -> dict[str, int]:
        return {"step": self.accelerator.step}

    def load_state_dict(self, saved: dict[str, int]) -> None:
        self.accelerator.step = saved["step"]


def train(url: str, until: int = 40, save_every: int | str = "auto") -> dict[str, Any]:
    """The state at the end, whether it took one life or many."""
    set_seed(7)
    accelerator = Accelerator(gradient_accumulation_steps=3, cpu=True)
    model = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=until)
    loader = DataLoader(Noisy(), batch_size=8, shuffle=True, num_workers=2)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)

    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader,
             "counter": Counter(accelerator)}  # fmt: skip
    with Run(url, name="accelerated", state=state, save_every=save_every) as run:
        run.resume()
        for _, (x, y) in run.steps(loader, until=until):
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            run.step(loss=loss.item())
        return run.state


if __name__ == "__main__":
    for value in train(sys.argv[1])["model"].state_dict().values():
        print(value.double().sum().item())
