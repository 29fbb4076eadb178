"""What thawing archived packs takes: how long, and what it costs. Pure: facts and prices in, figures out.

Times are the longest that AWS gives as typical (AWS S3 User Guide, "Archive retrieval options"); prices are those of
AWS for us-east-1 in US dollars, without tax ("Amazon S3 pricing"). A GB is 2**30 bytes, as AWS bills it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import msgspec

Tier = Literal["expedited", "standard", "bulk"]
TIERS: tuple[Tier, ...] = get_args(Tier)
THAWED_DAYS = 7
"""for so long a thawed copy can be read"""
_GB = 1 << 30
_DAYS_OF_MONTH = 30


class Thaw(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one way to thaw takes. `hours`: after so many it is done, as a rule."""

    hours: float
    per_gb: float
    per_1000_requests: float


_THAW: dict[str, dict[Tier, Thaw]] = {
    "GLACIER": {
        "expedited": Thaw(5 / 60, 0.03, 10.0),
        "standard": Thaw(5, 0.01, 0.05),
        "bulk": Thaw(12, 0.0, 0.0),
    },
    "DEEP_ARCHIVE": {"standard": Thaw(12, 0.02, 0.10), "bulk": Thaw(48, 0.0025, 0.025)},
}
_STORAGE = {
    "STANDARD": 0.023,
    "STANDARD_IA": 0.0125,
    "ONEZONE_IA": 0.01,
    "INTELLIGENT_TIERING": 0.023,
    "GLACIER_IR": 0.004,
    "GLACIER": 0.0036,
    "DEEP_ARCHIVE": 0.00099,
}
_MOVE = {
    "STANDARD_IA": 0.01,
    "ONEZONE_IA": 0.01,
    "INTELLIGENT_TIERING": 0.01,
    "GLACIER_IR": 0.02,
    "GLACIER": 0.03,
    "DEEP_ARCHIVE": 0.05,
}


class Prices(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a region charges. What is left out has the price of us-east-1.

    `thaw`: storage class -> way -> what it takes. `per_gb_month`: storage class -> of keeping. `per_1000_moves`:
    storage class -> of moving objects there. `egress_per_gb`: of what leaves the region, 0 for a restore inside it.
    """

    currency: str = "USD"
    thaw: dict[str, dict[Tier, Thaw]] = {}
    per_gb_month: dict[str, float] = {}
    per_1000_moves: dict[str, float] = {}
    egress_per_gb: float = 0.0

    def of_thaw(self, storage_class: str, tier: Tier) -> Thaw | None:
        """None where there is no such way."""
        own = self.thaw.get(storage_class, {}).get(tier)
        return own or _THAW.get(storage_class, {}).get(tier)

    def hours(self, storage_class: str, tier: Tier) -> float:
        """How long it takes; where there is no such way, so that it was asked for by another, the longest."""
        found = self.of_thaw(storage_class, tier)
        every = [found] if found else [self.of_thaw(storage_class, each) for each in TIERS]
        return max((each.hours for each in every if each), default=0.0)

    def of_month(self, storage_class: str, size_bytes: int) -> float:
        """What it costs to keep so much for a month."""
        return self.per_gb_month.get(storage_class, _STORAGE.get(storage_class, 0.0)) * size_bytes / _GB

    def of_moves(self, storage_class: str, objects: int) -> float:
        """What it costs to move so many objects to another class."""
        return self.per_1000_moves.get(storage_class, _MOVE.get(storage_class, 0.0)) * objects / 1000


class PackHeld(msgspec.Struct, frozen=True):
    """A pack that is needed, and how it lies there."""

    pack: str
    bytes: int
    storage_class: str
    hold: Literal["readable", "archived", "thawing"]


class Way(msgspec.Struct, frozen=True):
    """One way to thaw all that is archived: `hours` until the last pack can be read, and the price of everything."""

    tier: Tier
    hours: float
    cost: float


class ThawPlan(msgspec.Struct, frozen=True):
    """What is needed, and what of it can't be read yet. `ways`: fastest first; none where nothing is archived."""

    packs: int
    bytes: int
    archived: list[PackHeld]
    """nobody has asked for these"""
    thawing: list[PackHeld]
    """these were asked for"""
    ways: list[Way]
    currency: str

    @property
    def waiting(self) -> int:
        """How many packs can't be read now."""
        return len(self.archived) + len(self.thawing)

    def way(self, tier: Tier) -> Way | None:
        return next((way for way in self.ways if way.tier == tier), None)

    def hours_left(self, tier: Tier, prices: Prices) -> float:
        """After at most so many hours all can be read, as a rule, were what is archived asked for by `tier` now."""
        classes = {each.storage_class for each in [*self.archived, *self.thawing]}
        return max((prices.hours(storage_class, tier) for storage_class in classes), default=0.0)


def plan_thaw(held: Iterable[PackHeld], prices: Prices) -> ThawPlan:
    """Work out what it takes to read all of these packs.

    >>> held = [PackHeld("a", 1 << 30, "DEEP_ARCHIVE", "archived"), PackHeld("b", 1 << 30, "STANDARD", "readable")]
    >>> [(way.tier, way.hours, way.cost) for way in plan_thaw(held, Prices()).ways]
    [('standard', 12, 0.0255), ('bulk', 48, 0.0079)]
    """
    every = list(held)
    archived = [each for each in every if each.hold == "archived"]
    thawing = [each for each in every if each.hold == "thawing"]
    of_class: dict[str, list[PackHeld]] = {}
    for each in archived:
        of_class.setdefault(each.storage_class, []).append(each)
    egress = prices.egress_per_gb * sum(each.bytes for each in every) / _GB
    ways = [way for tier in TIERS if of_class and (way := _way(of_class, tier, prices, egress)) is not None]
    return ThawPlan(len(every), sum(each.bytes for each in every), archived, thawing, ways, prices.currency)


def _way(of_class: Mapping[str, list[PackHeld]], tier: Tier, prices: Prices, egress: float) -> Way | None:
    """None where one of the classes can't be thawed so."""
    hours, cost = 0.0, egress
    for storage_class, packs in of_class.items():
        thaw = prices.of_thaw(storage_class, tier)
        if thaw is None:
            return None
        size_bytes = sum(each.bytes for each in packs)
        copies = prices.of_month("STANDARD", size_bytes) * THAWED_DAYS / _DAYS_OF_MONTH
        cost += thaw.per_gb * size_bytes / _GB + thaw.per_1000_requests * len(packs) / 1000 + copies
        hours = max(hours, thaw.hours)
    return Way(tier, hours, round(cost, 4))
