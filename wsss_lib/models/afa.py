"""AFA's network: one encoder that classifies, segments and tells which patches belong together.

Source: AFA, Ru et al. 2022 (arXiv 2203.02664), section 3. `AfaNet` is the paper's, on a Mix Transformer.
`AfaViT` is not in the paper: the same heads on a plain ViT, under its own name wherever it is reported.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import attention_affinity
from .attention import AttentionTape, fused_attention, module_flags
from .cam import CamOutput
from .getam import outputs_of, stem_levels
from .mit import Grid, MixTransformer, pooled_queries
from .network import Network
from .segformer import SegFormerHead
from .vit import create_backbone, split_tokens, token_grid

FEATURES = 256  # width of the published segmentation head, on a backbone of width 512
POOLS = {"gmp": F.adaptive_max_pool2d, "gap": F.adaptive_avg_pool2d}


class AfaAffinity(NamedTuple):
    """What `AfaNet.forward_affinity` returns."""

    features: Tensor  # (B, D, h, w), what the classifier reads
    affinity: Tensor  # (B, N, N), do tokens i and j belong together? symmetric, in (0, 1), float32 or better
    grid: Grid  # of the N tokens: (h, w) of the features unless the last blocks' keys are pooled


class AfaOutput(NamedTuple):
    """What `AfaNet.forward_segmentation` returns."""

    logits: Tensor  # (B, C), of the classes in the image
    segmentation: Tensor  # (B, C+1, h, w), background first, on the grid of the finest level
    affinity: Tensor  # (B, N, N), as in AfaAffinity


class AfaNet(Network):
    """Multi-label classifier, segmentation and affinity network on a Mix Transformer.

    backbone: a `MixTransformer`, or its name. num_classes: C, without background. pool: "gmp" (maximum over
    the picture) or "gap" (mean) of the features, before the classifier; an attribute, which no file stores.
    features: width of the segmentation head; None is 256, or half of the backbone's width if that is less.
    published: True has batch norm in the segmentation head (the default is group norm, which small batches do
    not disturb) and random first weights of the affinity.

    The affinity is sigmoid(sum_m w_m (S_m + S_m^T) + b) of the scores S = q k^T, neither scaled nor through a
    softmax, of all M heads of the last two blocks (`kernels.attention_affinity`). Each w_m starts at
    1 / (M sqrt(d)), b at 0: the mean of the heads' scaled scores. Images may have any size.

    Attributes: those of `Network`, pool and published.
    Raises ValueError for another backbone, one whose last stage has a single block, wrong numbers, an unknown
    pool and as `create_backbone`.
    """

    def __init__(
        self,
        backbone: nn.Module | str = "toymit",
        num_classes: int = 20,
        pool: str = "gmp",
        features: int | None = None,
        published: bool = False,
    ) -> None:
        super().__init__(backbone, num_classes)
        if pool not in POOLS:
            raise ValueError(f"pool: found {pool!r}, expected one of {', '.join(POOLS)}")
        self._check_backbone()
        self.pool, self.published = pool, published
        dim, channels = self.backbone.embed_dim, self._level_channels()
        features = min(FEATURES, dim // 2) if features is None else features
        self.classifier = nn.Conv2d(dim, num_classes, 1, bias=False)
        self.affinity = nn.Conv2d(sum(block.attn.num_heads for block in self.backbone.blocks[-2:]), 1, 1)
        self._reset_affinity()
        self.decoder = SegFormerHead(channels, features, num_classes + 1, "batch" if published else "group")

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised -> class logits (B, C); no other head runs."""
        return self._classify(self.forward_levels(images)[-1])

    def forward_heads(self, images: Tensor) -> CamOutput:
        """Images (B, 3, H, W), normalised -> CamOutput; there is one head, so class_logits are pooled."""
        features = self.forward_levels(images)[-1]
        logits = self._classify(features)
        return CamOutput(logits, self.activation_maps(features), logits, features)

    def forward_affinity(self, images: Tensor) -> AfaAffinity:
        """Images (B, 3, H, W), normalised -> AfaAffinity; the segmentation head does not run."""
        return self._with_affinity(images)[1]

    def forward_segmentation(self, images: Tensor) -> AfaOutput:
        """Images (B, 3, H, W), normalised -> AfaOutput: all heads, in one pass."""
        levels, (features, affinity, _) = self._with_affinity(images)
        return AfaOutput(self._classify(features), self.decoder(levels), affinity)

    def forward_levels(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W), normalised -> four levels (B, D_i, h_i, w_i), finest first.

        The classifier reads the last one."""
        return self.backbone.forward_stages(images)

    def activation_maps(self, features: Tensor) -> Tensor:
        """Features (B, D, h, w) -> w_c . f_j, the evidence of patch j for class c: (B, C, h, w)."""
        return self.classifier(features)

    def parameter_groups(self, lr: float = 6e-5, weight_decay: float = 0.01) -> list[dict]:
        """Groups for an optimiser, as published: the encoder at `lr`, its norms at 0, the heads at 10 lr."""
        encoder = list(self.backbone.named_parameters())
        norms = [parameter for name, parameter in encoder if "norm" in name]
        others = [parameter for name, parameter in encoder if "norm" not in name]
        heads = [*self.classifier.parameters(), *self.affinity.parameters(), *self.decoder.parameters()]
        return [
            {"params": others, "lr": lr, "weight_decay": weight_decay},
            {"params": norms, "lr": 0.0, "weight_decay": 0.0},
            {"params": heads, "lr": 10 * lr, "weight_decay": weight_decay},
        ]

    def _classify(self, features: Tensor) -> Tensor:
        pooled = POOLS[self.pool](features, 1)  # (B, D, h, w) -> (B, D, 1, 1)
        return self.classifier(pooled).flatten(1)  # (B, D, 1, 1) -> (B, C, 1, 1) -> (B, C)

    def _with_affinity(self, images: Tensor) -> tuple[list[Tensor], AfaAffinity]:
        """The levels of one pass, and what its last two blocks say of the patches."""
        *earlier, first, second = self.backbone.blocks
        calls = sum(getattr(block.attn, "fused_attn", True) for block in earlier)  # the tape skips these
        fused = fused_attention(nn.ModuleList([first, second]))
        # Recomputed in the backward pass, queries and keys would have no graph on the tape.
        with fused, module_flags(self.backbone, grad_checkpointing=False), AttentionTape(calls) as tape:
            levels = self.forward_levels(images)
        if len(tape.blocks) != 2:
            found = f"{len(tape.blocks)} calls of attention"
            raise ValueError(f"model: found {found}, expected 2, of the last two blocks")
        # two of (B, H, N, d) -> (B, M, N, d), M = 2*H
        q, k = (torch.cat(pair, dim=1) for pair in zip(*((block.q, block.k) for block in tape.blocks)))
        q, k, grid = self._of_patches(q, k, tuple(levels[-1].shape[-2:]))
        weight, bias = self.affinity.weight.flatten(), self.affinity.bias  # (1, M, 1, 1) -> (M,)
        return levels, AfaAffinity(levels[-1], attention_affinity(q, k, weight, bias), grid)

    def _of_patches(self, q: Tensor, k: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Grid]:
        """Queries and keys of patches that lie on the same grid, which is the third result."""
        q, grid = pooled_queries(q, grid, self.backbone.blocks[-1].attn.sr_ratio)
        return q, k, grid

    def _check_backbone(self) -> None:
        if not isinstance(self.backbone, MixTransformer):
            found = type(self.backbone).__name__
            raise ValueError(f"backbone: found {found}, expected a MixTransformer; AfaViT takes a plain ViT")
        if len(self.backbone.block4) < 2:
            raise ValueError("backbone: found 1 block in the last stage, expected 2: the affinity is theirs")

    def _level_channels(self) -> list[int]:
        return list(self.backbone.embed_dims)

    def _reset_affinity(self) -> None:
        heads = self.affinity.in_channels
        nn.init.zeros_(self.affinity.bias)
        if self.published:  # a deviation of 0.58, for scores that reach 30: sigmoids that are 0 or 1
            nn.init.kaiming_normal_(self.affinity.weight, a=math.sqrt(5), mode="fan_out")
        else:
            nn.init.constant_(self.affinity.weight, (2 * self.backbone.embed_dim / heads) ** -0.5 / heads)


class AfaViT(AfaNet):
    """AFA's heads on a plain ViT of timm, with or without class token: a variant that the paper has not.

    Arguments, outputs and attributes are AfaNet's. The affinity is read off the patches' rows and columns of
    the last two blocks; prefix tokens have no part in it. The classifier reads the patches after the final
    norm. The other levels are the outputs of blocks 1/4, 1/2 and 3/4 of the way up, without norm, all on the
    patch grid; where there is a convolutional stem, its two finer levels take the place of the first two.
    Raises ValueError for images whose sides are no multiples of the patch stride and for a backbone without
    two blocks of attention.
    """

    def __init__(
        self,
        backbone: nn.Module | str = "toyvit",
        num_classes: int = 20,
        pool: str = "gmp",
        features: int | None = None,
        published: bool = False,
    ) -> None:
        super().__init__(backbone, num_classes, pool, features, published)

    def forward_levels(self, images: Tensor) -> list[Tensor]:
        """As of AfaNet. ValueError for images whose sides are no multiples of the patch stride."""
        backbone, grid, wanted = self.backbone, token_grid(self.backbone, images), self._blocks_read()
        with outputs_of([module for module, _ in stem_levels(backbone)]) as levels:
            tokens, found = backbone.forward_intermediates(images, indices=sorted(set(wanted)))
        tokens = getattr(backbone, "fc_norm", nn.Identity())(tokens)
        by_block = dict(zip(sorted(set(wanted)), found))  # a shallow network reads a block twice
        last = split_tokens(tokens, self.num_prefix_tokens, grid)[1]
        return [*levels, *(by_block[block] for block in wanted), last]

    def _of_patches(self, q: Tensor, k: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Grid]:
        return q[:, :, self.num_prefix_tokens :], k[:, :, self.num_prefix_tokens :], grid

    def _check_backbone(self) -> None:
        blocks = self.backbone.blocks
        if isinstance(self.backbone, MixTransformer) or not hasattr(self.backbone, "forward_intermediates"):
            raise ValueError(f"backbone: found {type(self.backbone).__name__}, expected a plain ViT of timm")
        if len(blocks) < 2 or not all(hasattr(block, "attn") for block in blocks):
            found = f"{len(blocks)} blocks of {type(blocks[0]).__name__}"
            raise ValueError(f"backbone: found {found}, expected two or more with one attention each")

    def _blocks_read(self) -> list[int]:
        """Blocks 1/4, 1/2, 3/4 of the way up, less those that the stem stands for."""
        quarters = [max(len(self.backbone.blocks) * quarter // 4 - 1, 0) for quarter in (1, 2, 3)]
        return quarters[len(stem_levels(self.backbone)) :]

    def _level_channels(self) -> list[int]:
        stem = [channels for _, channels in stem_levels(self.backbone)]
        return stem + [self.backbone.embed_dim] * (4 - len(stem))


def afa_network(
    backbone: nn.Module | str = "toyvit",
    num_classes: int = 20,
    pool: str = "gmp",
    features: int | None = None,
    published: bool = False,
) -> AfaNet:
    """AfaNet for a Mix Transformer, AfaViT for a plain ViT; arguments and errors are theirs."""
    backbone = create_backbone(backbone) if isinstance(backbone, str) else backbone
    network = AfaNet if isinstance(backbone, MixTransformer) else AfaViT
    return network(backbone, num_classes, pool, features, published)
