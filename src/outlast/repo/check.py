"""Verify a repository: the log, every pack, the derived objects, and every chunk that a snapshot needs.

What is proven, and why that is enough: a pack's name, which the log holds, is the hash of its
footer; the footer holds the hash of every payload as stored. So a payload whose stored bytes have
that hash is byte for byte what was written, and writing decodes whatever a codec touched and
compares it before it counts as stored. Hashing each stored byte once therefore proves that it can be
restored, at the speed of reading, and without keys.

Checking changes nothing. Packs that the log doesn't name are leftovers of unfinished work, no
damage, unless there is no log at all.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Literal

import msgspec

from outlast.clock import SYSTEM_CLOCK, Clock
from outlast.errors import Corrupt, InvalidInput, NotFound, OutlastError
from outlast.events import NULL_SINK, EventSink, Progress
from outlast.records import PackRef
from outlast.repo import chain, pack, seal
from outlast.repo.form import OBJECT_BYTES_MAX
from outlast.repo.index import Index, footer_rows, indexed_pack, read_segment
from outlast.repo.keyring import Secret, read_slot
from outlast.repo.pack import Footer, object_name
from outlast.repo.references import Findings, References
from outlast.repo.repository import SEGMENT_BYTES_MAX, Repository
from outlast.store.base import ObjectStore

RANGE_BYTES = 8 << 20
_PROGRESS_SECONDS = 0.1
_DERIVED = "It is derived from the packs and costs nothing: delete it, and it is made again when it is due."

Data = Literal["all", "none"] | float
"""How much of the packs' payloads to read: all, none, or a fraction of their bytes, chosen at random"""


class Damage(msgspec.Struct):
    """One object that is not what was written, and what can't be restored because of it.

    At most 100 files are listed; `problem` says how many there are when there are more.
    """

    object: str
    problem: str
    snapshots: list[str] = []
    files: list[str] = []


class CheckReport(msgspec.Struct):
    """What was checked. `ok`: nothing was damaged. `bytes_read`: of packs.

    `unreferenced_packs`: those that no entry of the log names, as a backup that was cut short leaves
    them, and one that is running makes them.
    """

    ok: bool
    snapshots: int
    packs: int
    chunks: int
    bytes_read: int
    damaged: list[Damage]
    seconds: float
    unreferenced_packs: int = 0
    unreferenced_bytes: int = 0


def check(repository: Repository, *, data: Data = "none") -> CheckReport:
    """Verify everything but payloads, and of those as much as `data` says; see the module.

    Raises only when checking itself is impossible (`Unavailable`, `InvalidInput`): damage is reported.
    """
    started = repository.clock.monotonic_seconds()
    # A view of its own: what the caller's repository has cached must not vouch for the store.
    view = Repository(
        repository.store,
        repository.format,
        repository.keys,
        repository.log.anchor,
        repository.clock,
        repository.sink,
    )
    return _Check(view, data).run(started)


def open_and_check(
    store: ObjectStore,
    *,
    secret: Secret | None = None,
    data: Data = "none",
    clock: Clock = SYSTEM_CLOCK,
    sink: EventSink = NULL_SINK,
) -> CheckReport:
    """`check` for a repository that may be too damaged for `Repository.open`.

    Raises as `open` does, but `Corrupt` only when `format` or every key is damaged.
    """
    started = clock.monotonic_seconds()
    return _Check(Repository.connect(store, secret=secret, clock=clock, sink=sink), data).run(started)


class _Checked(msgspec.Struct):
    """What came of one pack. `bad`: chunks whose stored bytes are not those that were written."""

    ref: PackRef
    footer: Footer | None = None
    problems: list[str] = []
    bad: list[bytes] = []


class _Check:
    def __init__(self, view: Repository, data: Data) -> None:
        if data not in ("all", "none") and not (isinstance(data, float | int) and 0 <= data <= 1):
            raise InvalidInput(f"{data!r} is not an amount of data to check.", hint="Say all, none or a part, as 5%.")
        self._view = view
        self._data = data
        self._findings = Findings()
        self._index = Index()
        self._rows: dict[str, bytes] = {}
        self._chunks = 0
        self._bytes_read = 0
        self._unreferenced_packs = 0
        self._unreferenced_bytes = 0
        self._progress = _Throttle(view)

    def run(self, started: float) -> CheckReport:
        view = self._view
        self._check_format_and_keys()
        found = chain.walk(view.store, view.log)
        for damage in found.damage:
            self._findings.problem(damage.object, damage.problem)
        sizes = {info.name: info.size_bytes for info in view.store.list("packs/")}
        self._count_unreferenced(found, sizes)
        view.adopt(found)
        good, bad = self._check_packs(sizes)
        self._index.sort()
        self._check_segments(good)
        view.use_index(self._index)
        References(view, self._findings, good, bad).walk()
        damaged = [self._damage(name) for name in self._findings.problems]
        return CheckReport(
            ok=not damaged,
            snapshots=len(view.state.snapshots),
            packs=len(view.state.packs),
            chunks=self._chunks,
            bytes_read=self._bytes_read,
            damaged=damaged,
            seconds=view.clock.monotonic_seconds() - started,
            unreferenced_packs=self._unreferenced_packs,
            unreferenced_bytes=self._unreferenced_bytes,
        )

    def _count_unreferenced(self, found: chain.Walk, sizes: dict[str, int]) -> None:
        named = {object_name(name) for name in found.state.packs}
        unnamed = [size_bytes for name, size_bytes in sizes.items() if name not in named]
        self._unreferenced_packs, self._unreferenced_bytes = len(unnamed), sum(unnamed)

    def _damage(self, name: str) -> Damage:
        findings = self._findings
        problem = " ".join(findings.problems[name])
        files, count = findings.files(name)
        if count:
            problem += f" About {count} files are affected; the first {len(files)} are listed."
        return Damage(name, problem, list(findings.snapshots.get(name, ())), files)

    def _check_format_and_keys(self) -> None:
        view = self._view
        try:
            if view.store.stat("format").size_bytes > OBJECT_BYTES_MAX:
                self._findings.problem("format", "It is far too large.")
            elif seal.digest(view.store.get("format")).hex() != view.log.anchor:
                self._findings.problem("format", "format is not what it was when the repository was opened.")
        except OutlastError as exc:
            self._findings.problem("format", self._why(exc))
        for info in view.store.list("keys/"):
            try:
                read_slot(view.store, info)
            except OutlastError as exc:
                self._findings.problem(info.name, f"{self._why(exc)} No passphrase opens it any more.")

    def _why(self, exc: OutlastError) -> str:
        """A sentence on why an object can't be had. When it is the whole store that is away, raise instead."""
        if isinstance(exc, NotFound):
            return "It is missing."
        if not isinstance(exc, Corrupt):
            self._view.store.stat("format")
        return exc.message

    # -- packs -----------------------------------------------------------------------------------

    def _check_packs(self, sizes: dict[str, int]) -> tuple[set[str], dict[bytes, set[str]]]:
        """(packs whose footer is sound, damaged chunk -> the packs in which it is damaged)"""
        view = self._view
        refs = list(view.state.packs.values())
        full = self._chosen(refs)
        self._progress.total(sum(ref.bytes for ref in refs if ref.name in full), len(refs))
        good: set[str] = set()
        bad: dict[bytes, set[str]] = {}
        workers = max(2, min(8, view.store.capabilities.concurrency))
        tasks = ((ref, sizes.get(object_name(ref.name)), ref.name in full) for ref in refs)
        with ThreadPoolExecutor(workers, thread_name_prefix="check") as pool:
            pending: set[Future[_Checked]] = {
                pool.submit(self._check_pack, *task) for task in islice(tasks, 2 * workers)
            }
            try:
                while pending:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        self._take(future.result(), good, bad)
                    pending |= {pool.submit(self._check_pack, *task) for task in islice(tasks, len(done))}
            finally:
                for future in pending:
                    future.cancel()
        self._bytes_read = self._progress.bytes_read
        return good, bad

    def _chosen(self, refs: list[PackRef]) -> set[str]:
        if self._data == "all":
            return {ref.name for ref in refs}
        if self._data == "none":
            return set()
        wanted = float(self._data) * sum(ref.bytes for ref in refs)
        chosen: set[str] = set()
        for ref in sorted(refs, key=lambda _: self._view.clock.random_bytes(8)):
            if wanted <= 0:
                break
            chosen.add(ref.name)
            wanted -= ref.bytes
        return chosen

    def _take(self, checked: _Checked, good: set[str], bad: dict[bytes, set[str]]) -> None:
        name = checked.ref.name
        for problem in checked.problems:
            self._findings.problem(object_name(name), problem)
        for chunk in checked.bad:
            bad.setdefault(chunk, set()).add(name)
        if checked.footer is not None:
            good.add(name)
            self._index.add([checked.footer])
            self._chunks += len(checked.footer.records)
            rows = seal.digest(footer_rows(checked.footer).tobytes())
            self._rows[name] = rows + msgspec.json.encode(indexed_pack(checked.footer))
        self._progress.add(packs=1)

    def _check_pack(self, ref: PackRef, size: int | None, full: bool) -> _Checked:
        checked = _Checked(ref)
        name = object_name(ref.name)
        try:
            if size is None:
                size = self._view.store.stat(name).size_bytes
            if size != ref.bytes:
                checked.problems.append(f"It has {size} bytes instead of {ref.bytes}.")
            checked.footer = self._read_ends(ref, checked)
        except OutlastError as exc:
            checked.problems.append(self._why(exc))
            return checked
        if full:
            for start, end, parts in _ranges(checked.footer, ref.bytes):
                self._check_range(name, start, end, parts, checked)
            if checked.bad:
                count = len(checked.footer.records)
                checked.problems.append(f"{len(checked.bad)} of its {count} chunks are damaged.")
        return checked

    def _read_ends(self, ref: PackRef, checked: _Checked) -> Footer:
        name = object_name(ref.name)
        guess = min(ref.bytes, ref.chunks * pack.RECORD.itemsize + pack.TRAILER.size)
        head_bytes = min(ref.bytes, pack.HEADER.size)
        head, tail = self._view.store.get_ranges(name, [(0, head_bytes), (ref.bytes - guess, guess)])
        needed = pack.footer_bytes(tail, ref.name, ref.bytes)
        if needed > len(tail):
            [tail] = self._view.store.get_ranges(name, [(ref.bytes - needed, needed)])
        footer = pack.parse_footer(tail, ref.name, ref.bytes)
        self._progress.add(head_bytes + needed)
        if head != tail[-pack.TRAILER.size :][: pack.HEADER.size]:
            checked.problems.append("Its header is damaged; the footer has a copy, so no chunk is affected.")
        return footer

    def _check_range(self, name: str, start: int, end: int, parts: list[_Part], checked: _Checked) -> None:
        assert checked.footer is not None
        records = checked.footer.records
        try:
            [data] = self._view.store.get_ranges(name, [(start, end - start)])
        except OutlastError as exc:
            checked.problems.append(self._why(exc))
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

    # -- derived objects -------------------------------------------------------------------------

    def _check_segments(self, good: set[str]) -> None:
        view = self._view
        for info in view.store.list("index/"):
            name = info.name.removeprefix("index/")
            try:
                if info.size_bytes > SEGMENT_BYTES_MAX:
                    raise Corrupt("It is far too large to be an index segment.")
                data = view.store.get(info.name)
                packs, rows = read_segment(data, name, view.keys)
            except OutlastError as exc:
                self._findings.problem(info.name, f"{self._why(exc)} {_DERIVED}")
                continue
            for number, listed in enumerate(packs):
                own = rows[rows["pack"] == number]
                own["pack"] = 0
                found = seal.digest(own.tobytes()) + msgspec.json.encode(listed)
                if self._rows.get(listed.name, found) != found:
                    what = f"It disagrees with the footer of pack {listed.name[:16]}."
                    self._findings.problem(info.name, f"{what} {_DERIVED}")
            if any(listed.name not in good and listed.name in view.state.packs for listed in packs):
                # Of a pack with a damaged footer the segment still says what is in it.
                self._index.add_segment(data, name, view.keys)
        self._index.sort()


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

    def __init__(self, view: Repository) -> None:
        self._view = view
        self._lock = threading.Lock()
        self._last_seconds = view.clock.monotonic_seconds()
        self._total_bytes = 0
        self._total_packs = 0
        self._packs = 0
        self.bytes_read = 0

    def total(self, total_bytes: int, packs: int) -> None:
        self._total_bytes, self._total_packs = total_bytes, packs

    def add(self, bytes_read: int = 0, packs: int = 0) -> None:
        with self._lock:
            self.bytes_read += bytes_read
            self._packs += packs
            now = self._view.clock.monotonic_seconds()
            last = packs and self._packs == self._total_packs
            if now - self._last_seconds < _PROGRESS_SECONDS and not last:
                return
            self._last_seconds = now
            done = min(self.bytes_read, self._total_bytes)
            packs_done = self._packs
        self._view.sink.progress(Progress("check", done, self._total_bytes, packs_done, self._total_packs))
