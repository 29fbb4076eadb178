"""Hugging Face's Trainer, killed at any moment and run again, ends in the same state, bit for bit.

    trainer = Trainer(model=model, args=args, train_dataset=data)
    OutlastCallback("./runs", name="gpt").attach(trainer)
    trainer.train()

A checkpoint is taken between two steps: after the logging and the evaluation that belong to the first, before
anything of the second but that its batches were read. The order of each epoch, and what is random in reading it
(in datasets, collators and workers alike), depend on the seed and on the place in the data only; so a run that goes
on skips indices and reads no sample twice.

Limits. An iterable dataset is read again from the beginning of its epoch, as the Trainer itself does; that is exact
where it gives the same again. Callbacks keep what they export (`ExportableState`), and hear `on_epoch_begin` of
the epochs that were done before. Samples per second count the steps of all lives in the time of the last one.
DeepSpeed, the Trainer's FSDP, `auto_find_batch_size` and hyperparameter search are refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from outlast.checkpoint.data import Batch, drawn_apart, mixed, random_state_of, rebuilt, samplers
from outlast.checkpoint.run import Run
from outlast.checkpoint.state import give_random_state, random_state
from outlast.errors import InvalidInput, Refused

_STATE = ("epoch", "global_step", "num_input_tokens_seen", "total_flos", "log_history", "best_metric",
          "best_global_step", "best_model_checkpoint")  # fmt: skip
_LOSS = ("_total_loss_scalar", "_globalstep_last_logged", "current_flos")
_NO_METRICS = ("epoch", "grad_norm", "learning_rate", "num_input_tokens_seen", "total_flos")
_RANKS_MAX = 1 << 20


class _Place(NamedTuple):
    epoch: int
    batches: int
    """of the epoch that were trained on by this process"""


class OutlastCallback(TrainerCallback):
    """Saves a Trainer's run, and lets it go on where it was. To be attached to the trainer before `train`."""

    def __init__(
        self,
        url: str,
        *,
        name: str,
        best: str = "",
        crashes_max: int = 3,
        same_environment: bool = False,
        **options: Any,
    ) -> None:
        """`options` are those of `Run`: `save_every`, in steps of the optimizer, `keep`, `passphrase` and so on. The
        others but `best` are those of `Run.resume`.

        With `best` ("eval_loss:min") each evaluation is saved too. The Trainer's own `save_strategy` is not needed,
        and doesn't disturb.
        """
        self._options: dict[str, Any] = {"name": name, "best": best} | options
        self._resuming: dict[str, Any] = {"crashes_max": crashes_max, "same_environment": same_environment}
        self._url = url
        self._best = best.partition(":")[0]
        self._trainer: Any = None
        self._run: Run | None = None
        self._order: _Epochs | None = None
        self._metrics: dict[str, float] = {}
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._place = _Place(0, 0)
        self._resumed = _Place(0, 0)
        self._batches_in_epoch: float = math.inf
        self._random: dict[str, Any] | None = None
        self._was_stopped = False

    def attach(self, trainer: Trainer) -> Trainer:
        """Take part in the trainer's runs; the trainer again. Raises `Refused` for what can't be resumed exactly."""
        _refuse_inexact(trainer)
        self._trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        of: Any = trainer
        train, run_epoch, loader = of.train, of._run_epoch, of.get_train_dataloader
        of.train = lambda *args, **options: self._train(train, *args, **options)
        of._run_epoch = lambda **given: self._run_epoch(run_epoch, given)
        of.get_train_dataloader = lambda: self._ordered(loader())
        return trainer

    # -- around the trainer's own methods --------------------------------------------------------

    def _train(self, own: Any, resume_from_checkpoint: Any = None, trial: Any = None, **options: Any) -> Any:
        if resume_from_checkpoint:
            raise InvalidInput(
                "this trainer goes on from its newest checkpoint in Outlast; `resume_from_checkpoint` is another one.",
                hint="Leave it out, or don't attach OutlastCallback.",
            )
        if trial is not None:
            raise Refused("trials of a hyperparameter search are no lives of one run; nothing was started.")
        self._begin_anew()
        try:
            return own(**options)
        finally:
            if self._run is not None:
                self._run.close()

    def _ordered(self, loader: Any) -> Any:
        """The same loader, in an order that is known of any epoch."""
        base = getattr(loader, "base_dataloader", loader)
        if isinstance(base.dataset, IterableDataset):
            return loader
        if base.batch_sampler is None:
            raise Refused("the trainer's loader has no batch sampler, so no place in it can be told.")
        args = self._trainer.args
        seed = args.seed if args.data_seed is None else args.data_seed
        self._order = _Epochs(base, seed, args.process_index)
        ordered: DataLoader[Any] = rebuilt(base, self._order)
        if base is loader:
            return ordered
        loader.base_dataloader = ordered  # the loader of Accelerate around it moves batches to their device
        return loader

    def _run_epoch(self, own: Any, given: dict[str, Any]) -> None:
        trainer, epoch = self._trainer, given["epoch"]
        if self._was_stopped or trainer.state.global_step >= trainer.state.max_steps:
            trainer.control.should_training_stop = True
            return
        if epoch < self._resumed.epoch:
            return
        batches = self._resumed.batches if epoch == self._resumed.epoch else 0
        self._place, self._batches_in_epoch = _Place(epoch, batches), given["steps_in_epoch"]
        if self._order is not None:
            self._order.set_epoch(epoch)
        if batches:  # the trainer skips them; that it finds no file of random numbers is meant
            given |= {
                "epochs_trained": epoch,
                "steps_trained_in_current_epoch": batches,
                "resume_from_checkpoint": os.devnull,
            }
        own(**given)

    # -- events ----------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        if self._trainer is None:
            raise InvalidInput(
                "OutlastCallback is among the trainer's callbacks, but not attached to it.",
                hint="Call `callback.attach(trainer)` before `trainer.train()`.",
            )
        parts = {
            "model": live["model"],
            "optimizer": getattr(live["optimizer"], "optimizer", live["optimizer"]),
            "scheduler": live["lr_scheduler"],
            "trainer": _Progress(self),
        }
        scaler = getattr(self._trainer.accelerator, "scaler", None)
        self._run = Run(self._url, state=parts | ({"scaler": scaler} if scaler is not None else {}), **self._options)
        self._run.resume(**self._resuming)
        if self._run.finished_steps:
            self._random = random_state()

    def on_step_begin(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        self._give_random_state()
        self._end_step(state)
        assert self._run is not None
        self._run.begin_step()

    def _give_random_state(self) -> None:
        """Once, right before the first step: what came since (an evaluation, the first batches) drew from them."""
        if self._random is not None:
            give_random_state(self._random)
            self._random = None

    def on_step_end(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        done = self._place.batches + args.gradient_accumulation_steps
        self._place = self._place._replace(batches=int(min(done, self._batches_in_epoch)))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **live: Any) -> None:
        for name, value in (logs or {}).items():
            is_speed = name.endswith(("_runtime", "_per_second"))
            if isinstance(value, int | float) and not is_speed and name not in _NO_METRICS:
                self._metrics[name] = float(value)

    def on_train_end(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        assert self._run is not None
        if self._place.batches == self._batches_in_epoch:
            self._place = _Place(self._place.epoch + 1, 0)
        self._give_random_state()
        trainer = self._trainer
        trainer._tr_loss.zero_()  # it was added to the sum already
        trainer._globalstep_last_logged = state.global_step
        if not args.load_best_model_at_end:  # that put other weights in place of those of the last step
            self._end_step(state, save=True)
        self._run.close()

    def _end_step(self, state: Any, *, save: bool = False) -> None:
        run = self._run
        assert run is not None
        if state.global_step <= run.finished_steps:
            return
        metrics, self._metrics = self._metrics, {}
        run.step(save or self._best in metrics, **metrics)


class _Progress:
    """What the trainer itself knows of its run."""

    def __init__(self, callback: OutlastCallback) -> None:
        self._callback = callback
        self._trainer = callback._trainer

    def state_dict(self) -> dict[str, Any]:
        trainer, state, control = self._trainer, self._trainer.state, self._trainer.control
        return {
            "place": list(self._callback._place),
            "shape": self._shape(),
            "seed": self._callback._order.seed if self._callback._order else None,
            "stopped": control.should_training_stop and state.global_step < state.max_steps,
            "state": {name: getattr(state, name) for name in _STATE},
            "loss": {name: getattr(trainer, name) for name in _LOSS} | {"_tr_loss": trainer._tr_loss},
            "callbacks": [[type(each).__name__, each.state()["attributes"]] for each in self._exportable()],
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        callback, trainer, now = self._callback, self._trainer, self._shape()
        changed = [f"{name}: was {was}, is {now.get(name)}" for name, was in saved["shape"].items() if now[name] != was]
        if changed:
            raise InvalidInput(
                "the place in the data means something else now: " + "; ".join(changed) + ".",
                hint="Train with the same data and sizes of batches, or give the run another name to begin anew.",
            )
        callback._resumed = _Place(*saved["place"])
        callback._was_stopped = saved["stopped"]
        if callback._order is not None:
            callback._order.seed = saved["seed"]
        for name, value in saved["state"].items():
            setattr(trainer.state, name, value)
        for name in _LOSS:
            setattr(trainer, name, saved["loss"][name])
        trainer._tr_loss.copy_(saved["loss"]["_tr_loss"])
        waiting = self._exportable()
        for kind, attributes in saved["callbacks"]:
            found = next((each for each in waiting if type(each).__name__ == kind), None)
            if found is not None:
                waiting.remove(found)
                vars(found).update(attributes)

    def _exportable(self) -> list[Any]:
        return [each for each in self._trainer.callback_handler.callbacks if isinstance(each, ExportableState)]

    def _shape(self) -> dict[str, Any]:
        args, data = self._trainer.args, self._trainer.train_dataset
        return {
            "samples": len(data) if hasattr(data, "__len__") else None,
            "batch size": self._trainer._train_batch_size,
            "gradient accumulation": args.gradient_accumulation_steps,
            "processes": args.world_size,
        }


class _Epochs(Sampler[Batch]):
    """The batches of any epoch, as the seed and the number of the epoch decide."""

    def __init__(self, loader: Any, seed: int, rank: int) -> None:
        self._loader, self._batches, self._rank = loader, loader.batch_sampler, rank
        self.seed = seed
        self._epoch = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._batches, name)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        seed = mixed(self.seed, self._epoch)
        for each in samplers(self._loader):
            if hasattr(each, "set_epoch"):
                each.set_epoch(self._epoch)
            if hasattr(each, "initial_seed"):
                each.initial_seed = self.seed
            if isinstance(getattr(each, "generator", None), torch.Generator):
                each.generator.manual_seed(seed)
        for number, indices in enumerate(drawn_apart(iter(self._batches), random_state_of(seed))):
            yield Batch(indices, mixed(seed, number * _RANKS_MAX + self._rank))


def _refuse_inexact(trainer: Any) -> None:
    args = trainer.args
    found = [
        what
        for what, is_so in (
            ("DeepSpeed", trainer.is_deepspeed_enabled),
            ("FSDP through the Trainer", trainer.is_fsdp_enabled),
            ("`auto_find_batch_size`", args.auto_find_batch_size),
            ("`ignore_data_skip`", args.ignore_data_skip),
            ("a Trainer without `_run_epoch` (transformers before 5)", not hasattr(trainer, "_run_epoch")),
        )
        if is_so
    ]
    if found:
        raise Refused(f"a run with {' and '.join(found)} can't be resumed exactly; nothing was attached.")
