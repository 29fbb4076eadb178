"""torch.distributed.checkpoint over a repository: real processes, real FSDP2, and what must never happen."""

from __future__ import annotations

import hashlib
import io
import json
import math
import multiprocessing
import os
import random  # noqa: TID251  seeded
import signal
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import LoadPlan, WriteItem
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

import outlast
from outlast.checkpoint import dcp_metadata, dcp_read
from outlast.checkpoint.dcp import OutlastReader, OutlastWriter
from outlast.checkpoint.dcp_read import rows
from outlast.errors import Busy, Corrupt, InvalidInput, OutlastError, Refused
from outlast.events import ListSink
from outlast.records import Snapshot
from outlast.repo.check import check

NAME = "run"


@pytest.fixture(autouse=True)
def _single_process_is_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "repository")


def save(url: str, state: dict[str, Any], **more: Any) -> str:
    """The id of the snapshot."""
    metadata = dcp.save(state, storage_writer=OutlastWriter(url, name=NAME), **more)
    assert metadata.storage_meta is not None
    return str(metadata.storage_meta.checkpoint_id)


def load(url: str, state: dict[str, Any], **more: Any) -> dict[str, Any]:
    dcp.load(state, storage_reader=OutlastReader(url, name=NAME, **more))
    return state


def snapshots(url: str) -> list[Snapshot]:
    return outlast.open(url).snapshots()


def failure(found: pytest.ExceptionInfo[CheckpointException]) -> BaseException:
    return next(iter(found.value.failures.values()))[0]


# -- one process -----------------------------------------------------------------------------------------


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return {
        "wide": torch.randn(700, 900),
        "bf16": torch.randn(33, 5).bfloat16(),
        "f8": torch.randn(17).to(torch.float8_e4m3fn),
        "bool": torch.rand(9) > 0.5,
        "complex": torch.randn(3, 2, dtype=torch.complex64),
        "scalar": torch.tensor(4.5),
        "empty": torch.empty(0, 3),
        "turned": torch.randn(50, 60).t(),
        "last": torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),
    }


def bits(tensor: torch.Tensor) -> bytes:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("at_once_bytes", [4 << 20, 64])
def test_tensors_come_back_bit_for_bit(url: str, at_once_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp_read, "_RUN_BYTES_MAX", at_once_bytes)
    monkeypatch.setattr(dcp_read, "_PASSING_BYTES_MAX", at_once_bytes)
    state = tensors()
    save(url, dict(state))
    found = load(url, {name: torch.zeros_like(value) for name, value in state.items()})
    for name, value in state.items():
        assert bits(found[name]) == bits(value), name
        assert found[name].stride() == value.stride()


def test_a_tensor_of_another_type_is_converted_as_torch_does(url: str) -> None:
    weight = torch.randn(100, 10)
    save(url, {"w": weight})
    assert torch.equal(load(url, {"w": torch.zeros(100, 10).bfloat16()})["w"], weight.bfloat16())


OBJECTS = {
    "step": 1000,
    "big": 1 << 70,
    "nothing": None,
    "yes": True,
    "lr": 0.1 + 0.2,
    "infinite": float("-inf"),
    "text": "größe \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
    "list": [1, [2.5, "x"], None],
    "pair": (1, (2, "three")),
    "keys": {"0": {"betas": (0.9, 0.999), "$odd": "dollar"}},
    "numpy": np.float32(0.3),
    "bytes": b"\x00\xff",
    "dtype": torch.bfloat16,
}


def test_objects_come_back_as_they_were(url: str) -> None:
    state = {**OBJECTS, "holds": (torch.arange(5), np.arange(6.0).reshape(2, 3))}
    save(url, state)
    found = load(url, dict.fromkeys(OBJECTS) | {"keys": {"0": {"betas": 0, "$odd": 0}}, "holds": 0})
    for name, value in OBJECTS.items():
        assert found[name] == value and type(found[name]) is type(value), name
    assert torch.equal(found["holds"][0], torch.arange(5))
    assert found["holds"][1].dtype == np.float64 and found["holds"][1].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_checkpoint_is_safetensors_and_json_and_no_pickle(url: str, tmp_path: Path) -> None:
    state = {"model": {"weight": torch.randn(300, 40), "bias": torch.randn(40)}, "step": 7}
    save(url, state, checkpoint_id="step-7")
    repository = outlast.open(url)
    [snapshot] = repository.snapshots()
    assert (snapshot.kind, snapshot.name, snapshot.tags) == ("checkpoint", NAME, {"step": "7"})
    target = tmp_path / "restored"
    outlast.restore(repository, outlast.plan_restore(repository, snapshot, str(target)))
    assert {each.name for each in target.iterdir()} == {"dcp.json", "shards-00000.safetensors"}
    found = load_file(target / "shards-00000.safetensors")
    assert torch.equal(found["model.weight"], state["model"]["weight"])
    described = json.loads((target / "dcp.json").read_text())
    assert described["objects"]["step"]["tree"] == 7 and described["saved_by"]["ranks"] == 1
    for file in target.iterdir():
        assert b"\x80\x02" not in file.read_bytes()[:4096]


def test_the_same_tensors_in_a_backup_are_stored_once(url: str, tmp_path: Path) -> None:
    state = {f"w{at}": torch.randn(512, 4096) for at in range(4)}
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    torch.save(state, folder / "model.pt")
    save(url, dict(state))
    repository = outlast.open(url)
    report = outlast.back_up(repository, str(folder), name="model")
    again = save(url, dict(state))
    assert [repository.find_snapshot(report.snapshot).bytes > 64 << 20, len(snapshots(url))] == [True, 3]
    for snapshot in (report.snapshot, again):
        assert outlast.open(url).find_snapshot(snapshot).bytes_added < 64 << 10


def test_an_encrypted_checkpoint(url: str) -> None:
    weight = torch.randn(300, 300)
    dcp.save({"w": weight}, storage_writer=OutlastWriter(url, name=NAME, passphrase="words"))
    assert torch.equal(load(url, {"w": torch.zeros(300, 300)}, passphrase="words")["w"], weight)
    with pytest.raises(CheckpointException, match="passphrase"):
        load(url, {"w": weight})
    stored = b"".join(path.read_bytes() for path in Path(url, "packs").rglob("*") if path.is_file())
    assert bits(weight)[:64] not in stored and b"shards-00000" not in stored


def test_tied_tensors_are_stored_once(url: str) -> None:
    weight = torch.randn(1000, 1000)
    save(url, {"embedding": weight, "head": weight})
    assert snapshots(url)[0].bytes < 4.1e6
    found = load(url, {"embedding": torch.zeros(1000, 1000), "head": torch.zeros(1000, 1000)})
    assert torch.equal(found["head"], weight) and torch.equal(found["embedding"], weight)


class Unsafe:
    pass


class Transforming(DefaultSavePlanner):
    """Makes its bytes itself, so that they are all there is to go by."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        return super().transform_object(write_item, object)


@pytest.mark.parametrize("planner", [DefaultSavePlanner, Transforming])
def test_what_only_pickle_could_keep_is_refused_with_its_path(
    url: str, planner: Callable[[], DefaultSavePlanner]
) -> None:
    save(url, {"w": torch.ones(3), "step": 1}, planner=planner())
    with pytest.raises(CheckpointException, match=r"state\['config'\]\['hook'\]") as found:
        save(url, {"w": torch.zeros(3), "config": {"hook": [1, Unsafe()]}}, planner=planner())
    assert isinstance(failure(found), Refused)
    assert len(snapshots(url)) == 1
    assert load(url, {"w": torch.zeros(3), "step": 0})["step"] == 1
    assert load(url, {"w": torch.zeros(3)})["w"].tolist() == [1, 1, 1]


def test_the_load_never_sees_stored_bytes_as_a_pickle(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What planners unpickle is made at the load, from JSON."""
    seen: list[bytes] = []

    class Watching(DefaultLoadPlanner):
        def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
            seen.append(value.getvalue())
            super().load_bytes(read_item, value)

    save(url, {"step": 3, "x": [1, 2]})
    packs = b"".join(path.read_bytes() for path in Path(url, "packs").rglob("*") if path.is_file())
    dcp.load({"step": 0, "x": []}, storage_reader=OutlastReader(url, name=NAME), planner=Watching())
    assert len(seen) == 2 and all(each not in packs and each[:2] == b"PK" for each in seen)
    assert b"PK\x03\x04" not in packs


def test_which_checkpoint_is_loaded(url: str) -> None:
    writer = OutlastWriter(url, name=NAME)
    ids = []
    for step in (10, 20, 30):
        metadata = dcp.save({"w": torch.full((2,), step)}, storage_writer=writer, checkpoint_id=f"/run/step-{step}")
        assert metadata.storage_meta is not None
        ids.append(str(metadata.storage_meta.checkpoint_id))
    dcp.save({"w": torch.zeros(2, dtype=torch.int64)}, storage_writer=OutlastWriter(url, name="other", step=99))
    assert [each.tags["step"] for each in snapshots(url)] == ["10", "20", "30", "99"]

    def first(checkpoint_id: str | None = None, **more: Any) -> int:
        state = {"w": torch.zeros(2, dtype=torch.int64)}
        dcp.load(state, storage_reader=OutlastReader(url, name=NAME, **more), checkpoint_id=checkpoint_id)
        return int(state["w"][0])

    assert first() == 30
    assert first("20") == 20 and first("step-20/") == 20
    assert first(ids[0]) == 10 and first(snapshot=ids[1][:8]) == 20 and first(snapshot=snapshots(url)[0]) == 10
    with pytest.raises(CheckpointException, match="no checkpoint of step 25 named run"):
        first("25")
    with pytest.raises(InvalidInput, match="does not end with the number of a step"):
        first("newest")


def test_a_step_told_once_is_not_that_of_the_next_save(url: str) -> None:
    writer = OutlastWriter(url, name=NAME)
    dcp.save({"w": torch.ones(2)}, storage_writer=writer, checkpoint_id="5")
    dcp.save({"w": torch.ones(2)}, storage_writer=writer)
    assert [each.tags for each in snapshots(url)] == [{"step": "5"}, {}]


def test_a_damaged_pack_is_named_with_the_tensors_it_costs(url: str) -> None:
    state = {"whole": torch.randn(400, 1000), "hurt": torch.randn(400, 1000)}
    save(url, dict(state))
    [pack] = [path for path in Path(url, "packs").rglob("*") if path.is_file()]
    data = bytearray(pack.read_bytes())
    at = bytes(data).index(bits(state["hurt"])[:64])
    data[at + 1000] ^= 1
    pack.chmod(0o644)
    pack.write_bytes(data)
    with pytest.raises(
        CheckpointException, match=f"hurt of checkpoint .* can't be read: pack {pack.name[:16]}"
    ) as found:
        load(url, {name: torch.zeros(400, 1000) for name in state})
    assert isinstance(failure(found), Corrupt)
    only = load(url, {"whole": torch.zeros(400, 1000)})
    assert torch.equal(only["whole"], state["whole"])


def test_a_damaged_description_is_named(url: str) -> None:
    save(url, {"w": torch.ones(1000), "note": "to be found"})
    [pack] = [path for path in Path(url, "packs").rglob("*") if path.is_file()]
    data = pack.read_bytes()
    pack.chmod(0o644)
    pack.write_bytes(data.replace(b"to be found", b"to be lost!"))
    with pytest.raises(CheckpointException, match=f"pack {pack.name[:16]} is damaged"):
        load(url, {"w": torch.ones(1000)})


class Caching(DefaultSavePlanner):
    pass


def test_plans_that_torch_keeps_from_save_to_save(url: str) -> None:
    planner, writer = Caching(enable_plan_caching=True), OutlastWriter(url, name=NAME)
    for step in (1, 2, 3):
        state = {"w": torch.full((100,), float(step)), "step": step} | ({"new": torch.ones(2)} if step == 3 else {})
        dcp.save(state, storage_writer=writer, planner=planner)
        found = load(url, {name: torch.zeros_like(value) if name != "step" else 0 for name, value in state.items()})
        assert found["step"] == step and bool((found["w"] == step).all())


def test_a_checkpoint_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(CheckpointException, match="there is no repository"):
        load(url, {"w": torch.ones(1)})
    repository = outlast.create(url)
    repository.writer().commit(Snapshot("", "checkpoint", NAME, "2026-01-01T00:00:00.000000Z"))
    with pytest.raises(CheckpointException, match=r"it has no dcp\.json"):
        load(url, {"w": torch.ones(1)})


def test_ranks_that_see_different_checkpoints_load_neither() -> None:
    reader = OutlastReader("memory://none", name=NAME)
    with pytest.raises(Busy, match="different latest checkpoints"):
        reader.prepare_global_plan([LoadPlan([], "a" * 32), LoadPlan([], "b" * 32)])


def test_without_collectives_it_is_refused(url: str) -> None:
    with pytest.raises(OutlastError, match="each rank would commit"):
        OutlastWriter(url, name=NAME).set_up_storage_writer(True, rank=0, use_collectives=False)


def described(**changes: Any) -> bytes:
    shard = {"offsets": [0], "sizes": [4], "file": "f", "name": "w"}
    found = {
        "version": 1, "torch": "", "saved_by": {"ranks": 1}, "objects": {}, "planner": None,
        "tensors": {"w": {"dtype": "float32", "size": [4], "shards": [shard | changes.pop("shard", {})]}},
    }  # fmt: skip
    found["tensors"]["w"] |= changes.pop("tensor", {})  # type: ignore[index]
    return json.dumps(found | changes).encode()


@pytest.mark.parametrize(
    "lie",
    [
        {"shard": {"sizes": [1 << 60]}, "tensor": {"size": [1 << 60]}},
        {"shard": {"offsets": [1]}},
        {"shard": {"offsets": [-1]}},
        {"shard": {"sizes": [4, 1]}},
        {"shard": {"file": "g"}},
        {"tensor": {"size": [9]}},
        {"tensor": {"dtype": "load"}},
        {"tensor": {"shards": []}},
        {"tensors": {"w": 3}},
    ],
)
def test_a_description_that_lies_is_damage(lie: dict[str, Any]) -> None:
    dcp_metadata.read(described(), {"f": 16}, "dcp.json")
    with pytest.raises(Corrupt):
        dcp_metadata.read(described(**lie), {"f": 16}, "dcp.json")


def test_a_later_version_is_refused() -> None:
    with pytest.raises(Refused, match="version 2"):
        dcp_metadata.read(described(version=2), {"f": 16}, "dcp.json")


def test_rows_cover_what_is_wanted_and_little_more() -> None:
    draw = random.Random(11)
    for _ in range(300):
        sizes = [draw.randint(1, 6) for _ in range(draw.randint(0, 4))]
        offsets = [draw.randint(0, size - 1) for size in sizes]
        lengths = [draw.randint(0, size - offset) for size, offset in zip(sizes, offsets, strict=True)]
        elements_max = draw.choice([1, 4, 30])
        stored = torch.arange(math.prod(sizes)).reshape(sizes)
        found = torch.full(lengths, -1)
        for part in rows(sizes, offsets, lengths, elements_max):
            count = math.prod(part.shape)
            assert count <= max(elements_max, math.prod(part.shape[1:]))
            read = stored.reshape(-1)[part.offset : part.offset + count].reshape(part.shape)
            into = found[part.prefix]
            if part.shape:
                into = into.narrow(0, part.start, part.shape[0])
            for dimension, (offset, length) in enumerate(part.columns, 1):
                read = read.narrow(dimension, offset, length)
            into.copy_(read)
        wanted = tuple(slice(offset, offset + length) for offset, length in zip(offsets, lengths, strict=True))
        assert torch.equal(found, stored[wanted]), (sizes, offsets, lengths, elements_max)


# -- several processes -----------------------------------------------------------------------------------


def ranks(count: int, work: Callable[[Path], None], folder: Path, *, dying: bool = False) -> list[int]:
    """Run `work(folder)` in so many processes that know each other; their exit codes."""
    context = multiprocessing.get_context("forkserver")  # imports torch once
    context.set_forkserver_preload(["torch.distributed.checkpoint", "torch.distributed.fsdp", "outlast.checkpoint.dcp"])
    meet = folder / f"meet-{work.__name__}-{count}"
    started = [context.Process(target=_rank, args=(rank, count, meet, work, folder)) for rank in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        if process.is_alive():
            process.kill()
            process.join()
    codes = [process.exitcode or 0 for process in started]
    if not dying:
        assert codes == [0] * count
    return codes


def _rank(rank: int, count: int, meet: Path, work: Callable[[Path], None], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meet}", rank=rank, world_size=count, timeout=timedelta(seconds=60)
    )
    work(folder)
    dist.destroy_process_group()


def built() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Of sizes that neither 2 nor 4 ranks divide; of some a rank has nothing."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(33, 257), nn.ReLU(), nn.Linear(257, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(2):
        model(torch.randn(4, 33)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer}


def digest(state: dict[str, Any]) -> str:
    """Of every tensor as a whole, and every number."""
    hasher = hashlib.sha256()

    def add(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value):
                add(f"{path}.{key}", value[key])
        elif isinstance(value, torch.Tensor):
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            hasher.update(path.encode() + bits(whole.detach()))
        else:
            hasher.update(f"{path}={value!r}".encode())

    add("", state)
    return hasher.hexdigest()


def save_sharded(folder: Path) -> None:
    model, optimizer = built()
    train(model, optimizer)
    state = state_of(model, optimizer) | {"step": 2}
    dcp.save(state, storage_writer=OutlastWriter(str(folder / "repository"), name=NAME, step=2))
    found = digest(state)
    if dist.get_rank() == 0:
        (folder / "digest").write_text(found)


def load_sharded(folder: Path) -> None:
    model, optimizer = built()
    state = state_of(model, optimizer) | {"step": 0}
    sink = ListSink()
    dcp.load(state, storage_reader=OutlastReader(str(folder / "repository"), name=NAME, sink=sink))
    assert digest(state) == (folder / "digest").read_text()
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
    )  # fmt: skip
    assert digest(state_of(model, optimizer) | {"step": 2}) == (folder / "digest").read_text()
    if not dist.is_initialized() or dist.get_rank() == 0:
        now = "4 ranks (dp=4)" if dist.is_initialized() else "1 rank"
        assert f"saved with 2 ranks (dp=2), now {now}: resharding" in sink.events[-1].reason


def test_fsdp_of_two_ranks_loads_on_one_and_on_four(tmp_path: Path, url: str) -> None:
    ranks(2, save_sharded, tmp_path)
    repository = outlast.open(url)
    [snapshot] = repository.snapshots()
    assert {each.path for each in repository.entries(snapshot)} == {
        ".", "dcp.json", "shards-00000.safetensors", "shards-00001.safetensors",
    }  # fmt: skip
    load_sharded(tmp_path)
    ranks(4, load_sharded, tmp_path)


def columns(folder: Path) -> None:
    """Sharded by columns, replicated tensors beside, an object on each rank; then one rank fails, and dies."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    torch.manual_seed(9)
    whole = torch.randn(64, 130)
    state: dict[str, Any] = {"tall": distribute_tensor(whole, mesh, [Shard(1)])}
    state |= {f"copy{at}": torch.full((100, 100), float(at)) for at in range(4)} | {"step": 1}
    writer = Failing(str(folder / "repository"), name=NAME)
    dcp.save(state, storage_writer=writer)
    state |= {f"late{at}": torch.randn(300, 300) for at in range(2)} | {"step": 2}
    Failing.moment = "raise"
    with pytest.raises(CheckpointException, match="the disk of rank 1 is gone"):
        dcp.save(state, storage_writer=writer)
    Failing.moment = ""
    dcp.save(state, storage_writer=writer)
    assert snapshots(writer._url)[-1].bytes_added < 500_000  # what rank 1 had stored before it failed still counts
    assert writer._repository is not None and not writer._repository.own_packs
    state |= {"step": 3, "more": torch.randn(500, 500)}
    Failing.moment = "die"
    dcp.save(state, storage_writer=writer)


class Failing(OutlastWriter):
    """On rank 1, after everything is durable."""

    moment = ""

    def write_data(self, plan: Any, planner: Any) -> Any:
        done = super().write_data(plan, planner)
        if dist.get_rank() == 1 and self.moment == "raise":
            raise OSError("the disk of rank 1 is gone")
        if dist.get_rank() == 1 and self.moment == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return done


def test_a_rank_that_fails_or_dies_leaves_the_checkpoint_before(tmp_path: Path, url: str) -> None:
    codes = ranks(2, columns, tmp_path, dying=True)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, -signal.SIGKILL)
    repository = outlast.open(url)
    assert len(repository.snapshots()) == 2
    assert check(repository, data="all").ok
    torch.manual_seed(9)
    whole = torch.randn(64, 130)
    found = load(url, {"tall": torch.zeros(64, 130), "copy3": torch.zeros(100, 100), "step": 0})
    assert found["step"] == 2 and torch.equal(found["tall"], whole) and bool((found["copy3"] == 3).all())
    # What is replicated is stored by one rank, and both take part.
    names: list[list[str]] = []
    target = tmp_path / "restored"
    latest = repository.find_snapshot("latest")
    outlast.restore(repository, outlast.plan_restore(repository, latest, str(target)))
    for rank in range(2):
        names.append(sorted(load_file(target / f"shards-{rank:05d}.safetensors")))
    assert sorted(names[0] + names[1]) == [
        "copy0", "copy1", "copy2", "copy3", "late0", "late1", "tall@0,0", "tall@0,65",
    ]  # fmt: skip
    assert len(names[0]) == len(names[1]) == 4


def apart(folder: Path) -> None:
    rank = dist.get_rank()
    url = str(folder / f"repository-{rank}")
    writer = OutlastWriter(url, name=NAME)
    with pytest.raises(CheckpointException, match=r"sees no repository at .*repository-1, though the coordinator"):
        dcp.save({f"w{rank}": torch.ones(3)}, storage_writer=writer)
    if rank == 1:
        outlast.create(url)
    with pytest.raises(CheckpointException, match="not the same repository for all ranks"):
        dcp.save({f"w{rank}": torch.ones(3)}, storage_writer=writer)
    assert snapshots(url) == []


def test_ranks_that_store_into_different_places_save_nothing(tmp_path: Path) -> None:
    ranks(2, apart, tmp_path)


def in_background(folder: Path) -> None:
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

    writer = OutlastWriter(str(folder / "repository"), name=NAME)
    for step, kind in enumerate((AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS), 1):
        state = {"w": torch.full((1000, 1000), float(step)), "step": step}
        pending = dcp.async_save(state, storage_writer=writer, checkpoint_id=str(step), async_checkpointer_type=kind)
        state["w"].fill_(-1)
        metadata: Any = pending.result()
        assert snapshots(writer._url)[-1].id == metadata.storage_meta.checkpoint_id


def test_async_save_in_a_thread_and_in_a_process(tmp_path: Path, url: str) -> None:
    ranks(1, in_background, tmp_path)
    assert [each.tags for each in snapshots(url)] == [{"step": "1"}, {"step": "2"}]
    for step in (1, 2):
        state: dict[str, Any] = {"w": torch.zeros(1000, 1000), "step": 0}
        dcp.load(state, storage_reader=OutlastReader(url, name=NAME), checkpoint_id=str(step))
        assert state["step"] == step and bool((state["w"] == step).all())
