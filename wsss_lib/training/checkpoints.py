"""Checkpoints: one safetensors file that holds all a run needs to go on as if it had never stopped.

Tensors are named `model.<name>` and `optimizer.<parameter index>.<name>`; the numbers (step, seconds,
history, configuration) are JSON in the file's header. There is no pickle, so opening a file never runs code.
Files are written beside their place, flushed and renamed: a killed save leaves the previous file whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.optim import Optimizer

FORMAT = "wsss_lib checkpoint"
VERSION = 1


def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer,
    step: int,
    seconds: float,
    history: list[dict],
    config: dict,
    pending: dict | None = None,
    scaler: dict | None = None,
) -> None:
    """Write model, optimiser state and the run's numbers to the file `path`, all or nothing.

    step: steps completed. seconds: training time so far. history: the log's rows. config: JSON-able settings
    that a resumed run must share. pending: JSON-able sums that belong to the next, unfinished row. scaler: JSON-able
    state of float16's scaling.
    The optimiser's state is saved (moments, step counts), its settings (learning rate, betas) are not.

    Raises OSError where the file cannot be written, TypeError for numbers that JSON cannot hold.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    state, scalars = optimizer.state_dict(), {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                scalars[f"{index}.{name}"] = value
    numbers = {
        "step": step, "seconds": seconds, "history": history, "config": config, "pending": pending or {},
        "scaler": scaler or {},
        "optimizer_scalars": scalars, "optimizer_groups": [len(g["params"]) for g in state["param_groups"]],
    }  # fmt: skip
    _write(path, tensors, {"format": FORMAT, "version": str(VERSION), "numbers": json.dumps(numbers)})


def load_checkpoint(path: str | Path, model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Any]:
    """Load `path` into `model` and, if given, `optimizer`; dict(step, seconds, history, config, pending, scaler).

    Everything is checked before anything is changed: after an error model and optimiser are as they were.

    Raises FileNotFoundError for a missing file; ValueError, naming file and tensor, for a file that is not a
    checkpoint, for missing or unexpected tensors, and for shapes or dtypes that differ.
    """
    tensors, numbers = _read(path)
    target = model.state_dict()
    weights = {name[len("model.") :]: t for name, t in tensors.items() if name.startswith("model.")}
    _check_names(path, {f"model.{n}" for n in weights}, {f"model.{n}" for n in target})
    for name, tensor in weights.items():
        _check_tensor(path, f"model.{name}", tensor, target[name])
    state = None if optimizer is None else _optimizer_state(path, tensors, numbers, optimizer)
    model.load_state_dict(weights)
    if optimizer is not None:
        optimizer.load_state_dict(state)
    return {name: numbers[name] for name in ("step", "seconds", "history", "config", "pending", "scaler")}


def check_config(path: str | Path, config: dict, free: tuple[str, ...] = ()) -> None:
    """ValueError, naming the field, where the checkpoint's config differs from `config` but in `free` fields.

    Reads the header only. Raises for a missing or damaged file as `load_checkpoint` does.
    """
    saved = _read(path, tensors=False)[1]["config"]
    for name in sorted((saved.keys() | config.keys()) - set(free)):
        if saved.get(name) != config.get(name):
            raise ValueError(f"{path}: {name}: found {saved.get(name)}, expected {config.get(name)}")


def write_log(path: str | Path, rows: list[dict]) -> None:
    """Replace the file `path` by `rows`, one JSON object per line, all or nothing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def append_log(path: str | Path, row: dict) -> None:
    """Add one line to the file `path`."""
    with _naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def save_weights(
    path: str | Path,
    model: nn.Module,
    dtype: torch.dtype = torch.float16,
    metadata: dict[str, Any] | None = None,
    base: str | Path | None = None,
) -> None:
    """Write the model's state dict under its own names, floating point as `dtype`, for shipping.

    metadata: stored in the header; what is not a string is stored as its JSON.
    base: a file of weights in the folder of `path`; tensors that are the same there, frozen ones, are left out, and
    the header names the base. `models.load_weights` reads the two as one.
    Raises ValueError, naming file and tensor, where a finite weight is out of the range of `dtype`, and for a base
    in another folder.
    """
    tensors, there = {}, {}
    if base is not None:
        if Path(base).resolve().parent != Path(path).resolve().parent:
            raise ValueError(f"base: found {base}, expected a file in the folder of {path}")
        there, metadata = load_file(base), {**(metadata or {}), "base": Path(base).name}
    for name, tensor in model.state_dict().items():
        tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        if tensor.is_floating_point() and (tensor.isfinite() & ~tensors[name].isfinite()).any():
            largest = tensor.abs().max().item()
            raise ValueError(f"{path}: tensor {name}: found a weight of {largest:g}, too large for {dtype}")
        if name in there and torch.equal(tensors[name], there[name].to(tensors[name].dtype)):
            del tensors[name]
    header = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (metadata or {}).items()}
    _write(path, tensors, header)


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """A failed write says what it failed for: the system names no file when it is the disk that is full."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _replace(path: Path, content: bytes) -> None:
    """Write beside `path`, flush, rename: the file is then the old one or the new one, never a part of it."""
    temporary = path.with_name(f".{path.name}.tmp")  # same folder: renames do not cross disks
    with _naming(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # else a power cut could leave the new name on an empty file
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _write(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Copies, since safetensors refuses tensors that share memory (tied weights).
    copies = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()}
    # Not safetensors' save_file: a full disk would be no OSError, and a killed save would leave a file of random name.
    _replace(path, save(copies, metadata))


def _read(path: str | Path, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            values = {name: file.get_tensor(name) for name in list(file.keys())} if tensors else {}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a checkpoint, or a damaged one ({error})") from error
    if metadata.get("format") != FORMAT:
        found = metadata.get("format")
        raise ValueError(f"{path}: not a checkpoint: format in the header: found {found}, expected {FORMAT}")
    if metadata.get("version") != str(VERSION):
        raise ValueError(f"{path}: version: found {metadata.get('version')}, expected {VERSION}")
    return values, json.loads(metadata["numbers"])


def _optimizer_state(path: str | Path, tensors: dict, numbers: dict, optimizer: Optimizer) -> dict:
    """What optimizer.load_state_dict takes: the file's state with the optimiser's own settings."""
    own = optimizer.state_dict()
    found, expected = numbers["optimizer_groups"], [len(g["params"]) for g in own["param_groups"]]
    if found != expected:
        raise ValueError(f"{path}: optimizer: found groups of {found} parameters, expected {expected}")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict] = {}
    values = {n[len("optimizer.") :]: t for n, t in tensors.items() if n.startswith("optimizer.")}
    for key, value in {**values, **numbers["optimizer_scalars"]}.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        # A state is a number (the step count) or one number per weight (the moments).
        if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
            shapes = f"found shape {tuple(value.shape)}, expected {tuple(parameter.shape)}"
            raise ValueError(f"{path}: tensor optimizer.{key}: {shapes}")
        state.setdefault(int(index), {})[name] = value
    # The first value of each parameter tells the names; all parameters of one optimiser have the same.
    names = set().union(*state.values()) if state else set()
    wanted = {f"optimizer.{index}.{name}" for index in state for name in names}
    _check_names(path, {f"optimizer.{i}.{name}" for i, entry in state.items() for name in entry}, wanted)
    return {"state": state, "param_groups": own["param_groups"]}


def _check_names(path: str | Path, found: set[str], expected: set[str]) -> None:
    for what, names in (("missing", expected - found), ("unexpected", found - expected)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{path}: {what} tensors: {', '.join(sorted(names)[:3])}{more}")


def _check_tensor(path: str | Path, name: str, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        ours, theirs = (f"{tuple(t.shape)} {t.dtype}" for t in (expected, found))
        raise ValueError(f"{path}: tensor {name}: found {theirs}, expected {ours}")
