"""The attention tape: what a vision transformer attends to, recorded and not materialised.

The class-token row of an attention map A = softmax(s q k^T) is softmax(s q_cls k^T): N numbers, not N x N.
Its gradient is exact without A as well: o_cls = sum_j A[cls, j] v_j, so dy/dA[cls, j] = <dy/do_cls, v_j>.
So q, k, v and the output o of every head are all one needs, and each ViT of timm hands them to one function,
`torch.nn.functional.scaled_dot_product_attention`. The tape watches that function: no model is patched,
fused attention stays on, and no N x N matrix is made or kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True, eq=False)
class AttentionBlock:
    """One recorded call of attention: H heads, N tokens of dimension d (other numbers of keys are fine)."""

    q: Tensor  # (B, H, N, d); where the model rotates queries and keys (RoPE), the rotated ones
    k: Tensor  # (B, H, N, d)
    v: Tensor  # (B, H, N, d)
    out: Tensor  # (B, H, N, d), softmax(scale q k^T + mask) v
    scale: float
    mask: Tensor | None = None  # broadcasts to (B, H, N, N); bool: True takes part; float: added to scores
    is_causal: bool = False
    dropout: float = 0.0

    def row(self, token: int = 0) -> Tensor:
        """Attention of one query token, by default the class token: (B, H, N), rows that sum to 1."""
        return self._attention(slice(token, token + 1))[:, :, 0]  # (B, H, 1, N) -> (B, H, N)

    def map(self) -> Tensor:
        """The whole attention map, materialised: (B, H, N, N)."""
        return self._attention(slice(0, self.q.shape[2]))

    def _attention(self, queries: slice) -> Tensor:
        """Attention of some query tokens, (B, H, n, N), without dropout; float32 or better, always."""
        with torch.autocast(self.q.device.type, enabled=False):
            q, k = at_least_float32(self.q[:, :, queries]), at_least_float32(self.k)
            scores = q @ k.transpose(-2, -1) * self.scale  # (B, H, n, d) @ (B, H, d, N) -> (B, H, n, N)
            mask = self.mask
            if self.is_causal:  # query i sees keys 0..i
                mask = torch.ones(self.q.shape[2], k.shape[2], dtype=torch.bool, device=k.device).tril()
            if mask is not None:
                mask = mask.expand(*mask.shape[:-2], self.q.shape[2], k.shape[2])[..., queries, :]
                hides = mask.dtype == torch.bool
                scores = scores.masked_fill(~mask, -torch.inf) if hides else scores + mask.to(scores.dtype)
            return scores.softmax(dim=-1)


class AttentionTape(TorchFunctionMode):
    """Records the attention of one forward pass: `with AttentionTape() as tape: logits = model(images)`.

    start_layer: earlier calls are not kept; `blocks[0]` is then call `start_layer`.
    detach: keep detached tensors, without the graph; `class_row_gradients` is then not available.

    A call of attention is a block, in the order of the calls; in a ViT, one per block of the network. Where a
    gradient is wanted (not `detach`, gradients enabled) but nothing before requires one, because the weights
    are frozen, the graph starts at the first recorded output, and the layers below cost no memory.
    Models of `torch.compile` run uncompiled under the tape: compiled, their inner tensors are out of reach.
    Entering a tape again begins a new recording; the old one is dropped.

    Raises ValueError, inside the `with`, for attention that is not (B, H, N, d) with as many key as query
    heads; RuntimeError where the tape is entered twice at once and, when read, where nothing was recorded.
    """

    def __init__(self, start_layer: int = 0, detach: bool = False) -> None:
        super().__init__()
        if isinstance(start_layer, bool) or not isinstance(start_layer, int) or start_layer < 0:
            raise ValueError(f"start_layer: found {start_layer}, expected a whole number >= 0")
        self.start_layer, self.detach = start_layer, detach
        self._calls, self._blocks = 0, []
        self._eager = None

    def __enter__(self) -> AttentionTape:
        if self._eager is not None:
            raise RuntimeError("AttentionTape: found a tape that is recording already, expected another one")
        self._calls, self._blocks = 0, []
        self._eager = torch.compiler.set_stance("force_eager")
        self._eager.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._eager.__exit__(*error)
        self._eager = None

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            if self._calls >= self.start_layer:
                self._record(out, *args, **kwargs)
            self._calls += 1
        return out

    def _record(
        self,
        out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        if query.ndim != 4 or key.shape[:2] != query.shape[:2]:
            found = f"queries {tuple(query.shape)} and keys {tuple(key.shape)}"
            raise ValueError(f"attention: found {found}, expected (B, H, N, d) and a key for each query head")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        tensors = (query, key, value, out)
        if self.detach:
            tensors = tuple(tensor.detach() for tensor in tensors)
        elif torch.is_grad_enabled() and not out.requires_grad:
            out.requires_grad_()  # a leaf: the graph begins here
        self._blocks.append(AttentionBlock(*tensors, scale, attn_mask, is_causal, dropout_p))

    @property
    def blocks(self) -> list[AttentionBlock]:
        """What was recorded, from `start_layer` on. RuntimeError where that is nothing."""
        if not self._blocks:
            raise RuntimeError(
                f"AttentionTape: found {self._calls} calls of scaled_dot_product_attention, expected more "
                f"than start_layer = {self.start_layer}; run the model inside the `with`, with fused "
                "attention on (see fused_attention), not scripted and in this thread"
            )
        return self._blocks

    def class_rows(self) -> Tensor:
        """Attention of the class token (token 0) in each block: (L, B, H, N), float32 or better."""
        return torch.stack([block.row() for block in self.blocks])

    def maps(self, block: int) -> Tensor:
        """Attention of one block, materialised: (B, H, N, N). For pictures: the rest does without.

        block: an index into `blocks`."""
        return self.blocks[block].map()

    def class_row_gradients(
        self, logits: Tensor, slots: tuple[Tensor, Tensor], retain_graph: bool = False
    ) -> Tensor:
        """Gradient of class logits to the class token's row of attention: (K, L, B, H, N), float32 or better.

        logits (B, C), of the pass that was recorded. slots: index long (B, K) and valid bool (B, K), as of
        `class_slots`: entry k is the gradient of each image's own logit `index[b, k]`, all images in one
        backward pass; zero where not valid. The row is meant as an input of its own: how it depends on q and
        k plays no part. Parameters' `.grad` are left alone. retain_graph: keep the graph for more backwards.

        Raises ValueError for attention with dropout (then o is not A v), logits that do not depend on the
        recorded attention, and other shapes; RuntimeError for a tape with detach, or made without gradients.
        """
        (index, valid), outs = slots, [block.out for block in self.blocks]
        self._check_gradients(logits, index, valid)
        gradients = []
        for k in range(index.shape[1]):
            chosen = logits.gather(1, index[:, k : k + 1])[:, 0]  # (B, C) -> (B,)
            keep = retain_graph or k + 1 < index.shape[1]
            weight = valid[:, k].to(chosen.dtype)
            d_outs = torch.autograd.grad(chosen, outs, weight, retain_graph=keep, allow_unused=True)
            unused = [block for block, d_out in enumerate(d_outs) if d_out is None]
            if unused:
                raise ValueError(f"logits: found none that depend on blocks {unused}, expected this pass's")
            rows = [_row_gradient(block, d_out) for block, d_out in zip(self.blocks, d_outs)]
            gradients.append(torch.stack(rows))
        rows = self.blocks[0].k.shape[:3]  # (B, H, N), for no slots at all
        empty = logits.new_zeros(0, len(outs), *rows, dtype=torch.promote_types(logits.dtype, torch.float32))
        return torch.stack(gradients) if gradients else empty

    def _check_gradients(self, logits: Tensor, index: Tensor, valid: Tensor) -> None:
        if self.detach:
            raise RuntimeError("AttentionTape: found detach=True, expected a tape that keeps the graph")
        if not logits.requires_grad:
            raise RuntimeError("logits: found none with a graph, expected gradients to be enabled")
        if logits.ndim != 2 or index.shape != valid.shape or len(index) != len(logits):
            found = f"{tuple(logits.shape)}, {tuple(index.shape)} and {tuple(valid.shape)}"
            raise ValueError(f"logits, slots: found shapes {found}, expected (B, C), (B, K) and (B, K)")
        dropout = max(block.dropout for block in self.blocks)
        if dropout > 0:
            raise ValueError(f"attention: found dropout {dropout}, expected none: call model.eval()")


@torch.no_grad()
def _row_gradient(block: AttentionBlock, d_out: Tensor) -> Tensor:
    """dy/dA[cls, j] = <dy/do_cls, v_j>: (B, H, N), for d_out = dy/do (B, H, N, d)."""
    with torch.autocast(d_out.device.type, enabled=False):
        d_class = at_least_float32(d_out[:, :, 0]).unsqueeze(-1)  # (B, H, N, d) -> (B, H, d, 1)
        return (at_least_float32(block.v) @ d_class)[..., 0]  # (B, H, N, d) @ (B, H, d, 1) -> (B, H, N)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision -> float32; float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def fused_attention(model: nn.Module) -> AbstractContextManager[None]:
    """A context in which timm's attention modules call the fused function, so that a tape sees them.

    They have a flag, `fused_attn`; where it is off the module writes out the N x N product instead.
    """
    return module_flags(model, fused_attn=True)


@contextmanager
def module_flags(model: nn.Module, **flags: bool) -> Iterator[None]:
    """Give these boolean attributes of the model's modules, where they exist, other values for a while."""
    changed = [
        (module, name, value)
        for module in model.modules()
        for name, value in flags.items()
        if getattr(module, name, value) is not value
    ]
    for module, name, value in changed:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, not value)
