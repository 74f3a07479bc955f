"""The decoder of DPT: four levels of features, merged from the coarsest to the finest into a mask.

Source: DPT, Ranftl et al. 2021 (arXiv 2103.13413), section 3 and its figures 1 and 2. The channel attention
before the head is GETAM's (arXiv 2112.02841), after SE-Net, Hu et al. 2018 (arXiv 1709.01507), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

NORMS = {
    "group": lambda channels: nn.GroupNorm(math.gcd(8, channels), channels),
    "batch": nn.BatchNorm2d,
}


class Reassemble(nn.Module):
    """Tokens of a block -> one level of features: class token folded in, laid out in 2D, projected, resized.

    dim: D of the tokens. channels: of the level. scale: 4 or 2 (transposed convolution), 1, or 0.5 (3x3
    convolution of stride 2). The readout is DPT's "project": GELU of a linear layer on [patch, class token].
    Raises ValueError for another scale.
    """

    def __init__(self, dim: int, channels: int, scale: float) -> None:
        super().__init__()
        self.readout = nn.Linear(2 * dim, dim)
        self.project = nn.Conv2d(dim, channels, 1)
        if scale in (4, 2):
            self.resize = nn.ConvTranspose2d(channels, channels, scale, stride=scale)
        elif scale == 0.5:
            self.resize = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        elif scale == 1:
            self.resize = nn.Identity()
        else:
            raise ValueError(f"scale: found {scale}, expected 4, 2, 1 or 0.5")

    def forward(self, patches: Tensor, token: Tensor, grid: Sequence[int]) -> Tensor:
        """Patches (B, h*w, D), class token (B, D), grid (h, w) -> (B, channels, scale*h, scale*w), ceiled."""
        # W [patch, token] = W_patch patch + W_token token: the token's share once, not once per patch
        for_patches, for_token = self.readout.weight.chunk(2, dim=1)  # (D, 2D) -> two of (D, D)
        mixed = F.linear(patches, for_patches) + F.linear(token, for_token, self.readout.bias)[:, None]
        # (B, h*w, D) -> (B, D, h*w) -> (B, D, h, w)
        return self.resize(self.project(F.gelu(mixed).transpose(1, 2).unflatten(2, tuple(grid))))


class ResidualUnit(nn.Module):
    """x -> x + two 3x3 convolutions of it, ReLU before and norm after each: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(channels, channels), NORMS[norm](channels)
        self.conv2, self.norm2 = _conv(channels, channels), NORMS[norm](channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(F.relu(x)))
        return x + self.norm2(self.conv2(F.relu(y)))


class Fusion(nn.Module):
    """What comes from the coarser level, plus this level, refined and resized to the next finer one.

    merges: False for the coarsest level, which has nothing to be added to.
    """

    def __init__(self, channels: int, norm: str, merges: bool = True) -> None:
        super().__init__()
        self.merge = ResidualUnit(channels, norm) if merges else None
        self.refine = ResidualUnit(channels, norm)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, level: Tensor, size: Sequence[int], coarser: Tensor | None = None) -> Tensor:
        """level (B, C, h, w), coarser of the same shape (where this block merges) -> (B, C, *size)."""
        x = level if self.merge is None else coarser + self.merge(level)
        # A 1x1 convolution commutes with bilinear weights, which sum to 1; first, it sees fewer positions.
        x = self.out(self.refine(x))
        return F.interpolate(x, tuple(size), mode="bilinear", align_corners=True)


class ChannelAttention(nn.Module):
    """x -> x + s * f(x), f two 3x3 convolutions, s a gate in (0, 1) for each channel of f(x): SE-Net's.

    reduction: the gate's hidden layer has channels / reduction units, at least one.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.body = nn.Sequential(
            _conv(channels, channels, bias=True), nn.ReLU(inplace=True), _conv(channels, channels, bias=True))
        self.gate = nn.Sequential(
            nn.Linear(channels, hidden, bias=False), nn.ReLU(inplace=True),
            nn.Linear(hidden, channels, bias=False), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        y = self.body(x)
        return x + y * self.gate(y.mean(dim=(2, 3)))[:, :, None, None]  # gate (B, C) -> (B, C, 1, 1)


class DPTDecoder(nn.Module):
    """Four levels of features, finest first -> logits at any size: (B, num_outputs, H, W).

    channels: of the four levels. features: width of the decoder. norm: "group" or, as published, "batch".
    Each path is resized to the level that it joins, so grids may be odd. DPT doubles, which is the same where
    each level is twice as fine as the next, and fails where it is not.
    Raises ValueError for other than four levels or an unknown norm.
    """

    def __init__(
        self, channels: Sequence[int], features: int = 256, num_outputs: int = 21, norm: str = "group"
    ) -> None:
        super().__init__()
        if len(channels) != 4:
            raise ValueError(f"channels: found {len(channels)} levels, expected 4")
        if features < 1:
            raise ValueError(f"features: found {features}, expected at least 1")
        if norm not in NORMS:
            raise ValueError(f"norm: found {norm!r}, expected one of {', '.join(NORMS)}")
        self.project = nn.ModuleList([_conv(count, features) for count in channels])
        self.fuse = nn.ModuleList([Fusion(features, norm, merges=level < 3) for level in range(4)])
        self.attention = ChannelAttention(features)
        self.head = nn.Sequential(
            _conv(features, features), NORMS[norm](features), nn.ReLU(inplace=True), nn.Dropout(0.1),
            nn.Conv2d(features, num_outputs, 1))

    def forward(self, levels: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """levels: four of (B, channels[i], h_i, w_i), finest first; size (H, W) -> (B, num_outputs, H, W)."""
        projected = [project(level) for project, level in zip(self.project, levels)]
        # Where each path goes: level 3's to level 2, 2's to 1, 1's to 0; the last becomes twice as fine.
        finest = [2 * side for side in projected[0].shape[-2:]]
        sizes = [finest, *(level.shape[-2:] for level in projected[:3])]
        path = None
        for level in (3, 2, 1, 0):
            path = self.fuse[level](projected[level], sizes[level], path)
        logits = self.head(self.attention(path))
        return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=True)


def _conv(in_channels: int, channels: int, bias: bool = False) -> nn.Conv2d:
    """3x3, same size; the norm that mostly follows makes a bias superfluous."""
    return nn.Conv2d(in_channels, channels, 3, padding=1, bias=bias)
