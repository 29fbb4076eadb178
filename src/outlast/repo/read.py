"""Fetch many chunks: grouped by pack, neighbours in one range, in parallel, each one verified."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby, islice
from threading import Lock
from typing import TYPE_CHECKING

import msgspec

from outlast.errors import Archived, Corrupt, NotFound, OutlastError
from outlast.records import PackRef
from outlast.repo.index import Location
from outlast.repo.pack import HEADER, RECORD, TRAILER, DamagedFooter, object_name

if TYPE_CHECKING:
    from outlast.repo.repository import Repository

_FEW_BYTES = 8 << 20
GAP_BYTES = 128 << 10
_PLAIN_BYTES_IN_FLIGHT = 128 << 20
_SMALL_BYTES = 16 << 10

Deliver = Callable[[bytes, "bytes | memoryview"], None]
Failed = Callable[[bytes, OutlastError], None]


class Fetched(msgspec.Struct):
    """What a fetch cost: chunks delivered, bytes read from the store."""

    chunks: int = 0
    bytes: int = 0

    def add(self, more: Fetched) -> None:
        self.chunks += more.chunks
        self.bytes += more.bytes


class Range(msgspec.Struct):
    """Bytes of a pack to read at once, and the chunks in them."""

    pack: str
    start: int
    end: int
    chunks: list[tuple[bytes, Location]]


def fetch(repository: Repository, chunks: Iterable[bytes], deliver: Deliver, failed: Failed | None) -> Fetched:
    """Call `deliver(id, plain)` once for each distinct chunk, from several threads, in no fixed order.

    A chunk that can't be had goes to `failed(id, error)`; without `failed` the first such error is
    raised, after what is under way has ended. An error raised by `deliver` ends the fetch likewise.
    """
    total = Fetched()

    one_at_a_time = Lock()

    def run(parts: list[Range]) -> Fetched:
        found = Fetched()
        for part in parts:
            # What is done with small chunks is work for the interpreter, whose lock threads would take from
            # each other at every system call: 100,000 files of 4 KiB on a local disk took half as long again.
            small = part.end - part.start < _SMALL_BYTES * len(part.chunks)
            turn = one_at_a_time if small else nullcontext()
            found.add(_fetch_range(repository, part, deliver, failed, turn))
        return found

    parts = list(ranges(repository, chunks, failed))
    able = repository.store.capabilities
    if len(parts) == 1 or (able.memory_map and sum(part.end - part.start for part in parts) < _FEW_BYTES):
        return run(parts)  # to start threads takes longer
    # A local disk reads ahead for whoever reads on: there each pack is for one thread.
    by_pack = [list(each) for _, each in groupby(parts, key=lambda part: part.pack)]
    waiting = iter(by_pack if able.memory_map else [[part] for part in parts])
    workers = max(2, min(8, able.concurrency))
    in_flight = max(workers, min(2 * workers, _PLAIN_BYTES_IN_FLIGHT // (2 * able.read_bytes)))
    with ThreadPoolExecutor(workers, thread_name_prefix="fetch") as pool:
        pending: set[Future[Fetched]] = {pool.submit(run, each) for each in islice(waiting, in_flight)}
        try:
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    total.add(future.result())
                pending |= {pool.submit(run, each) for each in islice(waiting, len(done))}
        finally:
            for future in pending:
                future.cancel()
    return total


def ranges(repository: Repository, chunks: Iterable[bytes], failed: Failed | None) -> Iterator[Range]:
    """Where these chunks lie: gaps up to `GAP_BYTES` are cheaper to read than to skip."""
    located: dict[bytes, Location] = {}
    for chunk in chunks:
        if chunk in located:
            continue
        try:
            located[chunk] = repository.locate(chunk)
        except Corrupt as exc:
            if failed is None:
                raise
            failed(chunk, exc)
    yield from joined(located.items(), repository.store.capabilities.read_bytes)


def joined(located: Iterable[tuple[bytes, Location]], range_bytes: int) -> Iterator[Range]:
    """These chunks in order of pack and offset, those that lie close together in one range of about `range_bytes`."""
    ordered = sorted(located, key=lambda item: (item[1].pack.name, item[1].offset))
    current: Range | None = None
    for chunk, location in ordered:
        end = location.offset + location.stored_bytes
        if (
            current is not None
            and current.pack == location.pack.name
            and location.offset - current.end <= GAP_BYTES
            and end - current.start <= range_bytes
        ):
            current.end = max(current.end, end)
            current.chunks.append((chunk, location))
            continue
        if current is not None:
            yield current
        current = Range(location.pack.name, location.offset, end, [(chunk, location)])
    if current is not None:
        yield current


def _fetch_range(
    repository: Repository,
    part: Range,
    deliver: Deliver,
    failed: Failed | None,
    turn: AbstractContextManager[object],
) -> Fetched:
    """`turn` is held while the chunks are opened and delivered, not while they are read."""
    name = object_name(part.pack)
    try:
        [data] = repository.read_pack(part.pack, [(part.start, part.end - part.start)])
    except Archived as exc:
        return _one_by_one(repository, part.chunks, deliver, failed, exc)
    except (NotFound, Corrupt) as exc:
        lost = Corrupt(f"pack {part.pack[:16]} is missing or cut short: {exc.message}", hint=f"The object is {name}.")
        return _one_by_one(repository, part.chunks, deliver, failed, lost)
    total = Fetched(0, part.end - part.start)
    view = memoryview(data)
    damaged: list[tuple[bytes, Location, Corrupt]] = []
    with turn:
        for chunk, location in part.chunks:
            at = location.offset - part.start
            try:
                plain = repository.open_chunk(chunk, location, view[at : at + location.stored_bytes])
            except Corrupt as exc:
                damaged.append((chunk, location, exc))
                continue
            deliver(chunk, plain)
            total.chunks += 1
    for chunk, location, found in damaged:
        total.add(_one_by_one(repository, [(chunk, location)], deliver, failed, found))
    return total


def _one_by_one(
    repository: Repository,
    chunks: list[tuple[bytes, Location]],
    deliver: Deliver,
    failed: Failed | None,
    lost: OutlastError,
) -> Fetched:
    """A pack cut short may still hold the front part of a range, and another pack a second copy."""
    total = Fetched()
    for chunk, location in chunks:
        try:
            plain = repository.get_stored(chunk)
        except OutlastError as exc:
            if failed is None:
                raise exc from lost
            failed(chunk, exc)
            continue
        deliver(chunk, plain)
        total.chunks += 1
        total.bytes += location.stored_bytes
    return total


def damaged_footer(repository: Repository, ref: PackRef) -> DamagedFooter:
    """What a footer without the right hash may still say. Raises `Corrupt`, `NotFound`, `Unavailable`."""
    guess = min(ref.bytes, ref.chunks * RECORD.itemsize + TRAILER.size)
    ends = [(0, min(ref.bytes, HEADER.size)), (ref.bytes - guess, guess)]
    front, tail = repository.store.get_ranges(object_name(ref.name), ends)
    return DamagedFooter(front, tail, ref.name, ref.bytes, ref.chunks)
