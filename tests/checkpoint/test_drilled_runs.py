"""`outlast drill` of a training run: its checkpoint is whole by its own account, and training goes on from it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from commands import Ran, outlast, program
from safetensors.torch import load_file, save_file

from outlast.checkpoint import validate
from outlast.checkpoint.run import Run
from outlast.repo.repository import Repository
from outlast.store.layers import open_store


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository of a training that saved at its steps 4, 8 and 12."""
    repository = tmp_path_factory.mktemp("drill") / "runs"
    program(repository, "provable.py", str(repository), "12")
    return repository


def training(place: Path, steps: int = 40) -> str:
    return shlex.join([sys.executable, "provable.py", str(place), str(steps)])


def drilled(repository: Path, code: int, *arguments: str, **environment: str) -> Ran:
    return outlast(repository, "drill", "--run", "gpt", *arguments, "--json", code=code, **environment)


# -- training goes on --------------------------------------------------------------------------------


def test_a_run_trains_on_from_what_was_restored_and_saves_nothing(trained: Path, tmp_path: Path) -> None:
    """Its own repository is not needed: this one may be all that is left."""
    nowhere = tmp_path / "gone"
    before = outlast(trained, "snapshots", "--json").json
    found = drilled(trained, 0, "--resume", training(nowhere)).json
    assert (found["level"], found["asked"]) == (5, 5)
    last = found["levels"][5]
    assert (last["reached"], last["looked"]["tensors"]) == (True, 26)
    assert found["rto_seconds"] >= last["seconds"] > 0
    assert not nowhere.exists()
    assert outlast(trained, "snapshots", "--json").json == before


def test_an_earlier_checkpoint_is_drilled_by_its_step(trained: Path) -> None:
    found = outlast(trained, "drill", "gpt@4", "--resume", training(trained), "--json").json
    assert found["level"] == 5


@pytest.mark.parametrize(
    ("changed", "steps", "problem"),
    [
        ("forgotten", 40, "value of counter, right after it was loaded: was 12, is 13"),
        ("dies", 40, "ValueError: as it was told to"),
        ("name", 40, "the command resumed the run other, not gpt"),
        ("", 14, "the command ended with 0 before it had trained 5 steps, from step 12 to 17"),
    ],
)
def test_what_keeps_a_run_from_going_on_is_named(trained: Path, changed: str, steps: int, problem: str) -> None:
    found = drilled(trained, 1, "--resume", training(trained, steps), CHANGED=changed).json
    assert (found["level"], found["levels"][2]["reached"], found["levels"][5]["reached"]) == (2, True, False)
    assert problem in found["problem"]


def test_weights_that_training_turns_into_no_numbers_are_found(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, torch, outlast\n"
        "torch.manual_seed(0)\n"
        "model = torch.nn.Linear(4, 1)\n"
        "state = {'model': model, 'optimizer': torch.optim.SGD(model.parameters(), lr=float(sys.argv[2]))}\n"
        "with outlast.Run(sys.argv[1], name='gpt', state=state, save_every=2) as run:\n"
        "    for step in range(run.resume(), int(sys.argv[3])):\n"
        "        run.begin_step()\n"
        "        state['optimizer'].param_groups[0]['lr'] = float(sys.argv[2])\n"
        "        model(torch.ones(8, 4)).square().mean().backward()\n"
        "        state['optimizer'].step()\n"
        "        state['optimizer'].zero_grad()\n"
        "        run.step()\n"
    )
    runs = tmp_path / "runs"
    program(runs, str(script), str(runs), "0.001", "2")
    command = f"{sys.executable} {script} {runs}"
    assert drilled(runs, 0, "--resume", f"{command} 0.001 20").json["level"] == 5
    problem = drilled(runs, 1, "--resume", f"{command} 1e38 20").json["problem"]
    assert "weight of model: after 5 steps 4 of 4 elements are not finite" in problem


def test_a_command_without_a_run_is_taken_at_its_word(trained: Path) -> None:
    script = "import os, safetensors.torch as s; s.load_file(os.environ['OUTLAST_RESTORED'] + '/model.safetensors')"
    last = drilled(trained, 0, "--resume", shlex.join([sys.executable, "-c", script])).json["levels"][5]
    assert last["looked"]["notes"] == ["no Run was resumed in the command: that it ended with 0 is all that is known"]


GOLDEN = """
import os, sys, torch
from cases import mlp
from safetensors.torch import load_file
model = mlp().eval()
model.load_state_dict(load_file(os.environ["OUTLAST_RESTORED"] + "/model.safetensors"))
sys.exit(0 if model(torch.ones(1, 16)).isfinite().all() else 1)
"""


def test_weights_of_a_checkpoint_load_into_the_model_for_golden_outputs(trained: Path) -> None:
    command = shlex.join([sys.executable, "-c", GOLDEN])
    assert drilled(trained, 0, "--golden", command).json["level"] == 3


@pytest.mark.slow
def test_several_ranks_go_on_together(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "provable.py", str(runs)]
    program(runs, *several, "8")
    command = shlex.join([sys.executable, *several, "40"])
    found = drilled(runs, 0, "--resume", command).json
    assert (found["level"], found["levels"][5]["looked"]["tensors"]) == (5, 2 * 26)


# -- a checkpoint agrees with itself -----------------------------------------------------------------


def saved(folder: Path) -> tuple[Path, Any]:
    """A restored checkpoint, and its snapshot."""
    model = torch.nn.Linear(3, 2)
    state = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    with Run(folder / "runs", name="gpt", state=state, save_every=100) as run:
        model(torch.ones(1, 3)).sum().backward()
        state["optimizer"].step()
        run.step()
        run.save().wait()
    outlast(folder / "runs", "restore", "gpt", "--to", str(folder / "there"))
    return folder / "there", Repository.open(open_store(str(folder / "runs"))).snapshots()[-1]


def lose_a_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def forget_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["bias"]
    save_file(tensors, folder / "model.safetensors")


def change(text: str, other: str) -> Callable[[Path], None]:
    def changing(folder: Path) -> None:
        path = folder / "state.json"
        assert text in path.read_text()
        path.write_text(path.read_text().replace(text, other))

    return changing


def lose_a_rank(folder: Path) -> None:
    path = folder / "state.json"
    state = msgspec.json.decode(path.read_bytes())
    state["facts"]["parallel"]["ranks"] = 2
    path.write_bytes(msgspec.json.encode(state))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file is gone": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "names weight of model, and no file has it",
    ),
    "a tensor is gone": (forget_a_tensor, "names bias of model, and no file has it"),
    "another step": (change('"step":1', '"step":2'), "is of step 2, and the checkpoint of step 1"),
    "no such kind": (change('"$":"tensor"', '"$":"code"'), "is of a kind 'code' that there is not"),
    "a rank is gone": (lose_a_rank, "2 ranks saved the checkpoint, and there is what 1 saved: "),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_checkpoint_that_contradicts_itself_is_named(tmp_path: Path, what: str) -> None:
    folder, snapshot = saved(tmp_path)
    sound = validate.structure(os.fsencode(folder), snapshot)
    assert (sound.looked.problems, sound.ranks) == ([], 1)
    spoil, problem = BROKEN[what]
    spoil(folder)
    found = validate.structure(os.fsencode(folder), snapshot).looked.problems
    assert problem in "\n".join(found)


def test_kept_gradients_may_overflow_and_weights_may_not(tmp_path: Path) -> None:
    folder, snapshot = saved(tmp_path)
    save_file({"grad.weight": torch.tensor([1.0, float("inf")])}, folder / "model.more.safetensors")
    found = validate.values(validate.structure(os.fsencode(folder), snapshot))
    assert (found.problems, len(found.notes)) == ([], 1)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "bias": torch.tensor([1.0, float("nan")])}, folder / "model.safetensors")
    found = validate.values(validate.structure(os.fsencode(folder), snapshot))
    assert found.problems == ["model.safetensors: bias: of 2 elements 1 are NaN"]
