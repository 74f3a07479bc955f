"""Class maps refined by the picture's own edges: PAR of AFA and PAMR, which GETAM uses, in one function.

Each pixel p looks at its 8 neighbours in every one of the dilations 1, 2, 4, 8, 12, 24: K = 48 of them, the
picture repeated at its edges. How alike they look says how much they count, and every iteration replaces p by
their weighted mean. With I the picture and s the deviation of the K neighbours, colour by colour:

    PAR   (AFA, arXiv 2203.02664, pixel-adaptive refinement)
          k(p, n) = softmax_n( mean_rgb -(|I_n - I_p| / (0.3 (s_p + 1e-8)))^2 )
                  + 0.01 softmax_n( -(|n - p| / (0.3 s'))^2 ),    s' the deviation of the K distances
    PAMR  (arXiv 2005.08104; GETAM, arXiv 2112.02841), s over the K neighbours and p itself, once a dilation
          k(p, n) = softmax_n( mean_rgb -|I_n - I_p| / (0.1 s_p + 1e-8) )
    maps(p) <- sum_n k(p, n) maps(n),    num_iter times

The published way copies the neighbours out: K times the picture for the affinity and K times all maps in each
iteration, written, multiplied and summed. The trick is to copy nothing:

- the affinity is made strip by strip, all K differences of a few rows in the cache at a time, so only the K
  numbers k(p, .) of a pixel are ever written. s comes from differences to the centre less their mean: this
  keeps its digits in flat regions and at single bright pixels; squares summed minus a sum squared do not;
- few maps: K shifted views of one padded copy, each multiplied and added in one pass;
- many maps: a pixel's maps lie side by side and an iteration is a sparse matrix times them, K entries a row.
  `embedding_bag` is that product: the table is the maps, the bag of p its neighbours, the weights k(p, .).
  Row sums stay in registers, and one index serves every iteration and every picture.

On a GPU: `local_refinement_triton`, one launch for the affinity and one for each iteration.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import choose_backend

VARIANTS = ("par", "pamr")
DILATIONS = (1, 2, 4, 8, 12, 24)
# The rows above and below a pixel, then its own: the order of two views of the picture (see `_differences`).
DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (1, -1), (1, 0), (1, 1), (0, -1), (0, 1))
EPSILON = 1e-8
PAR_SCALE, PAMR_SCALE = 0.3, 0.1
POSITION_WEIGHT = 0.01  # PAR: what the distances count beside the colours
STRIP = {"cpu": 2**19}  # differences at a time: 2 MB of float32, about the second-level cache
STRIP_ELSEWHERE = 2**25  # a GPU wants fewer, larger launches
MANY_MAPS = 8  # from here on the sparse product is faster (measured: equal at 7..8)


@torch.no_grad()
def refine_cam(
    images: Tensor,
    masks: Tensor,
    dilations: Sequence[int] = DILATIONS,
    num_iter: int = 10,
    variant: str = "par",
    backend: str = "auto",
) -> Tensor:
    """Maps pulled to the picture's edges: (B, C, h, w) -> (B, C, H, W), by PAR (AFA) or PAMR (GETAM).

    images (B, 3, H, W) of values 0..255, uint8 or floating point; masks (B, C, h, w), the maps or scores of
    every class (background too, if it competes), first resized to the picture (bilinear, align_corners True).
    dilations: the neighbours' distances in pixels. num_iter: 0 only resizes. variant: "par" or "pamr".
    Pictures of 0..1 give the same affinity, but for the 1e-8 beside the deviation: a relative 1e-6 where the
    colours around a pixel deviate by 0.01, and less everywhere else.

    PAR's weights sum to 1.01, so maps grow by 1.01^num_iter, up to 10.5% in 10 iterations; PAMR's sum to 1.
    Computed and returned in float32, or float64 for float64 masks; same result under autocast and the same
    bits on every run. There is no gradient: refinement makes labels; the published code runs without one too.
    Beside masks and result PyTorch holds, for one picture at a time, 8 H W K bytes (4 for less than 8 maps;
    float32, K = 8 len(dilations)) and its maps twice; Triton 4 H W K for every picture and all maps twice.
    Raises ValueError for other shapes, types and variants, for empty inputs, dilations < 1 and num_iter < 0.
    """
    _check(images, masks, dilations, num_iter, variant)
    dtype = torch.promote_types(masks.dtype, torch.float32)
    images = images.to(dtype)
    with torch.autocast(images.device.type, enabled=False):
        masks = masks.to(dtype)
        if masks.shape[-2:] != images.shape[-2:]:
            masks = F.interpolate(masks, images.shape[-2:], mode="bilinear", align_corners=True)
        if num_iter == 0:
            return masks.clone()
        if choose_backend(backend, images) == "triton":
            from .local_refinement_triton import refine

            offsets = torch.tensor(neighbor_offsets(dilations), dtype=torch.int32)
            position = position_weights(dilations, variant).to(dtype)
            return refine(images, masks, offsets, position, num_iter, variant)
        return _refine(images, masks, tuple(dilations), num_iter, variant)


def neighbor_offsets(dilations: Sequence[int]) -> list[tuple[int, int]]:
    """Where the K = 8 len(dilations) neighbours are, as (rows, columns) from the pixel."""
    return [(d * dy, d * dx) for d in dilations for dy, dx in DIRECTIONS]


def position_weights(dilations: Sequence[int], variant: str) -> Tensor:
    """What every neighbour counts whatever its colour, (K,) float64: PAR's distance term; zero for PAMR."""
    if variant == "pamr":
        return torch.zeros(8 * len(dilations), dtype=torch.float64)
    distance = torch.tensor([math.hypot(*o) for o in neighbor_offsets(dilations)], dtype=torch.float64)
    scaled = distance / ((distance.std() + EPSILON) * PAR_SCALE)
    return POSITION_WEIGHT * torch.softmax(-scaled.square(), dim=0)


def _refine(images: Tensor, masks: Tensor, dilations: tuple[int, ...], num_iter: int, variant: str) -> Tensor:
    """The PyTorch path. Picture by picture: a batch would only need more memory."""
    result = torch.empty_like(masks, memory_format=torch.contiguous_format)
    sparse = masks.shape[1] >= MANY_MAPS and masks.device.type in ("cpu", "cuda")
    if sparse:
        index = _neighbor_index(*images.shape[-2:], dilations, images.device)
    for image, maps, out in zip(images, masks, result, strict=True):
        affinity = _affinity(image, dilations, variant, pixels_first=sparse)
        if sparse:
            out.copy_(_propagate_sparse(affinity, maps, index, num_iter))
        else:
            out.copy_(_propagate_shifted(affinity, maps, dilations, num_iter))
    return result


def _affinity(image: Tensor, dilations: tuple[int, ...], variant: str, pixels_first: bool) -> Tensor:
    """k(p, n) of one picture (3, H, W), as (H*W, K) or as (K, H, W)."""
    _, height, width = image.shape
    neighbors = 8 * len(dilations)
    position = position_weights(dilations, variant).to(image)[:, None, None]
    shape = (height * width, neighbors) if pixels_first else (neighbors, height, width)
    affinity = image.new_empty(shape)
    for first, last, differences in _differences(image, dilations):
        strip = _logits(differences, variant).softmax(0)  # (K, n, W)
        if variant == "par":
            strip += position
        if pixels_first:
            affinity[first * width : last * width] = strip.flatten(1).t()  # (K, n, W) -> (n*W, K)
        else:
            affinity[:, first:last] = strip
    return affinity


def _differences(image: Tensor, dilations: tuple[int, ...]) -> Iterator[tuple[int, int, Tensor]]:
    """Strips: (first row, row after the last, I_n - I_p (3, K, n, W)). The next strip reuses the memory."""
    channels, height, width = image.shape
    neighbors, margin = 8 * len(dilations), max(dilations)
    padded = _pad(image, margin)  # (3, H + 2m, W + 2m)
    rows = STRIP.get(image.device.type, STRIP_ELSEWHERE) // (channels * neighbors * width)
    rows = min(max(rows, 1), height)
    memory = image.new_empty(channels, neighbors, rows, width)
    for first in range(0, height, rows):
        last = min(first + rows, height)
        n, center = last - first, image[:, first:last]
        differences = memory[:, :, :n]
        for d, out in zip(dilations, differences.split(8, dim=1), strict=True):
            # The strip and d more pixels on every side; the windows of n x W in it are the neighbours.
            window = padded[:, margin + first - d : margin + last + d, margin - d : margin + width + d]
            vertical = window.unfold(1, n, 2 * d).unfold(2, width, d)  # (3, 2, 3, n, W)
            horizontal = window[:, d : d + n].unfold(2, width, 2 * d)  # (3, n, 2, W)
            torch.sub(vertical, center[:, None, None], out=out[:, :6].unflatten(1, (2, 3)))
            torch.sub(horizontal.transpose(1, 2), center[:, None], out=out[:, 6:])
        yield first, last, differences


def _logits(differences: Tensor, variant: str) -> Tensor:
    """I_n - I_p (3, K, n, W), overwritten -> what the softmax over n is taken of, (K, n, W)."""
    k = differences.shape[1]
    # PAMR counts the pixel itself, difference 0, once for each of the k / 8 dilations.
    samples = k if variant == "par" else k + k // 8
    mean = differences.sum(1, keepdim=True) / samples  # (3, 1, n, W)
    squares = (differences - mean).square_().sum(1, keepdim=True) + (samples - k) * mean.square()
    deviation = (squares / (samples - 1)).sqrt_()
    if variant == "par":
        weight = ((deviation + EPSILON) * PAR_SCALE).pow_(-2) / -3
        differences.square_()
    else:
        weight = (deviation * PAMR_SCALE + EPSILON).reciprocal_() / -3
        differences.abs_()
    logits = differences[0] * weight[0]
    return logits.addcmul_(differences[1], weight[1]).addcmul_(differences[2], weight[2])


def _propagate_shifted(affinity: Tensor, maps: Tensor, dilations: tuple[int, ...], num_iter: int) -> Tensor:
    """Few maps (C, H, W), affinity (K, H, W): a neighbour is a shifted view, multiplied and added at once."""
    _, height, width = maps.shape
    margin = max(dilations)
    for _ in range(num_iter):
        padded = _pad(maps, margin)  # (C, H + 2m, W + 2m)
        maps = torch.zeros_like(maps)
        for (dy, dx), weight in zip(neighbor_offsets(dilations), affinity, strict=True):
            y, x = margin + dy, margin + dx
            maps.addcmul_(padded[:, y : y + height, x : x + width], weight)
    return maps


def _propagate_sparse(affinity: Tensor, maps: Tensor, index: tuple[Tensor, Tensor], num_iter: int) -> Tensor:
    """Many maps (C, H, W), affinity (H*W, K): a sparse matrix of K entries a row times (H*W, C)."""
    columns, starts = index
    table = maps.flatten(1).t().contiguous()  # (C, H, W) -> (H*W, C)
    for _ in range(num_iter):
        table = F.embedding_bag(
            columns, table, starts, mode="sum", per_sample_weights=affinity.view(-1), include_last_offset=True
        )
    return table.t().unflatten(1, maps.shape[1:])  # (H*W, C) -> (C, H, W)


def _neighbor_index(
    height: int, width: int, dilations: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The sparse matrix's columns (H*W*K,), clamped to the picture, and where its rows start (H*W + 1,)."""
    offsets = neighbor_offsets(dilations)
    entries = height * width * len(offsets)
    options = {"device": device, "dtype": torch.int32 if entries < 2**31 else torch.int64}
    dy, dx = torch.tensor(offsets, **options).t()  # (K,) each
    y = (torch.arange(height, **options)[:, None] + dy).clamp_(0, height - 1)  # (H, K)
    x = (torch.arange(width, **options)[:, None] + dx).clamp_(0, width - 1)  # (W, K)
    columns = y[:, None] * width + x  # (H, W, K)
    return columns.view(-1), torch.arange(0, entries + 1, len(offsets), **options)


def _pad(maps: Tensor, margin: int) -> Tensor:
    """(C, H, W) -> (C, H + 2 margin, W + 2 margin), the edges repeated, whatever the picture's size."""
    return F.pad(maps[None], [margin] * 4, mode="replicate")[0]


def _check(images: Tensor, masks: Tensor, dilations: Sequence[int], num_iter: int, variant: str) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        found = f"found shape {tuple(images.shape)}"
        raise ValueError(f"images: {found}, expected (B, 3, H, W), none of them zero")
    if masks.ndim != 4 or len(masks) != len(images) or 0 in masks.shape:
        found = f"found shape {tuple(masks.shape)}"
        raise ValueError(f"masks: {found}, expected ({len(images)}, C, h, w), none of them zero")
    if not images.is_floating_point() and images.dtype != torch.uint8:
        raise ValueError(f"images: found {images.dtype}, expected uint8 or floating point")
    if not masks.is_floating_point():
        raise ValueError(f"masks: found {masks.dtype}, expected floating point")
    if images.device != masks.device:
        raise ValueError(f"masks: found {masks.device}, expected {images.device}, where the images are")
    if len(dilations) == 0 or any(not isinstance(d, int) or d < 1 for d in dilations):
        raise ValueError(f"dilations: found {dilations}, expected whole numbers of pixels, 1 or more")
    if not isinstance(num_iter, int) or num_iter < 0:
        raise ValueError(f"num_iter: found {num_iter}, expected a whole number, 0 or more")
    if variant not in VARIANTS:
        raise ValueError(f"variant: found {variant!r}, expected one of {', '.join(VARIANTS)}")
