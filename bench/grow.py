"""Makes repositories of many snapshots: `grow.py FOLDER 100 1000 10000` makes FOLDER/100, FOLDER/1000, ...

Each snapshot is of a folder of 50 files with 1,000 chunks, 10 files and 200 chunks of which are new. The
chunks are tiny, so that the disk holds them; all that grows with their number is as large as it would be.
Built without fsync, by our own writer: it is the reading that is measured.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from outlast.clock import ManualClock
from outlast.records import ChunkRef, Entry, Snapshot, time_text
from outlast.repo.repository import Repository
from outlast.store.disk import Disk
from outlast.store.local import LocalStore

FILES = 50
NEW_FILES = 10
CHUNKS = 20
CHUNK_BYTES = 48
HOUR = 3600.0


class Unsynced(Disk):
    """A disk that is told to make nothing durable."""

    def fsync_file(self, fd: int) -> None:
        return

    def fsync_dir(self, path: str) -> None:
        return


def snapshot(repository: Repository, clock: ManualClock, files: list[list[ChunkRef]], number: int) -> None:
    writer = repository.writer()
    for place in range(NEW_FILES):
        noise = clock.random_bytes(CHUNKS * CHUNK_BYTES)
        pieces = [noise[at : at + CHUNK_BYTES] for at in range(0, len(noise), CHUNK_BYTES)]
        files[(number * NEW_FILES + place) % FILES] = [writer.add(writer.prepare(piece)) for piece in pieces]
    for place, chunks in enumerate(files):
        if chunks:
            size = len(chunks) * CHUNK_BYTES
            writer.add_entry(Entry(f"shard-{place:05d}.bin", "file", 0o644, size=size, chunks=chunks))
    made = Snapshot("", "backup", "series", time_text(clock.now_ns()), files=FILES, bytes=FILES * CHUNKS * CHUNK_BYTES)
    writer.commit(made)
    clock.sleep(HOUR)


def main() -> None:
    folder = Path(sys.argv[1])
    counts = sorted(map(int, sys.argv[2:]))
    clock = ManualClock(seed=3)
    store = LocalStore(str(folder / "growing"), clock, Unsynced())
    repository = Repository.create(store, compression="none", clock=clock)
    files: list[list[ChunkRef]] = [[] for _ in range(FILES)]
    for number in range(counts[-1]):
        snapshot(repository, clock, files, number)
        if number + 1 in counts:
            shutil.copytree(folder / "growing", folder / str(number + 1), copy_function=os.link)
    shutil.rmtree(folder / "growing")


if __name__ == "__main__":
    main()
