"""The fused attention map on a GPU: tiles outside, maps inside, nothing of M x N x N.

    F_ij = sum_m w_m A_m,ij,    A_m,ij = exp(scale q_m,i k_m,j - lse_m,i)

1. `_row_lse` reads the keys once for each block of queries: lse_m,i = log sum_j exp(scale q_m,i k_m,j).
2. `_weighted_sum` gives every tile (i, j) of F to one program, which loops over the maps with the tile in
   registers: F is written once, without atomics, and has the same bits on every run.
3. `_weight_gradient`, dw_m = sum_ij G_ij A_m,ij, needs no lse: sum_j G_ij E_ij and sum_j E_ij are gathered
   in one pass under a running maximum, and their quotient is rowsum(A * G). Each block of rows writes one
   number; these are added up in a fixed order.

Exponents are base 2: log2(e) is part of the scale. Dot products accumulate in float32; float32 inputs are
multiplied as three TF32 products, which keep float32's accuracy on tensor cores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_sum import LOG2E
from .dispatch import interpreted

BLOCK = 64  # rows and columns of a tile
HALF = {"num_warps": 4, "num_stages": 3}  # 128 registers a thread at most, no spills
SINGLE = {"num_warps": 8, "num_stages": 2}  # three TF32 products need the registers of twice the warps


@triton.jit
def _load_tokens(ptr, first, stride_n, N, d: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """BLOCK_N tokens from number `first` on, (BLOCK_N, BLOCK_D), in registers; zero beyond N and d."""
    n, c = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    inside = (n[:, None] < N) & (c[None, :] < d)
    return tl.load(ptr + n[:, None] * stride_n + c[None, :], mask=inside, other=0.0)


@triton.jit
def _row_lse(
    q_ptr, k_ptr, lse_ptr, M, N, scale, q_b, q_m, q_n, k_b, k_m, k_n,
    d: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """lse (B, M, N), base 2. Program (block of rows, picture x map)."""
    pair = tl.program_id(1).to(tl.int64)
    b, m, first = pair // M, pair % M, tl.program_id(0) * BLOCK_N
    b_q = _load_tokens(q_ptr + b * q_b + m * q_m, first, q_n, N, d, BLOCK_N, BLOCK_D)
    b_max = tl.full([BLOCK_N], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, N, BLOCK_N):
        b_k = _load_tokens(k_ptr + b * k_b + m * k_m, start, k_n, N, d, BLOCK_N, BLOCK_D)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        b_s = tl.where((start + tl.arange(0, BLOCK_N) < N)[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_sum = b_sum * tl.exp2(b_max - b_new) + tl.sum(tl.exp2(b_s - b_new[:, None]), 1)
        b_max = b_new
    i = first + tl.arange(0, BLOCK_N)
    tl.store(lse_ptr + pair * N + i, b_max + tl.log2(b_sum), mask=i < N)


@triton.jit
def _weighted_sum(
    q_ptr, k_ptr, lse_ptr, weights_ptr, out_ptr, M, N, scale, q_b, q_m, q_n, k_b, k_m, k_n,
    d: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out (B, N, N). Program (block of columns, block of rows, picture)."""
    b, row, column = tl.program_id(2).to(tl.int64), tl.program_id(1) * BLOCK_N, tl.program_id(0) * BLOCK_N
    i, j = row + tl.arange(0, BLOCK_N), column + tl.arange(0, BLOCK_N)
    b_out = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)  # in registers until all maps are in
    for m in range(M):
        map_m = tl.cast(m, tl.int64)  # maps x stride may pass 2^31
        b_q = _load_tokens(q_ptr + b * q_b + map_m * q_m, row, q_n, N, d, BLOCK_N, BLOCK_D)
        b_k = _load_tokens(k_ptr + b * k_b + map_m * k_m, column, k_n, N, d, BLOCK_N, BLOCK_D)
        b_lse = tl.load(lse_ptr + (b * M + m) * N + i, mask=i < N, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        b_out += tl.load(weights_ptr + b * M + m) * tl.exp2(b_s - b_lse[:, None])
    inside = (i[:, None] < N) & (j[None, :] < N)
    tl.store(out_ptr + b * N * N + i[:, None] * N + j[None, :], b_out, mask=inside)


@triton.jit
def _weight_gradient(
    q_ptr, k_ptr, gradient_ptr, parts_ptr, M, N, scale,
    q_b, q_m, q_n, k_b, k_m, k_n, g_b, g_i, g_j,
    d: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """parts (B, M, blocks): rowsum(A * G), summed over a block. Program (block of rows, map, picture)."""
    b, m = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_N
    i = first + tl.arange(0, BLOCK_N)
    b_q = _load_tokens(q_ptr + b * q_b + m * q_m, first, q_n, N, d, BLOCK_N, BLOCK_D)
    b_max = tl.full([BLOCK_N], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_N], tl.float32)
    b_dot = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, N, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        b_k = _load_tokens(k_ptr + b * k_b + m * k_m, start, k_n, N, d, BLOCK_N, BLOCK_D)
        inside = (i[:, None] < N) & (j[None, :] < N)
        g_offsets = i[:, None].to(tl.int64) * g_i + j[None, :].to(tl.int64) * g_j
        b_g = tl.load(gradient_ptr + b * g_b + g_offsets, mask=inside, other=0.0).to(tl.float32)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        b_s = tl.where((j < N)[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_e, b_shrink = tl.exp2(b_s - b_new[:, None]), tl.exp2(b_max - b_new)
        b_sum = b_sum * b_shrink + tl.sum(b_e, 1)
        b_dot = b_dot * b_shrink + tl.sum(b_e * b_g, 1)
        b_max = b_new
    part = tl.sum(tl.where(i < N, b_dot / b_sum, 0.0), 0)
    tl.store(parts_ptr + (b * tl.num_programs(1) + m) * tl.num_programs(0) + tl.program_id(0), part)


def weighted_sum(q: Tensor, k: Tensor, weights: Tensor, scale: float) -> Tensor:
    """q, k (B, M, N, d), weights (B, M) -> F (B, N, N), float32."""
    q, k, precision = _prepare(q, k)
    batch, maps, n, _ = q.shape
    blocks, strides = triton.cdiv(n, BLOCK), (*q.stride()[:3], *k.stride()[:3])
    options = _options(q, precision)
    lse = torch.empty(batch, maps, n, dtype=torch.float32, device=q.device)
    out = torch.empty(batch, n, n, dtype=torch.float32, device=q.device)
    weights = weights.float().contiguous()
    _row_lse[(blocks, batch * maps)](q, k, lse, maps, n, scale * LOG2E, *strides, **options)
    tiles = (blocks, blocks, batch)
    _weighted_sum[tiles](q, k, lse, weights, out, maps, n, scale * LOG2E, *strides, **options)
    return out


def weight_gradient(q: Tensor, k: Tensor, gradient: Tensor, scale: float) -> Tensor:
    """q, k (B, M, N, d), gradient dF (B, N, N) -> dw (B, M), float32."""
    q, k, precision = _prepare(q, k)
    batch, maps, n, _ = q.shape
    blocks, strides = triton.cdiv(n, BLOCK), (*q.stride()[:3], *k.stride()[:3])
    parts = torch.empty(batch, maps, blocks, dtype=torch.float32, device=q.device)
    _weight_gradient[(blocks, maps, batch)](
        q, k, gradient, parts, maps, n, scale * LOG2E, *strides, *gradient.stride(), **_options(q, precision)
    )
    return parts.sum(-1)


def _prepare(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, str]:
    """q and k with neighbouring channels neighbours in memory, and how `tl.dot` multiplies them."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    if interpreted() or q.device.type != "cuda":
        return q, k, "ieee"
    if torch.cuda.get_device_capability(q.device) >= (8, 0):
        return q, k, "tf32x3"  # of float32 inputs; half precision is exact as it is
    return q.float(), k.float(), "ieee"  # Triton has no tensor cores there: half precision would be slower


def _options(q: Tensor, precision: str) -> dict[str, object]:
    d = q.shape[-1]
    sizes = {"d": d, "BLOCK_N": BLOCK, "BLOCK_D": max(16, triton.next_power_of_2(d))}  # tl.dot: 16 at least
    return {**sizes, "PRECISION": precision, **(SINGLE if q.dtype == torch.float32 else HALF)}
