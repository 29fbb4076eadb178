"""Chosen tensors out of the model files of a snapshot, into one safetensors file."""

from __future__ import annotations

import fnmatch
import os
import stat
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress

import blake3
import msgspec

from outlast.backup.folder import sync_folder
from outlast.backup.restore import RestoreReport, exclusive, make_parents, translated
from outlast.backup.restore_plan import beside, first_few, kept_name, selected, shown, stamp_text
from outlast.backup.staging import Meter
from outlast.errors import Corrupt, InvalidInput, NotFound
from outlast.records import Entry, Snapshot
from outlast.repo import formats
from outlast.repo.formats import Tensor
from outlast.repo.layout import DTYPE_BITS
from outlast.repo.repository import Repository, chunk_offsets

_CHUNKS_CACHED = 6
_FILE_BYTES_MIN = 8


class _Chunks:
    """The few chunks read last, of whatever file; counts what was fetched."""

    def __init__(self, repository: Repository) -> None:
        self.bytes_fetched = 0
        self._repository = repository
        self._cache: dict[str, bytes | memoryview] = {}

    def get(self, chunk: str, path: str) -> bytes | memoryview:
        found = self._cache.get(chunk)
        if found is None:
            if len(self._cache) >= _CHUNKS_CACHED:
                self._cache.pop(next(iter(self._cache)))
            try:
                found = self._cache[chunk] = self._repository.get_chunk(bytes.fromhex(chunk))
            except Corrupt as exc:
                hint = f"Leave {path} out with `--include`. {exc.hint}".strip()
                raise Corrupt(f"{path} can't be read: {exc.message}", hint=hint) from exc
            self.bytes_fetched += len(found)
        return found


class _Content:
    """A file of the snapshot, read at any offset; only the chunks that are touched are fetched."""

    def __init__(self, chunks: _Chunks, entry: Entry) -> None:
        self.entry = entry
        self._chunks = chunks
        self._places = list(chunk_offsets(entry))
        self._starts = [offset for offset, _ in self._places]

    def chunks(self, offset: int, length: int) -> list[tuple[int, str]]:
        """(start relative to `offset`, chunk id) of what the range touches."""
        first = max(0, bisect_right(self._starts, offset) - 1)
        found = []
        for start, (chunk, chunk_bytes) in self._places[first:]:
            if start >= offset + length:
                break
            if start + chunk_bytes > offset:
                found.append((start - offset, chunk))
        return found

    def read(self, offset: int, length: int) -> bytes:
        length = max(0, min(length, self.entry.size - offset))
        found = bytearray(length)
        for start, chunk in self.chunks(offset, length):
            plain = self._chunks.get(chunk, self.entry.path)
            low = max(0, -start)
            part = plain[low : length - start]
            found[start + low : start + low + len(part)] = part
        return bytes(found)


class _Chosen(msgspec.Struct):
    name: str
    content: _Content
    tensor: Tensor

    @property
    def place(self) -> str:
        return f"{self.content.entry.path}:{self.tensor.name}"


def restore_tensors(
    repository: Repository,
    snapshot: Snapshot,
    names: Sequence[str],
    target: bytes | str,
    *,
    include: Sequence[str] = (),
    overwrite: bool = False,
) -> RestoreReport:
    """Write the tensors that fit `names` (globs) to `target`, a `.safetensors` file or a folder for one.

    They come from any file of a known format, or only from those that fit `include`. One that is
    in several files with the same content is written once; with different contents each gets the
    path of its file before its name. An existing file is kept beside as `NAME.before-<time>`.

    Raises `NotFound` (a glob that fits nothing), `InvalidInput` (what safetensors can't hold),
    `Corrupt`, `Busy`, `StoreFull`, `Refused`, `Unavailable`; an existing file is then as it was.
    """
    started = repository.clock.monotonic_seconds()
    path = os.path.realpath(os.fsencode(target))
    if not path.endswith(b".safetensors") or os.path.isdir(path):
        path += b"/tensors.safetensors"
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise InvalidInput(f"{shown(path)} is not a file, so it can't be replaced by one; nothing was changed.")
    chunks = _Chunks(repository)
    found = selected(repository, snapshot, include)
    files = (entry for _, entry in found if entry.type == "file" and entry.size >= _FILE_BYTES_MIN)
    chosen = _named_apart(_find(snapshot, (_Content(chunks, entry) for entry in files), names))
    # As the reference implementation orders them: wide elements first, which keeps all of them aligned.
    chosen.sort(key=lambda each: (-DTYPE_BITS.get(each.tensor.dtype, 0), each.name))
    header = formats.safetensors_header(
        [(each.name, each.tensor.dtype, each.tensor.shape, each.tensor.length) for each in chosen],
        {"format": "pt", "outlast_snapshot": snapshot.id},
    )
    total = len(header) + sum(each.tensor.length for each in chosen)
    meter = Meter(repository.sink, repository.clock, total, 1)
    kept = b""
    with translated(path, total):
        make_parents(os.path.dirname(path))
        with exclusive(path):
            temporary = beside(path, f".outlast-{snapshot.id[:12]}")
            try:
                _write(temporary, header, chosen, meter)
                if os.path.lexists(path) and not overwrite:
                    kept = kept_name(path, stamp_text(repository.clock.now_ns()))
                    _keep(path, kept)
                os.rename(temporary, path)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(temporary)
            sync_folder(os.path.dirname(path))
    return RestoreReport(
        snapshot=snapshot.id,
        files=1,
        bytes=total,
        bytes_fetched=chunks.bytes_fetched,
        verified=True,
        seconds=repository.clock.monotonic_seconds() - started,
        kept_as=shown(kept),
    )


def _find(snapshot: Snapshot, contents: Iterator[_Content], names: Sequence[str]) -> list[_Chosen]:
    """Every tensor that fits one of `names`. Raises `NotFound` where one of those fits nothing."""
    chosen = []
    unused = set(names)
    for content in contents:
        for tensor in formats.tensors(content.read, content.entry.size) or []:
            fitting = {name for name in names if tensor.name == name or fnmatch.fnmatchcase(tensor.name, name)}
            if fitting:
                unused -= fitting
                chosen.append(_Chosen(tensor.name, content, tensor))
    if unused or not chosen:
        raise NotFound(
            f"no tensor of snapshot {snapshot.id[:12]} fits {first_few(sorted(unused))}; nothing was written.",
            hint="`outlast show` lists the tensors of every file.",
        )
    return chosen


def _named_apart(chosen: list[_Chosen]) -> list[_Chosen]:
    """One for each content; those that share a name and differ get their file's path before it."""
    by_name: dict[str, list[_Chosen]] = {}
    for each in chosen:
        same_name = by_name.setdefault(each.name, [])
        if not any(_same(each, other) for other in same_name):
            same_name.append(each)
    result: dict[str, _Chosen] = {}
    for name, several in by_name.items():
        for each in several:
            if len(several) > 1:
                each.name = f"{each.content.entry.path}/{name}"
            if each.name in result:
                raise InvalidInput(
                    f"{result[each.name].place} and {each.place} differ and would both be called {each.name!r}; "
                    "nothing was written.",
                    hint="Choose the file with `--include`, and restore them one at a time.",
                )
            result[each.name] = each
    return list(result.values())


def _same(one: _Chosen, other: _Chosen) -> bool:
    a, b = one.tensor, other.tensor
    if (a.dtype, a.shape, a.length) != (b.dtype, b.shape, b.length):
        return False
    if a.strides is None and b.strides is None:
        chunks = one.content.chunks(a.offset, a.length)
        if not one.content.entry.holes and chunks == other.content.chunks(b.offset, b.length):
            return not other.content.entry.holes or _digest(one) == _digest(other)
    return _digest(one) == _digest(other)


def _digest(chosen: _Chosen) -> bytes:
    hasher = blake3.blake3()
    for piece in formats.tensor_bytes(chosen.content.read, chosen.tensor):
        hasher.update(piece)
    return hasher.digest()


def _write(path: bytes, header: bytes, chosen: Sequence[_Chosen], meter: Meter) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with open(fd, "wb", buffering=0) as file:
        for piece in _pieces(header, chosen):
            view = memoryview(piece)
            while view:
                view = view[file.write(view) or 0 :]
            meter.add(len(piece), 0)
        os.fsync(fd)
    meter.report()


def _pieces(header: bytes, chosen: Sequence[_Chosen]) -> Iterator[bytes]:
    yield header
    for each in chosen:
        yield from formats.tensor_bytes(each.content.read, each.tensor)


def _keep(path: bytes, kept: bytes) -> None:
    try:
        os.link(path, kept, follow_symlinks=False)
    except OSError:  # no hard links here
        os.rename(path, kept)
