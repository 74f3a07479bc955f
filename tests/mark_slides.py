"""Choose a notebook's slides: the cells named become slides, all others are skipped. Nothing but metadata changes.

    python tests/mark_slides.py notebooks/03_getam.ipynb title goal-text +goal chain-rule ...

Cells are named by their ids, in the notebook's order; a plus makes a fragment, which the next key press adds to the
slide. `python -m wsss_lib students --slides` makes HTML of them. For a talk of 20 minutes choose 20 to 25 cells: the
title, the texts that hold a formula or a question, the cells that drew the figures one would miss.
"""

import sys
from pathlib import Path

import nbformat


def mark(path: Path, chosen: list[str]) -> None:
    """Write the choice into the file."""
    nb = nbformat.read(path, as_version=4)
    kinds = {name.removeprefix("+"): "fragment" if name.startswith("+") else "slide" for name in chosen}
    order = [cell.id for cell in nb.cells if cell.id in kinds]
    if order != list(kinds) or len(kinds) != len(chosen):
        raise ValueError(f"{path.name}: found cells {list(kinds)}, expected ids of the notebook in its order: {order}")
    for cell in nb.cells:
        cell.metadata["slideshow"] = {"slide_type": kinds.get(cell.id, "skip")}
    nbformat.write(nb, path)


if __name__ == "__main__":
    mark(Path(sys.argv[1]), sys.argv[2:])
