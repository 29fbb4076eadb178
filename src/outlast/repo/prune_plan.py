"""Which packs to repack, to condemn and to sweep, and why. Pure: facts in, decisions out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

Place = Literal["live", "condemned", "quarantined", "unnamed"]
Action = Literal["keep", "repack", "condemn", "wait", "sweep", "rescue"]


class Policy(msgspec.Struct, frozen=True):
    """How much waste is tolerable, and how much may go at once. Shares lie between 0 and 1."""

    max_unused: float = 0.05
    """of the packs' bytes: unneeded chunks in packs that also hold needed ones may stay up to this share"""
    max_delete: float = 0.5
    """of all bytes: when more than this would go, nothing is done"""
    grace_seconds: float = 24 * 3600.0
    """how long a pack stays readable after it was condemned"""
    unnamed_seconds: float | None = None
    """how old an object is that no entry names, before it isn't taken for work under way; None: `grace_seconds`"""


class PackFacts(msgspec.Struct, frozen=True):
    """One pack that was not swept, or an object under `packs/` that no entry names.

    `needed_bytes`: what would be left of it without the chunks that no snapshot needs from here; 0 when
    none is needed. `age_seconds`: by the store's clock, since the pack was condemned; of an unnamed one,
    since it was written.
    """

    name: str
    place: Place
    bytes: int
    needed_bytes: int = 0
    age_seconds: float = 0.0
    readable: bool = True
    """whether it is known what is in it"""
    archived: bool = False
    """it can't be read without thawing it, so that it is never repacked"""


class Decision(msgspec.Struct, frozen=True):
    """What to do about one pack."""

    pack: str
    action: Action
    bytes: int
    needed_bytes: int
    reason: str


class Decided(msgspec.Struct, frozen=True):
    """`bytes_freed`: what will be gone in the end, less what repacking writes anew."""

    decisions: list[Decision]
    bytes_total: int
    bytes_needed: int
    bytes_freed: int

    def of(self, *actions: Action) -> list[Decision]:
        return [each for each in self.decisions if each.action in actions]

    @property
    def share_freed(self) -> float:
        """Of all bytes under `packs/`: what this plan newly condemns, less what repacking writes anew."""
        return self.bytes_freed / self.bytes_total if self.bytes_total else 0.0


def decide(packs: Iterable[PackFacts], policy: Policy) -> Decided:
    """One decision for each pack, in order of name.

    Of the live packs that hold both needed and unneeded chunks those with the largest share of waste are
    repacked first, until what stays unneeded is at most `max_unused` of what stays.

    >>> facts = [PackFacts("a", "live", 100, 99), PackFacts("b", "live", 100, 10), PackFacts("c", "live", 100)]
    >>> [each.action for each in decide(facts, Policy()).decisions]
    ['keep', 'repack', 'condemn']
    """
    every = sorted(packs, key=lambda pack: pack.name)
    decisions = {pack.name: _decide_alone(pack, policy) for pack in every}
    kept = [pack for pack in every if decisions[pack.name].action == "keep" and pack.place == "live"]
    kept = [pack for pack in kept if not pack.archived]
    waste = sum(_waste(pack) for pack in kept)
    size = sum(pack.bytes for pack in kept)
    for pack in sorted(kept, key=lambda pack: (-_waste(pack) / max(1, pack.bytes), pack.name)):
        if waste <= policy.max_unused * size:
            break
        if not _waste(pack):
            continue
        waste -= _waste(pack)
        size -= _waste(pack)
        share = f"{_waste(pack) / pack.bytes:.0%} of it is not needed"
        decisions[pack.name] = _decision(pack, "repack", share)
    freed = sum(
        each.bytes - each.needed_bytes
        for pack in every
        if (each := decisions[pack.name]).action in ("repack", "condemn")
    )
    return Decided(
        list(decisions.values()), sum(pack.bytes for pack in every), sum(pack.needed_bytes for pack in every), freed
    )


def _waste(pack: PackFacts) -> int:
    return pack.bytes - pack.needed_bytes if pack.readable else 0


def _decide_alone(pack: PackFacts, policy: Policy) -> Decision:
    if pack.place == "condemned":
        if pack.needed_bytes:
            return _decision(pack, "rescue", "it was condemned, but a snapshot needs it")
        if pack.age_seconds >= policy.grace_seconds:
            return _decision(pack, "sweep", "it was condemned long enough ago")
        return _decision(pack, "wait", "it was condemned a short while ago")
    if pack.place == "unnamed":
        patience = policy.grace_seconds if policy.unnamed_seconds is None else policy.unnamed_seconds
        if pack.age_seconds >= patience:
            return _decision(pack, "condemn", "no commit names it: left by work that was cut short")
        return _decision(pack, "keep", "no commit names it yet: it may belong to a backup that is running")
    if not pack.readable:
        return _decision(pack, "keep", "it can't be known what is in it; `outlast check --repair` may help")
    if pack.archived and pack.needed_bytes:
        return _decision(pack, "keep", "it is archived: what nobody needs of it goes with the rest")
    if not pack.needed_bytes:
        return _decision(pack, "condemn", "no snapshot needs anything of it")
    if pack.place == "quarantined":
        return _decision(pack, "keep", "it is damaged, but a snapshot needs what only it holds")
    return _decision(pack, "keep", "")


def _decision(pack: PackFacts, action: Action, reason: str) -> Decision:
    return Decision(pack.name, action, pack.bytes, pack.needed_bytes, reason)
