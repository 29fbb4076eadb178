"""Packs that are durable and that no entry names: what a session left that was killed before it could commit them.

A copy takes them up instead of sending the same bytes again. They may be of a session that is still at work: then both
commit them, which is one fact said twice. Nothing is written here: what relies on one lists it when it commits, as it
does with packs that were condemned meanwhile, and so the proof in `state.py` holds for them too.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from outlast.errors import Corrupt, NotFound
from outlast.records import PackRef
from outlast.repo import pack
from outlast.repo.index import Location, indexed_pack
from outlast.repo.pack import Footer
from outlast.repo.repository import Repository


def take_up(repository: Repository) -> None:
    """Let new work rely on what these packs hold. Raises as `refresh` does.

    Not on a disk: there what a killed process left may be gone after a power cut, and the entry that relies on it not.
    """
    if not repository.store.capabilities.durable_when_listed:
        return
    found = _unnamed(repository)
    if not found:
        return
    # Whoever swept a pack may be about to delete it: then it is no leftover. Only the whole log knows them all.
    try:
        repository.log.prove()
    except Corrupt:
        repository.log.load()
        return
    repository.refresh()
    refs = [ref for ref in found if repository.state.find(ref.name) is None and ref.name not in repository.log.swept]
    with ThreadPoolExecutor(repository.store.capabilities.concurrency) as threads:
        footers = [footer for footer in threads.map(lambda ref: _sound(repository, ref), refs) if footer is not None]
    sizes = {ref.name: ref.bytes for ref in refs}
    repository.index.add(footers)
    repository.index.sort()
    for footer in footers:
        repository.leftovers[footer.name] = PackRef(footer.name, sizes[footer.name], len(footer.records))


def _unnamed(repository: Repository) -> list[PackRef]:
    known = {*repository.own_packs, *repository.leftovers}
    found = []
    for info in repository.store.list("packs/"):
        name = info.name.rpartition("/")[2]
        if info.name == pack.object_name(name) and name not in known and repository.state.find(name) is None:
            found.append(PackRef(name, info.size_bytes, 0))
    return found


def _sound(repository: Repository, ref: PackRef) -> Footer | None:
    """The footer of a pack that may be relied on: by its name it is the one that the pack was made with."""
    try:
        footer = repository.read_footer(ref)
        if repository.keys is not None:
            # What an entry names, somebody with the key has made. Here only the chunks themselves can tell.
            if footer.epoch != repository.keys.epoch:
                return None
            _open_all(repository, footer)
    except (Corrupt, NotFound):
        return None
    return footer if footer.encrypted == (repository.keys is not None) else None


def _open_all(repository: Repository, footer: Footer) -> None:
    held_by = indexed_pack(footer)
    for start, records in pack.runs(footer.records):
        end = int(records[-1]["offset"]) + int(records[-1]["stored"])
        [data] = repository.store.get_ranges(pack.object_name(footer.name), [(start, end - start)])
        for chunk, _, offset, stored, plain, codec, _ in records.tolist():
            location = Location(held_by, offset, stored, plain, codec)
            repository.open_chunk(chunk, location, memoryview(data)[offset - start : offset - start + stored])
