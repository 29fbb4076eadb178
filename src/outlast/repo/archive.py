"""Move verified packs into a cheaper storage class, without any of what it takes to know what is in them.

Only packs move. The log, `format`, keys, states and the index stay, and for a class that has to be thawed two more
things are seen to before: the footer of each pack lies beside it (`footers.py`), and every list of files (manifest)
has a copy in a pack that stays. So a repository whose packs are all archived still lists its snapshots and files,
checks its structure, takes new backups, and tells which packs a restore needs.

    plan      which packs, and why not the others; changes nothing
    execute   1 keep the footer of each pack beside it
              2 copy manifests that have no other place into a pack that stays, and commit it
              3 let S3 copy each pack onto itself, in the other class

Killed anywhere, it leaves nothing wrong: a footer that is kept in vain, or manifests stored twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
from outlast.store.archive import archive_of
from outlast.store.classes import ARCHIVES, AT_ONCE

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
    storage_class = planned.policy.storage_class
    report = ArchiveReport(storage_class)
    archive = archive_of(repository.store)
    chosen = planned.packs
    is_thawed_first = storage_class in ARCHIVES
    if is_thawed_first:
        chosen = _with_footers(repository, chosen, report)
        chosen = _without_manifests(repository, chosen, report)
    total = sum(each.bytes for each in chosen)

    def move(pack: StoredPack) -> bool:
        return _done(repository, pack, lambda: archive.move(object_name(pack.name), storage_class))

    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="archive") as threads:
        for each, moved in zip(chosen, threads.map(move, chosen), strict=True):
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


def _with_footers(repository: Repository, chosen: list[StoredPack], report: ArchiveReport) -> list[StoredPack]:
    """Those whose footers lie beside them now."""

    def keep(pack: StoredPack) -> bool:
        ref = repository.state.packs[pack.name]
        return _done(repository, pack, lambda: footers.keep(repository.store, ref))

    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="footer") as threads:
        kept = dict(zip([each.name for each in chosen], threads.map(keep, chosen), strict=True))
    report.failed += [name for name, done in kept.items() if not done]
    return [each for each in chosen if kept[each.name]]


def _without_manifests(repository: Repository, chosen: list[StoredPack], report: ArchiveReport) -> list[StoredPack]:
    """Those without which every list of files can be read, once the ones in them have been stored again.

    From the footers on a prune takes these packs for archived, and so the new copies for those that count.
    """
    going = {each.name for each in chosen}
    only = _only_there(repository, going)
    if only:
        report.manifests_stored_again = sum(map(len, only.values()))
        repack(repository, only.items())
    # What was committed meanwhile may need a list of files that nobody needed before.
    repository.refresh()
    kept_back = _only_there(repository, going).keys()
    report.kept_back = len(kept_back)
    return [each for each in chosen if each.name not in kept_back and each.name in repository.state.packs]


def _only_there(repository: Repository, going: set[str]) -> dict[str, list[Row]]:
    """By pack that goes: the manifest chunks in it that no pack holds which stays and can be read."""
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


def _done(repository: Repository, pack: StoredPack, step: Callable[[], object]) -> bool:
    """Whether a step was made for a pack. Raises where it would fail for every other one too."""
    try:
        step()
    except Refused:
        raise
    except OutlastError as exc:
        if not isinstance(exc, NotFound):  # else a prune was quicker
            what = f"pack {pack.name[:16]} was not moved: {exc.message}"
            repository.sink.event(Event("pack.not_archived", what, {"object": object_name(pack.name)}))
        return False
    return True
