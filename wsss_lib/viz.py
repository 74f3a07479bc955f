"""Pictures: maps over images, masks in class colours, curves and bars. Every function returns the Figure.

Readable without colour vision: maps use a scale whose brightness rises with the value, curves differ in
marker as well as colour (Okabe and Ito, https://jfly.uni-koeln.de/color/), and regions carry an outline and a
name, because VOC's palette has many colours that look alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.nn import functional as F

from wsss_lib.data.voc import VOC_CLASSES, voc_palette

HEAT = "inferno"
LINE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
MARKERS = "osD^vPX"
ArrayLike = Any  # a tensor or whatever numpy turns into an array


def _array(value: ArrayLike) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _picture(image: ArrayLike) -> np.ndarray:
    image = _array(image)
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image: found {image.dtype} {image.shape}, expected uint8 (H, W, 3) (denormalize)")
    return image


def _mask(mask: ArrayLike) -> np.ndarray:
    mask = _array(mask)
    if mask.ndim != 2 or mask.dtype.kind not in "iub" or mask.min() < 0 or mask.max() > 255:
        raise ValueError(f"mask: found {mask.dtype} {mask.shape}, expected whole numbers 0..255, (H, W)")
    return mask.astype(np.int64)


def class_name(class_id: int, class_names: Sequence[str] = VOC_CLASSES) -> str:
    """Name of a class id: 0 background, 255 ignored, 1..C as in `class_names`. ValueError for other ids."""
    if class_id in (0, 255):
        return "background" if class_id == 0 else "ignored"
    if not 0 < class_id <= len(class_names):
        raise ValueError(f"class id: found {class_id}, expected 0..{len(class_names)} or 255")
    return class_names[class_id - 1]


def denormalize(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised images (B, 3, H, W) -> uint8 (B, H, W, 3): x * std + mean, rounded and clipped to 0..255."""
    images = torch.as_tensor(images).detach().cpu().float()
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: found shape {tuple(images.shape)}, expected (B, 3, H, W)")
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (mean, std))
    pixels = ((images * std + mean) * 255).round().clamp(0, 255).byte()
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()  # (B, 3, H, W) -> (B, H, W, 3)


def color_mask(mask: ArrayLike) -> np.ndarray:
    """Mask (H, W) of 0..255 -> uint8 (H, W, 3) in VOC's colours. ValueError for another shape or type."""
    return voc_palette()[_mask(mask)]


def overlay_map(image: ArrayLike, map: ArrayLike, alpha: float = 0.7, cmap: str = HEAT) -> np.ndarray:
    """A map in [0, 1] of any size (h, w), as heat over the image uint8 (H, W, 3) -> uint8 (H, W, 3).

    The opacity is alpha times the map, upsampled bilinearly: where the map is 0 the picture stays as it is.
    ValueError for another image, a map that is not 2-D, or values outside [0, 1].
    """
    image, values = _picture(image), torch.as_tensor(map).detach().cpu().float()
    if values.ndim != 2 or not (values.min() >= 0 and values.max() <= 1 + 1e-5):
        found = f"{tuple(values.shape)} with values {values.min():.3g} to {values.max():.3g}"
        raise ValueError(f"map: found {found}, expected (h, w) normalised to [0, 1]")
    values = F.interpolate(values[None, None], image.shape[:2], mode="bilinear")[0, 0]  # (h, w) -> (H, W)
    values = values.clamp(0, 1).numpy()[..., None]
    # Under the heat the picture turns grey, or an orange bus and an orange map could not be told apart.
    grey = image @ np.array([0.299, 0.587, 0.114])
    base = image + np.minimum(1, 3 * values) * (grey[..., None] - image)
    heat = colormaps[cmap](values[..., 0])[..., :3] * 255
    return np.round(base + alpha * values * (heat - base)).astype(np.uint8)


def overlay_mask(image: ArrayLike, mask: ArrayLike, alpha: float = 0.55) -> np.ndarray:
    """Mask (H, W) in VOC's colours over the image uint8 (H, W, 3) -> uint8 (H, W, 3). Background leaves the
    picture untouched; ignored pixels (255) are white. ValueError for other types or unequal sizes."""
    image, mask = _picture(image), _mask(mask)
    if mask.shape != image.shape[:2]:
        raise ValueError(f"mask: found shape {mask.shape}, expected the image's, {image.shape[:2]}")
    opacity = np.where(mask == 0, 0.0, np.where(mask == 255, 1.0, alpha))[..., None]
    colors = np.where(mask[..., None] == 255, 255, color_mask(mask))
    return np.round((1 - opacity) * image + opacity * colors).astype(np.uint8)


def name_regions(ax: Axes, mask: ArrayLike, class_names: Sequence[str] = VOC_CLASSES) -> None:
    """Outline each class of a mask (H, W) on the axes that show it, and write its name on it."""
    mask = _mask(mask)
    height, width = mask.shape
    for class_id in np.setdiff1d(mask, (0, 255)).tolist():
        region, name = torch.from_numpy(mask == class_id), class_name(class_id, class_names)
        # How much of the class is near each pixel, on a coarse grid; the name goes to the pixel with most.
        coarse = F.avg_pool2d(F.adaptive_avg_pool2d(region[None, None].float(), 16), 5, 1, padding=2)
        near = F.interpolate(coarse, mask.shape, mode="bilinear")[0, 0] * region
        y, x = divmod(int(near.argmax()), width)
        half = 0.02 * len(name) * width  # about half the name's length in a six-column figure: stay inside
        text = ax.text(np.clip(x, half, width - half), np.clip(y, 0.06 * height, 0.94 * height), name,
                       color="white", fontsize=8, ha="center", va="center", clip_on=True)
        text.set_path_effects([patheffects.withStroke(linewidth=2, foreground="black")])
        if not region.all():
            ax.contour(region, levels=[0.5], colors="white", linewidths=0.7)


def show_grid(
    rows: Sequence[Sequence[ArrayLike | None]],
    titles: Sequence[Any] | None = None,
    row_titles: Sequence[str] | None = None,
    width: float = 10.0,
) -> Figure:
    """A grid of RGB arrays (H, W, 3), uint8 or 0..1; None leaves a cell blank, as do rows that are short.

    titles: one a column, or a list of lists, one a cell. row_titles: one a row, at the left. width: inches.
    The cell at (r, c) is `figure.axes[r * columns + c]`. ValueError for no picture or too many titles.
    """
    columns = max((len(row) for row in rows), default=0)
    if columns == 0:
        raise ValueError("rows: found no picture, expected at least one")
    cells = [[None if x is None else _array(x) for x in row] + [None] * (columns - len(row)) for row in rows]
    titles = [] if titles is None else list(titles)
    if titles and isinstance(titles[0], str):
        if len(titles) != columns:
            raise ValueError(f"titles: found {len(titles)}, expected one for each of {columns} columns")
        titles = [titles]
    if len(titles) > len(rows) or (row_titles is not None and len(row_titles) != len(rows)):
        raise ValueError(f"titles: found {len(titles)} rows, row_titles {row_titles}, expected {len(rows)}")
    # A row is as high as its tallest picture, so that nothing is squeezed; titles need a little more.
    heights = [max((x.shape[0] / x.shape[1] for x in row if x is not None), default=0.1) for row in cells]
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(width, sum(heights) * width / columns + 0.25 * max(len(titles), 1)),
        squeeze=False, layout="constrained", gridspec_kw={"height_ratios": heights},
    )
    for r, row in enumerate(cells):
        for c, cell in enumerate(row):
            ax = axes[r, c]
            ax.set(xticks=[], yticks=[], frame_on=False, anchor="N")  # N: the titles of a row on one line
            if cell is not None:
                ax.imshow(cell, interpolation="nearest")  # the picture's own pixels; also smaller files
            if r < len(titles) and c < len(titles[r]) and titles[r][c]:
                ax.set_title(titles[r][c], fontsize=10)
        if row_titles is not None:
            axes[r, 0].set_ylabel(row_titles[r], fontsize=10)
    return figure


def show_maps(
    images: Sequence[ArrayLike],
    masks: Sequence[ArrayLike] | None,
    maps: Sequence[ArrayLike],
    labels: ArrayLike,
    predictions: Sequence[ArrayLike] | None = None,
    class_names: Sequence[str] = VOC_CLASSES,
    max_classes: int = 3,
    width: float = 10.0,
) -> Figure:
    """One row a picture: the picture, the truth, the map of each class it is labelled with, the prediction.

    images (B, H, W, 3) uint8 (see `denormalize`), or a list of any sizes; masks, predictions (B, H, W) or
    None; maps (B, C, h, w) in [0, 1]; labels (B, C). At most max_classes maps a row, lowest ids first; the
    picture's title counts those left out. ValueError as in the overlays, or for unequal lengths.
    """
    labels = _array(labels)
    given = [x for x in (masks, predictions) if x is not None]
    if any(len(x) != len(images) for x in (maps, labels, *given)):
        found = [len(x) for x in (images, maps, labels, *given)]
        raise ValueError(f"images, maps, labels, masks: found {found}, expected as many of each")
    present = [np.flatnonzero(row > 0).tolist() for row in labels]
    most = min(max_classes, max(map(len, present)))
    rows, titles, named = [], [], []
    for i, image in enumerate(images):
        shown, left = present[i][:max_classes], len(present[i]) - max_classes
        cells = [("picture" if left <= 0 else f"picture (+{left} more)", _picture(image))]
        if masks is not None:
            named.append((i, len(cells), masks[i]))
            cells.append(("truth", overlay_mask(image, masks[i])))
        cells += [(f"map: {class_name(c + 1, class_names)}", overlay_map(image, maps[i][c])) for c in shown]
        cells += [("", None)] * (most - len(shown))
        if predictions is not None:
            named.append((i, len(cells), predictions[i]))
            cells.append(("prediction", overlay_mask(image, predictions[i])))
        titles.append([title for title, _ in cells])
        rows.append([cell for _, cell in cells])
    figure = show_grid(rows, titles, width=width)
    for r, c, mask in named:
        name_regions(figure.axes[r * len(rows[0]) + c], mask, class_names)
    return figure


def palette_legend(
    class_ids: Sequence[int], class_names: Sequence[str] = VOC_CLASSES, width: float = 10.0
) -> Figure:
    """Swatches of VOC's colours with the classes' names beside them. ValueError for an unknown id."""
    columns, lines = 6, max(1, -(-len(class_ids) // 6))
    figure, ax = plt.subplots(figsize=(width, 0.3 * lines + 0.1), layout="constrained")
    ax.set(xlim=(0, columns), ylim=(lines, 0))
    ax.set_axis_off()
    for i, class_id in enumerate(class_ids):
        row, column = divmod(i, columns)
        color = voc_palette()[class_id] / 255
        ax.add_patch(plt.Rectangle((column + 0.02, row + 0.15), 0.16, 0.7, facecolor=color, edgecolor="0.4"))
        ax.text(column + 0.22, row + 0.5, class_name(class_id, class_names), va="center", fontsize=10)
    return figure


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    return ax if ax is not None else plt.subplots(figsize=size, layout="constrained")[1]


def threshold_curve(
    thresholds: ArrayLike,
    miou: ArrayLike,
    fixed: float | None = None,
    ax: Axes | None = None,
    label: str = "mIoU",
) -> Figure:
    """mIoU (0..1, drawn in %) against the background threshold, both (K,). The best point is annotated, a
    fixed threshold, chosen without the truth, is hollow. For more curves call again with the same `ax`."""
    thresholds, percent = _array(thresholds), 100 * _array(miou)
    if thresholds.ndim != 1 or thresholds.shape != percent.shape:
        raise ValueError(f"found {thresholds.shape} thresholds, {percent.shape} mIoU, expected one (K,)")
    ax = _axes(ax, (8, 4))
    index = len(ax.get_legend_handles_labels()[0])  # the curves so far
    style = {"color": LINE_COLORS[index % 7], "marker": MARKERS[index % 7]}
    best = int(np.nanargmax(percent))
    label = f"{label}: best {percent[best]:.1f} at {thresholds[best]:.2f} (oracle)"
    if fixed is not None:
        at_fixed = float(np.interp(fixed, thresholds, percent))
        label += f", {at_fixed:.1f} at fixed {fixed:.2f}"
        ax.plot(fixed, at_fixed, markerfacecolor="white", markersize=8, linestyle="", zorder=3, **style)
        ax.axvline(fixed, color="0.6", linewidth=1, linestyle=":", zorder=1)
    ax.plot(thresholds, percent, label=label, markevery=[best], markersize=8, linewidth=2, **style)
    number = ax.annotate(f"{percent[best]:.1f}", (thresholds[best], percent[best]), (0, 8), ha="center",
                         textcoords="offset points", fontsize=10, color=style["color"], fontweight="bold")
    number.set_path_effects([patheffects.withStroke(linewidth=3, foreground="white")])
    top = max(ax.get_ylim()[1] if index else 0, 1.15 * percent[best], 1)
    ax.set(xlabel="background threshold", ylabel="mIoU (%)", xlim=(0, 1), ylim=(0, top))
    ax.grid(color="0.9")
    ax.legend(fontsize=9)
    return ax.figure


def bars(
    values: Mapping[str, float], xlabel: str = "%", title: str = "", ax: Axes | None = None
) -> Figure:
    """Horizontal bars of shares (0..1), in % with the number written on; nan reads "no pixel". ValueError for
    no bar at all."""
    if not values:
        raise ValueError("values: found none, expected at least one bar")
    ax = _axes(ax, (7, 0.36 * len(values) + 0.9))
    percent = [100 * float(v) for v in values.values()]
    ax.barh(range(len(values)), np.nan_to_num(percent), color=LINE_COLORS[0], height=0.7)
    for row, value in enumerate(percent):
        text, place = ("no pixel", 0) if np.isnan(value) else (f"{value:.1f}", value)
        ax.annotate(text, (place, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=10)
    ax.set(yticks=range(len(values)), yticklabels=list(values), xlabel=xlabel, title=title)
    ax.set_xlim(0, 112 if np.nanmax([50, *percent]) > 50 else 1.15 * max(np.nanmax([0, *percent]), 1))
    ax.set_ylim(len(values) - 0.4, -0.6)  # the first bar on top, no wide margins
    ax.spines[["top", "right"]].set_visible(False)
    return ax.figure


def heat_table(
    matrix: ArrayLike, rows: Sequence[str], columns: Sequence[str], title: str = "", ax: Axes | None = None
) -> Figure:
    """Shares (R, K) in 0..1 as a coloured table of numbers in %; nan is left blank. ValueError where the
    names do not fit the matrix."""
    matrix = 100 * np.asarray(_array(matrix), float)
    if matrix.shape != (len(rows), len(columns)):
        raise ValueError(f"matrix: found shape {matrix.shape}, expected {(len(rows), len(columns))} as named")
    ax = _axes(ax, (min(10, 1.8 + 0.75 * len(columns)), 0.26 * len(rows) + 0.9))
    high = max(np.nanmax([0, *matrix.flat]), 1)
    decimals = 0 if high >= 20 else 1
    ax.imshow(matrix, cmap="cividis", vmin=0, vmax=high, aspect="auto")
    for r, c in np.argwhere(~np.isnan(matrix)):
        ax.text(c, r, f"{matrix[r, c]:.{decimals}f}", ha="center", va="center", fontsize=9,
                color="black" if matrix[r, c] > 0.55 * high else "white")
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    ax.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    ax.set_title(title, pad=8)
    return ax.figure
