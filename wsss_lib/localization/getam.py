"""GETAM: class maps from the class token's attention and the gradient of a class logit to it.

Source: GETAM, Sun et al. 2021 (arXiv 2112.02841); the variants are named as in ACR's code (arXiv 2308.04321).
The trick: with the tape (`models.attention`) neither the attention nor its gradient is ever N x N, and one
backward pass serves many images, each with a class of its own (`slots`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..models.attention import AttentionTape, at_least_float32, module_flags
from ..models.vit import num_class_tokens, token_grid
from .cam import eval_mode
from .slots import check_labels, class_slots

VARIANTS = ("cam_grad_s", "grad_s", "cam_grad", "grad")
HEADS = ("both", "class", "patch")
CPU_PASS = 2**17  # numbers in the tokens of a pass: on a CPU a longer one is hardly faster, and keeps more


@torch.inference_mode(False)
@torch.enable_grad()
def getam(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    start_layer: int | None = None,
    variant: str = "cam_grad_s",
    head: str = "both",
) -> Tensor:
    """GETAM maps: (B, C, h, w), not negative, not normalised, zero for absent classes.

    model: a `CamViT`, or a classifier of timm with a class token. images (B, 3, H, W), normalised; labels
    (B, C) multi-hot. start_layer: the first block that counts; None is half of the depth. variant: see
    `combine_rows`; "cam_grad_s" is the paper's. head: the logit y_c that is differentiated: "class" is the
    class token's, "patch" the pooled patches', "both" what the model returns; models without
    `forward_heads` have "both" only. The maps are float32, or float64 for a model in float64.

    The map is the sum over blocks of `combine_rows`, at the patches. Runs in eval mode, under
    `torch.no_grad()` too; parameters and their gradients are left alone. Images with equally many classes
    share a forward pass and one backward pass per class; blocks before start_layer take part in no graph.
    Raises ValueError for other shapes and values.
    """
    check_labels(labels, len(images), model.num_classes)
    backbone = getattr(model, "backbone", model)
    start = first_layer(backbone, start_layer)
    if variant not in VARIANTS:
        raise ValueError(f"variant: found {variant!r}, expected one of {', '.join(VARIANTS)}")
    _check_head(model, head)
    images, grid, prefix = images.detach(), token_grid(backbone, images), backbone.num_prefix_tokens
    maps = at_least_float32(images.new_zeros(*labels.shape, *grid))
    width = backbone.embed_dim * (prefix + grid[0] * grid[1])  # numbers in the tokens of one image
    longest = max(1, CPU_PASS // width) if images.device.type == "cpu" else max(1, len(images))
    # Recomputation in the backward pass would not be on the tape, so checkpointing is off.
    flags = module_flags(model, fused_attn=True, grad_checkpointing=False)
    with eval_mode(model), flags, frozen(model):
        for rows, index in _passes(labels, longest):
            rows, index = rows.to(images.device), index.to(images.device)
            with AttentionTape(start) as tape:
                logits = _logits(model, images[rows], head)
            check_calls(tape, len(backbone.blocks) - start)
            found = _pass_rows(tape, logits, index, variant)
            # (b, K, P + h*w) -> (b, K, h*w) -> (b, K, h, w)
            maps[rows[:, None], index] = found[..., prefix:].unflatten(2, grid)
    return maps


def _passes(labels: Tensor, longest: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images that share a pass, at most `longest`: their rows (b,), and the K classes that each has (b, K).

    With equally many classes no class slot is empty, so no backward pass is wasted on an image that lacks it.
    """
    counts = labels.count_nonzero(dim=1)  # (B,)
    for count in counts.unique().tolist():
        if count:  # without a class there is no map
            for rows in (counts == count).nonzero()[:, 0].split(longest):
                yield rows, class_slots(labels[rows])[0]


def _pass_rows(tape: AttentionTape, logits: Tensor, index: Tensor, variant: str) -> Tensor:
    """What the tape of b images says of each token, for each image's own K classes (b, K): (b, K, N)."""
    gradients = tape.class_row_gradients(logits, (index, torch.ones_like(index, dtype=torch.bool)))
    with torch.no_grad():  # (L, b, H, N) and (K, L, b, H, N) -> (K, L, b, N)
        found = combine_rows(tape.class_rows(), gradients, variant)
    return found.sum(dim=1).transpose(0, 1)  # (K, L, b, N) -> (K, b, N) -> (b, K, N)


def combine_rows(attention: Tensor, gradient: Tensor, variant: str = "cam_grad_s") -> Tensor:
    """What one block says of each token: (..., H, N) and (..., H, N) -> (..., N), averaged over heads, >= 0.

    attention A: the class token's row; gradient G: that of the class logit to the row.
    "cam_grad_s": mean relu(A G) * mean relu(G); "grad_s": (mean relu(G))^2;
    "cam_grad": mean relu(A G); "grad": mean relu(G).
    """
    gain = gradient.relu().mean(dim=-2)
    if variant == "grad":
        return gain
    if variant == "grad_s":
        return gain * gain
    weighted = (attention * gradient).relu().mean(dim=-2)
    return weighted if variant == "cam_grad" else weighted * gain


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient, so nothing is kept for it; afterwards each is as it was."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _logits(model: nn.Module, images: Tensor, head: str) -> Tensor:
    if head == "both":
        return model(images)
    heads = model.forward_heads(images)
    return heads.class_logits if head == "class" else heads.pooled


def _check_head(model: nn.Module, head: str) -> None:
    if head not in HEADS:
        raise ValueError(f"head: found {head!r}, expected one of {', '.join(HEADS)}")
    if head != "both" and not hasattr(model, "forward_heads"):
        name = type(model).__name__
        raise ValueError(f'head: found {head!r}, expected "both": {name} has no forward_heads')


def check_class_token(backbone: nn.Module, why: str) -> None:
    """ValueError unless one token stands for the whole picture; WeakTr has one for each class instead."""
    found = backbone.cls_token.shape[1] if num_class_tokens(backbone) else "no"
    if found != 1:
        tokens = "token" if found == "no" else "tokens"
        raise ValueError(f"model: found {found} class {tokens}, expected one: {why}")


def first_layer(backbone: nn.Module, start_layer: int | None) -> int:
    """The first block that counts. ValueError for another, or where there is not one class token."""
    check_class_token(backbone, "the map is made of its attention")
    depth = len(backbone.blocks)
    start = depth // 2 if start_layer is None else start_layer
    if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start < depth:
        raise ValueError(f"start_layer: found {start_layer}, expected None or a block, 0..{depth - 1}")
    return start


def check_calls(tape: AttentionTape, blocks: int) -> None:
    """ValueError unless the tape has one call of attention for each of this many blocks."""
    calls = len(tape.blocks)
    if calls != blocks:
        raise ValueError(f"model: found {calls} calls of attention, expected {blocks}, one per block")
