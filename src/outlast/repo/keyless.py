"""Verify stored bytes without the passphrase, as a host does that only keeps them.

What can be proven is that every pack has the bytes that were written, for its name commits to them,
and that `format` and the key slots are whole. What the log says is sealed: which packs there should be,
which of them snapshots need, and whether the log is the one that was written, only the keys tell.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from outlast.clock import SYSTEM_CLOCK, Clock
from outlast.errors import Corrupt, NotFound, OutlastError
from outlast.events import NULL_SINK, EventSink
from outlast.records import PackRef
from outlast.repo import form, seal
from outlast.repo.check import CheckReport, Damage
from outlast.repo.keyring import read_slot
from outlast.repo.log import ENTRY_BYTES_MAX, entry_name
from outlast.repo.pack import object_name
from outlast.repo.scrub import Data, Scrub, Task, choose, refuse_senseless, why
from outlast.store.base import ObjectStore

_NAME = re.compile(r"packs/[0-9a-f]{2}/[0-9a-f]{64}")
_NOT_CHECKED = [
    "the log: whether its entries are the ones that were written, in an unbroken chain",
    "whether packs are missing, and whether damaged ones are needed at all or were quarantined before",
    "manifests: which snapshots and files damage costs",
]


def scrub(
    store: ObjectStore,
    *,
    data: Data = "all",
    max_seconds: float | None = None,
    clock: Clock = SYSTEM_CLOCK,
    sink: EventSink = NULL_SINK,
) -> CheckReport:
    """Verify what can be verified of an encrypted repository without its keys; changes nothing.

    A part of the data is chosen at random. Raises `NoRepository`, `Refused` and `Corrupt` as `open` does for
    `format`, and `Unavailable`.
    """
    refuse_senseless(data, max_seconds)
    started = clock.monotonic_seconds()
    form.parse_format(form.get_or_none(store, "format") or b"", store.url)
    damaged = [*_keys(store), *_log(store), *_states(store)]
    report = CheckReport(True, 0, 0, 0, 0, damaged, 0.0, keyless=True, not_checked=_NOT_CHECKED)
    sizes = {info.name: info.size_bytes for info in store.list("packs/")}
    refs = []
    for name, size_bytes in sizes.items():
        ref = PackRef(name.rpartition("/")[2], size_bytes, 0)
        if _NAME.fullmatch(name) and name == object_name(ref.name):
            refs.append(ref)
        else:
            damaged.append(Damage(name, "It has not the name of a pack."))
    refs.sort(key=lambda _: clock.random_bytes(8))
    chosen = {ref.name for ref in choose(refs, data)}
    tasks = [Task(ref, ref.bytes, ref.name in chosen) for ref in sorted(refs, key=lambda ref: ref.name not in chosen)]
    reading = Scrub(store, clock, sink, max_seconds)
    for checked in reading.run(tasks):
        if checked.is_missing:
            continue  # a prune has deleted it since it was listed
        report.packs += 1
        report.bytes += checked.ref.bytes
        report.chunks += len(checked.footer.records) if checked.footer else 0
        report.packs_unread += checked.footer is not None and not checked.read_whole
        report.archived_packs += checked.is_archived
        report.archived_bytes += checked.is_archived * checked.ref.bytes
        if checked.problems:
            damaged.append(Damage(object_name(checked.ref.name), " ".join(checked.problems)))
        elif checked.read_whole:
            report.bytes_verified += checked.ref.bytes
    report.ok = not damaged
    report.bytes_read = reading.bytes_read
    report.seconds = clock.monotonic_seconds() - started
    return report


def _keys(store: ObjectStore) -> Iterator[Damage]:
    found = False
    for info in store.list("keys/"):
        found = True
        try:
            read_slot(store, info)
        except NotFound:
            continue  # removed since it was listed
        except OutlastError as exc:
            yield Damage(info.name, f"{why(store, exc)} No passphrase opens it any more.")
    if not found:
        yield Damage("keys", "There is no key at all: nothing opens this repository.")


def _log(store: ObjectStore) -> Iterator[Damage]:
    due = 1
    for info in store.list("log/"):
        number = info.name.removeprefix("log/")
        if not number.isdigit() or info.name != entry_name(int(number)):
            yield Damage(info.name, "It has not the name of a log entry.")
            continue
        for missing in range(due, int(number)):
            try:
                store.stat(entry_name(missing))  # it may have come while the log was listed
            except NotFound:
                yield Damage(entry_name(missing), f"log entry {missing} is missing; later entries exist.")
                break
        due = int(number) + 1
        if info.size_bytes > ENTRY_BYTES_MAX:
            yield Damage(info.name, "It is far too large to be a log entry.")
        else:
            yield from _sealed(store, info.name)


def _states(store: ObjectStore) -> Iterator[Damage]:
    for info in store.list("state/"):
        yield from _sealed(store, info.name)


def _sealed(store: ObjectStore, name: str) -> Iterator[Damage]:
    try:
        [head] = store.get_ranges(name, [(0, seal.SEALED_BYTES_MIN)])
        if not seal.looks_sealed(head):
            raise Corrupt("It is no sealed object, though the repository is encrypted.")
    except NotFound:
        return  # a prune deletes old states
    except OutlastError as exc:
        yield Damage(name, why(store, exc))
