"""Masks of one's own pictures: a folder in, colour masks and overlays out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from .data.sample import Sample, read_image
from .data.transforms import EvalTransform
from .data.voc import encode_mask
from .segmentation import segment
from .viz import overlay_mask

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def predict_folder(
    model: nn.Module,
    images: str | Path,
    out: str | Path,
    side: int,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    progress: bool = True,
) -> list[dict[str, int]]:
    """Segment every picture of a folder; one dict a picture: class id -> pixels, background 0.

    images: folder of jpg, png, bmp or webp files, of any size. side: each is brought to this shorter side, in
    pixels, for the network, which has learned from crops of that size; masks have the picture's own size.
    out: gets NAME.png, the mask in VOC's palette, and NAME_overlay.jpg. scales, flip: as of `segment`.
    Pictures are done one by one; those that have a mask already are done again.
    Raises FileNotFoundError for a folder that is not there or has no picture, ValueError for a file that is
    none, two files of one name, and a network that does not segment.
    """
    images, out = Path(images), Path(out)
    files = sorted(f for f in images.glob("*") if f.suffix.lower() in PICTURES) if images.is_dir() else []
    if not files:
        found = "no picture" if images.is_dir() else "no such folder"
        raise FileNotFoundError(f"{images}: found {found}, expected some of *{', *'.join(PICTURES)}")
    names = [f.stem for f in files]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{images}: found several pictures called {', '.join(twice)}, expected one of each name")
    out.mkdir(parents=True, exist_ok=True)
    counts = []
    for file in tqdm(files, desc=f"segmenting {images.name}", disable=not progress):
        picture = read_image(file)
        mask = predict(model, picture, side, scales, flip).numpy().astype(np.uint8)
        (out / f"{file.stem}.png").write_bytes(encode_mask(mask))
        pixels = picture.permute(1, 2, 0).numpy()  # (3, H, W) -> (H, W, 3)
        Image.fromarray(overlay_mask(pixels, mask)).save(out / f"{file.stem}_overlay.jpg", quality=92)
        ids, sizes = np.unique(mask, return_counts=True)
        counts.append(dict(zip(ids.tolist(), sizes.tolist())))
    return counts


def predict(
    model: nn.Module, picture: torch.Tensor, side: int, scales: Sequence[float] = (1.0,), flip: bool = False
) -> torch.Tensor:
    """The mask of one picture, uint8 (3, H, W) -> long (H, W), on the CPU. Arguments as of `predict_folder`."""
    height, width = picture.shape[-2:]
    ratio = side / min(height, width)
    size = tuple(max(1, round(length * ratio)) for length in (height, width))
    transform = EvalTransform(size, model.data_config["mean"], model.data_config["std"])
    image = transform(Sample("picture", picture, torch.zeros(model.num_classes)))["image"][None]
    scores = segment(model, image.to(next(model.parameters()).device), scales, flip)
    return F.interpolate(scores, (height, width), mode="bilinear", align_corners=False)[0].argmax(dim=0).cpu()
