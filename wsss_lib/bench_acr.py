"""ACR's loss for `bench`: what it adds to a training step, with the kernel and with attention written out."""

from __future__ import annotations

import copy

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bench import Calls, Case
from .bench_getam import CLASSES, random_vit
from .data.views import permutation, transform
from .kernels.baselines import consistency_terms
from .models.attention import module_flags
from .training.consistency import consistency_loss

VIEW = "hflip"


def plain_step(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """The two views' class loss alone, forward and backward: (the class loss,)."""
    logits = [model(view) for view in (images, transform(images, VIEW))]
    loss = sum(F.multilabel_soft_margin_loss(x, labels) for x in logits)
    return _backward(model, loss, loss)[:1]


def written_out_step(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """The same with both consistency terms, each block's attention (B, H, N, N) written out and kept: (the class loss,
    the loss, the first block's gradient)."""
    grid, prefix = model.patch_embed.dynamic_feat_size(images.shape[-2:]), model.num_prefix_tokens
    order, attention = permutation(VIEW, grid).to(images.device), []
    hooks = [block.attn.attn_drop.register_forward_hook(lambda _module, _inputs, out: attention.append(out.mean(1)))
             for block in model.blocks]
    try:
        with module_flags(model, fused_attn=False):
            logits = [model(view) for view in (images, transform(images, VIEW))]
    finally:
        for hook in hooks:
            hook.remove()
    depth = len(model.blocks)
    views = zip(attention[:depth], attention[depth:])  # of each block (B, N, N) twice
    consistency = 100 * torch.stack([sum(consistency_terms(one, two, order, prefix)) for one, two in views]).mean()
    classes = sum(F.multilabel_soft_margin_loss(x, labels) for x in logits)
    return _backward(model, classes, classes + consistency)


def step(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """As `written_out_step`, by `consistency_loss`, which keeps no attention."""
    losses = consistency_loss(model, images, labels, VIEW)
    return _backward(model, losses["class"] + losses["class_view"], sum(losses.values()))


def _backward(model: nn.Module, classes: Tensor, loss: Tensor) -> tuple[Tensor, ...]:
    loss.backward()
    gradient = model.blocks[0].attn.qkv.weight.grad
    model.zero_grad()  # so that each call starts with the weights alone
    return classes.detach(), loss.detach(), gradient


def acr_cases(size: str, dtype: torch.dtype) -> list[Case]:
    """Random weights; paper: ViT-B at 384 pixels, one picture a GPU; small: ViT-Ti at 224. The first case compares
    two ways to the same step, the second a step without the consistency terms with one that has them."""
    name, pixels = {"tiny": ("vit_tiny_patch16_224", 32), "small": ("vit_tiny_patch16_224", 224),
                    "paper": ("vit_base_patch16_384", 384)}[size]
    with torch.device("meta"):
        vit = timm.create_model(name, img_size=pixels)
    depth, width, heads = len(vit.blocks), vit.embed_dim, vit.blocks[0].attn.num_heads
    n = vit.patch_embed.num_patches + 1
    # Forward and, twice that, backward of two views; the terms read each map once more, there and back.
    flops = 2 * 3 * depth * (24 * n * width**2 + 4 * n * n * width) + 2 * 3 * depth * 2 * n * n * width
    needs = 8 * 2 * depth * (3 * heads * n * n + 20 * n * width) + 2 * 8 * 12 * depth * width**2
    sizes = {"bytes": 3 * 4 * 12 * depth * width**2, "flops": flops, "needs": needs}
    title = f"{name.split('_patch')[0]}, {pixels} pixels, a step"
    return [
        Case("acr_step", f"{title}, attention written out or not", lambda d: _calls(name, pixels, d, True), **sizes),
        Case("acr_step", f"{title}, without the terms or with", lambda d: _calls(name, pixels, d, False), **sizes),
    ]


def _calls(name: str, pixels: int, device: torch.device, same: bool) -> Calls:
    generator, model = torch.Generator().manual_seed(0), random_vit(name, pixels).to(device)
    images = torch.randn(1, 3, pixels, pixels, generator=generator).to(device)
    labels = (torch.rand(1, CLASSES, generator=generator) < 0.1).float().to(device)
    double = copy.deepcopy(model).double()
    if same:
        return Calls(
            baseline=lambda: written_out_step(model, images, labels),
            ours=lambda: step(model, images, labels),
            exact=lambda: written_out_step(double, images.double(), labels.double()),
        )
    return Calls(  # what the two steps have in common is the class loss
        baseline=lambda: plain_step(model, images, labels),
        ours=lambda: step(model, images, labels)[:1],
        exact=lambda: plain_step(double, images.double(), labels.double()),
    )
