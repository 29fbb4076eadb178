"""Random work by several processes at a time, with kills and faults, and after each round the judge.

`make soak MINUTES=30`, or `python tests/soak/run.py --minutes 30 --seed 7`. The seed decides what is done and
when somebody is killed; how it all meets is up to the machine. Ends with 1, and names the seed, as soon as a
snapshot is lost or has a wrong byte, a log or pack is damaged, or a process is stuck or breaks.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import msgspec

from outlast.clock import SYSTEM_CLOCK
from outlast.testing.sim import Dice
from servers import S3_ENVIRONMENT, LossyProxy, MotoServer
from workers import Judge, Process, Task, make_repository

STUCK_SECONDS = 120.0
ROUND_SECONDS = 12.0
ROUNDS_OF_ONE_REPOSITORY = 4


class Soak:
    """One run. `counts` is what the last line tells."""

    def __init__(self, seed: int, minutes: float, folder: Path) -> None:
        self.dice = Dice(seed)
        self.counts: Counter[str] = Counter()
        self.alarms: Counter[str] = Counter()
        """what checks said about a sound repository while others worked at it"""
        self._folder = folder
        self._end = SYSTEM_CLOCK.monotonic_seconds() + minutes * 60
        self._server: MotoServer | None = None
        self._proxy: LossyProxy | None = None

    @property
    def _left_seconds(self) -> float:
        return self._end - SYSTEM_CLOCK.monotonic_seconds()

    def run(self) -> None:
        try:
            while not self.counts["repositories"] or self._left_seconds > 0:
                self._one_repository()
        finally:
            if self._server is not None:
                self._server.stop()

    def _one_repository(self) -> None:
        self.counts["repositories"] += 1
        home = self._folder / str(self.counts["repositories"])
        home.mkdir()
        dice = self.dice
        is_encrypted = dice.chance(0.4)
        url, other_url = (self._url(home / name, on_s3=dice.chance(0.3)) for name in ("repository", "other"))
        make_repository(url, is_encrypted=is_encrypted)
        make_repository(other_url, is_encrypted=dice.chance(0.3))
        judges = [Judge(url), Judge(other_url)]
        acknowledged: set[str] = set()
        for number in range(ROUNDS_OF_ONE_REPOSITORY):
            if number and self._left_seconds <= 0:
                break
            what = f"round {self.counts['rounds'] + 1}: {url.partition(':')[0] if '://' in url else 'local'}"
            print(f"{what}{', encrypted' if is_encrypted else ''}, {max(0, self._left_seconds):.0f} s left", flush=True)
            acknowledged |= self._round(home, url, other_url, is_encrypted, number)
            judges[0].assert_all_is_well(acknowledged)
            judges[1].assert_all_is_well(set())
            if dice.chance(0.5):
                judges[0].assert_prune_leaves_it_well(acknowledged)
            self.counts["rounds"] += 1
        for judge in judges:
            self.counts += judge.seen
        shutil.rmtree(home)

    def _url(self, folder: Path, *, on_s3: bool) -> str:
        if not on_s3:
            return str(folder)
        if self._server is None:
            self._server = MotoServer()
            os.environ.update(S3_ENVIRONMENT)
            self._proxy = LossyProxy(self._server.port)
            os.environ["AWS_ENDPOINT_URL"] = self._proxy.url
        bucket = f"bucket-{uuid.uuid4().hex}"
        self._server.make_bucket(bucket)
        return f"s3://{bucket}"

    def _round(self, home: Path, url: str, other_url: str, is_encrypted: bool, number: int) -> set[str]:
        dice = self.dice
        seconds = max(1.0, min(ROUND_SECONDS, self._left_seconds))
        roles = ["write", "write", "write", "forget", "prune"]
        roles += [role for role in ("check", "restore", "copy", "prune") if dice.chance(0.5)]
        if is_encrypted and dice.chance(0.7):
            roles.append("rotate")
        grace_seconds = dice.pick([0.0, 0.0, 1.0, 5.0])
        faults = dice.pick([0, 20, 60])
        tasks = [
            Task(
                role,
                url,
                f"{role}{at}",
                dice.below(1 << 62),
                str(home / f"{role}{at}"),
                seconds,
                other_url=other_url,
                faults=faults,
                quota_bytes=dice.pick([0, 0, 400_000]) if role == "write" else 0,
                grace_seconds=grace_seconds,
            )
            for at, role in enumerate(roles)
        ]
        processes = [Process(task, home / f"{number}-{task.name}") for task in tasks]
        ended: list[Process] = []
        started = SYSTEM_CLOCK.monotonic_seconds()
        while SYSTEM_CLOCK.monotonic_seconds() - started < seconds:
            SYSTEM_CLOCK.sleep(dice.share())
            if self._proxy is not None:
                self._proxy.lose_replies(dice.pick(["PUT", "PUT", "GET", "DELETE", "HEAD"]), 1)
            if dice.chance(0.5):
                ended.append(self._kill_and_replace(processes, home, number, started + seconds))
        told = [line for process in ended + processes for line in process.end(STUCK_SECONDS)]
        return self._count(told)

    def _kill_and_replace(self, processes: list[Process], home: Path, number: int, end: float) -> Process:
        """Somebody else with the same folder takes up the work of one that was killed."""
        at = self.dice.below(len(processes))
        victim = processes[at]
        victim.kill()
        self.counts["kills"] += 1
        left_seconds = max(0.0, end - SYSTEM_CLOCK.monotonic_seconds())
        task = msgspec.structs.replace(victim.task, seed=self.dice.below(1 << 62), seconds=left_seconds)
        processes[at] = Process(task, home / f"{number}-{self.counts['kills']}-{task.name}")
        return victim

    def _count(self, told: list[dict[str, Any]]) -> set[str]:
        for line in told:
            match line["did"]:
                case "refused":
                    self.counts[f"refused: {line['kind']}"] += 1
                    if line["kind"] in ("corrupt", "wrong_key", "failed", "not_found", "invalid_input"):
                        self.alarms[f"{line['kind']}: {line['why'][:90]}"] += 1
                case "checked":
                    self.alarms.update(f"check: {problem[:90]}" for problem in line["problems"])
                case "pruned":
                    self.counts["packs swept"] += line["swept"]
                case "restored":
                    self.counts["bytes restored"] += line["bytes"]
            self.counts[f"did: {line['did']}"] += 1
        return {line["id"] for line in told if line["did"] == "snapshot"}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=int.from_bytes(SYSTEM_CLOCK.random_bytes(4), "big"))
    given = parser.parse_args()
    print(f"soak: seed {given.seed}, {given.minutes:g} minutes", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="outlast-soak-"))
    soak = Soak(given.seed, given.minutes, folder)
    try:
        soak.run()
    except AssertionError as exc:
        print(f"VIOLATION: {exc}\nseed {given.seed}; what is left lies in {folder}", file=sys.stderr)
        return 1
    finally:
        for what, count in sorted(soak.counts.items()):
            print(f"  {count:12,} {what}")
        for what, count in soak.alarms.most_common(12):
            print(f"  {count:12,} false alarm: {what}")
    shutil.rmtree(folder)
    print(f"soak: seed {given.seed}: nothing lost, no wrong byte, nobody stuck")
    return 0


if __name__ == "__main__":
    sys.exit(main())
