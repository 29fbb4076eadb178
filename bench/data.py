"""Makes what the benchmark backs up; a program of its own, so that the measuring process stays small.

    python bench/data.py model FOLDER --scale 1 --version 0
    python bench/data.py small FOLDER --count 100000

`model` writes `checkpoint.pt`: a transformer of 12 blocks in fp32 (GPT-2 small's shapes) with both
AdamW moments, 1.5 GB at scale 1. The tensors are drawn, not trained: normal weights with another
scale in every layer, normal first moments, squared normal second moments. Version v differs from
version v-1 in 2 of the 12 blocks: weights, moments and the step counters of these parameters, as when
the other blocks are frozen; with --one-step in the step counter of every parameter too, as when an
optimizer counts steps for all of them. Equal arguments give equal bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

BLOCKS = 12
BLOCKS_CHANGED = 2
SMALL_FILE_BYTES = 4096
SMALL_FILES_PER_FOLDER = 1000


def last_change(block: int, version: int) -> int:
    """The newest version up to `version` that changed this block; 0 if none did."""
    for candidate in range(version, 0, -1):
        first = BLOCKS_CHANGED * candidate % BLOCKS
        if block in range(first, first + BLOCKS_CHANGED):
            return candidate
    return 0


def shapes(scale: float) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """(tensors outside the blocks, tensors of one block), by name."""
    width = max(32, round(768 * scale**0.5 / 32) * 32)
    words = max(64, round(50257 * scale**0.5))
    positions = max(16, round(1024 * scale**0.5))
    outer = {
        "wte.weight": (words, width),
        "wpe.weight": (positions, width),
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
    }
    block = {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.c_attn.weight": (width, 3 * width),
        "attn.c_attn.bias": (3 * width,),
        "attn.c_proj.weight": (width, width),
        "attn.c_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (width, 4 * width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (4 * width, width),
        "mlp.c_proj.bias": (width,),
    }
    return outer, block


def parts(scale: float, version: int) -> Iterator[tuple[str, tuple[int, ...], int, float]]:
    """(name, shape, the version whose values it has, standard deviation) of every parameter."""
    outer, block = shapes(scale)
    for name, shape in outer.items():
        yield name, shape, 0, 0.02
    for number in range(BLOCKS):
        for name, shape in block.items():
            yield f"h.{number}.{name}", shape, last_change(number, version), 0.02 / (1 + number) ** 0.5


def write_model(folder: Path, scale: float, version: int, one_step: bool = False) -> dict[str, int]:
    """Write `checkpoint.pt`, and `config.json` after it; {"bytes": all, "changed": since version - 1}."""
    import torch

    weights, states, changed = {}, {}, 0
    for number, (name, shape, seed_version, deviation) in enumerate(parts(scale, version)):
        generator = torch.Generator().manual_seed(number * 1000 + seed_version)
        weight = torch.randn(shape, generator=generator) * deviation
        if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
            weight += 1
        first = torch.randn(shape, generator=generator) * (1e-4 * deviation / 0.02)
        second = torch.randn(shape, generator=generator).mul_(2e-4).square_()
        weights[name] = weight
        step = torch.tensor(1000.0 + (version if one_step else seed_version))
        states[number] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
        if version and seed_version == version:
            changed += 3 * weight.nbytes + step.nbytes
        elif version and one_step:
            changed += step.nbytes
    folder.mkdir(parents=True, exist_ok=True)
    groups = [{"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "params": list(states)}]
    optimizer = {"state": states, "param_groups": groups}
    path = folder / "checkpoint.pt"
    torch.save({"step": 1000, "model": weights, "optimizer": optimizer}, path)
    # borg never trusts the newest file of a folder to be unchanged; a newer one spares it a re-read.
    time.sleep(0.05)
    config = folder / "config.json"
    config.write_text(json.dumps({"blocks": BLOCKS, "version": version}) + "\n")
    return {"bytes": path.stat().st_size + config.stat().st_size, "changed": changed}


def write_small(folder: Path, count: int) -> dict[str, int]:
    """Files of 4 KiB, every one different, 1,000 to a folder."""
    for number in range(count):
        inner = folder / f"{number // SMALL_FILES_PER_FOLDER:04d}"
        if number % SMALL_FILES_PER_FOLDER == 0:
            inner.mkdir(parents=True, exist_ok=True)
        head = f"{number:012d}\n".encode()
        (inner / f"{number:06d}.bin").write_bytes(head + os.urandom(SMALL_FILE_BYTES - len(head)))
    return {"bytes": count * SMALL_FILE_BYTES, "changed": 0}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["model", "small"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--version", type=int, default=0)
    parser.add_argument("--one-step", action="store_true")
    parser.add_argument("--count", type=int, default=100_000)
    options = parser.parse_args()
    if options.what == "model":
        facts = write_model(options.folder, options.scale, options.version, options.one_step)
    else:
        facts = write_small(options.folder, options.count)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
