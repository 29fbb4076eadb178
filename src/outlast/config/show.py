"""What is in force, as a file of the same form: it can be read again, and says the same."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from outlast.config import Config
from outlast.config.decode import OFF
from outlast.config.fields import ARCHIVE, CLASS, DRILL, POLICIES, PRICES, SOURCE, SYNC, THAW, TIER, Field, Section
from outlast.config.values import Kind, write_amount, write_duration
from outlast.repo.thaw_plan import Prices
from outlast.tiers.policy import DrillPolicy, Source, intervals, rpo_seconds

_STEP = "  "
_PLAIN = re.compile(r"[\w./](?:[\w./+@=-]|:(?=[\w/]))*(?: [\w./+@=-]+)*")


def document(config: Config) -> dict[str, Any]:
    """The policy as JSON; for each source what it comes to before its first backup, with the reasons."""
    resolved = {}
    for source in config.policy.sources:
        found = intervals(source, None)
        resolved[source.name] = {**msgspec.to_builtins(found), "rpo_seconds": rpo_seconds(source, found)}
    return {
        "path": config.path,
        "policy": msgspec.to_builtins(config.policy),
        "intervals": resolved,
        "warnings": [warning._asdict() for warning in config.warnings],
    }


def lines(config: Config) -> Iterator[str]:
    """YAML: every key with its value, and in comments where that comes from if it isn't written there."""
    yield f"# What is in force by {_one_line(config.path)}. Values that depend on the stage are comments."
    yield "storage_tiers:"
    for tier in config.policy.tiers:
        where = f"storage_tiers.{tier.name}"
        yield f"{_STEP}{tier.name}:"
        yield from _section(config, TIER, tier, where, 2)
        if tier.archive_class:
            yield f"{_STEP * 2}archive:"
            yield from _section(config, ARCHIVE, tier, f"{where}.archive", 3)
        yield f"{_STEP * 2}sync:"
        yield from _section(config, SYNC, tier, f"{where}.sync", 3)
    if config.policy.sources:
        yield "sources:"
    for source in config.policy.sources:
        where = f"sources.{source.name}"
        yield f"{_STEP}{source.name}:"
        yield from _section(config, SOURCE, source, where, 2, _by_stage(source))
        yield from _drill(config, source.drill, f"{where}.drill", 2)
    yield "policies:"
    yield from _section(config, POLICIES, config.policy, "policies", 1)
    yield f"{_STEP}runs:"
    yield from _drill(config, config.policy.run_drill, "policies.runs.drill", 2)
    if config.policy.prices != Prices():
        yield from _prices(config, config.policy.prices)


def _drill(config: Config, drill: DrillPolicy | None, where: str, depth: int) -> Iterator[str]:
    if drill is None:
        yield _line(config, where, depth, "drill", OFF)
        return
    yield f"{_STEP * depth}drill:"
    yield from _section(config, DRILL, drill, where, depth + 1)


def _prices(config: Config, prices: Prices) -> Iterator[str]:
    """Those that were given; the others are in the documentation."""
    yield f"{_STEP}prices:"
    yield from _section(config, PRICES, prices, "policies.prices", 2)
    for each in PRICES.fields:
        if each.kind is not CLASS:
            continue
        ways = prices.thaw.get(each.key, {})
        amounts = {"per_gb_month": prices.per_gb_month, "per_1000_moves": prices.per_1000_moves}
        given = {key: of_class[each.key] for key, of_class in amounts.items() if each.key in of_class}
        if not ways and not given:
            continue
        yield f"{_STEP * 2}{each.key}:"
        for key, amount in given.items():
            yield f"{_STEP * 3}{key}: {write_amount(amount)}"
        for way, thaw in ways.items():
            yield f"{_STEP * 3}{way}:"
            yield from _section(config, THAW, thaw, f"policies.prices.{each.key}.{way}", 4)


def _by_stage(source: Source) -> dict[str, str]:
    """What holds for keys that are not set, and why."""
    found = intervals(source, None)
    auto = next((each for each in found.reasons if each.startswith("auto")), "")
    why = "; ".join(each for each in found.reasons if not each.startswith("auto") and "configured" not in each)
    return {
        "full": f"{write_duration(found.full_seconds)}  # {why}",
        "incremental": f"{write_duration(found.incremental_seconds)}  # {auto or why}",
        "retention": f"{write_duration(found.retention_seconds)}  # {why}",
        "rpo": f"{write_duration(rpo_seconds(source, found))}  # twice incremental",
    }


def _section(
    config: Config, section: Section, record: msgspec.Struct, where: str, depth: int, unset: Mapping[str, str] = {}
) -> Iterator[str]:
    for field in section.fields:
        if isinstance(field.kind, Section):
            continue
        value, below = getattr(record, field.attribute), f"{where}.{field.key}"
        if field.kind.is_list:
            yield from _list(config, field, field.kind, value, below, depth)
        elif field.unset and value in (None, ""):
            yield f"{_STEP * depth}# {field.key}: {unset.get(field.key, field.unset)}"
        elif value == "auto":
            yield f"{_STEP * depth}{field.key}: auto  # now {unset[field.key].replace('  # auto', '')}"
        else:
            yield _line(config, below, depth, field.key, scalar(field.kind.write(value)))


def _list(config: Config, field: Field, kind: Kind, values: tuple[str, ...], where: str, depth: int) -> Iterator[str]:
    if not values:
        yield _line(config, where, depth, field.key, "[]")
        return
    yield f"{_STEP * depth}{field.key}:"
    for value in values:
        yield f"{_STEP * (depth + 1)}- {scalar(kind.write(value))}"


def _line(config: Config, where: str, depth: int, key: str, value: str) -> str:
    origin = config.origins.get(where, "")
    comment = f"  # {origin}" if origin else ""
    return f"{_STEP * depth}{key}: {value}{comment}"


def scalar(text: str) -> str:
    """A text as YAML, in quotes where it needs them.

    >>> print(scalar("7 days"), scalar("off"), scalar("a: b"), scalar("s3://bucket/x"))
    7 days "off" "a: b" s3://bucket/x
    """
    if _PLAIN.fullmatch(text) and text.lower() not in ("null", "true", "false", "yes", "no", "on", "off", "y", "n"):
        return text
    return '"' + "".join(map(_in_quotes, text)) + '"'


def _in_quotes(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    return character if character.isprintable() else f"\\U{ord(character):08X}"


def _one_line(text: str) -> str:
    return "".join(each if each.isprintable() else "?" for each in text)
