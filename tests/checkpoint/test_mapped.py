"""A mapped checkpoint has the weights that were saved, is pages of the packs, and never changes them."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import outlast
from outlast.checkpoint import mapped
from outlast.checkpoint.run import Run
from outlast.errors import Corrupt, NotFound, Refused
from outlast.records import Chunking
from outlast.repo import forget, prune
from outlast.repo.prune_plan import Policy
from outlast.repo.repository import Repository
from outlast.store.layers import open_store

BLOCK_BYTES = 128 << 10
SMALL = Chunking(block_bytes=BLOCK_BYTES, min_bytes=32 << 10, avg_bytes=64 << 10, max_bytes=128 << 10)


@pytest.fixture(autouse=True)
def _no_disk_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "runs")


class Net(torch.nn.Module):
    """A tensor over several packs, tied ones, small ones, one that lies in another order, one that is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.big = torch.nn.Linear(512, 600)
        self.tied = torch.nn.Linear(512, 600)
        self.tied.weight = self.big.weight
        self.odd = torch.nn.Parameter(torch.randn(70_001, dtype=torch.bfloat16))
        self.conv = torch.nn.Conv2d(32, 64, 5)
        self.conv.weight.data = self.conv.weight.data.contiguous(memory_format=torch.channels_last)
        self.register_buffer("empty", torch.empty(0, 3))


def saved(url: str, model: torch.nn.Module, **how: Any) -> Repository:
    """A run with small blocks and packs of a few of them."""
    torch.manual_seed(5)
    settings: dict[str, Any] = {"compression": "none", "chunking": SMALL, "pack_bytes": 512 << 10} | how
    repository = Repository.create(open_store(url), **settings)
    secret = settings.get("secret")
    passphrase = secret() if secret else None
    with Run(url, name="net", state={"model": model}, save_every=10**9, keep=1, passphrase=passphrase) as run:
        run.save().wait()
    repository.refresh()
    return repository


def same(found: dict[str, torch.Tensor], model: torch.nn.Module) -> bool:
    wanted = model.state_dict()
    return list(found) == list(wanted) and all(
        (found[name].dtype, found[name].shape) == (each.dtype, each.shape) and torch.equal(found[name], each)
        for name, each in wanted.items()
    )


def mapped_bytes(tensor: torch.Tensor) -> int:
    """How much of the memory of a tensor is pages of packs."""
    start, total = tensor.data_ptr(), 0
    end = start + tensor.nbytes
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/packs/" in line:
            low, high = (int(each, 16) for each in line.split()[0].split("-"))
            total += max(0, min(end, high) - max(start, low))
    return total


def test_large_tensors_are_pages_of_the_packs(url: str) -> None:
    model = Net()
    repository = saved(url, model)
    found = mapped.open(url)
    assert same(found, model)
    weight = found["big.weight"]
    assert weight.nbytes > 2 * repository.format.pack_bytes
    assert mapped_bytes(weight) == weight.nbytes
    assert weight.data_ptr() == found["tied.weight"].data_ptr()
    assert found["conv.weight"].is_contiguous(memory_format=torch.channels_last)


def test_a_state_of_an_optimizer_is_mapped_by_its_names(url: str) -> None:
    model = torch.nn.Linear(512, 600)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 512)).sum().backward()
    optimizer.step()
    with Run(url, name="net", state={"model": model, "optimizer": optimizer}, save_every=10**9) as run:
        snapshot = run.save().wait()
    found = mapped.open(outlast.open(url), snapshot, "optimizer")
    moments = optimizer.state[model.weight]
    assert torch.equal(found["state.weight.exp_avg"], moments["exp_avg"])
    assert mapped_bytes(found["state.weight.exp_avg_sq"]) == moments["exp_avg_sq"].nbytes
    assert found["state.weight.step"] == moments["step"]


def test_writing_to_a_tensor_changes_no_pack(url: str) -> None:
    model = Net()
    saved(url, model)
    first, second = mapped.open(url), mapped.open(url)
    for tensor in first.values():
        tensor.fill_(7)
    assert same(second, model)
    assert same(mapped.open(url, verify=True), model)


def test_tensors_outlive_their_packs(url: str) -> None:
    model = Net()
    repository = saved(url, model)
    found = mapped.open(repository)
    forget.execute(repository, forget.plan(repository, ids=[repository.snapshots()[0].id]), allow_empty=True)
    prune.prune(repository, Policy(max_unused=0.0, max_delete=1.0, grace_seconds=0.0))
    assert not list(repository.store.list("packs/"))
    assert same(found, model)


def test_damage_is_seen_only_where_it_is_asked_for(url: str) -> None:
    model = Net()
    repository = saved(url, model)
    [largest] = sorted((Path(url) / "packs").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)[-1:]
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.chmod(0o600)
    largest.write_bytes(content)
    assert not same(mapped.open(repository), model)
    with pytest.raises(Corrupt):
        mapped.open(repository, verify=True)


def test_a_pack_cut_short_is_told_of_and_not_mapped(url: str) -> None:
    saved(url, Net())
    for path in (Path(url) / "packs").rglob("*"):
        if path.is_file():
            path.chmod(0o600)
            os.truncate(path, path.stat().st_size // 3)
    with pytest.raises(Corrupt):
        mapped.open(url)


@pytest.mark.parametrize("how", [{"compression": "auto"}, {"secret": lambda: b"secret"}], ids=["packed", "encrypted"])
def test_what_cannot_be_mapped_is_read(url: str, how: dict[str, Any]) -> None:
    model = Net()
    torch.nn.init.zeros_(model.big.weight)
    repository = saved(url, model, **how)
    found = mapped.open(repository)
    assert same(found, model)
    assert mapped_bytes(found["big.weight"]) == 0


def test_a_repository_elsewhere_is_read() -> None:
    model = Net()
    repository = saved("memory://mapped", model)
    assert same(mapped.open(repository, verify=True), model)


def test_a_block_that_lies_elsewhere_is_mapped_from_there(url: str) -> None:
    """Of a tensor whose middle changed, the rest is where the first save put it."""
    model = Net()
    repository = saved(url, model)
    with torch.no_grad():
        model.big.weight.view(-1)[BLOCK_BYTES // 4 + 5] += 1
    with Run(url, name="net", state={"model": model}, save_every=10**9) as run:
        run.begin_at(1)
        run.save().wait()
    repository.refresh()
    found = mapped.open(repository)
    assert same(found, model)
    assert mapped_bytes(found["big.weight"]) == found["big.weight"].nbytes


def test_what_is_not_there_is_named(url: str) -> None:
    repository = saved(url, Net())
    with pytest.raises(NotFound, match="no part weights; it has model, rng"):
        mapped.open(repository, part="weights")
    with pytest.raises(NotFound):
        mapped.open(repository, "0123456789abcdef")


def test_a_backup_is_no_checkpoint(url: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"x")
    repository = outlast.create(url)
    outlast.back_up(repository, str(tmp_path / "folder"), name="folder")
    with pytest.raises(Refused, match="no checkpoint"):
        mapped.open(repository)


def test_mapped_tensors_load_into_a_model(url: str) -> None:
    model = Net()
    saved(url, model)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        torch.nn.init.ones_(parameter)
    other.load_state_dict(mapped.open(url), assign=True)
    assert same(dict(other.state_dict()), model)
