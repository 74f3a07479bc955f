"""Losses of the methods; models return outputs only."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def classification_loss(model: nn.Module, batch: dict, step: int) -> dict[str, Tensor]:
    """Multi-label soft margin loss of both heads of a `CamViT`, from image-level labels: {"class", "patch"}.

    batch: image (B, 3, H, W), labels (B, C) multi-hot. Mean over pictures and classes of the binary cross entropy
    between sigmoid(logit) and label.
    """
    out = model.forward_heads(batch["image"])
    return {"class": F.multilabel_soft_margin_loss(out.class_logits.float(), batch["labels"]),
            "patch": F.multilabel_soft_margin_loss(out.pooled.float(), batch["labels"])}
