"""The index finds what was put in and nothing else, however it was put in, and refuses damaged segments."""

from __future__ import annotations

import struct
import threading

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from outlast.errors import Corrupt
from outlast.repo import codec, pack, seal
from outlast.repo.index import Index, build_segment, segment_name
from outlast.repo.pack import EncodedChunk, Footer

KEYS = seal.new_keys(b"r" * 16, bytes(range(64)))


def chunk_name(number: int) -> bytes:
    """Ids of which many share their first 4 bytes, by which the index sorts, and many their first 8."""
    return struct.pack(">II", number % 3 * 2**30, number % 2) + bytes(20) + struct.pack(">I", number)


def footer(salt: int, numbers: list[int]) -> Footer:
    chunks = [EncodedChunk(chunk_name(number), codec.RAW, number, bytes(number)) for number in numbers]
    return pack.build(chunks, None, salt.to_bytes(32, "big")).footer


footers = st.lists(st.lists(st.integers(0, 40), max_size=12, unique=True), max_size=6).map(
    lambda packs: [footer(salt, numbers) for salt, numbers in enumerate(packs)]
)


def expected_places(parts: list[Footer]) -> dict[bytes, set[tuple[str, int]]]:
    places: dict[bytes, set[tuple[str, int]]] = {}
    for part in parts:
        for row in part.records:
            places.setdefault(row["id"].tobytes(), set()).add((part.name, int(row["offset"])))
    return places


def assert_holds(index: Index, parts: list[Footer]) -> None:
    places = expected_places(parts)
    for number in range(45):
        chunk = chunk_name(number)
        found = {(copy.pack.name, copy.offset) for copy in index.copies(chunk)}
        assert found == places.get(chunk, set())
        location = index.get(chunk)
        if location is None:
            assert not found
        else:
            assert (location.pack.name, location.offset) in found
            assert (location.plain_bytes, location.stored_bytes) == (number, number)


@given(parts=footers, ways=st.lists(st.sampled_from(["footer", "segment", "recent"]), min_size=6, max_size=6))
@settings(max_examples=150, deadline=None)
def test_every_chunk_is_found_whatever_way_it_came(parts: list[Footer], ways: list[str]) -> None:
    index = Index()
    for part, way in zip(parts, ways, strict=False):
        if way == "footer":
            index.add([part])
        elif way == "segment":
            data = build_segment([part])
            index.add_segment(data, segment_name(data, None), None)
    index.sort()
    recent = [part for part, way in zip(parts, ways, strict=False) if way == "recent"]
    if len(expected_places(recent)) == sum(len(part.records) for part in recent):
        for part in recent:
            index.add_recent(part)
        assert_holds(index, parts)
    else:
        # Of its own packs a process keeps one copy of a chunk in mind; that is enough to find it.
        for part in recent:
            index.add_recent(part)
        assert all(index.get(chunk) for chunk in expected_places(parts))


@given(parts=footers, twice=footers)
@settings(max_examples=60, deadline=None)
def test_segments_that_overlap_add_nothing_twice(parts: list[Footer], twice: list[Footer]) -> None:
    index = Index()
    for group in (parts, parts[1:], parts[::-1]):
        data = build_segment(group)
        index.add_segment(data, segment_name(data, None), None)
    index.add(parts)
    index.sort()
    assert len(index) == sum(len(part.records) for part in {part.name: part for part in parts}.values())
    assert_holds(index, list({part.name: part for part in parts}.values()))


class Model:
    """What an index knows: packs in the order in which they came."""

    def __init__(self) -> None:
        self.known: dict[str, Footer] = {}
        self.forgotten: set[str] = set()

    def add(self, parts: list[Footer], wanted: set[str] | None = None) -> None:
        for part in parts:
            if part.name not in self.forgotten and (wanted is None or part.name in wanted):
                self.known.setdefault(part.name, part)

    def forget(self, names: set[str]) -> None:
        self.forgotten |= names
        self.known = {name: part for name, part in self.known.items() if name not in names}

    def copies(self, chunk: bytes) -> list[tuple[str, int]]:
        found = [
            (name, int(row["offset"]))
            for name, part in self.known.items()
            for row in part.records
            if row["id"].tobytes() == chunk
        ]
        return found[::-1]


PARTS = [footer(salt, [*range(salt, 40, 2 + salt % 3), 41 + salt]) for salt in range(6)]
some_parts = st.lists(st.sampled_from(PARTS), unique_by=lambda part: part.name)
steps = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["add", "recent", "forget"]), some_parts, st.none()),
        st.tuples(st.just("segment"), some_parts, st.none() | st.sets(st.sampled_from([part.name for part in PARTS]))),
    ),
    max_size=8,
)


@example(steps=[("recent", PARTS[:1], None), ("segment", PARTS[1:2], None)])
@given(steps=steps)
@settings(max_examples=150, deadline=None)
def test_the_index_knows_what_a_dict_would(steps: list[tuple[str, list[Footer], set[str] | None]]) -> None:
    index, model = Index(), Model()
    for kind, parts, wanted in steps:
        if kind == "forget":
            index.forget_packs({part.name for part in parts})
            model.forget({part.name for part in parts})
            continue
        model.add(parts, wanted)
        if kind == "add":
            index.add(parts)
            index.sort()
        elif kind == "segment":
            data = build_segment(parts)
            index.add_segment(data, segment_name(data, None), None, wanted)
            index.sort()
        else:
            for part in parts:
                index.add_recent(part)
        for number in range(48):
            location, expected = index.get(chunk_name(number)), model.copies(chunk_name(number))
            assert (location is None) == (not expected)
            assert location is None or (location.pack.name, location.offset) in expected
    index.sort()
    assert index.packs == set(model.known)
    assert len(index) == sum(len(part.records) for part in model.known.values())
    for number in range(48):
        found = [(copy.pack.name, copy.offset) for copy in index.copies(chunk_name(number))]
        assert found == model.copies(chunk_name(number))


def random_footer(salt: int, count: int) -> Footer:
    rows = np.zeros(count, pack.RECORD)
    rows["id"] = np.frombuffer(np.random.default_rng(salt).bytes(32 * count), "V32")
    rows["offset"] = np.arange(count) * 100 + 64
    rows["stored"] = rows["plain"] = 100
    return Footer(salt.to_bytes(32, "big").hex(), 0, False, bytes(32), rows)


@pytest.mark.parametrize("recent", [False, True])
def test_many_chunks_of_one_process_are_all_found(recent: bool) -> None:
    index, parts = Index(), [random_footer(salt, 30_000) for salt in range(5)]
    for part in parts:
        if recent:
            index.add_recent(part)
        else:
            index.add([part])
    if not recent:
        index.sort()
    assert len(index) == 150_000
    for part in parts:
        for row in (0, 1, 17_000, 29_999):
            location = index.get(part.records["id"][row].tobytes())
            assert location is not None
            assert (location.pack.name, location.offset) == (part.name, row * 100 + 64)
    assert index.get(bytes(32)) is None
    assert index.get(b"\xff" * 32) is None


def test_what_is_known_is_found_while_others_are_added() -> None:
    index, first = Index(), random_footer(0, 500)
    index.add([first])
    index.sort()
    chunks = [row.tobytes() for row in first.records["id"]]
    missed: list[bytes] = []
    ended = threading.Event()

    def look_up() -> None:
        while not ended.is_set():
            missed.extend(chunk for chunk in chunks if index.get(chunk) is None)

    threads = [threading.Thread(target=look_up) for _ in range(2)]
    for thread in threads:
        thread.start()
    for salt in range(1, 60, 3):
        index.add_recent(random_footer(salt, 200))
        data = build_segment([random_footer(salt + 1, 200), first])
        index.add_segment(data, segment_name(data, None), None)
        index.sort()
        index.add([random_footer(salt + 2, 200)])
        index.forget_packs({random_footer(salt, 1).name})
    ended.set()
    for thread in threads:
        thread.join()
    assert not missed


def test_the_last_copy_counts() -> None:
    index, old, new = Index(), footer(1, [5, 6]), footer(2, [6])
    index.add([old, new])
    index.sort()
    location = index.get(chunk_name(6))
    assert location is not None
    assert location.pack.name == new.name


@pytest.mark.parametrize("keys", [None, KEYS], ids=["plain", "keyed"])
def test_every_changed_byte_of_a_segment_is_noticed_and_changes_nothing(keys: seal.Keys | None) -> None:
    data = build_segment([footer(1, [1, 2])])
    name = segment_name(data, keys)
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1
        index = Index()
        with pytest.raises(Corrupt):
            index.add_segment(bytes(damaged), name, keys)
        assert (len(index), index.packs) == (0, set())
    for length in range(len(data)):
        with pytest.raises(Corrupt):
            Index().add_segment(data[:length], name, keys)


def test_a_segment_of_somebody_without_the_keys_is_refused() -> None:
    data = build_segment([footer(1, [1, 2])])
    with pytest.raises(Corrupt):
        Index().add_segment(data, segment_name(data, None), KEYS)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"OUTLINDX",
        struct.pack("<8sII", b"OUTLINDX", 1, 2**32 - 1),
        struct.pack("<8sII", b"OUTLINDX", 2, 0),
        struct.pack("<8sII", b"OUTLINDX", 1, 2) + b"{}",
        struct.pack("<8sII", b"OUTLINDX", 1, 33) + b'{"packs":[],"records":4294967295} ',
        struct.pack("<8sII", b"OUTLINDX", 1, 24) + b'{"packs":[],"records":1}' + bytes(56),
    ],
)
def test_malformed_segments_are_refused_even_with_a_right_name(data: bytes) -> None:
    with pytest.raises(Corrupt):
        Index().add_segment(data, segment_name(data, None), None)
