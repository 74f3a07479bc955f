"""ACR the plain way: where patches move to, its loss and maps of attention written out; golden weights."""

import math
import zlib

import numpy as np
import torch

from . import naive_getam


def moved(view, row, column, grid):
    """Where patch (row, column) of an (h, w) grid lies in the view; rotations are counter-clockwise."""
    height, width = grid
    return {
        "hflip": (row, width - 1 - column),
        "vflip": (height - 1 - row, column),
        "rot90": (width - 1 - column, row),
        "rot180": (height - 1 - row, width - 1 - column),
        "rot270": (column, height - 1 - row),
        "transpose": (column, row),
    }[view]


def permutation(view, grid):
    """Index in the view of every patch, row by row: a list of h*w numbers."""
    width = grid[0] if view in ("rot90", "rot270", "transpose") else grid[1]  # of the view
    places = [moved(view, row, column, grid) for row in range(grid[0]) for column in range(grid[1])]
    return [row * width + column for row, column in places]


def losses(backbone, model, images, other, labels, order, layers):
    """ACR's four terms, unweighted: classes of both views, region, affinity. other: the second view; order: a
    list, where its patches lie. Autograd goes through every attention map, 2 L B H N^2 numbers.
    """
    prefix, classes, attention = backbone.num_prefix_tokens, [], []
    for pictures in (images, other):
        with naive_getam.attention_maps(backbone) as maps:
            logits = model(pictures)
        p = logits.sigmoid()
        classes.append(-(labels * p.log() + (1 - labels) * (1 - p).log()).mean())
        attention.append([maps[layer].mean(dim=1) for layer in layers])  # (B, H, N, N) -> (B, N, N)
    tokens = [prefix + place for place in order]
    region = affinity = 0
    for one, two in zip(*attention):
        region = region + (one[:, 0, prefix:] - two[:, 0, tokens]).abs().mean() / len(layers)
        patches = two[:, tokens][:, :, tokens]
        affinity = affinity + (one[:, prefix:, prefix:] - patches).abs().mean() / len(layers)
    return *classes, region, affinity


def maps(backbone, forward, images, labels, start_layer, variant, grid):
    """GETAM's maps (B, C, h, w), and what the patch affinity of all blocks, written out, makes of them."""
    found = naive_getam.getam(backbone, forward, images, labels, start_layer, variant, grid)
    with torch.no_grad(), naive_getam.attention_maps(backbone) as attention:
        forward(images)
    prefix, spread = backbone.num_prefix_tokens, torch.zeros_like(found)
    for b, c in labels.nonzero().tolist():
        column = found[b, c].flatten()
        for a in attention:
            for head in a[b]:
                spread[b, c] += (head[prefix:, prefix:] @ column).reshape(grid) / len(a[b])
    return found, spread


def golden_weight(name, shape):
    """The tensor of a golden network called `name`, float32: `naive_attention.formula_weight`, thirteen times
    as fast, for networks of 86 M weights. Unsigned numbers of 32 bits wrap by themselves."""
    count = math.prod(shape)
    x = np.arange(count, dtype=np.uint32) * np.uint32(0x9E3779B1) + np.uint32(zlib.crc32(name.encode()))
    for shift, multiplier in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x ^= x >> np.uint32(shift)
        x *= np.uint32(multiplier)
    x ^= x >> np.uint32(16)
    s = (x / 2**31 - 1).reshape(shape)
    if len(shape) == 1:
        s = 1 + 0.1 * s if name.endswith("weight") else 0.02 * s
    else:
        s *= 0.05 if len(shape) == 3 else math.sqrt(3 * shape[0] / count)
    return torch.from_numpy(s.astype(np.float32))
