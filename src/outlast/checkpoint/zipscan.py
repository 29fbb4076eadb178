"""The members of torch archives that are damaged or cut off, each checked against its CRC-32. No pickle is executed.

A member is described up to three times (APPNOTE 6.3.10): in its local header, in the descriptor behind its bytes,
and in the central directory at the end of the archive. Whatever of these agrees with the bytes is believed; without
a directory the local headers are looked for. Nothing is good that no CRC-32 confirms, unless the whole archive was
written without checksums (`torch.serialization.set_crc32_options(False)`): that is told.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from struct import Struct

import msgspec

from outlast.repo import torchfile
from outlast.repo.layout import Malformed, ReadAt, Window

_LOCAL = Struct("<4s5H3L2H")
_ENTRY = Struct("<4s6H3L5H2L")
_HEADER, _DESCRIPTOR, _DIRECTORY = b"PK\x03\x04", b"PK\x07\x08", (b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06")
_NAME = re.compile(rb"[ -~\x80-\xff]+")
_NAME_BYTES_MAX = 512
_FOLLOWS_AT_END, _ENCRYPTED = 8, 1

_BLOCK_BYTES_MIN = 4096
_BLOCK_BYTES = 8 << 20
_ARCHIVES_MAX = 1 << 16
_MEMBERS_MAX = 1 << 17
_PICKLE_BYTES_MAX = 24 << 20
_ALIGN_BYTES = 64
"""where torch begins the bytes of a member, counted from the start of the archive"""


class Member(msgspec.Struct):
    """Bytes of the file under a name."""

    header: int
    name: bytes
    offset: int
    length: int
    crc: int
    problem: str = ""
    """why the bytes can't be used"""
    proven: bool = False
    """the bytes were read and agree with the CRC"""


class Archive(msgspec.Struct):
    """What is left of one archive."""

    start: int
    pickle: bytes = b""
    """`data.pkl`, where it is whole"""
    pickle_problem: str = "its data.pkl, which names the tensors, is missing"
    byteorder_problem: str = ""
    storages: dict[str, Member] = {}
    lost: dict[str, str] = {}
    """storage -> why it is lost, of those whose place or name is known"""
    checked: bool = True
    """whether there are checksums"""


def archives(read: ReadAt, size: int) -> list[Archive]:
    """Everything that is found, in the order of the file. Raises `OSError` only where nothing can be read at all."""
    window, room = Window(read, size), torchfile.Room()
    found: list[Archive] = []
    end = size
    while end > 0 and len(found) < _ARCHIVES_MAX:
        whole = _by_directory(window, read, end, room)
        if whole is None:
            break
        found.append(whole)
        end = whole.start
    rest = _groups(_scanned(window, read, 0, end)) if end > 0 else []
    return [_archive(read, members, checks_order=True) for members in rest] + found[::-1]


def damage(read: ReadAt, size: int) -> str:
    """What is wrong with a file that begins as an archive does, or nothing; also of one that is no archive."""
    if read(0, len(_HEADER)) != _HEADER:
        return ""
    for found in archives(read, size):
        lost = [f"storage {key}: {reason}" for key, reason in found.lost.items()]
        for problem in (found.pickle_problem, found.byteorder_problem, *lost):
            if problem:
                return problem
    return ""


# -- with a central directory ----------------------------------------------------------------------------


def _by_directory(window: Window, read: ReadAt, end: int, room: torchfile.Room) -> Archive | None:
    """The archive whose directory ends here; None where none does, or where it contradicts itself."""
    try:
        place = torchfile.directory_place(window, end, 64 << 10, room)
        listed = _listed(window, place)
    except (Malformed, OSError):
        return None
    doubtful = False
    members = []
    for each in listed:
        at, named = _data_place(window, each, place.base)
        doubtful |= named != each.name
        each.offset = at
        each.problem = _check(read, each)
        if each.problem:
            aligned = _aligned(each.header + _LOCAL.size + len(each.name) + 4, place.base)
            other = msgspec.structs.replace(each, offset=aligned, problem="", proven=False)
            if aligned != at and aligned + each.length <= place.start and not _check(read, other):
                each = other
        doubtful |= bool(each.problem)
        members.append(each)
    if any(each.crc for each in members):
        if not any(each.proven for each in members):
            return None
    else:
        doubtful = False
    if doubtful:
        members = _reconciled(members, list(_scanned(window, read, place.base, place.start)), read)
    return _archive(read, members, start=place.base)


def _listed(window: Window, place: torchfile.Directory) -> list[Member]:
    """The entries of a directory. Raises `Malformed`."""
    if place.entries > _MEMBERS_MAX:
        raise Malformed("more members than any model has")
    data = window.get(place.start, place.length)
    found, at = [], 0
    for _ in range(place.entries):
        if at + _ENTRY.size > len(data):
            raise Malformed("the directory ends early")
        fields = _ENTRY.unpack_from(data, at)
        name_bytes, extra_bytes, comment_bytes = fields[10:13]
        if fields[0] != _DIRECTORY[0]:
            raise Malformed("the directory has something else in it")
        at += _ENTRY.size
        name = data[at : at + name_bytes]
        extra = data[at + name_bytes : at + name_bytes + extra_bytes]
        length, _, header = torchfile.wide(extra, fields[9], fields[8], fields[16])
        problem = "it is compressed or encrypted" if fields[4] or fields[3] & _ENCRYPTED else ""
        found.append(Member(place.base + header, name, 0, length, fields[7], problem))
        at += name_bytes + extra_bytes + comment_bytes
    if at != len(data):
        raise Malformed("the directory is longer than its entries")
    if sum(each.length for each in found) > place.start - place.base:
        raise Malformed("members that overlap, which would be read over and over")
    return sorted(found, key=lambda each: each.header)


def _data_place(window: Window, member: Member, base: int) -> tuple[int, bytes]:
    """Where the bytes of a member begin and how its local header calls it; a guess where that is damaged."""
    try:
        local = window.get(member.header, _LOCAL.size, ahead=512)
        magic, *_, name_bytes, extra_bytes = _LOCAL.unpack(local)
        name = window.get(member.header + _LOCAL.size, min(name_bytes, 512))
    except (Malformed, OSError):
        magic, name, name_bytes, extra_bytes = b"", b"", 0, 0
    if magic == _HEADER and name_bytes == len(member.name):
        return member.header + _LOCAL.size + name_bytes + extra_bytes, name
    return _aligned(member.header + _LOCAL.size + len(member.name) + 4, base), b""


def _aligned(at: int, base: int) -> int:
    return at + (base - at) % _ALIGN_BYTES


def _reconciled(listed: list[Member], scanned: list[Member], read: ReadAt) -> list[Member]:
    """What the directory and the local headers say together. Members of archives inside tensors are no members."""
    local = {each.header: each for each in scanned if each.name}
    by_name = {each.name: each for each in local.values()}
    known = {each.header for each in listed}
    found = []
    for each in listed:
        other = local.get(each.header)
        if other is None or other.name != each.name:
            # Either its place in the directory is wrong or one of the names is.
            namesake = by_name.get(each.name)
            other = namesake if namesake is not None and namesake.header not in known else other
        if other is None:
            found.append(each)
            continue
        if each.problem:
            other = msgspec.structs.replace(other, problem=other.problem or _check(read, other))
            if not other.problem:
                found.append(other if other.name == each.name else _one_name(each, other, other))
                continue
        found.append(each if each.name == other.name or each.problem else _one_name(each, other, each))
    found.sort(key=lambda each: each.header)
    _settle(found)
    return found


class _TwoNames(Member):
    """Its header and the directory call it differently."""

    other: bytes = b""


def _one_name(listed: Member, local: Member, good: Member) -> Member:
    found = {name: getattr(good, name) for name in Member.__struct_fields__}
    return _TwoNames(**found | {"name": listed.name}, other=local.name)


def _settle(members: list[Member]) -> None:
    """Of two names the one that says the member's place is right: torch counts storages from 0 in order."""
    place = 0
    for each in members:
        if isinstance(each, _TwoNames):
            names = [each.name, each.other]
            roles = [name for name in names if name.endswith((b"/data.pkl", b"/byteorder"))]
            places = [name for name in names if _key(name) == str(place)]
            if not roles and not places:
                each.problem = "the archive calls it by two names"
            each.name = (roles or places or names)[0]
        place += _key(each.name) is not None


# -- without ---------------------------------------------------------------------------------------------


_GAP = Member(-1, b"", 0, 0, 0)
"""what lies here is no member"""
_END = Member(-2, b"", 0, 0, 0)
"""a central directory begins here, or nothing tells whether what follows belongs to what came before"""


class _Search:
    """Looks for signatures in the file, a few times its size at most."""

    def __init__(self, read: ReadAt, span_bytes: int) -> None:
        self.read = read
        self._left = 4 * span_bytes + (64 << 20)

    def places(self, wanted: bytes, start: int, end: int) -> Iterator[int]:
        at, block_bytes = start, _BLOCK_BYTES_MIN
        while at + len(wanted) <= end and self._left > 0:
            block = _quietly(self.read, at, min(block_bytes, end - at))
            found, searched = block.find(wanted), 0
            while found >= 0:
                self._left -= found - searched
                searched = found
                yield at + found
                found = block.find(wanted, found + 1)
            self._left -= block_bytes - searched
            at += block_bytes - len(wanted) + 1
            block_bytes = min(4 * block_bytes, _BLOCK_BYTES)

    def headers(self, start: int, end: int) -> Iterator[int]:
        """Where local headers stand."""
        return (at for at in self.places(_HEADER, start, end) if _local(self.read, at, end) is not None)

    def behind(self, content: int, start: int, end: int) -> tuple[int, int, int] | None:
        """(next header, length, CRC) of a member whose bytes begin at `content`, or None.

        A header inside those bytes, of an archive in a tensor, is told from the next one by what precedes it: a
        descriptor with the length of this member. It has it twice, and damage may have hit one of them.
        """
        for at in self.headers(start, end):
            for width, whole in ((4, 16), (8, 24)):
                data = _quietly(self.read, at - whole, whole)
                sizes = {int.from_bytes(data[8:][each * width :][:width], "little") for each in (0, 1)}
                if len(data) == whole and content <= at - whole and at - whole - content in sizes:
                    return at, at - whole - content, int.from_bytes(data[4:8], "little")
        return None


_FOLLOWING = {b"data.pkl": b".format_version", b".format_version": b".storage_alignment", b"byteorder": b"data/0",
              b".storage_alignment": b"byteorder"}  # fmt: skip


def _next_name(before: bytes) -> bytes:
    """What torch writes after a member of this name, or nothing where that is not known."""
    root, slash, name = before.partition(b"/")
    number = name.removeprefix(b"data/")
    following = b"data/%d" % (int(number) + 1) if number.isdigit() and len(number) < 8 else _FOLLOWING.get(name, b"")
    return root + slash + following if following else b""


def _scanned(window: Window, read: ReadAt, start: int, end: int) -> Iterator[Member]:
    """Members by their local headers, in order, with `_GAP` and `_END` between."""
    search = _Search(read, end - start)

    def get(offset: int, length: int) -> bytes:
        return window.get(offset, min(length, window.size - offset), ahead=1024)

    at, count, last = start, 0, b""
    while at + _LOCAL.size <= end and count < _MEMBERS_MAX:
        count += 1
        member = _local(get, at, end)
        if member is None:
            name = b"" if _quietly(get, at, 4) in _DIRECTORY else _next_name(last)
            content = _aligned(at + _LOCAL.size + len(name) + 4, start)
            found = search.behind(content, at + 1, end) if name else None
            yield _GAP if found else _END
            at = found[0] if found else next(search.headers(at + 1, end), end)
            continue
        behind = member.offset + member.length
        if member.crc < 0:
            member, behind = _measured(search, member, end)
        elif behind > end:
            member.length, member.problem = 0, "the file ends inside it"
        last = member.name
        yield member
        if member.problem and behind <= member.offset:
            yield _END
            behind = next(search.headers(member.offset, end), end)
        at = behind


def _local(read: ReadAt, at: int, end: int) -> Member | None:
    """What a local header says; the CRC is -1 where it and the length follow the bytes."""
    head = _quietly(read, at, _LOCAL.size)
    if not head.startswith(_HEADER) or len(head) < _LOCAL.size:
        return None
    fields = _LOCAL.unpack(head)
    flags, method, crc, stored, length, name_bytes, extra_bytes = *fields[2:4], *fields[6:11]
    offset = at + _LOCAL.size + name_bytes + extra_bytes
    if name_bytes > _NAME_BYTES_MAX or offset > end:
        return None
    rest = _quietly(read, at + _LOCAL.size, name_bytes + extra_bytes)
    name, extra = rest[:name_bytes], rest[name_bytes:]
    if not _NAME.fullmatch(name) or not _is_sequence(extra):
        return None
    problem = "it is compressed or encrypted" if method or flags & _ENCRYPTED else ""
    if flags & _FOLLOWS_AT_END:
        return Member(at, name, offset, 0, -1, problem)
    try:
        length, stored, _ = torchfile.wide(extra, length, stored, 0)
    except Malformed:
        return None
    return Member(at, name, offset, length, crc, problem) if length == stored else None


def _is_sequence(extra: bytes) -> bool:
    """Whether an extra field is nothing but records: id, length, content. A length that is wrong shows here."""
    at = 0
    while at + 4 <= len(extra):
        at += 4 + int.from_bytes(extra[at + 2 : at + 4], "little")
    return at == len(extra)


def _measured(search: _Search, member: Member, end: int) -> tuple[Member, int]:
    """The member with length and CRC from the descriptor that says how far it lies behind; where the next begins."""
    for at in search.places(_DESCRIPTOR, member.offset, end):
        length = at - member.offset
        data = _quietly(search.read, at, 24)
        for width, whole in ((4, 16), (8, 24)):
            sizes = {int.from_bytes(data[8 + each * width : 8 + (each + 1) * width], "little") for each in (0, 1)}
            followed = length or at + whole == end or _quietly(search.read, at + whole, 2) == b"PK"
            if len(data) >= whole and sizes == {length} and followed:
                crc = int.from_bytes(data[4:8], "little")
                return msgspec.structs.replace(member, length=length, crc=crc), at + whole
    found = search.behind(member.offset, member.offset, end)
    if found is not None:
        at, length, crc = found
        return msgspec.structs.replace(member, length=length, crc=crc), at
    return msgspec.structs.replace(
        member, crc=0, problem="the file ends before its checksum, or that is damaged"
    ), member.offset


def _quietly(read: ReadAt, offset: int, length: int) -> bytes:
    try:
        return read(offset, length)
    except (OSError, Malformed):
        return b""


class _Unchained(Member):
    """What lies before it could not be read."""


def _groups(members: Iterator[Member]) -> list[list[Member]]:
    """Members by archive: each begins with its pickle, or behind the directory of the one before."""
    groups: list[list[Member]] = []
    before = _END
    for each in members:
        if each.name:
            if before is _END or each.name.endswith(b"/data.pkl"):
                groups.append([])
            if before is _GAP:
                each = _Unchained(**{name: getattr(each, name) for name in Member.__struct_fields__})
            groups[-1].append(each)
        if before is not _END or each.name:
            before = each
        if len(groups) > _ARCHIVES_MAX:
            break
    return groups


# -- both ------------------------------------------------------------------------------------------------


def _check(read: ReadAt, member: Member) -> str:
    """Why the bytes of a member are not what was written, or nothing."""
    if member.problem or member.proven:
        return member.problem
    crc = 0
    for at in range(0, member.length, _BLOCK_BYTES):
        length = min(_BLOCK_BYTES, member.length - at)
        try:
            piece = read(member.offset + at, length)
        except OSError as exc:
            return f"its bytes can't be read: {exc.strerror}"
        if len(piece) != length:
            return "the file ends inside it"
        crc = zlib.crc32(piece, crc)
    member.proven = crc == member.crc
    return "" if member.proven else _MISMATCH


_MISMATCH = "its bytes don't match their CRC-32"


def _key(name: bytes) -> str | None:
    _, separator, key = name.partition(b"/data/")
    return key.decode("utf-8", "replace") if separator else None


def _archive(read: ReadAt, members: list[Member], *, start: int = 0, checks_order: bool = False) -> Archive:
    found = Archive(start or (members[0].header if members else 0))
    for each in members:
        each.problem = _check(read, each)
    sized = [each for each in members if each.length and each.problem in ("", _MISMATCH)]
    found.checked = not sized or any(each.crc for each in sized)
    if not found.checked:
        for each in sized:
            each.problem = ""
    due = 0
    for each in members:
        key = _key(each.name)
        if each.name.endswith(b"/data.pkl"):
            _take_pickle(read, each, found)
        elif each.name.endswith(b"/byteorder"):
            _take_byteorder(read, each, found)
        elif key is not None:
            if checks_order and not each.problem and key.isdigit() and len(key) < 8:
                # A name that only one header says: it must be the next number, or the one after it behind a gap.
                fits = int(key) - due in ((0, 1) if isinstance(each, _Unchained) else (0,))
                each.problem = "" if fits else "its name does not fit its place"
            due = int(key) + 1 if key.isdigit() and not each.problem and len(key) < 8 else due + 1
            if key in found.storages or (key in found.lost and not each.problem):
                found.storages.pop(key, None)
                found.lost[key] = "the archive has two members of its name"
            elif each.problem:
                found.lost[key] = each.problem
            else:
                found.storages[key] = each
    return found


def _take_pickle(read: ReadAt, member: Member, found: Archive) -> None:
    if member.length > _PICKLE_BYTES_MAX:
        member.problem = "it is longer than that of any model"
    if member.problem:
        found.pickle_problem = f"its data.pkl, which names the tensors, is damaged: {member.problem}"
    else:
        found.pickle, found.pickle_problem = read(member.offset, member.length), ""


def _take_byteorder(read: ReadAt, member: Member, found: Archive) -> None:
    content = b"" if member.problem else read(member.offset, min(member.length, 16))
    # A damaged one still has its length; nothing but "big" and "little" is ever written.
    is_little = content == b"little" or (member.problem == _MISMATCH and member.length == len(b"little"))
    if not is_little:
        found.byteorder_problem = "the order of the bytes of each element is not little-endian, or not known"
