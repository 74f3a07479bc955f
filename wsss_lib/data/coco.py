"""MS COCO 2014 as a segmentation data set with image-level labels.

Lin et al., Microsoft COCO: Common Objects in Context, ECCV 2014, https://cocodataset.org
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import Dataset
from torchvision import tv_tensors

from .sample import IGNORE, Sample, check_truth, check_unique, read_image

COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard",
    "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase",
    "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip

# Category ids run 1..90 with ten gaps; our classes run 1..80 in the same order.
_UNUSED_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
_CLASS_OF_ID = {k: c for c, k in enumerate((k for k in range(1, 91) if k not in _UNUSED_IDS), start=1)}


class _Annotation(NamedTuple):
    number: Any  # the annotation's id, for messages
    category: int  # 1..80
    area: float  # pixels
    crowd: bool
    segmentation: list[np.ndarray] | dict  # polygons, each float32 (2 * points,) x0 y0 x1 y1 ..., or an RLE


class COCO(Dataset):
    """Pictures of COCO 2014 with their image-level labels, and masks only where asked for.

    root: has train2014/, val2014/ and annotations/instances_{train,val}2014.json.
    split: "train" or "val". Pictures are in the order of their ids.
    truth: any of "mask", "instances"; nothing by default, and then no segmentation is kept in memory.
    crowd: what a crowd region is in the mask where no single instance covers it: "ignore" (255) or "class"
        (the class, underneath all instances). In `instances` it is 255 in both cases, for it is not one.

    The labels are the set of category_id of a picture. Crowd regions count: their class is visible.
    Pictures without any annotation (train 82,783 -> 82,081; val 40,504 -> 40,137) have no label to learn
    from: they are left out of `names` and listed in `unlabelled`.

    Masks are drawn from larger to smaller area, so that the smaller instance is on top. Instances are
    numbered in that order; one that is wholly covered leaves its number unused.

    Attributes: root, split, truth, crowd, names (list of N), unlabelled (list), labels (float32 (N, C)),
    classes, num_classes (C = 80). Item i is a `Sample`.

    Raises FileNotFoundError (JSON, pictures) and ValueError (unknown split, truth or crowd; JSON invalid or
    without a field; unknown category_id or image_id; duplicate image ids; malformed polygon or RLE; picture
    of another size than the JSON says). RLEs and pictures are checked when they are read.
    """

    classes = COCO_CLASSES
    num_classes = len(COCO_CLASSES)

    def __init__(
        self, root: str | Path, split: str = "train", truth: str | Iterable[str] = (), crowd: str = "ignore"
    ) -> None:
        if split not in ("train", "val"):
            raise ValueError(f"{root}: split: found {split!r}, expected one of ['train', 'val']")
        if crowd not in ("ignore", "class"):
            raise ValueError(f"crowd: found {crowd!r}, expected 'ignore' or 'class'")
        self.root, self.split, self.crowd = Path(root), split, crowd
        self.truth = check_truth(truth, ("mask", "instances"))
        self.file = self.root / "annotations" / f"instances_{split}2014.json"
        self._pictures = self.root / f"{split}2014"
        content = _load(self.file)

        sizes: dict[Any, tuple[int, int]] = {}
        files: dict[Any, str] = {}
        images = content["images"]
        ids = [_field(self.file, f"images[{n}]", record, "id") for n, record in enumerate(images)]
        check_unique(ids, f"{self.file}: field images/id")
        for n, (key, record) in enumerate(zip(ids, images)):
            where = f"images[{n}]"
            files[key] = _field(self.file, where, record, "file_name")
            height, width = (_field(self.file, where, record, side) for side in ("height", "width"))
            sizes[key] = (height, width)

        found: dict[Any, list[_Annotation]] = {}
        for n, record in enumerate(content["annotations"]):
            key = _field(self.file, f"annotations[{n}]", record, "image_id")
            if key not in files:
                raise ValueError(
                    f"{self.file}: annotations[{n}], field image_id: found {key!r}, expected an id in images"
                )
            found.setdefault(key, []).append(self._annotation(n, record))

        kept = sorted(key for key in files if key in found)
        if not kept:
            raise ValueError(f"{self.file}: field annotations: found none, expected at least one")
        self._files = [files[key] for key in kept]
        self._sizes = [sizes[key] for key in kept]
        self._annotations = [found[key] for key in kept] if self.truth else []
        self.names = [Path(file).stem for file in self._files]
        self.unlabelled = [Path(files[key]).stem for key in sorted(files.keys() - found.keys())]
        self.labels = torch.zeros(len(kept), self.num_classes)
        for i, key in enumerate(kept):
            self.labels[i, [a.category - 1 for a in found[key]]] = 1.0

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Sample:
        image = read_image(self.image_path(i))
        truths = {}
        if self.truth:
            size = tuple(image.shape[-2:])
            if size != self._sizes[i]:
                height, width = self._sizes[i]
                raise ValueError(
                    f"{self.image_path(i)}: picture is {size[0]} x {size[1]} (height x width), "
                    f"fields height and width in {self.file} say {height} x {width}"
                )
            mask, instances = self._draw(i)
            truths = {field: {"mask": mask, "instances": instances}[field] for field in self.truth}
        return Sample(self.names[i], image, self.labels[i].clone(), **truths)

    def image_path(self, i: int) -> Path:
        """The JPEG of picture i."""
        return self._pictures / self._files[i]

    def _annotation(self, n: int, record: Any) -> _Annotation:
        where = f"annotations[{n}]"
        category = _field(self.file, where, record, "category_id")
        if category not in _CLASS_OF_ID:
            raise ValueError(
                f"{self.file}: {where}, field category_id: found {category!r}, "
                f"expected 1..90 without {sorted(_UNUSED_IDS)}"
            )
        number = record.get("id", n)
        if not self.truth:
            return _Annotation(number, _CLASS_OF_ID[category], 0.0, False, [])
        segmentation = _field(self.file, where, record, "segmentation")
        if not isinstance(segmentation, dict):
            try:
                segmentation = _polygons(segmentation)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{self.file}: annotation {number}, field segmentation: {error}") from error
        area, crowd = float(_field(self.file, where, record, "area")), bool(record.get("iscrowd", 0))
        return _Annotation(number, _CLASS_OF_ID[category], area, crowd, segmentation)

    def _draw(self, i: int) -> tuple[tv_tensors.Mask, tv_tensors.Mask]:
        """Class mask and instance mask of picture i, each uint8 (H, W)."""
        size = self._sizes[i]
        mask, instances = np.zeros(size, dtype=np.uint8), np.zeros(size, dtype=np.uint8)
        count = 0
        for a in sorted(self._annotations[i], key=lambda a: (not a.crowd, -a.area)):
            try:
                region = _region(a.segmentation, *size)
            except (TypeError, ValueError) as error:
                where = f"annotation {a.number}, field segmentation"
                raise ValueError(f"{self.file}: {where}: {error}") from error
            count += not a.crowd
            if count >= IGNORE:
                raise ValueError(f"{self.file}: picture {self.names[i]}: found over 254 instances")
            mask[region] = IGNORE if a.crowd and self.crowd == "ignore" else a.category
            instances[region] = IGNORE if a.crowd else count
        return tv_tensors.Mask(torch.from_numpy(mask)), tv_tensors.Mask(torch.from_numpy(instances))


def rle_counts(text: str | bytes) -> list[int]:
    """The run lengths in COCO's compressed string.

    A number is written in groups of five bits, lowest first, each as the character 48 + group, + 32 while
    more follow; bit 4 of its last group is the sign. From the fourth run on the number is the difference to
    the run two before it (the one of the same colour). Raises ValueError for a character outside the code
    or a string that ends within a number.
    """
    counts: list[int] = []
    value, shift = 0, 0
    for byte in text.encode() if isinstance(text, str) else text:
        group = byte - 48
        if not 0 <= group < 64:
            raise ValueError(f"RLE counts: found the character {chr(byte)!r}, expected '0' to 'o'")
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value, shift = 0, 0
    if shift:
        raise ValueError("RLE counts: found a string that ends within a number, expected it complete")
    return counts


def rle_mask(counts: Sequence[int] | str | bytes, height: int, width: int) -> np.ndarray:
    """Run lengths -> bool (height, width). Runs go down the columns and begin with the outside.

    counts: the uncompressed list or the compressed string.
    Raises ValueError when a run is negative or the runs do not add up to height * width.
    """
    runs = rle_counts(counts) if isinstance(counts, (str, bytes)) else list(counts)
    if any(run < 0 for run in runs):
        raise ValueError(f"RLE counts: found a run of {min(runs)}, expected none below 0")
    if sum(runs) != height * width:
        raise ValueError(f"RLE counts: found a sum of {sum(runs)}, expected {height} x {width}")
    inside = np.arange(len(runs)) % 2 == 1
    return np.repeat(inside, runs).reshape(height, width, order="F")


def polygon_mask(polygons: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """Union of filled polygons -> bool (height, width).

    polygons: each (2 * points,) as x0, y0, x1, y1 ... in pixels; pixel i covers i to i + 1.
    A pixel is inside when its centre is, found by drawing at five times the size with PIL.ImageDraw (whose
    integer polygons include their outline) and keeping every fifth pixel. At borders this can differ from
    pycocotools by a pixel, and a polygon that holds no pixel centre comes out empty.
    """
    fine = 5  # odd, so that one fine pixel lies on the centre of each pixel
    region = np.zeros((height, width), dtype=bool)
    for polygon in polygons:
        points = polygon.reshape(-1, 2)  # (2 * points,) -> (points, 2) of x, y
        x0, y0 = np.clip(np.floor(points.min(0)), 0, (width, height)).astype(int)
        x1, y1 = np.clip(np.ceil(points.max(0)), 0, (width, height)).astype(int)
        if x1 <= x0 or y1 <= y0:
            continue
        canvas = Image.new("L", (int(x1 - x0) * fine, int(y1 - y0) * fine))
        vertices = np.floor((points - (x0, y0)) * fine).astype(int)
        ImageDraw.Draw(canvas).polygon([(int(x), int(y)) for x, y in vertices], fill=1)
        region[y0:y1, x0:x1] |= np.asarray(canvas)[fine // 2 :: fine, fine // 2 :: fine] > 0
    return region


def _region(segmentation: list[np.ndarray] | dict, height: int, width: int) -> np.ndarray:
    if not isinstance(segmentation, dict):
        return polygon_mask(segmentation, height, width)
    if list(segmentation.get("size", ())) != [height, width]:
        raise ValueError(f"RLE size: found {segmentation.get('size')}, expected {[height, width]}")
    counts = segmentation.get("counts")
    if not isinstance(counts, (list, str)):
        raise ValueError(f"RLE counts: found {type(counts).__name__}, expected a list or string")
    return rle_mask(counts, height, width)


def _polygons(parts: Any) -> list[np.ndarray]:
    # Arrays: the numbers of train2014 as lists of Python floats would take gigabytes.
    polygons = [np.asarray(part, dtype=np.float32) for part in parts]
    if not polygons:
        raise ValueError("found no polygon, expected at least one")
    for polygon in polygons:
        if polygon.ndim != 1 or polygon.size < 6 or polygon.size % 2 or not np.isfinite(polygon).all():
            raise ValueError(f"found a polygon of {polygon.size} numbers, expected x, y of 3 or more points")
    return polygons


def _load(file: Path) -> dict:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such annotation file")
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    for name in ("images", "annotations"):
        found = content.get(name) if isinstance(content, dict) else None
        if not isinstance(found, list):
            raise ValueError(f"{file}: field {name}: found {type(found).__name__}, expected a list")
    return content


def _field(file: Path, where: str, record: Any, name: str) -> Any:
    if not isinstance(record, dict) or name not in record:
        raise ValueError(f"{file}: {where}, field {name}: found none, expected a value")
    return record[name]
