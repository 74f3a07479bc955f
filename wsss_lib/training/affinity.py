"""AFA's affinity loss: patches of the same pseudo label belong together, patches of different ones do not.

Source: AFA, Ru et al. 2022 (arXiv 2203.02664), section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.sample import IGNORE
from ..refinement.random_walk import radius_mask
from .distributed import per_count

SAME, DIFFERENT = 1, 0


@torch.no_grad()
def affinity_labels(
    masks: Tensor, radius: int | None = 8, stride: int = 16, published: bool = False
) -> Tensor:
    """What the affinity of two patches should be: uint8 (B, N, N), 1 same class, 0 different, 255 ignored.

    masks (B, H, W): whole numbers, background 0, classes 1..C, or 255: ignored. A patch of stride x stride
    pixels has the label of the pixel in its middle; published: of its upper left pixel, half a patch away.
    Ignored are pairs with a patch of 255 and those more than `radius` rows or columns apart (None: none are).
    The diagonal counts, as published. Raises ValueError for other shapes and types, sides that are no
    multiples of the stride and a negative radius.
    """
    if masks.ndim != 3 or masks.is_floating_point() or masks.dtype == torch.bool or 0 in masks.shape:
        found = f"{masks.dtype} of shape {tuple(masks.shape)}"
        raise ValueError(f"masks: found {found}, expected whole numbers (B, H, W), none of them zero")
    if stride < 1 or any(side % stride for side in masks.shape[1:]):
        found = f"{masks.shape[1]}x{masks.shape[2]} pixels"
        raise ValueError(f"masks: found {found}, expected multiples of the stride, {stride}")
    offset = 0 if published else stride // 2
    patches = masks[:, offset::stride, offset::stride]  # (B, H, W) -> (B, h, w)
    grid, patches = patches.shape[1:], patches.flatten(1)  # (B, h, w) -> (B, N)
    labels = (patches[:, :, None] == patches[:, None, :]).to(torch.uint8)  # (B, N, N)
    ignored = patches == IGNORE
    labels.masked_fill_(ignored[:, :, None], IGNORE).masked_fill_(ignored[:, None, :], IGNORE)
    if radius is not None:
        labels.masked_fill_(~radius_mask(*grid, radius, device=masks.device), IGNORE)
    return labels


def affinity_loss(affinity: Tensor, labels: Tensor) -> Tensor:
    """Half the mean of 1 - a over pairs that belong together, plus half that of a over the others: a scalar.

    affinity (B, N, N), values in (0, 1); labels (B, N, N) as of `affinity_labels`. The means are over the
    whole batch, and each divides by its count + 1, as published: a side without pairs adds 0. In float32, or
    float64 for a float64 affinity. Raises ValueError for other shapes and for labels other than 0, 1 and 255.
    """
    if affinity.ndim != 3 or affinity.shape != labels.shape or not affinity.is_floating_point():
        found = f"{affinity.dtype} {tuple(affinity.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"affinity, labels: found {found}, expected floating point, both (B, N, N)")
    same, different = labels == SAME, labels == DIFFERENT
    counts = torch.stack([side.sum() for side in (same, different, labels == IGNORE)])
    if counts.sum() != labels.numel():
        found = sorted(set(labels.unique().tolist()) - {SAME, DIFFERENT, IGNORE})[:3]
        raise ValueError(f"labels: found values {found}, expected {DIFFERENT}, {SAME} or {IGNORE}")
    with torch.autocast(affinity.device.type, enabled=False):
        affinity = affinity.to(torch.promote_types(affinity.dtype, torch.float32))
        sums = torch.stack([((1 - affinity) * same).sum(), (affinity * different).sum()])
        return per_count(sums, counts[:2], more=1).sum() / 2
