"""`show` and `diff`: which files and tensors there are, and how many bytes of each changed."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from safetensors.torch import save

from outlast.backup.inspect import FileView, diff, show
from outlast.clock import ManualClock
from outlast.errors import Corrupt
from outlast.records import ChunkRef, Entry, Snapshot, path_order, path_text, time_text
from outlast.repo import formats
from outlast.repo.chunker import cutter, pieces
from outlast.repo.content import Content, RecentChunks
from outlast.repo.pack import object_name
from outlast.repo.repository import Repository
from outlast.store.memory import MemoryStore

BLOCK_BYTES = 4 << 20


@pytest.fixture
def repository() -> Repository:
    return Repository.create(MemoryStore(), compression="none", clock=ManualClock(seed=5))


def keep(repository: Repository, contents: dict[str, bytes], extra: list[Entry] | None = None) -> Snapshot:
    """Commit files, cut as a backup cuts them."""
    writer = repository.writer()
    entries = [*(extra or ())]
    for name, content in contents.items():
        refs: list[ChunkRef] = []
        found = formats.spans(lambda offset, length, content=content: content[offset : offset + length], len(content))
        for piece in pieces(len(content), found, (), repository.format.chunking):
            at = piece.offset
            lengths = [piece.length]
            if piece.cut:
                lengths = cutter(repository.format.chunking)(content[at : at + piece.length], True)
            for length in lengths:
                refs.append(writer.add(writer.prepare(content[at : at + length], piece.item_bytes)))
                at += length
        entries.append(Entry(path_text(name.encode()), "file", mode=0o644, size=len(content), chunks=refs))
    for entry in sorted(entries, key=lambda entry: path_order(entry.raw_path)):
        writer.add_entry(entry)
    return writer.commit(Snapshot("", "backup", "test", time_text(repository.clock.now_ns())))


def weights(seed: int, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def torch_file(state: object) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def npy_file(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def views(repository: Repository, snapshot: Snapshot) -> dict[str, FileView]:
    return {view.entry.path: view for view in show(repository, snapshot)}


def test_show_finds_tensors_by_content_whatever_the_name(repository: Repository) -> None:
    state = weights(1, a=(3, 4), b=(700,))
    snapshot = keep(
        repository,
        {
            "model.safetensors": save(state),
            "no-suffix": torch_file({"model": state, "step": 7}),
            "array.bin": npy_file(np.arange(6, dtype=np.int16).reshape(2, 3)),
            "lies.safetensors": b"\x10\0\0\0\0\0\0\0{" + b"x" * 100,
            "notes.txt": b"plain text, long enough to be looked into",
            "empty": b"",
        },
    )
    found = views(repository, snapshot)
    assert list(found) == sorted(found, key=lambda path: path_order(path.encode()))
    assert {path: view.format for path, view in found.items() if view.format} == {
        "array.bin": "npy",
        "model.safetensors": "safetensors",
        "no-suffix": "torch",
    }
    tensors = {each.name: (each.dtype, each.shape, each.length) for each in found["no-suffix"].tensors or ()}
    assert tensors == {"model.a": ("F32", (3, 4), 48), "model.b": ("F32", (700,), 2800)}
    assert [(each.dtype, each.shape) for each in found["array.bin"].tensors or ()] == [("I16", (2, 3))]


def test_show_goes_on_past_a_damaged_file(repository: Repository) -> None:
    first = keep(repository, {"bad.safetensors": save(weights(1, a=(5000,)))})
    both = keep(repository, {"bad.safetensors": save(weights(1, a=(5000,))), "good.npy": npy_file(np.zeros(9))})
    [damaged] = {repository.locate(bytes.fromhex(chunk)).pack.name for chunk, _ in first.manifest}
    for name in list(repository.state.packs):
        if name == damaged:
            data = bytearray(repository.store.get(object_name(name)))
            location = repository.locate(bytes.fromhex(next(repository.entries(both)).chunks[0][0]))
            data[location.offset] ^= 1
            repository.store.put(object_name(name), [bytes(data)])
    found = views(repository, both)
    assert "damaged" in found["bad.safetensors"].problem
    assert found["good.npy"].format == "npy"


def test_nothing_differs_between_equal_snapshots(repository: Repository) -> None:
    contents = {"m.safetensors": save(weights(1, a=(3000,))), "a/b": b"1", "a.b": b"2"}
    report = diff(repository, keep(repository, contents), keep(repository, contents))
    assert not (report.files.added or report.files.removed or report.files.changed or report.bytes_changed)


def test_files_are_paired_by_path_in_manifest_order(repository: Repository) -> None:
    before = keep(repository, {"a/z": b"1", "a.txt": b"2", "gone": b"345", "same": b"6"})
    after = keep(repository, {"a/z": b"1", "a.txt": b"other", "same": b"6", "zz/new": b"78"})
    report = diff(repository, before, after)
    assert [(each.path, each.bytes) for each in report.files.added] == [("zz/new", 2)]
    assert [(each.path, each.bytes) for each in report.files.removed] == [("gone", 3)]
    assert [(each.path, each.what, each.bytes_changed) for each in report.files.changed] == [("a.txt", ["content"], 5)]
    assert (report.bytes_added, report.bytes_removed, report.bytes_changed) == (2, 3, 5)


def test_mode_link_and_type_changes_are_changes_but_times_are_not(repository: Repository) -> None:
    def links(target: str, kind: str, mode: int, mtime_ns: int) -> list[Entry]:
        return [
            Entry("link", "symlink", target=target),
            Entry("kind", kind),  # type: ignore[arg-type]
            Entry("mode", "dir", mode=mode),
            Entry("time", "dir", mtime_ns=mtime_ns),
        ]

    before = keep(repository, {}, links("a", "dir", 0o755, 1))
    after = keep(repository, {}, links("b", "fifo", 0o700, 2))
    changed = {each.path: each.what for each in diff(repository, before, after).files.changed}
    assert changed == {"link": ["target"], "kind": ["type"], "mode": ["mode"]}


def test_one_changed_block_of_a_large_tensor(repository: Repository) -> None:
    state = weights(2, big=(3 * BLOCK_BYTES // 4 + 1000,), other=(2000,))
    before = keep(repository, {"m.safetensors": save(state)})
    state["big"][BLOCK_BYTES // 4 + 5] += 1
    report = diff(repository, before, keep(repository, {"m.safetensors": save(state)}))
    [tensor] = report.tensors.changed
    assert (tensor.path, tensor.name, tensor.bytes) == ("m.safetensors", "big", state["big"].nbytes)
    assert tensor.bytes_changed == BLOCK_BYTES == report.bytes_changed == report.files.changed[0].bytes_changed


def test_small_tensors_inside_shared_chunks_are_told_apart(repository: Repository) -> None:
    state = weights(3, bias=(8,), scale=(8,), weight=(4000,))
    before = keep(repository, {"m.safetensors": save(state)})
    state["scale"][3] = 9
    report = diff(repository, before, keep(repository, {"m.safetensors": save(state)}))
    assert [(each.name, each.bytes_changed) for each in report.tensors.changed] == [("scale", 32)]


def test_tensors_that_moved_are_not_changed(repository: Repository) -> None:
    state = weights(4, a=(5000,), tiny=(3,))
    before = keep(repository, {"model": save(state)})
    moved = keep(repository, {"model": save({**weights(5, first=(999,)), **state})})
    report = diff(repository, before, moved)
    assert [each.name for each in report.tensors.added] == ["first"]
    assert not report.tensors.changed
    assert not report.tensors.removed


def test_another_container_format_holds_the_same_tensors(repository: Repository) -> None:
    state = weights(6, a=(5000,), b=(100, 3))
    before = keep(repository, {"model": save(state)})
    report = diff(repository, before, keep(repository, {"model": torch_file(state)}))
    assert report.files.changed[0].what == ["content"]
    assert (report.tensors.added, report.tensors.removed, report.tensors.changed) == ([], [], [])


def test_views_are_compared_by_their_elements(repository: Repository) -> None:
    state = weights(7, a=(40, 50))
    before = keep(repository, {"model": save(state), "same": save(state)})
    turned = {"a": state["a"].t().contiguous().t()}  # the same elements in another order in the file
    assert not turned["a"].is_contiguous()
    report = diff(repository, before, keep(repository, {"model": torch_file(turned), "same": save(state)}))
    assert not report.tensors.changed
    turned["a"][1, 2] += 1
    report = diff(repository, before, keep(repository, {"model": torch_file(turned), "same": save(state)}))
    assert [(each.name, each.bytes_changed) for each in report.tensors.changed] == [("a", 8000)]


def test_a_new_dtype_or_shape_is_named_with_the_old_one(repository: Repository) -> None:
    before = keep(repository, {"m": save({"a": torch.zeros(4, 500), "gone": torch.ones(7)})})
    after = keep(repository, {"m": save({"a": torch.zeros(2000, dtype=torch.bfloat16)})})
    report = diff(repository, before, after)
    [changed] = report.tensors.changed
    assert (changed.dtype_before, changed.shape_before) == ("F32", (4, 500))
    assert (changed.dtype, changed.shape, changed.bytes_changed) == ("BF16", (2000,), 4000)
    assert [each.name for each in report.tensors.removed] == ["gone"]


def test_holes_are_compared_without_reading_them(repository: Repository) -> None:
    writer = repository.writer()
    data = writer.add(writer.prepare(b"d" * 1000))
    sparse = Entry("big", "file", size=(1 << 50) + 1000, chunks=[data], holes=[(0, 1 << 50)])
    whole = Entry("big", "file", size=(1 << 50) + 1000, chunks=[data], holes=[(1000, 1 << 50)])
    before, after = keep(repository, {}, [sparse]), keep(repository, {}, [whole])
    writer.commit(Snapshot("", "backup", "data", time_text(0)))
    report = diff(repository, before, after)
    assert [(each.what, each.bytes_changed) for each in report.files.changed] == [(["content"], 0)]
    assert report.problems == []


def test_content_is_read_at_any_offset_over_chunks_and_holes(repository: Repository) -> None:
    writer = repository.writer()
    chunks = [writer.add(writer.prepare(bytes([65 + number]) * (number + 1), 1)) for number in range(12)]
    plain = b"".join(bytes([65 + number]) * (number + 1) for number in range(12))
    plain = bytes(5) + plain[:1] + bytes(7) + plain[1:] + bytes(3)
    entry = Entry("a", "file", size=len(plain), chunks=chunks, holes=[(0, 5), (6, 7), (len(plain) - 3, 3)])
    writer.add_entry(entry)
    writer.commit(Snapshot("", "backup", "test", time_text(repository.clock.now_ns())))
    recent = RecentChunks(repository)
    content = Content(entry, recent.get)
    for offset in range(len(plain) + 2):
        for length in (0, 1, 2, 9, 40, 200):
            assert content.read(offset, length) == plain[offset : offset + length]
    before = recent.bytes_fetched
    assert content.read(60, 1) == content.read(60, 1) == plain[60:61]
    assert recent.bytes_fetched - before <= 12, "a chunk is fetched once"
    short = Entry("b", "file", size=3, chunks=[(chunks[3][0], 3)])
    with pytest.raises(Corrupt, match="has 4 bytes, not 3"):
        Content(short, recent.get).read(0, 3)
