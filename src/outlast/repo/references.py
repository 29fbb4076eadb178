"""Walk every snapshot's manifest and look for each chunk it refers to; say what damage costs.

Snapshots of one folder share most of their manifests' chunks, so each manifest chunk is read once,
whatever the number of snapshots; only the lines that straddle two chunks are looked at again.
"""

from __future__ import annotations

import msgspec

from outlast import records
from outlast.errors import Corrupt, OutlastError
from outlast.records import ChunkRef, Entry, Snapshot
from outlast.repo.pack import object_name
from outlast.repo.repository import Repository


class Findings:
    """Problems by object, and by object the snapshots and files that need what is damaged."""

    def __init__(self) -> None:
        self.problems: dict[str, list[str]] = {}
        self.snapshots: dict[str, dict[str, None]] = {}
        self.files: dict[str, set[str]] = {}

    def problem(self, name: str, problem: str) -> None:
        known = self.problems.setdefault(name, [])
        if problem not in known:
            known.append(problem)

    def affected(self, name: str, snapshot: str, path: str | None = None) -> None:
        self.snapshots.setdefault(name, {})[snapshot] = None
        if path is not None:
            self.files.setdefault(name, set()).add(path)


class _Hurt(msgspec.Struct, frozen=True):
    """A file that can't be restored whole, the object that is to blame, and why if that isn't known yet."""

    object: str
    path: str | None
    problem: str = ""


class _Piece(msgspec.Struct):
    """One manifest chunk: what stands before its first line break and after its last one.

    `tail` is None when there is no line break, so that all of it is `head`.
    """

    head: bytes
    tail: bytes | None
    hurt: list[_Hurt]


class References:
    """`good`: packs whose footers are sound; `bad`: chunk -> packs in which its payload is damaged."""

    def __init__(self, view: Repository, findings: Findings, good: set[str], bad: dict[bytes, set[str]]) -> None:
        self._view = view
        self._findings = findings
        self._good = good
        self._bad = bad
        self._pieces: dict[str, _Piece | None] = {}
        self._footless = [object_name(name) for name in view.state.packs if name not in good]

    def walk(self) -> None:
        for snapshot in self._view.snapshots():
            self._walk_snapshot(snapshot)

    def _walk_snapshot(self, snapshot: Snapshot) -> None:
        rest: bytes | None = b""
        for ref in snapshot.manifest:
            if ref[0] not in self._pieces:
                self._pieces[ref[0]] = self._read_piece(ref)
            piece = self._pieces[ref[0]]
            if piece is None:
                problem = f"The manifest of snapshot {snapshot.id[:12]} can't be read in full."
                hurt = self._missing(ref, None)
                self._note(snapshot, [msgspec.structs.replace(each, problem=problem) for each in hurt])
                rest = None
                continue
            if piece.tail is None:
                rest = None if rest is None else rest + piece.head
                continue
            self._note(snapshot, piece.hurt)
            if rest is not None:
                self._note(snapshot, self._check_line(rest + piece.head))
            rest = piece.tail
        if rest:
            cut = "The manifest ends in the middle of a line."
            self._note(snapshot, [_Hurt(f"snapshot {snapshot.id}", None, cut)])

    def _note(self, snapshot: Snapshot, hurt: list[_Hurt]) -> None:
        for each in hurt:
            if each.problem or each.object not in self._findings.problems:
                what = each.problem or "Chunks of it are damaged."
                self._findings.problem(each.object, what)
            self._findings.affected(each.object, snapshot.id, each.path)

    def _read_piece(self, ref: ChunkRef) -> _Piece | None:
        try:
            text = bytes(self._view.get_chunk(bytes.fromhex(ref[0])))
        except Corrupt:
            return None
        head, newline, body = text.partition(b"\n")
        if not newline:
            return _Piece(head, None, [])
        lines, _, tail = body.rpartition(b"\n")
        hurt = [each for line in lines.split(b"\n") if line for each in self._check_line(line)]
        return _Piece(head, tail, hurt)

    def _check_line(self, line: bytes) -> list[_Hurt]:
        try:
            entry = records.parse(line, Entry, "a line of the manifest")
            hurt = [each for ref in entry.chunks for each in self._look_up(ref, entry.path)]
        except (OutlastError, ValueError) as exc:
            return [_Hurt("manifests", None, f"A manifest is malformed: {exc}")]
        length = sum(ref[1] for ref in entry.chunks) + sum(hole[1] for hole in entry.holes)
        if entry.type == "file" and length != entry.size:
            wrong = f"The manifest gives {entry.path} {length} bytes of content, but a size of {entry.size}."
            hurt.append(_Hurt("manifests", entry.path, wrong))
        return hurt

    def _look_up(self, ref: ChunkRef, path: str) -> list[_Hurt]:
        """Nothing when a sound copy of the chunk is there, otherwise who is to blame."""
        chunk = bytes.fromhex(ref[0])
        location = self._view.index.get(chunk)
        if location and location.plain_bytes == ref[1] and location.pack.name in self._good and chunk not in self._bad:
            return []
        for copy in self._view.index.copies(chunk):
            name = copy.pack.name
            if name in self._good and name not in self._bad.get(chunk, ()) and copy.plain_bytes == ref[1]:
                return []
        return self._missing(ref, path)

    def _missing(self, ref: ChunkRef, path: str | None) -> list[_Hurt]:
        """Whose fault it is that a chunk can't be had. Of packs without footers, each may have held it."""
        copies = self._view.index.copies(bytes.fromhex(ref[0]))
        for copy in copies:
            if copy.plain_bytes == ref[1]:
                return [_Hurt(object_name(copy.pack.name), path)]
        if copies:
            wrong = f"Chunk {ref[0][:16]} is {copies[0].plain_bytes} bytes long, not {ref[1]}."
            return [_Hurt("manifests", path, wrong)]
        if self._footless:
            return [_Hurt(name, path) for name in self._footless]
        return [_Hurt("packs", path, "Chunks that snapshots need are in no pack of the log.")]
