"""What a training script sees of a run: signals, failures, what is kept, what is skipped."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from outlast.checkpoint import gradients, save, tiers
from outlast.checkpoint.run import Run
from outlast.errors import Corrupt, InvalidInput, Refused, WrongKey
from outlast.events import Event


class Told:
    """An event sink that keeps what it is told."""

    wants_progress = False

    def __init__(self) -> None:
        self.events: list[Event] = []

    def event(self, event: Event) -> None:
        self.events.append(event)

    def progress(self, progress: object) -> None:
        pass


def made(width: int = 8) -> dict[str, Any]:
    model = torch.nn.Linear(4, width)
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)}


def trained(run: Run, steps: int, losses: Iterator[float] | None = None) -> None:
    for _ in range(steps):
        run.state["optimizer"].zero_grad()
        run.state["model"](torch.randn(2, 4)).square().mean().backward()
        run.state["optimizer"].step()
        run.step(loss=next(losses) if losses else 1.0)


def steps_of(run: Run) -> list[int]:
    return [step for step, _ in run.checkpoints()]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "runs")


def test_a_terminated_run_saves_and_leaves_with_143(url: str) -> None:
    run = Run(url, name="x", state=made(), save_every=10**9)
    run.resume()
    trained(run, 3)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        trained(run, 5)
    assert left.value.code == 143
    assert steps_of(run) == [4]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_control_c_saves_and_stops(url: str) -> None:
    run = Run(url, name="x", state=made(), save_every=10**9)
    run.resume()
    trained(run, 1)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trained(run, 5)
    assert steps_of(run) == [2]


def test_control_c_twice_stops_at_once(url: str) -> None:
    run = Run(url, name="x", state=made(), save_every=10**9)
    run.resume()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    run.close()


def test_a_save_into_memory_is_found_by_the_next_process(url: str) -> None:
    run = Run(url, name="x", state=made(), save_every=10**9)
    run.resume()
    os.kill(os.getpid(), signal.SIGUSR1)
    trained(run, 2)
    run._end_pending(wait=True)
    run._let_go()  # it is killed
    assert steps_of(run) == [], "nothing was written to the disk"
    again = Run(url, name="x", state=made())
    assert again.resume() == 1
    again.close()


def test_what_failed_in_the_background_is_raised_at_a_later_step(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from outlast.errors import StoreFull
    from outlast.repo.write import Writer

    def full(*_: object) -> None:
        raise StoreFull("the disk is full.")

    run = Run(url, name="x", state=made(), save_every=2)
    monkeypatch.setattr(Writer, "commit", full)
    with pytest.raises(StoreFull):
        trained(run, 10_000)
    monkeypatch.undo()
    trained(run, 4)
    run.close()
    assert steps_of(run), "somebody made room, and it goes on"


def test_the_last_the_best_and_the_regular_ones_are_kept(url: str) -> None:
    losses = iter([9.0, 5.0, 1.0, 7.0, 6.0, 8.0, 5.0, 4.0, 6.0, 7.0])
    with Run(url, name="x", state=made(), save_every=10**9, keep=2, keep_every=4, best="loss:min") as run:
        for loss in losses:
            trained(run, 1)
            run.save({"loss": loss}).wait()
    assert steps_of(run) == [3, 4, 8, 9, 10]


def test_nan_is_never_the_best_and_never_pushes_out_what_is_sane(url: str) -> None:
    with Run(url, name="x", state=made(), save_every=10**9, keep=2, best="loss:min") as run:
        for loss in (3.0, 2.0, 2.5, *[float("nan")] * 4):
            trained(run, 1)
            run.save({"loss": loss}).wait()
    assert steps_of(run) == [2, 3, 6, 7]


def test_a_checkpoint_that_crashes_the_run_again_and_again_is_skipped(url: str) -> None:
    told = Told()
    with Run(url, name="x", state=made(), save_every=1) as run:
        trained(run, 2)
        run.save().wait()
    for _ in range(3):
        died_after(url, 0)
    assert Run(url, name="x", state=made(), sink=told).resume() == 1
    assert any("died at the same step 3 times" in event.reason for event in told.events)


def died_after(url: str, steps: int) -> int:
    """A life that goes on from the newest checkpoint, and is killed so many steps later; where it began."""
    run = Run(url, name="x", state=made(), save_every=10**9)
    began = run.resume()
    run.begin_step()
    trained(run, steps)
    run._let_go()
    return began


def test_a_run_that_is_killed_now_and_then_goes_on_from_the_newest(url: str) -> None:
    with Run(url, name="x", state=made(), save_every=1) as run:
        trained(run, 2)
        run.save().wait()
    assert [died_after(url, steps) for steps in (3, 7, 1, 5, 2, 4)] == [2] * 6
    assert [died_after(url, 3) for _ in range(3)] == [2, 2, 1], "it died at step 5 for the third time"


def test_where_a_life_died_is_not_known_on_another_machine(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Run(url, name="x", state=made(), save_every=1) as run:
        trained(run, 2)
        run.save().wait()
    monkeypatch.setattr("outlast.checkpoint.crash_marker.CrashMarker.last", lambda self: None)
    assert [died_after(url, steps) for steps in (3, 7, 1, 5)] == [2, 2, 2, 1]


def test_an_exception_between_two_steps_saves_and_one_inside_a_step_does_not(url: str) -> None:
    data = [torch.zeros(1)] * 4
    with pytest.raises(ZeroDivisionError), Run(url, name="x", state=made(), save_every=10**9) as run:
        for _ in run.steps(data, until=9):
            run.step()
            raise ZeroDivisionError
    assert steps_of(run) == [1]
    with pytest.raises(ZeroDivisionError), Run(url, name="y", state=made(), save_every=10**9) as run:
        for step, _ in run.steps(data, until=9):
            if step == 2:
                raise ZeroDivisionError
            run.step()
    assert steps_of(run) == []


def test_a_closed_run_saves_no_more(url: str) -> None:
    with Run(url, name="x", state=made(), save_every=1) as run:
        trained(run, 2)
    assert steps_of(run) == [1, 2]
    with pytest.raises(Refused, match="run x was closed"):
        run.save()
    with pytest.raises(Refused, match="run x was closed"):
        trained(run, 1)
    assert steps_of(run) == [1, 2]


def test_what_does_not_fit_is_listed_and_nothing_is_loaded(url: str) -> None:
    with Run(url, name="x", state=made()) as run:
        trained(run, 1)
        run.save()
    state = made(9)
    before = state["model"].weight.clone()
    with pytest.raises(Refused, match=r"model: reshaped weight: was \[8, 4\], is \[9, 4\]"):
        Run(url, name="x", state=state).resume()
    assert torch.equal(state["model"].weight, before)


def test_what_can_not_be_captured_is_refused_with_its_path(url: str) -> None:
    run = Run(url, name="x", state=made() | {"extra": {"hooks": [print]}})
    with pytest.raises(Refused, match=r"state\['extra'\]\['hooks'\]\[0\] is a builtins.builtin_function_or_method"):
        run.save()


@pytest.mark.parametrize("wrong", [0, "often", "xs", -3])
def test_a_senseless_schedule_is_refused(url: str, wrong: Any) -> None:
    with pytest.raises(InvalidInput, match="save_every"):
        Run(url, name="x", state=made(), save_every=wrong)


def packs_of(url: str) -> list[Path]:
    return sorted(
        (path for path in Path(url, "packs").rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime
    )


def flip(pack: Path) -> None:
    pack.chmod(0o644)
    content = bytearray(pack.read_bytes())
    content[len(content) // 2] ^= 1
    pack.write_bytes(content)


@pytest.mark.parametrize("damage", [flip, Path.unlink], ids=["flipped", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(damage: Any, url: str) -> None:
    run = Run(url, name="x", state=made(5000), save_every=2)
    run.resume()
    for _ in range(3):
        trained(run, 2)
        run._end_pending(wait=True)
    weights = {step: run.load(snapshot) and run.state["model"].weight.clone() for step, snapshot in run.checkpoints()}
    run.close()
    damage(packs_of(url)[-1])

    told = Told()
    again = Run(url, name="x", state=made(5000), save_every=2, sink=told)
    assert again.resume() == 4
    assert torch.equal(again.state["model"].weight, weights[4])
    assert len(again.skipped) == 1 and "of step 6 is skipped: it is damaged" in again.skipped[0]
    assert "checkpoint.skipped" in [event.kind for event in told.events]
    trained(again, 2)
    again.save().wait_verified()  # what it holds in common with the damaged one was stored again
    again.close()
    assert Run(url, name="x", state=made(5000)).resume() == 6


def test_when_every_checkpoint_is_damaged_nothing_is_trained_on(url: str) -> None:
    with Run(url, name="x", state=made(5000), save_every=2) as run:
        run.resume()
        trained(run, 2)
    for pack in packs_of(url):
        flip(pack)
    with pytest.raises(Corrupt, match="damaged"):
        Run(url, name="x", state=made(5000)).resume()


def test_two_runs_in_one_repository_do_not_disturb_each_other(url: str) -> None:
    """Each drops what it doesn't keep, and prunes, while the other stores."""
    runs = [Run(url, name=name, state=made(20_000), save_every=1, keep=1) for name in ("a", "b")]
    for _ in range(12):
        for run in runs:
            trained(run, 1)
    for run in runs:
        run.close()
    for name in ("a", "b"):
        assert Run(url, name=name, state=made(20_000)).resume() == 12


def test_a_changed_environment_is_told_or_refused(url: str) -> None:
    with Run(url, name="x", state=made(), save_every=10**9) as run:
        trained(run, 1)
        run.save().wait()
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        told = Told()
        assert Run(url, name="x", state=made(), sink=told).resume() == 1
        assert f"threads: was {before}, is {before + 1}" in told.events[0].reason
        with pytest.raises(Refused, match="threads: was"):
            Run(url, name="x", state=made()).resume(same_environment=True)
    finally:
        torch.set_num_threads(before)


def test_an_encrypted_run_needs_its_passphrase(url: str) -> None:
    with Run(url, name="x", state=made(), passphrase="secret") as run:
        trained(run, 1)
        run.save().wait()
    assert Run(url, name="x", state=made(), passphrase="secret").resume() == 1
    with pytest.raises(WrongKey):
        Run(url, name="x", state=made(), passphrase="wrong").resume()
    assert not any(
        b"weight" in path.read_bytes() for path in Path(url).rglob("*") if path.is_file() and "packs" in path.parts
    )


def test_going_back_stays_gone_back(url: str) -> None:
    """What was saved last is the newest, whatever its step: a run that went back goes on from there."""
    with Run(url, name="x", state=made(), save_every=2, keep=2) as run:
        run.resume()
        for _ in range(3):
            trained(run, 2)
            run.checkpoints()
    again = Run(url, name="x", state=made(), save_every=10**9, keep=2)
    assert steps_of(again) == [4, 6]
    assert again.load(4) == 4
    trained(again, 1)
    again.save().wait()
    again.close()
    assert steps_of(again) == [6, 5]
    assert Run(url, name="x", state=made()).resume() == 5


def test_a_process_that_did_not_resume_can_not_push_out_a_run(url: str) -> None:
    with Run(url, name="x", state=made(), save_every=2) as run:
        trained(run, 2)
    fresh = Run(url, name="x", state=made(), save_every=10**9)
    trained(fresh, 1)
    with pytest.raises(Refused, match="did not go on from"):
        fresh.save().wait()
    assert steps_of(fresh) == [2]


def test_looking_at_a_finished_run_is_no_crash(url: str) -> None:
    with Run(url, name="x", state=made(), save_every=2) as run:
        trained(run, 2)
    for _ in range(5):
        again = Run(url, name="x", state=made())
        assert again.resume() == 2
        again._let_go()


def test_gradients_that_came_after_the_step_are_kept(url: str) -> None:
    """As in adversarial training, where the other's backward adds to them."""
    state = made()
    run = Run(url, name="x", state=state, save_every=10**9)
    state["model"](torch.ones(2, 4)).sum().backward()
    state["optimizer"].step()
    for _ in range(50):  # each new gradient lies where the one before lay
        state["optimizer"].zero_grad()
        state["model"](torch.ones(2, 4)).sum().backward()
        assert gradients.needed([state["optimizer"]]) == {id(each) for each in state["model"].parameters()}
    run.step()
    run.save().wait()
    other = made()
    Run(url, name="x", state=other).load()
    assert torch.equal(other["model"].weight.grad, state["model"].weight.grad)


def test_a_parameter_of_no_module_is_refused(url: str) -> None:
    state = made()
    state["optimizer"].add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    with pytest.raises(InvalidInput, match="in no module of the state"):
        Run(url, name="x", state=state)


def test_another_optimizer_is_refused_before_anything_is_changed(url: str) -> None:
    with Run(url, name="x", state=made()) as run:
        trained(run, 1)
    other = made()
    before = other["model"].weight.clone()
    other["optimizer"] = torch.optim.AdamW(other["model"].parameters())
    with pytest.raises(Refused, match="was of SGD, is of AdamW"):
        Run(url, name="x", state=other).resume()
    assert torch.equal(other["model"].weight, before)


def test_a_script_that_ends_without_closing_loses_no_save(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, outlast\n"
        "model = torch.nn.Linear(4000, 4000)\n"
        f"run = outlast.Run({str(tmp_path / 'runs')!r}, name='x', state={{'model': model}})\n"
        "run.resume(); run.step(); run.save(); run.step()\n"
    )
    ran = subprocess.run([sys.executable, str(script)], check=True, timeout=60, capture_output=True, text=True)
    assert "run x ended at step 2 without run.close(): what it goes on from is step 1" in ran.stderr
    assert Run(tmp_path / "runs", name="x", state={"model": torch.nn.Linear(4000, 4000)}).resume() == 1


def test_a_worker_that_is_forked_in_mid_save_ends(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has none of the threads that save, and waited for them until its loader killed it."""
    may_save, persist = threading.Event(), save.persist
    monkeypatch.setattr(save, "persist", lambda *given, **how: may_save.wait() and persist(*given, **how))
    with Run(url, name="x", state={"w": torch.zeros(3)}) as run:
        pending = run.save()
        worker = multiprocessing.get_context("fork").Process(target=len, args=([],))
        worker.start()
        worker.join(20)
        ended = worker.exitcode
        worker.kill()
        may_save.set()
        pending.wait()
    assert ended == 0


def test_after_a_save_that_failed_the_last_step_is_saved_all_the_same(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from outlast.repo.write import Writer

    run = Run(url, name="x", state=made(), save_every=10**9)
    run.resume()
    trained(run, 1)
    with monkeypatch.context() as broken:
        broken.setattr(Writer, "commit", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.save().wait()
    run.close()
    assert steps_of(run) == [1]


def resumed_elsewhere(url: str) -> None:
    try:
        Run(url, name="x", state=made()).resume()
    except Refused as exc:
        os._exit(7 if f"by process {os.getppid()} on this machine" in exc.message else 8)
    os._exit(0)


def test_a_run_that_is_under_way_is_not_begun_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same machine; however the process ends that trains it, the next may go on."""
    monkeypatch.setattr(tiers, "DYING_SECONDS", 0.1)

    def elsewhere() -> int | None:
        child = multiprocessing.get_context("fork").Process(target=resumed_elsewhere, args=(url,))
        child.start()
        child.join(60)
        return child.exitcode

    run = Run(url, name="x", state=made())
    run.resume()
    run.begin_step()
    assert elsewhere() == 7
    assert Run(url, name="x", state=made()).resume() == 0, "it is the same process"
    assert elsewhere() == 7
    trained(run, 1)
    run.close()
    assert elsewhere() == 0
    with pytest.raises(ZeroDivisionError), Run(url, name="x", state=made()) as run:
        run.resume()
        run.begin_step()
        assert elsewhere() == 7
        raise ZeroDivisionError
    assert elsewhere() == 0


def test_what_verifying_finds_damaged_is_stored_again(url: str) -> None:
    state = {"frozen": torch.randn(300_000), "count": torch.zeros(())}
    run = Run(url, name="x", state=state, save_every=10**9)
    run.resume()
    run.step()
    run.save().wait()
    [pack] = packs_of(url)
    flip(pack)
    run.step()
    with pytest.raises(Corrupt):
        run.save().wait_verified()
    run.step()
    run.save().wait_verified()
    run.close()


def test_a_loader_that_is_iterated_past_the_run_is_told_of(url: str) -> None:
    told = Told()
    loader = torch.utils.data.DataLoader(range(6))
    with Run(url, name="x", state=made() | {"loader": loader}, save_every=2, sink=told) as run:
        for _ in loader:
            trained(run, 1)
    assert [each.fields for each in told.events if each.kind == "loader.unread"] == [{"key": "loader"}]
    told.events.clear()
    with Run(url, name="y", state=made() | {"loader": loader}, save_every=2, sink=told) as run:
        for _ in run.state["loader"]:
            trained(run, 1)
    assert not told.events


def test_steps_that_nobody_counts_are_told_of(url: str) -> None:
    told = Told()
    with Run(url, name="x", state=made(), sink=told) as run:
        for number, _ in enumerate(run.steps([1] * 150, until=1)):
            if number == 120:
                run.step()
    assert [each.kind for each in told.events] == ["run.stepless"]
    told.events.clear()
    with Run(url, name="y", state=made(), sink=told) as run:
        for number, _ in enumerate(run.steps([1] * 250, until=2)):
            if number % 120 == 50:
                run.step()
    assert not told.events, "it accumulates"


def test_that_a_repository_knows_no_differences_is_told_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    with monkeypatch.context() as old:
        old.setattr("outlast.repo.form.FEATURES", [])
        with Run(url, name="x", state=made()) as run:
            trained(run, 1)
    with Run(url, name="y", state=made(), delta=True, save_every=1, sink=told) as run:
        run.resume()
        trained(run, 3)
    assert [each.kind for each in told.events] == ["delta.not_allowed"]


def test_options_that_the_checkpoint_overrides_are_told(url: str) -> None:
    told, state = Told(), made()
    with Run(url, name="x", state=state) as run:
        trained(run, 1)
    state["optimizer"].param_groups[0]["lr"] = 0.5
    Run(url, name="x", state=state, sink=told).resume()
    assert [each.reason for each in told.events] == [
        "resuming at step 1: lr of optimizer, group 0, is 0.5 in the script, and goes on as 0.1"
    ]
    torch.optim.lr_scheduler.ExponentialLR(state["optimizer"], 0.5).step()
    told.events.clear()
    with Run(url, name="y", state=state) as run:
        trained(run, 1)
    state["optimizer"].param_groups[0]["lr"] = 0.1
    Run(url, name="y", state=state, sink=told).resume()
    assert not told.events, "a scheduler changes it all the time"


def test_a_save_that_is_told_answers_signals_and_raises_what_failed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(url, name="x", state=made())
    run.resume()
    run.step(save=True, loss=1.0)
    run._end_pending(wait=True)
    with monkeypatch.context() as broken:
        broken.setattr(save, "persist", lambda *_, **__: 1 / 0)
        run.step(save=True)
        with pytest.raises(ZeroDivisionError):
            run.step(save=True)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        run.step(save=True)
    assert {1, 4} <= set(steps_of(run)) <= {1, 3, 4}
    with pytest.raises(InvalidInput, match="neither True nor False"):
        Run(url, name="y", state=made()).step(0.5)  # type: ignore[arg-type]


def test_what_did_not_change_is_not_hashed_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from outlast.repo.write import Writer

    state = {"": torch.zeros(50), "frozen": torch.randn(100_000), "count": torch.zeros(3)}
    run = Run(url, name="x", state={"parts": state}, save_every=10**9, keep=9)
    hashed: list[int] = []
    identify = Writer.identify
    monkeypatch.setattr(Writer, "identify", lambda writer, data: hashed.append(len(data)) or identify(writer, data))
    for number in range(1, 4):
        state["count"].fill_(number)
        run.step()
        run.save().wait_verified()
    assert hashed.count(400_000) == 1
    for step, snapshot in run.checkpoints():
        run.load(snapshot)
        assert state["count"].tolist() == [step] * 3
