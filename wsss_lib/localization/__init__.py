"""Localisation: model and batch in -> maps (B, C, h, w) out."""

from .cam import cam, grad_cam
from .localize import METHODS, localize
from .normalize import normalize_maps
from .slots import class_slots

__all__ = ["METHODS", "cam", "class_slots", "grad_cam", "localize", "normalize_maps"]
