"""Copy the needed chunks out of packs, so that the packs can be given up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import msgspec

from outlast.errors import Corrupt, NotFound
from outlast.events import Event, Progress
from outlast.repo.index import Location
from outlast.repo.pack import EncodedChunk, object_name
from outlast.repo.repository import Repository
from outlast.repo.write import Writer

_RANGE_BYTES = 8 << 20

Row = tuple[bytes, Location]
"""(chunk id, where it lies)"""


class Repacked(msgspec.Struct):
    """`packs`: those of which everything asked for is durable, and committed, in the packs `written`."""

    packs: set[str]
    written: frozenset[str] = frozenset()
    chunks: int = 0
    bytes_written: int = 0
    damaged: list[bytes] = []


def repack(repository: Repository, wanted: dict[str, list[Row]], *, partly: bool = False) -> Repacked:
    """Store these chunks again, in new packs, and commit those.

    Each chunk is decoded and compared with its id on the way; it keeps its encoded form, and is sealed with
    the newest key. A pack with a damaged chunk is left out of the result, and with `partly` its other
    chunks are copied all the same. Raises `Unavailable`, `StoreFull`; then nothing is lost.
    """
    done = Repacked(set())
    if not wanted:
        return done
    writer = repository.writer()
    try:
        for number, (pack, rows) in enumerate(wanted.items()):
            if _copy(repository, writer, pack, rows, done, partly=partly):
                done.packs.add(pack)
            repository.sink.progress(Progress("repack", done_files=number + 1, total_files=len(wanted)))
        writer.finish()
    except BaseException:
        writer.abandon()
        raise
    done.written = frozenset(writer.relied_on)
    done.bytes_written = writer.bytes_stored
    return done


def _copy(
    repository: Repository, writer: Writer, pack: str, rows: Sequence[Row], done: Repacked, *, partly: bool
) -> bool:
    """Whether all of the rows were copied."""
    whole = True
    for part in _ranges(rows):
        for (chunk, location), stored in zip(part, _read(repository, pack, part), strict=True):
            try:
                if stored is None:
                    raise Corrupt(f"chunk {chunk.hex()[:16]} can't be read.")
                encoded, _ = repository.unseal_chunk(chunk, location, stored)
            except Corrupt as exc:
                whole = False
                done.damaged.append(chunk)
                repository.sink.event(Event("pack.damaged", f"pack {pack[:16]} can't be emptied: {exc.message}"))
                continue
            if whole or partly:
                writer.store_again(EncodedChunk(chunk, location.codec, location.plain_bytes, bytes(encoded)))
                done.chunks += 1
    return whole


def _read(repository: Repository, pack: str, part: Sequence[Row]) -> list[memoryview | None]:
    """The stored bytes of neighbouring rows; None for those that can't be had."""
    start = part[0][1].offset
    end = part[-1][1].offset + part[-1][1].stored_bytes
    try:
        [data] = repository.store.get_ranges(object_name(pack), [(start, end - start)])
    except (Corrupt, NotFound):
        if len(part) == 1:
            return [None]
        return [_read(repository, pack, [row])[0] for row in part]
    view = memoryview(data)
    return [view[row.offset - start : row.offset - start + row.stored_bytes] for _, row in part]


def _ranges(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows in order of offset, in reads of about `_RANGE_BYTES`."""
    part: list[Row] = []
    for row in sorted(rows, key=lambda row: row[1].offset):
        if part and row[1].offset + row[1].stored_bytes - part[0][1].offset > _RANGE_BYTES:
            yield part
            part = []
        part.append(row)
    if part:
        yield part
