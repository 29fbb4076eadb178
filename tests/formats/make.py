"""Make the golden repositories of this format version: `python tests/formats/make.py tests/formats/v1`.

Run once per format version and commit the result; later versions must read it for ever.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from outlast.backup.create import create
from outlast.clock import ManualClock
from outlast.records import Chunking
from outlast.repo import write
from outlast.repo.repository import Repository
from outlast.store.local import LocalStore

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
    main(Path(sys.argv[1]))
