"""Attention consistency on CUDA: tiles of D = mean_h A1 - mean_h A2 in registers, only their signs in memory.

The equations are those of `attention_consistency`. Four launches serve all blocks, pictures and heads of both
views; each program owns what it writes, so there are no atomics and the bits are the same each time:

    lse      log of the sum of exp(scores) of each query and head
    compare  a tile of D: both views, head after head, summed in registers; leaves sign(D), one byte for all
             heads, and two partial sums
    dq       rowsum(A * G) in one sweep over the keys, dS k in another. (A * G) k - rowsum(A * G) (A k) would
             be one sweep of as many products, but cancels where attention is nearly one-hot
    dk       dS^T q, with the row sums that dq has left

G is +-1 until the end, where the incoming gradient multiplies it: in half precision the share of one term
among L B M^2 would be 0. Blocks are found through a table of their addresses, tokens of view 2 through
`order`: neither a sequence of tensors nor the permutation costs a copy. Exponents are base 2: log2(e) is part
of the scale. R = 1 + M queries (token 0 and the patches), M patches, N keys, in the order of view 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .attention_consistency import LOG2E
from .dispatch import interpreted

# Nothing spills at d = 64 on Hopper. Float32 products are three TF32 ones: they keep float32's accuracy on
# tensor cores.
HALF = {"BLOCK_R": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
SINGLE = {"BLOCK_R": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}


@triton.jit
def split_program(z, L, B):
    """Program index -> (view, block, picture)."""
    return z // (L * B), z // B % L, z % B


@triton.jit
def head_ptr(table_ptr, like_ptr, view, kind, layer, L, b, h, stride_b, stride_h):
    """Where the tokens (N, d) of one head begin; kind 0: queries, 1: keys. like_ptr has the type wanted."""
    address = tl.load(table_ptr + (view * 2 + kind) * L + layer).to(like_ptr.dtype)
    return address + b.to(tl.int64) * stride_b + h * stride_h


@triton.jit
def load_tokens(ptr, order_ptr, position, present, stride_n, D, BLOCK_D: tl.constexpr):
    """(rows, BLOCK_D) of the tokens at these positions; 0 beyond the last dimension and where not present."""
    token = tl.load(order_ptr + position, mask=present, other=0)
    dim = tl.arange(0, BLOCK_D)
    mask = present[:, None] & (dim < D)[None, :]
    return tl.load(ptr + token[:, None] * stride_n + dim[None, :], mask=mask, other=0.0)


@triton.jit
def store_tokens(ptr, order_ptr, position, present, D, tile, BLOCK_D: tl.constexpr):
    """The same way back, to contiguous tokens."""
    token = tl.load(order_ptr + position, mask=present, other=0)
    dim = tl.arange(0, BLOCK_D)
    tl.store(ptr + token[:, None] * D + dim[None, :], tile, mask=present[:, None] & (dim < D)[None, :])


@triton.jit
def query_position(row, PREFIX):
    """Row 0 is token 0, row r is patch r - 1."""
    return tl.where(row == 0, 0, row + PREFIX - 1)


@triton.jit
def attention_tile(q, k, lse, scale, PRECISION: tl.constexpr):
    """A of one head, in registers; 2^-lse in absent columns."""
    return tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None])


@triton.jit
def load_sign(sign_ptr, row, column, R, M, PREFIX):
    """sign(D) at these rows and key positions as float32: 0 in the prefix columns, which are not compared."""
    mask = (row < R)[:, None] & ((column >= PREFIX) & (column < M + PREFIX))[None, :]
    sign = tl.load(sign_ptr + row[:, None] * M + (column - PREFIX)[None, :], mask=mask, other=0)
    return sign.to(tl.float32)


@triton.jit
def lse_kernel(
    table_ptr, like_ptr, order_ptr, lse_ptr, scale, L, B, H, N, D, PREFIX, stride_b, stride_h, stride_n,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """lse (2, L, B, H, R), base 2. Program (block of rows, head, view x block x picture)."""
    h, z, R = tl.program_id(1), tl.program_id(2), N - PREFIX + 1
    view, layer, b = split_program(z, L, B)
    q_ptr = head_ptr(table_ptr, like_ptr, view, 0, layer, L, b, h, stride_b, stride_h)
    k_ptr = head_ptr(table_ptr, like_ptr, view, 1, layer, L, b, h, stride_b, stride_h)
    order_ptr += view * N
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    q = load_tokens(q_ptr, order_ptr, query_position(row, PREFIX), row < R, stride_n, D, BLOCK_D)
    b_max = tl.full([BLOCK_R], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, N, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        k = load_tokens(k_ptr, order_ptr, column, column < N, stride_n, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where((column < N)[None, :], scores, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(scores, 1))
        b_sum = b_sum * tl.exp2(b_max - b_new) + tl.sum(tl.exp2(scores - b_new[:, None]), 1)
        b_max = b_new
    tl.store(lse_ptr + (z.to(tl.int64) * H + h) * R + row, b_max + tl.log2(b_sum), mask=row < R)


@triton.jit
def compare_kernel(
    table_ptr, like_ptr, order_ptr, lse_ptr, sign_ptr, sums_ptr, scale,
    L, B, H, N, D, PREFIX, stride_b, stride_h, stride_n,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    KEEP_SIGN: tl.constexpr,
):  # fmt: skip
    """sign(D) int8 (L, B, R, M), and sums of H |D| over each tile (L * B, tiles, 2): class row, patch rows.
    Program (block of rows, block of patches, block x picture)."""
    M, R, z = N - PREFIX, N - PREFIX + 1, tl.program_id(2)
    layer, b = z // B, z % B
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_difference = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for head_of_view in range(2 * H):  # the views in turn: equal attention leaves exactly 0
        h, view = head_of_view // 2, head_of_view % 2
        q_ptr = head_ptr(table_ptr, like_ptr, view, 0, layer, L, b, h, stride_b, stride_h)
        k_ptr = head_ptr(table_ptr, like_ptr, view, 1, layer, L, b, h, stride_b, stride_h)
        tokens_ptr = order_ptr + view * N
        q = load_tokens(q_ptr, tokens_ptr, query_position(row, PREFIX), row < R, stride_n, D, BLOCK_D)
        k = load_tokens(k_ptr, tokens_ptr, column + PREFIX, column < M, stride_n, D, BLOCK_D)
        lse_of_head = lse_ptr + (((view * L + layer).to(tl.int64) * B + b) * H + h) * R
        lse = tl.load(lse_of_head + row, mask=row < R, other=0.0)
        b_difference += attention_tile(q, k, lse, scale, PRECISION) * (1 - 2 * view)
    inside = (row < R)[:, None] & (column < M)[None, :]
    b_rows = tl.sum(tl.where(inside, tl.abs(b_difference), 0.0), 1)
    tile = (z * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums_ptr + tile * 2, tl.sum(tl.where(row == 0, b_rows, 0.0)))
    tl.store(sums_ptr + tile * 2 + 1, tl.sum(tl.where(row == 0, 0.0, b_rows)))
    if KEEP_SIGN:
        sign = (b_difference > 0).to(tl.int8) - (b_difference < 0).to(tl.int8)
        sign_ptr += z.to(tl.int64) * R * M
        tl.store(sign_ptr + row[:, None] * M + column[None, :], sign, mask=inside)


@triton.jit
def dq_kernel(
    table_ptr, like_ptr, order_ptr, lse_ptr, sign_ptr, incoming_ptr, delta_ptr, dq_ptr, first_view, scale,
    L, B, H, N, D, PREFIX, stride_b, stride_h, stride_n,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq (views, L, B, H, N, D), rows of R only; delta (views, L, B, H, R) = rowsum(A * sign(D)).
    Program (block of rows, head, view x block x picture)."""
    h, z, M, R = tl.program_id(1), tl.program_id(2), N - PREFIX, N - PREFIX + 1
    view, layer, b = split_program(z, L, B)
    head = z.to(tl.int64) * H + h  # among those whose gradient is wanted
    view += first_view
    q_ptr = head_ptr(table_ptr, like_ptr, view, 0, layer, L, b, h, stride_b, stride_h)
    k_ptr = head_ptr(table_ptr, like_ptr, view, 1, layer, L, b, h, stride_b, stride_h)
    order_ptr += view * N
    sign_ptr += (layer * B + b).to(tl.int64) * R * M
    lse_ptr += (((view * L + layer).to(tl.int64) * B + b) * H + h) * R
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    q = load_tokens(q_ptr, order_ptr, query_position(row, PREFIX), row < R, stride_n, D, BLOCK_D)
    lse = tl.load(lse_ptr + row, mask=row < R, other=0.0)
    b_delta = tl.zeros([BLOCK_R], tl.float32)
    for start in range(PREFIX, N, BLOCK_N):  # D has no prefix columns
        column = start + tl.arange(0, BLOCK_N)
        k = load_tokens(k_ptr, order_ptr, column, column < N, stride_n, D, BLOCK_D)
        a = attention_tile(q, k, lse, scale, PRECISION)
        b_delta += tl.sum(a * load_sign(sign_ptr, row, column, R, M, PREFIX), 1)
    tl.store(delta_ptr + head * R + row, b_delta, mask=row < R)
    b_dq = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        k = load_tokens(k_ptr, order_ptr, column, column < N, stride_n, D, BLOCK_D)  # 0 beyond N
        a = attention_tile(q, k, lse, scale, PRECISION)
        d_scores = a * (load_sign(sign_ptr, row, column, R, M, PREFIX) - b_delta[:, None])
        b_dq += tl.dot(d_scores.to(k.dtype), k, input_precision=PRECISION)
    incoming = tl.where(row == 0, tl.load(incoming_ptr), tl.load(incoming_ptr + 1)) * (1 - 2 * view)
    b_dq *= incoming[:, None]
    store_tokens(dq_ptr + head * N * D, order_ptr, query_position(row, PREFIX), row < R, D, b_dq, BLOCK_D)


@triton.jit
def dk_kernel(
    table_ptr, like_ptr, order_ptr, lse_ptr, sign_ptr, incoming_ptr, delta_ptr, dk_ptr, first_view, scale,
    L, B, H, N, D, PREFIX, stride_b, stride_h, stride_n,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk (views, L, B, H, N, D). Program (block of keys, head, view x block x picture)."""
    h, z, M, R = tl.program_id(1), tl.program_id(2), N - PREFIX, N - PREFIX + 1
    view, layer, b = split_program(z, L, B)
    head = z.to(tl.int64) * H + h  # among those whose gradient is wanted
    view += first_view
    q_ptr = head_ptr(table_ptr, like_ptr, view, 0, layer, L, b, h, stride_b, stride_h)
    k_ptr = head_ptr(table_ptr, like_ptr, view, 1, layer, L, b, h, stride_b, stride_h)
    order_ptr += view * N
    sign_ptr += (layer * B + b).to(tl.int64) * R * M
    lse_ptr += (((view * L + layer).to(tl.int64) * B + b) * H + h) * R
    delta_ptr += head * R
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = load_tokens(k_ptr, order_ptr, column, column < N, stride_n, D, BLOCK_D)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, R, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        patch = (row > 0) & (row < R)
        q = load_tokens(q_ptr, order_ptr, query_position(row, PREFIX), patch, stride_n, D, BLOCK_D)
        lse = tl.load(lse_ptr + row, mask=patch, other=0.0)
        delta = tl.load(delta_ptr + row, mask=patch, other=0.0)
        a = attention_tile(q, k, lse, scale, PRECISION)
        d_scores = a * (load_sign(sign_ptr, row, column, R, M, PREFIX) - delta[:, None])
        b_dk += tl.dot(tl.trans(d_scores.to(q.dtype)), q, input_precision=PRECISION)
    # The class row, which has an incoming gradient of its own: an outer product.
    dim = tl.arange(0, BLOCK_D)
    class_q = tl.load(q_ptr + tl.load(order_ptr) * stride_n + dim, mask=dim < D, other=0.0).to(tl.float32)
    class_a = tl.exp2(tl.sum(k.to(tl.float32) * class_q[None, :], 1) * scale - tl.load(lse_ptr))
    compared = (column >= PREFIX) & (column < N)
    class_sign = tl.load(sign_ptr + column - PREFIX, mask=compared, other=0).to(tl.float32)
    class_d_scores = class_a * (class_sign - tl.load(delta_ptr)) * tl.load(incoming_ptr)
    b_dk = b_dk * tl.load(incoming_ptr + 1) + class_d_scores[:, None] * class_q[None, :]
    b_dk *= 1 - 2 * view
    store_tokens(dk_ptr + head * N * D, order_ptr, column, column < N, D, b_dk, BLOCK_D)


class ConsistencySums(torch.autograd.Function):
    """Sums of |D| of all blocks: (class row, patch rows). tensors: q1, k1, q2, k2 of each block."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, permutation: Tensor, prefix: int, grad_enabled: bool, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        keep_sign = grad_enabled and any(ctx.needs_input_grad)
        (B, H, N, D), L, device = tensors[0].shape, len(tensors) // 4, tensors[0].device
        R, M, ctx.dtype = N - prefix + 1, N - prefix, tensors[0].dtype
        tensors, options = _prepare(tensors)
        table = [[tensor.data_ptr() for tensor in tensors[kind::4]] for kind in range(4)]
        table = torch.tensor(table, device=device)  # (4, L) = (view x kind, L), addresses
        tokens = torch.arange(N, device=device)
        order = torch.stack([tokens, torch.cat([tokens[:prefix], permutation + prefix])]).int()  # (2, N)
        tiles = triton.cdiv(R, options["BLOCK_R"]), triton.cdiv(M, options["BLOCK_N"])
        lse = torch.empty(2, L, B, H, R, device=device)
        sums = torch.empty(L * B, *tiles, 2, device=device)
        sign = torch.empty((L, B, R, M) if keep_sign else 1, dtype=torch.int8, device=device)
        numbers = D**-0.5 * LOG2E, L, B, H, N, D, prefix, *tensors[0].stride()[:3]
        pointers = table, tensors[0], order, lse
        with torch.cuda.device_of(tensors[0]):
            lse_kernel[(tiles[0], H, 2 * L * B)](*pointers, *numbers, **options)
            compare_kernel[(*tiles, L * B)](*pointers, sign, sums, *numbers, **options, KEEP_SIGN=keep_sign)
        ctx.save_for_backward(table, order, lse, sign, *tensors)
        ctx.numbers, ctx.options = numbers, options
        class_sum, patch_sum = sums.sum(dim=(0, 1, 2)).div_(H)
        return class_sum.clone(), patch_sum.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_class: Tensor, d_patch: Tensor) -> tuple[Tensor | None, ...]:
        table, order, lse, sign, *tensors = ctx.saved_tensors
        like, R = tensors[0], lse.shape[-1]
        (B, H, N, D), L, needs = like.shape, len(tensors) // 4, ctx.needs_input_grad[3:]
        views = [view for view in (0, 1) if any(needs[2 * view :: 4]) or any(needs[2 * view + 1 :: 4])]
        incoming = torch.stack([d_class, d_patch]).float() * (D**-0.5 / H)  # to a head's scores, unscaled
        delta = lse.new_empty(len(views), L, B, H, R)
        d_q = torch.zeros(len(views), L, B, H, N, D, dtype=ctx.dtype, device=like.device)
        d_k = torch.empty_like(d_q)
        pointers = table, like, order, lse, sign, incoming, delta
        rows, columns, z = ctx.options["BLOCK_R"], ctx.options["BLOCK_N"], len(views) * L * B
        with torch.cuda.device_of(like):
            dq_kernel[(triton.cdiv(R, rows), H, z)](*pointers, d_q, views[0], *ctx.numbers, **ctx.options)
            dk_kernel[(triton.cdiv(N, columns), H, z)](*pointers, d_k, views[0], *ctx.numbers, **ctx.options)
        gradients = [None] * len(tensors)
        for i, view in enumerate(views):
            gradients[2 * view :: 4] = d_q[i]
            gradients[2 * view + 1 :: 4] = d_k[i]
        return None, None, None, *gradients


def _prepare(tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], dict[str, object]]:
    """Tensors of one layout, channels neighbours in memory; and how the kernels are launched."""
    precision, first = "tf32x3", tensors[0]
    if interpreted() or torch.cuda.get_device_capability(first.device) < (8, 0):
        precision = "ieee"
        if first.is_cuda:
            tensors = tuple(tensor.float() for tensor in tensors)  # no tensor cores: half would be slower
    strides = tensors[0].stride()
    if strides[3] != 1 or any(tensor.stride() != strides for tensor in tensors):
        tensors = tuple(tensor.contiguous() for tensor in tensors)
    block_d = max(16, triton.next_power_of_2(first.shape[3]))  # tl.dot: 16 at least
    options = SINGLE if tensors[0].dtype == torch.float32 else HALF
    return tensors, {**options, "BLOCK_D": block_d, "PRECISION": precision}
