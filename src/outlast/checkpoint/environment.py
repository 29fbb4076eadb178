"""What a training runs on, as far as it may change the numbers: recorded with each checkpoint, compared at resume.

Nothing here is secret: of the environment only named variables are read, and values in the command line that look
like secrets are masked.
"""

from __future__ import annotations

import os
import platform
import re
import socket
import subprocess
import sys
from importlib import metadata
from typing import Any

import numpy as np
import torch

_VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG", "CUDA_VISIBLE_DEVICES", "NCCL_ALGO", "NCCL_PROTO", "NVTE_ALLOW_NONDETERMINISTIC_ALGO",
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONHASHSEED", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)  # fmt: skip
_SECRET_NAME = re.compile(r"(?i)(pass(word|phrase|wd)?|secret|token|api[-_]?key|access[-_]?key|credential|auth)")
_SECRET_VALUE = re.compile(r"(hf_|sk-|ghp_|github_pat_|glpat-|xox[a-z]-|AKIA|ASIA|eyJ)[\w.-]{8,}|//[^/@\s]*:[^/@\s]*@")
MASKED = "***"
_GIT_SECONDS = 5.0


def fingerprint() -> dict[str, Any]:
    """What decides about bits: versions, devices, flags. Two runs of equal fingerprints may be compared bit for bit."""
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": str(np.__version__),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count())] if cuda else [],
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,  # type: ignore[no-untyped-call]
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        "matmul_precision": torch.get_float32_matmul_precision(),
        "default_dtype": str(torch.get_default_dtype()),
        "variables": {name: _printable(os.environ[name]) for name in _VARIABLES if name in os.environ},
    }


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each thing that is not as it was."""
    return [
        f"{name}: was {saved.get(name)}, is {now.get(name)}"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]


def origin() -> dict[str, Any]:
    """Where it comes from, for people: commit, command, host, packages. Changes no numbers."""
    return {
        "command": masked([sys.executable, *sys.argv]),
        "host": socket.gethostname(),
        "git": _git(),
        "packages": {each.metadata["Name"]: each.version for each in metadata.distributions()},
    }


def masked(arguments: list[str]) -> list[str]:
    """The command line without what looks like a secret.

    >>> masked(["train.py", "--api-key", "abc", "--token=xyz", "s3://me:pw@host/x"])
    ['train.py', '--api-key', '***', '--token=***', 's3:***host/x']
    """
    found: list[str] = []
    hides_next = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if hides_next and not argument.startswith("-"):
            found.append(MASKED)
        elif equals and _SECRET_NAME.search(name):
            found.append(f"{_printable(name)}={MASKED}")
        else:
            found.append(_printable(_SECRET_VALUE.sub(MASKED, argument)))
        hides_next = argument.startswith("-") and not equals and _SECRET_NAME.search(argument) is not None
    return found


def _printable(text: str) -> str:
    """Bytes that are no UTF-8, which Python has as lone surrogates, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _git() -> dict[str, Any] | None:
    """The commit of the folder that the command runs in, and whether files differ from it."""
    try:
        commit = _said("git", "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_said("git", "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _said(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True)
    return done.stdout.strip()
