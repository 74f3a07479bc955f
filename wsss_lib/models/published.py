"""Files of published checkpoints: tensors by the names they have there, and ours in their place.

No code in a file is run, and no tensor is passed over: each has a place, or a pattern that says why it has none.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file, by the names they have there, without DataParallel's prefix."""

    file: Path
    tensors: dict[str, Tensor]

    def refuse(self, name: str, found: object, expected: object) -> NoReturn:
        """Raise the ValueError that names file, tensor, found and expected."""
        raise ValueError(f"{self.file}: {name}: found {found}, expected {expected}")

    def shape(self, name: str, ndim: int) -> tuple[int, ...]:
        """Of a tensor that the configuration is read off. ValueError if missing or not of ndim dimensions."""
        if name not in self.tensors:
            self.refuse(name, "no such tensor", f"one of {ndim} dimensions")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != ndim:
            self.refuse(name, f"shape {shape}", f"{ndim} dimensions")
        return shape


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """A state dict from .safetensors or, any other suffix, from what torch.save wrote. No code in it is run.

    Raises FileNotFoundError; ValueError where the file is neither or holds no tensors by name.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found, expected a published checkpoint")
    try:
        if file.suffix == ".safetensors":
            found = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # on bytes that are no pickle, an unpickler fails in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file}: found no checkpoint ({reason}), expected tensors by name") from error
    for key in ("model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{file}: found {type(found).__name__} without tensors, expected tensors by name")
    others = [name for name, value in found.items() if not isinstance(value, Tensor)]
    if others:
        kind = type(found[others[0]]).__name__
        raise ValueError(f"{file}: {others[0]}: found {kind}, expected a tensor")
    return Checkpoint(file, {name.removeprefix("module."): value for name, value in found.items()})


def fill(
    model: nn.Module, checkpoint: Checkpoint, names: tuple[tuple[str, str], ...], unused: tuple[str, ...]
) -> None:
    """Give every tensor of the model its value, and set `missing_weights` and `unused_weights`.

    names: pairs (pattern of our name's start, what stands there in theirs), the first that matches counts.
    unused: patterns of published names that the network never uses; they are loaded where our model keeps the
    tensor all the same (timm's final norm), need not be there, and are all listed in `unused_weights`.
    Raises ValueError for a tensor that is missing, of another shape, or that none of these patterns explains.
    """
    never = re.compile("|".join(f"(?:{pattern})" for pattern in unused))
    loaded, stored = {}, checkpoint.tensors
    theirs = {name: published_name(name, names) for name in model.state_dict()}
    for name, own in model.state_dict().items():
        source, shape = theirs[name], tuple(own.shape)
        if source in stored:
            if tuple(stored[source].shape) != shape:
                checkpoint.refuse(source, f"shape {tuple(stored[source].shape)}", shape)
            loaded[name] = stored[source].to(own.dtype)
        elif not never.match(source):
            checkpoint.refuse(source, "no such tensor", f"shape {shape}")
    for name in stored.keys() - set(theirs.values()):
        if not never.match(name):
            checkpoint.refuse(name, f"a tensor of shape {tuple(stored[name].shape)}", "none")
    model.load_state_dict(loaded, strict=False)
    model.missing_weights = []
    model.unused_weights = sorted(name for name in stored if never.match(name))


def published_name(name: str, names: tuple[tuple[str, str], ...]) -> str:
    """What one of our tensors is called in the published network. ValueError where no pattern matches."""
    for ours, theirs in names:
        found = re.match(ours, name)
        if found:
            return theirs.format(*(int(group) + 1 for group in found.groups())) + name[found.end() :]
    raise ValueError(f"{name}: found no published name, expected one for each tensor of the network")
