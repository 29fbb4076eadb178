"""`outlast watch` behind real trainers: what they write is backed up whole, and comes back loadable."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from outlast.backup import restore, restore_plan
from outlast.backup.wakeups import Wakeups
from outlast.backup.watch import Taken, Watch
from outlast.records import Snapshot
from outlast.repo.repository import Repository
from outlast.repo.retention import Policy
from outlast.store.local import LocalStore


@contextmanager
def watched(tmp_path: Path, quiet_seconds: float = 0.3, policy: Policy | None = None) -> Iterator[list[Taken]]:
    """Follow `out` as the command does, in a thread, until all that it holds is backed up."""
    repository = Repository.create(LocalStore(str(tmp_path / "repo")))
    taken: list[Taken] = []
    out = tmp_path / "out"
    watch = Watch(repository, str(out), quiet_seconds=quiet_seconds, policy=policy, tell=taken.append)
    wakeups = Wakeups(watch.folder, 0.5, pytest.fail)
    over = threading.Event()

    def follow() -> None:
        while True:
            was_over = over.is_set()
            look = watch.look()
            if was_over and not look.waiting:
                return
            wakeups.wait(min(look.next_seconds, 0.5))

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield taken
    finally:
        over.set()
        thread.join(120)
        wakeups.close()
        assert not thread.is_alive()


def snapshots(tmp_path: Path, name: str = "out") -> list[Snapshot]:
    repository = Repository.open(LocalStore(str(tmp_path / "repo")))
    return [each for each in repository.snapshots() if each.name == name]


def restored(tmp_path: Path, snapshot: Snapshot) -> Path:
    repository = Repository.open(LocalStore(str(tmp_path / "repo")))
    target = tmp_path / "back"
    shutil.rmtree(target, ignore_errors=True)
    restore.execute(repository, restore_plan.plan(repository, snapshot, str(target)))
    return target


def same_files(one: Path, other: Path) -> bool:
    def content(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    return content(one) == content(other)


def test_the_trainer_of_hugging_face_with_its_rotation(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from cases_transformers import GPT2Config, GPT2LMHeadModel, Text, Trainer, TrainingArguments, masking
    from transformers import TrainerCallback

    seen: list[str] = []

    class Slowly(TrainerCallback):
        """Gives each checkpoint the time to be backed up; the trainer keeps two."""

        def on_save(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            seen.append(f"checkpoint-{state.global_step}")
            for _ in range(600):
                if any(each.checkpoint == seen[-1] for each in taken):
                    return
                threading.Event().wait(0.1)

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=8, save_steps=2, save_total_limit=2, report_to="none",
        disable_tqdm=True, use_cpu=True, per_device_train_batch_size=4, dataloader_pin_memory=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=1))
    made = Trainer(model, arguments, data_collator=masking, train_dataset=Text(31), callbacks=[Slowly()])
    with watched(tmp_path, policy=Policy(last=3)) as taken:
        made.train()
        made.save_model()
        made.save_state()
    assert [each.checkpoint for each in taken] == [*seen, "."], "each once, and then the model that was exported"
    assert not any(each.flaw or each.unsound for each in taken)
    kept = snapshots(tmp_path)
    assert [each.tags["checkpoint"] for each in kept] == ["checkpoint-6", "checkpoint-8", "."]
    assert [each.tags.get("step") for each in kept] == ["6", "8", None]
    for each in kept[:2]:
        assert same_files(restored(tmp_path, each), tmp_path / "out" / each.tags["checkpoint"])
    exported = restored(tmp_path, kept[2])
    assert not list(exported.glob("checkpoint-*"))
    loaded = GPT2LMHeadModel.from_pretrained(exported)
    assert all(map(torch.equal, loaded.parameters(), made.model.cpu().parameters()))


def test_checkpoints_of_torch_distributed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with watched(tmp_path) as taken:
        for step in (10, 20):
            state = {"model": {"w": torch.full((500,), float(step))}, "step": torch.tensor(step)}
            dcp.save(state, checkpoint_id=tmp_path / "out" / f"step_{step}", no_dist=True)
    assert sorted(each.checkpoint for each in taken) == ["step_10", "step_20"]
    for snapshot in snapshots(tmp_path):
        wanted = {"model": {"w": torch.zeros(500)}, "step": torch.tensor(0)}
        dcp.load(wanted, checkpoint_id=restored(tmp_path, snapshot), no_dist=True)
        assert snapshot.tags["step"] == str(int(wanted["step"])) and wanted["model"]["w"][3] == wanted["step"]


def test_a_writer_that_pauses_longer_than_the_quiet_period_is_waited_for(tmp_path: Path) -> None:
    """By the end of each file: torch's and HDF5's, and that of a folder by its parts."""
    out = tmp_path / "out"
    out.mkdir()
    torch.save({"w": torch.arange(50_000.0)}, tmp_path / "whole.pt")
    data = (tmp_path / "whole.pt").read_bytes()
    with watched(tmp_path, quiet_seconds=0.1) as taken, (out / "epoch_1.pt").open("wb", buffering=0) as file:
        for at in range(0, len(data), 40_000):
            file.write(data[at : at + 40_000])
            threading.Event().wait(0.5)
            assert taken == [] or at + 40_000 >= len(data)
    [each] = taken
    assert (each.bytes, each.flaw) == (len(data), "")
    assert (restored(tmp_path, snapshots(tmp_path)[0]) / "epoch_1.pt").read_bytes() == data


def test_lightning_and_its_link_to_the_last(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.demos.boring_classes import BoringModel

    out = tmp_path / "out"
    keep = ModelCheckpoint(str(out), every_n_train_steps=4, save_top_k=-1, save_last="link")
    trainer = lightning.Trainer(
        max_steps=12, callbacks=[keep], logger=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", limit_val_batches=0,
    )  # fmt: skip
    out.mkdir()
    with watched(tmp_path) as taken:
        trainer.fit(BoringModel())
    assert sorted(each.checkpoint for each in taken) == sorted(f"epoch=0-step={step}.ckpt" for step in (4, 8, 12))
    for snapshot in snapshots(tmp_path):
        name = snapshot.tags["checkpoint"]
        loaded = torch.load(restored(tmp_path, snapshot) / name, weights_only=True)
        assert str(loaded["global_step"]) == snapshot.tags["step"]
