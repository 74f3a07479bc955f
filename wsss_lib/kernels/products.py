"""a b^T in float32 at the speed that the CPU has.

PyTorch leaves float32 products to MKL, which uses half of what an AMD CPU with AVX-512 can do (100 of 230
GFLOP/s on one core of a Zen 5). oneDNN, which PyTorch brings along too, uses all of it: the same
arithmetic, in float32, in half the time. PyTorch calls it for such products in compiled models only, by the
operator that is called here. Where that operator is missing or would not help, `torch.bmm` does the work.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

WORTHWHILE = 2**20  # multiplications in a product; below, calling the operator costs more than it saves


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """a b^T, all <a_i, b_j>: (B, n, d), (B, m, d) -> (B, n, m), in their type. Differentiable once."""
    return _InnerProducts.apply(a, b)


def multiply_transposed(a: Tensor, b: Tensor) -> Tensor:
    """`inner_products` without a graph."""
    linear = _linear() if _worthwhile(a, b) else None
    if linear is None:
        return torch.bmm(a, b.transpose(1, 2))
    if len(a) == 1:
        return linear(a[0], b[0])[None]
    out = a.new_empty(len(a), a.shape[1], b.shape[1])
    for into, x, y in zip(out, a, b):
        into.copy_(linear(x, y))
    return out


class _InnerProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with torch.autocast(a.device.type, enabled=False):
            return multiply_transposed(a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (a, b), (needs_a, needs_b) = ctx.saved_tensors, ctx.needs_input_grad
        with torch.autocast(a.device.type, enabled=False):
            # (B, n, m) @ (B, m, d) -> (B, n, d), and (B, m, n) @ (B, n, d) -> (B, m, d)
            d_a = multiply_transposed(gradient, b.transpose(1, 2)) if needs_a else None
            d_b = multiply_transposed(gradient.transpose(1, 2), a.transpose(1, 2)) if needs_b else None
        return d_a, d_b


def _worthwhile(a: Tensor, b: Tensor) -> bool:
    return (
        a.device.type == "cpu"
        and a.dtype == b.dtype == torch.float32
        and a.shape[1] * a.shape[2] * b.shape[1] >= WORTHWHILE
    )


@cache
def _linear() -> Callable[[Tensor, Tensor], Tensor] | None:
    """oneDNN's x w^T, (n, d), (m, d) -> (n, m); None where it is not to be had, or MKL is as good."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return None

    def linear(x: Tensor, w: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")

    try:  # not a documented operator: it may change
        x, w = torch.arange(6.0).view(3, 2), torch.arange(8.0).view(4, 2)
        return linear if torch.equal(linear(x, w), x @ w.T) else None
    except (AttributeError, RuntimeError, TypeError):
        return None
