"""What the first cells of every notebook need: device, data and sizes of a profile."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset

from .data import COCO, VOC
from .data.sample import TRUTHS
from .paths import cache_folder, shipped

PROFILES = ("toy", "full", "voc", "coco")


@dataclass(frozen=True)
class Course:
    """A profile made concrete.

    train: pictures with image-level labels only, no mask is opened. val: the same with all truths, for scores.
    steps, batch_size, lr: of a classifier's training. backbone: as of `create_model`. image_size: pixels.
    limit: how many pictures of val a notebook scores (None: all): COCO's 40,504 would fill a Colab machine's memory, so
    there a notebook shows the first 1000, which is a look and not the benchmark's number.
    """

    profile: str
    device: str
    train: Dataset
    val: Dataset
    backbone: str
    image_size: int
    steps: int
    batch_size: int
    lr: float
    limit: int | None = None


def best_device() -> str:
    """cuda where there is one, then mps, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def preflight(profile: str = "toy", data_root: str | Path | None = None, device: str | None = None) -> Course:
    """Prepare a profile and print one line about it.

    toy: the drawn pictures that ship with the project. full: a large drawn tree, built in the cache if it is not there.
    voc, coco: real data under data_root, which is never downloaded.
    Raises ValueError for an unknown profile, or voc and coco without a data_root; and as the readers.
    """
    if profile not in PROFILES:
        raise ValueError(f"PROFILE: found {profile!r}, expected one of {', '.join(PROFILES)}")
    if profile in ("voc", "coco") and data_root is None:
        raise ValueError(f"DATA_ROOT: found None, expected the folder that holds {profile.upper()} (see README, data)")
    device = device or best_device()
    if profile == "coco":
        train, val = COCO(data_root, "train"), COCO(data_root, "val", truth=("mask",))
    elif profile == "voc":
        train, val = VOC(data_root, "train_aug"), VOC(data_root, "train", truth=("mask",))
    else:
        root = data_root or (shipped("toyvoc") if profile == "toy" else _large_toyvoc())
        train, val = VOC(root, "train"), VOC(root, "val", truth=TRUTHS)
    drawn = profile in ("toy", "full")
    backbone, size, batch_size = ("toyvit", 112, 16) if drawn else ("deit_small_patch16_224", 448, 16)
    steps, lr = {"toy": (60, 1e-3), "full": (2000, 5e-4), "voc": (6000, 5e-5), "coco": (40000, 5e-5)}[profile]
    print(f"profile {profile} on {device}: {len(train)} pictures to learn from, {len(val)} to score on ({val.split}), "
          f"backbone {backbone} at {size} px")
    limit = 1000 if profile == "coco" else None
    return Course(profile, device, train, val, backbone, size, steps, batch_size, lr, limit)


def _large_toyvoc() -> Path:
    from .data.toyvoc import build_toyvoc

    return build_toyvoc(cache_folder() / "toyvoc")
