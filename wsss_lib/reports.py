"""A model and a labelled split in, a report out: classification, maps, pseudo labels, partial and false activation."""
from __future__ import annotations

import json
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .data.toyvoc import CONTEXT_ID, PART_GROUPS, QUADRUPEDS
from .data.transforms import EvalTransform
from .data.voc import VOC_CLASSES
from .evaluation import ThresholdSweep, mean_average_precision
from .localization import localize
from .phenomena import ContextActivation, PartCoverage
from .refinement import pseudo_labels, scored_maps

FIXED_BACKGROUND = .4      # the threshold reported beside the oracle's: chosen before any score was seen


@dataclass
class LocalizedSplit:
    """Everything a score needs of a split, in memory: maps at the token grid, truths at picture size.

    logits, labels (N, C); maps (N, C, h, w); samples: the N data set items with their truths.
    """

    name: str
    logits: Tensor
    labels: Tensor
    maps: Tensor
    samples: list

    def scores(self, i: int) -> Tensor:
        """(1, C, H, W): the maps of picture i, normalised to [0, 1], at its size; absent classes are zero."""
        return scored_maps(self.maps[i:i + 1], self.labels[i:i + 1], self.samples[i].image.shape[-2:])

    def pseudo_labels(self, i: int, background: float) -> Tensor:
        """(H, W): the pseudo label of picture i."""
        size = self.samples[i].image.shape[-2:]
        return pseudo_labels(self.maps[i:i + 1], self.labels[i:i + 1], background=background, size=size)[0]


@torch.no_grad()
def localize_split(model: nn.Module, data, method: str = "cam", batch_size: int = 50, progress: bool = True,
                   size: int | None = None, **options) -> LocalizedSplit:
    """Run a model over a data set, image-level labels given; `options` go to `localize`.

    size: pictures are resized to size x size for the model (truths keep theirs); None: they all have one size.
    """
    device = next(model.parameters()).device
    transform = EvalTransform(size, mean=model.data_config["mean"], std=model.data_config["std"])
    samples, logits, maps, labels = [], [], [], []
    for start in tqdm(range(0, len(data), batch_size), desc=f"{method} on {data.split}", disable=not progress):
        chunk = [data[i] for i in range(start, min(start + batch_size, len(data)))]
        images = torch.stack([transform(sample)["image"] for sample in chunk]).to(device)
        present = torch.stack([sample.labels for sample in chunk])
        logits.append(model(images).float().cpu())
        maps.append(localize(model, images, present.to(device), method=method, **options).cpu())
        labels.append(present)
        samples.extend(chunk)
    return LocalizedSplit(data.split, torch.cat(logits), torch.cat(labels), torch.cat(maps), samples)


def sweep_thresholds(split: LocalizedSplit) -> ThresholdSweep:
    """The mIoU of every background threshold of a split's pseudo labels, in one pass."""
    sweep = ThresholdSweep(split.maps.shape[1])
    for i, sample in enumerate(split.samples):
        sweep.update(split.scores(i), torch.as_tensor(sample.mask)[None])
    return sweep


def measure_phenomena(split: LocalizedSplit, background: float) -> tuple[PartCoverage, ContextActivation]:
    """Partial activation (quadrupeds: head group against body group) and false activation by context, of the pseudo
    labels at one background threshold. Needs parts and contexts: drawn data only."""
    coverage = PartCoverage(PART_GROUPS, tuple(VOC_CLASSES.index(c) + 1 for c in QUADRUPEDS))
    activation = ContextActivation(len(VOC_CLASSES), CONTEXT_ID)
    for i, sample in enumerate(split.samples):
        prediction = split.pseudo_labels(i, background)
        mask = torch.as_tensor(sample.mask)
        coverage.update(prediction, mask, torch.as_tensor(sample.parts))
        activation.update(prediction, mask, torch.as_tensor(sample.contexts), sample.labels)
    return coverage, activation


def report(model: nn.Module, data, method: str = "cam", background: float = FIXED_BACKGROUND, **options) -> dict:
    """Score a model's maps on a split of ToyVOC opened with all truths: plain numbers, ready for JSON.

    best: the threshold that maximises mIoU on this very split, an oracle; fixed: the one given. Coverage and context
    activation are measured at the best threshold, where the labels are at their most complete.
    """
    started = time.perf_counter()
    split = localize_split(model, data, method, **options)
    sweep = sweep_thresholds(split)
    best = sweep.best(split.name)
    thresholds, miou = sweep.curve()
    chosen = float(thresholds[miou.argmax()])
    coverage, activation = measure_phenomena(split, chosen)
    rates = {c: {k: round(float(r), 4) for k, r in zip(CONTEXT_ID, row) if r == r}
             for c, row in zip(VOC_CLASSES, activation.rates())}
    return {
        "method": method, "options": options, "split": split.name, "pictures": len(split.samples), "labels": "given",
        "mean_average_precision": round(mean_average_precision(split.logits, split.labels)[0], 4),
        "best": {"background": round(chosen, 2), "miou": round(best.miou, 4), "oracle": True,
                 "iou": [round(float(v), 4) for v in best.iou]},
        "fixed": {"background": background, "miou": round(sweep.scores_at(background, split.name).miou, 4), "oracle": False},
        "coverage": {k: round(v, 4) for k, v in coverage.coverage().items()},
        "background_called_foreground": round(activation.background_rate(), 4),
        "context_activation": rates, "seconds": round(time.perf_counter() - started, 1),
    }


def write_results(path: str | Path, result: dict) -> Path:
    """Write a ledger entry as JSON with the command, the machine kind and the versions that made it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"command": "python -m wsss_lib " + " ".join(sys.argv[1:]), "torch": torch.__version__,
              "python": platform.python_version(), "machine": platform.machine()}
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps({**header, **result}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path
