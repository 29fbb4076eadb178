"""`outlast config` as a person meets it."""

from __future__ import annotations

import pytest
from shell import Shell

GOOD = """\
storage_tiers:
  hot: {type: nvme_ssd, url: ./hot, retention: 7_days}
  cold: {type: hdd, url: ./cold}
sources:
  models: {paths: [./model], importance: critical}
"""


@pytest.fixture
def team(shell: Shell) -> Shell:
    (shell.folder / "outlast.yaml").write_text(GOOD)
    (shell.folder / "model").mkdir()
    return shell


def test_a_good_file_is_said_to_be_good(team: Shell) -> None:
    assert team("config", "check").out == "outlast.yaml: no mistakes.\n"
    assert team("config", "check", "--json").json == {
        "path": "outlast.yaml",
        "ok": True,
        "mistakes": [],
        "warnings": [],
    }


def test_every_mistake_is_named_with_its_line(team: Shell) -> None:
    (team.folder / "bad.yaml").write_text(GOOD.replace("retention: 7_days", "retension: 7").replace("paths", "path"))
    ran = team("config", "check", "bad.yaml", code=2)
    assert ran.out.splitlines() == [
        "bad.yaml:2: storage_tiers.hot.retension: unknown key; did you mean `retention`?",
        "bad.yaml:5: sources.models.path: unknown key; did you mean `paths`?",
        "bad.yaml: 2 mistakes, 0 warnings.",
    ]
    document = team("config", "check", "--json", code=2, OUTLAST_CONFIG="bad.yaml").json
    assert not document["ok"]
    assert document["mistakes"][0] == {
        "line": 2,
        "column": 37,
        "where": "storage_tiers.hot.retension",
        "problem": "unknown key",
        "hint": "did you mean `retention`?",
    }


def test_other_commands_name_the_first_mistake_and_where_to_see_all(team: Shell) -> None:
    (team.folder / "outlast.yaml").write_text(GOOD.replace("retention", "retension").replace("critical", "high"))
    ran = team("config", "show", code=2)
    assert ran.out == ""
    place = "outlast.yaml:2: storage_tiers.hot.retension"
    assert ran.err.splitlines() == [
        f"outlast: 2 mistakes in the configuration, the first: {place}: unknown key. Nothing was done.",
        "`outlast config check outlast.yaml` names them all.",
    ]


def test_what_is_shown_can_be_used_instead(team: Shell) -> None:
    shown = team("config", "show").out
    assert "    # full: 1 day  # stage middle; critical: intervals x0.5, retention x2\n" in shown
    (team.folder / "elsewhere").mkdir()
    (team.folder / "elsewhere" / "copy.yaml").write_text(shown)
    first, second = (team("config", "show", name, "--json").json for name in ("outlast.yaml", "elsewhere/copy.yaml"))
    assert first["policy"] == second["policy"]
    assert first["intervals"]["models"]["incremental_seconds"] == 6 * 3600
    assert first["intervals"]["models"]["rpo_seconds"] == 12 * 3600


def test_warnings_are_told_and_change_no_exit_code(team: Shell) -> None:
    (team.folder / "model").rmdir()
    ran = team("config", "check")
    assert ran.out.splitlines()[0].startswith("outlast.yaml:5: sources.models.paths[0]: ")
    assert ran.out.splitlines()[0].endswith("is not there; is it spelled right? (warning)")
    assert ran.out.splitlines()[1] == "outlast.yaml: 0 mistakes, 1 warning."


def test_no_configuration_is_told_with_what_to_do(shell: Shell) -> None:
    ran = shell("config", "check", code=1)
    assert ran.err.splitlines() == [
        "outlast: the configuration outlast.yaml is not there; nothing was done.",
        "Give its path, set OUTLAST_CONFIG, or write outlast.yaml here.",
    ]
