"""Write ToyVOC to disk as a VOC tree, in parallel, resumably, byte for byte the same each time."""
from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ..voc import VOC_CLASSES, encode_mask
from .scenes import BIAS, SIZE, ToySample, draw_sample

FOLDERS = {"mask": "SegmentationClass", "instances": "SegmentationObject", "parts": "SegmentationPart",
           "contexts": "SegmentationContext"}
LISTS = "ImageSets/Segmentation"
MANIFEST = "toyvoc.json"
OCCLUDED = .15      # VOC calls an object occluded when a considerable part is hidden; here: this share or more


def sample_name(split: str, index: int) -> str:
    """The name of a sample's files, without their endings."""
    return f"toy_{split}_{index:06d}"


def build_toyvoc(root: str | Path, train: int = 6000, val: int = 500, single: int = 16000, seed: int = 0,
                 bias: float = BIAS, processes: int | None = None, progress: bool = True) -> Path:
    """Draw a ToyVOC tree under `root` and return `root`.

    train, val, single: number of scenes, scenes and single-object pictures (split lists of those names).
    seed, bias: see `draw_sample`; sample i has the same bytes whatever `processes` is.
    An interrupted build goes on where it stopped, and a larger one extends a smaller one: what is there is kept.

    Raises ValueError if `root` holds a tree of another seed, bias or size (two seeds are never mixed), or is a
    folder with other things in it; and for negative counts.
    """
    root, counts = Path(root), {"train": train, "val": val, "single": single}
    if min(counts.values()) < 0:
        raise ValueError(f"train, val, single: found {train}, {val}, {single}, expected 0 or more")
    _claim(root, {"generator": 1, "seed": seed, "bias": bias, "size": SIZE})
    for folder in ("JPEGImages", "Annotations", LISTS, *FOLDERS.values()):
        (root / folder).mkdir(parents=True, exist_ok=True)
    todo = [(split, i) for split, count in counts.items() for i in range(count)
            if not _annotation(root, sample_name(split, i)).exists()]
    write = partial(_write_sample, root, seed, bias)
    with tqdm(total=len(todo), desc="ToyVOC", unit="picture", disable=not progress or not todo) as bar:
        for _ in _parallel(write, todo, processes or os.cpu_count() or 1):
            bar.update()
    for split, count in counts.items():
        if count:
            lines = "".join(f"{sample_name(split, i)}\n" for i in range(count))
            _replace(root / LISTS / f"{split}.txt", lines.encode())
    return root


def _parallel(write, todo: list, processes: int) -> Iterator[None]:
    if processes == 1 or len(todo) < 64:
        yield from map(write, todo)
    else:
        with ProcessPoolExecutor(processes) as pool:
            yield from pool.map(write, todo, chunksize=16)


def _claim(root: Path, manifest: dict) -> None:
    """Write the manifest into a new tree, or check that the one there says the same."""
    path = root / MANIFEST
    if path.exists():
        found = json.loads(path.read_text())
        for field, expected in manifest.items():
            if found.get(field) != expected:
                raise ValueError(f"{path}: {field}: found {found.get(field)!r}, expected {expected!r}; a tree holds one "
                                 f"{field} only, choose another root")
    elif root.exists() and any(root.iterdir()):
        raise ValueError(f"{root}: holds files but no {MANIFEST}; choose an empty or new folder")
    else:
        root.mkdir(parents=True, exist_ok=True)
        _replace(path, (json.dumps(manifest, indent=1) + "\n").encode())


def _annotation(root: Path, name: str) -> Path:
    return root / "Annotations" / f"{name}.xml"


def _replace(path: Path, content: bytes) -> None:
    """Write to a temporary file and rename: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _write_sample(root: Path, seed: int, bias: float, which: tuple[str, int]) -> None:
    """All files of one sample; the annotation comes last, so its presence says that the sample is complete."""
    sample, name = draw_sample(seed, *which, bias=bias), sample_name(*which)
    _replace(root / "JPEGImages" / f"{name}.jpg", encode_jpeg(sample.image))
    for field, folder in FOLDERS.items():
        _replace(root / folder / f"{name}.png", encode_mask(getattr(sample, field)))
    _replace(_annotation(root, name), annotation(sample, name))


def encode_jpeg(image: np.ndarray) -> bytes:
    """(H, W, 3) uint8 -> JPEG bytes, colours at full resolution (half-resolution colours show at this size)."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=88, subsampling=0)
    return out.getvalue()


def annotation(sample: ToySample, name: str) -> bytes:
    """VOC's XML: boxes are 1-based and inclusive."""
    top = ElementTree.Element("annotation")

    def add(parent: ElementTree.Element, tag: str, text: object = "") -> ElementTree.Element:
        child = ElementTree.SubElement(parent, tag)
        child.text = str(text)
        return child

    add(top, "folder", "ToyVOC")
    add(top, "filename", f"{name}.jpg")
    size = add(top, "size")
    for tag, value in zip(("width", "height", "depth"), (*sample.mask.shape[::-1], 3)):
        add(size, tag, value)
    add(top, "segmented", 1)
    add(top, "context", sample.context)
    for found in sample.objects:
        item = add(top, "object")
        add(item, "name", found.name)
        add(item, "truncated", int(found.truncated))
        add(item, "occluded", int(found.occluded >= OCCLUDED))
        add(item, "difficult", 0)
        box = add(item, "bndbox")
        for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), found.box):
            add(box, tag, value + 1)
    ElementTree.indent(top)
    return ElementTree.tostring(top) + b"\n"


def statistics(root: str | Path, split: str) -> dict:
    """What a split holds, read from its annotations: pictures, objects and classes per picture, share of occluded and
    truncated objects, pictures per class, pictures per context."""
    names = (Path(root) / LISTS / f"{split}.txt").read_text().split()
    objects, flags, classes, contexts, kinds = 0, Counter(), Counter(), Counter(), 0
    for name in names:
        top = ElementTree.parse(_annotation(Path(root), name)).getroot()
        found = top.findall("object")
        present = {item.findtext("name") for item in found}
        objects, kinds = objects + len(found), kinds + len(present)
        flags.update(flag for item in found for flag in ("occluded", "truncated") if item.findtext(flag) == "1")
        classes.update(present)
        contexts[top.findtext("context")] += 1
    return {"pictures": len(names), "objects_per_picture": round(objects / len(names), 3),
            "classes_per_picture": round(kinds / len(names), 3),
            "occluded_share": round(flags["occluded"] / objects, 3),
            "truncated_share": round(flags["truncated"] / objects, 3),
            "pictures_per_class": {c: classes[c] for c in VOC_CLASSES}, "pictures_per_context": dict(sorted(contexts.items()))}
