"""The content of a file at an offset: of its chunks only those that are touched are fetched."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from outlast.errors import Corrupt
from outlast.records import Entry
from outlast.repo.repository import chunk_offsets

_CHUNKS_KEPT = 6


class Chunks(Protocol):
    """What chunks are read from: a repository, or several."""

    def get_chunk(self, chunk: bytes) -> bytes | memoryview: ...


class RecentChunks:
    """The few chunks read last, of whatever file; counts what was fetched."""

    def __init__(self, repository: Chunks) -> None:
        self.bytes_fetched = self.chunks_fetched = 0
        self._repository = repository
        self._kept: dict[str, bytes | memoryview] = {}

    def get(self, chunk: str) -> bytes | memoryview:
        """The verified plain bytes. Raises `Corrupt` where no copy is whole."""
        found = self._kept.pop(chunk, None)
        if found is None:
            if len(self._kept) >= _CHUNKS_KEPT:
                self._kept.pop(next(iter(self._kept)))
            found = self._repository.get_chunk(bytes.fromhex(chunk))
            self.bytes_fetched += len(found)
            self.chunks_fetched += 1
        self._kept[chunk] = found
        return found


class Piece(NamedTuple):
    """The run of content that begins at some offset: inside which chunk ("" for a hole), how many of
    the chunk's bytes lie before it, and how many bytes are left in it."""

    chunk: str
    skip: int
    rest: int


class Content:
    """The content of a file, to read and to compare without reading."""

    def __init__(self, entry: Entry, get: Callable[[str], bytes | memoryview], head: bytes = b"") -> None:
        """`get` gives the plain bytes of a chunk; `head`: the first bytes, where they are at hand."""
        self.entry = entry
        self._get = get
        self._head = head
        self._chunks = list(chunk_offsets(entry))
        self._starts = [start for start, _ in self._chunks]

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes, fewer only at the end of the file. Raises what `get` raises, and `Corrupt`."""
        end = min(offset + length, self.entry.size)
        if end <= len(self._head):
            return self._head[offset:end]
        found = bytearray(max(0, end - offset))
        for start, chunk, chunk_bytes in self._touched(offset, end):
            plain = self._get(chunk)
            if len(plain) != chunk_bytes:
                raise Corrupt(f"chunk {chunk[:16]} has {len(plain)} bytes, not {chunk_bytes}.")
            low, high = max(start, offset), min(start + chunk_bytes, end)
            found[low - offset : high - offset] = plain[low - start : high - start]
        return bytes(found)

    def chunks(self, offset: int, length: int) -> list[tuple[int, str]]:
        """(start relative to `offset`, chunk id) of what the range touches."""
        return [(start - offset, chunk) for start, chunk, _ in self._touched(offset, offset + length)]

    def piece(self, offset: int) -> Piece:
        """Raises `Corrupt` at or behind the end of the file."""
        if offset >= self.entry.size:
            raise Corrupt(f"the tensors of {self.entry.path} reach past its end.")
        at = bisect_right(self._starts, offset) - 1
        if at >= 0:
            start, (chunk, length) = self._chunks[at]
            if offset < start + length:
                return Piece(chunk, offset - start, start + length - offset)
        end = self._starts[at + 1] if at + 1 < len(self._starts) else self.entry.size
        return Piece("", 0, end - offset)

    def _touched(self, offset: int, end: int) -> Iterator[tuple[int, str, int]]:
        at = max(0, bisect_right(self._starts, offset) - 1)
        while at < len(self._chunks) and self._starts[at] < end:
            start, (chunk, chunk_bytes) = self._chunks[at]
            if start + chunk_bytes > offset:
                yield start, chunk, chunk_bytes
            at += 1
