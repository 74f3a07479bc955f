"""The comparison of all methods as tables and a picture, from the rows that `leaderboard` wrote."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from . import viz
from .data.sample import read_mask
from .data.toyvoc import draw_sample
from .data.voc import VOC_CLASSES
from .leaderboard import ENTRIES, MASKS

# What the names of networks and maps say to a reader.
NETWORK_TITLES = {
    "classifier": "CAM", "getam": "GETAM end to end", "weaktr": "WeakTr", "afa": "AFA on toyvit", "afa_toymit": "AFA",
    "acr_without": "ACR, no consistency", "acr_region": "ACR, region", "acr_affinity": "ACR, affinity",
    "acr": "ACR, both",
}
MAP_TITLES = {
    "cam": "CAM", "grad_cam_last_block": "Grad-CAM, last block", "attention": "class attention",
    "rollout": "attention rollout", "getam": "GETAM (A G G)", "getam_grad": "GETAM, G", "getam_grad_s": "GETAM, G G",
    "getam_cam_grad": "GETAM, A G", "weaktr_coarse": "coarse map", "weaktr_class_attention": "class attention x coarse",
    "weaktr_mean": "fine, mean of heads", "weaktr": "fine, adaptive fusion", "afa_cam": "CAM", "affinity": "random walk",
    "acr_gradient": "gradient maps", "acr": "gradient maps x affinity", MASKS: "its masks",
}


def title(network: str, maps: str) -> str:
    """A row's name for readers, such as "ACR, both: gradient maps"; a Segmenter is named by whose labels it had."""
    if maps == MASKS and ENTRIES[network].retrained:
        return f"Segmenter, {NETWORK_TITLES[network]}'s labels"
    return MAP_TITLES[maps] if network == "classifier" else f"{NETWORK_TITLES[network]}: {MAP_TITLES[maps]}"


def table(rows: list[dict]) -> list[dict]:
    """One entry for each network and kind of maps, over its seeds: mean and range of every score, in percent.

    Entries: network, maps, seeds, and `scores`: name -> (mean, lowest, highest), such as "raw best", "raw fixed",
    "par best", "crf fixed", "masks", "masks crf", "pseudo labels", "head", "body", "background", "seconds", "megabytes".
    """
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["network"], row["maps"]), []).append(row)
    return [
        {"network": network, "maps": maps, "seeds": sorted(r["seed"] for r in group),
         "scores": {name: _spread([_numbers(r)[name] for r in group]) for name in _numbers(group[0])}}
        for (network, maps), group in groups.items()
    ]


def _numbers(row: dict) -> dict[str, float]:
    found = {"seconds": row["seconds_per_picture"], "megabytes": row["bytes_per_picture"] / 1e6}
    for kind, r in row["scores"].items():
        if "best" in r:
            found |= {f"{kind} best": 100 * r["best"]["miou"], f"{kind} fixed": 100 * r["fixed"]["miou"]}
        else:
            found["masks" if kind == "raw" else f"masks {kind}"] = 100 * r["miou"]
    if "pseudo_labels" in row:
        found["pseudo labels"] = 100 * row["pseudo_labels"]["miou"]
    raw = row["scores"]["raw"]
    if "coverage" in raw:
        found |= {part: 100 * share for part, share in raw["coverage"].items() if share is not None}
        found["background"] = 100 * raw["background_called_foreground"]
    return found


def _spread(values: list[float]) -> tuple[float, float, float]:
    return statistics.mean(values), min(values), max(values)


def read_rows(folder: str | Path) -> list[dict]:
    """All rows of a folder of scores, in the order of ENTRIES, then of seeds."""
    order = [(name, maps) for name, entry in ENTRIES.items() for maps in (*entry.maps, MASKS)]
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in Path(folder).glob("*.json")]
    return sorted(rows, key=lambda r: (order.index((r["network"], r["maps"])), r["seed"]))


def lines(entries: list[dict]) -> list[str]:
    """The table as aligned text: best threshold, and the fixed one in brackets; masks have none."""
    out = [f"{'':41} {'raw':>13} {'PAR':>13} {'CRF':>13}  head/body  seconds"]
    for entry in entries:
        s = {name: value[0] for name, value in entry["scores"].items()}
        if "masks" in s:
            cells = [f"{s['masks']:.1f}", "", f"{s['masks crf']:.1f}"]
        else:
            cells = [f"{s[f'{kind} best']:.1f} ({s[f'{kind} fixed']:.1f})" for kind in ("raw", "par", "crf")]
        covered = f"{s['head']:.0f}/{s['body']:.0f}" if "head" in s and "body" in s else ""
        out.append(f"{title(entry['network'], entry['maps']):41} " + " ".join(f"{c:>13}" for c in cells)
                   + f"  {covered:>9}  {s['seconds']:.3f}")
    return out


def read_strips(file: str | Path) -> list[list[np.ndarray]]:
    """The masks that `leaderboard.write_strips` kept beside a row: uint8 (H, H) of each picture, of maps as they are
    and by PAR, of a network that segments in one list alone."""
    pixels = read_mask(file).numpy()  # (lines H, pictures H)
    count = 1 if f".{MASKS}." in Path(file).name else 2
    return [np.split(line, count * pixels.shape[1] // len(pixels), axis=1) for line in np.split(pixels, count)]


def result_picture(folder: str | Path, pictures: Sequence[int] = (0, 3, 6), seed: int = 0) -> Figure:
    """What the course is about, in one figure: words and picture, CAM, CAM refined by PAR, a Segmenter's mask, truth.

    folder: of the scores, whose strips are shown; pictures: places in them. The pictures are drawn again, as the
    tree was: ToyVOC, seed 0, val. FileNotFoundError where the classifier or its Segmenter has no strip.
    """
    raw, par = read_strips(Path(folder, f"classifier.cam.{seed}.png"))
    masks, = read_strips(Path(folder, f"classifier.{MASKS}.{seed}.png"))
    rows, words = [], []
    for i in pictures:
        sample = draw_sample(0, "val", i)
        rows.append([sample.image, *(viz.overlay_mask(sample.image, mask) for mask in (
            raw[i], par[i], masks[i], sample.mask))])
        words.append("\n".join(VOC_CLASSES[c - 1] for c in np.setdiff1d(sample.mask, (0, 255))))
    titles = ["all that is told: words", "CAM", "CAM, refined by PAR", "learned from these:\nneeds no words", "truth"]
    return viz.show_grid(rows, titles, words, width=9)
