"""How the notebooks are saved, what a student gets, and that parameters reach them.

nbval runs each notebook from top to bottom and compares outputs; here is what nbval does not see.
"""
import ast
import json
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from wsss_lib.students import YOUR_TURN, student_version, tagged

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIRST = ROOT / "notebooks" / "00_start_here.ipynb"
LOCAL_PATH = re.compile(r"(?<![\w.~/-])/(?:home|root|tmp|work|Users|private|mnt)\b|\bC:\\")
MEGABYTE = 2**20

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(nb: NotebookNode) -> list[NotebookNode]:
    """The code cells that hold code."""
    return [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]


# ---- rules: notebook -> what is wrong with it


def execution_faults(nb: NotebookNode) -> list[str]:
    """Saved after one run from top to bottom: nbval compares nothing where a count is missing."""
    counts = [cell.execution_count for cell in code_cells(nb)]
    expected = list(range(1, len(counts) + 1))
    return [] if counts == expected else [f"execution counts: found {counts}, expected 1..{len(counts)}"]


def error_faults(nb: NotebookNode) -> list[str]:
    return [f"cell {cell.execution_count}: saved error {output.ename}: {output.evalue}"
            for cell in code_cells(nb) for output in cell.outputs if output.output_type == "error"]


def text_faults(nb: NotebookNode) -> list[str]:
    text, code = sum(cell.cell_type == "markdown" for cell in nb.cells), len(code_cells(nb))
    return [] if text >= code else [f"found {text} text cells, expected at least the {code} of code"]


def setup_faults(nb: NotebookNode) -> list[str]:
    lines = [line for line in code_cells(nb)[0].source.splitlines() if line.strip()]
    return [] if len(lines) <= 8 else [f"set-up cell: found {len(lines)} lines, expected at most 8"]


def parameter_faults(nb: NotebookNode) -> list[str]:
    """One cell of literals, for papermill writes its own values below it and nothing more."""
    cells = [cell for cell in nb.cells if tagged(cell, "parameters")]
    if len(cells) != 1:
        return [f"parameters: found {len(cells)} cells, expected one"]
    faults, values = [], {}
    for line in ast.parse(cells[0].source).body:
        try:
            target, = line.targets if isinstance(line, ast.Assign) else [line.target]
            values[target.id] = ast.literal_eval(line.value)
        except (AttributeError, TypeError, ValueError):
            faults.append(f"parameters: found `{ast.unparse(line)}`, expected NAME = literal")
    for name, value in {"PROFILE": "toy", "DATA_ROOT": None, "SEED": 0}.items():
        if name not in values or values[name] != value:
            faults.append(f"parameters: {name}: found {values.get(name, 'nothing')!r}, expected {value!r}")
    return faults


def path_faults(nb: NotebookNode) -> list[str]:
    """Paths of the machine that the notebook was written on."""
    faults = []
    for number, cell in enumerate(nb.cells):
        for text in [cell.source, *_text_outputs(cell)]:
            found = LOCAL_PATH.search(re.sub(r"https?://\S+", "", text))
            if found:
                faults.append(f"cell {number}: found {text[found.start():found.end() + 20]!r}")
    return faults


def _text_outputs(cell: NotebookNode) -> list[str]:
    texts = []
    for output in cell.get("outputs", []):
        texts.append(output.get("text", ""))
        texts += [v for k, v in output.get("data", {}).items() if k.startswith("text/")]
    return texts


def widget_faults(nb: NotebookNode) -> list[str]:
    """Saved widget state: large, and dead without a kernel."""
    states = [nb.metadata.get("widgets", {})]
    states += [v for cell in code_cells(nb) for output in cell.outputs
               for k, v in output.get("data", {}).items() if k.startswith("application/vnd.jupyter.widget")]
    sizes = [len(json.dumps(state)) for state in states]
    return [f"widget state: found {size} bytes, expected at most 100000" for size in sizes if size > 100_000]


def exercise_faults(nb: NotebookNode) -> list[str]:
    """exercise (a stub that raises), then its solution, then an assert cell, before the next exercise."""
    starts = [i for i, cell in enumerate(nb.cells) if tagged(cell, "exercise") and cell.cell_type == "code"]
    if not starts:
        return ["exercises: found none, expected at least one"]
    faults = []
    for start, end in zip(starts, [*starts[1:], len(nb.cells)]):
        stub, after = nb.cells[start], [c for c in nb.cells[start + 1:end] if c.cell_type == "code"]
        names = [node.name for node in ast.walk(ast.parse(stub.source)) if isinstance(node, ast.FunctionDef)]
        if "raise NotImplementedError" not in stub.source or not names:
            faults.append(f"cell {start}: expected a function that raises NotImplementedError")
            continue
        solutions = [i for i, cell in enumerate(after) if tagged(cell, "solution")]
        if not solutions or f"def {names[0]}" not in "".join(after[i].source for i in solutions):
            faults.append(f"cell {start}: {names[0]}: found no solution cell that defines it")
        checks = after[solutions[-1] + 1:] if solutions else []
        if not checks or "assert" not in checks[0].source or f"{names[0]}(" not in checks[0].source:
            faults.append(f"cell {start}: {names[0]}: found no assert on it right after the solution")
    return faults


def hint_faults(nb: NotebookNode) -> list[str]:
    """A hint in the text before each exercise: `*Hint*:`, or `*Hints*:` for several."""
    faults, text = [], ""
    for number, cell in enumerate(nb.cells):
        if cell.cell_type == "markdown":
            text = cell.source
        elif tagged(cell, "exercise"):
            if not re.search(r"\*Hints?\*:", text):
                faults.append(f"cell {number}: found no `*Hint*:` in the text before the exercise")
            text = ""
    return faults


RULES = [execution_faults, error_faults, text_faults, setup_faults, parameter_faults, path_faults,
         widget_faults, exercise_faults, hint_faults]
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)


def test_there_are_notebooks():
    assert FIRST in NOTEBOOKS


@every_rule
@every_notebook
def test_a_notebook_keeps_the_rule(path: Path, rule: Callable[[NotebookNode], list[str]]):
    assert rule(read(path)) == []


@every_notebook
def test_a_notebook_is_small_and_valid(path: Path):
    assert path.stat().st_size < 3 * MEGABYTE
    nbformat.validate(read(path))


# ---- the rules themselves, on a small notebook that keeps them all


def small_notebook() -> NotebookNode:
    sources = [("import math", []),
               ('PROFILE = "toy"\nDATA_ROOT = None  # a folder\nSEED = 0', ["parameters"]),
               ("def half(x):\n    raise NotImplementedError", ["exercise"]),
               ("def half(x):\n    return x / 2", ["solution"]), ("assert half(3) == 1.5", [])]
    cells = []
    for count, (source, tags) in enumerate(sources, 1):
        cells += [new_markdown_cell("See https://example.org/home/x, and and/or $f: x$. *Hint*: divide."),
                  new_code_cell(source, execution_count=count, metadata={"tags": tags})]
    return new_notebook(cells=cells)


def stream(text: str) -> NotebookNode:
    return new_output("stream", text=text)


# rule, cell (odd cells are code), what is changed in it
BROKEN = [
    (execution_faults, 5, {"execution_count": None}), (execution_faults, 5, {"execution_count": 7}),
    (error_faults, 1, {"outputs": [new_output("error", ename="KeyError", evalue="x", traceback=[])]}),
    (text_faults, 0, {"cell_type": "raw"}),
    (setup_faults, 1, {"source": "\n".join(f"a{i} = {i}" for i in range(9))}),
    (parameter_faults, 3, {"metadata": {}}),
    (parameter_faults, 1, {"metadata": {"tags": ["parameters"]}}),
    (parameter_faults, 3, {"source": 'PROFILE = "toy"\nDATA_ROOT = None'}),
    (parameter_faults, 3, {"source": 'PROFILE = "full"\nDATA_ROOT = None\nSEED = 0'}),
    (parameter_faults, 3, {"source": 'PROFILE = "toy"\nDATA_ROOT = None\nSEED = 0\nSTEPS = 2 * SEED'}),
    (parameter_faults, 3, {"source": 'PROFILE = "toy"\nDATA_ROOT = None\nSEED = 0\nprint(SEED)'}),
    (path_faults, 1, {"source": 'open("/home/me/x")'}), (path_faults, 0, {"source": r"in C:\data"}),
    (path_faults, 1, {"outputs": [stream("saved to /tmp/x.png")]}),
    (path_faults, 1, {"outputs": [new_output("display_data", data={"text/html": "<a href='/root/x'>"})]}),
    (widget_faults, 1, {"outputs": [new_output("display_data", data={
        "application/vnd.jupyter.widget-state+json": {"state": "x" * 100_000}})]}),
    (exercise_faults, 5, {"metadata": {}}), (exercise_faults, 7, {"metadata": {}}),
    (exercise_faults, 5, {"source": "def half(x):\n    return 0"}),
    (exercise_faults, 7, {"source": "def third(x):\n    return x / 3"}),
    (exercise_faults, 9, {"source": "half(3)"}), (exercise_faults, 9, {"source": "assert True"}),
    (hint_faults, 4, {"source": "Write it. No hint: it is easy."}),
]


@every_rule
def test_a_rule_accepts_a_good_notebook(rule: Callable[[NotebookNode], list[str]]):
    assert rule(small_notebook()) == []


@pytest.mark.parametrize("rule, cell, change", BROKEN)
def test_a_rule_finds_what_is_broken(rule: Callable[[NotebookNode], list[str]], cell: int, change: dict):
    nb = small_notebook()
    nb.cells[cell].update(nbformat.from_dict(deepcopy(change)))
    assert rule(nb)


def test_a_hint_serves_one_exercise():
    nb = small_notebook()
    nb.cells = [*nb.cells[:6], *nb.cells[5:]]  # the stub twice, one text before both
    assert len(hint_faults(nb)) == 1


def test_large_widget_metadata_is_found():
    nb = small_notebook()
    nb.metadata["widgets"] = {"state": "x" * 100_000}
    assert widget_faults(nb)


# ---- the student version


def test_the_student_version_has_no_solutions():
    nb = small_notebook()
    whole = deepcopy(nb)
    expected = [YOUR_TURN if i == 6 else cell.source for i, cell in enumerate(nb.cells) if i != 7]
    assert [cell.source for cell in student_version(nb).cells] == expected
    assert nb == whole, "the notebook itself stays whole"


@every_notebook
def test_a_student_version_keeps_all_but_the_solutions(path: Path):
    nb = read(path)
    kept = [cell.id for cell in nb.cells if not tagged(cell, "solution")]
    assert [cell.id for cell in student_version(nb).cells] == kept
    assert len(kept) < len(nb.cells)


def run_to_first_exercise(nb: NotebookNode) -> None:
    """Run a student version: all is well up to the first exercise, whose check then says: not done."""
    student = student_version(nb)
    code = [i for i, cell in enumerate(student.cells) if cell.cell_type == "code"]
    first = next(i for i in code if tagged(student.cells[i], "exercise"))
    check = code[code.index(first) + 1]
    where = {"metadata": {"path": str(ROOT)}}
    client = NotebookClient(student, timeout=300, kernel_name="python3", resources=where)
    with client.setup_kernel():
        for index in range(first + 1):
            client.execute_cell(student.cells[index], index)
        with pytest.raises(CellExecutionError) as caught:
            client.execute_cell(student.cells[check], check)
    assert caught.value.ename == "NotImplementedError"


def test_a_small_student_version_runs_to_its_exercise():
    run_to_first_exercise(small_notebook())


def test_the_first_student_version_runs_to_its_first_exercise():
    run_to_first_exercise(read(FIRST))
