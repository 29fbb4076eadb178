"""Folders to back up: made from a description, and read back into one that can be compared."""

from __future__ import annotations

import hashlib
import os
import stat
from typing import Any

from outlast.records import Entry
from outlast.repo.repository import Repository


def describe(root: bytes | str) -> dict[bytes, tuple[Any, ...]]:
    """Everything a restore must bring back: type, mode, mtime, content, link targets, which names are one file."""
    root = os.fsencode(root)
    found: dict[bytes, tuple[Any, ...]] = {}
    first_name: dict[int, bytes] = {}
    for folder, folders, files in os.walk(root):
        for name in [b"", *folders, *files]:
            path = os.path.join(folder, name) if name else folder
            status = os.lstat(path)
            relative = os.path.relpath(path, root)
            kind = stat.S_IFMT(status.st_mode)
            facts: tuple[Any, ...] = (kind, stat.S_IMODE(status.st_mode), status.st_mtime_ns)
            if stat.S_ISLNK(status.st_mode):
                facts = (kind, os.readlink(path))
            elif stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:
                    facts += (hashlib.file_digest(file, "sha256").hexdigest(),)
                if status.st_nlink > 1:
                    facts += (first_name.setdefault(status.st_ino, relative),)
            found[relative] = facts
    return found


def entries(repository: Repository) -> dict[str, Entry]:
    return {entry.path: entry for entry in repository.entries(repository.find_snapshot("latest"))}


def content(repository: Repository, entry: Entry) -> bytes:
    return b"".join(bytes(repository.get_chunk(bytes.fromhex(chunk))) for chunk, _ in entry.chunks)
