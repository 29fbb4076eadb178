"""The footer of a pack: at its end, and of an archived pack in a small object beside it, which is never archived.

`footers/<name of the pack>` holds the end of the pack, byte for byte. The name of a pack commits to its footer, so
that the copy proves itself. It is derived, but without it nobody knows what an archived pack holds until it is thawed.
"""

from __future__ import annotations

from contextlib import suppress

from outlast.errors import Archived, Corrupt, NotFound
from outlast.records import PackRef
from outlast.repo import pack
from outlast.repo.pack import Footer, object_name
from outlast.store.base import ObjectStore

FOLDER = "footers/"


def kept_name(name: str) -> str:
    """The object with the footer of an archived pack."""
    return FOLDER + name


def kept(store: ObjectStore) -> set[str]:
    """Packs whose footers are kept: those that are archived, or are about to be. A local folder has none."""
    if store.capabilities.memory_map:
        return set()
    return {info.name.removeprefix(FOLDER) for info in store.list(FOLDER)}


def keep(store: ObjectStore, ref: PackRef) -> Footer:
    """Keep the footer of a pack beside it, once it has proven right. Raises `Corrupt`, `NotFound`, `Archived`."""
    tail = _tail(store, ref)
    footer = pack.parse_footer(tail, ref.name, ref.bytes)
    store.put(kept_name(ref.name), [tail])
    return footer


def read(store: ObjectStore, ref: PackRef, *, is_kept: bool = False) -> Footer:
    """The verified footer; where it `is_kept` beside the pack, that one first.

    Raises `Corrupt`, `NotFound`, and `Archived` where it can't be had without thawing.
    """
    if is_kept and (found := _kept(store, ref)) is not None:
        return found
    try:
        return pack.parse_footer(_tail(store, ref), ref.name, ref.bytes)
    except Archived:
        found = None if is_kept else _kept(store, ref)
        if found is None:
            raise
        return found


def _kept(store: ObjectStore, ref: PackRef) -> Footer | None:
    with suppress(Corrupt, NotFound):
        return pack.parse_footer(store.get(kept_name(ref.name)), ref.name, ref.bytes)
    return None


def _tail(store: ObjectStore, ref: PackRef) -> bytes:
    name = object_name(ref.name)
    guess = min(ref.bytes, ref.chunks * pack.RECORD.itemsize + pack.TRAILER.size)
    [tail] = store.get_ranges(name, [(ref.bytes - guess, guess)])
    needed = pack.footer_bytes(tail, ref.name, ref.bytes)
    if needed > len(tail):
        [tail] = store.get_ranges(name, [(ref.bytes - needed, needed)])
    return tail[-needed:]


def is_damaged(store: ObjectStore, ref: PackRef) -> bool:
    """Read a pack and compare each stored chunk with the footer's hash of it. Of an archived one nothing is known."""
    try:
        for start, rows in pack.runs(read(store, ref).records):
            end = rows[-1]["offset"] + rows[-1]["stored"]
            [data] = store.get_ranges(object_name(ref.name), [(start, int(end) - start)])
            if not pack.are_right(memoryview(data), start, rows):
                return True
    except (Corrupt, NotFound):
        return True
    except Archived:
        return False
    return False
