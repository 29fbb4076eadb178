"""Which things in a trainer's folder are checkpoints, and what their names tell."""

from __future__ import annotations

import pytest

from outlast.backup.trained import Contents, Found, Seen, compare, contents, tags
from outlast.records import Entry


def folder(*paths: str, own_name: str = "out") -> Contents:
    """Contents of a folder with these files, each written a second after the one before."""
    seen: dict[bytes, Seen] = {}
    for number, path in enumerate(paths):
        parts = path.encode().split(b"/")
        for depth in range(1, len(parts)):
            above = b"/".join(parts[:depth])
            seen.setdefault(above, Seen(above, "dir"))
        kind, name = ("link", path[:-1]) if path.endswith("@") else ("file", path)
        seen[name.encode()] = Seen(name.encode(), kind, 10, number * 10**9, number * 10**9, number)
    return contents([seen[path] for path in sorted(seen, key=lambda path: path.split(b"/"))], own_name.encode())


def names(found: Contents) -> dict[str, list[str]]:
    return {each.name.decode(): [source.decode() for source in each.sources] for each in found.checkpoints}


def test_of_the_trainer_each_folder_is_one_and_the_exported_model_another() -> None:
    found = folder(
        *(f"checkpoint-{step}/{name}" for step in (10, 9) for name in ("model.safetensors", "trainer_state.json")),
        *("tmp-checkpoint-500/model.safetensors", "runs/Nov22/events.out.tfevents.1", ".cache/x.pt"),
        *("config.json", "model.safetensors", "training_args.bin", "tokenizer.json", "trainer_state.json"),
    )
    own = ["config.json", "model.safetensors", "tokenizer.json", "trainer_state.json", "training_args.bin"]
    assert names(found) == {"checkpoint-10": ["checkpoint-10"], "checkpoint-9": ["checkpoint-9"], ".": own}
    assert [each.name for each in found.checkpoints] == [b"checkpoint-10", b"checkpoint-9", b"."], "oldest first"
    assert found.others == [b"runs"]


def test_files_are_checkpoints_and_parts_belong_together() -> None:
    found = folder(
        *("epoch_1.pt", "epoch_2.pt", "last.ckpt", "best.ckpt@", "train.log", "config.json", "weights.h5"),
        *("big-00001-of-00002.safetensors", "big-00002-of-00002.safetensors", "big.safetensors.index.json"),
        *("ckpt-7.index", "ckpt-7.data-00000-of-00001", "checkpoint", "half.pt.tmp", "x.ckpt.part"),
    )
    big = ["big-00001-of-00002.safetensors", "big-00002-of-00002.safetensors", "big.safetensors.index.json"]
    assert names(found) == {
        **{name: [name] for name in ("epoch_1.pt", "epoch_2.pt", "last.ckpt", "weights.h5")},
        "big.safetensors": big,
        "ckpt-7": ["ckpt-7.data-00000-of-00001", "ckpt-7.index"],
    }
    assert found.others == [b"best.ckpt", b"checkpoint", b"config.json", b"train.log"]


def test_what_holds_no_model_is_none() -> None:
    found = folder("eval_step_500/metrics.json", "figures/loss.png", "step_600/params", "orbax/manifest.ocdbt")
    assert names(found).keys() == {"step_600", "orbax"}, "of an unknown trainer, and of Orbax"
    assert found.others == [b"eval_step_500", b"figures"]


def test_files_that_say_which_is_the_last_are_none() -> None:
    found = folder("global_step5/mp_rank_00_model_states.pt", "latest", "zero_to_fp32.py", "iter_0000005/x/model.pt")
    assert names(found).keys() == {"global_step5", "iter_0000005"}
    assert found.pointers.keys() == {b"latest"}


@pytest.mark.parametrize(
    "paths",
    [
        ("__0_0.distcp", "__1_0.distcp", ".metadata"),
        ("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/model.safetensors"),
        ("adapter_config.json", "adapter_model.safetensors"),
    ],
)
def test_a_folder_that_is_a_model_is_one_checkpoint(paths: tuple[str, ...]) -> None:
    [found] = folder(*paths).checkpoints
    assert found.name == b"."
    assert {each.path.decode() for each in found.files} == set(paths)


def test_a_single_checkpoint_that_is_watched_keeps_all_its_parts() -> None:
    paths = ("trainer_state.json", "model.safetensors", "global_step500/mp_rank_00_model_states.pt", "latest")
    assert names(folder(*paths, own_name="checkpoint-500"))["."] == sorted(["global_step500", *paths[:2], "latest"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("checkpoint-500", {"step": "500"}),
        ("global_step12", {"step": "12"}),
        ("epoch=2-step=300.ckpt", {"step": "300", "epoch": "2"}),
        ("ep1-ba100-rank0.pt", {"step": "100", "epoch": "1"}),
        ("000700", {"step": "700"}),
        ("model_epoch_3.pt", {"epoch": "3"}),
        ("llama-it-7b", {}),
        ("model-00001-of-00002.safetensors", {}),
        ("bestep3", {}),
    ],
)
def test_a_name_tells_the_step(name: str, expected: dict[str, str]) -> None:
    assert tags(name.encode()) == expected


# -- the same as a snapshot? -----------------------------------------------------------------------


def found(*files: tuple[str, int, int]) -> Found:
    seen = tuple(Seen(f"c/{path}".encode(), "file", size, time) for path, size, time in files)
    return Found(b"c", (b"c",), (Seen(b"c", "dir"), *seen))


def entry(path: str, size: int, mtime_ns: int, **more: object) -> Entry:
    return Entry(path, "file", size=size, mtime_ns=mtime_ns, **more)  # type: ignore[arg-type]


MANIFEST = [Entry(".", "dir", mtime_ns=99), entry("a", 1, 5), entry("b", 2, 6)]


def test_a_checkpoint_is_told_from_its_snapshot_by_sizes_and_times() -> None:
    assert compare(found(("a", 1, 5), ("b", 2, 6)), MANIFEST) == "same"
    assert compare(found(("a", 1, 5)), MANIFEST) == "fewer", "it is being deleted"
    assert compare(found(("a", 1, 5), ("b", 2, 7)), MANIFEST) == "other"
    assert compare(found(("a", 1, 5), ("b", 3, 6)), MANIFEST) == "other"
    assert compare(found(("a", 1, 5), ("b", 2, 6), ("c", 0, 0)), MANIFEST) == "other"


def test_what_was_unstable_or_can_be_read_now_is_taken_again() -> None:
    now = found(("a", 1, 5))
    assert compare(now, [entry("a", 1, 5, unstable=True)]) == "other"
    unreadable = [Entry("a", "unreadable", reason="Permission denied")]
    assert compare(now, unreadable) == "same"
    assert compare(now, unreadable, readable=[b"c/a"]) == "other"
