"""What moves the weights: the optimiser of a run, its groups of parameters, and the learning rate of a step."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .schedules import warmup_cosine, warmup_poly

if TYPE_CHECKING:
    from .engine import TrainConfig

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "poly")


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """AdamW or SGD on the trainable parameters, in groups; weight decay on those of more than one dimension only.

    Biases and the scales of norm layers set offsets and gains: pulling those to zero simplifies nothing.
    config.lr_factors: regular expression -> factor; a parameter's rate is multiplied by the factor of the first
    expression that its name begins with, else by 1. Each group has its "factor"; the engine sets its "lr".
    Raises ValueError for a model without trainable parameters, an unknown optimiser, and an expression that no
    parameter's name begins with.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("model: found no trainable parameter, expected at least one")
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    used = set()
    for name, parameter in trainable:
        pattern = next((p for p in config.lr_factors if re.match(p, name)), None)
        used.add(pattern)
        factor = 1.0 if pattern is None else float(config.lr_factors[pattern])
        groups.setdefault((factor, parameter.ndim > 1), []).append(parameter)
    if idle := sorted(config.lr_factors.keys() - used):
        raise ValueError(f"lr_factors: found {idle}, expected beginnings of trainable parameters' names")
    # Decayed parameters first, in the order of the factors: the same groups whatever the order of the layers.
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], not item[0][1]))
    rows = [{"params": members, "factor": factor, "weight_decay": config.weight_decay if decayed else 0.0}
            for (factor, decayed), members in ordered]
    if config.optimizer == "sgd":
        return torch.optim.SGD(rows, lr=config.lr, momentum=config.momentum)
    settings = {"lr": config.lr, "betas": config.betas}
    try:
        return torch.optim.AdamW(rows, **settings, fused=True)
    except RuntimeError:  # no fused AdamW on this device, or in this version of PyTorch
        return torch.optim.AdamW(rows, **settings)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate at `step` (0-based) of config.steps, before a group's factor: see `schedules` and `TrainConfig`."""
    late = config.late_factor if config.late_from is not None and step >= config.late_from else 1.0
    if config.schedule == "cosine":
        return config.lr * late * warmup_cosine(step, config.steps, config.warmup, config.final_lr)
    factor = warmup_poly(step, config.steps, config.warmup, config.power, published=config.published)
    return config.lr * late * (config.final_lr + (1 - config.final_lr) * factor)
