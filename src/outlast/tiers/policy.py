"""What is to be: tiers, sources, how often each is backed up, and what each tier holds for how long. Pure.

A policy never changes by what happens; what is due follows from it and from what the logs of the tiers say (`due.py`).
"""

from __future__ import annotations

from typing import Literal

import msgspec

from outlast.records import Snapshot
from outlast.repo.thaw_plan import Prices

HOUR_SECONDS = 3600
DAY_SECONDS = 24 * HOUR_SECONDS
LARGE_BYTES = 100 * 10**9
LARGE_FACTOR = 1.5
KEEP_TAG = "keep"
"""a snapshot with this tag stays where it is, whatever a policy says"""

Stage = Literal["initial", "middle", "final"]
Importance = Literal["critical", "normal", "low"]
TierType = Literal["memory", "nvme_ssd", "ssd", "hdd", "object_storage"]

_AUTO_COST_MAX = 0.05
_AUTO_SECONDS_MIN = 60


class Intervals(msgspec.Struct, frozen=True):
    """How often a source is backed up, and for how long each of its backups is kept; in seconds."""

    full_seconds: int
    incremental_seconds: int
    retention_seconds: int
    reasons: tuple[str, ...] = ()
    """where each came from, in the order in which they were applied"""


STAGES: dict[Stage, Intervals] = {
    "initial": Intervals(24 * HOUR_SECONDS, 4 * HOUR_SECONDS, 7 * DAY_SECONDS),
    "middle": Intervals(48 * HOUR_SECONDS, 12 * HOUR_SECONDS, 14 * DAY_SECONDS),
    "final": Intervals(72 * HOUR_SECONDS, 24 * HOUR_SECONDS, 30 * DAY_SECONDS),
}
IMPORTANCE: dict[Importance, tuple[float, float]] = {"critical": (0.5, 2.0), "normal": (1.0, 1.0), "low": (2.0, 0.5)}
"""importance -> what the intervals, and the retention, are multiplied by"""


class DrillPolicy(msgspec.Struct, frozen=True):
    """How often a restore is rehearsed, how far up the ladder, and the commands of its upper levels."""

    every_seconds: int = 7 * DAY_SECONDS
    level: int = 2
    golden: str = ""
    quality: str = ""
    resume: str = ""


class Source(msgspec.Struct, frozen=True):
    """Folders that are backed up together, under one name. What is None follows from stage, importance and size."""

    name: str
    paths: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    importance: Importance = "normal"
    stage: Stage = "middle"
    full_seconds: int | None = None
    incremental_seconds: int | Literal["auto"] | None = None
    """auto: as rarely as the RPO allows, and not more often than its cost allows"""
    retention_seconds: int | None = None
    """for so long every backup is kept; after it full ones alone, as long as a tier keeps anything"""
    rpo_seconds: int | None = None
    rto_seconds: int | None = None
    drill: DrillPolicy | None = DrillPolicy()


class Tier(msgspec.Struct, frozen=True):
    """A repository, what it is for, and how snapshots get to it. Sources are backed up to the first tier."""

    name: str
    url: str
    type: TierType = "ssd"
    retention_seconds: int | None = None
    """None: for ever"""
    purpose: str = ""
    mode: Literal["async", "sync"] = "async"
    """sync: a backup is copied here at once; async: when `interval_seconds` or `batch_size` say so, what comes first"""
    interval_seconds: int = HOUR_SECONDS
    """how long a snapshot waits for others to be copied with"""
    batch_size: int = 16
    """so many snapshots wait for no others"""
    bandwidth_bytes_per_second: float | None = None
    storage_class: str = ""
    """of S3, in which packs are created: one that can be read at once; "" is the bucket's own"""
    archive_class: str = ""
    """of S3, to which packs are moved once they were proven; reading them again takes a thaw. "" for none"""
    archive_after_seconds: int = 30 * DAY_SECONDS

    @property
    def recompresses(self) -> bool:
        """Whether what comes here is stored as differences, where they are smaller: it is slower to read."""
        return self.type in ("hdd", "object_storage")


class Policy(msgspec.Struct, frozen=True):
    """The tiers, nearest first, the sources, and what holds for all."""

    tiers: tuple[Tier, ...]
    sources: tuple[Source, ...] = ()
    copies: int = 2
    """A tier drops a snapshot that others still want only when so many of those hold it, and it was verified there."""
    verified_within_seconds: int = 7 * DAY_SECONDS
    """how old the proof of such a copy may be"""
    run_drill: DrillPolicy | None = None
    """for runs, whose checkpoints come from training scripts"""
    prices: Prices = Prices()
    """of thawing, storing and moving in the region of the buckets"""
    lease_seconds: int = 120
    """after so long without a sign of life the work of an agent is another's"""

    def source(self, name: str) -> Source | None:
        return next((each for each in self.sources if each.name == name), None)


def intervals(source: Source, newest: Snapshot | None) -> Intervals:
    """How often to back it up. `newest`: its last backup, whose size and cost count.

    >>> from datetime import timedelta
    >>> found = intervals(Source("models", ("./models",), importance="critical", stage="initial"), None)
    >>> str(timedelta(seconds=found.full_seconds)), str(timedelta(seconds=found.incremental_seconds))
    ('12:00:00', '2:00:00')
    """
    table = STAGES[source.stage]
    often, long = IMPORTANCE[source.importance]
    reasons = [f"stage {source.stage}"]
    if source.importance != "normal":
        reasons.append(f"{source.importance}: intervals x{often:g}, retention x{long:g}")
    if newest is not None and newest.bytes > LARGE_BYTES:
        often *= LARGE_FACTOR
        reasons.append(f"over {LARGE_BYTES // 10**9} GB: intervals x{LARGE_FACTOR:g}")
    full, incremental = round(table.full_seconds * often), round(table.incremental_seconds * often)
    retention = round(table.retention_seconds * long)
    if source.incremental_seconds == "auto":
        assert source.rpo_seconds is not None, "a policy is checked when it is read"
        incremental, reason = auto_seconds(source.rpo_seconds, newest.seconds if newest else 0.0)
        reasons.append(reason)
    elif source.incremental_seconds is not None:
        incremental = source.incremental_seconds
        reasons.append("incremental as configured")
    elif source.rpo_seconds is not None and incremental > source.rpo_seconds // 2:
        incremental = source.rpo_seconds // 2
        reasons.append(f"incremental twice within the RPO of {source.rpo_seconds} s")
    if source.full_seconds is not None:
        full = source.full_seconds
        reasons.append("full as configured")
    if source.retention_seconds is not None:
        retention = source.retention_seconds
        reasons.append("retention as configured")
    return Intervals(full, incremental, retention, tuple(reasons))


def auto_seconds(rpo_seconds: float, cost_seconds: float) -> tuple[int, str]:
    """An interval for a tolerated loss and a measured cost, and why.

    What a backup holds is as old as its beginning, so that with interval i and cost c at most i + c is lost, and
    2 i + c when one backup fails: i = (rpo - c) / 2. Where that makes more than 5 % of the time work, i grows as far
    as the RPO allows without a failure.
    """
    interval = max(_AUTO_SECONDS_MIN, (rpo_seconds - cost_seconds) / 2)
    cheap = cost_seconds / _AUTO_COST_MAX
    latest = max(_AUTO_SECONDS_MIN, rpo_seconds - 2 * cost_seconds)
    if interval < cheap:
        interval = max(interval, min(cheap, latest))
    share = cost_seconds / interval
    return int(interval), f"auto: RPO {rpo_seconds:g} s, a backup takes {cost_seconds:g} s, {share:.0%} of the time"


def rpo_seconds(source: Source, found: Intervals) -> int:
    """The tolerated age of the last backup: as configured, or so that one may fail."""
    return source.rpo_seconds if source.rpo_seconds is not None else 2 * found.incremental_seconds


def is_full(snapshot: Snapshot) -> bool:
    """Whether every byte was read for it: then it was built on no other. Checkpoints always are."""
    return snapshot.kind == "checkpoint" or not snapshot.parent
