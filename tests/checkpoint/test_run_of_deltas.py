"""A run whose checkpoints are differences: smaller, loaded bit for bit, restored by every way out, also when copied."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from outlast import rescue
from outlast.backup.inspect import diff
from outlast.checkpoint.run import Run
from outlast.repo.check import check
from outlast.repo.repository import Repository
from outlast.store.layers import open_store

SAVES = 8
EVERY = 4


class Characters(nn.Module):
    """A transformer that learns this very file by heart."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.1, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        length = text.shape[1]
        mask = torch.triu(torch.full((length, length), float("-inf"), dtype=self.head.weight.dtype), 1)
        return self.head(self.blocks(self.embed(text), mask=mask))


def made(dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(1)
    model = Characters().to(dtype)
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=3e-4)}


def tensors_of(state: dict[str, Any]) -> list[torch.Tensor]:
    moments = [value for each in state["optimizer"].state.values() for value in each.values()]
    return [each.detach().clone() for each in [*state["model"].state_dict().values(), *moments]]


def train(url: str, dtype: torch.dtype, **options: Any) -> list[list[torch.Tensor]]:
    """The state at each save."""
    text = torch.tensor(list(Path(__file__).read_bytes()))
    state, found = made(dtype), []
    warm = 40
    with Run(url, name="run", state=state, save_every=10**9, keep=SAVES, **options) as run:
        for step in range(warm + SAVES * EVERY):
            starts = torch.randint(0, len(text) - 33, (4,))
            batch = torch.stack([text[start : start + 33] for start in starts.tolist()])
            loss = nn.functional.cross_entropy(state["model"](batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            state["optimizer"].zero_grad()
            loss.backward()
            state["optimizer"].step()
            run.step(loss=loss.item())
            if step >= warm and (step + 1 - warm) % EVERY == 0:  # also at the end
                run.save().wait()
                found.append(tensors_of(state))
    return found


def outlast(*arguments: str) -> Any:
    ran = subprocess.run([sys.executable, "-m", "outlast", *arguments, "--json"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr + ran.stdout
    return json.loads(ran.stdout)


def opened(url: Path | str) -> Repository:
    return Repository.open(open_store(str(url)))


def bytes_of(repository: Repository) -> tuple[int, int]:
    """(of files, of packs)"""
    return sum(each.bytes for each in repository.snapshots()), sum(ref.bytes for ref in repository.state.packs.values())


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(_bits(a), _bits(b)) for a, b in zip(one, other, strict=True))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("trained")
    return folder, request.param, train(str(folder / "runs"), request.param, delta=True)


def test_every_checkpoint_loads_as_it_was(trained: Any) -> None:
    folder, dtype, states = trained
    repository = opened(folder / "runs")
    whole, stored = bytes_of(repository)
    assert stored < 0.9 * whole
    assert any(entry.sums for each in repository.snapshots() for entry in repository.entries(each))
    found = check(repository, data="all")
    assert found.ok, found.damaged
    for snapshot, expected in zip(repository.snapshots(), states, strict=True):
        state = made(dtype)
        with Run(str(folder / "runs"), name="run", state=state, keep=SAVES) as run:
            run.load(snapshot)
            assert same(tensors_of(state), expected)


def test_the_oldest_may_go(trained: Any, tmp_path: Path) -> None:
    _, dtype, _ = trained
    states = train(str(tmp_path / "runs"), dtype, delta=True)
    with Run(str(tmp_path / "runs"), name="run", state=made(dtype), keep=2, delta=True) as run:
        run.resume()
        run.save().wait()  # what is saved now is what is there: it takes the parts over
    repository = opened(tmp_path / "runs")
    assert len(repository.snapshots()) == 2
    assert check(repository, data="all").ok
    with Run(str(tmp_path / "runs"), name="run", state=made(dtype)) as run:
        run.resume()
        assert same(tensors_of(run.state), states[-1])


@pytest.mark.parametrize("delta", [False, True])
def test_a_cold_copy_is_small_and_every_way_leads_back(delta: bool, trained: Any, tmp_path: Path) -> None:
    """From checkpoints that are whole and not compressed, or are differences already."""
    folder, dtype, states = trained
    source = folder / ("runs" if delta else "whole")
    if not source.exists():
        assert same(train(str(source), dtype)[-1], states[-1])
    cold = f"--repo={tmp_path / 'cold'}"
    outlast("init", cold)
    assert not outlast("copy", "--delta", f"--from={source}", cold)["failed"]
    assert outlast("check", "--data=all", cold)["ok"]
    repository = opened(tmp_path / "cold")
    whole, stored = bytes_of(repository)
    assert stored < (0.9 if delta else 0.8) * whole
    *_, before, last = repository.snapshots()
    outlast("restore", last.id, f"--to={tmp_path / 'restored'}", cold)
    outlast("restore", last.id, f"--to={tmp_path / 'one.safetensors'}", "--tensor=head.weight", cold)
    changed = diff(repository, before, last).tensors.changed
    assert {"head.weight", "state.head.weight.exp_avg"} <= {each.name for each in changed}
    ran = subprocess.run(
        [sys.executable, rescue.__file__, str(tmp_path / "cold"), last.id, str(tmp_path / "rescued")],
        capture_output=True,
        text=True,
    )
    assert "every chunk verified" in ran.stdout, ran.stderr
    for way in ("restored", "rescued"):
        found = load_file(tmp_path / way / "model.safetensors")
        assert same([found[name] for name in made(dtype)["model"].state_dict()], states[-1][: len(found)])
    assert same([load_file(tmp_path / "one.safetensors")["head.weight"]], [found["head.weight"]])
    state = made(dtype)
    with Run(str(tmp_path / "cold"), name="run", state=state) as run:
        assert run.resume()
        assert same(tensors_of(state), states[-1])
