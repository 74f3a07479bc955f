"""WeakTr's maps: a coarse class activation map, made fine by attention weighed head by head.

Source: WeakTr, Zhu et al. 2023 (arXiv 2304.01184), section 3.3. The map of one view is `fine` of
`models.weaktr`: patch attention @ (class tokens' attention * relu(coarse)). At inference WeakTr adds up the
maps of several scales and their mirror images, and normalises each class's sum by minimum and maximum:

    maps = localize(model, images, labels, "weaktr", scales=(1.0, 1.2), flip=True)
    masks = pseudo_labels(normalize_maps(maps, "minmax"), labels, images, background=0.43)

(COCO: scales 1, 0.8, 1.2 and background 0.42; then `refinement.crf_labels`.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models.attention import at_least_float32
from .cam import eval_mode
from .slots import check_labels

FUSIONS = ("adaptive", "mean", "coarse", "random")


@torch.no_grad()
def weaktr_maps(
    model: nn.Module, images: Tensor, labels: Tensor, fusion: str = "adaptive", seed: int = 0,
    patch_attention: bool = True,
) -> Tensor:
    """WeakTr's maps of one view: (B, C, h, w), not negative, not normalised, zero for absent classes.

    model: a `WeakTr`. images (B, 3, H, W), normalised; labels (B, C) multi-hot.
    fusion: how heads are weighed. "adaptive": by the model. Its baselines: "mean", all alike; "random",
    uniform in [0, 1), the same for all images, from `seed`; "coarse", no attention at all: relu of the coarse
    map. patch_attention: False gives the map before the last step, class tokens' attention * relu(coarse).
    Patch attention reaches every patch, so a map made with it is positive everywhere: subtract the
    minimum before a threshold. float32 or better; runs in eval mode.
    Raises ValueError for an unknown fusion, another network, wrong labels and as `WeakTr.forward`.
    """
    if not hasattr(model, "forward_predictions"):
        raise ValueError(f"model: found {type(model).__name__}, expected a WeakTr: its fusion makes the map")
    if fusion not in FUSIONS:
        raise ValueError(f"fusion: found {fusion!r}, expected one of {', '.join(FUSIONS)}")
    check_labels(labels, len(images), model.num_classes)
    with eval_mode(model):
        if fusion == "coarse":
            maps = at_least_float32(model.coarse_cam(images)).relu()
        else:
            out = model.forward_predictions(images, _head_weights(model, fusion, seed, images))
            maps = out.fine_cam if patch_attention else out.fused_cam
    return maps.masked_fill((labels == 0).to(maps.device)[:, :, None, None], 0)


def _head_weights(model: nn.Module, fusion: str, seed: int, images: Tensor) -> Tensor | None:
    """(L, H), for every image; None: the model finds them."""
    shape = model.fusion.depth, model.fusion.num_heads
    if fusion == "adaptive":
        return None
    if fusion == "mean":
        return images.new_ones(shape)
    # on the CPU, so that every device draws the same
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(images)
