"""Trains a small GPT and keeps its checkpoints: `series.py FOLDER --checkpoints 10 --steps 80`.

The data is the source text of Python's own standard library, byte by byte; 3.3 million parameters in fp32, AdamW with
PyTorch's own betas and a weight decay of 0.1, a warm-up and a cosine down to a tenth of the learning rate, as language
models are trained. Every `--steps` steps it writes

    FOLDER/fp32/NN/checkpoint.pt      parameters and optimizer (both moments), by `torch.save`
    FOLDER/bf16/NN/model.safetensors  the parameters, rounded to bf16

and at its end it prints a JSON object: `loss`, at every checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import sysconfig
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

WIDTH = 256
LAYERS = 4
CONTEXT = 128
BATCH = 8
LEARNING_RATE = 1e-3
WARM_UP = 20
TEXT_BYTES = 8_000_000


def text() -> torch.Tensor:
    """The standard library, in one row of bytes."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = bytearray()
    for path in sorted(folder.rglob("*.py")):
        if len(found) < TEXT_BYTES and not {"site-packages", "test"} & set(path.parts):
            found += path.read_bytes()
    return torch.frombuffer(found[:TEXT_BYTES], dtype=torch.uint8)


class Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        layer = {"dropout": 0.0, "batch_first": True, "norm_first": True, "activation": "gelu"}
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, WIDTH // 64, 4 * WIDTH, **layer)  # type: ignore[arg-type]
            for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256, bias=False)
        for each in self.parameters():
            if each.dim() > 1:
                nn.init.normal_(each, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        found = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            found = block(found, src_mask=mask, is_causal=True)
        result: torch.Tensor = self.head(self.norm(found))
        return result


def save(folder: Path, number: int, model: Gpt, optimizer: torch.optim.Optimizer) -> None:
    whole, half = folder / "fp32" / f"{number:02d}", folder / "bf16" / f"{number:02d}"
    whole.mkdir(parents=True)
    half.mkdir(parents=True)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, whole / "checkpoint.pt")
    rounded = {name: each.to(torch.bfloat16) for name, each in model.state_dict().items()}
    safetensors.torch.save_file(rounded, half / "model.safetensors")


def train(folder: Path, checkpoints: int, steps: int) -> list[float]:
    """The loss at every checkpoint."""
    torch.manual_seed(1)
    data, model = text(), Gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, fused=True)
    total = checkpoints * steps

    def rate(step: int) -> float:
        return min(1, (step + 1) / WARM_UP) * (0.55 + 0.45 * math.cos(math.pi * step / total))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses = []
    for step in range(1, total + 1):
        starts = torch.randint(len(data) - CONTEXT - 1, (BATCH, 1))
        rows = data[starts + torch.arange(CONTEXT + 1)].long()
        found = model(rows[:, :-1])
        loss = nn.functional.cross_entropy(found.reshape(-1, 256), rows[:, 1:].reshape(-1))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % steps == 0:
            losses.append(round(loss.item(), 3))
            save(folder, step // steps, model, optimizer)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoints", type=int, default=10)
    parser.add_argument("--steps", type=int, default=80, help="between two checkpoints")
    options = parser.parse_args()
    print(json.dumps({"loss": train(options.folder, options.checkpoints, options.steps)}))


if __name__ == "__main__":
    main()
