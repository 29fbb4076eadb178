"""What a checkpoint holds of a training state comes back as it was, whatever the state is made of; or it is refused."""

from __future__ import annotations

import copy
import random  # noqa: TID251  a state that is captured
from collections import Counter, OrderedDict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from outlast.checkpoint.run import Run
from outlast.errors import Refused


def saved(folder: Path, state: dict[str, Any]) -> None:
    with Run(str(folder / "runs"), name="x", state=state) as run:
        run.step()
        run.save().wait_verified()


def loaded(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    with Run(str(folder / "runs"), name="x", state=state) as run:
        assert run.load() == 1
    return state


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(300, 8)
        self.head = nn.Linear(8, 300, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("table", torch.arange(20.0))
        self.register_buffer("part", self.table[5:9], persistent=False)


def test_tied_weights_and_views_stay_tied(tmp_path: Path) -> None:
    model = Tied()
    saved(tmp_path, {"model": model})
    found = loaded(tmp_path, {"model": Tied()})["model"]
    assert found.head.weight is found.embedding.weight
    assert torch.equal(found.head.weight, model.head.weight)
    found.table[5] = 77
    assert found.part[0] == 77
    sizes = [entry.size for entry in _entries(tmp_path) if entry.path == "model.safetensors"]
    assert sizes[0] < 2 * model.head.weight.nbytes, "the weight that is tied is stored twice"


def _entries(folder: Path) -> Any:
    run = Run(str(folder / "runs"), name="x", state={"x": {}})
    return list(run._tiers.disk.repository.entries(run.checkpoints()[-1][1]))


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


def test_a_compiled_model_and_a_plain_one_are_the_same(tmp_path: Path) -> None:
    model = net()
    inner = nn.Sequential(torch.compile(net()), nn.Linear(4, 4))
    saved(tmp_path / "a", {"model": torch.compile(model)})
    assert torch.equal(loaded(tmp_path / "a", {"model": net()})["model"][2].weight, model[2].weight)
    saved(tmp_path / "b", {"model": model})
    found = loaded(tmp_path / "b", {"model": torch.compile(net())})["model"]
    assert torch.equal(found._orig_mod[2].weight, model[2].weight)
    saved(tmp_path / "c", {"model": inner})
    found = loaded(tmp_path / "c", {"model": nn.Sequential(net(), nn.Linear(4, 4))})["model"]
    assert torch.equal(found[0][2].weight, inner[0]._orig_mod[2].weight)


def test_an_averaged_copy_beside_its_model(tmp_path: Path) -> None:
    model = net()
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        ema.update_parameters(model)
    saved(tmp_path, {"model": model, "ema": ema, "optimizer": optimizer})
    other = net()
    fresh = torch.optim.swa_utils.AveragedModel(other)
    state = {"model": other, "ema": fresh, "optimizer": torch.optim.AdamW(other.parameters())}
    found = loaded(tmp_path, state)
    assert found["ema"].n_averaged == 3
    assert torch.equal(found["ema"].module[0].weight, ema.module[0].weight)
    assert not torch.equal(found["ema"].module[0].weight, found["model"][0].weight)


def test_the_state_of_an_optimizer_follows_names_not_positions(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.AdamW([{"params": [model[0].weight, model[2].weight], "lr": 0.5},
                                   {"params": [model[0].bias, model[2].bias], "weight_decay": 0.0}])  # fmt: skip
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    saved(tmp_path, {"model": model, "optimizer": optimizer})
    other = net()
    turned = torch.optim.AdamW([{"params": [other[2].bias, other[0].bias]},
                                {"params": [other[2].weight, other[0].weight]}])  # fmt: skip
    loaded(tmp_path, {"model": other, "optimizer": turned})
    for at, kind in ((0, "weight"), (2, "weight"), (0, "bias"), (2, "bias")):
        before, after = getattr(model[at], kind), getattr(other[at], kind)
        for name, value in optimizer.state[before].items():
            assert torch.equal(turned.state[after][name], value), (at, kind, name)
    assert [group["lr"] for group in turned.param_groups] == [0.001, 0.5]
    assert [group["weight_decay"] for group in turned.param_groups] == [0.0, 0.01]


def test_every_kind_of_value_comes_back_bit_for_bit(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "numbers": [0.1, -0.0, float("inf"), 5e-324, 1 << 80, -(1 << 63), True, None],
        "nested": {"tuple": (1, (2, [3])), "set": {1, 2}, 7: "integer key", ("a", 1): "tuple key"},
        "ordered": OrderedDict(b=1, a=2),
        "counted": Counter("hello"),
        "queue": deque([1, 2, 3], maxlen=5),
        "bytes": [b"\0\xff", bytearray(b"\0\xfe")],
        "complex": 1 - 0.5j,
        "numpy": {"scalar": np.float32(0.1), "big": np.arange(6, dtype=">u2").reshape(2, 3), "flag": np.bool_(True)},
        "types": [torch.bfloat16, torch.device("cpu"), torch.Size([2, 3])],
        "$odd": {"$": "a key of ours"},
        "text": "ünïcode\n",
    }
    tensors = {
        name: torch.arange(12).to(dtype).reshape(3, 4)
        for name, dtype in vars(torch).items()
        if isinstance(dtype, torch.dtype)
        and name in ("float64", "float16", "bfloat16", "int8", "uint8", "uint16", "uint64", "bool", "complex64",
                     "float8_e4m3fn", "float8_e5m2")
    }  # fmt: skip
    tensors |= {
        "strided": torch.arange(24.0).reshape(4, 6)[::2, 1::2],
        "lying": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.5),
        "nan": torch.tensor([0x7FC00001, 0x7F800001], dtype=torch.int32).view(torch.float32),
        "conjugated": torch.tensor([1 + 2j]).conj(),
        "negative": torch.tensor([1 + 2j]).conj().imag,
    }
    saved(tmp_path, {"values": values, "tensors": tensors})
    found = loaded(tmp_path, {"values": {}, "tensors": {}})
    assert repr(found["values"]) == repr(values)
    for name, tensor in tensors.items():
        assert found["tensors"][name].dtype == tensor.dtype, name
        assert found["tensors"][name].shape == tensor.shape, name
        assert bits(found["tensors"][name]) == bits(tensor), name
    assert found["tensors"]["lying"].stride() == tensors["lying"].stride()


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    def made() -> dict[str, Any]:
        return {"a": torch.Generator(), "b": np.random.default_rng(1), "c": random.Random(1),
                "d": np.random.RandomState(1)}  # fmt: skip

    def drawn(state: dict[str, Any]) -> list[Any]:
        own = [torch.rand(1, generator=state["a"]).item(), state["b"].random(), state["c"].random(), state["d"].rand()]
        return [*own, torch.rand(1).item(), np.random.rand(), random.random()]

    state = made()
    drawn(state)
    saved(tmp_path, state)
    wanted = drawn(state)
    assert drawn(loaded(tmp_path, made())) == wanted


def bits(tensor: torch.Tensor) -> bytes:
    whole = torch.empty(tensor.shape, dtype=tensor.dtype)
    whole.copy_(tensor)
    return bytes(whole.flatten().view(torch.uint8).tolist())


class Opaque:
    pass


@pytest.mark.parametrize(
    "state, path",
    [
        ({"a": {"b": [1, Opaque()]}}, r"state\['a'\]\['b'\]\[1\] is a .*Opaque"),
        ({"a": {"f": print}}, r"state\['a'\]\['f'\]"),
        ({"a": {"t": torch.eye(3).to_sparse()}}, "the tensor t is sparse"),
        ({"a": {"t": torch.empty(3, device="meta")}}, "meta"),
        ({"a": {"n": np.array([object()])}}, r"state\['a'\]\['n'\]"),
        ({"a": {"file": "caf\udce9"}}, r"state\['a'\]\['file'\] has a lone surrogate"),
        ({"a": [{"caf\udce9": 1}]}, r"state\['a'\]\[0\]\['caf\\udce9'\] has a lone surrogate"),
        ({"a": {("caf\udce9", 1): torch.ones(1)}}, "has a lone surrogate"),
        ({"a": {"seed": 1 << 20_000}}, r"state\['a'\]\['seed'\] is an integer of 20,001 bits"),
    ],
)
def test_what_can_not_be_kept_is_refused_with_its_path(state: dict[str, Any], path: str, tmp_path: Path) -> None:
    run = Run(str(tmp_path / "runs"), name="x", state=state)
    with pytest.raises(Refused, match=path):
        run.save()
    assert run.checkpoints() == []


def test_lazily_made_state_is_loaded_too(tmp_path: Path) -> None:
    """An optimizer that has not stepped yet has no state; what was saved of it comes back all the same."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    saved(tmp_path, {"model": model, "optimizer": optimizer})
    other = net()
    fresh = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    loaded(tmp_path, {"model": other, "optimizer": fresh})
    assert torch.equal(
        fresh.state[other[0].weight]["momentum_buffer"], optimizer.state[model[0].weight]["momentum_buffer"]
    )


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters())
    model[2](model[0](torch.randn(2, 4))).sum().backward()
    optimizer.step()
    return optimizer


@pytest.fixture
def two(tmp_path: Path) -> list[tuple[nn.Module, torch.optim.Optimizer]]:
    """What was saved, and another that has moments of its own."""
    found = [(model, stepped(model)) for model in (net(), net())]
    saved(tmp_path, dict(zip(("model", "optimizer"), found[0], strict=True)))
    return found


def test_moments_are_filled_where_they_lie_so_that_nothing_is_held_twice(tmp_path: Path, two: Any) -> None:
    (model, optimizer), (other, mine) = two
    before = {id(each): mine.state[each]["exp_avg"].data_ptr() for each in other.parameters()}
    loaded(tmp_path, {"model": other, "optimizer": mine})
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.state[a]["exp_avg"], mine.state[b]["exp_avg"])
        assert mine.state[b]["exp_avg"].data_ptr() == before[id(b)]


def test_moments_that_share_memory_do_not_take_each_other_s_values(tmp_path: Path, two: Any) -> None:
    """One tensor for both moments, or the parameter itself, as an optimizer may begin with; they differ in the file."""
    (model, optimizer), (other, mine) = two
    for each in other.parameters():
        mine.state[each]["exp_avg_sq"] = mine.state[each]["exp_avg"]
    mine.state[other[0].weight]["exp_avg"] = other[0].weight.detach()
    loaded(tmp_path, {"model": other, "optimizer": mine})
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        for name, value in optimizer.state[a].items():
            assert torch.equal(value, mine.state[b][name]), name


class Spread(nn.Module):
    """Buffers whose elements share memory, which `expand` makes."""

    def __init__(self, value: float, *, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([[value], [2 * value]]).expand(2, 5), persistent=persistent)


def test_expanded_tensors(tmp_path: Path) -> None:
    """They come back where memory can be shared as it was; a module that could never load its own is refused."""
    state = {"model": Spread(3.0, persistent=False), "values": {"row": torch.ones(2).expand(3, 2)}}
    saved(tmp_path, state)
    live = {"row": torch.zeros(2).expand(3, 2)}
    found = loaded(tmp_path, {"model": Spread(0.0, persistent=False), "values": live})
    assert torch.equal(found["model"].mask, state["model"].mask)
    assert found["model"].mask.stride() == (1, 0)
    assert torch.equal(live["row"], torch.ones(3, 2))
    assert torch.equal(loaded(tmp_path, {"values": {}})["values"]["row"], torch.ones(3, 2))
    with pytest.raises(Refused, match=r"state\['model'\]\['mask'\] is an expanded tensor"):
        Run(str(tmp_path / "runs"), name="y", state={"model": Spread(3.0, persistent=True)}).save()


def test_an_expanded_tensor_does_not_take_what_differs_within(tmp_path: Path) -> None:
    saved(tmp_path, {"values": {"row": torch.arange(6.0).reshape(3, 2)}})
    live = torch.zeros(2).expand(3, 2)
    with pytest.raises(Refused, match="can't hold what was saved"):
        loaded(tmp_path, {"values": {"row": live}})
    assert not live.any()


class Turn(nn.Module):
    def __init__(self, value: complex) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.full((3, 2), value))


def test_complex_parameters(tmp_path: Path) -> None:
    model = Turn(1 - 2j)
    optimizer = torch.optim.AdamW(model.parameters())
    model.turn.abs().sum().backward()
    optimizer.step()
    saved(tmp_path, {"model": model, "optimizer": optimizer})
    other = Turn(0j)
    fresh = torch.optim.AdamW(other.parameters())
    loaded(tmp_path, {"model": other, "optimizer": fresh})
    assert torch.equal(other.turn, model.turn)
    assert torch.equal(fresh.state[other.turn]["exp_avg"], optimizer.state[model.turn]["exp_avg"])


def test_other_types_are_refused_and_nothing_is_cast(tmp_path: Path) -> None:
    saved(tmp_path, {"model": nn.Sequential(net(), nn.BatchNorm1d(4)), "own": torch.ones(2)})
    other = nn.Sequential(net().to(torch.bfloat16), nn.BatchNorm1d(3))
    before = other[0][0].weight.clone()
    with pytest.raises(Refused) as raised:
        loaded(tmp_path, {"model": other, "own": torch.ones(2, dtype=torch.float64)})
    told = raised.value.message.splitlines()[1:]
    assert "  model: retyped 0.0.weight: was float32, is bfloat16" in told
    assert "  model: reshaped 1.weight: was [4], is [3]" in told
    assert "  retyped own: was float32, is float64" in told
    assert torch.equal(other[0][0].weight, before)
    many = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(40))
    saved(tmp_path / "many", {"model": many})
    with pytest.raises(Refused) as raised:
        loaded(tmp_path / "many", {"model": copy.deepcopy(many).half()})
    assert len(raised.value.message.splitlines()) == 20
    assert raised.value.message.endswith("and 22 more")
