"""Checkpoints hold everything, and what is damaged or foreign is refused."""

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_training import CONFIG, batch_at, loss, network, run
from torch import nn

from wsss_lib.training import engine
from wsss_lib.training.checkpoints import load_checkpoint, save_checkpoint, save_weights
from wsss_lib.training.engine import step_seed
from wsss_lib.training.optimizers import make_optimizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    model, history = run(out)
    return out, model, history




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
    assert found == {"step": 3, "seconds": 1.5, "history": [{"a": 1}], "config": {"b": [2]}, "pending": {}, "scaler": {}}
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
