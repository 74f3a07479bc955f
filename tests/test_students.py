"""The course for a class: what students get, and the slides."""

import re
import sys
from collections.abc import Callable
from copy import deepcopy
from html import unescape
from pathlib import Path

import nbformat
import pytest
from mark_slides import mark
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from wsss_lib.__main__ import main
from wsss_lib.paths import REPOSITORY
from wsss_lib.students import YOUR_TURN, slide_cells, slides, student_version, tagged

FOLDER = REPOSITORY / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


TALKS = [path for path in NOTEBOOKS if slide_cells(read(path))]


@pytest.fixture
def run(monkeypatch) -> Callable[..., None]:
    """`python -m wsss_lib students ...`, within this process."""

    def call(*args: object) -> None:
        monkeypatch.setattr(sys, "argv", ["wsss_lib", "students", *map(str, args)])
        main()

    return call


def error_of(call: Callable[..., None], *args: object) -> str:
    """The one line with which the command exits."""
    with pytest.raises(SystemExit) as caught:
        call(*args)
    assert isinstance(caught.value.code, str) and "\n" not in caught.value.code
    return caught.value.code


def code(source: str, output: str = "", *tags: str, kind: str = "skip", picture: bool = False) -> NotebookNode:
    outputs = [new_output("stream", text=output)] if output else []
    outputs += [new_output("display_data", data={"image/png": PIXEL})] if picture else []
    metadata = {"tags": list(tags), "slideshow": {"slide_type": kind}}
    return new_code_cell(source, execution_count=1, outputs=outputs, metadata=metadata)


def text(source: str, kind: str = "skip") -> NotebookNode:
    return new_markdown_cell(source, metadata={"slideshow": {"slide_type": kind}})


def lesson() -> NotebookNode:
    """An exercise, its solution in two cells, its check; beside them cells that only look alike."""
    cells = [
        text("# A lesson", "slide"),
        code("import math\nhalf = None\nprint(math.pi)", "3.14", kind="fragment"),
        text("Halve it. *Hint*: divide."),
        code("def half(x):\n    raise NotImplementedError", "", "exercise"),
        text("One way to do it:"),
        code("def halve(x):\n    return x / 2", "", "solution"),
        text("And with that:"),
        code("def half(x):\n    return halve(x)\n\nassert True", "a solution's words", "solution", kind="slide"),
        text("The check:", "slide"),
        code("assert half(3) == 1.5\nprint(half(3))", "1.5"),
        code("print(math.half if math.pi < 3 else 'no')", "no", kind="slide"),
        code("show(halve)", "drawn", picture=True, kind="fragment"),
        code("print(2 + 2)", "4", picture=True, kind="slide"),
        code("\n" * 12 + "print('long' * 2)", "longlong", kind="fragment"),
        code("\n" * 11 + "print('short')", kind="fragment"),
    ]
    return new_notebook(cells=cells)


# ---- the student version


def test_what_is_cleared_and_what_is_kept():
    nb = lesson()
    student = student_version(nb)
    expected = [cell.source for i, cell in enumerate(nb.cells) if i not in (5, 7)]
    expected[4] = expected[5] = YOUR_TURN
    assert [cell.source for cell in student.cells] == expected
    cleared = [cell.source for cell in student.cells if cell.cell_type == "code" and cell.execution_count is None]
    assert cleared == ["assert half(3) == 1.5\nprint(half(3))", "show(halve)"]
    for cell in student.cells:
        if cell.cell_type == "code" and cell.source in cleared:
            assert cell.outputs == []
    assert "".join(o.text for cell in student.cells for o in cell.get("outputs", []) if "text" in o) == "3.14no4longlong"


@every_notebook
def test_a_notebook_changes_nowhere_but_at_its_exercises(path):
    nb = read(path)
    student = {cell.id: cell for cell in student_version(nb).cells}
    changed, stub, solved = [], False, set()
    for cell in nb.cells:
        if tagged(cell, "solution"):
            assert cell.id not in student
            solved |= set(re.findall(r"def (\w+)\(", cell.source))
        elif student[cell.id] != cell:
            changed.append(cell)
    for cell in changed:
        if cell.cell_type == "markdown":
            assert student[cell.id].source == YOUR_TURN and nb.cells[nb.cells.index(cell) - 1].metadata.tags == ["exercise"]
        else:
            assert any(f"{name}(" in cell.source for name in solved)
            assert student[cell.id].outputs == [] and student[cell.id].source == cell.source
    stubs = [i for i, cell in enumerate(nb.cells) if tagged(cell, "exercise")]
    assert stubs, "every notebook has an exercise"
    for stub in stubs:  # its check shows the solution's figures
        after = [cell for cell in nb.cells[stub + 1 :] if cell.cell_type == "code" and not tagged(cell, "solution")]
        assert after[0] in changed and student[nb.cells[stub].id] == nb.cells[stub]


def test_the_command_writes_all_notebooks_and_never_replaces_one(run, tmp_path, capsys):
    run("--out", tmp_path / "class")
    written = sorted((tmp_path / "class").iterdir())
    assert [f.name for f in written] == [f.name for f in NOTEBOOKS]
    solutions = sum(tagged(cell, "solution") for path in NOTEBOOKS for cell in read(path).cells)
    assert f"{len(NOTEBOOKS)} notebooks, {solutions} solutions removed" in capsys.readouterr().out
    for path, original in zip(written, NOTEBOOKS):
        nbformat.validate(read(path))
        assert read(path) == student_version(read(original))
    written[0].write_text("somebody's work")
    written[1].unlink()
    said = error_of(run, "--out", tmp_path / "class")
    assert "somebody's work" in said and written[0].name in said
    assert written[0].read_text() == "somebody's work" and not written[1].exists(), "all or nothing"
    assert "found a file" in error_of(run, "--out", FOLDER)


def test_what_the_command_wrote_runs_to_its_first_exercise(run, tmp_path):
    nbformat.write(lesson(), tmp_path / "lesson.ipynb")
    run("--out", tmp_path / "class", tmp_path / "lesson.ipynb")
    nb = read(tmp_path / "class" / "lesson.ipynb")
    client = NotebookClient(nb, timeout=60, kernel_name="python3")
    with client.setup_kernel():
        for index in range(6):
            client.execute_cell(nb.cells[index], index)
        check = next(i for i, cell in enumerate(nb.cells) if "assert" in cell.source)
        with pytest.raises(CellExecutionError) as caught:
            client.execute_cell(nb.cells[check], check)
    assert caught.value.ename == "NotImplementedError"


def test_bad_input_is_one_line(run, tmp_path, monkeypatch):
    assert "no_such.ipynb: found no such file" in error_of(run, "--out", tmp_path / "a", tmp_path / "no_such.ipynb")
    nbformat.write(new_notebook(cells=[text("words")]), tmp_path / "plain.ipynb")
    assert "slides: found none" in error_of(run, "--out", tmp_path / "a", "--slides", tmp_path / "plain.ipynb")
    for module in ("nbconvert", "nbformat"):
        monkeypatch.setitem(sys.modules, module, None)  # as where only `pip install -e .` was run
        said = error_of(run, "--out", tmp_path / "a", "--slides", TALKS[0])
        assert f"found no {module}" in said and "pip install jupyterlab" in said
    assert not (tmp_path / "a").exists()


# ---- slides


def sections(html: str) -> int:
    """Slides in a deck: each is a section with one section in it."""
    count, inner = html.count("<section"), len(re.findall(r"<section\s*>\s*<section\s*>", html))
    assert count == 2 * inner
    return inner


def test_slides_show_what_was_chosen_and_pictures_without_code():
    html = unescape(re.sub(r"<style.*?</style>|<script.*?</script>|<[^>]+>", "", slides(lesson(), "lesson"), flags=re.DOTALL))
    for shown in ("A lesson", "import", "3.14", "The check:", "math.half", "drawn", "longlong", "'short'"):
        assert shown in html, shown
    for hidden in ("Halve it", "a solution's words", "return halve", "show(halve)", "2 + 2", "1.5", "* 2"):
        assert hidden not in html, hidden
    whole = slides(lesson(), "lesson")
    assert "max-height: 500px" in whole and sections(whole) == 4 and whole.count('class="fragment"') == 4 and whole.count(PIXEL) == 2


def test_slides_start_with_a_slide_and_there_are_some():
    nb = lesson()
    nb.cells = nb.cells[1:]
    with pytest.raises(ValueError, match="fragment"):
        slides(nb, "lesson")
    with pytest.raises(ValueError, match="found no slides"):
        slides(new_notebook(cells=[text("words")]), "lesson")


def test_there_are_talks():
    assert {"01_cam_basics", "03_getam", "07_end_to_end"} == {path.stem for path in TALKS}


@pytest.mark.parametrize("path", TALKS, ids=lambda path: path.stem)
def test_a_talk_has_the_slides_that_its_metadata_say(run, tmp_path, path):
    nb = read(path)
    kinds = [cell.metadata.slideshow.slide_type for cell in nb.cells]
    assert set(kinds) == {"slide", "fragment", "skip"} and 20 <= len(kinds) - kinds.count("skip") <= 25
    assert nb.cells[0].metadata.slideshow.slide_type == "slide"
    run("--out", tmp_path, "--slides", path)
    html = (tmp_path / f"{path.stem}.slides.html").read_text(encoding="utf-8")
    assert sections(html) == kinds.count("slide") and html.count('class="fragment"') == kinds.count("fragment")
    assert "Traceback" not in html and "widget-state" not in html
    pictures = [o.data["image/png"] for cell in slide_cells(nb) for o in cell.get("outputs", [])
                if "image/png" in o.get("data", {})]
    assert len(pictures) >= 7 and all(picture.replace("\n", "") in html.replace("\n", "") for picture in pictures)


def test_marking_slides_changes_nothing_but_metadata(tmp_path):
    path, nb = tmp_path / "01.ipynb", read(TALKS[0])
    nbformat.write(nb, path)
    mark(path, ["title", "goal-text", "+goal"])
    marked = read(path)
    assert [cell.id for cell in slide_cells(marked)] == ["title", "goal-text", "goal"]
    for cell, was in zip(marked.cells, deepcopy(nb).cells, strict=True):
        cell.metadata.pop("slideshow"), was.metadata.pop("slideshow")
        assert cell == was
    for wrong in (["title", "no-such-cell"], ["goal-text", "title"], ["title", "title"]):
        with pytest.raises(ValueError, match="expected ids of the notebook in its order"):
            mark(path, wrong)
