"""`outlast doctor resume`: a training is trained once more, and what is not the same is named, the cause first."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Ran, outlast, program

from outlast.checkpoint.prove import Trail, digest
from outlast.records import Snapshot


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository of a training that saved at its steps 4, 8 and 12."""
    repository = tmp_path_factory.mktemp("doctor") / "runs"
    program(repository, "provable.py", str(repository), "12")
    return repository


def proved(repository: Path, code: int, *options: str, **environment: str) -> Ran:
    command = [sys.executable, "provable.py", str(repository), "40"]
    return outlast(repository, "doctor", "resume", "gpt", *options, "--", *command, code=code, **environment)


def test_a_training_that_goes_on_bit_for_bit_is_proven(trained: Path) -> None:
    log = outlast(trained, "repo", "log", "--json").out
    found = proved(trained, 0, "--json").json
    proof = found["proof"]
    assert (proof["verdict"], proof["first"], proof["first_batch"]) == ("proven", "", "same")
    assert (proof["findings"], proof["environment"]) == ([], [])
    assert proof["tensors"] == 6 + 3 * 6 + 2  # the model, what AdamW keeps, torch's and numpy's generators
    assert (proof["step_before"], proof["step_after"], found["step"]) == (8, 12, 12)
    assert outlast(trained, "repo", "log", "--json").out == log, "a proof was noted in the log, or saved something"


def test_a_proof_prints_what_the_command_prints_apart(trained: Path) -> None:
    told = proved(trained, 0)
    assert "Proven. From step 8 the run came to step 12 bit for bit" in told.out
    assert "step 8: " in told.err
    assert "step 8: " not in told.out
    assert "step 12: " not in told.err, "it went on after the proof"


@pytest.mark.parametrize(
    "changed, first, advice",
    [
        ("threads", "the environment: threads: was 1, is 2", "Make the environment as it was"),
        ("forgotten", "value of counter, right after it was loaded: was 8, is 9", "loses or changes it"),
        ("order", "the first batch", "the loader is not in the state"),
        ("drawn", "the random numbers of torch: ", "More or fewer random numbers"),
        ("lr", "param_groups[0].lr of optimizer: was 0.001, is 0.002", "The script sets it"),
        ("unsaved", "0.weight of model: ", "not in the state"),
    ],
)
def test_what_differs_first_is_named(trained: Path, changed: str, first: str, advice: str) -> None:
    told = proved(trained, 1, CHANGED=changed).out
    assert f"First that differs: {first}" in told
    assert advice in told


def test_how_far_apart_is_told_by_elements(trained: Path) -> None:
    proof = proved(trained, 1, "--json", CHANGED="unsaved").json["proof"]
    [weight] = [each for each in proof["findings"] if (each["key"], each["name"]) == ("model", "3.weight")]
    assert weight["elements"] == 256 * 256
    assert 0 < weight["elements_different"] <= weight["elements"]
    assert 0 < weight["largest"] < 1
    assert proof["first_batch"] == "same"
    assert {each["stage"] for each in proof["findings"]} == {"reached"}


@pytest.mark.parametrize(
    "changed, reason",
    [
        ("dies", "the command ended with 1 before it came to where step"),
        ("name", "the command resumed the run other, not gpt"),
    ],
)
def test_what_is_no_proof_is_none(trained: Path, changed: str, reason: str) -> None:
    log = outlast(trained, "repo", "log", "--json").out
    told = proved(trained, 1, CHANGED=changed)
    assert f"Can't be proven: {reason}" in told.out
    assert outlast(trained, "repo", "log", "--json").out == log, "a run that was not meant has trained"


def test_a_command_that_resumes_nothing_proves_nothing(trained: Path, tmp_path: Path) -> None:
    told = outlast(trained, "doctor", "resume", "gpt", "--", "true", code=1).out
    assert "Can't be proven: the command ended with 0, and no Run of it was resumed." in told
    assert "can't be started" in outlast(trained, "doctor", "resume", "gpt", "--", "no-such-program", code=2).err
    other = str(tmp_path / "elsewhere")
    ran = outlast(trained, "doctor", "resume", "gpt", "--", sys.executable, "provable.py", other, "9", code=1)
    assert "in another repository than --repo" in ran.out
    assert not Path(other).exists()


def test_saves_of_the_script_itself_are_where_it_is_compared(tmp_path: Path) -> None:
    """At its own save the script has drawn a random number since the end of the step."""
    repository = tmp_path / "runs"
    program(repository, "provable.py", str(repository), "10", ASKED="1")
    assert outlast(repository, "runs", "--json").json[0]["last_step"] == 10
    assert "Proven." in proved(repository, 0, ASKED="1").out
    told = proved(repository, 1).out
    assert "Can't be proven: the command did not save at step 10, where the run had saved." in told


def test_without_a_command_the_latest_checkpoint_is_read(trained: Path) -> None:
    told = outlast(trained, "doctor", "resume", "gpt")
    assert "every byte is as it was saved" in told.out
    assert "This machine is like the one that saved it." in told.out
    found = outlast(trained, "doctor", "resume", "gpt", "--json").json
    assert found["environment"] == []
    parts = {each["key"]: each for each in found["parts"]}
    assert (parts["model"]["tensors"], parts["model"]["not_finite"]) == (6, 0)
    assert parts["model"]["norm"] > 1
    assert "proof" not in found
    assert "no run nope" in outlast(trained, "doctor", "resume", "nope", code=1).err
    told = outlast(trained, "doctor", "resume", "gpt@8", code=1).err
    assert "there are runs: gpt." in told
    assert "Is it gpt? `outlast runs`" in told


def test_damage_is_told_before_anything_is_started(tmp_path: Path) -> None:
    repository = tmp_path / "runs"
    program(repository, "provable.py", str(repository), "9")
    newest = max((repository / "packs").rglob("*"), key=lambda each: each.stat().st_mtime_ns if each.is_file() else 0)
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.chmod(0o600)
    newest.write_bytes(damaged)
    ran = outlast(repository, "doctor", "resume", "gpt", "--", "touch", str(tmp_path / "started"), code=20)
    assert "is damaged" in ran.err
    assert not (tmp_path / "started").exists()


@pytest.mark.slow
def test_each_rank_is_compared(tmp_path: Path) -> None:
    repository = tmp_path / "runs"
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "provable.py", str(repository)]
    program(repository, *ranks, "10")

    def found(code: int, **environment: str) -> Any:
        command = ["--", sys.executable, *ranks, "40"]
        return outlast(repository, "doctor", "resume", "gpt", "--json", *command, code=code, **environment).json[
            "proof"
        ]

    alike = found(0)
    assert (alike["verdict"], alike["ranks"], alike["tensors"]) == ("proven", 2, 2 * 26)
    other = found(1, CHANGED="unsaved on rank 1")
    assert other["first"].startswith("0.weight of model on rank 1: ")
    assert {each["rank"] for each in other["findings"]} == {1}


# -- the first batch -----------------------------------------------------------------------------------------


def test_a_batch_has_a_digest_of_all_that_is_in_it() -> None:
    batch = {"ids": torch.arange(12).reshape(3, 4), "labels": (torch.ones(3), ["a", 1, None])}
    known = digest(batch)
    assert known == digest({"ids": torch.arange(12).reshape(3, 4), "labels": (torch.ones(3), ["a", 1, None])})
    others = [
        {**batch, "ids": torch.arange(12).reshape(4, 3)},
        {**batch, "ids": torch.arange(12, dtype=torch.int32).reshape(3, 4)},
        {**batch, "ids": torch.arange(12).reshape(3, 4).flip(0)},
        {**batch, "labels": (torch.ones(3), ["a", 2, None])},
        {"labels": batch["labels"]},
    ]
    assert len({known, *map(digest, others)}) == 1 + len(others)
    assert digest(object()) is None
    assert digest([torch.ones(2).to_sparse()]) is None


def test_the_digest_of_a_large_batch_sees_its_ends() -> None:
    large = torch.zeros(4 << 20)
    known = digest(large)
    for at in (0, -1):
        other = large.clone()
        other[at] = 1
        assert digest(other) != known


def test_a_save_that_failed_leaves_the_trail_of_the_one_before() -> None:
    trail = Trail()
    trail.went_on_from("a" * 32)
    trail.see("first")
    before = trail.facts(asked=False)
    assert before == {"snapshot": "a" * 32, "first_batch": digest("first"), "asked": False}
    trail.saving()
    trail.see("second")
    trail.saved(None)
    assert trail.facts(asked=False) == before
    trail.saving()
    trail.see("third")
    trail.saved(Snapshot(id="b" * 32, kind="checkpoint", name="x", time=""))
    assert trail.facts(asked=True) == {"snapshot": "b" * 32, "first_batch": digest("third"), "asked": True}
