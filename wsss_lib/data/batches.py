"""Data set + transform -> batch number `step`, as a pure function of the step."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from .sample import Sample
from .transforms import collate


@dataclass
class Batches:
    """Call with a step, get a batch: what `training.engine.train` asks for.

    Each epoch is a permutation of the data set given by (seed, epoch), and the random numbers of a picture's
    transforms are given by (seed, step, its place in the batch), so a resumed run sees what the uninterrupted one
    would have seen. The last pictures of an epoch that fill no batch are left for the next one.
    rank, world: of several processes that share each batch, this one gets the rank-th part of it, the pictures and
    random numbers that a single process would have there.

    Raises ValueError if the batch is larger than the data set, or no multiple of the number of processes.
    """

    data: Dataset
    transform: Callable[[Sample], dict]
    batch_size: int
    seed: int = 0
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= len(self.data):
            expected = f"1..{len(self.data)}, the pictures there are"
            raise ValueError(f"batch_size: found {self.batch_size}, expected {expected}")
        if self.batch_size % self.world:
            raise ValueError(f"batch_size: found {self.batch_size}, expected a multiple of the {self.world} processes")

    def __call__(self, step: int) -> dict:
        per_epoch = len(self.data) // self.batch_size
        epoch, k = divmod(step, per_epoch)
        order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.data))
        share = self.batch_size // self.world
        places = range(self.rank * share, (self.rank + 1) * share)
        with torch.random.fork_rng(devices=[]):
            return collate([self._picture(int(order[k * self.batch_size + place]), step, place) for place in places])

    def _picture(self, index: int, step: int, place: int) -> dict:
        seeds = np.random.SeedSequence([self.seed, 1, step, place])
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))
        return self.transform(self.data[index])
