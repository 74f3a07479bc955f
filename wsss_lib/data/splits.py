"""Data sets by the names that recipes use: "toyvoc", "voc12", "coco14"."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .coco import COCO
from .voc import VOC

# The split that a method learns from; its pictures get the pseudo labels of methods with two steps.
TRAIN_SPLITS = {"toyvoc": "train", "voc12": "train_aug", "coco14": "train"}


def open_split(data: str, root: str | Path, split: str, truth: str | Iterable[str] = ()) -> VOC | COCO:
    """A split of "toyvoc", "voc12" or "coco14" below `root`; truth: as of `VOC` and `COCO`, whose errors it raises.

    ValueError for another name.
    """
    if data not in TRAIN_SPLITS:
        raise ValueError(f"data: found {data!r}, expected one of {', '.join(TRAIN_SPLITS)}")
    return (COCO if data == "coco14" else VOC)(root, split, truth)
