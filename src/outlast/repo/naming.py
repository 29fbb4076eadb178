"""Which snapshot is meant by the beginning of an id, or by `latest`: in one repository, or in several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from outlast.errors import InvalidInput, NotFound
from outlast.records import Snapshot

_ID_CHARACTERS_MIN = 4


class Snapshots(Protocol):
    """What snapshots can be found in: a repository, or `Together`."""

    def snapshots(self) -> list[Snapshot]: ...

    def find_snapshot(self, reference: str, name: str | None = None) -> Snapshot: ...


class Together:
    """The snapshots of several repositories, each once: as the first of them that has it knows it."""

    def __init__(self, repositories: Sequence[Snapshots]) -> None:
        self._repositories = repositories

    def snapshots(self) -> list[Snapshot]:
        """Ordered by time: no other order holds for all of them."""
        found: dict[str, Snapshot] = {}
        for repository in self._repositories:
            for snapshot in repository.snapshots():
                found.setdefault(snapshot.id, snapshot)
        return sorted(found.values(), key=lambda each: each.time)

    def find_snapshot(self, reference: str, name: str | None = None) -> Snapshot:
        """See `find`."""
        return find(self.snapshots(), reference, name)


def find(every: Sequence[Snapshot], reference: str, name: str | None = None) -> Snapshot:
    """See `Repository.find_snapshot`."""
    wanted = reference.strip().lower()
    candidates = [snapshot for snapshot in every if name is None or snapshot.name == name]
    if every and not candidates:
        raise NotFound(
            f"no snapshot is named {name}; there are: {', '.join(sorted({each.name for each in every}))}.",
            hint="`outlast snapshots` lists them.",
        )
    if wanted == "latest":
        if not candidates:
            what = f"named {name}" if name else "in this repository"
            raise NotFound(f"there is no snapshot {what}.", hint="Make one with `outlast backup`.")
        return max(reversed(candidates), key=lambda snapshot: snapshot.time)
    if len(wanted) < _ID_CHARACTERS_MIN:
        raise InvalidInput(
            f"{reference!r} is too short; give at least {_ID_CHARACTERS_MIN} characters of the id, or `latest`.",
            hint="`outlast snapshots` lists them.",
        )
    found = [snapshot for snapshot in candidates if snapshot.id.startswith(wanted)]
    if not found:
        others = [each for each in every if each.id.startswith(wanted)]
        what = f"snapshot {others[0].id[:8]} is of {others[0].name}, not {name}." if others else ""
        raise NotFound(what or f"no snapshot has the id {reference!r}.", hint="`outlast snapshots` lists them.")
    if len(found) > 1:
        shown = max(8, len(wanted) + 4)
        raise InvalidInput(
            f"{reference!r} fits {len(found)} snapshots: {', '.join(item.id[:shown] for item in found[:5])}.",
            hint="Give more characters of the id.",
        )
    return found[0]
