"""A whole sample: choose a context, place objects that stand somewhere, draw, and say what is visible."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from ..voc import VOC_CLASSES
from .backgrounds import CONTEXTS, Background, draw_background, noise
from .objects import COMPANIONS, OBJECTS
from .parts import SUPERSAMPLING, Pen

SIZE = 112
SPLITS = {"train": 0, "val": 1, "single": 2}     # part of the seed: the splits of one seed share no picture
BIAS = .9
MIN_PIXELS, MIN_SHARE = 40, .08                  # less of an object is visible: it loses its label

INDOOR_ON_TABLE = ("bottle", "pottedplant", "tvmonitor")


@dataclass(frozen=True)
class VisibleObject:
    """One labelled object: class name, box (x0, y0, x1, y1) in pixels, inclusive, of what is visible of it."""

    name: str
    box: tuple[int, int, int, int]
    truncated: bool        # touches the picture's edge
    occluded: float        # share of its drawn area hidden by nearer objects


@dataclass(frozen=True)
class ToySample:
    """A drawn picture with everything that is true of it. All arrays (S, S) uint8 but the image (S, S, 3).

    mask: 0 background, 1..20 class, 255 border and unlabelled remains. instances: 1.. in the order of `objects`.
    parts: PART_ID. contexts: CONTEXT_ID of background pixels, 0 elsewhere. labels: float32 (20,), exactly the classes
    in `mask`. context: one of CONTEXTS. hidden: names of drawn objects that are not visible enough to be labelled.
    """

    image: np.ndarray
    mask: np.ndarray
    instances: np.ndarray
    parts: np.ndarray
    contexts: np.ndarray
    labels: np.ndarray
    objects: tuple[VisibleObject, ...]
    context: str
    hidden: tuple[str, ...]


@dataclass
class _Placed:
    name: str
    x: float
    y: float
    size: float
    place: str             # ground, water, air or wall
    depth: float           # drawing order, far to near


def draw_sample(seed: int, split: str, index: int, bias: float = BIAS, size: int = SIZE) -> ToySample:
    """Draw sample `index` of a split: a pure function of its arguments.

    bias in [0, 1]: how strongly contexts and classes go together. With probability `bias` the first object is shown
    in one of its own contexts (a boat on water, a train on rails) and each further object is a usual companion there;
    otherwise context and companion are drawn uniformly. bias = 0 makes context and class independent, bias = 1 never
    shows a boat on land.

    Raises ValueError for an unknown split, a negative seed or index, or a bias outside [0, 1].
    """
    if split not in SPLITS:
        raise ValueError(f"split: found {split!r}, expected one of {', '.join(SPLITS)}")
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index: found {seed} and {index}, expected 0 or more")
    if not 0 <= bias <= 1:
        raise ValueError(f"bias: found {bias}, expected a number in [0, 1]")
    for attempt in range(100):                   # rarely, nothing is visible enough: draw again
        rng = np.random.default_rng([seed, SPLITS[split], index, attempt])
        sample = _draw(rng, split == "single", bias, size)
        if sample.objects:
            return sample
    raise RuntimeError(f"seed {seed}, {split} {index}: no visible object in 100 attempts")


def choose_classes(rng: np.random.Generator, single: bool, bias: float) -> tuple[str, list[str]]:
    """Context and class names of a scene (the first one decides the context)."""
    first = VOC_CLASSES[rng.integers(20)] if single or rng.random() < .85 else "person"
    own = OBJECTS[first].contexts if rng.random() < bias else CONTEXTS
    context, names = own[rng.integers(len(own))], [first]
    if not single:
        for _ in range(rng.choice(4, p=(.3, .35, .22, .13))):
            pool = COMPANIONS[context] if rng.random() < bias else VOC_CLASSES
            names.append(first if rng.random() < .2 else pool[rng.integers(len(pool))])
    return context, names


def _draw(rng: np.random.Generator, single: bool, bias: float, size: int) -> ToySample:
    context, names = choose_classes(rng, single, bias)
    places = [_choose_place(rng, name, context) for name in names]
    stage = draw_background(rng, context, size, land_needed="ground" in places)
    placed = [_position(rng, name, place, stage, size, single, len(names)) for name, place in zip(names, places)]
    _set_tables(rng, placed)
    placed.sort(key=lambda p: p.depth)

    canvas, ids = stage.canvas(), Image.new("I", (size * SUPERSAMPLING,) * 2, 0)
    drawn_area = []
    for k, p in enumerate(placed, 1):
        if p.place == "ground":
            _shadow(canvas, p)
        rotation = rng.normal(0, .2) if p.place == "air" else 0.
        pen = Pen(canvas, ids, k, rng, p.x, p.y, p.size, rotation, rng.random() < .5,
                  (rng.uniform(.88, 1.12), rng.uniform(.92, 1.08)))
        OBJECTS[p.name].draw(pen, p.place)
        drawn_area.append(np.count_nonzero((_at_sample_resolution(ids) >> 8) == k))
    codes = _at_sample_resolution(ids)
    order, parts = codes >> 8, (codes & 255).astype(np.uint8)
    image = _photograph(rng, np.asarray(canvas.reduce(SUPERSAMPLING), np.float32), order, len(placed))
    return _describe(image, order, parts, stage, placed, drawn_area, context)


def _at_sample_resolution(ids: Image.Image) -> np.ndarray:
    return np.asarray(ids)[SUPERSAMPLING // 2::SUPERSAMPLING, SUPERSAMPLING // 2::SUPERSAMPLING]


# ---------------------------------------------------------------------- placing
def _choose_place(rng: np.random.Generator, name: str, context: str) -> str:
    flies = rng.random()                         # drawn for every class, so the stream does not depend on the class
    if name == "boat" and context == "water":
        return "water"
    if name == "aeroplane" and context != "indoor" and flies < (1. if context == "sky" else .35):
        return "air"
    if name == "bird" and context != "indoor" and flies < (.85 if context == "sky" else .45):
        return "air"
    if name == "tvmonitor" and context == "indoor" and flies < .35:
        return "wall"
    return "ground"


def _position(rng: np.random.Generator, name: str, place: str, stage: Background, size: int, single: bool,
              count: int) -> _Placed:
    spec = OBJECTS[name]
    unit = size * spec.size * (rng.uniform(.52, .92) if single else rng.uniform(.38, .74) * (1.15 if count == 1 else .95))
    unit = min(unit, size * 1.08 / max(spec.width * .8, spec.height))
    if place == "wall":                          # a screen on a wall is seen whole
        unit = min(unit, stage.horizon * .95)
    x = size * (rng.uniform(.4, .6) if single else rng.uniform(.15, .85))
    top, bottom = {"ground": stage.ground, "water": stage.water, "wall": (unit * .98, stage.horizon),
                   "air": (unit * spec.height * .85, max(unit * spec.height, stage.horizon * .95))}[place]
    if name == "train" and stage.rails is not None:
        return _Placed(name, x, stage.rails, unit, place, stage.rails)
    if place == "ground":                        # near enough to keep its head in the picture
        top = min(max(top, unit * spec.height * .92), bottom)
    y = rng.uniform(top, max(top, bottom))
    if place in ("ground", "water"):             # what stands farther away is smaller
        unit *= .8 + .25 * (y - top) / max(1., bottom - top)
    return _Placed(name, x, y, unit, place, y if place in ("ground", "water") else 0.)


def _set_tables(rng: np.random.Generator, placed: list[_Placed]) -> None:
    """Put bottles, plants and screens on a table if there is one: most of the time, and only on its top."""
    tables = [p for p in placed if p.name == "diningtable"]
    for p in placed:
        if tables and p.name in INDOOR_ON_TABLE and p.place == "ground" and rng.random() < .75:
            table = tables[0]
            p.x = table.x + rng.uniform(-.3, .3) * table.size
            p.y = table.y - .52 * table.size
            p.size = min(p.size, table.size * rng.uniform(.5, .65))
            p.place, p.depth = "table", table.depth + .01


def _shadow(canvas: Image.Image, p: _Placed) -> None:
    """A soft contact shadow: what stands on the ground darkens it."""
    spec, k = OBJECTS[p.name], SUPERSAMPLING
    rx, ry = p.size * spec.width * .42 * k, p.size * .05 * k
    draw = ImageDraw.Draw(canvas, "RGBA")
    for grow, alpha in ((1.15, 38), (.9, 50)):
        draw.ellipse([p.x * k - rx * grow, p.y * k - ry * grow, p.x * k + rx * grow, p.y * k + ry * grow],
                     fill=(10, 10, 16, alpha))


# ---------------------------------------------------------------------- picture and truth
def _photograph(rng: np.random.Generator, image: np.ndarray, order: np.ndarray, count: int) -> np.ndarray:
    """Texture and lighting per object, then contrast, tint and sensor noise of the whole: uint8 (S, S, 3)."""
    size = image.shape[0]
    rows = np.arange(size, dtype=np.float32)
    for k in range(1, count + 1):
        inside = order == k
        texture, light = rng.uniform(.03, .14) * noise(rng, size), rng.uniform(0, .2)
        filled = np.flatnonzero(inside.any(1))
        if filled.size:
            height = (rows - filled[0]) / max(1, filled[-1] - filled[0])
            image[inside] *= (1 + texture + light * (.5 - height)[:, None])[inside][:, None].astype(np.float32)
    image = (image - 128) * rng.uniform(.78, 1.15) + 128 + rng.normal(0, 12) + rng.normal(0, 5, 3)
    image = image + rng.normal(0, rng.uniform(1, 6), image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def borders(order: np.ndarray) -> np.ndarray:
    """bool (S, S): pixels with a 4-neighbour that belongs to something nearer (a higher number).

    The border lies *outside* the nearer thing, on whatever is behind it, so that a thin object (a bicycle's tube of
    one or two pixels) is not swallowed by its own border.
    """
    edge = np.zeros(order.shape, bool)
    edge[:, 1:] |= order[:, :-1] > order[:, 1:]
    edge[:, :-1] |= order[:, 1:] > order[:, :-1]
    edge[1:] |= order[:-1] > order[1:]
    edge[:-1] |= order[1:] > order[:-1]
    return edge


def _describe(image: np.ndarray, order: np.ndarray, parts: np.ndarray, stage: Background, placed: list[_Placed],
              drawn_area: list[int], context: str) -> ToySample:
    """Masks, labels and boxes of what is visible."""
    edge, size = borders(order), order.shape[0]
    number = np.zeros(len(placed) + 1, np.uint8)         # drawing order -> instance number, 255 for remains
    category = np.zeros(len(placed) + 1, np.uint8)
    objects, hidden = [], []
    for k, p in enumerate(placed, 1):
        visible = (order == k) & ~edge
        area = np.count_nonzero(order == k)
        if np.count_nonzero(visible) < MIN_PIXELS or area < MIN_SHARE * drawn_area[k - 1]:
            number[k] = category[k] = 255
            hidden.append(p.name)
            continue
        ys, xs = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
        box = int(xs[0]), int(ys[0]), int(xs[-1]), int(ys[-1])
        truncated = min(box[:2]) == 0 or max(box[2:]) == size - 1
        objects.append(VisibleObject(p.name, box, truncated, 1 - area / drawn_area[k - 1]))
        number[k], category[k] = len(objects), VOC_CLASSES.index(p.name) + 1
    mask, instances = category[order], number[order]
    mask[edge], instances[edge] = 255, 255
    labels = np.zeros(20, np.float32)
    labels[[VOC_CLASSES.index(o.name) for o in objects]] = 1
    labelled = (mask > 0) & (mask < 255)
    return ToySample(image, mask, instances, np.where(labelled, parts, 0).astype(np.uint8),
                     np.where(mask == 0, stage.contexts, 0).astype(np.uint8), labels, tuple(objects), context,
                     tuple(hidden))
