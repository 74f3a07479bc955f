"""Tiny VOC and COCO trees for the tests of the readers."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

HEIGHT, WIDTH = 6, 8
VOC_NAMES = ["2007_000001", "2007_000002", "2007_000003"]
VOC_OBJECTS = {"2007_000001": ["dog", "dog", "person"], "2007_000002": ["tvmonitor"], "2007_000003": ["cat"]}


def message(error: type[Exception], call) -> str:
    """What `call` says when it raises `error`."""
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def write_picture(path: Path, height: int = HEIGHT, width: int = WIDTH, mode: str = "RGB") -> Path:
    """A picture with some texture, so that a JPEG of it has bytes to lose."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).convert(mode).save(path)
    return path


def write_mask(path: Path, indices, palette: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.fromarray(np.asarray(indices, dtype=np.uint8))
    if palette:
        # Palette colours that differ from the indices: a reader that reads colours shows itself.
        mask.putpalette([(7 * k + 3) % 256 for k in range(768)])
    mask.save(path)
    return path


def write_annotation(path: Path, objects: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    items = "".join(
        f"<object><name>{name}</name><difficult>{n % 2}</difficult><part><name>head</name></part></object>"
        for n, name in enumerate(objects)
    )
    path.write_text(f"<annotation>{items}</annotation>")
    return path


def write_split(root: Path, split: str, names: list[str]) -> Path:
    path = root / "ImageSets/Segmentation" / f"{split}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))
    return path


def voc_mask(name: str) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[1:4, 2:5] = {"2007_000001": 12, "2007_000002": 20, "2007_000003": 8}[name]
    mask[0, 0] = 255
    return mask


def voc_tree(root: Path) -> Path:
    """Three pictures, split train, all four kinds of masks."""
    for name in VOC_NAMES:
        write_picture(root / "JPEGImages" / f"{name}.jpg")
        write_annotation(root / "Annotations" / f"{name}.xml", VOC_OBJECTS[name])
        write_mask(root / "SegmentationClass" / f"{name}.png", voc_mask(name))
        for kind, value in (("Object", 41), ("Part", 77), ("Context", 99)):
            write_mask(root / f"Segmentation{kind}" / f"{name}.png", np.full((HEIGHT, WIDTH), value))
    write_split(root, "train", VOC_NAMES)
    return root


def box(x0: float, y0: float, x1: float, y1: float) -> list[float]:
    """A rectangle as a COCO polygon."""
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def annotation(number: int, image_id: int, category: int, segmentation, area: float, crowd: int = 0) -> dict:
    return {
        "id": number, "image_id": image_id, "category_id": category, "segmentation": segmentation,
        "area": area, "iscrowd": crowd,
    }  # fmt: skip


def coco_content() -> dict:
    """Picture 3: person with a smaller toothbrush on top, and a crowd of persons. 1: dog. 2: nothing."""
    files = {k: f"COCO_train2014_{k:012d}.jpg" for k in (3, 1, 2)}
    images = [{"id": k, "file_name": file, "height": HEIGHT, "width": WIDTH} for k, file in files.items()]
    # Rows 4 and 5 of every column: 4 outside, then 2 inside, and so on.
    crowd = {"size": [HEIGHT, WIDTH], "counts": [4, 2] * WIDTH}
    annotations = [
        annotation(10, 3, 90, [box(2, 2, 4, 4)], 4.0),
        annotation(11, 3, 1, [box(1, 1, 5, 5)], 16.0),
        annotation(12, 3, 1, crowd, 16.0, crowd=1),
        annotation(13, 1, 18, [box(0, 0, 2, 2), box(6, 4, 8, 6)], 8.0),
    ]
    return {"images": images, "annotations": annotations}


def coco_tree(root: Path, content: dict | None = None, split: str = "train") -> Path:
    content = coco_content() if content is None else content
    file = root / f"annotations/instances_{split}2014.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    for image in content.get("images", []):
        write_picture(root / f"{split}2014" / image["file_name"])
    return root
