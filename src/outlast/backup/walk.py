"""Walk the sources of a backup in the order of the manifest, without following links."""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Callable, Iterator, Sequence

import msgspec

from outlast.errors import InvalidInput


class Found(msgspec.Struct, frozen=True):
    """Something on disk. `path` is where it goes in the snapshot, `location` where it lies now."""

    path: bytes
    location: bytes
    status: os.stat_result
    error: OSError | None = None
    """Why nothing more is known: a folder that can't be listed, a thing that can't be looked at."""


_UNKNOWN = os.stat_result((0,) * 10)


class Root(msgspec.Struct, frozen=True):
    """A source and its place in the snapshot: "." for a single folder, else its own name."""

    path: bytes
    location: bytes
    status: os.stat_result


def roots(sources: Sequence[bytes]) -> tuple[list[Root], list[tuple[bytes, OSError]]]:
    """Resolve the sources: the roots in manifest order, and what is missing with why.

    A link given as a source is followed; links found below it are not.
    """
    found: list[Root] = []
    missing: list[tuple[bytes, OSError]] = []
    for source in sources:
        if not source:
            raise InvalidInput("one of the paths to back up is empty; nothing was backed up.")
        location = os.path.realpath(source)
        try:
            status = os.stat(location)
        except OSError as exc:
            missing.append((source, exc))
            continue
        found.append(Root(os.path.basename(location) or b"root", location, status))
    if len(sources) == 1 and found and stat.S_ISDIR(found[0].status.st_mode):
        return [msgspec.structs.replace(found[0], path=b".")], missing
    found.sort(key=lambda root: root.path)
    for one, other in itertools.pairwise(found):
        if one.path == other.path:
            raise InvalidInput(
                f"two sources are both called {one.path.decode(errors='replace')!r}: "
                f"{os.fsdecode(one.location)} and {os.fsdecode(other.location)}. Nothing was backed up.",
                hint="Back them up one by one, each with its own --name, or back up the folder that holds both.",
            )
    return found, missing


def walk(root: Root, skip: Callable[[bytes, os.stat_result], bool]) -> Iterator[Found]:
    """Everything at and below a root, parents first, siblings in byte order.

    `skip(path, status)` leaves a thing, and all below it, out. What vanishes meanwhile is left out.
    """
    pending = [Found(root.path, root.location, root.status)]
    while pending:
        found = pending.pop()
        if found.error is not None or not stat.S_ISDIR(found.status.st_mode):
            yield found
            continue
        try:
            with os.scandir(found.location) as listing:
                children = sorted(listing, key=lambda child: child.name, reverse=True)
        except FileNotFoundError:
            continue
        except OSError as exc:
            yield msgspec.structs.replace(found, error=exc)
            continue
        yield found
        prefix = b"" if found.path == b"." else found.path + b"/"
        for child in children:
            path = prefix + child.name
            try:
                status = child.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            except OSError as exc:
                pending.append(Found(path, child.path, _UNKNOWN, exc))
                continue
            if not skip(path, status):
                pending.append(Found(path, child.path, status))
