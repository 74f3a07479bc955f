"""One picture with what is known of it, and the checked readers that both data sets share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors

IGNORE = 255
TRUTHS = ("mask", "instances", "parts", "contexts")  # the optional fields of a Sample


@dataclass
class Sample:
    """One picture and what is known of it.

    Raises ValueError when a mask has not the picture's height and width.
    """

    name: str
    image: tv_tensors.Image  # uint8 (3, H, W)
    labels: torch.Tensor  # float32 multi-hot (C,), C without background
    mask: tv_tensors.Mask | None = None  # uint8 (H, W): 0 background, 1..C, 255 ignore
    instances: tv_tensors.Mask | None = None  # uint8 (H, W): 0 background, 1..k, 255 border
    parts: tv_tensors.Mask | None = None  # uint8 (H, W): drawn data only: 0 none, else part id
    contexts: tv_tensors.Mask | None = None  # uint8 (H, W): drawn data only: 0 under objects, else kind
    saliency: tv_tensors.Image | None = None  # uint8 (1, H, W), 255 stands out: no truth, another model's opinion

    def __post_init__(self) -> None:
        size = tuple(self.image.shape[-2:])
        for field, truth in self.truths().items():
            if tuple(truth.shape) != size:
                shape = tuple(truth.shape)
                raise ValueError(f"sample {self.name}: {field} has shape {shape}, the picture {size}")
        if self.saliency is not None and tuple(self.saliency.shape) != (1, *size):
            shape = tuple(self.saliency.shape)
            raise ValueError(f"sample {self.name}: saliency has shape {shape}, expected {(1, *size)}")

    def truths(self) -> dict[str, tv_tensors.Mask]:
        """The masks this sample has, by field name."""
        return {field: value for field in TRUTHS if (value := getattr(self, field)) is not None}


def read_image(path: str | Path) -> tv_tensors.Image:
    """Read a picture of any mode as RGB: uint8 (3, H, W), as stored (an EXIF rotation is not applied,
    for masks and boxes refer to the stored pixels).

    Raises FileNotFoundError (no such file) and ValueError (truncated, corrupt or not a picture).
    """
    pixels = _open(path, lambda picture: picture.convert("RGB"))
    # (H, W, 3) -> (3, H, W)
    return tv_tensors.Image(torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous())


def read_grey(path: str | Path) -> torch.Tensor:
    """Read a grey map, 8 bits in a file of any mode: uint8 (1, H, W). Errors as `read_image`; ValueError for colours."""
    channels = read_image(path)  # (3, H, W)
    if not (channels == channels[:1]).all():
        raise ValueError(f"{path}: found colours, expected a grey map, 0..255")
    return channels[:1]


def read_mask(
    path: str | Path,
    num_classes: int | None = None,
    size: Sequence[int] | None = None,
    picture: str | Path | None = None,
) -> tv_tensors.Mask:
    """Read an 8-bit PNG, palette or grayscale, as indices: uint8 (H, W).

    num_classes: when given, only 0..num_classes and 255 (ignore) may occur.
    size: (height, width) that the mask must have; `picture` names the file it was taken from.
    Raises FileNotFoundError, and ValueError that names the file, what was found and what was expected.
    """
    pixels = _open(path, lambda picture: picture.copy())
    # An RGB mask would need a guess at its palette, and a guess can be silently wrong.
    if pixels.mode not in ("P", "L"):
        raise ValueError(f"{path}: mask has mode {pixels.mode}, expected 8-bit palette (P) or grayscale (L)")
    indices = np.array(pixels)
    if size is not None and indices.shape != tuple(size):
        of = "its picture" if picture is None else f"its picture {picture}"
        raise ValueError(
            f"{path}: mask is {indices.shape[0]} x {indices.shape[1]} (height x width), "
            f"{of} is {size[0]} x {size[1]}"
        )
    if num_classes is not None:
        values = np.flatnonzero(np.bincount(indices.ravel(), minlength=256))
        wrong = [int(v) for v in values if num_classes < v < IGNORE]
        if wrong:
            raise ValueError(f"{path}: mask values: found {wrong}, expected 0..{num_classes} or {IGNORE}")
    return tv_tensors.Mask(torch.from_numpy(indices))


def multi_hot(indices: Iterable[int], num_classes: int) -> torch.Tensor:
    """Class indices 0..C-1 (background not counted, repeats allowed) -> float32 (C,) of zeros and ones.

    Raises ValueError for an index outside the range.
    """
    labels = torch.zeros(num_classes)
    for index in indices:
        # Negative indices would otherwise count from the end.
        if not 0 <= index < num_classes:
            raise ValueError(f"class index: found {index}, expected 0..{num_classes - 1}")
        labels[index] = 1.0
    return labels


def check_truth(truth: str | Iterable[str], known: Sequence[str]) -> tuple[str, ...]:
    """The truths asked for as a tuple of names; ValueError for a name that is not in `known`."""
    names = (truth,) if isinstance(truth, str) else tuple(truth)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"truth: found {unknown}, expected any of {list(known)}")
    return names


def check_unique(values: Iterable, where: str) -> None:
    """ValueError that begins with `where` and lists (at most ten of) the values that occur more than once."""
    seen, repeated = set(), {}
    for value in values:
        if value in seen:
            repeated[value] = None
        seen.add(value)
    if repeated:
        shown = ", ".join(str(value) for value in list(repeated)[:10])
        more = f" and {len(repeated) - 10} more" if len(repeated) > 10 else ""
        raise ValueError(f"{where}: found duplicate ids {shown}{more}, expected each once")


def _open(path: str | Path, load) -> Image.Image:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        # PIL decodes lazily, so `load` has to run in here for truncation to show.
        with Image.open(path) as picture:
            return load(picture)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as a picture: {error}") from error
