"""From image-level labels to a network that segments, whatever the method: in one run or in two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import nn

from .data.splits import TRAIN_SPLITS, open_split
from .reports import MAPS, write_labels
from .training import distributed
from .training.fit import fit
from .training.recipes import Recipe, find_recipe


def train_segmenter(
    recipe: Recipe,
    root: str | Path,
    out: str | Path,
    init: bool | str | Path = True,
    resume: bool = True,
    progress: bool = True,
    evaluate: Callable[[nn.Module, int], dict[str, float]] | None = None,
    second: Recipe | None = None,
) -> nn.Module:
    """Train by the recipe up to a network that segments; return it, in eval mode.

    A method whose own network segments (afa, getam) is trained into the folder `out` and that is all. The others
    (weaktr, acr) go on: pseudo labels of the pictures, as the recipe's `labels` say, into `out`/labels, and a
    Segmenter that learns from them into `out`/segmenter, by `second`, or else the data set's own recipe for it with
    the first recipe's seed, device and workers. Each part resumes where it was stopped.
    evaluate: of the run that ends with the network that is returned. Other arguments and errors as of `fit`.
    """
    options = {"init": init, "resume": resume, "progress": progress}
    if not recipe.labels:
        return fit(recipe, root, out, evaluate=evaluate, **options)
    folder = Path(out, "labels")
    with distributed.processes(recipe.config.device):
        model = fit(recipe, root, out, **options)
        data = open_split(recipe.data, root, TRAIN_SPLITS[recipe.data])
        write_labels(model, data, folder=folder, progress=progress, **label_options(recipe))
        distributed.wait()  # a process begins to learn when all labels are there
        return fit(second or second_recipe(recipe), root, Path(out, "segmenter"), masks=folder, evaluate=evaluate,
                   **options)


def label_options(recipe: Recipe) -> dict:
    """What `write_labels` needs to know of a recipe's pseudo labels, the threshold included.

    ValueError for a recipe without, and for maps that are none of `reports.MAPS`."""
    options = dict(recipe.labels)
    name = options.pop("maps", None)
    if name not in MAPS:
        raise ValueError(f"labels: found maps {name!r}, expected one of {', '.join(MAPS)}")
    return {**MAPS[name], **options}


def second_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the Segmenter that learns from another recipe's pseudo labels."""
    second, config = find_recipe(f"{recipe.data}/segmenter"), recipe.config
    return replace(second, config=replace(
        second.config, seed=config.seed, device=config.device, workers=config.workers))
