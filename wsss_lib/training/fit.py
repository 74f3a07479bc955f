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
from ..data.pseudo import PseudoLabelled, WithSaliency
from ..data.sample import Sample
from ..data.splits import TRAIN_SPLITS, open_split
from ..data.transforms import ClassificationTransform, TrainTransform
from ..ledgers import command_line, current_commit
from ..models import create_model
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
    evaluate: Callable[[nn.Module, int], dict[str, float]] | None = None,
    saliency: str | Path | None = None,
) -> nn.Module:
    """Train the recipe's network on the pictures below `root`; return it, in eval mode.

    out: folder for checkpoint and log (see `engine.train`), `model.safetensors` and its record `model.json`.
    init: weights to start from, as `create_model`'s `pretrained`. masks: the folder of pseudo labels, for the
    recipes that learn from one. The recipe's config has seed, device and workers. ship: a further file for the
    weights, beside the backbone's own, which then holds only what the training changed. evaluate: see
    `engine.train`. A checkpoint in `out` is gone on from if all of the recipe, the number of pictures and the name of
    the masks' folder are the same. saliency: a folder of maps for getam, which otherwise looks at each picture's
    contrast: good for drawn pictures only.
    Under torchrun each process has its part of every batch, and the first one writes; see `distributed`.
    Raises ValueError where masks are missing or not wanted, and as `create_model`, `VOC` and `train`.
    """
    if recipe.pseudo_labels != (masks is not None):
        found, expected = ("none", "a folder of pseudo labels") if masks is None else (masks, "none")
        raise ValueError(f"masks: found {found}, expected {expected} for the method {recipe.method}")
    if saliency is not None and recipe.method != "getam":
        raise ValueError(f"saliency: found {saliency}, expected none for the method {recipe.method}")
    with distributed.processes(recipe.config.device) as device:
        torch.manual_seed(recipe.config.seed)  # the new heads' first weights
        data = open_split(recipe.data, root, TRAIN_SPLITS[recipe.data])
        classes = list(data.classes)
        model = create_model(recipe.method, recipe.backbone, data.num_classes, init, **recipe.network)
        freeze(model, recipe.freeze)
        data = data if masks is None else PseudoLabelled(data, masks)
        data = data if saliency is None else WithSaliency(data, saliency)
        share = distributed.rank(), distributed.world_size()
        batches = Batches(data, make_transform(recipe, model), recipe.batch_size, recipe.config.seed, *share)
        config = replace(recipe.config, device=device)
        objective = OBJECTIVES[recipe.method](**recipe.loss)
        settings = {f"recipe.{name}": value for name, value in as_record(recipe).items() if name != "config"}
        settings |= {"recipe.pictures": len(data), "recipe.masks": _name(masks), "recipe.saliency": _name(saliency)}
        start = init if isinstance(init, bool) else Path(init).name
        settings["recipe.init"] = start
        options = {"evaluate": evaluate, "progress": progress, "settings": settings}
        last = train(model, batches, objective, config, out, resume, **options)[-1]
        if distributed.rank():
            return model
    record = {
        "seed": recipe.config.seed, "images": last["pictures"], "seconds": round(last["seconds"]),
        "processes": share[1], "recipe": as_record(recipe), "num_classes": model.num_classes,
        "classes": classes, "init": start, "masks": _name(masks), "saliency": _name(saliency),
        "command": command_line(), "commit": current_commit(),
    }
    files = {Path(out, "model.safetensors"): None}
    if ship is not None:
        files[Path(ship)] = Path(ship).with_name(f"{recipe.backbone}.safetensors")
    for file, base in files.items():
        save_weights(file, model, base=base)
        file.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return model


def _name(folder: str | Path | None) -> str | None:
    return None if folder is None else Path(folder).name


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
