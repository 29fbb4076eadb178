"""Names, shapes and bytes of tensors agree with what each format's own library reads from real files."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from outlast.errors import InvalidInput
from outlast.repo import formats
from outlast.repo.formats import ReadAt, Span, Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip


def reader(content: bytes) -> ReadAt:
    return lambda offset, length: content[offset : offset + length]


def spans(content: bytes) -> list[Span] | None:
    return formats.spans(reader(content), len(content))


def by_name(content: bytes) -> dict[str, Tensor]:
    found = formats.tensors(reader(content), len(content))
    assert found is not None
    assert len({each.name for each in found}) == len(found)
    return {each.name: each for each in found}


def values(content: bytes, tensor: Tensor) -> bytes:
    pieces = list(formats.tensor_bytes(reader(content), tensor))
    assert all(len(piece) <= 8 << 20 for piece in pieces)
    return b"".join(pieces)


def raw(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def saved(value: object, **options: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def assert_same(content: bytes, expected: dict[str, torch.Tensor]) -> dict[str, Tensor]:
    found = by_name(content)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert DTYPES[tensor.dtype] == expected[name].dtype, name
        assert tensor.shape == tuple(expected[name].shape), name
        assert tensor.length == expected[name].numel() * expected[name].element_size(), name
        assert values(content, tensor) == raw(expected[name]), name
    return found


def flat(value: object, path: str = "") -> dict[str, torch.Tensor]:
    """What our names promise, spelt out over live objects."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    if isinstance(value, dict):
        parts = [(str(key), each) for key, each in value.items()]
    elif isinstance(value, (list, tuple)):
        parts = [(str(at), each) for at, each in enumerate(value)]
    else:
        return {}
    found: dict[str, torch.Tensor] = {}
    for key, each in parts:
        found |= flat(each, f"{path}.{key}" if path else key)
    return found


def trained() -> dict[str, object]:
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Embedding(50, 16), torch.nn.Linear(16, 16), torch.nn.LayerNorm(16))
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    model(torch.arange(20)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": [torch.get_rng_state()],
        "step": 1,
        "dtype": torch.bfloat16,
        "note": "ä" * 9000,
    }


def test_training_checkpoint_has_the_names_and_bytes_that_torch_loads() -> None:
    state = trained()
    content = saved(state)
    found = assert_same(content, flat(state))
    assert "optimizer.state.0.exp_avg" in found
    assert found["optimizer.state.0.step"].shape == ()
    assert formats.detect(reader(content), len(content)) == "torch"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_of_torch_save(protocol: int) -> None:
    state = trained()
    assert_same(saved(state, pickle_protocol=protocol), flat(state))


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_every_dtype_in_a_torch_file(dtype: str) -> None:
    tensor = torch.arange(24).to(torch.uint8).view(3, 8)
    tensor = (tensor > 3) if dtype == "BOOL" else tensor.view(DTYPES[dtype])
    content = saved({"t": tensor})
    assert_same(content, {"t": tensor})
    found = spans(content)
    assert found is not None
    assert [each.item_bytes for each in found] == [4 if dtype == "C64" else tensor.element_size()]


def test_views_ties_and_parameters() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    weight = torch.nn.Parameter(torch.randn(5, 3))
    noted = torch.nn.Parameter(torch.ones(2))
    noted.note = 1  # type: ignore[attr-defined]
    state = {
        "base": base,
        "transposed": base.t(),
        "middle": base[1:3, 2:4],
        "every_other": base.reshape(-1)[1::2],
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 3),
        "empty": torch.empty(0, 7),
        "scalar": torch.tensor(3.5),
        "odd": torch.ones(1, 5, 1).as_strided((1, 5, 1), (99, 1, 77)),
        "weight": weight,
        "tied": weight,
        "noted": noted,
        "buffer": torch.nn.Buffer(torch.ones(3)),
        "nested": [{"a": (torch.ones(1), [torch.zeros(2)])}, 5],
    }
    content = saved(state)
    found = assert_same(content, flat(state))
    assert found["tied"].offset == found["weight"].offset
    assert found["transposed"].strides == (1, 6)
    assert found["odd"].strides is None
    assert found["middle"].offset == found["base"].offset + 4 * 8


def test_whole_module_is_named_like_its_state_dict() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    assert_same(saved(model), dict(model.state_dict()))


def test_bare_tensor_and_clashing_names() -> None:
    assert_same(saved(torch.arange(3)), {"tensor": torch.arange(3)})
    one, two, three = torch.ones(1), torch.ones(2), torch.ones(3)
    assert_same(saved({"a.b": one, "a": {"b": two}, 0: three}), {"a.b": one, "a.b#2": two, "0": three})


def test_self_references_are_walked_once() -> None:
    state: dict[str, object] = {"w": torch.ones(2)}
    state["self"] = state
    state["list"] = [state, torch.zeros(1)]
    found = by_name(saved(state))
    assert found.keys() == {"w", "list.1"}


def test_values_that_are_no_plain_tensors_are_left_out() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
    lazy = torch.ones(2, dtype=torch.complex64).conj()
    state = {"q": quantised, "c": lazy, "s": torch.eye(3).to_sparse(), "plain": torch.ones(2)}
    content = saved(state)
    assert by_name(content).keys() == {"plain"}
    found = spans(content)
    assert found is not None
    assert len(found) == 5, "their storages are aligned all the same"


def test_spans_of_a_torch_file_are_its_storages() -> None:
    content = saved({"a": torch.ones(100), "b": torch.ones(30, dtype=torch.bfloat16), "view": torch.ones(64)[8:16]})
    found = spans(content)
    assert found is not None
    assert [(each.length, each.item_bytes) for each in found] == [(400, 4), (60, 2), (256, 4)]


def test_unreadable_pickle_still_gives_spans() -> None:
    content = saved({"a": torch.arange(100)})
    at = content.index(b"_rebuild_tensor_v2")
    broken = content[: at - 20] + b"\xff" + content[at - 19 :]
    found = spans(broken)
    assert found is not None
    assert [(each.length, each.item_bytes) for each in found] == [(800, 0)]
    assert formats.tensors(reader(broken), len(broken)) is None


def test_legacy_torch_files_and_other_zips_are_opaque(tmp_path: Path) -> None:
    legacy = saved(torch.ones(3), _use_new_zipfile_serialization=False)
    arrays = io.BytesIO()
    np.savez(arrays, a=np.ones(3))
    for content in (legacy, arrays.getvalue(), b"", b"short", bytes(5000)):
        assert spans(content) is None
        assert formats.tensors(reader(content), len(content)) is None
        assert formats.detect(reader(content), len(content)) is None


def test_a_large_aligned_archive_and_its_local_headers() -> None:
    """Storages far apart need reads of their own; small neighbours share one."""
    state = {f"{at}": torch.full((size,), at) for at, size in enumerate([40_000, 1, 2, 40_000, 3])}
    content = saved(state)
    calls = []

    def counted(offset: int, length: int) -> bytes:
        calls.append(length)
        return content[offset : offset + length]

    found = formats.spans(counted, len(content))
    assert found is not None
    assert [content[each.offset] for each in found] == [0, 1, 2, 3, 4]
    assert len(calls) <= 6
    assert sum(calls) < 120_000


def test_distcp_every_item_is_found(tmp_path: Path) -> None:
    state = {"model": trained()["model"], "step": 5, "big": torch.arange(30_000), "half": torch.ones(7).bfloat16()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=tmp_path)
    (file,) = tmp_path.glob("*.distcp")
    content = file.read_bytes()
    found = by_name(content)
    expected = sorted(raw(each) for each in flat(state).values())
    assert sorted(values(content, each) for each in found.values()) == expected
    assert all(name.isdecimal() for name in found), "an item is named by its position"
    located = spans(content)
    assert located is not None
    assert {(each.offset, each.length) for each in located} == {(each.offset, each.length) for each in found.values()}
    assert {each.item_bytes for each in located} == {2, 4, 8}


def test_distcp_with_a_damaged_item_keeps_those_behind_it() -> None:
    items = [saved(torch.full((50,), at)) for at in range(4)]
    content = b"".join(items)
    found = spans(content)
    assert found is not None
    assert [content[each.offset] for each in found] == [0, 1, 2, 3]
    end_of_second = len(items[0]) + len(items[1])
    broken = content[: end_of_second - 3] + b"xxx" + content[end_of_second:]
    found = spans(broken)
    assert found is not None
    assert [broken[each.offset] for each in found] == [2, 3]


def test_safetensors_agrees_with_the_library() -> None:
    state = {
        name: torch.arange(48).to(torch.uint8).view(dtype).reshape(2, -1)
        for name, dtype in DTYPES.items()
        if name != "BOOL"
    }
    state |= {"BOOL": torch.tensor([True, False]), "empty": torch.empty(0, 3), "scalar": torch.tensor(1.5)}
    content = safetensors.torch.save(state, metadata={"format": "pt"})
    assert formats.detect(reader(content), len(content)) == "safetensors"
    assert_same(content, state)
    found = spans(content)
    assert found is not None
    assert sum(each.length for each in found) == sum(each.numel() * each.element_size() for each in state.values())


def test_written_header_is_read_by_the_library() -> None:
    state = {"b": torch.arange(5.0), "a": torch.ones(2, 3).bfloat16(), "none": torch.empty(0), "ü": torch.tensor(7)}
    names = {dtype: name for name, dtype in DTYPES.items()}
    described = [(key, names[each.dtype], tuple(each.shape), len(raw(each))) for key, each in state.items()]
    header = formats.safetensors_header(described, {"step": "7"})
    assert len(header) % 8 == 0
    content = header + b"".join(map(raw, state.values()))
    loaded = safetensors.torch.load(content)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], each) for key, each in state.items())
    assert_same(content, state)
    assert safetensors.torch.load(formats.safetensors_header([])) == {}


@pytest.mark.parametrize(
    "tensors",
    [
        [("q", "Q4_K", (256,), 144)],
        [("c", "C128", (1,), 16)],
        [("a", "F32", (2,), 7)],
        [("a", "F32", (-2,), 8)],
        [("a", "U8", (1,), 1), ("a", "U8", (1,), 1)],
        [("__metadata__", "U8", (1,), 1)],
    ],
)
def test_header_refuses_what_safetensors_cant_hold(tensors: list[tuple[str, str, tuple[int, ...], int]]) -> None:
    with pytest.raises(InvalidInput, match="nothing was written"):
        formats.safetensors_header(tensors)


def safetensors_file(header: str, data_bytes: int) -> bytes:
    text = header.encode()
    return struct.pack("<Q", len(text)) + text + bytes(data_bytes)


@pytest.mark.parametrize(
    ("header", "data_bytes", "expected"),
    [
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8, [8]),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}', 20, [8]),  # a gap and a rest are harmless
        ('{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,5]}}', 5, [5]),  # a type of the future
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 7, None),  # cut short
        ('{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}', 8, None),
        ('{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}', 8, None),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}', 8, None),
        ('{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}', 8, None),  # noqa: E501
        ('{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}', 8, [8]),  # noqa: E501
        ('{"a":5}', 8, None),
        ('{"a":{"dtype":"U8"', 8, None),
    ],
)  # fmt: skip
def test_safetensors_offsets_must_agree(header: str, data_bytes: int, expected: list[int] | None) -> None:
    content = safetensors_file(header, data_bytes)
    found = spans(content)
    assert (found and [each.length for each in found]) == expected
    assert (formats.tensors(reader(content), len(content)) is None) == (expected is None)


def test_gguf_agrees_with_its_library(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_custom_alignment(64)
    writer.add_array("tokenizer.ggml.tokens", [f"token {at}" for at in range(50_000)])
    writer.add_array("tokenizer.ggml.scores", [float(at) for at in range(3000)])
    writer.add_array("nested", [[1, 2], [3]])
    rng = np.random.default_rng(7)
    for at, kind in enumerate((np.float32, np.float16, np.int8, np.int64)):
        writer.add_tensor(f"blk.{at}.weight", (rng.random((6, 10)) * 100).astype(kind))
    for kind, (items, width) in gguf.GGML_QUANT_SIZES.items():
        if items > 1:
            blocks = rng.integers(0, 256, (3, 2 * width), dtype=np.uint8)
            writer.add_tensor(f"quantised.{kind.name}", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = (tmp_path / "m.gguf").read_bytes()
    found = by_name(content)
    theirs = {each.name: each for each in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert found.keys() == theirs.keys()
    assert any(name.startswith("quantised") for name in found)
    for name, tensor in found.items():
        assert tensor.dtype == theirs[name].tensor_type.name
        assert tensor.shape == tuple(reversed([int(each) for each in theirs[name].shape]))
        assert tensor.offset == theirs[name].data_offset
        assert tensor.length == theirs[name].n_bytes
        assert values(content, tensor) == theirs[name].data.tobytes()
    located = spans(content)
    assert located is not None
    assert {each.item_bytes for each in located} == {0, 1, 2, 4, 8}


def test_every_ggml_type_that_the_library_knows_has_its_block_size() -> None:
    from outlast.repo.gguf import _TYPES

    for kind, (items, width) in gguf.GGML_QUANT_SIZES.items():
        assert _TYPES[kind.value] == (kind.name, items, width)


def test_big_endian_gguf_is_opaque(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("a", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert spans((tmp_path / "m.gguf").read_bytes()) is None


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=version)
    return file.getvalue()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize(
    "make",
    [
        lambda: np.arange(12.0).reshape(3, 4),
        lambda: np.asfortranarray(np.arange(24, dtype=np.int16).reshape(2, 3, 4)),
        lambda: np.asfortranarray(np.ones((5, 1), np.float16)),
        lambda: np.array(7, np.uint32),
        lambda: np.zeros((0, 3), np.complex64),
        lambda: np.array([True, False]),
    ],
)
def test_npy_agrees_with_numpy(make: Callable[[], np.ndarray], version: tuple[int, int]) -> None:
    array = make()
    content = npy(array, version)
    found = by_name(content)["array"]
    assert found.shape == array.shape
    assert values(content, found) == array.tobytes(order="C")
    assert formats.detect(reader(content), len(content)) == "npy"


def test_npy_of_foreign_elements() -> None:
    assert spans(npy(np.array([{}, None], object))) is None
    records = npy(np.zeros(3, dtype=[("a", "f4"), ("b", "i8")]))
    assert spans(records) is None
    swapped = npy(np.arange(5, dtype=">f4"))
    assert spans(swapped) == [Span(len(swapped) - 20, 20, 4)]
    assert formats.tensors(reader(swapped), len(swapped)) is None
    dates = npy(np.zeros(3, "M8[ns]"))
    assert formats.tensors(reader(dates), len(dates)) is None


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((3000, 2000), (1, 3000), 0),  # transposed and larger than what is read at once
        ((2000, 3000), (2 * 3000, 1), 5),  # rows of a wider matrix
        ((7, 11, 13), (1, 7, 77), 3),
        ((50, 4, 50), (1, 0, 50), 0),  # repeats
        ((3, 2), (1_000_000, 10), 1),  # few elements far apart
        ((), (), 9),
    ],
)
def test_strided_views_are_gathered(
    shape: tuple[int, ...], strides: tuple[int, ...], offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outlast.repo.strided._BLOCK_BYTES", 1 << 20)
    source = np.random.default_rng(1).integers(0, 1 << 31, 12_100_000, dtype=np.int32)
    content = source.tobytes()
    expected = np.lib.stride_tricks.as_strided(source[offset:], shape, [4 * each for each in strides])
    tensor = Tensor("t", "I32", shape, 4 * offset, expected.size * 4, strides)
    largest = 0

    def read(at: int, length: int) -> bytes:
        nonlocal largest
        largest = max(largest, length)
        return content[at : at + length]

    pieces = list(formats.tensor_bytes(read, tensor))
    assert b"".join(pieces) == expected.tobytes()
    assert max(map(len, pieces)) <= 8 << 20
    assert largest <= 1 << 20
