"""What thawing takes and what may be archived: figures and decisions, without any store."""

from __future__ import annotations

import msgspec
import pytest

from outlast.repo.archive_plan import ArchivePolicy, StoredPack, decide_archive
from outlast.repo.prune_plan import PackFacts, Policy, decide
from outlast.repo.thaw_plan import PackHeld, Prices, plan_thaw

GB = 1 << 30


def held(count: int, storage_class: str, hold: str = "archived", size_bytes: int = GB) -> list[PackHeld]:
    return [PackHeld(f"{storage_class}{number}", size_bytes, storage_class, hold) for number in range(count)]


def test_the_price_of_a_thaw_is_requests_retrieval_and_the_copies_for_a_week() -> None:
    # 1,000 packs of 100 GB in all: 0.05 for 1,000 requests, 100 GB at 0.01, 100 GB of copies for 7 of 30 days.
    plan = plan_thaw(held(1000, "GLACIER", size_bytes=100 * GB // 1000), Prices())
    standard = plan.way("standard")
    assert standard is not None
    assert standard.cost == pytest.approx(0.05 + 100 * 0.01 + 100 * 0.023 * 7 / 30, abs=0.001)
    assert (standard.hours, plan.way("bulk").hours) == (5, 12)  # type: ignore[union-attr]


def test_what_lies_in_two_classes_is_ready_when_the_slower_one_is_and_has_only_ways_of_both() -> None:
    plan = plan_thaw([*held(2, "GLACIER"), *held(1, "DEEP_ARCHIVE"), *held(3, "STANDARD", "readable")], Prices())
    assert [(way.tier, way.hours) for way in plan.ways] == [("standard", 12), ("bulk", 48)]
    assert (plan.packs, plan.waiting) == (6, 3)


def test_what_is_thawing_is_not_paid_twice_but_waited_for() -> None:
    plan = plan_thaw([*held(5, "DEEP_ARCHIVE", "thawing"), *held(1, "STANDARD", "readable")], Prices())
    assert plan.ways == []
    assert plan.waiting == 5
    assert plan.hours_left("bulk", Prices()) == 48
    assert plan.hours_left("expedited", Prices()) == 48, "it was asked for by another way: the longest counts"


def test_prices_are_taken_from_a_mapping_and_the_rest_from_the_table() -> None:
    own = msgspec.convert(
        {
            "currency": "EUR",
            "egress_per_gb": 0.09,
            "thaw": {"GLACIER": {"standard": {"hours": 4, "per_gb": 1, "per_1000_requests": 0}}},
        },
        Prices,
    )
    plan = plan_thaw(held(1, "GLACIER"), own)
    costs = {way.tier: (way.hours, way.cost) for way in plan.ways}
    assert costs["standard"] == (4, pytest.approx(1 + 0.09 + 0.023 * 7 / 30, abs=1e-4))
    assert costs["bulk"][0] == 12
    assert plan.currency == "EUR"
    with pytest.raises(msgspec.ValidationError, match="egres_per_gb"):
        msgspec.convert({"egres_per_gb": 1}, Prices)


def test_each_pack_that_stays_has_its_reason() -> None:
    day = 86_400.0
    packs = [
        StoredPack("goes", 1 << 26, "STANDARD", 40 * day, True),
        StoredPack("small", 100_000, "STANDARD", 40 * day, True),
        StoredPack("young", 1 << 26, "STANDARD", 20 * day, True),
        StoredPack("unread", 1 << 26, "STANDARD", 40 * day, False),
        StoredPack("lists", 1 << 26, "STANDARD", 40 * day, True, manifest_bytes=1 << 25),
        StoredPack("there", 1 << 26, "DEEP_ARCHIVE", 40 * day, True, is_archived=True),
        StoredPack("frozen", 1 << 26, "GLACIER", 40 * day, True, is_archived=True),
    ]
    plan = decide_archive(packs, ArchivePolicy("DEEP_ARCHIVE", 30 * day))
    assert [each.name for each in plan.packs] == ["goes"]
    assert len(plan.left) == 6
    assert sum(each.packs for each in plan.left) == 6


def test_archived_packs_are_never_repacked_and_are_no_reason_to_repack_others() -> None:
    archived = PackFacts("a", "live", 100, 10, archived=True)
    decided = decide([archived, PackFacts("b", "live", 100, 96), PackFacts("c", "live", 100, archived=True)], Policy())
    assert [each.action for each in decided.decisions] == ["keep", "keep", "condemn"]
    assert "archived" in decided.decisions[0].reason
    assert decided.bytes_freed == 100
