"""The files of a checkpoint, piece by piece: cut as they come, hashed and encoded by threads, stored in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from outlast.checkpoint.leaves import TensorFile
from outlast.records import ChunkRef, Entry
from outlast.repo import deltas
from outlast.repo.deltas import Block, Kept
from outlast.repo.repository import Repository
from outlast.repo.sums import Parts
from outlast.repo.write import Writer

_IN_FLIGHT = 8


Ids = dict[tuple[str, int, int], bytes]
"""(id of the repository, offset in the leaf, length) -> id of that chunk there, of bytes whose ids were worked out"""


class LeafBytes(NamedTuple):
    """A leaf's bytes, and what is known of them."""

    data: memoryview
    ids: Ids
    """It learns what is worked out."""


class Piece(NamedTuple):
    """What becomes one chunk."""

    data: bytes | memoryview
    item_bytes: int
    """width of its elements; 0 where it has none"""
    id: bytes = b""
    """of the chunk, where it is known already"""
    learn: Callable[[bytes], object] = lambda _: None
    """What is to be told the id."""


def threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 2)), thread_name_prefix="save")


def of_data(repository: Repository, data: bytes | memoryview, item_bytes: int = 0) -> Iterator[Piece]:
    """Cut by content."""
    start = 0
    for length in repository.cutter()(data, True):
        yield Piece(memoryview(data)[start : start + length], item_bytes)
        start += length


def of_tensors(repository: Repository, file: TensorFile, content: Callable[[str], LeafBytes]) -> Iterator[Piece]:
    """`content` is asked for a leaf when it is reached."""
    known: dict[str | None, Ids] = {}

    def data(name: str) -> memoryview:
        found, known[name] = content(name)
        return found

    for each in file.stretches(data, repository.format.chunking):
        if each.is_cut:
            yield from of_data(repository, each.data, each.item_bytes)
        else:
            place = repository.format.id, each.offset, len(each.data)
            ids = known.get(each.leaf, {})
            yield Piece(each.data, each.item_bytes, ids.get(place, b""), partial(ids.__setitem__, place))


def identified(writer: Writer, pool: ThreadPoolExecutor, pieces: Iterable[Piece]) -> list[Piece]:
    """With their ids."""

    def identify(piece: Piece) -> Piece:
        chunk = piece.id or writer.identify(piece.data)
        piece.learn(chunk)
        return piece._replace(id=chunk)

    return [made.result() for made in [pool.submit(identify, piece) for piece in pieces]]


def store(
    writer: Writer,
    pool: ThreadPoolExecutor,
    path: str,
    pieces: Iterable[Piece],
    *,
    mine: Collection[str] | None = None,
    old: Mapping[int, Block] | None = None,
) -> Entry:
    """One file. With `mine` only those chunks are stored; the others, whose ids are known, are named alone.

    `old`: by offset what an earlier version has in the place of each piece, from which differences are made.
    """
    kept: dict[str, Parts] = {}
    chunks = list(_added(writer, pool, pieces, mine, old or {}, kept))
    entry = Entry(path=path, type="file", mode=0o644, size=sum(length for _, length in chunks))
    return deltas.with_sums(entry, chunks, kept)


def _added(
    writer: Writer,
    pool: ThreadPoolExecutor,
    pieces: Iterable[Piece],
    mine: Collection[str] | None,
    old: Mapping[int, Block],
    kept: dict[str, Parts],
) -> Iterator[ChunkRef]:
    """Hash and encode in the pool, a few pieces ahead of what is added. `kept` learns which are kept as sums."""
    waiting: deque[Future[Kept] | ChunkRef] = deque()

    def first() -> ChunkRef:
        each = waiting.popleft()
        if not isinstance(each, Future):
            return each
        found = each.result()
        writer.add(found.prepared)
        if found.parts is not None:
            kept[found.id.hex()] = found.parts
        return found.ref

    def prepare(piece: Piece, before: Block | None) -> Kept:
        found = deltas.prepare(writer, piece.data, piece.item_bytes, before, lasting=True, chunk=piece.id)
        piece.learn(found.id)
        return found

    at = 0
    for piece in pieces:
        if mine is None or piece.id.hex() in mine:
            waiting.append(pool.submit(prepare, piece, old.get(at)))
        else:
            waiting.append((piece.id.hex(), len(piece.data)))
        at += len(piece.data)
        if len(waiting) > _IN_FLIGHT:
            yield first()
    while waiting:
        yield first()
