"""Where a run is in its data: stopped at any batch and gone on, it sees what it would have seen, in the same order."""

from __future__ import annotations

import random  # noqa: TID251
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from outlast.checkpoint.run import Run
from outlast.errors import Refused

COUNT = 23


class Numbers(Dataset[Any]):
    """Sample `n` is the number n, and something random."""

    def __init__(self, count: int = COUNT) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[int, float]:
        return index, torch.rand(()).item() + float(np.random.rand()) + random.random()


def collate(samples: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Random as well."""
    return [number for number, _ in samples], [noise + torch.rand(()).item() for _, noise in samples]


class Shuffled(Sampler[int]):
    """One's own: draws from numpy, and lazily from python."""

    def __len__(self) -> int:
        return COUNT

    def __iter__(self) -> Iterator[int]:
        left = [int(each) for each in np.random.permutation(COUNT)]
        while left:
            yield left.pop(random.randrange(len(left)))


class Buckets(BatchSampler):
    """Batches of two sizes, another order in each epoch that it is told of."""

    def __init__(self) -> None:
        super().__init__(SequentialSampler(range(COUNT)), 4, False)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        while order:
            size = 3 if len(order) % 2 else 5
            yield order[:size]
            order = order[size:]

    def __len__(self) -> int:
        return len(list(iter(self)))


def life(url: str, made: Callable[[], Any], until: int, seed: int = 1) -> list[Any]:
    """The batches of one life of a run, which saves where it ends. What it draws depends on all lives before."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    given, loader = [], made()
    with Run(url, name="x", state={"loader": loader}, save_every=10**9) as run:
        run.resume()
        for _, batch in run.steps(loader, until=until):
            given.append((batch, torch.rand(()).item()))
            run.step()
        run.save().wait()
    return given


def numbers(given: list[Any]) -> list[list[int]]:
    return [list(map(int, batch[0])) for batch, _ in given]


LOADERS: dict[str, Callable[[], Any]] = {
    "in order": lambda: DataLoader(Numbers(), batch_size=4, collate_fn=collate),
    "shuffled": lambda: DataLoader(Numbers(), batch_size=4, shuffle=True, collate_fn=collate),
    "without the last": lambda: DataLoader(Numbers(), batch_size=4, shuffle=True, drop_last=True, collate_fn=collate),
    "single": lambda: DataLoader(Numbers(), batch_size=None, sampler=RandomSampler(Numbers()), collate_fn=list),
    "of a rank": lambda: DataLoader(
        Numbers(), batch_size=3, sampler=DistributedSampler(Numbers(), 2, 1), collate_fn=collate
    ),
    "weighted": lambda: DataLoader(
        Numbers(), batch_size=4, collate_fn=collate,
        sampler=WeightedRandomSampler([1.0] * COUNT, COUNT, generator=torch.Generator().manual_seed(3)),
    ),
    "own sampler": lambda: DataLoader(Numbers(), batch_size=4, sampler=Shuffled(), collate_fn=collate),
    "batches named": lambda: DataLoader(
        Numbers(), batch_sampler=BatchSampler(RandomSampler(Numbers()), 4, True), collate_fn=collate
    ),
    "own batches": lambda: DataLoader(Numbers(), batch_sampler=Buckets(), collate_fn=collate),
}  # fmt: skip


@pytest.mark.parametrize("kind", LOADERS)
def test_it_goes_on_at_any_batch_as_if_nothing_had_happened(kind: str, tmp_path: Path) -> None:
    until = 16 if kind != "single" else 50
    whole = life(str(tmp_path / "whole"), LOADERS[kind], until)
    for stop in (1, 4, 5, 6, 7, 12) if kind != "single" else (1, 23, 30):
        url = str(tmp_path / f"stopped at {stop}")
        assert life(url, LOADERS[kind], stop) == whole[:stop]
        assert life(url, LOADERS[kind], until, seed=2) == whole[stop:], f"stopped at {stop}"


def test_batches_are_made_as_they_would_be(tmp_path: Path) -> None:
    """Of the sizes that the loader's own iteration has."""
    for kind, loader in LOADERS.items():
        if kind != "single":
            sizes = [len(batch[0]) for batch in loader()]
            assert [len(each) for each in numbers(life(str(tmp_path / kind), loader, len(sizes)))] == sizes, kind


@pytest.mark.parametrize("kind", ["in order", "shuffled", "own sampler", "own batches"])
def test_each_epoch_has_each_sample_once(kind: str, tmp_path: Path) -> None:
    given = []
    for until in (2, 5, 6, 7, 11, 12, 13, 17):
        given += numbers(life(str(tmp_path), LOADERS[kind], until, seed=until))
    flat = [number for batch in given for number in batch]
    assert sorted(flat[:COUNT]) == sorted(flat[COUNT : 2 * COUNT]) == list(range(COUNT))


@pytest.mark.parametrize("options", [{"num_workers": 1}, {"num_workers": 3, "prefetch_factor": 4}])
def test_another_number_of_workers_gives_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    """Also of what is random in them. What they read ahead doesn't count."""

    def loader(**options: Any) -> Any:
        return DataLoader(Numbers(), batch_size=4, shuffle=True, collate_fn=collate, **options)

    whole = life(str(tmp_path / "whole"), loader, 9)
    url = str(tmp_path / "stopped")
    assert life(url, lambda: loader(**options), 2) == whole[:2]
    assert life(url, lambda: loader(num_workers=2, persistent_workers=True), 5, seed=2) == whole[2:5]
    assert life(url, loader, 9, seed=3) == whole[5:]


def test_another_number_of_ranks_loses_and_repeats_nothing(tmp_path: Path) -> None:
    """Two ranks read 12 samples; one, or three, go on with the other ones."""

    def loader(ranks: int, rank: int, batch: int) -> Any:
        return DataLoader(Numbers(24), batch_size=batch, sampler=DistributedSampler(Numbers(24), ranks, rank))

    def read(url: Path, of: tuple[int, int, int], until: int) -> set[int]:
        return {number for batch in numbers(life(str(url), lambda: loader(*of), until)) for number in batch}

    seen = read(tmp_path / "of rank 0", (2, 0, 3), 2) | read(tmp_path / "of rank 1", (2, 1, 3), 2)
    assert len(seen) == 12
    for ranks, batch, steps in ((1, 4, 3), (3, 2, 2)):
        rest = []
        for rank in range(ranks):
            url = tmp_path / f"{rank} of {ranks}"
            shutil.copytree(tmp_path / "of rank 0", url)  # as a process of its own, each rank would read the same
            rest += sorted(read(url, (ranks, rank, batch), 2 + steps))
        assert sorted([*seen, *rest]) == list(range(24))


def test_data_that_is_not_what_it_was_is_refused(tmp_path: Path) -> None:
    life(str(tmp_path), LOADERS["shuffled"], 2)
    with pytest.raises(Refused, match="the dataset had 23 samples and has 24"):
        life(str(tmp_path), lambda: DataLoader(Numbers(24), batch_size=4, shuffle=True), 4)


# -- loaders that know their place -----------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_of_torchdata(workers: int, tmp_path: Path) -> None:
    """What is random in its workers it doesn't keep; the order it does."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def loader() -> Any:
        return stateful.StatefulDataLoader(Numbers(), batch_size=4, shuffle=True, num_workers=workers)

    def seen(given: list[Any]) -> list[Any]:
        return [(batch[0].tolist(), batch[1].tolist() if not workers else None, drawn) for batch, drawn in given]

    whole = seen(life(str(tmp_path / "whole"), loader, 14))
    for stop in (1, 5, 6, 7, 12):
        url = str(tmp_path / f"stopped at {stop}")
        assert seen(life(url, loader, stop)) == whole[:stop]
        assert seen(life(url, loader, 14, seed=2)) == whole[stop:], f"stopped at {stop}"


def test_a_dataset_of_hugging_face(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")

    def loader(workers: int = 0) -> Any:
        data = datasets.Dataset.from_dict({"n": list(range(COUNT))})
        data.set_transform(lambda rows: rows | {"noise": [random.random() for _ in rows["n"]]})
        return DataLoader(data, batch_size=4, shuffle=True, num_workers=workers)

    def seen(given: list[Any]) -> list[Any]:
        return [(batch["n"].tolist(), batch["noise"].tolist(), drawn) for batch, drawn in given]

    whole = seen(life(str(tmp_path / "whole"), loader, 14))
    for stop, workers in ((1, 0), (6, 0), (8, 2)):
        url = str(tmp_path / f"stopped at {stop}")
        assert seen(life(url, loader, stop)) == whole[:stop]
        assert seen(life(url, partial(loader, workers), 14, seed=2)) == whole[stop:], f"stopped at {stop}"


def test_an_iterable_dataset_of_hugging_face(tmp_path: Path) -> None:
    """Its shards are in another order in each epoch."""
    datasets = pytest.importorskip("datasets")

    def loader() -> Any:
        data = datasets.Dataset.from_dict({"n": list(range(COUNT))}).to_iterable_dataset(num_shards=5)
        data = data.shuffle(seed=5, buffer_size=1).map(lambda row: row | {"noise": random.random()})
        return DataLoader(data, batch_size=4)

    def seen(given: list[Any]) -> list[Any]:
        return [(batch["n"].tolist(), batch["noise"].tolist(), drawn) for batch, drawn in given]

    whole = seen(life(str(tmp_path / "whole"), loader, 14))
    assert whole[0][0] != whole[6][0]
    for stop in (1, 3, 5, 6, 7, 12):
        url = str(tmp_path / f"stopped at {stop}")
        assert seen(life(url, loader, stop)) == whole[:stop]
        assert seen(life(url, loader, 14, seed=2)) == whole[stop:], f"stopped at {stop}"


def test_an_iterable_dataset_that_does_not_know_its_place_is_refused(tmp_path: Path) -> None:
    class Endless(torch.utils.data.IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            yield from range(10**9)

    with pytest.raises(Refused, match="no `state_dict`"):
        Run(str(tmp_path), name="x", state={"loader": DataLoader(Endless())})


class Counting(torch.utils.data.IterableDataset[int]):
    """Knows its place, and fails once."""

    def __init__(self, fails_at: int) -> None:
        self.at, self.fails_at = 0, fails_at

    def __iter__(self) -> Iterator[int]:
        while self.at < COUNT:
            self.at += 1
            if self.at == self.fails_at:
                raise OSError("the disk is away")
            yield self.at - 1

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, saved: dict[str, int]) -> None:
        self.at = saved["at"]


def test_an_iterable_dataset_that_fails_in_mid_batch_loses_no_sample(tmp_path: Path) -> None:
    def life(fails_at: int) -> list[int]:
        seen = []
        loader = DataLoader(Counting(fails_at), batch_size=4)
        with Run(str(tmp_path), name="x", state={"loader": loader}, save_every=10**9) as run:
            run.resume()
            for step, batch in run.steps(loader, until=5):
                seen += batch.tolist()
                run.step(save=step == 0)
        return seen

    with pytest.raises(OSError, match="the disk is away"):
        life(fails_at=11)
    assert life(fails_at=-1) == list(range(4, 20))


def test_a_shuffle_buffer_that_would_lose_samples_is_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"n": list(range(COUNT))}).to_iterable_dataset(num_shards=5)
    loader = DataLoader(data.shuffle(seed=5, buffer_size=8).map(dict), batch_size=4)
    with pytest.raises(Refused, match="does not keep what is in its buffer"):
        Run(str(tmp_path), name="x", state={"loader": loader})


@pytest.mark.parametrize("loader", [
    DataLoader(Numbers(), batch_size=4, shuffle=True), DataLoader(Numbers(), batch_size=4, sampler=Shuffled()),
], ids=["canonical", "own"])  # fmt: skip
def test_a_script_that_loops_over_epochs_itself_makes_as_many(loader: DataLoader[Any], tmp_path: Path) -> None:
    """Stopped anywhere, also after the last batch of an epoch."""
    batches = len(loader)

    def life(steps: int) -> list[tuple[int, int]]:
        made = []
        run = Run(str(tmp_path / "runs"), name="x", state={"loader": loader}, save_every=10**9)
        run.resume()
        feed = run.state["loader"]
        for epoch in range(feed.epoch, 3):
            for _ in feed:
                made.append((epoch, feed.epoch))
                run.step()
                if len(made) == steps:
                    run.save().wait()
                    run.close()
                    return made
        run.close()
        return made

    made = [each for steps in (2, batches - 2, 3, 10**6) for each in life(steps)]
    assert [epoch for epoch, _ in made] == sorted([0, 1, 2] * batches)
