"""Batches by the number of their step: prepared ahead in worker processes, and cut into parts."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .interrupts import ignore_interrupt

Batch = dict[str, Any]


@dataclass
class _Steps:
    batch_at: Callable[[int], Batch]

    def __getitem__(self, step: int) -> Batch:
        return self.batch_at(step)


def batches(batch_at: Callable[[int], Batch], steps: range, workers: int, device: torch.device) -> DataLoader:
    """The batches of the steps, in order, prepared ahead where there are workers."""
    workers = workers if steps else 0
    # Forked workers need not pickle batch_at, often a closure in a notebook. PyTorch gives each one thread.
    fork = workers and "fork" in multiprocessing.get_all_start_methods()
    processes = {"multiprocessing_context": "fork" if fork else None, "worker_init_fn": ignore_interrupt}
    pin = device.type == "cuda"
    return DataLoader(
        _Steps(batch_at), batch_size=None, sampler=steps, num_workers=workers, pin_memory=pin, **processes
    )


def count_pictures(batch: Batch, step: int) -> int:
    """The batch's pictures: batch["pictures"] if it is there, else the first size of batch["image"].

    ValueError for a batch without "image"."""
    if not isinstance(batch, dict) or "image" not in batch:
        found = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
        raise ValueError(f'batch_at({step}): found {found}, expected a dict with "image"')
    return int(batch.get("pictures", batch["image"].shape[0]))


def parts(batch: Batch, count: int) -> list[Batch]:
    """The batch as `count` smaller ones: tensors and lists with an entry a picture are cut, all else is in each.

    ValueError where the pictures cannot be shared equally."""
    if count == 1:
        return [batch]
    pictures = batch["image"].shape[0]
    if pictures % count:
        raise ValueError(f"accumulate: found a batch of {pictures} pictures, expected a multiple of {count}")
    size = pictures // count

    def cut(value: Any, k: int) -> Any:
        per_picture = isinstance(value, (Tensor, list)) and getattr(value, "ndim", 1) and len(value) == pictures
        return value[k * size : (k + 1) * size] if per_picture else value

    return [{name: cut(value, k) for name, value in batch.items()} for k in range(count)]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on the device."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    return batch | {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
