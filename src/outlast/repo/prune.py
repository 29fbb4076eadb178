"""Give back the room of what no snapshot needs: plan, condemn, and later sweep, while others work.

Nobody is locked out. What makes it safe is the order of entries in the log (see `state.py`): packs
are condemned in an entry made for a state in which no snapshot needs them; a backup that relied on
one lists it again when it commits; and `sweep` is in the log before anything is deleted. The time
between the two phases is no part of that: it spares restores that are under way.

    plan      what each pack holds of what the snapshots need, and what to do about it; changes nothing
    execute   1 repack: copy what is needed out of packs that are mostly waste, commit the new packs
              2 condemn: the emptied packs, those that nothing needs, and leftovers that no entry names
              3 sweep: packs condemned at least `grace_seconds` ago by the store's clock; then delete them
              4 tidy: one set of index segments for what is left, and no state but the newest
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from outlast.errors import Corrupt, NotFound, OutlastError, Refused
from outlast.events import Event
from outlast.records import PackRef, Snapshot
from outlast.repo.index import Location
from outlast.repo.log import entry_name
from outlast.repo.needs import needed_chunks
from outlast.repo.pack import RECORD, object_name
from outlast.repo.prune_plan import Decided, PackFacts, Place, Policy, decide
from outlast.repo.read import damaged_footer
from outlast.repo.repack import repack, unreadable
from outlast.repo.repository import Repository
from outlast.repo.seal import ID_BYTES
from outlast.repo.state import CONDEMN, PACKS, SWEEP, Condemned, State
from outlast.repo.tidy import tidy
from outlast.repo.usage import Usage
from outlast.store.lease import store_time_seconds
from outlast.store.lock import LockingStore

_TRIES = 5
_PACKS_AT_ONCE = 256
"""so many are proven together: their chunks are held in memory, some 500 bytes each"""
_HINT_DAMAGED = "`outlast check` names what is damaged; `outlast check --repair` may mend it, or forget the snapshot."


class PrunePlan(msgspec.Struct):
    """What `execute` will do, and the state that it was made for."""

    policy: Policy
    facts: list[PackFacts]
    decided: Decided
    usage: Usage
    snapshots: frozenset[str]
    live: frozenset[str]
    quarantined: frozenset[str]


class PruneReport(msgspec.Struct):
    """What was done; packs and bytes of each phase. `bytes_freed`: deleted now."""

    repacked: int = 0
    bytes_repacked: int = 0
    condemned: int = 0
    bytes_condemned: int = 0
    swept: int = 0
    bytes_freed: int = 0
    rescued: int = 0
    waiting: int = 0
    bytes_waiting: int = 0
    unnamed: int = 0
    """young packs that no entry names yet"""
    bytes_unnamed: int = 0
    segments: int = 0
    extended: int = 0
    """objects whose Object Lock was extended"""
    seconds: float = 0.0
    decided: Decided | None = None
    """what was decided about each pack at first; a prune without grace decides again after it has condemned"""


class Stale(Exception):
    """Another prune or repair committed something since the plan was made."""


class _NewSnapshots(Exception):
    """What these need has to be read before anything can be condemned."""

    def __init__(self, snapshots: list[Snapshot]) -> None:
        super().__init__()
        self.snapshots = snapshots


def plan(repository: Repository, policy: Policy | None = None, *, dry_run: bool = False) -> PrunePlan:
    """Decide about every pack. Changes nothing, but for the object `clock`, which asks the store for the time.

    With `dry_run` not even that: this machine's clock must do. Raises `Corrupt` when it can't be known
    what a snapshot needs.
    """
    policy = policy or Policy()
    repository.log.prove()
    for _ in range(_TRIES):
        repository.refresh()
        seq = repository.state.seq
        found = _plan(repository, policy, dry_run=dry_run)
        # Reading a manifest learns what others committed where a pack is gone. A plan is of one moment: what a
        # snapshot of that moment needs was marked, and no snapshot counts as looked at that was not.
        if repository.state.seq == seq:
            return found
    raise _others_are_at_it()


def _plan(repository: Repository, policy: Policy, *, dry_run: bool) -> PrunePlan:
    state = repository.state
    index = repository.load_index()
    repository.learn_archived()  # now: whatever copy of a manifest the state names was made after these were marked
    usage = Usage(
        index,
        exclude=state.condemned,
        damaged={*state.quarantined, *state.damaged},
        among=state.readable_packs(),
        archived=repository.archived,
    )
    unknown: list[bytes] = []
    try:
        needed_chunks(repository, repository.snapshots(), lambda ids: unknown.extend(usage.mark(ids)))
    except Corrupt as exc:
        raise Corrupt(f"{exc.message} So nothing was pruned.", hint=_HINT_DAMAGED) from exc
    if unknown:
        raise Corrupt(
            f"{len(set(unknown))} chunks that snapshots need are in no pack that can be read, so nothing was pruned.",
            hint=_HINT_DAMAGED,
        )
    now = (
        repository.clock.now_ns() / 1e9
        if dry_run
        else store_time_seconds(repository.store, repository.clock.random_bytes(16).hex())
    )
    facts = _facts(repository, usage, now)
    decided = decide(facts, policy)
    _refuse_lies(repository, {each.pack for each in decided.of("condemn", "repack", "sweep")})
    return PrunePlan(
        policy,
        facts,
        decided,
        usage,
        frozenset(state.snapshots),
        frozenset(state.packs),
        frozenset(state.quarantined),
    )


def _refuse_lies(repository: Repository, names: set[str]) -> None:
    """What these packs hold is known from index segments: before they go, their own footers have the last word.

    Raises `Corrupt` where a segment left something out. Of a damaged footer only those records count whose chunks
    are known: others may be what the damage made.
    """
    seen = {footer.name for footer in repository.uncovered}
    refs = [ref for name in sorted(names - seen) if (ref := repository.state.find(name)) is not None]

    def lied_about(ref: PackRef) -> bool:
        damaged = False
        try:
            try:
                footer = repository.read_footer(ref)
            except Corrupt:
                footer, damaged = damaged_footer(repository, ref).records(), True
        except (Corrupt, NotFound):
            return False
        for chunk, _, offset, *_ in footer.records.tolist():
            copies = repository.index.copies(chunk)
            if (copies or not damaged) and not any(
                copy.pack.name == ref.name and (damaged or copy.offset == offset) for copy in copies
            ):
                return True
        return False

    with ThreadPoolExecutor(repository.store.capabilities.concurrency) as threads:
        lied = [ref.name for ref, lie in zip(refs, threads.map(lied_about, refs), strict=True) if lie]
    if lied:
        raise Corrupt(
            f"an index segment is wrong about what pack {lied[0][:16]} holds, so nothing was pruned.",
            hint="`outlast check --repair` writes the segment anew; then prune again.",
        )


def _facts(repository: Repository, usage: Usage, now_seconds: float) -> list[PackFacts]:
    state, found = repository.state, usage.packs()
    facts: list[PackFacts] = []
    ages: dict[int, float] = {}
    for name, ref in state.readable_packs().items():
        used = found.get(name)
        waste = (used.bytes - used.used_bytes) + RECORD.itemsize * (used.chunks - used.used_chunks) if used else 0
        needed = ref.bytes - waste if used and used.used_chunks else 0
        if name in state.condemned:
            seq = state.condemned[name].seq
            if seq not in ages:
                ages[seq] = now_seconds - repository.store.stat(entry_name(seq)).modified_seconds
            facts.append(PackFacts(name, "condemned", ref.bytes, needed, ages[seq]))
        else:
            place: Place = "quarantined" if name in state.quarantined else "live"
            archived = name in repository.archived
            facts.append(PackFacts(name, place, ref.bytes, needed, readable=used is not None, archived=archived))
    named = {fact.name for fact in facts}
    for info in repository.store.list("packs/"):
        name = info.name.rpartition("/")[2]
        if name not in named and info.name == object_name(name):
            facts.append(PackFacts(name, "unnamed", info.size_bytes, 0, now_seconds - info.modified_seconds))
    return facts


def prune(repository: Repository, policy: Policy | None = None) -> PruneReport:
    """Plan and execute; plan again when another prune or repair was quicker.

    Without grace what was condemned is swept at once. Raises `Refused` when more than `max_delete` would go,
    `Corrupt` as `plan` does, `Unavailable`. Whatever it raises, and whenever it is killed, no snapshot is
    touched, and the next prune goes on from there.
    """
    started = repository.clock.monotonic_seconds()
    policy = policy or Policy()
    report = PruneReport()
    try:
        _plan_and_execute(repository, policy, report)
        if policy.grace_seconds <= 0 and repository.state.condemned:
            _plan_and_execute(repository, policy, report)
    except Refused:
        _extend_locks(repository)  # what is kept because too much would go must not lose its lock for that
        raise
    report.extended = _extend_locks(repository)
    report.seconds = repository.clock.monotonic_seconds() - started
    return report


def _plan_and_execute(repository: Repository, policy: Policy, report: PruneReport) -> None:
    for attempt in range(_TRIES):
        repository.refresh()
        seq = repository.state.seq
        try:
            execute(repository, plan(repository, policy), report)
            return
        except Stale:
            continue
        except Corrupt:
            # Another prune may have taken, meanwhile, what only snapshots needed that are forgotten by now.
            repository.refresh()
            if repository.state.seq == seq or attempt == _TRIES - 1:
                raise
    raise _others_are_at_it()


def _others_are_at_it() -> Refused:
    return Refused(
        "other prunes kept changing what this one had planned; nothing more was done.",
        hint="Let one prune at a time work on a repository.",
    )


def execute(repository: Repository, planned: PrunePlan, report: PruneReport) -> None:
    """Carry out a plan. Raises what `prune` raises, and `Stale`, having harmed nothing."""
    if problem := refusal(planned):
        raise Refused(
            f"{problem} Nothing was changed.",
            hint="If that is what you want, say so with a higher --max-delete; `--dry-run` shows the plan.",
        )
    decided = planned.decided
    swept_before = report.swept
    due = {each.pack for each in decided.of("sweep")}
    needed_still = _unproven(repository, planned.usage, due)
    rescued = needed_still | {each.pack for each in decided.of("rescue")}
    _rescue(repository, rescued, report)
    _sweep(repository, due - needed_still, report)
    done = repack(repository, ((each.pack, planned.usage.used(each.pack)) for each in decided.of("repack")))
    report.repacked += len(done.packs)
    report.bytes_repacked += done.bytes_written
    going = {each.pack for each in decided.of("condemn")} | done.packs
    _condemn(repository, planned, going, planned.live | rescued | done.written, report)
    waiting = repository.state.condemned.values()
    report.waiting, report.bytes_waiting = len(waiting), sum(each.bytes for each in waiting)
    young = [each for each in planned.facts if each.place == "unnamed" and each.name not in going]
    report.unnamed, report.bytes_unnamed = len(young), sum(each.bytes for each in young)
    report.decided = report.decided or decided
    repository.log.save_state()
    report.segments += tidy(repository, swept=report.swept > swept_before)


def refusal(planned: PrunePlan) -> str:
    """Why the plan must not be carried out, or "": it condemns more than the policy lets go at once."""
    share, limit = planned.decided.share_freed, planned.policy.max_delete
    if round(share, 3) <= limit:
        return ""
    return f"{share:.1%} of the repository's bytes would go, more than the {limit:.1%} that --max-delete allows."


def _extend_locks(repository: Repository) -> int:
    """In a store that locks what is written, keep everything that is still needed locked."""
    store = repository.store
    if not isinstance(store, LockingStore):
        return 0
    state = repository.state
    needed = {"format", *map(object_name, state.packs), *map(object_name, state.quarantined)}
    kept = (info for info in store.list("") if info.name.startswith(("keys/", "log/")) or info.name in needed)
    return store.extend(kept).extended


def _rescue(repository: Repository, names: set[str], report: PruneReport) -> None:
    """Make packs live again that were condemned, though a snapshot needs what is in them."""
    back: list[str] = []

    def body(state: State) -> dict[str, Any] | None:
        back[:] = sorted((names & state.condemned.keys()) - repository.log.swept)
        if names - state.packs.keys() - set(back):
            raise Stale  # one was swept meanwhile: what it was needed for has to be elsewhere
        return {"packs": msgspec.to_builtins([state.find(name) for name in back])} if back else None

    repository.log.append(PACKS, body)
    report.rescued += len(back)


def _unproven(repository: Repository, usage: Usage, names: set[str]) -> set[str]:
    """Of these packs, those that hold a needed chunk whose other copy, the one to stay, can't be read.

    This is the last moment at which a chunk that was repacked, or stored twice, could be had from here.
    """
    unproven: set[str] = set()
    ordered = sorted(names)
    for at in range(0, len(ordered), _PACKS_AT_ONCE):
        packs: dict[bytes, list[str]] = {}
        kept: dict[bytes, Location] = {}
        for pack, chunk, location in usage.spares(ordered[at : at + _PACKS_AT_ONCE]):
            packs.setdefault(chunk, []).append(pack)
            kept[chunk] = location
        for chunk in unreadable(repository, kept.items()):
            unproven.update(packs[chunk])
    for pack in sorted(unproven):
        what = f"pack {pack[:16]} is kept after all: what it holds can't be read at the place that was to stay."
        repository.sink.event(Event("pack.rescued", what))
    return unproven


def _condemn(
    repository: Repository, planned: PrunePlan, names: set[str], relied_on: Collection[str], report: PruneReport
) -> None:
    """Commit that packs are condemned, for the state just before: what new snapshots need of them is left out.

    `relied_on`: live packs that hold what the others are condemned for.
    """
    if not names:
        return
    places = {each.name: each for each in planned.facts}
    listed = set(names)
    known = set(planned.snapshots)
    refs: list[PackRef] = []

    def body(state: State) -> dict[str, Any] | None:
        if any(name not in state.packs for name in relied_on) or any(
            name not in state.packs and name not in state.quarantined for name in planned.quarantined
        ):
            raise Stale  # a chunk that counted as being in one of these may not be anywhere else
        fresh = [snapshot for name, snapshot in state.snapshots.items() if name not in known]
        if fresh:
            raise _NewSnapshots(fresh)
        refs.clear()
        for name in sorted(listed):
            ref = state.find(name)
            if ref is None and places[name].place == "unnamed":
                refs.append(PackRef(name, places[name].bytes, 0))
            elif ref is not None and places[name].place != "unnamed":
                refs.append(ref)
        return {"packs": msgspec.to_builtins(refs)} if refs else None

    while True:
        try:
            repository.log.append(CONDEMN, body)
            break
        except _NewSnapshots as new:
            listed.difference_update(_holders(repository, new.snapshots, listed))
            known.update(snapshot.id for snapshot in new.snapshots)
    report.condemned += len(refs)
    report.bytes_condemned += sum(ref.bytes for ref in refs)


def _holders(repository: Repository, snapshots: Sequence[Snapshot], names: set[str]) -> set[str]:
    """Those of the packs that hold anything that the snapshots need."""
    found: set[str] = set()
    if not snapshots:
        return found
    index = repository.load_index()

    def take(ids: bytes) -> None:
        for at in range(0, len(ids), ID_BYTES):
            found.update(copy.pack.name for copy in index.copies(ids[at : at + ID_BYTES]))

    needed_chunks(repository, snapshots, take)
    return found & names


def _sweep(repository: Repository, names: set[str], report: PruneReport) -> None:
    """Commit that condemned packs are gone, and only then delete their objects."""
    if not names:
        return
    swept: list[Condemned] = []

    def body(state: State) -> dict[str, Any] | None:
        swept[:] = [state.condemned[name] for name in sorted(names & state.condemned.keys())]
        return {"packs": [each.name for each in swept]} if swept else None

    if repository.log.append(SWEEP, body) is None:
        return
    repository.index.forget_packs(repository.log.swept)
    with ThreadPoolExecutor(repository.store.capabilities.concurrency) as threads:
        deleted = list(threads.map(lambda each: _delete(repository, each.name), swept))
    report.swept += sum(deleted)
    report.bytes_freed += sum(each.bytes for each, gone in zip(swept, deleted, strict=True) if gone)


def _delete(repository: Repository, pack: str) -> bool:
    """Failing is no failure: an object that stays is found again by the next prune, as one that nothing names."""
    try:
        repository.store.delete(object_name(pack))
    except OutlastError as exc:
        repository.sink.event(Event("pack.not_deleted", f"{object_name(pack)} was not deleted: {exc.message}"))
        return False
    return True
