"""Trainings by Hugging Face's Trainer, to be killed: `python cases_transformers.py CASE KILLS SEED FOLDER`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import killing
import torch
from cases import digest, seeded
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from outlast.checkpoint.run import Run
from outlast.integrations.transformers import OutlastCallback

VOCABULARY = 64
torch.set_num_threads(1)


class Text(Dataset[Any]):
    """Each sample is augmented at random."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": (torch.arange(12) * 3 + index + torch.randint(0, 4, (12,))) % VOCABULARY}


def masking(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """As collators for language models do: random in the collator."""
    tokens = torch.stack([sample["input_ids"] for sample in samples])
    return {"input_ids": torch.where(torch.rand(tokens.shape) < 0.1, 0, tokens), "labels": tokens}


def trainer(folder: str, **options: Any) -> Trainer:
    seeded()
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=2, n_head=2,
                                       bos_token_id=1, eos_token_id=1))  # fmt: skip
    arguments = TrainingArguments(
        output_dir=f"{folder}-out", save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=3, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    return Trainer(model, arguments, data_collator=masking, train_dataset=Text(31), eval_dataset=Text(9))


def trained(url: str, made: Trainer, **options: Any) -> str:
    if Run(url, name="x", state={"nothing": {}}).checkpoints():
        torch.manual_seed(os.getpid())  # a later life has only what was saved
    OutlastCallback(url, name="x", crashes_max=99, **options).attach(made).train()
    return told(made)


def told(trainer: Trainer) -> str:
    """The digest of all that was trained, and what was logged of it."""
    optimizer: Any = trainer.optimizer
    losses = {  # once: a life that finds the run at its end logs that again
        (each["step"], each.get("loss"), each.get("eval_loss"), each.get("train_loss"), each["epoch"]): None
        for each in trainer.state.log_history
    }
    state = {"model": trainer.model, "optimizer": getattr(optimizer, "optimizer", optimizer)}
    return f"{digest(state)} {trainer.state.global_step} {trainer.state.total_flos} {list(losses)}"


def shuffled(url: str) -> str:
    """Shuffling, two workers, random augmentation and collation, dropout, an evaluation in mid-epoch."""
    made = trainer(url, max_steps=20, dataloader_num_workers=2, eval_strategy="steps", eval_steps=5)
    return trained(url, made, save_every=2)


def accumulating(url: str) -> str:
    """Steps of three batches, and of what is left at the end of an epoch; evaluated then."""
    made = trainer(url, num_train_epochs=7, gradient_accumulation_steps=3, eval_strategy="epoch")
    return trained(url, made, save_every=1, best="eval_loss:min")


CASES = {each.__name__: each for each in (shuffled, accumulating)}

if __name__ == "__main__":
    killing.CASES.clear()
    killing.CASES.update(CASES)
    sys.exit(killing.main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])))
