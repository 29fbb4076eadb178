"""Walk every snapshot's manifest and look for each chunk it refers to; say what damage costs.

Snapshots of one folder share most of their manifests' chunks, so each manifest chunk is read once,
whatever the number of snapshots; only the lines that straddle two chunks are looked at again.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

import msgspec

from outlast import records
from outlast.errors import Archived, Corrupt, NotFound, OutlastError, Unavailable
from outlast.records import ChunkRef, Entry, Snapshot
from outlast.repo import seal
from outlast.repo.index import Location
from outlast.repo.manifest import Order, entry_problem, is_root
from outlast.repo.pack import object_name
from outlast.repo.repository import Repository, chunk_offsets

FILES_MAX = 100
HURT_FILES_MAX = 1000
PROBLEMS_MAX = 100
_PLACES_MAX = 4
_CHUNKS_MAX = 100_000
_SUSPECTS_NAMED = 10
_MORE = "There is more of this kind."

T = TypeVar("T")


class Findings:
    """Problems by object, and by object the snapshots and files that need what is damaged.

    Of the files at most `FILES_MAX` an object are kept, the first by name, and the others are counted:
    a disk that is going may cost millions of files, and the report must come out all the same.
    """

    def __init__(self) -> None:
        self.problems: dict[str, list[str]] = {}
        self.snapshots: dict[str, dict[str, None]] = {}
        self._files: dict[str, set[str]] = {}
        self._left_out: set[str] = set()
        self._counts: dict[str, int] = {}

    def problem(self, name: str, problem: str) -> None:
        known = self.problems.setdefault(name, [])
        if problem not in known and len(known) <= PROBLEMS_MAX:
            known.append(problem if len(known) < PROBLEMS_MAX else _MORE)

    def affected(self, name: str, snapshot: str) -> None:
        self.snapshots.setdefault(name, {})[snapshot] = None

    def lost(self, name: str, path: str) -> None:
        """A file can't be restored whole; to be told once for each line of a manifest that says so."""
        files = self._files.setdefault(name, set())
        self._counts[name] = self._counts.get(name, 0) + 1
        files.add(path)
        if len(files) > 2 * FILES_MAX:
            self._files[name] = set(sorted(files)[:FILES_MAX])
            self._left_out.add(name)

    def files(self, name: str) -> tuple[list[str], int]:
        """The files to name, and, when there are more, about how many there are, else 0."""
        files = sorted(self._files.get(name, ()))
        if len(files) <= FILES_MAX and name not in self._left_out:
            return files, 0
        return files[:FILES_MAX], self._counts[name]


class _Hurt(msgspec.Struct, frozen=True):
    """A file that can't be restored whole, the object that is to blame, and why if that isn't known yet."""

    object: str
    path: str | None
    problem: str = ""


class _Piece(msgspec.Struct):
    """One manifest chunk: what stands before its first line break and after its last one.

    `tail` is None when there is no line break, so that all of it is `head`. `blamed`: (object, problem)
    of the lines between; their files are told to `Findings` when the piece is read, and not kept.
    `order`: what those lines ask of the lines before them.
    """

    head: bytes
    tail: bytes | None
    blamed: dict[tuple[str, str], None]
    order: Order
    hurt: list[bytes] = []
    """which of `Needs.files` these lines are"""


class HurtFile(msgspec.Struct):
    """A file that can't be restored whole, as some snapshots have it."""

    entry: Entry
    snapshots: dict[str, None] = {}


class Needs(msgspec.Struct):
    """Chunks that snapshots need and that lie in no sound live pack. For a repair, which asks for it."""

    endangered: dict[bytes, None] = {}
    """they can still be read, from packs that are damaged or condemned"""
    lost: dict[bytes, int] = {}
    """chunk -> plain bytes: no pack gives it"""
    places: dict[bytes, list[tuple[str, int]]] = {}
    """lost chunk -> (path, offset in that file) of some files that it belongs to"""
    files: dict[bytes, HurtFile] = {}
    """hash of the line of a manifest -> the file, up to `HURT_FILES_MAX`"""
    files_left_out: int = 0


class References:
    """`sound`: live packs in which nothing is wrong; `good`: live packs whose footers are sound;
    `bad`: chunk -> packs in which its payload is damaged; `footless`: packs of which it isn't known for sure
    what they hold; `missing`: packs whose objects are not there. `collect`: note files and places in `needs`."""

    def __init__(
        self,
        view: Repository,
        findings: Findings,
        *,
        sound: set[str],
        good: set[str],
        bad: dict[bytes, set[str]],
        footless: Collection[str] = (),
        missing: Collection[str] = (),
        collect: bool = False,
    ) -> None:
        self._view = view
        self._findings = findings
        self._sound = sound
        self._good = good
        self._bad = bad
        self._collect = collect
        self.needs = Needs()
        self.unlisted: dict[str, Snapshot] = {}
        """snapshots whose manifests can't be read in full"""
        self._gone = set(missing)
        self._pieces: dict[str, _Piece | None] = {}
        self._straddling: set[bytes] = set()
        self._hurt: list[bytes] = []
        # A chunk that no other pack holds was in one of these, and nobody knows in which.
        self._suspects = sorted(footless)

    def walk(self) -> None:
        for snapshot in self._view.snapshots():
            self._walk_snapshot(snapshot)

    def _walk_snapshot(self, snapshot: Snapshot) -> None:
        rest: bytes | None = b""
        order, first = Order(), True
        for ref in snapshot.manifest:
            if ref[0] not in self._pieces:
                self._pieces[ref[0]] = self._read_piece(ref)
            piece = self._pieces[ref[0]]
            if piece is None:
                self.unlisted[snapshot.id] = snapshot
                problem = f"The manifest of snapshot {snapshot.id[:12]} can't be read in full."
                blamed = {
                    (each.object, text): None
                    for each in self._missing(ref, None)
                    for text in (each.problem, problem)
                    if text
                }
                self._note(snapshot, blamed)
                rest, first = None, False
                order = Order(whole=False)  # nobody knows which folders were open here
                continue
            if piece.tail is None:
                rest = None if rest is None else rest + piece.head
                continue
            self._note(snapshot, piece.blamed)
            self._has_hurt(snapshot, piece.hurt)
            if rest is not None:
                self._note(snapshot, self._check_straddling(rest + piece.head, order, first))
                self._has_hurt(snapshot, self._taken_hurt())
            for path, problem in order.join(piece.order):
                self._findings.lost("manifests", path)
                self._note(snapshot, {("manifests", _bad_entry(path, problem)): None})
            first = False
            rest = piece.tail
        if rest:
            cut = "The manifest ends in the middle of a line."
            self._note(snapshot, {(f"snapshot {snapshot.id}", cut): None})

    def _note(self, snapshot: Snapshot, blamed: dict[tuple[str, str], None]) -> None:
        for name, problem in blamed:
            if problem or name not in self._findings.problems:
                self._findings.problem(name, problem or "Chunks of it are damaged.")
            self._findings.affected(name, snapshot.id)

    def _tell(self, hurt: list[_Hurt], blamed: dict[tuple[str, str], None], *, known: bool = False) -> None:
        """Name the files of one line, each once for an object, and note who is to blame for what."""
        for name, path in dict.fromkeys((each.object, each.path) for each in hurt):
            if path is not None and not known:
                self._findings.lost(name, path)
        for each in hurt:
            # A manifest of nothing but malformed lines must not fill memory and report.
            many = each.problem and len(blamed) >= PROBLEMS_MAX
            blamed[each.object, _MORE if many else each.problem] = None

    def _check_straddling(self, line: bytes, order: Order, first: bool) -> dict[tuple[str, str], None]:
        """Such a line is met again in each snapshot that has the same two chunks; its files count once."""
        hurt = self._check_line(line, order, first)
        blamed: dict[tuple[str, str], None] = {}
        if hurt:
            digest = seal.digest(line)
            self._tell(hurt, blamed, known=digest in self._straddling)
            self._straddling.add(digest)
        return blamed

    def _read_piece(self, ref: ChunkRef) -> _Piece | None:
        chunk = bytes.fromhex(ref[0])
        try:
            text = bytes(self._view.get_chunk(chunk))
        except (Corrupt, NotFound, Unavailable):
            self._view.store.stat("format")  # raises when it is the whole store that is away
            self._note_chunk(self.needs.lost, chunk, ref[1])
            return None
        if not self._is_there(ref):
            self.needs.lost.pop(chunk, None)
        head, newline, body = text.partition(b"\n")
        if not newline:
            return _Piece(head, None, {}, Order(whole=False))
        lines, _, tail = body.rpartition(b"\n")
        blamed: dict[tuple[str, str], None] = {}
        order = Order(whole=False)
        for line in lines.split(b"\n"):
            if line and (hurt := self._check_line(line, order)):
                self._tell(hurt, blamed)
        return _Piece(head, tail, blamed, order, self._taken_hurt())

    def _check_line(self, line: bytes, order: Order, first: bool = False) -> list[_Hurt]:
        """`first`: this is the first line of a manifest."""
        try:
            entry = records.parse(line, Entry, "a line of the manifest")
            root = first and is_root(entry)
            problem = entry_problem(entry, root=root) or ("" if root else order.add(entry))
            if problem:
                return [_Hurt("manifests", entry.path, _bad_entry(entry.path, problem))]
            hurt = [each for ref in entry.stored for each in self._look_up(ref, entry.path)]
            if hurt and self._collect:
                self._remember(line, entry)
            return hurt
        except (OutlastError, ValueError) as exc:
            return [_Hurt("manifests", None, f"A manifest is malformed: {exc}")]

    def _look_up(self, ref: ChunkRef, path: str) -> list[_Hurt]:
        """Nothing when a sound copy of the chunk is there, otherwise who is to blame."""
        return [] if self._is_there(ref) else self._missing(ref, path)

    def _is_there(self, ref: ChunkRef) -> bool:
        chunk = bytes.fromhex(ref[0])
        location = self._view.index.get(chunk)
        if location and location.plain_bytes == ref[1] and location.pack.name in self._sound and chunk not in self._bad:
            return True
        if chunk in self.needs.endangered:
            return True
        if self.needs.lost.get(chunk) == ref[1]:
            return False
        bad = self._bad.get(chunk, ())
        copies = [each for each in self._view.index.copies(chunk) if each.plain_bytes == ref[1]]
        copies = [each for each in copies if each.pack.name not in bad]
        if any(each.pack.name in self._sound for each in copies):
            return True
        if any(each.pack.name in self._good or self._can_be_read(chunk, each) for each in copies):
            self._note_chunk(self.needs.endangered, chunk, None)
            return True
        self._note_chunk(self.needs.lost, chunk, ref[1])
        return False

    def _note_chunk(self, known: dict[bytes, T], chunk: bytes, value: T) -> None:
        if self._collect or len(known) < _CHUNKS_MAX:  # without a repair it only saves looking again
            known[chunk] = value

    def _can_be_read(self, chunk: bytes, location: Location) -> bool:
        """Packs that are damaged or condemned promise nothing: what is needed of them is read."""
        name = location.pack.name
        if name in self._gone:
            return False
        try:
            [stored] = self._view.read_pack(name, [(location.offset, location.stored_bytes)])
            self._view.open_chunk(chunk, location, stored)
        except Archived:
            return True  # nothing speaks against it; what is archived was read and verified before
        except Corrupt:
            return False
        except NotFound:
            self._gone.add(name)
            return False
        except Unavailable:
            self._view.store.stat("format")  # raises when it is the whole store that is away
            return False
        return True

    def _missing(self, ref: ChunkRef, path: str | None) -> list[_Hurt]:
        """Whose fault it is that a chunk can't be had. Of packs without footers, each may have held it."""
        copies = self._view.index.copies(bytes.fromhex(ref[0]))
        held = [copy.pack.name for copy in copies if copy.plain_bytes == ref[1]]
        if held:
            name = next((each for each in held if each in self._view.state.packs), held[0])
            return [_Hurt(object_name(name), path, self._problem_of(name))]
        sizes = [copy.plain_bytes for copy in copies if copy.pack.name not in self._suspects]
        if sizes:
            wrong = f"Chunk {ref[0][:16]} is {sizes[0]} bytes long, not {ref[1]}."
            return [_Hurt("manifests", path, wrong)]
        if len(self._suspects) == 1:
            return [_Hurt(object_name(self._suspects[0]), path, self._problem_of(self._suspects[0]))]
        if self._suspects:
            which = "missing" if self._gone.issuperset(self._suspects) else "unreadable"
            some = ", ".join(name[:16] for name in self._suspects[:_SUSPECTS_NAMED])
            more = ", …" if len(self._suspects) > _SUSPECTS_NAMED else ""
            what = f"It held chunks that snapshots need: {some}{more}."
            return [_Hurt(f"one of {len(self._suspects)} {which} packs", path, what)]
        return [_Hurt("packs", path, "Chunks that snapshots need are in no pack of the log.")]

    def _problem_of(self, name: str) -> str:
        if name in self._gone:
            return "It is missing."
        if name in self._view.archived:
            return "It is archived, and nothing beside it tells what it holds: it has to be thawed to be known."
        if name in self._view.state.quarantined:
            return "It is quarantined: damaged, and the only one that held some chunks which snapshots need."
        if name in self._view.state.condemned:
            return "It is condemned, but snapshots need chunks that nothing else holds."
        return ""

    # -- for a repair ----------------------------------------------------------------------------

    def _remember(self, line: bytes, entry: Entry) -> None:
        needs = self.needs
        parts = entry.parts
        for offset, (chunk, _) in chunk_offsets(entry):
            for raw in map(bytes.fromhex, parts.get(chunk, [chunk])):
                places = needs.places.setdefault(raw, []) if raw in needs.lost else None
                if places is not None and len(places) < _PLACES_MAX and (entry.path, offset) not in places:
                    places.append((entry.path, offset))
        digest = seal.digest(line)
        if digest in needs.files or len(needs.files) < HURT_FILES_MAX:
            needs.files.setdefault(digest, HurtFile(entry))
            self._hurt.append(digest)
        else:
            needs.files_left_out += 1

    def _taken_hurt(self) -> list[bytes]:
        taken, self._hurt = self._hurt, []
        return taken

    def _has_hurt(self, snapshot: Snapshot, hurt: list[bytes]) -> None:
        for digest in hurt:
            self.needs.files[digest].snapshots[snapshot.id] = None


def _bad_entry(path: str, problem: str) -> str:
    return f"The entry {path[:200]!r} {problem}; it can't be restored."
