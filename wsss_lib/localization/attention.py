"""Where the class token looks: raw attention and attention rollout, the baselines of the class-specific maps.

Neither knows a class: all present classes of an image get the same map, absent ones zero.
Source of the rollout: Abnar and Zuidema 2020 (arXiv 2005.00928), section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models.attention import AttentionTape, at_least_float32, fused_attention
from ..models.vit import token_grid
from .cam import eval_mode
from .getam import check_calls, first_layer
from .slots import check_labels


@torch.no_grad()
def class_attention(
    model: nn.Module, images: Tensor, labels: Tensor, start_layer: int | None = None
) -> Tensor:
    """Attention of the class token to each patch, mean over heads and blocks: (B, C, h, w), >= 0.

    The same map for every present class of an image, zero for absent ones. start_layer: the first block that
    counts; None is half of the depth. Other arguments and errors as of `getam`.
    """
    backbone = getattr(model, "backbone", model)
    tape = _record(model, images, labels, first_layer(backbone, start_layer))
    rows = tape.class_rows().mean(dim=(0, 2))  # (L, B, H, N) -> (B, N)
    return _class_maps(rows, labels, backbone.num_prefix_tokens, token_grid(backbone, images))


@torch.no_grad()
def rollout(model: nn.Module, images: Tensor, labels: Tensor, start_layer: int = 0) -> Tensor:
    """Attention rollout, the class token's row of the product of all (A_l + I) / 2: (B, C, h, w), >= 0.

    A_l is the mean over heads; the identity stands for the residual connection. One row is all that is
    asked for, so a vector passes from the last block down to start_layer, and only one block's maps,
    H x N x N, exist at a time. The same map for every present class of an image, zero for absent ones.
    Arguments and errors as of `getam`.
    """
    backbone = getattr(model, "backbone", model)
    tape = _record(model, images, labels, first_layer(backbone, start_layer))
    row = at_least_float32(torch.zeros_like(tape.blocks[-1].q[:, :1, :, 0]))  # (B, H, N, d) -> (B, 1, N)
    row[..., 0] = 1  # the class token itself
    for block in reversed(tape.blocks):
        row = (row @ block.map().mean(dim=1) + row) / 2  # (B, 1, N) @ (B, N, N) -> (B, 1, N)
    return _class_maps(row[:, 0], labels, backbone.num_prefix_tokens, token_grid(backbone, images))


def _record(model: nn.Module, images: Tensor, labels: Tensor, start: int) -> AttentionTape:
    """One pass over the images, recorded from block `start` on."""
    check_labels(labels, len(images), model.num_classes)
    with eval_mode(model), fused_attention(model), AttentionTape(start, detach=True) as tape:
        model(images)
    check_calls(tape, len(getattr(model, "backbone", model).blocks) - start)
    return tape


def _class_maps(rows: Tensor, labels: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """Rows (B, P + h*w), labels (B, C) -> the patches' part at each present class, (B, C, h, w)."""
    maps = rows[:, prefix:].unflatten(1, grid)[:, None]  # (B, P + h*w) -> (B, 1, h, w)
    present = (labels > 0).to(rows.device)[:, :, None, None]  # (B, C, 1, 1)
    return maps.where(present, 0)
