"""A checkpoint that was saved elsewhere becomes one that a Run resumes from, bit for bit, or is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

from outlast.checkpoint.import_file import Imported, bring_in
from outlast.checkpoint.run import Run
from outlast.errors import Corrupt, InvalidInput, NotFound, Refused
from outlast.repo.repository import Repository
from outlast.store.layers import open_store

State = dict[str, Any]


def made(seed: int) -> State:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2),
        "scaler": torch.amp.GradScaler("cpu", init_scale=2.0**9),
    }


def train(state: State, steps: int = 3) -> State:
    torch.manual_seed(50)
    for _ in range(steps):
        state["optimizer"].zero_grad()
        state["model"](torch.randn(8, 4)).square().sum().backward()
        state["optimizer"].step()
        state["scheduler"].step()
    return state


def weights(state: State) -> bytes:
    return b"".join(each.numpy().tobytes() for each in state["model"].state_dict().values())


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository.create(open_store(str(tmp_path / "runs")))


def resumed(repository: Repository, report: Imported, keys: list[str] | None = None) -> tuple[int, State]:
    state = made(seed=99)
    mine = {key: state[key] for key in keys or report.parts}
    with Run(repository.store.url, name=report.run, state=mine) as run:
        return run.resume(), state


def check_goes_on_as(original: State, state: State) -> None:
    """Training on from both gives the same: so moments, learning rates and counters are the same too."""
    assert weights(train(state)) == weights(train(original))


@pytest.mark.parametrize(
    "names",
    [
        ("model", "optimizer", "scheduler", "scaler", "step"),
        ("model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "scaler_state_dict", "global_step"),
        ("state_dict", "optimizer", "lr_scheduler", "grad_scaler", "step"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_torch_file_of_a_script_is_gone_on_with(
    repository: Repository, tmp_path: Path, names: tuple[str, ...], legacy: bool
) -> None:
    original = train(made(1))
    values = [original[key].state_dict() for key in ("model", "optimizer", "scheduler", "scaler")]
    content = dict(zip(names, [*values, 120], strict=True)) | {"epoch": 7, "best": 0.5}
    torch.save(content, tmp_path / "last.pt", _use_new_zipfile_serialization=not legacy)
    report = bring_in(repository, str(tmp_path / "last.pt"), "gpt")
    assert report.left_out == ["best", "epoch"]
    step, state = resumed(repository, report)
    assert step == report.step == 120
    assert state["scaler"].get_scale() == 2.0**9
    check_goes_on_as(original, state)


def test_a_lightning_checkpoint_is_gone_on_with(repository: Repository, tmp_path: Path) -> None:
    original = train(made(1))
    content = {
        "epoch": 3,
        "global_step": 30,
        "state_dict": original["model"].state_dict(),
        "optimizer_states": [original["optimizer"].state_dict()],
        "lr_schedulers": [original["scheduler"].state_dict()],
    }
    torch.save(content, tmp_path / "last.ckpt")
    report = bring_in(repository, str(tmp_path / "last.ckpt"), "lit")
    assert (report.step, report.left_out) == (30, ["epoch"])
    check_goes_on_as(original, resumed(repository, report)[1])


def test_a_dcp_folder_is_read_without_running_its_pickle(repository: Repository, tmp_path: Path) -> None:
    original = train(made(1))
    content = {key: original[key].state_dict() for key in ("model", "optimizer", "scheduler")} | {"step": 5}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(content, checkpoint_id=str(tmp_path / "dcp"), no_dist=True)
    report = bring_in(repository, str(tmp_path / "dcp"), "gpt")
    step, state = resumed(repository, report)
    assert step == 5
    check_goes_on_as(original, state)


def test_safetensors_become_the_model(repository: Repository, tmp_path: Path) -> None:
    original = train(made(1))
    save_file(original["model"].state_dict(), tmp_path / "model.safetensors")
    report = bring_in(repository, str(tmp_path / "model.safetensors"), "gpt", step=8)
    assert report.parts == {"model": "module"}
    step, state = resumed(repository, report)
    assert step == 8 and weights(state) == weights(original)


def test_prefixes_of_wrappers_are_removed(repository: Repository, tmp_path: Path) -> None:
    original = train(made(1))
    wrapped = {f"module._orig_mod.{name}": each for name, each in original["model"].state_dict().items()}
    torch.save({"model": wrapped, "optimizer": original["optimizer"].state_dict()}, tmp_path / "x.pt")
    report = bring_in(repository, str(tmp_path / "x.pt"), "gpt")
    assert any("module." in note for note in report.notes)
    _, state = resumed(repository, report)
    assert weights(state) == weights(original)


def test_other_places_are_told_by_map(repository: Repository, tmp_path: Path) -> None:
    original = train(made(1))
    content = {
        "net": {"weights": original["model"].state_dict()},
        "opt": original["optimizer"].state_dict(),
        "seen": [1],
    }
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(Refused, match="it has net, opt, seen"):
        bring_in(repository, str(tmp_path / "x.pt"), "gpt")
    with pytest.raises(NotFound, match=r"no net\.wrong"):
        bring_in(repository, str(tmp_path / "x.pt"), "gpt", places=["model=net.wrong"])
    with pytest.raises(InvalidInput, match="not of the form"):
        bring_in(repository, str(tmp_path / "x.pt"), "gpt", places=["model"])
    places = ["model=net.weights", "optimizer=opt", "data:value=seen"]
    report = bring_in(repository, str(tmp_path / "x.pt"), "gpt", places=places)
    assert report.parts == {"model": "module", "optimizer": "optimizer", "data": "value"}
    _, state = resumed(repository, report, ["model", "optimizer"])
    assert weights(state) == weights(original)


# -- names of parameters ---------------------------------------------------------------------------------


def test_groups_need_names_and_those_of_torch_are_used(repository: Repository, tmp_path: Path) -> None:
    original = made(1)
    parameters = dict(original["model"].named_parameters())
    decayed = {name: each for name, each in parameters.items() if name.endswith("weight")}
    others = {name: each for name, each in parameters.items() if name not in decayed}

    def groups(*, named: bool) -> list[dict[str, Any]]:
        return [{"params": list(each.items() if named else each.values())} for each in (decayed, others)]

    for named in (False, True):
        original["optimizer"] = torch.optim.AdamW(groups(named=named), lr=0.01)
        original["scheduler"] = torch.optim.lr_scheduler.StepLR(original["optimizer"], 2)
        train(original)
        content = {"model": original["model"].state_dict(), "optimizer": original["optimizer"].state_dict()}
        torch.save(content, tmp_path / "x.pt")
        if not named:
            with pytest.raises(Refused, match="2 groups") as raised:
                bring_in(repository, str(tmp_path / "x.pt"), "gpt")
            assert "named_parameters" in raised.value.hint
    report = bring_in(repository, str(tmp_path / "x.pt"), "gpt")
    state = made(99)
    mine = dict(state["model"].named_parameters())
    state["optimizer"] = torch.optim.AdamW([{"params": [mine[n] for n in each]} for each in (others, decayed)], lr=0.01)
    with Run(repository.store.url, name="gpt", state={key: state[key] for key in report.parts}) as run:
        run.resume()
    for name, parameter in original["model"].named_parameters():
        one, other = original["optimizer"].state[parameter], state["optimizer"].state[mine[name]]
        assert torch.equal(one["exp_avg"], other["exp_avg"]), name


def test_an_order_that_does_not_fit_the_model_is_refused(repository: Repository, tmp_path: Path) -> None:
    original = made(1)
    for parameters, match in (
        (list(original["model"].parameters())[::-1], "their order is another"),
        (list(original["model"].parameters())[:4], "4 parameters without names, and the model has 6"),
    ):
        original["optimizer"] = torch.optim.AdamW(parameters, lr=0.01)
        original["scheduler"] = torch.optim.lr_scheduler.StepLR(original["optimizer"], 2)
        train(original)
        content = {"model": original["model"].state_dict(), "optimizer": original["optimizer"].state_dict()}
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(Refused, match=match):
            bring_in(repository, str(tmp_path / "x.pt"), "gpt")
    torch.save({"optimizer": original["optimizer"].state_dict()}, tmp_path / "x.pt")
    with pytest.raises(Refused, match="there is no model beside it"):
        bring_in(repository, str(tmp_path / "x.pt"), "gpt")
    assert repository.snapshots() == [], "nothing was stored"


# -- what is refused -------------------------------------------------------------------------------------


def test_what_needs_a_pickle_to_run_is_refused_by_its_name(repository: Repository, tmp_path: Path) -> None:
    trace = tmp_path / "executed"

    class Harmful:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return os.system, (f"touch {trace}",)

    torch.save({"model": made(1)["model"].state_dict(), "more": Harmful()}, tmp_path / "bad.pt")
    with pytest.raises(Refused, match=r"it holds a (posix|os)\.system"):
        bring_in(repository, str(tmp_path / "bad.pt"), "gpt")
    torch.save(made(1)["model"], tmp_path / "whole.pt")
    with pytest.raises(Refused, match=r"torch\.nn\.modules"):
        bring_in(repository, str(tmp_path / "whole.pt"), "gpt")
    assert not trace.exists()


def test_a_damaged_file_is_refused_and_never_stored(repository: Repository, tmp_path: Path) -> None:
    content = {"model": made(1)["model"].state_dict()}
    torch.save(content, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    at = data.index(content["model"]["0.weight"].numpy().tobytes())
    for damaged in (data[: at + 200], data[:at] + b"\xff" + data[at + 1 :]):
        (tmp_path / "x.pt").write_bytes(damaged)
        with pytest.raises(Corrupt) as raised:
            bring_in(repository, str(tmp_path / "x.pt"), "gpt")
        assert "outlast salvage" in raised.value.hint
    save_file(content["model"], tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-4])
    with pytest.raises(Corrupt):
        bring_in(repository, str(tmp_path / "x.safetensors"), "gpt")
    assert repository.snapshots() == []


def test_the_command_says_what_a_run_resumes_with(repository: Repository, tmp_path: Path) -> None:
    original = train(made(1))
    content = {"model": original["model"].state_dict(), "optimizer": original["optimizer"].state_dict(), "step": 9}
    torch.save(content, tmp_path / "x.pt")
    command = [sys.executable, "-m", "outlast", "--repo", repository.store.url, "import", str(tmp_path / "x.pt")]
    ran = subprocess.run([*command, "--run", "gpt", "--json"], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert (document["step"], document["parts"]) == (9, {"model": "module", "optimizer": "optimizer"})
    told = subprocess.run([*command, "--run", "other"], capture_output=True, text=True, timeout=120)
    assert "model (module), optimizer (optimizer)" in told.stdout
    (tmp_path / "x.pt").write_bytes(b"no checkpoint")
    told = subprocess.run([*command, "--run", "other"], capture_output=True, text=True, timeout=120)
    assert told.returncode in (20, 21) and "Traceback" not in told.stderr
