"""Weakly supervised semantic segmentation with vision transformers: masks learned from image-level labels."""
from .evaluation import Scores, evaluate
from .localization import localize, normalize_maps
from .models import create_model, load_official
from .refinement import pseudo_labels

__all__ = ["Scores", "create_model", "evaluate", "load_official", "localize", "normalize_maps", "pseudo_labels"]
__version__ = "0.1.0"
