"""Kill a training at random moments until it has ended, and compare it with one that was left alone.

A program of its own: it imports torch once and forks every life of the training, so that a life costs no import.

    python killing.py CASE KILLS SEED FOLDER
"""

from __future__ import annotations

import os
import random  # noqa: TID251
import signal
import sys
import time  # noqa: TID251
import traceback
from pathlib import Path

from cases import CASES


def live(case: str, url: str, told: Path) -> int:
    """Fork one life; its process id."""
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        told.write_text(CASES[case](url))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def main(case: str, kills: int, seed: int, folder: Path) -> int:
    dice = random.Random(seed)
    alone = folder / "alone"
    started = time.monotonic()
    child = live(case, str(folder / "left-alone"), alone)
    if os.waitpid(child, 0)[1]:
        return 1
    whole_seconds = time.monotonic() - started
    wanted, killed, run = alone.read_text(), 0, 0
    while killed < kills:
        run += 1
        url, told = str(folder / f"killed{run}"), folder / f"told{run}"
        while True:
            child = live(case, url, told)
            end = time.monotonic() + dice.uniform(0, whole_seconds * 0.8) if killed < kills else 1e12
            while not (done := os.waitpid(child, os.WNOHANG))[0]:
                if time.monotonic() >= end:
                    os.killpg(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    killed += 1
                    break
                time.sleep(0.002)
            if done[0]:
                if done[1]:
                    print(f"{case}, seed {seed}: a life ended with {done[1]}")
                    return 1
                break
        if told.read_text() != wanted:
            print(f"{case}, seed {seed}, run {run}: killed {killed} times, it came to another state")
            return 1
    print(f"{case}, seed {seed}: {killed} kills in {run} runs, each ended in the state of the run that was left alone")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])))
