"""The command line: what each command gives, and what bad input gets."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from shell import Shell, weights

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


def test_a_usage_error_points_to_the_help_of_its_command(filled: Shell) -> None:
    assert "`outlast restore --help` shows" in filled("restore", "latest", "--to", code=2).err
    assert "`outlast snapshots --help` shows" in filled("snapshots", "--nope", code=2).err


def test_names_are_text_however_they_arrive(filled: Shell) -> None:
    as_bytes = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert filled("backup", "model", "--name", "über", "--tag", "ort=Köln", "--json", **as_bytes).json["name"] == "über"
    assert filled("snapshots", "--name", "über", "--json").json[0]["tags"] == {"ort": "Köln"}
    assert "UTF-8" in filled("backup", "model", "--name", os.fsdecode(b"\xff"), code=2).err
    assert "UTF-8" in filled("backup", "model", "--tag", os.fsdecode(b"a=\xff"), code=2).err


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
    assert "To heal it: `outlast check --repair`" in text
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
    (filled.folder / "model" / "more").write_text("more")
    filled("backup", "model")
    damaged_log(filled)
    assert "can be restored" not in filled("check", code=20).out
    assert re.search("was not read: `outlast check --data all`", filled("check", code=20).out)
    assert "was read only in part" in filled("check", "--data", "1%", code=20).out
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
