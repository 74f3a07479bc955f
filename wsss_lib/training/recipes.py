"""Recipes: for each method and data set all that a training run depends on, by name.

A recipe is data. `training.fit` turns it into a network, batches and an objective; `override` changes single
settings of one, as `python -m wsss_lib train --set key=value` does. The recipes of voc12 and coco14 are the
papers'; those of toyvoc are ours, for minutes on a laptop, and stand in `toy_recipes`.

Sources: GETAM (arXiv 2112.02841), WeakTr (arXiv 2304.01184), AFA (arXiv 2203.02664) and ACR (arXiv 2308.04321),
their experiments' sections and published code. Epochs are turned into steps with the pictures that there are.
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

    method, backbone, network: the arguments of `create_model`. data: "toyvoc", "voc12" or "coco14". loss: fields of
    the method's objective (`objectives.OBJECTIVES`). augment: "crop", of `TrainTransform`, with crop_size (pixels),
    scale_range, long_side and color_jitter; or "classification", of `ClassificationTransform`.
    freeze: regular expressions; parameters whose names begin with one stay as they are.
    pseudo_labels: True where the masks of a folder are learned from. labels: how the trained network's own pseudo
    labels are made, for a Segmenter to learn from: maps (a name of `reports.MAPS`), background (the threshold), and
    options of `reports.localize_split` (scales, flip, refine, crf); empty where the network itself segments.
    config: of the training loop.
    """

    method: str
    data: str
    config: TrainConfig
    batch_size: int = 16
    crop_size: int = 112
    scale_range: tuple[float, float] = (1.0, 1.25)
    long_side: tuple[float, float] | None = None
    color_jitter: tuple[float, float, float, float] | None = (0.2, 0.2, 0.2, 0.0)
    augment: str = "crop"
    backbone: str = "toyvit"
    network: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    freeze: tuple[str, ...] = ()
    pseudo_labels: bool = False
    labels: dict[str, Any] = field(default_factory=dict)


PICTURES = {"voc12": 10_582, "coco14": 82_081}  # train_aug; train with at least one label
CROP = {"color_jitter": None, "scale_range": (0.5, 2.0)}


def _epochs(data: str, epochs: int, batch_size: int) -> int:
    return epochs * (PICTURES[data] // batch_size)


def getam(data: str, published: bool = False) -> Recipe:
    """GETAM end to end: 20 epochs, the second half with labels of the network's own, at a tenth of the rate.

    published: weight decay in the place of SGD's momentum, which is what the published optimiser does with it.
    """
    steps, decay = _epochs(data, 20, 4), 5e-4
    config = TrainConfig(
        steps, lr=0.04, optimizer="sgd", momentum=decay if published else 0.0, weight_decay=0.0 if published else decay,
        schedule="poly", power=0.9, final_lr=0.0, warmup=0, clip=0.0, plain_attention=False,
        late_from=steps // 2, late_factor=0.1)
    cut = {"voc12": 0.9, "coco14": 0.95}[data]
    return Recipe(
        "getam", data, config, batch_size=4, crop_size=256, scale_range=(1.0, 1.0), long_side=(230, 292),
        color_jitter=None, backbone="vit_base_r50_s16_384", network={"published": published},
        loss={"classify_until": steps // 2, "cut": cut, "start_layer": 6, "published": published})


def afa(data: str, published: bool = False) -> Recipe:
    """AFA end to end: classes, then affinity and masks of refined maps, then masks of propagated ones.

    Heads at ten times the encoder's rate, its norms frozen. The published segmentation head has batch norm and its
    schedule a jump after the warm-up; published=True has both."""
    voc = data == "voc12"
    config = TrainConfig(
        20_000 if voc else 80_000, lr=6e-4, weight_decay=0.01, betas=(0.9, 0.999), schedule="poly", power=1.0,
        final_lr=0.0, warmup=1500, clip=0.0, plain_attention=False, lr_factors={"backbone": 0.1}, published=published)
    stages = (2_000, 6_000) if voc else (5_000, 15_000)
    loss = {"classify_until": stages[0], "propagate_from": stages[1], "num_iter": 10 if voc else 15}
    return Recipe("afa", data, config, batch_size=8, crop_size=512, long_side=(512, 2048), backbone="mit_b1",
                  network={"published": published}, loss=loss, freeze=("backbone.*norm",), **CROP)


def weaktr(data: str, published: bool = False) -> Recipe:
    """WeakTr's first stage: class tokens, coarse map and fusion; 60 epochs of timm's augmentation at 224 pixels.

    Its threshold was chosen on the truth of the training pictures."""
    voc = data == "voc12"
    labels = {"maps": "weaktr", "background": 0.43 if voc else 0.42, "flip": True, "refine": "crf",
              "scales": (1.0, 1.2) if voc else (1.0, 0.8, 1.2),
              "crf": {} if voc else {"spatial": (3, 3), "bilateral": (50, 5, 10)}}
    epoch, lr = PICTURES[data] // 64, {"voc12": 6e-4, "coco14": 2e-4}[data] * 64 / 512
    config = TrainConfig(60 * epoch, lr=lr, weight_decay=0.03, betas=(0.9, 0.999), warmup=5 * epoch,
                         final_lr=1e-5 / lr, clip=0.0, plain_attention=False)
    return Recipe("weaktr", data, config, batch_size=64, crop_size=224, augment="classification", labels=labels,
                  backbone="deit_small_patch16_224", network={"published": published, "drop_path_rate": 0.1})


def segmenter(data: str, published: bool = False) -> Recipe:
    """WeakTr's second stage: a Segmenter on pseudo labels, its gradients clipped; 100 epochs of 480-pixel crops."""
    config = TrainConfig(
        _epochs(data, 100, 4), lr=1e-4, optimizer="sgd", weight_decay=0.0, schedule="poly", power=0.9, final_lr=0.1,
        warmup=0, clip=0.0, plain_attention=False, lr_factors={"backbone": 0.1})
    return Recipe("segmenter", data, config, batch_size=4, crop_size=480, backbone="deit_small_patch16_224",
                  network={"published": published}, loss={"start": 1.2, "patch": 120}, pseudo_labels=True, **CROP)


def acr(data: str, published: bool = False) -> Recipe:
    """ACR: two views, both consistency terms over all blocks; 10 epochs (COCO 5) at 384 pixels.

    The published code has weights of 100 and weight decay in the place of SGD's momentum; the paper 125 for VOC. The
    threshold is a round number, for the paper's is swept on the truth."""
    decay, weight = 5e-4, 125.0 if data == "voc12" and not published else 100.0
    config = TrainConfig(
        _epochs(data, 10 if data == "voc12" else 5, 4), lr=0.05, optimizer="sgd", momentum=decay if published else 0.0,
        weight_decay=0.0 if published else decay, schedule="poly", power=0.9, final_lr=0.0, warmup=0, clip=0.0,
        plain_attention=False)
    return Recipe("acr", data, config, batch_size=4, crop_size=384, scale_range=(1.0, 1.0), long_side=(345, 438),
                  color_jitter=None, backbone="vit_base_r50_s16_384", network={"published": published},
                  loss={"region_weight": weight, "affinity_weight": weight},
                  labels={"maps": "acr", "background": 0.4, "flip": True, "refine": "crf"})


PAPERS = {"getam": getam, "afa": afa, "weaktr": weaktr, "segmenter": segmenter, "acr": acr}
# A classifier alone, whose CAM the methods are compared with, has a recipe for drawn pictures.
NAMES = ["toyvoc/cam", *(f"{data}/{method}" for data in ("toyvoc", *PICTURES) for method in PAPERS)]


def find_recipe(name: str, published: bool = False) -> Recipe:
    """The recipe of a name such as "toyvoc/afa" or "voc12/getam".

    published: with the defects of the published code (those of a recipe, and its network's and objective's).
    Raises ValueError for an unknown name, and for published with toyvoc, which no paper has.
    """
    data, _, method = name.partition("/")
    if name not in NAMES:
        raise ValueError(f"recipe: found {name!r}, expected one of {', '.join(NAMES)}")
    if data != "toyvoc":
        return PAPERS[method](data, published)
    if published:
        raise ValueError(f"published: found True for {name}, expected False: no paper has ToyVOC")
    from .toy_recipes import TOY_RECIPES

    return TOY_RECIPES[method]


def override(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """A recipe with other settings, each "key=value".

    key: a field of Recipe or of its TrainConfig, or "network.NAME", "loss.NAME", "labels.NAME".
    value: a Python literal, or else a string.
    Raises ValueError for text without "=", an unknown key and values of another type.
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
    if dot and group in ("network", "loss", "labels"):
        return replace(recipe, **{group: {**getattr(recipe, group), name: value}})
    own = [f.name for f in fields(Recipe) if f.name != "config"]
    of_config = [f.name for f in fields(TrainConfig)]
    if key not in own and key not in of_config:
        expected = ", ".join([*own, *of_config, "network.NAME", "loss.NAME", "labels.NAME"])
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
