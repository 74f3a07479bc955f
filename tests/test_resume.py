"""A run can be stopped at any point and ends where the uninterrupted one ends."""

import dataclasses
import json
import os
import signal
import threading

import pytest
import torch
from safetensors import safe_open
from tiny_training import CONFIG, loss, network, run, same_files, stop_at

from wsss_lib.training import checkpoints, engine
from wsss_lib.training.checkpoints import load_checkpoint
from wsss_lib.training.engine import train


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    model, history = run(out)
    return out, model, history


def test_files_of_a_run(whole):
    out, _model, history = whole
    assert sorted(os.listdir(out)) == ["checkpoint.safetensors", "log.jsonl"]
    assert [row["step"] for row in history] == [3, 4, 6, 8, 9, 12]
    assert [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] == history
    with safe_open(out / "checkpoint.safetensors", "pt") as file:
        assert json.loads(file.metadata()["numbers"])["step"] == 12


def test_dropout_and_seed_matter(whole, tmp_path):
    """Guards the equalities below: another seed must give another run."""
    run(tmp_path, dataclasses.replace(CONFIG, seed=1))
    assert not same_files(whole[0], tmp_path)


@pytest.mark.parametrize("step", [0, 2, 5, 7, 8, 11])
def test_resumed_run_ends_like_the_uninterrupted_one(whole, tmp_path, step):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, loss=stop_at(step))
    with safe_open(tmp_path / "checkpoint.safetensors", "pt") as file:
        assert json.loads(file.metadata()["numbers"])["step"] == step
    torch.rand(step + 1)  # the state of the global generator must not matter
    _model, history = run(tmp_path, model=network().requires_grad_(True))
    assert same_files(whole[0], tmp_path)
    assert [row["step"] for row in history] == [3, 4, 6, 8, 9, 12]


@pytest.mark.parametrize("more", [{"amp": "fp16"}, {"accumulate": 2}, {"amp": "bf16", "accumulate": 4}])
def test_precision_and_parts_resume_too(tmp_path, more):
    """Also float16's scale, which grows every `growth_interval` steps, here 3."""
    config = dataclasses.replace(CONFIG, **more)
    with pytest.MonkeyPatch.context() as patch:
        scaled = more.get("amp") == "fp16"
        patch.setattr(engine, "make_scaler", lambda half, device: torch.amp.GradScaler(
            "cpu", init_scale=8.0, growth_interval=3, enabled=scaled))
        run(tmp_path / "whole", config)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", config, loss=stop_at(5))
        _, history = run(tmp_path / "cut", config)
    assert same_files(tmp_path / "whole", tmp_path / "cut")
    assert not scaled or history[-1]["scale"] == 8.0 * 2**4


def test_after_a_crash_the_log_goes_back_to_the_checkpoint(whole, tmp_path):
    with pytest.raises(MemoryError):
        run(tmp_path, loss=stop_at(7, MemoryError))  # steps 5 to 7, and the row of step 6, are past the save
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3
    run(tmp_path)
    assert same_files(whole[0], tmp_path)


def test_workers_change_nothing(whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, dataclasses.replace(CONFIG, workers=2), loss=stop_at(6))
    run(tmp_path, dataclasses.replace(CONFIG, workers=2))
    assert same_files(whole[0], tmp_path)


@pytest.mark.parametrize("number, error", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_signals_finish_the_step_and_save(whole, tmp_path, number, error):
    def signalled(model, batch, step):
        if step == 5:
            os.kill(os.getpid(), number)
        return loss(model, batch, step)

    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(error):
        run(tmp_path, loss=signalled)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    with safe_open(tmp_path / "checkpoint.safetensors", "pt") as file:
        assert json.loads(file.metadata()["numbers"])["step"] == 6
    run(tmp_path)
    assert same_files(whole[0], tmp_path)


def test_a_second_signal_does_not_wait(tmp_path):
    def stuck(model, batch, step):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second signal should have raised")

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, loss=stuck)


def test_interrupt_within_the_update_keeps_the_last_checkpoint(whole, tmp_path, monkeypatch):
    step, calls = torch.optim.AdamW.step, []

    def torn(self, *args):
        calls.append(1)
        step(self, *args)
        if len(calls) == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.AdamW, "step", torn)
        run(tmp_path)
    with safe_open(tmp_path / "checkpoint.safetensors", "pt") as file:
        assert json.loads(file.metadata()["numbers"])["step"] == 4
    run(tmp_path)
    assert same_files(whole[0], tmp_path)


def test_trains_outside_the_main_thread(whole, tmp_path):
    thread = threading.Thread(target=run, args=(tmp_path,))
    thread.start()
    thread.join()
    assert same_files(whole[0], tmp_path)


def test_a_row_owed_at_the_stop_is_written_on_resume(tmp_path):
    """evaluate is interrupted after step 4: the resumed run writes that row first."""

    def scores(model, step):
        assert not model.training
        return {"score": step * 10}

    def interrupted(model, step):
        raise KeyboardInterrupt

    for name, first in (("a", interrupted), ("b", scores)):
        try:
            run(tmp_path / name, evaluate=first)
        except KeyboardInterrupt:
            pass
        _, history = run(tmp_path / name, evaluate=scores)
        assert [row.get("score") for row in history] == [None, 40, None, 80, None, 120]
    assert same_files(tmp_path / "a", tmp_path / "b")


def test_killed_while_saving(whole, tmp_path, monkeypatch):
    replace = os.replace

    def killed(source, target):
        if str(target).endswith(".safetensors") and os.path.exists(target):
            raise OSError("killed")
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr(checkpoints.os, "replace", killed)
        run(tmp_path)  # the second save dies
    assert load_checkpoint(tmp_path / "checkpoint.safetensors", network())["step"] == 4
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.safetensors", "log.jsonl"]
    run(tmp_path)
    assert same_files(whole[0], tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.safetensors", "log.jsonl"]


def test_finished_run_is_not_trained_again(whole):
    out, model, history = whole
    fresh = network()
    never = lambda *args: pytest.fail("the run is finished")
    config = dataclasses.replace(CONFIG, workers=2)
    again = train(fresh, never, never, config, out, evaluate=never, progress=False)
    assert again == history and not fresh.training
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), model.state_dict().values()))
    with pytest.raises(FileExistsError, match="checkpoint.safetensors: exists already"):
        run(out, resume=False)


@pytest.mark.parametrize("field, value", [("steps", 13), ("betas", (0.9, 0.999)), ("seed", 1), ("lr", 0.5)])
def test_resume_with_other_settings(whole, field, value):
    model = network()
    before = model[0].weight.clone()
    found = getattr(CONFIG, field)
    found, expected = (list(v) if isinstance(v, tuple) else v for v in (found, value))
    with pytest.raises(ValueError) as error:
        run(whole[0], dataclasses.replace(CONFIG, **{field: value}), model)
    assert f"checkpoint.safetensors: {field}: found {found}, expected {expected}" in str(error.value)
    assert torch.equal(model[0].weight, before)


def test_resume_may_change_what_does_not_matter(whole):
    free = dataclasses.replace(CONFIG, workers=1, save_every=5, log_every=7)
    assert run(whole[0], free)[1] == whole[2]
