"""The training loop: it learns, it can be stopped at any point, and it says what is wrong."""

import dataclasses
import json
import math
import os
import signal
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from wsss_lib.training import checkpoints, engine
from wsss_lib.training.checkpoints import load_checkpoint, save_checkpoint, save_weights
from wsss_lib.training.engine import TrainConfig, make_optimizer, plain_attention, step_seed, train
from wsss_lib.training.schedules import warmup_cosine

CONFIG = TrainConfig(steps=12, lr=0.02, warmup=3, save_every=4, log_every=3, bf16=False)


def network(dropout=0.3):
    torch.manual_seed(5)
    features = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.LayerNorm(8 * 16)
    return nn.Sequential(*features, nn.Dropout(dropout), nn.Linear(8 * 16, 2))


def batch_at(step):
    generator = torch.Generator().manual_seed(step_seed(7, step))
    image = torch.randn(8, 3, 6, 6, generator=generator)
    return {"image": image, "label": (image[:, 0].mean((1, 2)) > 0).long(), "name": ["a"] * 8}


def loss(model, batch, step):
    logits = model(batch["image"]).float()
    entropy = nn.functional.cross_entropy(logits, batch["label"])
    return {"class": entropy, "size": 1e-3 * logits.square().mean()}


def run(out, config=CONFIG, model=None, loss=loss, **options):
    model = model or network()
    return model, train(model, batch_at, loss, config, out, progress=False, **options)


def stop_at(step, error=KeyboardInterrupt):
    """A loss that raises once, in the middle of the given step."""

    def stopping(model, batch, now):
        if now == step:
            raise error
        return loss(model, batch, now)

    return stopping


def same_files(a, b):
    """The checkpoints' tensors and the logs are equal bit for bit (wall-clock times aside)."""
    ours, theirs = (load_file(folder / "checkpoint.safetensors") for folder in (a, b))
    rows = [[json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()] for f in (a, b)]
    for row in rows[0] + rows[1]:
        row.pop("seconds")
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours) and rows[0] == rows[1]


# ---- schedules


def test_schedule_by_hand():
    factors = [warmup_cosine(step, steps=6, warmup=2, final=0.2) for step in range(6)]
    half = math.sqrt(0.5)  # cos 45 degrees; the cosine takes 4 steps of 45 degrees each
    expected = [0.5, 1.0, 0.6 + 0.4 * half, 0.6, 0.6 - 0.4 * half, 0.2]
    assert factors == pytest.approx(expected)
    assert warmup_cosine(1, steps=2, warmup=100) == pytest.approx(0.02)  # 2 / 100: still warming up
    assert warmup_cosine(0, steps=1, warmup=0, final=0.5) == pytest.approx(0.5)


@pytest.mark.parametrize("bad", [{"step": 6}, {"step": -1}, {"warmup": -1}, {"final": 0}, {"final": 1.5}])
def test_schedule_refuses(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}: found"):
        warmup_cosine(**{"step": 0, "steps": 6, **bad})


# ---- learning


@pytest.mark.parametrize("bf16", [False, True])
def test_loss_falls(bf16):
    config = dataclasses.replace(CONFIG, steps=200, lr=0.01, log_every=20, save_every=1000, bf16=bf16)
    model, history = run(None, config, network(dropout=0.0))
    assert [row["step"] for row in history] == list(range(20, 201, 20))
    assert history[0]["class"] > 0.5 and history[-1]["class"] < 0.35
    assert history[-1]["pictures"] == 200 * 8 and history[-1]["lr"] == pytest.approx(0.01 * 0.02)
    assert not model.training


def test_rows_average_since_the_last_row():
    given = {0: 1.0, 1: 2.0, 2: 6.0, 3: 10.0, 4: 20.0}

    def constant(model, batch, step):
        return {"x": given[step] + 0 * next(model.parameters()).sum()}

    _, history = run(None, dataclasses.replace(CONFIG, steps=5, save_every=100), loss=constant)
    assert [(row["step"], row["x"], row["pictures"]) for row in history] == [(3, 3.0, 24), (5, 15.0, 40)]


def test_weight_decay_spares_biases_and_norms():
    model = network()
    model[0].weight.requires_grad_(False)
    decayed, others = make_optimizer(model, CONFIG).param_groups
    assert {id(p) for p in decayed["params"]} == {id(model[5].weight)} and decayed["weight_decay"] == 0.05
    rest = {id(p) for p in (model[0].bias, model[3].weight, model[3].bias, model[5].bias)}
    assert {id(p) for p in others["params"]} == rest and others["weight_decay"] == 0
    with pytest.raises(ValueError, match="no trainable parameter"):
        make_optimizer(model.requires_grad_(False), CONFIG)


def test_gradients_are_clipped(monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def spy(self, *args):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])).item())
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    for clip in (1e-3, 0):
        run(None, dataclasses.replace(CONFIG, steps=1, clip=clip))
    assert norms[0] == pytest.approx(1e-3, rel=1e-3) and norms[1] > 0.1


def test_tiny_vit_in_bf16():
    import timm

    shape = {"img_size": 32, "depth": 1, "num_classes": 2}
    model = timm.create_model("vit_tiny_patch16_224", drop_path_rate=0.1, **shape)
    seen = []

    def vit_loss(model, batch, step):
        logits = model(nn.functional.interpolate(batch["image"], (32, 32)))
        seen.append((logits.dtype, model.blocks[0].attn.fused_attn))
        return {"class": nn.functional.cross_entropy(logits.float(), batch["label"])}

    before = model.blocks[0].attn.fused_attn
    weight = model.head.weight.detach().clone()
    config = TrainConfig(steps=2, warmup=0, bf16=True)
    train(model, batch_at, vit_loss, config, progress=False)
    assert seen == [(torch.bfloat16, False)] * 2 and model.blocks[0].attn.fused_attn == before
    assert not torch.equal(model.head.weight, weight)
    train(model, batch_at, vit_loss, dataclasses.replace(config, plain_attention=False), progress=False)
    assert seen[-1] == (torch.bfloat16, before)


def test_plain_attention_restores_each_value():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1))
    model[0].fused_attn, model[1].fused_attn = True, False
    with pytest.raises(RuntimeError), plain_attention(model):
        assert not model[0].fused_attn and not model[1].fused_attn
        raise RuntimeError
    assert model[0].fused_attn is True and model[1].fused_attn is False
    assert not hasattr(model[2], "fused_attn")


# ---- stopping and going on


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    model, history = run(out)
    return out, model, history


def test_files_of_a_run(whole):
    out, model, history = whole
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
    model, history = run(tmp_path, model=network().requires_grad_(True))
    assert same_files(whole[0], tmp_path)
    assert [row["step"] for row in history] == [3, 4, 6, 8, 9, 12]


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
    never = lambda *args: pytest.fail("the run is finished")  # noqa: E731
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


# ---- what goes wrong


def test_nan_keeps_the_last_checkpoint(tmp_path):
    def spoiled(model, batch, step):
        losses = loss(model, batch, step)
        return {**losses, "size": losses["size"] * (math.nan if step == 6 else 1)}

    model = network()
    with pytest.raises(FloatingPointError, match=r"step 6: .*'class': \d.*'size': nan"):
        run(tmp_path, model=model, loss=spoiled)
    assert all(p.isfinite().all() for p in model.parameters())
    assert load_checkpoint(tmp_path / "checkpoint.safetensors", network())["step"] == 4


def test_gradient_that_is_not_finite():
    def steep(model, batch, step):
        return {"root": model(batch["image"]).mul(0).sum().abs().sqrt()}  # finite, with an infinite slope

    with pytest.raises(FloatingPointError, match="step 0: .*gradient norm"):
        run(None, loss=steep)


@pytest.mark.parametrize(
    "losses, message",
    [
        ({}, "found no loss"),
        ({"a": torch.zeros(2)}, r"'a' at step 0: found torch.float32 of shape \(2,\)"),
        ({"a": torch.zeros((), dtype=torch.bfloat16)}, "found torch.bfloat16"),
        ({"lr": torch.zeros(())}, "loss: found the name 'lr'"),
    ],
)
def test_losses_are_checked(losses, message):
    with pytest.raises(ValueError, match=message):
        run(None, loss=lambda model, batch, step: losses)


def test_batches_and_settings_are_checked():
    with pytest.raises(ValueError, match=r"batch_at\(0\): found \['pixels'\], expected a dict with"):
        train(network(), lambda step: {"pixels": 1}, loss, CONFIG, progress=False)
    with pytest.raises(ValueError, match="steps: found 0, expected 1 or more"):
        TrainConfig(steps=0)
    with pytest.raises(ValueError, match=r"evaluate: found the names \['class'\]"):
        run(None, evaluate=lambda model, step: {"class": 1})


def test_pictures_may_be_given():
    given = lambda step: {**batch_at(step), "pictures": 3}  # noqa: E731
    history = train(network(), given, loss, CONFIG, progress=False)
    assert history[-1]["pictures"] == 36


# ---- checkpoints


@pytest.mark.parametrize("kind", ["sgd", "plain sgd", "adamw"])
def test_optimizer_state_comes_back(tmp_path, kind):
    def steps(model, optimizer, first, last):
        for step in range(first, last):
            optimizer.zero_grad()
            sum(loss(model, batch_at(step), step).values()).backward()
            optimizer.step()

    def fresh():
        model = network(dropout=0.0)
        if kind == "adamw":
            return model, torch.optim.AdamW(model.parameters(), lr=0.1)
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9 if kind == "sgd" else 0)

    model, optimizer = fresh()
    steps(model, optimizer, 0, 3)
    save_checkpoint(tmp_path / "c", model, optimizer, 3, 1.5, [{"a": 1}], {"b": [2]})
    other, its_optimizer = fresh()
    found = load_checkpoint(tmp_path / "c", other, its_optimizer)
    assert found == {"step": 3, "seconds": 1.5, "history": [{"a": 1}], "config": {"b": [2]}, "pending": {}}
    steps(model, optimizer, 3, 5)
    steps(other, its_optimizer, 3, 5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


def test_tied_weights(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    save_checkpoint(tmp_path / "c", model, torch.optim.SGD(model.parameters()), 0, 0.0, [], {})
    assert load_checkpoint(tmp_path / "c", model)["step"] == 0


def test_damaged_and_foreign_files(whole, tmp_path):
    good = (whole[0] / "checkpoint.safetensors").read_bytes()
    path = tmp_path / "checkpoint.safetensors"
    for damaged in (good[: len(good) // 2], b"", b"not a checkpoint at all"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="checkpoint.safetensors: not a checkpoint"):
            run(tmp_path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="format in the header: found None"):
        load_checkpoint(path, network())
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_checkpoint(tmp_path / "nowhere", network())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model.5.bias": None}, "missing tensors: model.5.bias"),
        ({"model.new": torch.zeros(1)}, "unexpected tensors: model.new"),
        ({"model.5.bias": torch.zeros(3)}, r"tensor model.5.bias: found \(3,\) torch.float32, expected \(2,"),
        ({"optimizer.0.exp_avg": None}, "missing tensors: optimizer.0.exp_avg"),
        ({"optimizer.0.exp_avg": torch.zeros(3)}, r"optimizer.0.exp_avg: found shape \(3,\), expected \(8,"),
    ],
)
def test_tensors_are_checked_before_anything_changes(whole, tmp_path, change, message):
    source, path = whole[0] / "checkpoint.safetensors", tmp_path / "changed.safetensors"
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    tensors = {name: t for name, t in (load_file(source) | change).items() if t is not None}
    save_file(tensors, path, metadata)
    model = network()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="changed.safetensors: .*" + message):
        load_checkpoint(path, model, make_optimizer(model, CONFIG))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before))


def test_other_optimizer_groups(whole):
    model = network()
    with pytest.raises(ValueError, match=r"found groups of \[2, 4\] parameters, expected \[6\]"):
        load_checkpoint(whole[0] / "checkpoint.safetensors", model, torch.optim.AdamW(model.parameters()))


def test_weights_for_shipping(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    path = tmp_path / "deep" / "weights.safetensors"
    save_weights(path, model, metadata={"method": "cam", "classes": 20})
    weights = load_file(path)
    assert weights.keys() == model.state_dict().keys()
    assert weights["0.weight"].dtype == torch.float16
    assert weights["1.num_batches_tracked"].dtype == torch.int64
    assert all(torch.equal(w, model.state_dict()[n].to(w.dtype)) for n, w in weights.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"method": "cam", "classes": "20"}
    assert os.listdir(path.parent) == ["weights.safetensors"]
    with torch.no_grad():
        model[0].weight[0] = 1e6
    with pytest.raises(ValueError, match="tensor 0.weight: found a weight of 1e.06, too large"):
        save_weights(path, model)


def test_step_seeds_differ():
    assert len({step_seed(seed, step) for seed in range(20) for step in range(200)}) == 4000
    assert engine.step_seed(3, 4) == step_seed(3, 4) != step_seed(4, 3)
