"""Every notebook run anew by papermill: with another seed, to its end; with an unknown profile, not at all."""
import sys
from pathlib import Path

import papermill
import pytest
from nbformat import NotebookNode

from wsss_lib.students import tagged

ROOT = Path(__file__).resolve().parent.parent
every_notebook = pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)


def execute(path: Path, out: Path, **parameters: object) -> NotebookNode:
    return papermill.execute_notebook(str(path), str(out / path.name), parameters, kernel_name="python3",
                                      cwd=str(ROOT), progress_bar=False, execution_timeout=300)


@every_notebook
def test_another_seed_reaches_a_notebook_and_it_runs_to_the_end(path: Path, tmp_path: Path):
    done = execute(path, tmp_path, SEED=7)
    injected = [cell for cell in done.cells if tagged(cell, "injected-parameters")]
    assert len(injected) == 1 and "SEED = 7" in injected[0].source
    assert all(cell.execution_count for cell in done.cells if cell.cell_type == "code" and cell.source.strip())
    if sys.platform == "linux":
        import resource  # other systems have none, or count in other units

        kilobytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # of the largest kernel so far
        assert kilobytes < 3 * 2**20, "a Colab machine has 12 GB"


@every_notebook
def test_an_unknown_profile_fails_at_once(path: Path, tmp_path: Path):
    with pytest.raises(papermill.PapermillExecutionError) as caught:
        execute(path, tmp_path, PROFILE="nonsense")
    assert caught.value.ename == "ValueError"
    for part in ("PROFILE", "found 'nonsense'", "expected", "toy", "voc"):
        assert part in caught.value.evalue
    assert caught.value.exec_count <= 4, "before anything is computed"
