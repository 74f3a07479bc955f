"""AFA's maps over several scales and mirror images, and the affinity that they are spread by.

Source: AFA, Ru et al. 2022 (arXiv 2203.02664), sections 3.2 and 3.4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.transforms import scaled_views
from ..models.attention import at_least_float32
from .cam import eval_mode
from .normalize import normalize_maps
from .slots import check_labels


class AffinityMaps(NamedTuple):
    """What `affinity_cam` returns."""

    maps: Tensor  # (B, C, H, W) in [0, 1], float32 or better
    affinity: Tensor  # (B, N, N), of the patches at one scale
    grid: tuple[int, int]  # (h, w) of those patches, N = h*w

    def on_grid(self) -> Tensor:
        """The maps on the affinity's grid, (B, C, h, w), ready for `refinement.random_walk`."""
        return F.interpolate(self.maps, self.grid, mode="bilinear", align_corners=False)


@torch.no_grad()
def affinity_cam(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    scales: Sequence[float] = (1.0, 0.5, 1.5),
    flip: bool = True,
    affinity_scale: float | None = None,
    published: bool = False,
) -> AffinityMaps:
    """Class activation maps of an `AfaNet` over scales and mirror images, and the affinity of one scale.

    images (B, 3, H, W), normalised; labels (B, C) multi-hot. Each view is resized to the multiple of the
    model's patch stride that is nearest. Its w_c . f_j are resized to H x W (bilinear, align_corners False)
    and, with flip, the maximum with those of its mirror image, mirrored back, is taken. What is positive is
    summed over the scales, and each map brought to [0, 1]: minimum subtracted, divided by the maximum.
    Absent classes are 0. affinity_scale: one of the scales, None for the largest; the affinity is that of the
    image as it is, not mirrored.

    published: sizes int(scale * side), no antialias, 1e-5 beside the maximum, maps of absent classes too;
    scale 1 comes first even if it is not among the scales, and the affinity is that of the largest scale's
    place among the scales, so another scale's where that order differs.
    Raises ValueError for other labels, no scales or an affinity_scale that is not among them.
    """
    check_labels(labels, len(images), model.num_classes)
    total, chosen, found = 0, _chosen_scale(scales, affinity_scale, published), None
    with eval_mode(model):
        for scale, view in _views(model, images, scales, published):
            if scale == chosen and found is None:
                features, *found = model.forward_affinity(view)
            else:
                features = model.forward_heads(view).features
            maps = _resized(model, features, images)
            if flip:
                mirrored = _resized(model, model.forward_heads(view.flip(-1)).features, images)
                maps = torch.maximum(maps, mirrored.flip(-1))
            total = total + maps.relu_()
    if published:
        total = total - total.amin(dim=(2, 3), keepdim=True)
        return AffinityMaps(total / (total.amax(dim=(2, 3), keepdim=True) + 1e-5), *found)
    absent = (labels == 0).to(total.device)[:, :, None, None]  # (B, C) -> (B, C, 1, 1)
    return AffinityMaps(normalize_maps(total.masked_fill_(absent, 0), "minmax"), *found)


def _resized(model: nn.Module, features: Tensor, images: Tensor) -> Tensor:
    """Features (B, D, h, w) -> w_c . f_j on the images' grid: (B, C, H, W)."""
    evidence = at_least_float32(model.activation_maps(features))
    return F.interpolate(evidence, images.shape[-2:], mode="bilinear", align_corners=False)


def _views(
    model: nn.Module, images: Tensor, scales: Sequence[float], published: bool
) -> Iterator[tuple[float, Tensor]]:
    if not published:
        for scale, _, view in scaled_views(images, scales, False, model.patch_stride):
            yield scale, view
        return
    for scale in _published_order(scales):
        size = [int(scale * side) for side in images.shape[-2:]]
        same = scale == 1
        yield scale, images if same else F.interpolate(images, size, mode="bilinear", align_corners=False)


def _published_order(scales: Sequence[float]) -> list[float]:
    return [1.0, *(scale for scale in scales if scale != 1)]


def _chosen_scale(scales: Sequence[float], affinity_scale: float | None, published: bool) -> float:
    if len(scales) == 0 or not all(scale > 0 for scale in scales):
        raise ValueError(f"scales: found {scales}, expected one or more numbers > 0")
    if affinity_scale is not None and affinity_scale not in scales:
        raise ValueError(f"affinity_scale: found {affinity_scale}, expected one of {tuple(scales)}")
    if affinity_scale is not None:
        return affinity_scale
    if published:  # the place in one list, looked up in another
        return _published_order(scales)[list(scales).index(max(scales))]
    return max(scales)
