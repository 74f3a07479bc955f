"""Maps -> masks: the pseudo labels that a segmentation network learns from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import refine_cam
from ..localization.normalize import normalize_maps
from ..localization.slots import check_labels

REFINEMENTS = ("par", "pamr")
ITERATIONS = 10
PAR_GAIN = 1.01  # the weights of a PAR iteration sum to this


def scored_maps(maps: Tensor, labels: Tensor, size: Sequence[int] | None = None, images: Tensor | None = None,
                refine: str | None = None) -> Tensor:
    """Raw maps (B, C, h, w) -> float32 scores (B, C, H, W) in [0, 1], ready for a threshold.

    Absent classes become 0, each map is divided by its maximum, then resized to size = (H, W) pixels
    (bilinear, align_corners False; None: the images', else the maps' own). In this order scores are values of
    the map itself: resizing first would divide by a maximum that the interpolation has lowered.
    refine: "par" or "pamr" then lets neighbouring pixels of like colour in the images (B, 3, H, W), 0..255, agree
    (`kernels.refine_cam`). A constant background score would stay as it is, so it need not be refined along.
    `pseudo_labels` and a threshold sweep share this function, so a sweep at t scores what background=t makes.
    Raises ValueError for wrong shapes, labels other than 0 and 1, maps that are negative or not finite, an
    empty size, an unknown refine, and images that are missing or have another size.
    """
    if refine not in (None, *REFINEMENTS):
        raise ValueError(f"refine: found {refine!r}, expected None or one of {', '.join(REFINEMENTS)}")
    if images is not None and (images.ndim != 4 or len(images) != len(maps)):
        raise ValueError(f"images: found shape {tuple(images.shape)}, expected ({len(maps)}, 3, H, W)")
    if size is None and images is not None:
        size = images.shape[-2:]
    if refine and (images is None or tuple(size) != tuple(images.shape[-2:])):
        found = "none" if images is None else f"{tuple(images.shape[-2:])} pixels"
        raise ValueError(f"images: found {found}, expected images of the scores' size to refine by")
    if maps.ndim != 4:
        raise ValueError(f"maps: found shape {tuple(maps.shape)}, expected (B, C, h, w)")
    check_labels(labels, *maps.shape[:2])
    absent = (labels == 0).to(maps.device)[:, :, None, None]  # (B, C) -> (B, C, 1, 1)
    scores = normalize_maps(maps.float().masked_fill(absent, 0))
    size = tuple(scores.shape[-2:] if size is None else size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size: found {size}, expected (height, width) in pixels")
    if size != tuple(scores.shape[-2:]):
        scores = F.interpolate(scores, size, mode="bilinear", align_corners=False)
    scores = scores.clamp(0, 1)  # interpolation weights may sum to 1 and a rounding error
    return _refined(scores, images, refine) if refine else scores


def _refined(scores: Tensor, images: Tensor, variant: str) -> Tensor:
    """Scores (B, C, H, W) refined; those of absent classes, all zero, cost nothing."""
    present = scores.flatten(2).any(dim=2).any(dim=0)  # (C,)
    gain = PAR_GAIN**ITERATIONS if variant == "par" else 1.0
    refined = torch.zeros_like(scores)
    if present.any():
        found = refine_cam(images.to(scores), scores[:, present], num_iter=ITERATIONS, variant=variant)
        refined[:, present] = found / gain
    return refined.clamp(0, 1)


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
    refine: "par" (AFA, section 3.3) or "pamr" with the images, 0..255; None leaves the scores alone.
    Raises ValueError for a background outside [0, 1] and as `scored_maps`.
    """
    if not 0 <= background <= 1:
        raise ValueError(f"background: found {background}, expected a score in [0, 1]")
    score, winner = scored_maps(maps, labels, size, images, refine).max(dim=1)  # (B, C, H, W) -> (B, H, W)
    # The threshold in float32, like the scores: 0.4 is not the same number in float64.
    threshold = torch.tensor(background, dtype=torch.float32, device=score.device)
    return torch.where(score > threshold, winner + 1, 0)
