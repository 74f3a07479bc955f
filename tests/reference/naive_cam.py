"""Maps and pseudo labels by explicit loops in float64: slow, and simple enough to be checked by eye."""

import math

import numpy as np


def cam(features, weight, labels):
    """features (B, D, h, w), weight (C, D), labels (B, C) -> relu(w_c . f_j), (B, C, h, w)."""
    batch, dim, height, width = features.shape
    maps = np.zeros((batch, len(weight), height, width))
    for b in range(batch):
        for c in range(len(weight)):
            if not labels[b][c]:
                continue
            for y in range(height):
                for x in range(width):
                    score = 0.0
                    for d in range(dim):
                        score += float(weight[c][d]) * float(features[b, d, y, x])
                    maps[b, c, y, x] = max(score, 0.0)
    return maps


def top_mean(values, k):
    """Mean of the k highest numbers."""
    return sum(sorted((float(v) for v in values), reverse=True)[:k]) / k


def grad_cam(features, logits, step=1e-5):
    """features (D, h, w), logits: (D, h, w) -> (C,). Grad-CAM of one picture, (C, h, w), by differences.

    A channel's mean gradient over the patches is the slope of the logit when the channel rises everywhere.
    """
    dim, height, width = features.shape
    total = 0.0
    for d in range(dim):
        shift = np.zeros_like(features)
        shift[d] = step
        slope = (logits(features + shift) - logits(features - shift)) / (2 * step)  # (C,)
        total = total + (slope / (height * width))[:, None, None] * features[d]
    return np.maximum(total, 0)


def resize(image, size):
    """(h, w) -> (H, W), bilinear, pixel centres at half-integers (align_corners False), edges repeated."""
    (height, width), out = image.shape, np.zeros(size)
    for y in range(size[0]):
        for x in range(size[1]):
            sy = max((y + 0.5) * height / size[0] - 0.5, 0)
            sx = max((x + 0.5) * width / size[1] - 0.5, 0)
            y0, x0 = math.floor(sy), math.floor(sx)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            fy, fx = sy - y0, sx - x0
            top = image[y0, x0] * (1 - fx) + image[y0, x1] * fx
            low = image[y1, x0] * (1 - fx) + image[y1, x1] * fx
            out[y, x] = top * (1 - fy) + low * fy
    return out


def scores(maps, labels, size):
    """Raw maps (B, C, h, w) -> (B, C, H, W): absent classes 0, divided by the maximum, resized."""
    batch, classes = maps.shape[:2]
    out = np.zeros((batch, classes, *size))
    for b in range(batch):
        for c in range(classes):
            if labels[b][c] and maps[b, c].max() > 0:
                out[b, c] = resize(maps[b, c] / maps[b, c].max(), size)
    return out


def masks(scored, background):
    """Scores (B, C, H, W) -> (B, H, W): argmax over [background, scores], ties to the background."""
    batch, classes, height, width = scored.shape
    out = np.zeros((batch, height, width), int)
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                best = background
                for c in range(classes):
                    if scored[b, c, y, x] > best:
                        best, out[b, y, x] = scored[b, c, y, x], c + 1
    return out
