"""CAM and Grad-CAM on the patch tokens of a ViT.

Sources: CAM, Zhou et al. 2016 (arXiv 1512.04150); Grad-CAM, Selvaraju et al. 2017 (arXiv 1610.02391).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..models.attention import at_least_float32
from ..models.vit import split_tokens, token_grid
from .slots import check_labels, class_slots


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model without dropout and the like; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def cam(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Class activation maps relu(w_c . f_j): (B, C, h, w), not normalised, zero for absent classes.

    model: a `CamViT`. images (B, 3, H, W), normalised; labels (B, C) multi-hot. The maps are float32, or
    float64 for a model in float64. Raises ValueError for other shapes and values, and a model without patch
    logits, such as GETAM's network.
    """
    check_labels(labels, len(images), model.num_classes)
    _check_patch_head(model)
    with eval_mode(model):
        evidence = model.activation_maps(model.forward_heads(images).features)
    maps = at_least_float32(evidence).relu()
    return maps.masked_fill((labels == 0).to(maps.device)[:, :, None, None], 0)


def _check_patch_head(model: nn.Module) -> None:
    if not hasattr(model, "activation_maps"):
        name = type(model).__name__
        raise ValueError(f"model: found {name}, which says nothing of single patches, expected one that does")


@torch.enable_grad()
def grad_cam(model: nn.Module, images: Tensor, labels: Tensor, layer: int | None = None) -> Tensor:
    """Grad-CAM: relu(sum_d alpha_cd f_jd), alpha_cd = mean over patches of dy_c/df_jd: (B, C, h, w).

    Arguments and output as of `cam`.
    layer None: f are the features that the patch head reads, y_c is the pooled patch logit. Then Grad-CAM is
    CAM / (h*w) for any pooling of the top k: y_c = b_c + (1/k) sum_{j in top k} w_c . f_j, so dy_c/df_jd is
    w_cd / k at k patches and 0 elsewhere, and its mean over the h*w patches is w_cd / (h*w).
    layer int: f are the patch tokens that this block puts out (negative counts from the last), y_c is the
    model's logit, `model(images)`. At the last block, still before the final norm, it is no longer CAM.

    Works under `torch.no_grad()`; parameters and their gradients are left alone. One backward pass per class
    slot. Raises ValueError as `cam`, and for a layer that the model does not have.
    """
    check_labels(labels, len(images), model.num_classes)
    index, valid = (t.to(images.device) for t in class_slots(labels))
    with eval_mode(model):
        if layer is None:
            _check_patch_head(model)
            features, logits = _from_features(model, images)
        else:
            features, logits = _from_block(model, images, layer)
        maps = at_least_float32(features.new_zeros(*labels.shape, *features.shape[-2:]))
        for k in range(index.shape[1]):
            chosen = logits.gather(1, index[:, k : k + 1])[:, 0]  # (B, C) -> (B,)
            more = k + 1 < index.shape[1]
            (gradient,) = torch.autograd.grad(chosen.sum(), features, retain_graph=more)  # (B, D, h, w)
            alpha = gradient.mean(dim=(2, 3), keepdim=True)  # (B, D, 1, 1)
            slot = at_least_float32((alpha * features.detach()).sum(dim=1).relu())  # (B, h, w)
            rows = valid[:, k].nonzero()[:, 0]  # images that have a k-th class
            maps[rows, index[rows, k]] = slot[rows]
    return maps


def _from_features(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Final features (B, D, h, w) as a leaf, and the pooled patch logits (B, C) as a function of them."""
    with torch.no_grad():  # nothing is differentiated through the backbone
        features = model.forward_heads(images).features
    features = features.detach().requires_grad_()
    return features, model.pool_logits(model.patch_logits(features))


def _from_block(model: nn.Module, images: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Patch tokens of a block's output (B, D, h, w) as a leaf, and the logits (B, C) that follow."""
    blocks, prefix = model.backbone.blocks, model.num_prefix_tokens
    if isinstance(layer, bool) or not isinstance(layer, int) or not -len(blocks) <= layer < len(blocks):
        raise ValueError(f"layer: found {layer}, expected None or a block, {-len(blocks)}..{len(blocks) - 1}")
    grid, seen = token_grid(model.backbone, images), []

    def cut(block: nn.Module, inputs: tuple, tokens: Tensor) -> Tensor:
        # A fresh leaf: the graph starts here, also where the weights are frozen, and not at the picture.
        first, patches = split_tokens(tokens.detach(), prefix, grid)
        seen.append(patches.requires_grad_())
        # (B, D, h, w) -> (B, h*w, D) -> (B, P + h*w, D)
        return torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1)

    handle = blocks[layer].register_forward_hook(cut)
    try:
        logits = model(images)
    finally:
        handle.remove()
    return seen[0], logits
