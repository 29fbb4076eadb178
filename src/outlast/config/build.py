"""From values to the policy: what isn't said is taken from `policies`, or from the records' own defaults."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from outlast.config.decode import OFF, Reader, Values
from outlast.config.fields import ARCHIVE, CLASSES, DRILL, POLICIES, PRICES, SOURCE, SYNC, THAW, TIER, Section
from outlast.config.values import BUCKETS
from outlast.repo.thaw_plan import TIERS as WAYS
from outlast.repo.thaw_plan import Prices, Thaw
from outlast.tiers.policy import DrillPolicy, Policy, Source, Tier

DEFAULT = "default"


class Built(NamedTuple):
    """The policy; `origins`: for each key that was not written where it counts, where its value comes from."""

    policy: Policy
    origins: dict[str, str]


def build(reader: Reader, top: Values) -> Built:
    """What can be told of the policy, also where there are mistakes: then with defaults, or without that part."""
    return _Builder(reader, top).built()


class _Builder:
    def __init__(self, reader: Reader, top: Values) -> None:
        self._reader = reader
        self._top = top
        self._shared = top.get("policies", {})
        self._origins: dict[str, str] = {}

    def built(self) -> Built:
        tiers = [self._tier(name, values) for name, values in self._top.get("storage_tiers", {}).items()]
        sources = [self._source(name, values) for name, values in self._top.get("sources", {}).items()]
        run_drill = self._drill(self._shared.get("runs", {}).get("drill"), "policies.runs.drill")
        values = self._plain(POLICIES, self._shared, "policies")
        policy = Policy(tuple(tiers), tuple(sources), run_drill=run_drill, prices=self._prices(), **values)
        return Built(policy, self._origins)

    def _tier(self, name: str, values: Values) -> Tier:
        where = f"storage_tiers.{name}"
        found = self._plain(TIER, values, where)
        if "type" not in values and found["url"].startswith(tuple(f"{each}://" for each in BUCKETS)):
            found["type"] = "object_storage"
        sync = self._plain(SYNC, values.get("sync", {}), f"{where}.sync", self._shared.get("sync", {}), "policies.sync")
        archive = self._plain(ARCHIVE, values.get("archive", {}), f"{where}.archive")
        return Tier(name, **found, **sync, **archive)

    def _source(self, name: str, values: Values) -> Source:
        where = f"sources.{name}"
        found = self._plain(SOURCE, values, where)
        return Source(name, drill=self._drill(values.get("drill"), f"{where}.drill"), **found)

    def _drill(self, given: Any, where: str) -> DrillPolicy | None:
        shared = self._shared.get("drill", {})
        if given == OFF:
            return None
        if given is None and shared == OFF:
            self._origins[where] = "policies.drill"
            return None
        return DrillPolicy(**self._plain(DRILL, given or {}, where, {} if shared == OFF else shared, "policies.drill"))

    def _prices(self) -> Prices:
        where = "policies.prices"
        given = self._shared.get("prices", {})
        of_class = {each: given[each] for each in CLASSES if each in given}
        thaw = {
            each: {
                way: Thaw(**self._plain(THAW, values[way], f"{where}.{each}.{way}")) for way in WAYS if way in values
            }
            for each, values in of_class.items()
        }
        kept, moved = (
            {each: values[key] for each, values in of_class.items() if key in values}
            for key in ("per_gb_month", "per_1000_moves")
        )
        ways = {each: found for each, found in thaw.items() if found}
        return Prices(thaw=ways, per_gb_month=kept, per_1000_moves=moved, **self._plain(PRICES, given, where))

    def _plain(
        self, section: Section, values: Values, where: str, shared: Values | None = None, origin: str = ""
    ) -> dict[str, Any]:
        """The attributes that a section sets, those of sections below it left out."""
        assert section.record is not None
        found: dict[str, Any] = {}
        for field in section.fields:
            if isinstance(field.kind, Section):
                continue
            below = f"{where}.{field.key}"
            if field.key in values:
                found[field.attribute] = values[field.key]
            elif shared and field.key in shared:
                found[field.attribute] = shared[field.key]
                self._origins[below] = origin
            else:
                default = field.default(section.record)
                if default is msgspec.NODEFAULT:
                    if below not in self._reader.bad and where not in self._opaque():
                        self._reader.missing(where, field)
                    default = () if field.kind.is_list else ""
                found[field.attribute] = default
                self._origins[below] = DEFAULT
        return found

    def _opaque(self) -> set[str]:
        """What is no mapping at all: that its keys are missing need not be said too."""
        return {each.where for each in self._reader.mistakes}
