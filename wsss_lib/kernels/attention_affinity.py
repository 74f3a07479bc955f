"""Which patches belong together, read off attention scores: AFA's affinity as one matrix product.

AFA (arXiv 2203.02664, affinity from attention) learns a weight per head for the scores before the softmax:

    affinity = sigmoid(sum_m w_m (S_m + S_m^T) + b),    S_m = q_m k_m^T,    m over the heads of two blocks.

The published way writes out M score maps, concatenates them, adds their transposes and calls a 1x1
convolution: 3 M N^2 numbers. But the convolution is linear in the scores, and the scores in the queries, so
the heads' weighted dot products are one dot product of the concatenated vectors:

    T_ij = sum_m w_m <q_m,i , k_m,j> = <(w_1 q_1,i .. w_M q_M,i), (k_1,j .. k_M,j)>.

That is one product of (N, M d) with (M d, N), and T + T^T costs one addition of N x N. Nothing of M N^2
exists, forward or backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .products import inner_products


def attention_affinity(q: Tensor, k: Tensor, weight: Tensor, bias: Tensor | float) -> Tensor:
    """sigmoid(T + T^T + b), T = sum_m w_m q_m k_m^T, of AFA: (B, N, N), symmetric, values in (0, 1).

    q, k (B, M, N, d): M heads (of the last two blocks, one after the other); weight (M,); bias a number or
    (1,). Computed and returned in float32, or float64 for float64 q and k; same result under autocast.
    Differentiable in all four. At most 4 N^2 numbers a picture beside copies of q and k, whatever M.
    Raises ValueError for other shapes and types. Where the network pools its keys (Mix Transformer, stages 1
    to 3) the scores are not square and there is no such affinity.
    """
    _check(q, k, weight)
    dtype = torch.promote_types(q.dtype, torch.float32)
    bias = torch.as_tensor(bias, dtype=dtype, device=q.device)
    if bias.numel() != 1:
        raise ValueError(f"bias: found shape {tuple(bias.shape)}, expected one number")
    with torch.autocast(q.device.type, enabled=False):
        queries = _concatenate(q.to(dtype) * weight.to(dtype)[:, None, None])
        scores = inner_products(queries, _concatenate(k.to(dtype)))  # two (B, N, M*d) -> (B, N, N)
        return (scores + scores.transpose(1, 2)).add_(bias.reshape(())).sigmoid_()


def _concatenate(heads: Tensor) -> Tensor:
    """(B, M, N, d) -> (B, N, M*d)"""
    return heads.transpose(1, 2).flatten(2)


def _check(q: Tensor, k: Tensor, weight: Tensor) -> None:
    if q.ndim != 4 or q.shape != k.shape or 0 in q.shape:
        found = f"{tuple(q.shape)} and {tuple(k.shape)}"
        raise ValueError(f"q, k: found shapes {found}, expected both (B, M, N, d), none of them zero")
    if weight.shape != q.shape[1:2]:
        raise ValueError(f"weight: found shape {tuple(weight.shape)}, expected (M,) = ({q.shape[1]},)")
    if not q.is_floating_point() or q.dtype != k.dtype or not weight.is_floating_point():
        found = f"{q.dtype}, {k.dtype} and {weight.dtype}"
        raise ValueError(f"q, k, weight: found {found}, expected floating point, the same for q and k")
