"""The training loop learns, and says what is wrong."""

import dataclasses
import math

import pytest
import torch
from tiny_training import CONFIG, batch_at, loss, network, run
from torch import nn

from wsss_lib.training import engine
from wsss_lib.training.checkpoints import load_checkpoint
from wsss_lib.training.engine import TrainConfig, plain_attention, train
from wsss_lib.training.optimizers import make_optimizer
from wsss_lib.training.precision import half_type
from wsss_lib.training.schedules import warmup_cosine

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


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_loss_falls(amp):
    config = dataclasses.replace(CONFIG, steps=200, lr=0.01, log_every=20, save_every=1000, amp=amp)
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
    config = TrainConfig(steps=2, warmup=0, amp="bf16")
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
    given = lambda step: {**batch_at(step), "pictures": 3}
    history = train(network(), given, loss, CONFIG, progress=False)
    assert history[-1]["pictures"] == 36


# ---- mixed precision, parts of a batch


def scaled_loss(model, batch, step):
    """float16 logits of about 1; their gradients, some 1e-7, are zero unless the loss is scaled."""
    return {"small": 1e-5 * nn.functional.cross_entropy(model(batch["image"]).float(), batch["label"])}


def test_float16_gradients_are_scaled_into_range(monkeypatch):
    config = dataclasses.replace(CONFIG, amp="fp16", steps=1, warmup=0, clip=0.0, optimizer="sgd", lr=1e3, weight_decay=0.0)

    def moved(amp):
        model, before = network(0.0), network(0.0)
        train(model, batch_at, scaled_loss, dataclasses.replace(config, amp=amp), progress=False)
        return model[0].weight - before[0].weight

    exact = moved("off")
    torch.testing.assert_close(moved("fp16"), exact, rtol=0.02, atol=0.02 * exact.abs().max().item())
    monkeypatch.setattr(engine, "make_scaler", lambda half, device: torch.amp.GradScaler("cpu", init_scale=1.0))
    assert (moved("fp16") - exact).abs().max() > 0.05 * exact.abs().max(), "the scale matters"


def test_a_step_that_overflows_is_left_out_and_the_scale_halved(monkeypatch):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    monkeypatch.setattr(engine, "make_scaler", lambda half, device: scaler)
    model, before = network(0.0), network(0.0)
    config = dataclasses.replace(CONFIG, amp="fp16", steps=2, log_every=1, clip=1.0)
    large = lambda model, batch, step: {"x": 1e3 * loss(model, batch, step)["class"]}
    history = train(model, batch_at, large, config, progress=False)
    assert [row["scale"] for row in history] == [2.0**29, 2.0**28]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))


def test_float16_at_a_scale_of_one_has_no_excuse(monkeypatch):
    monkeypatch.setattr(engine, "make_scaler", lambda half, device: torch.amp.GradScaler("cpu", init_scale=1.0))
    endless = lambda model, batch, step: {"x": 1e30 * loss(model, batch, step)["class"]}
    with pytest.raises(FloatingPointError, match="step 0: .*gradient norm"):
        train(network(0.0), batch_at, endless, dataclasses.replace(CONFIG, amp="fp16"), progress=False)


def test_half_types():
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert [half_type(amp, cpu) for amp in ("auto", "bf16", "fp16", "off")] == [
        torch.bfloat16, torch.bfloat16, torch.float16, None]
    assert half_type("auto", meta) is half_type("off", meta) is None
    with pytest.raises(ValueError, match="amp: found 'bf16' on meta"):
        half_type("bf16", meta)


@pytest.mark.parametrize("capability, expected", [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_a_t4_gets_float16(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert half_type("auto", torch.device("cuda")) is expected


@pytest.mark.parametrize("count", [2, 8])
def test_parts_of_a_batch_add_up_to_it(count):
    """Losses that are means over pictures, without dropout: float64, so that only the order of sums differs."""
    def double(step):
        batch = batch_at(step)
        return {**batch, "image": batch["image"].double()}

    def ends(accumulate, seen):
        def counted(model, batch, step):
            seen.append((len(batch["image"]), len(batch["name"])))
            logits = model(batch["image"])
            return {"class": nn.functional.cross_entropy(logits, batch["label"]), "size": logits.square().mean()}

        model = network(0.0).double()
        config = dataclasses.replace(CONFIG, steps=5, accumulate=accumulate, optimizer="sgd")
        return model, train(model, double, counted, config, progress=False)

    whole, cut = [], []
    (a, rows), (b, others) = ends(1, whole), ends(count, cut)
    assert whole == [(8, 8)] * 5 and cut == [(8 // count, 8 // count)] * 5 * count
    for ours, theirs in zip(b.parameters(), a.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for ours, theirs in zip(others, rows):
        assert (ours["pictures"], ours["class"]) == (theirs["pictures"], pytest.approx(theirs["class"], rel=1e-12))


def test_parts_must_be_equal():
    with pytest.raises(ValueError, match="accumulate: found a batch of 8 pictures, expected a multiple of 3"):
        run(None, dataclasses.replace(CONFIG, accumulate=3))
