"""Says at the end of a run how many examples were run, and which ones the pages exempt."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    facts = [
        dict(report.user_properties)
        for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
        if "/docs/" in report.nodeid
    ]
    run = sum(int(fact.get("examples_run", 0)) for fact in facts)
    exempt = [where for fact in facts for where in str(fact.get("examples_exempt", "")).split()]
    if run or exempt:
        named = f": {', '.join(exempt)}" if exempt else ""
        terminalreporter.write_line(f"documentation: {run} examples run, {len(exempt)} marked `not run`{named}")
