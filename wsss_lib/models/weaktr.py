"""WeakTr's network: a ViT with one token per class, and attention maps weighed head by head.

Source: WeakTr, Zhu et al. 2023 (arXiv 2304.01184), section 3. A 3x3 convolution on the patches gives a coarse
class activation map. Attention makes it fine: with the fused map F = mean_m w_m A_m over the M heads of all
blocks, X its class-token rows and P its patch rows (both at the patch columns),

    fused = X * relu(coarse),   fine = P @ fused.

The weights w are learned, from the heads' own outputs. F is N x N and the A_m are M times that; none of them
is ever made: X needs C rows of each map, and `kernels.propagate` applies P by blocks of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.attention_sum import propagate, weighted_attention_sum
from .attention import AttentionBlock, AttentionTape, at_least_float32, fused_attention
from .class_tokens import expand_class_tokens, repeat_stored_class_token, resize_positions_as_published
from .getam import block_outputs, outputs_of
from .network import Network
from .vit import token_grid

POOLS = ("max", "avg")


class WeakTrOutput(NamedTuple):
    """What `WeakTr.forward_predictions` returns; the three logits are what its losses are on."""

    class_logits: Tensor  # (B, C), mean over channels of each class token
    coarse_logits: Tensor  # (B, C), mean of the coarse map
    fine_logits: Tensor  # (B, C), mean of the fine map; only the fusion learns from it
    coarse_cam: Tensor  # (B, C, h, w), of either sign
    fused_cam: Tensor  # (B, C, h, w), class token's attention times relu(coarse), >= 0
    fine_cam: Tensor  # (B, C, h, w), patch attention @ fused, >= 0
    head_weights: Tensor  # (B, L, H), of each block's heads


class AdaptiveAttentionFusion(nn.Module):
    """One weight in (0, 1) for each head of each block, from the features of all of them.

    A head's features are pooled over the tokens and described by one number (head_dim -> head_dim / 8 -> 1,
    no activation between), then all heads' numbers are seen together (M -> M / reduction -> M, ReLU,
    sigmoid). depth L, num_heads H, head_dim d of the backbone; M = L H. pool: "max" or "avg".
    feature_reduction: the 8 above.
    Where a picture turns all of the M / reduction ReLUs off, every weight is 1/2 and learns nothing. DeiT-S
    has 9 of them; toyvit has 3 for reduction=8 (off at the start for 11% of pictures, over 200 seeds), and 12
    for reduction=2 (0.4%). Raises ValueError for another pool and reductions below 1.
    """

    def __init__(
        self,
        depth: int,
        num_heads: int,
        head_dim: int,
        pool: str = "max",
        reduction: int = 8,
        feature_reduction: int = 8,
    ) -> None:
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"pool: found {pool!r}, expected one of {', '.join(POOLS)}")
        if min(reduction, feature_reduction) < 1:
            found = f"{reduction}, {feature_reduction}"
            raise ValueError(f"reduction, feature_reduction: found {found}, expected at least 1")
        self.pool, self.depth, self.num_heads = pool, depth, num_heads
        maps = depth * num_heads
        hidden, described = max(1, maps // reduction), max(1, head_dim // feature_reduction)
        self.describe = nn.Sequential(nn.Linear(head_dim, described), nn.Linear(described, 1))
        self.weigh = nn.Sequential(
            nn.Linear(maps, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, maps, bias=False), nn.Sigmoid())

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Each block's per-head features, L of (B, H, N, d) -> weights (B, L, H)."""
        pooled = [f.amax(dim=2) if self.pool == "max" else f.mean(dim=2) for f in features]
        pooled = torch.stack(pooled, dim=2)  # L of (B, H, d) -> (B, H, L, d)
        scores = self.describe(pooled)  # (B, H, L, 1)
        weights = self.weigh(scores.flatten(1))  # -> (B, H*L), the blocks of one head side by side
        return weights.unflatten(1, (self.num_heads, self.depth)).transpose(1, 2)  # -> (B, H, L) -> (B, L, H)


class WeakTr(Network):
    """Multi-label classifier on a timm ViT with a token per class, whose maps attention makes fine.

    backbone: as of `create_backbone`, or its name; it must have a class token. It is changed in place
    (`expand_class_tokens`): the class token and its position become C copies, which come apart in training
    because each is read by its own class's logit. num_classes: C, without background. pool, reduction,
    feature_reduction: of `AdaptiveAttentionFusion`. Distillation and register tokens stay, after the class
    tokens: they take part in attention and in the pooled features, but nothing is read from them and the maps
    leave them out.

    The tokens are read before the final norm: it would take the mean over channels, which is the class
    logit, out of them. So the backbone's final norm is frozen.

    published: True computes what the published code does, on ViT and DeiT. There the fusion sees what
    attention's projection puts out, cut into heads with the head as the fastest axis; but the projection has
    mixed the heads, and in any order its channels are no head's. Here it sees the output of each head itself.
    And there positions are resized by a scale factor (h + 0.1) / h0 that is a little off; here by timm.

    Attributes: those of `Network` (num_prefix_tokens counts the C class tokens and the others), fusion,
    coarse_head and published. Raises ValueError for a backbone without exactly one class token, wrong numbers and
    as `create_backbone`.
    """

    def __init__(
        self,
        backbone: nn.Module | str = "toyvit",
        num_classes: int = 20,
        pool: str = "max",
        reduction: int = 8,
        feature_reduction: int = 8,
        published: bool = False,
    ) -> None:
        super().__init__(backbone, num_classes)
        expand_class_tokens(self.backbone, num_classes)
        for name in ("norm", "fc_norm"):  # never applied: a parameter that gets no gradient would stop DDP
            getattr(self.backbone, name, nn.Identity()).requires_grad_(False)
        if published:
            resize_positions_as_published(self.backbone)
        self.published = published
        dim, blocks = self.backbone.embed_dim, self.backbone.blocks
        heads = blocks[0].attn.num_heads
        head_dim = dim // heads if published else blocks[0].attn.head_dim
        self.coarse_head = nn.Conv2d(dim, num_classes, 3, padding=1)
        self.fusion = AdaptiveAttentionFusion(
            len(blocks), heads, head_dim, pool, reduction, feature_reduction)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised -> class logits (B, C), of the class tokens alone.

        ValueError for images whose sides are no multiples of the patch stride."""
        return class_logits(self._tokens(images)[0])

    def coarse_cam(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised -> the coarse map (B, C, h, w), of either sign."""
        return self.coarse_head(self._tokens(images)[1])

    def forward_predictions(self, images: Tensor, head_weights: Tensor | None = None) -> WeakTrOutput:
        """Images (B, 3, H, W), normalised -> WeakTrOutput. Raises as `forward`.

        head_weights: any that broadcast to (B, L, H), instead of those that the fusion finds.
        Attention maps, features and coarse map are detached before the fusion: class and coarse logits train
        the backbone, the fine logits the fusion only. Maps and weights are float32 or better.

        Beside what the backbone keeps this holds q and k once more, C rows of each attention map (in
        inference of one block's maps at a time) and two tiles of `kernels.propagate`. For one image of
        480x480, DeiT-S and C = 20 (N = 920, M = 72) that is 8.5, 1.3 and at most 0.5 million numbers; all the
        maps would be 61.
        """
        tokens, patches, blocks, weights = self._record(images, head_weights)
        coarse = self.coarse_head(patches)
        fused, fine = self._fuse(blocks, weights, at_least_float32(coarse.detach()).relu())
        return WeakTrOutput(class_logits(tokens), coarse.mean(dim=(2, 3)), fine.mean(dim=(2, 3)),
                            coarse, fused, fine, weights)

    def attention_map(self, images: Tensor, head_weights: Tensor | None = None) -> Tensor:
        """F = mean_m w_m A_m, materialised: (B, N, N), prefix tokens first. For figures: the maps need none.

        Arguments as of `forward_predictions`."""
        *_, blocks, weights = self._record(images, head_weights)
        q, k = stack_heads(blocks)
        return weighted_attention_sum(q, k, weights.flatten(1) / q.shape[1], blocks[0].scale)

    def adapt_weights(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a model with one class token -> the same with C copies of it; others as they are."""
        return repeat_stored_class_token(stored, "backbone.", self.num_classes, self.backbone)

    def _record(
        self, images: Tensor, head_weights: Tensor | None
    ) -> tuple[Tensor, Tensor, list[AttentionBlock], Tensor]:
        """`_tokens`, attention of all blocks, detached, and the weights of its heads (B, L, H)."""
        backbone, fusion = self.backbone, self.fusion
        modules = [block.attn for block in backbone.blocks] if self.published else []
        with fused_attention(backbone), AttentionTape(detach=True) as tape, outputs_of(modules) as outputs:
            tokens, patches = self._tokens(images)
        check_attention(tape.blocks, fusion.depth)
        if head_weights is None:
            published = [split_heads_as_published(output.detach(), fusion.num_heads) for output in outputs]
            head_weights = fusion(published or [block.out for block in tape.blocks])
        weights = at_least_float32(head_weights).expand(len(images), fusion.depth, fusion.num_heads)
        return tokens, patches, tape.blocks, weights

    def _tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The last block's class tokens (B, C, D) and patches (B, D, h, w), before the final norm."""
        grid = token_grid(self.backbone, images)
        ((patches, prefix),) = block_outputs(self.backbone, images, [len(self.backbone.blocks) - 1])
        # (B, h*w, D) -> (B, D, h*w) -> (B, D, h, w)
        return prefix[:, : self.num_classes], patches.transpose(1, 2).unflatten(2, grid)

    def _fuse(self, blocks: list[AttentionBlock], weights: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (B, L, H), relu(coarse) (B, C, h, w) -> fused and fine map, both (B, C, h, w)."""
        prefix, grid = self.num_prefix_tokens, coarse.shape[2:]
        with torch.autocast(coarse.device.type, enabled=False):
            q, k = stack_heads(blocks)
            weights = weights / q.shape[1]  # of the mean
            rows = class_token_rows(blocks, weights, self.num_classes)
            fused = rows[..., prefix:].unflatten(2, grid) * coarse  # (B, C, P + h*w) -> (B, C, h, w)
            # (B, C, h, w) -> (B, h*w, C) -> (B, P + h*w, C), zero at the prefix tokens: they pass nothing on
            values = F.pad(fused.flatten(2).transpose(1, 2), (0, 0, prefix, 0))
            fine = propagate(q, k, weights.flatten(1), values, blocks[0].scale)[:, prefix:]
        return fused, fine.transpose(1, 2).unflatten(2, grid)  # (B, h*w, C) -> (B, C, h*w) -> (B, C, h, w)


def class_logits(tokens: Tensor) -> Tensor:
    """Class tokens (B, C, D) -> (B, C): each is its own classifier, by the mean over its channels."""
    return tokens.mean(dim=-1)


def stack_heads(blocks: Sequence[AttentionBlock]) -> tuple[Tensor, Tensor]:
    """q and k of L blocks, (B, H, N, d) each -> both (B, L*H, N, d)."""
    return torch.cat([block.q for block in blocks], dim=1), torch.cat([block.k for block in blocks], dim=1)


def class_token_rows(blocks: Sequence[AttentionBlock], weights: Tensor, count: int) -> Tensor:
    """The first `count` rows of sum_m w_m A_m, for weights (B, L, H): (B, count, N)."""
    total = 0
    for block, weight in zip(blocks, weights.unbind(1)):
        rows = replace(block, q=block.q[:, :, :count]).map()  # (B, H, count, N)
        total = total + torch.einsum("bh,bhcn->bcn", weight.to(rows.dtype), rows)
    return total


def check_attention(blocks: Sequence[AttentionBlock], depth: int) -> None:
    """ValueError unless there is one call of attention per block, unmasked, all of one shape and scale."""
    found = {(tuple(block.k.shape), block.scale, block.mask is None) for block in blocks}
    if len(blocks) != depth or len(found) != 1 or not next(iter(found))[2]:
        raise ValueError(f"backbone: found {len(blocks)} calls of attention with (shape of k, scale, "
                         f"unmasked) {sorted(found)}, expected {depth} alike, without a mask")


def split_heads_as_published(features: Tensor, num_heads: int) -> Tensor:
    """What attention puts out, (B, N, d*H) -> (B, H, N, d), the head as the fastest axis."""
    return features.unflatten(2, (-1, num_heads)).permute(0, 3, 1, 2)
