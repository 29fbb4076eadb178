"""Says at the end of a run how many states the enumeration has looked at."""

from __future__ import annotations

import sys

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    crashing = sys.modules.get("crashing")
    if crashing is not None and crashing.TOTAL.cuts:
        total = crashing.TOTAL
        terminalreporter.write_line(
            f"crashes: {total.cuts} cuts, {total.outcomes} outcomes, {total.distinct} different states examined"
        )
