"""The 20 classes: who draws them, how large they are, where they are usually seen."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from . import animals, furniture, vehicles
from .parts import Pen


@dataclass(frozen=True)
class ObjectSpec:
    """One class of ToyVOC.

    draw: draws it, given a pen and its place ("ground", "water", "air" or "wall").
    height, width: typical extent in object units.
    size: how large an object unit is beside other classes.
    contexts: the class's own contexts; a repeated entry is more likely.
    """

    draw: Callable[[Pen, str], None]
    height: float
    width: float
    size: float
    contexts: tuple[str, ...]


def _anywhere(draw: Callable[[Pen], None]) -> Callable[[Pen, str], None]:
    return lambda pen, place: draw(pen)


def _animal(kind: str) -> Callable[[Pen, str], None]:
    return _anywhere(partial(animals.quadruped, kind=kind))


OBJECTS = {
    "aeroplane": ObjectSpec(_anywhere(vehicles.aeroplane), .7, 1.4, 1.1, ("sky", "sky", "runway")),
    "bicycle": ObjectSpec(_anywhere(vehicles.bicycle), .78, 1.3, 1., ("road", "grass")),
    "bird": ObjectSpec(lambda pen, place: animals.bird(pen, flying=place == "air"), .8, 1., .8, ("sky", "grass", "water")),
    "boat": ObjectSpec(_anywhere(vehicles.boat), .9, 1.2, 1., ("water",)),
    "bottle": ObjectSpec(_anywhere(furniture.bottle), 1., .4, .75, ("indoor",)),
    "bus": ObjectSpec(_anywhere(vehicles.bus), .65, 1.3, 1.15, ("road",)),
    "car": ObjectSpec(_anywhere(vehicles.car), .55, 1.1, 1.1, ("road",)),
    "cat": ObjectSpec(_animal("cat"), .85, 1.25, .9, ("indoor", "grass")),
    "chair": ObjectSpec(_anywhere(furniture.chair), 1., .7, .9, ("indoor",)),
    "cow": ObjectSpec(_animal("cow"), .85, 1.25, 1.05, ("grass",)),
    "diningtable": ObjectSpec(_anywhere(furniture.diningtable), .65, 1.2, 1.05, ("indoor",)),
    "dog": ObjectSpec(_animal("dog"), .85, 1.25, .95, ("grass", "indoor", "road")),
    "horse": ObjectSpec(_animal("horse"), .95, 1.25, 1.05, ("grass",)),
    "motorbike": ObjectSpec(_anywhere(vehicles.motorbike), .8, 1.25, .9, ("road",)),
    "person": ObjectSpec(_anywhere(animals.person), 1.05, .5, 1.15, ("indoor", "road", "grass")),
    "pottedplant": ObjectSpec(_anywhere(furniture.pottedplant), .85, .8, .85, ("indoor",)),
    "sheep": ObjectSpec(_animal("sheep"), .85, 1.25, .95, ("grass",)),
    "sofa": ObjectSpec(_anywhere(furniture.sofa), .65, 1.2, 1.1, ("indoor",)),
    "train": ObjectSpec(_anywhere(vehicles.train), .55, 2.2, 1.25, ("rails",)),
    "tvmonitor": ObjectSpec(lambda pen, place: furniture.tvmonitor(pen, on_wall=place == "wall"), .7, 1., .9, ("indoor",)),
}

QUADRUPEDS = ("cat", "cow", "dog", "horse", "sheep")

# Who is usually seen together in a context.
COMPANIONS = {
    "indoor": ("person", "chair", "sofa", "diningtable", "tvmonitor", "bottle", "pottedplant", "cat", "dog"),
    "grass": ("cow", "horse", "sheep", "dog", "person", "bird", "bicycle", "cat"),
    "road": ("car", "bus", "bicycle", "motorbike", "person", "dog"),
    "rails": ("train", "person", "train"),
    "water": ("boat", "bird", "person", "boat"),
    "sky": ("aeroplane", "bird"),
    "runway": ("aeroplane", "car", "person", "bus"),
}
