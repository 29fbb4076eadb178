"""The documentation is true: every command is described, every example runs and prints what it says.

A page is README.md or a file under docs/. Its fenced `console` and `python` blocks run from top to
bottom in one scratch folder per page; variables exported and folders entered by one block hold for
the next. In a `console` block lines starting with "$ " are commands (bash, "> " continues one), and
what follows is the output expected, compared after numbers, ids and times are masked; a line "..."
stands for any lines; a command without output below it may print anything. A block after the comment
<!-- not run --> is left out, and counted at the end of the test run.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,})(?P<language>[\w-]*)")
EXEMPT = "<!-- not run -->"
EXAMPLE_SECONDS_MAX = 120

MASKS = [
    (r"(?<![\w./])/[\w.+@/-]*\w", "PATH"),
    (r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:\d\d| UTC)?", "TIME"),
    (r"\b(?=[0-9a-f]*\d)[0-9a-f]{8,}\b", "ID"),
    (r"\b\d[\d.,]*(e-?\d+)?\s?([kKMGT]i?)?(B|bytes?)(/s)?(?!\w)", "SIZE"),
    (r"\b\d[\d.,]*\s?(ns|ms|s|seconds?|min(utes)?|h)\b", "SPAN"),
    (r"\b\d+:\d\d(:\d\d)?\b", "SPAN"),
    (r"\b\d[\d.,]*", "N"),
    (r"SPAN( SPAN)+", "SPAN"),
    (r"[─━═-]{3,}", "---"),
    (r"\s+", " "),
]


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    exempt: bool

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"


@dataclass
class Example:
    """A command of a console block, with the output the page promises."""

    command: str
    expected: list[str] = field(default_factory=list)


def blocks(page: Path) -> Iterator[Block]:
    """The page's `console` and `python` blocks, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    number, exempt = 0, False
    while number < len(lines):
        fence = FENCE.match(lines[number])
        if not fence:
            exempt = lines[number].strip() == EXEMPT or (exempt and not lines[number].strip())
            number += 1
            continue
        end = number + 1
        while end < len(lines) and not lines[end].strip().startswith(fence["ticks"]):
            end += 1
        text = textwrap.dedent("\n".join(lines[number + 1 : end])) + "\n"
        if fence["language"] in {"console", "python"}:
            yield Block(page, number + 1, fence["language"], text, exempt)
        number, exempt = end + 1, False


def examples(text: str) -> list[Example]:
    found: list[Example] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append(Example(line[2:]))
        elif line.startswith("> ") and found and not found[-1].expected:
            found[-1].command += "\n" + line[2:]
        elif found and found[-1].command.endswith("\\") and not found[-1].expected:
            found[-1].command += "\n" + line
        elif found:
            found[-1].expected.append(line)
    return found


def mask(line: str) -> str:
    for pattern, name in MASKS:
        line = re.sub(pattern, name, line)
    return line.strip()


def fits(expected: list[str], actual: list[str]) -> bool:
    """Whether the masked lines agree, "..." standing for any number of lines."""
    if not expected:
        return not actual
    if expected[0] == "...":
        return any(fits(expected[1:], actual[start:]) for start in range(len(actual) + 1))
    return bool(actual) and expected[0] == actual[0] and fits(expected[1:], actual[1:])


class Terminal:
    """A bash that keeps its folder and its exported variables from command to command."""

    def __init__(self, scratch: Path) -> None:
        self.folder = scratch / "page"
        self.state = scratch / "state"
        self.folder.mkdir()
        self.state.write_text(f"cd {shlex.quote(str(self.folder))}\n")
        programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        kept = {name: value for name, value in os.environ.items() if not name.startswith("OUTLAST_")}
        self.environment = kept | {
            "PATH": programs,
            "HOME": str(scratch),
            "COLUMNS": "100",
            "TERM": "dumb",
            "NO_COLOR": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def run(self, command: str) -> tuple[int, str]:
        state = shlex.quote(str(self.state))
        # The state is written by the trap, so that `exit` and a failing command keep it too.
        script = f'source {state}\ntrap \'{{ export -p; printf "cd %q\\n" "$PWD"; }} >{state}\' EXIT\n{command}\n'
        ran = subprocess.run(
            ["bash", "-c", script],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=EXAMPLE_SECONDS_MAX,
        )
        return ran.returncode, ran.stdout.decode("utf-8", "replace")

    def python(self, text: str) -> tuple[int, str]:
        script = self.state.with_name("example.py")
        script.write_text(text, encoding="utf-8")
        return self.run(f"{shlex.quote(sys.executable)} {shlex.quote(str(script))}")


def run_console(block: Block, terminal: Terminal) -> None:
    for example in examples(block.text):
        code, output = terminal.run(example.command)
        shown = f"{block.where}\n$ {example.command}\n{output}"
        assert code == 0, f"The example ended with exit code {code}:\n{shown}"
        expected = [mask(line) for line in example.expected if line.strip()]
        actual = [mask(line) for line in output.splitlines() if line.strip()]
        if expected and not fits(expected, actual):
            difference = "\n".join(difflib.unified_diff(expected, actual, "the page", "the program", lineterm=""))
            pytest.fail(f"The page shows another output than the program gives:\n{shown}\n{difference}")


WITH_EXAMPLES = [page for page in PAGES if page.exists() and list(blocks(page))]


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_examples_run(page: Path, tmp_path: Path, record_property: Any) -> None:
    found = list(blocks(page))
    due = [block for block in found if not block.exempt]
    record_property("examples_run", len(due))
    record_property("examples_exempt", " ".join(block.where for block in found if block.exempt))
    terminal = Terminal(tmp_path)
    for block in due:
        if block.language == "console":
            run_console(block, terminal)
        else:
            code, output = terminal.python(block.text)
            assert code == 0, f"The example at {block.where} ended with exit code {code}:\n{output}"


def commands(command: Any, path: tuple[str, ...]) -> Iterator[str]:
    """The full names of all commands below a click command, groups left out."""
    children = getattr(command, "commands", None)
    if children is None:
        yield " ".join(path)
        return
    for name, child in sorted(children.items()):
        if not child.hidden:
            yield from commands(child, (*path, name))


def test_every_command_is_documented() -> None:
    from outlast.cli.main import app

    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.exists())
    names = list(commands(app, ("outlast",)))
    assert len(names) >= 8, names
    missing = [name for name in names if not re.search(re.escape(name) + r"(?![\w-])", text)]
    assert not missing, f"Describe these commands in README.md or under docs/: {', '.join(missing)}"


def test_the_readme_shows_the_main_job() -> None:
    """Backing up and restoring is run from the README itself, never only described."""
    shown = [
        example.command
        for block in blocks(ROOT / "README.md")
        if block.language == "console" and not block.exempt
        for example in examples(block.text)
    ]
    for verb in ("init", "backup", "restore", "check"):
        runs = any(re.match(rf"outlast\b.*\b{verb}\b", command) for command in shown)
        assert runs, f"No console block of README.md runs `$ outlast {verb}`: show it."


def test_outputs_are_compared_loosely_but_compared() -> None:
    promised = ["snapshot 3fa9c1d27b", "12 files, 86.7 MB in 0.4 s", "...", "done"]
    printed = ["snapshot 00112233aa", "9 files, 1.2 GiB in 12.0 s", "anything", "done"]
    expected = [mask(line) for line in promised]
    assert fits(expected, [mask(line) for line in printed])
    assert not fits(expected, [mask(line) for line in ["snapshot 00112233aa", "9 folders, 1 B in 2 s", "done"]])


def test_blocks_are_found_and_exempted(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    exempt = f"{EXEMPT}\n\n```python\n1/0\n```\n"
    page.write_text(f"```console\n$ true\n```\n{exempt}```sh\nfalse\n```\n~~~python\n2\n~~~\n")
    found = [(block.line, block.language, block.exempt) for block in blocks(page)]
    assert found == [(1, "console", False), (6, "python", True), (12, "python", False)]


def test_a_terminal_keeps_its_folder_and_variables(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path)
    assert terminal.run("mkdir deep && cd deep && export COLOUR='dark blue'; false")[0] == 1
    assert terminal.run('echo "$COLOUR $(basename "$PWD")"') == (0, "dark blue deep\n")
