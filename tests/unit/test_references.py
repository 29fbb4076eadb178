"""What damage costs is told in bounded room, whatever is lost."""

from __future__ import annotations

import tracemalloc

from outlast.clock import ManualClock
from outlast.records import Entry, Snapshot
from outlast.repo.check import open_and_check
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
