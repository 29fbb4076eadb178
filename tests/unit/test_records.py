"""Records have one byte form, names survive as text, and no changed byte of an object goes unnoticed."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast import records
from outlast.errors import Corrupt
from outlast.records import Entry, LogEntry

ENTRY = LogEntry(7, "ab" * 16, "cd" * 32, "2025-01-01T00:00:00Z", "me@host", "packs", {"packs": [], "é": "\n"})


@given(st.binary(min_size=1).filter(lambda name: b"\0" not in name))
def test_every_file_name_survives_as_text(name: bytes) -> None:
    text = records.path_text(name)
    entry = records.parse(records.canonical(Entry(path=text, type="file")), Entry, "it")
    assert entry.raw_path == name


def test_manifest_order_is_that_of_a_walk() -> None:
    names = [b"a.txt", b"a/b", b"a", b"b", b"a/b/c", b"a-", b"."]
    assert sorted(names, key=records.path_order) == [b".", b"a", b"a/b", b"a/b/c", b"a-", b"a.txt", b"b"]


@given(st.integers(0, 4_000_000_000 * 10**9))
def test_times_sort_as_text(now_ns: int) -> None:
    assert records.time_text(now_ns) <= records.time_text(now_ns + 1000)
    assert len(records.time_text(now_ns)) == 27


def test_an_object_is_a_line_of_json_that_ends_with_its_hash() -> None:
    data = records.canonical_object(ENTRY)
    assert data.count(b"\n") == 1
    fields = json.loads(data)
    assert list(fields)[-1] == "hash"
    assert fields["kind"] == "packs"
    assert records.parse_object(data, LogEntry, "it") == ENTRY


def test_every_changed_byte_of_an_object_is_noticed() -> None:
    data = records.canonical_object(ENTRY)
    for at in range(len(data)):
        for flip in (1, 0x20, 0x80):
            damaged = bytearray(data)
            damaged[at] ^= flip
            with pytest.raises(Corrupt, match="entry 7"):
                records.parse_object(bytes(damaged), LogEntry, "entry 7")
    for length in range(len(data)):
        with pytest.raises(Corrupt, match="entry 7"):
            records.parse_object(data[:length], LogEntry, "entry 7")
    with pytest.raises(Corrupt):
        records.parse_object(data + b" ", LogEntry, "entry 7")


def test_fields_of_later_versions_are_let_through() -> None:
    class Later(msgspec.Struct):
        seq: int
        write_id: str
        prev_hash: str
        time: str
        actor: str
        kind: str
        body: dict[str, str]
        added_in_a_later_version: int

    later = Later(1, "", "", "", "", "new", {}, 5)
    assert records.parse_object(records.canonical_object(later), LogEntry, "it").kind == "new"


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b'{"path":1,"type":"file"}', b'{"path":"a","type":"socket"}', b"\xff", b"[" * 100_000],
)
def test_what_does_not_fit_is_corrupt_and_named(data: bytes) -> None:
    with pytest.raises(Corrupt, match="the line"):
        records.parse(data, Entry, "the line")
