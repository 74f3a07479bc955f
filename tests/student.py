"""The student version of a notebook: the solutions removed, the exercises kept."""
from copy import deepcopy

from nbconvert.preprocessors import TagRemovePreprocessor
from nbformat import NotebookNode


def tagged(cell: NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def student_version(nb: NotebookNode) -> NotebookNode:
    """A copy without the cells tagged `solution`."""
    student, _ = TagRemovePreprocessor(remove_cell_tags={"solution"}).preprocess(deepcopy(nb), {})
    return student
