"""The training loop: one function that can be read from top to bottom, and killed at any time.

All chance is a function of (seed, step): batches come from `batch_at(step)`, and dropout is seeded anew for
every step. A run that was stopped and resumed therefore ends bit for bit where the uninterrupted one ends.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import checkpoints, distributed
from .interrupts import noted_signals
from .loader import Batch, batches, count_pictures, parts, to_device
from .optimizers import OPTIMIZERS, SCHEDULES, learning_rate, make_optimizer
from .precision import AMP, half_type, make_scaler

# What may differ between the run that saved a checkpoint and the run that resumes it.
FREE_FIELDS = ("device", "workers", "save_every", "log_every", "plain_attention")


@dataclass
class TrainConfig:
    """Settings of a run. lr is the peak rate, warmup in steps.

    optimizer: "adamw" (betas) or "sgd" (momentum). lr_factors: of parameters by name, as of `make_optimizer`.
    schedule: down to final_lr, a factor of lr, by "cosine" or "poly" with `power` (published: its jump, see
    `warmup_poly`). From step late_from on the rate is multiplied by late_factor.
    amp: mixed precision, "auto", "bf16", "fp16" or "off", as of `precision.half_type`.
    accumulate: parts that a batch is cut into, one on the device at a time; their losses are averaged, so what
        divides by a count of pixels or pairs is divided part by part. clip: largest gradient norm, 0 for none.
    workers: processes that prepare batches, 0 for the training process. save_every, log_every: in steps.
    plain_attention: on the CPU, use the context manager of that name; False for a loss that needs the fused
        call (an AttentionTape sees nothing else).
    """

    steps: int
    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: int = 100
    final_lr: float = 0.02
    clip: float = 1.0
    seed: int = 0
    device: str = "cpu"
    amp: str = "auto"
    accumulate: int = 1
    workers: int = 0
    save_every: int = 200
    log_every: int = 20
    plain_attention: bool = True
    optimizer: str = "adamw"
    momentum: float = 0.9
    schedule: str = "cosine"
    power: float = 1.0
    lr_factors: dict[str, float] = field(default_factory=dict)
    late_from: int | None = None
    late_factor: float = 1.0
    published: bool = False

    def __post_init__(self) -> None:
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("amp", AMP)):
            if getattr(self, name) not in known:
                expected = " or ".join(map(repr, known))
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected {expected}")
        positive = ("steps", "save_every", "log_every", "accumulate")
        for name, least in (*((name, 1) for name in positive), ("workers", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected {least} or more")


def train(
    model: nn.Module,
    batch_at: Callable[[int], Batch],
    loss: Callable[[nn.Module, Batch, int], dict[str, Tensor]],
    config: TrainConfig,
    out: str | Path | None = None,
    resume: bool = True,
    evaluate: Callable[[nn.Module, int], dict[str, float]] | None = None,
    progress: bool = True,
    settings: dict[str, Any] | None = None,
) -> list[dict]:
    """Train `model` in place for config.steps steps; return the history, one row per config.log_every steps.

    batch_at(step) -> dict with at least "image" (B, 3, H, W). A pure function of the step (0-based), whose
        randomness is derived from it, e.g. by `step_seed`; workers call it, so it stays off the GPU.
        Pictures are counted as image.shape[0], or as the int batch["pictures"] if there is one.
    loss(model, batch, step) -> dict of named scalars, whose sum is minimised. It runs under autocast; the
        scalars must be float32 (or float64): compute them from `logits.float()`. Seeded is torch alone.
    out: folder for `checkpoint.safetensors` (each save_every steps and at the end) and `log.jsonl` (rows).
    resume: go on from the checkpoint in `out` if there is one; a finished run only loads its weights.
    evaluate(model, step) -> numbers for the row, at each save, `step` steps completed, in eval mode. Every process
        calls it, so that it may share its work with the others.
    settings: by name, what else the run depends on: a checkpoint with others is not resumed.

    A row: step (completed), lr, each loss averaged since the last row, seconds, pictures, evaluate's numbers;
    with float16 the scale of the losses.
    Rows fall on multiples of log_every, on saves and on the end. The model is left in eval mode.

    On Ctrl-C or SIGTERM the step in progress is finished and saved, then KeyboardInterrupt or SystemExit
    follows; a second signal does not wait. Raises FloatingPointError for a loss or gradient that is not
    finite (the last checkpoint stays; float16 gradients may overflow, and their step is then left out, until the
    scale is down to 1), FileExistsError for a checkpoint in the way of resume=False,
    ValueError for one with other settings and for batches or losses that break the rules above.
    """
    device = torch.device(config.device)
    model.to(device)
    forward, main = distributed.objective(model, loss), distributed.rank() == 0
    optimizer = make_optimizer(model, config)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    half = half_type(config.amp, device)
    scaler = make_scaler(half, device)
    # as it will come back from the file: lists for tuples
    settings = json.loads(json.dumps({**asdict(config), **(settings or {})}))
    done, before, history, pending = 0, 0.0, [], {"sums": {}, "pictures": 0}
    checkpoint = log = None
    if out is not None:
        checkpoint, log = Path(out, "checkpoint.safetensors"), Path(out, "log.jsonl")
    if checkpoint and checkpoint.exists():
        if not resume:
            raise FileExistsError(f"{checkpoint}: exists already; resume it, or choose another folder")
        checkpoints.check_config(checkpoint, settings, free=FREE_FIELDS)
        saved = checkpoints.load_checkpoint(checkpoint, model, optimizer)
        done, before, history, pending = (saved[k] for k in ("step", "seconds", "history", "pending"))
        scaler.load_state_dict(saved["scaler"])
    if log and main:
        checkpoints.write_log(log, history)  # drops rows past the checkpoint: those steps are run again

    started, seen_before = time.perf_counter(), pending["pictures"]

    def elapsed() -> float:
        return before + time.perf_counter() - started

    def save() -> None:
        if checkpoint and main:
            state = (model, optimizer, done, elapsed(), history, settings, pending, scaler.state_dict())
            checkpoints.save_checkpoint(checkpoint, *state)

    def close_step() -> None:
        """Write the row and the checkpoint that are due after `done` steps, unless that was done already."""
        saving = done % config.save_every == 0 or done == config.steps
        if not pending["sums"] or not (saving or done % config.log_every == 0):
            return
        row = {"step": done, "lr": learning_rate(config, done - 1)}
        row |= {name: total / count for name, (total, count) in pending["sums"].items()}
        row |= {"seconds": elapsed(), "pictures": pending["pictures"]}
        row |= {"scale": scaler.get_scale()} if scaler.is_enabled() else {}
        if saving and evaluate:
            numbers = evaluate(model.eval(), done)
            if clash := sorted(numbers.keys() & row.keys()):
                raise ValueError(f"evaluate: found the names {clash}, which the row has already")
            row |= numbers
            model.train()
        history.append(row)
        pending["sums"] = {}
        if log and main:
            checkpoints.append_log(log, row)
        if saving:
            save()

    updating = False
    bar = tqdm(total=config.steps, initial=done, disable=not (progress and main), unit="step")
    plain = plain_attention(model) if config.plain_attention and device.type == "cpu" else nullcontext()
    with bar, plain, noted_signals() as received:
        try:
            model.train()
            close_step()  # a run stopped between a step and its row owes that row
            for batch in batches(batch_at, range(done, config.steps), config.workers, device):
                count = count_pictures(batch, done)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(config, done) * group["factor"]
                torch.manual_seed(step_seed(config.seed, done, distributed.rank()))
                optimizer.zero_grad(set_to_none=True)
                found = []
                for number, part in enumerate(parts(batch, config.accumulate), start=1):
                    with distributed.apart(forward) if number < config.accumulate else nullcontext():
                        with torch.autocast(device.type, half, enabled=half is not None):
                            losses = forward(to_device(part, device), done)
                        _check_losses(losses, done)
                        scaler.scale(sum(losses.values()) / config.accumulate).backward()
                    found.append({name: value.detach() for name, value in losses.items()})
                scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(parameters, config.clip or math.inf)

                # One wait for the device per step, while the weights are still those of the last good step. The
                # processes agree on what they see, and on stopping: a signal may have reached only one of them.
                means = [torch.stack([f[name] for f in found]).mean() for name in losses]
                stop = norm.new_tensor(float(len(received)))
                numbers = distributed.average(torch.stack([*means, norm, stop]))
                *numbers, norm, stop = numbers.tolist()
                values = dict(zip(losses, numbers))
                overflow = scaler.is_enabled() and not math.isfinite(norm) and scaler.get_scale() > 1
                if not all(map(math.isfinite, numbers)) or not (math.isfinite(norm) or overflow):
                    raise FloatingPointError(f"step {done}: found losses {values}, gradient norm {norm}")
                updating = True
                scaler.step(optimizer)  # or not, where gradients have overflowed
                scaler.update()
                done += 1
                for name, value in values.items():
                    total, n = pending["sums"].get(name, (0.0, 0))
                    pending["sums"][name] = (total + value, n + 1)
                pending["pictures"] += count * distributed.world_size()
                updating = False

                rate = (pending["pictures"] - seen_before) / (time.perf_counter() - started)
                shown = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
                bar.set_postfix_str(f"{shown}, {rate:.0f} pictures/s", refresh=False)
                bar.update()
                close_step()
                if stop or (received and distributed.world_size() == 1):
                    raise received[0] if received else KeyboardInterrupt
        except BaseException as error:
            stopped = received or isinstance(error, (KeyboardInterrupt, SystemExit))
            if stopped and not updating:  # else some weights are a step ahead: the last checkpoint is better
                save()
            raise
    model.eval()
    return history


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """A 63-bit seed for one step of one process; neighbouring steps, seeds and ranks get unrelated numbers."""
    key = [seed, step, rank] if rank else [seed, step]
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Within the block timm's attention layers compute softmax(q k^T) v step by step, not by the fused call.

    On CPUs the fused call's backward pass is slow (42 % of a training step); results agree up to rounding.
    Each module that has an attribute `fused_attn` gets its own value back afterwards, after errors as well.
    """
    before = [(m, m.fused_attn) for m in model.modules() if hasattr(m, "fused_attn")]
    try:
        for module, _ in before:
            module.fused_attn = False
        yield
    finally:
        for module, value in before:
            module.fused_attn = value


def _check_losses(losses: dict[str, Tensor], step: int) -> None:
    if not losses:
        raise ValueError(f"loss at step {step}: found no loss, expected at least one")
    for name, value in losses.items():
        if name in ("step", "lr", "seconds", "pictures"):
            raise ValueError(f"loss: found the name {name!r}, which the log uses for something else")
        if value.ndim or value.dtype not in (torch.float32, torch.float64):
            found = f"{value.dtype} of shape {tuple(value.shape)}"
            raise ValueError(f"loss {name!r} at step {step}: found {found}, expected a float32 scalar")
