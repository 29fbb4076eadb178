"""The real command line, as a process of its own, in one folder with one repository in the environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

PASSPHRASE = "correct horse battery staple"
COMMANDS = [
    *("init", "backup", "snapshots", "show", "diff", "restore", "check", "forget", "prune", "copy", "runs"),
    *("doctor store", "doctor resume", "config check", "config show"),
    *("key list", "key add", "key remove", "key rotate", "repo stats", "repo log", "repo verify-log"),
]


class Ran:
    """A finished command; `json` is its one document."""

    def __init__(self, ran: subprocess.CompletedProcess[bytes]) -> None:
        self.code = ran.returncode
        self.out = ran.stdout.decode()
        self.err = ran.stderr.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Shell:
    """Runs commands in one folder, with one repository in the environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {name: text for name, text in os.environ.items() if not name.startswith("OUTLAST_")}
        self.environment |= {"OUTLAST_REPO": str(folder / "repo"), "COLUMNS": "100"}

    def argv(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "outlast", *arguments]

    def __call__(self, *arguments: str, code: int = 0, without: str = "", **environment: str) -> Ran:
        env = {name: text for name, text in (self.environment | environment).items() if name != without}
        ran = Ran(
            subprocess.run(
                self.argv(*arguments),
                cwd=self.folder,
                env=env,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=120,
            )
        )
        assert ran.code == code, f"outlast {' '.join(arguments)} gave {ran.code}:\n{ran.out}\n{ran.err}"
        assert "Traceback" not in ran.err or "--debug" in arguments
        return ran


def weights(path: Path, scale: float, **more: np.ndarray) -> None:
    state = {"layer.weight": np.arange(3000, dtype=np.float32), "head.weight": np.full((20, 50), scale, np.float32)}
    save_file({**state, **more}, path)
