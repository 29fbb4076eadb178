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
from itertools import count
from pathlib import Path

import torch
from cases import CASES, RANKS

NUMBERS = count()
torch.optim.SGD([torch.zeros(1)])  # what it imports is imported once too


def live(case: str, url: str, told: Path) -> int:
    """Fork one life, of a process for each rank; the id of the process that waits for them."""
    ranks = RANKS.get(case, 1)
    told.mkdir(exist_ok=True)
    meet = told / f"meet{next(NUMBERS)}"
    leader = os.fork()
    if leader:
        return leader
    os.setsid()
    children = [fork_rank(case, url, told, rank, ranks, meet) for rank in range(ranks)]
    failed = 0
    for _ in children:
        failed = os.wait()[1] or failed
        if failed:  # the others would wait for it
            os.killpg(0, signal.SIGKILL)
    os._exit(0)


def fork_rank(case: str, url: str, told: Path, rank: int, ranks: int, meet: Path) -> int:
    child = os.fork()
    if child:
        return child
    try:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MEET": str(meet)}
        (told / str(rank)).write_text(CASES[case](url))
        sys.stderr.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def strike(leader: int, dice: random.Random) -> None:
    """Kill all processes of a life at once, or one of its ranks first."""
    children = Path(f"/proc/{leader}/task/{leader}/children").read_text().split()
    if len(children) > 1 and dice.random() < 0.5:
        os.kill(int(dice.choice(children)), signal.SIGKILL)
        time.sleep(dice.uniform(0, 0.1))
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        pass
    os.waitpid(leader, 0)


def said(told: Path, case: str) -> list[str]:
    return [(told / str(rank)).read_text() for rank in range(RANKS.get(case, 1))]


def main(case: str, kills: int, seed: int, folder: Path) -> int:
    dice = random.Random(seed)
    alone = folder / "alone"
    started = time.monotonic()
    child = live(case, str(folder / "left-alone"), alone)
    if os.waitpid(child, 0)[1]:
        return 1
    whole_seconds = time.monotonic() - started
    wanted, killed, run = said(alone, case), 0, 0
    while killed < kills:
        run += 1
        url, told = str(folder / f"killed{run}"), folder / f"told{run}"
        while True:
            child = live(case, url, told)
            end = time.monotonic() + dice.uniform(0, whole_seconds * 0.8) if killed < kills else 1e12
            while not (done := os.waitpid(child, os.WNOHANG))[0]:
                if time.monotonic() >= end:
                    strike(child, dice)
                    killed += 1
                    break
                time.sleep(0.002)
            if done[0]:
                if done[1]:
                    print(f"{case}, seed {seed}: a life ended with {done[1]}")
                    return 1
                break
        if said(told, case) != wanted:
            print(f"{case}, seed {seed}, run {run}: killed {killed} times, it came to another state")
            return 1
    print(f"{case}, seed {seed}: {killed} kills in {run} runs, each ended in the state of the run that was left alone")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])))
