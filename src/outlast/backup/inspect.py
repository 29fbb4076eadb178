"""What a snapshot holds, and what differs between two: files, and the tensors inside them.

Values out, nothing printed. Only manifests and the few chunks around each file's header are read;
contents are compared by the ids of their chunks, and read only where chunks don't line up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import blake3
import msgspec

from outlast.errors import Archived, Corrupt
from outlast.records import Entry, Snapshot, path_order
from outlast.repo import formats
from outlast.repo.content import Content, RecentChunks
from outlast.repo.formats import Tensor
from outlast.repo.manifest import entry_problem
from outlast.repo.repository import Repository

_HEAD_BYTES = 16 << 10
_MODEL_BYTES_MIN = 16
_BATCH_BYTES = 64 << 20
_BATCH_FILES = 1024


class FileView(msgspec.Struct, frozen=True):
    """An entry of a snapshot, with the tensors inside it where it is a model file."""

    entry: Entry
    format: str | None = None
    """safetensors, torch, gguf or npy"""
    tensors: list[Tensor] | None = None
    """None: of no known format, or its tensors can't be read"""
    problem: str = ""
    """why the content can't be looked into: it is damaged"""
    archived: bool = False
    """the content can't be looked into before it is thawed"""


class FileSide(msgspec.Struct, frozen=True):
    """A file that only one of two snapshots has."""

    path: str
    type: str
    bytes: int


class FileChange(msgspec.Struct, frozen=True):
    """An entry that differs. `what` says in which: content, type, target, mode, owner."""

    path: str
    type: str
    what: list[str]
    bytes_before: int
    bytes_after: int
    bytes_changed: int
    """bytes of the later content, in whole chunks, that the earlier one doesn't hold"""


class TensorSide(msgspec.Struct, frozen=True):
    """A tensor that only one of two versions of a file has."""

    path: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


class TensorChange(msgspec.Struct, frozen=True, omit_defaults=True):
    """A tensor whose bytes, dtype or shape differ; the fields say how it is afterwards."""

    path: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    bytes_changed: int
    """in whole chunks, never more than `bytes`"""
    dtype_before: str = ""
    shape_before: tuple[int, ...] | None = None


class FileChanges(msgspec.Struct):
    added: list[FileSide] = []
    removed: list[FileSide] = []
    changed: list[FileChange] = []


class TensorChanges(msgspec.Struct):
    added: list[TensorSide] = []
    removed: list[TensorSide] = []
    changed: list[TensorChange] = []


class DiffReport(msgspec.Struct):
    """What differs. Tensors are told for files that both snapshots have; in an added file all are new."""

    before: str
    after: str
    files: FileChanges
    tensors: TensorChanges
    bytes_added: int = 0
    """size of added files"""
    bytes_removed: int = 0
    """size of removed files"""
    bytes_changed: int = 0
    """sum over changed files"""
    problems: list[str] = []
    """damaged contents that could not be looked into"""


def show(
    repository: Repository, snapshot: Snapshot, wanted: Callable[[Entry], bool] = lambda entry: True
) -> Iterator[FileView]:
    """Every wanted entry in the order of the manifest. A damaged file doesn't end it: see `problem`."""
    batch: list[Entry] = []
    batch_bytes = 0
    for entry in repository.entries(snapshot):
        if not wanted(entry):
            continue
        batch.append(entry)
        batch_bytes += entry.chunks[0][1] if entry.chunks else 0
        if batch_bytes >= _BATCH_BYTES or len(batch) >= _BATCH_FILES:
            yield from _views(repository, batch)
            batch, batch_bytes = [], 0
    yield from _views(repository, batch)


def _views(repository: Repository, entries: list[Entry]) -> Iterator[FileView]:
    heads = _heads(repository, entries)
    for entry in entries:
        if not _may_hold_tensors(entry):
            yield FileView(entry)
            continue
        head = heads.get(bytes.fromhex(entry.chunks[0][0]), b"")
        yield _view(Content(entry, RecentChunks(repository).get, head))


def _heads(repository: Repository, entries: list[Entry]) -> dict[bytes, bytes]:
    """The first bytes of each file that may be a model, fetched together: most files end here."""
    heads: dict[bytes, bytes] = {}

    def keep(chunk: bytes, plain: bytes | memoryview) -> None:
        heads[chunk] = bytes(plain[:_HEAD_BYTES])

    first = (bytes.fromhex(entry.chunks[0][0]) for entry in entries if _may_hold_tensors(entry))
    # What is missing here is asked for again, and reported, when the file itself is looked into.
    repository.fetch(first, keep, lambda chunk, error: None)
    return heads


def _may_hold_tensors(entry: Entry) -> bool:
    starts_with_hole = bool(entry.holes) and entry.holes[0][0] == 0
    if entry.type != "file" or entry.size < _MODEL_BYTES_MIN or not entry.chunks or starts_with_hole:
        return False
    return not entry_problem(entry)


def _view(content: Content) -> FileView:
    try:
        form = formats.detect(content.read, content.entry.size)
        found = formats.tensors(content.read, content.entry.size) if form else None
    except Corrupt as exc:
        return FileView(content.entry, problem=exc.message)
    except Archived:
        return FileView(content.entry, archived=True)
    return FileView(content.entry, form if found is not None else None, found)


def diff(repository: Repository, before: Snapshot, after: Snapshot) -> DiffReport:
    """Compare two snapshots: both manifests are read once, side by side, whatever their size."""
    report = DiffReport(before.id, after.id, FileChanges(), TensorChanges())
    for old, new in _merged(repository.entries(before), repository.entries(after)):
        if old is None and new is not None:
            report.files.added.append(FileSide(new.path, new.type, new.size))
            report.bytes_added += new.size
        elif new is None and old is not None:
            report.files.removed.append(FileSide(old.path, old.type, old.size))
            report.bytes_removed += old.size
        elif old is not None and new is not None and (what := _differs(old, new)):
            changed = _bytes_new(old, new)
            report.files.changed.append(FileChange(new.path, new.type, what, old.size, new.size, changed))
            report.bytes_changed += changed
            if "content" in what:
                _compare_tensors(repository, old, new, report)
    return report


def _merged(olds: Iterator[Entry], news: Iterator[Entry]) -> Iterator[tuple[Entry | None, Entry | None]]:
    """Pair the entries of two manifests by path; both come in `path_order`."""
    old, new = next(olds, None), next(news, None)
    while old is not None or new is not None:
        old_key = path_order(old.raw_path) if old is not None else None
        new_key = path_order(new.raw_path) if new is not None else None
        if new_key is None or (old_key is not None and old_key < new_key):
            yield old, None
            old = next(olds, None)
        elif old_key is None or new_key < old_key:
            yield None, new
            new = next(news, None)
        else:
            yield old, new
            old, new = next(olds, None), next(news, None)


def _differs(old: Entry, new: Entry) -> list[str]:
    """In which respects; times are left out, for every backup of a live folder changes some."""
    facts = {
        "type": old.type != new.type,
        "content": (old.chunks, old.holes, old.size) != (new.chunks, new.holes, new.size),
        "target": old.target != new.target,
        "mode": old.mode != new.mode,
        "owner": (old.uid, old.gid) != (new.uid, new.gid),
    }
    return [name for name, differs in facts.items() if differs]


def _bytes_new(old: Entry, new: Entry) -> int:
    had = {chunk for chunk, _ in old.chunks}
    return sum(length for chunk, length in new.chunks if chunk not in had)


def _compare_tensors(repository: Repository, old: Entry, new: Entry, report: DiffReport) -> None:
    if not (_may_hold_tensors(old) and _may_hold_tensors(new)):
        return
    old_content, new_content = (Content(entry, RecentChunks(repository).get) for entry in (old, new))
    try:
        olds, news = _view(old_content), _view(new_content)
        for view in (olds, news):
            if view.problem:
                report.problems.append(f"{view.entry.path}: {view.problem}")
        if olds.tensors is not None and news.tensors is not None:
            _compare_named(old_content, olds.tensors, new_content, news.tensors, report.tensors)
    except Archived:
        return  # compared by their chunks alone
    except Corrupt as exc:
        report.problems.append(f"{new.path}: {exc.message}")


def _compare_named(
    old_content: Content, olds: Iterable[Tensor], new_content: Content, news: Iterable[Tensor], report: TensorChanges
) -> None:
    path = new_content.entry.path
    before = {tensor.name: tensor for tensor in olds}
    for tensor in news:
        old = before.pop(tensor.name, None)
        if old is None:
            report.added.append(TensorSide(path, tensor.name, tensor.dtype, tensor.shape, tensor.length))
            continue
        retyped = (old.dtype, old.shape) != (tensor.dtype, tensor.shape)
        changed = tensor.length if retyped else _tensor_bytes_changed(old_content, old, new_content, tensor)
        if not retyped and not changed:
            continue
        report.changed.append(
            TensorChange(
                path,
                tensor.name,
                tensor.dtype,
                tensor.shape,
                tensor.length,
                changed,
                dtype_before=old.dtype if retyped else "",
                shape_before=old.shape if retyped else None,
            )
        )
    report.removed += [TensorSide(path, old.name, old.dtype, old.shape, old.length) for old in before.values()]


def _tensor_bytes_changed(old_content: Content, old: Tensor, new_content: Content, new: Tensor) -> int:
    if old.strides is None and new.strides is None and old.length == new.length:
        return _bytes_changed(old_content, old.offset, new_content, new.offset, new.length)
    same = _content_hash(old_content, old) == _content_hash(new_content, new)
    return 0 if same else new.length


def _bytes_changed(old: Content, old_start: int, new: Content, new_start: int, length: int) -> int:
    """How many of `length` bytes lie in parts that differ: by chunk ids where the chunks line up,
    by the bytes themselves where they don't."""
    changed = at = 0
    while at < length:
        ours, theirs = old.piece(old_start + at), new.piece(new_start + at)
        step = min(ours.rest, theirs.rest, length - at)
        if (ours.chunk, ours.skip) == (theirs.chunk, theirs.skip) or (not ours.chunk and not theirs.chunk):
            same = True
        elif ours.chunk and theirs.chunk and not ours.skip and not theirs.skip and ours.rest == theirs.rest == step:
            same = False  # whole chunks with different ids
        else:
            same = old.read(old_start + at, step) == new.read(new_start + at, step)
        changed += 0 if same else step
        at += step
    return changed


def _content_hash(content: Content, tensor: Tensor) -> bytes:
    hasher = blake3.blake3()
    for piece in formats.tensor_bytes(content.read, tensor):
        hasher.update(piece)
    return hasher.digest()
