"""What moves: aeroplane, bicycle, boat, bus, car, motorbike, train."""
from __future__ import annotations

import numpy as np

from .parts import DARK, GLASS, PAINT, STEEL, WOOD, Pen, shade, spoked_wheel, wheel, windows

LAMP = (252, 238, 158)
COCKPIT = (52, 62, 78)


def car(pen: Pen) -> None:
    """A car from the side, facing right."""
    paint = pen.pick(PAINT)
    length, height, r = pen.uniform(.95, 1.15), pen.uniform(.2, .26), pen.uniform(.1, .13)
    belt, roof = -r - height, pen.uniform(.17, .24)
    rear, front = -length * pen.uniform(.3, .46), length * pen.uniform(.16, .3)
    pen.polygon([(rear, belt), (rear + .12, belt - roof), (front - .1, belt - roof), (front + .12, belt)],
                shade(paint, .8), "cabin")
    glass = pen.jitter(GLASS, 16)
    pen.polygon([(rear + .05, belt), (rear + .14, belt - roof * .8), (-.03, belt - roof * .8), (-.03, belt)], glass, "window")
    pen.polygon([(.02, belt), (.02, belt - roof * .8), (front - .11, belt - roof * .8), (front + .06, belt)], glass, "window")
    pen.rounded_box(-length / 2, belt - .01, length / 2, -r * .6, paint, "body")
    pen.ellipse(length / 2 - .04, belt + .07, .04, .03, LAMP, "light", n=10)
    pen.ellipse(-length / 2 + .03, belt + .07, .03, .03, (200, 40, 40), "light", n=10)
    pen.line([(0, belt), (0, -r)], .012, shade(paint, .55), "door")
    for x in (-length * .3, length * .3):
        wheel(pen, x, -r, r)


def bus(pen: Pen) -> None:
    """A bus from the side, its door at the front."""
    paint = pen.pick(PAINT)
    length, height, r = pen.uniform(1., 1.35), pen.uniform(.42, .6), pen.uniform(.08, .11)
    top = -r - height
    pen.rounded_box(-length / 2, top, length / 2, -r * .7, paint, "body", power=9)
    if pen.chance(.5):
        pen.box(-length / 2, top + height * .58, length / 2, top + height * .7, pen.pick(PAINT), "body")
    windows(pen, -length / 2 + .05, top + height * .15, length / 2 - .17, top + height * .52, int(pen.rng.integers(4, 7)))
    pen.box(length / 2 - .15, top + height * .15, length / 2 - .03, top + height * .95, pen.jitter((70, 85, 100), 10), "door")
    pen.ellipse(length / 2 - .02, -r - .06, .03, .03, LAMP, "light", n=10)
    for x in (-length * .3, length * .3):
        wheel(pen, x, -r, r)


def train(pen: Pen) -> None:
    """An engine with a sloping nose and one or two coaches behind it."""
    paint, stripe = pen.pick(PAINT), pen.pick(PAINT)
    length, height, r, nose = pen.uniform(.75, 1.), pen.uniform(.36, .5), .045, pen.uniform(.15, .3)
    top = -2 * r - height
    for k in range(int(pen.rng.integers(1, 3)), -1, -1):
        x1 = .6 - k * (length + .04)
        x0 = x1 - length
        pen.box(x0, top, x1, -r, paint, "body")
        pen.box(x0, top + height * .62, x1, top + height * .74, stripe, "body")
        windows(pen, x0 + .04, top + height * .15, x1 - .04, top + height * .52, int(pen.rng.integers(3, 6)))
        for x in np.arange(x0 + .08, x1, .16):
            wheel(pen, x, -r, r)
    pen.polygon([(.6, top), (.6 + nose * .55, top + height * .2), (.6 + nose, top + height * .7), (.6 + nose, -r), (.6, -r)],
                stripe, "nose")
    pen.polygon([(.63, top + height * .12), (.6 + nose * .5, top + height * .25), (.6 + nose * .8, top + height * .55),
                 (.63, top + height * .55)], COCKPIT, "window")
    pen.ellipse(.6 + nose - .05, top + height * .85, .035, .035, LAMP, "light", n=10)


def bicycle(pen: Pen) -> None:
    """Two spoked wheels and a tube frame; the tubes are drawn stout enough to survive at small sizes."""
    paint, tube = pen.pick(PAINT), .05
    r, half = pen.uniform(.25, .3), pen.uniform(.36, .42)
    for x in (-half, half):
        spoked_wheel(pen, x, -r, r, pen.uniform(.045, .06))
    saddle, head, crank = (-.17, -r - pen.uniform(.28, .36)), (.27, -r - pen.uniform(.3, .38)), (-.05, -r + .02)
    for path in ([(-half, -r), crank, saddle, (-half, -r)], [crank, (head[0] + .03, head[1] + .08), saddle],
                 [head, (half, -r)], [saddle, (saddle[0] - .03, saddle[1] - .07)]):
        pen.line(path, tube, paint, "frame")
    pen.ellipse(saddle[0] - .03, saddle[1] - .08, .12, .04, DARK, "seat")
    pen.line([head, (head[0] - .02, head[1] - .08), (head[0] + .11, head[1] - .12)], tube, DARK, "handle")
    pen.ellipse(crank[0], crank[1], .06, .06, DARK, "frame")


def motorbike(pen: Pen) -> None:
    """A motorbike from the side, facing right."""
    paint = pen.pick(PAINT)
    r, half = pen.uniform(.19, .24), pen.uniform(.36, .42)
    for x in (-half, half):
        wheel(pen, x, -r, r)
    y = -r - .12
    pen.line([(half, -r), (half - .17, y - .3)], .05, STEEL, "frame")
    pen.rounded_box(-.2, -r - .1, .2, -r + .14, pen.jitter((105, 105, 110), 12), "engine", power=3)
    pen.polygon([(-half - .12, y - .1), (-.1, y - .04), (.24, y - .12), (.2, -r - .05), (-.25, -r - .02)], paint, "body")
    pen.ellipse(.08, y - .13, .19, .1, paint, "body", angle=-.1)
    pen.ellipse(-.23, y - .1, .2, .055, DARK, "seat", angle=.08)
    pen.line([(half - .17, y - .3), (half - .32, y - .34)], .035, DARK, "handle")
    pen.ellipse(half - .11, y - .22, .06, .06, LAMP, "light")
    pen.line([(-.1, -r + .12), (-half - .16, -r + .07)], .06, shade(STEEL, 1.15), "engine")


def aeroplane(pen: Pen) -> None:
    """Seen from the side: far wing, fuselage, fin, tail plane, near wing with an engine under it."""
    paint = pen.pick(((230, 230, 235), (200, 205, 215), (150, 155, 165), (220, 225, 230)) + PAINT[:2], 10)
    r, accent, dip = pen.uniform(.08, .11), pen.pick(PAINT), pen.uniform(-.1, .1)
    dark, y = shade(paint, .8), -.3
    pen.polygon([(.12, y), (-.1, y), (-.28, y - pen.uniform(.2, .34) + dip), (-.18, y - .26 + dip)], shade(dark, .9), "wing")
    pen.rounded_box(-.62, y - r, .62, y + r, paint, "body", power=2.3)
    pen.polygon([(-.4, y - r * .6), (-.62, y - r - pen.uniform(.2, .28)), (-.7, y - r - .2), (-.6, y)], accent, "fin")
    pen.polygon([(-.44, y + .01), (-.72, y + .04), (-.74, y + .09), (-.56, y + .05)], dark, "fin")
    windows(pen, -.35, y - .035, .38, y + .005, 9, (60, 70, 90))
    pen.polygon([(.14, y + .03), (-.12, y + .03), (-.34, y + .03 + pen.uniform(.22, .36)), (-.22, y + .33)], dark, "wing")
    pen.rounded_box(-.12, y + .11, .06, y + .19, shade(paint, .55), "engine", power=3)
    pen.polygon([(.5, y - .06), (.56, y - .03), (.58, y), (.5, y - .01)], COCKPIT, "window")


def boat(pen: Pen) -> None:
    """A sailing boat or a cabin cruiser."""
    length, height, paint = pen.uniform(.9, 1.2), pen.uniform(.15, .22), pen.pick(PAINT + WOOD)
    if pen.chance(.55):
        mast = pen.uniform(.62, .85)
        pen.line([(0, -height), (0, -height - mast - .05)], .035, (92, 70, 50), "sail")
        cloth = pen.jitter((232, 228, 220), 12) if pen.chance(.7) else pen.pick(PAINT)
        pen.polygon([(.03, -height - .06), (.03, -height - mast), (.38, -height - .06)], cloth, "sail")
        pen.polygon([(-.03, -height - .06), (-.03, -height - mast * .9), (-.32, -height - .06)], shade(cloth, .88), "sail")
    else:
        roof, x = pen.uniform(.16, .25), pen.uniform(-.3, -.1)
        pen.polygon([(x + .03, -height - roof), (x + .39, -height - roof), (x + .44, -height + .01), (x, -height + .01)],
                    pen.jitter((225, 225, 220), 12), "cabin")
        windows(pen, x + .05, -height - roof * .8, x + .38, -height - roof * .35, 3)
        pen.line([(x + .1, -height - roof), (x + .1, -height - roof - .2)], .025, DARK, "cabin")
    pen.polygon([(-length / 2, -height), (length / 2 + .08, -height - .05), (length / 2 - .12, 0), (-length / 2 + .1, 0)],
                paint, "hull")
    pen.line([(-length / 2 + .02, -height + .03), (length / 2 + .03, -height - .01)], .03, shade(paint, .6) + 60, "hull")
