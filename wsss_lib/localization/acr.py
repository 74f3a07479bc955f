"""ACR's maps: the gradient of a class to the class token's attention, spread to patches that go together.

Source: ACR, Sun et al. 2023 (arXiv 2308.04321), section 3. What the class token's last blocks say of a class
(`getam`, variant "grad") is multiplied by the attention between patches, summed over all blocks. That matrix
is never made: its product with the maps streams over heads and rows (`kernels.propagate`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import propagate
from ..models.attention import AttentionBlock, AttentionTape
from .getam import getam

PICTURES = 8  # in one go: queries and keys of all their blocks are held, 2 L N D numbers each


def acr_maps(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    start_layer: int | None = None,
    variant: str = "grad",
    head: str = "both",
    patch_affinity: bool = True,
) -> Tensor:
    """ACR's maps: (B, C, h, w), not negative, not normalised, zero for absent classes.

    The map of `getam` from block start_layer on (None: the last two blocks) times the patch affinity of every
    block: (sum_l mean_h A_lh) @ map, patches only. model: an `AcrViT`, or what else `getam` takes; its other
    arguments, output type and errors are getam's. head "both" is what the model returns: of an AcrViT the
    class token's logit. The affinity comes from the same forward pass. Patches attend to prefix tokens
    too, so the rows of A over the patches sum to less than 1. patch_affinity: False leaves it out.
    """
    backbone = getattr(model, "backbone", model)
    depth, prefix = len(backbone.blocks), backbone.num_prefix_tokens
    options = (max(depth - 2, 0) if start_layer is None else start_layer, variant, head)
    if not patch_affinity:
        return getam(model, images, labels, *options)
    maps = getam(model, images, torch.zeros_like(labels), *options)  # zeros; it checks the arguments
    for rows in _groups(labels):
        with AttentionTape(detach=True) as tape:
            found = getam(model, images[rows.to(images.device)], labels[rows], *options)
        # Getam splits the group in order, and every pass of it left `depth` blocks on the tape.
        passes = [tape.blocks[first : first + depth] for first in range(0, len(tape.blocks), depth)]
        parts = found.split([len(blocks[0].q) for blocks in passes])
        spread_out = [spread(part, blocks, prefix) for part, blocks in zip(parts, passes)]
        maps[rows.to(maps.device)] = torch.cat(spread_out)
    return maps


def _groups(labels: Tensor) -> Iterator[Tensor]:
    """Rows of pictures with equally many classes, at least one: then `getam` takes them in their order."""
    counts = labels.count_nonzero(dim=1)  # (B,)
    for count in counts.unique().tolist():
        if count:
            yield from (counts == count).nonzero()[:, 0].split(PICTURES)


def spread(maps: Tensor, blocks: Sequence[AttentionBlock], num_prefix_tokens: int = 1) -> Tensor:
    """(sum over blocks of the head-averaged attention, patches to patches) @ map: (B, C, h, w) -> the same.

    blocks: an `AttentionTape`'s, of a pass over these B pictures. num_prefix_tokens: before the h*w patches.
    Exact, and one tile of one attention map in memory at a time. Raises ValueError as `kernels.propagate`.
    """
    # L of (B, H, N, d) -> (B, L*H, N, d)
    q, k = (torch.cat(tensors, dim=1) for tensors in ([b.q for b in blocks], [b.k for b in blocks]))
    weights = maps.new_full(q.shape[:2], 1 / blocks[0].q.shape[1])
    # (B, C, h, w) -> (B, C, h*w) -> (B, C, P + h*w) -> (B, N, C); what prefix tokens hold is nothing
    values = F.pad(maps.flatten(2), (num_prefix_tokens, 0)).transpose(1, 2)
    out = propagate(q, k, weights, values, blocks[0].scale)[:, num_prefix_tokens:]
    return out.transpose(1, 2).unflatten(2, maps.shape[-2:])  # (B, h*w, C) -> (B, C, h*w) -> (B, C, h, w)
