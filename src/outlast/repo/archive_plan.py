"""Which packs to move to another storage class, and why not the others. Pure: facts in, decisions out."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

BYTES_MIN = 128 << 10
"""smaller objects are billed as if they had this size, or with an overhead of 40 KB each"""
DAYS_MIN = {"STANDARD_IA": 30, "ONEZONE_IA": 30, "GLACIER_IR": 90, "GLACIER": 90, "DEEP_ARCHIVE": 180}
"""storage class -> days that are billed even if the object is deleted sooner (AWS S3 User Guide, storage classes)"""


class ArchivePolicy(msgspec.Struct, frozen=True):
    """Where packs go, and how old they have to be."""

    storage_class: str
    older_than_seconds: float = 0.0


class StoredPack(msgspec.Struct, frozen=True):
    """A live pack. `age_seconds`: since it was written, or moved."""

    name: str
    bytes: int
    storage_class: str
    age_seconds: float
    is_verified: bool
    """a check has read every byte of it, and found no damage then or later"""
    manifest_bytes: int = 0
    """stored bytes of manifest chunks in it"""
    is_archived: bool = False
    """it would have to be thawed first"""


class Left(msgspec.Struct, frozen=True):
    """Packs that stay where they are, for one reason."""

    reason: str
    packs: int
    bytes: int


class ArchivePlan(msgspec.Struct, frozen=True):
    """`left`: the others, most bytes first."""

    policy: ArchivePolicy
    packs: list[StoredPack]
    left: list[Left]

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.packs)


def decide_archive(packs: Iterable[StoredPack], policy: ArchivePolicy) -> ArchivePlan:
    """Move what is old enough, verified and worth it.

    >>> packs = [StoredPack("a", 1 << 26, "STANDARD", 9e6, True), StoredPack("b", 1 << 26, "STANDARD", 9e6, False)]
    >>> plan = decide_archive(packs, ArchivePolicy("GLACIER"))
    >>> [each.name for each in plan.packs], [each.reason for each in plan.left]
    (['a'], ['no check has read them: `outlast check --data all`'])
    """
    chosen: list[StoredPack] = []
    left: dict[str, list[int]] = {}
    for each in sorted(packs, key=lambda pack: pack.name):
        reason = _why_left(each, policy)
        if reason:
            left.setdefault(reason, []).append(each.bytes)
        else:
            chosen.append(each)
    rows = [Left(reason, len(sizes), sum(sizes)) for reason, sizes in left.items()]
    return ArchivePlan(policy, chosen, sorted(rows, key=lambda row: -row.bytes))


def _why_left(pack: StoredPack, policy: ArchivePolicy) -> str:
    if pack.storage_class == policy.storage_class:
        return f"in {policy.storage_class} already"
    if pack.is_archived:
        return f"in {pack.storage_class}, and would have to be thawed first"
    if pack.bytes < BYTES_MIN:
        return "too small: it would cost more there"
    if 2 * pack.manifest_bytes >= pack.bytes:
        return "lists of files, which every restore needs first"
    if pack.age_seconds < policy.older_than_seconds:
        return "too young"
    if not pack.is_verified:
        return "no check has read them: `outlast check --data all`"
    return ""
