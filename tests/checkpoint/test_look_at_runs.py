"""The commands that look at training runs: runs, show and diff of checkpoints."""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import outlast, program
from torch.utils.data import DataLoader, TensorDataset

from outlast.checkpoint.references import find, run_name
from outlast.checkpoint.run import Run
from outlast.errors import InvalidInput
from outlast.repo.repository import Repository
from outlast.store.layers import open_store


def state() -> dict[str, Any]:
    """A model with a frozen layer and one in bfloat16."""
    torch.manual_seed(1)
    model = torch.nn.ModuleDict(
        {
            "frozen": torch.nn.Linear(64, 64),
            "trained": torch.nn.Linear(64, 64),
            "short": torch.nn.Linear(32, 32, dtype=torch.bfloat16),
        }
    )
    model["frozen"].requires_grad_(False)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.5)
    loader = DataLoader(TensorDataset(torch.arange(10)), batch_size=2)
    return {"model": model, "optimizer": optimizer, "loader": loader}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run `gpt` that saved at steps 1, 2 and 3, one `fine-tune` with one step, and a backup."""
    folder = tmp_path_factory.mktemp("look")
    repository = folder / "runs"
    parts = state()
    model, optimizer = parts["model"], parts["optimizer"]
    run = Run(str(repository), name="gpt", state=parts, save_every=10**9, keep=9)
    run.resume()
    for step, loss in enumerate((2.5, 1.25, math.nan), 1):
        list(zip(run.steps(parts["loader"], until=step), (1,), strict=False))
        run.step()
        with torch.no_grad():
            if step == 2:
                model["trained"].weight[0] += 0.25  # 64 elements
                model["short"].bias += 1
                model["trained"].bias[3] = math.inf
                optimizer.param_groups[0]["lr"] = 0.125
        run.save({"loss": loss, "speed": 10 * step}).wait()
    run.close()
    other = {"model": torch.nn.ModuleDict({"frozen": torch.nn.Linear(64, 32), "new": torch.nn.Linear(2, 2)})}
    with Run(str(repository), name="fine-tune", state=other, save_every=10**9) as run:
        run.step()
        run.save()
    for _ in range(2):  # two lives that saved nothing
        again = Run(str(repository), name="gpt", state=state(), save_every=10**9)
        assert again.resume() == 3
        again.begin_step()
        again.close()
    (folder / "file").write_text("x")
    outlast(repository, "backup", str(folder / "file"), "--name", "gpt-files")
    return repository


def test_runs_are_listed_with_what_the_log_knows(trained: Path) -> None:
    listed = outlast(trained, "runs", "--json").json
    assert [each["name"] for each in listed] == ["gpt", "fine-tune"]
    gpt, other = listed
    assert (gpt["checkpoints"], gpt["first_step"], gpt["last_step"], gpt["retries"]) == (3, 1, 3, 2)
    assert (other["checkpoints"], other["last_step"], other["retries"], other["metrics"]) == (1, 1, 0, {})
    assert gpt["metrics"]["loss"] == {
        "last": None, "lowest": 1.25, "lowest_step": 2, "highest": 2.5, "highest_step": 1,
    }  # fmt: skip
    assert gpt["metrics"]["speed"]["last"] == 30
    assert gpt["age_seconds"] > 0
    assert 0 < gpt["bytes"] < gpt["bytes_stored"]
    told = outlast(trained, "runs").out.splitlines()
    assert told[0].split()[:2] == ["RUN", "STEP"]
    assert told[0].split()[-2:] == ["RETRIES", "METRICS"]
    assert "loss no number (1.25 to 2.5)" in told[1]
    assert len(told) == 3


def test_a_repository_without_runs_has_none(tmp_path: Path) -> None:
    outlast(tmp_path / "empty", "init")
    assert outlast(tmp_path / "empty", "runs").out == "No runs.\n"
    assert outlast(tmp_path / "empty", "runs", "--json").json == []


def test_a_checkpoint_tells_what_was_captured_and_what_not(trained: Path) -> None:
    shown = outlast(trained, "show", "gpt@2", "--json").json
    assert (shown["kind"], shown["name"], shown["step"]) == ("checkpoint", "gpt", 2)
    [rank] = shown["ranks"]
    parts = {each["key"]: each for each in rank["parts"]}
    assert list(parts) == ["model", "optimizer", "loader", "rng"]
    assert (parts["model"]["kind"], parts["model"]["tensors"]) == ("module", 6)
    assert sorted(parts["model"]["dtypes"]) == ["BF16", "F32"]
    assert parts["model"]["bytes"] == 2 * 4 * (64 * 64 + 64) + 2 * (32 * 32 + 32)
    captured = {each["what"]: each["how"] for each in shown["captured"]}
    assert captured["data position"] == "loader: epoch 0, 8 of 10 consumed"
    assert captured["learning rate"] == "optimizer: 0.125 for 4 parameters"
    assert captured["random numbers"].startswith("python, numpy, torch")
    facts = shown["facts"]
    assert facts["environment"]["torch"] == torch.__version__
    assert facts["parallel"]["ranks"] == 1
    assert facts["origin"]["command"][0] == sys.executable
    assert shown["metrics"] == {"loss": 1.25, "speed": 20}

    told = outlast(trained, "show", "gpt@2").out
    assert "gpt, step 2" in told
    assert "epoch 0, 8 of 10 consumed" in told
    identifier = shown["id"][:8]
    assert outlast(trained, "show", identifier).out == told
    assert "model.safetensors" in outlast(trained, "show", identifier, ".").out
    none = outlast(trained, "show", "fine-tune", "--json").json
    assert {each["what"] for each in none["not_captured"]} >= {"data position", "optimizer"}


def test_a_checkpoint_is_found_by_run_step_and_id(trained: Path) -> None:
    latest = outlast(trained, "show", "gpt", "--json").json
    assert (latest["step"], latest["metrics"]["loss"]) == (3, None)
    assert outlast(trained, "show", latest["id"][:6], "--json").json["step"] == 3
    assert "it has those of 1, 2, 3." in outlast(trained, "show", "gpt@7", code=1).err
    assert "no run and no snapshot is called 'feedbeef'" in outlast(trained, "show", "feedbeef", code=1).err
    assert outlast(trained, "show", "latest", "--name", "gpt-files", "--json").json["file_count"] == 1


def test_the_best_checkpoint_is_found_by_any_metric(trained: Path) -> None:
    for reference, step in (("gpt@loss:min", 2), ("gpt@loss:max", 1), ("gpt@speed:max", 3), ("gpt@speed:min", 1)):
        assert outlast(trained, "show", reference, "--json").json["step"] == step, reference
    assert outlast(trained, "diff", "gpt@loss:max", "gpt@loss:min", "--json").json["step_after"] == 2
    told = outlast(trained, "show", "gpt@best", code=2).err
    assert "which metric a run keeps its best by is not stored" in told
    assert "gpt@loss:min" in told
    told = outlast(trained, "show", "gpt@los:min", code=1).err
    assert "no checkpoint of run gpt has a number for the metric los; there are: loss, speed." in told
    outlast(trained, "show", "gpt@loss", code=2)


def test_the_best_is_the_one_that_a_run_keeps(tmp_path: Path) -> None:
    """One of several equals too; and a metric may have an "@" in its name."""
    place = str(tmp_path / "runs")
    with Run(place, name="x", state=state(), save_every=10**9, keep=1, best="recall@5:max") as run:
        run.resume()
        for value in (0.25, 0.5, 0.5, math.nan, 0.125):
            run.step()
            run.save({"recall@5": value}).wait()
        kept = [step for step, _ in run.checkpoints()]
    repository = Repository.open(open_store(place))
    assert kept == [3, 5]
    assert find(repository, "x@recall@5:max").tags["step"] == "3"


@pytest.mark.parametrize(
    "reference, meant",
    [("gtp", "gpt"), ("GPT@2", "gpt@2"), ("fine", "fine-tune"), ("fine_tune@loss:min", "fine-tune@loss:min")],
)
def test_a_name_that_is_almost_right_is_answered_with_the_right_one(trained: Path, reference: str, meant: str) -> None:
    told = outlast(trained, "show", reference, code=1).err
    assert "there are runs: fine-tune, gpt." in told
    assert f"Is it {meant}? `outlast runs` lists the runs" in told


def test_without_anything_like_it_the_lists_are_named(trained: Path) -> None:
    told = outlast(trained, "export", "zzzz", "--format", "torch", "--to", "never", code=1).err
    assert "Is it" not in told
    assert "`outlast runs` lists the runs, `outlast snapshots` every snapshot." in told


def test_with_a_damaged_log_nothing_is_the_latest_or_the_best(trained: Path, tmp_path: Path) -> None:
    place = tmp_path / "runs"
    shutil.copytree(trained, place)
    entry = max((place / "log").iterdir())
    entry.chmod(0o600)
    entry.write_bytes(entry.read_bytes()[:-9])
    for reference in ("gpt", "gpt@loss:min"):
        assert f"`{reference}` can't be told" in outlast(place, "show", reference, code=20).err
        to = str(tmp_path / "never")
        assert "can't be told" in outlast(place, "export", reference, "--format", "dcp", "--to", to, code=20).err
    assert outlast(place, "show", "gpt@2", "--json").json["step"] == 2


def test_one_checkpoint_is_forgotten_by_its_step_or_metric_and_a_run_never_by_its_name(tmp_path: Path) -> None:
    place = tmp_path / "runs"
    with Run(str(place), name="gpt", state=state(), save_every=10**9, keep=9) as run:
        run.resume()
        for loss in (3.0, 5.0, 1.0, 2.0):
            run.step()
            run.save({"loss": loss}).wait()

    def steps() -> list[str]:
        return [each["tags"]["step"] for each in outlast(place, "snapshots", "--json").json]

    told = outlast(place, "forget", "gpt", code=2).err
    assert "gpt is a run" in told
    assert "gpt@4" in told
    assert outlast(place, "forget", "gpt@loss:max", "--dry-run", "--json").json["forgotten"] != []
    assert steps() == ["1", "2", "3", "4"]
    outlast(place, "forget", "gpt@loss:max", "gpt@1")
    assert steps() == ["3", "4"]
    assert "has no checkpoint of step 1" in outlast(place, "forget", "gpt@3", "gpt@1", code=1).err
    assert steps() == ["3", "4"]


def test_what_means_something_else_is_no_name_of_a_run(trained: Path) -> None:
    for name in ("latest", "LATEST", "a@b", "gpt@3", "-x", "", " ", "a\nb", None):
        with pytest.raises(InvalidInput, match="can't be the name of a run"):
            run_name(name)
    for name in ("gpt", "gpt-2", "the latest", "org/gpt", "20261122", "ü"):
        assert run_name(name) == name
    before = outlast(trained, "snapshots", "--json").json
    told = outlast(trained, "import", "nothing.pt", "--run", "gpt@3", code=2).err
    assert "'gpt@3' can't be the name of a run: \"@\" stands between the name of a run and a step" in told
    assert outlast(trained, "snapshots", "--json").json == before


def test_a_difference_is_told_by_tensor_with_its_norm(trained: Path) -> None:
    found = outlast(trained, "diff", "gpt@1", "gpt@2", "--json").json
    assert (found["step_before"], found["step_after"]) == (1, 2)
    changed = {each["name"]: each for each in found["changed"] if each["key"] == "model"}
    assert changed.keys() == {"trained.weight", "trained.bias", "short.bias"}
    weight = changed["trained.weight"]
    assert (weight["elements"], weight["elements_changed"]) == (64 * 64, 64)
    assert weight["norm_of_change"] == pytest.approx(0.25 * 8)
    assert weight["largest"] == pytest.approx(0.25)
    before = state()["model"]["trained"].weight
    assert weight["norm_before"] == pytest.approx(before.double().norm().item())
    assert weight["relative"] == pytest.approx(2 / before.double().norm().item())
    half = changed["short.bias"]
    assert (half["dtype"], half["elements_changed"]) == ("BF16", 32)
    assert half["largest"] == pytest.approx(1, abs=0.01)
    assert (changed["trained.bias"]["not_finite"], changed["trained.bias"]["elements_changed"]) == (1, 1)
    values = {f"{each['key']}.{each['path']}": (each["before"], each["after"]) for each in found["values"]}
    assert values["optimizer.param_groups[0].lr"] == ("0.5", "0.125")
    assert values["loader.consumed"] == ("4", "8")
    assert not found["environment"]
    told = outlast(trained, "diff", "gpt@1", "gpt@2").out
    assert "~ model: trained.weight" in told
    assert "optimizer.param_groups[0].lr: 0.5 -> 0.125" in told
    assert "frozen" not in told


def test_two_models_differ_by_names_and_shapes(trained: Path) -> None:
    found = outlast(trained, "diff", "gpt", "fine-tune", "--json").json
    [added] = [each for each in found["added"] if each["name"] == "new.weight"]
    assert (added["key"], added["dtype"], added["shape"]) == ("model", "F32", [2, 2])
    assert "trained.weight" in {each["name"] for each in found["removed"]}
    reshaped = {each["name"]: (each["shape_before"], each["shape"]) for each in found["reshaped"]}
    assert reshaped == {"frozen.weight": ([64, 64], [32, 64]), "frozen.bias": ([64], [32])}
    assert ("optimizer", "optimizer", None) in {
        (each["key"], each["before"], each["after"]) for each in found["values"]
    }
    outlast(trained, "diff", "gpt", "fine-tune")


def test_a_checkpoint_and_a_backup_are_compared_by_files(trained: Path) -> None:
    backup = outlast(trained, "show", "latest", "--name", "gpt-files", "--json").json["id"]
    found = outlast(trained, "diff", "gpt", backup, "--json").json
    assert {each["path"] for each in found["files"]["added"]} == {"file"}
    assert "state.json" in {each["path"] for each in found["files"]["removed"]}


def test_looking_needs_no_torch(trained: Path) -> None:
    script = (
        "import sys\nfrom outlast.cli.main import main\n"
        "for line in (['runs'], ['show', 'gpt'], ['diff', 'gpt@1', 'gpt@2']):\n    assert main(line) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    program(trained, "-c", script)
