"""Explorers for notebooks: sliders that redraw a picture, and the functions that draw it.

An explorer is the last expression of a cell. It takes batches, as `localize` does, has a slider for the picture where
there are several, and relies on what ipywidgets 7.7 (Colab) and 8 share. All controls are sliders: JupyterLab takes the
arrow keys away from menus. What it draws with, `show_...`, is public too: of one picture, without the batch dimension,
a Figure whose label, `figure.get_label()`, says in words what is seen. The explorer writes them beneath the picture.
"""
from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from html import escape
from inspect import signature

import matplotlib.pyplot as plt
import torch
from ipywidgets import HTML, FloatSlider, HBox, IntSlider, Layout, SelectionSlider, VBox
from matplotlib import patheffects
from matplotlib.figure import Figure
from torch import Tensor, nn

from . import viz
from .data.views import VIEWS, permutation, transform
from .data.voc import VOC_CLASSES
from .kernels import refine_cam
from .localization import METHODS, localize, normalize_maps
from .localization.cam import eval_mode
from .models.attention import AttentionTape, fused_attention
from .models.vit import token_grid
from .refinement.pseudo_labels import PAR_GAIN, pseudo_labels, scored_maps
from .viz import ArrayLike


def threshold_explorer(model: nn.Module, images: Tensor, labels: Tensor, masks: Sequence[ArrayLike] | None = None,
                       method: str = "getam", threshold: float = 0.4, start_layer: int | None = None,
                       power: float = 1.0, class_names: Sequence[str] = VOC_CLASSES, **kw) -> VBox:
    """Sliders for the threshold and, of methods that have one, the start layer: map -> pseudo label (`show_threshold`).

    images (B, 3, H, W), normalised; labels (B, C) multi-hot; masks: the truths, (H, W) each. method, kw: as of
    `localize`; start_layer: where its slider begins, None at half of the depth. power: what raw maps are raised to, one
    over the number of factors in them (1/3 for GETAM's "cam_grad_s"). Maps are made once for each picture and start
    layer. At once, ValueError as `localize` and `show_threshold`, TypeError for what is no argument of the method.
    """
    photos, device = viz.denormalize(images, **model.data_config), next(model.parameters()).device

    @cache
    def maps(i: int, **start: int) -> Tensor:
        return localize(model, images[[i]].to(device), labels[[i]], method, **start, **kw)[0].cpu().pow(power)

    def draw(picture: int, threshold: float, **start: int) -> Figure:
        mask = None if masks is None else masks[picture]
        return show_threshold(photos[picture], maps(picture, **start), labels[picture], threshold, mask, class_names)

    layers = {}
    if method in METHODS and "start_layer" in signature(METHODS[method]).parameters:
        depth = len(model.backbone.blocks)
        layers["start_layer"] = IntSlider(depth // 2 if start_layer is None else start_layer, 0, depth - 1)
    return explorer(draw, len(images), threshold=FloatSlider(threshold, min=0, max=1, step=0.05), **layers)


def show_threshold(photo: ArrayLike, maps: Tensor, labels: Tensor, threshold: float = 0.4,
                   mask: ArrayLike | None = None, class_names: Sequence[str] = VOC_CLASSES) -> Figure:
    """The picture, the truth if given, the maps of its classes (three at most), and the pseudo label.

    photo uint8 (H, W, 3); maps (C, h, w), raw and >= 0; labels (C,) multi-hot; threshold: `background` of
    `pseudo_labels`; mask (H, W): the truth. ValueError as `pseudo_labels` and `viz.show_maps`.
    """
    label = pseudo_labels(maps[None], labels[None], background=threshold, size=photo.shape[:2])
    truth, heat = None if mask is None else [mask], normalize_maps(maps[None])
    figure = viz.show_maps([photo], truth, heat, labels[None], label, class_names)
    figure.axes[-1].set_title(f"label, threshold {threshold:.2f}", fontsize=10)
    figure.set_label(_shares(label[0].cpu(), mask, class_names))
    return figure


def par_slider(images: Sequence[Tensor], maps: Sequence[Tensor], labels: Tensor,
               masks: Sequence[ArrayLike] | None = None, num_iter: int = 10, threshold: float = 0.4,
               variant: str = "par", most: int = 60, class_names: Sequence[str] = VOC_CLASSES) -> VBox:
    """Sliders for the iterations of PAR or PAMR, 0 to `most`, and the threshold: before and after (`show_par`).

    images (B, 3, H, W) of 0..255, or a list of any sizes; maps (B, C, h, w), raw: `localize`'s, or what a random walk
    made of them; labels (B, C) multi-hot; masks: the truths, (H, W) each. The variant has one too; errors: `show_par`.
    """
    def draw(picture: int, iterations: int, threshold: float, variant: str) -> Figure:
        photo = torch.as_tensor(images[picture]).permute(1, 2, 0).round().byte().numpy()  # (3, H, W) -> (H, W, 3)
        mask = None if masks is None else masks[picture]
        return show_par(photo, maps[picture], labels[picture], iterations, threshold, variant, mask, class_names)

    return explorer(draw, len(images), iterations=IntSlider(num_iter, 0, most),
                    threshold=FloatSlider(threshold, min=0, max=1, step=0.05),
                    variant=SelectionSlider(options=["par", "pamr"], value=variant))


def show_par(photo: ArrayLike, maps: Tensor, labels: Tensor, num_iter: int = 10, threshold: float = 0.4,
             variant: str = "par", mask: ArrayLike | None = None, class_names: Sequence[str] = VOC_CLASSES) -> Figure:
    """The strongest map and its label, before and after num_iter iterations of `refine_cam`; the truth if given.

    Other arguments as of `show_threshold`. PAR's growth is divided out: ten iterations give the label of
    `pseudo_labels(..., refine=variant)`. ValueError as `scored_maps` and `refine_cam`.
    """
    pixels = torch.as_tensor(photo).permute(2, 0, 1)[None].float()  # (H, W, 3) -> (1, 3, H, W)
    present = labels.nonzero()[:, 0].cpu()
    before = scored_maps(maps[None].cpu(), labels[None].cpu(), images=pixels)[:, present]  # (1, K, H, W)
    after = refine_cam(pixels, before, num_iter=num_iter, variant=variant)
    after = (after / (PAR_GAIN**num_iter if variant == "par" else 1)).clamp(0, 1)
    row, regions, words = [photo], [], []
    for values in (before[0], after[0]):
        best, winner = values.max(dim=0)  # (K, H, W) -> (H, W)
        regions.append(torch.where(best > threshold, present[winner] + 1, 0))
        row += [viz.overlay_map(photo, best), viz.overlay_mask(photo, regions[-1])]
        words.append(_shares(regions[-1], mask, class_names))
    if mask is not None:
        regions, row = [*regions, mask], [*row, viz.overlay_mask(photo, mask)]
    times = f"{num_iter} x {variant.upper()}"
    titles = ["picture", "map", f"label, threshold {threshold:.2f}", f"map, {times}", f"label, {times}", "truth"]
    figure = viz.show_grid([row], titles[: len(row)])
    for column, label in zip((2, 4, 5), regions):
        viz.name_regions(figure.axes[column], label, class_names)
    figure.set_label(f"before: {words[0]}; after: {words[1]}")
    return figure


def head_picker(model: nn.Module, images: Tensor, masks: Sequence[ArrayLike] | None = None, block: int = 0,
                head: int | None = None, class_names: Sequence[str] = VOC_CLASSES) -> VBox:
    """Controls for the block, the head and the token that asks: what it attends to (`show_head`).

    images (B, 3, H, W), normalised; masks: the truths, (H, W) each. head None: the mean over heads. The class token
    asks, that of a class where each has its own (WeakTr), or a patch, by row and column. ValueError as `attention_row`.
    """
    tokens = model.backbone.cls_token.shape[1]
    askers = ["class token"] if tokens == 1 else [class_names[c] for c in range(tokens)]
    patch = _patch_sliders(model, images)

    def draw(picture: int, block: int, head: int | str, asks: str, row: int, column: int) -> Figure:
        for slider in patch.values():
            slider.disabled = asks != "patch"
        asker = (row, column) if asks == "patch" else askers.index(asks)
        mask = None if masks is None else masks[picture]
        return show_head(model, images[picture], block, None if head == "mean" else head, asker, mask)

    heads = ["mean", *range(model.backbone.blocks[0].attn.num_heads)]
    return explorer(draw, len(images), block=IntSlider(block, 0, len(model.backbone.blocks) - 1),
                    head=SelectionSlider(options=heads, value="mean" if head is None else head),
                    asks=SelectionSlider(options=[*askers, "patch"]), **patch)


def show_head(model: nn.Module, image: Tensor, block: int = 0, head: int | None = None,
              asker: int | tuple[int, int] = 0, mask: ArrayLike | None = None) -> Figure:
    """The picture, with the patch that asks, what it attends to, and the truth if given, (H, W).

    Other arguments and errors of `attention_row`. The brightest 5% are drawn alike, or one patch would hide the rest.
    """
    answer = attention_row(model, image, block, head, asker)  # (h, w)
    photo, high = viz.denormalize(image[None], **model.data_config)[0], answer.quantile(0.95).clamp(min=1e-12)
    row = [photo, viz.overlay_map(photo, (answer / high).clamp(max=1))]
    words = f"{answer.sum():.1%} of the attention is on patches, on one of them {answer.max():.1%}"
    if mask is not None:
        row, objects = [*row, viz.overlay_mask(photo, mask)], torch.as_tensor((mask > 0) & (mask < 255)).float()
        share = nn.functional.adaptive_avg_pool2d(objects[None], answer.shape)[0]  # (1, H, W) -> (h, w)
        found = (share * answer).sum() / answer.sum()
        words += f"; objects, {objects.mean():.1%} of the picture, get {found:.1%} of that"
    titles = ["picture", f"block {block}, {'mean of heads' if head is None else f'head {head}'}", "truth"]
    figure = viz.show_grid([row], titles[: len(row)], width=3.3 * len(row))
    if not isinstance(asker, int):
        _mark(figure.axes[0], asker, model.patch_stride)
    figure.set_label(words)
    return figure


def two_view_explorer(model: nn.Module | Mapping[str, nn.Module], images: Tensor, block: int = 0,
                      head: int | None = None, view: str = "hflip") -> VBox:
    """Sliders for a patch: what it attends to in the picture and in its mirror image, and the difference.

    model: a network, or several by name, such as without and with consistency, each with a row of its own. images
    (B, 3, H, W), normalised. head None: the mean over heads. Block and view, one of `data.views.VIEWS`, have sliders
    too. ValueError as `show_two_views`.
    """
    first = next(iter(model.values())) if isinstance(model, Mapping) else model

    def draw(picture: int, row: int, column: int, block: int, view: str) -> Figure:
        return show_two_views(model, images[picture], (row, column), block, head, view)

    blocks = IntSlider(block, 0, len(first.backbone.blocks) - 1)
    return explorer(draw, len(images), **_patch_sliders(first, images), block=blocks,
                    view=SelectionSlider(options=list(VIEWS), value=view))


def show_two_views(model: nn.Module | Mapping[str, nn.Module], image: Tensor, patch: tuple[int, int], block: int = 0,
                   head: int | None = None, view: str = "hflip") -> Figure:
    """What a patch attends to: in the picture, in a view of it, in the view put back, and how the two differ.

    model: as of `two_view_explorer`; image (3, H, W), normalised; patch: its row and column in the picture. The heat of
    a row has one scale. Half the sum of the difference is the share of attention that moved: 0 where the views agree,
    1 where they have nothing in common. ValueError as `attention_row` and `data.views.transform`.
    """
    models = model if isinstance(model, Mapping) else {"": model}
    turned, rows, words = transform(image, view), [], []
    for name, network in models.items():
        there = attention_row(network, image, block, head, patch)  # (h, w)
        order, width = permutation(view, there.shape).view_as(there), transform(there, view).shape[1]
        other = attention_row(network, turned, block, head, divmod(int(order[patch]), width))
        back = other.flatten()[order]  # what each patch of the picture gets where it lies in the view: (h, w)
        difference, high = (there - back).abs(), torch.maximum(there.max(), back.max())
        photo, shown = (viz.denormalize(x[None], **network.data_config)[0] for x in (image, turned))
        answers = ((photo, there), (shown, other), (photo, back), (photo, difference))
        rows.append([photo, *(viz.overlay_map(under, heat / high) for under, heat in answers)])
        words.append(f"{name}{': ' if name else ''}{difference.sum() / 2:.1%} of the attention moved")
    titles = ["a patch asks", "the picture answers", f"the view ({view})", "the view, put back", "difference"]
    figure = viz.show_grid(rows, titles, list(models))
    for number, network in enumerate(models.values()):
        _mark(figure.axes[number * len(titles)], patch, network.patch_stride)
    figure.set_label("; ".join(words))
    return figure


@torch.no_grad()
def attention_row(model: nn.Module, image: Tensor, block: int = 0, head: int | None = None,
                  asker: int | tuple[int, int] = 0) -> Tensor:
    """What one token attends to among the patches, (h, w), on the CPU: sums to 1 less what the prefix tokens get.

    model: a `Network` on a plain ViT; image (3, H, W), normalised. head None: the mean over heads. asker: row and
    column of a patch, or the number of a class token. ValueError for a block, head or token that is not there, and
    attention that is not to all tokens, such as a Mix Transformer's.
    """
    image, prefix = image[None].to(next(model.parameters()).device), model.num_prefix_tokens
    height, width = token_grid(model.backbone, image)
    with eval_mode(model), fused_attention(model), AttentionTape(detach=True) as tape:
        model(image)
    (_, heads, found, _), expected = tape.blocks[0].k.shape, prefix + height * width
    if found != expected:
        raise ValueError(f"model: found attention to {found} tokens, expected {expected}: a plain ViT's")
    bounds = {"block": (block, len(tape.blocks)), "head": (head or 0, heads)}
    if isinstance(asker, int):
        token, bounds["class token"] = asker, (asker, prefix)
    else:
        token = prefix + asker[0] * width + asker[1]
        bounds |= {"row": (asker[0], height), "column": (asker[1], width)}
    for name, (value, count) in bounds.items():
        if not 0 <= value < count:
            raise ValueError(f"{name}: found {value}, expected 0..{count - 1}")
    rows = tape.blocks[block].row(token)[0, :, prefix:]  # (1, H, N) -> (H, h*w)
    return (rows.mean(dim=0) if head is None else rows[head]).unflatten(0, (height, width)).cpu()


def explorer(draw: Callable[..., Figure], count: int, **controls: IntSlider | FloatSlider | SelectionSlider) -> VBox:
    """Controls of your own, and one for `count` pictures: `draw(picture=0, name=value, ...)` gives a Figure."""
    controls, output = {"picture": IntSlider(0, 0, count - 1), **controls}, HTML()
    shown = [c for c in controls.values() if isinstance(c, SelectionSlider) or c.min < c.max]  # not for one picture
    for name, control in controls.items():
        control.description = control.tooltip = name.replace("_", " ")  # version 8 shows "null" where there is none
        control.style.description_width, control.continuous_update = "initial", False  # draw when it is let go

    def update(_: object = None) -> None:
        try:
            figure = draw(**{name: control.value for name, control in controls.items()})
        except ValueError as error:
            output.value = f'<p role="alert">{escape(str(error))}</p>'
            raise  # the first one to who calls; of a callback it would go unseen but for the line above
        values = [f"{c.value:.2f}" if isinstance(c, FloatSlider) else c.value for c in shown]
        chosen = ", ".join(f"{c.description} {value}" for c, value in zip(shown, values) if not c.disabled)
        output.value = _html(figure, f"{chosen}: {figure.get_label()}.")

    update()
    for control in shown:
        control.observe(update, "value")
    return VBox([HBox(shown, layout=Layout(flex_flow="row wrap")), output])


def _html(figure: Figure, words: str) -> str:
    """The figure, closed, for an HTML widget (an Image has no alternative text): its titles are that text."""
    png, titles = io.BytesIO(), ", ".join(filter(None, (ax.get_title() for ax in figure.axes)))
    figure.savefig(png, format="png")
    plt.close(figure)  # else the notebook would show it once more
    width, height = figure.canvas.get_width_height()
    return (f'<figure style="margin: 0"><img alt="{escape(titles)}" width="{width}" height="{height}" '
            f'style="max-width: 100%; height: auto" src="data:image/png;base64,{b64encode(png.getvalue()).decode()}">'
            f'<figcaption><span role="status">{escape(words)}</span></figcaption></figure>')


def _patch_sliders(model: nn.Module, images: Tensor) -> dict[str, IntSlider]:
    return {name: IntSlider(n // 2, 0, n - 1) for name, n in zip(("row", "column"), token_grid(model.backbone, images))}


def _mark(ax: plt.Axes, patch: tuple[int, int], stride: int) -> None:
    """A frame round a patch (row, column) of `stride` pixels, to be seen on bright and on dark."""
    corner = (patch[1] * stride - 0.5, patch[0] * stride - 0.5)
    frame = ax.add_patch(plt.Rectangle(corner, stride, stride, fill=False, edgecolor="white", linewidth=2))
    frame.set_path_effects([patheffects.withStroke(linewidth=4, foreground="black")])


def _shares(label: Tensor, mask: ArrayLike | None, class_names: Sequence[str]) -> str:
    """What share of the pixels each class of a label (H, W) has; how many of those that a truth knows are right."""
    ids, counts = label.unique(return_counts=True)
    words = [f"{viz.class_name(int(i), class_names)} {n / label.numel():.1%}" for i, n in zip(ids, counts)]
    if mask is not None:
        words.append(f"{(label == torch.as_tensor(mask))[torch.as_tensor(mask) != 255].float().mean():.1%} right")
    return ", ".join(words)
