"""Verify a repository: the log, every pack, the derived objects, and every chunk that a snapshot needs.

What is proven, and why that is enough: a pack's name, which the log holds, is the hash of its
footer; the footer holds the hash of every payload as stored. So a payload whose stored bytes have
that hash is byte for byte what was written, and writing decodes whatever a codec touched and
compares it before it counts as stored. Hashing each stored byte once therefore proves that it can be
restored, at the speed of reading, and without keys.

Only live packs are verified. Of those that are condemned or quarantined it is only read what they
hold: a chunk counts as lost where a snapshot needs it and no pack at all gives it. Packs that the
log doesn't name are leftovers of unfinished work, no damage, unless there is no log at all.

Others may work on the repository meanwhile. Where damage was found, and something was forgotten or
condemned since the log was read, that may be all there is to it: then everything is looked at again.

Checking changes nothing, but for one log entry that says which packs were read whole and are sound:
the next check of a part of the data takes those that were not verified for longest.
"""

from __future__ import annotations

from typing import Any

import msgspec

from outlast import records
from outlast.clock import SYSTEM_CLOCK, Clock
from outlast.errors import Corrupt, NotFound, OutlastError, WrongKey
from outlast.events import NULL_SINK, Event, EventSink
from outlast.records import PackRef
from outlast.repo import chain, seal
from outlast.repo.form import OBJECT_BYTES_MAX
from outlast.repo.index import Index, Location, footer_rows, indexed_pack, read_segment
from outlast.repo.keyring import Secret, read_slot
from outlast.repo.log import ENTRY_BYTES_MAX, entry_name
from outlast.repo.pack import Footer, object_name
from outlast.repo.read import damaged_footer
from outlast.repo.references import Findings, Needs, References
from outlast.repo.repack import unreadable
from outlast.repo.repository import SEGMENT_BYTES_MAX, Repository
from outlast.repo.scrub import Checked, Data, Scrub, Task, choose, refuse_senseless, why
from outlast.repo.state import FORGET, KEY, QUARANTINE, SWEEP, VERIFIED, State
from outlast.store.base import ObjectStore

_LOOKS = 4
_NAMES_MAX = 100_000
_MISSING_KEY = "It is missing: its passphrase opens nothing any more. If that is right, `outlast key remove` it."
_DERIVED = "It is derived from the packs and costs nothing: `outlast check --repair` writes it anew."


class Damage(msgspec.Struct):
    """One object that is not what was written, and what can't be restored because of it.

    At most 100 files are listed; `problem` says how many there are when there are more.
    """

    object: str
    problem: str
    snapshots: list[str] = []
    files: list[str] = []


class UnlistedSnapshot(msgspec.Struct):
    """A snapshot whose manifest can't be read in full, so that it isn't known which files it has."""

    id: str
    name: str
    time: str


class CheckReport(msgspec.Struct):
    """What was checked. `ok`: nothing was damaged. `packs`, `chunks`, `bytes`: of live packs."""

    ok: bool
    snapshots: int
    packs: int
    chunks: int
    bytes_read: int
    """of packs, now"""
    damaged: list[Damage]
    seconds: float
    unreferenced_packs: int = 0
    """objects that no entry of the log names, as a backup that was cut short leaves them, and one that runs"""
    unreferenced_bytes: int = 0
    condemned_packs: int = 0
    condemned_bytes: int = 0
    quarantined_packs: int = 0
    """those that are not missing, too"""
    quarantined_bytes: int = 0
    archived_packs: int = 0
    """live ones in a storage class that has to be thawed: they were not read, and that is no damage"""
    archived_bytes: int = 0
    bytes: int = 0
    packs_unread: int = 0
    """live packs of which not every byte was read now"""
    bytes_verified: int = 0
    """of live packs whose every byte was read and right, now or in an earlier check"""
    verified_since: str = ""
    """the longest ago that any of these was last read, RFC 3339"""
    unlisted: list[UnlistedSnapshot] = []
    """snapshots that can't be restored whole, and of which not even every file can be named"""
    recorded: bool = False
    """the log now says which packs were read and are sound"""
    keyless: bool = False
    """without the passphrase: see `not_checked`"""
    not_checked: list[str] = []
    """sentences: what could not be checked"""


def check(repository: Repository, *, data: Data = "none", max_seconds: float | None = None) -> CheckReport:
    """Verify everything but payloads, and of those as much as `data` says; see the module.

    A part of the data is that which was not verified for longest. After `max_seconds` no more payloads
    are begun. The repository may be one that was only connected to, with a log too damaged to open.
    Raises only when checking itself is impossible (`Unavailable`, `InvalidInput`): damage is reported.
    """
    started = repository.clock.monotonic_seconds()
    checker = Checker(repository, data, max_seconds)
    found = checker.look()
    found.report.recorded = checker.record(found)
    checker.date(found)
    found.report.seconds = repository.clock.monotonic_seconds() - started
    return found.report


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
    return check(Repository.connect(store, secret=secret, clock=clock, sink=sink), data=data)


class Examined(msgspec.Struct):
    """What one look found: the report, and what a repair must know. `view`: the repository as it was seen."""

    report: CheckReport
    view: Repository
    log_is_whole: bool
    damaged_packs: set[str]
    """live ones"""
    damaged_derived: list[str]
    """objects"""
    missing: set[str]
    """packs whose objects are not there"""
    covered: set[str]
    """packs that a sound index segment tells of"""
    bad: dict[bytes, set[str]]
    """chunk -> live packs in which it is damaged"""
    needs: Needs


class Checker:
    """Looks at a repository, again if need be; payloads that were found sound are not read twice."""

    def __init__(
        self, repository: Repository, data: Data, max_seconds: float | None = None, *, for_repair: bool = False
    ) -> None:
        refuse_senseless(data, max_seconds)
        self._repository = repository
        self._data = data
        self._likely: dict[str, Footer | None] | None = {} if for_repair else None
        self._scrub = Scrub(repository.store, repository.clock, repository.sink, max_seconds)
        self._chosen: set[str] | None = None
        self._read: set[str] = set()
        self._proven: set[str] = set()
        self._found_bad: dict[str, Checked] = {}

    def look(self) -> Examined:
        """Once, or more often while others forget and prune. Raises as `check` does."""
        for _ in range(_LOOKS - 1):
            look = _Look(self._fresh())
            found = self._finish(look)
            if found.report.ok or not _may_be_outdated(look):
                return found
        return self._finish(_Look(self._fresh()))

    def _fresh(self) -> Repository:
        """A view of its own: what the caller's repository has cached must not vouch for the store."""
        base = self._repository
        return Repository(base.store, base.format, base.keys, base.log.anchor, base.clock, base.sink)

    def _finish(self, look: _Look) -> Examined:
        look.read_log()
        tasks = self._tasks(look)
        for name in self._found_bad.keys() & look.view.state.packs.keys():
            look.take(self._found_bad[name])
        for checked in self._scrub.run(tasks):
            look.take(checked)
            if checked.read_whole:
                self._read.add(checked.ref.name)
                if checked.problems:
                    self._found_bad[checked.ref.name] = checked
                else:
                    self._proven.add(checked.ref.name)
        for name, when in look.view.state.damaged.items():
            if name not in self._read:
                look.not_read_again(name, when)
        found = look.end(self._likely)
        found.report.bytes_read = self._scrub.bytes_read
        found.report.packs_unread = len(look.good - self._read)
        return found

    def _tasks(self, look: _Look) -> list[Task]:
        """Those whose data is to be read come first, of them those not verified for longest."""
        state, sizes, random_bytes = look.view.state, look.sizes, self._repository.clock.random_bytes
        refs = sorted(state.packs.values(), key=lambda ref: (state.verified.get(ref.name, ""), random_bytes(8)))
        chosen = self._chosen
        if chosen is None or self._data == "all":
            chosen = self._chosen = {ref.name for ref in choose(refs, self._data)}
        wanted = chosen - self._proven
        refs = [ref for ref in refs if ref.name not in self._found_bad]
        refs.sort(key=lambda ref: ref.name not in wanted)
        refs += [ref for name, ref in state.readable_packs().items() if name not in state.packs]
        return [Task(ref, sizes.get(object_name(ref.name)), ref.name in wanted) for ref in refs]

    def record(self, found: Examined) -> bool:
        """Commit which packs were read whole and are sound, and which are not. Not being able to is no failure."""
        names, damaged = sorted(self._proven), sorted(found.damaged_packs)
        if not self._read or not found.log_is_whole:
            return False
        try:
            for at in range(0, max(len(names), len(damaged)), _NAMES_MAX):
                if not _record(found.view, names[at : at + _NAMES_MAX], damaged[at : at + _NAMES_MAX]):
                    return False
        except OutlastError as exc:
            what = "what was verified could not be recorded, so the next check doesn't know of it"
            self._repository.sink.event(Event("check.not_written", f"{what}: {exc.message}"))
            return False
        return True

    def date(self, found: Examined) -> None:
        """Say in the report how much was verified, and since when."""
        state, report = found.view.state, found.report
        now = records.time_text(self._repository.clock.now_ns())
        times = {**state.verified, **dict.fromkeys(self._proven, now)}
        sound = [name for name in state.packs if name in times and name not in found.damaged_packs]
        report.bytes_verified = sum(state.packs[name].bytes for name in sound)
        report.verified_since = min((times[name] for name in sound), default="")


def _record(view: Repository, sound: list[str], damaged: list[str]) -> bool:
    def body(state: State) -> dict[str, Any] | None:
        live = [name for name in sound if name in state.packs]
        hurt = [name for name in damaged if name in state.packs]
        return ({"packs": live, "damaged": hurt} if hurt else {"packs": live}) if live or hurt else None

    return view.log.append(VERIFIED, body) is not None


def _may_be_outdated(look: _Look) -> bool:
    """Whether since the log was read something was forgotten, swept or quarantined, or keys changed."""
    seq = look.seq
    try:
        while True:
            seq += 1
            if look.view.store.stat(entry_name(seq)).size_bytes > ENTRY_BYTES_MAX:
                return False
            entry = look.view.log.parse(look.view.store.get(entry_name(seq)), seq)
            if entry.kind in (FORGET, SWEEP, QUARANTINE, KEY):
                return True
    except (NotFound, Corrupt, WrongKey):
        return False


def _damaged_footer(view: Repository, ref: PackRef) -> Footer:
    """What can be believed of a footer without the right hash. Raises `Corrupt`, `NotFound`, `Unavailable`."""
    damaged = damaged_footer(view, ref)
    footer = damaged.records()
    if footer.epoch not in (view.keys.epochs if view.keys else (0,)):
        raise Corrupt(f"pack {ref.name[:16]} seems to be sealed with a key that the repository never had.")
    holder = indexed_pack(footer)
    rows = [(chunk, Location(holder, *where)) for chunk, _, *where, _ in footer.records.tolist()]
    sound = {chunk for chunk, _ in rows}.difference(unreadable(view, rows))
    return damaged.flipped_back(sound) or footer


class _Look:
    """One pass over everything."""

    def __init__(self, view: Repository) -> None:
        self.view = view
        self.sizes: dict[str, int] = {}
        self.seq = 0
        self.good: set[str] = set()
        """live packs whose footers are sound"""
        self._findings = Findings()
        self._slots: set[str] = set()
        self._log_is_whole = True
        self._index = Index()
        self._rows: dict[str, bytes] = {}
        self._damaged: set[str] = set()
        self._missing: set[str] = set()
        self._archived: set[str] = set()
        self._bad: dict[bytes, set[str]] = {}
        self._covered: set[str] = set()
        self._chunks = 0

    def read_log(self) -> None:
        """And all else that decides what to look at."""
        view = self.view
        self._check_format_and_keys()
        found = chain.walk(view.store, view.log)
        for damage in found.damage:
            if damage.object.startswith("state/"):
                self._derived_problem(damage.object, damage.problem, found.state)
            else:
                self._findings.problem(damage.object, damage.problem)
                self._log_is_whole = False
        self.sizes = {info.name: info.size_bytes for info in view.store.list("packs/")}
        view.adopt(found)
        self.seq = view.state.seq
        for slot, epoch in view.state.slots.items():
            if epoch and self._log_is_whole and not self._has_slot(f"keys/{slot}"):
                self._findings.problem(f"keys/{slot}", _MISSING_KEY)

    def _derived_problem(self, name: str, problem: str, state: State) -> None:
        if name not in state.ignored:
            self._findings.problem(name, problem)

    def not_read_again(self, pack: str, when: str) -> None:
        """An earlier check found it damaged. What that costs can't be told without reading it."""
        problem = f"It was damaged when its data was read on {when[:10]}, and was not read now."
        self._findings.problem(object_name(pack), problem)

    def end(self, likely: dict[str, Footer | None] | None) -> Examined:
        """`likely`: for a repair, what earlier looks made of damaged footers; it is added to."""
        view, findings = self.view, self._findings
        state = view.state
        self._index.sort()
        self._check_segments()
        footless = state.readable_packs().keys() - self._index.packs
        if likely is not None:
            # Also where a segment tells of the pack: it may be wrong, and what either says is read before it counts.
            self._try_footers(state.readable_packs().keys() - self._rows.keys() - self._missing, likely)
        view.use_index(self._index)
        references = References(
            view,
            findings,
            sound=self.good - self._damaged,
            good=self.good,
            bad=self._bad,
            footless=footless,
            missing=self._missing,
            collect=likely is not None,
        )
        references.walk()
        report = self._report(state)
        report.unlisted = [UnlistedSnapshot(each.id, each.name, each.time) for each in references.unlisted.values()]
        return Examined(
            report,
            view,
            self._log_is_whole,
            self._damaged,
            [name for name in findings.problems if name.startswith(("index/", "state/"))],
            self._missing,
            self._covered,
            self._bad,
            references.needs,
        )

    def _report(self, state: State) -> CheckReport:
        damaged = [self._damage(name) for name in self._findings.problems]
        named = {object_name(name) for name in state.readable_packs()}
        quarantined = [each.bytes for name, each in state.quarantined.items() if name not in self._missing]
        unnamed = [size_bytes for name, size_bytes in self.sizes.items() if name not in named]
        return CheckReport(
            ok=not damaged,
            snapshots=len(state.snapshots),
            packs=len(state.packs),
            chunks=self._chunks,
            bytes_read=0,
            damaged=damaged,
            seconds=0.0,
            unreferenced_packs=len(unnamed),
            unreferenced_bytes=sum(unnamed),
            condemned_packs=len(state.condemned),
            condemned_bytes=sum(each.bytes for each in state.condemned.values()),
            quarantined_packs=len(quarantined),
            quarantined_bytes=sum(quarantined),
            archived_packs=len(self._archived & state.packs.keys()),
            archived_bytes=sum(ref.bytes for name, ref in state.packs.items() if name in self._archived),
            bytes=sum(each.bytes for each in state.packs.values()),
        )

    def _damage(self, name: str) -> Damage:
        findings = self._findings
        problem = " ".join(findings.problems[name])
        files, count = findings.files(name)
        if count:
            problem += f" About {count} files are affected; the first {len(files)} are listed."
        return Damage(name, problem, list(findings.snapshots.get(name, ())), files)

    def _check_format_and_keys(self) -> None:
        view = self.view
        try:
            if view.store.stat("format").size_bytes > OBJECT_BYTES_MAX:
                self._findings.problem("format", "It is far too large.")
            elif seal.digest(view.store.get("format")).hex() != view.log.anchor:
                self._findings.problem("format", "format is not what it was when the repository was opened.")
        except OutlastError as exc:
            self._findings.problem("format", why(view.store, exc))
        for info in view.store.list("keys/"):
            self._slots.add(info.name)
            try:
                read_slot(view.store, info)
            except NotFound:
                continue  # removed since it was listed
            except OutlastError as exc:
                self._findings.problem(info.name, f"{why(view.store, exc)} No passphrase opens it any more.")

    def _has_slot(self, name: str) -> bool:
        """A slot that came since they were listed is there too."""
        try:
            return name in self._slots or bool(self.view.store.stat(name).size_bytes)
        except NotFound:
            return False

    # -- packs -----------------------------------------------------------------------------------

    def take(self, checked: Checked) -> None:
        """What came of a pack."""
        name = checked.ref.name
        if checked.is_missing:
            self._missing.add(name)
        if checked.is_archived:
            self._archived.add(name)
            self.view.archived[name] = True
        if name in self.view.state.packs:
            self._take_live(checked)
        if checked.footer is not None:
            self._index.add([checked.footer])
            rows = seal.digest(footer_rows(checked.footer).tobytes())
            self._rows[name] = rows + msgspec.json.encode(indexed_pack(checked.footer))

    def _take_live(self, checked: Checked) -> None:
        name = checked.ref.name
        for problem in checked.problems:
            self._findings.problem(object_name(name), problem)
            self._damaged.add(name)
        for chunk in checked.bad:
            self._bad.setdefault(chunk, set()).add(name)
        if checked.footer is not None:
            self.good.add(name)
            self._chunks += len(checked.footer.records)

    def _try_footers(self, packs: set[str], likely: dict[str, Footer | None]) -> None:
        """Chunks by what damaged footers say. They are in no sound pack, so each is read before it counts as there."""
        view, readable = self.view, self.view.state.readable_packs()
        for name in sorted(packs - likely.keys()):
            try:
                likely[name] = _damaged_footer(view, readable[name])
            except OutlastError as exc:
                why(view.store, exc)
                likely[name] = None
        self._index.add(filter(None, map(likely.get, packs)), known=True)
        self._index.sort()

    # -- derived objects -------------------------------------------------------------------------

    def _check_segments(self) -> None:
        view = self.view
        readable = view.state.readable_packs()
        for info in view.store.list("index/"):
            name = info.name.removeprefix("index/")
            try:
                if info.size_bytes > SEGMENT_BYTES_MAX:
                    raise Corrupt("It is far too large to be an index segment.")
                data = view.store.get(info.name)
                packs, rows = read_segment(data, name, view.keys)
            except NotFound:
                continue  # a prune has merged it into another since it was listed
            except OutlastError as exc:
                self._derived_problem(info.name, f"{why(view.store, exc)} {_DERIVED}", view.state)
                continue
            agrees = True
            for number, listed in enumerate(packs):
                own = rows[rows["pack"] == number]
                own["pack"] = 0
                found = seal.digest(own.tobytes()) + msgspec.json.encode(listed)
                if self._rows.get(listed.name, found) != found:
                    agrees = False
                    what = f"It disagrees with the footer of pack {listed.name[:16]}."
                    self._derived_problem(info.name, f"{what} {_DERIVED}", view.state)
            if agrees:
                self._covered.update(listed.name for listed in packs)
            if any(listed.name not in self._rows and listed.name in readable for listed in packs):
                # Of a pack with a damaged footer the segment still says what is in it.
                self._index.add_segment(data, name, view.keys, readable)
        self._index.sort()
