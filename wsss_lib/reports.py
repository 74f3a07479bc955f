"""A model and a labelled split in, a report out: classification, pseudo labels, partial, false activation."""
from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .data.toyvoc import CONTEXT_ID, PART_GROUPS, QUADRUPEDS
from .data.transforms import EvalTransform
from .data.voc import VOC_CLASSES, encode_mask
from .evaluation import ConfusionMatrix, Scores, ThresholdSweep, mean_average_precision
from .localization import localize
from .localization.cam import eval_mode
from .phenomena import ContextActivation, PartCoverage
from .paths import REPOSITORY
from .refinement import pseudo_labels, scored_maps

FIXED_BACKGROUND = .4      # the threshold reported beside the oracle's: chosen before any score was seen

# What `evaluate --methods` takes: the method of `localize` and its options. power: a map that is a product of n
# factors is thresholded as its n-th root, on the scale of one factor: A G G of GETAM, A G and G G of its variants.
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
}


@dataclass
class LocalizedSplit:
    """Everything a score needs of a split, in memory: maps at the token grid, truths at picture size.

    logits, labels (N, C); maps (N, C, h, w); samples: the N data set items with their truths.
    refine: what `pseudo_labels` does to the scores ("par", "pamr"), None for nothing.
    """

    name: str
    logits: Tensor
    labels: Tensor
    maps: Tensor
    samples: list
    refine: str | None = None

    def _picture(self, i: int) -> dict:
        image = torch.as_tensor(self.samples[i].image)[None]
        return {"maps": self.maps[i:i + 1], "labels": self.labels[i:i + 1], "images": image, "refine": self.refine}

    def scores(self, i: int) -> Tensor:
        """(1, C, H, W): the maps of picture i, normalised to [0, 1], at its size; absent classes are zero."""
        return scored_maps(**self._picture(i))

    def pseudo_labels(self, i: int, background: float) -> Tensor:
        """(H, W): the pseudo label of picture i."""
        return pseudo_labels(**self._picture(i), background=background)[0]


@torch.no_grad()
def localize_split(model: nn.Module, data, method: str = "cam", batch_size: int = 50,
                   progress: bool = True, size: int | None = None, limit: int | None = None,
                   power: float = 1., refine: str | None = None, **options) -> LocalizedSplit:
    """Run a model over a data set, image-level labels given; `options` go to `localize`.

    size: pictures are resized to size x size for the model (truths keep theirs); None: they all have one
    size. limit: the first so many pictures only.
    """
    device = next(model.parameters()).device
    transform = EvalTransform(size, mean=model.data_config["mean"], std=model.data_config["std"])
    samples, logits, maps, labels = [], [], [], []
    count = len(data) if limit is None else min(len(data), limit)
    starts = range(0, count, batch_size)
    for start in tqdm(starts, desc=f"{method} on {data.split}", disable=not progress):
        chunk = [data[i] for i in range(start, min(start + batch_size, count))]
        images = torch.stack([transform(sample)["image"] for sample in chunk]).to(device)
        present = torch.stack([sample.labels for sample in chunk])
        with eval_mode(model):
            logits.append(model(images).float().cpu())
        found = localize(model, images, present.to(device), method=method, **options)
        maps.append(found.pow(power).cpu())
        labels.append(present)
        samples.extend(chunk)
    return LocalizedSplit(data.split, torch.cat(logits), torch.cat(labels), torch.cat(maps), samples, refine)


def sweep_thresholds(split: LocalizedSplit) -> ThresholdSweep:
    """The mIoU of every background threshold of a split's pseudo labels, in one pass."""
    sweep = ThresholdSweep(split.maps.shape[1])
    for i, sample in enumerate(split.samples):
        sweep.update(split.scores(i), torch.as_tensor(sample.mask)[None])
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
    return coverage, activation


def _rounded(value: float) -> float | None:
    """Four decimals; None for nan, which JSON does not have: nothing there to measure."""
    return None if math.isnan(value) else round(float(value), 4)


def report(model: nn.Module, data, method: str = "cam", background: float = FIXED_BACKGROUND,
           progress: bool = True, **options) -> dict:
    """Score a model's maps on a split of ToyVOC opened with all truths: plain numbers, ready for JSON.

    best: the threshold that maximises mIoU on this very split, an oracle; fixed: the one given. Coverage and
    context activation are measured at the best threshold, where the labels are at their most complete. None
    stands where there was no pixel to measure. options: as of `localize_split`.
    """
    started = time.perf_counter()
    split = localize_split(model, data, method, progress=progress, **options)
    sweep = sweep_thresholds(split)
    best = sweep.best(split.name)
    thresholds, miou = sweep.curve()
    chosen = float(thresholds[miou.argmax()])
    coverage, activation = measure_phenomena(split, chosen)
    rates = {c: {k: _rounded(r) for k, r in zip(CONTEXT_ID, row) if not math.isnan(r)}
             for c, row in zip(VOC_CLASSES, activation.rates())}
    fixed = sweep.scores_at(background, split.name)
    return {
        "method": method, "options": {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()},
        "split": split.name, "pictures": len(split.samples), "labels": "given",
        "device": next(model.parameters()).device.type,
        "mean_average_precision": _rounded(mean_average_precision(split.logits, split.labels)[0]),
        "best": {"background": round(chosen, 2), "miou": _rounded(best.miou), "oracle": best.oracle,
                 "iou": [_rounded(v) for v in best.iou]},
        "fixed": {"background": background, "miou": _rounded(fixed.miou), "oracle": fixed.oracle},
        "coverage": {k: _rounded(v) for k, v in coverage.coverage().items()},
        "background_called_foreground": _rounded(activation.background_rate()),
        "context_activation": rates, "seconds": round(time.perf_counter() - started, 1),
    }


def write_pseudo_labels(split: LocalizedSplit, background: float, folder: str | Path) -> Scores:
    """Write a split's pseudo labels as palette PNGs, named like the pictures, and scores.json beside them."""
    folder, confusion = Path(folder), ConfusionMatrix(split.maps.shape[1])
    folder.mkdir(parents=True, exist_ok=True)
    for i, sample in enumerate(split.samples):
        mask = split.pseudo_labels(i, background)
        (folder / f"{sample.name}.png").write_bytes(encode_mask(mask.numpy().astype("uint8")))
        confusion.update(mask, torch.as_tensor(sample.mask))
    scores = confusion.scores(split.name)
    record = {"background": background, **scores.to_json()}
    (folder / "scores.json").write_text(json.dumps(record, indent=1) + "\n")
    return scores


def current_commit() -> str | None:
    """The commit of the code that is running, None outside a git checkout."""
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    except FileNotFoundError:                       # no git on this machine
        return None
    return done.stdout.strip() or None


def command_line() -> str:
    """The command that is running; paths inside the repository are told from there, for they hold elsewhere too."""
    return "python -m wsss_lib " + " ".join(part.removeprefix(f"{REPOSITORY}/") for part in sys.argv[1:])


def write_results(path: str | Path, result: dict) -> Path:
    """Write a ledger entry as JSON with the command, commit, machine kind and versions that made it.

    ValueError for nan or infinite numbers, which JSON does not have; a file that was there stays as it was.
    """
    header = {"command": command_line(), "commit": current_commit(),
              "torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    return _write_json(Path(path), {**header, **result})


def study_row(name: str | None, training: dict | None, reports: dict[str, dict]) -> dict:
    """A row of a study: how the weights were made (the record `pretrain` writes beside them), how their maps score.

    ValueError without a name or a record: a row that cannot be told from others, or made again, is no evidence.
    """
    if not name or not training:
        raise ValueError(f"study: found name {name!r} and {'a' if training else 'no'} record of the training, "
                         "expected both; `pretrain` writes the record beside the weights")
    kept = ("best", "fixed", "coverage", "background_called_foreground")
    scores = {key: {k: r[k] for k in kept} for key, r in reports.items()}
    for score in scores.values():
        score["best"] = {k: v for k, v in score["best"].items() if k != "iou"}
    first = next(iter(reports.values()))
    return {"name": name, "seed": training["seed"], "images": training["images"],
            "minutes": round(training["seconds"] / 60, 1), "split": first["split"], "pictures": first["pictures"],
            "mean_average_precision": first["mean_average_precision"], **scores, "training": training}


def add_row(path: str | Path, row: dict) -> Path:
    """Write a row into a study's JSON file {"rows": [...]}: in the place of the one with its name and seed, else last.

    Scores of maps that are not in the new row stay, if the weights and the pictures are the same: a map can be added
    to a study later. ValueError as `write_results`, and for a file that is no study.
    """
    path = Path(path)
    study = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
    if not isinstance(study, dict) or not isinstance(study.get("rows"), list):
        raise ValueError(f'{path}: found no study, expected JSON with a list "rows"')
    rows, key = study["rows"], (row["name"], row["seed"])
    place = next((i for i, r in enumerate(rows) if (r["name"], r["seed"]) == key), len(rows))
    before = rows[place] if place < len(rows) else {}
    if all(before.get(field) == row[field] for field in ("training", "split", "pictures")):
        row = {**before, **row}
    return _write_json(path, {**study, "rows": rows[:place] + [row] + rows[place + 1:]})


def _write_json(path: Path, content: dict) -> Path:
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path
