"""AFA's random walk: scores flow between patches that belong together, to neighbours only.

Source: AFA, Ru et al. 2022 (arXiv 2203.02664), section 3.4. With a the affinity, m the pairs within a radius:

    T_ij = m_ij a_ij^2 / (sum_i m_ij a_ij^2 + e),    scores <- scores T

The published way masks, squares and divides the whole (N, N) matrix of each picture: three copies of it. But
patches of one row of the grid have all their neighbours in 2 radius + 1 rows, so T is made row by row of the
grid, never as a whole: at radius 8 and 48x48 patches an eighth of the pairs count, and a third are read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..localization.slots import check_labels

EPSILON = 0.1  # beside the sum of a column; all the same where nothing competes, the maps alone:
EPSILON_ALONE = 1e-4
TOLERANCE = 1e-3  # interpolation and rounding may leave [0, 1] by less


@torch.no_grad()
def random_walk(
    maps: Tensor,
    affinity: Tensor,
    labels: Tensor,
    background: float | None = 0.45,
    radius: int | None = 8,
    power: float = 2,
) -> Tensor:
    """One step of AFA's random walk: scores (B, C+1, h, w), background first; exactly 0 for absent classes.

    maps (B, C, h, w) in [0, 1], on the affinity's grid; affinity (B, N, N), N = h*w, not negative; labels
    (B, C) multi-hot. Each patch starts with the softmax over [background, maps of the classes present].
    background None: with the maps themselves, of any scale, and (B, C, h, w) comes out. radius: how far
    patches may lie apart, in rows and in columns; None for any distance. power: of the affinity.

    The columns of T sum to a little less than 1, so what comes out is compared, not read as probabilities.
    Nothing is changed in place. Float32, or float64 for float64 maps; there is no gradient.
    Raises ValueError for other shapes and labels, maps outside [0, 1], a negative radius or power.
    """
    _check(maps, affinity, labels, background, radius, power)
    dtype = torch.promote_types(maps.dtype, torch.float32)
    present = (labels > 0).to(maps.device)[:, :, None, None]  # (B, C) -> (B, C, 1, 1)
    with torch.autocast(maps.device.type, enabled=False):
        maps = maps.to(dtype)
        if background is None:
            return _step(maps * present, affinity, radius, power, EPSILON_ALONE)
        constant = maps.new_full((len(maps), 1, *maps.shape[2:]), background)
        scores = torch.cat([constant, maps.masked_fill(~present, -torch.inf)], dim=1).softmax(dim=1)
        return _step(scores, affinity, radius, power, EPSILON)


def _step(scores: Tensor, affinity: Tensor, radius: int | None, power: float, epsilon: float) -> Tensor:
    """scores T: (B, K, h, w) -> (B, K, h, w)."""
    height, width = scores.shape[-2:]
    reach = max(height, width) if radius is None else radius
    near_columns = _within(width, reach, scores.device)  # (w, w)
    # (B, N, N) -> (B, h, w, h, w)
    pairs = affinity.unflatten(2, (height, width)).unflatten(1, (height, width))
    out = torch.empty_like(scores, memory_format=torch.contiguous_format)
    for row in range(height):  # T's columns of this row's patches
        rows = slice(max(0, row - reach), row + reach + 1)
        weights = pairs[:, rows, :, row].to(scores.dtype).pow(power) * near_columns  # (B, n, w, w)
        weights = weights.flatten(1, 2)  # (B, n, w, w) -> (B, n*w, w)
        # (B, K, n*w) @ (B, n*w, w) -> (B, K, w)
        flow = scores[:, :, rows].flatten(2) @ weights
        out[:, :, row] = flow / (weights.sum(dim=1, keepdim=True) + epsilon)
    return out


def radius_mask(height: int, width: int, radius: int, device: torch.device | str | None = None) -> Tensor:
    """Which patches of a grid are at most `radius` rows and columns apart: bool (N, N), N = height * width.

    Raises ValueError for an empty grid or a negative radius.
    """
    if min(height, width) < 1 or radius < 0:
        found = f"{height}x{width} and {radius}"
        raise ValueError(f"grid, radius: found {found}, expected sides > 0 and radius >= 0")
    rows, columns = _within(height, radius, device), _within(width, radius, device)
    near = rows[:, None, :, None] & columns[None, :, None, :]  # (h, w, h, w)
    return near.flatten(2).flatten(0, 1)


def _within(count: int, radius: int, device: torch.device | str | None) -> Tensor:
    """|i - j| <= radius: bool (count, count)."""
    place = torch.arange(count, device=device)
    return (place[:, None] - place).abs() <= radius


def check_unit_range(maps: Tensor) -> None:
    """ValueError unless the maps lie in [0, 1], give or take what interpolation leaves."""
    low, high = (value.item() for value in maps.aminmax())
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
        raise ValueError(f"maps: found values {low:.4g} to {high:.4g}, expected 0 to 1 (see normalize_maps)")


def _check(maps: Tensor, affinity: Tensor, labels: Tensor, background: float | None, radius: int | None,
           power: float) -> None:
    if maps.ndim != 4 or not maps.is_floating_point() or 0 in maps.shape:
        found = f"{maps.dtype} of shape {tuple(maps.shape)}"
        raise ValueError(f"maps: found {found}, expected floating point (B, C, h, w), none of them zero")
    check_labels(labels, *maps.shape[:2])
    tokens = maps.shape[2] * maps.shape[3]
    if affinity.shape != (len(maps), tokens, tokens):
        expected = f"({len(maps)}, {tokens}, {tokens}), every patch of the maps with every other"
        raise ValueError(f"affinity: found shape {tuple(affinity.shape)}, expected {expected}")
    if background is not None:
        check_unit_range(maps)
        if not 0 <= background <= 1:
            raise ValueError(f"background: found {background}, expected None or a score in [0, 1]")
    if (radius is not None and radius < 0) or not power > 0:
        found = f"{radius} and {power}"
        raise ValueError(f"radius, power: found {found}, expected radius >= 0 or None, power > 0")
