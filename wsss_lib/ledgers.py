"""Ledgers: results as JSON files that say which command, commit and machine made them."""
from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

from .paths import REPOSITORY


def current_commit() -> str | None:
    """The commit of the code that is running, None outside a git checkout."""
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    except FileNotFoundError:                       # no git on this machine
        return None
    return done.stdout.strip() or None


def command_line() -> str:
    """The command that is running; paths inside the repository are told from there, for they hold elsewhere too."""
    return "python -m wsss_lib " + " ".join(part.removeprefix(f"{REPOSITORY}/") for part in sys.argv[1:])


def write_results(path: str | Path, result: dict) -> Path:
    """Write a ledger entry as JSON with the command, commit, machine kind and versions that made it.

    ValueError for nan or infinite numbers, which JSON does not have; a file that was there stays as it was.
    """
    header = {"command": command_line(), "commit": current_commit(),
              "torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    return _write_json(Path(path), {**header, **result})


def study_row(name: str | None, training: dict | None, reports: dict[str, dict]) -> dict:
    """A row of a study: how the weights were made (the record `pretrain` writes beside them), how their maps score.

    ValueError without a name or a record: a row that cannot be told from others, or made again, is no evidence.
    """
    if not name or not training:
        raise ValueError(f"study: found name {name!r} and {'a' if training else 'no'} record of the training, "
                         "expected both; `pretrain` writes the record beside the weights")
    kept = ("best", "fixed", "coverage", "background_called_foreground", "miou")
    scores = {key: {k: r[k] for k in kept if k in r} for key, r in reports.items()}
    for score in scores.values():
        if "best" in score:
            score["best"] = {k: v for k, v in score["best"].items() if k != "iou"}
    first = next(iter(reports.values()))
    return {"name": name, "seed": training["seed"], "images": training["images"],
            "minutes": round(training["seconds"] / 60, 1), "split": first["split"], "pictures": first["pictures"],
            "mean_average_precision": first.get("mean_average_precision"), **scores, "training": training}


def add_row(path: str | Path, row: dict) -> Path:
    """Write a row into a study's JSON file {"rows": [...]}: in the place of the one with its name and seed, else last.

    Scores of maps that are not in the new row stay, if the weights and the pictures are the same: a map can be added
    to a study later. ValueError as `write_results`, and for a file that is no study.
    """
    path = Path(path)
    study = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
    if not isinstance(study, dict) or not isinstance(study.get("rows"), list):
        raise ValueError(f'{path}: found no study, expected JSON with a list "rows"')
    rows, key = study["rows"], (row["name"], row["seed"])
    place = next((i for i, r in enumerate(rows) if (r["name"], r["seed"]) == key), len(rows))
    before = rows[place] if place < len(rows) else {}
    if all(before.get(field) == row[field] for field in ("training", "split", "pictures")):
        row = {**before, **row}
    return _write_json(path, {**study, "rows": rows[:place] + [row] + rows[place + 1:]})


def _write_json(path: Path, content: dict) -> Path:
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path
