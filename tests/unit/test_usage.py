"""Counting what is needed gives what counting by hand gives: each needed chunk is used once, in the right pack."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.repo.index import Index, build_segment, segment_name
from outlast.repo.pack import RECORD, Footer
from outlast.repo.usage import PackUsage, Usage


def chunk_name(number: int) -> bytes:
    """Ids of which many share their first 4 bytes, and many their first 8."""
    return struct.pack(">II", number % 3 * 2**30, number % 2) + bytes(20) + struct.pack(">I", number)


def footer(salt: int, chunks: list[tuple[bytes, int]]) -> Footer:
    """A pack of these chunks with their stored bytes."""
    rows = np.zeros(len(chunks), RECORD)
    rows["id"] = np.frombuffer(b"".join(chunk for chunk, _ in chunks), "V32")
    rows["stored"] = rows["plain"] = [stored for _, stored in chunks]
    rows["offset"] = 64 + np.cumsum([0, *(stored for _, stored in chunks)])[:-1]
    # Names in another order than that in which the packs are added.
    return Footer((salt * 37 % 101).to_bytes(32, "big").hex(), 0, False, bytes(32), rows)


footers = st.lists(st.dictionaries(st.integers(0, 25), st.integers(1, 4), max_size=12), min_size=1, max_size=6).map(
    lambda packs: [
        footer(salt, [(chunk_name(number), stored) for number, stored in chunks.items()])
        for salt, chunks in enumerate(packs)
    ]
)


class Counted:
    """By hand: where each needed chunk is used, and what each pack holds."""

    def __init__(self, parts: list[Footer], needed: set[bytes], distrust: dict[str, int]) -> None:
        rows = [
            (part.name, row["id"].tobytes(), int(row["offset"]), int(row["stored"]))
            for part in parts
            for row in part.records
        ]
        needed_bytes = {
            part.name: sum(row[3] for row in rows if row[0] == part.name and row[1] in needed) for part in parts
        }
        self.holder: dict[bytes, tuple[str, int]] = {}
        for chunk in needed:
            copies = [(name, offset) for name, found, offset, _ in rows if found == chunk]
            if copies:
                self.holder[chunk] = min(
                    copies, key=lambda copy: (distrust.get(copy[0], 0), -needed_bytes[copy[0]], copy[0])
                )
        self.packs: dict[str, PackUsage] = {}
        self.spares: set[tuple[str, bytes]] = set()
        for part in parts:
            own = [row for row in rows if row[0] == part.name]
            used = [row for row in own if self.holder.get(row[1]) == (row[0], row[2])]
            spare = [row for row in own if row[1] in needed and row not in used]
            self.spares |= {(row[0], row[1]) for row in spare}
            sums = [number for group in (own, used, spare) for number in (len(group), sum(row[3] for row in group))]
            self.packs[part.name] = PackUsage(*sums)


@given(
    parts=footers,
    marks=st.lists(st.lists(st.integers(0, 30)), max_size=3),
    distrust=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    segments=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_usage_is_what_one_counts_by_hand(
    parts: list[Footer], marks: list[list[int]], distrust: list[int], segments: bool
) -> None:
    index = Index()
    if segments:
        for group in (parts[:3], parts):
            data = build_segment(group)
            index.add_segment(data, segment_name(data, None), None)
    else:
        index.add(parts)
    levels = {part.name: level for part, level in zip(parts, distrust, strict=False)}
    usage = Usage(
        index,
        {name for name, level in levels.items() if level},
        {name for name, level in levels.items() if level == 2},
    )
    needed: set[bytes] = set()
    known = {row.tobytes() for part in parts for row in part.records["id"]}
    counted = Counted(parts, needed, levels)
    assert usage.packs() == counted.packs
    for numbers in marks:
        ids = [chunk_name(number) for number in numbers]
        assert usage.mark(b"".join(ids)) == list(dict.fromkeys(chunk for chunk in ids if chunk not in known))
        needed.update(ids)
        counted = Counted(parts, needed, levels)
        assert usage.packs() == counted.packs
    for part in parts:
        used = [(chunk, location.pack.name, location.offset) for chunk, location in usage.used(part.name)]
        own = [(chunk, *place) for chunk, place in counted.holder.items() if place[0] == part.name]
        assert used == sorted(own, key=lambda row: row[2])
    chosen = {part.name for part in parts[::2]}
    spares = usage.spares(chosen)
    assert {(name, chunk) for name, chunk, _ in spares} == {spare for spare in counted.spares if spare[0] in chosen}
    assert len(spares) == len({(name, chunk) for name, chunk, _ in spares})
    assert all((kept.pack.name, kept.offset) == counted.holder[chunk] for _, chunk, kept in spares)


def test_forgotten_and_unknown_packs_hold_nothing() -> None:
    index, old, new = Index(), footer(1, [(chunk_name(1), 5)]), footer(2, [(chunk_name(1), 5), (chunk_name(2), 7)])
    index.add([old, new])
    index.forget_packs({new.name})
    usage = Usage(index)
    assert usage.mark(chunk_name(1) + chunk_name(2)) == [chunk_name(2)]
    assert usage.packs() == {old.name: PackUsage(1, 5, 1, 5, 0, 0)}
    assert usage.used(new.name) == usage.spares([new.name]) == []


def test_more_ids_than_are_looked_up_at_once() -> None:
    data = np.random.default_rng(5).bytes(32 * 20_000)
    ids = [data[at : at + 32] for at in range(0, len(data), 32)]
    parts = [footer(salt, [(chunk, 1) for chunk in ids[1000 * salt : 1000 * salt + 1500]]) for salt in range(20)]
    index = Index()
    index.add(parts)
    usage = Usage(index)
    strangers = [bytes(31) + b"\1", b"\xff" * 32, *(chunk[:31] + bytes([chunk[31] ^ 1]) for chunk in ids[:50])]
    assert usage.mark(b"".join(ids[:15_000]) * 20 + b"".join(strangers * 2)) == strangers
    packs = usage.packs().values()
    assert sum(each.used_chunks for each in packs) == 15_000
    assert sum(each.spare_chunks for each in packs) == 7_000
    assert sum(each.chunks for each in packs) == 29_500
    assert {chunk for name in index.packs for chunk, _ in usage.used(name)} == set(ids[:15_000])


def test_nothing_at_all() -> None:
    usage = Usage(Index())
    assert usage.packs() == {}
    assert usage.mark(b"") == []
    assert usage.mark(bytes(64)) == [bytes(32)]
    with pytest.raises(ValueError, match="33 bytes"):
        usage.mark(bytes(33))
