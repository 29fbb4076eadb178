"""When a checkpoint is whole, by real files of each format and by what trainers write last."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.numpy import save

from outlast.backup.trained import Contents, Seen, contents
from outlast.backup.wholeness import flaw


def seen(folder: Path) -> Contents:
    things = []
    for path in sorted(folder.rglob("*"), key=lambda path: path.parts):
        status = path.stat()
        kind = "dir" if path.is_dir() else "file"
        name = os.fsencode(path.relative_to(folder))
        things.append(Seen(name, kind, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino))
    return contents(things)


def flaw_in(folder: Path, name: str) -> str:
    found = seen(folder)
    [one] = [each for each in found.checkpoints if each.name == name.encode()]

    def read(path: bytes, offset: int, length: int) -> bytes:
        return (folder / os.fsdecode(path)).read_bytes()[offset : offset + length]

    return flaw(one, found.pointers, read)


def torch_bytes(**options: object) -> bytes:
    file = io.BytesIO()
    torch.save({"w": torch.arange(5000.0), "step": 3}, file, **options)
    return file.getvalue()


def hdf5_bytes(**options: object) -> bytes:
    file = io.BytesIO()
    with h5py.File(file, "w", **options) as opened:
        opened["w"] = np.arange(5000.0)
    return file.getvalue()


def npz_bytes() -> bytes:
    file = io.BytesIO()
    np.savez(file, w=np.arange(5000.0))
    return file.getvalue()


FORMATS: dict[str, Callable[[], bytes]] = {
    "epoch_1.pt": torch_bytes,
    "epoch=1.ckpt": torch_bytes,
    "model.safetensors": lambda: save({"w": np.arange(5000.0)}),
    "model.weights.h5": hdf5_bytes,
    "newer.h5": lambda: hdf5_bytes(libver="latest"),
    "arrays.npz": npz_bytes,
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_is_whole_at_no_length_but_its_own(name: str, tmp_path: Path) -> None:
    data = FORMATS[name]()
    file = tmp_path / name
    file.write_bytes(data)
    assert flaw_in(tmp_path, name) == ""
    for length in [0, *range(8, len(data), 331), len(data) - 1]:
        file.write_bytes(data[:length])
        assert name in flaw_in(tmp_path, name), length


@pytest.mark.parametrize("version", ["earliest", "latest"])
def test_an_hdf5_file_that_is_still_open_is_not_whole(version: str, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "model.h5", "w", libver=version) as file:
        for number in range(3):
            file[f"layer{number}"] = np.arange(300_000.0)
        assert "still open" in flaw_in(tmp_path, "model.h5")
    assert flaw_in(tmp_path, "model.h5") == ""


def test_a_legacy_torch_file_has_no_end_to_look_for(tmp_path: Path) -> None:
    (tmp_path / "old.pt").write_bytes(torch_bytes(_use_new_zipfile_serialization=False))
    assert flaw_in(tmp_path, "old.pt") == ""


def test_every_shard_that_an_index_or_a_name_tells_of_has_to_be_there(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    shards = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    for shard in shards:
        (folder / shard).write_bytes(save({"w": np.arange(10.0)}))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {f"w{shard}": shard for shard in shards}}))
    assert flaw_in(tmp_path, "export") == ""
    (folder / shards[1]).unlink()
    assert "1 of the 3 parts" in flaw_in(tmp_path, "export")
    index.write_text('{"weight_map": {"w": "other.safetensors", "v": ')
    (folder / shards[1]).write_bytes(save({"w": np.arange(10.0)}))
    assert "ends early" in flaw_in(tmp_path, "export")
    index.write_text('{"weight_map": {"w": "other.safetensors"}}')
    assert flaw_in(tmp_path, "export").startswith("other.safetensors, which")


def test_a_dcp_folder_is_whole_with_its_metadata_and_all_that_it_names(tmp_path: Path) -> None:
    folder = tmp_path / "step_7"
    dcp.save({"w": torch.arange(3000.0), "b": torch.ones(7)}, checkpoint_id=folder, no_dist=True)
    assert flaw_in(tmp_path, "step_7") == ""
    [shard] = folder.glob("*.distcp")
    data, metadata = shard.read_bytes(), (folder / ".metadata").read_bytes()
    (folder / ".metadata").unlink()
    assert ".metadata, which is written last" in flaw_in(tmp_path, "step_7")
    (folder / ".metadata").write_bytes(metadata[:-20])
    assert "ends early" in flaw_in(tmp_path, "step_7")
    (folder / ".metadata").write_bytes(metadata)
    shard.write_bytes(data[:5000])
    assert "too short" in flaw_in(tmp_path, "step_7")
    shard.rename(folder / "__9_9.distcp")
    assert "not there yet" in flaw_in(tmp_path, "step_7")


def test_the_trainer_writes_its_state_last(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-500"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert seen(tmp_path).checkpoints == [], "what has no model yet is none"
    (folder / "model.safetensors").write_bytes(save({"w": np.arange(10.0)}))
    assert flaw_in(tmp_path, "checkpoint-500") == "", "other trainers of that name write no state"
    (folder / "training_args.bin").write_bytes(torch_bytes())
    assert "trainer_state.json" in flaw_in(tmp_path, "checkpoint-500")
    (folder / "trainer_state.json").write_text("{}")
    assert flaw_in(tmp_path, "checkpoint-500") == ""
    (folder / "optimizer.pt.tmp").write_text("")
    assert "still being written" in flaw_in(tmp_path, "checkpoint-500")


@pytest.mark.parametrize(
    ("pointer", "name", "inside", "content"),
    [
        ("latest", "global_step500", "mp_rank_00_model_states.pt", "global_step500"),
        ("latest_checkpointed_iteration.txt", "iter_0000500", "mp_rank_00/model_optim_rng.pt", "500\n"),
    ],
)
def test_deepspeed_and_megatron_say_when_they_are_through(
    pointer: str, name: str, inside: str, content: str, tmp_path: Path
) -> None:
    file = tmp_path / name / inside
    file.parent.mkdir(parents=True)
    (tmp_path / pointer).write_text("400")
    file.write_bytes(torch_bytes())
    os.utime(tmp_path / pointer, ns=(0, 10**9))
    assert "doesn't name it yet" in flaw_in(tmp_path, name)
    (tmp_path / pointer).write_text(content)
    os.utime(tmp_path / pointer, ns=(0, 10**9))
    assert flaw_in(tmp_path, name) == "", "named, whatever the clocks say"
    (tmp_path / pointer).write_text("600")
    assert flaw_in(tmp_path, name) == "", "it was written after it, for a later one"
