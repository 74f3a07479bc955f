"""The exact Gaussian sum of DenseCRF on the GPU: out_i = sum_j exp(-|f_i - f_j|^2 / 2) values_j.

Krähenbühl & Koltun, NeurIPS 2011 (arXiv 1210.5644), equation 3, without the N x N kernel: as in
FlashAttention, a program owns a block of rows i and walks over all columns j; a tile of the kernel is made in
registers from the features, multiplied with its values and forgotten. Memory traffic is N / BLOCK_I times the
features and values, which fit in the L2 cache. Attention's running maximum is not needed: no kernel value
exceeds 1. Every program adds in ascending j: the same bits every time.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

BLOCK_I, BLOCK_J, NUM_WARPS = 64, 64, 8  # 64 x 64 fits the registers of old and new GPUs alike
MAX_LABELS = 64  # labels a program accumulates; more are split among programs


@triton.jit
def gaussian_sum_kernel(
    features_ptr, values_ptr, out_ptr, N, NUM_FEATURES: tl.constexpr, LABELS: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """features (NUM_FEATURES, N), scaled so that the kernel is 2^-|f_i - f_j|^2; values, out (N, LABELS)."""
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    label = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    b_out = tl.zeros([BLOCK_I, BLOCK_L], tl.float32)  # registers
    for start in range(0, N, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        b_distance = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)  # registers
        for k in tl.static_range(NUM_FEATURES):
            b_left = tl.load(features_ptr + k * N + i, mask=i < N, other=0.0)
            b_right = tl.load(features_ptr + k * N + j, mask=j < N, other=0.0)
            b_step = b_left[:, None] - b_right[None, :]
            b_distance += b_step * b_step
        # Columns past the end add nothing: their values are loaded as 0.
        b_values = tl.load(values_ptr + j[:, None] * LABELS + label[None, :], mask=j[:, None] < N, other=0.0)
        b_out += tl.dot(tl.exp2(-b_distance), b_values, input_precision="ieee")
    tl.store(out_ptr + i[:, None] * LABELS + label[None, :], b_out, mask=i[:, None] < N)


def gaussian_sum(features: Tensor, values: Tensor) -> Tensor:
    """Features (d, N), values (N, L), float32 -> the sums (N, L)."""
    num_features, num_points = features.shape
    num_labels = values.shape[1]
    block = min(max(16, triton.next_power_of_2(num_labels)), MAX_LABELS)  # tl.dot needs 16
    num_blocks = triton.cdiv(num_labels, block)
    padded = F.pad(values, (0, num_blocks * block - num_labels)).contiguous()  # (N, L) -> (N, blocks * block)
    scaled = (features * math.sqrt(0.5 / math.log(2))).contiguous()  # e^(-x/2) = 2^(-x / (2 ln 2))
    out = torch.empty_like(padded)
    gaussian_sum_kernel[triton.cdiv(num_points, BLOCK_I), num_blocks](
        scaled, padded, out, num_points, NUM_FEATURES=num_features, LABELS=num_blocks * block, BLOCK_L=block,
        BLOCK_I=BLOCK_I, BLOCK_J=BLOCK_J, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out[:, :num_labels]
