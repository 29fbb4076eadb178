"""Every parser against mutated and random bytes: what is wrong is `Corrupt`, soon, and in little memory.

Objects carry hashes, so most mutations would be stopped at the door. Here they are sealed anew after
the mutation, as somebody would who writes to the store: what lies behind the door is what is tried.
OUTLAST_FUZZ=n tries n times as many, other ones each time; a failure prints how to have it again.
"""

from __future__ import annotations

import os
import re
import signal
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_formats_hostile import examine, samples

from outlast import records
from outlast.backup import inspect
from outlast.clock import ManualClock
from outlast.errors import Corrupt, Refused, WrongKey
from outlast.events import NULL_SINK
from outlast.records import Chunking, Encryption, Entry, Format, LogEntry, PackRef, Snapshot
from outlast.repo import codec, form, index, keyring, manifest, needs, pack, seal
from outlast.repo.index import Index
from outlast.repo.log import Log, entry_name, state_name
from outlast.repo.pack import EncodedChunk, Footer
from outlast.repo.references import Findings, References
from outlast.repo.repository import Repository
from outlast.repo.state import Condemned, State
from outlast.repo.usage import Usage
from outlast.store.memory import MemoryStore

TIMES = int(os.environ.get("OUTLAST_FUZZ", "1"))
MEMORY_BYTES_MAX = 64 << 20
HANG_SECONDS = 30
KEYS = seal.new_keys(b"r" * 16, bytes(range(64)))
ANCHOR = "f0" * 32
TIME = "2025-01-01T00:00:00.000000Z"

EXTREMES = [0, 1, 0x7F, 0xFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
VALUES = [b"-1", b"0", b"1.5", b"1e400", b"1" * 400, b"9223372036854775808", b"18446744073709551616", b"null", b"true",
          b'""', b'"\\ud800"', b'"\\u0000"', b'"%00"', b'"%"', b'"%ff/%2e%2e"', b'"zz"', b'"' + b"A" * 64 + b'"', b"[]",
          b"{}", b"[[]]", b"[" * 2000, b'{"a":' * 2000]  # fmt: skip
VALUE = re.compile(rb'"[^"]*"|-?\d+|\[\]|\{\}|null|true|false')


def fuzzed(examples: int, **arguments: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`given`, with as many examples as were asked for."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        limits = settings(
            max_examples=examples * TIMES,
            deadline=None,
            derandomize=TIMES == 1,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        )
        return limits(given(**arguments)(test))

    return decorate


@contextmanager
def bounded(content: bytes) -> Iterator[None]:
    """Ends what hangs, and measures the memory."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"{len(content)} bytes took more than {HANG_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG_SECONDS)
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MEMORY_BYTES_MAX + len(content)
    finally:
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


place = st.integers(0, 2**20)
edits = st.one_of(
    st.tuples(st.just("flip"), place, st.integers(1, 255)),
    st.tuples(st.just("cut"), place, st.integers(1, 64)),
    st.tuples(st.just("end"), place, st.just(0)),
    st.tuples(st.just("insert"), place, st.binary(min_size=1, max_size=12)),
    st.tuples(st.just("repeat"), place, st.tuples(st.integers(1, 200), st.integers(1, 50))),
    st.tuples(st.just("integer"), place, st.tuples(st.sampled_from(["<I", "<Q"]), st.sampled_from(EXTREMES))),
)
values = st.tuples(st.just("value"), place, st.sampled_from(VALUES))


def edited(content: bytes, edit: tuple[str, int, Any]) -> bytes:
    what, where, how = edit
    at = where % (len(content) + 1)
    head, tail = content[:at], content[at:]
    match what:
        case "flip":
            return head + bytes([tail[0] ^ how]) + tail[1:] if tail else content
        case "cut":
            return head + tail[how:]
        case "end":
            return head
        case "insert":
            return head + how + tail
        case "repeat":
            return head + tail[: how[0]] * how[1] + tail
        case "integer":
            form, number = how
            packed = struct.pack(form, number & (2 ** (8 * struct.calcsize(form)) - 1))
            return (head + packed + tail[len(packed) :])[: len(content)]
    found = list(VALUE.finditer(content))  # a value of JSON
    if not found:
        return content
    chosen = found[where % len(found)]
    return content[: chosen.start()] + how + content[chosen.end() :]


def mutated(*valid: bytes, text: bool = False) -> st.SearchStrategy[bytes]:
    """One of these, changed in up to four places, or noise. With `text` mostly values of JSON are changed."""

    def apply(content: bytes, changes: list[tuple[str, int, Any]]) -> bytes:
        for change in changes:
            content = edited(content, change)
        return content

    change = values | values | edits if text else edits
    changed = st.builds(apply, st.sampled_from(valid), st.lists(change, min_size=1, max_size=4))
    return st.one_of(changed, changed, changed, st.binary(max_size=400))


def sealed_line(line: bytes) -> bytes:
    """A JSON object without its hash, as an object of its own."""
    body = line.rstrip(b"\n").removesuffix(b"}")
    return body + b',"hash":"' + seal.digest(body).hex().encode() + b'"}\n'


# -- samples -------------------------------------------------------------------------------------


def built_pack(keys: seal.Keys | None) -> bytes:
    plains = [b"", b"abc", bytes(70_000), b"\1" * 66_000]
    chunks = [EncodedChunk(seal.chunk_id(plain, keys), codec.RAW, len(plain), plain) for plain in plains]
    return b"".join(pack.build(chunks, keys, b"s" * 32).parts)


PACK = built_pack(None)
PACK_FOOTER_BYTES = 4 * pack.RECORD.itemsize + pack.TRAILER.size


def footer(salt: bytes) -> Footer:
    chunks = [EncodedChunk(seal.digest(salt + b"%d" % each), codec.RAW, 3, b"abc") for each in range(5)]
    return pack.build(chunks, None, salt).footer


FOOTERS = [footer(b"%032d" % number) for number in range(3)]
REFS = [PackRef(each.name, 1000, 5) for each in FOOTERS]
CHUNK = seal.digest(b"x").hex()
SNAPSHOT = Snapshot("ab" * 16, "backup", "d", TIME, [(CHUNK, 900)], {"run": "1"}, "h", ["/d"], "cd" * 16, 3, 900, 9, 9)
BODIES: dict[str, dict[str, Any]] = {
    "snapshot": {"snapshot": records.msgspec.to_builtins(SNAPSHOT), "packs": records.msgspec.to_builtins(REFS)},
    "packs": {"packs": records.msgspec.to_builtins(REFS)},
    "forget": {"snapshots": [SNAPSHOT.id]},
    "condemn": {"packs": records.msgspec.to_builtins(REFS[:1])},
    "sweep": {"packs": [REFS[1].name]},
    "quarantine": {"packs": [REFS[0].name], "objects": ["index/ab"]},
    "verified": {"packs": [REFS[0].name]},
    "key": {"action": "rotate", "slot": "ee" * 16, "label": "l", "epoch": 1, "replaces": ["dd" * 16]},
    "later": {"what": None},
}
LOG_LINES = [
    records.canonical(LogEntry(7, "00" * 16, "11" * 32, TIME, "me@h", kind, body)) for kind, body in BODIES.items()
]
STATE = State(
    7,
    "22" * 32,
    {SNAPSHOT.id: SNAPSHOT},
    {REFS[0].name: REFS[0]},
    {REFS[1].name: Condemned(REFS[1].name, 1000, 5, 3)},
    {REFS[2].name: REFS[2]},
    ["index/ab"],
    {REFS[0].name: TIME},
    slots={"ee" * 16: 1},
)
FORMAT = Format("outlast repository", 1, "72" * 16, TIME, [], Chunking(), "auto", 64 << 20, Encryption(), 30)
ENTRIES = [
    Entry(".", "dir", mode=0o755),
    Entry("a%25", "dir", mode=0o755, uid=1000, gid=100, mtime_ns=10**18),
    Entry("a%25/f", "file", size=10_000, chunks=[(CHUNK, 4000), (CHUNK, 1000)], holes=[(4000, 5000)], inode=5),
    Entry("a%25/g", "file", size=7, chunks=[(CHUNK, 7)], unstable=True),
    Entry("a%25/h", "hardlink", target="a%25/f"),
    Entry("a%25/s", "file", size=8, chunks=[("22" * 32, 8)], sums=[(0, 4, [CHUNK, "33" * 32])]),
    Entry("l", "symlink", target="../x%FF"),
    Entry("p", "fifo"),
    Entry("u", "unreadable", reason="EACCES"),
]
MANIFEST = b"".join(records.canonical(each) + b"\n" for each in ENTRIES)


# -- packs and index -----------------------------------------------------------------------------


@fuzzed(400, content=mutated(PACK[-PACK_FOOTER_BYTES:]), size=st.sampled_from([0, len(PACK), 2**40]))
def test_footers(content: bytes, size: int) -> None:
    with bounded(content), suppress(Corrupt):
        pack.footer_bytes(content, "ab" * 32, size)
        pack.parse_footer(content, "ab" * 32, size)


@fuzzed(
    500,
    table=mutated(PACK[-PACK_FOOTER_BYTES : -pack.TRAILER.size]),
    header=mutated(PACK[:64]),
    count=st.sampled_from([None, *EXTREMES[:7]]),
    changes=st.booleans(),
)
def test_footers_with_a_right_hash(table: bytes, header: bytes, count: int | None, changes: bool) -> None:
    header = header[:64].ljust(64, b"\0") if changes else PACK[:64]
    at = len(PACK) - PACK_FOOTER_BYTES
    numbers = (len(table) // pack.RECORD.itemsize if count is None else count, 0, at)
    hashed = seal.digest(table + header + struct.pack("<IIQ", *numbers))
    content = table + pack.TRAILER.pack(header, *numbers, hashed, b"OUTLFOOT")
    with bounded(content), suppress(Corrupt):
        found = pack.parse_footer(content, hashed.hex(), at + len(content))
        assert all(
            64 <= offset <= at and offset + length <= at for offset, length in pack.gaps(found, at + len(content))
        )
        for start, rows in pack.runs(found.records):
            end = int(rows[-1]["offset"] + rows[-1]["stored"])
            assert 64 <= start <= end <= at
            pack.are_right(memoryview(PACK)[start:end], start, rows)
        known = Index()
        known.add([found])
        known.sort()
        assert [known.get(row["id"].tobytes()) is not None for row in found.records] == [True] * len(found.records)


SEGMENT = index.build_segment(FOOTERS)


@fuzzed(600, content=mutated(SEGMENT) | mutated(SEGMENT, text=True), keyed=st.booleans())
def test_index_segments(content: bytes, keyed: bool) -> None:
    keys = KEYS if keyed else None
    with bounded(content), suppress(Corrupt):
        name = index.segment_name(content, keys)
        packs, rows = index.read_segment(content, name, keys)
        known = Index()
        known.add_segment(content, name, keys)
        known.add_segment(content, name, keys)
        known.sort()
        for row in rows:
            found = known.get(row["id"].tobytes())
            assert found is None or found.pack in packs
        usage = Usage(known)
        usage.mark(rows["id"].tobytes())
        assert sum(each.used_chunks for each in usage.packs().values()) <= len(rows)


# -- objects of one line -------------------------------------------------------------------------


def log_of(store: MemoryStore, keys: seal.Keys | None) -> Log:
    return Log(store, keys, ANCHOR, ManualClock(1), NULL_SINK)


@fuzzed(700, line=mutated(*LOG_LINES, text=True), encrypted=st.booleans(), whole=st.booleans())
def test_log_entries(line: bytes, encrypted: bool, whole: bool) -> None:
    content = sealed_line(line) if whole else line
    if encrypted and whole:
        content = seal.seal_object(KEYS, entry_name(7), content, b"s" * 32)
    with bounded(content), suppress(Corrupt, WrongKey):
        keys = seal.new_keys(b"r" * 16, bytes(range(64))) if encrypted else None
        entry = log_of(MemoryStore(), keys).parse(content, 7)
        state = State(6, "11" * 32, {SNAPSHOT.id: SNAPSHOT}, {REFS[0].name: REFS[0]})
        state.apply(entry, "33" * 32)
        records.parse_object(records.canonical_object(state), State, "what comes of it")


@fuzzed(400, content=mutated(seal.seal_object(KEYS, entry_name(7), sealed_line(LOG_LINES[0]), b"s" * 32)))
def test_sealed_objects(content: bytes) -> None:
    with bounded(content), suppress(Corrupt, WrongKey):
        log_of(MemoryStore(), KEYS).parse(content, 7)


@fuzzed(600, line=mutated(records.canonical(STATE), text=True), whole=st.booleans())
def test_states(line: bytes, whole: bool) -> None:
    content = sealed_line(line) if whole else line
    store = MemoryStore()
    store.put(entry_name(7), [b"the entry"])
    store.put(state_name(7), [content.replace(b"22" * 32, seal.digest(b"the entry").hex().encode())])
    with bounded(content), suppress(Corrupt):
        state = log_of(store, None).read_state(state_name(7))
        state.readable_packs()
        for line in LOG_LINES:
            state.apply(records.parse(line, LogEntry, "it"), "")


@fuzzed(500, line=mutated(records.canonical(FORMAT), text=True), whole=st.booleans())
def test_formats(line: bytes, whole: bool) -> None:
    content = sealed_line(line) if whole else line
    with bounded(content), suppress(Corrupt, Refused):
        found = form.parse_format(content, "the store")
        form.check_sizes(found)


@pytest.fixture(scope="module")
def cheap_keys() -> Iterator[bytes]:
    """A key slot, where a mutated one can't ask for a gigabyte, which the format allows."""
    with pytest.MonkeyPatch.context() as patch:
        for name, limit in (("ARGON2_MEMORY_KIB", 32), ("ARGON2_ITERATIONS", 1), ("ARGON2_LANES", 1)):
            patch.setattr(seal, name, limit)
        patch.setattr(seal, "_ARGON2_MEMORY_KIB_MAX", 64)
        patch.setattr(seal, "_ARGON2_WORK_MAX", 2)
        yield records.canonical(seal.wrap_keys(KEYS, b"word", b"s" * 32, TIME, "label"))


SLOT = seal.KeySlot(1, TIME, "argon2id", 32, 1, 1, "73" * 32, "00" * 300, "label")


@fuzzed(400, line=mutated(records.canonical(SLOT), text=True), whole=st.booleans(), real=st.booleans())
def test_key_slots(cheap_keys: bytes, line: bytes, whole: bool, real: bool) -> None:
    if real:
        wrapped = re.search(rb'"wrapped":"([0-9a-f]+)"', cheap_keys)
        assert wrapped
        line = line.replace(b"00" * 300, wrapped[1])
    content = sealed_line(line) if whole else line
    store = MemoryStore()
    store.put("keys/ab", [content])
    with bounded(content), suppress(Corrupt):
        slot = keyring.read_slot(store, store.stat("keys/ab"))
        assert seal.unwrap_keys(slot, b"wrong") is None
        found = seal.unwrap_keys(slot, b"word")
        assert found is None or found.epochs == KEYS.epochs


# -- manifests -----------------------------------------------------------------------------------


class Given(Repository):
    """A repository whose chunks are these, and whose other chunks are nowhere."""

    def __init__(self, chunks: dict[bytes, bytes]) -> None:
        store = MemoryStore()
        store.put("format", [b"there"])
        super().__init__(store, FORMAT, None, ANCHOR, ManualClock(1), NULL_SINK)
        self.chunks = chunks

    def get_chunk(self, chunk: bytes) -> bytes:
        if chunk not in self.chunks:
            raise Corrupt(f"chunk {chunk.hex()} is nowhere.")
        return self.chunks[chunk]

    def fetch(self, chunks: Any, deliver: Any, failed: Any = None) -> Any:
        for chunk in set(chunks):
            try:
                deliver(chunk, self.get_chunk(chunk))
            except Corrupt as exc:
                if failed is None:
                    raise
                failed(chunk, exc)


def given_manifest(content: bytes, cuts: list[int]) -> tuple[Given, Snapshot]:
    """The manifest as several chunks."""
    edges = [0, *sorted(cut % (len(content) + 1) for cut in cuts), len(content)]
    pieces = [content[start:end] for start, end in pairwise(edges)]
    chunks = {seal.digest(piece): piece for piece in pieces}
    refs = [(seal.digest(piece).hex(), len(piece)) for piece in pieces]
    snapshot = Snapshot("ab" * 16, "backup", "d", TIME, refs)
    repository = Given(chunks)
    repository.state.snapshots[snapshot.id] = snapshot
    return repository, snapshot


@fuzzed(500, content=mutated(MANIFEST, text=True) | mutated(MANIFEST), cuts=st.lists(place, max_size=3))
def test_manifests(content: bytes, cuts: list[int]) -> None:
    repository, snapshot = given_manifest(content, cuts)
    with bounded(content), suppress(Corrupt):
        for raw, entry in manifest.validated(repository.entries(snapshot), snapshot.id):
            assert manifest.is_safe(raw) or raw == b"."
            assert b".." not in raw.split(b"/")
            spans = list(manifest.chunk_spans(entry))
            if entry.type == "file":
                assert all(0 <= start < start + length <= entry.size for start, length in spans)


@fuzzed(500, content=mutated(MANIFEST, text=True) | mutated(MANIFEST), cuts=st.lists(place, max_size=3))
@example(content=b'{"path":' + b"[" * 2000 + b"\n", cuts=[])
def test_what_manifests_need(content: bytes, cuts: list[int]) -> None:
    repository, snapshot = given_manifest(content, cuts)
    taken = bytearray()
    with bounded(content), suppress(Corrupt):
        needs.needed_chunks(repository, [snapshot], taken.extend)
        entries = [entry for _, entry in manifest.validated(repository.entries(snapshot), snapshot.id)]
        refs = [*snapshot.manifest, *(ref for entry in entries for ref in entry.stored)]
        expected = {bytes.fromhex(chunk) for chunk, _ in refs}
        assert expected == {bytes(taken[at : at + 32]) for at in range(0, len(taken), 32)}


@fuzzed(500, content=mutated(MANIFEST, text=True) | mutated(MANIFEST), cuts=st.lists(place, max_size=3))
def test_a_check_of_manifests_ends(content: bytes, cuts: list[int]) -> None:
    """Whatever stands in it, the check goes on to its end, and nothing malformed passes for sound."""
    repository, snapshot = given_manifest(content, cuts)
    findings = Findings()
    with bounded(content):
        References(repository, findings, sound=set(), good=set(), bad={}, collect=True).walk()
        try:
            entries = [entry for _, entry in manifest.validated(repository.entries(snapshot), snapshot.id)]
        except Corrupt:
            assert findings.problems
        else:
            assert bool(findings.problems) == any(entry.chunks for entry in entries)


@fuzzed(300, content=mutated(MANIFEST, text=True) | mutated(MANIFEST), model=st.booleans())
def test_looking_into_manifests(content: bytes, model: bool) -> None:
    """Showing and comparing takes entries as they are: nothing is written by them."""
    repository, snapshot = given_manifest(content, [])
    _, other = given_manifest(MANIFEST, [])
    repository.chunks[bytes.fromhex(other.manifest[0][0])] = MANIFEST
    if model:
        repository.chunks[bytes.fromhex(CHUNK)] = samples()["gguf"][:4000].ljust(4000, b"\0")
    with bounded(content), suppress(Corrupt):
        assert all(view.tensors is None or view.format for view in inspect.show(repository, snapshot))
    with bounded(content), suppress(Corrupt):
        inspect.diff(repository, snapshot, other)


@fuzzed(400, line=mutated(LOG_LINES[0], text=True))
def test_snapshots_of_log_entries(line: bytes) -> None:
    """What an entry says of its snapshot's manifest is no better than the entry is."""
    repository = Given({bytes.fromhex(CHUNK): MANIFEST})
    with bounded(line), suppress(Corrupt):
        repository.state.apply(records.parse(line, LogEntry, "it"), "")
    for snapshot in repository.snapshots():
        with bounded(line), suppress(Corrupt):
            list(repository.entries(snapshot))
        with bounded(line), suppress(Corrupt):
            needs.needed_chunks(repository, [snapshot], bytearray().extend)


@fuzzed(
    500,
    path=st.text() | st.binary().map(records.path_text) | st.text("./%20afz\0", max_size=12),
    target=st.text("./%20afz\0", max_size=12),
    kind=st.sampled_from(["file", "dir", "symlink", "hardlink", "fifo", "unreadable"]),
    numbers=st.lists(st.sampled_from([*EXTREMES, -1, -(2**63), 10**30]), min_size=7, max_size=7),
    holes=st.lists(st.tuples(st.integers(-5, 9), st.integers(-5, 9)), max_size=4),
    lengths=st.lists(st.integers(-2, 9), max_size=4),
    sums=st.lists(st.tuples(st.integers(-2, 5), st.integers(-1, 9), st.lists(st.sampled_from([CHUNK, "x"])))),
)
def test_entries(
    path: str,
    target: str,
    kind: Any,
    numbers: list[int],
    holes: list[tuple[int, int]],
    lengths: list[int],
    sums: list[tuple[int, int, list[str]]],
) -> None:
    mode, uid, gid, mtime, ctime, inode, size = numbers
    chunks = [(CHUNK, length) for length in lengths]
    if size == 1:
        size = sum(lengths) + sum(length for _, length in holes)
    entry = Entry(path, kind, mode, uid, gid, mtime, size, ctime, inode, target, chunks, holes, sums)
    with bounded(b""):
        if not manifest.entry_problem(entry) and kind == "file":
            places = [*manifest.chunk_spans(entry), *entry.holes]
            assert sum(length for _, length in places) == entry.size
            assert all(0 <= number < len(chunks) and len(parts) >= 2 for number, _, parts in sums)
            assert sorted(start for start, _ in places) == sorted({start for start, _ in places})
        manifest.Order().add(entry)
        assert len(entry.stored) >= len(chunks) or any(not parts for _, _, parts in sums)


# -- model files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["torch", "distcp", "safetensors", "gguf", "npy"])
def test_model_files(kind: str) -> None:
    valid = samples()[kind]
    text = kind == "safetensors"

    @fuzzed(150, content=mutated(valid, text=text) | mutated(valid))
    def run(content: bytes) -> None:
        with bounded(content):
            examine(content)

    run()
