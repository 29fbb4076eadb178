"""The house rules, as tests. Each failure says where, and what to do about it."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "outlast"

FILE_LINES_MAX = 600
FUNCTION_LINES_MAX = 70
MODULE_NAMES_BANNED = {"utils", "helpers", "common", "misc"}
CLASS_ENDINGS_BANNED = ("Manager", "Handler")
FUNCTION_NAMES_BANNED = {"process", "handle"}
CLOCK_MODULES = {"time", "random", "secrets"}
CLOCK_METHODS = {"now", "utcnow", "today"}
# A training's own randomness is captured, given back and seeded there; nothing of ours is drawn from it.
OF_THE_TRAINING = {("checkpoint/state.py", "import random"), ("checkpoint/data.py", "import random")}
SKIPPED_FOLDERS = {"__pycache__", "build", "dist"}


def text_files() -> Iterator[Path]:
    """Every file of the project that a person could read, generated and hidden folders left out."""
    waiting = [ROOT]
    while waiting:
        for path in sorted(waiting.pop().iterdir()):
            if path.is_dir():
                hidden = path.name.startswith(".") and path.name not in {".ci", ".github"}
                if not hidden and path.name not in SKIPPED_FOLDERS and not path.name.endswith(".egg-info"):
                    waiting.append(path)
            elif path.is_file() and is_text(path):
                yield path


def is_text(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" not in file.read(4096)


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def at(path: Path, line: int = 0) -> str:
    where = path.relative_to(ROOT).as_posix()
    return f"{where}:{line}" if line else where


def complain(found: list[str], advice: str) -> None:
    assert not found, advice + "\n  " + "\n  ".join(found)


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in python_files("src"):
        yield path, ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def test_files_are_short() -> None:
    long = []
    for path in python_files("src", "tests", "bench", "demo"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > FILE_LINES_MAX:
            long.append(f"{at(path)}: {lines} lines")
    complain(long, f"A file has at most {FILE_LINES_MAX} lines: split it where its ideas part.")


def test_functions_are_short() -> None:
    long = []
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES_MAX:
                    long.append(f"{at(path, node.lineno)}: {node.name} has {lines} lines")
    complain(long, f"A function has at most {FUNCTION_LINES_MAX} lines: make its steps functions.")


def test_names_say_something() -> None:
    vague = []
    for path, tree in trees():
        parts = {*path.relative_to(SOURCE).with_suffix("").parts}
        vague += [f"{at(path)}: module {name}" for name in sorted(parts & MODULE_NAMES_BANNED)]
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name.endswith(CLASS_ENDINGS_BANNED):
                vague.append(f"{at(path, node.lineno)}: class {node.name}")
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name in FUNCTION_NAMES_BANNED:
                vague.append(f"{at(path, node.lineno)}: function {node.name}")
    complain(
        vague,
        "These names say nothing: name a thing for its noun, and a function for its deed.",
    )


def clock_reads(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Imports of the clock modules, and calls like datetime.now(): (line, what)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in CLOCK_MODULES:
                    yield node.lineno, f"import {alias.name}"
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module in CLOCK_MODULES:
            yield node.lineno, f"from {node.module} import"
        elif isinstance(node, ast.Attribute) and node.attr in CLOCK_METHODS:
            owner = ast.unparse(node.value)
            if owner.split(".")[-1] in {"datetime", "date"}:
                yield node.lineno, f"{owner}.{node.attr}"


def test_time_and_randomness_come_from_the_clock() -> None:
    readers = [
        f"{at(path, line)}: {what}"
        for path, tree in trees()
        if path != SOURCE / "clock.py"
        for line, what in clock_reads(tree)
        if (path.relative_to(SOURCE).as_posix(), what) not in OF_THE_TRAINING
    ]
    complain(readers, "Take an outlast.clock.Clock as an argument, so that tests own time and randomness.")


def test_nothing_is_left_for_later() -> None:
    marks = re.compile(r"\b(?:" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X")) + r")\b")
    left = [
        f"{at(path, number)}: {line.strip()[:100]}"
        for path in text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if marks.search(line)
    ]
    complain(left, "Do it now, or open an issue and delete the note.")


def build_machine_paths() -> re.Pattern[str]:
    """Folders that exist on one machine only: homes, this checkout, this interpreter's environment."""
    here = {str(path) for path in (ROOT, Path(sys.prefix), Path.home()) if len(path.parts) > 2}
    fixed = [re.escape(path) + r"(?![\w.-])" for path in sorted(here)]
    return re.compile(r"(?<![\w.~$}/-])(?:" + "|".join([*fixed, r"/(?:home|Users)/\w+/", r"/root/"]) + ")")


def test_no_path_of_a_build_machine() -> None:
    paths = build_machine_paths()
    named = [
        f"{at(path, number)}: {found[0]}"
        for path in text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if path != Path(__file__).resolve() and (found := paths.search(line))
    ]
    complain(named, "A path of somebody's machine says nothing to readers: write a relative one.")


@pytest.mark.parametrize("command", ["ruff check", "ruff format --check", "mypy", "lint-imports", "tests/test_tidy.py"])
def test_make_check_runs_every_tool(command: str) -> None:
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").split("\ncheck:")[1].split("\n\n")[0]
    assert command in recipe, f"`make check` no longer runs {command!r}: put it back into the Makefile."


def test_every_rule_bites() -> None:
    """The rules above see what they forbid (a rule that can't fail is a defect)."""
    tree = ast.parse("import time\nfrom random import Random\nx = datetime.now()\ny = datetime.datetime.utcnow()\n")
    assert [line for line, _ in clock_reads(tree)] == [1, 2, 3, 4]
    assert build_machine_paths().search("see /home/someone/outlast")
    assert build_machine_paths().search(f"see {ROOT}/src") or len(ROOT.parts) <= 2
    with pytest.raises(AssertionError, match="Split"):
        complain(["a.py: 601 lines"], "Split it.")
