"""Refinement: maps in -> pseudo labels out."""

from .affinity_maps import affinity_maps
from .label_completion import (
    CompletedLabels,
    complete,
    complete_labels,
    completion_thresholds,
    initial_labels,
    open_regions,
)
from .label_crf import crf_labels
from .pseudo_labels import pseudo_labels, scored_maps
from .random_walk import radius_mask, random_walk
from .reliable_labels import combine_labels, propagated_labels, refine_scores, reliable_labels, threshold_labels
from .saliency import ContrastSaliency, FolderSaliency, contrast_saliency, saliency_report

__all__ = [
    "CompletedLabels", "ContrastSaliency", "FolderSaliency", "affinity_maps", "combine_labels", "complete",
    "complete_labels", "completion_thresholds", "contrast_saliency", "crf_labels", "initial_labels",
    "open_regions", "propagated_labels", "pseudo_labels", "radius_mask", "random_walk", "refine_scores",
    "reliable_labels", "saliency_report", "scored_maps", "threshold_labels",
]
