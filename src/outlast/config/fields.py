"""Every key of outlast.yaml, in one table: how it is read, what it means, and which part of the policy it sets.

Reading, `outlast config show`, what errors suggest and the table in docs/tiers.md all follow it. Defaults are those of
the policy's own records.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from outlast.config.values import (
    AMOUNT,
    ARCHIVE_CLASS,
    COMMAND,
    COUNT,
    CURRENCY,
    DURATION,
    GLOBS,
    INTERVAL,
    LEVEL,
    PATHS,
    RATE,
    RETENTION,
    STORAGE_CLASS,
    TEXT,
    URL,
    Kind,
    choice,
)  # fmt: skip
from outlast.repo.thaw_plan import TIERS as WAYS
from outlast.repo.thaw_plan import Prices, Thaw
from outlast.store.classes import ARCHIVES, AT_ONCE
from outlast.tiers.policy import DrillPolicy, Importance, Policy, Source, Stage, Tier, TierType


class Section(NamedTuple):
    """Keys below a key."""

    fields: tuple[Field, ...]
    record: type[msgspec.Struct] | None
    """where the values go, and the defaults come from"""
    may_be_off: bool = False


class Field(NamedTuple):
    """A key. `attribute`: its name in the record."""

    key: str
    kind: Kind | Section
    meaning: str
    attribute: str = ""
    unset: str = ""
    """what holds without it, in words, where that is no value that could be written"""

    def default(self, record: type[msgspec.Struct]) -> Any:
        """Its value where it isn't given; `msgspec.NODEFAULT` where it has to be."""
        return _defaults(record)[self.attribute]


def _defaults(record: type[msgspec.Struct]) -> Mapping[str, Any]:
    return {each.encode_name: each.default for each in msgspec.structs.fields(record)}


def _words(of: Any) -> Kind:
    return choice(*typing.get_args(of))


SYNC = Section(
    (
        Field("mode", choice("async", "sync"), "`sync`: what is made is copied here at once", "mode"),
        Field("interval", DURATION, "so long a snapshot waits for others to be copied with", "interval_seconds"),
        Field("batch_size", COUNT, "so many snapshots wait for no others", "batch_size"),
        Field("bandwidth", RATE, "copying here takes no more than this", "bandwidth_bytes_per_second"),
    ),
    Tier,
)

ARCHIVE = Section(
    (
        Field("class", ARCHIVE_CLASS, "of S3: packs go there once they are proven", "archive_class", "none"),
        Field("after", DURATION, "so old are the packs that go there", "archive_after_seconds"),
    ),
    Tier,
)

TIER = Section(
    (
        Field("type", _words(TierType), "what it is; `hdd` and `object_storage` are stored smaller", "type"),
        Field("url", URL, "the repository", "url"),
        Field("retention", RETENTION, "for so long it holds a snapshot", "retention_seconds"),
        Field("purpose", TEXT, "for people", "purpose", "none"),
        Field(
            "storage_class",
            STORAGE_CLASS,
            "of S3, in which packs are created",
            "storage_class",
            "STANDARD",
        ),
        Field("archive", ARCHIVE, "what is old goes where it has to be thawed"),
        Field("sync", SYNC, "how snapshots get here"),
    ),
    Tier,
)

DRILL = Section(
    (
        Field("every", DURATION, "how often a restore is rehearsed", "every_seconds"),
        Field(
            "level",
            LEVEL,
            "how far: bytes, structure, values, golden outputs, quality, resumed training",
            "level",
        ),
        Field("golden", COMMAND, "a command that compares golden outputs (L3)", "golden", "none"),
        Field("quality", COMMAND, "a command that measures quality (L4)", "quality", "none"),
        Field("resume", COMMAND, "a command that goes on training (L5)", "resume", "none"),
    ),
    DrillPolicy,
    may_be_off=True,
)

SOURCE = Section(
    (
        Field("paths", PATHS, "the folders and files", "paths"),
        Field("exclude", GLOBS, "what is left out, as in `outlast backup --exclude`", "exclude"),
        Field("importance", _words(Importance), "`critical`: twice as often, kept twice as long", "importance"),
        Field("stage", _words(Stage), "of the work: how often it changes", "stage"),
        Field("full", DURATION, "how often every byte is read", "full_seconds", "by stage"),
        Field("incremental", INTERVAL, "how often what changed is read", "incremental_seconds", "by stage"),
        Field("retention", DURATION, "for so long every backup is kept", "retention_seconds", "by stage"),
        Field("rpo", DURATION, "how old the last backup may be", "rpo_seconds", "twice `incremental`"),
        Field("rto", DURATION, "how long a restore may take", "rto_seconds", "none"),
        Field("drill", DRILL, "rehearsed restores, or `off`", "drill"),
    ),
    Source,
)

RUNS = Section((Field("drill", DRILL, "rehearsed restores of training runs, or `off`", "run_drill"),), None)

THAW = Section(
    (
        Field("hours", AMOUNT, "after so many it is done", "hours"),
        Field("per_gb", AMOUNT, "of what is thawed", "per_gb"),
        Field("per_1000_requests", AMOUNT, "of thawing: one for each pack", "per_1000_requests"),
    ),
    Thaw,
)

CLASS = Section(
    (
        Field("per_gb_month", AMOUNT, "of keeping", "per_gb_month", "AWS us-east-1"),
        Field("per_1000_moves", AMOUNT, "of moving packs there", "per_1000_moves", "AWS us-east-1"),
        *(Field(way, THAW, "one way to thaw") for way in WAYS),
    ),
    None,
)
CLASSES = ("STANDARD", *AT_ONCE, *ARCHIVES)

PRICES = Section(
    (
        Field("currency", CURRENCY, "of all prices", "currency"),
        Field("egress_per_gb", AMOUNT, "of what leaves the region", "egress_per_gb"),
        *(Field(each, CLASS, "of a storage class") for each in CLASSES),
    ),
    Prices,
)

POLICIES = Section(
    (
        Field("copies", COUNT, "so many other tiers hold a snapshot, proven, before one drops it", "copies"),
        Field("verified_within", DURATION, "how old such a proof may be", "verified_within_seconds"),
        Field("lease", DURATION, "after so long without a sign of life an agent is replaced", "lease_seconds"),
        Field("sync", SYNC, "defaults for every tier"),
        Field("drill", DRILL, "defaults for every source, and for runs"),
        Field("runs", RUNS, "of training runs"),
        Field("prices", PRICES, "what thawing, keeping and moving cost"),
    ),
    Policy,
)

TOP = {"storage_tiers": TIER, "sources": SOURCE, "policies": POLICIES}

TABLES = {
    "storage_tiers.NAME": TIER,
    "storage_tiers.NAME.archive": ARCHIVE,
    "storage_tiers.NAME.sync": SYNC,
    "sources.NAME": SOURCE,
    "sources.NAME.drill": DRILL,
    "policies": POLICIES,
    "policies.runs": RUNS,
    "policies.prices": PRICES,
    "policies.prices.CLASS": CLASS,
    "policies.prices.CLASS.WAY": THAW,
}


def homes(key: str) -> list[str]:
    """Where a key belongs, for one that was written elsewhere."""
    found = [where for where, section in TABLES.items() if any(field.key == key for field in section.fields)]
    return [key, *found] if key in TOP else found
