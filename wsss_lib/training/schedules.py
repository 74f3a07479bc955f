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


def warmup_poly(
    step: int,
    steps: int,
    warmup: int = 1500,
    power: float = 1.0,
    start: float = 1e-6,
    published: bool = False,
) -> float:
    """Factor in (0, 1] of the base learning rate at `step` (0-based) of `steps`: AFA's schedule.

    The first `warmup` steps rise linearly from `start`. At step `warmup` the factor is 1, and from there
    ((steps - step) / (steps - warmup))^power falls to its last value, one step short of 0. A run not longer
    than its warm-up only rises.
    published: (1 - step / steps)^power after the warm-up, as if that had been part of the fall. So the rate
    jumps at step `warmup`, from almost 1 to 1 - warmup / steps; and past the last step it stays as it is.

    Source: AFA, Ru et al. 2022 (arXiv 2203.02664), section 4.1, and its published code.
    Raises ValueError for a step outside 0..steps - 1 (published: below 0), a negative warm-up, a power <= 0
    or a start outside (0, 1].
    """
    if step < 0 or (step >= steps and not published):
        raise ValueError(f"step: found {step}, expected 0..{steps - 1}")
    if warmup < 0:
        raise ValueError(f"warmup: found {warmup}, expected a number of steps, 0 or more")
    if power <= 0:
        raise ValueError(f"power: found {power}, expected a number > 0")
    if not 0 < start <= 1:
        raise ValueError(f"start: found {start}, expected a factor in (0, 1]")
    if step < warmup:
        return 1 - (1 - step / warmup) * (1 - start)
    begin = 0 if published else warmup
    return (1 - (min(step, steps - 1) - begin) / (steps - begin)) ** power
