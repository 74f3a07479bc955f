"""AFA's pseudo labels: foreground that a strict threshold finds, background that a loose one leaves.

Source: AFA, Ru et al. 2022 (arXiv 2203.02664), sections 3.3 to 3.5. Between the two backgrounds' scores, .55
and .35, a pixel is neither: 255, it teaches nothing. Both labellings are refined by PAR
(`kernels.refine_cam`), at half of the picture's resolution. A crop may be padded; outside its valid box
everything is 255.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import EllipsisType

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.sample import IGNORE
from ..kernels import refine_cam
from ..localization.slots import check_labels
from .random_walk import check_unit_range, random_walk

BACKGROUNDS = (0.55, 0.35)  # strict, loose
NUM_ITER = 10  # of PAR; 15 for COCO


def threshold_labels(
    maps: Tensor,
    labels: Tensor,
    background: float | Sequence[float] = BACKGROUNDS,
    boxes: Tensor | None = None,
) -> Tensor:
    """Maps (B, C, H, W) in [0, 1] -> masks long (B, H, W), by thresholds alone.

    A pixel has the class of its highest map, absent classes left out. background (strict, loose): where that
    map is at most `loose` it is 0, where it is more but at most `strict` it is 255. A single number: 0 where
    the map is at most that. boxes (B, 4), (y0, x0, y1, x1): outside, 255.
    Raises ValueError for other shapes and labels and for strict < loose.
    """
    _check(maps, labels, None, boxes)
    present = (labels > 0).to(maps.device)[:, :, None, None]  # (B, C) -> (B, C, 1, 1)
    score, winner = (maps * present).max(dim=1)  # (B, C, H, W) -> (B, H, W)
    return combine_labels(*((winner + 1) * (score > threshold) for threshold in _pair(background)), boxes)


@torch.no_grad()
def reliable_labels(
    maps: Tensor,
    labels: Tensor,
    images: Tensor,
    backgrounds: Sequence[float] = BACKGROUNDS,
    boxes: Tensor | None = None,
    num_iter: int = NUM_ITER,
    published: bool = False,
) -> Tensor:
    """Maps (B, C, h, w) in [0, 1] and images (B, 3, H, W), 0..255 -> masks long (B, H, W), 255 where unsure.

    For each of the backgrounds (strict, loose): at half resolution the softmax over [background, maps of the
    present classes], refined by num_iter iterations of PAR, resized, argmax. Then `combine_labels`.
    labels (B, C) multi-hot; boxes (B, 4), (y0, x0, y1, x1), the part of each image that is picture (None:
    all): what lies outside has no say and is 255. published: the padding takes part in the refinement.
    Raises ValueError for other shapes and labels, maps outside [0, 1] and strict < loose.
    """
    _check(maps, labels, images, boxes)
    check_unit_range(maps)
    pair, maps = _pair(backgrounds), _resize(maps, images.shape[-2:])
    strict, loose = masks = [_ignored(maps) for _ in pair]
    maps = F.pad(maps, (0, 0, 0, 0, 1, 0))  # (B, C, H, W) -> (B, C+1, H, W), the background's place first
    for i, keys, box in _pictures(labels.to(maps.device), boxes):
        window = WHOLE if published else box
        image, small = images[i : i + 1][window], _half(maps[i : i + 1, keys][window])  # (1, K+1, h, w)
        scores = []
        for background in pair:
            small[:, 0] = background
            scores.append(small.softmax(dim=1))
        # PAR treats every map by itself: in one call the picture's affinity is made once for both
        refined = refine_cam(_half(image.to(maps.dtype)), torch.cat(scores, dim=1), num_iter=num_iter)
        refined = _resize(refined, image.shape[-2:])  # (1, 2*(K+1), h, w) -> (1, 2*(K+1), H, W)
        for mask, found in zip(masks, refined[0].chunk(2)):
            mask[i][window] = keys[found.argmax(dim=0)]
    return combine_labels(strict, loose, boxes)


@torch.no_grad()
def propagated_labels(
    maps: Tensor,
    affinity: Tensor,
    labels: Tensor,
    images: Tensor,
    backgrounds: Sequence[float] = BACKGROUNDS,
    boxes: Tensor | None = None,
    radius: int | None = 8,
    num_iter: int = NUM_ITER,
    published: bool = False,
) -> Tensor:
    """`reliable_labels` of maps that the affinity has spread: masks long (B, H, W).

    maps (B, C, h, w) in [0, 1] on the affinity's grid; affinity (B, h*w, h*w). For each of the backgrounds
    `random_walk`, resized to the image, and `refine_scores`; then `combine_labels`. Other arguments and
    errors as of those.
    """
    masks = []
    for background in _pair(backgrounds):
        scores = random_walk(maps, affinity, labels, background, radius)
        refined = refine_scores(scores, labels, images, boxes, num_iter, published)
        masks.append(refined.argmax(dim=1))
    return combine_labels(*masks, boxes)


@torch.no_grad()
def refine_scores(
    scores: Tensor,
    labels: Tensor,
    images: Tensor,
    boxes: Tensor | None = None,
    num_iter: int = NUM_ITER,
    published: bool = False,
) -> Tensor:
    """Scores (B, C+1, h, w), background first, refined by PAR at half resolution: (B, C+1, H, W).

    labels (B, C) multi-hot; images (B, 3, H, W), 0..255; boxes (B, 4), (y0, x0, y1, x1). 0 outside the boxes
    and for absent classes. PAR makes scores grow, by 1.01 an iteration; which is highest does not change.
    published: scores are halved with align_corners True, and so shifted by up to half a pixel beside the
    image, which is not. Raises ValueError for other shapes and labels.
    """
    _check(scores[:, 1:], labels, images, boxes)
    scores = _resize(scores, images.shape[-2:])
    out = torch.zeros_like(scores)
    for i, keys, box in _pictures(labels.to(scores.device), boxes):
        image, present = images[i : i + 1][box], scores[i : i + 1, keys][box]
        # refine_cam itself brings maps to the image's size, with align_corners True
        refined = refine_cam(
            _half(image.to(scores.dtype)), present if published else _half(present), num_iter=num_iter)
        out[i][(keys, *box[1:])] = _resize(refined, image.shape[-2:])[0]
    return out


def combine_labels(strict: Tensor, loose: Tensor, boxes: Tensor | None = None) -> Tensor:
    """Two masks long (B, H, W) -> one: the strict one's classes, 0 where both have 0, elsewhere 255.

    boxes (B, 4), (y0, x0, y1, x1): outside, 255. Raises ValueError for other shapes.
    """
    if strict.ndim != 3 or strict.shape != loose.shape:
        found = f"{tuple(strict.shape)} and {tuple(loose.shape)}"
        raise ValueError(f"strict, loose: found shapes {found}, expected both (B, H, W)")
    masks = torch.where(strict != 0, strict, torch.where(loose == 0, 0, IGNORE))
    if boxes is None:
        return masks
    out = torch.full_like(masks, IGNORE)
    for mask, found, box in zip(out, masks, _windows(boxes, len(masks))):
        mask[box] = found[box]
    return out


Window = tuple[EllipsisType, slice, slice]  # rows and columns, of whatever stands before them
WHOLE: Window = (..., slice(None), slice(None))


def _pictures(labels: Tensor, boxes: Tensor | None) -> Iterator[tuple[int, Tensor, Window]]:
    """Each picture: its number, its classes (0 for the background first) and the window of its box."""
    for i, window in enumerate(_windows(boxes, len(labels))):
        keys = labels[i].nonzero()[:, 0] + 1
        yield i, torch.cat([keys.new_zeros(1), keys]), window


def _windows(boxes: Tensor | None, count: int) -> list[Window]:
    if boxes is None:
        return [WHOLE] * count
    return [(..., slice(y0, y1), slice(x0, x1)) for y0, x0, y1, x1 in torch.as_tensor(boxes).tolist()]


def _ignored(maps: Tensor) -> Tensor:
    """(B, C, H, W) -> long (B, H, W) of 255."""
    return torch.full((len(maps), *maps.shape[2:]), IGNORE, device=maps.device)


def _half(x: Tensor) -> Tensor:
    return _resize(x, [max(1, side // 2) for side in x.shape[-2:]])


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    same = tuple(x.shape[-2:]) == tuple(size)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x if same else F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def _pair(background: float | Sequence[float]) -> tuple[float, float]:
    """(strict, loose); one number is both."""
    pair = (background, background) if isinstance(background, (int, float)) else tuple(background)
    if len(pair) != 2 or not 0 <= pair[1] <= pair[0] <= 1:
        expected = "(strict, loose) with 1 >= strict >= loose >= 0"
        raise ValueError(f"background: found {background}, expected {expected}")
    return pair


def _check(maps: Tensor, labels: Tensor, images: Tensor | None, boxes: Tensor | None) -> None:
    if maps.ndim != 4 or not maps.is_floating_point():
        found = f"{maps.dtype} of shape {tuple(maps.shape)}"
        raise ValueError(f"maps: found {found}, expected floating point (B, C, h, w)")
    check_labels(labels, *maps.shape[:2])
    if images is not None and (images.ndim != 4 or images.shape[:2] != (len(maps), 3)):
        raise ValueError(f"images: found shape {tuple(images.shape)}, expected ({len(maps)}, 3, H, W)")
    if boxes is None:
        return
    height, width = (maps if images is None else images).shape[-2:]
    boxes = torch.as_tensor(boxes)
    if tuple(boxes.shape) != (len(maps), 4):
        raise ValueError(f"boxes: found shape {tuple(boxes.shape)}, expected ({len(maps)}, 4)")
    for y0, x0, y1, x1 in boxes.tolist():
        if not (0 <= y0 < y1 <= height and 0 <= x0 < x1 <= width):
            found, expected = (y0, x0, y1, x1), f"(y0, x0, y1, x1) inside {height}x{width} pixels"
            raise ValueError(f"boxes: found {found}, expected {expected}")
