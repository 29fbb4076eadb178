"""A small transformer that learns to write like the text in a folder, byte by byte. Kill it, and start it again.

python writer.py FOLDER RUNS STEPS
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import outlast

CONTEXT = 64


class Windows(Dataset[torch.Tensor]):
    def __init__(self, folder: Path) -> None:
        text = b"\n".join(path.read_bytes() for path in sorted(folder.rglob("*.md")))
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()

    def __len__(self) -> int:
        return (len(self.text) - 1) // CONTEXT

    def __getitem__(self, index: int) -> torch.Tensor:
        start = int(torch.randint(len(self.text) - CONTEXT - 1, ()))  # augmentation: anywhere
        return self.text[start : start + CONTEXT + 1]


class Writer(nn.Module):
    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256, bias=False)
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        return self.head(self.layers(self.tokens(tokens) + self.places.weight, mask, is_causal=True))


def main(folder: str, runs: str, steps: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Writer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1)
    loader = DataLoader(Windows(Path(folder)), batch_size=16, shuffle=True)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}

    run = outlast.Run(runs, name="writer", state=state, save_every=10)
    start = run.resume()
    print(f"from step {start}", flush=True)
    for step, batch in run.steps(loader, until=steps):
        loss = functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        run.step(loss=loss.item())
        print(f"step {step} loss {loss.item().hex()}", flush=True)
    run.close()

    weights = b"".join(weight.detach().numpy().tobytes() for weight in model.state_dict().values())
    print(f"weights {hashlib.sha256(weights).hexdigest()}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
