"""What comes out of damaged checkpoint files is what went in, bit for bit, or it is named as lost."""

from __future__ import annotations

import io
import json
import os
import pickle
import random  # noqa: TID251
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from outlast.checkpoint.salvage import FileReport, salvage
from outlast.errors import InvalidInput, Refused

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _no_disk_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def state() -> dict[str, Any]:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2).bfloat16())
    tied = model[0].weight
    return {
        "model": model.state_dict(),
        "view": torch.randn(4, 4).t(),
        "tied": [tied, tied],
        "step": 3,
        "empty": torch.empty(0),
    }


def torch_bytes(value: object, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **how)
    return buffer.getvalue()


def saved(folder: Path, data: bytes) -> tuple[FileReport, Tensors]:
    """What salvage says of these bytes, and what it wrote."""
    source, out = folder / "damaged.pt", folder / "out.safetensors"
    source.write_bytes(data)
    out.unlink(missing_ok=True)
    [report] = salvage([str(source)], str(out))
    assert source.read_bytes() == data
    assert bool(report.written) == out.exists() == bool(report.intact + report.unverified)
    return report, load_file(out) if report.written else {}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def storages(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = {name: name.partition("/")[2] for name in archive.namelist() if "/data/" in name}
        return {short: archive.read(name) for name, short in names.items()}


def check_true(report: FileReport, out: Tensors, whole: Tensors, raw: dict[str, bytes], where: object) -> None:
    """Whatever came out is what went in, and whatever did not is named."""
    for name, tensor in out.items():
        if name.startswith("data/"):
            assert bytes(tensor.numpy()) == raw[name], (where, name)
        else:
            assert same(tensor, whole[name]), (where, name)
    named = out.keys() | {each.name for each in report.lost}
    assert whole.keys() <= named or named & {"data.pkl", "everything"}, where


def test_everything_comes_out_of_a_whole_file(tmp_path: Path) -> None:
    given = state()
    report, out = saved(tmp_path, torch_bytes(given))
    assert (report.format, report.intact, report.unverified, report.lost) == ("torch", len(out), 0, [])
    assert same(out["view"], given["view"].contiguous())
    assert same(out["tied.0"], given["model"]["0.weight"])
    assert {f"model.{name}" for name in given["model"]} | {"view", "tied.0", "tied.1", "empty"} == out.keys()


def test_a_flipped_byte_anywhere_loses_what_it_hits_and_falsifies_nothing(tmp_path: Path) -> None:
    data = torch_bytes(state())
    _, whole = saved(tmp_path, data)
    raw = storages(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        directory = archive.start_dir
        inside = set()
        for each in archive.infolist():
            name_bytes, extra_bytes = struct.unpack_from("<2H", data, each.header_offset + 26)
            start = each.header_offset + 30 + name_bytes + extra_bytes
            inside.update(range(start, start + each.file_size))
    draw = random.Random(5)
    for at in [*range(0, len(data), 3), *range(directory, len(data))]:
        damaged = bytearray(data)
        damaged[at] ^= draw.choice([1, 2, 16, 65, 128, 255])
        report, out = saved(tmp_path, bytes(damaged))
        check_true(report, out, whole, raw, at)
        assert report.unverified == 0, at
        if at not in inside:
            assert not report.lost, (at, report.lost)
        if not any(name.startswith("data/") for name in out):
            assert len(report.lost) <= 3, (at, report.lost)  # a storage may have several names


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_what_lies_before_the_cut_comes_out(tmp_path: Path, legacy: bool) -> None:
    data = torch_bytes(state(), _use_new_zipfile_serialization=not legacy)
    _, whole = saved(tmp_path, data)
    raw = {} if legacy else storages(data)
    came_out = []
    # Storages of old files lie in order of their addresses, so how many the last bytes belong to is chance.
    for end in [*range(0, len(data), 11), len(data)]:
        report, out = saved(tmp_path, data[:end])
        check_true(report, out, whole, raw, end)
        assert legacy or report.unverified == 0
        came_out.append(len(out))
    assert came_out == sorted(came_out)
    assert came_out[0] == 0 and came_out[-1] == len(whole)


def test_without_the_directory_nothing_is_lost(tmp_path: Path) -> None:
    data = torch_bytes(state())
    _, whole = saved(tmp_path, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        report, out = saved(tmp_path, data[: archive.start_dir])
    assert not report.lost and out.keys() == whole.keys()


def test_several_damages_at_once_falsify_nothing_even_around_an_archive_in_a_tensor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inner = {name: torch.randn(6) for name in "abcd"}
    nested = torch.frombuffer(bytearray(torch_bytes(inner)), dtype=torch.uint8)
    outer = {"a": torch.randn(6), "n": nested, "b": torch.randn(6), "c": torch.randn(6)}
    data = torch_bytes(outer)
    draw = random.Random(11)
    for turn in range(600):
        damaged = bytearray(data[: draw.choice([len(data), draw.randrange(len(data))])])
        for _ in range(draw.choice([1, 2, 4])):
            if damaged:
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        _, out = saved(tmp_path, bytes(damaged))
        for name, tensor in out.items():
            own = name.rpartition(".")[2]
            if "data/" not in name:
                assert any(same(tensor, each[own]) for each in (outer, inner) if own in each), (turn, name)


def test_storages_come_out_as_bytes_where_their_names_are_damaged(tmp_path: Path) -> None:
    data = torch_bytes({"w": torch.arange(10, dtype=torch.float32)})
    at = data.index(b"_rebuild_tensor_v2")
    report, out = saved(tmp_path, data[:at] + b"X" + data[at + 1 :])
    assert [each.name for each in report.lost] == ["data.pkl"]
    assert torch.equal(out["data/0"].view(torch.float32), torch.arange(10, dtype=torch.float32))


def test_files_without_checksums_are_said_to_be_unverified(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        data = torch_bytes(state())
    finally:
        torch.serialization.set_crc32_options(True)
    report, out = saved(tmp_path, data)
    assert report.intact == 0 and report.unverified == len(out) > 10 and not report.lost
    assert any("can't be verified" in note for note in report.notes)


def test_no_pickle_is_executed(tmp_path: Path) -> None:
    trace = tmp_path / "executed"

    class Harmful:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return os.system, (f"touch {trace}",)

    data = torch_bytes({"w": torch.ones(3), "bad": Harmful()})
    report, out = saved(tmp_path, data)
    assert same(out["w"], torch.ones(3)) and not report.lost
    saved(tmp_path, torch_bytes({"w": torch.ones(3), "bad": Harmful()}, _use_new_zipfile_serialization=False))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Harmful()))
    (folder / "__0_0.distcp").write_bytes(torch_bytes(torch.ones(2)))
    salvage([str(folder)], str(tmp_path / "folder.safetensors"))
    assert not trace.exists()


def test_bytes_that_can_not_be_read_lose_only_what_they_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {name: torch.randn(3000) for name in "abc"}
    data = torch_bytes(given)
    bad = data.index(given["b"].numpy().tobytes()) + 5000
    real = os.pread

    def pread(fd: int, length: int, offset: int) -> bytes:
        if offset <= bad < offset + length:
            raise OSError(5, "Input/output error")
        return real(fd, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    report, out = saved(tmp_path, data)
    assert out.keys() == {"a", "c"} and all(same(out[name], given[name]) for name in out)
    assert [(each.name, "Input/output error" in each.reason) for each in report.lost] == [("b", True)]


# -- safetensors -----------------------------------------------------------------------------------------


def safetensors_bytes(folder: Path, tensors: Tensors) -> bytes:
    save_file(tensors, folder / "whole.safetensors", {"format": "pt"})
    return (folder / "whole.safetensors").read_bytes()


def test_of_a_cut_safetensors_file_each_tensor_before_the_cut_comes_out(tmp_path: Path) -> None:
    tensors = {f"t{at}": torch.randn(5, at + 1) for at in range(6)} | {"half": torch.randn(3).bfloat16()}
    data = safetensors_bytes(tmp_path, tensors)
    start = 8 + int.from_bytes(data[:8], "little")
    for end in range(start, len(data), 7):
        report, out = saved(tmp_path, data[:end])
        assert out.keys() | {each.name for each in report.lost} == tensors.keys()
        assert all(same(out[name], tensors[name]) for name in out)
        assert report.intact == 0, "nothing in the format proves it"
    report, out = saved(tmp_path, data[: start - 5])
    assert not out and "header" in report.lost[0].reason


def test_a_wrong_length_of_the_header_is_found_anew(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(50), "b": torch.randn(7, 3)}
    data = safetensors_bytes(tmp_path, tensors)
    for at in range(8):
        damaged = bytearray(data)
        damaged[at] ^= 0x11
        report, out = saved(tmp_path, bytes(damaged))
        assert not report.lost and all(same(out[name], tensors[name]) for name in tensors), at


def test_a_damaged_header_never_moves_a_tensor(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(50), "b": torch.randn(7, 3)}
    data = safetensors_bytes(tmp_path, tensors)
    contents = {(each.dtype, each.numpy().tobytes()) for each in tensors.values()}
    for at in range(8, 8 + int.from_bytes(data[:8], "little")):
        damaged = bytearray(data)
        damaged[at] ^= 0x01
        report, out = saved(tmp_path, bytes(damaged))
        for tensor in out.values():  # a name can change unnoticed, and nothing else
            known = any(tensor.numpy().tobytes() == content for _, content in contents)
            assert known, (at, out.keys())
        assert report.intact == 0


# -- torch.distributed.checkpoint ------------------------------------------------------------------------


def dcp_folder(folder: Path) -> tuple[Path, Tensors]:
    given = state()["model"]
    target = folder / "dcp"
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"model": given, "step": 7}, checkpoint_id=str(target), no_dist=True)
    return target, {f"model.{name}": tensor for name, tensor in given.items()}


def out_of(source: Path, out: Path) -> tuple[FileReport, Tensors]:
    out.unlink(missing_ok=True)
    [report] = salvage([str(source)], str(out))
    return report, load_file(out) if report.written else {}


def test_a_dcp_folder_comes_out_under_its_names(tmp_path: Path) -> None:
    folder, whole = dcp_folder(tmp_path)
    report, out = out_of(folder, tmp_path / "out.safetensors")
    assert not report.lost and out.keys() == whole.keys()
    assert all(same(out[name], whole[name]) for name in whole)


def test_damage_in_a_dcp_folder_falsifies_nothing(tmp_path: Path) -> None:
    folder, whole = dcp_folder(tmp_path)
    [file] = folder.glob("*.distcp")
    data = file.read_bytes()
    draw = random.Random(2)
    for at in range(0, len(data), 37):
        damaged = bytearray(data)
        damaged[at] ^= draw.choice([1, 65, 255])
        file.write_bytes(damaged)
        report, out = out_of(folder, tmp_path / "out.safetensors")
        assert all(same(out[name], whole[name]) for name in out), at
        assert len(report.lost) <= 1 and out.keys() | {each.name for each in report.lost} == whole.keys(), at
    for end in range(0, len(data), 501):
        file.write_bytes(data[:end])
        report, out = out_of(folder, tmp_path / "out.safetensors")
        assert all(same(out[name], whole[name]) for name in out), end
        assert out.keys() | {each.name for each in report.lost} == whole.keys(), end


def test_without_metadata_contents_come_out_under_their_place(tmp_path: Path) -> None:
    folder, whole = dcp_folder(tmp_path)
    (folder / ".metadata").unlink()
    report, out = out_of(folder, tmp_path / "out.safetensors")
    assert [each.name for each in report.lost] == [".metadata"]
    assert len(out) == len(whole)
    assert all(any(same(one, other) for other in out.values()) for one in whole.values())


def sharded(folder: Path, whole: torch.Tensor, boxes: list[tuple[int, int, int, int]]) -> Path:
    """A folder in which `w` lies in boxes (row, column, rows, columns), a file each, as several ranks write it."""
    folder.mkdir()
    chunks, places = [], {}
    for at, (row, column, rows, columns) in enumerate(boxes):
        data = torch_bytes(whole[row : row + rows, column : column + columns].clone())
        (folder / f"__{at}_0.distcp").write_bytes(data)
        corner = torch.Size((row, column))
        chunks.append(ChunkStorageMetadata(corner, torch.Size((rows, columns))))
        places[MetadataIndex("w", corner)] = _StorageInfo(f"__{at}_0.distcp", 0, len(data))
    described = TensorStorageMetadata(TensorProperties(dtype=whole.dtype), whole.shape, chunks)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({"w": described}, {"w": ("w",)}, places)))
    return folder


def test_shards_are_put_together_and_a_lost_one_leaves_the_others(tmp_path: Path) -> None:
    whole = torch.randn(6, 4)
    folder = sharded(tmp_path / "rows", whole, [(4, 0, 2, 4), (0, 0, 3, 4), (3, 0, 1, 4)])
    report, out = out_of(folder, tmp_path / "out.safetensors")
    assert not report.lost and same(out["w"], whole)
    (folder / "__2_0.distcp").unlink()
    report, out = out_of(folder, tmp_path / "out.safetensors")
    assert [each.name for each in report.lost] == ["w"]
    assert same(out["w[0:3, 0:4]"], whole[:3]) and same(out["w[4:6, 0:4]"], whole[4:])
    columns = sharded(tmp_path / "columns", whole, [(0, 0, 6, 1), (0, 1, 6, 3)])
    report, out = out_of(columns, tmp_path / "out.safetensors")
    assert not report.lost and same(out["w[0:6, 1:4]"], whole[:, 1:].contiguous())


def test_metadata_that_points_outside_the_folder_is_not_followed(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "x", torch.randn(2, 2), [(0, 0, 2, 2)])
    metadata = folder / ".metadata"
    (tmp_path / "_0_0.distcp").write_bytes(torch_bytes(torch.zeros(2, 2)))
    metadata.write_bytes(metadata.read_bytes().replace(b"__0_0.distcp", b"../_0_0.dist"))
    report, out = out_of(folder, tmp_path / "out.safetensors")
    assert report.lost[0].name == ".metadata" and "outside" in report.lost[0].reason
    assert set(out) == {"__0_0.distcp/tensor"}


# -- the command -----------------------------------------------------------------------------------------


def test_nothing_is_ever_overwritten(tmp_path: Path) -> None:
    source, out = tmp_path / "a.pt", tmp_path / "out.safetensors"
    source.write_bytes(torch_bytes({"w": torch.ones(2)}))
    out.write_text("mine")
    with pytest.raises(Refused, match="exists already"):
        salvage([str(source)], str(out))
    assert out.read_text() == "mine"
    with pytest.raises(InvalidInput):
        salvage([str(source)], str(tmp_path / "out.pt"))
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "out.safetensors"]


def test_several_files_come_out_apart(tmp_path: Path) -> None:
    for at, name in enumerate(["one/model.pt", "two/model.pt"]):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(torch_bytes({"w": torch.full((2,), float(at))}))
    reports = salvage([str(tmp_path / "one/model.pt"), str(tmp_path / "two/model.pt")], str(tmp_path / "out"))
    assert [load_file(each.written)["w"][0].item() for each in reports] == [0.0, 1.0]


def outlast(*arguments: str) -> tuple[int, str, str]:
    ran = subprocess.run([sys.executable, "-m", "outlast", *arguments], capture_output=True, text=True, timeout=120)
    return ran.returncode, ran.stdout, ran.stderr


def test_the_exit_code_says_whether_all_some_or_nothing_came_out(tmp_path: Path) -> None:
    data = torch_bytes({"first": torch.ones(50), "second": torch.zeros(50)})
    files = {"whole": data, "cut": data[: data.index(torch.ones(50).numpy().tobytes()) + 400], "none": data[:90]}
    for name, content in files.items():
        (tmp_path / f"{name}.pt").write_bytes(content)
    found = {}
    for name in files:
        code, out, _ = outlast(
            "salvage", str(tmp_path / f"{name}.pt"), "--to", str(tmp_path / f"{name}.safetensors"), "--json"
        )
        document = json.loads(out)
        found[name] = code, document["found"], document["intact"], document["lost"]
    assert found == {"whole": (0, 2, 2, 0), "cut": (3, 2, 1, 1), "none": (20, 1, 0, 1)}
    code, out, _ = outlast("salvage", str(tmp_path / "cut.pt"), "--to", str(tmp_path / "again.safetensors"))
    assert code == 3 and "Lost: second: " in out
    code, _, err = outlast("salvage", str(tmp_path / "cut.pt"), "--to", str(tmp_path / "again.safetensors"))
    assert code == 21 and "exists already" in err


def test_a_large_file_takes_little_memory_and_no_torch(tmp_path: Path) -> None:
    torch.save({f"w{at}": torch.full((10_000_000,), float(at)) for at in range(6)}, tmp_path / "a.pt")
    os.truncate(tmp_path / "a.pt", os.path.getsize(tmp_path / "a.pt") - 9_000_000)
    program = """if True:
        import sys
        from outlast.cli.main import main
        code = main(sys.argv[1:])
        [peak] = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
        print(code, peak, "torch" in sys.modules)
    """
    arguments = ["salvage", str(tmp_path / "a.pt"), "--to", str(tmp_path / "out.safetensors"), "--quiet"]
    ran = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120)
    code, kibibytes, has_torch = ran.stdout.split()[-3:]
    assert (code, has_torch) == ("3", "False"), ran.stdout + ran.stderr
    assert int(kibibytes) < 150 << 10
    assert len(load_file(tmp_path / "out.safetensors")) == 5


def test_a_file_that_unfolds_without_end_does_not_fill_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outlast.checkpoint.salvage._BYTES_MIN", 2 << 20)
    one = torch.ones(1)
    report, out = saved(tmp_path, torch_bytes({"a": one, **{f"x{at}": one.expand(1 << 18) for at in range(9)}}))
    assert report.bytes <= 2 << 20 and {"a", "x0"} <= out.keys()
    assert all("far more room" in each.reason for each in report.lost) and len(report.lost) == 8
