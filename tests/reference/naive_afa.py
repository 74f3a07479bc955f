"""AFA by loops in float64: the random walk, affinity labels and loss, reliable labels; the golden weights."""

import math

import numpy as np
import torch

from . import naive_refinement
from .naive_attention import formula_weight


def golden_weight(name, shape):
    """A tensor of the golden networks, float32."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    values = formula_weight(name, tuple(shape))
    if name.endswith("running_var"):
        values = 1 + 0.1 * (values / 0.02) ** 2  # a variance; the formula made it as any bias, 0.02 s
    return torch.from_numpy(values).float()


def near(i, j, width, radius):
    """Are patches i and j of a grid at most radius rows and columns apart? radius None: always."""
    if radius is None:
        return True
    return abs(i // width - j // width) <= radius and abs(i % width - j % width) <= radius


def softmax(values):
    e = [math.exp(v - max(values)) for v in values]
    return [x / sum(e) for x in e]


def random_walk(maps, affinity, labels, background, radius, power=2):
    """maps (C, h, w), affinity (N, N), labels (C,) of a picture -> (C+1, h, w); no background: (C, h, w)."""
    classes, height, width = maps.shape
    n = height * width
    flat = maps.reshape(classes, n)
    present = [c for c in range(classes) if labels[c]]
    scores = np.zeros((classes + (background is not None), n))
    for j in range(n):
        if background is None:
            for c in present:
                scores[c, j] = flat[c, j]
        else:
            for key, value in zip([-1, *present], softmax([background, *(flat[c, j] for c in present)])):
                scores[key + 1, j] = value
    out = np.zeros_like(scores)
    for j in range(n):
        weights = [float(affinity[i, j]) ** power if near(i, j, width, radius) else 0 for i in range(n)]
        total = sum(weights) + (1e-4 if background is None else 0.1)
        for c in range(len(scores)):
            out[c, j] = sum(scores[c, i] * weights[i] for i in range(n)) / total
    return out.reshape(-1, height, width)


def affinity_labels(mask, radius, stride, offset):
    """mask (H, W) -> (N, N): 1 same, 0 different, 255 ignored; a patch has the label of pixel `offset`."""
    height, width = mask.shape[0] // stride, mask.shape[1] // stride
    patch = [int(mask[y * stride + offset, x * stride + offset]) for y in range(height) for x in range(width)]
    out = np.zeros((len(patch), len(patch)), dtype=np.int64)
    for i in range(len(patch)):
        for j in range(len(patch)):
            if 255 in (patch[i], patch[j]) or not near(i, j, width, radius):
                out[i, j] = 255
            else:
                out[i, j] = patch[i] == patch[j]
    return out


def affinity_loss(affinity, labels):
    """Both (B, N, N) -> a number."""
    same = [1 - a for a, y in zip(affinity.ravel(), labels.ravel()) if y == 1]
    different = [a for a, y in zip(affinity.ravel(), labels.ravel()) if y == 0]
    return 0.5 * sum(same) / (len(same) + 1) + 0.5 * sum(different) / (len(different) + 1)


def resize(maps, height, width):
    """(C, h, w) -> (C, height, width), bilinear, pixels are squares (align_corners False)."""
    classes, h, w = maps.shape
    out = np.zeros((classes, height, width))
    for y in range(height):
        for x in range(width):
            sy, sx = max(0, (y + 0.5) * h / height - 0.5), max(0, (x + 0.5) * w / width - 0.5)
            y0, x0 = min(int(sy), h - 1), min(int(sx), w - 1)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            fy, fx = sy - y0, sx - x0
            top = maps[:, y0, x0] * (1 - fx) + maps[:, y0, x1] * fx
            low = maps[:, y1, x0] * (1 - fx) + maps[:, y1, x1] * fx
            out[:, y, x] = top * (1 - fy) + low * fy
    return out


def combine(strict, loose):
    """Two labels of a pixel -> one."""
    if strict:
        return strict
    return 0 if loose == 0 else 255


def reliable_labels(maps, labels, image, backgrounds, box, num_iter):
    """maps (C, H, W), labels (C,), image (3, H, W), box (y0, x0, y1, x1) of one picture -> (H, W).

    What lies outside the box is cut off first."""
    y0, x0, y1, x1 = box
    keys = [0, *(c + 1 for c in range(len(maps)) if labels[c])]
    picture, present = image[:, y0:y1, x0:x1], maps[[k - 1 for k in keys[1:]], y0:y1, x0:x1]
    half = ((y1 - y0) // 2, (x1 - x0) // 2)
    small, small_maps = resize(picture, *half), resize(present, *half)
    found = []
    for background in backgrounds:
        scores = np.zeros((len(keys), *half))
        for y in range(half[0]):
            for x in range(half[1]):
                scores[:, y, x] = softmax([background, *small_maps[:, y, x]])
        refined = naive_refinement.refine(small[None], scores[None], (1, 2, 4, 8, 12, 24), num_iter, "par")[0]
        found.append(np.array(keys)[resize(refined, y1 - y0, x1 - x0).argmax(0)])
    out = np.full(image.shape[1:], 255)
    for y in range(y1 - y0):
        for x in range(x1 - x0):
            out[y0 + y, x0 + x] = combine(found[0][y, x], found[1][y, x])
    return out


def pooled_scores(q, k, grid, ratio):
    """q (h*w, d), k (M, d): scores q k^T averaged over windows of ratio x ratio queries, (M, M)."""
    height, width = grid
    scores = [[sum(float(a) * float(b) for a, b in zip(x, y)) for y in k] for x in q]
    rows = []
    for y in range(height // ratio):
        for x in range(width // ratio):
            places = [(y * ratio + i, x * ratio + j) for i in range(ratio) for j in range(ratio)]
            window = [scores[row * width + column] for row, column in places]
            rows.append([sum(column) / len(window) for column in zip(*window)])
    return np.array(rows)
