"""Read packs, and say which of their stored bytes are what was written. Needs no keys.

A pack's name is the hash of its footer, and the footer holds the hash of every payload as stored.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from itertools import islice
from typing import Literal

import msgspec

from outlast.clock import Clock
from outlast.errors import Archived, Corrupt, InvalidInput, NotFound, OutlastError
from outlast.events import EventSink, Progress
from outlast.records import PackRef
from outlast.repo import footers, pack, seal
from outlast.repo.pack import Footer, object_name
from outlast.store.base import ObjectStore

RANGE_BYTES = 8 << 20
_PROGRESS_SECONDS = 0.1

Data = Literal["all", "none"] | float
"""How much of the packs' payloads to read: all, none, or a fraction of their bytes"""


def refuse_senseless(data: Data, max_seconds: float | None) -> None:
    """Raise `InvalidInput` for what is no amount of data or of time."""
    if data not in ("all", "none") and not (isinstance(data, float | int) and 0 <= data <= 1):
        raise InvalidInput(f"{data!r} is not an amount of data to check.", hint="Say all, none or a part, as 5%.")
    if max_seconds is not None and not max_seconds > 0:
        raise InvalidInput(f"{max_seconds!r} seconds are no time to read anything; nothing was read.")


def choose(refs: Sequence[PackRef], data: Data) -> list[PackRef]:
    """Of packs in order of their turn the first ones, up to that share of the bytes of all."""
    if data == "all":
        return list(refs)
    if data == "none":
        return []
    wanted = float(data) * sum(ref.bytes for ref in refs)
    chosen = []
    for ref in refs:
        if wanted <= 0:
            break
        chosen.append(ref)
        wanted -= ref.bytes
    return chosen


class Task(msgspec.Struct, frozen=True):
    """`listed_bytes`: the size that a listing told, None where the pack is not in it."""

    ref: PackRef
    listed_bytes: int | None
    whole: bool
    """read the payloads too"""


class Checked(msgspec.Struct):
    """What came of one pack. `bad`: chunks whose stored bytes are not those that were written."""

    ref: PackRef
    footer: Footer | None = None
    problems: list[str] = []
    bad: list[bytes] = []
    read_whole: bool = False
    is_missing: bool = False
    is_archived: bool = False
    """it can't be read, and that is no damage; its footer is known where it is kept beside it"""


def why(store: ObjectStore, exc: OutlastError) -> str:
    """A sentence on why an object can't be had. When it is the whole store that is away, raise instead."""
    if isinstance(exc, NotFound):
        return "It is missing."
    if not isinstance(exc, Corrupt):
        store.stat("format")
    return exc.message


class Scrub:
    """Reads packs in parallel. When `max_seconds` are over, counted from here, no more payloads are begun."""

    def __init__(self, store: ObjectStore, clock: Clock, sink: EventSink, max_seconds: float | None = None) -> None:
        self._store = store
        self._clock = clock
        self._deadline_seconds = None if max_seconds is None else clock.monotonic_seconds() + max_seconds
        self._progress = _Throttle(clock, sink)

    @property
    def bytes_read(self) -> int:
        return self._progress.bytes_read

    def run(self, tasks: Sequence[Task]) -> Iterator[Checked]:
        """What came of each pack, in the order in which they are done; they are begun in the order given."""
        self._progress.begin(sum(task.ref.bytes for task in tasks if task.whole), len(tasks))
        workers = max(2, min(8, self._store.capabilities.concurrency))
        waiting: Iterable[Task] = iter(tasks)
        with ThreadPoolExecutor(workers, thread_name_prefix="check") as pool:
            pending: set[Future[Checked]] = {
                pool.submit(self._check_pack, task) for task in islice(waiting, 2 * workers)
            }
            try:
                while pending:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
                        self._progress.add(packs=1)
                    pending |= {pool.submit(self._check_pack, task) for task in islice(waiting, len(done))}
            finally:
                for future in pending:
                    future.cancel()

    def _check_pack(self, task: Task) -> Checked:
        checked, ref = Checked(task.ref), task.ref
        name = object_name(ref.name)
        try:
            size = task.listed_bytes
            if size is None:
                size = self._store.stat(name).size_bytes
            if size != ref.bytes:
                checked.problems.append(f"It has {size} bytes instead of {ref.bytes}.")
            checked.footer = self._read_ends(ref, checked)
        except Archived:
            checked.is_archived = True
            with suppress(Archived):
                checked.footer = footers.read(self._store, ref)
            return checked
        except OutlastError as exc:
            checked.is_missing = isinstance(exc, NotFound)
            checked.problems.append(why(self._store, exc))
            return checked
        if task.whole and not self._is_time_up():
            for start, end, parts in _ranges(checked.footer, ref.bytes):
                self._check_range(name, start, end, parts, checked)
            checked.read_whole = True
            if checked.bad:
                count = len(checked.footer.records)
                checked.problems.append(f"{len(checked.bad)} of its {count} chunks are damaged.")
        return checked

    def _is_time_up(self) -> bool:
        return self._deadline_seconds is not None and self._clock.monotonic_seconds() >= self._deadline_seconds

    def _read_ends(self, ref: PackRef, checked: Checked) -> Footer:
        name = object_name(ref.name)
        guess = min(ref.bytes, ref.chunks * pack.RECORD.itemsize + pack.TRAILER.size)
        head_bytes = min(ref.bytes, pack.HEADER.size)
        head, tail = self._store.get_ranges(name, [(0, head_bytes), (ref.bytes - guess, guess)])
        needed = pack.footer_bytes(tail, ref.name, ref.bytes)
        if needed > len(tail):
            [tail] = self._store.get_ranges(name, [(ref.bytes - needed, needed)])
        footer = pack.parse_footer(tail, ref.name, ref.bytes)
        self._progress.add(head_bytes + needed)
        if head != tail[-pack.TRAILER.size :][: pack.HEADER.size]:
            checked.problems.append("Its header is damaged; the footer has a copy, so no chunk is affected.")
        return footer

    def _check_range(self, name: str, start: int, end: int, parts: list[_Part], checked: Checked) -> None:
        assert checked.footer is not None
        records = checked.footer.records
        try:
            [data] = self._store.get_ranges(name, [(start, end - start)])
        except OutlastError as exc:
            checked.problems.append(why(self._store, exc))
            checked.bad += [records["id"][row].tobytes() for _, _, row in parts if row >= 0]
            return
        view = memoryview(data)
        for offset, length, row in parts:
            found = view[offset - start : offset - start + length]
            if row < 0:
                if found != bytes(length):
                    checked.problems.append(f"The padding at offset {offset} is not zero; no chunk is affected.")
            elif seal.digest(found) != records["stored_hash"][row].tobytes():
                checked.bad.append(records["id"][row].tobytes())
        self._progress.add(end - start)


_Part = tuple[int, int, int]
"""(offset, length, number of the record or -1 for padding)"""


def _ranges(footer: Footer, size: int) -> Iterator[tuple[int, int, list[_Part]]]:
    """(start, end, parts): everything between header and table, in reads of about `RANGE_BYTES`."""
    offsets, lengths = footer.records["offset"].tolist(), footer.records["stored"].tolist()
    parts: list[_Part] = [
        (offset, length, row) for row, (offset, length) in enumerate(zip(offsets, lengths, strict=True))
    ]
    for offset, length in pack.gaps(footer, size):
        for at in range(offset, offset + length, RANGE_BYTES):
            parts.append((at, min(RANGE_BYTES, offset + length - at), -1))
    parts.sort()
    first = 0
    for number, (offset, length, _) in enumerate(parts):
        if number + 1 == len(parts) or parts[number + 1][0] + parts[number + 1][1] - parts[first][0] > RANGE_BYTES:
            yield parts[first][0], offset + length, parts[first : number + 1]
            first = number + 1


class _Throttle:
    """Progress, told at most ten times a second, from any thread."""

    def __init__(self, clock: Clock, sink: EventSink) -> None:
        self._clock = clock
        self._sink = sink
        self._lock = threading.Lock()
        self._last_seconds = clock.monotonic_seconds()
        self._total_bytes = 0
        self._total_packs = 0
        self._packs = 0
        self._before = 0
        self.bytes_read = 0

    def begin(self, total_bytes: int, packs: int) -> None:
        self._total_bytes, self._total_packs, self._packs = total_bytes, packs, 0
        self._before = self.bytes_read

    def add(self, bytes_read: int = 0, packs: int = 0) -> None:
        with self._lock:
            self.bytes_read += bytes_read
            self._packs += packs
            now = self._clock.monotonic_seconds()
            last = packs and self._packs == self._total_packs
            if now - self._last_seconds < _PROGRESS_SECONDS and not last:
                return
            self._last_seconds = now
            done = min(self.bytes_read - self._before, self._total_bytes)
            packs_done = self._packs
        self._sink.progress(Progress("check", done, self._total_bytes, packs_done, self._total_packs))
