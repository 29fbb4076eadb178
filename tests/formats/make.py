"""Make the golden repositories of this format version: `python tests/formats/make.py tests/formats/v1 [sums]`.

Run once per format version and commit the result; later versions must read it for ever. `sums`: only the one with the
feature of that name, which came later.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save, save_file

from outlast.backup.create import create
from outlast.clock import ManualClock
from outlast.records import Chunking, Entry, Snapshot, time_text
from outlast.repo import write
from outlast.repo.copy import copy
from outlast.repo.form import WAY_OUT
from outlast.repo.repository import Repository
from outlast.store.local import LocalStore
from outlast.store.memory import MemoryStore

PASSPHRASE = b"correct horse battery staple"
SMALL = Chunking(block_bytes=16384, min_bytes=2048, avg_bytes=8192, max_bytes=32768)


def grow(folder: Path) -> None:
    """One of everything that a manifest and a pack can hold."""
    random = np.random.default_rng(11)
    weights = {
        "embed.weight": random.standard_normal((64, 96)).astype(np.float32),
        "norm.bias": np.zeros(300, np.float32),
        "half": random.standard_normal(5000).astype(np.float16),
        "double": random.standard_normal(2000),
        "ids": np.arange(3000, dtype=np.int64),
    }
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    torch.save({name: torch.from_numpy(array) for name, array in weights.items()}, folder / "model.pt")
    np.save(folder / "array.npy", weights["double"])
    (folder / "log.txt").write_text("step 1 loss 0.5\n" * 3000)
    (folder / "noise.bin").write_bytes(random.bytes(40_000))
    (folder / "empty").mkdir()
    (folder / "nothing").touch()
    (folder / os.fsdecode(b"odd %\n\xff")).write_text("odd")
    (folder / "link").symlink_to("model.pt")
    os.link(folder / "log.txt", folder / "same.txt")
    with open(folder / "sparse.img", "wb") as file:
        file.truncate(300_000)
        file.seek(200_000)
        file.write(b"island")
    for path in folder.rglob("*"):
        if not path.is_symlink():
            os.utime(path, ns=(0, 1_700_000_000_123_456_789))


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix().encode("utf-8", "surrogateescape").hex(): hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def steps() -> list[bytes]:
    """A training's state, some steps apart."""
    random = np.random.default_rng(12)
    state = {"w": random.normal(size=9000).astype(np.float32), "v": random.normal(size=4000)}
    found = []
    for _ in range(6):
        found.append(save(state))
        with np.errstate(invalid="ignore"):
            state = {name: each * each.dtype.type(1.0001) for name, each in state.items()}
        state["w"].view(np.uint32)[:4] = [0x7FC00001, 0xFFA00000, 0x80000000, 1]
    return found


def make_sums(target: Path) -> None:
    clock = ManualClock(seed=3)
    source = Repository.create(MemoryStore(), compression="none", chunking=SMALL, clock=clock)
    for number, content in enumerate(steps()):
        writer = source.writer()
        head = 8 + int.from_bytes(content[:8], "little")
        cuts = [0, *(head + at for at in (0, 16384, 32000, 48384, 64768, 68000))]
        chunks = [writer.add(writer.prepare(content[start:end])) for start, end in pairwise(cuts)]
        writer.add_entry(Entry("model.safetensors", "file", mode=0o644, size=len(content), chunks=chunks))
        time = time_text((10**9 + number) * 10**9)
        writer.commit(Snapshot(id="", kind="checkpoint", name="run", time=time, files=1, bytes=len(content)))
    (target / "sums.json").write_text(json.dumps([hashlib.sha256(each).hexdigest() for each in steps()]) + "\n")
    store = LocalStore(str(target / "sums"), clock)
    repository = Repository.create(store, secret=lambda: PASSPHRASE, chunking=SMALL, pack_bytes=100_000, clock=clock)
    assert not copy(source, repository, delta=True).failed
    (target / "sums" / "tmp").rmdir()
    for name in WAY_OUT:
        (target / "sums" / name).unlink()


def main(target: Path) -> None:
    write.SEGMENT_PACKS = 3
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        grow(source)
        for kind, secret in (("plain", None), ("encrypted", lambda: PASSPHRASE)):
            clock = ManualClock(seed=len(kind))
            repository = Repository.create(
                LocalStore(str(target / kind), clock), secret=secret, chunking=SMALL, pack_bytes=100_000, clock=clock
            )
            create(repository, [str(source)], name="golden", tags={"step": "1"})
            create(repository, [str(source / "log.txt")], name="second")
        (target / "contents.json").write_text(json.dumps(contents(source), indent=1) + "\n")
    for leftover in target.rglob("tmp"):
        leftover.rmdir()


if __name__ == "__main__":
    if "sums" not in sys.argv:
        main(Path(sys.argv[1]))
    make_sums(Path(sys.argv[1]))
