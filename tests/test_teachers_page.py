"""notebooks/README.md, the page for teachers, says what the notebooks hold."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from wsss_lib.__main__ import main
from wsss_lib.paths import REPOSITORY
from wsss_lib.students import tagged

FOLDER = REPOSITORY / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def part(path: Path) -> str:
    """What the page says of one notebook."""
    found = re.search(rf"^## {path.stem}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, f"{path.stem}: no section in notebooks/README.md"
    return found[1]


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#:]+)\)", PAGE)
    assert len(links) > len(NOTEBOOKS)
    for link in links:
        assert (FOLDER / link).exists(), link


@every_notebook
def test_a_notebook_is_planned_explained_and_graded(path):
    row = re.search(rf"^\| .*{path.stem}.*\|$", PAGE, re.MULTILINE)[0]
    measured = row.split("|")[3].strip()
    time = next(line for line in read(path).cells[0].source.splitlines() if line.startswith("**Time**"))
    assert measured in time, f"{measured}: found {time}"
    for plan in ("## One day", "## Six weeks"):
        assert re.search(rf"\b{path.stem[:2]}\b", PAGE[PAGE.index(plan) :][:3500]), plan
    stubs = [cell.source for cell in read(path).cells if tagged(cell, "exercise")]
    names = [re.search(r"def (\w+)\(", stub)[1] for stub in stubs]
    for name in names:
        assert f"- `{name}`" in part(path), name
    assert part(path).count("(1)") == 2 * len(names), "two points each beside those of the check"
    assert "Three misconceptions" in part(path) and "**Trouble.**" in part(path)


@every_notebook
def test_cells_that_the_page_names_are_where_it_says(path):
    """`section 4, cell 31`: the cell with the execution count 31 stands in the notebook's section 4."""
    section, of_cell, known = None, {}, set()
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            for number in re.findall(r"^## (\d+)\b", cell.source, re.MULTILINE):
                section = int(number)
                known.add(section)
        elif cell.execution_count:
            of_cell[cell.execution_count] = section
    for named, cell in re.findall(r"section (\d+), cell (\d+)", part(path)):
        assert of_cell[int(cell)] == int(named), f"cell {cell}: found section {of_cell[int(cell)]}, expected {named}"
    assert {int(named) for named in re.findall(r"section (\d+)", part(path))} <= known


# What the page quotes -> how the cell that refutes the misconception prints it.
QUOTED = {
    "00_start_here": {"80.9": "80.9", "mIoU of 3.9": " 3.9", "18.5": "18.5", "oracle=True": "oracle=True"},
    "01_cam_basics": {"41.9": "41.9", "25.1": "25.1", "37 % of the water": "36.9%", "of the sky 7 %": "6.8%"},
    "02_attention": {"0.17": "correlation 0.17", "27 %": "background patch 27 %", "fill 17 %": "objects fill 17 %"},
    "03_getam": {"20 patches": "G 20.1", "5.5": "A G 5.5", "5.3": "A G G 5.3"},
    "04_weaktr": {"0.96": "0.96 at the end", "quality is 0.1": "with AP 0.1", "137 of 196": "137 of 196",
                  "99 %": "99% of the wrong", "54 %": "54% of the object"},
    "05_afa_par": {"55 of 100": "55% before", "loses 11": "46.7", "gains 18": "75.6"},
    "07_end_to_end": {"79 % right": "of those right 79%", "6 % of the object": "of object pixels right 6%"},
    "08_leaderboard": {"6.0 points": "6.0 points", "11.8 after": "11.8 points", "seven are seen": "'seen': 7"},
}


@pytest.mark.parametrize("name", QUOTED)
def test_figures_that_the_page_quotes_are_in_the_outputs(name):
    path = FOLDER / f"{name}.ipynb"
    outputs = json.dumps([cell.get("outputs", []) for cell in read(path).cells])
    for said, printed in QUOTED[name].items():
        assert said in part(path) and printed in outputs, said


def test_commands_on_the_page_exist(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["wsss_lib", "students", "--help"])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().out
    for option in set(re.findall(r"wsss_lib students.*?(--\w+)", PAGE)):
        assert option in said
