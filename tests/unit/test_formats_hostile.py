"""Hostile model files are opaque at worst: no exception, no hang, little memory, nothing outside the file."""

from __future__ import annotations

import io
import pickle
import struct
import subprocess
import sys
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from outlast.repo import formats, torchfile, torchpickle
from outlast.repo.formats import ReadAt

MEMORY_BYTES_MAX = 50 << 20


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@cache
def samples() -> dict[str, bytes]:
    """One small file of each format."""
    state = {"a": torch.arange(40.0).reshape(5, 8), "b": [torch.ones(3).bfloat16()], "v": torch.ones(6, 4).t()}
    array = io.BytesIO()
    np.save(array, np.asfortranarray(np.ones((3, 5), np.float32)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_array("tokens", ["a", "bc"])
        writer.add_array("scores", [1.0, 2.0])
        writer.add_tensor("w", np.ones((4, 8), np.float32))
        writer.add_tensor("h", np.ones(7, np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        quantised = path.read_bytes()
    return {
        "torch": saved(state),
        "distcp": saved(torch.ones(5)) + saved({"step": 5}) + saved(torch.arange(9)),
        "safetensors": safetensors.torch.save({"a": torch.ones(4, 4), "b": torch.ones(3).half()}),
        "gguf": quantised,
        "npy": array.getvalue(),
    }


def examine(content: bytes) -> None:
    """Everything a caller does with a file; asserts what callers rely on."""
    size = len(content)

    def read(offset: int, length: int) -> bytes:
        assert offset >= 0
        assert length >= 0
        assert offset + length <= size
        return content[offset : offset + length]

    formats.detect(read, size)
    end = 0
    for span in formats.spans(read, size) or []:
        assert span.offset >= end
        assert span.length > 0
        assert span.item_bytes in (0, 1, 2, 4, 8)
        end = span.offset + span.length
    assert end <= size
    for tensor in formats.tensors(read, size) or []:
        tensor.name.encode("utf-8")
        assert 0 <= tensor.offset <= size
        assert tensor.strides is not None or tensor.offset + tensor.length <= size
        if tensor.length <= 1 << 20:
            pieces = formats.tensor_bytes(read, tensor)
            assert sum(map(len, pieces)) == tensor.length


@pytest.mark.parametrize("kind", ["torch", "distcp", "safetensors", "gguf", "npy"])
def test_every_truncation(kind: str) -> None:
    content = samples()[kind]
    examine(content)
    for length in range(0, len(content), 7):
        examine(content[:length])
        examine(content[length:])


@settings(max_examples=600, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["torch", "distcp", "safetensors", "gguf", "npy"]),
    edits=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from([b"", b"\0", b"\xff"]) | st.binary(max_size=9)),
        min_size=1,
        max_size=6,
    ),
)
def test_overwritten_bytes(kind: str, edits: list[tuple[float, bytes]]) -> None:
    content = bytearray(samples()[kind])
    for place, new in edits:
        at = int(place * len(content))
        content[at : at + len(new)] = new[: len(content) - at]
    examine(bytes(content))


@pytest.mark.parametrize("kind", ["torch", "safetensors", "gguf", "npy"])
def test_every_single_byte_of_the_descriptions(kind: str) -> None:
    content = samples()[kind]
    places = range(min(len(content), 1200)) if kind != "torch" else range(0, len(content), 3)
    for at in places:
        for value in (0, 255, content[at] ^ 1):
            examine(content[:at] + bytes([value]) + content[at + 1 :])


MAGICS = [
    b"GGUF\x03\0\0\0",
    b"GGUF\x02\0\0\0",
    b"\x93NUMPY\x01\0",
    b"\x93NUMPY\x03\0",
    b"PK\x03\x04",
    b"\x40\0\0\0\0\0\0\0{",
]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.sampled_from(MAGICS), st.binary(max_size=600), st.sampled_from([b"", b"PK\x05\x06" + bytes(18)]))
def test_random_bytes_after_each_magic(magic: bytes, rest: bytes, end: bytes) -> None:
    examine(magic + rest + end)


def archive(data_pkl: bytes, storages: dict[str, bytes] | None = None) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as writer:
        writer.writestr("m/data.pkl", data_pkl)
        for key, content in (storages or {"0": bytes(64)}).items():
            writer.writestr(f"m/data/{key}", content)
    return file.getvalue()


OPCODES = b"(.012NJKMG}]l)tadesubcRQqrhj\x80\x81\x85\x86\x87\x88\x89\x8a\x8c\x8f\x90\x91\x92\x93\x94"
FRAGMENTS = [bytes([code]) for code in OPCODES] + [
    b"X\x01\0\0\0k",
    b"X\x07\0\0\0storage",
    b"ctorch\nFloatStorage\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ccollections\nOrderedDict\n",
    b"ctorch._tensor\n_rebuild_from_type_v2\n",
    b"q\0",
    b"h\0",
    b"K\x02",
    b"((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x08tQ",
]


@settings(max_examples=800, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(FRAGMENTS) | st.binary(max_size=4), max_size=60))
@example([b"}", b"q\0", b"X\x01\0\0\0k", b"h\0", b"s"])
def test_random_pickles(fragments: list[bytes]) -> None:
    examine(archive(b"\x80\x02" + b"".join(fragments) + b"."))


def doubling(levels: int) -> bytes:
    """Lists that hold the list before twice: small to write, 2**levels tensors to walk."""
    tensor = pickle_of_tensor()
    steps = [b"](" + b"h\0" + b"h\0eq\0" for _ in range(levels)]
    return b"\x80\x02" + tensor + b"q\x00" + b"".join(steps) + b"."


def pickle_of_tensor() -> bytes:
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x10tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0K\x10\x85K\x01\x85\x89)tR"


def test_the_hand_made_tensor_is_one() -> None:
    content = archive(b"\x80\x02" + pickle_of_tensor() + b".")
    found = formats.tensors(lambda offset, length: content[offset : offset + length], len(content))
    assert [each.shape for each in found or []] == [(16,)]


BOMBS: dict[str, Callable[[], bytes]] = {
    "empty dicts": lambda: archive(b"\x80\x02" + b"}" * 30_000 + b"."),
    "marks": lambda: archive(b"\x80\x02" + b"(" * 30_000 + b"."),
    "memo": lambda: archive(b"\x80\x04N" + b"\x94" * 30_000 + b"."),
    "nested tuples": lambda: archive(b"\x80\x02N" + b"\x85" * 30_000 + b"."),
    "nested lists": lambda: archive(b"\x80\x02" + b"](" * 30_000 + b"e" * 30_000 + b"."),
    "nested tuple as a key": lambda: archive(b"\x80\x02}N" + b"\x85" * 100_000 + b"Ns."),
    "nested tuple as a module's part": lambda: archive(
        b"\x80\x02cm\nC\n)\x81}N" + b"\x85" * 100_000 + pickle_of_tensor() + b"sb."
    ),
    "two to the 40": lambda: archive(doubling(40)),
    "long names": lambda: archive(
        b"\x80\x02" + pickle_of_tensor() + (b"q\0}X\xa0\x0f\0\0" + b"k" * 4000 + b"h\0s") * 250 + b"."
    ),
    "huge text": lambda: archive(b"\x80\x02X\xff\xff\xff\xff."),
    "huge bytes": lambda: archive(b"\x80\x05\x8e" + b"\xff" * 8 + b"."),
    "huge number": lambda: archive(b"\x80\x02\x8b\xff\xff\xff\x7f" + b"1" * 30_000 + b"."),
    "one list many times": lambda: archive(
        b"\x80\x02](" + b"K\x01" * 20_000 + b"eq\0](" + b"h\0" * 20_000 + b"e."
    ),
    "module in module": lambda: archive(b"\x80\x02" + b"cm\nC\n)\x81" * 10_000 + b"b" * 9_999 + b"."),
    "many tiny archives": lambda: archive(b"N.") * 1000,
    "ends without archives": lambda: b"PK\x03\x04" + (b"PK\x05\x06" + bytes(18)) * 200_000,
    "json nesting": lambda: struct.pack("<Q", 1_000_000) + b'{"a":' * 200_000,
    "json list nesting": lambda: struct.pack("<Q", 1_000_000) + b'{"a":' + b"[" * 1_000_000,
    "json numbers": lambda: struct.pack("<Q", 4_000_000)
    + b'{"a":{"dtype":"U8","shape":['
    + b"9223372036854775807," * 199_990
    + b"1],"
    + b'"data_offsets":[0,0]}}'.ljust(200),
    "npy parentheses": lambda: b"\x93NUMPY\x01\0\xff\xff" + b"{" + b"(" * 60_000 + b")" * 5533 + b"}",
    "npy nots": lambda: b"\x93NUMPY\x01\0\xff\xff" + b"{" + b"not " * 16_383 + b"}}",
    "npy commas": lambda: b"\x93NUMPY\x01\0\xff\xff" + b"{'shape': (" + (b"9," * 40_000)[:65_523] + b"}",
    "gguf strings": lambda: b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 2**60) + bytes(4_000_000),
    "gguf arrays": lambda: b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 9) + struct.pack("<IQ", 9, 1) * 300_000,
    "gguf tensors": lambda: b"GGUF" + struct.pack("<IQQ", 3, 5_000, 0)
    + b"".join(struct.pack("<Q8sIIQ", 8, b"%08d" % at, 0, 0, 0) for at in range(5_000))
    + bytes(64),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BOMBS))
def test_small_files_that_ask_for_much(name: str) -> None:
    content = BOMBS[name]()
    tracemalloc.start()
    try:
        examine(content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY_BYTES_MAX


MEASURED = """
import os, sys
from outlast.repo import formats

def status(field):
    with open("/proc/self/status") as file:
        return int(file.read().split(field + ":")[1].split()[0]) << 10

fd = os.open(sys.argv[1], os.O_RDONLY)
size = os.fstat(fd).st_size
read = lambda offset, length: os.pread(fd, length, offset)
before = status("VmRSS")
formats.spans(read, size)
formats.tensors(read, size)
print(status("VmHWM") - before)
"""
MEASURED_BYTES_MAX = 150 << 20


def header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def many_members(count: int) -> bytes:
    """One archive of `count` storages of a byte, made by hand since `zipfile` takes its time."""
    content, directory = bytearray(), bytearray()
    for name, data in [(b"m/data.pkl", b"N."), *((b"m/data/%x" % at, b"x") for at in range(count))]:
        fields = (0, 0, 0, 0, 0, 0, len(data), len(data), len(name))
        fixed = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 0, *fields, 0, 0, 0, 0, 0, len(content))
        directory += fixed + name
        content += struct.pack("<4s5H3L2H", b"PK\x03\x04", *fields, 0) + name + data
    start, length = len(content), len(directory)
    end = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 30, 45, 0, 0, count + 1, count + 1, length, start)
    end += struct.pack("<4sLQL", b"PK\x06\x07", 0, start + length, 1) + b"PK\x05\x06" + bytes(18)
    return bytes(content + directory) + end


GREEDY: dict[str, Callable[[], bytes]] = {
    "keys": lambda: header(b"{" + b",".join(b'"%x":0' % at for at in range(4_000_000)) + b"}"),
    "fewer keys": lambda: header(b"{" + b",".join(b'"%x":0' % at for at in range(520_000)) + b"}"),
    "escaped": lambda: header(
        b"{" + b",".join(b'"%x":{"data\\u005foffsets":[0,0]}' % at for at in range(1_500_000)) + b"}"
    ),
    "shape": lambda: header(b'{"a":{"shape":[' + b",".join(b"1%018d" % at for at in range(4_000_000)) + b"]}}"),
    "dicts": lambda: archive(b"\x80\x02" + b"}" * 8_000_000 + b"."),
    "one tensor": lambda: archive(b"\x80\x02" + pickle_of_tensor() + b"q\0(" + b"h\0" * 8_000_000 + b"l."),
    "members": lambda: many_members(400_000),
    "archives": lambda: many_members(4) * 60_000,
}


@pytest.mark.parametrize("name", list(GREEDY))
def test_large_files_that_ask_for_much(tmp_path: Path, name: str) -> None:
    """The memory of the process, decoders in C included."""
    (tmp_path / "greedy").write_bytes(GREEDY[name]())
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "greedy")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < MEASURED_BYTES_MAX


def test_chained_archives_share_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file with too many operations the storages are still known; with too many members it is opaque."""
    one = archive(b"\x80\x02" + b"N0" * 1500 + pickle_of_tensor() + b".")

    def examined(content: bytes) -> tuple[list[int] | None, int | None]:
        def read(offset: int, length: int) -> bytes:
            return content[offset : offset + length]

        spans, tensors = formats.spans(read, len(content)), formats.tensors(read, len(content))
        return spans and [each.item_bytes for each in spans], tensors and len(tensors)

    assert examined(one * 4) == ([4, 4, 4, 4], 4)
    monkeypatch.setattr(torchpickle, "_STEPS_MAX", 7000)
    assert examined(one * 2) == ([4, 4], 2)
    assert examined(one * 4) == ([4, 4, 0, 0], None)
    monkeypatch.undo()
    monkeypatch.setattr(torchfile, "_MEMBERS_MAX", 4)
    assert examined(one * 2) == ([4, 4], 2)
    assert examined(one * 3) == (None, None)


def test_the_walk_of_a_structure_has_a_budget() -> None:
    """Half a million lists, eight times over: small to write, long to visit."""
    lists = b"]q\0" + b"0(" + b"h\0" * 500_000 + b"lq\x01(" + b"h\x01" * 8 + b"l"
    content = archive(b"\x80\x02" + lists + b".")
    assert formats.tensors(lambda offset, length: content[offset : offset + length], len(content)) is None


def virtual(pieces: dict[int, bytes], size: int) -> ReadAt:
    """A file of any size: these bytes at these offsets, zeros elsewhere; refuses reads that cost memory."""

    def read(offset: int, length: int) -> bytes:
        assert length < 1 << 20
        answer = bytearray(length)
        for start, piece in pieces.items():
            low, high = max(start, offset), min(start + len(piece), offset + length)
            if low < high:
                answer[low - offset : high - offset] = piece[low - start : high - start]
        return bytes(answer)

    return read


@pytest.mark.parametrize(
    ("head", "size"),
    [
        (struct.pack("<Q", 10 << 30) + b"{", 20 << 30),
        (struct.pack("<Q", 2**63) + b"{", 20 << 30),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), 20 << 30),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), 20 << 30),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 5, 2**60), 20 << 30),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 2**60), 20 << 30),
        (b"GGUF" + struct.pack("<IQQQ1sI4QIQ", 3, 1, 0, 1, b"k", 4, *[2**60] * 4, 0, 0), 20 << 30),
        (b"\x93NUMPY\x02\0" + struct.pack("<I", 2**32 - 1) + b"{", 20 << 30),
    ],
)
def test_huge_counts_in_huge_files(head: bytes, size: int) -> None:
    read = virtual({0: head}, size)
    assert formats.spans(read, size) is None
    assert formats.tensors(read, size) is None


@pytest.mark.parametrize(
    ("entries", "length", "offset"),
    [(2**60, 2**60, 0), (2**60, 10 << 30, 0), (5, 10 << 30, 100), (2**31, 46, 100), (1, 46, 2**63), (0, 0, 0)],
)
def test_zip_with_lying_counts(entries: int, length: int, offset: int) -> None:
    size = 20 << 30
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 30, 45, 0, 0, entries, entries, length, offset)
    end = end64 + struct.pack("<4sLQL", b"PK\x06\x07", 0, offset + length & (2**64 - 1), 1)
    end += b"PK\x05\x06" + bytes(18)
    read = virtual({0: b"PK\x03\x04", size - len(end): end}, size)
    assert formats.spans(read, size) is None


def local(name: bytes, extra: int = 0) -> bytes:
    return struct.pack("<4s5H3L2H", b"PK\x03\x04", 0, 0x808, 0, 0, 0, 0, 0, 0, len(name), extra) + name + bytes(extra)


def entry(name: bytes, length: int, header: int) -> bytes:
    wide = struct.pack("<2H3Q", 1, 24, length, length, header)
    full = 0xFFFFFFFF
    fixed = struct.pack(
        "<4s6H3L5H2L", b"PK\x01\x02", 0, 0, 0x808, 0, 0, 0, 0, full, full, len(name), len(wide), 0, 0, 0, 0, full
    )
    return fixed + name + wide


@pytest.mark.parametrize(
    ("length", "overlap", "expected"), [(8 << 30, 0, True), (30 << 30, 0, False), (8 << 30, 1 << 20, False)]
)
def test_zip_of_64_bits(length: int, overlap: int, expected: bool) -> None:
    """A storage beyond 4 GiB, one behind it, and sizes that lie."""
    size = 20 << 30
    pickled = b"\x80\x02" + pickle_of_tensor() + b"."
    second = 9 << 30
    members = {0: local(b"m/data.pkl") + pickled, 4096: local(b"m/data/0", 50), second: local(b"m/data/1")}
    directory = entry(b"m/data.pkl", len(pickled), 0) + entry(b"m/data/0", length + 4 * overlap * 1024, 4096)
    directory += entry(b"m/data/1", 64, second)
    ending = len(directory) + 98
    start = size - ending
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 30, 45, 0, 0, 3, 3, len(directory), start)
    end = end64 + struct.pack("<4sLQL", b"PK\x06\x07", 0, start + len(directory), 1)
    end += struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 3, 3, len(directory), 0xFFFFFFFF, 0)
    read = virtual(members | {start: directory + end}, size)
    found = formats.spans(read, size)
    if expected:
        first = 4096 + 30 + len(b"m/data/0") + 50
        assert found == [formats.Span(first, length, 4), formats.Span(second + 30 + len(b"m/data/1"), 64, 0)]
    else:
        assert found is None


def test_compressed_storages_are_no_spans() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as writer:
        writer.writestr("m/data.pkl", b"\x80\x02" + pickle_of_tensor() + b".", zipfile.ZIP_STORED)
        writer.writestr("m/data/0", bytes(64))
    content = file.getvalue()
    assert formats.spans(lambda offset, length: content[offset : offset + length], len(content)) == []
    assert formats.tensors(lambda offset, length: content[offset : offset + length], len(content)) is None


def test_nothing_in_a_pickle_is_called(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return open, (str(tmp_path / "pwned"), "w")  # type: ignore[return-value]

    for protocol in range(6):
        examine(archive(pickle.dumps({"a": Attack()}, protocol)))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_shrinks_while_read_is_opaque() -> None:
    for content in samples().values():
        size = len(content) + 1000
        assert formats.spans(lambda offset, length, c=content: c[offset : offset + length], size) is None


def test_errors_of_the_reader_are_the_callers() -> None:
    def read(offset: int, length: int) -> bytes:
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="fire"):
        formats.spans(read, 1000)
