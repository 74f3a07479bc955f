"""GETAM, attention and rollout the plain way: maps written out, N x N, one picture and class at a time."""

from contextlib import contextmanager

import torch


@contextmanager
def attention_maps(backbone):
    """Inside, a forward pass of a timm ViT appends each block's attention (B, H, N, N) to the list."""
    maps, handles, modules = [], [], [block.attn for block in backbone.blocks]
    fused = [module.fused_attn for module in modules]
    for module in modules:
        module.fused_attn = False  # softmax(q k^T) is then a tensor, which goes through the module attn_drop
        handles.append(module.attn_drop.register_forward_hook(lambda _m, _i, out: maps.append(out)))
    try:
        yield maps
    finally:
        for module, handle, flag in zip(modules, handles, fused):
            module.fused_attn = flag
            handle.remove()


def combine(attention, gradient, variant):
    """A and G of one block and picture (H, N) -> (N,), head by head."""
    heads = len(attention)
    gain = sum(gradient[h].clamp(min=0) for h in range(heads)) / heads
    weighted = sum((attention[h] * gradient[h]).clamp(min=0) for h in range(heads)) / heads
    return {"cam_grad_s": weighted * gain, "grad_s": gain * gain, "cam_grad": weighted, "grad": gain}[variant]


def getam(backbone, forward, images, labels, start_layer, variant, grid):
    """forward: images -> logits (B, C). Maps (B, C, h, w), each from a forward and a backward of its own."""
    maps = torch.zeros(*labels.shape, *grid, dtype=images.dtype)
    for b in range(len(images)):
        for c in range(labels.shape[1]):
            if not labels[b, c]:
                continue
            with attention_maps(backbone) as attention:
                logits = forward(images[b : b + 1])
            gradients = torch.autograd.grad(logits[0, c], attention[start_layer:], allow_unused=True)
            total = 0
            for a, g in zip(attention[start_layer:], gradients):
                total = total + combine(a[0, :, 0].detach(), g[0, :, 0], variant)  # row of the class token
            maps[b, c] = total[backbone.num_prefix_tokens :].reshape(grid)
    return maps


def getam_loop(backbone, model, images, labels, start_layer, variant, grid):
    """The published loop: one forward of the batch, then a backward of all of it, weights included, for each
    picture and class; every block keeps its attention (B, H, N, N) and the gradient of it.

    Extra memory: per block the softmax and its gradient, 2 B H N^2 numbers, and all activations.
    """
    maps = torch.zeros(*labels.shape, *grid, dtype=images.dtype)
    with attention_maps(backbone) as attention:
        logits = model(images)
    for a in attention:
        a.retain_grad()
    for b, c in labels.nonzero().tolist():
        model.zero_grad(set_to_none=True)
        for a in attention:
            a.grad = None
        logits[b, c].backward(retain_graph=True)
        total = 0
        for a in attention[start_layer:]:
            total = total + combine(a[b, :, 0].detach(), a.grad[b, :, 0], variant)
        maps[b, c] = total[backbone.num_prefix_tokens :].reshape(grid)
    model.zero_grad(set_to_none=True)
    return maps


def class_attention(attention, start_layer):
    """Maps of all blocks, (B, H, N, N) each -> the class token's row, mean over heads and blocks, (B, N)."""
    rows = [a[:, h, 0] for a in attention[start_layer:] for h in range(a.shape[1])]
    return sum(rows) / len(rows)


def rollout(attention, start_layer):
    """Maps of all blocks -> the class token's row of the whole product, first block innermost, (B, N)."""
    product = torch.eye(attention[0].shape[-1], dtype=attention[0].dtype)
    for a in attention[start_layer:]:
        product = (a.mean(dim=1) + torch.eye(a.shape[-1], dtype=a.dtype)) / 2 @ product
    return product[:, 0]
