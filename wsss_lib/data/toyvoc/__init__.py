"""ToyVOC: the 20 PASCAL VOC classes, drawn from parametric parts, with every truth a picture can have.

parts.py draws shapes, animals.py / vehicles.py / furniture.py compose them, objects.py lists the classes,
backgrounds.py and scenes.py make a sample, build.py writes a VOC tree.
"""
from .backgrounds import CONTEXT_ID, CONTEXTS
from .build import build_toyvoc, statistics
from .objects import COMPANIONS, OBJECTS, QUADRUPEDS
from .parts import PART_GROUPS, PART_ID, PARTS
from .scenes import BIAS, SIZE, ToySample, VisibleObject, draw_sample

__all__ = [
    "BIAS", "COMPANIONS", "CONTEXTS", "CONTEXT_ID", "OBJECTS", "PARTS", "PART_GROUPS", "PART_ID", "QUADRUPEDS", "SIZE",
    "ToySample", "VisibleObject", "build_toyvoc", "draw_sample", "statistics",
]
