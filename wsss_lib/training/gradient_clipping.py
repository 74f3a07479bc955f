"""WeakTr's gradient clipping: pixels whose loss stands out teach nothing.

Source: WeakTr, Zhu et al. 2023 (arXiv 2304.01184), section 3.4. Pseudo labels are wrong in places; a network
that has learned what most pixels say has a high loss there. So once the mean loss is low enough, a pixel's
loss is capped at a threshold around it, which cuts its gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .distributed import average


def gradient_clipping_loss(loss_map: Tensor, start: float = 1.2, patch: int = 120) -> Tensor:
    """The mean of `clip_loss_map`, a number. Arguments and errors as there."""
    return clip_loss_map(loss_map, start, patch).mean()


def clip_loss_map(loss_map: Tensor, start: float = 1.2, patch: int = 120) -> Tensor:
    """Per-pixel losses (B, H, W), 0 where ignored -> the same capped at thresholds: min(loss, threshold).

    start: while the mean of all losses is above it, nothing is capped. patch: side, in pixels, of the squares
    that have one threshold each: the larger of the square's mean and the mean of all, both over the batch.
    Ignored pixels count in every mean, as published. Squares start at the top left; those at the right and
    bottom end with the picture, and their mean is over the pixels that they have. (The published code takes
    only heights and widths that the patch divides; for those the two agree.)

    A pixel at or below its threshold keeps its gradient, one above it has none; the thresholds are
    constants. Computed and returned in float32 or better.
    Raises ValueError for another shape, an empty map and patch < 1.
    """
    if loss_map.ndim != 3 or 0 in loss_map.shape or not loss_map.is_floating_point():
        found = f"{loss_map.dtype} of shape {tuple(loss_map.shape)}"
        raise ValueError(f"loss_map: found {found}, expected losses (B, H, W), not empty")
    if patch < 1:
        raise ValueError(f"patch: found {patch}, expected at least 1")
    loss_map = loss_map.to(torch.promote_types(loss_map.dtype, torch.float32))
    losses = average(loss_map.mean(dim=0))  # (B, H, W) -> (H, W), of all processes' pictures
    thresholds = local_thresholds(losses[None], patch).masked_fill(losses.mean() > start, torch.inf)
    return torch.where(loss_map <= thresholds, loss_map, thresholds)


def local_thresholds(losses: Tensor, patch: int) -> Tensor:
    """Losses (B, H, W) -> (H, W), at each pixel the larger of its square's mean and the mean of all."""
    height, width = losses.shape[1:]
    # A window that ends beyond the picture is cut and divided by what is left of it. (H, W) -> (1, h, w)
    means = F.avg_pool2d(losses.mean(dim=0)[None], patch, stride=patch, ceil_mode=True)[0]
    rows, columns = (torch.arange(side, device=losses.device) // patch for side in (height, width))
    return means.clamp(min=losses.mean())[rows[:, None], columns]
