"""What each method minimises, as the training loop calls it: (model, batch, step) -> named losses.

The losses themselves are in `training.losses`; here is what a method makes of them over a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ..data.sample import IGNORE
from ..localization import affinity_cam
from ..refinement import propagated_labels, reliable_labels
from .losses import (
    affinity_labels,
    affinity_loss,
    balanced_segmentation_loss,
    classification_loss,
    consistency_loss,
    gradient_clipping_loss,
    weaktr_loss,
)

Losses = dict[str, Tensor]


@dataclass(frozen=True)
class AcrObjective:
    """ACR's losses (arXiv 2308.04321, section 3); the fields are arguments of `consistency_loss`."""

    view: str = "hflip"
    region_weight: float = 100.0
    affinity_weight: float = 100.0

    def __call__(self, model: nn.Module, batch: dict, step: int) -> Losses:
        weights = {"region_weight": self.region_weight, "affinity_weight": self.affinity_weight}
        return consistency_loss(model, batch["image"], batch["labels"], self.view, **weights)


@dataclass(frozen=True)
class RetrainingObjective:
    """WeakTr's second stage (arXiv 2304.01184, section 3.4): pixel cross entropy on pseudo labels, clipped.

    batch: image, mask (B, H, W) with 255 ignored. start, patch: of `gradient_clipping_loss`; start 0 clips
    nothing, for no mean loss is below it.
    """

    start: float = 1.2
    patch: int = 120

    def __call__(self, model: nn.Module, batch: dict, step: int) -> Losses:
        logits = model(batch["image"]).float()
        loss_map = F.cross_entropy(logits, batch["mask"], ignore_index=IGNORE, reduction="none")
        return {"segmentation": gradient_clipping_loss(loss_map, self.start, self.patch)}


@dataclass(frozen=True)
class AfaObjective:
    """AFA's schedule (arXiv 2203.02664, sections 3.3 to 3.5): classes first, then masks and affinity too.

    Until step `classify_until` the class loss alone. From there the network's own maps, over `scales` and their
    mirror images, make the labels of that step: `reliable_labels` for the affinity, and for the segmentation
    as well until step `propagate_from`; after it the segmentation learns from `propagated_labels`. No gradient
    flows through labels. scales, backgrounds, radius, num_iter: as of those functions.
    batch: image, labels, box and image_uint8 (`TrainTransform` with keep_uint8).
    """

    classify_until: int = 2000
    propagate_from: int = 6000
    segmentation_weight: float = 0.1
    affinity_weight: float = 0.1
    scales: tuple[float, ...] = (1.0, 0.5, 1.5)
    backgrounds: tuple[float, float] = (0.55, 0.35)
    radius: int = 8
    num_iter: int = 10

    def __call__(self, model: nn.Module, batch: dict, step: int) -> Losses:
        labels = batch["labels"]
        if step < self.classify_until:
            return {"class": F.multilabel_soft_margin_loss(model(batch["image"]).float(), labels)}
        pictures = labels, batch["image_uint8"], self.backgrounds, batch["box"]
        found = affinity_cam(model, batch["image"], labels, self.scales)
        pairs = masks = reliable_labels(found.maps, *pictures, self.num_iter)
        if step >= self.propagate_from:
            radius = self.radius, self.num_iter
            masks = propagated_labels(found.on_grid(), found.affinity, *pictures, *radius)
        out = model.forward_segmentation(batch["image"])
        wanted = affinity_labels(pairs, self.radius, model.patch_stride)
        return {
            "class": F.multilabel_soft_margin_loss(out.logits.float(), labels),
            "segmentation": self.segmentation_weight * balanced_segmentation_loss(out.segmentation, masks, average=True),
            "affinity": self.affinity_weight * affinity_loss(out.affinity, wanted),
        }


# A method's name -> what makes its objective from the recipe's `loss` options.
OBJECTIVES: dict[str, Callable[..., Callable[[nn.Module, dict, int], Losses]]] = {
    "cam": lambda: classification_loss,
    "weaktr": lambda: weaktr_loss,
    "acr": AcrObjective,
    "afa": AfaObjective,
    "segmenter": RetrainingObjective,
}
