"""The command line as a process: secrets, signals, closed outputs, help, the names it is made of."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from shell import COMMANDS, PASSPHRASE, Shell

from outlast.clock import SYSTEM_CLOCK

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

main.app.add_command(command.Command("wait", callback=wait))
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


@pytest.mark.parametrize("arguments", [("snapshots", "--json"), ("check", "--json-lines")])
def test_a_full_disk_behind_standard_output_is_told(filled: Shell, arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full:
        ran = subprocess.run(
            filled.argv(*arguments),
            cwd=filled.folder,
            env=filled.environment,
            stdout=full,
            stderr=subprocess.PIPE,
        )
    assert ran.returncode == 1
    assert re.fullmatch(rb"outlast: the result can't be written .+ No space left on device\..*\n.*\n?", ran.stderr)


def test_a_signal_before_a_command_begins_gives_its_code_too(shell: Shell) -> None:
    script = """
import os, signal, sys
from outlast.cli import command, main
def interrupted(*_):
    os.kill(os.getpid(), signal.SIGTERM if "--debug" in sys.argv else signal.SIGINT)
command._refuse_empty = interrupted
sys.exit(main.main())
"""
    for arguments, code in ((["snapshots"], 130), (["snapshots", "--debug"], 143)):
        ran = subprocess.run([sys.executable, "-c", script, *arguments], env=shell.environment, capture_output=True)
        assert (ran.returncode, b"bug" in ran.stderr) == (code, False), ran.stderr


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
        "names = {name for name in outlast.__all__ if name not in ('Run', 'PendingSave')};"
        "found = [getattr(outlast, name) for name in names]; assert 'torch' not in sys.modules;"
        "assert outlast.Run and outlast.PendingSave and 'torch' in sys.modules;"
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
