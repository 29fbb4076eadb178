"""What checkpoints cost a training: a program that holds a model and measures what it is asked for, line by line.

    python bench/training.py FOLDER --scale 1

When the state is made, it tells its `bytes` and the contenders of each row. Then it answers each line
`ROW<tab>CONTENDER` with a JSON object: `wall_seconds`, `cpu_seconds`, and `rss_bytes`, the most memory that the
contender took beside the state and what others keep. An empty contender clears what the row left. So all contenders
of a row work on the same tensors.

The model is a transformer of 12 blocks in fp32 (GPT-2 small's shapes), trained by AdamW on the CPU: parameters and
moments are 1.5 GB at scale 1. Between two saves the optimizer makes a step, so every parameter and moment changes.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from measure import drop_from_cache
from outlast.checkpoint import mapped
from outlast.checkpoint.leaves import tensor_bytes
from outlast.checkpoint.pending import PendingSave
from outlast.checkpoint.run import Run

BLOCKS = 12
TRAINED = 2
"""blocks that still change where the others are frozen"""
TOKENS = 128
LOOP_STEPS = 4
STEP_CALLS = 100_000
BUFFER_BYTES = 4 << 20
NEVER = 10**9
PAUSE_RATIO = 3.0
"""forward and backward take at least so many times as long as a plain copy of the state"""


class Meter:
    """Time, time of all cores, and memory of what runs inside of it; of several such stretches together."""

    def __init__(self) -> None:
        self.wall_seconds = self.cpu_seconds = 0.0
        self.peak_bytes = 0

    def __enter__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: proc(5)
        self._resident_bytes = resident_bytes("VmRSS")
        self._used_seconds = used_seconds()
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.wall_seconds += time.perf_counter() - self._began
        self.cpu_seconds += used_seconds() - self._used_seconds
        self.peak_bytes = max(self.peak_bytes, resident_bytes("VmHWM") - self._resident_bytes)


class Model(torch.nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        width = max(64, round(768 * scale**0.5 / 64) * 64)
        self.words = max(64, round(50257 * scale**0.5))
        self.wte = torch.nn.Embedding(self.words, width)
        self.wpe = torch.nn.Embedding(max(TOKENS, round(1024 * scale**0.5)), width)
        layer: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": True, "activation": "gelu"}
        self.h = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(width, width // 64, 4 * width, **layer) for _ in range(BLOCKS)
        )
        self.ln_f = torch.nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.h:
            found = block(found)
        loss: torch.Tensor = self.ln_f(found).square().mean()
        return loss


def adamw(parameters: Iterator[torch.nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=1e-5, fused=True)


class Training:
    """A state, and what can be done with it."""

    def __init__(self, folder: Path, scale: float) -> None:
        torch.manual_seed(1)
        self.folder = folder
        self.model = Model(scale)
        self.optimizer = adamw(self.model.parameters())
        self.head = adamw(each for block in self.model.h[-TRAINED:] for each in block.parameters())
        """the optimizer of a training whose other blocks were frozen from its beginning"""
        self.before_step: Callable[[], object] | None = None
        self.waited_seconds = 0.0
        self.meter = Meter()
        self._entered = 0.0
        self.stager: DefaultStager | None = None
        self.buffers: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None = None
        self.optimizer.register_step_pre_hook(self._enter)
        self.batches = 1
        self.runs: dict[str, Run] = {}
        self.train()
        self.head.step()  # with the gradients of that step, so that it has moments
        self.bytes = sum(each.nbytes for each in self.tensors())
        source, target = self.memory()
        copy_seconds = timed(lambda: np.copyto(target, source))
        self.batches = max(1, round(PAUSE_RATIO * copy_seconds / timed(self.forward_backward)))

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}

    @property
    def dictionary(self) -> dict[str, Any]:
        """What a script gives to torch.save and to DCP."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def tensors(self) -> Iterator[torch.Tensor]:
        """Parameters and moments."""
        for parameter in self.model.parameters():
            yield parameter.detach()
            yield from (each for each in self.optimizer.state[parameter].values() if isinstance(each, torch.Tensor))

    def change(self, optimizer: torch.optim.Optimizer | None = None, *, frozen: bool = False) -> None:
        """A step with the gradients that are there, of all or of the last blocks; no save needs them afterwards."""
        if any(each.grad is None for each in self.model.parameters()) and not frozen:
            self.forward_backward()
        if frozen:
            changing = {id(each) for block in self.model.h[-TRAINED:] for each in block.parameters()}
            for each in self.model.parameters():
                each.grad = each.grad if id(each) in changing else None
        (optimizer or self.optimizer).step()
        for run in self.runs.values():
            run.step()

    def memory(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Two runs of touched memory, each as large as the state."""
        if self.buffers is None:
            self.buffers = np.ones(self.bytes, np.uint8), np.zeros(self.bytes, np.uint8)
            self.buffers[1][:] = 2
        return self.buffers

    def forward_backward(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)
        for _ in range(self.batches):
            self.model(torch.randint(self.model.words, (1, TOKENS))).backward()

    def train(self) -> None:
        self.forward_backward()
        self.change()

    def _enter(self, *_: object) -> None:
        """The first hook of a step; `Run`'s own comes next, and the last one is that of `run_of`."""
        self._entered = time.perf_counter()
        if self.before_step is not None:
            self.before_step()
            self.before_step = None
        self.waited_seconds = time.perf_counter() - self._entered

    def _left(self, *_: object) -> None:
        self.waited_seconds = time.perf_counter() - self._entered

    def run_of(self, name: str, state: dict[str, Any] | None = None, **how: Any) -> Run:
        """A run that is kept until the row ends."""
        if name not in self.runs:
            url = str(self.folder / f"run-{name}")
            self.runs[name] = Run(url, name=name, state=state or self.state, save_every=NEVER, keep=1, **how)
            self.optimizer.register_step_pre_hook(self._left)
        return self.runs[name]

    def clear(self) -> None:
        for run in self.runs.values():
            run.close()
        self.runs.clear()
        if self.stager is not None:
            self.stager.close()
        self.stager = self.buffers = None
        for path in self.folder.iterdir():
            remove(path)

    # -- how long the training stands still -------------------------------------------------------

    def copy(self) -> None:
        """The state itself, one tensor after the other."""
        target, at = self.memory()[1], 0
        with self.meter:
            for tensor in self.tensors():
                np.copyto(target[at : at + tensor.nbytes], np.frombuffer(tensor_bytes(tensor), np.uint8))
                at += tensor.nbytes

    def copy_one(self) -> None:
        source, target = self.memory()
        with self.meter:
            np.copyto(target, source)

    def stall_at_once(self) -> None:
        run = self.run_of("at-once", overlap=False)
        self.change()
        with self.meter:
            pending = run.save()
        finished(pending)

    def stall_of_dcp(self) -> None:
        self.change()
        with self.meter:
            finish = self.dcp_async(None)
        finish()

    def stall_overlapped(self) -> None:
        run = self.run_of("overlapped")
        with self.meter:
            pending = run.save()
        self.train()
        self.meter.wall_seconds += self.waited_seconds
        finished(pending)

    def stall_of_dcp_overlapped(self) -> None:
        stager = self.copying_stager()
        with self.meter:
            finish = self.dcp_async(stager)
        self.train()
        self.meter.wall_seconds += self.waited_seconds
        finish()

    def copying_stager(self) -> DefaultStager:
        """Of what runs without a GPU the fastest: copies in a thread, into memory that it keeps."""
        self.stager = self.stager or DefaultStager(StagingOptions(False, False, True, False))
        return self.stager

    def dcp_async(self, stager: DefaultStager | None) -> Callable[[], None]:
        """Begin to save; gives what waits until it is written. The next step waits until its copy is made."""
        path = self.folder / "dcp"
        writer = dcp.FileSystemWriter(path, sync_files=True)
        found: Any = dcp.async_save(self.dictionary, storage_writer=writer, async_stager=stager, no_dist=True)
        written = found
        if hasattr(found, "upload_completion"):
            written, self.before_step = found.upload_completion, found.staging_completion.result

        def finish() -> None:
            written.result()
            self.before_step = None

        return finish

    # -- the loop as a whole ----------------------------------------------------------------------

    def loop(self, save: Callable[[], Callable[[], None]]) -> None:
        """What one save costs a few steps, everything waited for, over the same steps without it."""
        with self.meter:
            for _ in range(LOOP_STEPS):
                self.train()
        wall, cpu = self.meter.wall_seconds, self.meter.cpu_seconds
        with self.meter:
            self.train()
            finish = save()
            for _ in range(LOOP_STEPS - 1):
                self.train()
            finish()
        self.meter.wall_seconds -= 2 * wall
        self.meter.cpu_seconds -= 2 * cpu

    def loop_of_run(self) -> None:
        run = self.run_of("loop")

        def save() -> Callable[[], None]:
            pending = run.save()
            return lambda: finished(pending)

        self.loop(save)

    def loop_of_dcp(self, stager: DefaultStager | None) -> None:
        self.loop(lambda: self.dcp_async(stager))

    # -- until it is durable ----------------------------------------------------------------------

    def durable(self) -> None:
        run = self.run_of("durable")
        self.change()
        self.save(run)

    def save(self, run: Run) -> None:
        """Until it is durable; then wait until older ones are dropped, so that nothing else is measured later."""
        with self.meter:
            pending = run.save()
            pending.wait()
        finished(pending)

    def written(self) -> None:
        """One file, all bytes, the folder too."""
        self.change()
        path = self.folder / "plain"
        with self.meter:
            with open(path, "xb", buffering=0) as file:
                for tensor in self.tensors():
                    rest = tensor_bytes(tensor)
                    while rest:
                        rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            sync_folder(path.parent)

    def torch_saved(self, frozen: str = "") -> None:
        optimizer = self.head if frozen == "new" else self.optimizer
        self.change(optimizer, frozen=bool(frozen))
        path = self.folder / "torch.pt"
        with self.meter:
            with open(path, "xb") as file:
                torch.save({"model": self.model.state_dict(), "optimizer": optimizer.state_dict()}, file)
                file.flush()
                os.fsync(file.fileno())
            sync_folder(path.parent)

    def dcp_saved(self) -> None:
        self.change()
        with self.meter:
            dcp.save(self.dictionary, storage_writer=dcp.FileSystemWriter(self.folder / "dcp"), no_dist=True)

    def frozen(self, which: str) -> None:
        name = f"frozen-{which}"
        is_new = name not in self.runs
        optimizer = self.head if which == "new" else self.optimizer
        run = self.run_of(name, {"model": self.model, "optimizer": optimizer})
        if is_new:
            finished(run.save())
        self.change(optimizer, frozen=True)
        self.save(run)

    # -- load -------------------------------------------------------------------------------------

    def saved(self, name: str, save: Callable[[Path], object]) -> Path:
        """What is loaded, saved once for the row. That it was just written doesn't show: it is read from the disk."""
        path = self.folder / f"kept-{name}"
        if not path.exists():
            save(path)
            cold(path)
        return path

    def repository(self) -> Path:
        def save(path: Path) -> None:
            with Run(str(path), name="load", state=self.state, save_every=NEVER) as run:
                self.optimizer.step()
                run.step()
                run.save().wait()

        return self.saved("run", save)

    def torch_file(self) -> Path:
        return self.saved("torch.pt", lambda path: torch.save(self.dictionary, path))

    def dcp_folder(self) -> Path:
        return self.saved("dcp", lambda path: dcp.save(self.dictionary, checkpoint_id=path, no_dist=True))

    def safetensors_file(self) -> Path:
        return self.saved("model", lambda path: safetensors.torch.save_file(self.model.state_dict(), path))

    def load(self) -> None:
        url = str(cold(self.repository()))
        with Run(url, name="load", state=self.state, save_every=NEVER) as run, self.meter:
            run.load()

    def read(self) -> None:
        repository = cold(self.repository())
        with self.meter:
            read_all(repository)

    def torch_loaded(self, *, into: bool = False) -> None:
        path = cold(self.torch_file())
        with self.meter:
            found = torch.load(path, weights_only=True)
            if into:
                self.model.load_state_dict(found["model"])
                self.optimizer.load_state_dict(found["optimizer"])

    def dcp_loaded(self) -> None:
        path = cold(self.dcp_folder())
        with self.meter:
            dcp.load(self.dictionary, checkpoint_id=path, no_dist=True)

    def warm(self, path: Path, load: Callable[[str], Iterable[torch.Tensor]]) -> None:
        """Until every element was looked at: mapping alone reads nothing."""
        read_all(path)
        total = torch.zeros(())
        with self.meter:
            for tensor in load(str(path)):
                total.add_(tensor.sum())

    # -- a step that doesn't save -----------------------------------------------------------------

    def step(self) -> None:
        with Run(str(self.folder / "kept-step"), name="step", state=self.state) as run:
            run.begin_at(0)
            finished(run.save())
            run.step()  # it takes in what that save cost
            with self.meter:
                for _ in range(STEP_CALLS):
                    run.step()
        self.meter.wall_seconds /= STEP_CALLS
        self.meter.cpu_seconds /= STEP_CALLS

    def measures(self) -> dict[str, dict[str, Callable[[], None]]]:
        """Row -> contender -> what runs it once."""
        return {
            "stall": {
                "memcpy": self.copy,
                "memcpy in one piece": self.copy_one,
                "Run.save, overlap=False": self.stall_at_once,
                "dcp.async_save": self.stall_of_dcp,
            },
            "stall-overlap": {
                "Run.save": self.stall_overlapped,
                "dcp.async_save, copied in a thread": self.stall_of_dcp_overlapped,
            },
            "loop": {
                "Run.save": self.loop_of_run,
                "dcp.async_save": lambda: self.loop_of_dcp(None),
                "dcp.async_save, copied in a thread": lambda: self.loop_of_dcp(self.copying_stager()),
            },
            "durable": {
                "Run.save": self.durable,
                "write + fsync": self.written,
                "torch.save + fsync": self.torch_saved,
                "dcp.save": self.dcp_saved,
            },
            "frozen": {
                "Run.save": lambda: self.frozen("later"),
                "torch.save + fsync": lambda: self.torch_saved("later"),
            },
            "frozen-new": {
                "Run.save": lambda: self.frozen("new"),
                "torch.save + fsync": lambda: self.torch_saved("new"),
            },
            "load-cold": {
                "Run.load": self.load,
                "plain read": self.read,
                "torch.load": self.torch_loaded,
                "torch.load + load_state_dict": lambda: self.torch_loaded(into=True),
                "dcp.load": self.dcp_loaded,
            },
            "load-warm": {
                "mapped.open": lambda: self.warm(self.repository(), lambda url: mapped.open(url).values()),
                "safetensors load_file": lambda: self.warm(
                    self.safetensors_file(), lambda path: safetensors.torch.load_file(path).values()
                ),
                "safetensors safe_open": lambda: self.warm(self.safetensors_file(), safely_opened),
            },
            "step": {"Run.step": self.step},
        }

    def answer(self, row: str, contender: str) -> Meter:
        """Run a contender once. What it wrote is removed, but for what the row keeps."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self.meter = Meter()
        self.measures()[row][contender]()
        for path in self.folder.iterdir():
            if not path.name.startswith(("kept-", "run-")):
                remove(path)
        return self.meter


def safely_opened(path: str) -> Iterator[torch.Tensor]:
    with safetensors.safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  it is no dictionary
            yield file.get_tensor(name)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def finished(pending: PendingSave) -> None:
    """Wait for it, and until older ones are dropped. Raises what failed."""
    pending.wait_done()
    pending.raise_error()


def read_all(path: Path) -> None:
    buffer = bytearray(BUFFER_BYTES)
    for each in [path] if path.is_file() else sorted(path.rglob("*")):
        if each.is_file():
            with each.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def cold(path: Path) -> Path:
    os.sync()
    drop_from_cache(path)
    return path


def sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(fd)
    os.close(fd)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def resident_bytes(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def used_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scale", type=float, default=1.0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    options.folder.mkdir(parents=True, exist_ok=True)
    training = Training(options.folder, options.scale)
    rows = {row: list(contenders) for row, contenders in training.measures().items()}
    print(json.dumps({"bytes": training.bytes, "rows": rows}), flush=True)
    peaks: dict[str, int] = {}
    for line in sys.stdin:
        row, contender = line.rstrip("\n").split("\t")
        if not contender:
            training.clear()
            print("{}", flush=True)
            continue
        found = training.answer(row, contender)
        peaks[line] = max(peaks.get(line, 0), found.peak_bytes)  # what it keeps for the next time is seen in its first
        told = {"wall_seconds": found.wall_seconds, "cpu_seconds": found.cpu_seconds, "rss_bytes": peaks[line]}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
