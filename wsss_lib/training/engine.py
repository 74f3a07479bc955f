"""The training loop: one function that can be read from top to bottom, and killed at any time.

All chance is a function of (seed, step): batches come from `batch_at(step)`, and dropout is seeded anew for
every step. A run that was stopped and resumed therefore ends bit for bit where the uninterrupted one ends.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from wsss_lib.training import checkpoints, distributed
from wsss_lib.training.optimizers import OPTIMIZERS, SCHEDULES, learning_rate, make_optimizer

Batch = dict[str, Any]
# What may differ between the run that saved a checkpoint and the run that resumes it.
FREE_FIELDS = ("device", "workers", "save_every", "log_every", "plain_attention")


@dataclass
class TrainConfig:
    """Settings of a run. lr is the peak rate, warmup in steps.

    optimizer: "adamw" (betas) or "sgd" (momentum). lr_factors: of parameters by name, as of `make_optimizer`.
    schedule: down to final_lr, a factor of lr, by "cosine" or "poly" with `power` (published: its jump, see
    `warmup_poly`). From step late_from on the rate is multiplied by late_factor.
    bf16: autocast on cuda and cpu (other devices train in float32). clip: largest gradient norm, 0 for none.
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
    bf16: bool = True
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
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                expected = " or ".join(map(repr, known))
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected {expected}")
        for name, least in (("steps", 1), ("save_every", 1), ("log_every", 1), ("workers", 0), ("seed", 0)):
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
) -> list[dict]:
    """Train `model` in place for config.steps steps; return the history, one row per config.log_every steps.

    batch_at(step) -> dict with at least "image" (B, 3, H, W). A pure function of the step (0-based), whose
        randomness is derived from it, e.g. by `step_seed`; workers call it, so it stays off the GPU.
        Pictures are counted as image.shape[0], or as the int batch["pictures"] if there is one.
    loss(model, batch, step) -> dict of named scalars, whose sum is minimised. It runs under bfloat16
        autocast; the scalars must be float32 (or float64): compute them from `logits.float()`. Seeded is torch alone.
    out: folder for `checkpoint.safetensors` (each save_every steps and at the end) and `log.jsonl` (rows).
    resume: go on from the checkpoint in `out` if there is one; a finished run only loads its weights.
    evaluate(model, step) -> numbers for the row, at each save, `step` steps completed, in eval mode.

    A row: step (completed), lr, each loss averaged since the last row, seconds, pictures, evaluate's numbers.
    Rows fall on multiples of log_every, on saves and on the end. The model is left in eval mode.

    On Ctrl-C or SIGTERM the step in progress is finished and saved, then KeyboardInterrupt or SystemExit
    follows; a second signal does not wait. Raises FloatingPointError for a loss or gradient that is not
    finite (the last checkpoint stays), FileExistsError for a checkpoint in the way of resume=False,
    ValueError for one with other settings and for batches or losses that break the rules above.
    """
    device = torch.device(config.device)
    model.to(device)
    forward, main = distributed.objective(model, loss), distributed.rank() == 0
    optimizer = make_optimizer(model, config)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    autocast = config.bf16 and device.type in ("cpu", "cuda")
    settings = json.loads(json.dumps(asdict(config)))  # as it will come back from the file: lists for tuples
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
    if log and main:
        checkpoints.write_log(log, history)  # drops rows past the checkpoint: those steps are run again

    started, seen_before = time.perf_counter(), pending["pictures"]

    def elapsed() -> float:
        return before + time.perf_counter() - started

    def save() -> None:
        if checkpoint and main:
            state = (model, optimizer, done, elapsed(), history, settings, pending)
            checkpoints.save_checkpoint(checkpoint, *state)

    def close_step() -> None:
        """Write the row and the checkpoint that are due after `done` steps, unless that was done already."""
        saving = done % config.save_every == 0 or done == config.steps
        if not pending["sums"] or not (saving or done % config.log_every == 0):
            return
        row = {"step": done, "lr": learning_rate(config, done - 1)}
        row |= {name: total / count for name, (total, count) in pending["sums"].items()}
        row |= {"seconds": elapsed(), "pictures": pending["pictures"]}
        if saving and evaluate and main:
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
    with bar, plain, _signals() as received:
        try:
            model.train()
            close_step()  # a run stopped between a step and its row owes that row
            for batch in _batches(batch_at, done, config, device):
                count = _count(batch, done)
                tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
                batch = batch | {name: t.to(device, non_blocking=True) for name, t in tensors.items()}
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(config, done) * group["factor"]
                torch.manual_seed(step_seed(config.seed, done, distributed.rank()))
                with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                    losses = forward(batch, done)
                _check_losses(losses, done)
                optimizer.zero_grad(set_to_none=True)
                sum(losses.values()).backward()
                norm = nn.utils.clip_grad_norm_(parameters, config.clip or math.inf)

                # One wait for the device per step, while the weights are still those of the last good step. The
                # processes agree on what they see, and on stopping: a signal may have reached only one of them.
                stop = norm.new_tensor(float(len(received)))
                numbers = distributed.average(torch.stack([*(v.detach() for v in losses.values()), norm, stop]))
                *numbers, norm, stop = numbers.tolist()
                values = dict(zip(losses, numbers))
                if not all(map(math.isfinite, (*numbers, norm))):
                    raise FloatingPointError(f"step {done}: found losses {values}, gradient norm {norm}")
                updating = True
                optimizer.step()
                done += 1
                for name, value in values.items():
                    total, n = pending["sums"].get(name, (0.0, 0))
                    pending["sums"][name] = (total + value, n + 1)
                pending["pictures"] += count * distributed.world_size()
                updating = False

                rate = (pending["pictures"] - seen_before) / (time.perf_counter() - started)
                bar.set_postfix_str(f"loss {sum(numbers):.4f}, {rate:.0f} pictures/s", refresh=False)
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


@contextmanager
def _signals() -> Iterator[list[BaseException]]:
    """Note Ctrl-C and SIGTERM in the yielded list, so that no step is cut in two; the second one raises."""
    received: list[BaseException] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers
        return

    def note(number: int, frame: Any) -> None:
        received.append(KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number))
        if len(received) > 1:
            raise received[-1]

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)


@dataclass
class _Steps:
    batch_at: Callable[[int], Batch]

    def __getitem__(self, step: int) -> Batch:
        return self.batch_at(step)


def _batches(batch_at: Callable, start: int, config: TrainConfig, device: torch.device) -> DataLoader:
    """The batches of steps start.., in order, prepared ahead where there are workers."""
    workers = config.workers if start < config.steps else 0
    # Forked workers need not pickle batch_at, often a closure in a notebook. PyTorch gives each one thread.
    fork = workers and "fork" in multiprocessing.get_all_start_methods()
    processes = {"multiprocessing_context": "fork" if fork else None, "worker_init_fn": _ignore_interrupt}
    steps, pin = range(start, config.steps), device.type == "cuda"
    return DataLoader(
        _Steps(batch_at), batch_size=None, sampler=steps, num_workers=workers, pin_memory=pin, **processes
    )


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C in a terminal reaches the workers too: the training process decides when they end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _count(batch: Batch, step: int) -> int:
    if not isinstance(batch, dict) or "image" not in batch:
        found = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
        raise ValueError(f'batch_at({step}): found {found}, expected a dict with "image"')
    return int(batch.get("pictures", batch["image"].shape[0]))


def _check_losses(losses: dict[str, Tensor], step: int) -> None:
    if not losses:
        raise ValueError(f"loss at step {step}: found no loss, expected at least one")
    for name, value in losses.items():
        if name in ("step", "lr", "seconds", "pictures"):
            raise ValueError(f"loss: found the name {name!r}, which the log uses for something else")
        if value.ndim or value.dtype not in (torch.float32, torch.float64):
            found = f"{value.dtype} of shape {tuple(value.shape)}"
            raise ValueError(f"loss {name!r} at step {step}: found {found}, expected a float32 scalar")
