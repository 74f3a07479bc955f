"""The classifier that class activation maps are read from: a ViT with two linear heads.

Sources: CAM, Zhou et al. 2016 (arXiv 1512.04150); patches pooled from the top, Durand et al. 2016 (WELDON).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from .network import Network
from .vit import forward_tokens, num_class_tokens, split_tokens, token_grid

PATCH_PRIOR = 0.01  # how often a patch shows a given class, before anything is known


class CamOutput(NamedTuple):
    """What `CamViT.forward_heads` returns."""

    class_logits: Tensor  # (B, C), from the class token
    patch_logits: Tensor  # (B, C, h, w), w_c . f_j + b_c: is class c at patch j?
    pooled: Tensor  # (B, C), the patch logits pooled over the picture
    features: Tensor  # (B, D, h, w), what the patch head reads: after the final norm


class CamViT(Network):
    """Multi-label classifier on a timm ViT: one head on the class token, one on every patch token.

    backbone: as of `create_backbone`, or its name. num_classes: C, without background.
    pool: the share of an image's patch logits, or (int) their number, that is averaged from the top. 1.0 is
    global average pooling, the classic CAM; it asks all of the picture to look like the object. The default,
    12 of the toy backbone's 196 tokens, asks that of a part.

    Where the backbone has no class token the pooled patch logits stand in for the class token's.
    Attributes: those of `Network`, and pool.
    Raises ValueError for a pool out of range and as `create_backbone`.
    """

    def __init__(
        self, backbone: nn.Module | str = "toyvit", num_classes: int = 20, pool: int | float = 12 / 196
    ) -> None:
        super().__init__(backbone, num_classes)
        in_range = pool >= 1 if isinstance(pool, int) else 0 < pool <= 1
        if isinstance(pool, bool) or not in_range:
            raise ValueError(f"pool: found {pool}, expected a share in (0, 1] or a whole number >= 1")
        self.pool = pool
        self.num_class_tokens = num_class_tokens(self.backbone)
        dim = self.backbone.embed_dim
        self.class_head = nn.Linear(dim, num_classes) if self.num_class_tokens else None
        self.patch_head = nn.Linear(dim, num_classes)
        self.reset_heads()

    def reset_heads(self) -> None:
        """Give both heads new random weights: the classes are forgotten, the backbone is not.

        The patch head's bias starts at the logit of PATCH_PRIOR (Lin et al. 2017, arXiv 1708.02002, section 4.1): a
        patch shows a given class rarely, and the bias says so before anything is learned. The activation map leaves
        the bias out, so it is positive where a patch is likelier to show the class than the bias alone would say.
        """
        if self.class_head is not None:
            self.class_head.reset_parameters()
        self.patch_head.reset_parameters()
        nn.init.constant_(self.patch_head.bias, math.log(PATCH_PRIOR / (1 - PATCH_PRIOR)))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised -> logits (B, C), the mean of both heads'.

        ValueError for images whose sides are no multiples of the patch stride."""
        heads = self.forward_heads(images)
        return (heads.class_logits + heads.pooled) / 2

    def forward_heads(self, images: Tensor) -> CamOutput:
        """Images (B, 3, H, W), normalised -> CamOutput. Raises as `forward`."""
        grid = token_grid(self.backbone, images)
        tokens = forward_tokens(self.backbone, images)
        prefix, features = split_tokens(tokens, self.num_prefix_tokens, grid)
        patch_logits = self.patch_logits(features)
        pooled = self.pool_logits(patch_logits)
        class_logits = pooled
        if self.class_head is not None:
            # class and distillation token come first, registers (which stand for nothing) after them
            class_logits = self.class_head(prefix[:, : self.num_class_tokens].mean(dim=1))  # (B, D) -> (B, C)
        return CamOutput(class_logits, patch_logits, pooled, features)

    def activation_maps(self, features: Tensor) -> Tensor:
        """Features (B, D, h, w) -> w_c . f_j, the evidence of patch j for class c, without the bias: (B, C, h, w)."""
        return F.linear(features.movedim(1, -1), self.patch_head.weight).movedim(-1, 1)

    def patch_logits(self, features: Tensor) -> Tensor:
        """Features (B, D, h, w) -> w_c . f_j + b_c, (B, C, h, w)."""
        return self.patch_head(features.movedim(1, -1)).movedim(-1, 1)

    def pool_logits(self, patch_logits: Tensor) -> Tensor:
        """Patch logits (B, C, h, w) -> (B, C), the mean of the highest. ValueError where pool is a number
        of patches that is more than there are."""
        logits = patch_logits.flatten(2)  # (B, C, h, w) -> (B, C, h*w)
        patches = logits.shape[-1]
        top = self.pool if isinstance(self.pool, int) else max(1, round(self.pool * patches))
        if top > patches:
            raise ValueError(f"pool: found {top} patches, expected at most the {patches} of these images")
        return logits.mean(-1) if top == patches else logits.topk(top, dim=-1).values.mean(-1)
