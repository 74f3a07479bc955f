"""Attention maps, their weighted sum and AFA's affinity by loops in float64, and WeakTr's q and k by hand.

`formula_weight` makes the weights of the golden networks from their names: nothing of them is stored.
"""

import math
import zlib

import numpy as np


def attention_map(q, k, scale):
    """softmax(scale q k^T), (N, d), (N, d) -> (N, N)."""
    out = np.zeros((len(q), len(k)))
    for i in range(len(q)):
        scores = [scale * sum(float(x) * float(y) for x, y in zip(q[i], k[j])) for j in range(len(k))]
        highest = max(scores)
        exponentials = [math.exp(score - highest) for score in scores]
        out[i] = [e / sum(exponentials) for e in exponentials]
    return out


def weighted_sum(q, k, weights, scale):
    """q, k (B, M, N, d), weights (B, M) -> sum_m w_m A_m, (B, N, N)."""
    batch, maps, n, _ = q.shape
    out = np.zeros((batch, n, n))
    for b in range(batch):
        for m in range(maps):
            out[b] += float(weights[b, m]) * attention_map(q[b, m], k[b, m], scale)
    return out


def affinity(q, k, weight, bias):
    """q, k (B, M, N, d), weight (M,), bias a number -> sigmoid(sum_m w_m (S_m + S_m^T) + b), (B, N, N)."""
    batch, maps, n, _ = q.shape
    out = np.zeros((batch, n, n))
    for b in range(batch):
        for i in range(n):
            for j in range(n):
                total = float(bias)
                for m in range(maps):
                    there = sum(float(x) * float(y) for x, y in zip(q[b, m, i], k[b, m, j]))
                    back = sum(float(x) * float(y) for x, y in zip(q[b, m, j], k[b, m, i]))
                    total += float(weight[m]) * (there + back)
                out[b, i, j] = 1 / (1 + math.exp(-total))
    return out


def formula_weight(name, shape, salt=""):
    """The tensor of a golden network called `name`: white noise from an integer hash of every index."""
    count, bits = math.prod(shape), 2**32
    x = (np.arange(count, dtype=np.uint64) * 0x9E3779B1 + zlib.crc32((salt + name).encode())) % bits
    for shift, multiplier in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> np.uint64(shift))) * multiplier) % bits
    x ^= x >> np.uint64(16)
    s = (x / 2**31 - 1).reshape(shape)
    if len(shape) == 1:
        s = 1 + 0.1 * s if name.endswith("weight") else 0.02 * s
    elif len(shape) == 3:
        s = 0.05 * s
    else:
        s = s * math.sqrt(3 * shape[0] / count)
    return s.astype(np.float32).astype(np.float64)  # the networks hold float32


def weaktr_queries_and_keys(images, dim, depth, heads, classes, patch, salt):
    """q and k of every block of a ViT with a class token per class: two arrays (B, depth, heads, N, d)."""

    def weight(name, *shape):
        return formula_weight(name, shape, salt)

    def linear(x, name, width):
        return x @ weight(f"{name}.weight", width, x.shape[-1]).T + weight(f"{name}.bias", width)

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return scaled * weight(f"{name}.weight", dim) + weight(f"{name}.bias", dim)

    batch, _, height, width = images.shape
    h, w = height // patch, width // patch
    # (B, 3, h*p, w*p) -> (B, h*w, 3*p*p)
    patches = images.reshape(batch, 3, h, patch, w, patch).transpose(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(batch, h * w, -1)
    kernel = weight("patch_embed.proj.weight", dim, 3, patch, patch).reshape(dim, -1)
    tokens = patches @ kernel.T + weight("patch_embed.proj.bias", dim)
    classes_first = np.repeat(weight("cls_token", 1, classes, dim), batch, 0)
    x = np.concatenate([classes_first, tokens], 1) + weight("pos_embed", 1, classes + h * w, dim)
    queries, keys = [], []
    for block in (f"blocks.{l}" for l in range(depth)):
        # (B, N, 3*D) -> (3, B, H, N, d)
        q, k, v = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv", 3 * dim).reshape(
            batch, -1, 3, heads, dim // heads
        ).transpose(2, 0, 3, 1, 4)
        scores = np.exp(q @ k.transpose(0, 1, 3, 2) / math.sqrt(dim // heads))
        out = (scores / scores.sum(-1, keepdims=True)) @ v
        x = x + linear(out.transpose(0, 2, 1, 3).reshape(x.shape), f"{block}.attn.proj", dim)
        hidden = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1", 4 * dim)
        gelu = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        x = x + linear(gelu, f"{block}.mlp.fc2", dim)
        queries.append(q)
        keys.append(k)
    return np.stack(queries, 1), np.stack(keys, 1)
