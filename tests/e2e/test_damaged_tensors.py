"""What is left of a model file when one of its tensors is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_repair import holder, made, mend, spoil
from trees import entries

from outlast.backup.tensors import restore_tensors
from outlast.repo import formats
from outlast.repo.content import Content, RecentChunks
from outlast.repo.repository import Repository


@pytest.mark.parametrize("lost", ["l0.w", "l3.w"])
def test_a_damaged_tensor_costs_no_other_tensor_of_its_file(tmp_path: Path, lost: str) -> None:
    """Also the first and the last one, which lie beside what tells where all of them are."""
    source = tmp_path / "source"
    source.mkdir()
    tensors = {f"l{number}.w": torch.randn(64, 256) for number in range(4)}
    torch.save(tensors, source / "m.pt")
    store = made(source)
    repository = Repository.open(store)
    entry, chunks = entries(repository)["m.pt"], RecentChunks(repository)
    [place] = [each for each in formats.tensors(Content(entry, chunks.get).read, entry.size) or [] if each.name == lost]
    name, at = holder(store, "m.pt", place.offset)
    spoil(store, name, at + 5)
    report = mend(store)
    [file] = report.lost
    assert (file.tensors, file.tensors_whole) == ([lost], 3)
    kept = sorted(set(tensors) - {lost})
    restored = restore_tensors(Repository.open(store), repository.snapshots()[0], kept, str(tmp_path / "t.safetensors"))
    assert restored.verified
    assert all(torch.equal(found, tensors[name]) for name, found in load_file(tmp_path / "t.safetensors").items())
