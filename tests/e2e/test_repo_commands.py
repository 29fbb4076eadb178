"""`outlast repo`: the figures are right, the history is told whole, and a changed or hidden one is found out."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from shell import COMMANDS, PASSPHRASE, Shell

KIB = 1 << 10


def noise(seed: int, size: int) -> bytes:
    return np.random.default_rng(seed).bytes(size)


@pytest.fixture(scope="module")
def two_names_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two names: `big` twice, with one file changed, and `other`, which has one file of `big`."""
    shell = Shell(tmp_path_factory.mktemp("two-names"))
    for folder, files in {"big": {"a": 1, "b": 2}, "small": {"same": 1, "own": 4}}.items():
        (shell.folder / folder).mkdir()
        for name, seed in files.items():
            (shell.folder / folder / name).write_bytes(noise(seed, 100 * KIB))
    shell("init")
    shell("backup", "big", "--name", "big")
    (shell.folder / "big" / "b").write_bytes(noise(3, 100 * KIB))
    shell("backup", "big", "--name", "big")
    shell("backup", "small", "--name", "other")
    return shell.folder


@pytest.fixture
def two_names(shell: Shell, two_names_template: Path) -> Shell:
    shutil.copytree(two_names_template, shell.folder, dirs_exist_ok=True)
    return shell


def entries(shell: Shell) -> list[Path]:
    return sorted((shell.folder / "repo" / "log").iterdir())


def overwrite(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def test_the_figures_are_those_of_the_content(two_names: Shell) -> None:
    found = two_names("repo", "stats", "--json").json
    assert (found["snapshots"], found["bytes"], found["bytes_unique"]) == (3, 600 * KIB, 400 * KIB)
    assert found["bytes_stored"] == 400 * KIB  # noise can't be compressed
    assert (found["dedup_ratio"], found["compression_ratio"]) == (1.5, 1.0)
    big, other = found["names"]
    columns = ("name", "snapshots", "bytes", "bytes_unique", "bytes_own", "bytes_shared")
    assert [big[each] for each in columns] == ["big", 2, 400 * KIB, 300 * KIB, 200 * KIB, 100 * KIB]
    assert [other[each] for each in columns] == ["other", 1, 200 * KIB, 200 * KIB, 100 * KIB, 100 * KIB]
    on_disk = {
        kind: sum(path.stat().st_size for path in (two_names.folder / "repo" / kind).rglob("*") if path.is_file())
        for kind in ("packs", "log")
    }
    assert found["places"]["live"] == {"objects": 3, "bytes": on_disk["packs"]}
    assert found["places"]["log"] == {"objects": 3, "bytes": on_disk["log"]}
    text = two_names("repo", "stats").out
    assert "3 snapshots of 600 KiB in all. Each chunk once: 400 KiB (dedup 1.50x)" in text
    assert re.search(r"^big +2 +400 KiB +300 KiB +200 KiB +100 KiB +300 KiB +1.33x +1.00x$", text, re.M), text


def test_what_is_condemned_is_counted_as_such(two_names: Shell) -> None:
    (two_names.folder / "repo" / "packs" / "ab").mkdir(exist_ok=True)
    (two_names.folder / "repo" / "packs" / "ab" / ("ab" * 32)).write_bytes(bytes(123))
    two_names("forget", "latest", "--name", "other", "--allow-empty")
    two_names("prune", "--max-delete", "100%")
    places = two_names("repo", "stats", "--json").json["places"]
    assert places["condemned"]["objects"] == 1
    assert places["condemned"]["bytes"] > 100 * KIB
    assert places["unreferenced"] == {"objects": 1, "bytes": 123}
    assert "packs condemned" in two_names("repo", "stats").out


def test_tensors_say_how_many_snapshots_hold_them(shell: Shell) -> None:
    rng = np.random.default_rng(5)
    base = rng.normal(size=(300, 400)).astype(np.float32)
    (shell.folder / "model").mkdir()
    shell("init")
    for number in range(3):
        head = rng.normal(size=5000).astype(np.float32)
        model = {"base": base, "head": head, "zeros": np.zeros(50_000, np.float32)}
        save_file(model, shell.folder / "model" / "model.safetensors", {"step": str(number)})
        shell("backup", "model", "--name", "run")
    found = shell("repo", "stats", "--tensors", "--json").json
    rows = {row["name"]: row for row in found["tensors"]}
    assert {name: row["snapshots"] for name, row in rows.items()} == {"base": 3, "head": 1, "zeros": 3}
    assert {name: row["bytes"] for name, row in rows.items()} == {"base": 480_000, "head": 20_000, "zeros": 200_000}
    assert rows["zeros"]["compression_ratio"] > 1000
    assert 1 <= rows["base"]["compression_ratio"] < 2
    text = shell("repo", "stats", "--tensors").out
    assert re.search(r"^base +F32 +\[300, 400\] +469 KiB .* 3$", text, re.M), text


def test_tensors_are_asked_of_one_name(two_names: Shell) -> None:
    assert "Add --name: big, other." in two_names("repo", "stats", "--tensors", code=2).err
    assert "has no tensors" in two_names("repo", "stats", "--tensors", "--name", "other").out
    assert "no snapshot is named nobody" in two_names("repo", "stats", "--name", "nobody", code=1).err


def test_figures_of_a_damaged_repository_say_what_they_lack(two_names: Shell) -> None:
    packs = sorted((two_names.folder / "repo" / "packs").rglob("*/*"), key=lambda path: path.stat().st_mtime)
    packs[-1].unlink()  # of `other`: one file and the manifest
    ran = two_names("repo", "stats", "--json", code=20)
    assert [each["bytes_unique"] for each in ran.json["names"]] == [300 * KIB, 0]
    assert len(ran.json["problems"]) == 2
    assert "packs that the log names and the store lacks: 1, such as " in ran.json["problems"][1]
    assert "Not counted: snapshot" in two_names("repo", "stats", code=20).out


@pytest.mark.parametrize("group", ["key", "repo"])
def test_a_group_has_the_exit_codes_of_its_commands(shell: Shell, group: str) -> None:
    def codes(*command: str) -> set[str]:
        told = re.search(r"Exit codes: ([^.]*)\.", " ".join(shell(*command, "--help").out.split()))
        assert told, command
        return set(told[1].split("; "))

    members = [name.split()[1] for name in COMMANDS if name.startswith(f"{group} ")]
    assert codes(group) == set[str]().union(*(codes(group, member) for member in members))


def test_an_empty_repository_has_figures_too(shell: Shell) -> None:
    shell("init")
    found = shell("repo", "stats", "--json").json
    assert (found["snapshots"], found["bytes_unique"], found["dedup_ratio"]) == (0, 0, None)
    assert "(dedup -)" in shell("repo", "stats", "--tensors").out
    assert shell("repo", "log").out == "No entries.\n"
    assert "the newest of 0 entries" in shell("repo", "verify-log").out


def test_the_history_in_words(two_names: Shell) -> None:
    two_names("forget", "--name", "big", "--keep-last", "1")
    two_names("prune", "--grace", "0", "--max-delete", "100%", "--max-unused", "0%")
    two_names("check", "--data", "all")
    lines = two_names("repo", "log").out.splitlines()
    whats = [re.split(r" {2,}", line.strip())[-1] for line in lines]
    assert whats[0] == "WHAT"
    assert re.fullmatch(r"backup [0-9a-f]{8} of big: 2 files, 200 KiB, 2\d\d KiB new", whats[1])
    assert re.fullmatch(r"backup [0-9a-f]{8} of other: 2 files, 200 KiB, 10\d KiB new", whats[3])
    assert re.fullmatch(r"forgot 1 snapshot: [0-9a-f]{8} of big", whats[4])
    rest = "\n".join(whats[5:])
    for told in ("stored 1 pack, ", "condemned 1 pack, 2", "deleted 1 pack, 2", "verified 3 packs, "):
        assert told in rest
    assert [int(line.split()[0]) for line in lines[1:]] == list(range(1, len(lines)))


def test_parts_of_the_history(two_names: Shell) -> None:
    two_names("forget", "--name", "big", "--keep-last", "1")
    assert [row["seq"] for row in two_names("repo", "log", "--json", "--limit", "2").json] == [3, 4]
    big = two_names("repo", "log", "--json", "--name", "big").json
    assert [(row["seq"], row["kind"]) for row in big] == [(1, "snapshot"), (2, "snapshot"), (4, "forget")]
    assert [row["seq"] for row in two_names("repo", "log", "--json", "--kind", "forget").json] == [4]
    assert two_names("repo", "log", "--kind", "quarantine").out == "No entries.\n"
    assert "Known are snapshot, packs" in two_names("repo", "log", "--kind", "nothing", code=2).err


def test_keys_are_part_of_the_history(shell: Shell) -> None:
    shell.environment["OUTLAST_PASSPHRASE"] = PASSPHRASE
    shell("init", "--encrypt")
    shell("key", "add", "--label", "two\nlines", OUTLAST_NEW_PASSPHRASE="another one")
    shell("key", "rotate")
    lines = shell("repo", "log").out.splitlines()[1:]
    assert "(two\\nlines) added" in lines[0]
    assert "data key 2 reserved for a rotation" in lines[1]
    assert "keys rotated: data key 2 is in use from here on" in lines[2]
    shell("repo", "verify-log")
    shell("repo", "verify-log", code=12, OUTLAST_PASSPHRASE="wrong")


@pytest.mark.parametrize("damage", ["flip", "delete", "swap"])
def test_damage_is_told_in_its_place(two_names: Shell, damage: str) -> None:
    whole = two_names("repo", "log", "--json").json
    second = entries(two_names)[1]
    if damage == "delete":
        second.unlink()
    elif damage == "flip":
        overwrite(second, second.read_bytes().replace(b'"actor":"', b'"actor":"x'))
    else:
        overwrite(second, entries(two_names)[2].read_bytes())
    ran = two_names("repo", "log", "--json", code=20)
    assert [row["seq"] for row in ran.json] == [1, 2, 3]
    assert [row for row in ran.json if "damaged" not in row] == [whole[0], whole[2]]
    assert ran.json[1]["object"] == f"log/{2:020d}"
    assert "damaged: " in two_names("repo", "log", "--name", "other", code=20).out.splitlines()[1]
    proof = two_names("repo", "verify-log", "--json", code=20).json
    assert (proof["ok"], proof["head"]) == (False, None)
    assert [each["object"] for each in proof["damaged"]] == [f"log/{2:020d}"]
    lacking = two_names("repo", "stats", "--json", code=20).json
    assert lacking["snapshots"] == 2
    assert "newer snapshots than those listed may exist" in lacking["warnings"][-1]


def test_a_history_that_was_written_anew_is_not_the_expected_one(two_names: Shell) -> None:
    """Everything in it is right by itself: only the head that was kept elsewhere tells."""
    shutil.copytree(two_names.folder / "repo", two_names.folder / "older")
    shutil.rmtree(two_names.folder / "small")
    two_names("forget", "--name", "big", "--keep-last", "1")
    head = two_names("repo", "verify-log", "--json").json["head"]
    shown = two_names("repo", "verify-log").out
    word = f"{head['seq']}:{head['hash']}"
    assert f"Head: {word}" in shown
    assert head["seq"] == 4
    two_names("backup", "big", "--name", "big")
    ran = two_names("repo", "verify-log", "--expect", word)
    assert "Entry 4 is the expected one: everything up to it is as it was then." in ran.out
    older = str(two_names.folder / "older")
    assert "The chain is whole" in two_names("repo", "verify-log", "-r", older).out
    ran = two_names("repo", "verify-log", "-r", older, "--expect", word, code=20)
    assert "Not as expected: entry 4 is not there, the newest one is 3" in ran.out
    assert "Head: " not in ran.out
    two_names("forget", "-r", older, "latest", "--name", "other", "--allow-empty")
    ran = two_names("repo", "verify-log", "-r", older, "--expect", word, "--json", code=20)
    assert ran.json["ok"] is False
    assert "entry 4 is another one" in ran.json["expected"]["problem"]


@pytest.mark.parametrize("word", ["4", "0:" + "a" * 64, "4:abc", "x:" + "a" * 64])
def test_an_expectation_that_can_t_be_one(shell: Shell, word: str) -> None:
    shell("init")
    assert "SEQ:HASH" in shell("repo", "verify-log", "--expect", word, code=2).err


def test_a_state_that_says_something_else_is_found_out(two_names: Shell) -> None:
    from outlast import records
    from outlast.repo.state import State

    [*_, last] = entries(two_names)
    head = json.loads(two_names("repo", "verify-log", "--json").out)["head"]
    forged = records.canonical_object(State(head["seq"], head["hash"]))
    (two_names.folder / "repo" / "state").mkdir(exist_ok=True)
    (two_names.folder / "repo" / "state" / last.name).write_bytes(forged)
    ran = two_names("repo", "verify-log", "--json", code=20)
    assert [each["object"] for each in ran.json["damaged"]] == [f"state/{last.name}"]
