"""What stands in a room: bottle, chair, diningtable, pottedplant, sofa, tvmonitor."""
from __future__ import annotations

import numpy as np

from .parts import DARK, FUR, PAINT, WOOD, Pen, four_legs, shade


def bottle(pen: Pen) -> None:
    """A bottle with a label, a cap and a highlight."""
    glass = pen.pick(((40, 100, 50), (112, 62, 32), (150, 190, 210), (70, 120, 60), (190, 60, 50)))
    w, h, neck = pen.uniform(.13, .18), pen.uniform(.5, .62), pen.uniform(.055, .07)
    pen.polygon([(-w, 0), (w, 0), (w, -h), (neck, -h - .16), (neck, -h - .34), (-neck, -h - .34), (-neck, -h - .16),
                 (-w, -h)], glass, "body")
    pen.box(-neck * 1.2, -h - .41, neck * 1.2, -h - .32, pen.pick(PAINT), "cap")
    pen.box(-w, -h * .8, w, -h * .35, pen.pick(((230, 225, 210),) + PAINT), "label")
    pen.line([(-w * .55, -.05), (-w * .55, -h)], .025, shade(glass, .5) + 110, "body")


def chair(pen: Pen) -> None:
    """Seat, four legs and an open back: two posts with slats, spindles or a cross, the room showing through."""
    paint = pen.pick(WOOD + PAINT)
    seat, back, w, lean = pen.uniform(.36, .44), pen.uniform(.45, .58), pen.uniform(.23, .28), pen.uniform(.06, .12)
    dark = shade(paint, .72)
    left, right = -w + lean, w + lean
    foot_of_back, top = -seat - .08, -seat - back

    def post(x: float) -> list[tuple[float, float]]:
        return [(x, foot_of_back), (x - .04, top)]

    four_legs(pen, -w, w, -seat, .055, dark, jitter=.01)
    kind = pen.rng.integers(3)
    if kind == 0:                                            # ladder back
        for t in np.linspace(.35, 1., int(pen.rng.integers(2, 4))):
            y = foot_of_back + (top - foot_of_back) * t
            pen.line([(left - .04 * t, y), (right - .04 * t, y)], .065, paint, "back")
    elif kind == 1:                                          # spindles under a top rail
        for x in np.linspace(left, right, int(pen.rng.integers(4, 6)))[1:-1]:
            pen.line(post(x), .03, paint, "back")
        pen.line([(left - .04, top), (right - .04, top)], .08, paint, "back")
    else:                                                    # crossed back
        pen.line([(left, foot_of_back), (right - .04, top)], .035, paint, "back")
        pen.line([(right, foot_of_back), (left - .04, top)], .035, paint, "back")
        pen.line([(left - .04, top), (right - .04, top)], .07, paint, "back")
    for x in (left, right):
        pen.line(post(x), .055, dark, "back")
    seat_color = pen.pick(PAINT) if pen.chance(.35) else paint          # a cushion now and then
    pen.polygon([(-w - .05, -seat + .03), (w + .01, -seat + .03), (w + lean + .02, -seat - .1), (-w + lean - .02, -seat - .1)],
                seat_color, "seat")
    pen.box(-w - .05, -seat + .02, w + .01, -seat + .07, shade(paint, .6), "seat")


def sofa(pen: Pen) -> None:
    """A sofa with two or three cushions, sometimes with a pillow on it."""
    cloth = pen.pick(PAINT + FUR)
    length, back, seat, cushions = pen.uniform(.95, 1.3), pen.uniform(.3, .4), pen.uniform(.2, .28), pen.rng.integers(2, 4)
    dark = shade(cloth, .82)
    for x in (-length / 2 + .08, length / 2 - .08):
        pen.line([(x, -.08), (x, -.01)], .05, DARK, "leg")
    pen.rounded_box(-length / 2 + .03, -seat - back, length / 2 - .03, -seat + .08, dark, "back", power=6)
    step = (length - .24) / cushions
    for i in range(cushions):
        x = -length / 2 + .12 + step * i
        pen.rounded_box(x + .01, -seat - back * .8, x + step - .01, -seat + .02, shade(cloth, .92), "back")
        pen.rounded_box(x, -seat - .02, x + step, -seat + .11, cloth, "seat")
    pen.box(-length / 2 + .08, -seat + .09, length / 2 - .08, -.06, shade(dark, .82), "body")
    for side in (-1, 1):
        x = side * (length / 2 - .07)
        pen.rounded_box(x - .09, -seat - .17, x + .09, -.05, cloth, "arm", power=4)
    if pen.chance(.5):
        x = pen.uniform(-.25, .25)
        pen.rounded_box(x - .1, -seat - .17, x + .1, -seat + .01, pen.pick(PAINT), "item", power=4)


def diningtable(pen: Pen) -> None:
    """A table, laid with plates and glasses."""
    wood, length, height, depth = pen.pick(WOOD), pen.uniform(.9, 1.25), pen.uniform(.42, .5), pen.uniform(.12, .2)
    four_legs(pen, -length / 2 + .12, length / 2 - .1, -height, .06, shade(wood, .75), jitter=.01)
    top = pen.pick(((235, 230, 225), (190, 60, 60), (90, 120, 170))) if pen.chance(.35) else wood
    pen.polygon([(-length / 2, -height + .03), (length / 2, -height + .03), (length / 2 - .13, -height - depth),
                 (-length / 2 + .13, -height - depth)], top, "top")
    pen.box(-length / 2, -height + .02, length / 2, -height + .07, shade(top, .8), "top")
    for _ in range(int(pen.rng.integers(1, 5))):             # plates and glasses belong to the laid table
        x, y = pen.uniform(-length * .34, length * .34), -height - pen.uniform(.02, depth * .8)
        if pen.chance(.65):
            pen.ellipse(x, y, .085, .035, (240, 240, 240), "item")
            pen.ellipse(x, y, .05, .02, pen.pick(PAINT), "item", n=12)
        else:
            pen.box(x - .03, y - .1, x + .03, y, pen.pick(((200, 220, 230), (230, 230, 230))), "item")


def pottedplant(pen: Pen) -> None:
    """A fan of leaves, sometimes in flower, in a pot."""
    pot = pen.pick(((170, 90, 55), (200, 195, 190), (70, 80, 110), (122, 72, 50)))
    green = pen.pick(((50, 120, 50), (82, 140, 62), (42, 96, 62), (120, 150, 72)))
    w, h, count, broad = pen.uniform(.14, .2), pen.uniform(.22, .32), int(pen.rng.integers(7, 15)), pen.uniform(.045, .1)
    for angle in np.linspace(-1.25, 1.25, count) + pen.rng.normal(0, .1, count):
        reach = pen.uniform(.28, .52)
        x, y = np.sin(angle) * reach, -h - np.cos(angle) * reach
        pen.line([(0, -h), (x * .7, y + .06)], .022, shade(green, .7), "leaf")
        pen.ellipse(x * .65, -h + (y + h) * .65, reach * .42, broad, pen.jitter(green, 10), "leaf",
                    angle=np.arctan2(y + h, x), n=14)
        if pen.chance(.08):
            pen.ellipse(x, y, .05, .05, pen.pick(PAINT), "leaf", n=10)
    pen.polygon([(-w, -h), (w, -h), (w * .72, 0), (-w * .72, 0)], pot, "pot")
    pen.box(-w * 1.12, -h - .05, w * 1.12, -h + .02, shade(pot, .85), "pot")


def tvmonitor(pen: Pen, on_wall: bool) -> None:
    """A flat screen that shows something, on a stand or, hung on a wall, without one."""
    w, h = pen.uniform(.4, .54), pen.uniform(.48, .6)
    foot = .3 if on_wall else pen.uniform(.08, .16)
    frame = pen.jitter(DARK if pen.chance(.75) else (190, 190, 190), 8)
    if not on_wall:
        pen.box(-.05, -foot - .02, .05, -.02, frame, "stand")
        pen.rounded_box(-w * .45, -.05, w * .45, 0, frame, "stand", power=4)
    pen.rounded_box(-w, -foot - h, w, -foot, frame, "frame", power=14)
    x0, y0, x1, y1 = -w + .045, -foot - h + .045, w - .045, -foot - .045
    SCREENS[pen.rng.integers(len(SCREENS))](pen, x0, y0, x1, y1)
    if pen.chance(.4):                                       # a reflection
        pen.polygon([(x0 + .05, y0), (x0 + .14, y0), (x0 + .06, y1), (x0, y1), (x0, y0 + (y1 - y0) * .5)],
                    (205, 214, 226), "screen")


def _landscape(pen: Pen, x0: float, y0: float, x1: float, y1: float) -> None:
    pen.box(x0, y0, x1, y1, pen.jitter((120, 175, 230), 12), "screen")
    horizon = y0 + (y1 - y0) * pen.uniform(.45, .7)
    peaks = np.linspace(x0, x1, 5)
    pen.polygon([(x0, horizon), *((x, horizon - pen.uniform(.02, .16)) for x in peaks[1:-1]), (x1, horizon)],
                pen.jitter((95, 105, 130), 12), "screen")
    pen.box(x0, horizon, x1, y1, pen.jitter((80, 150, 60), 14), "screen")
    pen.ellipse(x0 + (x1 - x0) * pen.uniform(.2, .8), y0 + .07, .04, .04, (250, 235, 140), "screen", n=10)


def _bars(pen: Pen, x0: float, y0: float, x1: float, y1: float) -> None:
    colors = ((225, 225, 225), (220, 210, 60), (60, 200, 210), (70, 190, 70), (200, 70, 190), (200, 50, 50), (50, 60, 190))
    step = (x1 - x0) / len(colors)
    for i, color in enumerate(colors):
        pen.box(x0 + step * i, y0, x0 + step * (i + 1) + .005, y1, color, "screen")


def _football(pen: Pen, x0: float, y0: float, x1: float, y1: float) -> None:
    pen.box(x0, y0, x1, y1, pen.jitter((50, 150, 60), 10), "screen")
    pen.box(x0, y0, x1, y0 + (y1 - y0) * .25, pen.jitter((70, 70, 90), 10), "screen")
    pen.line([((x0 + x1) / 2, y0 + (y1 - y0) * .25), ((x0 + x1) / 2, y1)], .015, (235, 240, 235), "screen")
    for _ in range(5):
        x, y = pen.uniform(x0 + .05, x1 - .05), pen.uniform(y0 + (y1 - y0) * .4, y1 - .04)
        pen.ellipse(x, y, .022, .035, pen.pick(PAINT[:2]), "screen", n=8)


def _newsreader(pen: Pen, x0: float, y0: float, x1: float, y1: float) -> None:
    pen.box(x0, y0, x1, y1, pen.jitter((40, 70, 130), 12), "screen")
    x, y = x0 + (x1 - x0) * pen.uniform(.3, .7), (y0 + y1) / 2
    pen.ellipse(x, y1 - .03, .13, .12, pen.pick(PAINT), "screen", start=np.pi, stop=2 * np.pi)
    pen.ellipse(x, y - .02, .055, .07, (224, 180, 150), "screen", n=12)
    pen.box(x0, y1 - .06, x1, y1, pen.jitter((200, 50, 50), 10), "screen")


SCREENS = (_landscape, _bars, _football, _newsreader)
