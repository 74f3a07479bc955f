"""Explorers without a browser: what sliders change, what the words say, and what the drawings are made of.

tests/browser moves the same sliders by the keyboard in JupyterLab.
"""
import re
from base64 import b64decode
from io import BytesIO

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from wsss_lib import create_model, localize, pseudo_labels, viz, widgets
from wsss_lib.data import VOC
from wsss_lib.data.transforms import EvalTransform
from wsss_lib.data.views import VIEWS, transform
from wsss_lib.kernels import refine_cam
from wsss_lib.models.attention import AttentionTape, module_flags
from wsss_lib.paths import shipped

PICTURE = 10  # of val: a cow (class 10) and a motorbike (14)
GRID = (14, 14)


@pytest.fixture(scope="module")
def model():
    return create_model("cam", "toyvit").eval()


@pytest.fixture(scope="module")
def weaktr():
    weights = shipped("checkpoints/weaktr_toyvit.safetensors")
    return create_model("weaktr", "toyvit", pretrained=weights, reduction=2).eval()


@pytest.fixture(scope="module")
def batch(model):
    """Two shipped pictures: images normalised (2, 3, H, W), labels (2, C), pixels 0..255 and masks."""
    data, prepare = VOC(shipped("toyvoc"), "val", truth="mask"), EvalTransform(**model.data_config)
    samples = [data[PICTURE], data[22]]
    images, pixels = torch.stack([prepare(s)["image"] for s in samples]), torch.stack([s.image for s in samples])
    return images, torch.stack([s.labels for s in samples]), pixels, [s.mask for s in samples]


@pytest.fixture(autouse=True)
def _no_figure_stays_open():
    yield
    left = plt.get_fignums()
    plt.close("all")
    assert not left


def drawn(figure):
    """The panels' pixels, titles and words of a figure, which is closed."""
    plt.close(figure)
    panels = [np.asarray(ax.images[0].get_array()) for ax in figure.axes]
    return panels, [ax.get_title() for ax in figure.axes], figure.get_label()


def right(label, mask):
    """The share of pixels that are right, of those that the truth knows; the rims of objects are 255."""
    known = mask != 255
    assert 0 < known.float().mean() < 1
    return f"{(label == mask)[known].float().mean():.1%} right"


class Shown:
    """An explorer as it is shown: its controls by name, and its picture, alternative text and words as they are now."""

    def __init__(self, explorer):
        box, self.output = explorer.children
        self.controls = {control.description: control for control in box.children}

    def __getitem__(self, name):
        return self.controls[name]

    @property
    def png(self):
        return b64decode(re.search(r'src="data:image/png;base64,([^"]+)"', self.output.value)[1], validate=True)

    @property
    def alt(self):
        return re.search(r'<img alt="([^"]+)"', self.output.value)[1]

    @property
    def words(self):
        return re.search(r'<figcaption><span role="status">(.+)</span></figcaption>', self.output.value)[1]

    def move(self, name, value):
        """Set a control; its value must be in the words, and the picture must be another one."""
        before, control = self.png, self[name]
        control.value = value
        assert f"{name} {value:.2f}" in self.words if isinstance(value, float) else f"{name} {value}" in self.words
        assert self.png != before
        return self


def explorers(model, weaktr, batch):
    images, labels, pixels, masks = batch
    return {
        "threshold": lambda **kw: widgets.threshold_explorer(model, images, labels, masks, **kw),
        "par": lambda **kw: widgets.par_slider(pixels, localize(model, images, labels), labels, masks, **kw),
        "head": lambda **kw: widgets.head_picker(weaktr, images, masks, **kw),
        "views": lambda **kw: widgets.two_view_explorer({"one": model, "<two>": weaktr}, images, **kw),
    }


# ---- the explorers


@pytest.mark.parametrize("name", ["threshold", "par", "head", "views"])
def test_every_explorer_is_labelled_drawn_and_closed(name, model, weaktr, batch):
    explorer = explorers(model, weaktr, batch)[name]()
    shown = Shown(explorer)
    assert next(iter(shown.controls)) == "picture" and all(shown.controls)
    for control in shown.controls.values():
        assert control.description == control.tooltip and not control.continuous_update
        assert type(control).__name__ in ("IntSlider", "FloatSlider", "SelectionSlider"), "as ipywidgets 7.7 has them"
    picture = Image.open(BytesIO(shown.png))
    assert np.asarray(picture.convert("RGB")).std() > 20
    assert f'width="{picture.width}" height="{picture.height}"' in shown.output.value
    assert shown.words.startswith("picture 0, ") and shown.words.endswith(".") and "%" in shown.words
    assert shown.alt.startswith(("picture, ", "a patch asks, "))
    assert plt.get_fignums() == []
    alone = Shown(explorers(model, weaktr, [x[1:] for x in batch])[name]())
    assert shown.move("picture", 1).png == alone.png and shown.words == f"picture 1, {alone.words}"
    assert plt.get_fignums() == []


def test_one_picture_needs_no_slider(model, batch):
    images, labels, _, masks = batch
    shown = Shown(widgets.threshold_explorer(model, images[1:], labels[1:], masks[1:]))
    assert list(shown.controls) == ["threshold", "start layer"] and shown.words.startswith("threshold 0.40")


def test_threshold_explorer_makes_each_map_once(model, batch, monkeypatch):
    images, labels, _, masks = batch
    made = []

    def counted(model, images, labels, method, start_layer=None, **kw):
        made.append(start_layer)
        return localize(model, images, labels, method, start_layer=start_layer, **kw)

    monkeypatch.setattr(widgets, "localize", counted)
    shown = Shown(widgets.threshold_explorer(model, images, labels, masks, power=1 / 3, threshold=0.3, head="class"))
    assert list(shown.controls) == ["picture", "threshold", "start layer"]
    assert "threshold 0.30, start layer 3" in shown.words and "label, threshold 0.30" in shown.alt
    first = shown.png
    shown.move("threshold", 0.6).move("start layer", 0).move("threshold", 0.3).move("start layer", 3)
    assert shown.png == first and made == [3, 0]
    shown.move("picture", 1).move("picture", 0)
    assert shown.png == first and made == [3, 0, 3]
    maps = localize(model, images[:1], labels[:1], "getam", start_layer=3, head="class").pow(1 / 3)
    label = pseudo_labels(maps, labels[:1], background=0.3, size=(112, 112))[0]
    for class_id, text in ((0, "background"), (10, "cow"), (14, "motorbike")):
        assert f"{text} {(label == class_id).float().mean():.1%}" in shown.words
    assert right(label, masks[0]) in shown.words


def test_methods_without_a_start_layer_have_no_slider_for_it(model, batch):
    images, labels, *_ = batch
    shown = Shown(widgets.threshold_explorer(model, images, labels, method="cam"))
    assert list(shown.controls) == ["picture", "threshold"]
    assert "right" not in shown.words and shown.alt.count("truth") == 0, "no truth was given"
    shown = Shown(widgets.threshold_explorer(model, images, labels, method="attention", start_layer=1))
    assert shown["start layer"].value == 1 and shown["start layer"].max == 5 and "start layer 1" in shown.words


def test_par_slider(model, weaktr, batch):
    shown = Shown(explorers(model, weaktr, batch)["par"](threshold=0.3))
    assert list(shown.controls) == ["picture", "iterations", "threshold", "variant"]
    shown.move("iterations", 3).move("variant", "pamr").move("threshold", 0.5)
    assert "label, 3 x PAMR" in shown.alt and "label, threshold 0.50" in shown.alt
    shown.move("iterations", 0)
    before, after = re.search("before: (.+); after: (.+)[.]", shown.words).groups()
    assert before == after


def test_head_picker(model, batch):
    images, _, _, masks = batch
    shown = Shown(widgets.head_picker(model, images, masks, block=2, head=1))
    assert list(shown.controls) == ["picture", "block", "head", "asks", "row", "column"]
    assert shown["head"].options == ("mean", 0, 1, 2, 3) and shown["asks"].options == ("class token", "patch")
    assert "block 2, head 1, asks class token: " in shown.words, "a class token has no row"
    assert shown["row"].disabled and shown["column"].disabled
    shown.move("asks", "patch").move("row", 3).move("head", "mean")
    assert "block 2, head mean, asks patch, row 3, column 7: " in shown.words and "block 2, mean of heads" in shown.alt
    assert not shown["row"].disabled and not shown["column"].disabled
    shown["asks"].value = "class token"
    assert shown["row"].disabled


def test_head_picker_offers_the_token_of_each_class(weaktr, batch):
    shown = Shown(widgets.head_picker(weaktr, batch[0]))
    assert shown["asks"].options[9] == "cow" and len(shown["asks"].options) == 21
    shown.move("asks", "cow")
    answer = widgets.attention_row(weaktr, batch[0][0], asker=9)
    assert f"{answer.sum():.1%} of the attention" in shown.words


def test_two_view_explorer_has_a_row_for_each_network(model, weaktr, batch):
    shown = Shown(explorers(model, weaktr, batch)["views"](view="rot90", block=1))
    assert list(shown.controls) == ["picture", "row", "column", "block", "view"]
    assert shown["view"].options == tuple(VIEWS) and re.search(r"one: [\d.]+% .+; &lt;two&gt;: [\d.]+% ", shown.words)
    shown.move("row", 2).move("column", 11).move("view", "vflip").move("block", 0)
    assert "the view (vflip)" in shown.alt


def test_unknown_arguments_are_refused_before_anything_is_shown(model, batch):
    images, labels, pixels, _ = batch
    maps = torch.rand(2, 20, *GRID)
    with pytest.raises(ValueError, match="method: found 'gatem', expected one of cam"):
        widgets.threshold_explorer(model, images, labels, method="gatem")
    with pytest.raises(TypeError, match="varaint"):
        widgets.threshold_explorer(model, images, labels, varaint="grad")
    with pytest.raises(ValueError, match="variant: found 'x'"):
        widgets.threshold_explorer(model, images, labels, variant="x")
    with pytest.raises(ValueError, match="background: found 1.5"):
        widgets.show_threshold(pixels[0].permute(1, 2, 0), maps[0], labels[0], 1.5)
    with pytest.raises(ValueError, match="variant: found 'crf'"):
        widgets.show_par(pixels[0].permute(1, 2, 0), maps[0], labels[0], variant="crf")
    for kw, message in (({"block": 6}, "block: found 6, expected 0..5"), ({"head": 4}, "head: found 4, expected 0..3"),
                        ({"block": -1}, "block: found -1"), ({"asker": 1}, "class token: found 1, expected 0..0"),
                        ({"asker": (14, 0)}, "row: found 14, expected 0..13"), ({"asker": (0, -1)}, "column: found")):
        with pytest.raises(ValueError, match=message):
            widgets.attention_row(model, images[0], **kw)
    with pytest.raises(ValueError, match="view: found 'flip', expected one of hflip"):
        widgets.show_two_views(model, images[0], (0, 0), view="flip")
    with pytest.raises(ValueError, match=r"model: found attention to \d+ tokens, expected \d+"):
        widgets.attention_row(create_model("cam", "toymit", pretrained=False), images[0])


def test_an_error_of_a_later_drawing_is_shown_to_the_reader(model, batch, monkeypatch):
    shown = Shown(widgets.head_picker(model, batch[0]))

    def broken(*args):
        raise ValueError("image: found <nothing>")

    monkeypatch.setattr(widgets, "show_head", broken)
    with pytest.raises(ValueError, match="found <nothing>"):
        shown["block"].value = 1
    assert shown.output.value == '<p role="alert">image: found &lt;nothing&gt;</p>'


# ---- what they draw with


def test_show_threshold(model, batch):
    images, labels, pixels, masks = batch
    photo, maps = pixels[0].permute(1, 2, 0).numpy(), localize(model, images, labels)
    panels, titles, words = drawn(widgets.show_threshold(photo, maps[0], labels[0], 0.25, masks[0]))
    assert titles == ["picture", "truth", "map: cow", "map: motorbike", "label, threshold 0.25"]
    label = pseudo_labels(maps[:1], labels[:1], background=0.25, size=photo.shape[:2])[0]
    np.testing.assert_array_equal(panels[-1], viz.overlay_mask(photo, label))
    np.testing.assert_array_equal(panels[2], viz.overlay_map(photo, maps[0, 9] / maps[0, 9].max()))
    shares = {text: float(share) for text, share in re.findall(r"(\w+) ([\d.]+)%", words)}
    assert abs(sum(shares.values()) - 100) < 0.2 and shares["cow"] > 1, words  # three numbers rounded to 0.1
    everything = drawn(widgets.show_threshold(photo, maps[0], labels[0], 1.0))[2]
    assert everything == "background 100.0%"


@pytest.mark.parametrize("variant", ["par", "pamr"])
def test_ten_iterations_are_those_of_pseudo_labels(variant, model, batch):
    images, labels, pixels, masks = batch
    photo, maps = pixels[0].permute(1, 2, 0).numpy(), localize(model, images, labels)
    panels, titles, words = drawn(widgets.show_par(photo, maps[0], labels[0], 10, 0.3, variant, masks[0]))
    assert titles[3:] == [f"map, 10 x {variant.upper()}", f"label, 10 x {variant.upper()}", "truth"]
    for panel, refine in ((panels[2], None), (panels[4], variant)):
        label = pseudo_labels(maps[:1], labels[:1], pixels[:1].float(), background=0.3, refine=refine)[0]
        np.testing.assert_array_equal(panel, viz.overlay_mask(photo, label))
        assert right(label, masks[0]) in words
    np.testing.assert_array_equal(panels[5], viz.overlay_mask(photo, masks[0]))


def test_what_par_adds_is_divided_out_again(batch):
    """The weights of PAR sum to 1.01: of a map that is the same everywhere nothing may change."""
    _, labels, pixels, _ = batch
    photo, ones = pixels[0].permute(1, 2, 0).numpy(), torch.ones(20, *GRID)
    assert refine_cam(pixels[:1], torch.ones(1, 1, 112, 112), num_iter=3).min() > 1.03
    for iterations in (3, 40):
        panels, _, words = drawn(widgets.show_par(photo, ones, labels[0], iterations, 0.99))
        np.testing.assert_array_equal(panels[1], panels[3])
        assert words == "before: cow 100.0%; after: cow 100.0%", "ties are the lower class's"
    assert drawn(widgets.show_par(photo, ones, labels[0], 0, 1.0))[2].startswith("before: background 100.0%; ")


def full_attention(model, image, block):
    """Attention of one picture in a block, all tokens to all, from its queries and keys: (H, N, N), float64."""
    with torch.no_grad(), AttentionTape(detach=True) as tape:
        model(image[None])
    q, k = (x[0].double() for x in (tape.blocks[block].q, tape.blocks[block].k))
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)


def test_attention_row_is_a_row_of_the_attention(model, weaktr, batch):
    image = batch[0][0, :, :96]  # 12 x 14 patches: a row taken for a column would show
    for network, prefix in ((model, 1), (weaktr, 20)):
        whole = full_attention(network, image, 4)
        for head, token, asker in ((2, 0, 0), (None, prefix - 1, prefix - 1), (3, prefix + 5 * 14 + 13, (5, 13))):
            expected = (whole.mean(0) if head is None else whole[head])[token, prefix:].view(12, 14)
            found = widgets.attention_row(network, image, 4, head, asker)
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)  # float32 against float64


def test_attention_row_leaves_the_network_as_it_was(model, batch):
    seen, expected = [], widgets.attention_row(model, batch[0][0], 1)
    handle = model.register_forward_pre_hook(lambda module, inputs: seen.append(module.training))
    model.train()
    try:
        with module_flags(model, fused_attn=False):  # a network that writes its attention out
            assert torch.equal(widgets.attention_row(model, batch[0][0], 1), expected)
            assert not any(block.attn.fused_attn for block in model.backbone.blocks)
        assert seen == [False] and model.training
    finally:
        handle.remove()
        model.eval()


def test_show_head(model, batch):
    images, _, pixels, masks = batch
    panels, titles, words = drawn(widgets.show_head(model, images[0], 3, 2, (4, 5), masks[0]))
    assert titles == ["picture", "block 3, head 2", "truth"]
    answer, objects = widgets.attention_row(model, images[0], 3, 2, (4, 5)), ((masks[0] > 0) & (masks[0] < 255)).float()
    on_objects = answer * F.avg_pool2d(objects[None], 8)[0]
    for number in (answer.sum(), answer.max(), objects.mean(), on_objects.sum() / answer.sum()):
        assert f"{number:.1%}" in words
    heat = (answer / np.quantile(answer, 0.95)).clamp(max=1)
    assert 0.04 < (heat == 1).float().mean() < 0.06
    photo = pixels[0].permute(1, 2, 0).numpy()
    for panel, expected in zip(panels, (photo, viz.overlay_map(photo, heat), viz.overlay_mask(photo, masks[0]))):
        assert np.abs(panel.astype(int) - expected).max() <= 2  # two ways to a quantile: a colour further at most
    figure = widgets.show_head(model, images[0], 3, 2, (4, 5))
    (frame,) = figure.axes[0].patches
    assert frame.get_bbox().bounds == (5 * 8 - 0.5, 4 * 8 - 0.5, 8, 8) and len(figure.axes) == 2
    plt.close(figure)
    figure = widgets.show_head(model, images[0])
    assert not figure.axes[0].patches, "the class token lies nowhere"
    plt.close(figure)


@pytest.mark.parametrize("view", VIEWS)
def test_two_views_are_compared_patch_by_patch(view, model, batch):
    """Against the whole attention of both views, its patches put back one by one."""
    image, patch = batch[0][0, :, :96], (3, 12)  # 12 x 14 patches
    there, other = (full_attention(model, x, 1).mean(0)[1:, 1:] for x in (image, transform(image, view)))
    number = transform(torch.arange(12 * 14).view(12, 14), view)  # which patch of the picture is seen where
    place = {int(n): i for i, n in enumerate(number.flatten())}
    asks = 3 * 14 + 12
    back = torch.stack([other[place[asks], place[j]] for j in range(12 * 14)]).view(12, 14)
    difference = (there[asks].view(12, 14) - back).abs()
    panels, titles, words = drawn(widgets.show_two_views(model, image, patch, 1, view=view))
    assert words == f"{difference.sum() / 2:.1%} of the attention moved" and titles[2] == f"the view ({view})"
    photo, high = panels[0], torch.maximum(there[asks].max(), back.max())
    assert panels[2].shape[:2] == tuple(transform(torch.zeros(96, 112), view).shape)
    for panel, heat in ((panels[1], there[asks].view(12, 14)), (panels[3], back), (panels[4], difference)):
        gap = np.abs(panel.astype(int) - viz.overlay_map(photo, heat / high))
        assert gap.max() <= 2, "float32 against float64: a colour of the scale of 256 further at most"


def test_where_a_network_turns_with_its_picture_nothing_moved(model, batch, monkeypatch):
    """A made-up attention: brightness over distance. It cannot tell a view from another picture."""
    def attention_row(model, image, block, head, asker):
        grid = F.avg_pool2d(image.exp().mean(0, keepdim=True), 8)[0]  # (3, H, W) -> (h, w)
        y, x = (torch.arange(n)[shape] for n, shape in zip(grid.shape, ((slice(None), None), (None, slice(None)))))
        row = grid / (1 + (y - asker[0]).square() + (x - asker[1]).square())
        return row / row.sum()

    monkeypatch.setattr(widgets, "attention_row", attention_row)
    for view in VIEWS:
        panels, _, words = drawn(widgets.show_two_views({"even": model}, batch[0][0, :, :96], (3, 12), view=view))
        assert words == "even: 0.0% of the attention moved"
        np.testing.assert_array_equal(panels[1], panels[3])
        np.testing.assert_array_equal(panels[4], panels[0])
