"""The physical limits, as child processes like everything else that is measured.

python bench/limits.py read PATH       read every byte below PATH, 4 MiB at a time
python bench/limits.py copy FROM TO    read, write and fsync every file of the folder FROM into TO
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

BUFFER_BYTES = 4 << 20


def files(path: str) -> Iterator[str]:
    for folder, _, names in os.walk(path):
        yield from (os.path.join(folder, name) for name in names)


def read(path: str) -> None:
    buffer = bytearray(BUFFER_BYTES)
    for name in files(path):
        with open(name, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def copy(source: str, target: str) -> None:
    buffer = bytearray(BUFFER_BYTES)
    view = memoryview(buffer)
    for name in files(source):
        copied = os.path.join(target, os.path.relpath(name, source))
        os.makedirs(os.path.dirname(copied), exist_ok=True)
        with open(name, "rb", buffering=0) as file, open(copied, "xb", buffering=0) as out:
            while count := file.readinto(buffer):
                rest = view[:count]
                while rest:
                    rest = rest[out.write(rest) :]
            os.fsync(out.fileno())


if __name__ == "__main__":
    if sys.argv[1] == "read":
        read(sys.argv[2])
    else:
        copy(sys.argv[2], sys.argv[3])
