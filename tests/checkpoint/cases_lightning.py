"""Trainings by Lightning, to be killed: `python cases_lightning.py CASE KILLS SEED FOLDER`."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import killing
import torch
from cases import Noisy, digest, mlp, seeded
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch.nn import functional as F
from torch.utils.data import DataLoader

from outlast.checkpoint.run import Run
from outlast.integrations.lightning import OutlastCallback

torch.set_num_threads(1)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.losses: list[float] = []

    def loss(self, batch: Any) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, number: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, number: int) -> None:
        self.log("val_loss", self.loss(batch))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["losses"] = list(self.losses)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.losses = list(checkpoint["losses"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=60)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class OnPlateau(Classifier):
    """The learning rate follows the validation."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


class Manual(Classifier):
    """Two optimizers, stepped by hand, one of them in every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, number: int) -> None:
        first, second = self.optimizers()
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.manual_backward(loss)
        first.step()
        first.zero_grad()
        if number % 2:
            second.step()
            second.zero_grad()

    def configure_optimizers(self) -> Any:
        half = len(list(self.parameters())) // 2
        first, second = list(self.parameters())[:half], list(self.parameters())[half:]
        return torch.optim.Adam(first, lr=1e-3), torch.optim.SGD(second, lr=1e-2, momentum=0.9)


def trainer(url: str, callbacks: list[Any], **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", devices=1, callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=f"{url}-out", **options,
    )  # fmt: skip


def loaders(**options: Any) -> dict[str, Any]:
    return {
        "train_dataloaders": DataLoader(Noisy(), batch_size=8, shuffle=True, **options),
        "val_dataloaders": DataLoader(Noisy(count=16), batch_size=8),
    }


def told(module: Classifier, fitted: Trainer) -> str:
    """The digest of all that was trained, and of the losses on the way."""
    state = [digest({"model": module, "optimizer": each}) for each in fitted.optimizers]
    losses = hashlib.sha256(repr(module.losses).encode()).hexdigest()
    return f"{state} {losses} {len(module.losses)} {fitted.global_step} {fitted.current_epoch}"


def fitted(url: str, module: type[Classifier], callbacks: list[Any], workers: int, **options: Any) -> str:
    seeded()
    made, by = module(), trainer(url, callbacks, **options)
    if Run(url, name="x", state={"nothing": {}}).checkpoints():
        torch.manual_seed(os.getpid())  # a later life has only what was saved
    by.fit(made, **loaders(num_workers=workers))
    return told(made, by)


def shuffled(url: str) -> str:
    """Shuffling, two workers, random augmentation, dropout, a validation in mid-epoch."""
    callbacks = [OutlastCallback(url, name="x", crashes_max=99, save_every=3)]
    return fitted(url, Classifier, callbacks, 2, max_epochs=3, val_check_interval=5)


def accumulating(url: str) -> str:
    """Steps of three batches, saves between; what was validated decides about the learning rate and the end."""
    callbacks = [EarlyStopping("val_loss", patience=9), OutlastCallback(url, name="x", crashes_max=99, save_every=2)]
    return fitted(url, OnPlateau, callbacks, 0, max_epochs=5, accumulate_grad_batches=3, gradient_clip_val=0.5)


def by_hand(url: str) -> str:
    callbacks = [OutlastCallback(url, name="x", crashes_max=99, save_every=1, best="val_loss:min")]
    return fitted(url, Manual, callbacks, 0, max_epochs=4, limit_train_batches=9)


CASES = {each.__name__: each for each in (shuffled, accumulating, by_hand)}

if __name__ == "__main__":
    killing.CASES.clear()
    killing.CASES.update(CASES)
    sys.exit(killing.main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])))
