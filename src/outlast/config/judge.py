"""Whether what the file says goes together: the places, the objectives, and what never could be met."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from typing import NamedTuple

from outlast.backup.selection import matcher
from outlast.config.values import BUCKETS, LEVELS, write_duration
from outlast.repo.thaw_plan import TIERS as WAYS
from outlast.store.classes import AT_ONCE
from outlast.tiers.policy import DAY_SECONDS, DrillPolicy, Policy, Source, Tier, intervals

LEASE_SECONDS_MIN = 10


class Finding(NamedTuple):
    """`where` something is wrong. `hangs_on`: other places that it follows from."""

    where: str
    problem: str
    hint: str = ""
    is_warning: bool = False
    hangs_on: tuple[str, ...] = ()


def judge(policy: Policy, given: frozenset[str]) -> Iterator[Finding]:
    """`given`: what stands in the file. Links are followed, for two names may mean one folder."""
    places = {tier.name: _place(tier.url) for tier in policy.tiers}
    yield from _tiers(policy, places)
    yield from _classes(policy, given)
    for source in policy.sources:
        yield from _paths(source, policy, places)
        yield from _objectives(source)
        yield from _drill(source.drill, f"sources.{source.name}.drill", given)
    yield from _drill(policy.run_drill, "policies.runs.drill", given)
    if policy.lease_seconds < LEASE_SECONDS_MIN:
        hint = f"write at least {write_duration(LEASE_SECONDS_MIN)}"
        yield Finding("policies.lease", "is shorter than a slow answer of a bucket", hint)
    if policy.verified_within_seconds < DAY_SECONDS:
        yield Finding("policies.verified_within", "is shorter than the day between two drops", "write at least 1 day")
    others = len(policy.tiers) - 1
    if "policies.copies" in given and policy.copies > others:
        problem = f"asks for {policy.copies} other tiers, and there {_are(others)}"
        yield Finding("policies.copies", problem, "those that there are will do", True, ("storage_tiers",))


def _are(count: int) -> str:
    return f"{'is' if count == 1 else 'are'} {count or 'none'}"


def _place(url: str) -> str:
    return url if _is_bucket(url) else os.path.realpath(url)


def _is_bucket(url: str) -> bool:
    return url.startswith(tuple(f"{each}://" for each in BUCKETS))


def _lies_in(inner: str, outer: str) -> bool:
    return inner == outer or inner.startswith(outer.rstrip("/") + "/")


def _tiers(policy: Policy, places: dict[str, str]) -> Iterator[Finding]:
    for nearer, further in itertools.combinations(policy.tiers, 2):
        one, other = places[nearer.name], places[further.name]
        where, hangs_on = f"storage_tiers.{further.name}.url", (f"storage_tiers.{nearer.name}.url",)
        if one == other:
            hint = "each tier is a repository of its own"
            yield Finding(where, f"is that of {nearer.name} too", hint, hangs_on=hangs_on)
        elif _lies_in(one, other) or _lies_in(other, one):
            yield Finding(where, f"lies inside that of {nearer.name}, or around it", "take another", hangs_on=hangs_on)
    for nearer, further in itertools.pairwise(policy.tiers):
        if further.retention_seconds is None or nearer.name == further.name:
            continue
        if nearer.retention_seconds is None or further.retention_seconds < nearer.retention_seconds:
            where, hangs_on = f"storage_tiers.{further.name}.retention", (f"storage_tiers.{nearer.name}.retention",)
            problem = f"is shorter than that of {nearer.name}, which is nearer"
            yield Finding(where, problem, "is the order of the tiers right?", True, hangs_on)
    for tier in policy.tiers:
        if _is_bucket(tier.url) and tier.type != "object_storage":
            problem = f"says {tier.type}, and the url is a bucket"
            yield Finding(f"storage_tiers.{tier.name}.type", problem, "write object_storage, or leave it out", True)


def _classes(policy: Policy, given: frozenset[str]) -> Iterator[Finding]:
    for number, tier in enumerate(policy.tiers):
        where, is_s3 = f"storage_tiers.{tier.name}", tier.url.startswith("s3://")
        archive = f"{where}.archive"
        if not is_s3:
            for each in {f"{where}.storage_class", archive} & given:
                problem = "is for buckets of S3 (s3://…) alone"
                yield Finding(each, problem, "leave it out", hangs_on=(f"{where}.url",))
        elif number == 0 and archive in given:
            problem = "can't be said of the first tier, to which backups go"
            yield Finding(archive, problem, "put one before it that is read at once", hangs_on=("storage_tiers",))
        elif archive in given and not tier.archive_class:
            yield Finding(f"{archive}.class", "is missing", "write GLACIER or DEEP_ARCHIVE", hangs_on=(archive,))
        elif archive in given and tier.archive_after_seconds >= (tier.retention_seconds or math.inf):
            problem = "is not shorter than the retention: hardly anything is ever archived"
            hangs_on = (f"{where}.retention",)
            yield Finding(f"{archive}.after", problem, "write less, or leave archive out", True, hangs_on)
    for storage_class, way in itertools.product(("STANDARD", *AT_ONCE), WAYS):
        where = f"policies.prices.{storage_class}.{way}"
        if where in given:
            yield Finding(where, f"is never needed: {storage_class} is read at once", "leave it out")


def _paths(source: Source, policy: Policy, places: dict[str, str]) -> Iterator[Finding]:
    whole = f"sources.{source.name}.paths"
    if not source.paths:
        yield Finding(whole, "names no path", "write at least one", hangs_on=(f"sources.{source.name}",))
    named: dict[str, str] = {}
    for number, path in enumerate(source.paths):
        where, real = f"{whole}[{number}]", os.path.realpath(path)
        if not os.path.lexists(path):
            yield Finding(where, f"{path} is not there", "is it spelled right?", True)
        name = os.path.basename(real)
        if name in named:
            problem = f"has the same last part as {named[name]}: both would come back as {name}"
            yield Finding(where, problem, "make them two sources, or name the folder that holds both")
        named[name] = path
        for at, tier in enumerate(policy.tiers):
            yield from _nested(source, where, real, tier, places[tier.name], is_first=at == 0)


def _nested(source: Source, where: str, path: str, tier: Tier, place: str, *, is_first: bool) -> Iterator[Finding]:
    hangs_on = (f"storage_tiers.{tier.name}.url", f"sources.{source.name}.exclude")
    if _is_bucket(tier.url) or not tier.url:
        return
    if _lies_in(path, place):
        yield Finding(where, f"lies in the repository of {tier.name}", "back up what is elsewhere", hangs_on=hangs_on)
    elif _lies_in(place, path):
        within = os.fsencode(os.path.relpath(place, path))
        excluded = matcher(source.exclude)
        if is_first:  # a backup skips the repository that it goes to
            problem = f"holds the repository of {tier.name}: what destroys the one destroys the other"
            yield Finding(where, problem, "move the tier", True, hangs_on)
        elif not excluded(within) and not excluded(os.fsencode(os.path.basename(path)) + b"/" + within):
            problem = f"holds the repository of {tier.name}, which would be backed up too"
            yield Finding(where, problem, f"move the tier, or add {os.fsdecode(within)} to exclude", hangs_on=hangs_on)


def _objectives(source: Source) -> Iterator[Finding]:
    where = f"sources.{source.name}"
    rpo = source.rpo_seconds
    if source.rto_seconds is not None and source.drill is None:
        problem = "is measured by drills, and they are off"
        yield Finding(f"{where}.rto", problem, "turn drill on, or leave rto out", True, (f"{where}.drill",))
    if source.incremental_seconds == "auto":
        if rpo is None:
            problem = "auto follows from rpo, and there is none"
            yield Finding(f"{where}.incremental", problem, "add rpo, as `rpo: 6 h`", hangs_on=(f"{where}.rpo",))
        elif rpo < 120:
            yield Finding(f"{where}.rpo", "is too short to back up within", "write at least 2 min")
        return
    if rpo is None:
        return
    found = intervals(source, None)
    often = min(found.incremental_seconds, found.full_seconds)
    hangs_on = tuple(f"{where}.{key}" for key in ("incremental", "full", "importance", "stage"))
    if rpo <= often:
        problem = f"is {'shorter than' if rpo < often else 'just'} the {write_duration(often)} between two backups"
        hint = f"write `incremental: auto`, or `incremental: {write_duration(max(60, rpo // 2))}`"
        yield Finding(f"{where}.rpo", problem, hint, rpo == often, hangs_on)


def _drill(drill: DrillPolicy | None, where: str, given: frozenset[str]) -> Iterator[Finding]:
    if drill is None:
        return
    for level, key in enumerate(("golden", "quality", "resume"), 3):
        command = getattr(drill, key)
        hangs_on = (f"{where}.{key}", "policies.drill.level", f"policies.drill.{key}")
        if drill.level == level and not command:
            place = where if f"{where}.level" in given or "policies.drill.level" not in given else "policies.drill"
            problem = f"{LEVELS[level]} needs a command, and {key} names none"
            yield Finding(f"{place}.level", problem, f"add {key}, or write {LEVELS[level - 1]}", False, hangs_on)
        elif command and drill.level < level and f"{where}.{key}" in given:
            problem = f"is never run: it belongs to {LEVELS[level]}, and drills go up to {LEVELS[drill.level]}"
            hint = f"write `level: {LEVELS[level]}`"
            yield Finding(f"{where}.{key}", problem, hint, True, (f"{where}.level", *hangs_on))
