"""What of archived packs a restore or a copy needs, and thawing it: ask, plan, start, and look again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from outlast.errors import Archived, Corrupt, InvalidInput
from outlast.records import Snapshot
from outlast.repo.needs import needed_chunks
from outlast.repo.pack import object_name
from outlast.repo.repository import Repository
from outlast.repo.seal import ID_BYTES
from outlast.repo.thaw_plan import THAWED_DAYS, PackHeld, Prices, ThawPlan, Tier, plan_thaw
from outlast.store.archive import Archive, archive_of, held_or_none

_AT_ONCE = 16


class Needed:
    """The packs that hold some chunks; of a chunk that lies in several, one that isn't archived."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        repository.load_index()
        self.packs: dict[str, int] = {}
        """name -> bytes"""

    @classmethod
    def by(cls, repository: Repository, snapshot: Snapshot) -> Needed:
        """What a whole snapshot needs, its list of files included."""
        found = cls(repository)

        def take(ids: bytes) -> None:
            for at in range(0, len(ids), ID_BYTES):
                found.add(ids[at : at + ID_BYTES])

        needed_chunks(repository, [snapshot], take)
        return found

    def add(self, chunk: bytes) -> None:
        """A stored chunk, or a sum that a manifest told of. What no pack holds is left out: its reader will tell."""
        repository = self._repository
        parts = None if repository.index.get(chunk) else repository.sums.parts(chunk)
        for each in parts.ids if parts else (chunk,):
            try:
                name = repository.locate(each).pack.name
            except Corrupt:
                continue
            ref = repository.state.find(name)
            if ref is not None:
                self.packs[name] = ref.bytes


def may_be_archived(repository: Repository) -> bool:
    """Whether it is worth asking: for this store there are storage classes, and packs were archived."""
    if not repository.store.url.startswith("s3://"):
        return False
    repository.load_index()
    return bool(repository.archived)


def look(repository: Repository, needed: Needed, prices: Prices, *, at_all: bool = True) -> ThawPlan:
    """Ask how these packs lie, and work out what thawing takes. Changes nothing. Raises `Refused`, `Unavailable`.

    Unless `at_all`, only at those that this program has archived. What can't be read is not asked for from then
    on, until the next look.
    """
    asked = needed.packs if at_all else needed.packs.keys() & repository.archived.keys()
    archive = archive_of(repository.store) if asked else None

    def ask(pack: tuple[str, int]) -> PackHeld | None:
        name, size_bytes = pack
        if archive is None or name not in asked:
            return PackHeld(name, size_bytes, "", "readable")
        held = held_or_none(archive, object_name(name))
        return PackHeld(name, size_bytes, held.storage_class, held.hold) if held else None

    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="held") as threads:
        found = [each for each in threads.map(ask, needed.packs.items()) if each is not None]
    for each in found:
        if each.hold != "readable" or each.pack in repository.archived:
            repository.archived[each.pack] = each.hold != "readable"
    return plan_thaw(found, prices)


def start(repository: Repository, planned: ThawPlan, tier: Tier) -> None:
    """Thaw what is archived. Raises `InvalidInput` before anything, `Refused`, `Unavailable`; then call it again."""
    if not planned.archived:
        return
    if planned.way(tier) is None:
        classes = sorted({each.storage_class for each in planned.archived})
        raise InvalidInput(
            f"what lies in {', '.join(classes)} can't be thawed by {tier}; nothing was done.",
            hint=f"Say {' or '.join(way.tier for way in planned.ways)}.",
        )
    archive = archive_of(repository.store)
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="thaw") as threads:
        list(threads.map(lambda each: _thaw(archive, each, tier), planned.archived))


def _thaw(archive: Archive, pack: PackHeld, tier: Tier) -> None:
    archive.thaw(object_name(pack.pack), tier, THAWED_DAYS)


def refusal(repository: Repository, planned: ThawPlan) -> Archived:
    """What to say when something that is needed can't be read now."""
    what = f"{planned.waiting} of the {planned.packs} packs that are needed of {repository.store.url}"
    thawing = f", and {len(planned.thawing)} of them are thawing" if planned.thawing else ""
    return Archived(
        f"{what} are archived{thawing}. Everything is whole, and nothing was changed.",
        hint="`--dry-run` shows how long thawing takes and what it costs, `--thaw standard` starts it.",
    )
