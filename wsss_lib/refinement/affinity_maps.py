"""AFA's maps: class activation maps over several scales, spread by the affinity that the network has learned.

Source: AFA, Ru et al. 2022 (arXiv 2203.02664), section 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..localization.affinity_cam import affinity_cam
from .random_walk import random_walk


def affinity_maps(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    walk: bool = True,
    radius: int | None = 8,
    power: float = 2,
    scales: Sequence[float] = (1.0, 0.5, 1.5),
    flip: bool = True,
) -> Tensor:
    """An `AfaNet`'s maps: (B, C, h, w), not negative, zero for absent classes.

    walk: one step of `random_walk` (radius, power) of the maps alone, without a background, on the affinity's
    grid; False leaves the maps at the images' size, in [0, 1]. So a threshold can be set on either. Other
    arguments and errors as of `affinity_cam`; the affinity is that of the largest scale.
    """
    found = affinity_cam(model, images, labels, scales, flip)
    if not walk:
        return found.maps
    return random_walk(found.on_grid(), found.affinity, labels, None, radius, power)
