"""What `state.json` of a checkpoint says: the part of a state that is no tensor. Torch is not needed to read it.

With several ranks each has a folder `rank-00000/` of its own inside the snapshot; one rank has its files at the root.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from outlast.errors import Refused
from outlast.records import Entry, Snapshot, parse
from outlast.repo.content import Content, RecentChunks

STATE_FILE = "state.json"
STATE_VERSION = 1
RNG = "rng"
"""the key of the random number generators of the process"""


class Description(msgspec.Struct):
    """The content of `state.json`."""

    version: int
    step: int
    parts: dict[str, tuple[str, object]]
    """key -> (kind, tree)"""
    facts: dict[str, object] = {}


def folder_of(rank: int, ranks: int) -> str:
    return f"rank-{rank:05d}/" if ranks > 1 else ""


def ranks_of(files: Mapping[str, Entry]) -> int:
    """How many ranks saved a checkpoint, of whose files these are all; 0 for one that no `Run` saved."""
    return sum(path.rpartition("/")[2] == STATE_FILE for path in files)


def describe(files: Mapping[str, Entry], chunks: RecentChunks, snapshot: Snapshot) -> Description:
    """What `state.json` of a rank says, whose files these are. Raises `Corrupt`, and `Refused` for a later version."""
    entry = files.get(STATE_FILE)
    if entry is None:
        raise Refused(f"snapshot {snapshot.id[:8]} is no checkpoint of a training state: it has no {STATE_FILE}.")
    what = f"{STATE_FILE} of checkpoint {snapshot.id[:8]}"
    found = parse(Content(entry, chunks.get).read(0, entry.size), Description, what)
    if found.version != STATE_VERSION:
        raise Refused(f"{what} is of version {found.version}, and this program knows {STATE_VERSION}.")
    return found
