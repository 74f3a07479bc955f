"""The commands of `python -m wsss_lib` that measure: scores of maps and masks, saliency, the comparison, the kernels.

As in `commands`, heavy modules are imported where they are used.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .commands import (
    check_device,
    check_methods,
    default_tree,
    first_process,
    loss_of,
    open_data,
    trained_network,
)
from .paths import shipped

if TYPE_CHECKING:
    from torch import nn


def evaluate(args: argparse.Namespace) -> None:
    """Score a checkpoint's maps, or the masks of a network that segments, on a split with masks."""
    from .ledgers import add_row, study_row, write_results
    from .reports import MAPS
    from .training import distributed

    check_device(args.device)
    check_methods(args.methods, [*MAPS, "segmentation"])
    with distributed.processes(args.device) as device:
        model, record = trained_network(args.checkpoint, args.backbone, device)
        data = open_data(record, args.root, args.split, truth=True)
        result = _scores(model, data, record, args)
    if not first_process():
        return
    if args.results:
        write_results(args.results, result)
    if args.study:
        add_row(args.study, study_row(args.name, record, result))
    for name, r in result.items():
        print(f"{name}, {r['split']}, {r['pictures']} pictures, labels {r['labels']}: {_in_words(r)}")


def _scores(model: nn.Module, data, record: dict | None, args: argparse.Namespace) -> dict[str, dict]:
    """A report of each method and refinement: by the method's name, a refinement's after a plus."""
    from .reports import localize_split, map_options, report
    from .segmentation import segmentation_report

    options = {"scales": tuple(args.scales), "flip": args.flip, "limit": args.limit, "progress": first_process()}
    options |= {"size": args.size} if args.size else {}
    refinements = {r: None if r == "none" else r for r in args.refine}
    result = {}
    for method in args.methods:
        if method == "segmentation":  # of masks there is the CRF alone
            kinds = {r: kind for r, kind in refinements.items() if kind in (None, "crf")} or {"none": None}
            found = {r: segmentation_report(model, data, refine=kind, **options) for r, kind in kinds.items()}
        else:
            of_map = {"power": 1., **options, **map_options(method, loss_of(record))}
            split = localize_split(model, data, **of_map)
            given = {"background": args.background, "split": split, **of_map}
            found = {r: report(model, data, refine=kind, **given) for r, kind in refinements.items()}
        result |= {method if r == "none" else f"{method}+{r}": scores for r, scores in found.items()}
    return result


def _in_words(r: dict) -> str:
    if "best" not in r:
        return f"mIoU {100 * r['miou']:.1f}"
    phenomena = (f"; coverage {r['coverage']}; background called foreground {r['background_called_foreground']}"
                 if "coverage" in r else "")
    return (f"mAP {r['mean_average_precision']:.3f}, mIoU {100 * r['best']['miou']:.1f} at {r['best']['background']} "
            f"(oracle), {100 * r['fixed']['miou']:.1f} at {r['fixed']['background']}{phenomena}")


def saliency(args: argparse.Namespace) -> None:
    """Score saliency maps, the contrast of each picture or a folder of yours, against the foreground."""
    from .data.voc import VOC
    from .ledgers import write_results
    from .refinement.saliency import FolderSaliency, saliency_report

    data = VOC(args.root or shipped("toyvoc"), args.split, truth=["mask"])
    result = saliency_report(data, FolderSaliency(args.folder) if args.folder else "contrast", args.limit)
    if args.results:
        write_results(args.results, result)
    for name, r in result["methods"].items():
        print(f"{name}, {result['split']}, {result['pictures']} pictures: F {r['f']['f']:.3f} at "
              f"{r['f']['threshold']}, {r['max_f']['f']:.3f} at {r['max_f']['threshold']} (oracle), "
              f"mean absolute error {r['mae']:.3f}")


def leaderboard(args: argparse.Namespace) -> None:
    """Train and score all methods on one backbone and one data set."""
    from .leaderboard import ENTRIES, run
    from .leaderboard_table import lines, result_picture, table

    check_device(args.device)
    root, networks = args.root or default_tree("toyvoc"), args.networks or list(ENTRIES)
    rows = run(root, args.runs, args.out, args.seeds, networks, args.limit, args.device, args.set)
    print(*lines(table(rows)), sep="\n")
    if args.picture:
        result_picture(args.out, seed=args.seeds[0]).savefig(args.picture, dpi=80)


def bench(args: argparse.Namespace) -> None:
    """Time the kernels beside what the published code does."""
    import torch

    from .bench import BUDGET, run, table
    from .bench_cases import cases

    check_device(args.device)
    device = torch.device(args.device)
    result = {"size": args.size, **run(cases(args.kernel, args.size, device), device, BUDGET[args.size])}
    print(table(result))
    if args.results:
        from .ledgers import write_results

        write_results(args.results, result)
