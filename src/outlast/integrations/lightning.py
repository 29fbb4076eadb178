"""Lightning, killed at any moment and run again, ends in the same state, bit for bit; and its checkpoints in Outlast.

    trainer = Trainer(callbacks=[OutlastCallback("./runs", name="gpt")])
    trainer.fit(module, loader)

A checkpoint is taken between two batches: when the loop asks for the next one, all that belongs to the one before is
done, validation too. There the run goes on: with the same progress of all loops, the same place in the data, the
same random numbers. Hooks called at the start of an epoch are called again for the epoch that it goes on in.

Limits. There is one loader for training, with a length; an iterable dataset has to have one. What a module logged for
the mean of an epoch, and what a torchmetrics metric gathered in it, covers the part since the run went on, as with
Lightning's own checkpoints. Strategies that shard the model (FSDP, DeepSpeed, ModelParallel), `dataloader_iter` and
`reload_dataloaders_every_n_epochs` are refused.

`OutlastCheckpointIO` is for those who keep Lightning's own checkpoints (`ModelCheckpoint`, `fit(ckpt_path=...)`): they
go to a repository, without pickle.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from outlast import Passphrase, secret_of
from outlast.checkpoint.data import Feed
from outlast.checkpoint.ranks import Ranks
from outlast.checkpoint.run import Run
from outlast.checkpoint.state import give_random_state, random_state
from outlast.checkpoint.tiers import Tier
from outlast.clock import SYSTEM_CLOCK
from outlast.errors import InvalidInput, NotFound, Refused
from outlast.events import LOG_SINK, EventSink
from outlast.repo import forget, prune
from outlast.repo.prune_plan import Policy as PrunePolicy

try:
    from lightning.fabric.plugins import CheckpointIO
    from lightning.pytorch import Callback
except ImportError:
    from lightning_fabric.plugins import CheckpointIO  # type: ignore[assignment,unused-ignore]
    from pytorch_lightning import Callback  # type: ignore[assignment,unused-ignore]

_ANSWERED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_ALL = 1 << 62
_SCHEME = "outlast://"


class OutlastCallback(Callback):
    """Saves the fitting of a module, and lets it go on where it was. Its steps are batches."""

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
        """`options` are those of `Run`: `save_every`, `keep`, `overlap`, `passphrase` and so on. The others but `best`
        are those of `Run.resume`.

        With `best` ("val_loss:min") each validation that logs this metric is saved too.
        """
        self._options: dict[str, Any] = {"name": name, "best": best} | options
        self._resuming: dict[str, Any] = {"crashes_max": crashes_max, "same_environment": same_environment}
        self._url = url
        self._best = best.partition(":")[0]
        self._run: Run | None = None

    # -- events ----------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        _refuse_inexact(trainer)
        self._progress, self._loader = _Progress(trainer, self), _Place()
        self._metrics: dict[str, float] = {}
        self._is_trained = False  # whether a batch was trained on that is no step of the run yet
        optimizers = trainer.optimizers
        parts = {"model": pl_module, "trainer": self._progress, "loader": self._loader}
        for at, optimizer in enumerate(optimizers):
            parts["optimizer" if len(optimizers) == 1 else f"optimizer{at}"] = optimizer
        self._run = Run(self._url, state=parts, **self._options)
        # Lightning sets handlers of its own after this, and back to what it found here: not to those of a run.
        before = [signal.getsignal(each) for each in _ANSWERED]
        self._run.resume(**self._resuming)
        self._signals = {
            each: signal.getsignal(each)
            for each, was in zip(_ANSWERED, before, strict=True)
            if signal.getsignal(each) is not was
        }
        for each, was in zip(_ANSWERED, before, strict=True):
            if each in self._signals:
                signal.signal(each, was)
        self._random = random_state() if self._run.finished_steps else None
        # Until the first batch they are out of reach: the validation before the training sets gradients to zero.
        self._grads = [(each, each.grad) for each in pl_module.parameters()] if self._random is not None else []
        for each, _ in self._grads:
            each.grad = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for each, answer in self._signals.items():
            signal.signal(each, answer)
        loop = trainer.fit_loop
        source = _resumable(loop)
        self._loader.be(source)
        loop._combined_loader.flattened = [_Between(source, self)]
        iter(loop._data_fetcher)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._is_trained = True

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self._metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._progress.has_ended = True
        self._end_step(save=True)
        self._close()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._give_back()  # of a run that had ended, and had nothing left to do
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.close()

    # -- between two batches ---------------------------------------------------------------------

    @property
    def goes_on_in_mid_epoch(self) -> bool:
        return self._random is not None and self._progress.is_mid_epoch

    def between(self) -> None:
        """Here checkpoints are taken, and here the run goes on from one: nothing else is under way."""
        self._give_back()
        self._end_step()
        if self._run is not None:
            self._run.begin_step()

    def _give_back(self) -> None:
        """Once: what the beginning of a fit changes."""
        if self._random is None:
            return
        self._progress.give_back()
        for each, grad in self._grads:
            each.grad = grad
        give_random_state(self._random)
        self._grads.clear()
        self._random = None

    def _end_step(self, *, save: bool = False) -> None:
        run = self._run
        if run is None or not self._is_trained:
            return
        self._is_trained = False
        metrics, self._metrics = self._metrics, {}
        run.step(save or self._best in metrics, **metrics)


class _Between:
    """The loader of the training, which tells the callback when a batch is asked for."""

    def __init__(self, source: Any, callback: OutlastCallback) -> None:
        self._source, self._callback = source, callback

    def __len__(self) -> int:
        return len(self._source)

    def __iter__(self) -> Iterator[Any]:
        batches = None
        if self._callback.goes_on_in_mid_epoch:
            batches = iter(self._source)  # what this draws was drawn already when the epoch began
        elif isinstance(self._source, Feed):
            self._source.end_epoch()  # the loop leaves the last batch of an epoch without asking for one more
        while True:
            self._callback.between()
            batches = iter(self._source) if batches is None else batches
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield batch


class _Place:
    """The place in the data. The loader is only there when the training starts, later than the rest."""

    def __init__(self) -> None:
        self._source: Any = None
        self._waiting: Any = None

    def be(self, source: Any) -> None:
        self._source = source
        if self._waiting is not None:
            source.load_state_dict(self._waiting)
            self._waiting = None

    def state_dict(self) -> Any:
        return self._source.state_dict()

    def load_state_dict(self, saved: Any) -> None:
        self._waiting = saved


class _Progress:
    """What the trainer itself, its callbacks, schedulers and plugins know of the run."""

    def __init__(self, trainer: Any, callback: Callback) -> None:
        self._trainer, self._callback = trainer, callback
        self._saved: dict[str, Any] = {}
        self.has_ended = False

    @property
    def is_mid_epoch(self) -> bool:
        return bool(self._saved) and not self._saved["ended"] and self._saved["fetched"] > 0

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        hooked = self._hooked()
        for each in (*self._others(), trainer.lightning_module):
            arguments = (hooked,) if each is trainer.lightning_module else (trainer, trainer.lightning_module, hooked)
            each.on_save_checkpoint(*arguments)
        return {
            "ended": self.has_ended,
            "should_stop": trainer.should_stop,
            "fetched": trainer.fit_loop.epoch_loop.batch_progress.current.ready,
            "loops": trainer.fit_loop.state_dict(),
            "metrics": dict(trainer._logger_connector._callback_metrics),
            "schedulers": [each.scheduler.state_dict() for each in trainer.lr_scheduler_configs],
            "callbacks": {each.state_key: found for each in self._others() if (found := each.state_dict())},
            "precision": trainer.precision_plugin.state_dict(),
            "data": trainer.datamodule.state_dict() if trainer.datamodule is not None else {},
            "hooked": {key: value for key, value in hooked.items() if key not in self._hooked()},
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """All but what the beginning of the fit is still going to change: see `give_back`."""
        trainer, self._saved = self._trainer, saved
        self._give_to_loops()
        trainer.should_stop = saved["should_stop"]
        for config, state in zip(trainer.lr_scheduler_configs, saved["schedulers"], strict=True):
            config.scheduler.load_state_dict(state)
        for each in self._others():
            if each.state_key in saved["callbacks"]:
                each.load_state_dict(saved["callbacks"][each.state_key])
        trainer.precision_plugin.load_state_dict(saved["precision"])
        if saved["data"]:
            trainer.datamodule.load_state_dict(saved["data"])
        hooked = self._hooked() | saved["hooked"]
        for each in self._others():
            each.on_load_checkpoint(trainer, trainer.lightning_module, hooked)
        trainer.lightning_module.on_load_checkpoint(hooked)

    def give_back(self) -> None:
        """At the place in the loops where the checkpoint was taken."""
        if not self._saved["ended"]:
            self._give_to_loops()
            self._trainer.fit_loop._data_fetcher.fetched = self._saved["fetched"]
        self._trainer._logger_connector._callback_metrics.update(self._saved["metrics"])
        self._saved = {}

    def _give_to_loops(self) -> None:
        loop = self._trainer.fit_loop
        loop.load_state_dict(self._saved["loops"])
        # Lightning thinks it restarts now, and would guess from the counters where. It is told: nowhere special.
        for each in (loop, loop.epoch_loop, *vars(loop.epoch_loop).values()):
            if hasattr(each, "_resuming_from_checkpoint"):
                each._restarting = each._loaded_from_state_dict = each._resuming_from_checkpoint = False

    def _others(self) -> list[Any]:
        return [each for each in self._trainer.callbacks if each is not self._callback]

    def _hooked(self) -> dict[str, Any]:
        """As much of Lightning's own checkpoint as hooks of modules and callbacks count on."""
        module = self._trainer.lightning_module
        return {
            "epoch": self._trainer.current_epoch,
            "global_step": self._trainer.global_step,
            "state_dict": module.state_dict(),
        }


def _resumable(loop: Any) -> Any:
    """The loader of the training as something whose place can be told."""
    loaders = loop._combined_loader.flattened
    if len(loaders) != 1:
        raise Refused(f"there are {len(loaders)} loaders for training, and only of one the place can be told.")
    if loop._data_fetcher.length is None or type(loop._data_fetcher).__name__ == "_DataLoaderIterDataFetcher":
        raise Refused(
            "batches are read before they are asked for: the loader has no length, or `training_step` takes an "
            "iterator; so no place in the data can be told.",
            hint="Give the dataset a length.",
        )
    loader = loaders[0]
    if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        return loader
    if not isinstance(loader, DataLoader):
        raise Refused(f"the loader is a {type(loader).__qualname__} that has no `state_dict` and `load_state_dict`.")
    return Feed(loader)


def _refuse_inexact(trainer: Any) -> None:
    if trainer.ckpt_path is not None:
        raise InvalidInput(
            "this fit goes on from its newest checkpoint in Outlast; `ckpt_path` is another one.",
            hint="Leave it out, or fit without OutlastCallback.",
        )
    if trainer.strategy.restore_checkpoint_after_setup:
        raise Refused(f"with {type(trainer.strategy).__name__} a fit can't be resumed exactly; nothing was started.")
    if trainer.reload_dataloaders_every_n_epochs:
        raise Refused("with `reload_dataloaders_every_n_epochs` no place in the data can be told.")


class OutlastCheckpointIO(CheckpointIO):
    """Keeps Lightning's checkpoints in a repository: `Trainer(plugins=[OutlastCheckpointIO(url, name="gpt")])`.

    Of a path its last part counts, also of `outlast://epoch=3.ckpt`: it is a snapshot called `NAME/epoch=3.ckpt`, and
    saving it again replaces that, whole or not at all. Numbers, text, containers of them, tensors and arrays are
    kept; anything else is refused with its place in the checkpoint, and nothing is pickled. `ckpt_path="last"` looks
    for files, of which there are none: name the path.
    """

    def __init__(
        self, url: str, *, name: str, passphrase: Passphrase | None = None, sink: EventSink = LOG_SINK
    ) -> None:
        self._url, self._name, self._passphrase, self._sink = url, name, passphrase, sink

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Returns when it is durable. Raises `Refused`, `StoreFull`, `Unavailable`; what was there before is whole."""
        if storage_options is not None:
            raise InvalidInput("`storage_options` mean nothing to a repository.")
        run = self._run(path, checkpoint)
        run.begin_at(int(checkpoint.get("global_step", 0)))
        kept = run.save().wait().id
        run.close()
        self._forget(path, but=kept)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Every byte verified; on the CPU. Raises `NotFound`, `Corrupt`."""
        checkpoint: dict[str, Any] = {}
        run = self._run(path, checkpoint)
        found = run.checkpoints()
        if not found:
            raise NotFound(f"there is no checkpoint {self._called(path)} in {self._url}.")
        before = random_state()
        run.load(max(found, key=lambda each: each[1].time)[1])
        run.close()
        give_random_state(before)  # Lightning's checkpoints hold none
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        self._forget(path)

    def _run(self, path: str | Path, checkpoint: dict[str, Any]) -> Run:
        return Run(
            self._url,
            name=self._called(path),
            state={"checkpoint": checkpoint},
            keep=_ALL,
            passphrase=self._passphrase,
            ranks=Ranks(alone=True),  # Lightning calls it on one rank
            sink=self._sink,
        )

    def _called(self, path: str | Path) -> str:
        last = str(path).removeprefix(_SCHEME).rstrip("/").rpartition("/")[2]
        if not last:
            raise InvalidInput(f"{str(path)!r} names no checkpoint.")
        return f"{self._name}/{last}"

    def _forget(self, path: str | Path, but: str = "") -> None:
        secret = secret_of(self._passphrase)
        repository = Tier(self._url, self._called(path), secret, SYSTEM_CLOCK, self._sink).repository
        gone = [each.id for each in repository.snapshots() if each.name == self._called(path) and each.id != but]
        if gone:
            forget.execute(repository, forget.plan(repository, ids=gone), allow_empty=True)
            prune.prune(repository, PrunePolicy(max_unused=0.5, max_delete=1.0, grace_seconds=0.0))
