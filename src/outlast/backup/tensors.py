"""Chosen tensors out of the model files of a snapshot, into one safetensors file."""

from __future__ import annotations

import fnmatch
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress

import blake3
import msgspec

from outlast.backup.folder import sync_folder
from outlast.backup.nearest import Holder, Nearest, Source
from outlast.backup.restore import RestoreReport, Skipped, exclusive, make_parents, translated
from outlast.backup.restore_plan import (
    beside,
    first_few,
    kept_already,
    kept_name,
    real_target,
    selected,
    shown,
    stamp_text,
)
from outlast.backup.staging import Meter
from outlast.errors import Corrupt, InvalidInput, NotFound
from outlast.records import Entry, Snapshot
from outlast.repo import formats
from outlast.repo.content import Content, RecentChunks
from outlast.repo.formats import Tensor
from outlast.repo.layout import DTYPE_BITS

_FILE_BYTES_MIN = 8


class _Chosen(msgspec.Struct):
    name: str
    content: Content
    tensor: Tensor

    @property
    def place(self) -> str:
        return f"{self.content.entry.path}:{self.tensor.name}"


def restore_tensors(
    repository: Holder,
    snapshot: Snapshot,
    names: Sequence[str],
    target: bytes | str,
    *,
    include: Sequence[str] = (),
    overwrite: bool = False,
) -> RestoreReport:
    """Write the tensors that fit `names` (globs) to `target`, a `.safetensors` file or an existing folder for one.

    They come from any file of a known format, or only from those that fit `include`. One that is
    in several files with the same content is written once; with different contents each gets the
    path of its file before its name. An existing file is kept beside as `NAME.before-<time>`.

    Raises `NotFound` (a glob that fits nothing), `InvalidInput` (a target of another name, or nothing but what
    safetensors can't hold; some of that among others is in `skipped`),
    `Corrupt`, `Busy`, `StoreFull`, `Refused`, `Unavailable`; an existing file is then as it was.
    """
    started = repository.clock.monotonic_seconds()
    path = _file_for(target)
    chunks = RecentChunks(repository)
    found = selected(repository, snapshot, include)
    files = (entry for _, entry in found if entry.type == "file" and entry.size >= _FILE_BYTES_MIN)
    every, skipped = _storable(_find(snapshot, (_content(entry, chunks) for entry in files), names))
    chosen = _named_apart(every)
    # As the reference implementation orders them: wide elements first, which keeps all of them aligned.
    chosen.sort(key=lambda each: (-DTYPE_BITS.get(each.tensor.dtype, 0), each.name))
    header = formats.safetensors_header(
        [(each.name, each.tensor.dtype, each.tensor.shape, each.tensor.length) for each in chosen],
        {"format": "pt", "outlast_snapshot": snapshot.id},
    )
    total = len(header) + sum(each.tensor.length for each in chosen)
    meter = Meter(repository.sink, repository.clock, total, 1)
    kept = b""
    with translated(path, total) as stage:
        make_parents(os.path.dirname(path))
        with exclusive(path):
            temporary = beside(path, f".outlast-{snapshot.id[:12]}")
            try:
                _write(temporary, header, chosen, meter, _mode(every))
                if os.path.lexists(path) and not overwrite:
                    kept = kept_already(path)
                    if not kept:
                        kept = kept_name(path, stamp_text(repository.clock.now_ns()))
                        _keep(path, kept)
                    sync_folder(os.path.dirname(path))  # before the name is given to what is new
                    stage.safe = f"What was there is kept as {shown(kept)}."
                os.rename(temporary, path)
                stage.safe = f"{shown(path)} is restored as a whole."
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
        skipped=skipped,
        path=shown(path),
        tensors=[each.name for each in chosen],
        sources=repository.read
        if isinstance(repository, Nearest)
        else [Source(repository.store.url, chunks.bytes_fetched, chunks.chunks_fetched)],
        renamed={each.name: each.tensor.name for each in chosen if each.name != each.tensor.name},
    )


def _file_for(target: bytes | str) -> bytes:
    """The file that a target means. Raises `InvalidInput`."""
    path = real_target(target)
    if os.path.isdir(path):
        path += b"/tensors.safetensors"
    elif not path.endswith(b".safetensors"):
        raise InvalidInput(
            f"{shown(path)} is no name for a file of tensors, and no folder is there; nothing was changed.",
            hint="End the target in .safetensors, or name an existing folder.",
        )
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise InvalidInput(f"{shown(path)} is not a file, so it can't be replaced by one; nothing was changed.")
    return path


def _storable(every: list[_Chosen]) -> tuple[list[_Chosen], list[Skipped]]:
    """What safetensors can hold, and the rest. Raises `InvalidInput` where that is all."""
    storable, refused = [], []
    for each in every:
        tensor = each.tensor
        try:
            formats.safetensors_header([(tensor.name, tensor.dtype, tensor.shape, tensor.length)])
            storable.append(each)
        except InvalidInput as exc:
            refused.append((each, exc))
    if not storable:
        raise refused[0][1]
    # The message ends in what is true only where nothing at all was written.
    return storable, [
        Skipped(each.place, exc.message.removesuffix("; nothing was written.") + ".") for each, exc in refused
    ]


def _content(entry: Entry, chunks: RecentChunks) -> Content:
    def get(chunk: str) -> bytes | memoryview:
        try:
            return chunks.get(chunk)
        except Corrupt as exc:
            hint = f"Leave {entry.path} out with `--include`. {exc.hint}".strip()
            raise Corrupt(f"{entry.path} can't be read: {exc.message}", hint=hint) from exc

    return Content(entry, get)


def _find(snapshot: Snapshot, contents: Iterator[Content], names: Sequence[str]) -> list[_Chosen]:
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


def _mode(chosen: Sequence[_Chosen]) -> int:
    """Who may read what comes out of several files: only those who may read each of them."""
    mode = 0o666
    for each in chosen:
        mode &= each.content.entry.mode
    return 0o600 | mode


def _write(path: bytes, header: bytes, chosen: Sequence[_Chosen], meter: Meter, mode: int) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
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
