"""PAR and PAMR on a GPU: one launch for the affinity, one for each iteration, no neighbour ever copied.

`_affinity` gives a block of pixels to one program, which goes over their K neighbours four times: the mean
of the differences to the centre, their deviation about it, the softmax's running maximum and sum, and the
affinity itself, written once. The picture stays in the cache, so looking again costs less than writing K
numbers and reading them back. `_propagate` keeps a block of maps x pixels in registers and adds up K
neighbours; the affinity is the only stream that it reads from memory, and nobody else writes its block: the
same bits on every run.

Neighbours outside the picture are those at its edge: their addresses are clamped, nothing is padded. Their
offsets come from a small table, in the order of `neighbor_offsets`: a loop at run time, since one unrolled
over 48 neighbours takes a minute to compile. All is computed in the images' type, float32 or float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import local_refinement as formula
from .dispatch import interpreted

EPSILON = tl.constexpr(formula.EPSILON)
PAR_SCALE, PAMR_SCALE = tl.constexpr(formula.PAR_SCALE), tl.constexpr(formula.PAMR_SCALE)
PIXELS, MAPS = 128, 8  # a block: 8 float32 sums a thread at four warps
WARPS = 4
INTERPRETED_PIXELS = 4096  # the interpreter pays for each operation, not for each number


@triton.jit
def _neighbor(offsets_ptr, k, y, x, H, W):
    """Where neighbour k of the pixels (y, x) lies in a picture or map, clamped to it."""
    row = tl.minimum(tl.maximum(y + tl.load(offsets_ptr + 2 * k), 0), H - 1)
    column = tl.minimum(tl.maximum(x + tl.load(offsets_ptr + 2 * k + 1), 0), W - 1)
    return row * W + column


@triton.jit
def _load_color(image_ptr, pixel, HW, inside):
    """Three values of every pixel of the block, in registers."""
    red = tl.load(image_ptr + pixel, mask=inside, other=0.0)
    green = tl.load(image_ptr + HW + pixel, mask=inside, other=0.0)
    return red, green, tl.load(image_ptr + 2 * HW + pixel, mask=inside, other=0.0)


@triton.jit
def _color_weight(b_squares, b_mean, K, SAMPLES, PAR: tl.constexpr):
    """What a squared (PAR) or absolute (PAMR) difference of a colour counts, divided by the three colours."""
    b_squares += (SAMPLES - K) * b_mean * b_mean  # PAMR's samples at the centre, of difference 0
    b_deviation = tl.sqrt(b_squares / (SAMPLES - 1))
    if PAR:
        b_scale = (b_deviation + EPSILON) * PAR_SCALE
        b_weight = -1.0 / (b_scale * b_scale * 3)
    else:
        b_weight = -1.0 / ((b_deviation * PAMR_SCALE + EPSILON) * 3)
    return b_weight


@triton.jit
def _logit(r, g, b, w_r, w_g, w_b, PAR: tl.constexpr):
    """What the softmax over the neighbours is taken of, from three differences and their weights."""
    if PAR:
        logit = w_r * r * r + w_g * g * g + w_b * b * b
    else:
        logit = w_r * tl.abs(r) + w_g * tl.abs(g) + w_b * tl.abs(b)
    return logit


@triton.jit
def _affinity(
    images_ptr, affinity_ptr, offsets_ptr, position_ptr, H, W, K, SAMPLES,
    PAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """affinity (B, K, H, W) in global memory. Program (block of pixels, picture)."""
    batch, HW = tl.program_id(1).to(tl.int64), H * W
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, y, x = p < HW, p // W, p % W
    image_ptr = images_ptr + batch * 3 * HW
    c_r, c_g, c_b = _load_color(image_ptr, p, HW, inside)
    zero = tl.zeros([BLOCK], image_ptr.dtype.element_ty)

    m_r, m_g, m_b = zero, zero, zero
    for k in range(K):
        r, g, b = _load_color(image_ptr, _neighbor(offsets_ptr, k, y, x, H, W), HW, inside)
        m_r += r - c_r
        m_g += g - c_g
        m_b += b - c_b
    m_r, m_g, m_b = m_r / SAMPLES, m_g / SAMPLES, m_b / SAMPLES

    v_r, v_g, v_b = zero, zero, zero
    for k in range(K):
        r, g, b = _load_color(image_ptr, _neighbor(offsets_ptr, k, y, x, H, W), HW, inside)
        r, g, b = r - c_r - m_r, g - c_g - m_g, b - c_b - m_b
        v_r += r * r
        v_g += g * g
        v_b += b * b
    w_r = _color_weight(v_r, m_r, K, SAMPLES, PAR)
    w_g = _color_weight(v_g, m_g, K, SAMPLES, PAR)
    w_b = _color_weight(v_b, m_b, K, SAMPLES, PAR)

    b_max, b_sum = zero + float("-inf"), zero
    for k in range(K):
        r, g, b = _load_color(image_ptr, _neighbor(offsets_ptr, k, y, x, H, W), HW, inside)
        b_logit = _logit(r - c_r, g - c_g, b - c_b, w_r, w_g, w_b, PAR)
        b_new = tl.maximum(b_max, b_logit)
        b_sum = b_sum * tl.exp(b_max - b_new) + tl.exp(b_logit - b_new)
        b_max = b_new

    out_ptr = affinity_ptr + batch * K * HW
    for k in range(K):
        r, g, b = _load_color(image_ptr, _neighbor(offsets_ptr, k, y, x, H, W), HW, inside)
        b_logit = _logit(r - c_r, g - c_g, b - c_b, w_r, w_g, w_b, PAR)
        tl.store(out_ptr + p, tl.exp(b_logit - b_max) / b_sum + tl.load(position_ptr + k), mask=inside)
        out_ptr += HW


@triton.jit
def _propagate(
    source_ptr, target_ptr, affinity_ptr, offsets_ptr, C, H, W, K, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """target = affinity x source, both (B, C, H, W). Program (block of pixels x block of maps, picture)."""
    batch, HW = tl.program_id(1).to(tl.int64), H * W
    # Blocks of maps run fastest, so those that read the same affinities run together and share the cache.
    groups = tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) % groups * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.program_id(0) // groups * BLOCK + tl.arange(0, BLOCK)
    inside_p, y, x = p < HW, p // W, p % W
    inside = (c < C)[:, None] & inside_p[None, :]
    rows = (batch * C + c)[:, None] * HW  # int64, where each map begins
    weight_ptr = affinity_ptr + batch * K * HW
    b_out = tl.zeros([BLOCK_C, BLOCK], target_ptr.dtype.element_ty)  # in registers until the last neighbour
    for k in range(K):
        b_weight = tl.load(weight_ptr + p, mask=inside_p, other=0.0)
        q = _neighbor(offsets_ptr, k, y, x, H, W)
        b_out += b_weight[None, :] * tl.load(source_ptr + rows + q[None, :], mask=inside, other=0.0)
        weight_ptr += HW
    tl.store(target_ptr + rows + p[None, :], b_out, mask=inside)


def refine(
    images: Tensor, masks: Tensor, offsets: Tensor, position: Tensor, num_iter: int, variant: str
) -> Tensor:
    """images (B, 3, H, W), masks (B, C, H, W), offsets int32 (K, 2), position (K,) -> refined (B, C, H, W).

    num_iter is at least 1. Images, masks and position are of one type, float32 or float64.
    """
    device = masks.device
    images, source = images.contiguous(), masks.contiguous()
    offsets, position = offsets.to(device), position.to(device)
    (batch, maps, height, width), neighbors = masks.shape, len(offsets)
    par = variant == "par"
    samples = neighbors if par else neighbors + neighbors // 8
    pixels = INTERPRETED_PIXELS if interpreted() else PIXELS
    block_maps = min(MAPS, triton.next_power_of_2(maps))
    blocks, groups = triton.cdiv(height * width, pixels), triton.cdiv(maps, block_maps)

    affinity = masks.new_empty(batch, neighbors, height, width)
    _affinity[(blocks, batch)](
        images, affinity, offsets, position, height, width, neighbors, samples, par, pixels, num_warps=WARPS
    )
    buffers = torch.empty_like(source), torch.empty_like(source)
    for i in range(num_iter):
        target = buffers[i % 2]
        _propagate[(blocks * groups, batch)](
            source, target, affinity, offsets, maps, height, width, neighbors, block_maps, pixels,
            num_warps=WARPS,
        )  # fmt: skip
        source = target
    return source
