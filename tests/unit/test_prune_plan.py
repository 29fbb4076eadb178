"""What prune decides, and why, before anything is touched."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from outlast.repo.prune_plan import PackFacts, Policy, decide

DAY = 24 * 3600.0


def actions(*packs: PackFacts, **policy: float) -> dict[str, str]:
    return {each.pack: each.action for each in decide(packs, Policy(**policy)).decisions}


def test_what_nothing_needs_is_given_up_and_the_rest_stays() -> None:
    assert actions(PackFacts("a", "live", 100, 100), PackFacts("b", "live", 100)) == {"a": "keep", "b": "condemn"}


def test_the_packs_with_the_largest_share_of_waste_are_repacked_until_the_rest_is_tolerable() -> None:
    packs = [PackFacts("a", "live", 100, 97), PackFacts("b", "live", 1000, 900), PackFacts("c", "live", 100, 20)]
    assert actions(*packs, max_unused=0.2) == {"a": "keep", "b": "keep", "c": "keep"}
    assert actions(*packs, max_unused=0.1) == {"a": "keep", "b": "keep", "c": "repack"}
    assert actions(*packs, max_unused=0.04) == {"a": "keep", "b": "repack", "c": "repack"}
    assert actions(*packs, max_unused=0.0) == {"a": "repack", "b": "repack", "c": "repack"}


def test_a_condemned_pack_waits_for_its_time_and_is_taken_back_when_needed() -> None:
    young, old = PackFacts("a", "condemned", 10, 0, DAY - 1), PackFacts("b", "condemned", 10, 0, DAY)
    needed = PackFacts("c", "condemned", 10, 5, 9 * DAY)
    assert actions(young, old, needed) == {"a": "wait", "b": "sweep", "c": "rescue"}
    assert actions(young, grace_seconds=0) == {"a": "sweep"}


def test_an_object_that_no_commit_names_is_given_up_only_when_it_is_old() -> None:
    assert actions(PackFacts("a", "unnamed", 10, 0, DAY / 2), PackFacts("b", "unnamed", 10, 0, 2 * DAY)) == {
        "a": "keep",
        "b": "condemn",
    }


def test_what_is_in_an_unreadable_pack_is_unknown_so_it_stays() -> None:
    assert actions(PackFacts("a", "live", 10, readable=False), PackFacts("b", "quarantined", 10, readable=False)) == {
        "a": "keep",
        "b": "keep",
    }


def test_a_damaged_pack_stays_while_only_it_holds_what_is_needed() -> None:
    assert actions(PackFacts("a", "quarantined", 10, 1), PackFacts("b", "quarantined", 10, 0)) == {
        "a": "keep",
        "b": "condemn",
    }


packs = st.lists(
    st.builds(
        lambda place, size, share, age, readable: PackFacts("", place, size, int(size * share), age, readable),
        st.sampled_from(["live", "condemned", "quarantined", "unnamed"]),
        st.integers(1, 1000),
        st.sampled_from([0, 0, 0.1, 0.5, 0.9, 1]),
        st.sampled_from([0.0, DAY / 2, DAY, 3 * DAY]),
        st.booleans(),
    ),
    max_size=12,
).map(lambda found: [PackFacts(f"p{n}", p.place, p.bytes, p.needed_bytes, p.age_seconds, p.readable)
                     for n, p in enumerate(found)])  # fmt: skip


@given(packs, st.sampled_from([0, 0.05, 0.5, 1]))
def test_nothing_that_is_needed_is_ever_given_up_and_the_waste_ends_below_the_limit(
    found: list[PackFacts], max_unused: float
) -> None:
    decided = decide(found, Policy(max_unused=max_unused))
    facts = {each.name: each for each in found}
    assert [each.pack for each in decided.decisions] == sorted(facts)
    for each in decided.of("condemn", "sweep"):
        assert facts[each.pack].needed_bytes == 0 or facts[each.pack].place == "unnamed"
        assert facts[each.pack].place != "live" or facts[each.pack].readable
        assert each.reason
    kept = [facts[each.pack] for each in decided.of("keep") if facts[each.pack].place == "live"]
    waste = sum(pack.bytes - pack.needed_bytes for pack in kept if pack.readable)
    rewritten = sum(facts[each.pack].needed_bytes for each in decided.of("repack"))
    assert waste <= max_unused * (rewritten + sum(pack.bytes for pack in kept))
    assert 0 <= decided.bytes_freed <= decided.bytes_total
