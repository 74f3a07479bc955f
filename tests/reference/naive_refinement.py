"""PAR and PAMR pixel by pixel in float64: slow, and simple enough to be checked by eye."""

import math

import numpy as np


def neighbors(y, x, height, width, dilations):
    """The 8 neighbours of (y, x) at each dilation, outside the picture those at its edge: two index lists."""
    rows, columns = [], []
    for d in dilations:
        for dy in (-d, 0, d):
            for dx in (-d, 0, d):
                if dy or dx:
                    rows.append(min(max(y + dy, 0), height - 1))
                    columns.append(min(max(x + dx, 0), width - 1))
    return rows, columns


def softmax(values):
    e = np.exp(values - np.max(values))
    return e / e.sum()


def position_weights(dilations):
    """PAR's weights of the neighbours by distance alone, before they are scaled by 0.01: they sum to 1."""
    d = np.array([n * math.hypot(y, x) for n in dilations for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x])
    return softmax(-((d / (d.std(ddof=1) + 1e-8) / 0.3) ** 2))


def affinity(image, y, x, dilations, variant):
    """image (3, H, W) -> what each neighbour of (y, x) counts, (K,)."""
    rows, columns = neighbors(y, x, *image.shape[1:], dilations)
    logits = np.zeros(len(rows))
    for color in image:
        around, here = color[rows, columns], color[y, x]
        if variant == "par":
            deviation = around.std(ddof=1)
            logits += -((np.abs(around - here) / (deviation + 1e-8) / 0.3) ** 2) / 3
        else:
            samples = np.append(around, [here] * len(dilations))
            deviation = samples.std(ddof=1)
            logits += -np.abs(around - here) / (1e-8 + 0.1 * deviation) / 3
    weights = softmax(logits)
    return weights + 0.01 * position_weights(dilations) if variant == "par" else weights


def resize(maps, height, width):
    """(C, h, w) -> (C, H, W), bilinear, corners onto corners (align_corners True)."""
    c, h, w = maps.shape
    out = np.zeros((c, height, width))
    for y in range(height):
        for x in range(width):
            sy = y * (h - 1) / (height - 1) if height > 1 else 0.0
            sx = x * (w - 1) / (width - 1) if width > 1 else 0.0
            y0, x0 = min(int(sy), h - 1), min(int(sx), w - 1)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            fy, fx = sy - y0, sx - x0
            top = maps[:, y0, x0] * (1 - fx) + maps[:, y0, x1] * fx
            low = maps[:, y1, x0] * (1 - fx) + maps[:, y1, x1] * fx
            out[:, y, x] = top * (1 - fy) + low * fy
    return out


def refine(images, masks, dilations, num_iter, variant):
    """images (B, 3, H, W), masks (B, C, h, w) -> (B, C, H, W)."""
    refined = []
    for image, maps in zip(np.asarray(images, np.float64), np.asarray(masks, np.float64), strict=True):
        height, width = image.shape[1:]
        maps = resize(maps, height, width)
        pixels = [(y, x) for y in range(height) for x in range(width)]
        around = [neighbors(y, x, height, width, dilations) for y, x in pixels]
        weights = [affinity(image, y, x, dilations, variant) for y, x in pixels]
        for _ in range(num_iter):
            new = np.zeros_like(maps)
            for (y, x), (rows, columns), weight in zip(pixels, around, weights, strict=True):
                for c in range(len(maps)):
                    new[c, y, x] = (maps[c, rows, columns] * weight).sum()
            maps = new
        refined.append(maps)
    return np.stack(refined)
