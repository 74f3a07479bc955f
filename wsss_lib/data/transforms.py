"""From a Sample to a batch: joint transforms of picture and masks, collation, scaled and flipped views."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnF
from timm.data import create_transform
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from .sample import IGNORE, TRUTHS, Sample

HALF = (0.5, 0.5, 0.5)


class TrainTransform:
    """Random rescale, flip, colour jitter and crop: Sample -> dict.

    crop_size: side S of the square crop in pixels. A smaller picture is padded, at a random offset.
    scale_range: the scale is uniform between the two. long_side (pixels): the picture is first brought to a
    longer side that is uniform between the two; None: it stays. flip: the probability of a mirror image.
    color_jitter: (brightness, contrast, saturation, hue) as for torchvision's ColorJitter, or None.
    mean, std: of the normalisation, for values in [0, 1].

    Returns image float32 (3, S, S) normalised, 0 (the mean colour) in the padding; labels, as they were: the
    crop may have lost an object; name; box long (4,), (y0, x0, y1, x1), the part of the crop that is picture;
    with keep_uint8 image_uint8 (3, S, S), the crop as the network sees it, the mean colour in the padding;
    each truth that the sample has, long (S, S), 255 in the padding; a saliency map, float (S, S) in [0, 1], 0 in the
    padding.

    Randomness is from torch's global generator. The picture is resized bilinearly with antialias, masks
    with nearest-exact, whose pixel centres are those of the bilinear resize.
    Raises ValueError for arguments out of range.
    """

    def __init__(
        self,
        crop_size: int,
        scale_range: tuple[float, float] = (0.5, 2.0),
        flip: float = 0.5,
        color_jitter: tuple[float, float, float, float] | None = None,
        mean: Sequence[float] = HALF,
        std: Sequence[float] = HALF,
        keep_uint8: bool = False,
        long_side: tuple[float, float] | None = None,
    ) -> None:
        _check_positive("crop_size", crop_size)
        if long_side is not None and not (len(long_side) == 2 and 0 < long_side[0] <= long_side[1]):
            raise ValueError(f"long_side: found {long_side}, expected 0 < low <= high")
        if len(scale_range) != 2 or not 0 < scale_range[0] <= scale_range[1] < float("inf"):
            raise ValueError(f"scale_range: found {scale_range}, expected 0 < low <= high")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip: found {flip}, expected a probability")
        if color_jitter is not None and len(color_jitter) != 4:
            raise ValueError(f"color_jitter: found {color_jitter}, expected four numbers")
        _check_statistics(mean, std)
        self.crop_size, self.scale_range, self.flip = crop_size, tuple(scale_range), flip
        self.jitter = None if color_jitter is None else v2.ColorJitter(*color_jitter)
        self.mean, self.std, self.keep_uint8, self.long_side = list(mean), list(std), keep_uint8, long_side

    def __call__(self, sample: Sample) -> dict[str, Any]:
        height, width = sample.image.shape[-2:]
        scale = _uniform(*self.scale_range)
        if self.long_side is not None:
            scale *= _uniform(*self.long_side) / max(height, width)
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        mirrored = _uniform(0, 1) < self.flip
        source_y, target_y, rows = self._place(size[0])
        source_x, target_x, columns = self._place(size[1])
        # left, top, right, bottom, as torchvision wants it
        bottom, right = self.crop_size - target_y - rows, self.crop_size - target_x - columns
        padding = [target_x, target_y, right, bottom]

        def crop(pixels: torch.Tensor) -> torch.Tensor:
            pixels = F.horizontal_flip(pixels) if mirrored else pixels
            return F.crop(pixels, source_y, source_x, rows, columns)

        picture = crop(_resize(sample.image, size))
        if self.jitter is not None:
            picture = self.jitter(picture)
        out = {
            # Padded after the normalisation, where the mean colour is 0 exactly.
            "image": F.pad(_normalise(picture, self.mean, self.std), padding, fill=0),
            "labels": sample.labels,
            "name": sample.name,
            "box": torch.tensor([target_y, target_x, target_y + rows, target_x + columns]),
        }
        if self.keep_uint8:
            out["image_uint8"] = F.pad(picture, padding, fill=[round(255 * m) for m in self.mean])
        for field, truth in sample.truths().items():
            out[field] = F.pad(crop(_resize_mask(truth, size)), padding, fill=IGNORE)[0].long()
        if sample.saliency is not None:
            out["saliency"] = F.pad(crop(_resize(sample.saliency, size)), padding, fill=0)[0].float() / 255
        return out

    def _place(self, length: int) -> tuple[int, int, int]:
        """Along one side: where the crop starts in the picture, where it lands in the output, its length."""
        room = length - self.crop_size
        offset = int(torch.randint(abs(room) + 1, ()))
        return (offset, 0, self.crop_size) if room >= 0 else (0, offset, length)


class ClassificationTransform:
    """timm's training transform, for pictures with image-level labels alone: Sample -> dict.

    RandAugment, random resized crop, mirror image, colour jitter and random erasing, as DeiT is trained (Touvron et
    al. 2021, arXiv 2012.12877) and WeakTr after it. crop_size, mean, std: as of TrainTransform. Returns image
    (3, S, S) normalised, labels, name, and box, the whole crop. Truths do not follow: ValueError for a sample that
    has one.
    """

    def __init__(self, crop_size: int, mean: Sequence[float] = HALF, std: Sequence[float] = HALF) -> None:
        self.crop_size = crop_size
        self.transform = create_transform(
            crop_size, is_training=True, color_jitter=0.4, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25,
            interpolation="bicubic", mean=tuple(mean), std=tuple(std))

    def __call__(self, sample: Sample) -> dict[str, Any]:
        if sample.truths():
            raise ValueError(f"sample {sample.name}: found {sorted(sample.truths())}, expected labels alone")
        # timm draws from Python's and numpy's generators: their seeds come from torch's, as all chance here.
        random.seed(int(torch.randint(2**31, ())))
        np.random.seed(int(torch.randint(2**31, ())))
        picture = self.transform(F.to_pil_image(sample.image))
        box = torch.tensor([0, 0, self.crop_size, self.crop_size])
        return {"image": picture, "labels": sample.labels, "name": sample.name, "box": box}


class EvalTransform:
    """The whole picture, normalised: Sample -> dict as of TrainTransform, without randomness.

    size: None keeps the picture's size, (h, w) resizes to it, an int to a square of that side.
    The truths stay at their ORIGINAL size, long (H, W): scores are taken there. box is the whole (resized)
    picture.
    Raises ValueError for arguments out of range.
    """

    def __init__(
        self,
        size: int | tuple[int, int] | None = None,
        mean: Sequence[float] = HALF,
        std: Sequence[float] = HALF,
        keep_uint8: bool = False,
    ) -> None:
        size = (size, size) if isinstance(size, int) else size
        if size is not None:
            if len(size) != 2:
                raise ValueError(f"size: found {size}, expected (height, width)")
            _check_positive("size", *size)
        _check_statistics(mean, std)
        self.size, self.mean, self.std, self.keep_uint8 = size, list(mean), list(std), keep_uint8

    def __call__(self, sample: Sample) -> dict[str, Any]:
        picture = sample.image.as_subclass(torch.Tensor)
        if self.size is not None:
            picture = _resize(picture, self.size)
        out = {
            "image": _normalise(picture, self.mean, self.std),
            "labels": sample.labels,
            "name": sample.name,
            "box": torch.tensor([0, 0, *picture.shape[-2:]]),
        }
        if self.keep_uint8:
            out["image_uint8"] = picture
        for field, truth in sample.truths().items():
            out[field] = truth.as_subclass(torch.Tensor).long()
        return out


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Dicts of the transforms -> one batch.

    Tensors are stacked along a new first dimension, names become a list; a truth whose sizes differ stays a
    list of (H, W). Raises ValueError for no samples, samples with different keys, or tensors (pictures) of
    different shapes.
    """
    if not samples:
        raise ValueError("collate: found no samples, expected at least one")
    for sample in samples:
        if sample.keys() != samples[0].keys():
            raise ValueError(
                f"collate: {sample.get('name')} has the fields {sorted(sample)}, "
                f"{samples[0].get('name')} has {sorted(samples[0])}"
            )
    batch: dict[str, Any] = {}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        if not isinstance(values[0], torch.Tensor):
            batch[key] = values
        elif len({value.shape for value in values}) == 1:
            batch[key] = torch.stack(values)
        elif key in TRUTHS:
            batch[key] = values
        else:
            shapes = ", ".join(f"{sample.get('name')} {tuple(sample[key].shape)}" for sample in samples)
            raise ValueError(
                f"collate: field {key}: found different shapes: {shapes}; expected one shape: "
                "crop, give EvalTransform a size, or take batches of one"
            )
    return batch


def scaled_views(
    images: torch.Tensor, scales: Sequence[float] = (1.0,), flip: bool = False, multiple_of: int = 1
) -> Iterator[tuple[float, bool, torch.Tensor]]:
    """Views of a batch for multi-scale and flip inference: yields (scale, flipped, images (B, C, h, w)).

    images: float (B, C, H, W). Sizes are scale * (H, W) rounded to the nearest multiple of `multiple_of` (at
    least one). Bilinear, align_corners False, with antialias where a side shrinks. With flip each view is
    followed by its mirror image. Raises ValueError for no scales, a scale <= 0 or multiple_of < 1.
    """
    if len(scales) == 0 or not all(0 < scale < float("inf") for scale in scales):
        raise ValueError(f"scales: found {scales}, expected one or more numbers > 0")
    _check_positive("multiple_of", multiple_of)
    # A generator of its own, so that wrong arguments are reported by the call, not by the first view.
    return _views(images, scales, flip, multiple_of)


def _views(
    images: torch.Tensor, scales: Sequence[float], flip: bool, multiple_of: int
) -> Iterator[tuple[float, bool, torch.Tensor]]:
    height, width = images.shape[-2:]
    for scale in scales:
        size = tuple(max(1, round(side * scale / multiple_of)) * multiple_of for side in (height, width))
        view = images
        if size != (height, width):
            shrinks = size[0] < height or size[1] < width
            view = nnF.interpolate(images, size, mode="bilinear", align_corners=False, antialias=shrinks)
        yield scale, False, view
        if flip:
            yield scale, True, view.flip(-1)


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def _resize(picture: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """uint8 (3, H, W) -> plain uint8 (3, h, w)."""
    return F.resize(picture.as_subclass(torch.Tensor), list(size), InterpolationMode.BILINEAR, antialias=True)


def _resize_mask(mask: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """uint8 (H, W) -> plain uint8 (1, h, w)."""
    # As a tv_tensors.Mask it would go through "nearest", which picks the upper left of the pixels it could
    # pick and so shifts masks against their picture by up to half a pixel.
    return F.resize(mask.as_subclass(torch.Tensor)[None], list(size), InterpolationMode.NEAREST_EXACT)


def _normalise(picture: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    return F.normalize(F.to_dtype(picture, torch.float32, scale=True), mean, std)


def _check_positive(name: str, *values: int) -> None:
    if not all(isinstance(value, int) and value > 0 for value in values):
        raise ValueError(f"{name}: found {', '.join(map(str, values))}, expected whole numbers > 0")


def _check_statistics(mean: Sequence[float], std: Sequence[float]) -> None:
    if len(mean) != 3 or not all(0 <= m <= 1 for m in mean):
        raise ValueError(f"mean: found {mean}, expected three numbers in [0, 1]")
    if len(std) != 3 or not all(s > 0 for s in std):
        raise ValueError(f"std: found {std}, expected three numbers > 0")
