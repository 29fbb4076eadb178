"""An exported checkpoint, read by the real tools, is bit for bit what the run had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn

from outlast.backup.create import create
from outlast.checkpoint.export import export, export_found
from outlast.checkpoint.references import find
from outlast.checkpoint.run import Run
from outlast.errors import Corrupt, InvalidInput, NotFound, Refused
from outlast.events import ListSink
from outlast.records import Snapshot
from outlast.repo import forget, prune
from outlast.repo.prune_plan import Policy
from outlast.repo.repository import Repository
from outlast.store.layers import open_store

State = dict[str, Any]


def made() -> State:
    first = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    model = nn.Sequential(*first, nn.Linear(3, 3).bfloat16())
    model[0].to(memory_format=torch.channels_last)
    model.register_parameter("tied", model[3].weight)
    model.register_buffer("eight", torch.randn(4).to(torch.float8_e4m3fn))
    model.register_buffer("truth", torch.tensor([True, False]))
    last = [*model[3].parameters(), *model[4].parameters()]
    groups = [{"params": last, "lr": 0.1}, {"params": model[0].parameters()}, {"params": model[1].parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2),
        "scaler": torch.amp.GradScaler("cpu"),
        "more": {"seen": {3, 4}, "phase": torch.randn(2, dtype=torch.complex64), "big": 1 << 80},
    }


def train(state: State, steps: int = 3) -> None:
    for _ in range(steps):
        state["optimizer"].zero_grad()
        inner = state["model"][:4](torch.randn(8, 1, 4, 4))
        state["model"][4](inner.bfloat16()).float().square().sum().backward()
        state["optimizer"].step()
        state["scheduler"].step()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Repository, Snapshot, State]:
    torch.manual_seed(1)
    state = made()
    with Run(str(tmp_path / "runs"), name="gpt", state=state, save_every=10**9) as run:
        for _ in range(2):
            train(state)
            run.step(loss=1.0)
            run.save({"loss": 1.0}).wait()
    repository = Repository.open(open_store(str(tmp_path / "runs")))
    return repository, find(repository, "gpt"), state


def check_same(one: Any, other: Any, path: str = "") -> None:
    assert type(one) is type(other), (path, type(one), type(other))
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape, path
        raw = [each.detach().contiguous().reshape(-1).view(torch.uint8) for each in (one, other)]
        assert torch.equal(*raw), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            check_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for at, (left, right) in enumerate(zip(one, other, strict=True)):
            check_same(left, right, f"{path}.{at}")
    else:
        assert one == other, path


def test_a_plain_script_goes_on_from_the_torch_file(saved: tuple[Repository, Snapshot, State], tmp_path: Path) -> None:
    repository, snapshot, state = saved
    path = str(tmp_path / "gpt.pt")
    report = export(repository, snapshot, "torch", path)
    loaded = torch.load(path, weights_only=True)
    assert loaded["step"] == report.step == 2
    check_same(dict(loaded["model"]), dict(state["model"].state_dict()))
    for key in ("optimizer", "scheduler", "scaler"):
        check_same(loaded[key], state[key].state_dict(), key)
    check_same(loaded["more"], state["more"])
    assert loaded["model"]["tied"].data_ptr() == loaded["model"]["3.weight"].data_ptr(), "tied, and stored once"
    names = loaded["outlast"]["param_names"]["optimizer"]
    assert names[:3] == ["tied", "3.bias", "4.weight"] or names[:3] == ["3.weight", "3.bias", "4.weight"]

    torch.manual_seed(77)
    other = made()
    for key in ("model", "optimizer", "scheduler", "scaler"):
        other[key].load_state_dict(loaded[key])
    for each in (state, other):
        torch.manual_seed(5)
        train(each)
    check_same(dict(other["model"].state_dict()), dict(state["model"].state_dict()))


def test_safetensors_are_the_files_as_they_were_stored(
    saved: tuple[Repository, Snapshot, State], tmp_path: Path
) -> None:
    repository, snapshot, state = saved
    folder = tmp_path / "out"
    report = export(repository, snapshot, "safetensors", str(folder))
    assert "state.json" in os.listdir(folder) and report.files == len(os.listdir(folder))
    assert json.loads((folder / "state.json").read_bytes())["step"] == 2
    model = load_file(folder / "model.safetensors")
    for name, tensor in state["model"].state_dict().items():
        if name in model:  # one of two tied names
            check_same(model[name], tensor.contiguous(), name)
    assert len(model) == len(state["model"].state_dict()) - 1


def test_hdf5_has_every_tensor_and_every_value(saved: tuple[Repository, Snapshot, State], tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    repository, snapshot, state = saved
    export(repository, snapshot, "hdf5", str(tmp_path / "gpt.h5"))
    with h5py.File(tmp_path / "gpt.h5") as file:
        assert (file.attrs["run"], file.attrs["step"], file.attrs["snapshot"]) == ("gpt", 2, snapshot.id)
        for name in ("0.weight", "1.running_mean", "1.num_batches_tracked", "3.bias", "truth"):
            whole = state["model"].state_dict()[name].contiguous()
            check_same(torch.from_numpy(np.asarray(file["model"][name])).reshape(whole.shape), whole, name)
        narrow = file["model"]["4.weight"]
        assert narrow.dtype == "uint16" and narrow.attrs["dtype"] == "bfloat16"
        check_same(torch.from_numpy(narrow[()]).view(torch.bfloat16), state["model"][4].weight.data)
        eight = file["model"]["eight"]
        assert eight.attrs["dtype"] == "float8_e4m3fn"
        check_same(torch.from_numpy(eight[()]).view(torch.float8_e4m3fn), state["model"].eight)
        moments = state["optimizer"].state[state["model"][3].bias]
        check_same(torch.from_numpy(file["optimizer"]["state.3.bias.exp_avg"][()]), moments["exp_avg"])
        assert json.loads(bytes(file["state.json"][()]))["step"] == 2


def test_without_h5py_the_error_names_what_to_install(
    saved: tuple[Repository, Snapshot, State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(InvalidInput) as raised:
        export(*saved[:2], "hdf5", str(tmp_path / "gpt.h5"))
    assert "outlast[hdf5]" in raised.value.hint
    assert not (tmp_path / "gpt.h5").exists()


def test_stock_dcp_reads_the_folder(saved: tuple[Repository, Snapshot, State], tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    repository, snapshot, state = saved
    folder = str(tmp_path / "dcp")
    export(repository, snapshot, "dcp", folder)
    wanted = {"model": {name: torch.zeros_like(each) for name, each in state["model"].state_dict().items()}, "step": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(wanted, checkpoint_id=folder, no_dist=True)
    assert wanted["step"] == 2
    check_same(wanted["model"], dict(state["model"].state_dict()))
    dcp_to_torch_save(folder, str(tmp_path / "whole.pt"))
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    torch.manual_seed(9)
    other = made()
    for each in (state, other):  # torch's own helper knows no tied names
        del each["model"]._parameters["tied"]
    whole["model"].pop("tied")
    text = json.dumps(sorted(whole["optimizer"]["state"])).replace("tied", "3.weight")
    assert sorted(json.loads(text)) == sorted(get_state_dict(state["model"], state["optimizer"])[1]["state"])
    if "tied" not in whole["optimizer"]["state"]:
        set_state_dict(
            other["model"],
            other["optimizer"],
            model_state_dict=whole["model"],
            optim_state_dict=whole["optimizer"],
        )
        check_same(other["optimizer"].state_dict()["state"], state["optimizer"].state_dict()["state"])


def test_checkpoints_are_named_by_run_step_or_id(saved: tuple[Repository, Snapshot, State]) -> None:
    repository, snapshot, _ = saved
    assert snapshot.tags["step"] == "2"
    first = find(repository, "gpt@1")
    assert first.tags["step"] == "1" and find(repository, first.id[:8]).id == first.id
    with pytest.raises(NotFound, match=r"of step 7; it has those of 1, 2"):
        find(repository, "gpt@7")
    with pytest.raises(NotFound, match="there are runs: gpt"):
        find(repository, "other")


def forget_and_prune(place: Path, *references: str) -> set[str]:
    """As the run itself does while it goes on, and thoroughly; the packs that are gone."""
    other = Repository.open(open_store(str(place)))
    before = set(other.state.packs)
    forget.execute(other, forget.plan(other, ids=[find(other, each).id for each in references]))
    prune.prune(other, Policy(max_unused=0.0, max_delete=1.0, grace_seconds=0.0))
    return before - set(other.state.packs)


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("form", ["safetensors", "torch", "dcp"])
def test_what_a_prune_has_moved_meanwhile_is_found_without_a_word(
    saved: tuple[Repository, Snapshot, State], tmp_path: Path, form: str, indexed: bool
) -> None:
    told = ListSink()
    seen = Repository.open(open_store(str(tmp_path / "runs")), sink=told)
    if indexed:
        seen.load_index()
    packs = set(seen.state.packs)
    gone = forget_and_prune(tmp_path / "runs", "gpt@1")
    assert gone and gone <= packs, "packs were expected to be written anew"
    report = export_found(seen, lambda: find(seen, "gpt@2"), form, str(tmp_path / "out"))
    assert (report.step, told.events) == (2, [])
    export(Repository.open(open_store(str(tmp_path / "runs"))), saved[1], form, str(tmp_path / "again"))
    assert (tmp_path / "out").exists() and report.bytes > 0
    if form == "safetensors":
        names = os.listdir(tmp_path / "again")
        assert {name: (tmp_path / "out" / name).read_bytes() for name in names} == {
            name: (tmp_path / "again" / name).read_bytes() for name in names
        }


def test_the_latest_that_a_run_has_dropped_meanwhile_is_the_one_after(
    saved: tuple[Repository, Snapshot, State], tmp_path: Path
) -> None:
    place, state = tmp_path / "runs", saved[2]
    seen, exact = (Repository.open(open_store(str(place)), sink=ListSink()) for _ in range(2))
    with Run(str(place), name="gpt", state=state, save_every=10**9) as run:
        run.resume()
        train(state)
        run.step()
        run.save().wait()
    forget_and_prune(place, "gpt@1", "gpt@2")
    assert export_found(seen, lambda: find(seen, "gpt"), "torch", str(tmp_path / "new.pt")).step == 3
    with pytest.raises(NotFound, match="of gpt was removed while it was exported"):
        export_found(exact, lambda: find(exact, "gpt@2"), "torch", str(tmp_path / "old.pt"))
    assert not (tmp_path / "old.pt").exists()


def test_a_backup_is_no_checkpoint_to_export(saved: tuple[Repository, Snapshot, State], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    made = create(saved[0], [bytes(tmp_path / "file")])
    with pytest.raises(InvalidInput, match="is a backup of files"):
        export(saved[0], find(saved[0], made.snapshot), "safetensors", str(tmp_path / "out"))


def test_nothing_is_overwritten_and_nothing_half_is_left(
    saved: tuple[Repository, Snapshot, State], tmp_path: Path
) -> None:
    repository, snapshot, _ = saved
    taken = tmp_path / "taken"
    taken.mkdir()
    for form in ("safetensors", "torch", "dcp"):
        with pytest.raises(Refused, match="exists already"):
            export(repository, snapshot, form, str(taken))
    assert os.listdir(taken) == []
    for pack in (tmp_path / "runs" / "packs").rglob("*"):
        if pack.is_file():
            damaged = bytearray(pack.read_bytes())
            damaged[len(damaged) // 3] ^= 1
            pack.chmod(0o600)
            pack.write_bytes(damaged)
    fresh = Repository.open(open_store(str(tmp_path / "runs")))
    before = sorted(os.listdir(tmp_path))
    for form in ("safetensors", "torch", "dcp"):
        with pytest.raises(Corrupt):
            export(fresh, snapshot, form, str(tmp_path / "new"))
    assert sorted(os.listdir(tmp_path)) == before


def test_the_command_tells_what_it_wrote(saved: tuple[Repository, Snapshot, State], tmp_path: Path) -> None:
    def outlast(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "outlast", "--repo", str(tmp_path / "runs"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    ran = outlast("export", "gpt@1", "--format", "torch", "--to", str(tmp_path / "one.pt"), "--json")
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert (document["step"], document["format"], document["files"]) == (1, "torch", 1)
    assert torch.load(tmp_path / "one.pt", weights_only=True)["step"] == 1
    assert outlast("export", "gpt", "--format", "torch", "--to", str(tmp_path / "one.pt")).returncode == 21
    assert outlast("export", "gpt", "--format", "zip", "--to", str(tmp_path / "two")).returncode == 2
    told = outlast("export", "gpt", "--format", "safetensors", "--to", str(tmp_path / "st"))
    assert told.returncode == 0 and told.stdout.startswith("Exported step 2 of gpt")


@pytest.mark.slow
def test_what_two_ranks_sharded_is_whole_in_the_torch_file(tmp_path: Path) -> None:
    program = Path(__file__).with_name("together.py")
    ran = subprocess.run(
        [sys.executable, str(program), "2", "save-sharded", str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    first = next(json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{"))
    repository = Repository.open(open_store(str(tmp_path / "runs")))
    [name] = {each.name for each in repository.snapshots()}
    report = export(repository, find(repository, name), "torch", str(tmp_path / "whole.pt"))
    assert any("2 ranks saved it" in note for note in report.notes)
    loaded = torch.load(tmp_path / "whole.pt", weights_only=True)
    found = dict(loaded["model"])
    for number, values in loaded["optimizer"]["state"].items():
        found |= {f"{number}.{key}": each for key, each in values.items() if isinstance(each, torch.Tensor)}
    assert {key: each.double().flatten()[:50].tolist() for key, each in found.items()} == first["contents"]
    export(repository, find(repository, name), "safetensors", str(tmp_path / "all"))
    assert sorted(os.listdir(tmp_path / "all")) == ["rank-00000", "rank-00001"]
