"""Many attention maps fused into one, and never more than a tile of one of them in memory.

WeakTr (arXiv 2304.01184, adaptive attention fusion) weighs every head of every block and adds the maps up:

    F = sum_m w_m A_m,    A_m = softmax(scale q_m k_m^T),    m = 1..M over blocks x heads.

M maps of N x N are 244 MB for one picture of 480 x 480 and DeiT-S (M = 72, N = 920); F is 3 MB. Here the
maps are the innermost loop: a block of rows of F stays in the cache, and each map's exponentials E of those
rows are made there, summed along the row (Z) and added as (w / Z) E. The sign of w plays no part.

Backward makes E again: with G = dF, t = rowsum(A * G) gives dw_m = sum_i t_i, and dS = w A * (G - t) gives
the gradients of q and k.

What makes it fast on a CPU: the tile never leaves the cache, so that the matrix product is most of what is
left (`products` makes that fast); 2^x costs a quarter of e^x, and its log2(e) goes into the scale; and no
row maximum is looked for where |q| |k| rules out an overflow. On a GPU: `attention_sum_triton`.

`propagate` applies F to maps (WeakTr's fine CAM is F times the CAM) without F: a block of its rows is enough.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .dispatch import choose_backend
from .products import multiply_transposed

LOG2E = math.log2(math.e)
SAFE_EXPONENT = 64.0  # 2^64, summed over a row and times any sensible gradient, is far from float32's 2^128
# Numbers in a tile of one map, and up to which tiles of several maps are made in one call. A CPU wants
# tiles that stay in its second-level cache (1 MB), a GPU few, large launches.
TILE_AND_PACK = {"cpu": (2**18, 2**16), "cuda": (2**21, 2**21)}


def weighted_attention_sum(
    q: Tensor, k: Tensor, weights: Tensor, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """sum_m w_m softmax(scale q_m k_m^T): (B, N, N), of WeakTr's adaptive attention fusion.

    q, k (B, M, N, d): the M maps (blocks x heads) in any order that `weights` (B, M) shares; any real
    weights. scale: None is d^-0.5. A mean over the maps, as in WeakTr, is weights / M.

    Computed and returned in float32, or float64 for float64 q and k; same result under autocast. Beside
    inputs and outputs forward and backward hold at most 3 N^2 numbers, whatever M and B (a GPU: 3 x 2^21
    where that is more; Triton: M N log-sum-exps and no tile). Differentiable in weights and, in PyTorch, in
    q and k: "auto" takes PyTorch where those require a gradient or something is float64. The same bits on
    every run.
    Raises ValueError for wrong shapes, types and empty inputs, and for "triton" where it cannot serve.
    """
    _check(q, k, weights)
    backend = _choose(q, k, weights, backend)
    return _Fusion.apply(q, k, weights, None, _scale(q, scale), backend)


def propagate(q: Tensor, k: Tensor, weights: Tensor, values: Tensor, scale: float | None = None) -> Tensor:
    """weighted_attention_sum(q, k, weights, scale) @ values, no N x N in memory: (B, N, C).

    values (B, N, C): for WeakTr's fine CAM the fused CAM at the patches and zero at the class tokens.
    Differentiable in all four tensors. Other arguments, precision and errors as of
    `weighted_attention_sum`; runs in PyTorch. It takes the time of the sum, and two tiles of rows for the
    whole batch in place of B N^2 numbers.
    """
    _check(q, k, weights)
    if values.ndim != 3 or values.shape[:2] != (q.shape[0], q.shape[2]) or 0 in values.shape:
        expected = f"(B, N, C) with B = {q.shape[0]}, N = {q.shape[2]} and C >= 1"
        raise ValueError(f"values: found shape {tuple(values.shape)}, expected {expected}")
    if not values.is_floating_point() or values.device != q.device:
        raise ValueError(f"values: found {values.dtype} on {values.device}, expected numbers on {q.device}")
    return _Fusion.apply(q, k, weights, values, _scale(q, scale), "torch")


def _check(q: Tensor, k: Tensor, weights: Tensor) -> None:
    if q.ndim != 4 or q.shape != k.shape or 0 in q.shape:
        found = f"{tuple(q.shape)} and {tuple(k.shape)}"
        raise ValueError(f"q, k: found shapes {found}, expected both (B, M, N, d), none of them zero")
    if weights.shape != q.shape[:2]:
        found = f"{tuple(weights.shape)}"
        raise ValueError(f"weights: found shape {found}, expected (B, M) = {tuple(q.shape[:2])}")
    if not q.is_floating_point() or q.dtype != k.dtype or not weights.is_floating_point():
        found = f"{q.dtype}, {k.dtype} and {weights.dtype}"
        raise ValueError(f"q, k, weights: found {found}, expected floating point, the same for q and k")
    if not q.device == k.device == weights.device:
        found = f"{q.device}, {k.device} and {weights.device}"
        raise ValueError(f"q, k, weights: found them on {found}, expected one device")


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def _choose(q: Tensor, k: Tensor, weights: Tensor, backend: str) -> str:
    """`choose_backend`, and PyTorch for what the Triton kernels do not do."""
    chosen = choose_backend(backend, q, uses_dot=True)
    wants_qk = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    if chosen == "torch" or not (wants_qk or torch.float64 in (q.dtype, weights.dtype)):
        return chosen
    if backend == "triton":
        found = "q or k that require a gradient" if wants_qk else "float64"
        raise ValueError(f'backend: found "triton" with {found}, expected "torch" or "auto" for that')
    return "torch"


class _Fusion(torch.autograd.Function):
    """F, or F @ values where there are values."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q: Tensor,
        k: Tensor,
        weights: Tensor,
        values: Tensor | None,
        scale: float,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(q, k, weights, values)
        ctx.scale, ctx.backend = scale, backend
        with torch.autocast(q.device.type, enabled=False):
            if backend == "triton":
                from . import attention_sum_triton

                return attention_sum_triton.weighted_sum(q, k, weights, scale)
            return _fuse(q, k, weights, values, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, weights, values = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            if ctx.backend == "triton":
                from . import attention_sum_triton

                d_weights = attention_sum_triton.weight_gradient(q, k, gradient, ctx.scale)
                return None, None, d_weights.to(weights.dtype), None, None, None
            gradients = _Gradients(q, k, weights, values, ctx.scale, ctx.needs_input_grad)
            gradients.add(gradient)
            return *gradients.results(), None, None


class _Exponentials:
    """E = exp(scale q k^T), by tiles of some maps and rows. A = E / Z."""

    def __init__(self, q: Tensor, k: Tensor, scale: float) -> None:
        _, maps, n, _ = q.shape
        self.q, self.k, self.scale = q, k, scale * LOG2E
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.shifted = self._may_overflow()
        size, pack_size = TILE_AND_PACK.get(q.device.type, TILE_AND_PACK["cuda"])
        rows = math.ceil(n / math.ceil(n * n / size))
        pack = max(1, min(maps, pack_size // (rows * n)))
        self.row_blocks = [slice(i, min(i + rows, n)) for i in range(0, n, rows)]
        self.map_packs = [slice(m, min(m + pack, maps)) for m in range(0, maps, pack)]

    def _may_overflow(self) -> list[list[bool]]:
        """(B, M): may an exponent of this picture's map exceed SAFE_EXPONENT? (|q k| <= |q| |k|.)"""
        longest = [torch.linalg.vector_norm(x, dim=-1, dtype=self.dtype).amax(-1) for x in (self.q, self.k)]
        return (longest[0] * longest[1] * abs(self.scale) > SAFE_EXPONENT).tolist()

    def tile(self, b: int, rows: slice, maps: slice) -> tuple[Tensor, Tensor]:
        """Of h maps of picture b: E (h, r, N) and its row sums Z (h, r, 1)."""
        queries = self.q[b, maps, rows].to(self.dtype) * self.scale
        # (h, r, d), (h, N, d) -> (h, r, N)
        scores = multiply_transposed(queries, self.k[b, maps].to(self.dtype))
        if any(self.shifted[b][maps]):
            scores.sub_(scores.amax(-1, keepdim=True))  # Z divides it out again
        scores.exp2_()
        return scores, scores.sum(-1, keepdim=True)

    def empty_block(self) -> Tensor:
        """Uninitialised memory for the rows of one block, (r, N)."""
        return self.q.new_empty(self.row_blocks[0].stop, self.q.shape[2], dtype=self.dtype)


def _fuse(q: Tensor, k: Tensor, weights: Tensor, values: Tensor | None, scale: float) -> Tensor:
    """F (B, N, N), or F @ values (B, N, C)."""
    exponentials = _Exponentials(q, k, scale)
    batch, _, n, _ = q.shape
    weights = weights.to(exponentials.dtype)
    out = q.new_empty(batch, n, n if values is None else values.shape[2], dtype=exponentials.dtype)
    block = None if values is None else exponentials.empty_block()
    for b in range(batch):
        for rows in exponentials.row_blocks:
            fused = out[b, rows] if values is None else block[: rows.stop - rows.start]  # (r, N)
            fused.zero_()
            for maps in exponentials.map_packs:
                _accumulate(fused, weights[b, maps], *exponentials.tile(b, rows, maps))
            if values is not None:
                torch.mm(fused, values[b].to(out.dtype), out=out[b, rows])  # (r, N) @ (N, C) -> (r, C)
    return out


def _accumulate(fused: Tensor, weights: Tensor, tile: Tensor, sums: Tensor) -> None:
    """fused (r, N) += sum_h w_h E_h / Z_h."""
    factors = weights[:, None, None] / sums  # (h, r, 1)
    if len(tile) == 1:
        fused.addcmul_(tile[0], factors[0])
    else:  # (r, 1, h) @ (r, h, N) -> (r, 1, N)
        fused[:, None].baddbmm_(factors.permute(1, 2, 0), tile.transpose(0, 1))


class _Gradients:
    """The gradients that are asked for, added up over row blocks in a fixed order."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        weights: Tensor,
        values: Tensor | None,
        scale: float,
        needed: tuple[bool, ...],
    ) -> None:
        self.inputs, self.scale = (q, k, weights, values), scale
        self.needs_q, self.needs_k, self.needs_weights, self.needs_values = needed[:4]
        self.exponentials = _Exponentials(q, k, scale)
        self.dtype = self.exponentials.dtype
        self.weights = weights.to(self.dtype)
        self.d_q, self.d_k, self.d_weights, self.d_values = (
            torch.zeros(x.shape, dtype=self.dtype, device=q.device) if need else None
            for x, need in zip(self.inputs, needed)
        )
        self.fused = self.exponentials.empty_block() if self.needs_values else None

    def results(self) -> list[Tensor | None]:
        """dq, dk, dw, dvalues in the types of their tensors."""
        totals = (self.d_q, self.d_k, self.d_weights, self.d_values)
        return [None if total is None else total.to(x.dtype) for total, x in zip(totals, self.inputs)]

    def add(self, gradient: Tensor) -> None:
        """gradient: of F (B, N, N) or of F @ values (B, N, C)."""
        values = self.inputs[3]
        for b in range(len(gradient)):
            for rows in self.exponentials.row_blocks:
                part = gradient[b, rows].to(self.dtype)
                # dF = d(F V) V^T: (r, C) @ (C, N) -> (r, N)
                d_fused = part if values is None else part @ values[b].to(self.dtype).T
                fused = self.fused[: len(part)].zero_() if self.needs_values else None
                for maps in self.exponentials.map_packs:
                    self._add_tile(b, rows, maps, d_fused, fused)
                if self.needs_values:
                    self.d_values[b].addmm_(fused.T, part)  # (N, r) @ (r, C) -> (N, C)

    def _add_tile(self, b: int, rows: slice, maps: slice, d_fused: Tensor, fused: Tensor | None) -> None:
        """d_fused: G = dF of these rows (r, N). `fused`: these rows of F, where wanted, so far."""
        tile, sums = self.exponentials.tile(b, rows, maps)
        weights = self.weights[b, maps]
        if self.needs_values:
            _accumulate(fused, weights, tile, sums)
        needs_scores = self.needs_q or self.needs_k
        if needs_scores or self.needs_weights:
            products = tile * d_fused if needs_scores else tile.mul_(d_fused)
            means = products.sum(-1, keepdim=True) / sums  # (h, r, 1), rowsum(A * G)
        if self.needs_weights:
            self.d_weights[b, maps] += means.sum((1, 2))
        if needs_scores:
            # dS = w A * (G - means) = w / Z (E * G - means E), with the scale of dq and dk
            products.addcmul_(tile, means, value=-1).mul_(self.scale * weights[:, None, None] / sums)
            del tile
            self._add_scores(b, rows, maps, products)

    def _add_scores(self, b: int, rows: slice, maps: slice, d_scores: Tensor) -> None:
        """d_scores: scale dS, (h, r, N), of S = scale q k^T."""
        q, k, _, _ = self.inputs
        if self.needs_q:  # (h, r, N) @ (h, N, d) -> (h, r, d)
            keys = k[b, maps].to(self.dtype).transpose(1, 2)
            self.d_q[b, maps, rows] = multiply_transposed(d_scores, keys)
        if self.needs_k:  # (h, N, r) @ (h, r, d) -> (h, N, d)
            queries = q[b, maps, rows].to(self.dtype).transpose(1, 2)
            self.d_k[b, maps] += multiply_transposed(d_scores.transpose(1, 2), queries)
