"""The real command line, as a process of its own, over a repository that trainings write to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Ran:
    """A finished command."""

    def __init__(self, ran: subprocess.CompletedProcess[bytes]) -> None:
        self.code, self.out, self.err = ran.returncode, ran.stdout.decode(), ran.stderr.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def outlast(repository: Path, *arguments: str, code: int = 0, **environment: str) -> Ran:
    return program(repository, "-m", "outlast", *arguments, code=code, **environment)


def program(repository: Path, *arguments: str, code: int = 0, **environment: str) -> Ran:
    """Run Python with these arguments, in the folder of these tests."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("OUTLAST_")}
    ran = Ran(
        subprocess.run(
            [sys.executable, *arguments],
            cwd=HERE,
            env={**kept, "OUTLAST_REPO": str(repository), "COLUMNS": "100", **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=120,
        )
    )
    assert ran.code == code, f"{' '.join(arguments)} gave {ran.code}:\n{ran.out}\n{ran.err}"
    return ran
