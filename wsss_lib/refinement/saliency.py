"""Saliency: what stands out in a picture, whatever it is. GETAM's label completion needs such a map.

Two sources, used the same way, `source(batch) -> (B, H, W)` in [0, 1], 1 is foreground:
- `ContrastSaliency`: from the picture alone, nothing learned. What is made for drawn pictures;
- `FolderSaliency`: a folder of maps that some other program made. What the papers do, with learned maps.

Contrast with the border. Whoever takes a picture seldom cuts its subject off, so the border shows background
(Wei et al., Geodesic Saliency Using Background Priors, ECCV 2012; Zhu et al., Saliency Optimization from
Robust Background Detection, CVPR 2014). A pixel stands out if its colour is rare there: minus the log of the
density of a side's colours, in CIELAB, where distance is what the eye sees. Of the four sides the one with
the second highest density counts: background reaches two sides, an object that is cut off mostly one. On 300
training pictures of ToyVOC that makes an F-measure (below) of .86 at threshold .5; the density of all four
sides together makes .80. The geodesic distance to the border, as of Wei et al., makes .77, and averaged in
changes nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.sample import IGNORE, read_grey
from .label_completion import SALIENT

# Chosen on ToyVOC's training split.
WORKING_SIDE = 128  # pixels; of a larger picture the long side is shrunk to it
SIDE_SAMPLES = 32  # evenly spaced pixels, or a few more, that stand for a side of the border
BANDWIDTH = 6.0  # of the density, in units of CIELAB (white and black are 100 apart)
RAREST = 1e-4  # densities below it count as it
CENTRE_SIGMA = 0.5  # of the centre prior, in half pictures

Source = Callable[[dict], Tensor]


@torch.no_grad()
def contrast_saliency(images: Tensor) -> Tensor:
    """Images (B, 3, H, W), 0..255, uint8 or floating point -> saliency (B, H, W) in [0, 1], float32.

    `border_rareness`, stretched to [0, 1] for each picture, but never by more than twice (a picture of one
    colour has no foreground), then averaged over 3 x 3 pixels.
    No randomness. Raises ValueError for another shape or type and values outside 0..255.
    """
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"images: found shape {tuple(images.shape)}, expected (B, 3, H, W) without a 0")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images: found {images.dtype}, expected uint8 or floating point")
    low, high = images.aminmax()
    if not (low > -0.5 and high < 255.5):  # resized pictures may round beyond the ends
        raise ValueError(f"images: found values {float(low):.4g} to {float(high):.4g}, expected 0 to 255")
    with torch.autocast(images.device.type, enabled=False):
        size, pixels = images.shape[2:], images.float() / 255
        if max(size) > WORKING_SIDE:
            small = [max(1, round(side * WORKING_SIDE / max(size))) for side in size]
            pixels = F.interpolate(pixels, small, mode="bilinear", align_corners=False, antialias=True)
        rare = torch.stack([border_rareness(picture) for picture in cielab(pixels)])  # (B, h, w)
        low, high = rare.amin((1, 2), keepdim=True), rare.amax((1, 2), keepdim=True)
        saliency = ((rare - low) / (high - low).clamp(min=-math.log(RAREST) / 2))[:, None]  # (B, 1, h, w)
        saliency = F.avg_pool2d(saliency, 3, 1, 1, count_include_pad=False)
        if max(size) > WORKING_SIDE:
            saliency = F.interpolate(saliency, size, mode="bilinear", align_corners=False)
        return saliency[:, 0].clamp(0, 1)


def border_rareness(lab: Tensor) -> Tensor:
    """CIELAB (3, H, W) -> (H, W): -log of the density of a side's colours at each pixel's, 0 or more.

    Of the four densities the second highest.
    """
    colours = lab.flatten(1).T / BANDWIDTH  # (H*W, 3)
    densities = []
    for side in (lab[:, 0], lab[:, -1], lab[:, :, 0], lab[:, :, -1]):  # (3, W) or (3, H)
        sample = side[:, :: max(1, side.shape[1] // SIDE_SAMPLES)].T / BANDWIDTH
        # A Gaussian around each sample, its peak 1.
        densities.append(torch.exp(torch.cdist(colours, sample).square() / -2).mean(dim=1))
    second = torch.stack(densities).sort(dim=0, descending=True).values[1]
    return -second.clamp(RAREST, 1).log().view(lab.shape[1:])


def cielab(pixels: Tensor) -> Tensor:
    """sRGB (B, 3, H, W) in [0, 1] -> CIELAB for daylight (D65): L in 0..100, a and b about -110..110."""
    linear = torch.where(pixels > 0.04045, ((pixels + 0.055) / 1.055).pow(2.4), pixels / 12.92)
    primaries = pixels.new_tensor(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )  # sRGB's, IEC 61966-2-1
    xyz = torch.einsum("ij,bjhw->bihw", primaries / primaries.sum(dim=1, keepdim=True), linear)
    # Now white is (1, 1, 1).
    # CIE 15: a cube root, with a straight line near black
    x, y, z = torch.where(xyz > (6 / 29) ** 3, xyz.pow(1 / 3), xyz * (29 / 6) ** 2 / 3 + 4 / 29).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


class ContrastSaliency:
    """`contrast_saliency` of a batch's pictures: called with {image_uint8 (B, 3, H, W)} -> (B, H, W).

    With a `box` (B, 4), (y0, x0, y1, x1), padding is kept out: only what is inside is looked at; 0 outside.
    """

    def __call__(self, batch: dict) -> Tensor:
        images, boxes = batch["image_uint8"], batch.get("box")
        whole = torch.tensor([0, 0, *images.shape[2:]])
        if boxes is None or bool((boxes.cpu() == whole).all()):
            return contrast_saliency(images)
        saliency = torch.zeros(len(images), *images.shape[2:], device=images.device)
        for image, (y0, x0, y1, x1), out in zip(images, boxes.tolist(), saliency):
            out[y0:y1, x0:x1] = contrast_saliency(image[None, :, y0:y1, x0:x1])[0]
        return saliency


class FolderSaliency:
    """Maps from files `folder/name.png`, grey, 8 bits, 255 is foreground: called with {name, image_uint8}.

    Each map is resized bilinearly to its picture in the batch, which must be the WHOLE picture, not mirrored:
    a map cannot follow a random crop or flip that it has not been through. Of those, only crops to another
    shape can be noticed. For a single map: `read`.
    Raises FileNotFoundError (folder, map) and ValueError (not a grey picture; not of its picture's shape, but
    for rounding), which name the file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder}: no such folder of saliency maps")

    def __call__(self, batch: dict) -> Tensor:
        images = batch["image_uint8"]
        maps = [self.read(name, images.shape[2:]) for name in batch["name"]]
        return torch.stack(maps).to(images.device)

    def read(self, name: str, size: tuple[int, int] | None = None) -> Tensor:
        """The map of one picture in [0, 1], float32 (H, W); resized if a `size` = (H, W) is given."""
        path = self.folder / f"{name}.png"
        grey = torch.as_tensor(read_grey(path)).float() / 255  # (1, h, w)
        (h, w), (height, width) = grey.shape[1:], size or grey.shape[1:]
        if abs(h * width - w * height) > max(h + w, height + width) / 2:  # each side is rounded by up to 1/2
            raise ValueError(f"{path}: found {h} x {w} (height x width), expected the shape of its picture, "
                             f"{height} x {width}; cropped pictures need maps that were cropped with them")
        if (h, w) != (height, width):
            shrinks = height < h or width < w
            grey = F.interpolate(grey[None], (height, width), mode="bilinear", align_corners=False,
                                 antialias=shrinks)[0]
        return grey[0].clamp(0, 1)


# ------------------------------------------------------------------ how good it is


def all_foreground(batch: dict) -> Tensor:
    """The map that is 1 everywhere: what any saliency must beat."""
    return torch.ones(len(batch["image_uint8"]), *batch["image_uint8"].shape[2:])


def centre_prior(batch: dict) -> Tensor:
    """A Gaussian around the middle, the same in every picture."""
    count, _, height, width = batch["image_uint8"].shape
    y, x = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    return torch.exp((y.square() + x.square()) / (-2 * CENTRE_SIGMA**2)).expand(count, -1, -1)


SOURCES: dict[str, Source] = {
    "contrast": ContrastSaliency(), "centre_prior": centre_prior, "all_foreground": all_foreground,
}


def saliency_report(data, method: str | Source = "contrast", limit: int | None = None) -> dict:
    """Score saliency maps against the foreground of a data set opened with truth="mask": ready for JSON.

    method: "contrast", or any source such as a `FolderSaliency`, which is then called "given"; the two
    baselines that look at no picture are scored beside it. limit: the first so many pictures only.
    ValueError for an unknown method.
    """
    if not callable(method) and method not in SOURCES:
        raise ValueError(f"method: found {method!r}, expected one of {', '.join(SOURCES)}, or a source")
    sources = {"given": method} if callable(method) else {method: SOURCES[method]}
    sources |= {name: SOURCES[name] for name in ("centre_prior", "all_foreground")}
    count = len(data) if limit is None else min(limit, len(data))
    counters, seconds = {name: FMeasure() for name in sources}, dict.fromkeys(sources, 0.0)
    for i in range(count):
        sample = data[i]
        batch = {"name": [sample.name], "image_uint8": torch.as_tensor(sample.image)[None]}
        for name, source in sources.items():
            started = time.perf_counter()
            found = source(batch)
            seconds[name] += time.perf_counter() - started
            counters[name].update(found, torch.as_tensor(sample.mask)[None])
    milliseconds = {name: round(1e3 * s / count, 1) for name, s in seconds.items()}
    return {"split": data.split, "pictures": count, "beta_squared": FMeasure.BETA_SQUARED,
            "foreground_share": round(counters["all_foreground"].share(), 4),
            "methods": {name: counter.to_json() | {"milliseconds_per_picture": milliseconds[name]}
                        for name, counter in counters.items()}}


class FMeasure:
    """How well saliency > t finds the foreground, for 101 thresholds t at once, over all pixels together.

    F = (1 + b) P R / (b P + R) of precision P and recall R, with b = beta^2 = 0.3: precision counts for more,
    as in Achanta et al., Frequency-tuned Salient Region Detection, CVPR 2009. There P and R are averaged over
    pictures; over pixels, as IoU is here, a picture without foreground needs no convention.
    """

    BETA_SQUARED = 0.3

    def __init__(self) -> None:
        self.thresholds = torch.linspace(0, 1, 101)
        self.counts = torch.zeros(2, 102, dtype=torch.long)  # [is foreground, number of thresholds below]
        self.error = 0.0

    def update(self, saliency: Tensor, masks: Tensor) -> None:
        """Add saliency (B, H, W) in [0, 1] and masks (B, H, W): foreground is 1..C, 255 does not count."""
        if saliency.shape != masks.shape:
            raise ValueError(f"saliency: found shape {tuple(saliency.shape)}, expected {tuple(masks.shape)}")
        valid = masks.cpu() != IGNORE
        truth, values = (masks.cpu() > 0)[valid], saliency.float().cpu()[valid]  # (P,)
        below = torch.searchsorted(self.thresholds, values)
        self.counts += torch.bincount(truth * 102 + below, minlength=204).view(2, 102)
        self.error += float((values - truth.float()).abs().double().sum())

    def share(self) -> float:
        """The foreground's share of the pixels."""
        return float(self.counts[1].sum() / self.counts.sum())

    def curve(self) -> Tensor:
        """(101,) float64: F at each threshold; 0 where nothing is found."""
        above = self.counts.flip(1).cumsum(1).flip(1)[:, 1:].double()  # (2, 101): pixels with saliency > t
        hits, found, there = above[1], above.sum(0), self.counts[1].sum()
        # P = hits / found and R = hits / there, put in
        return (1 + self.BETA_SQUARED) * hits / (self.BETA_SQUARED * there + found).clamp(min=1e-9)

    def to_json(self) -> dict:
        """The best F with its threshold, which the truth chose; F at 0.5; the mean absolute error."""
        curve, total = self.curve(), int(self.counts.sum())
        if not total or not int(self.counts[1].sum()):
            raise ValueError(f"masks: found {total} pixels, none of them foreground, expected some")
        best, fixed = int(curve.argmax()), round(100 * SALIENT)
        return {"max_f": {"f": round(float(curve[best]), 4), "threshold": best / 100, "oracle": True},
                "f": {"f": round(float(curve[fixed]), 4), "threshold": SALIENT, "oracle": False},
                "mae": round(self.error / total, 4)}
