"""Aligned views: flips and rotations by 90 degrees, which move whole pixels and whole patches.

Every patch of one view is, turned, a patch of the other; where each went is a permutation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {  # (..., H, W); rotations are counter-clockwise
    "hflip": lambda grid: grid.flip(-1),
    "vflip": lambda grid: grid.flip(-2),
    "rot90": lambda grid: grid.rot90(1, (-2, -1)),
    "rot180": lambda grid: grid.rot90(2, (-2, -1)),
    "rot270": lambda grid: grid.rot90(3, (-2, -1)),
    "transpose": lambda grid: grid.transpose(-2, -1),
}


def transform(images: Tensor, view: str) -> Tensor:
    """Images (..., H, W) -> the view, (..., H, W), or (..., W, H) for rot90, rot270 and transpose.

    view: one of VIEWS; ValueError for another.
    """
    if view not in VIEWS:
        raise ValueError(f"view: found {view!r}, expected one of {', '.join(VIEWS)}")
    return VIEWS[view](images)


def permutation(view: str, grid: tuple[int, int]) -> Tensor:
    """Where each patch of a picture lies in its view: long (h*w,), row by row in both; on the CPU.

    Patch i of the picture, of a grid (h, w), is patch permutation[i] of `transform(picture, view)`. So
    `view_tokens[:, permutation]` puts the view's patch tokens in the picture's order.
    """
    height, width = grid
    shown = transform(torch.arange(height * width).view(height, width), view)  # which patch is seen where
    return shown.flatten().argsort()
