"""ACR's network: a ViT whose class token and patches share one linear classifier.

Source: ACR, Sun et al. 2023 (arXiv 2308.04321), section 3. The network is plain; what ACR adds is in the loss
(`training.consistency`) and in the maps (`localization.acr`), both read off the attention.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .cam import CamOutput
from .getam import as_published, block_outputs
from .network import Network
from .vit import num_class_tokens, token_grid


class AcrViT(Network):
    """Multi-label classifier on a timm ViT with a class token: one linear head for it and for the patches.

    backbone: as of `create_backbone`, or its name. num_classes: C, without background.
    published: True computes what the published code does: `as_published` on the backbone, in place; a
    distillation token that counts as a patch where the patch logits are averaged; `cam` with the bias.

    Both readings are of the last block's output, without the final norm. The image's class is the class
    token's; distillation token and registers are in no logit.

    Attributes: those of `Network`, and published.
    Raises ValueError for a backbone without a class token, no classes and as `create_backbone`.
    """

    def __init__(
        self, backbone: nn.Module | str = "toyvit", num_classes: int = 20, published: bool = False
    ) -> None:
        super().__init__(backbone, num_classes)
        if not num_class_tokens(self.backbone):
            raise ValueError("backbone: found no class token, expected one: the logits are read off it")
        self.published = published
        if published:
            as_published(self.backbone)
        self.classifier = nn.Linear(self.backbone.embed_dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised -> the class token's logits (B, C).

        ValueError for images whose sides are no multiples of the patch stride."""
        _, prefix = self._tokens(images)
        return self.classifier(prefix[:, 0])  # (B, P, D) -> (B, D) -> (B, C)

    def forward_heads(self, images: Tensor) -> CamOutput:
        """Images (B, 3, H, W), normalised -> CamOutput: features without the final norm, pooled the mean of
        the patch logits. Raises as `forward`."""
        patches, prefix = self._tokens(images)
        # (B, h*w, D) -> (B, D, h*w) -> (B, D, h, w)
        features = patches.transpose(1, 2).unflatten(2, token_grid(self.backbone, images))
        patch_logits = self.patch_logits(features)
        pooled = self.pool_logits(patch_logits)
        if self.published and self.num_prefix_tokens > 1:  # the distillation token takes part
            others, count = self.classifier(prefix[:, 1:]).sum(dim=1), patches.shape[1]
            pooled = (count * pooled + others) / (count + prefix.shape[1] - 1)
        return CamOutput(self.classifier(prefix[:, 0]), patch_logits, pooled, features)

    def activation_maps(self, features: Tensor) -> Tensor:
        """Features (B, D, h, w) -> w_c . f_j, what patch j says of class c, without the bias: (B, C, h, w).

        published: with the bias."""
        if self.published:
            return self.patch_logits(features)
        return F.linear(features.movedim(1, -1), self.classifier.weight).movedim(-1, 1)

    def patch_logits(self, features: Tensor) -> Tensor:
        """Features (B, D, h, w) -> w_c . f_j + b_c, (B, C, h, w)."""
        return self.classifier(features.movedim(1, -1)).movedim(-1, 1)

    def pool_logits(self, patch_logits: Tensor) -> Tensor:
        """Patch logits (B, C, h, w) -> their mean, (B, C)."""
        return patch_logits.mean(dim=(2, 3))

    def _tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Patches (B, h*w, D) and prefix (B, P, D), as the last block puts them out."""
        token_grid(self.backbone, images)  # refuses what does not fit
        return block_outputs(self.backbone, images, [len(self.backbone.blocks) - 1])[0]
