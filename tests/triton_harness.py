"""Triton in processes of their own: it decides when it is imported whether to interpret or to compile."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

TESTS = Path(__file__).parent


def run_apart(function: Callable[[str], None], file: Path, **environment: str) -> None:
    """function(file) in a new process with these environment variables.

    function stands at the top level of a test module, and writes what it finds to the file.
    """
    module, name = function.__module__, function.__name__
    script = f"import sys, {module}; {module}.{name}(sys.argv[1])"
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    subprocess.run([sys.executable, "-c", script, str(file)], env=environment, check=True, timeout=1800)


def interpret(function: Callable[[str], None], folder: Path) -> dict[str, Tensor]:
    """The tensors that function saves, with Triton interpreting every kernel on the CPU."""
    pytest.importorskip("triton")
    file = folder / "results.safetensors"
    run_apart(function, file, TRITON_INTERPRET="1")
    return load_file(file)
