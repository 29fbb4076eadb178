"""Where a repair looks for lost chunks: another repository, or a folder that still has the files.

Nothing that is found there is believed: a chunk counts only when its bytes have the id.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice

from outlast.backup.folder import Folder
from outlast.backup.restore_plan import shown
from outlast.errors import Corrupt, InvalidInput, NoRepository, NotFound
from outlast.events import NULL_SINK
from outlast.records import Entry, Snapshot
from outlast.repo import codec, seal
from outlast.repo.content import Content, RecentChunks
from outlast.repo.keyring import Secret
from outlast.repo.manifest import is_safe
from outlast.repo.pack import CHUNK_BYTES_MAX, EncodedChunk, object_name
from outlast.repo.repair import Origin, Places
from outlast.repo.repository import Repository
from outlast.store.layers import ReadOnlyStore, open_store, own_folder

_BATCH = 32

Wanted = dict[str, list[tuple[int, bytes]]]
"""path -> (offset, chunk)"""


def open_origin(where: str, *, secret: Secret | None, own: Repository) -> Origin:
    """The repository at a URL, or else the folder of that name. Raises as `Repository.open` does, or `InvalidInput`."""
    store = ReadOnlyStore(open_store(where))
    folder = own_folder(store)
    if store.url == own.store.url or (folder is not None and folder == own_folder(own.store)):
        raise InvalidInput(
            f"{where} is the repository that is to be repaired; nothing was done.",
            hint="Name another repository that has its snapshots, or a folder that still has the files.",
        )
    try:
        try:
            return RepositoryOrigin(Repository.open(store, secret=secret, clock=own.clock, sink=NULL_SINK))
        except Corrupt:
            # What of it can still be read is proven chunk by chunk.
            return RepositoryOrigin(Repository.open_damaged(store, secret=secret, clock=own.clock, sink=NULL_SINK))
    except NoRepository as exc:
        if os.path.isdir(where):
            return FolderOrigin(os.fsencode(where))
        raise InvalidInput(
            f"{where} is neither a repository nor a folder; nothing was done.",
            hint="Name another repository that has the snapshots, or a folder that still has the files.",
        ) from exc


class RepositoryOrigin:
    """Chunks by their ids where both repositories name chunks alike, otherwise by path and offset."""

    def __init__(self, other: Repository) -> None:
        self._other = other
        self.where = other.store.url

    def chunks(self, view: Repository, wanted: dict[bytes, int], places: Places) -> Iterator[EncodedChunk]:
        left = dict(wanted)
        if _names_alike(view, self._other):
            for chunk in self._by_id(list(wanted)):
                del left[chunk.id]
                yield chunk
        yield from self._by_place(view, left, places)

    def _by_id(self, chunks: list[bytes]) -> Iterator[EncodedChunk]:
        self._other.load_index()
        waiting = iter(chunks)
        with ThreadPoolExecutor(max(1, min(8, self._other.store.capabilities.concurrency))) as threads:
            while batch := list(islice(waiting, _BATCH)):
                yield from filter(None, threads.map(self._read, batch))

    def _read(self, chunk: bytes) -> EncodedChunk | None:
        """As the other has it encoded."""
        for copy in self._other.index.copies(chunk):
            try:
                ranges = [(copy.offset, copy.stored_bytes)]
                [stored] = self._other.store.get_ranges(object_name(copy.pack.name), ranges)
                encoded, _ = self._other.unseal_chunk(chunk, copy, stored)
            except (Corrupt, NotFound):
                continue
            return EncodedChunk(chunk, copy.codec, copy.plain_bytes, bytes(encoded))
        return None

    def _by_place(self, view: Repository, left: dict[bytes, int], places: Places) -> Iterator[EncodedChunk]:
        by_path = _by_path(left, places)
        known = {(snapshot.name, snapshot.time) for snapshot in view.snapshots()}
        newest_first = self._other.snapshots()[::-1]
        newest_first.sort(key=lambda each: (each.name, each.time) not in known)  # a copy of ours is the best bet
        encoder = codec.Encoder(view.format.compression)
        seen: set[tuple[str, bytes]] = set()
        for snapshot in newest_first:
            if not left:
                return
            for entry in self._entries(snapshot):
                version = entry.path, seal.digest(repr(entry.chunks).encode())
                if entry.type == "file" and entry.path in by_path and version not in seen:
                    seen.add(version)
                    read = Content(entry, RecentChunks(self._other).get).read
                    yield from _found_at(view, encoder, _tolerant(read), by_path[entry.path], left)

    def _entries(self, snapshot: Snapshot) -> Iterator[Entry]:
        try:
            yield from self._other.entries(snapshot)
        except Corrupt:
            return


class FolderOrigin:
    """A folder that was backed up, or one that a snapshot was restored to. No link inside is followed."""

    def __init__(self, path: bytes) -> None:
        self._path = os.path.realpath(path)
        self.where = shown(self._path)

    def chunks(self, view: Repository, wanted: dict[bytes, int], places: Places) -> Iterator[EncodedChunk]:
        left = dict(wanted)
        encoder = codec.Encoder(view.format.compression)
        with Folder(self._path) as folder:
            for path, ranges in _by_path(left, places).items():
                raw = Entry(path, "file").raw_path
                # In a snapshot of several sources the first part of a path is the name of its source.
                for candidate in dict.fromkeys([raw, raw.partition(b"/")[2]]):
                    if candidate and is_safe(candidate):
                        yield from self._from_file(view, encoder, folder, candidate, ranges, left)

    def _from_file(
        self,
        view: Repository,
        encoder: codec.Encoder,
        folder: Folder,
        path: bytes,
        ranges: list[tuple[int, bytes]],
        left: dict[bytes, int],
    ) -> Iterator[EncodedChunk]:
        with ExitStack() as stack:
            try:
                fd = folder.open_file(path, os.O_RDONLY)
            except OSError:
                return
            stack.callback(os.close, fd)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return

            def read(offset: int, length: int) -> bytes:
                try:
                    return os.pread(fd, length, offset)
                except OSError:
                    return b""

            yield from _found_at(view, encoder, read, ranges, left)


def _names_alike(one: Repository, other: Repository) -> bool:
    """Whether equal content has equal chunk ids in both."""
    if one.keys is None or other.keys is None:
        return one.keys is other.keys
    return one.keys.id_key == other.keys.id_key


def _by_path(wanted: Iterable[bytes], places: Places) -> Wanted:
    found: Wanted = {}
    for chunk in wanted:
        for path, offset in places.get(chunk, ()):
            found.setdefault(path, []).append((offset, chunk))
    return found


def _tolerant(read: Callable[[int, int], bytes]) -> Callable[[int, int], bytes]:
    def reading(offset: int, length: int) -> bytes:
        try:
            return read(offset, length)
        except (Corrupt, NotFound):
            return b""

    return reading


def _found_at(
    view: Repository,
    encoder: codec.Encoder,
    read: Callable[[int, int], bytes],
    ranges: list[tuple[int, bytes]],
    left: dict[bytes, int],
) -> Iterator[EncodedChunk]:
    """Those of the chunks that lie where they should; each is taken out of `left`."""
    for offset, chunk in ranges:
        length = left.get(chunk)
        if length is None or length > CHUNK_BYTES_MAX:
            continue
        plain = read(offset, length)
        if len(plain) != length or seal.chunk_id(plain, view.keys) != chunk:
            continue
        del left[chunk]
        number, encoded = encoder.encode(plain, 0)
        yield EncodedChunk(chunk, number, length, encoded)
