"""Pieces cover a file exactly, tensors keep their own cuts, and streaming cuts where cutting at once does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.records import Chunking, Hole
from outlast.repo import seal
from outlast.repo.chunker import TENSOR_BYTES_MIN, cutter, pieces
from outlast.repo.formats import Span

SMALL = Chunking(block_bytes=4096, min_bytes=1024, avg_bytes=4096, max_bytes=16384)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, list[Span], list[Hole]]:
    """A file size, disjoint sorted spans and disjoint sorted holes inside it."""
    size = draw(st.integers(0, 60_000))

    def runs() -> list[tuple[int, int]]:
        cuts = sorted(draw(st.lists(st.integers(0, size), max_size=12, unique=True)))
        return [(start, end - start) for start, end in zip(cuts[::2], cuts[1::2], strict=False)]

    spans = [Span(offset, length, draw(st.sampled_from([0, 1, 2, 4, 8]))) for offset, length in runs()]
    return size, spans, runs()


@given(layouts())
@settings(max_examples=300, deadline=None)
def test_pieces_cover_everything_but_the_holes_once(layout: tuple[int, list[Span], list[Hole]]) -> None:
    size, spans, holes = layout
    covered = np.zeros(size, np.int8)
    at = 0
    for piece in pieces(size, spans, holes, SMALL):
        assert piece.offset >= at
        assert piece.length > 0
        at = piece.offset + piece.length
        covered[piece.offset : at] += 1
        if not piece.cut:
            assert piece.length <= max(SMALL.block_bytes, SMALL.min_bytes)
    for offset, length in holes:
        assert not covered[offset : offset + length].any()
        covered[offset : offset + length] = 1
    assert (covered == 1).all()


@given(layouts())
@settings(max_examples=100, deadline=None)
def test_a_whole_tensor_is_cut_from_its_own_first_byte(layout: tuple[int, list[Span], list[Hole]]) -> None:
    size, spans, holes = layout
    found = {piece.offset: piece for piece in pieces(size, spans, holes, SMALL)}
    for span in spans:
        in_a_hole = any(
            offset < span.offset + span.length and span.offset < offset + length for offset, length in holes if length
        )
        if span.length >= TENSOR_BYTES_MIN and not in_a_hole:
            for start in range(0, span.length, SMALL.block_bytes):
                piece = found[span.offset + start]
                assert piece.length == min(SMALL.block_bytes, span.length - start)
                assert (piece.item_bytes, piece.cut) == (span.item_bytes, False)


def test_the_same_tensor_anywhere_gives_the_same_chunks() -> None:
    tensor = np.random.default_rng(5).bytes(50_000)

    def chunk_ids(head: bytes, tail: bytes) -> set[bytes]:
        data = head + tensor + tail
        found = pieces(len(data), [Span(len(head), len(tensor), 4)], [], SMALL)
        return {
            seal.chunk_id(data[piece.offset : piece.offset + piece.length], None)
            for piece in found
            if piece.item_bytes == 4
        }

    expected = chunk_ids(b"", b"")
    assert len(expected) == 13
    for head, tail in [(b"x", b""), (b"h" * 4097, b"t"), (b"h" * 777, b"t" * 9000)]:
        assert chunk_ids(head, tail) == expected


def stream(data: bytes, steps: list[int], chunking: Chunking) -> list[int]:
    """Cut as a reader does: what is there so far, when there is enough of it."""
    cut = cutter(chunking, 0)
    lengths: list[int] = []
    start = end = 0
    for step in steps:
        end = min(len(data), end + step)
        if end - start >= 2 * chunking.max_bytes and end < len(data):
            found = cut(data[start:end], False)
            lengths += found
            start += sum(found)
    return lengths + (cut(data[start:], True) if start < len(data) else [])


@given(seed=st.integers(0, 1000), steps=st.lists(st.integers(1, 60_000), max_size=20), zeros=st.integers(0, 100_000))
@settings(max_examples=60, deadline=None)
def test_streaming_cuts_where_cutting_at_once_does(seed: int, steps: list[int], zeros: int) -> None:
    noise = np.random.default_rng(seed).bytes(200_000)
    data = noise[:77_777] + bytes(zeros) + noise[77_777:]
    at_once = cutter(SMALL, 0)(data, True)
    assert sum(at_once) == len(data)
    assert max(at_once) <= SMALL.max_bytes
    assert all(length >= SMALL.min_bytes for length in at_once[:-1])
    assert stream(data, steps, SMALL) == at_once


@pytest.mark.parametrize("at", [0, 1, 50_000, 199_999])
def test_an_inserted_byte_changes_few_chunks(at: int) -> None:
    data = np.random.default_rng(9).bytes(200_000)

    def chunk_ids(data: bytes) -> set[bytes]:
        ids, start = set(), 0
        for length in cutter(SMALL, 0)(data, True):
            ids.add(seal.chunk_id(data[start : start + length], None))
            start += length
        return ids

    assert len(chunk_ids(data[:at] + b"!" + data[at:]) - chunk_ids(data)) <= 3
