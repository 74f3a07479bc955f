"""Localisation: model and batch in -> maps (B, C, h, w) out."""

from .acr import acr_maps, spread
from .affinity_cam import AffinityMaps, affinity_cam
from .attention import class_attention, rollout
from .cam import cam, grad_cam
from .fusion import weaktr_maps
from .getam import combine_rows, getam
from .localize import METHODS, localize
from .normalize import normalize_maps
from .slots import class_slots

__all__ = ["METHODS", "AffinityMaps", "acr_maps", "affinity_cam", "cam", "class_attention", "class_slots",
           "combine_rows", "getam", "grad_cam", "localize", "normalize_maps", "rollout", "spread", "weaktr_maps"]
