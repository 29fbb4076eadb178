"""How fast one core reads a repository: `decode.py REPOSITORY`, a companion that answers each line.

It has one core to itself, and reads every chunk of every snapshot: from the page cache, decompressed, differences added
up, each block proven by its hash. Nothing is written. It first tells `bytes`, all that the snapshots hold.
"""

from __future__ import annotations

import json
import os
import sys
import time

from outlast.repo.repository import Repository
from outlast.store.layers import open_store


def read_all(repository: Repository) -> int:
    read = [0]

    def take(_: bytes, plain: bytes | memoryview) -> None:
        read[0] += len(plain)

    for snapshot in repository.snapshots():
        for entry in repository.entries(snapshot):
            repository.fetch([bytes.fromhex(chunk) for chunk, _ in entry.chunks], take)
    return read[0]


def main() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    repository = Repository.open(open_store(sys.argv[1]))
    print(json.dumps({"bytes": read_all(repository)}), flush=True)
    for _ in sys.stdin:
        started, used = time.perf_counter(), time.process_time()
        read_all(repository)
        found = {"wall_seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}
        print(json.dumps({**found, "rss_bytes": 0}), flush=True)


if __name__ == "__main__":
    main()
