"""Ids and frozen records, with one canonical byte form: what the log and the manifests hold.

Everything here is JSON (RFC 8259, UTF-8, no insignificant space, fields in the order declared,
fields at their default left out), so a stranger reads a repository with `cat` and `jq`.

An object of its own (`format`, `keys/…`, `log/…`, `state/…`) ends with one more field, `hash`: the
BLAKE3 of all bytes before `,"hash"`. So a changed byte in any of them is noticed and named, even
where nothing else refers to the object.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar
from urllib.parse import unquote_to_bytes

import blake3
import msgspec

from outlast.errors import Corrupt

_encoder = msgspec.json.Encoder()
_ESCAPED = re.compile("[\udc80-\udcff]")

_HASH_FIELD = re.compile(rb',"hash":"([0-9a-f]{64})"\}\n')
_HASH_FIELD_BYTES = 76

T = TypeVar("T")

FORMAT_VERSION = 1

EntryType = Literal["file", "dir", "symlink", "hardlink", "fifo", "unreadable"]

ChunkRef = tuple[str, int]
"""(chunk id in hex, plain length in bytes)"""

Hole = tuple[int, int]
"""(offset, length) of a run of zeros that takes no space in a sparse file"""

Sum = tuple[int, int, list[str]]
"""(number of a chunk in `Entry.chunks`, bytes of an element, the chunks that it is the sum of)"""


class Entry(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One file, folder or link of a backup; a line of the manifest.

    `path` is relative to the snapshot's root ("." is the root folder itself), with "/" between
    parts. File names are bytes: `path` is their UTF-8 text in which `%` and every byte that is not
    valid UTF-8 stand as `%XX`, so `urllib.parse.unquote_to_bytes(path)` gives the name back.
    A file's content is its `chunks` end to end, with `holes` of zeros in between.
    """

    path: str
    type: EntryType
    mode: int = 0
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size: int = 0
    ctime_ns: int = 0
    inode: int = 0
    target: str = ""
    """symlink: what it points to; hardlink: the path of the entry it is the same file as (both written as `path` is)"""
    chunks: list[ChunkRef] = []
    holes: list[Hole] = []
    sums: list[Sum] = []
    """those chunks that may not be stored themselves: each is the sum of stored ones, see `repo/difference.py`"""
    unstable: bool = False
    """The file kept changing while it was read; its content is one that may never have existed."""
    reason: str = ""
    """unreadable: why there is no content"""

    @property
    def raw_path(self) -> bytes:
        return _raw(self.path)

    @property
    def raw_target(self) -> bytes:
        return _raw(self.target)

    @property
    def stored(self) -> list[ChunkRef]:
        """What holds the content: the chunks, and for sums what they are made of."""
        return stored(self.chunks, self.sums) if self.sums else self.chunks

    @property
    def parts(self) -> dict[str, list[str]]:
        """chunk -> what it is the sum of, for those that are one"""
        return parts(self.chunks, self.sums)


def stored(chunks: list[ChunkRef], sums: list[Sum]) -> list[ChunkRef]:
    """See `Entry.stored`."""
    of = parts(chunks, sums)
    return [(part, length) for chunk, length in chunks for part in of.get(chunk, [chunk])]


def parts(chunks: list[ChunkRef], sums: list[Sum]) -> dict[str, list[str]]:
    """See `Entry.parts`; what no backup writes is left out."""
    return {chunks[number][0]: ids for number, _, ids in sums if ids and 0 <= number < len(chunks)}


def _raw(text: str) -> bytes:
    return unquote_to_bytes(text) if "%" in text else text.encode()


class Snapshot(msgspec.Struct, frozen=True, omit_defaults=True):
    """An immutable record that a backup or a checkpoint exists. Its manifest lists the entries."""

    id: str
    kind: Literal["backup", "checkpoint"]
    name: str
    time: str
    """RFC 3339, UTC, when the work began"""
    manifest: list[ChunkRef] = []
    """the chunks whose plain bytes, joined, are JSON lines: one Entry each, in `path_order`"""
    tags: dict[str, str] = {}
    host: str = ""
    sources: list[str] = []
    parent: str = ""
    files: int = 0
    bytes: int = 0
    """logical size of all files"""
    bytes_added: int = 0
    """plain bytes of chunks the repository did not have before, manifest included"""
    bytes_stored: int = 0
    """bytes of the packs this snapshot added"""
    unreadable: int = 0
    unstable: int = 0
    program: str = ""
    seconds: float = 0.0
    """how long the work on it took, up to its commit; 0 where it was not measured"""


class PackRef(msgspec.Struct, frozen=True):
    """A durable pack, as the log names it. The name is the hash of its header and footer table."""

    name: str
    bytes: int
    chunks: int


class LogEntry(msgspec.Struct, frozen=True):
    """One numbered, hash-chained fact. `prev_hash` is the BLAKE3 of the stored bytes of entry
    `seq - 1`, or of the object `format` for the first."""

    seq: int
    write_id: str
    prev_hash: str
    time: str
    actor: str
    kind: str
    body: dict[str, Any]


class Encryption(msgspec.Struct, frozen=True):
    """How an encrypted repository seals: the names of the primitives, for readers to check."""

    cipher: Literal["aes-256-gcm"] = "aes-256-gcm"
    kdf: Literal["argon2id"] = "argon2id"


class Chunking(msgspec.Struct, frozen=True):
    """How content is cut. Fixed when the repository is made; changing it would end deduplication.

    `block_bytes`: tensors are cut into blocks of this size from their first byte on.
    `min/avg/max_bytes`, `seed`: FastCDC (Xia et al., IEEE TPDS 2020, normalisation level 2) for the rest.
    """

    block_bytes: int = 4 << 20
    min_bytes: int = 256 << 10
    avg_bytes: int = 1 << 20
    max_bytes: int = 4 << 20
    seed: int = 0


class Format(msgspec.Struct, frozen=True):
    """The object `format`: its creation is the creation of the repository."""

    magic: Literal["outlast repository"]
    version: int
    id: str
    created: str
    features: list[str]
    """names a reader or writer must know, or else leave the repository alone"""
    chunking: Chunking
    compression: Literal["auto", "none", "zstd"]
    pack_bytes: int
    encryption: Encryption | None = None
    lock_days: int | msgspec.UnsetType = msgspec.UNSET
    """for how many days each object that isn't derived is locked by the store; left out where none is"""


def canonical(record: msgspec.Struct) -> bytes:
    """The one byte form of a record."""
    return _encoder.encode(record)


def parse(data: bytes | memoryview, kind: type[T] | msgspec.json.Decoder[T], what: str) -> T:
    """Decode canonical bytes; `Corrupt` names `what` when they don't fit."""
    try:
        if isinstance(kind, msgspec.json.Decoder):
            return kind.decode(data)
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError, UnicodeDecodeError) as exc:
        raise Corrupt(f"{what} can't be read: {exc}.") from exc


def canonical_object(record: msgspec.Struct) -> bytes:
    """The bytes of a record that is an object of its own: a line that ends with its hash."""
    body = _encoder.encode(record)[:-1]
    return body + b',"hash":"' + blake3.blake3(body).hexdigest().encode() + b'"}\n'


def parse_object(data: bytes, kind: type[T], what: str) -> T:
    """Undo `canonical_object`; `Corrupt` names `what` when any byte is not as it was written."""
    body, field = data[:-_HASH_FIELD_BYTES], _HASH_FIELD.fullmatch(data[-_HASH_FIELD_BYTES:])
    if field is None or blake3.blake3(body).hexdigest().encode() != field[1]:
        raise Corrupt(f"{what} was changed or cut short: it does not have the hash that it ends with.")
    return parse(data, kind, what)


def path_text(raw: bytes) -> str:
    """The text form of a file name; see `Entry.path`.

    >>> path_text(b"50%/caf\\xe9")
    '50%25/caf%E9'
    """
    text = raw.replace(b"%", b"%25").decode("utf-8", "surrogateescape")
    return _ESCAPED.sub(lambda match: f"%{ord(match[0]) - 0xDC00:02X}", text)


def path_order(raw_path: bytes) -> bytes:
    """Sort key of manifest entries: parents before children, siblings by bytes.

    "/" sorts below every other byte, so that `a/b` comes before `a.txt`: the order of a walk that
    visits each folder's entries in byte order and goes down at once.
    """
    return b"" if raw_path == b"." else raw_path.replace(b"/", b"\0")


def time_text(now_ns: int) -> str:
    """RFC 3339 in UTC with microseconds, for nanoseconds since the epoch.

    >>> time_text(1_750_000_000_123_456_000)
    '2025-06-15T15:06:40.123456Z'
    """
    seconds, rest = divmod(now_ns, 1_000_000_000)
    moment = datetime.fromtimestamp(seconds, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{rest // 1000:06d}Z"


def time_ns(text: str) -> int:
    """Undo `time_text`; raises `ValueError` for anything else."""
    moment = datetime.fromisoformat(text)
    return int(moment.replace(microsecond=0).timestamp()) * 1_000_000_000 + moment.microsecond * 1000
