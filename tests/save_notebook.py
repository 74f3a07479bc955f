"""Execute notebooks top to bottom and save them as the repository keeps them: with outputs, pictures small.

    python tests/save_notebook.py notebooks/01_cam_basics.ipynb ...

Pictures are saved in 256 colours (a quarter of the bytes); times of execution, new with every run, are left out, and
so are widgets, which without a kernel are an error message where the picture was.
"""

import base64
import io
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

WIDGET = "application/vnd.jupyter.widget-view+json"


def save(path: Path) -> None:
    """Execute one notebook in its folder and write it back."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    notebook.metadata.pop("widgets", None)
    NotebookClient(notebook, timeout=600, resources=resources, store_widget_state=False).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = shrink(data["image/png"])
    nbformat.write(notebook, path)


def shrink(png: str) -> str:
    """A picture as base64 PNG -> the same in 256 colours."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    buffer = io.BytesIO()
    picture.quantize(256, method=Image.Quantize.FASTOCTREE).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        save(Path(name).resolve())
