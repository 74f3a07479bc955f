"""Maps -> masks: the pseudo labels that a segmentation network learns from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..localization.normalize import normalize_maps
from ..localization.slots import check_labels


def scored_maps(maps: Tensor, labels: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """Raw maps (B, C, h, w) -> float32 scores (B, C, H, W) in [0, 1], ready for a threshold.

    Absent classes become 0, each map is divided by its maximum, then resized to size = (H, W) pixels
    (bilinear, align_corners False; None: the maps' own). In this order scores are values of the map itself:
    resizing first would divide by a maximum that the interpolation has lowered.
    `pseudo_labels` and a threshold sweep share this function, so a sweep at t scores what background=t makes.
    Raises ValueError for wrong shapes, labels other than 0 and 1, maps that are negative or not finite, or an
    empty size.
    """
    if maps.ndim != 4:
        raise ValueError(f"maps: found shape {tuple(maps.shape)}, expected (B, C, h, w)")
    check_labels(labels, *maps.shape[:2])
    absent = (labels == 0).to(maps.device)[:, :, None, None]  # (B, C) -> (B, C, 1, 1)
    scores = normalize_maps(maps.float().masked_fill(absent, 0))
    if size is None:
        return scores
    size = tuple(size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size: found {size}, expected (height, width) in pixels")
    if size != tuple(scores.shape[-2:]):
        scores = F.interpolate(scores, size, mode="bilinear", align_corners=False)
    return scores.clamp(0, 1)  # interpolation weights may sum to 1 and a rounding error


def pseudo_labels(
    maps: Tensor,
    labels: Tensor,
    images: Tensor | None = None,
    background: float = 0.4,
    refine: str | None = None,
    size: Sequence[int] | None = None,
) -> Tensor:
    """Raw maps (B, C, h, w) and labels (B, C) multi-hot -> masks long (B, H, W), 0 background, 1..C classes.

    Each pixel gets the class of its highest score (see `scored_maps`) where that is > background, in [0, 1],
    else 0: argmax over [background, scores], ties to the background, then to the lowest class.
    The masks have `size` = (H, W), else the size of the images (B, 3, H, W), else that of the maps.
    refine: None; there is no refinement yet.
    Raises ValueError for a background outside [0, 1], an unknown refine, other images, and as `scored_maps`.
    """
    if not 0 <= background <= 1:
        raise ValueError(f"background: found {background}, expected a score in [0, 1]")
    if refine is not None:
        raise ValueError(f"refine: found {refine!r}; available: None")
    if images is not None and (images.ndim != 4 or len(images) != len(maps)):
        raise ValueError(f"images: found shape {tuple(images.shape)}, expected ({len(maps)}, 3, H, W)")
    if size is None and images is not None:
        size = images.shape[-2:]
    score, winner = scored_maps(maps, labels, size).max(dim=1)  # (B, C, H, W) -> (B, H, W)
    # The threshold in float32, like the scores: 0.4 is not the same number in float64.
    threshold = torch.tensor(background, dtype=torch.float32, device=score.device)
    return torch.where(score > threshold, winner + 1, 0)
