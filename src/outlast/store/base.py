"""The contract every object store keeps, in prose and as a Protocol.

A store maps names to immutable byte strings.

* **Durable on return.** When `put` or `put_if_absent` returns, the bytes and the name survive a
  power cut. When either raises, the object is either absent (or, for `put`, as it was) or complete:
  no reader ever sees a part of it.
* **One winner.** Of any number of concurrent `put_if_absent` calls for one name exactly one
  succeeds; the others raise `Exists` and change nothing. A lost reply is not a lost write:
  `Unavailable` from a put means that the caller must read back to learn the outcome. A store that
  finds out about a lost reply by comparing bytes succeeds on identical ones, even if another writer
  put them there; who needs to know the winner puts random bytes into the object. (Log entries and
  packs carry such bytes, so for them identical means ours.)
* **Read after write.** Once a put has returned, `get`, `stat` and `list` of every client see it.
* **Nothing hidden.** `list` yields every object with the prefix, in ascending order of name, and
  nothing else: no temporary files, no directories.
* **Errors are ours.** Vendor errors are translated here, once: `NotFound`, `Exists`,
  `Unavailable`, `StoreFull`, `Refused` (permission, read-only), `Archived` (whole, and to be thawed
  before it is read), `InvalidInput` (a bad name). A store
  that is away as a whole raises `Unavailable`, never `NotFound` once it has been there.
* **Local files.** A store whose capabilities say `memory_map` also has `local_path(name) -> str`: the
  file that holds, or would hold, the object. It is for mapping and for learning about the file system,
  never for writing; other stores need not have the method.

The suite in `outlast.testing.conformance` states the same contract as executable checks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Protocol

import msgspec

from outlast.errors import InvalidInput

Buffer = bytes | bytearray | memoryview

HOW_TO_THAW = "`outlast repo thaw SNAPSHOT --dry-run` tells what has to be thawed, how long it takes and what it costs."
NAME_BYTES_MAX = 512
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")


class ObjectInfo(msgspec.Struct, frozen=True):
    """One listed object; `modified_seconds` is by the store's own clock (Unix epoch)."""

    name: str
    size_bytes: int
    modified_seconds: float


class Capabilities(msgspec.Struct, frozen=True):
    """What differs between stores and matters to callers."""

    memory_map: bool = False
    """Objects are local files: `local_path` may be used to map them."""
    durable_when_listed: bool = False
    """What is listed survives a power cut, whoever wrote it, and also if they died before they were told so. A disk
    lists what a killed process left in the page cache."""
    readonly: bool = False
    concurrency: int = 4
    """How many calls at once make sense."""
    read_bytes: int = 8 << 20
    """How many bytes to ask for in one call, where more lie side by side."""
    object_bytes_max: int = 5 << 30
    pack_class: str = ""
    """The storage class in which packs are created; empty: the one of the bucket."""


class ObjectStore(Protocol):
    """Named bytes. All methods may be called from many threads at once."""

    @property
    def url(self) -> str:
        """Where this is, as a person would write it; never holds a secret."""
        ...

    @property
    def capabilities(self) -> Capabilities: ...

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        """Create `name` with the parts joined. Raises `Exists` when the name is taken."""
        ...

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """Create or atomically replace `name`."""
        ...

    def get(self, name: str) -> bytes:
        """The whole object. Raises `NotFound`."""
        ...

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """For each (offset, length) exactly those bytes.

        Raises `NotFound` for a missing object and `Corrupt` when a range reaches past its end.
        """
        ...

    def stat(self, name: str) -> ObjectInfo:
        """Size and modification time. Raises `NotFound`."""
        ...

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        """Objects whose name starts with `prefix` (any string, not only whole path parts) and is > `after`."""
        ...

    def delete(self, name: str) -> None:
        """Remove the object; a missing one is not an error. When it returns, a power cut doesn't bring it back."""
        ...


def check_name(name: str) -> str:
    """Return `name` when it is a legal object name, else raise `InvalidInput`.

    Names come from data (log entries, indexes); a store turns them into paths, so nothing but a
    conservative alphabet is let through, and no part may start with a dot.
    """
    if len(name) > NAME_BYTES_MAX or not _NAME.fullmatch(name):
        raise InvalidInput(f"{name[:80]!r} is not a legal object name; nothing was touched.")
    return name
