"""GETAM's network: one ViT that classifies and, through a DPT decoder, segments.

Source: GETAM, Sun et al. 2021 (arXiv 2112.02841), section 3; the decoder is DPT's (arXiv 2103.13413). The map
of a class is read off its logit and the attention (`localization.getam`); it supervises the decoder's mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import StdConv2dSame, pad_same
from timm.models.deit import VisionTransformerDistilled
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .decoders import DPTDecoder, Reassemble
from .network import Network
from .toy import ConvStem
from .vit import num_class_tokens, token_grid

FEATURES = 256  # width of the published decoder, on a backbone of width 768


class GetamOutput(NamedTuple):
    """What `GetamViT.forward_segmentation` returns."""

    logits: Tensor  # (B, C), of the classes in the image
    segmentation: Tensor  # (B, C+1, H, W), of each pixel, background first


class GetamViT(Network):
    """Multi-label classifier and segmentation network on a timm ViT with a class token.

    backbone: as of `create_backbone`, or its name. num_classes: C, without background. features: width of the
    decoder; None is 256, or half of the backbone's width where that is less.
    published: True computes what the published code does: batch norm in the decoder (the default is group
    norm, which small batches do not disturb) and `as_published` on the backbone, in place.

    Four levels feed the decoder. Blocks 1/4, 1/2, 3/4 and all of the way up (2, 5, 8, 11 of ViT-B, counted
    from 0) are resized to 4, 2, 1 and 1/2 of the patch grid; the final norm is not applied. Where there is a
    convolutional stem (ResNetV2 as in R50+ViT-B, or the toy's) the two finer levels come from it, at 4 and 8
    pixels per position. The class logits are a linear head on the mean of the coarsest level.

    Attributes: those of `Network`, and published.
    Raises ValueError for a backbone without a class token, wrong numbers and as `create_backbone`.
    """

    def __init__(
        self,
        backbone: nn.Module | str = "toyvit",
        num_classes: int = 20,
        features: int | None = None,
        published: bool = False,
    ) -> None:
        super().__init__(backbone, num_classes)
        if not num_class_tokens(self.backbone):
            raise ValueError("backbone: found no class token, expected one: the map is made of its attention")
        self.published = published
        if published:
            as_published(self.backbone)
        dim, depth, stem = self.backbone.embed_dim, len(self.backbone.blocks), stem_levels(self.backbone)
        quarters = [max(depth * quarter // 4 - 1, 0) for quarter in (1, 2, 3, 4)]
        self.blocks_read = quarters[len(stem) :]
        channels = [count for _, count in stem] + [dim // 8, dim // 4, dim // 2, dim][len(stem) :]
        if stem:  # as published: the tokens' own level keeps their width
            channels[2] = dim
        self.reassemble = nn.ModuleList(
            nn.Identity() if level < len(stem) else Reassemble(dim, channels[level], scale)
            for level, scale in enumerate((4, 2, 1, 0.5)))
        self.classifier = nn.Linear(dim, num_classes)
        features = min(FEATURES, dim // 2) if features is None else features
        self.decoder = DPTDecoder(channels, features, num_classes + 1, "batch" if published else "group")

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised -> class logits (B, C); the decoder does not run.

        ValueError for images whose sides are no multiples of the patch stride."""
        (coarsest,) = self._token_levels(images, self.blocks_read[-1:])
        return self._classify(coarsest)

    def forward_segmentation(self, images: Tensor) -> GetamOutput:
        """Images (B, 3, H, W), normalised -> GetamOutput, in one pass. Raises as `forward`."""
        levels = self.forward_levels(images)
        return GetamOutput(self._classify(levels[-1]), self.decoder(levels, images.shape[-2:]))

    def forward_levels(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W), normalised -> the four levels (B, C_i, h_i, w_i), finest first."""
        with outputs_of([module for module, _ in stem_levels(self.backbone)]) as levels:
            tokens = self._token_levels(images, self.blocks_read)
        return levels + tokens

    def _token_levels(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """The levels made of these blocks' outputs, which are the last of `blocks_read`."""
        grid = token_grid(self.backbone, images)
        outputs = block_outputs(self.backbone, images, blocks)
        return [reassemble(patches, prefix[:, 0], grid)
                for reassemble, (patches, prefix) in zip(self.reassemble[-len(blocks) :], outputs)]

    def _classify(self, level: Tensor) -> Tensor:
        return self.classifier(level.mean(dim=(2, 3)))  # (B, D, h, w) -> (B, D) -> (B, C)


def block_outputs(
    backbone: nn.Module, images: Tensor, blocks: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    """What blocks of a timm ViT put out, before the final norm: each, patches (B, h*w, D), prefix (B, P, D).

    The blocks after the last one asked for run as well.
    """
    wanted = sorted(set(blocks))  # a shallow network may read a block twice
    outputs = backbone.forward_intermediates(
        images, indices=wanted, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True)
    found = dict(zip(wanted, outputs))
    return [found[block] for block in blocks]


def stem_levels(backbone: nn.Module) -> list[tuple[nn.Module, int]]:
    """The parts of a convolutional stem whose outputs are the two finer levels, with channels; or none."""
    stem = getattr(backbone.patch_embed, "backbone", None)
    if isinstance(stem, ResNetV2) and len(stem.stages) > 1:  # feature_info[0] is what comes before the stages
        return [(stem.stages[i], stem.feature_info[i + 1]["num_chs"]) for i in (0, 1)]
    if isinstance(stem, ConvStem):
        return [(stem.block2, stem.down2[0].out_channels), (stem.block3, stem.down3[0].out_channels)]
    return []


@contextmanager
def outputs_of(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Inside, what these modules put out is appended to the list, in the order of the calls; then it ends."""
    outputs: list[Tensor] = []
    handles = [module.register_forward_hook(lambda _m, _i, out: outputs.append(out)) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------ what the published code computes


def as_published(backbone: nn.Module) -> nn.Module:
    """Make a ViT of timm compute what the timm of 2021 and the code built on it did; in place, returned.

    - The position embedding is resized bilinearly, corners not aligned; timm: bicubic with antialiasing.
    - The convolutions of an R50 stem are `PublishedStdConv2d`.
    Tensors and their names stay. Measured on the golden R50+ViT-B, 24x24 positions on a grid of 4x4: timm's
    stem would move the tokens' level by 4e-4 of its largest value, stem and positions by 5e-3.
    Raises ValueError for other than a ViT or DeiT with a learned position for each prefix token and patch.
    """
    kind = next((new for old, new in PUBLISHED if type(backbone) in (old, new)), None)
    known = kind is not None and backbone.pos_embed is not None and backbone.reg_token is None
    if not known or backbone.no_embed_class:
        raise ValueError(f"backbone: found {type(backbone).__name__}, expected, as published, a ViT or DeiT "
                         "with a learned position for each prefix token and patch")
    if backbone.dynamic_img_size:  # of a fixed size, there is nothing to resize
        backbone.__class__ = kind
    for module in backbone.modules():
        if isinstance(module, StdConv2dSame):
            module.__class__ = PublishedStdConv2d
    return backbone


class PublishedStdConv2d(StdConv2dSame):
    """Convolution with weights (w - mean) / (std + 1e-5); timm's are (w - mean) / sqrt(variance + 1e-8)."""

    def forward(self, x: Tensor) -> Tensor:
        if self.same_pad:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        std, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        weight = (self.weight - mean) / (std + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class PublishedViT(VisionTransformer):
    """A ViT of timm whose position embedding is resized as in 2021."""

    def _pos_embed(self, patches: Tensor) -> Tensor:
        return _embed_positions(self, patches, [self.cls_token])


class PublishedDistilledViT(VisionTransformerDistilled):
    """A distilled DeiT of timm whose position embedding is resized as in 2021."""

    def _pos_embed(self, patches: Tensor) -> Tensor:
        return _embed_positions(self, patches, [self.cls_token, self.dist_token])


PUBLISHED = ((VisionTransformer, PublishedViT), (VisionTransformerDistilled, PublishedDistilledViT))


def _embed_positions(backbone: VisionTransformer, patches: Tensor, prefix: list[Tensor]) -> Tensor:
    """Patches (B, h, w, D) and P prefix tokens (1, 1, D) -> all with their positions, (B, P + h*w, D)."""
    (batch, *grid, _), count = patches.shape, len(prefix)
    positions = backbone.pos_embed[:, count:].unflatten(1, backbone.patch_embed.grid_size)
    # (1, h0, w0, D) -> (1, D, h0, w0) -> (1, D, h, w) -> (1, h*w, D)
    positions = F.interpolate(positions.permute(0, 3, 1, 2), grid, mode="bilinear", align_corners=False)
    positions = torch.cat([backbone.pos_embed[:, :count], positions.flatten(2).transpose(1, 2)], dim=1)
    tokens = torch.cat([*(token.expand(batch, -1, -1) for token in prefix), patches.flatten(1, 2)], dim=1)
    return backbone.pos_drop(tokens + positions)
