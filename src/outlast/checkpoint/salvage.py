"""Every intact tensor out of damaged checkpoint files, into safetensors. No pickle is executed; inputs stay as is.

A torch archive has a CRC-32 for each of its members: what it doesn't confirm is lost, and named. Safetensors files,
and what torch wrote before version 1.6, have no checksums: what comes out of them is present, and can't be verified.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from math import prod

import msgspec

from outlast.checkpoint import oldtorch, zipscan
from outlast.checkpoint.new_file import fresh, refuse_taken
from outlast.errors import InvalidInput, NotFound, Refused
from outlast.repo import dcp_folder, formats, torchfile, torchpickle
from outlast.repo.layout import DTYPE_BITS, Malformed, ReadAt, Tensor

_BLOCK_BYTES = 8 << 20
_HEADER_BYTES_MAX = 24 << 20
_ENDLESS = 1 << 62
_FILES_MAX = 1 << 16
# Tied tensors come out under each of their names, so what is written may be larger than what was read.
_GROWTH_MAX = 64
_BYTES_MIN = 1 << 30


class Lost(msgspec.Struct):
    name: str
    reason: str


class FileReport(msgspec.Struct):
    """What became of one input."""

    path: str
    format: str = ""
    """"torch", "torch (before 1.6)", "safetensors", "distributed checkpoint", or nothing where it is none of them"""
    found: int = 0
    """tensors that came out, and lost ones whose names are known"""
    intact: int = 0
    """confirmed by a checksum"""
    unverified: int = 0
    """present, in a format that has no checksums"""
    lost: list[Lost] = []
    notes: list[str] = []
    bytes: int = 0
    """of the tensors that came out"""
    written: str = ""
    """the safetensors file that holds them"""


class _Piece(msgspec.Struct):
    read: ReadAt
    tensor: Tensor


class _Saved(msgspec.Struct):
    """A tensor to write: its pieces end to end."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: list[_Piece]
    checked: bool

    @property
    def length(self) -> int:
        return sum(each.tensor.length for each in self.pieces)


class _Finding(msgspec.Struct):
    format: str = ""
    size: int = 0
    """of the files that were read"""
    saved: list[_Saved] = []
    lost: list[Lost] = []
    notes: list[str] = []


def salvage(paths: Sequence[str], out: str) -> list[FileReport]:
    """Write what is intact of each input: a file, or a folder of torch.distributed.checkpoint.

    `out`: a new `.safetensors` file for one input; for several, or where it is a folder, a file in it for each.
    Raises `NotFound`, `InvalidInput`, and `Refused` where something would be overwritten; then nothing was written.
    """
    for path in paths:
        if not os.path.exists(path):
            raise NotFound(f"there is no {path}; nothing was written.")
    targets = _targets(paths, out)
    for target in targets:
        refuse_taken(target)
    return [_salvage(path, target) for path, target in zip(paths, targets, strict=True)]


def _targets(paths: Sequence[str], out: str) -> list[str]:
    if len(paths) == 1 and not os.path.isdir(out):
        if not out.endswith(".safetensors"):
            raise InvalidInput(
                f"{out} is no name for a file of tensors; nothing was written.",
                hint="End it in .safetensors, or name an existing folder.",
            )
        return [out]
    if os.path.lexists(out) and not os.path.isdir(out):
        raise Refused(f"{out} exists and is no folder; it is as it was, and nothing was written.")
    taken: set[str] = set()
    targets = []
    for path in paths:
        stem = name = os.path.splitext(os.path.basename(os.path.abspath(path)))[0] or "tensors"
        while name in taken:
            name = f"{stem}.{len(taken) + 1}"
        taken.add(name)
        targets.append(os.path.join(out, f"{name}.safetensors"))
    return targets


def _salvage(path: str, target: str) -> FileReport:
    finding = _dcp(path) if os.path.isdir(path) else _file(path)
    saved, finding.lost = _writable(finding)
    report = FileReport(path, finding.format, lost=finding.lost, notes=finding.notes)
    if saved:
        checked = all(each.checked for each in saved)
        metadata = {"format": "pt", "outlast_salvaged": "checked by CRC-32" if checked else "present, not verified"}
        header = formats.safetensors_header(
            [(each.name, each.dtype, each.shape, each.length) for each in saved], metadata
        )
        with fresh(target) as part:
            _write(part, header, saved)
        report.written = target
    report.intact = sum(each.checked for each in saved)
    report.unverified = len(saved) - report.intact
    report.bytes = sum(each.length for each in saved)
    report.found = len(saved) + len(report.lost)
    return report


def _writable(finding: _Finding) -> tuple[list[_Saved], list[Lost]]:
    """What can be read again and stands in a safetensors file; everything else is lost."""
    saved, lost, taken = [], list(finding.lost), set()
    left = max(_BYTES_MIN, _GROWTH_MAX * finding.size)
    for each in finding.saved:
        problem = _unreadable(each) if not each.checked else ""
        try:
            formats.safetensors_header([(each.name, each.dtype, each.shape, each.length)])
        except InvalidInput:
            problem = problem or f"a safetensors file can't hold elements of type {each.dtype}, or a name like that"
        left -= each.length
        if left < 0:
            problem = problem or "the tensors before it take far more room than the file that holds them"
        if each.name in taken:
            problem = problem or "another tensor has its name"
        if problem:
            lost.append(Lost(each.name, problem))
        else:
            taken.add(each.name)
            saved.append(each)
    # As the reference implementation orders them: wide elements first, which keeps all of them aligned.
    saved.sort(key=lambda each: (-DTYPE_BITS.get(each.dtype, 0), each.name))
    return saved, lost


def _unreadable(saved: _Saved) -> str:
    try:
        for piece in saved.pieces:
            for _ in formats.tensor_bytes(piece.read, piece.tensor):
                pass
    except OSError as exc:
        return f"its bytes can't be read: {exc.strerror}"
    return ""


def _write(path: str, header: bytes, saved: Sequence[_Saved]) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with open(fd, "wb") as file:
        file.write(header)
        for each in saved:
            for piece in each.pieces:
                for block in formats.tensor_bytes(piece.read, piece.tensor):
                    file.write(block)


# -- files -----------------------------------------------------------------------------------------------


def _opened(path: str) -> tuple[ReadAt, int]:
    """A reader of a plain file, and its size. Raises `InvalidInput` for what is none."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise InvalidInput(f"{path} is not a file; nothing was written.")

    def read(offset: int, length: int) -> bytes:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            pieces = []
            while length > 0 and (piece := os.pread(fd, length, offset)):
                pieces.append(piece)
                offset, length = offset + len(piece), length - len(piece)
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        finally:
            os.close(fd)

    return read, found.st_size


def _file(path: str) -> _Finding:
    read, size = _opened(path)
    found = _content(read, size)
    found.size = size
    return found


def _content(read: ReadAt, size: int) -> _Finding:
    try:
        head = read(0, min(size, 4096))
    except OSError as exc:
        head = b""
        if exc.errno is None:
            raise
    if head.startswith(oldtorch.MAGIC):
        return _old_torch(read, size)
    if head[8:9] == b"{" and (b'"dtype"' in head or b'"data_offsets"' in head or b'"__metadata__"' in head):
        return _safetensors(read, size)
    found = _torch(read, size)
    if found.saved or found.format or head.startswith(torchfile.MAGIC):
        found.format = "torch"
        if not found.saved and not found.lost:
            found.lost.append(Lost("data.pkl", "nothing of what names and holds the tensors is left"))
        return found
    known = formats.detect(read, size) if head else None
    what = f"a file of format {known}, which holds no torch checkpoint" if known else "of no format that is known here"
    return _Finding(lost=[Lost("everything", f"it is {what}, or nothing of it is left")])


def _torch(read: ReadAt, size: int) -> _Finding:
    finding = _Finding()
    found = zipscan.archives(read, size)
    budget = torchpickle.Budget()
    for at, archive in enumerate(found):
        prefix = str(at) if len(found) > 1 else ""
        if archive.pickle or archive.storages or archive.lost:
            finding.format = "torch"
            _take_archive(finding, archive, prefix, read, size, budget)
    if finding.format and not all(archive.checked for archive in found):
        finding.notes.append("It was written without checksums: what came out is present, but can't be verified.")
    return finding


def _take_archive(
    finding: _Finding, archive: zipscan.Archive, prefix: str, read: ReadAt, size: int, budget: torchpickle.Budget
) -> None:
    def named(name: str) -> str:
        if prefix and name == torchpickle.BARE_TENSOR:
            return prefix
        return f"{prefix}.{name}" if prefix else name

    views, problem = _views(archive, budget)
    if problem:
        finding.lost.append(Lost(named("data.pkl"), problem))
        finding.notes.append("The storages of its tensors are written as bytes, each under its number in the archive.")
        for key, member in archive.storages.items():
            if member.length:
                raw = Tensor(named(f"data/{key}"), "U8", (member.length,), member.offset, member.length)
                finding.saved.append(_Saved(raw.name, "U8", raw.shape, [_Piece(read, raw)], archive.checked))
        finding.lost += [Lost(named(f"data/{key}"), reason) for key, reason in archive.lost.items()]
        return
    whole = torchfile.Archive(
        torchfile.Member(0, b"", 0, 0),
        {key: torchfile.Member(0, each.name, each.offset, each.length) for key, each in archive.storages.items()},
        None,
    )
    for name, view in views:
        missing = "its storage is missing: the file ends before it, or what names it is damaged"
        reason = archive.byteorder_problem or archive.lost.get(view.key, "")
        reason = reason or ("" if view.key in whole.storages else missing)
        try:
            if not reason:
                tensor = torchfile.tensor_of(named(name), view, whole, size)
                piece = _Piece(read, tensor)
                finding.saved.append(_Saved(tensor.name, tensor.dtype, tensor.shape, [piece], archive.checked))
        except Malformed as exc:
            reason = f"what describes it is wrong: {exc}"
        if reason:
            finding.lost.append(Lost(named(name), reason))


def _views(archive: zipscan.Archive, budget: torchpickle.Budget) -> tuple[list[tuple[str, torchpickle.View]], str]:
    if archive.pickle_problem:
        return [], archive.pickle_problem
    try:
        return torchpickle.name_tensors(torchpickle.interpret(archive.pickle, budget), budget), ""
    except Malformed as exc:
        return [], f"its data.pkl can't be understood: {exc}"


def _old_torch(read: ReadAt, size: int) -> _Finding:
    finding = _Finding("torch (before 1.6)")
    try:
        found = oldtorch.content(read, size)
    except (Malformed, OSError) as exc:
        finding.lost.append(Lost("everything", f"nothing tells where a tensor begins: {exc}"))
        return finding
    finding.lost = [Lost(name, reason) for name, reason in found.lost.items()]
    for each in found.tensors:
        finding.saved.append(_Saved(each.name, each.dtype, each.shape, [_Piece(read, each)], checked=False))
    finding.notes.append("This format has no checksums: what came out is present, but can't be verified.")
    return finding


# -- safetensors -----------------------------------------------------------------------------------------


def _safetensors(read: ReadAt, size: int) -> _Finding:
    finding = _Finding("safetensors")

    def beyond(offset: int, length: int) -> bytes:
        """The file as if it went on in zeros: then its header can be read although data is cut off."""
        return read(offset, length).ljust(length, b"\0")

    found = formats.tensors(beyond, _ENDLESS)
    if found is None:
        repaired = _with_length(read, size)
        found = formats.tensors(repaired, size) if repaired else None
        if found is None:
            reason = f"the header is damaged, and nothing else says where each tensor lies in {size:,} bytes"
            finding.lost.append(Lost("everything", reason))
            return finding
        finding.notes.append("The length of its header was damaged; it was found anew from the size of the file.")
    at = min((each.offset for each in found), default=size)
    for each in found:
        if each.offset > at:
            finding.lost.append(Lost(f"bytes {at} to {each.offset}", "the header names no tensor that lies there"))
        at = max(at, each.offset + each.length)
        if each.offset + each.length > size:
            finding.lost.append(Lost(each.name, "the file ends before its last byte"))
        else:
            finding.saved.append(_Saved(each.name, each.dtype, each.shape, [_Piece(read, each)], checked=False))
    if size > at:
        finding.lost.append(Lost(f"bytes {at} to {size}", "the header names no tensor that lies there"))
    finding.notes.append("Safetensors has no checksums: what came out is present, but can't be verified.")
    return finding


def _with_length(read: ReadAt, size: int) -> ReadAt | None:
    """A reader in which the header has the only length with which the tensors end where the file ends."""
    text = read(8, min(size, _HEADER_BYTES_MAX)).decode("utf-8", "replace")
    with suppress(ValueError, RecursionError, TypeError, KeyError, AttributeError, IndexError):
        header, _ = json.JSONDecoder().raw_decode(text)
        end = max(int(each["data_offsets"][1]) for name, each in header.items() if name != "__metadata__")
        length = (size - 8 - end).to_bytes(8, "little")

        def repaired(offset: int, count: int) -> bytes:
            found = read(offset, count)
            return length[offset : offset + count] + found[max(0, 8 - offset) :]

        return repaired
    return None


# -- torch.distributed.checkpoint ------------------------------------------------------------------------


def _dcp(folder: str) -> _Finding:
    names = sorted(os.listdir(folder))
    files = [name for name in names if name.endswith(".distcp")]
    if dcp_folder.METADATA_FILE not in names and not files:
        raise InvalidInput(
            f"{folder} is no folder of torch.distributed.checkpoint; nothing was written.",
            hint="Name the files themselves.",
        )
    finding = _Finding("distributed checkpoint", sum(os.path.getsize(os.path.join(folder, name)) for name in files))
    try:
        read, size = _opened(os.path.join(folder, dcp_folder.METADATA_FILE))
        if size > dcp_folder.METADATA_BYTES_MAX:
            raise Malformed("it is longer than that of any model")
        items = dcp_folder.read_items(read(0, size))
    except (Malformed, OSError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else str(exc)
        finding.lost.append(Lost(dcp_folder.METADATA_FILE, f"it can't be read, so tensors have no names: {reason}"))
        _by_file(folder, files[:_FILES_MAX], finding)
        return finding
    finding.notes.append("The names are those of .metadata, which has no checksum; contents were checked by CRC-32.")
    values = 0
    for item in items.values():
        if item.shape is None:
            values += 1
        else:
            _take_item(folder, item, finding)
    if values:
        finding.notes.append(f"{values} values that are no tensors (numbers, text) are left out.")
    return finding


def _by_file(folder: str, files: Sequence[str], finding: _Finding) -> None:
    for name in files:
        found = _file(os.path.join(folder, name))
        for saved in found.saved:
            saved.name = f"{name}/{saved.name}"
        for lost in found.lost:
            lost.name = f"{name}/{lost.name}"
        finding.saved += found.saved
        finding.lost += found.lost


def _take_item(folder: str, item: dcp_folder.Item, finding: _Finding) -> None:
    """The whole tensor; where a shard is lost, or they lie in columns, each shard on its own."""
    good: list[tuple[dcp_folder.Shard, _Saved]] = []
    reasons = []
    for each in item.shards:
        saved, reason = _shard(folder, each)
        if saved is None:
            reasons.append(reason)
        else:
            good.append((each, saved))
    assert item.shape is not None
    alike = len({(saved.dtype, saved.checked) for _, saved in good}) == 1
    covered = sum(prod(each.sizes) for each in item.shards) == prod(item.shape)
    if good and not reasons and alike and dcp_folder.rows(item):
        first = good[0][1]
        pieces = [piece for _, saved in good for piece in saved.pieces]
        finding.saved.append(_Saved(item.name, first.dtype, item.shape, pieces, first.checked))
        return
    for each, saved in good:
        box = ", ".join(f"{at}:{at + size}" for at, size in zip(each.corner, each.sizes, strict=True))
        saved.name = f"{item.name}[{box}]"
        finding.saved.append(saved)
    if reasons or not covered:
        what = f"{len(reasons)} of its {len(item.shards)} parts: {reasons[0]}" if reasons else "parts of it are missing"
        finding.lost.append(Lost(item.name, what))


def _shard(folder: str, shard: dcp_folder.Shard) -> tuple[_Saved | None, str]:
    """The tensor that a shard holds, or why there is none."""
    try:
        read, size = _opened(os.path.join(folder, shard.file))
    except OSError as exc:
        return None, f"{shard.file} can't be read: {exc.strerror}"
    if shard.offset >= size:
        return None, f"{shard.file} ends before it"
    found = _torch(_part(read, shard.offset, shard.length), min(shard.length, size - shard.offset))
    if len(found.saved) == 1 and not found.lost and found.saved[0].shape == shard.sizes:
        return found.saved[0], ""
    return None, f"{shard.file}: {found.lost[0].reason if found.lost else 'what lies there is not this tensor'}"


def _part(read: ReadAt, start: int, length: int) -> ReadAt:
    return lambda offset, count: read(start + offset, max(0, min(count, length - offset)))
