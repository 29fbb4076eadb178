"""Move verified packs into a cheaper storage class, without any of what it takes to know what is in them.

Only packs move. The log, `format`, keys, states and the index stay, and for a class that has to be thawed two more
things are seen to before: the footer of each pack lies beside it (`footers.py`), and every list of files (manifest)
has a copy in a pack that stays. So a repository whose packs are all archived still lists its snapshots and files,
checks its structure, takes new backups, and tells which packs a restore needs.

    plan      which packs, and why not the others; changes nothing
    execute   1 manifests: copy those that have no other place into a pack of their own, and commit it
              2 for each pack: keep its footer, then let S3 copy the object onto itself, in the other class

Killed anywhere, it leaves nothing wrong: a footer that is kept in vain, or manifests stored twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from outlast.errors import InvalidInput, NotFound, OutlastError, Refused
from outlast.events import Event, Progress
from outlast.records import Snapshot
from outlast.repo import footers
from outlast.repo.archive_plan import ArchivePlan, ArchivePolicy, StoredPack, decide_archive
from outlast.repo.pack import object_name
from outlast.repo.repack import Row, repack
from outlast.repo.repository import Repository
from outlast.store.archive import ARCHIVES, AT_ONCE, Archive, archive_of

_AT_ONCE = 16


class ArchiveReport(msgspec.Struct):
    """What was moved. `failed`: packs that S3 did not move; the next run tries them again."""

    storage_class: str
    packs: int = 0
    bytes: int = 0
    manifests_stored_again: int = 0
    """chunks of lists of files that were copied out of packs that move"""
    kept_back: int = 0
    """packs that did not move, because a list of files has no other place"""
    failed: list[str] = []
    seconds: float = 0.0


def plan(repository: Repository, policy: ArchivePolicy) -> ArchivePlan:
    """Decide about every live pack; changes nothing. Raises `InvalidInput`, `Refused`, `Unavailable`."""
    _refuse_senseless(repository, policy.storage_class)
    archive = archive_of(repository.store)
    repository.load_index()
    state, now_seconds = repository.state, repository.clock.now_ns() / 1e9
    manifests = _manifest_bytes(repository)
    found = []
    for info, storage_class in archive.classes("packs/"):
        name = info.name.rpartition("/")[2]
        if name in state.packs:
            found.append(
                StoredPack(
                    name,
                    info.size_bytes,
                    storage_class,
                    now_seconds - info.modified_seconds,
                    name in state.verified and name not in state.damaged,
                    manifests.get(name, 0),
                    storage_class in ARCHIVES,
                )
            )
    return decide_archive(found, policy)


def _refuse_senseless(repository: Repository, storage_class: str) -> None:
    if storage_class not in (*ARCHIVES, *AT_ONCE):
        raise InvalidInput(
            f"there is no storage class {storage_class!r} to move packs to; nothing was changed.",
            hint=f"Known are {', '.join((*AT_ONCE, *ARCHIVES))}.",
        )
    if repository.format.lock_days:
        raise Refused(
            "the objects of this repository are locked: each would stay, and be paid for, in its old class too. "
            "Nothing was changed.",
            hint="Copy to a repository without --lock-days, and archive there.",
        )


def _manifest_bytes(repository: Repository) -> dict[str, int]:
    found: dict[str, int] = {}
    for chunk in _manifest_chunks(repository.snapshots()):
        for copy in repository.index.copies(chunk):
            found[copy.pack.name] = found.get(copy.pack.name, 0) + copy.stored_bytes
    return found


def _manifest_chunks(snapshots: Iterable[Snapshot]) -> set[bytes]:
    return {bytes.fromhex(chunk) for snapshot in snapshots for chunk, _ in snapshot.manifest}


def execute(repository: Repository, planned: ArchivePlan) -> ArchiveReport:
    """Carry out a plan. Raises `Refused`, `Unavailable`, `StoreFull`; then some packs may have moved, each whole."""
    started = repository.clock.monotonic_seconds()
    report = ArchiveReport(planned.policy.storage_class)
    archive = archive_of(repository.store)
    chosen = {each.name: each for each in planned.packs}
    is_thawed_first = planned.policy.storage_class in ARCHIVES
    if is_thawed_first and chosen:
        only = _only_there(repository, chosen.keys())
        report.manifests_stored_again = sum(map(len, only.values()))
        repack(repository, only.items())
        # Also what was committed meanwhile may need a list of files that nobody needed before.
        repository.refresh()
        for name in _only_there(repository, chosen.keys()):
            del chosen[name]
            report.kept_back += 1
    total = sum(each.bytes for each in chosen.values())
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="archive") as threads:
        moves = threads.map(lambda each: _move(repository, archive, each, report.storage_class), chosen.values())
        for each, moved in zip(chosen.values(), moves, strict=True):
            if moved:
                report.packs += 1
                report.bytes += each.bytes
                if is_thawed_first:
                    repository.archived[each.name] = True
            else:
                report.failed.append(each.name)
            repository.sink.progress(Progress("archive", report.bytes, total, report.packs, len(chosen)))
    report.seconds = repository.clock.monotonic_seconds() - started
    return report


def _only_there(repository: Repository, going: Iterable[str]) -> dict[str, list[Row]]:
    """By pack that goes: the manifest chunks in it that no pack holds which stays and can be read."""
    going = set(going)
    stays = repository.state.packs.keys() - going - repository.archived.keys()
    found: dict[str, list[Row]] = {}
    for chunk in sorted(_manifest_chunks(repository.snapshots())):
        copies = repository.index.copies(chunk)
        if any(copy.pack.name in stays for copy in copies):
            continue
        for copy in copies:
            if copy.pack.name in going:
                found.setdefault(copy.pack.name, []).append((chunk, copy))
                break
    return found


def _move(repository: Repository, archive: Archive, pack: StoredPack, storage_class: str) -> bool:
    """Raises where nothing else will succeed either."""
    try:
        ref = repository.state.find(pack.name)
        if ref is None:
            return False  # a prune was quicker
        if storage_class in ARCHIVES:
            footers.keep(repository.store, ref)
        archive.move(object_name(pack.name), storage_class)
    except Refused:
        raise
    except OutlastError as exc:
        if not isinstance(exc, NotFound):
            what = f"pack {pack.name[:16]} was not moved: {exc.message}"
            repository.sink.event(Event("pack.not_archived", what, {"object": object_name(pack.name)}))
        return False
    return True
