"""`make demo`: a training is killed and goes on bit for bit; then a real model folder is backed up, lost and restored.

Its backup is damaged, found out and healed. Every Outlast step goes through the real command line, shown as typed.
Nothing is downloaded; the scratch folder `.demo/`, made where you are, is removed at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

SCRATCH = Path.cwd() / ".demo"
OUTLAST = Path(sys.executable).with_name("outlast")
CORRUPT = 20
LAYER = "encoder.layer.5."

T = TypeVar("T")


def say(text: str = "") -> None:
    print(text, flush=True)


def strong(text: str) -> str:
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text


def title(text: str) -> None:
    say()
    say(strong(f"── {text} " + "─" * max(0, 76 - len(text))))


def size(count: int) -> str:
    return f"{count / (1 << 20):,.1f} MiB"


def course(losses: list[float]) -> str:
    return " → ".join(f"{loss:.3f}" for loss in losses)


def timed(work: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    outcome = work()
    return outcome, time.perf_counter() - started


def outlast(*arguments: str, lines_max: int = 0, expect: int = 0) -> float:
    """Run a command as a person would, with its own output; the seconds it took.

    With `lines_max` only so many lines of its output are shown.
    """
    say(strong("$ outlast " + " ".join(arguments)))
    started = time.perf_counter()
    pipe = subprocess.PIPE if lines_max else None
    ran = subprocess.run([OUTLAST, *arguments], cwd=SCRATCH, text=True, stdout=pipe)
    seconds = time.perf_counter() - started
    if lines_max:
        lines = ran.stdout.splitlines()
        say("\n".join(lines[:lines_max]))
        if len(lines) > lines_max:
            say(f"  … and {len(lines) - lines_max} more lines")
    say()
    if ran.returncode != expect:
        raise SystemExit(f"The demo failed: exit code {ran.returncode} instead of {expect}.")
    return seconds


def outlast_json(*arguments: str, expect: int = 0) -> Any:
    """The same command line, for programs: what it prints with --json."""
    ran = subprocess.run([OUTLAST, "--json", *arguments], cwd=SCRATCH, text=True, capture_output=True)
    if ran.returncode != expect:
        raise SystemExit(f"The demo failed: {arguments} gave exit code {ran.returncode}: {ran.stderr}")
    return json.loads(ran.stdout)


Found = dict[str, tuple[str, int, int]]


def fingerprint(folder: Path) -> Found:
    """Hash of the content, mode and mtime (ns) of everything in a folder."""
    found = {}
    for path in sorted([folder, *folder.rglob("*")]):
        status = path.stat()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        found[str(path.relative_to(folder))] = (digest, status.st_mode, status.st_mtime_ns)
    return found


def assert_same(folder: Path, wanted: Found) -> None:
    if fingerprint(folder) != wanted:
        raise SystemExit("The demo failed: the restored folder is not what was lost.")
    say(f"Compared: {len(wanted)} files and folders; every byte, mode and mtime is as it was.")


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def flip_one_byte(repository: Path) -> Path:
    """Turn one bit round in the middle of the biggest pack, as a tired disk does."""
    packs = (path for path in (repository / "packs").rglob("*") if path.is_file())
    pack = max(packs, key=lambda path: path.stat().st_size)
    pack.chmod(0o644)
    with pack.open("r+b") as file:
        file.seek(pack.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    return pack


Row = tuple[str, str, float]
"""of the table at the end: what, how much, seconds"""


STEPS = 120


def train(runs: str, kill_at: int | None) -> tuple[dict[int, str], str]:
    """The losses by step and the hash of the weights; with `kill_at` the process is killed -9 when it prints that step.

    The hash is "" for a process that was killed.
    """
    program = Path(__file__).with_name("writer.py")
    text = program.parent.parent / "docs"
    command = [sys.executable, str(program), str(text), runs, str(STEPS)]
    losses, weights = {}, ""
    with subprocess.Popen(command, cwd=SCRATCH, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            match line.split():
                case ["from", "step", step]:
                    say(f"{program.name} begins at step {step}")
                case ["step", step, "loss", loss]:
                    losses[int(step)] = loss
                    if int(step) == kill_at:
                        process.kill()
                        say(strong(f"$ kill -9 {process.pid}    # in step {step}"))
                        break
                case ["weights", weights]:
                    pass
    if process.returncode and kill_at is None:
        raise SystemExit(f"The demo failed: the training ended with {process.returncode}.")
    return losses, weights


def killed_and_resumed() -> Iterator[Row]:
    title("1. Train a small transformer; kill it twice; it ends as if nothing had been")
    (whole, wanted), seconds = timed(lambda: train("undisturbed", None))
    told = [float.fromhex(whole[step]) for step in (0, STEPS // 4, STEPS // 2, STEPS - 1)]
    say(f"undisturbed: loss {course(told)}, weights {wanted[:16]}\n")
    yield f"train {STEPS} steps", "undisturbed", seconds
    first = random.randrange(15, STEPS // 2)
    second = random.randrange(STEPS // 2, STEPS - 5)
    started = time.perf_counter()
    lives = [train("killed", moment) for moment in (first, second, None)]
    again = sum(map(len, (losses for losses, _ in lives))) - STEPS
    for losses, _ in lives:
        if any(whole[step] != loss for step, loss in losses.items()):
            raise SystemExit("The demo failed: a loss after the resume differs.")
    if lives[-1][1] != wanted:
        raise SystemExit("The demo failed: the weights differ.")
    say(f"killed twice: every loss is equal to the last bit, and the weights are {lives[-1][1][:16]}")
    yield "the same, killed twice", f"same weights; {again} steps done again", time.perf_counter() - started


def protect(model: Path) -> Iterator[Row]:
    """Fine-tune, back up, train on with one layer, back up again."""
    title("2. A real model, fine-tuned for a few steps")
    from training import Trainer, bytes_changed  # imports torch: seconds, so not before the title

    trainer = Trainer()
    losses, seconds = timed(lambda: trainer.train(4))
    trainer.save(model)
    say(f"all-MiniLM-L6-v2, {trainer.parameters / 1e6:.1f} million parameters; loss {course(losses)}")
    for path in sorted(model.rglob("*"), key=lambda path: -path.stat().st_size):
        if path.is_file() and path.stat().st_size > 100_000:
            say(f"  {size(path.stat().st_size):>10}  {path.relative_to(SCRATCH)}")
    yield "fine-tune, 4 steps", f"{trainer.parameters / 1e6:.1f} M parameters", seconds

    title("3. Back it up")
    outlast("init")
    seconds = outlast("backup", "model", "--name", "minilm")
    say("The weights lie in both big files, and are stored once.")
    first = outlast_json("snapshots")[-1]
    yield "first backup", f"{size(first['bytes'])}, stored in {size(bytes_in(SCRATCH / 'repository'))}", seconds

    title(f"4. Train on with one layer ({LAYER[:-1]}), and back up again")
    before = trainer.tensors()
    trainer.freeze_all_but(LAYER)
    losses = trainer.train(2)
    changed = bytes_changed(before, trainer.tensors())
    trainer.save(model)
    say(f"loss {course(losses)}; {size(changed)} of weights and AdamW moments changed")
    seconds = outlast("backup", "model", "--name", "minilm")
    snapshots = {snapshot["id"]: snapshot for snapshot in outlast_json("snapshots")}
    second = next(snapshot for snapshot in snapshots.values() if snapshot["id"] != first["id"])
    ratio = second["bytes_added"] / changed
    say(f"Changed: {size(changed)}. Added: {size(second['bytes_added'])}, {strong(f'{ratio:.3f}x')} of that.")
    yield "one-layer backup", f"{size(second['bytes_added'])} added for {size(changed)} changed", seconds
    say()
    outlast("show", second["id"][:8], lines_max=16)
    outlast("diff", first["id"][:8], second["id"][:8], lines_max=16)


def lose_and_restore(model: Path, wanted: Found) -> Iterator[Row]:
    title("5. Lose the folder, and get it back")
    say(strong("$ rm -r model"))
    shutil.rmtree(model)
    seconds = outlast("restore", "latest", "--to", "model")
    assert_same(model, wanted)
    yield "restore", f"{size(bytes_in(model))}, every byte compared", seconds


def copy_damage_and_heal() -> Iterator[Row]:
    title("6. Keep a second copy elsewhere")
    outlast("init", "--repo", "elsewhere")
    seconds = outlast("copy", "--from", "repository", "--to", "elsewhere")
    yield "copy of both snapshots", size(bytes_in(SCRATCH / "elsewhere")), seconds

    title("7. Damage one bit; check finds it, and the copy heals it")
    pack = flip_one_byte(SCRATCH / "repository")
    say(f"Flipped one bit in {pack.relative_to(SCRATCH)} ({size(pack.stat().st_size)})\n")
    seconds = outlast("check", "--data", "all", expect=CORRUPT)
    report = outlast_json("check", "--data", "all", expect=CORRUPT)
    if report["ok"] or pack.name not in json.dumps(report["damaged"]):
        raise SystemExit("The demo failed: check did not name the damaged pack.")
    yield "check of all data", f"{size(report['bytes_read'])} read, the bad pack named", seconds
    seconds = outlast("check", "--repair", "--from", "elsewhere")
    outlast("check", "--data", "all")
    yield "repair", "the damaged chunk fetched from the copy", seconds


def let_go(model: Path, wanted: Found) -> Iterator[Row]:
    title("8. Forget what is old, and free its space")
    outlast("forget", "--keep-last", "1")
    before = bytes_in(SCRATCH / "repository")
    seconds = outlast("prune", "--grace", "0")
    yield "prune", f"{size(before - bytes_in(SCRATCH / 'repository'))} freed", seconds

    title("9. Restore without Outlast, by a program that every repository holds")
    shutil.rmtree(model)
    say(strong("$ python repository/rescue.py repository latest model"))
    command = [sys.executable, "-I", "repository/rescue.py", "repository", "latest", "model"]
    ran, seconds = timed(lambda: subprocess.run(command, cwd=SCRATCH))
    if ran.returncode:
        raise SystemExit(f"The demo failed: rescue.py gave exit code {ran.returncode}.")
    assert_same(model, wanted)
    yield "restore by rescue.py", f"{size(bytes_in(model))}, every byte compared", seconds


def demo() -> list[Row]:
    """Tell the story; the rows of the table at its end."""
    os.environ["OUTLAST_REPO"] = str(SCRATCH / "repository")
    model = SCRATCH / "model"
    rows = list(killed_and_resumed())
    rows += protect(model)
    wanted = fingerprint(model)
    rows += lose_and_restore(model, wanted)
    rows += copy_damage_and_heal()
    rows += let_go(model, wanted)
    return rows


def main() -> None:
    shutil.rmtree(SCRATCH, ignore_errors=True)
    SCRATCH.mkdir()
    try:
        rows, seconds = timed(demo)
    finally:
        shutil.rmtree(SCRATCH, ignore_errors=True)
    title("What happened")
    for what, how_much, took in rows:
        say(f"  {what:<24} {how_much:<44} {took:6.1f} s")
    say(f"  {'all of it':<24} {'':<44} {seconds:6.1f} s")


if __name__ == "__main__":
    main()
