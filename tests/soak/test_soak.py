"""Ten seconds of what `make soak` does for as long as it is told to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_short_soak() -> None:
    command = [sys.executable, str(Path(__file__).with_name("run.py")), "--minutes", "0.17", "--seed", "20250101"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "soak: seed 20250101" in done.stdout
    assert "snapshots compared" in done.stdout
