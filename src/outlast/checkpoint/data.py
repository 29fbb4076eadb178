"""Where a training run is in its data: the order, how much of it was consumed, and the randomness of its workers.

A `Feed` reads what a `DataLoader` reads, in an order that is fixed for the whole epoch before it begins, with a
cursor in it. So it goes on at any sample without reading those before it again, batches that workers prefetched
don't count, and another number of workers or ranks goes on from the same cursor. Augmentation draws from
generators that are seeded anew for each batch, by its place in the order: it doesn't matter which worker does it,
or whether its predecessors were done by the same process.
"""

from __future__ import annotations

import random  # noqa: TID251  seeded for each batch, as its place in the order says
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from outlast.checkpoint.state import give_random_state, random_state
from outlast.errors import InvalidInput, Refused

_MIX = 0x9E3779B97F4A7C15


class _Batch(list[Any]):
    """The indices of one batch, and the seed of everything random that is done to it."""

    def __init__(self, indices: Sequence[Any], seed: int) -> None:
        super().__init__(indices)
        self.seed = seed


class _Seeded(Dataset[Any]):
    """A dataset whose randomness depends on the batch that is asked for, and on nothing else."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getattr__(self, name: str) -> Any:
        if name == "_dataset":  # while it is being unpickled in a worker
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, batch: _Batch) -> list[Any]:
        with _randomness_of(batch.seed):
            many = getattr(self._dataset, "__getitems__", None)
            return list(many(list(batch))) if many else [self._dataset[index] for index in batch]

    def __getitem__(self, batch: _Batch) -> Any:
        with _randomness_of(batch.seed):
            return self._dataset[batch[0]]


class _randomness_of:  # noqa: N801
    """Every generator of this process is seeded inside, and is as it was outside."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        # In the training's own process: what it draws must not depend on whether batches are read there.
        self._kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
        random.seed(self._seed)
        np.random.seed(self._seed & 0xFFFFFFFF)
        torch.default_generator.manual_seed(self._seed)  # of the CPU: workers have no other

    def __exit__(self, *_: object) -> None:
        random.setstate(self._kept[0])
        np.random.set_state(self._kept[1])
        torch.set_rng_state(self._kept[2])


class _Order(Sampler[_Batch]):
    """The batches that are left of an epoch."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    def __iter__(self) -> Iterator[_Batch]:
        return self._feed.batches_left()


class Feed:
    """Iterate it for the batches that are left of an epoch; iterate again for the next one.

    `state_dict` tells where it is: the batch given out last counts as consumed.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        self._epoch = 0
        self._seed: int | None = None
        """of the epoch under way; None between two"""
        self._consumed = 0
        """samples of the epoch's order, those of all ranks; batches where the order is a sampler's own"""
        self._start: dict[str, Any] | None = None
        """the generators' state when the epoch began, where its order is a sampler's own"""
        self._inner: DataLoader[Any] | None = None
        if isinstance(loader.dataset, IterableDataset):
            if loader.num_workers or not hasattr(loader.dataset, "state_dict"):
                has = "a" if hasattr(loader.dataset, "state_dict") else "no"
                raise Refused(
                    "where an iterable dataset is, only itself knows: its loader has "
                    f"{loader.num_workers} workers, and it has {has} `state_dict`; nothing was started.",
                    hint="Use torchdata's StatefulDataLoader, or num_workers=0 with `state_dict` and `load_state_dict` "
                    "on the dataset.",
                )
        else:
            self._inner = self._rebuilt()

    # -- the order -------------------------------------------------------------------------------

    def _sampler(self) -> Any:
        """The sampler of single indices, where batches are made of one in the usual way."""
        loader = self._loader
        if loader.batch_size is None:
            return loader.sampler
        return loader.sampler if type(loader.batch_sampler) is BatchSampler else None

    def _is_canonical(self) -> bool:
        """Whether the order of an epoch is known before it begins."""
        sampler = self._sampler()
        if type(sampler) is RandomSampler:
            return not sampler.replacement and sampler.num_samples == len(sampler.data_source)
        return type(sampler) in (SequentialSampler, DistributedSampler)

    def _indices(self) -> tuple[Sequence[int], int, int]:
        """(the order of the epoch, ranks, this rank)."""
        sampler = self._sampler()
        assert self._seed is not None
        total = len(self._loader.dataset)  # type: ignore[arg-type]
        generator = torch.Generator()
        if type(sampler) is SequentialSampler:
            return range(total), 1, 0
        if type(sampler) is RandomSampler:
            generator.manual_seed(self._seed)
            return torch.randperm(total, generator=generator).tolist(), 1, 0
        order: Sequence[int] = range(total)
        if sampler.shuffle:
            generator.manual_seed(sampler.seed + self._epoch)  # the same on all ranks, as torch does it
            order = torch.randperm(total, generator=generator).tolist()
        ranks = sampler.num_replicas
        whole = total // ranks * ranks if sampler.drop_last else -(-total // ranks) * ranks
        return [order[at % total] for at in range(whole)], ranks, sampler.rank

    def batches_left(self) -> Iterator[_Batch]:
        """From the cursor on. It is moved when a batch is given out, not when a worker is told to make it."""
        assert self._seed is not None
        at, seed = self._consumed, self._seed
        if not self._is_canonical():
            for number, indices in enumerate(self._own_batches(at), at):
                yield _Batch(indices, _mixed(seed, number))
            return
        order, ranks, rank = self._indices()
        size = (self._loader.batch_size or 1) * ranks
        while at < len(order):
            mine = order[at + rank : at + size : ranks]
            if not mine or (len(order) - at < size and self._loader.drop_last):
                return
            yield _Batch(mine, _mixed(seed, at + rank))
            at += size

    def _own_batches(self, skip: int) -> Iterator[Sequence[Any]]:
        """Those of the user's own sampler, which draws from generators as they were when the epoch began."""
        source = self._loader.batch_sampler
        batches = iter(source) if source is not None else ([index] for index in self._loader.sampler)
        assert self._start is not None
        inside = self._start
        for number in count():
            outside = random_state()
            give_random_state(inside)
            batch = next(batches, None)
            inside = random_state()
            give_random_state(outside)
            if batch is None:
                return
            if number >= skip:
                yield list(batch)

    def _step(self) -> int:
        if not self._is_canonical():
            return 1
        sampler = self._sampler()
        ranks = sampler.num_replicas if type(sampler) is DistributedSampler else 1
        return (self._loader.batch_size or 1) * int(ranks)

    # -- reading ---------------------------------------------------------------------------------

    def _rebuilt(self) -> DataLoader[Any]:
        """The same loader over the same dataset, in our order."""
        loader, order = self._loader, _Order(self)
        options: dict[str, Any] = {
            name: getattr(loader, name)
            for name in ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "prefetch_factor",
                         "persistent_workers", "multiprocessing_context", "pin_memory_device")
        }  # fmt: skip
        options |= (
            {"batch_sampler": order} if loader.batch_sampler is not None else {"sampler": order, "batch_size": None}
        )
        # Its own generator: a loader draws a seed for its workers, and that must not come from the training's.
        return DataLoader(_Seeded(loader.dataset), generator=torch.Generator(), **options)

    def __iter__(self) -> Iterator[Any]:
        if self._inner is None:
            outside = torch.get_rng_state()
            batches = iter(self._loader)
            torch.set_rng_state(outside)  # it drew a seed for workers: once more in a life that goes on in mid-epoch
            yield from batches
            self._epoch += 1
            return
        if self._seed is None:
            self._start = None if self._is_canonical() else random_state()
            self._seed = int(torch.empty((), dtype=torch.int64).random_().item())
            self._consumed = 0
        step = self._step()
        for batch in self._inner:
            self._consumed += step
            yield batch
        self._seed = None
        self._consumed = 0
        self._epoch += 1

    # -- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"epoch": self._epoch, "consumed": self._consumed, "seed": self._seed}
        if self._inner is None:
            return found | {"dataset": self._loader.dataset.state_dict()}  # type: ignore[attr-defined]
        found["samples"] = len(self._loader.dataset)  # type: ignore[arg-type]
        return found | ({"start": self._start} if self._start is not None else {})

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Raises `InvalidInput` where the data is not what it was."""
        if self._inner is None:
            self._loader.dataset.load_state_dict(saved["dataset"])  # type: ignore[attr-defined]
        elif saved.get("samples") != len(self._loader.dataset):  # type: ignore[arg-type]
            raise InvalidInput(
                f"the dataset has {len(self._loader.dataset)} samples, and had {saved.get('samples')} when it was "  # type: ignore[arg-type]
                "saved: the same place in it means something else now.",
                hint="Train on the same data, or leave the loader out of the state to begin an epoch anew.",
            )
        self._epoch, self._consumed, self._seed = saved["epoch"], saved["consumed"], saved["seed"]
        self._start = saved.get("start")


def _mixed(seed: int, place: int) -> int:
    return (seed ^ ((place + 1) * _MIX)) & ((1 << 63) - 1)
