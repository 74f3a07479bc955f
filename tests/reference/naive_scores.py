"""Scores by the letter: plain loops over pixels, thresholds and ranks. Slow, and short enough to believe."""

import math


def confusion(predictions, truths, num_classes, ignore_index=255):
    """Lists of masks (H, W) -> nested list (C+1, C+1), rows truth, columns prediction."""
    counts = [[0] * (num_classes + 1) for _ in range(num_classes + 1)]
    for prediction, truth in zip(predictions, truths):
        for y in range(truth.shape[0]):
            for x in range(truth.shape[1]):
                if int(truth[y, x]) != ignore_index:
                    counts[int(truth[y, x])][int(prediction[y, x])] += 1
    return counts


def iou(counts):
    """Nested list (C+1, C+1) -> list (C+1,), nan for a class in neither prediction nor truth."""
    result = []
    for c in range(len(counts)):
        union = sum(counts[c]) + sum(row[c] for row in counts) - counts[c][c]
        result.append(counts[c][c] / union if union else math.nan)
    return result


def mean(values):
    """The mean of the values that are not nan."""
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known)


def predict(maps, threshold, labels=None):
    """Maps (C, H, W) -> nested list (H, W): the largest of [threshold, maps], the first of equals."""
    channels, height, width = maps.shape
    result = [[0] * width for _ in range(height)]
    for y in range(height):
        for x in range(width):
            best = threshold
            for c in range(channels):
                present = labels is None or labels[c] > 0
                if present and maps[c, y, x] > best:
                    best, result[y][x] = maps[c, y, x], c + 1
    return result


def average_precision(scores, labels):
    """Lists (N,) of one class -> sum over the distinct scores of (R_n - R_{n-1}) P_n, down the ranks."""
    positives = sum(1 for label in labels if label)
    if positives == 0:
        return math.nan
    total, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        taken = [label for score, label in zip(scores, labels) if score >= threshold]
        hits = sum(1 for label in taken if label)
        total += (hits / positives - recall_before) * hits / len(taken)
        recall_before = hits / positives
    return total
