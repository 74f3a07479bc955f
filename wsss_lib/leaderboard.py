"""All methods on one backbone and one data set: networks trained by recipe, their maps and masks scored alike.

Each score is a file of its own, OUT/NETWORK.MAPS.SEED.json, so a run that was stopped goes on where it was, and one
row can be measured anew by deleting its file. The comparison is fair where it can be: the same weights to start from,
the same pictures to learn from and to be scored on, labels given to all maps and to no segmenter, one fixed threshold
for all, an oracle's beside it.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .bench_instruments import peak_bytes
from .data.pseudo import PseudoLabelled
from .data.sample import TRUTHS
from .data.splits import open_split
from .data.transforms import EvalTransform
from .data.voc import encode_mask
from .evaluation import ConfusionMatrix
from .ledgers import write_results
from .localization import localize
from .localization.cam import eval_mode
from .pipeline import second_recipe, train_segmenter
from .refinement import affinity_maps
from .reports import localize_split, map_options, report
from .segmentation import segment, segmentation_report
from .training.fit import fit, load_trained
from .training.recipes import Recipe, find_recipe, override

REFINEMENTS = (None, "par", "crf")
SHOWN = 8               # the first so many pictures' masks are kept beside a row, to be looked at
MASKS = "segmentation"  # stands for a network's own masks where else the name of its maps stands


@dataclass(frozen=True)
class Entry:
    """A network of the comparison: its recipe, settings beside the recipe's, and which of its maps are scored.

    retrained: a Segmenter learns from its pseudo labels, and is scored as MASKS. Names are those of `reports.MAPS`.
    """

    recipe: str
    maps: tuple[str, ...]
    settings: tuple[str, ...] = ()
    retrained: bool = False


ACR = ("acr_gradient", "acr")
ENTRIES: dict[str, Entry] = {
    "classifier": Entry("toyvoc/cam", ("cam", "grad_cam_last_block", "attention", "rollout", "getam", "getam_grad",
                                       "getam_grad_s", "getam_cam_grad"), retrained=True),
    "getam": Entry("toyvoc/getam", ("getam", MASKS)),
    "weaktr": Entry("toyvoc/weaktr", ("weaktr_coarse", "weaktr_class_attention", "weaktr_mean", "weaktr"),
                    retrained=True),
    "afa": Entry("toyvoc/afa", ("afa_cam", "affinity", MASKS), ("backbone=toyvit",)),
    "afa_toymit": Entry("toyvoc/afa", ("afa_cam", "affinity", MASKS)),
    "acr_without": Entry("toyvoc/acr", ACR, ("loss.region_weight=0.0", "loss.affinity_weight=0.0")),
    "acr_region": Entry("toyvoc/acr", ACR, ("loss.region_weight=100.0", "loss.affinity_weight=0.0")),
    "acr_affinity": Entry("toyvoc/acr", ACR, ("loss.region_weight=0.0", "loss.affinity_weight=100.0")),
    "acr": Entry("toyvoc/acr", ACR, ("loss.region_weight=100.0", "loss.affinity_weight=100.0"), retrained=True),
}
# The same for all labels: plain cross entropy, as WeakTr's clipping costs points here (data/results/weaktr.json).
SEGMENTER = ("loss.start=0.0", "steps=600")
# What AFA is published with; all other maps are of one view.
AFA_VIEWS = {"scales": (1.0, 0.5, 1.5), "flip": True}


def run(
    root: str | Path,
    runs: str | Path,
    out: str | Path,
    seeds: Sequence[int] = (0, 1, 2),
    networks: Sequence[str] = tuple(ENTRIES),
    limit: int | None = 300,
    device: str = "cpu",
    settings: Sequence[str] = (),
) -> list[dict]:
    """Train what is not trained, score what is not scored; return the rows of these networks and seeds.

    root: a ToyVOC tree; its train split is learned from and the first `limit` pictures of val are scored. runs: a
    folder for the networks, NETWORK_SEED each, which may be there already. out: the folder of the scores.
    settings: for every recipe, beside its own, such as "steps=2" to try the path.
    Raises ValueError for an unknown network, for weights in `runs` that another recipe made, and as `fit`.
    """
    unknown = [name for name in networks if name not in ENTRIES]
    if unknown:
        raise ValueError(f"networks: found {', '.join(unknown)}, expected some of {', '.join(ENTRIES)}")
    data, rows = open_split("toyvoc", root, "val", TRUTHS), []
    for seed in seeds:
        for name in networks:
            entry = ENTRIES[name]
            folder = Path(runs, f"{name}_{seed}")
            own = [*entry.settings, *settings, f"seed={seed}", f"device={device}"]
            recipe = override(find_recipe(entry.recipe), own)
            for maps in (*entry.maps, *((MASKS,) if entry.retrained else ())):
                file = Path(out, f"{name}.{maps}.{seed}.json")
                if not file.exists():
                    retrained = entry.retrained and maps == MASKS
                    model = _trained(recipe, root, folder, retrained, settings).to(device)
                    scores, masks = _score(model, data, maps, recipe, limit)
                    if retrained:
                        scores["pseudo_labels"] = _labels_report(root, folder / "labels")
                    write_strips(file.with_suffix(".png"), masks)
                    write_results(file, {"network": name, "maps": maps, "seed": seed, **scores})
                rows.append(json.loads(file.read_text(encoding="utf-8")))
    return rows


def _trained(recipe: Recipe, root: str | Path, folder: Path, retrained: bool, settings: Sequence[str]) -> nn.Module:
    """The network of a recipe, trained if it is not there, or the Segmenter that learned from its pseudo labels."""
    if retrained:
        second = override(second_recipe(recipe), [*SEGMENTER, *settings])
        return train_segmenter(recipe, root, folder, second=second)
    weights = folder / "model.safetensors"
    if not weights.exists():
        return fit(recipe, root, folder)
    model, record = load_trained(weights)
    check_same(recipe, record["recipe"], weights)
    return model


def check_same(recipe: Recipe, made: dict, weights: Path) -> None:
    """ValueError where weights were made by a recipe that differs in what the network learns."""
    for field in ("method", "data", "backbone", "network", "loss", "batch_size", "crop_size"):
        if made[field] != json.loads(json.dumps(getattr(recipe, field))):
            raise ValueError(f"{weights}: {field}: found {made[field]}, expected {getattr(recipe, field)}")
    for field in ("steps", "lr", "seed"):
        if made["config"][field] != getattr(recipe.config, field):
            found, expected = made["config"][field], getattr(recipe.config, field)
            raise ValueError(f"{weights}: {field}: found {found}, expected {expected}")


def _score(
    model: nn.Module, data, maps: str, recipe: Recipe, limit: int | None
) -> tuple[dict, list[list[Tensor]]]:
    """Scores of one kind of maps, as they are and refined, or of the network's masks, and what a picture costs; and
    the first masks, (H, W) each: of maps as they are and by PAR, each at its best threshold, of a network its own."""
    if maps == MASKS:
        scores = {kind or "raw": segmentation_report(model, data, limit=limit, refine=kind) for kind in (None, "crf")}
        return {"scores": scores, **_cost(model, data, lambda image, labels: segment(model, image))}, [
            [segment(model, batch["image"]).argmax(dim=1)[0].cpu() for batch in _batches(model, data, SHOWN)]]
    options = {"limit": limit, "power": 1.0, **map_options(maps, recipe.loss)}
    options |= AFA_VIEWS if options["method"] == "affinity" else {}
    split = localize_split(model, data, **options)
    # parts and contexts are measured of the maps as they are: of refined ones that would take as long as all the rest
    bare = replace(split, samples=[replace(sample, parts=None, contexts=None) for sample in split.samples])
    scores = {kind or "raw": _short(report(model, data, split=bare if kind else split, refine=kind, **options))
              for kind in REFINEMENTS}
    of_map = {k: v for k, v in options.items() if k not in ("limit", "power", "minmax", "method")}
    masks = [[replace(split, refine=kind).pseudo_labels(i, scores[kind or "raw"]["best"]["background"])
              for i in range(min(SHOWN, len(split.samples)))] for kind in (None, "par")]

    def one(image: Tensor, labels: Tensor) -> Tensor:
        if options["method"] == "affinity":
            return affinity_maps(model, image, labels, **of_map)
        return localize(model, image, labels, method=options["method"], **of_map)

    return {"scores": scores, **_cost(model, data, one)}, masks


def _labels_report(root: str | Path, folder: Path) -> dict:
    """How good the labels were that a Segmenter learned from, of all training pictures."""
    data = PseudoLabelled(open_split("toyvoc", root, "train"), folder)
    truths, confusion = open_split("toyvoc", root, "train", ("mask",)), ConfusionMatrix(data.num_classes)
    for i in range(len(data)):
        confusion.update(data[i].mask, truths[i].mask)
    return {"split": "train", "pictures": len(data), "miou": round(float(confusion.scores("train").miou), 4)}


def write_strips(path: str | Path, masks: list[list[Tensor]]) -> None:
    """Rows of masks, (H, W) each and all of one size, side by side and below each other, as one palette PNG."""
    pixels = torch.cat([torch.cat(row, dim=1) for row in masks])  # (rows H, pictures W)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(encode_mask(pixels.numpy().astype("uint8")))


def _short(found: dict) -> dict:
    """A report without what no table shows."""
    return {k: v for k, v in found.items() if k not in ("options", "method", "device", "context_activation")}


def _batches(model: nn.Module, data, pictures: int) -> Iterator[dict[str, Tensor]]:
    """The first pictures of the data, each a batch of its own on the model's device: image and labels."""
    transform = EvalTransform(mean=model.data_config["mean"], std=model.data_config["std"])
    for i in range(min(pictures, len(data))):
        batch = transform(data[i])
        yield {name: batch[name][None].to(next(model.parameters()).device) for name in ("image", "labels")}


def _cost(model: nn.Module, data, one: Callable[[Tensor, Tensor], Tensor], pictures: int = 9) -> dict:
    """Median seconds of a picture alone, and the most memory that it takes beside the weights, in bytes.

    On a CPU these are seconds of its cores, summed: other work on the machine does not count.
    """
    device, seconds = next(model.parameters()).device, []
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    with eval_mode(model):
        for batch in _batches(model, data, pictures):
            started = clock()
            one(batch["image"], batch["labels"])
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(clock() - started)
        peak = peak_bytes(lambda: one(batch["image"], batch["labels"]), device)
    return {"seconds_per_picture": round(statistics.median(seconds), 4), "bytes_per_picture": peak}
