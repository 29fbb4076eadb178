"""Lightning: killed at any moment and run again, it ends in the same state, bit for bit; and its own checkpoints.

OUTLAST_KILLS=50 kills each training so often; the seed is printed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning")

import torch
from cases import Noisy, Stream, seeded
from cases_lightning import CASES, Classifier, Manual, loaders, told, trainer
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from outlast.checkpoint.run import Run
from outlast.errors import InvalidInput, NotFound, Refused
from outlast.integrations.lightning import OutlastCallback, OutlastCheckpointIO
from outlast.records import Snapshot
from outlast.repo.repository import Repository
from outlast.store.layers import open_store


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed(case: str, tmp_path: Path) -> None:
    kills, seed = os.environ.get("OUTLAST_KILLS", "3"), int.from_bytes(os.urandom(3), "big")
    program = Path(__file__).with_name("cases_lightning.py")
    ran = subprocess.run(
        [sys.executable, str(program), case, kills, str(seed), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    print(ran.stdout)
    assert ran.returncode == 0, f"seed {seed}\n{ran.stdout}\n{ran.stderr[-3000:]}"


class StopsAt(Callback):
    """Fails at the beginning of a batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            raise ZeroDivisionError


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "runs")


def fit(url: str, *others: Callback, made: type[Classifier] = Classifier, **options: Any) -> tuple[Any, Trainer]:
    seeded()
    module = made()
    by = trainer(url, [*others, OutlastCallback(url, name="x", save_every=1, keep=100)], **options)
    by.fit(module, **loaders())
    return module, by


@pytest.mark.parametrize("batch", [1, 8, 12, 13, 14, 25, 26])
def test_it_goes_on_from_any_place_of_an_epoch(batch: int, tmp_path: Path) -> None:
    """The epoch has 13 batches. Gradients of one optimizer are kept over two."""
    options: dict[str, Any] = {"made": Manual, "max_epochs": 3}
    wanted = told(*fit(str(tmp_path / "alone"), **options))
    url = str(tmp_path / "runs")
    with pytest.raises(ZeroDivisionError):
        fit(url, StopsAt(batch), **options)
    assert told(*fit(url, **options)) == wanted


def test_a_fit_that_is_done_is_not_done_again_but_goes_on_when_told_to(url: str) -> None:
    first, _ = fit(url, max_epochs=1)
    again, by = fit(url, max_epochs=1)
    assert by.global_step == 13
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    longer, by = fit(url, max_epochs=2)
    assert (by.global_step, by.current_epoch, len(longer.losses)) == (26, 2, 26)


def test_a_terminated_fit_saves_and_leaves_with_143(url: str) -> None:
    class Terminates(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as left:
        fit(url, Terminates(), max_epochs=1)
    assert left.value.code == 143
    assert Run(url, name="x", state={"nothing": {}}).checkpoints()[-1][0] == 3
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_would_not_be_exact_is_refused(url: str) -> None:
    by = trainer(url, [OutlastCallback(url, name="x")], max_epochs=1)
    with pytest.raises(Refused, match="no length"):
        by.fit(Classifier(), DataLoader(Stream(), batch_size=4))
    by = trainer(url, [OutlastCallback(url, name="x")], max_epochs=1)
    with pytest.raises(Refused, match="2 loaders"):
        by.fit(Classifier(), [DataLoader(Noisy()), DataLoader(Noisy())])
    by = trainer(url, [OutlastCallback(url, name="x")], max_epochs=1, reload_dataloaders_every_n_epochs=1)
    with pytest.raises(Refused, match="reload_dataloaders"):
        by.fit(Classifier(), **loaders())


# -- Lightning's own checkpoints -------------------------------------------------------------------------


def kept(url: str, **options: Any) -> tuple[Classifier, Trainer, ModelCheckpoint]:
    seeded()
    module = Classifier()
    policy = ModelCheckpoint(dirpath=f"{url}-out", monitor="val_loss", save_top_k=2, save_last=True)
    by = Trainer(accelerator="cpu", devices=1, callbacks=[policy], logger=False, enable_progress_bar=False,
                 enable_model_summary=False, plugins=[OutlastCheckpointIO(url, name="own")], **options)  # fmt: skip
    by.fit(module, **loaders())
    return module, by, policy


def test_lightning_s_checkpoints_lie_in_the_repository(url: str) -> None:
    module, by, policy = kept(url, max_epochs=4)
    assert not list(Path(f"{url}-out").glob("**/*.ckpt")), "no file was written"
    listed = [each.name for each in snapshots(url)]
    assert len(listed) == 3
    assert "own/last.ckpt" in listed
    assert f"own/{Path(policy.best_model_path).name}" in listed

    again = Classifier()
    longer = trainer(url, [], max_epochs=4, plugins=[OutlastCheckpointIO(url, name="own")])
    longer.fit(again, ckpt_path="outlast://last.ckpt", **loaders())
    assert longer.global_step == by.global_step
    assert all(map(torch.equal, module.parameters(), again.parameters()))


def test_a_checkpoint_comes_back_as_it_was(url: str) -> None:
    plugin = OutlastCheckpointIO(url, name="own")
    shared = torch.arange(6.0).reshape(2, 3)
    saved = {
        "global_step": 7, "state_dict": {"a.weight": shared, "b.weight": shared}, "lr_schedulers": [{"last": 1e-3}],
        "callbacks": {"X{'monitor': None}": {"best": torch.tensor(float("inf")), "kept": (1, None, "text")}},
    }  # fmt: skip
    before = torch.get_rng_state()
    plugin.save_checkpoint(saved, "/somewhere/epoch=1.ckpt")
    plugin.save_checkpoint(saved | {"global_step": 3}, "/elsewhere/epoch=1.ckpt")
    loaded = plugin.load_checkpoint("epoch=1.ckpt")
    assert loaded["global_step"] == 3, "it replaces the one before, though its step is lower"
    assert len(snapshots(url)) == 1
    assert torch.equal(loaded["state_dict"]["b.weight"], shared)
    assert loaded["callbacks"] == saved["callbacks"]
    assert torch.equal(torch.get_rng_state(), before)

    plugin.remove_checkpoint("epoch=1.ckpt")
    with pytest.raises(NotFound, match=r"own/epoch=1\.ckpt"):
        plugin.load_checkpoint("epoch=1.ckpt")
    with pytest.raises(Refused, match=r"state\['checkpoint'\]\['hyper_parameters'\]\['activation'\]"):
        plugin.save_checkpoint({"hyper_parameters": {"activation": torch.relu}}, "x.ckpt")
    with pytest.raises(InvalidInput):
        plugin.save_checkpoint({}, "x.ckpt", storage_options={})


def snapshots(url: str) -> list[Snapshot]:
    return Repository.open(open_store(url)).snapshots()
