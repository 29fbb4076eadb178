"""Chosen tensors come out of any known format into one safetensors file that the real library reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outlast import errors
from outlast.backup.create import create
from outlast.backup.restore import RestoreReport
from outlast.backup.tensors import restore_tensors
from outlast.records import Chunking, Snapshot
from outlast.repo.repository import Repository
from outlast.store.local import LocalStore

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file  # noqa: E402

SMALL = Chunking(block_bytes=4096, min_bytes=1024, avg_bytes=4096, max_bytes=16384)


@pytest.fixture
def weights() -> dict[str, Any]:
    torch.manual_seed(7)
    return {
        "embed.weight": torch.randn(300, 64),
        "layer.0.weight": torch.randn(64, 64, dtype=torch.bfloat16),
        "layer.0.bias": torch.randn(64),
        "layer.1.weight": torch.randn(64, 64, dtype=torch.float16),
        "count": torch.tensor(12, dtype=torch.int64),
        "none": torch.zeros(0, 5),
    }


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository.create(LocalStore(str(tmp_path / "repository")), chunking=SMALL)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


def back_up(repository: Repository, source: Path) -> Snapshot:
    return repository.find_snapshot(create(repository, [os.fsencode(source)]).snapshot)


def run(repository: Repository, source: Path, names: list[str], target: Path, **options: Any) -> RestoreReport:
    return restore_tensors(repository, back_up(repository, source), names, os.fsencode(target), **options)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_chosen_tensors_come_back(
    repository: Repository, source: Path, tmp_path: Path, weights: dict[str, Any], kind: str
) -> None:
    if kind == "pt":
        torch.save({**weights, "turned": weights["embed.weight"].T}, source / "model.pt")
        weights["turned"] = weights["embed.weight"].T
    else:
        save_file(weights, source / "model.safetensors")
    target = tmp_path / "out" / "some.safetensors"
    report = run(repository, source, ["layer.*", "count", "none", "turned" if kind == "pt" else "count"], target)
    wanted = {name: each for name, each in weights.items() if name != "embed.weight"}
    assert same(load_file(target), wanted)
    assert (report.files, report.bytes, report.verified) == (1, target.stat().st_size, True)
    assert os.listdir(target.parent) == ["some.safetensors"]


def test_only_the_chunks_that_are_needed_are_fetched(
    repository: Repository, source: Path, tmp_path: Path, weights: dict[str, Any]
) -> None:
    weights["huge"] = torch.randn(1 << 20)
    save_file(weights, source / "model.safetensors")
    (tmp_path / "out").mkdir()
    report = run(repository, source, ["layer.0.bias"], tmp_path / "out")
    assert same(load_file(tmp_path / "out" / "tensors.safetensors"), {"layer.0.bias": weights["layer.0.bias"]})
    assert report.bytes_fetched < 64 << 10


def test_the_same_tensor_in_two_formats_is_written_once(
    repository: Repository, source: Path, tmp_path: Path, weights: dict[str, Any]
) -> None:
    save_file(weights, source / "model.safetensors")
    torch.save(weights, source / "model.pt")
    run(repository, source, ["*"], tmp_path / "x.safetensors")
    assert same(load_file(tmp_path / "x.safetensors"), weights)


def test_tensors_that_share_a_name_and_differ_get_the_path_of_their_file(
    repository: Repository, source: Path, tmp_path: Path
) -> None:
    one, two = {"w": torch.ones(9)}, {"w": torch.zeros(9), "v": torch.ones(2)}
    save_file(one, source / "one.safetensors")
    save_file(two, source / "two.safetensors")
    run(repository, source, ["*"], tmp_path / "x.safetensors")
    assert same(
        load_file(tmp_path / "x.safetensors"),
        {"one.safetensors/w": one["w"], "two.safetensors/w": two["w"], "v": two["v"]},
    )
    run(repository, source, ["w"], tmp_path / "y.safetensors", include=["two.*"])
    assert same(load_file(tmp_path / "y.safetensors"), {"w": two["w"]})


def test_an_existing_file_is_kept_unless_overwritten(
    repository: Repository, source: Path, tmp_path: Path, weights: dict[str, Any]
) -> None:
    save_file(weights, source / "model.safetensors")
    target = tmp_path / "x.safetensors"
    target.write_bytes(b"old")
    report = run(repository, source, ["count"], target)
    assert Path(report.kept_as).read_bytes() == b"old"
    assert run(repository, source, ["count"], target, overwrite=True).kept_as == ""
    assert len(os.listdir(tmp_path)) == 4


@pytest.mark.parametrize(("modes", "mode"), [([0o600], 0o600), ([0o644], 0o644), ([0o664, 0o640], 0o640), ([0], 0o600)])
def test_nobody_may_read_a_tensor_who_may_not_read_its_file(
    repository: Repository, source: Path, tmp_path: Path, modes: list[int], mode: int
) -> None:
    for number, each in enumerate(modes):
        save_file({f"w{number}": torch.full((9,), number)}, source / f"{number}.safetensors")
        (source / f"{number}.safetensors").chmod(each)
    snapshot = back_up(repository, source)
    mask = os.umask(0)
    try:
        restore_tensors(repository, snapshot, ["*"], os.fsencode(tmp_path / "x.safetensors"))
    finally:
        os.umask(mask)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == mode


def test_columns_first_arrays_come_back_in_rows(repository: Repository, source: Path, tmp_path: Path) -> None:
    array = np.asfortranarray(np.arange(6000, dtype=np.int32).reshape(60, 100))
    np.save(source / "a.npy", array)
    run(repository, source, ["array"], tmp_path / "x.safetensors")
    assert torch.equal(load_file(tmp_path / "x.safetensors")["array"], torch.from_numpy(np.ascontiguousarray(array)))


def test_a_name_that_fits_nothing_and_a_type_that_cannot_be_written(
    repository: Repository, source: Path, tmp_path: Path, weights: dict[str, Any]
) -> None:
    save_file(weights, source / "model.safetensors")
    torch.save({"c": torch.zeros(3, dtype=torch.complex128)}, source / "c.pt")
    with pytest.raises(errors.NotFound, match=r"fits layer\.9\.\*;"):
        run(repository, source, ["count", "layer.9.*"], tmp_path / "x.safetensors")
    with pytest.raises(errors.InvalidInput, match="C128"):
        run(repository, source, ["c"], tmp_path / "x.safetensors")
    (tmp_path / "folder.safetensors" / "tensors.safetensors").mkdir(parents=True)
    with pytest.raises(errors.InvalidInput, match="is not a file"):
        run(repository, source, ["count"], tmp_path / "folder.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_a_damaged_file_is_named_and_can_be_left_out(
    repository: Repository, source: Path, tmp_path: Path, weights: dict[str, Any]
) -> None:
    save_file(weights, source / "good.safetensors")
    torch.manual_seed(8)
    save_file({"layer.2.weight": torch.randn(64, 64)}, source / "hurt.safetensors")
    snapshot = back_up(repository, source)
    [entry] = [each for each in repository.entries(snapshot) if each.path == "hurt.safetensors"]
    place = repository.locate(bytes.fromhex(entry.chunks[0][0]))
    pack = tmp_path / "repository" / "packs" / place.pack.name[:2] / place.pack.name
    pack.chmod(0o644)
    with pack.open("r+b") as file:
        file.seek(place.offset)
        file.write(b"\xff\xff")
    with pytest.raises(errors.Corrupt, match=r"hurt\.safetensors can't be read"):
        restore_tensors(repository, snapshot, ["layer.*"], os.fsencode(tmp_path / "x.safetensors"))
    restore_tensors(repository, snapshot, ["layer.*"], os.fsencode(tmp_path / "x.safetensors"), include=["good.*"])
    assert load_file(tmp_path / "x.safetensors").keys() == {"layer.0.weight", "layer.0.bias", "layer.1.weight"}


def test_a_target_that_is_no_name_for_such_a_file_is_said(
    repository: Repository, source: Path, tmp_path: Path, weights: dict[str, Any]
) -> None:
    save_file(weights, source / "model.safetensors")
    snapshot = back_up(repository, source)
    for target, reason in [(tmp_path / "x.bin", "no name for a file of tensors"), ("", "target is empty")]:
        with pytest.raises(errors.InvalidInput, match=reason):
            restore_tensors(repository, snapshot, ["count"], os.fspath(target))
    assert sorted(os.listdir(tmp_path)) == ["repository", "source"]


def test_the_report_names_what_was_written_under_which_name_and_what_could_not_be(
    repository: Repository, source: Path, tmp_path: Path
) -> None:
    save_file({"w": torch.ones(9)}, source / "one.safetensors")
    torch.save({"w": torch.zeros(9), "c": torch.zeros(3, dtype=torch.complex128)}, source / "two.pt")
    save_file({"v": torch.ones(2)}, source / "three.safetensors")
    report = run(repository, source, ["*"], tmp_path / "x.safetensors")
    assert (
        sorted(report.tensors)
        == sorted(load_file(tmp_path / "x.safetensors"))
        == ["one.safetensors/w", "two.pt/w", "v"]
    )
    assert report.renamed == {"one.safetensors/w": "w", "two.pt/w": "w"}
    assert report.path == os.fspath(tmp_path / "x.safetensors")
    [skipped] = report.skipped
    assert skipped.path == "two.pt:c" and "C128" in skipped.reason and "nothing was written" not in skipped.reason
