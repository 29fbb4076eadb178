"""A training that is killed at any moment ends in the same state, bit for bit, as one that was left alone.

OUTLAST_KILLS=50 kills each of them so often; the seed is printed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import CASES

KILLING = Path(__file__).with_name("killing.py")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed(case: str, tmp_path: Path) -> None:
    kills, seed = os.environ.get("OUTLAST_KILLS", "4"), int.from_bytes(os.urandom(3), "big")
    ran = subprocess.run(
        [sys.executable, str(KILLING), case, kills, str(seed), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    print(ran.stdout)
    assert ran.returncode == 0, f"seed {seed}\n{ran.stdout}\n{ran.stderr[-3000:]}"
