"""GETAM for `bench`: the published loop, and the cases that compare it with `localization.getam`."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import timm
import torch
from torch import Tensor, nn

from .bench import Calls, Case
from .localization.getam import combine_rows, getam
from .models.attention import module_flags

CLASSES = 20


def getam_loop(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The published loop, from the middle block on: (B, C, h, w). model: a classifier of timm.

    One forward pass of the batch, in which each block writes out its attention (B, H, N, N) and keeps it, and
    for each picture and class a backward pass of all of it, to the weights too, which leaves the gradient of
    every map. At the peak: attention and gradient of each block, all activations, the weights' gradients.
    """
    grid, attention = model.patch_embed.dynamic_feat_size(images.shape[-2:]), []
    maps = images.new_zeros(*labels.shape, *grid)
    hooks = [
        block.attn.attn_drop.register_forward_hook(lambda _module, _inputs, out: attention.append(out))
        for block in model.blocks
    ]
    try:
        with torch.enable_grad(), module_flags(model, fused_attn=False):
            logits = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    for a in attention:
        a.retain_grad()
    for b, c in labels.nonzero().tolist():
        model.zero_grad()
        for a in attention:
            a.grad = None
        logits[b, c].backward(retain_graph=True)
        counted = attention[len(attention) // 2 :]
        rows = sum(combine_rows(a.detach()[b, :, 0], a.grad[b, :, 0]) for a in counted)  # (H, N) each -> (N,)
        maps[b, c] = rows[model.num_prefix_tokens :].unflatten(0, grid)
    model.zero_grad()
    return maps


def getam_cases(size: str, dtype: torch.dtype) -> list[Case]:
    """Random weights, from the middle block on; small: 2 pictures with 3 classes in all, paper: 4 with 7."""
    if size == "paper":
        vits = [("vit_small_patch16_224", 224), ("vit_base_patch16_384", 384)]
        return [getam_case(name, pixels, classes=(1, 2, 3, 1)) for name, pixels in vits]
    return [getam_case("vit_tiny_patch16_224", {"tiny": 32, "small": 224}[size], classes=(1, 2))]


def getam_case(name: str, pixels: int, classes: Sequence[int]) -> Case:
    """name: of a ViT of timm. classes: how many each picture has."""
    with torch.device("meta"):
        vit = timm.create_model(name, img_size=pixels)
    depth, width, heads = len(vit.blocks), vit.embed_dim, vit.blocks[0].attn.num_heads
    n, batch, slots = vit.patch_embed.num_patches + 1, len(classes), sum(classes)
    layers, product = 24 * n * width**2, 2 * n * n * width  # operations of a block's layers; of q k^T or A v
    # Forward: every block. Backward, once for each class of each picture: as much again for the layers, and
    # q k^T with four more products for attention, in the blocks behind the first that counts; in that one the
    # layers behind its attention only, three quarters of them.
    behind = depth - depth // 2 - 1
    backward = behind * (layers + 5 * product) + 0.75 * layers
    weights = 12 * depth * width**2
    # Of a picture: attention, its gradient, in one block the scores, and about 20 D activations a token.
    picture = (2 * depth + 1) * heads * n * n + 20 * depth * n * width
    return Case(
        "getam", f"{name.split('_patch')[0]}, {pixels} pixels, {batch} pictures, {slots} classes",
        make=lambda device: _calls(name, pixels, classes, device),
        bytes=4 * weights,  # read once; pictures and maps are small beside them
        flops=batch * depth * (layers + 2 * product) + slots * backward,
        # The batch in float32, or one picture in float64; with the weights' gradients, here and copied.
        needs=max(4 * (batch * picture + weights), 8 * (picture + 3 * weights)),
    )


def _calls(name: str, pixels: int, classes: Sequence[int], device: torch.device) -> Calls:
    generator, model = torch.Generator().manual_seed(0), random_vit(name, pixels).to(device)
    images = torch.randn(len(classes), 3, pixels, pixels, generator=generator).to(device)
    labels = torch.zeros(len(classes), CLASSES)
    for row, count in zip(labels, classes):
        row[torch.randperm(CLASSES, generator=generator)[:count]] = 1
    labels = labels.to(device)
    return Calls(
        baseline=lambda: (getam_loop(model, images, labels),),
        ours=lambda: (getam(model, images, labels),),
        exact=lambda: (_exact(model, images, labels),),
    )


def _exact(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The loop in float64, one picture at a time: in eval mode they do not mix, and it needs less memory."""
    model = copy.deepcopy(model).double()
    pictures = zip(images.double().split(1), labels.split(1))
    return torch.cat([getam_loop(model, image, label) for image, label in pictures])


def random_vit(name: str, pixels: int) -> nn.Module:
    """A classifier of timm with weights that make its attention uneven and its logits differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, img_size=pixels, num_classes=CLASSES).eval()
        for block in model.blocks:
            block.attn.qkv.weight.data.mul_(4)
        nn.init.normal_(model.head.weight, std=0.1)
    return model
