"""Installing the library on a machine like Colab keeps the torch and numpy that are there."""

import json
import os
import shutil
import subprocess
import venv
import zipfile
from pathlib import Path

import pytest
import tomllib

from wsss_lib.paths import REPOSITORY

COLAB = {"torch": "2.6.0", "torchvision": "0.21.0", "timm": "1.0.15", "numpy": "1.26.4", "pillow": "11.1.0",
         "matplotlib": "3.10.0", "ipywidgets": "7.7.1", "safetensors": "0.5.3", "tqdm": "4.67.1"}


def stub(site: Path, name: str, version: str) -> None:
    """What an installed package looks like to pip: its metadata, and none of its files."""
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "INSTALLER").write_text("pip\n")
    (folder / "RECORD").write_text("")


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A virtual environment with pip and stubs of what Colab has."""
    folder = tmp_path_factory.mktemp("machine")
    venv.create(folder, with_pip=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for name, version in COLAB.items():
        stub(site, name, version)
    return folder / "bin" / "python", site


def would_install(python: Path, tmp_path: Path) -> set[str]:
    """What pip would install for the library's requirements, found without an index: only what is there can do.

    The wheel has the metadata of pyproject.toml and nothing else, so that nothing need be built."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    name, version = project["name"], project["version"]
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}",
             f"Requires-Python: {project['requires-python']}", *(f"Requires-Dist: {d}" for d in project["dependencies"])]
    wheel, info = tmp_path / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    command = [str(python), "-m", "pip", "install", "--dry-run", "--no-index", "--quiet", "--disable-pip-version-check",
               "--report", "-", str(wheel)]
    # pip's settings of this machine may name folders with packages
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")} | {"PIP_CONFIG_FILE": os.devnull}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return {item["metadata"]["name"] for item in json.loads(done.stdout)["install"]}


def test_what_is_there_is_kept(machine, tmp_path):
    assert would_install(machine[0], tmp_path) == {"wsss_lib"}, "and nothing else"


@pytest.mark.parametrize("name, version", [("torch", "2.1.0"), ("numpy", "1.21.0")])
def test_what_is_too_old_is_noticed(machine, tmp_path, name, version):
    """Guards the test above: pip then looks for another one, and finds none here."""
    python, site = machine
    whole, hidden = site / f"{name}-{COLAB[name]}.dist-info", site / "hidden"
    whole.rename(hidden)
    stub(site, name, version)
    try:
        with pytest.raises(AssertionError, match=f"No matching distribution found for {name}>="):
            would_install(python, tmp_path)
    finally:
        shutil.rmtree(site / f"{name}-{version}.dist-info")
        hidden.rename(whole)
