"""Where a training run is in its data: the order, how much of it was consumed, and the randomness of its workers.

A `Feed` reads what a `DataLoader` reads, in an order that is fixed for the whole epoch before it begins, with a
cursor in it. So it goes on at any sample without reading those before it again, batches that workers prefetched
don't count, and another number of workers or ranks goes on from the same cursor. Augmentation draws from
generators that are seeded anew for each batch, by its place in the order: it doesn't matter which worker does it,
or whether its predecessors were done by the same process.
"""

from __future__ import annotations

import random  # noqa: TID251  seeded for each batch, as its place in the order says
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
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
from outlast.errors import Refused

_MIX = 0x9E3779B97F4A7C15


class Batch(list[Any]):
    """The indices of one batch, and the seed of everything random that is done to it."""

    def __init__(self, indices: Sequence[Any], seed: int) -> None:
        super().__init__(indices)
        self.seed = seed


class _Seeded(Dataset[Any]):
    """A dataset whose batches, collated, depend on what is asked for, and on nothing else that is random."""

    def __init__(self, dataset: Any, collate: Callable[[Any], Any]) -> None:
        self._dataset = dataset
        self._collate = collate

    def __getattr__(self, name: str) -> Any:
        if name in ("_dataset", "_collate"):  # while it is being unpickled in a worker
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, batch: Batch) -> Any:
        with _randomness_of(batch.seed):
            many = getattr(self._dataset, "__getitems__", None)
            return self._collate(many(list(batch)) if many else [self._dataset[index] for index in batch])

    def __getitem__(self, batch: Batch) -> Any:
        with _randomness_of(batch.seed):
            return self._collate(self._dataset[batch[0]])


def _as_it_is(batch: Any) -> Any:
    return batch


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


class _Order(Sampler[Batch]):
    """The batches that are left of an epoch."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    def __iter__(self) -> Iterator[Batch]:
        return self._feed.batches_left()


class Feed:
    """Iterate it for the batches that are left of an epoch; iterate again for the next one.

    `state_dict` tells where it is: the batch given out last counts as consumed.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.on_batch: Callable[[], None] = _nothing
        """called when a batch is given out"""
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
            if any(map(_is_shuffle_buffer, _examples(loader.dataset))):
                raise Refused(
                    "a shuffled iterable dataset of Hugging Face does not keep what is in its buffer, so samples would "
                    "be lost where the run goes on; nothing was started.",
                    hint="Use `shuffle(buffer_size=1)`, which shuffles its shards, or a dataset that is not iterable.",
                )
        else:
            self._inner = self._rebuilt()

    # -- the order -------------------------------------------------------------------------------

    def _sampler(self) -> Any:
        """The sampler of single indices, where batches are made of one in the usual way."""
        batches = self._loader.batch_sampler
        if batches is None:
            return self._loader.sampler
        return batches.sampler if type(batches) is BatchSampler else None

    @property
    def _batch_size(self) -> int:
        return int(getattr(self._loader.batch_sampler, "batch_size", 1))

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

    def batches_left(self) -> Iterator[Batch]:
        """From the cursor on. It is moved when a batch is given out, not when a worker is told to make it."""
        assert self._seed is not None
        at, seed = self._consumed, self._seed
        if not self._is_canonical():
            for number, indices in enumerate(self._own_batches(at), at):
                yield Batch(indices, mixed(seed, number))
            return
        order, ranks, rank = self._indices()
        if left := (len(order) - at) % ranks:  # it was consumed by another number of ranks
            order = order[:-left] if self._drops_uneven() else [*order, *order[at:][: ranks - left]]
        drops_last = getattr(self._loader.batch_sampler, "drop_last", False)
        size = self._batch_size * ranks
        while at < len(order):
            mine = order[at + rank : at + size : ranks]
            if not mine or (len(order) - at < size and drops_last):
                return
            yield Batch(mine, mixed(seed, at + rank))
            at += size

    def _drops_uneven(self) -> bool:
        return bool(getattr(self._sampler(), "drop_last", False))

    def _own_batches(self, skip: int) -> Iterator[Sequence[Any]]:
        """Those of the user's own sampler, which draws from generators as they were when the epoch began."""
        source = self._loader.batch_sampler
        batches = iter(source) if source is not None else ([index] for index in self._loader.sampler)
        assert self._start is not None
        self._own_generators(self._start["own"])
        yield from islice(drawn_apart(batches, self._start), skip, None)

    def _step(self) -> int:
        if not self._is_canonical():
            return 1
        sampler = self._sampler()
        ranks = sampler.num_replicas if type(sampler) is DistributedSampler else 1
        return self._batch_size * int(ranks)

    # -- reading ---------------------------------------------------------------------------------

    def _rebuilt(self) -> DataLoader[Any]:
        """The same loader over the same dataset, in our order."""
        # Its own generator: a loader draws a seed for its workers, and that must not come from the training's.
        return rebuilt(self._loader, _Order(self), torch.Generator())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __len__(self) -> int:
        """Batches in a whole epoch. Raises `TypeError` where that isn't known."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        was_under_way, gave = self._seed is not None, False
        for _ in range(2):
            for batch in self._rest():
                gave = True
                yield batch
            if gave or not was_under_way:  # else the place was behind the last batch of an epoch
                return

    def end_epoch(self) -> None:
        """Leave out what is left of an epoch under way: the next iteration begins a new one."""
        if self._seed is not None:
            self._seed = None
            self._consumed = 0
            self._epoch += 1

    @property
    def epoch(self) -> int:
        """The number of the epoch that the next batch belongs to, from 0, for scripts that loop over epochs."""
        if self._inner is None or self._seed is None:
            return self._epoch
        if self._is_canonical():
            is_over = next(self.batches_left(), None) is None
        else:
            is_over = self._consumed >= len(self._loader)
        return self._epoch + is_over

    def _rest(self) -> Iterator[Any]:
        self._tell_epoch()
        if self._inner is None:
            self._seed = 0
            outside = torch.get_rng_state()
            batches = iter(self._loader)
            torch.set_rng_state(outside)  # it drew a seed for workers: once more in a life that goes on in mid-epoch
            yield from _told(batches, self.on_batch)
            self.end_epoch()
            return
        if self._seed is None:
            self._start = None if self._is_canonical() else random_state() | {"own": self._own_generators()}
            self._seed = int(torch.empty((), dtype=torch.int64).random_().item())
            self._consumed = 0
        step = self._step()
        for batch in self._inner:
            self.on_batch()  # first: an exception from here on finds the state in the middle of a step
            self._consumed += step
            yield batch
        self.end_epoch()

    def _tell_epoch(self) -> None:
        for each in (*samplers(self._loader), self._loader.dataset):
            tell = getattr(each, "set_epoch", None)
            if tell is not None:
                tell(self._epoch)

    def _own_generators(self, given: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """The states of the generators that samplers hold; set to those that are given."""
        found = {id(each.generator): each.generator for each in samplers(self._loader) if _has_generator(each)}
        for generator, state in zip(found.values(), given or (), strict=False):
            generator.set_state(state)
        return [each.get_state() for each in found.values()]

    # -- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"epoch": self._epoch, "consumed": self._consumed, "seed": self._seed}
        if self._inner is None:
            return found | {"dataset": self._loader.dataset.state_dict()}  # type: ignore[attr-defined]
        found["samples"] = len(self._loader.dataset)  # type: ignore[arg-type]
        return found | ({"start": self._start} if self._start is not None else {})

    def differs_from(self, saved: dict[str, Any]) -> str:
        """What keeps a place from being given back, or nothing."""
        count = None if self._inner is None else len(self._loader.dataset)  # type: ignore[arg-type]
        if count is None or saved.get("samples") == count:
            return ""
        return (
            f"the dataset had {saved.get('samples')} samples and has {count}, so the place in it means something else; "
            "leave the loader out of the state to begin an epoch anew"
        )

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        if self._inner is None:
            self._epoch = saved["epoch"]
            self._tell_epoch()  # a place in another epoch is none
            self._loader.dataset.load_state_dict(saved["dataset"])  # type: ignore[attr-defined]
        self._epoch, self._consumed, self._seed = saved["epoch"], saved["consumed"], saved["seed"]
        self._start = saved.get("start")


def rebuilt(
    loader: DataLoader[Any], order: Sampler[Batch], generator: torch.Generator | None = None
) -> DataLoader[Any]:
    """A loader of the same samples, in the order and with the randomness that `order` tells."""
    options: dict[str, Any] = {
        name: getattr(loader, name)
        for name in ("num_workers", "pin_memory", "timeout", "worker_init_fn", "prefetch_factor", "persistent_workers",
                     "multiprocessing_context", "pin_memory_device")
    }  # fmt: skip
    options |= {"batch_sampler": order} if loader.batch_sampler is not None else {"sampler": order, "batch_size": None}
    dataset = _Seeded(loader.dataset, loader.collate_fn)
    return DataLoader(dataset, collate_fn=_as_it_is, generator=generator, **options)


class Placed:
    """A loader that knows its place itself: it begins where it was left, also when that is the end of an epoch."""

    def __init__(self, loader: Any) -> None:
        self.on_batch: Callable[[], None] = _nothing
        self._loader = loader
        self._goes_on = False

    def __iter__(self) -> Iterator[Any]:
        goes_on, self._goes_on = self._goes_on, False
        outside = torch.get_rng_state()
        batches = iter(self._loader)
        if goes_on:
            torch.set_rng_state(outside)  # it drew a seed for workers, as it had when the epoch began
        gave = False
        for batch in _told(batches, self.on_batch):
            gave = True
            yield batch
        if goes_on and not gave:
            yield from _told(self._loader, self.on_batch)

    def state_dict(self) -> Any:
        return self._loader.state_dict()

    def load_state_dict(self, saved: Any) -> None:
        self._loader.load_state_dict(saved)
        self._goes_on = True


def _told(batches: Iterable[Any], on_batch: Callable[[], None]) -> Iterator[Any]:
    """Of a loader whose place is where its dataset stands. Where that fails, some samples of a batch are gone from it;
    so the failure, too, finds the state in the middle of a step, and the checkpoint before it stays the last."""
    try:
        for batch in batches:
            on_batch()
            yield batch
    except Exception:
        on_batch()
        raise


def _nothing() -> None:
    pass


def placed(loader: Any) -> Feed | Placed:
    """Something to iterate in the loader's stead, whose place is state. Raises `Refused` where no place can be told."""
    base = getattr(loader, "base_dataloader", None)
    if isinstance(base, DataLoader) and not hasattr(base, "state_dict"):
        # The adapter that Accelerate's `prepare` made. It takes the state of what is inside before it reads ahead.
        loader.base_dataloader = Feed(base)
        loader.dl_state_dict = loader.base_dataloader.state_dict()
    if callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None)):
        return Placed(loader)
    return Feed(loader)


def resumable(item: Any) -> Any:
    """An item of a state, or what stands for it: for a loader what tells its place."""
    if isinstance(item, torch.optim.Optimizer) and type(item).__module__ == "accelerate.optimizer":
        return getattr(item, "optimizer", item)  # a wrapper without state, whose hooks nobody calls
    return placed(item) if isinstance(item, DataLoader) or hasattr(item, "base_dataloader") else item


def samplers(loader: Any) -> Iterator[Any]:
    """The loader's samplers, from the outermost to the innermost."""
    waiting = [loader.batch_sampler, loader.sampler]
    while waiting:
        each = waiting.pop(0)
        if each is not None:
            yield each
            waiting += [getattr(each, "batch_sampler", None), getattr(each, "sampler", None)]


def _examples(dataset: Any) -> Iterator[Any]:
    """What an iterable dataset of Hugging Face is built of."""
    waiting = [getattr(dataset, "_ex_iterable", None)]
    while waiting:
        each = waiting.pop()
        if each is not None:
            yield each
            waiting += [getattr(each, "ex_iterable", None), *getattr(each, "ex_iterables", ())]


def _is_shuffle_buffer(examples: Any) -> bool:
    return type(examples).__name__ == "BufferShuffledExamplesIterable" and examples.buffer_size > 1


def _has_generator(sampler: Any) -> bool:
    return isinstance(getattr(sampler, "generator", None), torch.Generator)


def drawn_apart(batches: Iterator[Any], inside: dict[str, Any]) -> Iterator[list[Any]]:
    """What `batches` gives where random numbers begin at `inside`; for all others they stay as they are."""
    while True:
        outside = random_state()
        give_random_state(inside)
        batch = next(batches, None)
        inside = random_state()
        give_random_state(outside)
        if batch is None:
            return
        yield list(batch)


def random_state_of(seed: int) -> dict[str, Any]:
    """The state of all generators after they were seeded. They stay as they are."""
    with _randomness_of(seed):
        return random_state()


def mixed(seed: int, place: int) -> int:
    """Another seed for each place, of one that is given."""
    return (seed ^ ((place + 1) * _MIX)) & ((1 << 63) - 1)
