"""The segmentation losses, pixel by pixel in float64, with their gradients to logits or probabilities."""

import math

import numpy as np


def softmax(logits):
    """(C+1, ...) -> the same."""
    out = np.exp(logits - logits.max(0, keepdims=True))
    return out / out.sum(0, keepdims=True)


def balanced(logits, masks):
    """logits (B, C+1, H, W), masks (B, H, W) -> (loss, gradient); nan where a side is missing."""
    gradient, total = np.zeros_like(logits), 0.0
    for wanted in (lambda m: m == 0, lambda m: m not in (0, 255)):
        places = [place for place in np.ndindex(masks.shape) if wanted(masks[place])]
        if not places:
            return math.nan, None
        for b, y, x in places:
            p, label = softmax(logits[b, :, y, x]), masks[b, y, x]
            total -= math.log(p[label]) / len(places)
            gradient[b, :, y, x] += p / len(places)
            gradient[b, label, y, x] -= 1 / len(places)
    return total, gradient


def saliency(logits, truth):
    """logits (B, C+1, H, W), truth (B, H, W), 1 is foreground -> mean cross entropy of p_background."""
    total = 0.0
    for b, y, x in np.ndindex(truth.shape):
        p, target = softmax(logits[b, :, y, x])[0], 1 - float(truth[b, y, x])
        total -= target * math.log(p) + (1 - target) * math.log(1 - p)
    return total / truth.size


def kernel(image, sigma_xy, sigma_rgb):
    """image (3, H, W) -> (N, N), every pair of pixels."""
    _, height, width = image.shape
    pixels = [(y, x) for y in range(height) for x in range(width)]
    out = np.zeros((len(pixels), len(pixels)))
    for i, (y, x) in enumerate(pixels):
        for j, (v, u) in enumerate(pixels):
            place = ((y - v) ** 2 + (x - u) ** 2) / (2 * sigma_xy**2)
            squares = sum(float(a - b) ** 2 for a, b in zip(image[:, y, x], image[:, v, u]))
            out[i, j] = math.exp(-place - squares / (2 * sigma_rgb**2))
    return out


def dense_energy(p, kernels, unknown, inside, published):
    """p (B, C+1, h, w), kernels B x (N, N), unknown and inside (B, h, w) -> (value, gradient to p)."""
    batch, classes, height, width = p.shape
    value, gradient = 0.0, np.zeros((batch, classes, height * width))
    for b in range(batch):
        q, known, here = p[b].reshape(classes, -1), ~unknown[b].flatten(), inside[b].flatten().astype(float)
        gate = np.array([max(0.0, i - m) if k else 1.0 for i, m, k in zip(here, q.max(0), known)])
        for c in range(classes):
            s = q[c] * here
            filtered = kernels[b] @ s
            value -= (s * gate * filtered).sum() / batch
            if published:
                gradient[b, c] = -2 * here * gate * filtered / batch
            else:  # the gate is a constant
                gradient[b, c] = -here * (gate * filtered + kernels[b].T @ (gate * s)) / batch
    return value, gradient.reshape(p.shape)
