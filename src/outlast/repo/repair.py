"""Mend what a check found, by writing new objects alone: nothing is edited and nothing deleted.

The order of durable writes makes every prefix at least as good as what was before: chunks are
stored again first, and committed; only then the damaged packs are quarantined by an
entry of the log, and even those are still read where nothing else holds a chunk.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import msgspec

from outlast.errors import Corrupt, Exists, NotFound, OutlastError
from outlast.events import Event
from outlast.records import PackRef
from outlast.repo import write
from outlast.repo.check import Examined
from outlast.repo.index import Location, build_segment, segment_name
from outlast.repo.pack import EncodedChunk, Footer
from outlast.repo.repack import repack
from outlast.repo.repository import Repository
from outlast.repo.state import QUARANTINE, State

Places = dict[bytes, list[tuple[str, int]]]
"""chunk -> (path, offset in that file) of files that it belongs to"""


class Origin(Protocol):
    """Another place that may still have what was lost."""

    @property
    def where(self) -> str:
        """As a person would write it."""
        ...

    def chunks(self, view: Repository, wanted: dict[bytes, int], places: Places) -> Iterator[EncodedChunk]:
        """Those of the wanted chunks (-> plain bytes) that it has, each proven to have its id, at most once."""
        ...


class Mended(msgspec.Struct):
    """Chunks that were stored again. `failed`: those that looked readable and were not -> plain bytes."""

    failed: dict[bytes, int] = {}
    chunks: int = 0
    bytes: int = 0


def rescue(found: Examined) -> Mended:
    """Store again what snapshots need and only packs hold that are damaged, condemned or quarantined.

    Raises `Unavailable`, `StoreFull`.
    """
    view, mended = found.view, Mended()
    copies = {chunk: _in_order(view, chunk, found.bad) for chunk in found.needs.endangered}
    copies = {chunk: left for chunk, left in copies.items() if left}
    while copies:
        wanted: dict[str, list[tuple[bytes, Location]]] = {}
        for chunk, left in copies.items():
            location = left.pop(0)
            wanted.setdefault(location.pack.name, []).append((chunk, location))
            mended.failed[chunk] = location.plain_bytes
        failed = set(repack(view, wanted.items(), partly=True).damaged)
        for chunk in copies.keys() - failed:
            mended.chunks += 1
            mended.bytes += mended.failed.pop(chunk)
        copies = {chunk: left for chunk, left in copies.items() if chunk in failed and left}
    return mended


def _in_order(view: Repository, chunk: bytes, bad: dict[bytes, set[str]]) -> list[Location]:
    """The copies to try, live packs first."""
    copies = view.index.copies(chunk)
    known_bad = bad.get(chunk, ())
    found = [each for each in copies if each.pack.name not in known_bad] or copies
    return sorted(found, key=lambda each: each.pack.name not in view.state.packs)


def store_again(view: Repository, chunks: Iterable[EncodedChunk]) -> Mended:
    """Store chunks that came from elsewhere, and commit them. Raises `Unavailable`, `StoreFull`."""
    mended = Mended()
    writer = view.writer()
    try:
        for chunk in chunks:
            writer.store_again(chunk)
            mended.chunks += 1
            mended.bytes += chunk.plain_bytes
        writer.finish()
    except BaseException:
        writer.abandon()
        raise
    return mended


def rebuild_segments(found: Examined) -> int:
    """Write new index segments for the packs of damaged ones. Gives how many; failing is no failure."""
    view = found.view
    damaged = {name for name in found.damaged_derived if name.startswith("index/")}
    if not damaged:
        return 0
    out = found.covered | found.damaged_packs
    written = 0
    try:
        for footers in _groups(_footers(view, [ref for name, ref in view.state.packs.items() if name not in out])):
            segment = build_segment(footers)
            if f"index/{segment_name(segment, view.keys)}" in damaged:
                # Nothing is replaced: the same segment with its packs in another order has another name.
                segment = build_segment(footers[::-1])
            name = f"index/{segment_name(segment, view.keys)}"
            if name in damaged:
                continue  # of a single pack: its footer tells as much
            try:
                view.store.put_if_absent(name, [segment])
            except Exists:
                continue
            written += 1
    except OutlastError as exc:
        view.sink.event(Event("index.not_written", f"index segments were not rebuilt: {exc.message}"))
    return written


def _footers(view: Repository, refs: list[PackRef]) -> Iterator[Footer]:
    def read(ref: PackRef) -> Footer | None:
        try:
            return view.read_footer(ref)
        except (Corrupt, NotFound):
            return None

    with ThreadPoolExecutor(view.store.capabilities.concurrency) as threads:
        yield from filter(None, threads.map(read, refs))


def _groups(footers: Iterator[Footer]) -> Iterator[list[Footer]]:
    group: list[Footer] = []
    for footer in footers:
        group.append(footer)
        if sum(len(each.records) for each in group) >= write.SEGMENT_CHUNKS:
            yield group
            group = []
    if group:
        yield group


def quarantine(view: Repository, packs: Collection[str], objects: Collection[str]) -> tuple[list[str], list[str]]:
    """Commit that these packs are damaged, and these derived objects. Gives those that were not quarantined yet."""
    new: tuple[list[str], list[str]] = [], []

    def body(state: State) -> dict[str, Any] | None:
        new[0][:] = sorted(name for name in packs if name in state.packs)
        new[1][:] = sorted(set(objects).difference(state.ignored))
        return {"packs": new[0], "objects": new[1]} if any(new) else None

    view.log.append(QUARANTINE, body)
    return new
