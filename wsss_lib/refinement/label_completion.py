"""GETAM's activation-aware label completion: scores and a saliency map -> masks to train on.

Sun et al. 2021 (arXiv 2112.02841), section 3: class maps say which class, saliency says where anything stands
out. Saliency misses objects; where a map is very sure although nothing stands out, the map is believed:

1. `initial_labels`: the best class where it beats the background and the picture is salient; salient pixels
   that no class wants are ignored (255), what is not salient is background.
2. `completion_thresholds`: how sure is very sure, for each picture and class by itself.
3. `complete`: background pixels above their class's threshold become that class.
4. `open_regions`: specks and thin strands that the completion left behind go.

`complete_labels` runs all four. The published code departs from this in three places, which published=True
restores: of two classes that claim a pixel the lower index wins (its branch for 255 is never reached); the
opening moves regions down and to the right by a pixel, for its even kernel has no centre; and completed
pixels are written into the saliency map, which the saliency loss reads afterwards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.sample import IGNORE
from ..localization.slots import check_labels
from ..models.attention import at_least_float32

SALIENT = 0.5  # saliency above it is foreground


class CompletedLabels(NamedTuple):
    """masks: long (B, H, W), 0 background, 1..C, 255 ignore. saliency (B, H, W): for the saliency loss."""

    masks: Tensor
    saliency: Tensor


@torch.no_grad()
def complete_labels(
    scores: Tensor,
    labels: Tensor,
    saliency: Tensor,
    cut: float = 0.9,
    power: float = 32,
    opening: int = 10,
    published: bool = False,
) -> CompletedLabels:
    """Scores (B, C, H, W), labels (B, C), saliency (B, H, W) -> masks to train on, and the saliency.

    scores: floating point in [0, 1], as of `scored_maps`; those of classes that are absent from the multi-hot
    labels do not count. saliency: bool, or floating point in [0, 1], foreground where it is above 0.5. cut:
    the share of a class's positive scores that is not sure enough (0.9 for VOC, 0.95 for COCO). power: of the
    background's score, see `initial_labels`. opening: side of the square of step 4, in pixels.
    A picture without a class: 255 where it is salient, as far as step 4 leaves it, else 0.

    saliency comes back as it was. published: the three departures above; of the saliency that the published
    loss reads, only completed pixels are foreground, so the map that comes back, float, is 1 there and 0
    elsewhere.
    Raises ValueError for other shapes, types, values, devices, cut outside [0, 1), power <= 0, opening < 1.
    """
    masks = initial_labels(scores, labels, saliency, power)
    completed = complete(masks, scores, completion_thresholds(scores, labels, cut), published)
    # What the opening removes keeps its place in the published saliency.
    changed = ((masks == 0) & (completed > 0)).float() if published else saliency
    kept = open_regions(completed > 0, opening, published)
    return CompletedLabels(completed.masked_fill(~kept, 0), changed)


def initial_labels(scores: Tensor, labels: Tensor, saliency: Tensor, power: float = 32) -> Tensor:
    """Step 1: scores (B, C, H, W), labels (B, C), saliency (B, H, W) -> masks long (B, H, W).

    The background's score is (1 - highest score)^power. Where a class scores more, that class (of equal ones
    the lowest), else 255; then 0 where the saliency is not above 0.5. Arguments, errors: `complete_labels`.
    """
    _check_scores(scores, labels)
    if power <= 0:
        raise ValueError(f"power: found {power}, expected a number > 0")
    foreground = _salient(saliency, scores)
    absent = (labels == 0).to(scores.device)[:, :, None, None]  # (B, C) -> (B, C, 1, 1)
    highest, winner = at_least_float32(scores).masked_fill(absent, 0).max(dim=1)  # (B, C, H, W) -> (B, H, W)
    masks = torch.where(highest > (1 - highest).pow(power), winner + 1, IGNORE)
    return masks.masked_fill(~foreground, 0)


def completion_thresholds(scores: Tensor, labels: Tensor, cut: float = 0.9) -> Tensor:
    """Step 2: scores (B, C, H, W), labels (B, C) -> (B, C), the scores above which a class is very sure.

    Of a class's n positive scores in the picture, in ascending order, the one at index int(cut * n). inf for
    absent classes and those without a positive score. Arguments and errors: `complete_labels`.
    """
    _check_scores(scores, labels)
    if not 0 <= cut < 1:
        raise ValueError(f"cut: found {cut}, expected a share in [0, 1)")
    scores, present = at_least_float32(scores), (labels > 0).to(scores.device)
    thresholds = scores.new_full(labels.shape, torch.inf)
    # Sorting is all the time this takes, and most classes are absent: (B, C, H, W) -> (P, H*W).
    ascending = scores.flatten(2)[present].sort(dim=1).values
    positive = (ascending > 0).sum(dim=1)  # (P,)
    # The product in float64, as Python has it; on the CPU, since not every device knows float64.
    above = (cut * positive.cpu().double()).long().to(positive.device)
    index = ascending.shape[1] - positive + above
    found = ascending.gather(1, index.clamp(max=ascending.shape[1] - 1)[:, None])[:, 0]
    thresholds[present] = torch.where(positive > 0, found, torch.inf)
    return thresholds


def complete(masks: Tensor, scores: Tensor, thresholds: Tensor, published: bool = False) -> Tensor:
    """Step 3: pixels that are 0 in masks (B, H, W) and score above their class's threshold become that class.

    scores (B, C, H, W), thresholds (B, C) -> masks long (B, H, W), new. A pixel that two classes claim
    becomes 255; published: the class of the lower index. Raises ValueError where the shapes do not fit.
    """
    expected = {"masks": (len(scores), *scores.shape[2:]), "thresholds": tuple(scores.shape[:2])}
    for name, tensor in (("masks", masks), ("thresholds", thresholds)):
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(f"{name}: found shape {tuple(tensor.shape)}, expected {expected[name]}")
    claims = at_least_float32(scores) > thresholds[:, :, None, None]  # (B, C, H, W)
    number = claims.sum(dim=1)  # (B, H, W)
    claimed = claims.int().argmax(dim=1) + 1  # the first that claims the pixel
    if not published:
        claimed = claimed.masked_fill(number > 1, IGNORE)
    return torch.where((masks == 0) & (number > 0), claimed, masks)


def open_regions(regions: Tensor, size: int = 10, published: bool = False) -> Tensor:
    """Step 4: morphological opening, bool (B, H, W) -> bool (B, H, W): the union of all size x size squares
    that fit into the region. A square may hang over the picture's edge by half of its side.

    An even square has no middle pixel, so erosion and dilation must look opposite ways for regions to stay
    where they are. published: both look size // 2 pixels up and left and one less down and right, which moves
    regions by a pixel down and right. Raises ValueError for another shape or type, or size < 1.
    """
    if regions.ndim != 3 or regions.dtype != torch.bool:
        found = f"{regions.dtype} of shape {tuple(regions.shape)}"
        raise ValueError(f"regions: found {found}, expected torch.bool (B, H, W)")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"opening: found {size}, expected a whole number of pixels, 1 or more")
    half, rest = size // 2, (size - 1) // 2  # of an odd square the same
    if published:
        eroded = ~_any_in_squares(~regions, size, half, rest)
        return _any_in_squares(eroded, size, half, rest)
    eroded = ~_any_in_squares(~regions, size, half, half)  # (B, H + 1, W + 1) for an even square, the squares
    return _any_in_squares(eroded, size, rest, rest)  # (B, H, W) again


def _any_in_squares(regions: Tensor, size: int, before: int, after: int) -> Tensor:
    """Bool (B, H, W) -> (B, H + before + after + 1 - size, ...): whether any pixel of each square is set.

    The squares are those of the picture with `before` pixels, not set, above and left, `after` the rest.
    """
    padded = F.pad(regions[:, None].float(), (before, after, before, after))  # (B, 1, H, W), larger
    rows = F.max_pool2d(padded, (size, 1), stride=1)  # a square is a column of rows: 2 size steps, not size^2
    return F.max_pool2d(rows, (1, size), stride=1)[:, 0] > 0


def _salient(saliency: Tensor, scores: Tensor) -> Tensor:
    """Bool (B, H, W): where the saliency is above 0.5. ValueError unless it fits the scores."""
    expected = (len(scores), *scores.shape[2:])
    if tuple(saliency.shape) != expected or saliency.device != scores.device:
        found = f"shape {tuple(saliency.shape)} on {saliency.device}"
        raise ValueError(f"saliency: found {found}, expected {expected} on {scores.device}")
    if saliency.dtype == torch.bool:
        return saliency
    if not saliency.is_floating_point():
        raise ValueError(f"saliency: found {saliency.dtype}, expected torch.bool or floating point in [0, 1]")
    _check_range("saliency", saliency)
    return saliency > SALIENT


def _check_scores(scores: Tensor, labels: Tensor) -> None:
    if scores.ndim != 4 or not scores.is_floating_point() or 0 in scores.shape:
        found = f"{scores.dtype} of shape {tuple(scores.shape)}"
        raise ValueError(f"scores: found {found}, expected floating point (B, C, H, W) without a 0")
    check_labels(labels, *scores.shape[:2])
    _check_range("scores", scores)


def _check_range(name: str, values: Tensor) -> None:
    low, high = values.aminmax()
    if not (low >= 0 and high <= 1):  # not satisfied by nan either
        raise ValueError(f"{name}: found values {low:.4g} to {high:.4g}, expected 0 to 1")
