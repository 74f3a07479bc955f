"""Scores: mean intersection over union, the background threshold, average precision of the labels.

A score is only as good as what it says about itself. `Scores` therefore carries the split it was measured on,
and whether anything (a threshold, a checkpoint) was chosen by looking at the truth. Then it is an *oracle*:
an upper bound, out of reach without the very masks that weak supervision is meant to do without.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

ArrayLike = Any  # a tensor or whatever numpy turns into an array


def as_masks(name: str, value: ArrayLike) -> Tensor:
    """One mask (H, W) or a batch (B, H, W) of whole numbers -> long tensor (B, H, W), or ValueError."""
    if not isinstance(value, Tensor):
        array = np.asarray(value)
        if array.dtype.kind not in "iub":
            raise ValueError(f"{name}: found dtype {array.dtype}, expected whole numbers (class ids)")
        value = torch.from_numpy(array.astype(np.int64))  # copies: arrays from image files are read-only
    if value.is_floating_point() or value.is_complex():
        raise ValueError(f"{name}: found dtype {value.dtype}, expected whole numbers (class ids)")
    if value.ndim not in (2, 3):
        raise ValueError(f"{name}: found shape {tuple(value.shape)}, expected (H, W) or (B, H, W)")
    return value.detach().long().reshape(-1, *value.shape[-2:])


def as_mask_pair(
    prediction: ArrayLike, truth: ArrayLike, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Both as (B, H, W) long tensors on the prediction's device; ValueError for wrong shapes or values."""
    prediction = as_masks("prediction", prediction)
    truth = as_masks("truth", truth).to(prediction.device)
    if prediction.shape != truth.shape:
        found, expected = tuple(prediction.shape), tuple(truth.shape)
        raise ValueError(f"prediction: found shape {found}, expected that of the truth, {expected}")
    check_values("prediction", prediction, num_classes)
    check_values("truth", truth, num_classes, ignore_index)
    return prediction, truth


def check_values(name: str, mask: Tensor, num_classes: int, ignore_index: int | None = None) -> None:
    """ValueError unless all values lie in 0..C, or are ignore_index where one is given."""
    wrong = (mask < 0) | (mask > num_classes)
    if ignore_index is not None:
        wrong &= mask != ignore_index
    if wrong.any():
        found = mask[wrong].unique().tolist()[:5]
        also = ", for it decides every pixel" if ignore_index is None else f" or {ignore_index} (ignored)"
        raise ValueError(f"{name}: found values {found}, expected 0..{num_classes}{also}")


def _check_ignore_index(num_classes: int, ignore_index: int) -> None:
    if 0 <= ignore_index <= num_classes:
        raise ValueError(f"ignore_index: found {ignore_index}, expected none of the classes 0..{num_classes}")


def names_with_background(classes: Sequence[str], num_classes: int) -> list[str]:
    """The C + 1 names, whether or not `classes` starts with the background's."""
    if len(classes) not in (num_classes, num_classes + 1):
        expected = f"{num_classes} or, with background, {num_classes + 1}"
        raise ValueError(f"classes: found {len(classes)} names, expected {expected}")
    return list(classes) if len(classes) == num_classes + 1 else ["background", *classes]


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole in float64, nan where whole is 0."""
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def _iou(confusion: np.ndarray) -> np.ndarray:
    """(..., C+1, C+1) -> (..., C+1): intersection over union; nan for a class in neither mask."""
    hit = np.diagonal(confusion, axis1=-2, axis2=-1)
    return _ratio(hit, confusion.sum(-1) + confusion.sum(-2) - hit)


@dataclass(frozen=True, eq=False)
class Scores:
    """What one set of predictions scores, over the pixels of all pictures together (as VOC does).

    miou: mean of `iou`, in 0..1. iou: (C+1,) float64, background first; nan for a class that is in neither
    prediction nor truth, which the mean leaves out. confusion: (C+1, C+1) int64 pixels, rows truth, columns
    prediction. split: name of the pictures. oracle: True where something was chosen by looking at this truth;
    then `choice` says what, as in "background threshold 0.31".
    """

    miou: float
    iou: np.ndarray
    confusion: np.ndarray
    split: str = ""
    oracle: bool = False
    choice: str = ""

    @property
    def precision(self) -> np.ndarray:
        """(C+1,) share of the pixels predicted as the class that are of it; nan where none is predicted."""
        return _ratio(np.diagonal(self.confusion), self.confusion.sum(0))

    @property
    def recall(self) -> np.ndarray:
        """(C+1,) share of the class's pixels that are predicted as it; nan where it has none."""
        return _ratio(np.diagonal(self.confusion), self.confusion.sum(1))

    def table(self, classes: Sequence[str]) -> list[str]:
        """Aligned lines in percent, for `print(*rows, sep="\\n")`: a heading, one line a class, the mean.

        classes: the C names, or C + 1 with the background's. ValueError for another number.
        """
        names = names_with_background(classes, len(self.iou) - 1)
        width = max(map(len, [*names, "mean"]))
        rows = [f"{'':{width}}    IoU  precision  recall"]
        for name, *values in zip(names, self.iou, self.precision, self.recall):
            iou, precision, recall = ("-" if np.isnan(v) else f"{100 * v:.1f}" for v in values)
            rows.append(f"{name:{width}}  {iou:>5}  {precision:>9}  {recall:>6}")
        note = f"  (oracle{': ' + self.choice if self.choice else ''})" if self.oracle else ""
        return [*rows, f"{'mean':{width}}  {100 * self.miou:5.1f}{note}"]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and lists for `json.dump`; nan becomes None, for JSON has no nan."""
        iou = [None if np.isnan(v) else float(v) for v in self.iou]
        return {"miou": self.miou, "iou": iou, "confusion": self.confusion.tolist(),
                "split": self.split, "oracle": self.oracle, "choice": self.choice}

    @classmethod
    def from_confusion(
        cls, confusion: np.ndarray, split: str = "", oracle: bool = False, choice: str = ""
    ) -> Scores:
        """(C+1, C+1) pixel counts -> Scores. ValueError where nothing was counted."""
        if not confusion.any():
            raise ValueError("confusion: found no counted pixel, expected at least one that is not ignored")
        iou = _iou(confusion)
        return cls(float(np.nanmean(iou)), iou, confusion.copy(), split, oracle, choice)


class ConfusionMatrix:
    """Counts pixels by (truth, prediction) over as many updates as wanted; memory does not grow.

    num_classes: C, without the background. ignore_index: the truth value whose pixels do not count.
    """

    def __init__(self, num_classes: int = 20, ignore_index: int = 255) -> None:
        _check_ignore_index(num_classes, ignore_index)
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.counts = np.zeros((num_classes + 1, num_classes + 1), np.int64)

    def update(self, prediction: ArrayLike, truth: ArrayLike) -> None:
        """Add one mask (H, W) or a batch (B, H, W). ValueError for other or unequal shapes, or values outside
        0..C (and, in the truth only, ignore_index)."""
        prediction, truth = as_mask_pair(prediction, truth, self.num_classes, self.ignore_index)
        valid, size = truth != self.ignore_index, self.num_classes + 1
        pairs = truth[valid] * size + prediction[valid]  # (P,): each pixel's cell of the matrix
        self.counts += torch.bincount(pairs, minlength=size**2).view(size, size).cpu().numpy()

    def scores(self, split: str = "", oracle: bool = False, choice: str = "") -> Scores:
        """The scores so far. ValueError where no pixel was counted."""
        return Scores.from_confusion(self.counts, split, oracle, choice)


def evaluate(
    predictions: Iterable[ArrayLike],
    truths: Iterable[ArrayLike],
    num_classes: int = 20,
    ignore_index: int = 255,
    split: str = "",
    oracle: bool = False,
    choice: str = "",
) -> Scores:
    """Score masks against truths: two iterables of (H, W) masks, of any sizes, or two batches (B, H, W).

    Generators are welcome: one pair is held at a time. ValueError where one side has more masks,
    for empty sides, and as in `ConfusionMatrix.update`.
    """
    matrix, missing = ConfusionMatrix(num_classes, ignore_index), object()
    for index, (prediction, truth) in enumerate(zip_longest(predictions, truths, fillvalue=missing)):
        if prediction is missing or truth is missing:
            short, more = ("predictions", "truths") if prediction is missing else ("truths", "predictions")
            raise ValueError(f"{short}: found {index} masks, expected as many as in {more}, which has more")
        matrix.update(prediction, truth)
    return matrix.scores(split, oracle, choice)


class ThresholdSweep:
    """The mIoU of every background threshold, from one pass over the data.

    Predicting at threshold t is argmax over [t, maps], ties to the background: the winning class where its
    score is > t, else 0. The winner does not depend on t, so a histogram of the winning score for each (true
    class, winning class) answers all thresholds. Nothing is lost: a score's bin is the number of thresholds
    below it, found in float32, as `maps > t` itself is computed.

    thresholds: increasing, within [0, 1]; default 0, 0.01, ..., 1. Maps of another dtype are read as float32.
    """

    def __init__(
        self, num_classes: int = 20, thresholds: Sequence[float] | None = None, ignore_index: int = 255
    ) -> None:
        _check_ignore_index(num_classes, ignore_index)
        values = [i / 100 for i in range(101)] if thresholds is None else [float(t) for t in thresholds]
        self.thresholds = torch.tensor(values, dtype=torch.float32)
        increasing = bool((self.thresholds.diff() > 0).all())
        if not values or not increasing or not 0 <= values[0] <= values[-1] <= 1:
            raise ValueError(f"thresholds: found {values[:5]}..., expected increasing numbers within [0, 1]")
        self.values, self.num_classes, self.ignore_index = values, num_classes, ignore_index
        # (C+1, C, K+1): pixels by true class, winning class, number of thresholds below the winning score
        self.histogram = np.zeros((num_classes + 1, num_classes, len(values) + 1), np.int64)

    def update(self, maps: ArrayLike, truth: ArrayLike, labels: ArrayLike | None = None) -> None:
        """Add maps (B, C, H, W) in [0, 1] at the size of the truth (B, H, W). With labels, (B, C) multi-hot,
        the maps of absent classes do not take part. ValueError for other shapes, or maps outside [0, 1]."""
        maps = torch.as_tensor(maps).detach().float()
        truth = as_masks("truth", truth).to(maps.device)
        expected = (len(truth), self.num_classes, *truth.shape[1:])
        if tuple(maps.shape) != expected:
            raise ValueError(f"maps: found shape {tuple(maps.shape)}, expected {expected}, the truth's")
        if labels is not None:
            labels = torch.as_tensor(labels, device=maps.device)
            if labels.shape != maps.shape[:2]:
                raise ValueError(f"labels: found shape {tuple(labels.shape)}, expected {expected[:2]}")
            maps = maps.masked_fill((labels <= 0)[:, :, None, None], 0)
        low, high = maps.min(), maps.max()
        if not (low >= 0 and high <= 1 + 1e-5):  # also refuses nan; resizing may pass 1 by a rounding error
            raise ValueError(f"maps: found values {low:.4g} to {high:.4g}, expected normalised, 0 to 1")
        score, winner = maps.max(dim=1)  # (B, C, H, W) -> (B, H, W); equal maps: the lowest class
        check_values("truth", truth, self.num_classes, self.ignore_index)
        valid = truth != self.ignore_index
        below = torch.searchsorted(self.thresholds.to(maps.device), score[valid])  # (P,): thresholds < score
        cell = (truth[valid] * self.num_classes + winner[valid]) * self.histogram.shape[-1] + below
        counts = torch.bincount(cell, minlength=self.histogram.size)
        self.histogram += counts.view(self.histogram.shape).cpu().numpy()

    def confusions(self) -> np.ndarray:
        """(K, C+1, C+1) int64: the confusion matrix at each threshold."""
        above = self.histogram[..., ::-1].cumsum(-1)[..., ::-1]  # [..., k]: k or more thresholds below
        foreground = np.moveaxis(above[..., 1:], -1, 0)  # (K, C+1, C): the winner beats threshold k
        background = self.histogram.sum((1, 2))[None, :, None] - foreground.sum(-1, keepdims=True)
        return np.concatenate([background, foreground], axis=-1)

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """(thresholds (K,), miou (K,)), float64, mIoU in 0..1. ValueError where no pixel was counted."""
        if not self.histogram.any():
            raise ValueError("sweep: found no counted pixel, expected at least one that is not ignored")
        return np.array(self.values), np.nanmean(_iou(self.confusions()), axis=-1)

    def scores_at(self, threshold: float, split: str = "") -> Scores:
        """Scores at one of the thresholds, fixed beforehand. ValueError where it is none of them."""
        index = (self.thresholds == torch.tensor(threshold, dtype=torch.float32)).nonzero().flatten().tolist()
        if not index:
            swept = f"{len(self.values)} swept, {self.values[0]} to {self.values[-1]}"
            raise ValueError(f"threshold: found {threshold}, expected one of the {swept}")
        return Scores.from_confusion(self.confusions()[index[0]], split)

    def best(self, split: str = "") -> Scores:
        """Scores at the threshold with the highest mIoU (the lowest such): an oracle."""
        thresholds, miou = self.curve()
        index = int(miou.argmax())
        choice = f"background threshold {thresholds[index]:.4g}"
        return Scores.from_confusion(self.confusions()[index], split, oracle=True, choice=choice)


def mean_average_precision(scores: ArrayLike, labels: ArrayLike) -> tuple[float, np.ndarray]:
    """How well image-level scores rank the pictures of each class: (mAP, ap (C,)), float64 in 0..1.

    scores (N, C), on any scale; labels (N, C) of 0 and 1. AP = sum_n (R_n - R_{n-1}) P_n over the distinct
    scores from high to low: equal scores enter together, so their order does not matter. A class without a
    positive has ap nan and is left out of the mean. (VOC's own AP differs: it interpolates the precision.)
    ValueError for unequal shapes, non-finite scores, labels other than 0 and 1, or no positive at all.
    """
    # torch.as_tensor first, so that tensors on a GPU and half precision are welcome too
    scores, labels = (torch.as_tensor(x).detach().cpu().double().numpy() for x in (scores, labels))
    if scores.ndim != 2 or scores.shape != labels.shape:
        raise ValueError(f"scores, labels: found shapes {scores.shape} and {labels.shape}, expected (N, C)")
    if not np.isfinite(scores).all():
        raise ValueError("scores: found nan or infinite values, expected finite ones")
    if not np.isin(labels, (0, 1)).all() or not labels.any():
        raise ValueError("labels: expected only 0 and 1 and at least one 1, found otherwise")
    ap = np.full(scores.shape[1], np.nan)
    for c in np.flatnonzero(labels.any(0)):
        order = np.argsort(-scores[:, c])
        ranked, hits = scores[order, c], labels[order, c].cumsum()
        last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # last rank of each distinct score
        recall, precision = hits[last] / hits[-1], hits[last] / (last + 1)
        ap[c] = np.sum(np.diff(recall, prepend=0.0) * precision)
    return float(np.nanmean(ap)), ap
