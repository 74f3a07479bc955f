"""GETAM's label completion, pixel by pixel."""

import math

import numpy as np


def initial_labels(scores, labels, saliency, power):
    """scores (C, H, W), labels (C,), saliency (H, W) of True and False -> (H, W)."""
    _, height, width = scores.shape
    out = np.zeros((height, width), int)
    for y in range(height):
        for x in range(width):
            best, winner = 0.0, None
            for c, present in enumerate(labels):
                if present and scores[c, y, x] > best:
                    best, winner = scores[c, y, x], c + 1
            if saliency[y, x]:
                out[y, x] = winner if best > (1 - best) ** power else 255
    return out


def thresholds(scores, labels, cut):
    """(C,): infinity where there is none."""
    out = []
    for c, present in enumerate(labels):
        positive = sorted(s for s in scores[c].flatten().tolist() if s > 0)
        out.append(positive[int(cut * len(positive))] if present and positive else math.inf)
    return out


def complete(mask, scores, limits, published):
    out = mask.copy()
    for y, x in np.argwhere(mask == 0):
        claims = [c + 1 for c, limit in enumerate(limits) if scores[c, y, x] > limit]
        if claims:
            out[y, x] = claims[0] if published or len(claims) == 1 else 255
    return out


def open_regions(region, size, published):
    """The union of the size x size squares that fit into the region, or would if it went on beyond the edge.

    Squares hang over the edge by size // 2 pixels at most; published ones of even size by one less at the
    lower and right edges, and what they cover moves by a pixel down and right.
    """
    height, width = region.shape
    out = np.zeros((height, width), bool)
    shift = 1 if published and size % 2 == 0 else 0
    half = size // 2
    for top in range(-half, height - size + half - shift + 1):  # the square's upper left pixel
        for left in range(-half, width - size + half - shift + 1):
            square = [(top + r, left + c) for r in range(size) for c in range(size)]
            inside = [(y, x) for y, x in square if 0 <= y < height and 0 <= x < width]
            if all(region[y, x] for y, x in inside):
                for y, x in square:
                    if 0 <= y + shift < height and 0 <= x + shift < width:
                        out[y + shift, x + shift] = True
    return out


def complete_labels(scores, labels, saliency, cut, power, opening, published):
    """One picture -> mask, and what of the saliency the published loss sees (None unless published)."""
    before = initial_labels(scores, labels, saliency, power)
    after = complete(before, scores, thresholds(scores, labels, cut), published)
    mask = np.where(open_regions(after > 0, opening, published), after, 0)
    return mask, ((before == 0) & (after > 0)) if published else None
