"""Command line, for work that outgrows a notebook:
`python -m wsss_lib {toyvoc, pretrain, train, localize, evaluate, predict, saliency, leaderboard, bench, students}`."""
from __future__ import annotations

import argparse

from . import commands, measuring, students


def main() -> None:
    """Parse the command line and run one command; bad input is reported in one line."""
    parser = argparse.ArgumentParser(prog="python -m wsss_lib", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True)

    p = subparsers.add_parser("toyvoc", help=commands.toyvoc.__doc__)
    p.add_argument("--root", required=True, help="folder to write the VOC tree to")
    p.add_argument("--train", type=int, default=6000, help="scenes for training")
    p.add_argument("--val", type=int, default=500, help="scenes for validation")
    p.add_argument("--single", type=int, default=16000, help="single-object pictures for pretraining")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--bias", type=float, default=.9,
                   help="how strongly contexts and classes go together, 0..1")
    p.add_argument("--processes", type=int, help="processes that draw (default: all cores)")
    p.add_argument("--results", help="write statistics and speed to this JSON file")
    p.set_defaults(run=commands.toyvoc)

    p = subparsers.add_parser("pretrain", help=commands.pretrain.__doc__)
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
    p.set_defaults(run=commands.pretrain)

    p = subparsers.add_parser("train", help=commands.train.__doc__)
    p.add_argument("--recipe", required=True, metavar="NAME", help="such as toyvoc/weaktr, see training/recipes.py")
    p.add_argument("--out", required=True, help="folder for checkpoint, log, weights and their record")
    p.add_argument("--root", help="the data (default: the cached ToyVOC tree, drawn if it is not there)")
    p.add_argument("--init", help="weights to start from (default: those that ship, or timm's)")
    p.add_argument("--masks", help="folder of pseudo labels, for a recipe that learns from one")
    p.add_argument("--saliency",
                   help="folder of saliency maps for getam, NAME.png in grey (default: each picture's contrast)")
    p.add_argument("--retrain", action="store_true",
                   help="after weaktr or acr: write pseudo labels and train a Segmenter on them, in OUT/segmenter")
    p.add_argument("--ship",
                   help="write the weights that differ from the backbone's file into its folder, as this file")
    p.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="other settings than the recipe's")
    p.add_argument("--published", action="store_true", help="with the slips of the published code")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cpu")
    p.add_argument("--workers", type=int, default=0)
    p.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True)
    p.set_defaults(run=commands.train)

    p = subparsers.add_parser("localize", help=commands.localize.__doc__)
    p.add_argument("--checkpoint", help="weights (default: the shipped ones)")
    p.add_argument("--root", help="VOC tree (default: the shipped ToyVOC)")
    p.add_argument("--split", default="train")
    p.add_argument("--backbone", default="toyvit", choices=["toyvit", "toycnn", "toymit"])
    p.add_argument("--method", default="cam", metavar="NAME", help="maps, see reports.MAPS")
    p.add_argument("--refine", default="none", choices=["none", "par", "pamr", "crf"])
    p.add_argument("--background", type=float, default=.4, help="threshold of the pseudo labels")
    p.add_argument("--scales", nargs="+", type=float, default=[1.0])
    p.add_argument("--flip", action="store_true")
    p.add_argument("--size", type=int, help="resize pictures to SIZE x SIZE for the network (default: as they are)")
    p.add_argument("--limit", type=int, help="the first so many pictures only")
    p.add_argument("--device", default="cpu")
    p.add_argument("--out", required=True, help="folder for the masks, NAME.png")
    p.set_defaults(run=commands.localize)

    p = subparsers.add_parser("evaluate", help=measuring.evaluate.__doc__)
    p.add_argument("--checkpoint", help="weights (default: the shipped ones)")
    p.add_argument("--root", help="ToyVOC tree (default: the shipped one)")
    p.add_argument("--split", default="val")
    p.add_argument("--backbone", default="toyvit", choices=["toyvit", "toycnn", "toymit"])
    p.add_argument("--methods", nargs="+", default=["cam"], metavar="NAME",
                   help="maps, see reports.MAPS, or segmentation")
    p.add_argument("--refine", nargs="+", default=["none"], choices=["none", "par", "pamr", "crf"],
                   help="score the maps as they are (none) and refined; masks of a network are refined by crf alone")
    p.add_argument("--limit", type=int, help="the first so many pictures only")
    p.add_argument("--scales", nargs="+", type=float, default=[1.0])
    p.add_argument("--flip", action="store_true")
    p.add_argument("--size", type=int, help="resize pictures to SIZE x SIZE for the network (default: as they are)")
    p.add_argument("--background", type=float, default=.4,
                   help="fixed threshold reported beside the best one")
    p.add_argument("--device", default="cpu")
    p.add_argument("--results", help="write the report to this JSON file")
    p.add_argument("--study", help="write a row with training record and scores into this JSON file")
    p.add_argument("--name", help="the row's name")
    p.set_defaults(run=measuring.evaluate)

    p = subparsers.add_parser("predict", help=commands.predict.__doc__)
    p.add_argument("--checkpoint", required=True,
                   help="model.safetensors that `train` wrote, of a network that segments")
    p.add_argument("--images", required=True, help="folder of pictures")
    p.add_argument("--out", required=True, help="folder for masks and overlays")
    p.add_argument("--side", type=int,
                   help="shorter side for the network, in pixels (default: the crops it learned from)")
    p.add_argument("--scales", nargs="+", type=float, default=[1.0])
    p.add_argument("--flip", action="store_true")
    p.add_argument("--device", default="cpu")
    p.set_defaults(run=commands.predict)

    p = subparsers.add_parser("saliency", help=measuring.saliency.__doc__)
    p.add_argument("--root", help="VOC tree with masks (default: the shipped ToyVOC)")
    p.add_argument("--split", default="val")
    p.add_argument("--folder", help="your maps, NAME.png in grey (default: the contrast of each picture)")
    p.add_argument("--limit", type=int, help="the first so many pictures only")
    p.add_argument("--results", help="write the report to this JSON file")
    p.set_defaults(run=measuring.saliency)

    p = subparsers.add_parser("leaderboard", help=measuring.leaderboard.__doc__)
    p.add_argument("--root", help="ToyVOC tree (default: the cached one, drawn if it is not there)")
    p.add_argument("--runs", default="runs/leaderboard", help="folder of the trained networks")
    p.add_argument("--out", default="data/results/leaderboard", help="folder of the scores, a JSON file a row")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--networks", nargs="+", metavar="NAME", help="some of leaderboard.ENTRIES (default: all)")
    p.add_argument("--limit", type=int, default=300, help="pictures of val that are scored")
    p.add_argument("--picture", metavar="PNG", help="also draw a few results of the first seed's classifier")
    p.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings for every recipe")
    p.add_argument("--device", default="cpu")
    p.set_defaults(run=measuring.leaderboard)

    p = subparsers.add_parser("bench", help=measuring.bench.__doc__)
    p.add_argument("--kernel", nargs="+", metavar="NAME", help="only these (default: all)")
    p.add_argument("--size", default="small", choices=["tiny", "small", "paper"],
                   help="tiny: does it run; small: two minutes on a laptop; paper: the papers' sizes, half an hour")
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--results", help="write all of it to this JSON file")
    p.set_defaults(run=measuring.bench)

    p = subparsers.add_parser("students", help=students.students.__doc__)
    p.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="notebooks (default: all of the course)")
    p.add_argument("--out", required=True, help="folder to write to; a file that is there already is never replaced")
    p.add_argument("--slides", action="store_true", help="also slides of the notebooks that choose some, as HTML")
    p.set_defaults(run=students.students)

    args = parser.parse_args()
    try:
        args.run(args)
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"wsss_lib {args.command}: {error}")


if __name__ == "__main__":
    main()
