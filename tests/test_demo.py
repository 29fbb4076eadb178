"""The demo that the README points to works to its end. It checks its own steps; this checks its story."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parent.parent / "demo" / "demo.py"


@pytest.mark.slow
def test_the_demo_tells_its_story(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, str(DEMO)],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("kill -9") == 2
    assert "every loss is equal to the last bit" in ran.stdout
    for fact in ("Damaged: packs/", "model/checkpoint.pt", "every chunk verified", "all of it"):
        assert fact in ran.stdout, ran.stdout
    assert ran.stdout.count("every byte, mode and mtime is as it was") == 2, "restored by Outlast, and without it"
    assert "No damage found" in ran.stdout.partition("--repair --from")[2], "the copy healed it"
    assert "\033" not in ran.stdout, "colour codes where nobody sees colours"
    assert list(tmp_path.iterdir()) == [], "the demo left something behind"
