"""What each method minimises, as the training loop calls it: (model, batch, step) -> named losses.

The losses themselves are in `training.losses`; here is what a method makes of them over a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.sample import IGNORE
from ..localization import affinity_cam, getam
from ..localization.cam import eval_mode
from ..models.attention import at_least_float32
from ..refinement import (
    CompletedLabels,
    ContrastSaliency,
    complete_labels,
    propagated_labels,
    reliable_labels,
    scored_maps,
)
from .losses import (
    affinity_labels,
    affinity_loss,
    balanced_segmentation_loss,
    classification_loss,
    consistency_loss,
    dense_energy_loss,
    gradient_clipping_loss,
    saliency_loss,
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
        logits = at_least_float32(model(batch["image"]))
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
            return {"class": F.multilabel_soft_margin_loss(at_least_float32(model(batch["image"])), labels)}
        pictures = labels, batch["image_uint8"], self.backgrounds, batch["box"]
        found = affinity_cam(model, batch["image"], labels, self.scales)
        pairs = masks = reliable_labels(found.maps, *pictures, self.num_iter)
        if step >= self.propagate_from:
            radius = self.radius, self.num_iter
            masks = propagated_labels(found.on_grid(), found.affinity, *pictures, *radius)
        out = model.forward_segmentation(batch["image"])
        wanted = affinity_labels(pairs, self.radius, model.patch_stride)
        segmentation = balanced_segmentation_loss(out.segmentation, masks, average=True)
        return {
            "class": F.multilabel_soft_margin_loss(at_least_float32(out.logits), labels),
            "segmentation": self.segmentation_weight * segmentation,
            "affinity": self.affinity_weight * affinity_loss(out.affinity, wanted),
        }


@dataclass(frozen=True)
class GetamObjective:
    """GETAM end to end (arXiv 2112.02841, section 3): two backward passes a step, one for maps, one to learn.

    Until step `classify_until` (half of the steps, as published) the class loss alone. From there each step first
    makes its labels: `getam` by gradients of the class logits, which change no weight, PAMR, and label completion
    with a saliency map. Then the network is run again and learns from class, segmentation (background and
    foreground apart), saliency and dense energy. What lies outside of a picture's box teaches nothing.
    start_layer, cut, opening, published: as of `getam`, `complete_labels` and `dense_energy_loss`.
    batch: image, labels, box and image_uint8; saliency (B, H, W) in [0, 1], or else the contrast of each picture.
    """

    classify_until: int
    start_layer: int | None = None
    cut: float = 0.9
    opening: int = 10
    energy_weight: float = 1e-7
    published: bool = False

    def __call__(self, model: nn.Module, batch: dict, step: int) -> Losses:
        labels = batch["labels"]
        if step < self.classify_until:
            return {"class": F.multilabel_soft_margin_loss(at_least_float32(model(batch["image"])), labels)}
        masks, saliency = self.labels_of(model, batch)
        out = model.forward_segmentation(batch["image"])
        pictures = batch["image_uint8"], masks, batch["box"]
        options = {"weight": self.energy_weight, "published": self.published}
        return {
            "class": F.multilabel_soft_margin_loss(at_least_float32(out.logits), labels),
            "segmentation": balanced_segmentation_loss(out.segmentation, masks),
            "saliency": saliency_loss(out.segmentation, saliency),
            "energy": dense_energy_loss(out.segmentation, *pictures, **options),
        }

    def labels_of(self, model: nn.Module, batch: dict) -> CompletedLabels:
        """The masks of this step, 255 outside of the boxes, and the saliency for its loss."""
        images, labels = batch["image_uint8"], batch["labels"]
        saliency = batch["saliency"] if "saliency" in batch else ContrastSaliency()(batch)
        with eval_mode(model):  # maps without dropout; weights keep their gradients of before
            maps = getam(model, batch["image"], labels, self.start_layer)
        scores = scored_maps(maps, labels, images=images, refine="pamr")
        options = {"opening": self.opening, "published": self.published}
        found = complete_labels(scores, labels, saliency, self.cut, **options)
        inside = torch.zeros_like(found.masks, dtype=torch.bool)
        for picture, (y0, x0, y1, x1) in zip(inside, batch["box"].tolist()):
            picture[y0:y1, x0:x1] = True
        return CompletedLabels(found.masks.masked_fill(~inside, IGNORE), found.saliency)


# A method's name -> what makes its objective from the recipe's `loss` options.
OBJECTIVES: dict[str, Callable[..., Callable[[nn.Module, dict, int], Losses]]] = {
    "cam": lambda: classification_loss,
    "weaktr": lambda: weaktr_loss,
    "acr": AcrObjective,
    "afa": AfaObjective,
    "getam": GetamObjective,
    "segmenter": RetrainingObjective,
}
