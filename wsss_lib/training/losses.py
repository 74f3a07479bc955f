"""Losses of the methods; models return outputs only.

All of them compute in float32 (float64 for float64 inputs) whatever autocast says.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.sample import IGNORE
from ..models.attention import at_least_float32
from .affinity import affinity_labels, affinity_loss
from .consistency import consistency_loss
from .dense_energy import check_logits, dense_energy_loss, upsampled
from .distributed import per_count
from .gradient_clipping import gradient_clipping_loss

__all__ = ["affinity_labels", "affinity_loss", "balanced_segmentation_loss", "classification_loss",
           "consistency_loss", "dense_energy_loss", "gradient_clipping_loss", "saliency_loss", "weaktr_loss"]


def classification_loss(model: nn.Module, batch: dict, step: int) -> dict[str, Tensor]:
    """Multi-label soft margin loss of both heads of a `CamViT`, from image-level labels: {"class", "patch"}.

    batch: image (B, 3, H, W), labels (B, C) multi-hot. Mean over pictures and classes of the binary cross
    entropy between sigmoid(logit) and label.
    """
    out = model.forward_heads(batch["image"])
    return {"class": F.multilabel_soft_margin_loss(at_least_float32(out.class_logits), batch["labels"]),
            "patch": F.multilabel_soft_margin_loss(at_least_float32(out.pooled), batch["labels"])}


def weaktr_loss(model: nn.Module, batch: dict, step: int) -> dict[str, Tensor]:
    """Multi-label soft margin loss of a `WeakTr`'s three predictions, to be summed: {"class", "coarse", "fine"}.

    batch: image (B, 3, H, W), labels (B, C) multi-hot. "fine" teaches the attention fusion alone: what it reads is
    detached. Source: WeakTr (arXiv 2304.01184), section 3.
    """
    out = model.forward_predictions(batch["image"])
    logits = {"class": out.class_logits, "coarse": out.coarse_logits, "fine": out.fine_logits}
    return {name: F.multilabel_soft_margin_loss(at_least_float32(x), batch["labels"]) for name, x in logits.items()}


def balanced_segmentation_loss(logits: Tensor, masks: Tensor, average: bool = False,
                               published: bool = False) -> Tensor:
    """Cross entropy, a scalar, in which background and foreground count the same whatever their size.

        mean of CE over the pixels that are 0  +  mean of CE over those that are 1..C

    logits (B, C+1, h, w), background first, resized to the masks (bilinear, align_corners False); masks
    (B, H, W) whole numbers 0..C, or 255: ignored. The means are over the whole batch. A side without pixels
    adds 0; published: nan, as in both published codes. average: the mean of the two sides, half of their sum.
    Source: GETAM (arXiv 2112.02841), the sum; AFA (arXiv 2203.02664) with average=True.
    Raises ValueError for other shapes and types, and as `F.cross_entropy` for other values.
    """
    check_logits(logits)
    if masks.ndim != 3 or len(masks) != len(logits) or masks.is_floating_point() or masks.dtype == torch.bool:
        found = f"{masks.dtype} of shape {tuple(masks.shape)}"
        raise ValueError(f"masks: found {found}, expected whole numbers ({len(logits)}, H, W)")
    with torch.autocast(logits.device.type, enabled=False):
        scores = upsampled(at_least_float32(logits), masks.shape[1:])
        # (B, H, W), 0 at ignored pixels: one pass for both sides
        errors = F.cross_entropy(scores, masks.long(), ignore_index=IGNORE, reduction="none")
        background = masks == 0
        foreground = ~background & (masks != IGNORE)
        fewest = 0 if published else 1                  # 0 / 0 is nan, 0 / 1 is 0
        sides = [per_count((errors * side).sum(), side.sum(), fewest) for side in (background, foreground)]
        return sum(sides) / 2 if average else sum(sides)


def saliency_loss(logits: Tensor, saliency: Tensor) -> Tensor:
    """Binary cross entropy between the background's probability and 1 - saliency, a scalar.

    logits (B, C+1, h, w), background first, resized to the saliency (bilinear, align_corners False); saliency
    (B, H, W), bool or in [0, 1], 1 is foreground. The mean over all pixels. As softmax(l)_0 is
    sigmoid(l_0 - logsumexp(l_1..l_C)), no probability's logarithm is ever taken: nothing overflows.
    Source: GETAM (arXiv 2112.02841). Its published code reads a saliency map that label completion has
    overwritten: for that, give this function what `refinement.complete_labels` returns with published=True.
    Raises ValueError for other shapes and, in floating point, values outside [0, 1].
    """
    check_logits(logits)
    if saliency.ndim != 3 or len(saliency) != len(logits) or 0 in saliency.shape:
        raise ValueError(f"saliency: found shape {tuple(saliency.shape)}, expected ({len(logits)}, H, W)")
    if saliency.dtype != torch.bool and not saliency.is_floating_point():
        raise ValueError(f"saliency: found {saliency.dtype}, expected torch.bool or floating point in [0, 1]")
    with torch.autocast(logits.device.type, enabled=False):
        scores = upsampled(at_least_float32(logits), saliency.shape[1:])
        saliency = saliency.to(scores)
        low, high = saliency.aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"saliency: found values {low:.4g} to {high:.4g}, expected 0 to 1")
        margin = scores[:, 0] - scores[:, 1:].logsumexp(dim=1)  # (B, H, W)
        return F.binary_cross_entropy_with_logits(margin, 1 - saliency)
