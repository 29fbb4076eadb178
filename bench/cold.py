"""Rows about what is kept long: how small a real series of checkpoints gets, how fast it is read and sent."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path

from contenders import AUTO, NONE, RESTIC, Keeper, installed, said
from measure import Command, Companion, Outcome, Question, bytes_in, remove
from rows import ROWS as OTHERS
from rows import OfTraining, Row, Stage, Trial

HERE = Path(__file__).parent
CHECKPOINTS = 10
STEPS = 80
LINE_BYTES_PER_SECOND = 125e6
PUTS_AT_ONCE = 4
AS_THEY_ARE = "as they are"
DELTA = "outlast copy --delta"
SEND = "outlast copy"
KEYS = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}


class Series:
    """Ten checkpoints of one training, and a repository in which each was backed up, as a trainer replaces it."""

    def __init__(self, stage: Stage, kind: str) -> None:
        self._stage, self.kind = stage, kind

    @property
    def folder(self) -> Path:
        folder = self._stage.scratch / "series"
        if not folder.exists():
            steps = ["--steps", str(max(2, round(STEPS * min(1, self._stage.scale))))]
            options = ["--checkpoints", str(CHECKPOINTS), *steps]
            subprocess.run(
                [sys.executable, str(HERE / "series.py"), str(folder), *options], check=True, stdout=subprocess.DEVNULL
            )
        return folder / self.kind

    @property
    def bytes(self) -> int:
        return bytes_in(self.folder)

    def hot(self) -> Path:
        return self._made("hot", partial(self._back_up_all, NONE))

    def cold(self) -> Path:
        return self._made("cold", self._copy)

    def _made(self, name: str, make: Callable[[Path], None]) -> Path:
        key = name, self.kind
        if key not in self._stage.kept:
            self._stage.kept[key] = self._stage.home(f"series-{self.kind}", name) / "repository"
            make(self._stage.kept[key])
        return self._stage.kept[key]

    def _back_up_all(self, keeper: Keeper, repository: Path) -> None:
        said(keeper.init(repository))
        said(self.back_up(keeper, repository))

    def _copy(self, repository: Path) -> None:
        said(AUTO.init(repository))
        said(self.copy(repository))

    def back_up(self, keeper: Keeper, repository: Path) -> Command:
        """One after the other, from one folder."""
        folder = repository.parent / "trainer"
        one = keeper.backup(repository, folder)
        turn = f"rm -rf {folder} && cp -r {{}} {folder} && {shlex.join(one.argv)}"
        turns = [turn.format(each) for each in sorted(self.folder.iterdir())]
        return Command(["sh", "-e", "-c", "\n".join(turns)], environment=one.environment)

    def copy(self, repository: Path) -> Command:
        argv = [AUTO.program, "--repo", str(repository), "copy", "--from", str(self.hot()), "--delta", "--json"]
        return Command(argv, environment={"XDG_CACHE_HOME": str(repository.parent / "cache")})


class Cold(Row):
    """How small they get."""

    kind = ""
    reference = AS_THEY_ARE
    ratio_of = "repository_bytes"

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self.series = Series(stage, self.kind)

    def trials(self) -> list[Trial]:
        self.series.hot()
        found = [self._kept(AS_THEY_ARE, lambda target: Command(["cp", "-r", str(self.series.folder), str(target)]))]
        found += [self._kept(f"zstd -{level}", partial(self._zstd, level)) for level in (3, 9) if shutil.which("zstd")]
        found += [self._kept("zipnn", partial(self._zipnn, python)) for python in with_zipnn()]
        found += [self._repository(each) for each in (AUTO, RESTIC) if installed(each)]
        return [*found, self._kept(DELTA, self.series.copy, AUTO)]

    def _kept(self, name: str, work: Callable[[Path], Command], keeper: Keeper | None = None) -> Trial:
        made: list[Path] = []

        def ready() -> Command:
            made[:] = [self.stage.home("kept", name) / "kept"]
            if keeper is None:
                made[0].mkdir()
            else:
                said(keeper.init(made[0]))
            return work(made[0])

        def facts(_: Outcome) -> dict[str, int]:
            noted = {"repository_bytes": bytes_in(made[0])}
            remove(made[0].parent)
            return noted

        return Trial(name, ready, facts)

    def _repository(self, keeper: Keeper) -> Trial:
        return self._kept(keeper.name, partial(self.series.back_up, keeper), keeper)

    def _zstd(self, level: int, target: Path) -> Command:
        one = f'zstd -q -T0 -{level} "$1" -o {target}/$(echo "$1" | tr / _)'
        return Command(["find", str(self.series.folder), "-type", "f", "-exec", "sh", "-c", one, "sh", "{}", ";"])

    def _zipnn(self, python: str, target: Path) -> Command:
        return Command([python, str(HERE / "sender.py"), "zipnn", str(self.series.folder), str(target)])

    def source_bytes(self) -> int:
        return self.series.bytes


class ColdFp32(Cold):
    name = "cold-fp32"
    kind = "fp32"
    title = "Ten checkpoints of a training, fp32 with AdamW, kept in a cold place: how small they are"
    note = (
        "A GPT of 3.3 million parameters that learns the source text of Python's standard library, 80 steps from one "
        "checkpoint to the next: weights and both moments, by `torch.save`. The ratio is of bytes. zstd and ZipNN "
        "compress each file; zstd uses every core."
    )


class ColdBf16(Cold):
    name = "cold-bf16"
    kind = "bf16"
    title = "The weights of these checkpoints in bf16, kept in a cold place: how small they are"
    note = "The ratio is of bytes."


class ColdRead(Row):
    name = "cold-read"
    title = "Reading the cold repositories with one core: decompress, add up differences, prove each block by its hash"
    reference = "outlast, fp32"
    note = "All ten snapshots, from the page cache, into memory. By the time that the core was at work for it."

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self._companions: dict[str, Companion] = {}

    def trials(self) -> list[Trial]:
        return [self._trial(kind) for kind in ("fp32", "bf16")]

    def _trial(self, kind: str) -> Trial:
        if kind not in self._companions:
            repository = Series(self.stage, kind).cold()
            self._companions[kind] = Companion([sys.executable, str(HERE / "decode.py"), str(repository)])
        companion = self._companions[kind]
        facts = {"source_bytes": int(companion.facts["bytes"])}
        return Trial(f"outlast, {kind}", lambda: Question(companion, "read"), lambda _: facts)

    def end(self) -> None:
        for each in self._companions.values():
            each.close()


class Send(Row):
    name = "copy-s3"
    title = "A copy from the disk to a bucket over a line of 1 Gbit/s"
    reference = "obstore"
    note = (
        "The repository of the first row, to an S3 server of our own that keeps objects in memory, behind a line that "
        "all connections share. obstore alone sends the files of the repository's packs as they are, four at once; "
        "the copy reads, decompresses and verifies every chunk, packs it anew and commits. Both begin with starting a "
        "program."
    )

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        argv = [sys.executable, str(HERE / "bucket.py"), str(LINE_BYTES_PER_SECOND)]
        self._server = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        assert self._server.stdout is not None
        self._url = f"http://127.0.0.1:{int(self._server.stdout.readline())}"
        self._environment = KEYS | {"AWS_ENDPOINT_URL": self._url, "XDG_CACHE_HOME": str(stage.scratch / "cache")}

    def new_round(self, number: int) -> None:
        self.stage.make_model(0)

    def trials(self) -> list[Trial]:
        packs = self.stage.repository(AUTO, self.stage.model) / "packs"
        facts = {"source_bytes": bytes_in(packs)}
        return [Trial(SEND, self._copy, lambda _: facts), Trial("obstore", partial(self._put, packs), lambda _: facts)]

    def _empty(self) -> None:
        with urllib.request.urlopen(urllib.request.Request(f"{self._url}/", method="DELETE")):
            pass

    def _copy(self) -> Command:
        self._empty()
        argv = [AUTO.program, "--repo", "s3://bucket/copy"]
        said(Command([*argv, "init"], environment=self._environment))
        source = self.stage.repository(AUTO, self.stage.model)
        return Command([*argv, "copy", "--from", str(source), "--json"], environment=self._environment)

    def _put(self, packs: Path) -> Command:
        self._empty()
        argv = [sys.executable, str(HERE / "sender.py"), "put", str(packs), "bucket", str(PUTS_AT_ONCE)]
        return Command(argv, environment=self._environment)

    def end(self) -> None:
        self._server.terminate()
        self._server.wait()

    def source_bytes(self) -> int:
        return 0


def with_zipnn() -> list[str]:
    """The Python that has ZipNN, which needs its own PyTorch: `ZIPNN_PYTHON` names it where it is another one."""
    named = os.environ.get("ZIPNN_PYTHON", "")
    if named or importlib.util.find_spec("zipnn") is not None:
        return [named or sys.executable]
    print("NOT MEASURED: zipnn is not installed; ZIPNN_PYTHON may name a Python that has it.", file=sys.stderr)
    return []


OF_TRAINING = tuple(row for row in OTHERS if issubclass(row, OfTraining))
ROWS: tuple[type[Row], ...] = (
    *(row for row in OTHERS if row not in OF_TRAINING),
    ColdFp32,
    ColdBf16,
    ColdRead,
    Send,
    *OF_TRAINING,
)
