"""Masks -> masks that follow the picture's edges: DenseCRF on labels, as WeakTr refines its pseudo labels.

Source: Kraehenbuehl and Koltun 2011 (arXiv 1210.5644); settings of WeakTr (arXiv 2304.01184), section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.dense_crf import DenseCRF, unary_from_labels
from ..localization.slots import check_labels

IGNORE = 255
SPATIAL, BILATERAL = (4, 3), (83, 5, 3)  # WeakTr on VOC; on COCO: (3, 3), (50, 5, 10)


def crf_labels(
    masks: Tensor,
    labels: Tensor,
    images: Tensor,
    spatial: tuple[float, float] = SPATIAL,
    bilateral: tuple[float, float, float] = BILATERAL,
    gt_prob: float = 0.7,
    num_iter: int = 10,
) -> Tensor:
    """Masks long (B, H, W), 0 background, 1..C classes, 255 unknown -> refined masks, without 255.

    labels: (B, C) multi-hot; a picture's CRF is over the background and its present classes, no others.
    images: (B, 3, H, W), 0..255. A pixel's label starts with probability gt_prob, the others share the rest;
    one of 255 prefers none. spatial, bilateral, num_iter: as of `kernels.dense_crf`.
    Raises ValueError for other shapes, a mask with a class that its labels lack, and as `dense_crf`.
    """
    if masks.ndim != 3 or masks.is_floating_point():
        raise ValueError(f"masks: found {masks.dtype} of shape {tuple(masks.shape)}, expected long (B, H, W)")
    expected = (len(masks), 3, *masks.shape[1:])
    if images.shape != expected:
        raise ValueError(f"images: found shape {tuple(images.shape)}, expected {expected}")
    check_labels(labels, len(masks))
    refined = torch.empty_like(masks, dtype=torch.long)
    for b, (mask, image) in enumerate(zip(masks, images)):
        present = labels[b].nonzero()[:, 0].to(mask.device) + 1
        classes = torch.cat([present.new_zeros(1), present])  # (K,), of this picture, ascending
        unary = unary_from_labels(_compact(mask, classes)[None], len(classes), gt_prob, IGNORE)[0]
        probabilities = DenseCRF(image, spatial, bilateral)(unary, num_iter)  # (K, H, W)
        refined[b] = classes[probabilities.argmax(dim=0)]
    return refined


def _compact(mask: Tensor, classes: Tensor) -> Tensor:
    """Mask (H, W) -> the place of each label in `classes` (K,), ascending; 255 stays."""
    known = (mask[..., None] == classes).any(dim=-1) | (mask == IGNORE)
    if not known.all():
        found, expected = mask[~known].unique().tolist(), classes.tolist()
        raise ValueError(f"masks: found {found}, expected {expected} (background, present classes) or 255")
    places = torch.searchsorted(classes, mask.long().contiguous())
    return places.masked_fill(mask == IGNORE, IGNORE)
