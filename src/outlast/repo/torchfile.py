"""Where the tensors lie in what `torch.save` writes: a zip archive, or several end to end. Pure.

An archive holds `<name>/data.pkl`, which describes the tensors, and their storages, uncompressed, as
`<name>/data/<key>` (APPNOTE 6.3.10 for the zip and its 64-bit records). A `.distcp` file of
torch.distributed.checkpoint is one archive per item with nothing in between; there the path of a tensor
starts with the position of its archive, because its name is kept in another file (`.metadata`).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from struct import Struct

import msgspec

from outlast.repo import torchpickle
from outlast.repo.layout import DTYPE_BITS, Malformed, Span, Tensor, Window, element_count

MAGIC = b"PK\x03\x04"

_END = Struct("<4s4H2LH")  # end of central directory
_LOCATOR = Struct("<4sLQL")  # of the 64-bit end of central directory
_END64 = Struct("<4sQ2H2L4Q")
_ENTRY = Struct("<4s6H3L5H2L")  # central directory
_LOCAL = Struct("<4s5H3L2H")

TAIL_BYTES = 64 << 10
_INNER_TAIL_BYTES = 16 << 10
_ARCHIVES_MAX = 1 << 16
_PICKLE_BYTES_MAX = 24 << 20
_NAME_BYTES_MAX = 512
# Of all the archives of a file together; 120 bytes of directory and 600 bytes of memory a member.
_DIRECTORY_BYTES_MAX = 24 << 20
_MEMBERS_MAX = 1 << 17
# A view that repeats elements (`expand`) may be larger than its file, but not without bound.
_EXPANDED_BYTES_MAX = 1 << 30


class Member(msgspec.Struct, frozen=True):
    """A stored (uncompressed) member and its bytes in the file."""

    header: int
    name: bytes
    offset: int
    length: int


class Archive(msgspec.Struct, frozen=True):
    pickle: Member
    storages: dict[str, Member]
    byteorder: Member | None


class Directory(msgspec.Struct, frozen=True):
    """The place of a central directory. `base` is the archive's first byte, from which its offsets count."""

    base: int
    start: int
    length: int
    entries: int


class Room:
    """What is left of the budget that the directories of one file share."""

    def __init__(self) -> None:
        self._bytes = _DIRECTORY_BYTES_MAX
        self._members = _MEMBERS_MAX

    def take(self, directory_bytes: int = 0, members: int = 0) -> None:
        self._bytes -= directory_bytes
        self._members -= members
        if self._bytes < 0 or self._members < 0:
            raise _TooMuch("more members than any model has")


class _TooMuch(Malformed):
    """The file as a whole asks for too much, so no part of it is read."""


def recognises(window: Window) -> bool:
    """Whether the last (or only) archive of the file is one of torch's."""
    room = Room()
    try:
        return bool(_archive(window, directory_place(window, window.size, TAIL_BYTES, room), room))
    except Malformed:
        return False


def spans(window: Window) -> Iterator[Span]:
    """One span per storage; its element width is known where the pickle can be read. Raises `Malformed`."""
    budget = torchpickle.Budget()
    for archive in _archives(window):
        try:
            widths = _pickled(window, archive, budget).widths
        except torchpickle.Unreadable:
            widths = {}
        for key, member in archive.storages.items():
            yield Span(member.offset, member.length, widths.get(key, 0))


def tensors(window: Window) -> list[Tensor]:
    """Every tensor with plain values: no quantised, sparse or lazily conjugated ones. Raises `Malformed`."""
    archives = _archives(window)
    budget = torchpickle.Budget()
    found = []
    for at, archive in enumerate(archives):
        if archive.byteorder and window.get(archive.byteorder.offset, archive.byteorder.length) != b"little":
            raise Malformed("elements in another byte order")
        for name, view in torchpickle.name_tensors(_pickled(window, archive, budget), budget):
            if len(archives) > 1:
                bare = name == torchpickle.BARE_TENSOR
                found.append(tensor_of(str(at) if bare else f"{at}.{name}", view, archive, window.size))
            else:
                found.append(tensor_of(name, view, archive, window.size))
    return found


def _pickled(window: Window, archive: Archive, budget: torchpickle.Budget) -> torchpickle.Pickled:
    if archive.pickle.length > _PICKLE_BYTES_MAX or budget.steps < 0:
        raise torchpickle.Unreadable("pickles longer than any model needs")
    return torchpickle.interpret(window.get(archive.pickle.offset, archive.pickle.length), budget)


def tensor_of(name: str, view: torchpickle.View, archive: Archive, size: int) -> Tensor:
    storage = archive.storages.get(view.key)
    if storage is None:
        raise Malformed("a tensor without a storage")
    item = DTYPE_BITS[view.dtype] // 8
    length = element_count(view.shape, max(size, _EXPANDED_BYTES_MAX) // item) * item
    if torchpickle.contiguous(view.shape, view.strides):
        strides, reach = None, length
    else:
        strides = view.strides
        reach = item + item * sum((each - 1) * step for each, step in zip(view.shape, strides, strict=True))
    if reach and view.offset * item + reach > storage.length:
        raise Malformed("a tensor outside its storage")
    offset = storage.offset + min(view.offset * item, storage.length)
    return Tensor(name, view.dtype, view.shape, offset, length, strides)


def _archives(window: Window) -> list[Archive]:
    """Every archive, in the order of the file, found from the end: each one's start is where another may end.

    Bytes before the first archive belong to no tensor. Raises `Malformed` when the file doesn't end in one.
    """
    archives: list[Archive] = []
    room = Room()
    end, tail = window.size, TAIL_BYTES
    while end > 0 and len(archives) < _ARCHIVES_MAX:
        try:
            directory = directory_place(window, end, tail, room)
            archive = _archive(window, directory, room)
        except _TooMuch:
            raise
        except Malformed:
            if not archives:
                raise
            break
        archives.append(archive)
        end, tail = directory.base, _INNER_TAIL_BYTES
    archives.reverse()
    return archives


def directory_place(window: Window, end: int, tail: int, room: Room) -> Directory:
    """The central directory of the archive that ends here (without a comment, as torch writes it)."""
    at = end - _END.size
    if at < 0:
        raise Malformed("too short for an archive")
    magic, disk, first_disk, _, entries, length, offset, comment = _END.unpack(
        window.get(at, _END.size, behind=tail - _END.size)
    )
    if magic != b"PK\x05\x06" or disk or first_disk or comment:
        raise Malformed("no end of a central directory")
    after = at
    if at >= _LOCATOR.size + _END64.size:
        magic, _, end64_offset, _ = _LOCATOR.unpack(window.get(at - _LOCATOR.size, _LOCATOR.size))
        if magic == b"PK\x06\x07":
            after = at - _LOCATOR.size - _END64.size
            magic, *_, entries, length, offset = _END64.unpack(window.get(after, _END64.size))
            if magic != b"PK\x06\x06" or end64_offset != offset + length:
                raise Malformed("the 64-bit end of the central directory is elsewhere")
    start = after - length
    if start < offset:
        raise Malformed("the archive begins before the file")
    if entries * _ENTRY.size > length:
        raise Malformed("more members than the directory has room for")
    room.take(directory_bytes=length)
    return Directory(start - offset, start, length, entries)


def _archive(window: Window, directory: Directory, room: Room) -> Archive:
    entries = window.get(directory.start, directory.length)
    listed = sorted(_listed(entries, directory, room), key=lambda each: each.header)
    ranges = [(each.header, _LOCAL.size + len(each.name)) for each in listed]
    members = []
    for each, local in zip(listed, window.get_many(ranges), strict=True):
        magic, _, flags, method, *_, name_bytes, extra_bytes = _LOCAL.unpack_from(local)
        if magic != MAGIC or flags & 1 or method or local[_LOCAL.size :] != each.name or name_bytes != len(each.name):
            raise Malformed("a member is not what the directory says")
        offset = each.header + len(local) + extra_bytes
        members.append(Member(each.header, each.name, offset, each.length))
    for one, following in pairwise(members):
        if one.offset + one.length > following.header:
            raise Malformed("overlapping members")
    if members and members[-1].offset + members[-1].length > directory.start:
        raise Malformed("a member reaches into the directory")
    return _by_role(members)


def _by_role(members: list[Member]) -> Archive:
    by_name = {each.name: each for each in members}
    pickles = [name for name in by_name if name.endswith(b"/data.pkl")]
    if len(pickles) != 1 or len(by_name) != len(members):
        raise Malformed("not an archive of torch")
    root = pickles[0].removesuffix(b"data.pkl")
    folder = root + b"data/"
    storages = {
        name.removeprefix(folder).decode("utf-8", "replace"): member
        for name, member in by_name.items()
        if name.startswith(folder)
    }
    return Archive(by_name[pickles[0]], storages, by_name.get(root + b"byteorder"))


def _listed(entries: bytes, directory: Directory, room: Room) -> Iterator[Member]:
    """The members that matter, as the directory gives them: `offset` is still unknown."""
    at = 0
    for _ in range(directory.entries):
        if at + _ENTRY.size > len(entries):
            raise Malformed("the directory ends early")
        fields = _ENTRY.unpack_from(entries, at)
        magic, flags, method, stored, length = fields[0], fields[3], fields[4], fields[8], fields[9]
        name_bytes, extra_bytes, comment_bytes, header = fields[10], fields[11], fields[12], fields[16]
        if magic != b"PK\x01\x02":
            raise Malformed("the directory has something else in it")
        at += _ENTRY.size
        name = entries[at : at + name_bytes]
        if b"/data/" in name or name.endswith((b"/data.pkl", b"/byteorder")):
            extra = entries[at + name_bytes : at + name_bytes + extra_bytes]
            length, stored, header = wide(extra, length, stored, header)
            # A compressed or encrypted storage has no bytes of its own; its tensors then lack a storage.
            if method == 0 and flags & 1 == 0:
                end = directory.base + header + _LOCAL.size + name_bytes + length
                if stored != length or len(name) != name_bytes or end > directory.start:
                    raise Malformed("a member outside the archive")
                if name_bytes > _NAME_BYTES_MAX:
                    raise Malformed("a name longer than torch writes")
                room.take(members=1)
                yield Member(directory.base + header, name, 0, length)
        at += name_bytes + extra_bytes + comment_bytes
    if at != len(entries):
        raise Malformed("the directory is longer than its entries")


def wide(extra: bytes, length: int, stored: int, header: int) -> tuple[int, int, int]:
    """The 64-bit values of the extra field 1, which are there only for fields that are saturated."""
    fields = [length, stored, header]
    if 0xFFFFFFFF not in fields:
        return length, stored, header
    at = 0
    while at + 4 <= len(extra):
        kind = int.from_bytes(extra[at : at + 2], "little")
        size = int.from_bytes(extra[at + 2 : at + 4], "little")
        at += 4
        if kind == 1:
            values = [int.from_bytes(extra[each : each + 8], "little") for each in range(at, at + size - 7, 8)]
            for which, field in enumerate(fields):
                if field == 0xFFFFFFFF:
                    if not values:
                        raise Malformed("a 64-bit value is missing")
                    fields[which] = values.pop(0)
            break
        at += size
    return fields[0], fields[1], fields[2]
