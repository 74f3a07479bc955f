"""The pen that draws ToyVOC, and the parts that several classes share.

An object is drawn in its own units: x to the right, y *down*, the ground at y = 0, a typical object about
one unit long. Every primitive lands on two canvases at once, a colour picture and an id picture, so the
masks are exact by construction: id = instance * 256 + part.

Everything random comes from the generator handed in; what transcendental functions return is rounded
(`rounded`), so that the bytes do not depend on which vector unit computed a cosine.
"""
from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLING = 2   # canvases are drawn at twice the size of the sample and averaged down

PARTS = ("body", "head", "ear", "muzzle", "horn", "mane", "neck", "leg", "tail", "wing", "beak", "fin", "wheel",
         "window", "frame", "handle", "cabin", "hull", "sail", "nose", "screen", "stand", "seat", "back", "arm",
         "top", "pot", "leaf", "cap", "label", "torso", "hair", "light", "engine", "item", "door")
PART_ID = {name: i + 1 for i, name in enumerate(PARTS)}   # 0 is "no part"

# What partial activation is measured on: the quadrupeds share the body group and are told apart by the head group.
PART_GROUPS = {"head": tuple(PART_ID[p] for p in ("head", "ear", "muzzle", "horn", "mane")),
               "body": tuple(PART_ID[p] for p in ("body", "leg", "tail"))}

Color = Sequence[float]
FUR = ((120, 80, 50), (62, 46, 36), (200, 190, 178), (42, 40, 42), (188, 130, 72), (150, 144, 138), (226, 220, 206),
       (96, 62, 46))
PAINT = ((190, 40, 40), (40, 80, 170), (230, 230, 228), (52, 52, 58), (222, 180, 50), (50, 130, 82), (150, 155, 160),
         (210, 120, 50), (110, 62, 122))
WOOD = ((132, 86, 50), (92, 60, 40), (180, 140, 95), (66, 54, 50), (202, 192, 178))
DARK, STEEL, GLASS = (35, 35, 38), (160, 162, 168), (120, 150, 172)


def rounded(values: np.ndarray, digits: int = 6) -> np.ndarray:
    """Round what sin, cos or a power returned, so that a last-bit difference between CPUs cannot move a pixel."""
    return np.round(values, digits)


def shade(color: Color, factor: float) -> np.ndarray:
    """`color` made darker (factor < 1) or lighter (factor > 1), kept within 0..255."""
    return np.clip(np.asarray(color, float) * factor, 0, 255)


def ellipse_points(cx: float, cy: float, rx: float, ry: float, angle: float = 0.0, n: int = 20,
                   start: float = 0.0, stop: float = 2 * np.pi, power: float = 2.0) -> np.ndarray:
    """(n, 2) points of a (super-)ellipse; power 2 is an ellipse, larger powers approach a rectangle."""
    t = np.linspace(start, stop, n)
    c, s = np.cos(t), np.sin(t)
    e = 2.0 / power
    points = np.stack([rx * np.sign(c) * np.abs(c) ** e, ry * np.sign(s) * np.abs(s) ** e], 1)
    ca, sa = np.cos(angle), np.sin(angle)
    return points @ np.array([[ca, sa], [-sa, ca]]) + (cx, cy)


class Pen:
    """Draws one object: maps object units to canvas pixels and writes colour and ids together.

    Args:
        picture, ids: PIL canvases of the same size, modes "RGB" and "I".
        instance: 1, 2, ...: the object's number in the scene.
        rng: the source of everything random.
        x, y: where the object stands, in sample pixels (x centre, y ground).
        size: sample pixels per object unit.
        rotation (radians), flip (mirror left-right), stretch (x and y factors): the object's pose.
    """

    def __init__(self, picture: Image.Image, ids: Image.Image, instance: int, rng: np.random.Generator, x: float,
                 y: float, size: float, rotation: float = 0.0, flip: bool = False,
                 stretch: tuple[float, float] = (1.0, 1.0)) -> None:
        self.rng, self.instance = rng, instance
        self._picture, self._ids = ImageDraw.Draw(picture), ImageDraw.Draw(ids)
        self._origin = np.array([x, y]) * SUPERSAMPLING
        self._pixels_per_unit = size * SUPERSAMPLING
        c, s = np.cos(rotation), np.sin(rotation)
        pose = np.array([[c, -s], [s, c]]) @ np.diag([(-1 if flip else 1) * stretch[0], stretch[1]])
        self._matrix = (self._pixels_per_unit * pose).T

    # ------------------------------------------------------------------ randomness
    def uniform(self, low: float, high: float) -> float:
        """A random number in [low, high)."""
        return self.rng.uniform(low, high)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.rng.random() < probability

    def jitter(self, color: Color, spread: float = 14.0) -> np.ndarray:
        """`color` with a random tint and brightness."""
        return np.clip(np.asarray(color, float) + self.rng.normal(0, spread, 3) + self.rng.normal(0, spread), 0, 255)

    def pick(self, palette: Sequence[Color], spread: float = 14.0) -> np.ndarray:
        """A random colour of a palette, jittered."""
        return self.jitter(palette[self.rng.integers(len(palette))], spread)

    # ------------------------------------------------------------------ primitives
    def polygon(self, points: Sequence[Sequence[float]] | np.ndarray, color: Color, part: str) -> None:
        """A filled polygon, (n, 2) points in object units; every other primitive ends here."""
        where = rounded(np.asarray(points, float) @ self._matrix + self._origin, 3)
        vertices = [tuple(p) for p in where.tolist()]
        self._picture.polygon(vertices, fill=tuple(int(v) for v in color))
        self._ids.polygon(vertices, fill=self.instance * 256 + PART_ID[part])

    def ellipse(self, cx: float, cy: float, rx: float, ry: float, color: Color, part: str, **shape: float) -> None:
        """A filled ellipse; `shape` as of `ellipse_points`."""
        self.polygon(ellipse_points(cx, cy, rx, ry, **shape), color, part)

    def box(self, x0: float, y0: float, x1: float, y1: float, color: Color, part: str) -> None:
        """A filled rectangle."""
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], color, part)

    def rounded_box(self, x0: float, y0: float, x1: float, y1: float, color: Color, part: str,
                    power: float = 5.0) -> None:
        """A filled rectangle with round corners, rounder for smaller powers."""
        self.polygon(ellipse_points((x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2, (y1 - y0) / 2, n=32, power=power),
                     color, part)

    def line(self, points: Sequence[Sequence[float]] | np.ndarray, width: float, color: Color, part: str) -> None:
        """A polyline of constant width with round joints; never thinner than one sample pixel."""
        points = np.asarray(points, float)
        width = max(width, SUPERSAMPLING / self._pixels_per_unit)
        for a, b in itertools.pairwise(points):
            d = b - a
            normal = np.array([-d[1], d[0]]) / (np.hypot(d[0], d[1]) + 1e-9) * width / 2
            self.polygon([a + normal, b + normal, b - normal, a - normal], color, part)
        if width * self._pixels_per_unit > 3:      # below that a joint is smaller than the pixels that show it
            for a in points:
                self.ellipse(a[0], a[1], width / 2, width / 2, color, part, n=10)


# ---------------------------------------------------------------------- parts that several classes share
def wheel(pen: Pen, x: float, y: float, radius: float) -> None:
    """A car's, bus's, motorbike's wheel: dark tyre, bright hub."""
    pen.ellipse(x, y, radius, radius, pen.jitter(DARK, 6), "wheel")
    hub = radius * pen.uniform(.42, .6)
    pen.ellipse(x, y, hub, hub, pen.jitter(STEEL, 12), "wheel")


def spoked_wheel(pen: Pen, x: float, y: float, radius: float, width: float) -> None:
    """A bicycle's wheel: tyre and spokes, the background showing between them."""
    pen.line(ellipse_points(x, y, radius, radius, n=22), width, DARK, "wheel")
    for angle in np.arange(4) * np.pi / 4 + pen.uniform(0, 1):
        dx, dy = radius * np.cos(angle), radius * np.sin(angle)
        pen.line([(x - dx, y - dy), (x + dx, y + dy)], .012, STEEL, "wheel")


def windows(pen: Pen, x0: float, y0: float, x1: float, y1: float, count: int, color: Color | None = None) -> None:
    """A row of `count` panes."""
    color = pen.jitter(GLASS, 16) if color is None else color
    step = (x1 - x0) / count
    for i in range(count):
        pen.box(x0 + step * (i + .1), y0, x0 + step * (i + .9), y1, color, "window")


def four_legs(pen: Pen, x0: float, x1: float, y0: float, width: float, color: Color, part: str = "leg",
              jitter: float = .03) -> None:
    """Four legs from y0 down to the ground; the far pair darker and a little inside."""
    for k, x in enumerate((x0 + .06, x1 - .06, x0, x1)):
        foot = x + pen.uniform(-jitter, jitter)
        knee = (x + foot) / 2 + pen.uniform(-jitter, jitter) / 2
        pen.line([(x, y0), (knee, y0 / 2), (foot, -width / 2)], width, shade(color, .7) if k < 2 else color, part)
