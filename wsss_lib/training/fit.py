"""A recipe and a data set in, trained weights and the record of how they were made out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..data.batches import Batches
from ..data.coco import COCO
from ..data.pseudo import PseudoLabelled
from ..data.sample import Sample
from ..data.transforms import ClassificationTransform, TrainTransform
from ..data.voc import VOC
from ..models import create_model
from ..ledgers import command_line, current_commit
from . import distributed
from .checkpoints import save_weights
from .engine import train
from .objectives import OBJECTIVES
from .recipes import Recipe, as_record


def fit(
    recipe: Recipe,
    root: str | Path,
    out: str | Path,
    init: bool | str | Path = True,
    masks: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
    ship: str | Path | None = None,
) -> nn.Module:
    """Train the recipe's network on the pictures below `root`; return it, in eval mode.

    out: folder for checkpoint and log (see `engine.train`), `model.safetensors` and its record `model.json`.
    init: weights to start from, as `create_model`'s `pretrained`. masks: the folder of pseudo labels, for the
    recipes that learn from one. The recipe's config has seed, device and workers. ship: a further file for the
    weights, beside the backbone's own, which then holds only what the training changed.
    Under torchrun each process has its part of every batch, and the first one writes; see `distributed`.
    Raises ValueError where masks are missing or not wanted, and as `create_model`, `VOC` and `train`.
    """
    if recipe.pseudo_labels != (masks is not None):
        found, expected = ("none", "a folder of pseudo labels") if masks is None else (masks, "none")
        raise ValueError(f"masks: found {found}, expected {expected} for the method {recipe.method}")
    with distributed.processes(recipe.config.device) as device:
        torch.manual_seed(recipe.config.seed)  # the new heads' first weights
        data = training_data(recipe.data, root)
        model = create_model(recipe.method, recipe.backbone, data.num_classes, init, **recipe.network)
        freeze(model, recipe.freeze)
        data = data if masks is None else PseudoLabelled(data, masks)
        share = distributed.rank(), distributed.world_size()
        batches = Batches(data, make_transform(recipe, model), recipe.batch_size, recipe.config.seed, *share)
        config = replace(recipe.config, device=device)
        objective = OBJECTIVES[recipe.method](**recipe.loss)
        last = train(model, batches, objective, config, out, resume, progress=progress)[-1]
        if distributed.rank():
            return model
    record = {
        "seed": recipe.config.seed, "images": last["pictures"], "seconds": round(last["seconds"]),
        "processes": share[1], "recipe": as_record(recipe), "num_classes": model.num_classes,
        "init": init if isinstance(init, bool) else Path(init).name,
        "masks": None if masks is None else Path(masks).name,
        "command": command_line(), "commit": current_commit(),
    }
    files = {Path(out, "model.safetensors"): None}
    if ship is not None:
        files[Path(ship)] = Path(ship).with_name(f"{recipe.backbone}.safetensors")
    for file, base in files.items():
        save_weights(file, model, base=base)
        file.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return model


def training_data(name: str, root: str | Path) -> VOC | COCO:
    """The pictures that are trained on, with image-level labels alone: of "toyvoc", "voc12" or "coco14"."""
    if name == "coco14":
        return COCO(root, "train")
    return VOC(root, "train" if name == "toyvoc" else "train_aug")


def make_transform(recipe: Recipe, model: nn.Module) -> Callable[[Sample], dict]:
    """The recipe's augmentation, normalised as the network's backbone expects."""
    mean, std = model.data_config["mean"], model.data_config["std"]
    if recipe.augment == "classification":
        return ClassificationTransform(recipe.crop_size, mean, std)
    return TrainTransform(
        recipe.crop_size, recipe.scale_range, color_jitter=recipe.color_jitter, mean=mean, std=std,
        keep_uint8=recipe.method in ("afa", "getam"), long_side=recipe.long_side)


def freeze(model: nn.Module, patterns: tuple[str, ...]) -> None:
    """Take the parameters whose names begin with one of the regular expressions out of the training.

    Raises ValueError for an expression that no name begins with."""
    names = dict(model.named_parameters())
    for pattern in patterns:
        found = [name for name in names if re.match(pattern, name)]
        if not found:
            raise ValueError(f"freeze: found no parameter whose name begins with {pattern!r}, expected some")
        for name in found:
            names[name].requires_grad_(False)


def load_trained(weights: str | Path) -> tuple[nn.Module, dict]:
    """The network of a file that `fit` wrote, in eval mode, and its record.

    Raises FileNotFoundError and ValueError for a missing or incomplete record, and as `create_model`."""
    file = Path(weights).with_suffix(".json")
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found, expected the record that was written beside {weights}")
    record = json.loads(file.read_text(encoding="utf-8"))
    try:
        recipe, classes = record["recipe"], record["num_classes"]
        method, backbone, network = (recipe[name] for name in ("method", "backbone", "network"))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: found no num_classes and recipe with method, backbone, network, expected "
                         "both") from error
    return create_model(method, backbone, classes, weights, **network).eval(), record
