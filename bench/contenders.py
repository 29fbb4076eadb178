"""What is measured: Outlast in three settings, restic, borg, and the disk itself.

Every contender answers the same four questions with a command: make a repository, back up, restore,
check all data. Rivals run with their own defaults, except where the page says otherwise.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from measure import Command

LIMITS = Path(__file__).with_name("limits.py")
PASSPHRASE = "only for the benchmark"


@dataclass(frozen=True)
class Outlast:
    """`outlast` of the environment that runs the benchmark."""

    name: str
    options: tuple[str, ...] = ()

    @property
    def program(self) -> str:
        return str(Path(sys.executable).with_name("outlast"))

    def _command(self, repository: Path, *arguments: str, cold: Path | None = None) -> Command:
        environment = {"XDG_CACHE_HOME": str(repository.parent / "cache")}
        if "--encrypt" in self.options:
            environment["OUTLAST_PASSPHRASE"] = PASSPHRASE
        argv = [self.program, "--repo", str(repository), "--json", *arguments]
        return Command(argv, environment=environment, cold=cold)

    def init(self, repository: Path) -> Command:
        return self._command(repository, "init", *self.options)

    def backup(self, repository: Path, source: Path) -> Command:
        return self._command(repository, "backup", str(source), "--name", "bench")

    def restore(self, repository: Path, target: Path) -> Command:
        return self._command(repository, "restore", "latest", "--to", str(target), cold=repository)

    def check(self, repository: Path) -> Command:
        return self._command(repository, "check", "--data", "all", cold=repository)

    def snapshots(self, repository: Path) -> Command:
        return self._command(repository, "snapshots")

    def plan_prune(self, repository: Path) -> Command:
        return self._command(repository, "prune", "--dry-run", "--max-delete", "100%")

    def configured(self, config: Path, *arguments: str) -> Command:
        return Command([self.program, "--json", *arguments, "--config", str(config)])

    def added_bytes(self, stdout: str) -> int:
        return int(json.loads(stdout)["bytes_added"])


@dataclass(frozen=True)
class Restic:
    """restic, repository format 2, its default compression."""

    name: str = "restic"

    @property
    def program(self) -> str:
        return "restic"

    def _command(self, repository: Path, *arguments: str, cold: Path | None = None) -> Command:
        cache = repository.parent / "restic-cache"
        environment = {"RESTIC_PASSWORD": PASSPHRASE, "RESTIC_CACHE_DIR": str(cache)}
        argv = ["restic", "--repo", str(repository), "--json", *arguments]
        return Command(argv, environment=environment, cold=cold)

    def init(self, repository: Path) -> Command:
        return self._command(repository, "init", "--repository-version", "2")

    def backup(self, repository: Path, source: Path) -> Command:
        return self._command(repository, "backup", str(source))

    def restore(self, repository: Path, target: Path) -> Command:
        return self._command(repository, "restore", "latest", "--target", str(target), cold=repository)

    def check(self, repository: Path) -> Command:
        return self._command(repository, "check", "--read-data", cold=repository)

    def added_bytes(self, stdout: str) -> int:
        """`data_added` of the summary, which is the last JSON line."""
        return int(json.loads(stdout.strip().splitlines()[-1])["data_added"])


@dataclass(frozen=True)
class Borg:
    """borg 1.x without encryption, lz4 (its default)."""

    name: str = "borg"

    @property
    def program(self) -> str:
        return "borg"

    def _command(
        self, repository: Path, *arguments: str, folder: Path | None = None, cold: Path | None = None
    ) -> Command:
        environment = {
            "BORG_BASE_DIR": str(repository.parent / "borg-base"),
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
        }
        return Command(["borg", *arguments], folder=folder, environment=environment, cold=cold)

    def init(self, repository: Path) -> Command:
        return self._command(repository, "init", "--encryption", "none", str(repository))

    def backup(self, repository: Path, source: Path) -> Command:
        place = f"{repository}::{{now:%Y%m%dT%H%M%S.%f}}"
        return self._command(repository, "create", "--compression", "lz4", "--json", place, str(source))

    def restore(self, repository: Path, target: Path) -> Command:
        target.mkdir(parents=True, exist_ok=True)
        listed = self._command(repository, "list", "--short", "--last", "1", str(repository))
        archive = said(listed).strip()
        return self._command(repository, "extract", f"{repository}::{archive}", folder=target, cold=repository)

    def check(self, repository: Path) -> Command:
        return self._command(repository, "check", "--verify-data", str(repository), cold=repository)

    def added_bytes(self, stdout: str) -> int:
        """Bytes of new chunks after compression; borg does not tell them before it."""
        return int(json.loads(stdout)["archive"]["stats"]["deduplicated_size"])


Keeper = Outlast | Restic | Borg

NONE = Outlast("outlast none", ("--compression", "none"))
AUTO = Outlast("outlast auto")
SEALED = Outlast("outlast encrypted", ("--encrypt",))
RESTIC = Restic()
BORG = Borg()
ALL_RIVALS: tuple[Keeper, ...] = (RESTIC, BORG)


def installed(keeper: Keeper) -> bool:
    return shutil.which(keeper.program) is not None


def said(command: Command) -> str:
    """Run a command that is not measured, and return what it prints."""
    environment = os.environ | command.environment
    ran = subprocess.run(command.argv, cwd=command.folder, env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command.argv)}\nended with {ran.returncode}: {ran.stderr[-2000:]}")
    return ran.stdout


def copied_and_synced(source: Path, target: Path) -> Command:
    """`cp` of a folder, and fsync of what it wrote; never a reflink."""
    script = 'cp -r --reflink=never "$1" "$2" && find "$2" -type f -exec sync {} +'
    return Command(["sh", "-c", script, "sh", str(source), str(target)])


def plainly_read(path: Path) -> Command:
    return Command([sys.executable, str(LIMITS), "read", str(path)], cold=path)


def plainly_restored(source: Path, target: Path) -> Command:
    return Command([sys.executable, str(LIMITS), "copy", str(source), str(target)], cold=source)


def version(keeper: Keeper) -> str:
    """Name and version, as in "restic 0.14.0"."""
    if isinstance(keeper, Outlast):
        return f"outlast {metadata.version('outlast')}"
    argv = [keeper.program, "--version" if isinstance(keeper, Borg) else "version"]
    return " ".join(said(Command(argv)).split()[:2])
