"""A rehearsed restore: would it come back, how long does that take, and how much would be lost?

A drill restores a snapshot into a scratch folder and climbs the ladder: bytes, structure, values, golden outputs,
quality, resumed training. It stops at the first level that is not reached, writes down in the log what it came to, and
removes the folder. Only a drill that could be held is written down: a full disk, or a store out of reach, says nothing
of the snapshot, and raises.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import msgspec

from outlast.backup.create import WITHOUT_CONTENT, create
from outlast.backup.restore import execute, plan
from outlast.backup.restore_plan import first_few
from outlast.checkpoint import doctor, validate
from outlast.checkpoint.validate import Looked, Structure
from outlast.errors import Corrupt, InvalidInput, OutlastError, StoreFull
from outlast.records import Entry, Snapshot, path_text, time_ns
from outlast.repo.repository import Repository
from outlast.repo.state import DRILL, Drill
from outlast.store.layers import open_store
from outlast.tiers import command
from outlast.tiers.command import Command, Commands
from outlast.tiers.scratch import scratch_folder

__all__ = ["LEVELS", "Commands", "DrillReport", "Level", "drill"]

LEVELS = ("bytes", "structure", "values", "golden outputs", "quality", "resumed training")
"""by their numbers"""
RESTORED = "OUTLAST_RESTORED"
"""where a command finds what was restored"""

_BYTES, _STRUCTURE, _VALUES, _GOLDEN, _QUALITY, _RESUMED = range(len(LEVELS))
_STEPS = 5
"""so many are trained for L5"""
_PROBLEM_CHARACTERS_MAX = 2000
_PROBLEMS_SHOWN = 5


class Level(msgspec.Struct):
    """One level of a drill."""

    level: int
    name: str
    reached: bool
    seconds: float
    looked: Looked
    is_skipped: bool = False
    """no command was given for it, and it was not the one that was asked for"""


class DrillReport(msgspec.Struct):
    """What a drill came to."""

    drill: Drill
    """as it is in the log"""
    levels: list[Level]

    @property
    def is_damaged(self) -> bool:
        """Not even the bytes came back."""
        return self.drill.level < _BYTES


def drill(
    repository: Repository,
    snapshot: Snapshot,
    *,
    level: int | None = None,
    commands: Commands | None = None,
    scratch: str | bytes | None = None,
    allowed: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    free_bytes: Callable[[bytes], int] | None = None,
) -> DrillReport:
    """Rehearse the restore of a snapshot up to a level, by default the highest that a command is given for, else L2.

    `scratch`: the folder in which the scratch folder is made. `allowed`: globs of tensors that may hold NaN.
    `environment`: of the commands, by default that of this process.
    Levels above L2 that no command is given for are left out, but for the one that is asked for.

    RTO is measured from here, the log being read, to where the highest level was reached: restored and durable, every
    chunk verified, and all that was looked at since; where none was reached, to where that was known. RPO is the age of
    the snapshot at the beginning.

    Raises `InvalidInput` for a level without a command, and `StoreFull` where there is no room, both before anything is
    restored; and what keeps a drill from being held: `Unavailable`, `Refused`. Then nothing is written down.
    """
    commands = commands or Commands()
    asked = _asked(level, commands)
    clock, now_ns = repository.clock, repository.clock.now_ns()
    began = clock.monotonic_seconds()
    with scratch_folder(scratch, clock, repository.sink) as folder:
        climb = _Climb(repository, snapshot, folder, commands, allowed, dict(environment or os.environ))
        climb.check_room(free_bytes or _free_bytes, asked)
        levels: list[Level] = []
        reached, until = -1, 0.0
        for number in range(asked + 1):
            if number >= _GOLDEN and _command_of(commands, number) is None:
                levels.append(Level(number, LEVELS[number], False, 0.0, Looked(), is_skipped=True))
                continue
            started = clock.monotonic_seconds()
            looked = climb.to(number)
            ended = clock.monotonic_seconds()
            levels.append(Level(number, LEVELS[number], not looked.problems, ended - started, looked))
            if looked.problems:
                until = until or ended - began
                break
            reached, until = number, ended - began
        found = Drill(
            snapshot=snapshot.id,
            name=snapshot.name,
            asked=asked,
            level=reached,
            rto_seconds=until,
            rpo_seconds=max(0, now_ns - time_ns(snapshot.time)) / 1e9,
            bytes=levels[_BYTES].looked.bytes,
            problem=_told(levels[-1].looked.problems),
        )
        time = _write_down(repository, found)
    return DrillReport(msgspec.structs.replace(found, time=time), levels)


def _write_down(repository: Repository, found: Drill) -> str:
    """Into the log; the time of the entry."""
    body = {"drill": msgspec.to_builtins(found)}
    try:
        entry = repository.log.append(DRILL, lambda _: body)
    except OutlastError as exc:
        came = f"L{found.level} in {found.rto_seconds:.1f} s" if found.level >= 0 else "no level"
        failed = f" ({found.problem})" if found.problem else ""
        raise type(exc)(
            f"the drill reached {came}{failed}, which could not be written down: {exc.message}", hint=exc.hint
        ) from exc
    assert entry is not None
    return entry.time


def _asked(level: int | None, commands: Commands) -> int:
    given = [number for number in range(_GOLDEN, len(LEVELS)) if _command_of(commands, number) is not None]
    for number in given:
        command.check(cast(Command, _command_of(commands, number)))
    if level is None:
        return max(given, default=_VALUES)
    if not 0 <= level < len(LEVELS):
        raise InvalidInput(f"there is no level L{level}; nothing was done.", hint=f"They are L0 to L{len(LEVELS) - 1}.")
    if level >= _GOLDEN and level not in given:
        option = ("golden", "quality", "resume")[level - _GOLDEN]
        raise InvalidInput(
            f"level L{level}, {LEVELS[level]}, is shown by a command, and none was given; nothing was done.",
            hint=f"Give it with --{option}.",
        )
    return level


def _command_of(commands: Commands, level: int) -> Command | None:
    return {_GOLDEN: commands.golden, _QUALITY: commands.quality, _RESUMED: commands.resume}.get(level)


def _told(problems: Sequence[str]) -> str:
    return first_few(problems, _PROBLEMS_SHOWN)[:_PROBLEM_CHARACTERS_MAX]


def _free_bytes(folder: bytes) -> int:
    room = os.statvfs(folder)
    return room.f_bavail * room.f_frsize


class _Climb:
    """One drill, in its folder."""

    def __init__(
        self,
        repository: Repository,
        snapshot: Snapshot,
        folder: bytes,
        commands: Commands,
        allowed: Sequence[str],
        environment: dict[str, str],
    ) -> None:
        self._repository, self._snapshot, self._folder = repository, snapshot, folder
        self._commands, self._allowed = commands, allowed
        self._restored = os.path.join(folder, b"restored")
        self._environment = {name: text for name, text in environment.items() if name != doctor.VARIABLE}
        self._environment[RESTORED] = os.fsdecode(self._restored)
        self._structure: Structure | None = None

    def check_room(self, free_bytes: Callable[[bytes], int], asked: int) -> None:
        """Raise `StoreFull` unless the folder has room for all that will be in it."""
        try:
            needed = sum(length for entry in self._repository.entries(self._snapshot) for _, length in entry.chunks)
        except Corrupt:
            return  # which the restore will say
        if asked >= _RESUMED and self._snapshot.kind == "checkpoint":
            needed *= 2  # see `_of_a_run`
        free = free_bytes(self._folder)
        if needed > free:
            where = path_text(os.path.dirname(self._folder))
            raise StoreFull(
                f"a drill with snapshot {self._snapshot.id[:8]} takes {needed} bytes in {where}, and {free} are free; "
                "nothing was restored.",
                hint="Make room there, or name another folder with --scratch.",
            )

    def to(self, level: int) -> Looked:
        """Look whether a level is reached, all those below being so."""
        if level == _BYTES:
            return self._restore()
        if level == _STRUCTURE:
            self._structure = validate.structure(self._restored, self._snapshot)
            self._note_lacking(self._structure.looked)
            return self._structure.looked
        assert self._structure is not None
        if level == _VALUES:
            return validate.values(self._structure, allowed=self._allowed)
        if level == _RESUMED and self._structure.ranks:
            return self._of_a_run(self._structure)
        return self._run(_command_of(self._commands, level))

    def _restore(self) -> Looked:
        try:
            report = execute(self._repository, plan(self._repository, self._snapshot, self._restored))
        except Corrupt as exc:
            safe = f" {path_text(self._restored)} is untouched."
            return Looked(problems=[exc.message.replace(safe, "")])
        lacking = {path_text(entry.raw_path) for entry in self._lacking()}  # L1 tells of them
        notes = [f"{each.path}: {each.reason}" for each in report.skipped if each.path not in lacking]
        return Looked(files=report.files, bytes=report.bytes, notes=notes)

    def _lacking(self) -> Iterator[Entry]:
        """What the backup knew that it doesn't have, whole."""
        if self._snapshot.unreadable + self._snapshot.unstable:
            for entry in self._repository.entries(self._snapshot):
                if entry.type == "unreadable" or entry.unstable:
                    yield entry

    def _note_lacking(self, looked: Looked) -> None:
        for entry in self._lacking():
            if entry.unstable:
                looked.note(f"{entry.path} changed while it was backed up")
            elif entry.reason == WITHOUT_CONTENT:
                looked.note(f"{entry.path} is not in the backup: {entry.reason}")
            else:
                looked.problem(f"{entry.path} is not in the backup: it could not be read then ({entry.reason})")

    def _run(self, given: Command | None) -> Looked:
        assert given is not None
        ended = self._start(given, {})
        told = ended.told(self._commands.timeout_seconds)
        return Looked(problems=[f"the command {told}"] if told else [])

    def _start(self, given: Command, more: Mapping[str, str]) -> command.Ended:
        return command.run(given, {**self._environment, **more}, self._commands.timeout_seconds)

    def _of_a_run(self, structure: Structure) -> Looked:
        """Training of a `Run` goes on, from a repository that is made of what was restored, and saves nothing."""
        place = os.path.join(self._folder, b"repository")
        made = Repository.create(open_store(os.fsdecode(place)), compression="none", clock=self._repository.clock)
        kept = create(made, [self._restored], name=self._snapshot.name, tags=self._snapshot.tags)
        found: list[command.Ended] = []

        def start(more: Mapping[str, str]) -> int:
            assert self._commands.resume is not None
            found.append(self._start(self._commands.resume, more))
            return found[0].code

        report = doctor.rehearse(
            os.fsdecode(place), made.find_snapshot(kept.snapshot), _STEPS, os.fsdecode(self._folder), start
        )
        told = found[0].told(self._commands.timeout_seconds)
        if told:
            return Looked(problems=[f"the command {told}"])
        if report is None:
            return Looked(notes=["no Run was resumed in the command: that it ended with 0 is all that is known"])
        looked = Looked(tensors=report.tensors, bytes=report.bytes, notes=list(report.environment))
        if report.verdict == "unproven":
            tail = f": {found[0].tail}" if found[0].tail else ""
            looked.problem(f"{report.reason}{tail}")
        for finding in report.findings:
            looked.problem(doctor.told(finding))
        return looked
