"""Recipes: for each method and data set all that a training run depends on, by name.

A recipe is data. `training.fit` turns it into a network, batches and an objective; `override` changes single
settings of one, as `python -m wsss_lib train --set key=value` does.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from .engine import TrainConfig


@dataclass(frozen=True)
class Recipe:
    """A training run.

    method, network: the arguments of `create_model`. data: "toyvoc". loss: fields of the method's objective
    (`objectives.OBJECTIVES`). crop_size (pixels), scale_range, color_jitter: of `TrainTransform`.
    freeze: regular expressions; parameters whose names begin with one stay as they are.
    pseudo_labels: True where the masks of a folder are learned from. config: of the training loop.
    """

    method: str
    data: str
    config: TrainConfig
    batch_size: int = 16
    crop_size: int = 112
    scale_range: tuple[float, float] = (1.0, 1.25)
    color_jitter: tuple[float, float, float, float] | None = (0.2, 0.2, 0.2, 0.0)
    backbone: str = "toyvit"
    network: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    freeze: tuple[str, ...] = ()
    pseudo_labels: bool = False


# On ToyVOC the backbone has seen the drawn classes in pretraining, so short runs do. plain_attention is off
# wherever the loss reads attention: its tape sees the fused call only.
RECIPES: dict[str, Recipe] = {
    "toyvoc/weaktr": Recipe(
        "weaktr", "toyvoc", TrainConfig(600, lr=5e-4, weight_decay=0.03, plain_attention=False),
        network={"reduction": 2}, freeze=("backbone.patch_embed",),
    ),
    "toyvoc/segmenter": Recipe(
        "segmenter", "toyvoc", TrainConfig(600, lr=5e-4, weight_decay=0.0, lr_factors={"backbone": 0.1}),
        # 1.2 of ln 21 = 3.04, and a quarter of the crop's side, as published for 480 pixels
        loss={"start": 1.2, "patch": 28}, pseudo_labels=True,
    ),
    "toyvoc/afa": Recipe(
        "afa", "toyvoc",
        TrainConfig(500, lr=1e-3, weight_decay=0.01, schedule="poly", warmup=50, plain_attention=False,
                    lr_factors={"backbone": 0.1}),
        backbone="toymit", batch_size=8,
        # the three stages of the published run, the last one shorter; a quarter of the grid's side
        loss={"classify_until": 200, "propagate_from": 300, "radius": 3},
    ),
    "toyvoc/getam": Recipe(
        "getam", "toyvoc",
        TrainConfig(400, lr=1e-3, weight_decay=0.01, schedule="poly", power=0.9, warmup=50, plain_attention=False,
                    lr_factors={"backbone": 0.1}),
        # half of the steps, as published; an opening of 10 belongs to pictures of 256 pixels
        batch_size=8, loss={"classify_until": 200, "opening": 4},
    ),
    "toyvoc/acr": Recipe(
        "acr", "toyvoc",
        TrainConfig(300, lr=3e-4, weight_decay=0.03, plain_attention=False, lr_factors={"classifier": 10.0}),
        batch_size=8,
    ),
}


def find_recipe(name: str) -> Recipe:
    """The recipe of a name such as "toyvoc/afa"; ValueError for an unknown one."""
    if name not in RECIPES:
        raise ValueError(f"recipe: found {name!r}, expected one of {', '.join(RECIPES)}")
    return RECIPES[name]


def override(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """A recipe with other settings, each "key=value".

    key: a field of Recipe or of its TrainConfig, or "network.NAME", "loss.NAME". value: a Python literal, or else
    a string. Raises ValueError for text without "=", an unknown key and values of another type.
    """
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"set: found {setting!r}, expected key=value")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        recipe = _replaced(recipe, key, value)
    return recipe


def _replaced(recipe: Recipe, key: str, value: Any) -> Recipe:
    group, dot, name = key.partition(".")
    if dot and group in ("network", "loss"):
        return replace(recipe, **{group: {**getattr(recipe, group), name: value}})
    own = [f.name for f in fields(Recipe) if f.name != "config"]
    of_config = [f.name for f in fields(TrainConfig)]
    if key not in own and key not in of_config:
        expected = ", ".join([*own, *of_config, "network.NAME", "loss.NAME"])
        raise ValueError(f"set: found key {key!r}, expected one of {expected}")
    before = getattr(recipe if key in own else recipe.config, key)
    if not _alike(before, value):
        raise ValueError(f"set: {key}: found {value!r}, expected a value like {before!r}")
    if key in own:
        return replace(recipe, **{key: value})
    return replace(recipe, config=replace(recipe.config, **{key: value}))


def _alike(before: Any, value: Any) -> bool:
    """A value of the same kind; a whole number will do for a real one, and anything for None."""
    if before is None or value is None:
        return True
    if isinstance(before, float) and not isinstance(value, bool):
        return isinstance(value, (int, float))
    return type(value) is type(before)


def as_record(recipe: Recipe) -> dict:
    """The recipe as plain data, for the JSON beside the weights that it makes."""
    return asdict(recipe)
