"""Tensors of a checkpoint as memory-mapped files: nothing is read before it is touched, and nothing is verified.

Large chunks that are stored raw and in the clear lie on page boundaries of local packs, and the blocks of a tensor
mostly one after the other. So a tensor is a range of addresses over which each run of its blocks is mapped from the
pack that holds it. The mappings are private: who writes to such a tensor writes to pages of his own, and packs never
change. What can't be mapped (small tensors, chunks that are compressed or encrypted, packs on another host) is read,
verified and copied into the same ranges.

What is mapped is whatever the disk gives, at the moment when it is touched: a damaged pack gives damaged weights, and
where the disk fails the process gets a SIGBUS. That is the price of not reading. `Run.load` verifies every byte.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import NamedTuple

import torch

import outlast
from outlast.checkpoint.leaves import rebuild
from outlast.checkpoint.load import Shelf, Stored
from outlast.checkpoint.state_file import folder_of, ranks_of
from outlast.checkpoint.tree_text import is_tensor, tensor_nodes
from outlast.errors import Corrupt, NotFound, Refused
from outlast.records import Entry, Snapshot
from outlast.repo import codec
from outlast.repo.content import Content, RecentChunks
from outlast.repo.index import Location
from outlast.repo.pack import object_name
from outlast.repo.repository import Repository

_MAP_FIXED = 0x10
_FAILED = ctypes.c_void_p(-1).value
_mmap = ctypes.CDLL(None, use_errno=True).mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]


class _Piece(NamedTuple):
    """What a chunk holds of a tensor: the bytes from `skip` on are those of the tensor from `at` on."""

    chunk: bytes
    skip: int
    at: int
    length: int


class _Run(NamedTuple):
    """Bytes of a pack that belong one after the other at `at` of a tensor."""

    pack: str
    offset: int
    at: int
    length: int


def open(  # noqa: A001  read as `mapped.open`
    source: str | Repository, snapshot: str | Snapshot = "latest", part: str = "model", *, verify: bool = False
) -> dict[str, torch.Tensor]:
    """Name -> tensor of one part of a checkpoint: of a module its state dictionary, tied tensors tied.

    `source`: an open repository, or the URL of one that isn't encrypted. `snapshot`: one that a `Run` saved, or the
    first characters of its id. Nothing that is mapped is verified, unless with `verify`: then every chunk is read
    and checked first. The tensors can be written to, which changes nothing but them, and stay valid as long as
    somebody holds them, even when a prune removes their packs.

    Raises `NotFound`; `Refused` for no checkpoint and for tensors sharded over ranks; `Corrupt` for damage that is
    seen.
    """
    repository = source if isinstance(source, Repository) else outlast.open(source)
    if not isinstance(snapshot, Snapshot):
        snapshot = repository.find_snapshot(snapshot)
    files = {entry.path: entry for entry in repository.entries(snapshot) if entry.type == "file"}
    chunks = RecentChunks(repository)
    shelf = Shelf(files, folder_of(0, ranks_of(files)), chunks, snapshot)
    if part not in shelf.parts:
        raise NotFound(f"checkpoint {snapshot.id[:8]} has no part {part}; it has {', '.join(shelf.parts)}.")
    saved = shelf.parts[part]
    if any("global" in node for node in tensor_nodes(saved.tree)):
        raise Refused(
            f"{part} of checkpoint {snapshot.id[:8]} is sharded over {ranks_of(files)} ranks: no file holds a whole "
            "tensor that could be mapped.",
            hint="Load it with Run.load, or write whole tensors with `outlast export` and map those.",
        )
    if saved.kind == "module":
        nodes = {name: node for name, node in saved.tree["state"].items() if is_tensor(node)}
    else:
        nodes = {node["name"]: node for node in tensor_nodes(saved.tree)}
    stored, names = shelf.tensors(part), {node["name"] for node in nodes.values()}
    if not names <= stored.keys():
        raise Corrupt(f"the files of {part} of checkpoint {snapshot.id[:8]} lack {min(names - stored.keys())}.")
    made = _tensors(repository, chunks, {name: stored[name] for name in names}, verify=verify)
    return {name: rebuild(node, made[node["name"]]) for name, node in nodes.items()}


def _tensors(
    repository: Repository, chunks: RecentChunks, wanted: dict[str, Stored], *, verify: bool
) -> dict[str, torch.Tensor]:
    contents: dict[str, Content] = {}
    pieces = {name: list(_pieces(each, contents, chunks)) for name, each in wanted.items()}
    if verify:
        repository.fetch({each.chunk for some in pieces.values() for each in some}, lambda _, __: None)
    places: dict[bytes, list[tuple[int, memoryview]]] = {}
    made = {}
    with ExitStack() as opened:
        packs = _Packs(repository, opened)
        for name, stored in wanted.items():
            placed = [(each, packs.run(each, stored.length)) for each in pieces[name]]
            memory = _memory(stored.length, list(_joined(run for _, run in placed if run)), packs)
            for piece, run in placed:
                if run is None:
                    view = memory[piece.at : piece.at + piece.length]
                    places.setdefault(piece.chunk, []).append((piece.skip, view))
            flat = torch.frombuffer(memory, dtype=torch.uint8) if stored.length else torch.empty(0, dtype=torch.uint8)
            made[name] = flat.view(stored.dtype).reshape(stored.shape)

    def deliver(chunk: bytes, plain: bytes | memoryview) -> None:
        view = memoryview(plain)
        for skip, memory in places[chunk]:
            memory[:] = view[skip : skip + len(memory)]

    repository.fetch(places, deliver)
    return made


def _pieces(stored: Stored, contents: dict[str, Content], chunks: RecentChunks) -> Iterator[_Piece]:
    entry: Entry = stored.entry
    content = contents.get(entry.path) or contents.setdefault(entry.path, Content(entry, chunks.get))
    at = 0
    while at < stored.length:
        found = content.piece(stored.offset + at)
        length = min(found.rest, stored.length - at)
        if found.chunk:
            yield _Piece(bytes.fromhex(found.chunk), found.skip, at, length)
        at += length


class _Packs:
    """The local files of packs, open until everything is mapped."""

    def __init__(self, repository: Repository, opened: ExitStack) -> None:
        self._repository, self._opened = repository, opened
        self._files: dict[str, tuple[int, int]] = {}
        self._is_local = repository.store.capabilities.memory_map

    def run(self, piece: _Piece, tensor_bytes: int) -> _Run | None:
        """Where the piece can be mapped from; None where it has to be read."""
        location = self._repository.locate(piece.chunk)
        offset = location.offset + piece.skip
        ends_a_page = piece.at + piece.length == tensor_bytes or piece.length % mmap.PAGESIZE == 0
        if (
            not self._is_local
            or location.codec != codec.RAW
            or location.pack.encrypted
            or offset % mmap.PAGESIZE
            or piece.at % mmap.PAGESIZE
            or not ends_a_page
            or not self._holds(location)
        ):
            return None
        return _Run(location.pack.name, offset, piece.at, piece.length)

    def descriptor(self, pack: str) -> int:
        return self._files[pack][0]

    def _holds(self, location: Location) -> bool:
        """Whether the file reaches as far: what is mapped beyond its end kills who touches it."""
        name = location.pack.name
        if name not in self._files:
            path: str = self._repository.store.local_path(object_name(name))  # type: ignore[attr-defined]
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError:  # who reads it will tell what is wrong, or find another copy
                self._files[name] = -1, 0
            else:
                self._opened.callback(os.close, fd)
                self._files[name] = fd, os.fstat(fd).st_size
        return location.offset + location.stored_bytes <= self._files[name][1]


def _joined(runs: Iterable[_Run]) -> Iterator[_Run]:
    """Neighbours in one."""
    last: _Run | None = None
    for run in runs:
        if last and (run.pack, run.offset - last.offset, run.at - last.at) == (last.pack, last.length, last.length):
            last = last._replace(length=last.length + run.length)
            continue
        if last:
            yield last
        last = run
    if last:
        yield last


def _memory(count_bytes: int, runs: list[_Run], packs: _Packs) -> memoryview:
    """So many bytes: those of the runs are pages of packs, the others zero."""
    if not runs:
        return memoryview(bytearray(count_bytes))
    reserved = mmap.mmap(-1, count_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(reserved))
    access = mmap.PROT_READ | mmap.PROT_WRITE
    for run in runs:
        assert run.at + run.length <= count_bytes, "nothing outside of the range is touched"
        # In place of the pages that are there; whoever unmaps the range unmaps these too: mmap(2), munmap(2).
        fd = packs.descriptor(run.pack)
        if _mmap(start + run.at, run.length, access, mmap.MAP_PRIVATE | _MAP_FIXED, fd, run.offset) == _FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return memoryview(reserved)
