"""What damage costs is told in bounded room, whatever is lost."""

from __future__ import annotations

import re
import tracemalloc

import msgspec
import pytest

from outlast.clock import ManualClock
from outlast.errors import Corrupt
from outlast.records import Entry, Snapshot
from outlast.repo.check import open_and_check
from outlast.repo.manifest import validated
from outlast.repo.references import Findings
from outlast.repo.repository import Repository
from outlast.store.memory import MemoryStore


def test_files_lost_with_unreadable_packs_are_told_once() -> None:
    """Without footers and index nobody knows which pack a chunk was in: one blame, not one for each pack."""
    store = MemoryStore()
    repository = Repository.create(store, pack_bytes=4 << 10)
    writer = repository.writer()
    noise = ManualClock(seed=3)
    chunks = []
    for number in range(250):
        chunk = writer.add(writer.prepare(noise.random_bytes(1000)))
        chunks.append(bytes.fromhex(chunk[0]))
        writer.add_entry(Entry(path=f"file{number:03d}", type="file", size=2000, chunks=[chunk, chunk]))
    snapshot = writer.commit(Snapshot(id="", kind="backup", name="n", time=""))
    for info in list(store.list("index/")):
        store.delete(info.name)
    opened = Repository.open(store)
    kept = {opened.locate(bytes.fromhex(ref[0])).pack.name for ref in snapshot.manifest}
    lost = [n for n, chunk in enumerate(chunks) if opened.locate(chunk).pack.name not in kept]
    broken = [info.name for info in store.list("packs/") if info.name.rpartition("/")[2] not in kept]
    assert len(broken) > 40
    for name in broken:
        store.put(name, [bytes(len(store.get(name)))])
    damaged = {damage.object: damage for damage in open_and_check(store).damaged}
    suspect = f"one of {len(broken)} unreadable packs"
    assert damaged.keys() == {*broken, suspect}
    assert damaged[suspect].snapshots == [snapshot.id]
    assert damaged[suspect].files == [f"file{number:03d}" for number in lost[:100]]
    assert f"{len(lost)} files" in damaged[suspect].problem
    assert not any(damaged[name].files for name in broken)


def _repository(entries: list[Entry], *, chunk_lines: int) -> MemoryStore:
    """A repository with a snapshot of these entries, whatever they are, a manifest chunk for each few lines."""
    store = MemoryStore()
    writer = Repository.create(store).writer()
    refs, lines = [], b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries)
    whole = lines.split(b"\n")[:-1]
    for at in range(0, len(whole), chunk_lines):
        part = b"".join(line + b"\n" for line in whole[at : at + chunk_lines])
        refs.append(writer.add(writer.prepare(part)))
    writer._manifest = refs
    writer.commit(Snapshot(id="", kind="backup", name="n", time=""))
    return store


def _folder(path: str) -> Entry:
    return Entry(path=path, type="dir", mode=0o755)


def _empty(path: str) -> Entry:
    return Entry(path=path, type="file", mode=0o644)


SOUND = [_folder("."), _folder("a"), _folder("a/b"), _empty("a/b/c"), _empty("a/b/d"), _empty("a/e"), _empty("f")]
UNSOUND = [
    ([*SOUND, _empty("../x")], "../x", "is not a path inside a folder"),
    ([*SOUND, _empty("f/x")], "f/x", "lies in something that is not a folder"),
    ([*SOUND[:5], _empty("a/d/x"), *SOUND[5:]], "a/d/x", "lies in something that is not a folder"),
    ([*SOUND, _empty("f")], "f", "is out of order or there twice"),
    ([*SOUND, _empty("a/e")], "a/e", "is out of order or there twice"),
    ([*SOUND, Entry(path="g", type="hardlink", target="h")], "g", "is linked to 'h'"),
    ([*SOUND, Entry(path="g", type="file", uid=1 << 40)], "g", "has an impossible uid"),
    ([*SOUND, Entry(path="g", type="file", size=3)], "g", "has chunks that don't make up its size"),
    ([*SOUND, Entry(path="g", type="file", size=8, holes=[(4, 4), (0, 4)])], "g", "has holes that overlap"),
]


@pytest.mark.parametrize("chunk_lines", [1, 2, 3, 100])
def test_check_names_the_entries_that_restore_refuses(chunk_lines: int) -> None:
    assert open_and_check(_repository(SOUND, chunk_lines=chunk_lines)).damaged == []
    for entries, path, problem in UNSOUND:
        store = _repository(entries, chunk_lines=chunk_lines)
        [snapshot] = Repository.open(store).snapshots()
        with pytest.raises(Corrupt, match=re.escape(problem)):
            list(validated(Repository.open(store).entries(snapshot), snapshot.id))
        [damage] = open_and_check(store).damaged
        assert f"The entry {path!r} {problem}" in damage.problem
        assert (damage.snapshots, damage.files) == ([snapshot.id], [path])


def test_a_million_lost_files_do_not_fill_memory() -> None:
    findings = Findings()
    tracemalloc.start()
    try:
        for number in range(200_000):
            findings.lost("packs/x", f"some/folder/file{number * 7919 % 200_000:06d}")
            findings.problem("manifests", f"line {number % 1000} is wrong")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert findings.files("packs/x") == ([f"some/folder/file{number:06d}" for number in range(100)], 200_000)
    assert findings.problems["manifests"][-1] == "There is more of this kind."
    assert peak < 1 << 20
