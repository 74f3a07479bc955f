"""Living things: five quadrupeds that share a body, a bird, a person.

The quadrupeds are what makes image-level supervision hard on purpose: trunk, legs, coat and tail come from one
distribution, whatever the class, and only the head group (head, ears, muzzle, horns, mane and the neck that carries
it) tells them apart. A classifier therefore needs the head alone, and its activation maps show it. The one
exception is wool, which a sheep nearly always and another animal now and then wears.
"""
from __future__ import annotations

import numpy as np

from .parts import DARK, FUR, PAINT, Color, Pen, four_legs, shade

BLACK, BONE, PINK = (14, 14, 14), (226, 216, 192), (205, 120, 120)
WOOL_CHANCE = {"sheep": .8, "other": .06}


def quadruped(pen: Pen, kind: str) -> None:
    """kind: cat, dog, cow, horse or sheep."""
    coat = pen.pick(FUR)
    length, height, leg = pen.uniform(.62, .88), pen.uniform(.25, .35), pen.uniform(.18, .34)
    if pen.chance(.12):
        leg = .05                                            # lying down
    middle = -leg - height / 2
    four_legs(pen, -length / 2 + .1, length / 2 - .1, middle + height * .2, pen.uniform(.06, .085), coat)
    _tail(pen, -length / 2 + .03, middle - height * .15, coat)
    pen.rounded_box(-length / 2, middle - height / 2, length / 2, middle + height / 2, coat, "body", power=2.6)
    patched, patch = pen.chance(.4), pen.pick(FUR)
    for _ in range(3):                                       # always drawn from the generator, so all kinds stay in step
        x, y = pen.uniform(-length * .32, length * .32), middle + pen.uniform(-height * .22, height * .22)
        rx, ry, angle = pen.uniform(.05, .12), pen.uniform(.04, .09), pen.uniform(0, 3)
        if patched:
            pen.ellipse(x, y, rx, ry, patch, "body", angle=angle)
    if pen.rng.random() < WOOL_CHANCE["sheep" if kind == "sheep" else "other"]:
        for t in np.linspace(0, 2 * np.pi, 15):
            pen.ellipse(length * .46 * np.cos(t), middle + height * .45 * np.sin(t), .078, .072, pen.jitter(coat, 5),
                        "body", n=12)
    HEADS[kind](pen, length / 2, middle, height, pen.jitter(coat, 6))


def _tail(pen: Pen, x: float, y: float, coat: Color) -> None:
    """One of four tails, whatever the animal."""
    kind, reach = pen.rng.integers(4), pen.uniform(.2, .34)
    if kind == 0:
        pen.line([(x, y), (x - .14, y - .04), (x - .18, y - .16), (x - .12, y - reach)], .045, coat, "tail")
    elif kind == 1:
        pen.line([(x, y), (x - .09, y - .1), (x - reach * .6, y - .18)], .05, coat, "tail")
    elif kind == 2:
        pen.polygon([(x, y - .03), (x - .09, y + .02), (x - .13, y + reach), (x - .04, y + reach), (x + .03, y + .08)],
                    shade(coat, .6), "tail")
    else:
        pen.line([(x, y), (x - .05, y + .1), (x - .05, y + reach)], .028, coat, "tail")
        pen.ellipse(x - .05, y + reach, .03, .05, shade(coat, .6), "tail", n=12)


def _eye(pen: Pen, x: float, y: float, radius: float, color: Color = BLACK) -> None:
    pen.ellipse(x, y, radius, radius, color, "head", n=8)


def _short_neck(pen: Pen, chest: float, middle: float, height: float, coat: Color) -> tuple[float, float]:
    """Where the head sits, and the neck up to it."""
    x, y = chest + pen.uniform(.02, .08), middle - height * .4 - pen.uniform(-.04, .13)
    pen.line([(chest - .1, middle - height * .1), (x, y)], height * .58, coat, "neck")
    return x, y


def _cat(pen: Pen, chest: float, middle: float, height: float, coat: Color) -> None:
    x, y = _short_neck(pen, chest, middle, height, coat)
    r, eyes = pen.uniform(.14, .17), pen.jitter((150, 190, 60), 20)
    for side in (-1, 1):
        pen.polygon([(x + side * r, y - r * .2), (x + side * r * .85, y - r * 1.65), (x + side * r * .1, y - r * .8)],
                    coat, "ear")
        pen.polygon([(x + side * r * .85, y - r * .5), (x + side * r * .78, y - r * 1.3),
                     (x + side * r * .35, y - r * .75)], PINK, "ear")
    pen.ellipse(x, y, r, r * .9, coat, "head")
    for side in (-1, 1):
        pen.ellipse(x + side * r * .42, y - r * .12, r * .24, r * .18, eyes, "head", n=10)
        pen.ellipse(x + side * r * .42, y - r * .12, r * .08, r * .18, BLACK, "head", n=8)
        for dy in (.28, .6):
            pen.line([(x + side * r * .25, y + r * .4), (x + side * r * 1.3, y + r * dy)], .01, (232, 232, 232), "muzzle")
    pen.polygon([(x - r * .16, y + r * .2), (x + r * .16, y + r * .2), (x, y + r * .42)], PINK, "muzzle")


def _dog(pen: Pen, chest: float, middle: float, height: float, coat: Color) -> None:
    x, y = _short_neck(pen, chest, middle, height, coat)
    r = pen.uniform(.135, .165)
    pen.ellipse(x, y, r, r * .92, coat, "head")
    pen.ellipse(x + r * 1.05, y + r * .32, r * .78, r * .42, coat, "muzzle", angle=.1)
    pen.ellipse(x + r * 1.7, y + r * .2, r * .24, r * .22, BLACK, "muzzle", n=10)
    _eye(pen, x + r * .35, y - r * .2, r * .14)
    if pen.chance(.75):                                      # hanging ear, else a pricked one
        pen.ellipse(x - r * .45, y + r * .25, r * .38, r * .92, shade(coat, .55), "ear", angle=.15)
    else:
        pen.polygon([(x - r * .85, y - r * .3), (x - r * .6, y - r * 1.6), (x + r * .1, y - r * .75)], shade(coat, .6), "ear")
    if pen.chance(.4):
        pen.polygon([(x + r * .7, y + r * .6), (x + r * 1.2, y + r * .7), (x + r, y + r * 1.25)], (215, 90, 100), "muzzle")


def _cow(pen: Pen, chest: float, middle: float, height: float, coat: Color) -> None:
    x, y = _short_neck(pen, chest, middle, height, coat)
    r = pen.uniform(.13, .16)
    for side in (-1, 1):
        pen.line([(x + side * r * .5, y - r * .6), (x + side * r * 1.1, y - r * .95), (x + side * r * 1.15, y - r * 1.6)],
                 .04, BONE, "horn")
        pen.ellipse(x + side * r * 1.05, y - r * .3, r * .45, r * .2, coat, "ear", angle=side * .3)
    pen.ellipse(x, y, r * .78, r * 1.1, coat, "head")
    pen.ellipse(x, y + r * .85, r * .68, r * .42, pen.jitter((215, 165, 150), 10), "muzzle")
    for side in (-1, 1):
        pen.ellipse(x + side * r * .25, y + r * .85, r * .11, r * .11, (60, 30, 30), "muzzle", n=8)
        _eye(pen, x + side * r * .38, y - r * .15, r * .12)


def _horse(pen: Pen, chest: float, middle: float, height: float, coat: Color) -> None:
    x, y = chest + .12, middle - height * .5 - pen.uniform(.12, .3)
    dark = shade(coat, .5)
    pen.polygon([(chest - .22, middle - height * .4), (x - .1, y - .06), (x + .06, y + .06), (chest, middle + height * .2)],
                coat, "neck")
    pen.polygon([(chest - .26, middle - height * .42), (x - .14, y - .1), (x - .02, y - .12), (x - .05, y + .02),
                 (chest - .14, middle - height * .28)], dark, "mane")
    pen.ellipse(x + .07, y + .04, .19, .085, coat, "head", angle=.65)
    pen.polygon([(x - .05, y - .05), (x - .04, y - .17), (x + .03, y - .06)], coat, "ear")
    pen.ellipse(x + .17, y + .13, .06, .052, dark, "muzzle", n=12)
    _eye(pen, x + .04, y - .005, .02)
    if pen.chance(.4):
        pen.line([(x + .03, y - .05), (x + .15, y + .07)], .03, (238, 236, 230), "head")      # blaze


def _sheep(pen: Pen, chest: float, middle: float, height: float, coat: Color) -> None:
    x, y = _short_neck(pen, chest, middle, height, coat)
    r = pen.uniform(.14, .17)
    face = pen.jitter((50, 45, 42), 8) if pen.chance(.6) else shade(coat, .8)
    pen.ellipse(x - .03, y - r * .5, r * .78, r * .55, coat, "head")
    for side in (-1, 1):
        pen.ellipse(x + side * r * .78, y - r * .05, r * .42, r * .17, face, "ear", angle=side * .5)
    pen.ellipse(x, y + r * .2, r * .52, r * .88, face, "head")
    for side in (-1, 1):
        _eye(pen, x + side * r * .22, y, r * .12, (236, 226, 190))
        _eye(pen, x + side * r * .22, y, r * .05)


HEADS = {"cat": _cat, "dog": _dog, "cow": _cow, "horse": _horse, "sheep": _sheep}


def bird(pen: Pen, flying: bool) -> None:
    """A bird on its legs, or with spread wings."""
    color = pen.pick(FUR + ((60, 110, 170), (180, 60, 50), (220, 190, 60)))
    dark, y = shade(color, .7), -.38
    if not flying:
        for x in (-.04, .06):
            pen.line([(x, y + .12), (x + .02, 0)], .025, (190, 140, 60), "leg")
            pen.line([(x - .02, -.01), (x + .09, -.01)], .02, (190, 140, 60), "leg")
    pen.polygon([(-.22, y), (-.56, y + pen.uniform(-.08, .12)), (-.52, y + .14), (-.2, y + .1)], dark, "tail")
    if flying:
        pen.polygon([(.1, y), (-.12, y), (-.32, y - pen.uniform(.3, .5)), (-.05, y - .36)], shade(dark, .8), "wing")
    pen.ellipse(0, y, .29, pen.uniform(.14, .19), color, "body", angle=-.25)
    x, top, r = .28, y - pen.uniform(.14, .24), pen.uniform(.1, .125)
    pen.line([(.18, y - .04), (x, top)], r * 1.5, color, "neck")
    pen.ellipse(x, top, r, r, pen.jitter(color, 8), "head")
    pen.polygon([(x + r * .8, top - .045), (x + r + pen.uniform(.1, .2), top + .02), (x + r * .8, top + .05)],
                (230, 160, 40), "beak")
    _eye(pen, x + .03, top - .03, .024)
    if flying:
        pen.polygon([(.12, y), (-.14, y + .02), (-.4, y - pen.uniform(.25, .45)), (-.15, y - .42)], dark, "wing")
    else:
        pen.ellipse(-.08, y, .2, .1, dark, "wing", angle=-.3)


def person(pen: Pen) -> None:
    """Standing or sitting, arms anywhere."""
    skin = pen.pick(((226, 182, 152), (190, 140, 105), (122, 82, 56), (240, 202, 178)), 8)
    shirt, trousers = pen.pick(PAINT), pen.pick(PAINT + ((50, 60, 100), (62, 62, 62)))
    hair = pen.pick(((40, 30, 25), (92, 62, 32), (190, 150, 82), (122, 122, 122)))
    width, sitting = pen.uniform(.1, .14), pen.chance(.15)
    hip = .2 if sitting else pen.uniform(.38, .46)
    shoulder = -hip - .36
    for side in (-1, 1):
        x = side * width * .55
        foot = x + (.22 if sitting else pen.uniform(-.08, .08))
        knee = (x + .2, -hip) if sitting else ((x + foot) / 2 + .02, -hip / 2)
        pen.line([(x, -hip), knee, (foot, -.04)], .095, trousers, "leg")
        pen.ellipse(foot + .03, -.02, .07, .03, DARK, "leg", n=10)

    def arm(side: int) -> None:
        swing = pen.uniform(-.6, .5)
        elbow = (side * (width + .04 + .1 * abs(np.sin(swing))), shoulder + .19 * np.cos(swing))
        hand = (elbow[0] + .16 * np.sin(swing) * side + .03, elbow[1] + .16 * np.cos(swing * 1.5))
        pen.line([(side * width * .9, shoulder + .04), elbow], .07, shirt, "arm")
        pen.line([elbow, hand], .055, skin, "arm")
        pen.ellipse(hand[0], hand[1], .035, .035, skin, "arm", n=10)

    arm(-1)
    pen.polygon([(-width - .02, shoulder), (width + .02, shoulder), (width * .85, -hip + .04), (-width * .85, -hip + .04)],
                shirt, "torso")
    arm(1)
    r = pen.uniform(.088, .108)
    pen.line([(0, shoulder), (0, shoulder - .06)], .07, skin, "neck")
    y = shoulder - .04 - r
    pen.ellipse(0, y - .02, r * 1.1, r * 1.15, hair, "hair")
    pen.ellipse(.015, y + .018, r * .88, r, skin, "head")
    for x in (-.02, .05):
        pen.ellipse(x, y, .014, .014, (20, 20, 20), "head", n=6)
