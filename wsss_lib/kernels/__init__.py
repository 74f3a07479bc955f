"""Kernels: what would need an N x N attention matrix or 48 copies of a picture, computed without them."""

from .attention_affinity import attention_affinity
from .attention_consistency import attention_consistency_loss
from .attention_sum import propagate, weighted_attention_sum
from .dense_crf import DenseCRF, dense_crf, unary_from_labels, unary_from_probabilities
from .local_refinement import refine_cam

__all__ = ["DenseCRF", "attention_affinity", "attention_consistency_loss", "dense_crf", "propagate", "refine_cam",
           "unary_from_labels", "unary_from_probabilities", "weighted_attention_sum"]
