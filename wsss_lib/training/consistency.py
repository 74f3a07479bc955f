"""ACR's loss: two views of a picture are classified, and must be attended to in the same way.

Source: ACR, Sun et al. 2023 (arXiv 2308.04321), section 3: region activation consistency compares the class
token's attention to the patches, region affinity consistency that of the patches to each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..data.views import permutation, transform
from ..kernels import attention_consistency_loss
from ..localization.getam import check_calls, check_class_token
from ..localization.slots import check_labels
from ..models.attention import AttentionTape, at_least_float32, fused_attention
from ..models.vit import token_grid


def consistency_loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    view: str = "hflip",
    region_weight: float = 100.0,
    affinity_weight: float = 100.0,
    layers: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """ACR's losses of a batch, to be summed: {"class", "class_view", "region", "affinity"}, four scalars.

    model: an `AcrViT`, or another classifier on a ViT of timm with a class token. images (B, 3, H, W),
    normalised; labels (B, C) multi-hot. view: what the second view is, one of `data.views.VIEWS`; the picture
    need not be square. region_weight, affinity_weight: 100 in the published code and for COCO; the paper
    has 125 for VOC. Either is 0 in an ablation. layers: the blocks whose attention is compared, None for all.

    class, class_view: multi-label soft margin loss of `model(view)`, mean over pictures and classes.
    region, affinity: the weighted terms of `kernels.attention_consistency_loss`: mean over blocks, pictures
    and entries of |A - A of the view, its patches put back|, A averaged over heads; rows of the class token,
    and of the patches; columns of the patches. Gradients flow through both views. No attention is kept.

    Each view is a pass of its own, with its own dropout. float32 under autocast, float64 for such a model.
    For the engine: `lambda model, batch, step: consistency_loss(model, batch["image"], batch["labels"])`.
    Raises ValueError for an unknown view, wrong layers, images or labels, and a model without class token.
    """
    backbone = getattr(model, "backbone", model)
    check_class_token(backbone, "its attention is compared")
    blocks = _check_layers(layers, len(backbone.blocks))
    order = permutation(view, token_grid(backbone, images))
    views, losses = [], {}
    for name, pictures in (("class", images), ("class_view", transform(images, view))):
        with fused_attention(model), AttentionTape() as tape:
            logits = model(pictures)
        check_calls(tape, len(backbone.blocks))
        check_labels(labels, *logits.shape)
        logits = at_least_float32(logits)
        losses[name] = F.multilabel_soft_margin_loss(logits, labels.to(logits))
        recorded = [tape.blocks[block] for block in blocks]
        views += [block.q for block in recorded], [block.k for block in recorded]
    region, affinity = attention_consistency_loss(*views, order, backbone.num_prefix_tokens)
    return {**losses, "region": region_weight * region, "affinity": affinity_weight * affinity}


def _check_layers(layers: Sequence[int] | None, depth: int) -> list[int]:
    chosen = list(range(depth)) if layers is None else list(layers)
    wrong = [layer for layer in chosen if isinstance(layer, bool) or layer not in range(depth)]
    if wrong or not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"layers: found {chosen}, expected None or different blocks, each 0..{depth - 1}")
    return chosen
