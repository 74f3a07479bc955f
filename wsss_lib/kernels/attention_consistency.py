"""Attention consistency of two views of a picture (ACR, arXiv 2308.04321): two numbers, no attention kept.

With A = softmax(S), S = q k^T / sqrt(d) in each of the H heads of a block, and view 2 in the patch order of
view 1, the loss and its gradient are

    D = mean_h A1 - mean_h A2      loss = sum w |D|      G = w sign(D) / H      dS = A * (G - rowsum(A * G))

(-G for view 2). Written out, autograd keeps every A of every block: 2 L B H N^2 numbers. Here

- the tokens of q2 and k2 are put in the order of view 1, never the rows and columns of a matrix;
- sign(D) of a few rows is known as soon as all heads of those rows are, and G serves all of them. So the
  gradients are made in the forward pass, a block of rows at a time, while their attention is still there;
  backward only multiplies them by the gradient that comes in. Nothing is larger than (H, rows, N);
- the queries are token 0 and the patches: the rows of other prefix tokens are in no term;
- 2^x costs a quarter of e^x, and its log2(e) goes into the scale; no row maximum is looked for where |q| |k|
  rules out an overflow. The matrix products, most of what is left, are those of `products`.

On a GPU, Triton keeps the tiles of D on the chip: `attention_consistency_triton`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .dispatch import choose_backend
from .products import multiply_transposed

NAMES = ("q1", "k1", "q2", "k2")
LOG2E = math.log2(math.e)
SAFE_EXPONENT = 64.0  # 2^64, summed over a row, is far from float32's 2^128, and 2^-64 from its 2^-126
# Numbers of attention in flight, both views together: a block of ViT-B at 384 x 384, 32 MiB in float32. Half
# as many fit smaller caches, but products of half the rows lose more than that gains.
SCRATCH = 2**23


def attention_consistency_loss(
    q1: Tensor | Sequence[Tensor],
    k1: Tensor | Sequence[Tensor],
    q2: Tensor | Sequence[Tensor],
    k2: Tensor | Sequence[Tensor],
    permutation: Tensor,
    num_prefix_tokens: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """How differently two views of each picture attend: (class_term, patch_term), two scalars.

    q1, k1, q2, k2: queries and keys of L blocks, each a sequence of L tensors (B, H, N, d), as an attention
    tape has them, or one tensor (L, B, H, N, d). N = num_prefix_tokens + M tokens, M of them patches.
    Attention is softmax(q k^T / sqrt(d)) over all N tokens, averaged over heads, in each block.
    permutation: long (M,); patch i of view 1 lies at patch permutation[i] of view 2. Where view 2 is
    `transform(view 1)` on an h x w grid, `transform(torch.arange(h * w).view(h, w)).flatten().argsort()`; for
    flips the argsort changes nothing, for a rotation by 90 degrees it does. One that is on the CPU costs
    CUDA devices no synchronisation.
    num_prefix_tokens: tokens before the patches, at least 1; token 0 is the class token. The others
    (distillation, registers) take part in the softmax and in no term.

        class_term = mean over (L, B, M) of |A1[0, patch] - A2[0, permuted patch]|
        patch_term = mean over (L, B, M, M) of |A1[patch, patch] - A2[permuted patch, permuted patch]|

    ACR (arXiv 2308.04321) calls them region activation and region affinity consistency and adds both to the
    loss, times 100 in the published code. Differentiable, once, in all four; where the attention of both
    views is equal the gradient is 0. Computed and returned in float32, or float64 for float64 inputs; same
    result under autocast. The same bits on every run.
    In PyTorch forward holds 2^23 numbers of attention and the gradients, the size of the inputs; Triton holds
    a byte for each of L B (1 + M) M entries instead of the gradients, and "auto" takes PyTorch for float64.
    Raises ValueError for other shapes, types or devices than these, empty inputs, what is no permutation, and
    for "triton" where it cannot serve.
    """
    views = [_layers(name, x) for name, x in zip(NAMES, (q1, k1, q2, k2))]
    layers = _check(views, permutation, num_prefix_tokens)  # (q1, k1, q2, k2) of each block
    first, patches = layers[0][0], len(permutation)
    permutation, grad_enabled = permutation.to(first.device), torch.is_grad_enabled()
    with torch.autocast(first.device.type, enabled=False):
        if _choose(backend, first) == "triton":
            from .attention_consistency_triton import ConsistencySums

            tensors = itertools.chain.from_iterable(layers)
            sums = ConsistencySums.apply(permutation, num_prefix_tokens, grad_enabled, *tensors)
        else:
            order = torch.arange(num_prefix_tokens, device=first.device)
            order = torch.cat([order, permutation + num_prefix_tokens])  # (N,)
            blocks = [_BlockSums.apply(order, num_prefix_tokens, grad_enabled, *layer) for layer in layers]
            sums = [torch.stack(terms).sum() for terms in zip(*blocks)]
        count = len(layers) * len(first) * patches  # L B M
        return sums[0] / count, sums[1] / (count * patches)


def _layers(name: str, tensors: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(L, B, H, N, d), or L tensors (B, H, N, d) -> the latter."""
    if isinstance(tensors, Tensor):
        if tensors.ndim != 5:
            expected = "(L, B, H, N, d) or a sequence of (B, H, N, d)"
            raise ValueError(f"{name}: found shape {tuple(tensors.shape)}, expected {expected}")
        return tensors.unbind()
    return tuple(tensors)


def _check(
    views: list[tuple[Tensor, ...]], permutation: Tensor, num_prefix_tokens: int
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The blocks, each (q1, k1, q2, k2)."""
    lengths = [len(view) for view in views]
    if min(lengths) != max(lengths) or not lengths[0]:
        found = ", ".join(map(str, lengths))
        raise ValueError(f"q1, k1, q2, k2: found {found} blocks, expected the same number, at least one")
    layers = list(zip(*views))
    first = layers[0][0]
    if first.ndim != 4 or 0 in first.shape:
        raise ValueError(f"q1: found blocks {tuple(first.shape)}, expected (B, H, N, d), none of them zero")
    if not first.is_floating_point():
        raise ValueError(f"q1: found {first.dtype}, expected floating point")
    for layer in layers:
        for name, tensor in zip(NAMES, layer):
            if (tensor.shape, tensor.dtype, tensor.device) != (first.shape, first.dtype, first.device):
                found = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
                expected = f"{tuple(first.shape)} {first.dtype} on {first.device}, as the first block of q1"
                raise ValueError(f"{name}: found {found}, expected {expected}")
    tokens = first.shape[2]
    if isinstance(num_prefix_tokens, bool) or not 1 <= num_prefix_tokens < tokens:
        expected = f"the class token at least, and a patch left of {tokens} tokens"
        raise ValueError(f"num_prefix_tokens: found {num_prefix_tokens}, expected {expected}")
    patches = tokens - num_prefix_tokens
    if permutation.shape != (patches,) or permutation.dtype != torch.long:
        found = f"{permutation.dtype} of shape {tuple(permutation.shape)}"
        raise ValueError(f"permutation: found {found}, expected torch.int64 of shape ({patches},)")
    if not torch.equal(permutation.sort().values, torch.arange(patches, device=permutation.device)):
        raise ValueError(f"permutation: found some patches twice, expected each of 0..{patches - 1} once")
    return layers


def _choose(backend: str, tensor: Tensor) -> str:
    """`choose_backend`, and PyTorch for float64."""
    chosen = choose_backend(backend, tensor, uses_dot=True)
    if chosen == "torch" or tensor.dtype != torch.float64:
        return chosen
    if backend == "triton":
        raise ValueError('backend: found "triton" with float64, expected "torch" or "auto" for that')
    return "torch"


class _BlockSums(torch.autograd.Function):
    """Sums of |D| of one block over its pictures, (class row, patch rows), and their gradients on the way."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, order: Tensor, prefix: int, grad_enabled: bool, *layer: Tensor
    ) -> tuple[Tensor, Tensor]:
        needs = ctx.needs_input_grad[3:]
        ctx.wanted = [grad_enabled and any(needs[:2]), grad_enabled and any(needs[2:])]
        ctx.prefix, ctx.dtype, sums, grads = prefix, layer[0].dtype, [], []
        ctx.orders = torch.arange(len(order), device=order.device), order
        for q1, k1, q2, k2 in zip(*layer):  # one picture: (H, N, d)
            views = [_View(*view, prefix) for view in zip((q1, q2), (k1, k2), ctx.orders, ctx.wanted)]
            sums.append(_compare(views, prefix))
            grads.append([grad for view in views if view.wanted for grad in view.gradients()])
        ctx.save_for_backward(*(torch.stack(grad) for grad in zip(*grads)))  # over the pictures
        rows = torch.stack(sums).sum(0)  # (B, 1 + M) -> (1 + M,)
        return rows[0], rows[1:].sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_class: Tensor, d_patch: Tensor) -> tuple[Tensor | None, ...]:
        saved, out = iter(ctx.saved_tensors), []
        for wanted, keys in zip(ctx.wanted, ctx.orders):
            if not wanted:
                out += [None, None]
                continue
            d_q, d_k, class_d_scores, class_q = (next(saved) for _ in range(4))
            queries = _queries(keys, ctx.prefix)
            weight = d_patch.repeat(len(queries), 1)  # (1 + M, 1)
            weight[0] = d_class
            # (B, H, d, N), the class row's share an outer product: (B, H, d, 1) * (B, H, 1, N)
            d_k = (d_k * d_patch).addcmul_(class_q[..., None] * d_class, class_d_scores[:, :, None])
            shape = *d_k.shape[:2], len(keys), d_k.shape[2]  # (B, H, N, d)
            out.append(d_q.new_zeros(shape).index_copy_(2, queries, d_q * weight).to(ctx.dtype))
            out.append(d_k.new_empty(shape).index_copy_(2, keys, d_k.transpose(2, 3)).to(ctx.dtype))
        return None, None, None, *out


def _queries(tokens: Tensor, prefix: int) -> Tensor:
    """The tokens whose rows are compared, token 0 and the patches: (N,) -> (1 + M,)."""
    return torch.cat([tokens[:1], tokens[prefix:]])


def _compare(views: list[_View], prefix: int) -> Tensor:
    """sum |D| of each query over the patches, (1 + M,); the views keep the gradients."""
    heads, queries, tokens = views[0].heads, views[0].q.shape[1], views[0].k.shape[1]
    blocks = math.ceil(len(views) * heads * queries * tokens / SCRATCH)
    blocks = min(blocks, queries // 2)  # the first has a patch beside the class token
    edges = [block * queries // blocks for block in range(blocks + 1)]
    return torch.cat([_compare_rows(views, slice(*pair), prefix) for pair in itertools.pairwise(edges)])


def _compare_rows(views: list[_View], rows: slice, prefix: int) -> Tensor:
    (maps1, total1), (maps2, total2) = (view.attention(rows) for view in views)
    difference = total1.sub_(total2).div_(views[0].heads)  # D, (rows, N)
    difference[:, :prefix] = 0
    sums = difference.abs().sum(1)
    gradient = difference.sign_().div_(views[0].heads)
    views[0].differentiate(maps1, gradient, rows)
    views[1].differentiate(maps2, gradient.neg_(), rows)
    return sums


class _View:
    """One view of one picture, in the order of view 1: all keys, the queries of token 0 and the patches."""

    def __init__(self, q: Tensor, k: Tensor, order: Tensor, wanted: bool, prefix: int) -> None:
        dtype = torch.promote_types(q.dtype, torch.float32)
        self.heads, self.scale, self.wanted = len(q), q.shape[-1] ** -0.5, wanted
        self.k = k.index_select(1, order).to(dtype)  # (H, N, d)
        queries = _queries(order, prefix)
        self.q = q.index_select(1, queries).to(dtype).mul_(self.scale * LOG2E)  # (H, 1 + M, d)
        on_cpu = q.device.type == "cpu"  # elsewhere looking at numbers would cost a synchronisation
        longest = [torch.linalg.vector_norm(x, dim=-1).amax(-1) for x in (self.q, self.k)]
        self.may_overflow = not on_cpu or bool((longest[0] * longest[1] > SAFE_EXPONENT).any())
        size = 1 if on_cpu else self.heads  # one head stays in the core's cache; a GPU wants large launches
        self.groups = [slice(head, head + size) for head in range(0, self.heads, size)]
        if wanted:
            self.d_q = torch.empty_like(self.q)
            self.d_k = self.k.new_zeros(self.k.transpose(1, 2).shape)  # (H, d, N)

    def attention(self, rows: slice) -> tuple[list[Tensor], Tensor]:
        """A of some queries, (heads, rows, N) for each group of heads, and its sum over all, (rows, N)."""
        maps, total = [], self.q.new_zeros(rows.stop - rows.start, self.k.shape[1])
        for group in self.groups:
            a = multiply_transposed(self.q[group, rows], self.k[group])  # scores; from here on in place
            if self.may_overflow:
                a.sub_(a.amax(-1, keepdim=True))
            a.exp2_()
            a.mul_(a.sum(-1, keepdim=True).reciprocal_())
            total += a[0] if len(a) == 1 else a.sum(0)
            maps.append(a)
        return maps, total

    def differentiate(self, maps: list[Tensor], gradient: Tensor, rows: slice) -> None:
        """What dS = A * (G - rowsum(A * G)) adds to dq and dk; maps: A, overwritten; G (rows, N)."""
        if not self.wanted:
            return
        first = 1 if rows.start == 0 else 0  # the class row's share of dk waits for its own incoming gradient
        for group, a in zip(self.groups, maps):
            q, k = self.q[group, rows], self.k[group]
            torch.ops.aten._softmax_backward_data.out(gradient.expand_as(a), a, -1, a.dtype, grad_input=a)
            self.d_q[group, rows].copy_(multiply_transposed(a, k.transpose(1, 2)))
            q_t, a_t = q[:, first:].transpose(1, 2), a[:, first:].transpose(1, 2)
            self.d_k[group].add_(multiply_transposed(q_t, a_t))  # (H, d, N): faster than its transpose
        if first:
            self.class_d_scores = torch.cat([a[:, 0] for a in maps])

    def gradients(self) -> tuple[Tensor, ...]:
        """dq (H, 1 + M, d), row 0 of the class sum and the others of the patch sum; dk (H, d, N) of the patch
        sum; and what the class sum's dk is made of: dS (H, N) of the class row, and its scaled q (H, d)."""
        class_q = self.q[:, 0] / LOG2E
        return self.d_q.mul_(self.scale), self.d_k.div_(LOG2E), self.class_d_scores, class_q
