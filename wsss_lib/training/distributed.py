"""One training run on several processes: each has its part of every batch, all have the same weights.

`torchrun --nproc-per-node N -m wsss_lib train ...` starts N of these on a machine; torchrun's --nnodes and
--rdzv-endpoint join several machines. Gradients are averaged over the processes by DistributedDataParallel. So a
loss that is a mean over pictures needs nothing more; one that divides by a count of pixels or pairs has to divide by
the count of all processes, else a process with few of them would count as much as one with many: `per_count`.

With one process every function here returns what it was given.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def processes(device: str) -> Iterator[str]:
    """Join the processes that torchrun started, if it did; yields this one's device.

    "cuda" becomes this process's own GPU, with NCCL; other devices talk by gloo. The group ends with the outermost
    block.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield device
        return
    if torch.device(device).type == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if dist.is_initialized():
        yield device
        return
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0; 0 writes files and shows progress."""
    return dist.get_rank() if world_size() > 1 else 0


def total(values: Tensor) -> Tensor:
    """The sum over the processes, a new tensor without gradient."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def average(values: Tensor) -> Tensor:
    """The mean over the processes, without gradient."""
    return total(values) / world_size()


def wait() -> None:
    """Until all processes are here."""
    if world_size() > 1:
        dist.barrier()


def share(count: int) -> range:
    """The numbers below `count` that are this process's: rank, rank + world_size, ..."""
    return range(rank(), count, world_size())


def total_counts(counts: np.ndarray | int) -> np.ndarray | int:
    """Whole numbers, of one shape everywhere, summed over the processes."""
    if world_size() == 1:
        return counts
    summed = total(torch.as_tensor(counts, device=_device())).cpu()
    return summed.numpy() if isinstance(counts, np.ndarray) else int(summed)


def gather(rows: Tensor) -> Tensor:
    """(n, ...) of this process's `share` -> (N, ...) of all, in the order of the whole."""
    if world_size() == 1:
        return rows
    whole = rows.new_zeros(total_counts(len(rows)), *rows.shape[1:], device=_device())
    whole[rank()::world_size()] = rows.to(whole.device)
    return total(whole).to(rows.device)


def _device() -> str:
    """Where tensors have to be that the processes exchange."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def per_count(sums: Tensor, counts: Tensor, least: float = 0, more: float = 0) -> Tensor:
    """sums / (counts + more), the sums over this process's part of a batch, the counts over all processes'.

    counts: whole numbers, shape as the sums'; divided by is at least `least`. The result is multiplied by the number
    of processes, because the average over them follows: it is then all sums over all counts.
    """
    everywhere = total(counts).to(sums.dtype).add(more)
    everywhere = everywhere.clamp(min=least) if least else everywhere
    return sums * world_size() / everywhere


class Objective(nn.Module):
    """A model and its loss as one module, so that each forward goes through what averages the gradients."""

    def __init__(self, model: nn.Module, loss: Callable) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: dict, step: int) -> dict[str, Tensor]:
        return self.loss(self.model, batch, step)


def objective(model: nn.Module, loss: Callable) -> nn.Module:
    """(batch, step) -> named losses of the model; with several processes, wrapped for them."""
    module = Objective(model, loss)
    if world_size() == 1:
        return module
    device = next(model.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    # A stage of a method may leave heads without gradient; those that no process uses stay without.
    return DistributedDataParallel(module, device_ids=ids, find_unused_parameters=True)


def apart(module: nn.Module) -> AbstractContextManager:
    """Within the block gradients of an `objective` stay with their process: for all but the last part of a batch."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()
