"""Replace derived objects: few large index segments for many, and no folded state but the newest ones.

New ones are written before old ones are deleted. Who reads meanwhile, and misses one, reads the
footers of the packs instead: slower, and right.
"""

from __future__ import annotations

from outlast.errors import OutlastError
from outlast.events import Event
from outlast.repo import footers
from outlast.repo.index import build_segments, segment_name
from outlast.repo.repository import Repository

SEGMENT_ROWS = 1 << 20
SEGMENTS_MAX = 8
"""more segments than this, beyond what their size needs, are merged"""
_STATES_KEPT = 3


def tidy(repository: Repository, *, swept: bool) -> int:
    """Rewrite the index when packs were `swept`, or it lies in too many pieces. Gives how many segments it wrote.

    Failing is no failure: everything here is derived.
    """
    try:
        for info in list(repository.store.list("state/"))[:-_STATES_KEPT]:
            repository.store.delete(info.name)
        for name in footers.kept(repository.store):
            if repository.state.find(name) is None:
                repository.store.delete(footers.kept_name(name))
        return _merge_segments(repository, swept)
    except OutlastError as exc:
        repository.sink.event(Event("index.not_written", f"the index was not tidied up: {exc.message}"))
        return 0


def _merge_segments(repository: Repository, swept: bool) -> int:
    old = {info.name for info in repository.store.list("index/")}
    index = repository.load_index()
    due = len(old) > SEGMENTS_MAX + len(index) // SEGMENT_ROWS
    if not (due or swept or old.intersection(repository.state.ignored)):
        return 0
    written = set()
    for segment in build_segments(index, SEGMENT_ROWS):
        name = f"index/{segment_name(segment, repository.keys)}"
        # Where the same segment is there, but damaged, its name is taken: it stays derived from the footers.
        if name not in old:
            repository.store.put_if_absent(name, [segment])
        written.add(name)
    for name in sorted(old - written):
        repository.store.delete(name)
    repository.uncovered.clear()
    return len(written - old)
