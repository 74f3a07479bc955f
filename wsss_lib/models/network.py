"""What every network here is made of: a backbone, and classes to tell apart."""

from __future__ import annotations

import timm
from torch import nn

from .vit import create_backbone, patch_stride


class Network(nn.Module):
    """A backbone whose heads come with the method.

    backbone: as of `create_backbone`, or its name. num_classes: C, without background.

    Attributes: backbone, num_classes, num_prefix_tokens (before the patches), patch_stride (pixels per token),
    data_config {"mean", "std"} of the normalisation that the backbone expects, for values in [0, 1].
    Raises ValueError for no classes and as `create_backbone`.
    """

    def __init__(self, backbone: nn.Module | str, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes: found {num_classes}, expected at least 1")
        self.backbone = create_backbone(backbone) if isinstance(backbone, str) else backbone
        self.num_classes = num_classes
        self.patch_stride = patch_stride(self.backbone)
        config = timm.data.resolve_model_data_config(self.backbone)
        self.data_config = {"mean": tuple(config["mean"]), "std": tuple(config["std"])}

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: class, distillation, registers."""
        return self.backbone.num_prefix_tokens
