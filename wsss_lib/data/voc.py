"""PASCAL VOC 2012 segmentation (and every data set in its layout) with image-level labels.

Everingham et al., The PASCAL Visual Object Classes Challenge 2012,
http://host.robots.ox.ac.uk/pascal/VOC/voc2012/
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from .sample import TRUTHS, Sample, check_truth, check_unique, multi_hot, read_image, read_mask

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person",
    "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

_FOLDERS = {
    "mask": "SegmentationClass",
    "instances": "SegmentationObject",
    "parts": "SegmentationPart",
    "contexts": "SegmentationContext",
}
_LISTS = "ImageSets/Segmentation"


def voc_palette() -> np.ndarray:
    """The colours of VOC's masks: uint8 (256, 3).

    The bits of an index are dealt in turn to red, green and blue, the lowest three to the highest bit of
    each, so that near indices get far colours. 0 is black, 255 is (224, 224, 192).
    """
    index = np.arange(256)
    palette = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        channel, depth = bit % 3, bit // 3
        palette[:, channel] |= ((index >> bit & 1) << (7 - depth)).astype(np.uint8)
    return palette


def encode_mask(mask: np.ndarray) -> bytes:
    """(H, W) uint8 -> PNG bytes with VOC's palette."""
    image = Image.fromarray(mask, "L")
    image.putpalette(voc_palette().tobytes())       # mode L -> P, the indices stay
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


class VOC(Dataset):
    """Pictures of a VOC tree with their image-level labels, and masks only where asked for.

    root: a folder that has JPEGImages, or whose VOC2012 or VOCdevkit/VOC2012 has it.
    split: a list in ImageSets/Segmentation (train, val, trainval; train_aug after `build_train_aug`).
    truth: what to open beyond picture and labels, any of "mask", "instances", "parts", "contexts"
        (SegmentationClass, -Object, -Part, -Context). Nothing by default: training from image-level labels
        opens no mask file. The masks of train_aug are looked for in SegmentationClassAug.

    Attributes: root (the folder that has JPEGImages), split, truth, names (list of N), labels (float32
    (N, C)), classes, num_classes (C = 20). Item i is a `Sample`.
    Labels are the `object/name` of Annotations/*.xml, difficult objects kept.

    Raises FileNotFoundError (root, picture, mask, annotation) and ValueError (unknown split or truth; list
    empty or with duplicate ids; annotation malformed, without objects or with an unknown class; mask of
    another size than its picture or with values other than 0..20 and 255). Annotations, pictures and masks
    are checked when they are read.
    """

    classes = VOC_CLASSES
    num_classes = len(VOC_CLASSES)

    def __init__(self, root: str | Path, split: str = "train", truth: str | Iterable[str] = ()) -> None:
        self.root = _find_root(root)
        self.split = split
        self.truth = check_truth(truth, TRUTHS)
        self.names = _read_list(_split_file(self.root, split))
        self._labels: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Sample:
        image = read_image(self.image_path(i))
        truths = {
            field: read_mask(
                self._mask_path(field, i),
                # Only class masks have a known range: instances, parts and contexts number what they like.
                num_classes=self.num_classes if field == "mask" else None,
                size=image.shape[-2:],
                picture=self.image_path(i),
            )
            for field in self.truth
        }
        # One small file, rather than `self.labels`: a loader's fresh worker must not parse all N of them.
        labels = self._read_labels(i) if self._labels is None else self._labels[i].clone()
        return Sample(self.names[i], image, labels, **truths)

    @property
    def labels(self) -> torch.Tensor:
        """Multi-hot labels of all pictures, float32 (N, C); read once, then kept in memory."""
        if self._labels is None:
            self._labels = torch.stack([self._read_labels(i) for i in range(len(self))])
        return self._labels

    def image_path(self, i: int) -> Path:
        """The JPEG of picture i."""
        return self.root / "JPEGImages" / f"{self.names[i]}.jpg"

    def _mask_path(self, field: str, i: int) -> Path:
        folder = _FOLDERS[field]
        if field == "mask" and self.split == "train_aug":
            folder = "SegmentationClassAug"
        return self.root / folder / f"{self.names[i]}.png"

    def _read_labels(self, i: int) -> torch.Tensor:
        """Multi-hot (C,) from the annotation of picture i."""
        file = self.root / "Annotations" / f"{self.names[i]}.xml"
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such annotation")
        try:
            objects = ElementTree.parse(file).getroot().findall("object")
        except ElementTree.ParseError as error:
            raise ValueError(f"{file}: malformed XML: {error}") from error
        if not objects:
            raise ValueError(f"{file}: field object: found none, expected at least one")
        # Only the name directly below object: person annotations have further names below object/part.
        names = [(item.findtext("name") or "").strip() for item in objects]
        unknown = sorted(set(names) - set(self.classes))
        if unknown:
            expected = list(self.classes)
            raise ValueError(f"{file}: field object/name: found {unknown}, expected one of {expected}")
        return multi_hot([self.classes.index(name) for name in names], self.num_classes)


def build_train_aug(voc_root: str | Path, sbd_root: str | Path, expected: int = 10_582) -> Path:
    """Write ImageSets/Segmentation/train_aug.txt, the usual "augmented" training list, and return its path.

    The list is sorted((SBD train + SBD val + VOC train) - VOC val): 10,582 pictures. All of them are
    pictures of VOC 2012 and have an XML annotation there, so training from image-level labels needs of SBD
    only its two lists and no mask. SBD (Hariharan et al., Semantic Contours from Inverse Detectors,
    ICCV 2011) is benchmark.tgz from http://home.bharathh.info/pubs/codes/SBD/download.html. Its own masks
    are .mat files; PNG masks converted from them belong in SegmentationClassAug, and are read with
    truth="mask" only.

    sbd_root: the folder with train.txt and val.txt, or one whose `dataset` or `benchmark_RELEASE/dataset` is.
    expected: the number of pictures that must come out.
    Raises FileNotFoundError (an SBD list is missing) and ValueError (a VOC list is missing, a list is empty
    or has duplicates, the number is wrong).
    """
    root = _find_root(voc_root)
    candidates = [Path(sbd_root) / below for below in ("", "dataset", "benchmark_RELEASE/dataset")]
    sbd = next((c for c in candidates if (c / "train.txt").is_file() and (c / "val.txt").is_file()), None)
    if sbd is None:
        looked_in = _listing(candidates)
        raise FileNotFoundError(f"{sbd_root}: no SBD lists: looked for train.txt and val.txt in {looked_in}")
    sources = {
        "SBD train": _read_list(sbd / "train.txt"),
        "SBD val": _read_list(sbd / "val.txt"),
        "VOC train": _read_list(_split_file(root, "train")),
        "VOC val": _read_list(_split_file(root, "val")),
    }
    union = {name for source in ("SBD train", "SBD val", "VOC train") for name in sources[source]}
    names = sorted(union - set(sources["VOC val"]))
    target = root / _LISTS / "train_aug.txt"
    if len(names) != expected:
        sizes = ", ".join(f"{source} {len(ids)}" for source, ids in sources.items())
        raise ValueError(f"{target}: found {len(names)} pictures, expected {expected}; lists: {sizes}")
    # Renamed when complete, so that a killed run leaves no half list behind.
    temporary = target.with_suffix(".txt.tmp")
    temporary.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    os.replace(temporary, target)
    return target


def _find_root(root: str | Path) -> Path:
    candidates = [Path(root) / below for below in ("", "VOC2012", "VOCdevkit/VOC2012")]
    for candidate in candidates:
        if (candidate / "JPEGImages").is_dir():
            return candidate
    looked_for = [candidate / "JPEGImages" for candidate in candidates]
    raise FileNotFoundError(f"{root}: no VOC tree: looked for {_listing(looked_for)}")


def _split_file(root: Path, split: str) -> Path:
    available = sorted(file.stem for file in (root / _LISTS).glob("*.txt"))
    if split not in available:
        hint = "; write it with build_train_aug" if split == "train_aug" else ""
        raise ValueError(f"{root / _LISTS}: split: found {split!r}, expected one of {available}{hint}")
    return root / _LISTS / f"{split}.txt"


def _read_list(file: Path) -> list[str]:
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    names = [line for line in lines if line]
    if not names:
        raise ValueError(f"{file}: found an empty list, expected one picture id a line")
    # Some published lists hold two paths a line: those would only fail later, as missing pictures.
    strange = [name for name in names if len(name.split()) > 1 or "/" in name]
    if strange:
        raise ValueError(f"{file}: found the line {strange[0]!r}, expected one picture id a line")
    check_unique(names, str(file))
    return names


def _listing(paths: Iterable[Path]) -> str:
    return ", ".join(str(path) for path in paths)
