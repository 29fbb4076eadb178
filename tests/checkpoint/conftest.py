"""Runs that a test leaves open answer signals no longer when it is over."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _nobody_answers() -> Iterator[None]:
    answered = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [(each, signal.getsignal(each)) for each in answered], sys.excepthook
    yield
    for each, answer in before[0]:
        signal.signal(each, answer)
    sys.excepthook = before[1]
