"""Pictures, image-level labels and masks in -> batches out."""
from .coco import COCO
from .sample import Sample
from .voc import VOC, VOC_CLASSES, build_train_aug, voc_palette

__all__ = ["COCO", "VOC", "VOC_CLASSES", "Sample", "build_train_aug", "voc_palette"]
