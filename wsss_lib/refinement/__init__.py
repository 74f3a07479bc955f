"""Refinement: maps in -> pseudo labels out."""

from .pseudo_labels import pseudo_labels, scored_maps

__all__ = ["pseudo_labels", "scored_maps"]
