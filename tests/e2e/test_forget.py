"""Forgetting snapshots: what a policy keeps stays whole, the last of a name is safe, and two at once don't harm."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import pytest
from shell import Ran, Shell

from outlast.backup.create import create
from outlast.clock import ManualClock
from outlast.errors import InvalidInput, NotFound, Refused
from outlast.records import time_ns
from outlast.repo.forget import execute, plan
from outlast.repo.repository import Repository
from outlast.repo.retention import Policy
from outlast.store.local import LocalStore

DAYS = ("2025-12-28", "2025-12-31", "2026-01-01")


seeds = count()


def repository(shell: Shell, now: str = "2026-02-01T00:00:00Z") -> Repository:
    """The repository as a process of its own would open it at that time."""
    return Repository.open(
        LocalStore(str(shell.folder / "repo")), clock=ManualClock(seed=next(seeds), now_ns=time_ns(now))
    )


@pytest.fixture(scope="module")
def dated_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with two snapshots of `run` on each of three days, around the end of a year."""
    shell = Shell(tmp_path_factory.mktemp("dated"))
    shell("init")
    source = shell.folder / "run"
    source.mkdir()
    for day in DAYS:
        for hour in (8, 20):
            (source / "step").write_text(f"{day} {hour}")
            at = repository(shell, f"{day}T{hour:02}:00:00Z")
            create(at, [bytes(source)], tags={"prod": "1"} if (day, hour) == (DAYS[0], 8) else {})
    return shell.folder


@pytest.fixture
def dated(shell: Shell, dated_template: Path) -> Shell:
    shutil.copytree(dated_template, shell.folder, dirs_exist_ok=True)
    return shell


def ids(shell: Shell) -> list[str]:
    return [each["id"] for each in shell("snapshots", "--json").json]


def entries(shell: Shell) -> list[str]:
    return sorted(path.name for path in (shell.folder / "repo" / "log").iterdir())


def content(shell: Shell, snapshot: str) -> str:
    shell("restore", snapshot, "--to", "back", "--overwrite")
    return (shell.folder / "back" / "step").read_text()


def rows(ran: Ran) -> list[tuple[str, ...]]:
    """(decision, reasons) of each line of the table."""
    cells = [re.split(r"  +", line, maxsplit=4) for line in ran.out.splitlines()]
    return [tuple(line[3:]) for line in cells if len(line) == 5]


# -- policies ----------------------------------------------------------------------------------------

RULES = ("--keep-daily", "2", "--keep-weekly", "2", "--keep-tag", "prod")
DECIDED = [
    ("DECISION", "REASONS"),
    ("keep", "tag prod"),
    ("keep", "weekly 2025-W52"),
    ("forget", "no rule keeps it"),
    ("keep", "daily 2025-12-31"),
    ("forget", "no rule keeps it"),
    ("keep", "daily 2026-01-01, weekly 2026-W01"),
]


def test_a_dry_run_tells_each_decision_and_changes_nothing(dated: Shell) -> None:
    before, log = ids(dated), entries(dated)
    ran = dated("forget", *RULES, "--dry-run")
    assert rows(ran) == DECIDED
    assert ran.out.splitlines()[-1] == "Would forget 2 of 6 snapshots. Nothing was changed."
    assert before[2][:8] in ran.out.splitlines()[3] and "2025-12-31 08:00:00" in ran.out.splitlines()[3]
    document = dated("forget", *RULES, "--dry-run", "--json").json
    assert (document["dry_run"], document["forgotten"]) == (True, [before[2], before[4]])
    assert (ids(dated), entries(dated)) == (before, log)


def test_what_is_kept_restores_and_what_is_forgotten_is_gone(dated: Shell) -> None:
    before = ids(dated)
    ran = dated("forget", *RULES)
    assert rows(ran) == DECIDED
    assert ran.out.splitlines()[-1] == "Forgot 2 of 6 snapshots. `outlast prune` frees the space."
    kept = [before[0], before[1], before[3], before[5]]
    assert ids(dated) == kept
    assert [content(dated, each) for each in kept] == [
        f"{DAYS[0]} 8",
        f"{DAYS[0]} 20",
        f"{DAYS[1]} 20",
        f"{DAYS[2]} 20",
    ]
    for gone in (before[2], before[4]):
        assert "no snapshot has the id" in dated("restore", gone, "--to", "none", code=1).err
        assert "no snapshot has the id" in dated("show", gone[:8], code=1).err
    assert dated("check", "--data", "all", "--json").json["ok"]
    log = entries(dated)
    assert dated("forget", *RULES, "--json").json["forgotten"] == []
    assert entries(dated) == log, "where nothing is forgotten nothing is written"
    dated("backup", "run")
    assert content(dated, "latest") == f"{DAYS[2]} 20"


def test_the_one_json_document(dated: Shell) -> None:
    before = ids(dated)
    document = dated("forget", "--keep-last", "5", "--json").json
    fields = {"dry_run", "refused", "snapshots", "forgotten", "decisions"}
    assert document.keys() == fields | {"already_gone", "entry"}
    assert dated("forget", "--keep-last", "5", "--dry-run", "--json").json.keys() == fields, "one script reads both"
    assert (document["dry_run"], document["snapshots"], document["forgotten"]) == (False, 6, [before[0]])
    assert f"{document['entry']:020d}" == entries(dated)[-1]
    assert [each["snapshot"] for each in document["decisions"]] == before
    assert document["decisions"][1] == {
        "snapshot": before[1],
        "name": "run",
        "time": f"{DAYS[0]}T20:00:00.000000Z",
        "keep": True,
        "reasons": ["last 5 of 5"],
    }


def test_each_option_is_its_rule(dated: Shell) -> None:
    def kept(*arguments: str) -> list[int]:
        decisions = dated("forget", *arguments, "--dry-run", "--json").json["decisions"]
        return [number for number, each in enumerate(decisions) if each["keep"]]

    assert kept("--keep-last", "1") == [5]
    assert kept("--keep-hourly", "3") == [3, 4, 5]
    assert kept("--keep-daily", "3") == [1, 3, 5]
    assert kept("--keep-weekly", "9") == [1, 5]
    assert kept("--keep-monthly", "9") == [3, 5]
    assert kept("--keep-within", "1d11h") == [3, 4, 5]
    assert kept("--keep-tag", "prod=1", "--keep-last", "0", "--keep-daily", "1") == [0, 5]


def test_only_one_name_is_touched(dated: Shell) -> None:
    dated("backup", "run", "--name", "other")
    dated("backup", "run", "--name", "other")
    every = ids(dated)
    dated("forget", "--name", "other", "--keep-last", "1")
    assert ids(dated) == [*every[:6], every[7]]
    assert "no snapshot is named none" in dated("forget", "--name", "none", "--keep-last", "1", code=1).err


def test_a_tag_that_no_snapshot_has_is_told(dated: Shell) -> None:
    ran = dated("forget", "--keep-tag", "prdo", "--keep-daily", "1", "--dry-run", "--json")
    assert "warning: no snapshot has the tag 'prdo', so it keeps nothing." in ran.err
    assert ran.json["warnings"] == ["no snapshot has the tag 'prdo', so it keeps nothing."]


# -- the last snapshot of a name ---------------------------------------------------------------------


def test_the_last_snapshot_of_a_name_is_kept_unless_it_is_said_twice(dated: Shell) -> None:
    dated("backup", "run", "--name", "alone")
    before, log = ids(dated), entries(dated)
    for arguments, name in (
        ([before[-1]], "alone"),
        (["latest", "--name", "alone"], "alone"),
        (before[:6], "run"),
        (["--keep-tag", "prod"], "alone"),
        (["--keep-tag", "none", "--name", "run"], "run"),
    ):
        ran = dated("forget", *arguments, code=21)
        assert ran.out == ""
        assert f"the last snapshot of {name}. Nothing was forgotten." in ran.err and "--allow-empty" in ran.err
        shown = dated("forget", *arguments, "--dry-run", code=21)
        assert f"It would be refused: this would forget the last snapshot of {name}." in shown.out and rows(shown)
    assert dated("forget", "latest", "--name", "alone", "--json", code=21).json["error"]["kind"] == "refused"
    document = dated("forget", "latest", "--name", "alone", "--dry-run", "--json", code=21).json
    assert (document["refused"], document["forgotten"]) == (
        "this would forget the last snapshot of alone.",
        [before[-1]],
    )
    assert (ids(dated), entries(dated)) == (before, log)
    assert "refused" not in dated("forget", before[-1], "--allow-empty", "--dry-run").out
    assert "Forgot 1 snapshot." in dated("forget", before[-1], "--allow-empty").out
    assert ids(dated) == before[:-1]
    dated("forget", "--keep-tag", "none", "--allow-empty")
    assert ids(dated) == []
    assert "Forgot no snapshot." in dated("forget", "--keep-last", "1").out
    assert dated("check", "--json").json["ok"]


# -- snapshots by their ids --------------------------------------------------------------------------


def test_named_snapshots_go_all_or_none(dated: Shell) -> None:
    before = ids(dated)
    assert "no snapshot has the id 'ffffffff'" in dated("forget", before[0], "ffffffff", code=1).err
    assert "no snapshot is named other" in dated("forget", before[0], "--name", "other", code=1).err
    assert ids(dated) == before
    ran = dated("forget", before[0][:8].upper(), before[0], "latest")
    assert rows(ran) == [("DECISION", "REASONS"), ("forget", "it was named"), ("forget", "it was named")]
    assert ids(dated) == before[1:5]
    assert dated("forget", before[1], "--quiet").out == ""
    assert ids(dated) == before[2:5]


BAD: dict[str, tuple[Sequence[str], str]] = {
    "nothing": ([], "nothing says which snapshots"),
    "only a name": (["--name", "run"], "nothing says which snapshots"),
    "only --allow-empty": (["--allow-empty"], "nothing says which snapshots"),
    "both": (["latest", "--keep-last", "1"], "both snapshots and rules"),
    "only zeros": (["--keep-last", "0", "--keep-daily", "0", "--allow-empty"], "no rule that keeps anything"),
    "a negative number": (["--keep-last", "-1"], "--keep-last"),
    "no number": (["--keep-daily", "many"], "--keep-daily"),
    "an empty tag": (["--keep-tag", "", "--allow-empty"], "--keep-tag is empty"),
    "a blank tag": (["--keep-tag", " ", "--keep-last", "1", "--allow-empty"], "not KEY or KEY=VALUE"),
    "a tag without a key": (["--keep-tag", "=1", "--allow-empty"], "not KEY or KEY=VALUE"),
    "a tag without its value": (["--keep-tag", "prod=", "--allow-empty"], "not KEY or KEY=VALUE"),
    "an empty name": (["--name", "", "--keep-last", "1"], "--name is empty"),
    "an empty snapshot": ([""], "SNAPSHOT is empty"),
    "a short id": (["abc"], "too short"),
    "no duration": (["--keep-within", "30", "--allow-empty"], "'30' can't be understood"),
    "no time at all": (["--keep-within", "0d", "--allow-empty"], "'0d' can't be understood"),
}


def test_wrong_usage_forgets_nothing(dated: Shell) -> None:
    before = ids(dated)
    for case, (arguments, message) in BAD.items():
        ran = dated("forget", *arguments, code=2)
        assert message in ran.err, case
        assert ran.out == "", case
    assert ids(dated) == before


def test_nothing_is_forgotten_in_a_repository_that_is_not_whole(dated: Shell) -> None:
    assert "no repository" in dated("forget", "--keep-last", "1", "--repo", "none", code=10).err
    first = min((dated.folder / "repo" / "log").iterdir())
    first.chmod(0o644)
    first.write_bytes(first.read_bytes().replace(b'"seq"', b'"sEq"'))
    log = entries(dated)
    assert dated("forget", "--keep-last", "1", "--json", code=20).json["error"]["kind"] == "corrupt"
    assert entries(dated) == log


# -- two at once -------------------------------------------------------------------------------------


def test_two_at_once_can_not_do_together_what_neither_may_alone(dated: Shell) -> None:
    before = ids(dated)
    one, other = repository(dated), repository(dated)
    first, second = plan(one, ids=before[:3]), plan(other, ids=before[3:])
    assert (first.refusal, second.refusal) == ("", "")
    assert execute(one, first).forgotten == tuple(before[:3])
    with pytest.raises(Refused, match="last snapshot of run"):
        execute(other, second)
    assert ids(dated) == before[3:]
    assert execute(other, second, allow_empty=True).forgotten == tuple(before[3:])
    assert ids(dated) == []


def test_what_another_forgot_meanwhile_is_left_out(dated: Shell) -> None:
    before = ids(dated)
    first, second, third = repository(dated), repository(dated), repository(dated)
    plans = [plan(each, policy=Policy(daily=1)) for each in (first, second, third)]
    execute(first, plan(first, ids=before[:2]))
    report = execute(second, plans[1])
    assert (report.forgotten, report.already_gone) == (tuple(before[2:5]), tuple(before[:2]))
    log = entries(dated)
    nothing = execute(third, plans[2])
    assert (nothing.forgotten, nothing.already_gone, nothing.entry) == ((), tuple(before[:5]), 0)
    assert entries(dated) == log
    assert ids(dated) == before[5:]


def test_processes_that_forget_each_others_rest_leave_one(dated: Shell) -> None:
    before = ids(dated)
    asked = (before[:3], before[3:], before[1:5])
    processes = [
        subprocess.Popen(
            dated.argv("forget", *wanted),
            cwd=dated.folder,
            env=dated.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for wanted in asked
    ]
    left, said = set(before), []
    for wanted, process in zip(asked, processes, strict=True):
        out, err = process.communicate(timeout=120)
        said.append(f"{process.returncode} {out} {err}")
        # 1: a process that came late no longer found what it was asked for.
        assert process.returncode in (0, 1, 21), said
        if process.returncode == 0:
            left -= set(wanted)
    assert left and left == set(ids(dated)), said
    assert dated("check", "--json").json["ok"]


def test_a_plan_wants_either_snapshots_or_a_policy(dated: Shell) -> None:
    opened = repository(dated)
    with pytest.raises(InvalidInput, match="both"):
        plan(opened, policy=Policy(last=1), ids=["latest"])
    with pytest.raises(InvalidInput, match="nothing says"):
        plan(opened)
    with pytest.raises(NotFound, match="no snapshot is named none"):
        plan(opened, policy=Policy(last=1), name="none")


def test_a_clock_that_runs_ahead_costs_no_snapshot(dated: Shell) -> None:
    before = ids(dated)
    create(repository(dated, "2999-01-01T00:00:00Z"), [bytes(Path(dated.folder / "run"))])
    ran = dated("forget", "--keep-last", "1", "--keep-weekly", "1")
    assert rows(ran)[-2:] == [
        ("keep", "last 1 of 1, weekly 2026-W01"),
        ("keep", "its time lies in the future: kept, and not counted"),
    ]
    assert len(ids(dated)) == 2 and ids(dated)[0] == before[5]


def test_a_snapshot_from_the_future_is_pointed_out(dated: Shell) -> None:
    wrong = repository(dated, "2999-01-01T00:00:00Z")
    report = create(wrong, [bytes(dated.folder / "run")])
    ran = dated("snapshots")
    assert f"snapshot {report.snapshot[:8]} of run lies in the future (2999-01-01 00:00:00)" in ran.err
    dated("forget", report.snapshot[:8])
    assert dated("snapshots").err == ""
