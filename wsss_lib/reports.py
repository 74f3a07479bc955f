"""A model and a labelled split in, a report out: classification, pseudo labels, partial, false activation."""
from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .data.toyvoc import CONTEXT_ID, PART_GROUPS, QUADRUPEDS
from .data.transforms import EvalTransform, scaled_views
from .data.voc import VOC_CLASSES, encode_mask
from .evaluation import ConfusionMatrix, Scores, ThresholdSweep, mean_average_precision
from .localization import localize, normalize_maps
from .localization.cam import eval_mode
from .phenomena import ContextActivation, PartCoverage
from .refinement import affinity_maps, crf_labels, pseudo_labels, scored_maps
from .training import distributed

FIXED_BACKGROUND = .4      # the threshold reported beside the oracle's: chosen before any score was seen

# What `evaluate --methods` takes: the method of `localize` and its options. power: a map that is a product of n
# factors is thresholded as its n-th root, on the scale of one factor: A G G of GETAM, A G and G G of its variants.
# minmax: patch attention makes a map positive everywhere, so its minimum is subtracted, as its paper does.
MAPS: dict[str, dict] = {
    "cam": {"method": "cam"},
    "grad_cam": {"method": "grad_cam"},
    "grad_cam_last_block": {"method": "grad_cam", "layer": -1},
    "attention": {"method": "attention"},
    "rollout": {"method": "rollout"},
    "getam": {"method": "getam", "power": 1 / 3},
    "getam_all_blocks": {"method": "getam", "start_layer": 0, "power": 1 / 3},
    "getam_grad": {"method": "getam", "variant": "grad"},
    "getam_grad_s": {"method": "getam", "variant": "grad_s", "power": 1 / 2},
    "getam_cam_grad": {"method": "getam", "variant": "cam_grad", "power": 1 / 2},
    "weaktr": {"method": "weaktr", "minmax": True},
    "weaktr_mean": {"method": "weaktr", "fusion": "mean", "minmax": True},
    "weaktr_random": {"method": "weaktr", "fusion": "random", "minmax": True},
    "weaktr_coarse": {"method": "weaktr", "fusion": "coarse", "minmax": True},
    "weaktr_class_attention": {"method": "weaktr", "patch_attention": False, "minmax": True, "power": 1 / 2},
    "acr": {"method": "acr", "minmax": True},
    "acr_gradient": {"method": "acr", "patch_affinity": False, "minmax": True},
    "afa_cam": {"method": "affinity", "walk": False},
    "affinity": {"method": "affinity"},
}


def map_options(name: str, loss: dict) -> dict:
    """The options of a map of MAPS, and the radius that the affinity was trained with, from a recipe's `loss`."""
    radius = {"radius": loss["radius"]} if name == "affinity" and loss.get("radius") else {}
    return {**MAPS[name], **radius}


@dataclass
class LocalizedSplit:
    """Everything a score needs of a split, in memory: maps at the token grid, truths at picture size.

    logits, labels (N, C); maps (N, C, h, w), or a list of N maps (C, h, w) where grids differ; samples: the N data
    set items with their truths. With several processes these are one's share of the split; sums go over all.
    refine: what is done to the scores ("par", "pamr", as `pseudo_labels` does) or to the masks ("crf", as
    `crf_labels` does), None for nothing. crf: options of `crf_labels`.
    """

    name: str
    logits: Tensor
    labels: Tensor
    maps: Tensor | list[Tensor]
    samples: list
    refine: str | None = None
    crf: dict = field(default_factory=dict)

    def _picture(self, i: int) -> dict:
        image = torch.as_tensor(self.samples[i].image)[None]
        refine = None if self.refine == "crf" else self.refine
        return {"maps": self.maps[i][None], "labels": self.labels[i:i + 1], "images": image, "refine": refine}

    def scores(self, i: int) -> Tensor:
        """(1, C, H, W): the maps of picture i, normalised to [0, 1], at its size; absent classes are zero. A CRF,
        which refines masks, comes after them."""
        return scored_maps(**self._picture(i))

    def pseudo_labels(self, i: int, background: float) -> Tensor:
        """(H, W): the pseudo label of picture i."""
        picture = self._picture(i)
        masks = pseudo_labels(**picture, background=background)
        if self.refine == "crf":
            masks = crf_labels(masks, picture["labels"], picture["images"], **self.crf)
        return masks[0]


@torch.no_grad()
def localize_split(model: nn.Module, data, method: str = "cam", batch_size: int = 50,
                   progress: bool = True, size: int | None = None, limit: int | None = None,
                   power: float = 1., minmax: bool = False, refine: str | None = None, crf: dict | None = None,
                   places: Sequence[int] | None = None, **options) -> LocalizedSplit:
    """Run a model over a data set, image-level labels given; `options` go to `localize`, or with the method
    "affinity" to `affinity_maps`.

    minmax, power: each map has its minimum subtracted and is divided by its maximum, then raised to the power.
    size: pictures are resized to size x size for the model (truths keep theirs); None: as they are, and those of
    one size share a pass. limit: the first so many pictures only. places: these pictures; None: this process's
    `distributed.share` of them, all if it is the only one.
    Raises ValueError where there are fewer pictures than processes, and as `localize`.
    """
    if places is None:
        places = distributed.share(len(data) if limit is None else min(len(data), limit))
    if not places:
        raise ValueError(f"{data.split}: found fewer pictures than the {distributed.world_size()} processes")
    device = next(model.parameters()).device
    transform = EvalTransform(size, mean=model.data_config["mean"], std=model.data_config["std"])
    samples, logits, maps, labels = [], [], [], []
    starts = range(0, len(places), batch_size)
    for start in tqdm(starts, desc=f"{method} on {data.split}", disable=not progress):
        chunk = [data[i] for i in places[start:start + batch_size]]
        for _, group in groupby(chunk, lambda sample: sample.image.shape):
            group = list(group)
            images = torch.stack([transform(sample)["image"] for sample in group]).to(device)
            present = torch.stack([sample.labels for sample in group])
            _, _, fitting = next(iter(scaled_views(images, (1.,), False, model.patch_stride)))
            with eval_mode(model):
                logits.append(model(fitting).float().cpu())
            if method == "affinity":
                found = affinity_maps(model, images, present.to(device), **options)
            else:
                found = localize(model, images, present.to(device), method=method, **options)
            maps.extend((normalize_maps(found, "minmax") if minmax else found).pow(power).cpu())
            labels.append(present)
            samples.extend(group)
    same = len({m.shape for m in maps}) == 1
    return LocalizedSplit(
        data.split, torch.cat(logits), torch.cat(labels), torch.stack(maps) if same else maps, samples, refine,
        crf or {})


def sweep_thresholds(split: LocalizedSplit) -> ThresholdSweep:
    """The mIoU of every background threshold of a split's pseudo labels, in one pass."""
    sweep = ThresholdSweep(split.labels.shape[1])
    for i, sample in enumerate(split.samples):
        sweep.update(split.scores(i), torch.as_tensor(sample.mask)[None])
    sweep.histogram = distributed.total_counts(sweep.histogram)
    return sweep


def measure_phenomena(split: LocalizedSplit, background: float) -> tuple[PartCoverage, ContextActivation]:
    """Partial activation (quadrupeds: head group against body group) and false activation by context, of the
    pseudo labels at one background threshold. Needs parts and contexts: drawn data only."""
    coverage = PartCoverage(PART_GROUPS, tuple(VOC_CLASSES.index(c) + 1 for c in QUADRUPEDS))
    activation = ContextActivation(len(VOC_CLASSES), CONTEXT_ID)
    for i, sample in enumerate(split.samples):
        prediction = split.pseudo_labels(i, background)
        mask = torch.as_tensor(sample.mask)
        coverage.update(prediction, mask, torch.as_tensor(sample.parts))
        activation.update(prediction, mask, torch.as_tensor(sample.contexts), sample.labels)
    for counted in (coverage, activation):
        for name in ("hits", "pixels", "background_hits", "background_pixels"):
            if hasattr(counted, name):
                setattr(counted, name, distributed.total_counts(getattr(counted, name)))
    return coverage, activation


def _rounded(value: float) -> float | None:
    """Four decimals; None for nan, which JSON does not have: nothing there to measure."""
    return None if math.isnan(value) else round(float(value), 4)


def report(model: nn.Module, data, method: str = "cam", background: float = FIXED_BACKGROUND,
           progress: bool = True, split: LocalizedSplit | None = None, **options) -> dict:
    """Score a model's maps on a split opened with its masks: plain numbers, ready for JSON.

    best: the threshold that maximises mIoU on this very split, an oracle; fixed: the one given. Coverage and
    context activation are measured at the best threshold, where the labels are at their most complete; they need
    the parts and contexts of drawn pictures, and are left out without. None stands where there was no pixel to
    measure. With several processes each has its share, and all return the report of the whole split.
    options: as of `localize_split`. With refine="crf" both thresholds are those of the masks that go into the CRF,
    and the scores those of the masks that come out.
    split: what `localize_split` made of the same arguments but for refine; the network then need not run again.
    """
    started = time.perf_counter()
    if split is None:
        split = localize_split(model, data, method, progress=progress, **options)
    split = replace(split, refine=options.get("refine"), crf=options.get("crf") or {})
    logits, labels = distributed.gather(split.logits), distributed.gather(split.labels)
    sweep = sweep_thresholds(split)
    best = sweep.best(split.name)
    thresholds, miou = sweep.curve()
    chosen = float(thresholds[miou.argmax()])
    phenomena = {}
    if all(sample.parts is not None and sample.contexts is not None for sample in split.samples):
        coverage, activation = measure_phenomena(split, chosen)
        phenomena = {
            "coverage": {k: _rounded(v) for k, v in coverage.coverage().items()},
            "background_called_foreground": _rounded(activation.background_rate()),
            "context_activation": {
                c: {k: _rounded(r) for k, r in zip(CONTEXT_ID, row) if not math.isnan(r)}
                for c, row in zip(VOC_CLASSES, activation.rates())}}
    fixed = sweep.scores_at(background, split.name)
    if split.refine == "crf":
        best, fixed = (replace(scores_of(split, t), oracle=s.oracle) for t, s in ((chosen, best), (background, fixed)))
    return {
        "method": method, "options": {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()},
        "split": split.name, "pictures": len(labels), "labels": "given",
        "device": next(model.parameters()).device.type,
        "mean_average_precision": _rounded(mean_average_precision(logits, labels)[0]),
        "best": {"background": round(chosen, 2), "miou": _rounded(best.miou), "oracle": best.oracle,
                 "iou": [_rounded(v) for v in best.iou]},
        "fixed": {"background": background, "miou": _rounded(fixed.miou), "oracle": fixed.oracle},
        **phenomena, "seconds": round(time.perf_counter() - started, 1),
    }


def scores_of(split: LocalizedSplit, background: float) -> Scores:
    """The scores of a split's pseudo labels at one threshold, mask by mask: what a sweep cannot know of a CRF."""
    confusion = ConfusionMatrix(split.labels.shape[1])
    for i, sample in enumerate(split.samples):
        confusion.update(split.pseudo_labels(i, background), torch.as_tensor(sample.mask))
    confusion.counts = distributed.total_counts(confusion.counts)
    return confusion.scores(split.name)


def write_labels(model: nn.Module, data, background: float, folder: str | Path, limit: int | None = None,
                 chunk: int = 50, progress: bool = True, **options) -> int:
    """Write the pseudo labels of a data set as palette PNGs, NAME.png; return how many were not there already.

    No truth is opened or needed. options: as of `localize_split`. Each file is written beside its place and
    renamed, so an interrupted run leaves whole files, and goes on with the pictures that have none. Of several
    processes each has its share, and counts that alone.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    count = len(data) if limit is None else min(len(data), limit)
    missing = [i for i in distributed.share(count) if not (folder / f"{data.names[i]}.png").exists()]
    bar = tqdm(total=len(missing), desc=f"pseudo labels of {data.split}", disable=not progress)
    for start in range(0, len(missing), chunk):
        split = localize_split(model, data, places=missing[start:start + chunk], progress=False, **options)
        for i, sample in enumerate(split.samples):
            _write_mask(folder / f"{sample.name}.png", split.pseudo_labels(i, background))
            bar.update()
    bar.close()
    return len(missing)


def _write_mask(path: Path, mask: Tensor) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(encode_mask(mask.numpy().astype("uint8")))
    temporary.replace(path)


def write_pseudo_labels(split: LocalizedSplit, background: float, folder: str | Path) -> Scores:
    """Write a split's pseudo labels as palette PNGs, named like the pictures, and scores.json beside them."""
    folder, confusion = Path(folder), ConfusionMatrix(split.labels.shape[1])
    folder.mkdir(parents=True, exist_ok=True)
    for i, sample in enumerate(split.samples):
        mask = split.pseudo_labels(i, background)
        _write_mask(folder / f"{sample.name}.png", mask)
        confusion.update(mask, torch.as_tensor(sample.mask))
    scores = confusion.scores(split.name)
    record = {"background": background, **scores.to_json()}
    (folder / "scores.json").write_text(json.dumps(record, indent=1) + "\n")
    return scores
