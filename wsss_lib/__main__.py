"""Command line, for work that outgrows a notebook: `python -m wsss_lib {toyvoc, pretrain, evaluate, saliency, bench}`."""
from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from .paths import cache_folder, shipped


def _check_device(name: str) -> None:
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
        from .reports import write_results

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
    from .models import fold_batch_norm
    from .reports import command_line, current_commit
    from .training.checkpoints import save_weights
    from .training.engine import TrainConfig, train
    from .training.recipes import MosaicBatches, MosaicRecipe, PictureStore, mosaic_loss

    _check_device(args.device)
    recipe = MosaicRecipe(batch=args.batch, mosaics=args.mosaics, singles_until=args.singles_until)
    config = TrainConfig(args.steps, lr=args.lr, seed=args.seed, device=args.device, workers=args.workers)
    root = Path(args.root) if args.root else build_toyvoc(cache_folder() / "toyvoc")
    norm = args.stem_norm or ("none" if args.init else "batch")
    torch.manual_seed(args.seed)
    model = create_model("cam", args.backbone, pretrained=args.init or False, stem_norm=norm)
    batches = MosaicBatches(PictureStore(root, "single"), PictureStore(root, "train"), args.steps,
                            model.data_config["mean"], model.data_config["std"], recipe, args.seed)
    loss = partial(mosaic_loss, recipe=recipe)
    last = train(model, batches, loss, config, out=args.out, resume=args.resume)[-1]
    fold_batch_norm(model)
    record = {"seed": args.seed, "backbone": args.backbone, "stem_norm": norm, "steps": args.steps, "lr": args.lr,
              "recipe": asdict(recipe), "images": args.steps * args.batch, "pictures": last["pictures"],
              "distinct_pictures": len(batches.singles.images) + len(batches.scenes.images),
              "seconds": round(last["seconds"]), "device": args.device,
              "init": Path(args.init).name if args.init else None, "before": _record_of(args.init),
              "command": command_line(), "commit": current_commit()}
    weights = Path(args.out) / f"{args.backbone}.safetensors"
    save_weights(weights, model)
    weights.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


def _record_of(weights: str | None) -> dict | None:
    """How the weights that a run starts from were made: the JSON beside them, if there is one."""
    beside = Path(weights).with_suffix(".json") if weights else None
    return json.loads(beside.read_text()) if beside and beside.exists() else None


def evaluate(args: argparse.Namespace) -> None:
    """Score a checkpoint's maps on a split of ToyVOC."""
    from . import create_model
    from .data.sample import TRUTHS
    from .data.voc import VOC
    from .reports import MAPS, add_row, report, study_row, write_results

    _check_device(args.device)
    unknown = [method for method in args.methods if method not in MAPS]
    if unknown:
        raise ValueError(f"methods: found {', '.join(map(repr, unknown))}, expected some of {', '.join(MAPS)}")
    record = _record_of(args.checkpoint or shipped(f"checkpoints/{args.backbone}.safetensors"))
    group = (record or {}).get("stem_norm") == "group"          # batch norm is folded into the weights
    model = create_model("cam", args.backbone, pretrained=args.checkpoint or True,
                         stem_norm="group" if group else "none").to(args.device).eval()
    data = VOC(args.root or shipped("toyvoc"), args.split, truth=TRUTHS)
    options = {"scales": tuple(args.scales), "flip": args.flip, "limit": args.limit}
    result = {}
    for method in args.methods:
        for refine in args.refine:
            name = method if refine == "none" else f"{method}+{refine}"
            result[name] = report(model, data, background=args.background,
                                  refine=None if refine == "none" else refine, **options,
                                  **{"power": 1., **MAPS[method]})
    if args.results:
        write_results(args.results, result)
    if args.study:
        add_row(args.study, study_row(args.name, record, result))
    for name, r in result.items():
        best, fixed = r["best"], r["fixed"]
        print(f"{name}, {r['split']}, {r['pictures']} pictures, labels given: "
              f"mAP {r['mean_average_precision']:.3f}, mIoU {100 * best['miou']:.1f} at {best['background']} "
              f"(oracle), {100 * fixed['miou']:.1f} at {fixed['background']}; coverage {r['coverage']}; "
              f"background called foreground {r['background_called_foreground']}")


def saliency(args: argparse.Namespace) -> None:
    """Score saliency maps, the contrast of each picture or a folder of yours, against the foreground."""
    from .data.voc import VOC
    from .refinement.saliency import FolderSaliency, saliency_report
    from .reports import write_results

    data = VOC(args.root or shipped("toyvoc"), args.split, truth=["mask"])
    result = saliency_report(data, FolderSaliency(args.folder) if args.folder else "contrast", args.limit)
    if args.results:
        write_results(args.results, result)
    for name, r in result["methods"].items():
        print(f"{name}, {result['split']}, {result['pictures']} pictures: F {r['f']['f']:.3f} at "
              f"{r['f']['threshold']}, {r['max_f']['f']:.3f} at {r['max_f']['threshold']} (oracle), "
              f"mean absolute error {r['mae']:.3f}")


def bench(args: argparse.Namespace) -> None:
    """Time the kernels beside what the published code does."""
    import torch

    from .bench import BUDGET, run, table
    from .bench_cases import cases

    _check_device(args.device)
    device = torch.device(args.device)
    result = {"size": args.size, **run(cases(args.kernel, args.size, device), device, BUDGET[args.size])}
    print(table(result))
    if args.results:
        from .reports import write_results

        write_results(args.results, result)


def main() -> None:
    """Parse the command line and run one command; bad input is reported in one line."""
    parser = argparse.ArgumentParser(prog="python -m wsss_lib", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    p = commands.add_parser("toyvoc", help=toyvoc.__doc__)
    p.add_argument("--root", required=True, help="folder to write the VOC tree to")
    p.add_argument("--train", type=int, default=6000, help="scenes for training")
    p.add_argument("--val", type=int, default=500, help="scenes for validation")
    p.add_argument("--single", type=int, default=16000, help="single-object pictures for pretraining")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--bias", type=float, default=.9,
                   help="how strongly contexts and classes go together, 0..1")
    p.add_argument("--processes", type=int, help="processes that draw (default: all cores)")
    p.add_argument("--results", help="write statistics and speed to this JSON file")
    p.set_defaults(run=toyvoc)

    p = commands.add_parser("pretrain", help=pretrain.__doc__)
    p.add_argument("--out", required=True, help="folder for checkpoint, log and weights")
    p.add_argument("--root", help="ToyVOC tree (default: the cached one, drawn if it is not there)")
    p.add_argument("--steps", type=int, default=3000)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--backbone", default="toyvit", choices=["toyvit", "toycnn", "toymit"])
    p.add_argument("--stem-norm", choices=["none", "batch", "group"],
                   help="norm in the convolutional stem; batch norm is folded into the saved weights (default: batch, "
                        "after --init none)")
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--mosaics", type=float, default=.5, help="share of a batch that is mosaics")
    p.add_argument("--singles-until", type=float, default=.4,
                   help="share of the steps on single-object pictures")
    p.add_argument("--init", help="weights to start from")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cpu")
    p.add_argument("--workers", type=int, default=0)
    p.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True)
    p.set_defaults(run=pretrain)

    p = commands.add_parser("evaluate", help=evaluate.__doc__)
    p.add_argument("--checkpoint", help="weights (default: the shipped ones)")
    p.add_argument("--root", help="ToyVOC tree (default: the shipped one)")
    p.add_argument("--split", default="val")
    p.add_argument("--backbone", default="toyvit", choices=["toyvit", "toycnn", "toymit"])
    p.add_argument("--methods", nargs="+", default=["cam"], metavar="NAME", help="maps, see reports.MAPS")
    p.add_argument("--refine", nargs="+", default=["none"], choices=["none", "par", "pamr"],
                   help="score the maps as they are (none) and refined")
    p.add_argument("--limit", type=int, help="the first so many pictures only")
    p.add_argument("--scales", nargs="+", type=float, default=[1.0])
    p.add_argument("--flip", action="store_true")
    p.add_argument("--background", type=float, default=.4,
                   help="fixed threshold reported beside the best one")
    p.add_argument("--device", default="cpu")
    p.add_argument("--results", help="write the report to this JSON file")
    p.add_argument("--study", help="write a row with training record and scores into this JSON file")
    p.add_argument("--name", help="the row's name")
    p.set_defaults(run=evaluate)

    p = commands.add_parser("saliency", help=saliency.__doc__)
    p.add_argument("--root", help="VOC tree with masks (default: the shipped ToyVOC)")
    p.add_argument("--split", default="val")
    p.add_argument("--folder", help="your maps, NAME.png in grey (default: the contrast of each picture)")
    p.add_argument("--limit", type=int, help="the first so many pictures only")
    p.add_argument("--results", help="write the report to this JSON file")
    p.set_defaults(run=saliency)

    p = commands.add_parser("bench", help=bench.__doc__)
    p.add_argument("--kernel", nargs="+", metavar="NAME", help="only these (default: all)")
    p.add_argument("--size", default="small", choices=["tiny", "small", "paper"],
                   help="tiny: does it run; small: two minutes on a laptop; paper: the papers' sizes, half an hour")
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--results", help="write all of it to this JSON file")
    p.set_defaults(run=bench)

    args = parser.parse_args()
    try:
        args.run(args)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        raise SystemExit(f"wsss_lib {args.command}: {error}")


if __name__ == "__main__":
    main()
