"""Backbones: plain vision transformers of timm, the course's own (`toy`) among them.

A backbone turns images (B, 3, H, W) into tokens (B, P + h*w, D): P prefix tokens (class, distillation,
registers), then the patches row by row. Nothing of timm is patched, so whatever it calls a ViT works.
"""

from __future__ import annotations

import difflib

import timm
import torch
from torch import Tensor, nn

from . import toy  # noqa: F401, timm's registry gets toyvit and toycnn


def create_backbone(name: str, pretrained: bool = False, **kw) -> nn.Module:
    """A timm ViT by name, without its classifier, for images of any size where timm allows that.

    name: as of `timm.list_models()`, with or without a tag (`name.tag`). pretrained: timm downloads weights.
    kw: handed to timm, e.g. drop_path_rate.
    Raises ValueError for names that timm does not know, and models that are no plain ViT: those without
    blocks, prefix tokens and one grid of square patches.
    """
    tagged = timm.list_models(include_tags=True) if "." in name else []
    if not timm.is_model(name) or (tagged and name not in tagged):
        near = difflib.get_close_matches(name, tagged or timm.list_models(), n=4)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models('*vit*')"
        raise ValueError(f"backbone: found {name!r}, expected a model that timm knows; {hint}")
    arguments = dict(pretrained=pretrained, num_classes=0, **kw)
    try:
        backbone = timm.create_model(name, **{"dynamic_img_size": True, **arguments})
    except TypeError as error:
        # Some transformers take one size only; timm tells by refusing the argument.
        if "dynamic_img_size" not in str(error) or "dynamic_img_size" in kw:
            raise
        backbone = timm.create_model(name, **arguments)
    _check_vit(name, backbone)
    return backbone


def forward_tokens(backbone: nn.Module, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) -> normalised tokens (B, P + h*w, D).

    ViTs made for average pooling norm after pooling (`fc_norm`), so their `forward_features` ends without a
    norm; here it is applied to each token. In all others fc_norm is the identity.
    """
    fc_norm = getattr(backbone, "fc_norm", None)
    tokens = backbone.forward_features(images)
    return tokens if fc_norm is None else fc_norm(tokens)


def patch_stride(backbone: nn.Module) -> int:
    """Pixels per token along each side, convolutional stem included. ValueError where the sides differ."""
    height, width = backbone.patch_embed.feat_ratio(as_scalar=False)
    if height != width:
        raise ValueError(f"backbone: found patches of {height}x{width} pixels, expected square ones")
    return height


def num_class_tokens(backbone: nn.Module) -> int:
    """How many of the first tokens stand for the image: class and distillation token, not registers."""
    return sum(getattr(backbone, name, None) is not None for name in ("cls_token", "dist_token"))


def token_grid(backbone: nn.Module, images: Tensor) -> tuple[int, int]:
    """(h, w): how many tokens high and wide the images (B, 3, H, W) become.

    ValueError for another number of dimensions, a size that is no multiple of the stride, or another size
    than the one that a backbone of fixed size takes.
    """
    if images.ndim != 4:
        raise ValueError(f"images: found shape {tuple(images.shape)}, expected (B, 3, H, W)")
    (height, width), stride = images.shape[-2:], patch_stride(backbone)
    if height % stride or width % stride or 0 in (height, width):
        raise ValueError(f"images: found {height}x{width} pixels, expected multiples of {stride}")
    fixed = tuple(backbone.patch_embed.img_size or ())
    if fixed and fixed != (height, width) and not getattr(backbone, "dynamic_img_size", False):
        expected = "x".join(map(str, fixed))
        raise ValueError(f"images: found {height}x{width} pixels, expected {expected}, its only size")
    return height // stride, width // stride


def split_tokens(
    tokens: Tensor, num_prefix_tokens: int, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Tokens (B, P + h*w, D) -> prefix (B, P, D), patches (B, D, h, w).

    grid: (h, w). Raises ValueError where the tokens are not P + h*w.
    """
    (height, width), prefix = grid, num_prefix_tokens
    if tokens.ndim != 3 or tokens.shape[1] != prefix + height * width:
        raise ValueError(
            f"tokens: found shape {tuple(tokens.shape)}, expected (B, {prefix + height * width}, D) for "
            f"{prefix} prefix tokens and a grid of {height}x{width}"
        )
    # (B, h*w, D) -> (B, D, h*w) -> (B, D, h, w)
    patches = tokens[:, prefix:].transpose(1, 2).unflatten(2, (height, width))
    return tokens[:, :prefix], patches


def _check_vit(name: str, backbone: nn.Module) -> None:
    """ValueError unless one small picture comes out as prefix tokens and a grid of patches."""
    needed = ("num_prefix_tokens", "blocks", "forward_features", "embed_dim", "patch_embed")
    missing = [attribute for attribute in needed if not hasattr(backbone, attribute)]
    if not missing and not hasattr(backbone.patch_embed, "feat_ratio"):
        missing = ["patch_embed.feat_ratio"]
    if missing:
        raise ValueError(f"backbone: found {name}, which has no {', '.join(missing)}; expected a plain ViT")
    stride = patch_stride(backbone)
    dynamic = getattr(backbone, "dynamic_img_size", False)
    size = (stride, 2 * stride) if dynamic else tuple(backbone.patch_embed.img_size)
    training = [module for module in backbone.modules() if module.training]
    backbone.eval()  # a stem with batch norm must not count this picture
    with torch.no_grad():
        picture = torch.zeros(1, getattr(backbone.patch_embed, "in_chans", 3), *size)
        tokens = backbone.forward_features(picture)
    for module in training:
        module.training = True
    try:
        split_tokens(tokens, backbone.num_prefix_tokens, token_grid(backbone, picture))
    except ValueError as error:
        raise ValueError(f"backbone: found {name}, which is no plain ViT: {error}") from error
