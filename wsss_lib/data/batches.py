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

    Each epoch is a permutation of the data set given by (seed, epoch), and the random numbers of a batch's
    transforms are given by (seed, step), so a resumed run sees what the uninterrupted one would have seen.
    The last pictures of an epoch that fill no batch are left for the next one.

    Raises ValueError if the batch is larger than the data set.
    """

    data: Dataset
    transform: Callable[[Sample], dict]
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= len(self.data):
            raise ValueError(f"batch_size: found {self.batch_size}, expected 1..{len(self.data)}, the pictures there are")

    def __call__(self, step: int) -> dict:
        per_epoch = len(self.data) // self.batch_size
        epoch, k = divmod(step, per_epoch)
        order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.data))
        chosen = order[k * self.batch_size:(k + 1) * self.batch_size]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence([self.seed, 1, step]).generate_state(1, np.uint64)[0] >> 1))
            return collate([self.transform(self.data[int(i)]) for i in chosen])
