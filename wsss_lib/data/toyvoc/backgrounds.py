"""The contexts of ToyVOC: indoor, grass, road, rails, water, sky, runway."""
from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from .parts import PAINT, SUPERSAMPLING, rounded

CONTEXTS = ("indoor", "grass", "road", "rails", "water", "sky", "runway")

# What a background pixel shows: the values of SegmentationContext, 0 under objects and their borders.
CONTEXT_ID = {"sky": 1, "grass": 2, "water": 3, "road": 4, "rails": 5, "wall": 6, "floor": 7, "building": 8, "tree": 9}

SKY = ((135, 180, 225), (180, 195, 215), (100, 150, 210), (205, 205, 210), (225, 180, 150))
WALL = ((200, 190, 170), (170, 180, 185), (215, 210, 205), (150, 120, 110), (130, 150, 130))
FLOOR = ((140, 100, 65), (120, 115, 110), (165, 130, 95), (110, 70, 60))
HOUSE = ((150, 110, 90), (140, 140, 145), (180, 170, 150), (110, 100, 105))
GROUND = {"grass": (95, 130, 60), "water": (70, 110, 140), "road": (105, 103, 105), "rails": (122, 112, 100),
          "runway": (130, 130, 130), "sky": (98, 125, 70)}


@dataclass
class Background:
    """An empty stage: float picture (S, S, 3), context ids (S, S), and where things can stand (rows, pixels)."""

    picture: np.ndarray
    contexts: np.ndarray
    horizon: int
    ground: tuple[float, float]                     # feet of whatever stands on land
    water: tuple[float, float] | None = None        # hulls of boats
    rails: float | None = None                      # wheels of a train
    lines: list[tuple[list[tuple[float, float]], tuple[int, int, int], int]] = field(default_factory=list)

    def canvas(self) -> Image.Image:
        """The stage as an RGB canvas at the drawing resolution, with the lines drawn on it."""
        size = self.picture.shape[0] * SUPERSAMPLING
        image = Image.fromarray(self.picture.clip(0, 255).astype(np.uint8)).resize((size, size), Image.BILINEAR)
        draw = ImageDraw.Draw(image)
        for points, color, width in self.lines:
            draw.line([(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points], fill=color, width=width)
        return image


@cache
def _noise_bank(size: int) -> np.ndarray:
    """(24, 2 size, 2 size) multi-octave noise of unit variance: drawn once, sampled by cropping.

    A crop of a larger tile has no seam, and rounding to 1/64 keeps the bytes independent of summation order.
    """
    rng, tiles, side = np.random.default_rng(0), [], 2 * size
    for k in range(24):
        total = np.zeros((side, side), np.float64)
        stretch = (1, 1, 3)[k % 3]                  # every third tile is streaky, like water or brushed ground
        for octave in (6, 12, 24, 48, 96, size)[k % 3:]:
            grid = rng.normal(0, 1, (octave, max(3, octave // stretch))).astype(np.float32)
            total += np.asarray(Image.fromarray(grid).resize((side, side), Image.BICUBIC), np.float64) * octave ** -.45
        tiles.append(np.round((total - total.mean()) / total.std() * 64) / 64)
    return np.stack(tiles).astype(np.float32)


def noise(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size) float32 noise, a random crop of a random tile."""
    bank = _noise_bank(size)
    y, x = rng.integers(0, size, 2)
    crop = bank[rng.integers(len(bank)), y:y + size, x:x + size]
    return crop[:, ::-1] if rng.random() < .5 else crop


def draw_background(rng: np.random.Generator, context: str, size: int, land_needed: bool) -> Background:
    """Draw an empty stage.

    context: one of CONTEXTS. land_needed: something in the scene stands on land, so water gets a bank and the sky
    a strip of ground to stand on: nothing floats.
    """
    picture, contexts = np.zeros((size, size, 3), np.float32), np.zeros((size, size), np.uint8)
    far, near = noise(rng, size), noise(rng, size)

    def band(y0: int, y1: int, color, roughness: float, texture: np.ndarray, name: str, gradient: float) -> None:
        slope = np.linspace(-gradient, gradient, max(1, y1 - y0))[:, None, None]
        tint = np.asarray(color, float) + rng.normal(0, 10, 3)
        picture[y0:y1] = tint * (1 + roughness * .5 * texture[y0:y1, :, None] + slope)
        contexts[y0:y1] = CONTEXT_ID[name]

    if context == "indoor":
        horizon = int(size * rng.uniform(.45, .68))
        band(0, horizon, WALL[rng.integers(len(WALL))], .06, far, "wall", .06)
        band(horizon, size, FLOOR[rng.integers(len(FLOOR))], .16, near, "floor", .1)
        picture[horizon - 2:horizon] *= .75         # skirting board
        if rng.random() < .6:
            _hang_picture(rng, picture, horizon, size)
        return Background(picture, contexts, horizon, _ground(horizon, size))

    if context == "sky":
        horizon = int(size * (rng.uniform(.62, .78) if land_needed else rng.uniform(.86, .97)))
    else:
        horizon = int(size * rng.uniform(.3, .58))
    band(0, horizon, SKY[rng.integers(len(SKY))], .1, far, "sky", .13)
    _skyline(rng, picture, contexts, context, horizon, near, size)
    name = {"runway": "road", "sky": "grass", "rails": "grass"}.get(context, context)
    roughness = .18 if context == "water" else .22
    band(horizon, size, np.asarray(GROUND[context]) * rng.uniform(.8, 1.2), roughness, near, name, .12)
    stage = Background(picture, contexts, horizon, _ground(horizon, size))
    if context == "water":
        _waves(rng, stage, far, near, size, land_needed)
    elif context == "rails":
        _track(rng, stage, size)
    elif context in ("road", "runway"):
        _markings(rng, stage, size)
    return stage


def _ground(top: float, size: int) -> tuple[float, float]:
    """Rows for feet: clearly below the line where the ground begins, up to the lower edge."""
    return top + max(4., .15 * (size - top)), size - 1.


def _hang_picture(rng: np.random.Generator, picture: np.ndarray, horizon: int, size: int) -> None:
    x, y = rng.integers(0, size - 24), rng.integers(3, max(4, horizon - 30))
    h, w = rng.integers(12, 22), rng.integers(12, 26)
    picture[y:y + h, x:x + w] = np.asarray(PAINT[rng.integers(len(PAINT))]) * .4 + 40
    picture[y + 2:y + h - 2, x + 2:x + w - 2] = np.asarray(PAINT[rng.integers(len(PAINT))]) * .6 + 70


def _skyline(rng: np.random.Generator, picture: np.ndarray, contexts: np.ndarray, context: str, horizon: int,
             texture: np.ndarray, size: int) -> None:
    """Houses along most roads, trees in many other places."""
    if context == "road" and rng.random() < .7:
        x = 0
        while x < size:
            w, h = rng.integers(10, 30), rng.integers(8, max(9, int(horizon * .9)))
            picture[horizon - h:horizon, x:x + w] = np.asarray(HOUSE[rng.integers(len(HOUSE))]) + rng.normal(0, 10, 3)
            picture[horizon - h + 3:horizon - 2:5, x + 2:x + w - 2] *= .75
            contexts[horizon - h:horizon, x:x + w] = CONTEXT_ID["building"]
            x += w
    elif rng.random() < (.25 if context in ("runway", "sky") else .6):
        crowns = np.clip(noise(rng, size)[0] * .5 + 1, .1, 3)
        top = horizon - (4 + (8 if context != "sky" else 2) * crowns)
        rows = np.arange(size)[:, None]
        trees = (rows > top) & (rows < horizon)
        picture[trees] = (np.array((55, 85, 50)) + rng.normal(0, 8, 3)) * (1 + .2 * texture[trees][:, None])
        contexts[trees] = CONTEXT_ID["tree"]


def _waves(rng: np.random.Generator, stage: Background, far: np.ndarray, near: np.ndarray, size: int, bank: bool) -> None:
    """Wave lines that widen towards the viewer, and a bank in front if somebody has to stand on it."""
    rows = np.arange(stage.horizon, size)
    lines = rounded(np.sin(rounded(rows ** 1.12) * 1.3 + rng.uniform(0, 6)), 4)
    stage.picture[stage.horizon:] += (8 * lines[:, None] + 6 * far[stage.horizon:])[:, :, None]
    shore = int(size * rng.uniform(.7, .82)) if bank else size
    if bank:
        edge = shore + np.round(3 * near[0]).astype(int)
        land = np.arange(size)[:, None] >= edge
        color = ((190, 170, 125), (105, 130, 70))[rng.integers(2)] + rng.normal(0, 8, 3)
        stage.picture[land] = color * (1 + .1 * near[land][:, None])
        stage.contexts[land] = CONTEXT_ID["grass"]
        stage.ground = shore + 5., size - 1.
    stage.water = stage.horizon + 5., min(shore - 1., size - 2.)


def _track(rng: np.random.Generator, stage: Background, size: int) -> None:
    """A track bed with sleepers and two rails; the bed is the context "rails", the rest of the ground is grass."""
    gauge = rng.uniform(7, 12)
    y = stage.horizon + (size - stage.horizon) * rng.uniform(.25, .6)
    y = min(y, size - gauge - 5)
    top, bottom = int(y - 4), int(y + gauge + 5)
    bed = slice(max(stage.horizon, top), min(size, bottom))
    stage.picture[bed] = stage.picture[bed] * .35 + np.array((105, 98, 92)) * .65 + 7 * noise(rng, size)[bed, :, None]
    stage.contexts[bed] = CONTEXT_ID["rails"]
    stage.rails = y + gauge * .75
    for x in range(int(rng.integers(-8, 0)), size + 8, 7):
        stage.lines.append(([(x, y + gauge + 2), (x + 2.5, y - 2)], (80, 65, 52), 5))
    for row in (y, y + gauge):
        stage.lines.append(([(0, row), (size, row)], (172, 172, 180), 3))


def _markings(rng: np.random.Generator, stage: Background, size: int) -> None:
    """A dashed line along the road."""
    if rng.random() < .75:
        y = rng.uniform(stage.horizon + (size - stage.horizon) * .35, size - 4)
        for x in range(int(rng.integers(-10, 0)), size, 17):
            stage.lines.append(([(x, y), (x + 8, y)], (220, 220, 210), 4))
