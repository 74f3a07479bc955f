"""Segmenter: a ViT that encodes, and a mask transformer in which class tokens and patches meet.

Source: Strudel et al. 2021 (arXiv 2105.05633), section 3. WeakTr (arXiv 2304.01184, section 3.4) retrains
with it on pseudo labels, pixel by pixel, under the loss of `training.gradient_clipping`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .getam import as_published
from .network import Network
from .vit import forward_tokens, token_grid

HEAD_DIM = 64  # of the decoder's attention heads


class MaskTransformer(nn.Module):
    """Blocks over the patches and one token per label; a mask is how alike patches and token are.

    dim: D of the encoder's tokens. num_labels: K, background included. depth: number of blocks. dropout: in
    attention, its projection and the MLPs.
    """

    def __init__(self, dim: int, num_labels: int, depth: int = 2, dropout: float = 0.1) -> None:
        super().__init__()
        self.num_labels, heads = num_labels, max(1, dim // HEAD_DIM)
        self.project = nn.Linear(dim, dim)
        self.label_tokens = nn.Parameter(torch.empty(1, num_labels, dim))
        self.blocks = nn.ModuleList(
            Block(dim, heads, qkv_bias=True, proj_drop=dropout, attn_drop=dropout, norm_layer=nn.LayerNorm)
            for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.patch_projection = nn.Parameter(torch.randn(dim, dim) * dim**-0.5)
        self.label_projection = nn.Parameter(torch.randn(dim, dim) * dim**-0.5)
        self.mask_norm = nn.LayerNorm(num_labels)
        nn.init.trunc_normal_(self.label_tokens, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, patches: Tensor) -> Tensor:
        """Patches (B, N, D) -> logits (B, K, N)."""
        return self.forward_layers(patches)[-1]

    def forward_layers(self, patches: Tensor) -> list[Tensor]:
        """Patches (B, N, D) -> the logits (B, K, N) that the tokens give after each block."""
        tokens = torch.cat([self.project(patches), self.label_tokens.expand(len(patches), -1, -1)], dim=1)
        layers = []
        for block in self.blocks:
            tokens = block(tokens)
            layers.append(self._masks(self.norm(tokens)))
        return layers

    def _masks(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N + K, D) -> (B, K, N): cosines, normed over the labels at each patch."""
        patches, labels = tokens[:, : -self.num_labels], tokens[:, -self.num_labels :]
        patches = F.normalize(patches @ self.patch_projection, dim=-1)
        labels = F.normalize(labels @ self.label_projection, dim=-1)
        # (B, N, D) @ (B, D, K) -> (B, N, K) -> (B, K, N)
        return self.mask_norm(patches @ labels.transpose(1, 2)).transpose(1, 2)


class Segmenter(Network):
    """Semantic segmentation on a timm ViT: tokens after its final norm, a `MaskTransformer`, upsampling.

    backbone: as of `create_backbone`, or its name; its prefix tokens (class, distillation, registers) take
    part in the encoder and are dropped before the decoder. num_classes: C, without background.
    depth, dropout: of the decoder.
    published: True computes what the published code does: `as_published` on the backbone (positions resized
    bilinearly) and an epsilon of 1e-5, not timm's 1e-6, in its norms.

    Attributes: those of `Network`, decoder and published.
    Raises ValueError for wrong numbers and as `create_backbone`.
    """

    def __init__(
        self,
        backbone: nn.Module | str = "toyvit",
        num_classes: int = 20,
        depth: int = 2,
        dropout: float = 0.1,
        published: bool = False,
    ) -> None:
        super().__init__(backbone, num_classes)
        if depth < 1:
            raise ValueError(f"depth: found {depth}, expected at least 1")
        if published:
            as_published(self.backbone)
            for module in self.backbone.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = 1e-5
        self.published = published
        self.decoder = MaskTransformer(self.backbone.embed_dim, num_classes + 1, depth, dropout)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised, any size -> logits (B, C+1, H, W), background first.

        The images are padded with zeros (the mean colour) at the right and bottom to multiples of the stride.
        """
        patches, grid, size = self._encode(images)
        return _to_pixels(self.decoder(patches), grid, size, images.shape[2:])

    def forward_layers(self, images: Tensor) -> list[Tensor]:
        """Images as of `forward` -> the logits (B, C+1, H, W) after each block of the decoder; the last is
        `forward`'s. (WeakTr's code has a variant that reads the last two.)"""
        patches, grid, size = self._encode(images)
        return [_to_pixels(masks, grid, size, images.shape[2:])
                for masks in self.decoder.forward_layers(patches)]

    def _encode(self, images: Tensor) -> tuple[Tensor, tuple[int, int], torch.Size]:
        """Images (B, 3, H, W) -> patches (B, h*w, D), their grid (h, w) and the size of the padded images."""
        if images.ndim != 4 or 0 in images.shape:
            raise ValueError(f"images: found shape {tuple(images.shape)}, expected (B, 3, H, W) without a 0")
        height, width = images.shape[2:]
        padded = F.pad(images, (0, -width % self.patch_stride, 0, -height % self.patch_stride))
        grid, tokens = token_grid(self.backbone, padded), forward_tokens(self.backbone, padded)
        return tokens[:, self.num_prefix_tokens :], grid, padded.shape[2:]


def _to_pixels(masks: Tensor, grid: tuple[int, int], size: torch.Size, wanted: torch.Size) -> Tensor:
    """Masks (B, K, h*w) -> bilinearly to the padded size, cut to the wanted one: (B, K, H, W)."""
    pixels = F.interpolate(masks.unflatten(2, grid), size, mode="bilinear", align_corners=False)
    return pixels[..., : wanted[0], : wanted[1]]


def sliding_window(model: nn.Module, images: Tensor, window: int = 480, stride: int = 320) -> Tensor:
    """Logits (B, C+1, H, W) of images of any size, from square windows as large as those seen in training.

    model: images (b, 3, h, w) -> logits (b, C+1, h, w). Windows start every `stride` pixels, the last one at
    the far edge; where they overlap, logits are averaged. A side shorter than the window is taken whole. All
    images share each window's pass. The published code first enlarges an image whose shorter side is below
    the window to the window; the caller may do so. Raises ValueError for window or stride below 1.
    """
    if window < 1 or not 1 <= stride <= window:
        raise ValueError(f"window, stride: found {window}, {stride}, expected 1 <= stride <= window")
    total, count = None, images.new_zeros(images.shape[2:])
    starts = [window_starts(side, window, stride) for side in images.shape[2:]]
    for top in starts[0]:
        for left in starts[1]:
            here = (..., slice(top, top + window), slice(left, left + window))
            logits = model(images[here])
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], *images.shape[2:])
            total[here] += logits
            count[here] += 1
    return total / count.to(total.dtype)


def window_starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows start along a side: every stride, and the last so that it ends with the side."""
    last = max(side - window, 0)
    return [*range(0, last, stride), last]
