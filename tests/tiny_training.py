"""A training run small enough to be repeated in every test of the engine."""

import json

import torch
from safetensors.torch import load_file
from torch import nn

from wsss_lib.training.engine import TrainConfig, step_seed, train

CONFIG = TrainConfig(steps=12, lr=0.02, warmup=3, save_every=4, log_every=3, amp="off")


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
