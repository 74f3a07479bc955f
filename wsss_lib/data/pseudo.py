"""Pictures with what other models say of them: pseudo labels in place of truths, saliency maps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch.utils.data import Dataset
from torchvision import tv_tensors

from .sample import Sample, read_grey, read_mask


class _WithFolder(Dataset):
    """A data set and a folder with a file NAME.png for each of its pictures."""

    def __init__(self, data: Dataset, folder: str | Path) -> None:
        self.data, self.folder = data, Path(folder)
        self.names, self.labels, self.num_classes = data.names, data.labels, data.num_classes
        self.split = data.split
        missing = [name for name in self.names if not self._path(name).is_file()]
        if missing:
            raise FileNotFoundError(f"{self.folder}: found no {missing[0]}.png, nor those of {len(missing) - 1} other "
                                    f"pictures, expected {len(self.names)} {self.kind}")

    def __len__(self) -> int:
        return len(self.names)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.png"


class PseudoLabelled(_WithFolder):
    """A data set whose masks are those of a folder, NAME.png for the picture called NAME.

    data: a `VOC` or `COCO` data set; its own truths are not opened where it was made without `truth`.
    folder: 8-bit PNGs as `reports.write_pseudo_labels` writes them: 0 background, 1..C classes, 255 ignored.

    Attributes: names, labels, num_classes and split, those of the data. Raises FileNotFoundError, when it is
    made, for a picture without a file; ValueError, when they are read, for masks of another size or with other
    values.
    """

    kind = "pseudo labels"

    def __getitem__(self, i: int) -> Sample:
        sample = self.data[i]
        size = sample.image.shape[-2:]
        return replace(sample, mask=read_mask(self._path(sample.name), self.num_classes, size, sample.name))


class WithSaliency(_WithFolder):
    """A data set whose pictures have the saliency maps of a folder, NAME.png in grey for the picture called NAME.

    Attributes and errors as of `PseudoLabelled`.
    """

    kind = "saliency maps"

    def __getitem__(self, i: int) -> Sample:
        sample = self.data[i]
        path, size = self._path(sample.name), tuple(sample.image.shape[-2:])
        grey = read_grey(path)  # (1, H, W)
        if tuple(grey.shape[-2:]) != size:
            found = tuple(grey.shape[-2:])
            raise ValueError(f"{path}: found {found} (height, width), expected {size}, the picture's")
        return replace(sample, saliency=tv_tensors.Image(grey))
