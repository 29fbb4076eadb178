"""Runs one command, or asks a program that goes on, and measures it, after the disk is quiet, and cold where asked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Command:
    """What to run, where, and what must be cold before."""

    argv: list[str]
    folder: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)
    cold: Path | None = None
    """drop every file below from the page cache first"""


@dataclass(frozen=True)
class Outcome:
    """One measured run. Memory is the peak of the process and its children (ru_maxrss of wait4)."""

    wall_seconds: float
    settle_seconds: float
    """how long a sync took afterwards: 0 for a program that wrote durably"""
    cpu_seconds: float
    rss_bytes: int
    stdout: str


class Companion:
    """A program that holds something large and answers each line of text with a JSON object."""

    def __init__(self, argv: list[str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  open as long as the program runs
        self._argv = argv
        self._child = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, bufsize=1
        )
        self.facts = self._answer()

    def ask(self, line: str) -> dict[str, Any]:
        """Raises RuntimeError with its last words when it has ended."""
        assert self._child.stdin is not None
        self._child.stdin.write(line + "\n")
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            self._errors.seek(0)
            words = self._errors.read().decode("utf-8", "replace").strip()[-2000:]
            raise RuntimeError(f"{' '.join(self._argv)}\nended with {self._child.wait()}: {words}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()
        self._errors.close()


@dataclass(frozen=True)
class Question:
    """What to ask a companion, which measures itself: it answers `wall_seconds`, `cpu_seconds` and `rss_bytes`."""

    companion: Companion
    line: str


def run(task: Command | Question) -> Outcome:
    """Run it alone on a quiet disk. Raises RuntimeError with its words when it fails."""
    os.sync()
    return _run(task) if isinstance(task, Command) else _ask(task)


def _ask(question: Question) -> Outcome:
    found = question.companion.ask(question.line)
    started = time.perf_counter()
    os.sync()
    settle_seconds = time.perf_counter() - started
    return Outcome(found["wall_seconds"], settle_seconds, found["cpu_seconds"], found["rss_bytes"], "")


def _run(command: Command) -> Outcome:
    if command.cold is not None:
        drop_from_cache(command.cold)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        child = subprocess.Popen(
            command.argv,
            cwd=command.folder,
            env=os.environ | command.environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=errors,
        )
        _, status, usage = os.wait4(child.pid, 0)
        wall_seconds = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        started = time.perf_counter()
        os.sync()
        settle_seconds = time.perf_counter() - started
        out.seek(0)
        stdout = out.read().decode("utf-8", "replace")
        if child.returncode:
            errors.seek(0)
            words = errors.read().decode("utf-8", "replace").strip()[-2000:]
            raise RuntimeError(f"{' '.join(command.argv)}\nended with {child.returncode}: {words or stdout[-2000:]}")
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return Outcome(wall_seconds, settle_seconds, cpu_seconds, usage.ru_maxrss * 1024, stdout)


def drop_from_cache(path: Path) -> None:
    """Make the next read of every file below come from the disk (its pages must be clean: sync first)."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file() and not file.is_symlink():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def warm_up(path: Path) -> None:
    """Read every file below, so that each contender finds the source in the page cache alike."""
    for file in path.rglob("*"):
        if file.is_file():
            with file.open("rb", buffering=0) as opened:
                while opened.read(4 << 20):
                    pass


def bytes_in(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())


def remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def machine(scratch: Path) -> dict[str, str]:
    """What a reader needs to know of this machine; nothing that names it."""
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    release = ".".join(os.uname().release.split("-")[0].split(".")[:2])
    return {
        "cores": str(len(os.sched_getaffinity(0))),
        "cpu": cpu[0].split(":", 1)[1].strip() if cpu else os.uname().machine,
        "memory": f"{int(memory.split()[1]) / (1 << 20):.0f} GiB",
        "kernel": f"Linux {release}",
        "disk": disk_kind(scratch),
    }


def disk_kind(path: Path) -> str:
    """The file system below `path` and what kind of device holds it, as far as the kernel says."""
    best, kind, device = "", "unknown file system", ""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        source, place, fstype = line.split()[:3]
        if (str(path.resolve()) + "/").startswith(place.rstrip("/") + "/") and len(place) >= len(best):
            best, kind, device = place, fstype, os.path.basename(source)
    number = os.stat(path).st_dev
    link = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    name = os.path.basename(os.path.realpath(link)) if link.exists() else device
    if name.startswith("vd"):
        return f"{kind} on a virtual disk"
    if name.startswith("nvme"):
        return f"{kind} on NVMe"
    rotational = Path(os.path.realpath(link)) / "queue" / "rotational"
    if rotational.exists():
        return f"{kind} on a {'spinning disk' if rotational.read_text().strip() == '1' else 'solid-state disk'}"
    return kind
