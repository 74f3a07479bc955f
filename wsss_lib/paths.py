"""Where the files are that ship with the project, and where large ones are built."""
from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def data_folders() -> list[Path]:
    """Folders searched for shipped files: $WSSS_DATA if set, then `data/` beside the package."""
    named = os.environ.get("WSSS_DATA")
    return ([Path(named)] if named else []) + [REPOSITORY / "data"]


def shipped(relative: str) -> Path:
    """The path of a shipped file or folder, such as "toyvoc" or "checkpoints/toyvit.safetensors".

    Raises FileNotFoundError that says where it was looked for and how to get it.
    """
    tried = [folder / relative for folder in data_folders()]
    for path in tried:
        if path.exists():
            return path
    raise FileNotFoundError(
        f"{relative}: not found as {' or '.join(map(str, tried))}. It ships in the repository's data/ "
        f"folder: install with `pip install -e .` from a clone, or set WSSS_DATA to a folder that holds it.")


def cache_folder() -> Path:
    """Where data sets and runs that do not ship are written: $WSSS_DATA, else data/cache (ignored by git)."""
    named = os.environ.get("WSSS_DATA")
    return Path(named) if named else REPOSITORY / "data" / "cache"


def runs_folder(name: str) -> Path:
    """Where a run leaves what it made, created if need be: `name` in $WSSS_RUNS, else in the repository's runs/,
    which git ignores."""
    folder = Path(os.environ.get("WSSS_RUNS") or REPOSITORY / "runs") / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
