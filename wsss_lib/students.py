"""The course for a class: notebooks without their solutions, and slides, both from the notebooks themselves."""

from __future__ import annotations

import argparse
import re
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from .paths import REPOSITORY

if TYPE_CHECKING:
    from nbformat import NotebookNode

YOUR_TURN = "Write it in the cell above. The next cell checks it."
# A slide is 960 x 700 pixels: a picture is as large as a heading allows, a line of code fits in.
SLIDE_STYLE = """<style>
:root { --jp-code-font-size: 14px; }
.reveal .jp-RenderedImage img { width: 880px; max-height: 500px; object-fit: contain; object-position: left; }
</style>"""
SLIDE_LINES = 12  # of code; what a longer cell printed is shown without it


def tagged(cell: NotebookNode, tag: str) -> bool:
    """Whether a cell has this tag."""
    return tag in cell.metadata.get("tags", [])


def student_version(nb: NotebookNode) -> NotebookNode:
    """A copy to be worked on: exercises, their hints and their checks are kept, cells tagged `solution` are not.

    A text between an exercise's stub and a cell of its solution announces the solution: it says `YOUR_TURN` instead.
    Cells that use a name which a solution defines show the solution's figures: they lose their output.
    """
    student, cells, stub, theirs = deepcopy(nb), [], False, set()
    for cell in student.cells:
        if tagged(cell, "solution"):
            theirs |= set(re.findall(r"^(?:def|class) (\w+)", cell.source, re.MULTILINE))
            if cells and stub and cells[-1].cell_type == "markdown":
                cells[-1].source = YOUR_TURN
            continue
        stub = tagged(cell, "exercise") or (stub and cell.cell_type == "markdown")
        # a name by itself, not an attribute: `where(x)` and not `torch.where(x)`
        if cell.cell_type == "code" and theirs & set(re.findall(r"(?<![\w.])\w+", cell.source)):
            cell.outputs, cell.execution_count = [], None
        cells.append(cell)
    student.cells = cells
    return student


def slide_cells(nb: NotebookNode) -> list[NotebookNode]:
    """The cells whose metadata `slideshow.slide_type` is `slide` (a new one) or `fragment` (the next key press).

    Never a solution, whatever its metadata say. Raises ValueError for a fragment before the first slide.
    """
    chosen = [cell for cell in nb.cells if _slide_type(cell) in ("slide", "fragment") and not tagged(cell, "solution")]
    if chosen and _slide_type(chosen[0]) != "slide":
        raise ValueError(f"slides: found a fragment in cell {chosen[0].id!r}, expected a slide to start with")
    return chosen


def _slide_type(cell: NotebookNode) -> str:
    return cell.metadata.get("slideshow", {}).get("slide_type", "skip")


def slides(nb: NotebookNode, title: str) -> str:
    """A notebook -> its slides as one HTML text, pictures included; reveal.js and MathJax load from the web.

    Slides hold saved outputs: nothing is run. Of a cell that made a picture, or that printed something and has more
    than `SLIDE_LINES` lines, what came out is shown without the code.
    Raises ValueError where no cell is a slide, and if nbconvert is missing.
    """
    chosen = [deepcopy(cell) for cell in slide_cells(nb)]
    if not chosen:
        raise ValueError(f"{title}: found no slides, expected cells with slideshow.slide_type in their metadata")
    for cell in chosen:
        drawn = any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
        if drawn or (cell.get("outputs") and len(cell.source.splitlines()) > SLIDE_LINES):
            cell.metadata.tags = [*cell.metadata.get("tags", []), "without-code"]
    deck = deepcopy(nb)
    deck.cells, deck.metadata.title = chosen, title
    deck.metadata.pop("widgets", None)
    exporter = _need("nbconvert").SlidesExporter(
        config={"TagRemovePreprocessor": {"enabled": True, "remove_input_tags": {"without-code"}}},
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        reveal_scroll=True,
        reveal_transition="none",
    )
    return exporter.from_notebook_node(deck)[0].replace("</head>", f"{SLIDE_STYLE}</head>", 1)


def _need(module: str) -> ModuleType:
    """A module that JupyterLab brings and `pip install -e .` alone does not."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(
            f"students: found no {module}, expected the packages that run the notebooks: pip install jupyterlab"
        ) from error


def students(args: argparse.Namespace) -> None:
    """Write notebooks without their solutions, for students, and slides."""
    nbformat = _need("nbformat")
    files = [Path(name) for name in args.notebooks] or sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
    if not files:
        raise FileNotFoundError(f"{REPOSITORY / 'notebooks'}: found no notebook, expected those of the course")
    texts, decks, removed = {}, {}, 0
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: found no such file, expected a notebook")
        nb = nbformat.read(file, as_version=4)
        removed += sum(tagged(cell, "solution") for cell in nb.cells)
        texts[Path(args.out, file.name)] = nbformat.writes(student_version(nb)) + "\n"
        if args.slides and slide_cells(nb):
            decks[Path(args.out, f"{file.stem}.slides.html")] = slides(nb, file.stem)
    if args.slides and not decks:
        raise ValueError("slides: found none, expected a notebook whose cells have slideshow.slide_type in their metadata")
    for path in [*texts, *decks]:
        if path.exists():
            raise FileExistsError(f"{path}: found a file, expected none: it may be somebody's work")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for path, text in (texts | decks).items():
        path.write_text(text, encoding="utf-8")
    print(f"{args.out}: {len(texts)} notebooks, {removed} solutions removed" + (f"; {len(decks)} sets of slides" if decks else ""))
