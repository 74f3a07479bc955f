"""Maps by the name of the method, over several scales and mirror images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..data.transforms import scaled_views
from .acr import acr_maps
from .attention import class_attention, rollout
from .cam import cam, grad_cam
from .fusion import weaktr_maps
from .getam import getam
from .slots import check_labels

METHODS: dict[str, Callable[..., Tensor]] = {
    "cam": cam, "grad_cam": grad_cam, "getam": getam, "attention": class_attention, "rollout": rollout,
    "weaktr": weaktr_maps, "acr": acr_maps,
}


def localize(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    method: str = "cam",
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    **kw,
) -> Tensor:
    """Where the classes in the labels are: maps (B, C, h, w), non-negative, not normalised, 0 if absent.

    images: float (B, 3, H, W), normalised; labels (B, C) multi-hot. method: one of METHODS; kw are its own.
    Each scale (and with flip its mirror image) is a pass of its own, on images resized to the multiple of the
    model's patch stride that is nearest. The maps are mirrored back, resized bilinearly (align_corners False)
    to the grid of the largest scale, and averaged raw: a scale with larger values counts for more
    (Grad-CAM and GETAM fall with the number of patches, so there small scales do).
    "attention" and "rollout" know no classes: all present classes of an image have the same map.
    One scale without flip is the method's own map, bit for bit, if the images fit the stride.
    Raises ValueError for an unknown method, wrong images, labels or scales, and as the method.
    """
    if method not in METHODS:
        raise ValueError(f"method: found {method!r}, expected one of {', '.join(METHODS)}")
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        found = f"{images.dtype} of shape {tuple(images.shape)}"
        raise ValueError(f"images: found {found}, expected normalised floats (B, 3, H, W)")
    check_labels(labels, len(images), model.num_classes)
    maps = []
    for _, flipped, view in scaled_views(images, scales, flip, model.patch_stride):
        found = METHODS[method](model, view, labels, **kw)
        maps.append(found.flip(-1) if flipped else found)
    grid = max(m.shape[-2:] for m in maps)  # the largest scale has both the most rows and the most columns
    maps = [_resize(m, grid) for m in maps]
    return sum(maps[1:], maps[0]) / len(maps)  # (for one view maps / 1, the same bits)


def _resize(maps: Tensor, grid: Sequence[int]) -> Tensor:
    same = maps.shape[-2:] == grid
    return maps if same else F.interpolate(maps, grid, mode="bilinear", align_corners=False)
