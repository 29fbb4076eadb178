"""The real command line, as a process of its own: results, errors, exit codes, secrets, signals."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from outlast.clock import SYSTEM_CLOCK

PASSPHRASE = "correct horse battery staple"
COMMANDS = ["init", "backup", "snapshots", "show", "diff", "restore", "check", "doctor store"]


class Ran:
    """A finished command; `json` is its one document."""

    def __init__(self, ran: subprocess.CompletedProcess[bytes]) -> None:
        self.code = ran.returncode
        self.out = ran.stdout.decode()
        self.err = ran.stderr.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Shell:
    """Runs commands in one folder, with one repository in the environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {name: text for name, text in os.environ.items() if not name.startswith("OUTLAST_")}
        self.environment |= {"OUTLAST_REPO": str(folder / "repo"), "COLUMNS": "100"}

    def argv(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "outlast", *arguments]

    def __call__(self, *arguments: str, code: int = 0, without: str = "", **environment: str) -> Ran:
        env = {name: text for name, text in (self.environment | environment).items() if name != without}
        ran = Ran(
            subprocess.run(
                self.argv(*arguments),
                cwd=self.folder,
                env=env,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=120,
            )
        )
        assert ran.code == code, f"outlast {' '.join(arguments)} gave {ran.code}:\n{ran.out}\n{ran.err}"
        assert "Traceback" not in ran.err or "--debug" in arguments
        return ran


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one snapshot of a small model folder, to be copied."""
    shell = Shell(tmp_path_factory.mktemp("template"))
    model = shell.folder / "model"
    model.mkdir()
    weights(model / "model.safetensors", scale=1)
    (model / "config.json").write_text("{}")
    (model / "tab\there").write_text("odd name")
    shell("init")
    shell("backup", "model", "--name", "tiny", "--tag", "run=1", "--tag", "odd=a=b")
    return shell.folder


@pytest.fixture
def filled(shell: Shell, template: Path) -> Shell:
    shutil.copytree(template, shell.folder, dirs_exist_ok=True)
    return shell


def weights(path: Path, scale: float, **more: np.ndarray) -> None:
    state = {"layer.weight": np.arange(3000, dtype=np.float32), "head.weight": np.full((20, 50), scale, np.float32)}
    save_file({**state, **more}, path)


# -- what each command gives -------------------------------------------------------------------------


def test_the_main_job_with_json(shell: Shell) -> None:
    (shell.folder / "data").mkdir()
    (shell.folder / "data" / "file").write_bytes(b"x" * 5000)
    made = shell("init", "--json", "--compression", "none").json
    assert (made["encrypted"], made["compression"], made["version"]) == (False, "none", 1)

    report = shell("backup", "data", "--json", "--tag", "a=1").json
    assert {"snapshot", "files", "bytes", "bytes_added", "bytes_stored", "unreadable", "seconds"} <= report.keys()
    assert (report["files"], report["bytes"], report["unreadable"], report["problems"]) == (1, 5000, 0, [])

    [listed] = shell("snapshots", "--json").json
    assert {"id", "time", "name", "tags", "files", "bytes", "bytes_added"} <= listed.keys()
    assert (listed["id"], listed["name"], listed["tags"]) == (report["snapshot"], "data", {"a": "1"})
    assert shell("snapshots", "--json", "--tag", "a=2").json == []

    plan = shell("restore", "latest", "--to", "back", "--dry-run", "--json").json
    assert (plan["dry_run"], plan["files"], plan["bytes"], plan["bytes_present"]) == (True, 1, 5000, 0)
    assert not (shell.folder / "back").exists()
    restored = shell("restore", report["snapshot"][:8], "--to", "back", "--json").json
    assert {"snapshot", "files", "bytes", "bytes_fetched", "seconds"} <= restored.keys()
    assert restored["verified"] is True
    assert (shell.folder / "back" / "file").read_bytes() == b"x" * 5000

    checked = shell("check", "--data", "all", "--json").json
    assert {"snapshots", "packs", "chunks", "bytes_read"} <= checked.keys()
    assert (checked["ok"], checked["damaged"]) == (True, [])


def test_the_main_job_for_people(filled: Shell) -> None:
    listing = filled("snapshots").out.splitlines()
    assert listing[0].split()[:2] == ["ID", "TIME"]
    assert "run=1 odd=a=b" in listing[1]
    shown = filled("show", "latest").out
    assert re.search(r"KiB  model\.safetensors  \(safetensors, 2 tensors\)\n +\S+ +F32 +\[", shown)
    assert "tab\\there" in shown
    again = filled("backup", "model", "--name", "tiny").out
    assert re.match(r"Snapshot [0-9a-f]{8} of tiny: 3 files, 15\.\d KiB, in ", again)
    first = filled("restore", "latest", "--to", "out").out
    assert "every byte was verified" in first
    (filled.folder / "out" / "config.json").write_text("changed")
    assert re.search(r"kept as .*out\.before-", filled("restore", "latest", "--to", "out").out)
    assert "No damage found. Checked 2 snapshots" in filled("check").out
    assert filled("backup", "model", "--quiet").out == ""


def test_show_json_lists_files_and_tensors(filled: Shell) -> None:
    document = filled("show", "latest", "--json").json
    assert (document["name"], document["file_count"]) == ("tiny", 3)
    files = {file["path"]: file for file in document["files"]}
    assert {".", "config.json", "model.safetensors", "tab\there"} == files.keys()
    assert files["."]["type"] == "dir"
    assert files["config.json"]["size"] == 2
    assert "format" not in files["config.json"]
    tensors = {each["name"]: each for each in files["model.safetensors"]["tensors"]}
    assert tensors["head.weight"] == {"name": "head.weight", "dtype": "F32", "shape": [20, 50], "bytes": 4000}
    [only] = filled("show", "latest", "config.json", "--json").json["files"]
    assert only["path"] == "config.json"


def test_diff_names_the_changed_tensor_and_file(filled: Shell) -> None:
    first = filled("snapshots", "--json").json[0]["id"]
    weights(filled.folder / "model" / "model.safetensors", 2, extra=np.zeros(3, np.int64))
    (filled.folder / "model" / "config.json").unlink()
    (filled.folder / "model" / "new").write_text("new")
    filled("backup", "model", "--name", "tiny")
    report = filled("diff", first, "latest", "--json").json
    assert [file["path"] for file in report["files"]["added"]] == ["new"]
    assert [file["path"] for file in report["files"]["removed"]] == ["config.json"]
    assert [tensor["name"] for tensor in report["tensors"]["added"]] == ["extra"]
    [tensor] = report["tensors"]["changed"]
    assert (tensor["name"], tensor["bytes"], tensor["bytes_changed"]) == ("head.weight", 4000, 4000)
    text = filled("diff", first, "latest").out
    assert "Tensors: 1 added, 0 removed, 1 changed" in text
    assert re.search(r"~  head\.weight +3\.9 KiB  of 3\.9 KiB", text)


def test_one_tensor_comes_back_as_safetensors(filled: Shell) -> None:
    filled("restore", "latest", "--to", "one.safetensors", "--tensor", "head.weight")
    [(name, array)] = load_file(filled.folder / "one.safetensors").items()
    assert name == "head.weight"
    assert np.array_equal(array, np.full((20, 50), 1, np.float32))


def test_options_stand_before_or_after_the_command(filled: Shell) -> None:
    repo = str(filled.folder / "repo")
    after = filled("snapshots", "--json", "-r", repo, without="OUTLAST_REPO").json
    before = filled("--json", "--repo", repo, "snapshots", without="OUTLAST_REPO").json
    assert before == after != []
    filled("--repo", str(filled.folder / "elsewhere"), "snapshots", "--repo", repo)


def test_json_lines_tell_progress_and_end_with_the_result(filled: Shell) -> None:
    (filled.folder / "model" / "big").write_bytes(bytes(range(256)) * 20_000)
    lines = [json.loads(line) for line in filled("--json-lines", "backup", "model").out.splitlines()]
    assert lines[-1]["files"] == 4
    assert all(set(line) <= {"progress", "event"} for line in lines[:-1])
    assert any("progress" in line for line in lines)


def test_doctor_says_which_promises_a_store_keeps(shell: Shell) -> None:
    report = shell("doctor", "store", "memory://", "--json").json
    assert report["ok"]
    assert {"name", "passed", "detail", "seconds"} <= report["checks"][0].keys()
    assert "lives in one process only" in shell("doctor", "store", "memory://").out
    assert "a repository is safe there" in shell("doctor", "store", "not/yet/there").out
    assert not (shell.folder / "not").exists()


def test_doctor_says_in_one_sentence_why_nothing_can_be_written(shell: Shell) -> None:
    (shell.folder / "file").write_text("precious")
    ran = shell("doctor", "store", "file", code=2)
    assert "file is a file where a directory is needed" in ran.err
    assert "FAILED" not in ran.out
    ran = shell("doctor", "store", "s3://bucket/x", code=2, AWS_ENDPOINT_URL="localhost:5123")
    assert "write http://localhost:5123" in ran.err
    assert "panic" not in ran.err


# -- bad input: one sentence, the right code, nothing lost -------------------------------------------


def newer_version(shell: Shell) -> None:
    path = shell.folder / "repo" / "format"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b'"version":1', b'"version":9'))


def damaged_log(shell: Shell, *, newest: bool = False) -> None:
    entry = sorted((shell.folder / "repo" / "log").iterdir())[-1 if newest else 0]
    entry.chmod(0o644)
    entry.write_bytes(entry.read_bytes().replace(b'"seq"', b'"sEq"'))


BAD: dict[str, tuple[Sequence[str], int, str, Callable[[Shell], None] | None]] = {
    "no repository there": (["snapshots", "--repo", "elsewhere"], 10, "no_repository", None),
    "unknown kind of store": (["snapshots", "--repo", "ftp://x"], 2, "invalid_input", None),
    "repository exists": (["init"], 21, "refused", None),
    "repository of a newer version": (["backup", "model"], 21, "refused", newer_version),
    "damaged log": (["backup", "model"], 20, "corrupt", damaged_log),
    "no source exists": (["backup", "nothing", "nowhere"], 2, "invalid_input", None),
    "unknown snapshot": (["restore", "0123456789", "--to", "x"], 1, "not_found", None),
    "no snapshot of that name": (["restore", "latest", "--name", "none", "--to", "x"], 1, "not_found", None),
    "no such path": (["show", "latest", "nothing"], 1, "not_found", None),
    "no such tensor": (["restore", "latest", "--to", "x.safetensors", "--tensor", "none"], 1, "not_found", None),
    "target is a file": (["restore", "latest", "--to", "model/config.json"], 2, "invalid_input", None),
    "repository in the target": (["restore", "latest", "--to", "."], 21, "refused", None),
    "unknown option": (["backup", "model", "--fast"], 2, "invalid_input", None),
    "unknown command": (["bakup", "model"], 2, "invalid_input", None),
    "missing argument": (["backup"], 2, "invalid_input", None),
    "missing --to": (["restore", "latest"], 2, "invalid_input", None),
    "malformed tag": (["backup", "model", "--tag", "novalue"], 2, "invalid_input", None),
    "malformed share": (["check", "--data", "150%"], 2, "invalid_input", None),
    "unknown compression": (["init", "--repo", "other", "--compression", "zip"], 2, "invalid_input", None),
    "passphrase without --encrypt": (["init", "--repo", "o", "--passphrase-file", "f"], 2, "invalid_input", None),
    "no passphrase": (["init", "--repo", "other", "--encrypt"], 12, "wrong_key", None),
    "empty --to": (["restore", "latest", "--to", ""], 2, "invalid_input", None),
    "empty --repo": (["snapshots", "--repo", ""], 2, "invalid_input", None),
    "empty --repo before the command": (["--repo", "", "snapshots"], 2, "invalid_input", None),
    "empty --name": (["backup", "model", "--name", ""], 2, "invalid_input", None),
    "empty path": (["backup", ""], 2, "invalid_input", None),
    "short id": (["show", "abc"], 2, "invalid_input", None),
    "memory": (["init", "--repo", "memory://x"], 2, "invalid_input", None),
    "tag given twice": (["backup", "model", "--tag", "a=1", "--tag", "a=2"], 2, "invalid_input", None),
    "dry run of tensors": (["restore", "latest", "--to", "x", "--tensor", "a", "--dry-run"], 2, "invalid_input", None),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence_and_the_right_code(filled: Shell, case: str) -> None:
    arguments, code, kind, spoil = BAD[case]
    if spoil:
        spoil(filled)
    before = sorted(path.name for path in (filled.folder / "repo").rglob("*"))
    human = filled(*arguments, code=code)
    assert human.out == ""
    message, *hint = human.err.splitlines()
    assert re.fullmatch(r"outlast: .+[.?)]", message)
    assert len(hint) <= 1
    error = filled(*arguments, "--json", code=code).json
    assert error.keys() == {"error"}
    assert (error["error"]["kind"], error["error"]["exit_code"]) == (kind, code)
    assert f"outlast: {error['error']['message']}" == message
    assert sorted(path.name for path in (filled.folder / "repo").rglob("*")) == before


def test_what_was_wrong_is_named(filled: Shell) -> None:
    assert "--to is empty" in filled("restore", "latest", "--to", "", code=2).err
    assert "PATH is empty" in filled("backup", "", code=2).err
    assert "give at least 4 characters of the id" in filled("show", "abc", code=2).err
    assert "lives only inside one Python process" in filled("init", "--repo", "memory://x", code=2).err
    assert "Write all, none or a percentage such as 10%" in filled("check", "--data", "50", code=2).err
    assert "'a' was given twice" in filled("backup", "model", "--tag", "a=1", "--tag", "a=2", code=2).err


def test_a_snapshot_is_found_as_people_write_it(filled: Shell) -> None:
    tiny = filled("snapshots", "--json").json[0]["id"]
    (filled.folder / "model" / "more").write_text("more")
    other = filled("backup", "model", "--name", "other", "--json").json["snapshot"]
    assert filled("show", f" {other[:8].upper()} ", "--json").json["id"] == other
    assert filled("show", "latest", "--name", "tiny", "--json").json["id"] == tiny
    report = filled("diff", tiny, "latest", "--name", "tiny", "--json").json
    assert (report["before"], report["after"]) == (tiny, tiny)
    assert f"snapshot {tiny[:8]} is of tiny, not other" in filled("show", tiny, "--name", "other", code=1).err
    assert "no snapshot is named tin; there are: other, tiny" in filled("show", "latest", "--name", "tin", code=1).err
    listed = filled("snapshots", "--name", "tin")
    assert "no snapshot is named tin; there are: other, tiny" in listed.err
    assert f"from snapshot {other[:8]} of other to back in" in filled("restore", "latest", "--to", "back").out
    assert f"{other[:8]} of other to" in filled("restore", "latest", "--to", "back", "--dry-run").out


def test_what_only_the_target_has_is_told_before_and_after(filled: Shell) -> None:
    filled("restore", "latest", "--to", "back")
    (filled.folder / "back" / "mine").write_text("mine")
    plan = filled("restore", "latest", "--to", "back", "--dry-run").out
    assert re.search(r"moved away +4 B  mine\n", plan)
    assert "Only at the target, and not in the snapshot: 1 item, 4 B; would be moved away.\n" in plan
    (filled.folder / "back" / "config.json").write_text("changed")
    merged = filled("restore", "latest", "--to", "back", "--include", "*.json").out
    assert "Kept beside the new ones, as NAME.before-<time>: 1 old item." in merged
    one = filled("restore", "latest", "--to", "one.safetensors", "--tensor", "head.*").out
    assert "Restored 1 tensor, " in one


def test_a_pattern_that_fits_nothing_is_told(filled: Shell) -> None:
    ran = filled("restore", "latest", "--to", "back", "--include", "*.json", "--include", "*.jsn")
    assert ran.err == "outlast: warning: the pattern '*.jsn' fits nothing.\n"
    assert (filled.folder / "back" / "config.json").exists()


def test_a_hint_that_is_a_command_can_be_pasted(filled: Shell) -> None:
    save_file({f"layer{n:03}": np.zeros(4, np.float32) for n in range(30)}, filled.folder / "model" / "step 1.st")
    filled("backup", "model")
    shown = filled("show", "latest").out
    hint = re.search(r"`outlast (show [0-9a-f]{8} '(?:model/)?step 1\.st')` lists all", shown)
    assert hint, shown
    assert "layer029" in filled(*shlex.split(hint[1])).out


def test_folders_and_links_are_not_counted_as_files_in_a_diff(filled: Shell) -> None:
    first = filled("snapshots", "--json").json[0]["id"]
    (filled.folder / "model" / "folder").mkdir()
    (filled.folder / "model" / "link").symlink_to("config.json")
    (filled.folder / "model" / "folder" / "file").write_text("new")
    filled("backup", "model")
    text = filled("diff", first, "latest").out
    assert "Files: 1 added, 0 removed, 0 changed (" in text
    assert "Folders: 1 added, 0 removed," in text
    assert "Links: 1 added, 0 removed, 0 changed\n" in text


def test_no_repository_named(shell: Shell) -> None:
    assert "OUTLAST_REPO" in shell("snapshots", code=2, without="OUTLAST_REPO").err


def test_no_arguments_show_the_help(shell: Shell) -> None:
    assert "Commands:" in shell(code=2).out


def test_a_missing_source_among_others_is_partly_done(filled: Shell) -> None:
    ran = filled("backup", "model", "nothing", "--json", code=3)
    assert (ran.json["files"], ran.json["unreadable"]) == (3, 1)
    assert [problem["path"] for problem in ran.json["problems"]] == ["nothing"]
    human = filled("backup", "model", "nothing", code=3)
    assert re.search("warning: nothing: No such file", human.err)
    assert "1 file could not be read" in human.out


def test_what_has_no_content_is_named_and_the_rest_is_kept(filled: Shell) -> None:
    with socket.socket(socket.AF_UNIX) as endpoint:
        here = Path.cwd()
        os.chdir(filled.folder)  # the path of a socket may have 107 bytes only
        try:
            endpoint.bind("model/socket")
        finally:
            os.chdir(here)
        ran = filled("backup", "model", "--json", code=3)
    assert ran.json["unreadable"] == 1
    assert filled("snapshots", "--json").json[-1]["unreadable"] == 1


def test_check_names_what_a_flipped_bit_costs(filled: Shell) -> None:
    [pack] = (path for path in (filled.folder / "repo" / "packs").rglob("*") if path.is_file())
    data = bytearray(pack.read_bytes())
    data[5000] ^= 1
    pack.chmod(0o644)
    pack.write_bytes(data)
    report = filled("check", "--data", "all", "--json", code=20).json
    assert not report["ok"]
    assert pack.name in report["damaged"][0]["object"]
    assert report["damaged"][0]["files"]
    text = filled("check", "--data", "all", code=20).out
    assert re.search(rf"Damaged: \S*{pack.name}: .*\n  snapshots: [0-9a-f]{{8}}\n  files: ", text)
    assert "To heal what the source still has: `outlast backup --full PATH`" in text
    lost = filled("restore", "latest", "--to", "out", "--json", code=20).json["error"]
    assert lost["kind"] == "corrupt"
    assert not (filled.folder / "out").exists()
    filled("backup", "--full", "model", "--name", "tiny")
    filled("restore", "latest", "--to", "out")


@pytest.mark.parametrize("newest", [False, True])
def test_in_a_damaged_log_nothing_is_hidden_and_latest_is_not_guessed(filled: Shell, newest: bool) -> None:
    filled("backup", "model", "--name", "second")
    damaged_log(filled, newest=newest)
    left = "tiny" if newest else "second"
    ran = filled("snapshots", "--json", code=20)
    [found] = ran.json
    assert found["name"] == left
    assert "warning" in ran.err and "newer snapshots" in ran.err
    assert left in filled("snapshots", code=20).out
    for arguments in (["restore", "latest", "--to", "out"], ["show", "latest"], ["diff", found["id"], "latest"]):
        refused = filled(*arguments, "--json", code=20)
        error = refused.json["error"]
        assert error["kind"] == "corrupt" and "newer snapshots" in error["message"]
        assert "outlast snapshots" in error["hint"]
    assert not (filled.folder / "out").exists()
    for arguments in (
        ["restore", found["id"], "--to", "out", "--dry-run"],
        ["restore", found["id"], "--to", "out"],
        ["show", found["id"]],
        ["diff", found["id"], found["id"]],
    ):
        ran = filled(*arguments, "--json")
        assert "newer snapshots" in ran.err and "newer snapshots" in ran.json["warnings"][-1]
        assert len(ran.json["warnings"]) > 1
    assert (filled.folder / "out" / "config.json").read_text() == "{}"
    assert "warning" in filled("show", found["id"]).err
    assert not filled("check", "--json", code=20).json["ok"]


def test_a_whole_log_gives_no_warnings(filled: Shell) -> None:
    assert "warnings" not in filled("show", "latest", "--json").json


def test_check_claims_only_what_it_read(filled: Shell) -> None:
    damaged_log(filled)
    assert "can be restored" not in filled("check", code=20).out
    assert re.search("was not read: `outlast check --data all`", filled("check", code=20).out)
    assert "was read only in part" in filled("check", "--data", "50%", code=20).out
    assert "can be restored" in filled("check", "--data", "all", code=20).out


def test_a_restore_that_leaves_something_out_is_partly_done(filled: Shell) -> None:
    with socket.socket(socket.AF_UNIX) as endpoint:
        here = Path.cwd()
        os.chdir(filled.folder)
        try:
            endpoint.bind("model/socket")
        finally:
            os.chdir(here)
        filled("backup", "model", code=3)
    for _ in range(2):
        ran = filled("restore", "latest", "--to", "out", "--json", code=3)
        assert [each["path"] for each in ran.json["skipped"]] == ["socket"]
    assert "Not as it was: socket" in filled("restore", "latest", "--to", "out", code=3).out


def test_a_traceback_only_with_debug(filled: Shell) -> None:
    assert "Traceback" in filled("--debug", "show", "ffffffff", code=1).err


# -- secrets -----------------------------------------------------------------------------------------


def test_a_passphrase_from_each_place_opens_and_never_shows(filled: Shell) -> None:
    repo = str(filled.folder / "sealed")
    secret = filled.folder / "secret"
    secret.write_text(PASSPHRASE + "\n")
    (filled.folder / "wrong").write_text("wrong")
    runs = [
        filled("init", "--encrypt", "--repo", repo, OUTLAST_PASSPHRASE=PASSPHRASE),
        filled("--json-lines", "--debug", "backup", "model", "--repo", repo, "--passphrase-file", "secret"),
        filled("snapshots", "--repo", repo, "--passphrase-command", "cat secret", "--json"),
        filled("check", "--data", "all", "--repo", repo, OUTLAST_PASSPHRASE=PASSPHRASE),
        filled("snapshots", "--repo", repo, "--json", code=12),
        filled("snapshots", "--repo", repo, "--passphrase-file", "wrong", "--json", code=12),
        filled("snapshots", "--repo", repo, "--passphrase-file", "absent", code=12),
        filled("snapshots", "--repo", repo, "--passphrase-command", "false", code=12),
        filled("snapshots", "--repo", repo, "--passphrase-command", "no-such-program", code=12),
        filled("snapshots", "--repo", repo, "--passphrase-file", "a", "--passphrase-command", "b", code=2),
    ]
    assert runs[2].json[0]["files"] == 3
    for ran in runs:
        assert PASSPHRASE not in ran.out + ran.err
    for path in (filled.folder / "sealed").rglob("*"):
        assert path.is_dir() or PASSPHRASE.encode() not in path.read_bytes()


@pytest.mark.parametrize("command", [["backup", "model"], ["snapshots"], ["check"], ["restore", "latest", "--to", "x"]])
def test_a_passphrase_for_a_repository_that_is_not_encrypted_is_refused(filled: Shell, command: list[str]) -> None:
    secret = filled.folder / "secret"
    secret.write_text(PASSPHRASE)
    before = sorted((filled.folder / "repo").rglob("*"))
    runs = [
        filled(*command, "--json", "--passphrase-file", "secret", code=21),
        filled(*command, "--json", "--passphrase-command", "cat secret", code=21),
        filled(*command, "--json", code=21, OUTLAST_PASSPHRASE=PASSPHRASE),
    ]
    for ran in runs:
        error = ran.json["error"]
        assert error["kind"] == "refused" and "not encrypted, but a passphrase was given" in error["message"]
        assert "unset" in error["hint"]
    assert sorted((filled.folder / "repo").rglob("*")) == before


def test_a_passphrase_without_encrypt_makes_no_plain_repository(shell: Shell) -> None:
    ran = shell("init", code=2, OUTLAST_PASSPHRASE=PASSPHRASE)
    assert "a passphrase was given, but not --encrypt" in ran.err
    assert not (shell.folder / "repo").exists()


def test_an_empty_passphrase_is_called_empty(shell: Shell) -> None:
    shell("init", "--encrypt", OUTLAST_PASSPHRASE=PASSPHRASE)
    assert "the passphrase is empty" in shell("snapshots", code=12, OUTLAST_PASSPHRASE="").err
    import outlast

    with pytest.raises(outlast.OutlastError, match="the passphrase is empty"):
        outlast.open(str(shell.folder / "repo"), passphrase="")


def at_terminal(shell: Shell, arguments: Sequence[str], answers: Sequence[str]) -> tuple[int, str]:
    """Run on a terminal of its own; type an answer at each prompt. Returns exit code and screen."""
    child, terminal = pty.fork()
    if not child:
        os.chdir(shell.folder)
        os.execve(sys.executable, shell.argv(*arguments), shell.environment)
    screen, waiting = b"", list(answers)
    deadline = SYSTEM_CLOCK.monotonic_seconds() + 60
    while SYSTEM_CLOCK.monotonic_seconds() < deadline:
        ready, _, _ = select.select([terminal], [], [], 1)
        try:
            piece = os.read(terminal, 4096) if ready else b""
        except OSError:
            break  # Linux: the other side is closed
        screen += piece
        if waiting and screen.rstrip(b" ").endswith(b":"):
            os.write(terminal, waiting.pop(0).encode() + b"\n")
            screen += b"\n"
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), screen.decode()


def test_a_terminal_is_asked_for_the_passphrase_and_shows_nothing_of_it(shell: Shell) -> None:
    code, screen = at_terminal(shell, ["init", "--encrypt"], [PASSPHRASE, "something else"])
    assert code == 2
    assert "differ" in screen
    code, screen = at_terminal(shell, ["init", "--encrypt"], [PASSPHRASE, PASSPHRASE])
    assert code == 0, screen
    code, more = at_terminal(shell, ["snapshots"], [PASSPHRASE])
    assert code == 0, more
    assert "No snapshots" in more
    assert PASSPHRASE not in screen + more
    plain = str(shell.folder / "plain")
    shell("init", "--repo", plain)
    code, screen = at_terminal(shell, ["snapshots", "--repo", plain], [])
    assert (code, "No snapshots" in screen) == (0, True), "that it could be asked is no passphrase given"


# -- signals and closed outputs ----------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_in_a_sentence_about_what_is_safe(filled: Shell, number: signal.Signals, code: int) -> None:
    filled("init", "--encrypt", "--repo", "sealed", OUTLAST_PASSPHRASE=PASSPHRASE)
    script = "sh -c 'touch started; exec sleep 60'"
    arguments = ["backup", "model", "--repo", "sealed", "--passphrase-command", script, "--json"]
    process = subprocess.Popen(
        filled.argv(*arguments),
        cwd=filled.folder,
        env=filled.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while not (filled.folder / "started").exists():
        assert process.poll() is None
        SYSTEM_CLOCK.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code
    error = json.loads(out)["error"]
    assert (error["kind"], error["exit_code"], err) == ("cancelled", code, b"")
    assert "What was committed is whole" in error["message"]
    filled("backup", "model", "--repo", "sealed", OUTLAST_PASSPHRASE=PASSPHRASE)


def test_a_second_signal_does_not_disturb_the_end(shell: Shell) -> None:
    code = """
import os, signal, sys
from outlast.cli import command, main

def wait(call):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        print("all was put away")

command.add_command(main.app, wait)
sys.exit(main.main(["wait"]))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (130, "all was put away\n"), ran.stderr


@pytest.mark.parametrize("form", [[], ["--json"], ["--json-lines"]])
def test_a_closed_output_does_not_end_the_work(filled: Shell, form: list[str]) -> None:
    command = shlex.join(filled.argv("backup", "model", *form))
    ran = subprocess.run(
        ["sh", "-c", f"{command} >&-"], cwd=filled.folder, env=filled.environment, stderr=subprocess.PIPE
    )
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert len(filled("snapshots", "--json").json) == 2
    assert filled("check", "--data", "all", "--json").json["ok"]


def test_a_reader_that_has_seen_enough_is_no_error(filled: Shell) -> None:
    for number in range(3000):
        (filled.folder / "model" / f"file-with-a-rather-long-name-{number}").touch()
    filled("backup", "model")
    process = subprocess.Popen(
        filled.argv("show", "latest"),
        cwd=filled.folder,
        env=filled.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    assert process.stderr
    assert process.stdout.readline().startswith(b"Snapshot ")
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=30) == 128 + signal.SIGPIPE


def test_a_full_disk_behind_standard_output_is_told(filled: Shell) -> None:
    with open("/dev/full", "wb") as full:
        ran = subprocess.run(
            filled.argv("snapshots", "--json"),
            cwd=filled.folder,
            env=filled.environment,
            stdout=full,
            stderr=subprocess.PIPE,
        )
    assert ran.returncode == 1
    assert re.fullmatch(rb"outlast: the result can't be written .+ No space left on device\..*\n.*\n?", ran.stderr)


# -- the surface -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_documents_the_exit_codes(shell: Shell, command: str) -> None:
    text = " ".join(shell(*command.split(), "--help").out.split())
    assert "Exit codes: 0 done; 1 failed; 2 wrong usage;" in text
    for option in ("--repo", "--json", "--passphrase-file", "--debug"):
        assert option in text


def test_h_is_help(shell: Shell) -> None:
    assert shell("-h").out == shell("--help").out
    assert shell("backup", "-h").out == shell("backup", "--help").out


def test_help_loads_nothing_heavy(shell: Shell) -> None:
    code = (
        "import sys; from outlast.cli.main import main; main(['--help']);"
        "print(sorted({'torch','numpy','obstore','rich','msgspec','cryptography'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"


def test_public_names_are_there_and_lazy() -> None:
    code = (
        "import sys, outlast; assert not {'torch', 'numpy', 'msgspec'} & set(sys.modules);"
        "names = [getattr(outlast, name) for name in outlast.__all__]; assert 'torch' not in sys.modules;"
        "print(outlast.__version__)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_the_same_job_from_python(tmp_path: Path) -> None:
    import outlast

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("content")
    outlast.create(str(tmp_path / "repo"), passphrase=PASSPHRASE)
    with pytest.raises(outlast.OutlastError):
        outlast.open(str(tmp_path / "repo"), passphrase="wrong")
    outlast.create(str(tmp_path / "plain"))
    for given in (PASSPHRASE, PASSPHRASE.encode):
        with pytest.raises(outlast.OutlastError, match="not encrypted, but a passphrase was given"):
            outlast.open(str(tmp_path / "plain"), passphrase=given)
    repository = outlast.open(str(tmp_path / "repo"), passphrase=lambda: PASSPHRASE.encode())
    report = outlast.back_up(repository, [str(tmp_path / "data")])
    snapshot = repository.find_snapshot(report.snapshot)
    outlast.restore(repository, outlast.plan_restore(repository, snapshot, str(tmp_path / "out")))
    assert (tmp_path / "out" / "file").read_text() == "content"
    assert outlast.check(repository, data="all").ok
    assert [view.entry.path for view in outlast.show(repository, snapshot)] == [".", "file"]
