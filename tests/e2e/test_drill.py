"""`outlast drill`: a restore is rehearsed, and what keeps a model from coming back is named, level by level."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from shell import PASSPHRASE, Ran, Shell, weights

from outlast.backup import read
from outlast.backup.create import WITHOUT_CONTENT, create
from outlast.clock import SYSTEM_CLOCK
from outlast.errors import InvalidInput, Refused, StoreFull
from outlast.events import ListSink
from outlast.repo.repository import Repository
from outlast.store.layers import open_store
from outlast.tiers import command as running
from outlast.tiers import scratch
from outlast.tiers.command import Commands
from outlast.tiers.drill import drill


@pytest.fixture
def place(filled: Shell) -> Path:
    """Where drills restore to."""
    made = filled.folder / "scratch"
    made.mkdir()
    filled.environment["TMPDIR"] = str(made)
    return made


def opened(shell: Shell) -> Repository:
    return Repository.open(open_store(str(shell.folder / "repo")))


def levels(ran: Ran) -> list[tuple[int, bool]]:
    return [(each["level"], each["reached"]) for each in ran.json["levels"] if not each["is_skipped"]]


def problems(ran: Ran) -> list[str]:
    return [problem for each in ran.json["levels"] for problem in each["looked"]["problems"]]


# -- what comes back ---------------------------------------------------------------------------------


def test_a_sound_model_reaches_the_values_and_the_log_says_so(filled: Shell, place: Path) -> None:
    ran = filled("drill", "--json")
    found = ran.json
    assert levels(ran) == [(0, True), (1, True), (2, True)]
    assert (found["name"], found["asked"], found["level"], found["passed"]) == ("tiny", 2, 2, True)
    assert found["levels"][1]["looked"] | {"notes": []} == {
        "files": 1, "tensors": 2, "documents": 1, "bytes": 0, "problems": [], "notes": [],
    }  # fmt: skip
    assert found["levels"][2]["looked"]["bytes"] == 4 * (3000 + 1000)
    assert sum(each["seconds"] for each in found["levels"]) <= found["rto_seconds"]
    assert found["rpo_seconds"] > 0
    state = opened(filled).state
    written = state.drills["tiny"]
    assert (written.level, written.rto_seconds, written.bytes) == (2, found["rto_seconds"], found["bytes"])
    assert state.proven == {found["snapshot"]: written.time}
    assert list(place.iterdir()) == []
    assert "L2 reached" in filled("repo", "log").out.splitlines()[-1]


def test_a_drill_is_told_in_lines_for_people(filled: Shell, place: Path) -> None:
    out = filled("drill", "--golden", "echo almost; exit 3", code=1).out.splitlines()
    assert out[0].startswith("Drill with snapshot ")
    assert [line.split()[:2] for line in out[1:5]] == [
        ["L0", "bytes"],
        ["L1", "structure"],
        ["L2", "values"],
        ["L3", "golden"],
    ]
    assert "FAILED" in out[4]
    assert out[5] == "Failed: the command ended with exit code 3: almost"
    assert out[6].startswith("L2 reached, not L3. RTO ")


def test_the_snapshot_of_a_drill_is_named_or_the_latest_of_a_source(filled: Shell, place: Path) -> None:
    filled("backup", "model/config.json", "--name", "config")
    latest, tiny = (filled("drill", *which, "--json").json for which in ([], ["--source", "tiny"]))
    assert (latest["name"], tiny["name"]) == ("config", "tiny")
    assert filled("drill", tiny["snapshot"][:8], "--level", "l0", "--json").json["asked"] == 0
    assert "there are: config, tiny" in filled("drill", "--source", "huge", code=1).err
    assert "no run tiny" in filled("drill", "--run", "tiny", code=1).err
    filled("drill", "--run", "a", "--source", "b", code=2)
    assert set(opened(filled).state.drills) == {"config", "tiny"}


def test_a_drill_that_could_not_be_written_down_says_what_it_came_to(
    filled: Shell, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = opened(filled)

    def refuse(*_: object) -> None:
        raise Refused("this store is read-only.")

    monkeypatch.setattr(repository.log, "append", refuse)
    with pytest.raises(Refused, match=r"the drill reached L2 in .* s, which could not be written down: this store is"):
        drill(repository, repository.snapshots()[0], scratch=str(place))
    assert list(place.iterdir()) == []


def test_an_encrypted_model_is_drilled_and_no_command_sees_the_passphrase(filled: Shell, place: Path) -> None:
    sealed = {"OUTLAST_REPO": str(filled.folder / "sealed"), "OUTLAST_PASSPHRASE": PASSPHRASE}
    filled("init", "--encrypt", **sealed)
    filled("backup", "model", **sealed)
    command = 'test -f "$OUTLAST_RESTORED/config.json" && ! env | grep -q PASSPHRASE'
    assert filled("drill", "--golden", command, "--json", **sealed).json["level"] == 3
    assert filled("drill", "--level", "L5", "--resume", command, "--json", **sealed).json["level"] == 5


# -- L0 ----------------------------------------------------------------------------------------------


def spoil_a_pack(shell: Shell) -> None:
    largest = max((shell.folder / "repo" / "packs").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    data = bytearray(largest.read_bytes())
    data[len(data) // 3] ^= 1
    largest.chmod(0o600)
    largest.write_bytes(data)


def test_damaged_bytes_fail_the_lowest_level_and_unprove_the_snapshot(filled: Shell, place: Path) -> None:
    found = filled("drill", "--json").json
    assert found["snapshot"] in opened(filled).state.proven
    spoil_a_pack(filled)
    ran = filled("drill", "--golden", "true", "--json", code=20)
    assert levels(ran) == [(0, False)]
    assert (ran.json["level"], ran.json["passed"]) == (-1, False)
    assert "can't be restored: model.safetensors" in ran.json["problem"]
    assert str(place) not in ran.json["problem"]
    state = opened(filled).state
    assert state.proven == {}
    assert state.drills["tiny"].level == -1
    assert list(place.iterdir()) == []
    assert "No level reached, not L2." in filled("drill", code=20).out


# -- L1 ----------------------------------------------------------------------------------------------


def cut(path: Path, count: int = 100) -> None:
    os.truncate(path, path.stat().st_size - count)


def test_a_model_that_was_backed_up_cut_short_is_named(filled: Shell, place: Path) -> None:
    cut(filled.folder / "model" / "model.safetensors")
    filled("backup", "model", "--name", "tiny")
    ran = filled("drill", "--json", code=1)
    assert levels(ran) == [(0, True), (1, False)]
    assert [text.partition(" ")[0] for text in problems(ran)] == ["model.safetensors"]
    assert opened(filled).state.proven, "its bytes are those that were backed up"


def torch_file(path: Path) -> None:
    import torch

    torch.save({"w": torch.ones(5000)}, path)


BROKEN: dict[str, Callable[[Path], Any]] = {
    "model.safetensors": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "pytorch_model.bin": lambda path: (torch_file(path), cut(path)),
    "last.pt": lambda path: path.write_bytes(b""),
    "weights.npy": lambda path: (np.save(path, np.ones(5000)), cut(path)),
    "weights.npz": lambda path: (np.savez(path, a=np.ones(50)), cut(path)),
    "model.gguf": lambda path: path.write_bytes(b"GGUF\3"),
    "config.json": lambda path: path.write_text('{"model_type": "gp'),
    "model.safetensors.index.json": lambda path: path.write_text("{}"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_no_program_can_read_is_named(filled: Shell, place: Path, name: str) -> None:
    BROKEN[name](filled.folder / "model" / name)
    filled("backup", "model", "--name", "tiny")
    ran = filled("drill", "--json", code=1)
    assert levels(ran)[-1] == (1, False)
    assert [text.split()[0] for text in problems(ran)] == [name]


def test_what_is_no_model_is_nobodys_failure(filled: Shell, place: Path) -> None:
    model = filled.folder / "model"
    (model / "train.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    (model / "settings.json").write_text('{"a": 1} // by hand\n')
    (model / "trainer_state.json").write_text('{"best_metric": NaN}')
    (model / "notes.bin").write_bytes(b"")
    (model / "tokenizer.bin").write_bytes(b"anything")
    np.save(model / "objects.npy", np.array([{}, None], dtype=object), allow_pickle=True)
    np.save(model / "records.npy", np.zeros(3, dtype=[("a", "<f4"), ("b", "<i8")]))
    np.save(model / "measured.npy", np.array([1.0, np.nan, np.inf]))
    torch_file(model / "last.pt")
    (model / "latest.pt").symlink_to("last.pt")
    os.mkfifo(model / "pipe")
    filled("backup", "model", "--name", "tiny")
    ran = filled("drill", "--json")
    assert problems(ran) == []
    [noted] = ran.json["levels"][1]["looked"]["notes"]
    assert noted.startswith("settings.json is no JSON")
    assert ran.json["levels"][2]["looked"]["notes"] == [
        "measured.npy: array: of 3 elements 1 are NaN and 1 are infinite"
    ]


def test_a_model_that_is_a_link_out_of_the_backup_would_not_come_back(filled: Shell, place: Path) -> None:
    model = filled.folder / "model"
    shutil.move(model / "model.safetensors", filled.folder / "elsewhere.safetensors")
    (model / "model.safetensors").symlink_to("../elsewhere.safetensors")
    filled("backup", "model", "--name", "tiny")
    [problem] = problems(filled("drill", "--json", code=1))
    assert problem == "model.safetensors is a link to ../elsewhere.safetensors, which is not in the backup"


def sharded(model: Path) -> dict[str, str]:
    (model / "model.safetensors").unlink()
    for at in (1, 2):
        save_file({f"l{at}.w": np.ones(40, np.float32)}, model / f"model-0000{at}-of-00002.safetensors")
    return {f"l{at}.w": f"model-0000{at}-of-00002.safetensors" for at in (1, 2)}


def test_each_shard_that_an_index_names_has_to_be_there_with_its_tensors(filled: Shell, place: Path) -> None:
    model = filled.folder / "model"
    named = sharded(model)
    index = model / "model.safetensors.index.json"

    def found(weight_map: dict[str, str], code: int) -> list[str]:
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        filled("backup", "model", "--name", "tiny")
        return problems(filled("drill", "--json", code=code))

    assert found(named, 0) == []
    lacking, outside = named | {"l3.w": "model-00003-of-00003.safetensors"}, named | {"l1.w": "../../config.json"}
    assert found(lacking, 1) == [f"{index.name} names model-00003-of-00003.safetensors, which is not there"]
    assert found(outside, 1) == [f"{index.name} names ../../config.json, which is not there"]
    swapped = named | {"l2.w": named["l1.w"]}
    assert found(swapped, 1) == [f"{index.name} names l2.w of {named['l1.w']}, which lacks it"]
    # The index of the format that nobody downloaded came along.
    index.unlink()
    index = model / "pytorch_model.bin.index.json"
    assert found({"l1.w": "pytorch_model-00001-of-00001.bin"}, 0) == []


def test_a_cache_of_links_inside_the_backup_is_a_whole_model(filled: Shell, place: Path) -> None:
    """As the cache of the Hugging Face hub is."""
    cache = filled.folder / "cache"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "main").mkdir(parents=True)
    weights(cache / "blobs" / "0a1b", scale=1)
    index = {"weight_map": {"layer.weight": "model.safetensors", "head.weight": "model.safetensors"}}
    (cache / "blobs" / "2c3d").write_text(json.dumps(index))
    (cache / "snapshots" / "main" / "model.safetensors").symlink_to("../../blobs/0a1b")
    (cache / "snapshots" / "main" / "model.safetensors.index.json").symlink_to("../../blobs/2c3d")
    filled("backup", "cache", "--name", "cache")
    looked = filled("drill", "--source", "cache", "--json").json["levels"]
    assert (looked[1]["looked"]["tensors"], looked[1]["looked"]["documents"]) == (2, 1)
    (cache / "snapshots" / "main" / "model.safetensors").unlink()
    filled("backup", "cache", "--name", "cache")
    filled("drill", "--source", "cache", "--json", code=1)


def test_what_could_not_be_backed_up_is_no_proof(filled: Shell, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled.folder / "model"
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if os.fsencode(path).endswith(b"bad.bin"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, flags, *rest, **named)

    def drilled() -> Any:
        repository = opened(filled)
        with monkeypatch.context() as patched:
            patched.setattr(read.os, "open", refuse)
            create(repository, [str(model)], name="tiny")
        return drill(repository, repository.find_snapshot("latest"), scratch=str(place))

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(model / "socket"))
        sound = drilled()
        assert sound.drill.passed
        assert sound.levels[0].looked.notes == []
        assert sound.levels[1].looked.notes == [f"socket is not in the backup: {WITHOUT_CONTENT}"]
        (model / "bad.bin").write_bytes(b"bad")
        assert drilled().levels[1].looked.problems == [
            "bad.bin is not in the backup: it could not be read then (Permission denied)"
        ]


# -- L2 ----------------------------------------------------------------------------------------------


def test_weights_that_are_no_numbers_are_named(filled: Shell, place: Path) -> None:
    path = filled.folder / "model" / "model.safetensors"
    state = load_file(path)
    half = np.ones(1000, np.float16)
    half[7] = -np.inf
    nan = np.zeros((2, 3), np.float32)
    nan[1, 2] = np.nan
    mask = np.triu(np.full((4, 4), -np.inf, np.float32), 1)
    bound = np.array([np.inf], np.float32)
    save_file(
        {**state, "half": half * np.arange(1000, dtype=np.float16), "nan": nan, "mask": mask, "bound": bound}, path
    )
    filled("backup", "model", "--name", "tiny")
    ran = filled("drill", "--json", code=1)
    assert levels(ran) == [(0, True), (1, True), (2, False)]
    assert sorted(problems(ran)) == [
        "model.safetensors: half: of 1,000 elements 1 are infinite",
        "model.safetensors: nan: of 6 elements 1 are NaN",
    ]
    assert ran.json["levels"][2]["looked"]["notes"] == ["infinite on purpose, as masks and bounds are: bound, mask"]
    filled("drill", "--level", "L1")
    assert filled("drill", "--allow-nan", "half", "--allow-nan", "n*", "--json").json["level"] == 2


# -- commands ----------------------------------------------------------------------------------------

GOLDEN = """
import os, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(os.environ["OUTLAST_RESTORED"])
expected = torch.load(sys.argv[1], weights_only=True)
with torch.no_grad():
    found = model(torch.arange(12)[None]).logits
sys.exit(0 if torch.equal(found, expected) else f"logits differ by {(found - expected).abs().max():.3g}")
"""


def test_a_real_model_gives_its_golden_outputs_and_another_one_does_not(filled: Shell, place: Path) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=32)).eval()
    model.save_pretrained(filled.folder / "gpt")
    with torch.no_grad():
        torch.save(model(torch.arange(12)[None]).logits, filled.folder / "golden.pt")
    (filled.folder / "golden.py").write_text(GOLDEN)
    golden = f"{sys.executable} golden.py golden.pt"
    filled("backup", "gpt")
    assert filled("drill", "--golden", golden, "--json").json["level"] == 3
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] += 1
    model.save_pretrained(filled.folder / "gpt")
    filled("backup", "gpt")
    ran = filled("drill", "--golden", golden, "--json", code=1)
    assert levels(ran)[-2:] == [(2, True), (3, False)]
    assert "logits differ by" in ran.json["problem"]


def test_a_level_without_its_command_is_refused_before_anything_is_restored(filled: Shell, place: Path) -> None:
    for level, option in (("L3", "--golden"), ("L4", "--quality"), ("L5", "--resume")):
        assert option in filled("drill", "--level", level, code=2).err
    filled("drill", "--level", "L6", code=2)
    filled("drill", "--golden", " ", code=2)
    filled("drill", "--scratch", "nowhere", code=2)
    assert opened(filled).state.drills == {}
    left_out = filled("drill", "--quality", "true", "--json").json
    assert [each["is_skipped"] for each in left_out["levels"]] == [False, False, False, True, False]
    filled("drill", "--quality", "true", "--level", "L1", "--json")


def test_a_command_that_hangs_is_ended_with_all_that_it_started(
    filled: Shell, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "_END_SECONDS", 0.3)
    pids = filled.folder / "pids"
    command = f"trap '' TERM; sleep 600 & echo $! > {pids}; echo begun; while :; do sleep 1; done"
    repository = opened(filled)
    commands = Commands(golden=command, timeout_seconds=1.5)
    found = drill(repository, repository.snapshots()[0], commands=commands, scratch=str(place))
    assert found.drill.problem == "the command was still running after 2 s, and was ended: begun"
    assert gone(int(pids.read_text()))
    assert list(place.iterdir()) == []


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has reaped has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_what_a_command_prints_is_no_burden(filled: Shell, place: Path) -> None:
    ran = filled(
        "drill",
        "--golden",
        "head -c 20000000 /dev/zero | tr '\\0' 'x'; echo; echo the end; kill -9 $$",
        "--json",
        code=1,
    )
    assert ran.json["problem"].startswith("the command was killed by SIGKILL: xxx")
    assert ran.json["problem"].endswith(" | the end")
    assert len(ran.json["problem"]) < 2000


def test_a_program_with_arguments_needs_no_shell(filled: Shell, place: Path) -> None:
    repository = opened(filled)
    words = [sys.executable, "-c", "import os, sys; sys.exit(sys.argv[1] + os.environ['OUTLAST_RESTORED'])", "$HOME "]
    found = drill(repository, repository.snapshots()[0], commands=Commands(golden=words), scratch=str(place))
    assert found.drill.problem.startswith(f"the command ended with exit code 1: $HOME {place}/outlast-drill-")
    lacking = drill(repository, repository.snapshots()[0], commands=Commands(golden=["no-such"]), scratch=str(place))
    assert "no-such can't be started: No such file" in lacking.drill.problem
    with pytest.raises(InvalidInput):
        drill(repository, repository.snapshots()[0], commands=Commands(golden=[]), scratch=str(place))


def test_a_command_has_the_environment_it_was_given_and_no_other() -> None:
    given = {"PATH": "/usr/bin:/bin", "A": "b c", "OUTLAST_PASSPHRASE": PASSPHRASE}
    assert running.run(["env"], given, 60).tail == "PATH=/usr/bin:/bin | A=b c"
    assert running.run(["env"], given | {"LC_CTYPE": "C"}, 60).tail.endswith("A=b c | LC_CTYPE=C")
    assert running.run("kill -PIPE $$", given, 60).code == -signal.SIGPIPE


# -- the scratch folder ------------------------------------------------------------------------------


def begun(shell: Shell, mark: Path) -> subprocess.Popen[bytes]:
    """A drill whose command has started, and hangs."""
    command = f"echo $$ > {mark}.part; mv {mark}.part {mark}; exec sleep 600"
    process = subprocess.Popen(
        shell.argv("drill", "--golden", command), cwd=shell.folder, env=shell.environment, stdout=-1, stderr=-1
    )
    while not mark.exists():
        assert process.poll() is None
        SYSTEM_CLOCK.sleep(0.02)
    return process


def test_a_killed_drill_leaves_no_process_and_the_next_one_removes_its_folder(filled: Shell, place: Path) -> None:
    mark = filled.folder / "mark"
    process = begun(filled, mark)
    held = {path.name for path in place.iterdir()}
    assert len(held) == 2
    assert stat.S_IMODE(next(path for path in place.iterdir() if path.is_dir()).stat().st_mode) == 0o700
    filled("drill", "--level", "L0")
    assert {path.name for path in place.iterdir()} == held, "a drill removed the folder of one that was going on"
    process.kill()
    process.communicate()
    while not gone(int(mark.read_text())):
        SYSTEM_CLOCK.sleep(0.02)
    before = opened(filled).state.drills["tiny"]
    (place / "outlast-drill-0123456789abcdef").mkdir()
    (place / "outlast-drill-0123456789abcdef" / "mine").write_text("of the user")
    filled("drill", "--level", "L0")
    assert [path.name for path in place.iterdir()] == ["outlast-drill-0123456789abcdef"]
    assert before.asked == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_drill_that_is_stopped_leaves_nothing(filled: Shell, place: Path, number: signal.Signals) -> None:
    mark = filled.folder / "mark"
    process = begun(filled, mark)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert b"nothing was written down" in err
    assert list(place.iterdir()) == []
    assert gone(int(mark.read_text()))
    assert opened(filled).state.drills == {}


def test_without_room_nothing_is_restored(filled: Shell, place: Path) -> None:
    repository = opened(filled)
    snapshot = repository.snapshots()[0]
    with pytest.raises(StoreFull, match=f"takes {snapshot.bytes} bytes in {place}, and 100 are free"):
        drill(repository, snapshot, scratch=str(place), free_bytes=lambda _: 100)
    assert opened(filled).state.drills == {}
    assert list(place.iterdir()) == []
    drill(repository, snapshot, scratch=str(place), free_bytes=lambda _: snapshot.bytes)


def test_a_lock_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    names = [f"outlast-drill-{number:016x}" for number in range(4)]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    (tmp_path / f"{names[0]}.lock").write_text(textwrap.dedent("something else, of the same length as a mark"))
    (tmp_path / f"{names[1]}.lock").symlink_to(tmp_path / f"{names[0]}.lock")
    (tmp_path / f"{names[2]}.lock").write_bytes(scratch._MARK)
    os.chmod(tmp_path / f"{names[2]}.lock", 0o666)
    (tmp_path / f"{names[3]}.lock").write_bytes(scratch._MARK)
    os.chmod(tmp_path / f"{names[3]}.lock", 0o600)
    scratch.sweep(os.fsencode(tmp_path), ListSink())
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == names[:3]
