"""Trainings that are killed and go on: small, real, and with every source of randomness that people use."""

from __future__ import annotations

import hashlib
import os
import random  # noqa: TID251
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from outlast.checkpoint.leaves import local
from outlast.checkpoint.run import Run

STEPS = 24


class Noisy(Dataset[Any]):
    """Random augmentation inside the workers, drawn from torch, numpy and python alike."""

    def __init__(self, shape: tuple[int, ...] = (16,), count: int = 103) -> None:
        self.shape, self.count = shape, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        noise = torch.randn(self.shape) + float(np.random.rand()) + random.random()
        return noise + index / self.count, index % 4


class Stream(IterableDataset[Any]):
    """Knows where it is."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        while self.at < 61:
            self.at += 1
            yield torch.full((16,), self.at / 61) + torch.randn(16), self.at % 4
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, saved: dict[str, int]) -> None:
        self.at = saved["at"]


# With more, torch's own sums may differ by a bit from one life to the next when the machine is busy: without any kill.
torch.set_num_threads(1)


def seeded() -> None:
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, 256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4)
    )


def digest(state: dict[str, Any]) -> str:
    """Of parameters, buffers, the optimizer's state, and of what every generator gives next."""
    hasher = hashlib.sha256()
    for value in state["model"].state_dict().values():
        hasher.update(local(value).contiguous().numpy().tobytes())
    for values in state["optimizer"].state.values():
        for value in values.values():
            hasher.update(local(torch.as_tensor(value)).contiguous().numpy().tobytes())
    hasher.update(repr((torch.rand(1).item(), random.random(), np.random.rand())).encode())
    return hasher.hexdigest()


def adamw(url: str) -> str:
    seeded()
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=STEPS + 1)
    loader = DataLoader(Noisy(), batch_size=8, shuffle=True, num_workers=2)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    with Run(url, name="adamw", state=state, save_every=3) as run:
        run.resume(crashes_max=10**6)  # it is killed all the time, and not by its own fault
        for _, (x, y) in run.steps(loader, until=STEPS):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            run.step(loss=loss.item())
    return digest(state)


def accumulating(url: str) -> str:
    return accumulated(url, torch.bfloat16)


def accumulating_halves(url: str) -> str:
    return accumulated(url, torch.float16)


def accumulated(url: str, dtype: torch.dtype) -> str:
    """Gradients are added up over three batches, and scaled, too much at first; saves fall between."""
    seeded()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=3)
    loader = DataLoader(Noisy(), batch_size=8, shuffle=True)
    state = {"model": model, "optimizer": optimizer, "scaler": scaler, "loader": loader}
    with Run(url, name="accumulating", state=state, save_every=2) as run:
        run.resume(crashes_max=10**6)  # it is killed all the time, and not by its own fault
        for step, (x, y) in run.steps(loader, until=STEPS):
            with torch.autocast("cpu", dtype=dtype):
                loss = F.cross_entropy(model(x).float(), y)
            scaler.scale(loss).backward()
            if step % 3 == 2:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=False)
            run.step(loss=loss.item())
    return digest(state)


def convolution(url: str) -> str:
    """Running statistics change in forward; weights lie channels last."""
    seeded()
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).to(memory_format=torch.channels_last)  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, amsgrad=True)
    loader = DataLoader(Noisy((3, 12, 12)), batch_size=8, shuffle=True, num_workers=1)
    state = {"model": model, "optimizer": optimizer, "loader": loader}
    with Run(url, name="convolution", state=state, save_every=3) as run:
        run.resume(crashes_max=10**6)  # it is killed all the time, and not by its own fault
        for _, (x, y) in run.steps(loader, until=STEPS):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x.to(memory_format=torch.channels_last)), y)
            loss.backward()
            optimizer.step()
            run.step(loss=loss.item())
    return digest(state)


def streaming(url: str) -> str:
    seeded()
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(Stream(), batch_size=4)
    state = {"model": model, "optimizer": optimizer, "loader": loader}
    with Run(url, name="streaming", state=state, save_every=3) as run:
        run.resume(crashes_max=10**6)  # it is killed all the time, and not by its own fault
        for _, (x, y) in run.steps(loader, until=STEPS):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            run.step(loss=loss.item())
    return digest(state)


def together() -> tuple[int, int]:
    """(this rank, ranks) of a process group over gloo."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{os.environ['MEET']}", rank=rank, world_size=ranks)
    return rank, ranks


def replicated(url: str) -> str:
    """DistributedDataParallel, with statistics and random numbers that differ by rank."""
    rank, ranks = together()
    seeded()
    bare = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 4))
    model = nn.parallel.DistributedDataParallel(bare)
    torch.manual_seed(rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = Noisy()
    sampler = DistributedSampler(data, ranks, rank, shuffle=True, seed=3)
    loader = DataLoader(data, batch_size=4, sampler=sampler, num_workers=1)
    state = {"model": model, "optimizer": optimizer, "loader": loader}
    with Run(url, name="replicated", state=state, save_every=3) as run:
        run.resume(crashes_max=10**6)  # it is killed all the time, and not by its own fault
        for _, (x, y) in run.steps(loader, until=STEPS):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            run.step()
    return digest({"model": bare, "optimizer": optimizer})


def sharded(url: str) -> str:
    """FSDP2: what a rank holds of parameters and of the optimizer's state is a part."""
    rank, ranks = together()
    seeded()
    model = mlp()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    torch.manual_seed(rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = Noisy()
    loader = DataLoader(data, batch_size=4, sampler=DistributedSampler(data, ranks, rank, seed=3))
    state = {"model": model, "optimizer": optimizer, "loader": loader}
    with Run(url, name="sharded", state=state, save_every=3) as run:
        run.resume(crashes_max=10**6)  # it is killed all the time, and not by its own fault
        for _, (x, y) in run.steps(loader, until=STEPS):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            run.step()
    return digest(state)


RANKS = {"replicated": 2, "sharded": 2}
CASES = {
    each.__name__: each
    for each in (adamw, accumulating, accumulating_halves, convolution, streaming, replicated, sharded)
}
