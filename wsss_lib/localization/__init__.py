"""Localisation: model and batch in -> maps (B, C, h, w) out."""

from .attention import class_attention, rollout
from .cam import cam, grad_cam
from .getam import combine_rows, getam
from .localize import METHODS, localize
from .normalize import normalize_maps
from .slots import class_slots

__all__ = ["METHODS", "cam", "class_attention", "class_slots", "combine_rows", "getam", "grad_cam",
           "localize", "normalize_maps", "rollout"]
