"""The house: imports run one way, every public name is explained, files are short, the linter is content."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from wsss_lib.paths import REPOSITORY

LIBRARY = REPOSITORY / "wsss_lib"
FILES = sorted(LIBRARY.rglob("*.py"))
# Who may import whom: only what stands in an earlier line, or in one's own. "" are modules that know no other part.
LAYERS = [
    {"paths", "allocations", "evaluation", "phenomena", "ledgers"},
    {"data", "kernels"},
    {"models"},
    {"localization"},
    {"refinement"},
    {"training"},
    {"reports", "segmentation", "pipeline", "course", "bench", "bench_acr", "bench_cases", "bench_getam", "bench_instruments"},
    {"viz"},
    {"prediction", "students", "widgets", "leaderboard", "leaderboard_table"},
    {"commands", "measuring", "__main__", "__init__"},
]


def part(file: Path) -> str:
    """The folder of the library that a file is in, or the name of a file that is in none."""
    return file.relative_to(LIBRARY).parts[0].removesuffix(".py")


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


def imported(file: Path) -> set[str]:
    """Parts of the library that a file imports, at its top or within functions; "" for the library itself."""
    package = file.relative_to(REPOSITORY).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = [*base, *(node.module or "").split(".")]
            names = [[*module, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        found |= {([part for part in name if part] + [""])[1] for name in names if name[0] == "wsss_lib"}
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(LIBRARY)))
def test_imports_run_one_way(file):
    own = layer(part(file))
    for name in imported(file):
        exists = (LIBRARY / name).is_dir() or (LIBRARY / f"{name}.py").is_file()
        above = layer(name if exists else "__init__")  # a name of the library's own __init__
        assert above <= own, f"{file.relative_to(LIBRARY)} imports {name}, which stands above it"


def public(body: list[ast.stmt], prefix: str = "") -> list[tuple[str, ast.AST]]:
    """Public functions, classes and methods of a module, but for overrides that Python or PyTorch name."""
    found = []
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            if not (prefix and node.name in ("forward", "backward", "to_json")):
                found.append((prefix + node.name, node))
            if isinstance(node, ast.ClassDef):
                found += public(node.body, f"{prefix}{node.name}.")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(LIBRARY)))
def test_every_public_name_is_explained(file):
    module = ast.parse(file.read_text(encoding="utf-8"))
    assert ast.get_docstring(module), "the file says nothing of itself"
    silent = [name for name, node in public(module.body) if not ast.get_docstring(node)]
    assert not silent


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(LIBRARY)))
def test_a_file_is_one_idea(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 300


def test_the_linter_is_content():
    """Ruff's default rules, but for those that pyproject.toml leaves out with a reason."""
    command = [sys.executable, "-m", "ruff", "check", "--output-format", "concise", "."]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
