"""Data sets by the names that recipes use: "toyvoc", "voc12", "coco14"."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .coco import COCO
from .voc import VOC

# Add your own here, a subclass of VOC with `classes` and `num_classes`, and recipes can name it.
DATASETS: dict[str, type[VOC | COCO]] = {"toyvoc": VOC, "voc12": VOC, "coco14": COCO}
# The split that a method learns from; its pictures get the pseudo labels of methods with two steps.
TRAIN_SPLITS = {"toyvoc": "train", "voc12": "train_aug", "coco14": "train"}


def open_split(data: str, root: str | Path, split: str, truth: str | Iterable[str] = ()) -> VOC | COCO:
    """A split of one of DATASETS below `root`; truth: as of `VOC` and `COCO`, whose errors it raises.

    ValueError for another name.
    """
    if data not in DATASETS:
        raise ValueError(f"data: found {data!r}, expected one of {', '.join(DATASETS)}")
    return DATASETS[data](root, split, truth)
