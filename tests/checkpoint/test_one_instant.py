"""What is saved is the state of one instant, however early the training goes on changing it."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from outlast.checkpoint import stage
from outlast.checkpoint.run import Run
from outlast.checkpoint.stage import Staged
from outlast.errors import Refused

SIZES = (300_001, 5_000_000, 17, 2_000_000)


class Filling(torch.optim.Optimizer):
    """Each step fills every parameter, and what it keeps beside it, with the number of the step."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.number = 0

    def step(self, closure: Any = None) -> None:
        self.number += 1
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.fill_(self.number)
                    self.state[parameter].setdefault("kept", torch.zeros_like(parameter)).fill_(self.number)


def made() -> dict[str, Any]:
    model = torch.nn.ParameterList(torch.zeros(size) for size in SIZES)
    return {"model": model, "optimizer": Filling(model.parameters())}


def numbers(state: dict[str, Any]) -> set[float]:
    """Every value that occurs anywhere."""
    tensors = [*state["model"].parameters()]
    tensors += [kept for values in state["optimizer"].state.values() for kept in values.values()]
    return {float(value) for tensor in tensors for value in tensor.unique()}


def test_a_step_that_follows_at_once_is_not_in_the_copy(tmp_path: Path) -> None:
    state = made()
    with Run(str(tmp_path / "runs"), name="x", state=state, save_every=1, keep=100) as run:
        for _ in range(8):
            state["optimizer"].step()
            run.step()
    for step, snapshot in run.checkpoints():
        found = made()
        assert Run(str(tmp_path / "runs"), name="x", state=found).load(snapshot) == step
        assert numbers(found) == {float(step)}


def test_what_is_not_copied_again_is_the_same_byte_for_byte(tmp_path: Path) -> None:
    """Writes that torch doesn't count, new leaves that move the others, and saves to two places between each other."""
    state: dict[str, Any] = made() | {"more": {}}
    model = state["model"]
    with Run(str(tmp_path / "runs"), name="x", state=state, save_every=10**9, keep=100) as run:
        wanted = []
        for number in range(1, 9):
            model[number % 2].data[-1 if number % 3 else 0] = number
            if number == 5:
                state["more"]["a"] = torch.full((70_000,), 5.0)
            run.step()
            run.save(in_memory=number in (3, 6)).wait()
            wanted.append([each.detach().clone() for each in model])
    for step, snapshot in run.checkpoints():
        found: dict[str, Any] = made() | {"more": {}}
        assert Run(str(tmp_path / "runs"), name="x", state=found).load(snapshot) == step
        assert all(map(torch.equal, found["model"], wanted[step - 1]))
        assert set(found["more"]) == ({"a"} if step >= 5 else set())


def test_without_the_wait_the_torn_copy_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = made()
    run = Run(str(tmp_path / "runs"), name="x", state=state, save_every=10**9)
    state["optimizer"].step()
    run.step()
    has_stepped = threading.Event()
    copies_later = Staged._copy_later
    monkeypatch.setattr(Staged, "_copy_later", lambda *given: has_stepped.wait() and copies_later(*given))
    monkeypatch.setattr(Staged, "hold", lambda self: None)
    pending = run.save()
    state["optimizer"].step()
    has_stepped.set()
    with pytest.raises(Refused, match="changed outside of its optimizer"):
        pending.wait()
    assert run.checkpoints() == []
    run.close()  # it was told once


@pytest.mark.parametrize("name", ["outlast-stage", "outlast-save"])
@pytest.mark.parametrize("has_begun", [False, True])
def test_a_save_that_is_interrupted_while_it_starts_is_none_or_whole(
    name: str, has_begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by Ctrl-C in a notebook, which goes on with the same run."""
    state = made()
    run = Run(str(tmp_path / "runs"), name="x", state=state, save_every=10**9, keep=100)
    for _ in range(2):
        state["optimizer"].step()
        run.step()
        run.save().wait()
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if thread.name != name:
            return start(thread)
        if has_begun:
            start(thread)
        raise KeyboardInterrupt

    put = run._tiers.disk.repository.store.put_if_absent
    may_end = threading.Event()
    for _ in range(2):
        state["optimizer"].step()
        run.step()
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", interrupted)
            patched.setattr(
                run._tiers.disk.repository.store, "put_if_absent", lambda *given: may_end.wait() and put(*given)
            )
            with pytest.raises(KeyboardInterrupt):
                run.save()
        threading.Timer(0.2, may_end.set).start()
        state["optimizer"].step()
        run.step()
        run.save().wait()
    run.close()
    assert {step for step, _ in run.checkpoints()} >= {1, 2, 4, 6}
    for step, snapshot in run.checkpoints():
        found = made()
        assert Run(str(tmp_path / "runs"), name="x", state=found).load(snapshot) == step
        assert numbers(found) == {float(step)}


def test_the_copy_of_a_save_that_failed_is_over_before_the_next_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = made()
    run = Run(str(tmp_path / "runs"), name="x", state=state, save_every=10**9)
    state["optimizer"].step()
    run.step()
    may_copy, copies_later = threading.Event(), Staged._copy_later
    with monkeypatch.context() as broken:
        broken.setattr(Staged, "_copy_later", lambda *given: may_copy.wait() and copies_later(*given))
        broken.setattr("outlast.checkpoint.save.persist", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.save().wait()
    threading.Timer(0.2, may_copy.set).start()
    first = run._stage._last
    run.save().wait()
    assert first is not None and first.done and run._stage._last is not first
    run.close()


class Device:
    """Stands in for a GPU: it copies as late as it is allowed to, when the host, or work given to it later, waits."""

    def __init__(self, owned: list[torch.Tensor], may_copy: threading.Event) -> None:
        self._owned = {each.data_ptr() for each in owned}
        self._may_copy = may_copy
        self._lock = threading.Lock()

    def owns(self, tensor: torch.Tensor) -> bool:
        return tensor.data_ptr() in self._owned

    def reserve(self, count_bytes: int) -> Any:
        return np.empty(count_bytes, np.uint8)

    def copy(self, pairs: Any) -> list[Any]:
        return list(pairs)

    def hold(self, mark: list[Any]) -> None:
        with self._lock, torch.no_grad():
            while mark:
                tensor, target = mark.pop()
                target.copy_(tensor)

    def wait(self, mark: list[Any]) -> None:
        self._may_copy.wait()
        self.hold(mark)


@pytest.mark.parametrize("is_held", [True, False])
def test_what_a_device_copies_is_of_the_same_instant(
    is_held: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = made()
    state["optimizer"].step()
    kept = [values["kept"] for values in state["optimizer"].state.values()]
    has_stepped = threading.Event()
    run = Run(str(tmp_path / "runs"), name="x", state=state, save_every=10**9)
    run._stage = stage.Stage(Device([*state["model"].parameters(), *kept], has_stepped))
    run.step()
    if not is_held:
        monkeypatch.setattr(Staged, "hold", lambda self: None)
    pending = run.save()
    state["optimizer"].step()
    has_stepped.set()
    if is_held:
        pending.wait()
        run.close()
        found = made()
        Run(str(tmp_path / "runs"), name="x", state=found).load()
        assert numbers(found) == {1.0}
    else:
        with pytest.raises(Refused, match="changed outside of its optimizer"):
            pending.wait()


def test_a_process_that_is_forked_does_not_carry_the_copy() -> None:
    """Workers of a loader would otherwise have each page of it copied that a later save writes to."""
    memory = stage.Stage()
    memory.reserve(1 << 20)
    memory._memory[:] = 1
    child = os.fork()
    if child == 0:
        os._exit(int(memory._memory.any()))
    assert os.waitpid(child, 0)[1] == 0
    assert memory._memory.all()
