"""Learning-rate schedules: plain functions of the step that return a factor of the base rate."""

from __future__ import annotations

import math


def warmup_cosine(step: int, steps: int, warmup: int = 100, final: float = 0.02) -> float:
    """Factor in (0, 1] of the base learning rate at `step` (0-based) of `steps`.

    The first `warmup` steps rise linearly, (step + 1) / warmup, up to 1 at step warmup - 1. From there half a
    cosine falls to `final`, reached exactly at the last step. A run not longer than its warm-up only rises.

    Raises ValueError for a step outside 0..steps - 1, a negative warm-up, or a final factor outside (0, 1].
    """
    if not 0 <= step < steps:
        raise ValueError(f"step: found {step}, expected 0..{steps - 1}")
    if warmup < 0:
        raise ValueError(f"warmup: found {warmup}, expected a number of steps, 0 or more")
    if not 0 < final <= 1:
        raise ValueError(f"final: found {final}, expected a factor in (0, 1]")
    if step < warmup:
        return (step + 1) / warmup
    progress = (step + 1 - warmup) / (steps - warmup)  # in (0, 1]: 1 at the last step
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
