"""What people and programs get to see: figures, escaped names, one JSON document, warnings."""

from __future__ import annotations

import doctest
import json
from collections.abc import Iterator
from typing import Any

import pytest

import outlast
from outlast.cli import text
from outlast.cli.agent import _Teller
from outlast.cli.command import CODES, Call, Options, Terminated, explain
from outlast.cli.output import JsonPrinter, TextPrinter, json_pieces
from outlast.cli.text import duration_text, path_shown, size_text, table
from outlast.clock import ManualClock
from outlast.errors import NotFound, OutlastError, StoreFull
from outlast.events import Event, Progress


def test_examples_in_docstrings_hold() -> None:
    assert doctest.testmod(text) == (0, doctest.testmod(text).attempted)
    assert doctest.testmod(outlast).failed == 0


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (1024, "1.0 KiB"),
        (102_400, "100 KiB"),
        (1_048_575, "1.0 MiB"),
        (5_000_000_000, "4.7 GiB"),
        (1 << 70, "1,024 EiB"),
    ],
)
def test_sizes_are_binary_and_short(count: int, shown: str) -> None:
    assert size_text(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0.00 s"), (0.999, "1.0 s"), (59.97, "1 min 00 s"), (3600, "1 h 00 min")]
)
def test_durations_never_show_sixty_of_anything(seconds: float, shown: str) -> None:
    assert duration_text(seconds) == shown


def test_no_name_can_move_the_cursor_or_hide() -> None:
    assert path_shown("a\x1b[2Jb\u202e\r\nc") == "a\\x1b[2Jb\\u202e\\r\\nc"
    assert path_shown("%1B%FF%25") == "\\x1b\\xff%"


def test_columns_line_up() -> None:
    lines = list(table(("NAME", "SIZE"), [("a", "1 B"), ("longer", "100 MiB")], right="SIZE"))
    assert lines == ["NAME       SIZE", "a           1 B", "longer  100 MiB"]


def printed(capfdbinary: pytest.CaptureFixture[bytes]) -> tuple[str, str]:
    out, err = capfdbinary.readouterr()
    return out.decode(), err.decode()


def test_a_list_that_fails_half_way_leaves_no_half_document(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    def files() -> Iterator[dict[str, Any]]:
        yield {"path": "a"}
        raise NotFound("the rest is gone.", hint="Look elsewhere.")

    printer = JsonPrinter()
    try:
        printer.result({"id": "1", "files": files()}, ())
    except NotFound as exc:
        printer.failure(explain(exc))
    out, _ = printed(capfdbinary)
    assert json.loads(out) == {
        "error": {"kind": "not_found", "message": "the rest is gone.", "hint": "Look elsewhere.", "exit_code": 1}
    }


def test_lazy_and_plain_lists_give_the_same_json() -> None:
    plain = {"id": "é\n", "files": [{"a": 1}, {"b": [None, True]}], "none": []}
    lazy = {"id": "é\n", "files": iter(plain["files"]), "none": iter(())}
    assert json.loads(b"".join(json_pieces(lazy))) == plain == json.loads(b"".join(json_pieces(plain)))


def test_a_name_that_is_no_text_is_still_json(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    JsonPrinter().result({"url": "repo\udcff"}, ())
    assert json.loads(printed(capfdbinary)[0]) == {"url": "repo\udcff"}


def test_json_lines_end_with_the_result(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    clock = ManualClock()
    printer = JsonPrinter(lines=True, clock=clock)
    assert printer.wants_progress
    clock.sleep(1)
    printer.progress(Progress("backup", 5, 10, 1, 2))
    printer.progress(Progress("backup", 6, 10, 1, 2))  # too soon after the last one
    printer.event(Event("file.unreadable", "a: no", {"path": "a"}))
    printer.result({"snapshot": "1"}, ())
    printer.event(Event("late", "nobody may see this after the result"))
    lines = [json.loads(line) for line in printed(capfdbinary)[0].splitlines()]
    assert lines == [
        {"progress": {"phase": "backup", "done_bytes": 5, "total_bytes": 10, "done_files": 1, "total_files": 2}},
        {"event": {"kind": "file.unreadable", "reason": "a: no", "path": "a"}},
        {"snapshot": "1"},
    ]


def test_plain_json_prints_no_events(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    printer = JsonPrinter()
    printer.event(Event("pack.damaged", "bad"))
    printer.result([], ())
    assert printed(capfdbinary) == ("[]\n", "")


def test_warnings_go_to_standard_error_escaped_and_bounded(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    printer = TextPrinter()
    printer.event(Event("pack.damaged", "pack x\x1b is damaged"))
    printer.event(Event("lock.taken", "of no interest to people"))
    for number in range(500):
        printer.event(Event("file.unreadable", f"{number}: Permission denied"))
    printer.result({}, ["done"])
    out, err = printed(capfdbinary)
    assert out == "done\n"
    assert err.startswith("outlast: warning: pack x\\x1b is damaged\noutlast: warning: 0: Permission denied\n")
    assert len(err.splitlines()) == 101
    assert "of no interest" not in err


def test_quiet_leaves_out_summaries_but_not_what_was_asked_for(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    printer = TextPrinter(quiet=True)
    printer.result({}, ["a summary"])
    printer.result({}, ["a listing"], always=True)
    assert printed(capfdbinary) == ("a listing\n", "")


def test_a_progress_bar_shows_bytes_and_lets_warnings_through(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    from outlast.cli.progress import Bar

    bar = Bar()
    bar.show(Progress("backup", 5 << 20, 10 << 20, 1, 2))
    bar.say("outlast: warning: [red]brackets[/red] stay")
    bar.show(Progress("commit"))
    bar.close()
    assert "[red]brackets[/red] stay" in printed(capfdbinary)[1]


def every_error() -> list[type[OutlastError]]:
    found, waiting = [], [OutlastError]
    while waiting:
        kind = waiting.pop()
        found.append(kind)
        waiting += kind.__subclasses__()
    return found


@pytest.mark.parametrize(
    "kind", [each for each in every_error() if "__init__" not in vars(each)], ids=lambda kind: kind.__name__
)
def test_every_error_keeps_its_kind_and_code(kind: type[OutlastError]) -> None:
    failure = explain(kind("it broke.", hint="Mend it."))
    assert failure == (kind.kind, "it broke.", "Mend it.", kind.exit_code)
    assert kind.exit_code in {*CODES, 22}


def test_what_nobody_foresaw_is_called_a_bug() -> None:
    failure = explain(KeyError("x"))
    assert (failure.kind, failure.exit_code) == ("bug", 1)
    assert "KeyError: 'x'" in failure.message
    assert "--debug" in failure.hint


def test_the_operating_system_is_quoted() -> None:
    full = explain(OSError(28, "No space left on device", b"/x"))
    assert (full.kind, full.exit_code) == (StoreFull.kind, 1)
    assert "No space left on device (/x)" in full.message


def test_stopping_says_what_is_safe() -> None:
    assert explain(KeyboardInterrupt(), "All is whole.")[1:] == ("cancelled. All is whole.", "", 130)
    assert explain(Terminated(), "All is whole.").exit_code == 143


def test_options_after_the_command_win() -> None:
    before, after = Options(repo="a", json=True), Options(repo="b", quiet=True)
    assert after.over(before) == Options(repo="b", json=True, quiet=True)
    assert Options().over(before) == before


def test_an_agent_tells_every_failure_however_long_it_runs(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    teller = _Teller(Call(Options()))
    for number in range(2500):
        teller.event(Event("job.failed" if number % 2 else "job.bug", f"failure {number}", {"tier": "warm"}))
    told = capsysbinary.readouterr().err.decode().splitlines()
    assert [line.rpartition(": ")[2] for line in told] == [f"failure {number}" for number in range(2500)]
    kept = teller.document()["failed"]
    assert len(kept) == 1000
    assert kept[-1] == {"reason": "failure 2499", "tier": "warm"}
