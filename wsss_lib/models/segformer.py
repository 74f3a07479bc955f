"""SegFormer's head: four levels, each brought to the same width by a linear layer, added up and classified.

Source: SegFormer, Xie et al. 2021 (arXiv 2105.15203), section 3.2 ("All-MLP decoder").
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .decoders import NORMS


class SegFormerHead(nn.Module):
    """Four levels of features, finest first -> logits on the grid of the finest: (B, num_outputs, h, w).

    channels: of the four levels. features: width of the head. norm: "group" or, as published, "batch".
    Raises ValueError for other than four levels, features below 1 or an unknown norm.

    As published the levels are resized, concatenated (coarsest first) and fused by a 1x1 convolution of four
    times the width. A 1x1 convolution commutes with bilinear weights, which sum to 1. So each level meets its
    quarter of the convolution on its own, coarser grid, and the results are resized and added: the same
    numbers and the same tensors, for a good third of the work.
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
        self.project = nn.ModuleList([nn.Linear(count, features) for count in channels])
        self.fuse = nn.Conv2d(4 * features, features, 1, bias=False)
        self.norm, self.dropout = NORMS[norm](features), nn.Dropout2d(0.1)
        self.predict = nn.Conv2d(features, num_outputs, 1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """levels: four of (B, channels[i], h_i, w_i), finest first -> (B, num_outputs, h_0, w_0)."""
        quarters = self.fuse.weight[:, :, 0, 0].chunk(4, dim=1)  # (E, 4*E, 1, 1) -> four of (E, E)
        size, fused = levels[0].shape[-2:], 0
        for level, project, quarter in zip(levels, self.project, reversed(quarters)):
            # (B, c, h, w) -> (B, h, w, E) -> (B, E, h, w)
            x = F.linear(project(level.movedim(1, -1)), quarter).movedim(-1, 1)
            same = x.shape[-2:] == size
            fused = fused + (x if same else F.interpolate(x, size, mode="bilinear", align_corners=False))
        return self.predict(self.dropout(F.relu(self.norm(fused))))
