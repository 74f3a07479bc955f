"""Class slots: one backward pass serves a whole batch, though its pictures show different classes.

Slot k holds the k-th present class of each picture. Pictures do not mix inside the network, so the gradient
of the sum over the batch of each picture's own slot-k logit is, picture by picture, the gradient of that
logit. A batch needs as many backward passes as its richest picture has classes (2 or 3), not one per picture
and class.
"""

from __future__ import annotations

import torch
from torch import Tensor


def class_slots(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels (B, C) multi-hot -> index long (B, K), valid bool (B, K); K is the most classes one image has.

    index[b, k] is the k-th present class of image b where valid[b, k], else 0. Raises ValueError as
    `check_labels`.
    """
    check_labels(labels)
    present = labels > 0
    counts = present.sum(dim=1)  # (B,)
    slots = int(counts.max()) if len(labels) else 0
    # A stable sort of "absent" puts the present classes first, in their own order.
    index = (~present).to(torch.uint8).argsort(dim=1, stable=True)[:, :slots]  # (B, C) -> (B, K)
    valid = torch.arange(slots, device=labels.device) < counts[:, None]
    return index.masked_fill(~valid, 0), valid


def check_labels(labels: Tensor, batch: int | None = None, num_classes: int | None = None) -> None:
    """ValueError unless labels are (B, C), of the B and C given, and each value is 0 or 1."""
    shape = tuple(labels.shape)
    fits = len(shape) == 2 and shape[0] == (batch if batch is not None else shape[0])
    if not fits or shape[1] != (num_classes if num_classes is not None else shape[1]):
        expected = f"({'B' if batch is None else batch}, {'C' if num_classes is None else num_classes})"
        raise ValueError(f"labels: found shape {shape}, expected {expected}, multi-hot")
    wrong = (labels != 0) & (labels != 1)
    if wrong.any():
        found = labels[wrong].flatten()[:3].tolist()
        raise ValueError(f"labels: found values {found}, expected 0 or 1 (multi-hot)")
