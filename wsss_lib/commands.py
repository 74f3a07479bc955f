"""The commands of `python -m wsss_lib`: each takes the parsed arguments, does its work and prints what came out.

Heavy modules are imported where they are used, so that `--help` and a wrong argument answer at once.
"""
from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from .paths import cache_folder, shipped

if TYPE_CHECKING:
    from torch import nn

    from .data import COCO, VOC


def check_device(name: str) -> None:
    """ValueError for a device that PyTorch does not know or find here."""
    import torch

    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:     # PyTorch without CUDA says so by an assertion
        raise ValueError(f"device: found {name!r}, expected one that PyTorch finds, such as cpu") from error


def toyvoc(args: argparse.Namespace) -> None:
    """Draw a ToyVOC tree."""
    from .data.toyvoc import build_toyvoc, draw_sample, statistics

    build_toyvoc(args.root, args.train, args.val, args.single, args.seed, args.bias, args.processes)
    counts = {"train": args.train, "val": args.val, "single": args.single}
    result = {"seed": args.seed, "bias": args.bias,
              "splits": {split: statistics(args.root, split) for split, count in counts.items() if count}}
    print(json.dumps(result, indent=1))
    if args.results:
        from .ledgers import write_results

        draw_sample(0, "train", 0)                      # builds the noise bank, once per process
        started = time.perf_counter()
        for i in range(300):
            draw_sample(0, "train", i)
        result["milliseconds_per_scene"] = round((time.perf_counter() - started) / 300 * 1e3, 2)
        result["tree_bytes"] = sum(f.stat().st_size for f in Path(args.root).rglob("*") if f.is_file())
        write_results(args.results, result)


def pretrain(args: argparse.Namespace) -> None:
    """Train a toy backbone on mosaics, from image-level labels."""
    from functools import partial

    import torch

    from . import create_model
    from .data.toyvoc import build_toyvoc
    from .ledgers import command_line, current_commit
    from .models import fold_batch_norm
    from .training.checkpoints import save_weights
    from .training.engine import TrainConfig
    from .training.engine import train as run
    from .training.mosaics import MosaicBatches, MosaicRecipe, PictureStore, mosaic_loss

    check_device(args.device)
    recipe = MosaicRecipe(batch=args.batch, mosaics=args.mosaics, singles_until=args.singles_until)
    config = TrainConfig(args.steps, lr=args.lr, seed=args.seed, device=args.device, workers=args.workers)
    root = Path(args.root) if args.root else build_toyvoc(cache_folder() / "toyvoc")
    norm = args.stem_norm or ("none" if args.init else "batch")
    torch.manual_seed(args.seed)
    model = create_model("cam", args.backbone, pretrained=args.init or False, stem_norm=norm)
    batches = MosaicBatches(PictureStore(root, "single"), PictureStore(root, "train"), args.steps,
                            model.data_config["mean"], model.data_config["std"], recipe, args.seed)
    loss = partial(mosaic_loss, recipe=recipe)
    last = run(model, batches, loss, config, out=args.out, resume=args.resume)[-1]
    fold_batch_norm(model)
    record = {"seed": args.seed, "backbone": args.backbone, "stem_norm": norm, "steps": args.steps, "lr": args.lr,
              "recipe": asdict(recipe), "images": args.steps * args.batch, "pictures": last["pictures"],
              "distinct_pictures": len(batches.singles.images) + len(batches.scenes.images),
              "seconds": round(last["seconds"]), "device": args.device,
              "init": Path(args.init).name if args.init else None, "before": record_of(args.init),
              "command": command_line(), "commit": current_commit()}
    weights = Path(args.out) / f"{args.backbone}.safetensors"
    save_weights(weights, model)
    weights.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


def record_of(weights: str | Path | None) -> dict | None:
    """How the weights that a run starts from were made: the JSON beside them, if there is one."""
    beside = Path(weights).with_suffix(".json") if weights else None
    return json.loads(beside.read_text()) if beside and beside.exists() else None


def train(args: argparse.Namespace) -> None:
    """Train a method's network by a recipe, from image-level labels or from pseudo labels."""
    from .pipeline import train_segmenter
    from .training.fit import fit
    from .training.recipes import find_recipe, override

    check_device(args.device)
    settings = [f"{name}={getattr(args, name)}" for name in ("seed", "workers")]
    recipe = override(find_recipe(args.recipe, args.published), [*settings, f"device={args.device}", *args.set])
    root = Path(args.root) if args.root else default_tree(recipe.data)
    if args.retrain and (args.masks or args.ship or args.saliency or not recipe.labels):
        found = f"{args.recipe} with other files" if recipe.labels else args.recipe
        raise ValueError(f"retrain: found {found}, expected a recipe that makes pseudo labels (weaktr, acr), without "
                         "--masks, --saliency and --ship")
    if args.retrain:
        train_segmenter(recipe, root, args.out, args.init or True, args.resume)
    else:
        fit(recipe, root, args.out, args.init or True, args.masks, args.resume, ship=args.ship, saliency=args.saliency)
    if first_process():
        for folder in [Path(args.out), *([Path(args.out, "segmenter")] if args.retrain else [])]:
            print((folder / "model.json").read_text(encoding="utf-8"), end="")


def first_process() -> bool:
    """Whether this is the one of several processes that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def default_tree(data: str) -> Path:
    """The cached ToyVOC tree, drawn if it is not there; ValueError for other data, which is not drawn."""
    from .data.toyvoc import build_toyvoc

    if data != "toyvoc":
        raise ValueError(f"root: found none, expected the folder that holds {data}: only toyvoc is drawn")
    return build_toyvoc(cache_folder() / "toyvoc")


def trained_network(checkpoint: str | None, backbone: str, device: str) -> tuple[nn.Module, dict | None]:
    """The network of a checkpoint, whichever command trained it, and how that was done."""
    from . import create_model
    from .training.fit import load_trained

    file = Path(checkpoint) if checkpoint else shipped(f"checkpoints/{backbone}.safetensors")
    record = record_of(file)
    if record and "recipe" in record and "method" in record["recipe"]:
        return load_trained(file)[0].to(device), record
    group = (record or {}).get("stem_norm") == "group"          # batch norm is folded into the weights
    model = create_model("cam", backbone, pretrained=file, stem_norm="group" if group else "none")
    return model.to(device).eval(), record


def localize(args: argparse.Namespace) -> None:
    """Write the pseudo labels of a split, from image-level labels, into a folder."""
    from .reports import MAPS, map_options, write_labels
    from .training import distributed

    check_device(args.device)
    check_methods([args.method], MAPS)
    with distributed.processes(args.device) as device:
        model, record = trained_network(args.checkpoint, args.backbone, device)
        data = open_data(record, args.root, args.split)
        refine = None if args.refine == "none" else args.refine
        options = {"scales": tuple(args.scales), "flip": args.flip, "refine": refine, "size": args.size,
                   "limit": args.limit, "progress": first_process(), **map_options(args.method, loss_of(record))}
        written = write_labels(model, data, args.background, args.out, **options)
        written = distributed.total_counts(written)
    if first_process():
        print(f"{args.out}: {written} pseudo labels of {args.method} written at {args.background}, "
              f"refined by {args.refine}; those that were there already are kept")


def open_data(record: dict | None, root: str | None, split: str, truth: bool = False) -> VOC | COCO:
    """The split of the data that the weights were trained on; with all truths that a score can use, or none."""
    from .data.sample import TRUTHS
    from .data.splits import open_split

    data = (record or {}).get("recipe", {}).get("data", "toyvoc")
    if root is None and data != "toyvoc":
        raise ValueError(f"root: found none, expected the folder that holds {data}: only toyvoc ships")
    truths = TRUTHS if data == "toyvoc" else ("mask",)
    return open_split(data, root or shipped("toyvoc"), split, truths if truth else ())


def loss_of(record: dict | None) -> dict:
    """The options of the loss that the weights were trained with; none where no recipe made them."""
    return (record or {}).get("recipe", {}).get("loss", {})


def check_methods(methods: list[str], known: Iterable[str]) -> None:
    """ValueError for a method that is not known."""
    unknown = [method for method in methods if method not in known]
    if unknown:
        raise ValueError(f"methods: found {', '.join(map(repr, unknown))}, expected some of {', '.join(known)}")


def predict(args: argparse.Namespace) -> None:
    """Segment a folder of one's own pictures: colour masks and overlays."""
    from .data.voc import VOC_CLASSES
    from .prediction import predict_folder
    from .training.fit import load_trained
    from .viz import class_name

    check_device(args.device)
    model, record = load_trained(args.checkpoint)
    side = args.side or record["recipe"]["crop_size"]
    counts = predict_folder(model.to(args.device), args.images, args.out, side, args.scales, args.flip)
    names = record.get("classes", VOC_CLASSES)
    classes = sorted({c for count in counts for c in count if c})
    seen = ", ".join(f"{class_name(c, names)} in {sum(c in count for count in counts)}" for c in classes)
    print(f"{args.out}: {len(counts)} pictures; found {seen or 'background only'}")
