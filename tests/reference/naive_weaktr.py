"""WeakTr the plain way: every attention map written out, one picture, block and head at a time."""

import numpy as np
import torch
import torch.nn.functional as F

from .naive_getam import attention_maps


def numbers(tensor):
    return tensor.detach().double().numpy()


def record(model, images):
    """One pass: attention of each block (B, H, N, N), what its projection takes and gives (B, N, D), and the
    tokens that the last block puts out."""
    taken, given, tokens, handles = [], [], [], []
    for block in model.backbone.blocks:
        handles.append(block.attn.proj.register_forward_pre_hook(lambda _m, i: taken.append(numbers(i[0]))))
        handles.append(block.attn.proj.register_forward_hook(lambda _m, _i, out: given.append(numbers(out))))
    last = model.backbone.blocks[-1]
    handles.append(last.register_forward_hook(lambda _m, _i, out: tokens.append(out.detach())))
    with torch.no_grad(), attention_maps(model.backbone) as maps:
        model(images)
    for handle in handles:
        handle.remove()
    return [numbers(m) for m in maps], taken, given, tokens[0]


def head_weights(model, taken, given, picture):
    """(L, H): the adaptive attention fusion for one picture."""
    fusion, depth = model.fusion, len(taken)
    heads = fusion.num_heads
    (w1, b1), (w2, b2) = ((numbers(layer.weight), numbers(layer.bias)) for layer in fusion.describe)
    scores = []
    for h in range(heads):  # the blocks of one head side by side
        for l in range(depth):
            if model.published:
                features = given[l][picture][:, h::heads]
            else:
                width = taken[l].shape[-1] // heads
                features = taken[l][picture][:, h * width : (h + 1) * width]
            pooled = features.max(axis=0) if fusion.pool == "max" else features.mean(axis=0)
            scores.append((w2 @ (w1 @ pooled + b1) + b2).item())
    hidden = np.maximum(numbers(fusion.weigh[0].weight) @ np.array(scores), 0)
    weights = 1 / (1 + np.exp(-numbers(fusion.weigh[2].weight) @ hidden))
    return np.array([[weights[h * depth + l] for h in range(heads)] for l in range(depth)])


def predictions(model, images):
    """Dict of class_logits, coarse_logits, fine_logits (B, C), coarse_cam, fused_cam, fine_cam (B, C, h, w),
    head_weights (B, L, H) and attention_map (B, N, N), float64."""
    maps, taken, given, tokens = record(model, images)
    classes, prefix, stride = model.num_classes, model.num_prefix_tokens, model.patch_stride
    grid = images.shape[2] // stride, images.shape[3] // stride
    patches = tokens[:, prefix:].transpose(1, 2).unflatten(2, grid)
    coarse = numbers(F.conv2d(patches, model.coarse_head.weight, model.coarse_head.bias, padding=1))
    found = []
    for b in range(len(images)):
        weights, total = head_weights(model, taken, given, b), 0
        for l, attention in enumerate(maps):
            for h in range(attention.shape[1]):
                total = total + weights[l, h] * attention[b, h] / weights.size
        fused, fine = np.zeros((classes, *grid)), np.zeros((classes, *grid))
        for c in range(classes):
            fused[c] = total[c, prefix:].reshape(grid) * np.maximum(coarse[b, c], 0)
            fine[c] = (total[prefix:, prefix:] @ fused[c].ravel()).reshape(grid)
        found.append({
            "class_logits": numbers(tokens[b, :classes]).mean(axis=1),
            "coarse_logits": coarse[b].mean((1, 2)), "fine_logits": fine.mean((1, 2)),
            "coarse_cam": coarse[b], "fused_cam": fused, "fine_cam": fine,
            "head_weights": weights, "attention_map": total})
    return {name: torch.from_numpy(np.stack([one[name] for one in found])) for name in found[0]}


def clipped(losses, start, patch):
    """Losses (B, H, W) -> (clipped (B, H, W), kept (B, H, W) bool), pixel by pixel."""
    batch, height, width = losses.shape
    mean = losses.sum() / losses.size
    out, kept = losses.copy(), np.ones(losses.shape, dtype=bool)
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                top, left = y // patch * patch, x // patch * patch
                square = [losses[i, r, s] for i in range(batch) for r in range(top, min(top + patch, height))
                          for s in range(left, min(left + patch, width))]
                threshold = max(sum(square) / len(square), mean)
                if mean <= start and losses[b, y, x] > threshold:
                    out[b, y, x], kept[b, y, x] = threshold, False
    return out, kept
