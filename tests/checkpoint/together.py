"""Several ranks in one scene. A program of its own, which prints a line of JSON for each rank.

python together.py RANKS SCENE FOLDER
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
from cases import mlp, seeded, together
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from outlast.checkpoint import run as running
from outlast.checkpoint import save as saving
from outlast.checkpoint.run import Run
from outlast.errors import OutlastError
from outlast.events import Event


class Told:
    wants_progress = False

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def event(self, event: Event) -> None:
        self.reasons.append(event.reason)

    def progress(self, progress: object) -> None:
        pass


def whole(value: Any) -> list[float]:
    """The sum of all ranks' parts, and of their squares, in a form that no order of ranks changes."""
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
    return value.double().flatten()[:50].tolist()


def made(ranks: int, *, shards: bool) -> dict[str, Any]:
    seeded()
    model: nn.Module = mlp()
    if shards and ranks > 1:
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        fully_shard(model)
    elif ranks > 1:
        model = nn.parallel.DistributedDataParallel(model)
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2)}


def trained(run: Run, steps: int) -> None:
    for _ in range(steps):
        run.state["optimizer"].zero_grad()
        F.cross_entropy(run.state["model"](torch.randn(4, 16)), torch.tensor([0, 1, 2, 3])).backward()
        run.state["optimizer"].step()
        run.step()


def contents(state: dict[str, Any]) -> dict[str, list[float]]:
    optimizer = state["optimizer"]
    found = {name.removeprefix("module."): whole(value) for name, value in state["model"].state_dict().items()}
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    for at, parameter in enumerate(parameters):
        found |= {f"{at}.{name}": whole(value) for name, value in optimizer.state.get(parameter, {}).items()}
    return found


def save(rank: int, ranks: int, folder: Path, *, shards: bool) -> Any:
    run = Run(str(folder / "runs"), name="x", state=made(ranks, shards=shards), save_every=10**9)
    run.resume()
    torch.manual_seed(100 + rank)
    trained(run, 3)
    snapshot = run.save().wait()
    run.close()
    return {"contents": contents(run.state), "snapshot": snapshot.id, "stored": snapshot.bytes_stored}


def differences(rank: int, ranks: int, folder: Path, *, shards: bool) -> Any:
    """Checkpoints that are built on each other."""
    run = Run(str(folder / "runs"), name="x", state=made(ranks, shards=shards), save_every=10**9, delta=True)
    run.resume()
    for group in run.state["optimizer"].param_groups:
        group["lr"] = 1e-5
    for _ in range(3):
        trained(run, 1)
        run.save().wait()
    run.close()
    return {"contents": contents(run.state)}


def load(rank: int, ranks: int, folder: Path, *, shards: bool) -> Any:
    told = Told()
    with Run(str(folder / "runs"), name="x", state=made(ranks, shards=shards), sink=told) as run:
        step = run.resume()
        drawn = torch.rand(1).item()
        return {"contents": contents(run.state), "step": step, "told": told.reasons, "drawn": drawn}


def one_dies(rank: int, ranks: int, folder: Path) -> Any:
    """Rank 1 is killed in the middle of the second save, when its share is durable and nothing is committed."""
    run = Run(str(folder / "runs"), name="x", state=made(ranks, shards=True), save_every=10**9)
    run.resume()
    trained(run, 1)
    run.save().wait()
    trained(run, 1)
    if rank == 1:
        stored = saving._store

        def dies(*given: Any) -> Any:
            stored(*given)
            os.kill(os.getpid(), signal.SIGKILL)

        saving._store = dies
    try:
        run.save().wait()
    except OutlastError as exc:
        return {"error": f"{type(exc).__name__}: {exc.message}"}
    return {}


def one_refuses(rank: int, ranks: int, folder: Path) -> Any:
    """What can't be kept on one rank is refused on all, and the run may go on."""
    state = {**made(ranks, shards=False), "extra": {"x": object() if rank == 1 else 1}}
    run = Run(str(folder / "runs"), name="x", state=state, save_every=10**9)
    run.resume()
    errors = []
    for _ in range(2):
        trained(run, 1)
        try:
            run.save().wait()
        except OutlastError as exc:
            errors.append(exc.message)
            run._pending = None
    state["extra"]["x"] = 1
    return {"errors": errors, "saved": run.save().wait().tags["step"]}


def one_is_terminated(rank: int, ranks: int, folder: Path) -> Any:
    """SIGTERM reaches one rank alone, and all save and leave."""
    run = Run(str(folder / "runs"), name="x", state=made(ranks, shards=False), save_every=10**9)
    run.resume()
    trained(run, 2)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    try:
        trained(run, 100_000)
    except SystemExit as exc:
        return {"code": exc.code, "step": run.finished_steps, "saved": run.checkpoints()[-1][0]}
    return {}


def every_so_often(rank: int, ranks: int, folder: Path) -> Any:
    """Ranks whose clocks and speeds differ save at the same steps."""
    running.schedule.FIRST_SECONDS = 0.05
    run = Run(str(folder / "runs"), name="x", state=made(ranks, shards=False), save_every="0.05s", keep=10**6)
    run.resume()
    for _ in range(60):
        trained(run, 1)
        run._clock.sleep(0.004 * rank)
    run.close()
    return {"steps": [step for step, _ in run.checkpoints()]}


def memory_and_disk(rank: int, ranks: int, folder: Path) -> Any:
    """What is saved to disk removes what is in memory, which only the first rank does."""
    run = Run(str(folder / "runs"), name="x", state=made(ranks, shards=False), save_every=10**9)
    run.resume()
    for in_memory in (True, False, True):
        trained(run, 1)
        run.save(in_memory=in_memory).wait_verified()
    trained(run, 1)
    run.step(save=True)
    run.close()
    return {"steps": [step for step, _ in run.checkpoints()], "finished": run.finished_steps}


SCENES = {
    "save": lambda *given: save(*given, shards=False),
    "save-sharded": lambda *given: save(*given, shards=True),
    "differences": lambda *given: differences(*given, shards=False),
    "differences-sharded": lambda *given: differences(*given, shards=True),
    "load": lambda *given: load(*given, shards=False),
    "load-sharded": lambda *given: load(*given, shards=True),
    **{each.__name__: each for each in (one_dies, one_refuses, one_is_terminated, every_so_often, memory_and_disk)},
}


def main(ranks: int, scene: str, folder: Path) -> int:
    meet = tempfile.mktemp(dir=folder)
    children = []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            try:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MEET": meet}
                if ranks > 1:
                    together()
                torch.set_num_threads(1)
                (folder / f"{scene}.{rank}").write_text(json.dumps(SCENES[scene](rank, ranks, folder)))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    for rank in range(ranks):
        told = folder / f"{scene}.{rank}"
        print(told.read_text() if told.exists() else "null")
        told.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))
