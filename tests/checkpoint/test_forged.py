"""What `state.json` says may be damaged or made up: then it is called so, whatever stands there."""

from __future__ import annotations

import copy
import json
import random  # noqa: TID251  its state is put back
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from outlast.checkpoint import load as loading
from outlast.checkpoint import state_file
from outlast.checkpoint.data import placed
from outlast.checkpoint.run import Run
from outlast.errors import Corrupt, Refused


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3).to(memory_format=torch.channels_last)
        self.turn = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        self.again = self.conv.bias
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("table", torch.arange(4), persistent=False)


def made() -> dict[str, Any]:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3),
        "loader": placed(DataLoader(range(9), batch_size=2, shuffle=True)),  # type: ignore[arg-type]
        "torch": torch.Generator(),
        "numpy": np.random.default_rng(1),
        "old": np.random.RandomState(1),
        "random": random.Random(1),
        "tensor": torch.ones(2, 2),
        "values": {},
    }


VALUES: dict[str, Any] = {
    "big": [1 << 70, float("nan"), 1 - 2j, b"\0", bytearray(b"\1")],
    "kept": [(1, (2,)), {3}, frozenset({4}), deque([5], 6), OrderedDict(a=7), Counter("aa"), {8: 9}, torch.Size([1])],
    "torch": [torch.float16, torch.device("cpu"), torch.arange(3)],
    "numpy": [np.float32(0.5), np.arange(4, dtype=">u2").reshape(2, 2)],
}


class Saved:
    """A checkpoint, and what its `state.json` says."""

    def __init__(self, folder: Path) -> None:
        state = made()
        state["values"].update(VALUES)
        model, optimizer = state["model"], state["optimizer"]
        (model.conv(torch.ones(1, 3, 3, 3)).sum() + model.turn.abs().sum()).backward()
        optimizer.step()
        self.run = Run(str(folder / "runs"), name="x", state=state)
        model.conv.weight.grad = torch.ones_like(model.conv.weight)  # one that is still needed
        self.run.step()
        self.snapshot = self.run.save().wait_verified()
        self.repository = self.run._tiers.disk.repository
        shelf = loading.Shelf(
            {each.path: each for each in self.repository.entries(self.snapshot)},
            "",
            loading.RecentChunks(self.repository),
            self.snapshot,
        )
        self.said = json.loads(state_file.read(shelf.files["state.json"], loading.RecentChunks(self.repository)))

    def load(self, said: bytes, **given: Any) -> loading.Loaded:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(state_file, "read", lambda *_: said)
            return loading.load(self.repository, self.snapshot, made(), **given)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("forged"))


@pytest.fixture(autouse=True)
def _same_random_numbers() -> Iterator[None]:
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything, but of long lists of numbers to the first ones alone."""
    if path:
        yield path
    inner = node.items() if isinstance(node, dict) else enumerate(node[:20]) if isinstance(node, list) else ()
    for key, each in inner:
        yield from places(each, (*path, key))


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def deep(levels: int) -> Any:
    found: Any = []
    for _ in range(levels):
        found = [found]
    return found


GONE = object()
ODD = [
    GONE, None, True, -1, 0, 3, 1 << 63, 10**200, -(1 << 70), 1.5, "", "x", "cuda:7", "a\ud800", "O", "<f8", [], {},
    [1], [[1]], ["x"], {"x": 1}, deep(150), deep(600), {"$": None}, {"$": "what"}, {"$": ["tensor"]}, {"$": "tensor"},
    {"$": "tensor", "name": 7}, {"$": "tensor", "name": "nowhere"}, {"$": "tensor", "name": "x", "global": None},
    {"$": "tensor", "name": "x", "global": {"shape": [-1], "offset": ["a"]}}, {"$": "float", "v": "1"},
    {"$": "int", "v": "9" * 5000}, {"$": "complex", "v": ["0x1p99999", "x"]}, {"$": "bytes", "v": "?"},
    {"$": "tuple", "v": 1}, {"$": "set", "v": [[]]}, {"$": "deque", "v": [], "max": 1 << 70}, {"$": "size", "v": ["x"]},
    {"$": "dict", "v": [1]}, {"$": "dict", "v": [[[], 1]]}, {"$": "counter", "v": [[1]]}, {"$": "dtype", "v": "nn"},
    {"$": "dtype", "v": "classes"}, {"$": "device", "v": "moon"}, {"$": "scalar", "dtype": "<f8", "v": "00"},
    {"$": "scalar", "dtype": "O", "v": "0000000000000000"}, {"$": "scalar", "dtype": "<f3", "v": "000000"},
    {"$": "array", "dtype": "<f8", "v": 1},
]  # fmt: skip


def only_refused(load: Callable[[], object]) -> None:
    try:
        load()
    except (Corrupt, Refused) as exc:
        assert "checkpoint" in exc.message or "state" in exc.message


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data())
def test_whatever_stands_there_is_taken_or_refused(saved: Saved, data: st.DataObject) -> None:
    said = copy.deepcopy(saved.said)
    paths = list(places(said))
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(paths))
        odd = data.draw(st.sampled_from(ODD) | st.sampled_from(paths).map(lambda path: at(saved.said, path)))
        try:
            place = at(said, path[:-1])
            if odd is GONE:
                del place[path[-1]]
            else:
                place[path[-1]] = copy.deepcopy(odd)
        except (LookupError, TypeError):
            continue  # the first change took away where the second was to be
    only_refused(lambda: saved.load(json.dumps(said).encode()))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_damaged_text_is_taken_or_refused(saved: Saved, data: st.DataObject) -> None:
    said = bytearray(json.dumps(saved.said).encode())
    where = data.draw(st.integers(0, len(said) - 1))
    said[where : where + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    only_refused(lambda: saved.load(bytes(said)))


def test_what_was_saved_is_taken(saved: Saved) -> None:
    assert saved.load(json.dumps(saved.said).encode()).step == 1


@pytest.mark.parametrize(
    "path, odd, told",
    [
        (("parts", "values", 1, "torch", 2, "name"), 7, r"state\['values'\]\['torch'\]\[2\]"),
        (("parts", "values", 1, "torch", 2, "name"), "gone", "the files of values lack the tensor gone"),
        (("parts", "values", 1, "torch", 0, "v"), "classes", r"state\['values'\]\['torch'\]\[0\], of kind 'dtype'"),
        (("parts", "values", 1, "kept", 0), {"$": "other"}, r"\['kept'\]\[0\] is of a kind 'other'"),
        (("parts", "optimizer", 1, "param_groups"), GONE, r"state\['optimizer'\].*param_groups"),
        (("parts", "model", 1, "state"), GONE, r"state\['model'\]"),
        (("parts", "model", 1, "state", "conv.weight", "order"), [0, 0, 1, 2], "conv.weight has a memory order"),
        (("parts", "model", 1, "state", "seen", "complex"), True, "seen is stored in a form that holds no complex"),
        (("parts", "model", 1, "state", "seen", "global"), {"shape": [3, 1], "offset": [0, 0]}, "seen is no block"),
        (("parts", "model", 1, "state", "seen", "global"), {"shape": [3], "offset": [1]}, "seen is no block"),
        (("parts", "model", 1, "state", "seen", "global"), {"shape": [-3], "offset": [0]}, "shape"),
        (("parts", "values", 1, "kept", 1), deep(150), "100 levels deep"),
        (("parts", "old", 1, "state", "pos"), 10**6, "numbers"),
        (("parts", "rng", 1, "numpy", "state", "pos"), 10**6, "random number generators"),
        (("parts", "../x"), ["value", {}], "'../x', which can't be the key"),
        (("facts", "classes"), [], "facts"),
        (("step",), 2, "is of step 2, and the checkpoint of step 1"),
    ],
)
def test_it_is_told_where(saved: Saved, path: tuple[Any, ...], odd: Any, told: str) -> None:
    said = copy.deepcopy(saved.said)
    place = at(said, path[:-1])
    if odd is GONE:
        del place[path[-1]]
    else:
        place[path[-1]] = odd
    with pytest.raises((Corrupt, Refused), match=told) as raised:
        saved.load(json.dumps(said).encode())
    assert isinstance(raised.value, Corrupt) or path[1] == "old"
    assert saved.snapshot.id[:8] in str(raised.value) or path[1] == "old"


def test_a_check_comes_before_anything_is_changed(saved: Saved) -> None:
    state = made()
    before = state["model"].conv.weight.clone()
    drawn = torch.get_rng_state()

    def check(loaded: loading.Loaded) -> None:
        assert loaded.step == 1
        raise Refused(f"not {loaded.facts['environment']}")

    with pytest.raises(Refused, match=r"not .*python"):
        loading.load(saved.repository, saved.snapshot, state, check=check)
    assert torch.equal(state["model"].conv.weight, before)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not state["optimizer"].state
