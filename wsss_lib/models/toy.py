"""The course's own backbones: a small ViT on a convolutional stem, and a plain CNN of equal size as its contrast.

Both are registered in timm and made for ToyVOC's 112x112 pictures, 14x14 tokens of 8 pixels. Small networks
on few pictures learn far faster through a stem of convolutions than from raw patches, and the stem learns
far faster with batch norm than with group norm (`data/results/pretraining.json`). Batch norm mixes the
pictures of a batch, though, and its statistics drift when a model is fine-tuned on other data. So it serves
in pretraining only: `fold_batch_norm` then turns it into the convolutions' weights and biases, and what
ships, and is fine-tuned, has no norm in its stem at all.
"""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from timm.layers import HybridEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ["ConvStem", "ToyCNN", "fold_batch_norm"]  # timm's registry adds toyvit and toycnn

WIDTH = 128
NORMS = {
    "none": lambda channels: nn.Identity(),
    "batch": nn.BatchNorm2d,
    "group": functools.partial(nn.GroupNorm, 8),
}

_config = {  # where timm's registry looks for the input that a model expects
    "input_size": (3, 112, 112), "fixed_input_size": True, "num_classes": 20, "pool_size": None,
    "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "interpolation": "bilinear", "crop_pct": 1.0,
    "first_conv": "patch_embed.backbone.down1.0", "classifier": "head", "license": "mit",
}
default_cfgs = generate_default_cfgs({"toyvit": _config, "toycnn": _config})


def _conv(in_chans: int, channels: int, norm: str, stride: int = 1) -> list[nn.Module]:
    """A 3x3 convolution and its norm; the bias is the norm's where there is one."""
    conv = nn.Conv2d(in_chans, channels, 3, stride=stride, padding=1, bias=norm == "none")
    if norm == "none":  # no norm will mend the scale
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        nn.init.zeros_(conv.bias)
    return [conv, NORMS[norm](channels)]


class Residual(nn.Module):
    """x -> relu(x + two 3x3 convolutions of x): (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, norm: str = "none") -> None:
        super().__init__()
        first, second = _conv(channels, channels, norm), _conv(channels, channels, norm)
        self.body = nn.Sequential(*first, nn.ReLU(inplace=True), *second)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


class ConvStem(nn.Module):
    """Images (B, in_chans, H, W) -> features (B, 128, H/8, W/8), for H and W that are multiples of 8.

    norm: "none" (the form that ships), "batch" or "group". Raises ValueError for another one.
    """

    def __init__(self, in_chans: int = 3, norm: str = "none") -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm: found {norm!r}, expected one of {', '.join(NORMS)}")
        self.down1 = nn.Sequential(*_conv(in_chans, 32, norm, stride=2), nn.ReLU(inplace=True))
        self.down2 = nn.Sequential(*_conv(32, 64, norm, stride=2), nn.ReLU(inplace=True))
        self.block2 = Residual(64, norm)
        self.down3 = nn.Sequential(*_conv(64, WIDTH, norm, stride=2), nn.ReLU(inplace=True))
        self.block3 = Residual(WIDTH, norm)

    def forward(self, images: Tensor) -> Tensor:
        x = self.block2(self.down2(self.down1(images)))  # (B, 64, H/4, W/4)
        return self.block3(self.down3(x))  # (B, 128, H/8, W/8)


@torch.no_grad()
def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Turn every BatchNorm2d that follows a Conv2d in a Sequential into that convolution's weight and bias.

    In place; returns the model. In eval mode the outputs stay the same up to rounding. A model built with
    norm="batch" has the tensors of one built with norm="none" afterwards.
    """
    training = model.training
    model.eval()
    for part in [m for m in model.modules() if isinstance(m, nn.Sequential)]:
        for i, (conv, norm) in enumerate(itertools.pairwise(part)):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                part[i], part[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return model.train(training)


@register_model
def toyvit(pretrained: bool = False, stem_norm: str = "none", **kwargs) -> VisionTransformer:
    """The course's backbone: ConvStem, then 6 blocks of width 128 with 4 heads, 1.7 M parameters.

    Raises ValueError for pretrained=True: the shipped weights include heads, which timm knows nothing of.
    """
    _no_weights("toyvit", pretrained)
    stem = functools.partial(HybridEmbed, backbone=ConvStem(kwargs.get("in_chans", 3), stem_norm))
    # patch_size 1: a token is one position of the stem's output, projected by a 1x1 convolution.
    shape = {"img_size": 112, "patch_size": 1, "embed_dim": WIDTH, "depth": 6, "num_heads": 4, "embed_layer": stem}
    return build_model_with_cfg(VisionTransformer, "toyvit", False, **{**shape, **kwargs})


class ToyCNN(nn.Module):
    """ConvStem, then residual blocks on 14x14 features: what CAM was invented on, as large as toyvit.

    It speaks the ViT's language: `forward_features` gives the positions as tokens (B, h*w, 128), without a
    class token, so that `CamViT` puts the same patch head on it.
    """

    num_prefix_tokens = 0
    dynamic_img_size = True
    embed_dim = WIDTH

    def __init__(self, depth: int = 4, in_chans: int = 3, stem_norm: str = "none", num_classes: int = 0, **_) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.patch_embed = HybridEmbed(
            ConvStem(in_chans, stem_norm), img_size=112, patch_size=1, in_chans=in_chans, embed_dim=WIDTH,
            flatten=False, output_fmt="NCHW", dynamic_img_pad=False, strict_img_size=False)
        self.blocks = nn.Sequential(*[Residual(WIDTH, stem_norm) for _ in range(depth)])

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> tokens (B, H/8 * W/8, 128)."""
        return self.blocks(self.patch_embed(images)).flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, h*w, D)

    forward = forward_features


@register_model
def toycnn(pretrained: bool = False, **kwargs) -> ToyCNN:
    """A plain CNN with toyvit's stem and number of parameters; see `ToyCNN`. Raises as `toyvit`."""
    _no_weights("toycnn", pretrained)
    kwargs.pop("dynamic_img_size", None)
    return build_model_with_cfg(ToyCNN, "toycnn", False, **kwargs)


def _no_weights(name: str, pretrained: bool) -> None:
    if pretrained:
        raise ValueError(f"{name}: timm has no weights for it; wsss_lib.create_model('cam', '{name}', "
                         "pretrained=True) loads the shipped ones")
