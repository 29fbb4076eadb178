"""Make a staged state durable: cut, hash, store what is new, commit once; then read back and compare."""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec

from outlast import __version__, records
from outlast.checkpoint.leaves import Leaf, TensorFile
from outlast.checkpoint.stage import Place
from outlast.checkpoint.state import Part
from outlast.records import ChunkRef, Entry, Snapshot
from outlast.repo.repository import Repository
from outlast.repo.write import Prepared, Writer

STATE_FILE = "state.json"
STATE_VERSION = 1
_PIECES_IN_FLIGHT = 8


class Description(msgspec.Struct):
    """The content of `state.json`."""

    version: int
    step: int
    parts: dict[str, tuple[str, object]]
    """key -> (kind, tree)"""
    facts: dict[str, object] = {}


def files_of(parts: Mapping[str, Part]) -> dict[str, list[Leaf]]:
    """The tensor files of a checkpoint, by name."""
    found = {}
    for key, part in parts.items():
        for name, leaves in ((f"{key}.safetensors", part.leaves), (f"{key}.more.safetensors", part.more)):
            if leaves:
                found[name] = leaves
    return found


def persist(
    repository: Repository,
    name: str,
    step: int,
    parts: Mapping[str, Part],
    contents: Mapping[Place, memoryview],
    tags: Mapping[str, str],
) -> Snapshot:
    """Store and commit one checkpoint. Raises `StoreFull`, `Unavailable`; what was committed before is whole."""
    now_ns = repository.clock.now_ns()
    writer = repository.writer()
    try:
        with ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 2)), thread_name_prefix="save") as pool:
            entries = list(_entries(repository, writer, pool, step, parts, contents, now_ns))
        for entry in sorted(entries, key=lambda entry: records.path_order(entry.raw_path)):
            writer.add_entry(entry)
        snapshot = Snapshot(
            id="",
            kind="checkpoint",
            name=name,
            time=records.time_text(now_ns),
            tags={"step": str(step), **tags},
            host=socket.gethostname(),
            files=len(entries) - 1,
            bytes=sum(entry.size for entry in entries),
            program=f"outlast {__version__}",
        )
        return writer.commit(snapshot)
    except BaseException:
        writer.abandon()
        raise


def _entries(
    repository: Repository,
    writer: Writer,
    pool: ThreadPoolExecutor,
    step: int,
    parts: Mapping[str, Part],
    contents: Mapping[Place, memoryview],
    now_ns: int,
) -> Iterator[Entry]:
    yield Entry(path=".", type="dir", mode=0o755, mtime_ns=now_ns)
    described = Description(STATE_VERSION, step, {key: (part.kind, part.tree) for key, part in parts.items()})
    pieces: Iterator[tuple[bytes | memoryview, int, bool]] = iter([(msgspec.json.encode(described), 0, True)])
    sizes = {STATE_FILE: pieces}
    for file, leaves in files_of(parts).items():
        tensors = TensorFile(leaves, {"format": "pt"})
        mine = {leaf.name: contents[file, leaf.name] for leaf in leaves}
        sizes[file] = tensors.chunks(mine, repository.format.chunking)
    for file, pieces in sizes.items():
        chunks = list(_store(repository, writer, pool, pieces))
        size = sum(length for _, length in chunks)
        yield Entry(path=file, type="file", mode=0o644, mtime_ns=now_ns, size=size, chunks=chunks)


def _store(
    repository: Repository,
    writer: Writer,
    pool: ThreadPoolExecutor,
    pieces: Iterator[tuple[bytes | memoryview, int, bool]],
) -> Iterator[ChunkRef]:
    cut = repository.cutter()
    waiting: deque[Future[Prepared]] = deque()
    for data, item_bytes, is_cut in pieces:
        start = 0
        for length in cut(data, True) if is_cut else [len(data)]:
            part = data[start : start + length]
            waiting.append(pool.submit(writer.prepare, part, item_bytes, lasting=True))
            start += length
            if len(waiting) > _PIECES_IN_FLIGHT:
                yield writer.add(waiting.popleft().result())
    while waiting:
        yield writer.add(waiting.popleft().result())
