"""The repositories of the tiers: opened when they are needed, and looked at."""

from __future__ import annotations

from collections.abc import Callable

from outlast.clock import Clock
from outlast.errors import NoRepository, NotFound, OutlastError
from outlast.repo.log import entry_name
from outlast.repo.repository import Repository
from outlast.repo.seal import digest
from outlast.store.base import ObjectStore
from outlast.store.layers import ThrottledStore
from outlast.tiers.due import Held
from outlast.tiers.policy import Policy, Tier

_AWAY_FACTOR = 10

Open = Callable[[ObjectStore], Repository]
StoreOf = Callable[[Tier], ObjectStore]


class Places:
    """The tiers of a policy. For one thread; what is opened stays open until it fails."""

    def __init__(self, policy: Policy, store_of: StoreOf, open_repository: Open, clock: Clock) -> None:
        self.policy, self.clock = policy, clock
        self._store_of, self._open = store_of, open_repository
        self._opened: dict[tuple[str, bool], Repository] = {}
        self._away: dict[str, tuple[float, Held]] = {}
        """tiers that could not be read -> until when, by the monotonic clock, they aren't asked again; what was told"""

    def another(self) -> Places:
        """The same tiers, of which nothing is open yet: for another thread."""
        return Places(self.policy, self._store_of, self._open, self.clock)

    def repository(self, tier: str, *, throttled: bool = False) -> Repository:
        """With its log read, as of now or some time before. `throttled`: at most at the tier's bandwidth."""
        found = self.tier(tier)
        rate = found.bandwidth_bytes_per_second if throttled else None
        key = tier, rate is not None
        if key in self._opened and not _is_there_still(self._opened[key]):
            self.forget(tier)
        if key not in self._opened:
            store = self._store_of(found)
            self._opened[key] = self._open(store if rate is None else ThrottledStore(store, rate, self.clock))
        return self._opened[key]

    def tier(self, name: str) -> Tier:
        return next(each for each in self.policy.tiers if each.name == name)

    def forget(self, tier: str) -> None:
        """Open it anew when it is needed next."""
        for throttled in (False, True):
            self._opened.pop((tier, throttled), None)

    def look(self) -> list[Held]:
        """What the log of each tier says now."""
        return [self._look(tier.name) for tier in self.policy.tiers]

    def _look(self, tier: str) -> Held:
        """One that took long to say that it can't be read is left alone for ten times as long: others wait for it."""
        began_seconds = self.clock.monotonic_seconds()
        until_seconds, held = self._away.pop(tier, (0.0, None))
        if held is not None and began_seconds < until_seconds:
            self._away[tier] = until_seconds, held
            return held
        held = self._read(tier)
        if held.problem:
            ended_seconds = self.clock.monotonic_seconds()
            self._away[tier] = ended_seconds + _AWAY_FACTOR * (ended_seconds - began_seconds), held
        return held

    def _read(self, tier: str) -> Held:
        try:
            repository = self.repository(tier)
            repository.refresh()
        except OSError as exc:
            self.forget(tier)
            return Held(problem=str(exc))
        except OutlastError as exc:
            self.forget(tier)
            hint = (
                " Mount the disk; where it is new or lost, `outlast init --config FILE` makes one."
                if isinstance(exc, NoRepository)
                else ""
            )
            return Held(problem=exc.message + hint)
        state = repository.state
        return Held(
            dict(state.snapshots),
            dict(state.proven),
            dict(state.hurt),
            dict(state.damaged),
            dict(state.drills),
            frozenset(state.resumed),
        )


def _is_there_still(repository: Repository) -> bool:
    """Whether the store holds what was opened. Raises `Unavailable`.

    Another repository may stand in its place by now, or an older state of this one, copied back. What is known of it
    would be wrong, and an entry that follows on what isn't there would end its log for every reader.
    """
    store, state = repository.store, repository.state
    try:
        if digest(store.get("format")).hex() != repository.log.anchor:
            return False
        return not state.seq or digest(store.get(entry_name(state.seq))).hex() == state.head_hash
    except NotFound:
        return False
