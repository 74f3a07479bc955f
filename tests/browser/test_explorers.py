"""The explorers where readers meet them: in JupyterLab, in a browser, by the keyboard.

What a test of Python alone cannot see: whether the browser's side of a widget can show it at all, whether a key reaches
a slider and not the notebook around it, and what a screen reader is told.
"""
import re
from base64 import b64decode
from io import BytesIO

import lab
import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

pytestmark = pytest.mark.skipif(lab.missing() is not None, reason=f"{lab.missing()}: no browser to test in")

SETUP = """\
%matplotlib inline
import torch
from wsss_lib import create_model, localize, widgets
from wsss_lib.data import VOC
from wsss_lib.data.transforms import EvalTransform
from wsss_lib.paths import shipped

model = create_model("cam", "toyvit").eval()
data = VOC(shipped("toyvoc"), "val", truth="mask")
samples = [data[10], data[22]]
prepare = EvalTransform(**model.data_config)
images, labels = torch.stack([prepare(s)["image"] for s in samples]), torch.stack([s.labels for s in samples])
pixels, masks = torch.stack([s.image for s in samples]), [s.mask for s in samples]
"""
EXPLORERS = {
    "threshold": "widgets.threshold_explorer(model, images, labels, masks, power=1 / 3)",
    "par": "widgets.par_slider(pixels, localize(model, images, labels), labels, masks)",
    "head": "widgets.head_picker(model, images, masks)",
    "views": "widgets.two_view_explorer(model, images)",
}
CONTROLS = {
    "threshold": ["picture", "threshold", "start layer"],
    "par": ["picture", "iterations", "threshold", "variant"],
    "head": ["picture", "block", "head", "asks", "row", "column"],
    "views": ["picture", "row", "column", "block", "view"],
}


class Explorer:
    """One explorer on the page, the n-th of EXPLORERS, as a reader sees and handles it."""

    def __init__(self, page, name):
        self.page, self.name, self.number = page, name, list(EXPLORERS).index(name)
        lab.wait_for(f"the picture of {name}", lambda: self.ask("return !!box?.querySelector('img')?.complete"))

    def ask(self, code, *arguments):
        """A script that knows the explorer's own part of the page as `box`."""
        box = "const box = document.querySelectorAll('.jp-OutputArea-output > .widget-vbox')[arguments[0]];"
        return self.page.script(f"{box} {code}", self.number, *arguments)

    def words(self):
        return self.ask("return box.querySelector('figcaption').innerText")

    def picture(self):
        """The picture's bytes, from the page."""
        source = self.ask("return box.querySelector('img').src")
        return b64decode(source.removeprefix("data:image/png;base64,"), validate=True)

    def focus(self, control):
        """Give a slider, named by its label, the keyboard's focus."""
        find = ("const part = [...box.querySelectorAll('.widget-inline-hbox')].find(part => "
                "part.querySelector('label').innerText === arguments[1]).querySelector('[role=slider]');")
        assert self.ask(f"{find} part.focus(); return document.activeElement === part", control)

    def press(self, control, key, expected):
        """Press a key on a control: the caption must say what is expected, and the picture be another one."""
        assert expected not in self.words()
        before = self.picture()
        self.focus(control)
        self.page.press(key)
        lab.wait_for(f"{expected!r} in the caption of {self.name}", lambda: expected in self.words())
        after = self.picture()
        assert after != before
        shown = np.asarray(Image.open(BytesIO(after)).convert("RGB"))
        assert shown.std() > 20, "something is drawn"
        read = "img.decode().then(() => [img.naturalHeight, img.naturalWidth])"
        assert self.ask(f"const img = box.querySelector('img'); return {read}") == list(shown.shape[:2])


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    cells = [new_code_cell(source) for source in (SETUP, *EXPLORERS.values())]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    path = tmp_path_factory.mktemp("lab") / "explorers.ipynb"
    nbformat.write(new_notebook(cells=cells, metadata=kernel), path)
    with lab.open_notebook(path) as opened:
        yield opened


def test_threshold_and_start_layer(page):
    explorer = Explorer(page, "threshold")
    few = float(re.search(r"background ([\d.]+)%", explorer.words())[1])
    explorer.press("threshold", "ArrowLeft", "threshold 0.35")
    assert float(re.search(r"background ([\d.]+)%", explorer.words())[1]) < few, "a lower threshold, less background"
    explorer.press("start layer", "ArrowRight", "start layer 4")
    explorer.press("picture", "ArrowRight", "picture 1")


def test_par(page):
    explorer = Explorer(page, "par")
    explorer.press("iterations", "ArrowRight", "iterations 11")
    assert "11 x PAR" in explorer.ask("return box.querySelector('img').alt")
    explorer.press("variant", "ArrowRight", "variant pamr")


def test_head(page):
    explorer = Explorer(page, "head")
    explorer.press("block", "ArrowRight", "block 1")
    explorer.press("head", "ArrowRight", "head 0")
    enabled = "return [...box.querySelectorAll('.noUi-target')].map(slider => !slider.hasAttribute('disabled'))"
    assert explorer.ask(enabled) == [True] * 4 + [False] * 2, "the class token has no row and column"
    explorer.press("asks", "ArrowUp", "asks patch, row 7, column 7")
    lab.wait_for("the patch's sliders", lambda: all(explorer.ask(enabled)))
    explorer.press("row", "ArrowDown", "row 6")


def test_two_views(page):
    explorer = Explorer(page, "views")
    explorer.press("column", "ArrowLeft", "column 6")
    explorer.press("view", "ArrowRight", "view vflip")
    explorer.press("block", "ArrowRight", "block 1")


@pytest.mark.parametrize("name", EXPLORERS)
def test_controls_have_labels_and_are_reached_by_the_tabulator(page, name):
    explorer, names = Explorer(page, name), CONTROLS[name]
    labels = "[...box.querySelectorAll('.widget-hslider > label')].map(label => [label.innerText, label.title])"
    assert explorer.ask(f"return {labels}") == [[text, text] for text in names], "the second is shown to a pointer"
    explorer.focus(names[0])
    here = ("const at = document.activeElement; return box.contains(at) && at.getAttribute('role') === 'slider' ? "
            "at.closest('.widget-inline-hbox').querySelector('label').innerText : null")
    reached = [explorer.ask(here)]
    for _ in range(2 * len(names)):  # a slider's number can be typed as well, so it has a stop of its own
        page.press("Tab")
        reached.append(explorer.ask(here))
    enabled = [text for text in names if name != "head" or text not in ("row", "column")]
    assert [text for text in reached if text in enabled] == enabled, "each, in the order in which they stand"


def test_what_a_screen_reader_is_told(page):
    """The pictures have names, the words beneath announce themselves.

    Sliders are sliders, but ipywidgets 8.1 ties no label to them: it stands before them, and the words repeat it."""
    for name in EXPLORERS:
        Explorer(page, name)
    pictures = page.accessible(".jp-OutputArea-output img")
    assert [role for role, _ in pictures] == ["image"] * 4
    assert all(text.startswith(("picture, ", "a patch asks, ")) for _, text in pictures)
    assert [role for role, _ in page.accessible(".jp-OutputArea-output figcaption span")] == ["status"] * 4
    handles = page.accessible(".jp-OutputArea-output [role=slider]")
    assert [role for role, _ in handles] == ["slider"] * sum(map(len, CONTROLS.values()))


def test_each_cell_shows_one_thing(page):
    """A figure that is left open would be shown again beneath the explorer."""
    outputs = "map(cell => cell.querySelectorAll('.jp-OutputArea-child').length)"
    assert page.script(f"return [...document.querySelectorAll('.jp-Notebook .jp-Cell')].{outputs}") == [0, 1, 1, 1, 1]
