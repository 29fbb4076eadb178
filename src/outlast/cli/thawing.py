"""What is said about archived packs, by the commands that need them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import click

from outlast.cli.command import PARTLY_DONE, Call
from outlast.cli.text import count_text, duration_text, size_text, table, time_text

if TYPE_CHECKING:
    from outlast.backup.nearest import Holder, Nearest
    from outlast.backup.restore import RestoreReport
    from outlast.backup.restore_plan import RestorePlan
    from outlast.backup.thawed import Thawing
    from outlast.repo.repository import Repository
    from outlast.repo.thaw_plan import Prices, ThawPlan, Tier

TIERS = click.Choice(["expedited", "standard", "bulk"])
PRICES = click.option("--config", metavar="FILE", help="A configuration whose prices count, instead of those of AWS.")


def prices_of(call: Call, config: str | None) -> Prices:
    """Those of a configuration, where one is named."""
    from outlast.cli.agent import load
    from outlast.repo.thaw_plan import Prices

    return Prices() if config is None else load(call, config).policy.prices


class ArchivedPart:
    """What a restore needs of archived packs: told of by a dry run, refused, or thawed where a `tier` is given.

    Only what has to come from `repository`, where that is one of several.
    """

    def __init__(
        self, holder: Holder, repository: Repository, tier: str | None, prices: Prices, *, dry_run: bool
    ) -> None:
        from outlast.repo import thaw

        self._holder, self._repository = holder, repository
        self._tier = cast("Tier | None", tier)
        self._prices = prices
        self._dry_run = dry_run
        self._needed = thaw.Needed(repository) if tier or thaw.may_be_archived(repository) else None
        self._found: ThawPlan | None = None

    @property
    def need(self) -> Callable[[bytes], object] | None:
        """To be told each chunk that is to be fetched."""
        if self._needed is None or self._holder is self._repository:
            return self._needed.add if self._needed else None
        return self._need_of_several

    def _need_of_several(self, chunk: bytes) -> None:
        found = cast("Nearest", self._holder).called_in(self._repository, chunk)
        if found is not None and self._needed is not None:
            self._needed.add(found)

    def look(self) -> None:
        """Ask the store, once the plan is made. A restore that thaws asks by itself."""
        from outlast.repo.thaw import look

        if self._needed is None or (self._holder is not self._repository and not self._needed.packs):
            return
        if self._dry_run or self._tier is None:
            self._found = look(self._repository, self._needed, self._prices, at_all=self._tier is not None)

    @property
    def matters(self) -> bool:
        """Whether it is `restore` of this that has to restore."""
        return self._tier is not None or (self._found is not None and self._found.waiting > 0)

    def document(self) -> dict[str, Any]:
        return {"thaw": thaw_document(self._found)} if self._found else {}

    def lines(self) -> Iterator[str]:
        return thaw_lines(self._found) if self._found else iter(())

    def restore(self, planned: RestorePlan, *, wait: bool) -> RestoreReport | Thawing:
        """Start the thaw and fetch what has thawed. Raises `Archived` unless that was asked for."""
        from outlast.backup.thawed import restore_thawed
        from outlast.repo.thaw import refusal

        if self._tier is None:
            assert self._found is not None
            raise refusal(self._repository, self._found)
        include, overwrite = planned.include, planned.overwrite
        return restore_thawed(
            self._repository,
            planned.snapshot,
            planned.target,
            self._tier,
            include=include,
            overwrite=overwrite,
            wait=wait,
            prices=self._prices,
        )

    def tell(self, call: Call, waiting: Thawing) -> int:
        """The end of a restore that waits for a thaw."""
        from outlast.records import time_text as rfc3339

        assert self._tier is not None
        ready = rfc3339(self._repository.clock.now_ns() + round(waiting.hours * 3600 * 10**9))
        document = {"restored": False, "thaw": thaw_document(waiting.thaw), "hours": waiting.hours, "ready": ready}
        lines = [
            *thaw_lines(waiting.thaw),
            *started_lines(waiting.thaw, self._tier, self._prices),
            "Partly done: what had thawed was fetched, and the target is as it was.",
            f"Run the same command again at {time_text(ready)} UTC, or add --wait.",
        ]
        call.result(document, lines, always=True)
        return PARTLY_DONE


def thaw_document(found: ThawPlan) -> dict[str, Any]:
    import msgspec

    from outlast.repo.pack import object_name

    def objects(held: Any) -> list[dict[str, Any]]:
        return [
            {"object": object_name(each.pack), "bytes": each.bytes, "storage_class": each.storage_class}
            for each in held
        ]

    return {
        "packs": found.packs,
        "bytes": found.bytes,
        "archived": objects(found.archived),
        "thawing": objects(found.thawing),
        "ways": msgspec.to_builtins(found.ways),
        "currency": found.currency,
    }


def thaw_lines(found: ThawPlan) -> Iterator[str]:
    """Which packs, how long, how much."""
    if not found.waiting:
        yield f"Nothing has to be thawed: {count_text(found.packs, 'pack')} can be read."
        return
    if found.archived:
        classes = ", ".join(sorted({each.storage_class for each in found.archived}))
        size = size_text(sum(each.bytes for each in found.archived))
        yield f"To be thawed: {len(found.archived):,} of {count_text(found.packs, 'pack')}, {size} in {classes}."
        yield from table(
            ("TIER", "WITHIN", f"COST ({found.currency})"),
            ((way.tier, duration_text(way.hours * 3600), f"{way.cost:,.4f}") for way in found.ways),
            right=f"WITHIN COST ({found.currency})",
        )
    if found.thawing:
        size = size_text(sum(each.bytes for each in found.thawing))
        yield f"Thawing already: {count_text(len(found.thawing), 'pack')}, {size}."


def started_lines(found: ThawPlan, tier: Tier, prices: Prices) -> Iterator[str]:
    if not found.waiting:
        return
    way = found.way(tier)
    if found.archived and way:
        count = count_text(len(found.archived), "pack")
        yield f"The thaw of {count} was started by {tier}, for {money(way.cost, prices.currency)}."
    yield f"All can be read within {duration_text(found.hours_left(tier, prices) * 3600)}, as a rule."


def money(amount: float, currency: str) -> str:
    """
    >>> money(1234.5, "USD"), money(0.0012, "USD"), money(0, "USD")
    ('1,234.50 USD', '0.0012 USD', 'nothing')
    """
    if not amount:
        return "nothing"
    return f"{amount:,.{2 if amount >= 0.1 else 4}f} {currency}"
