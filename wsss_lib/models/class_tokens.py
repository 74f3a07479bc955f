"""A class token for each class on a ViT of timm, where timm has one for the whole picture.

Source: WeakTr, Zhu et al. 2023 (arXiv 2304.01184), after MCTformer, Xu et al. 2022 (arXiv 2203.02891). The
backbone stays timm's: only its parameters `cls_token` and `pos_embed` grow.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


def expand_class_tokens(backbone: nn.Module, count: int) -> nn.Module:
    """Give a timm ViT `count` copies of its class token and of the token's position; in place, returned.

    Class tokens come first; distillation and register tokens follow, as before. Where positions are for
    patches only (registers, RoPE) the tokens have none of their own: being learned themselves, they would
    gain nothing. Raises ValueError for other than one class token.
    """
    found = 0 if getattr(backbone, "cls_token", None) is None else backbone.cls_token.shape[1]
    if found != 1:
        raise ValueError(f"backbone: found {found} class tokens, expected one: it is copied for each class")
    if _embeds_prefix(backbone):
        backbone.pos_embed = nn.Parameter(_repeat_first(backbone.pos_embed.detach(), count))
    backbone.cls_token = nn.Parameter(backbone.cls_token.detach().repeat(1, count, 1))
    for module in backbone.modules():  # rotary attention and patch dropout count them as well
        if hasattr(module, "num_prefix_tokens"):
            module.num_prefix_tokens += count - 1
    return backbone


def repeat_stored_class_token(
    stored: dict[str, Tensor], prefix: str, count: int, backbone: nn.Module
) -> dict[str, Tensor]:
    """Weights by name, of the backbone before `expand_class_tokens` -> after it; of after it, as they are.

    prefix: where the backbone's names start, e.g. "backbone.". The tensors of `stored` are left alone.
    """
    token, positions = (stored.get(f"{prefix}{name}") for name in ("cls_token", "pos_embed"))
    if token is None or token.shape[1] != 1:
        return stored
    stored = {**stored, f"{prefix}cls_token": token.repeat(1, count, 1)}
    if positions is not None and _embeds_prefix(backbone):
        stored[f"{prefix}pos_embed"] = _repeat_first(positions, count)
    return stored


def _embeds_prefix(backbone: nn.Module) -> bool:
    """Have the prefix tokens positions of their own?"""
    return getattr(backbone, "pos_embed", None) is not None and not getattr(backbone, "no_embed_class", False)


def _repeat_first(positions: Tensor, count: int) -> Tensor:
    """(1, N, D) -> (1, count - 1 + N, D), the first of them `count` times."""
    return torch.cat([positions[:, :1].repeat(1, count, 1), positions[:, 1:]], dim=1)


# ------------------------------------------------------------------ what the published code computes


def resize_positions_as_published(backbone: nn.Module) -> nn.Module:
    """Make a ViT of timm resize its positions as DINO's code did and WeakTr's does; in place, returned.

    Bicubic without antialiasing, by the factor (h + 0.1) / h0 for h0 -> h rows: the samples lie a little
    closer together than h0 / h. Raises ValueError for other than a ViT or DeiT with learned positions.
    """
    known = type(backbone) in (VisionTransformer, PublishedWeakTrViT) and _embeds_prefix(backbone)
    if not known or backbone.reg_token is not None:
        raise ValueError(f"backbone: found {type(backbone).__name__}, expected, as published, a ViT or DeiT "
                         "with a learned position for each class token and patch")
    if backbone.dynamic_img_size:  # of a fixed size, there is nothing to resize
        backbone.__class__ = PublishedWeakTrViT
    return backbone


class PublishedWeakTrViT(VisionTransformer):
    """A ViT of timm with class tokens, and positions resized as published."""

    def _pos_embed(self, patches: Tensor) -> Tensor:
        """Patches (B, h, w, D) -> class tokens and patches with their positions, (B, C + h*w, D)."""
        (batch, *grid, _), count = patches.shape, self.num_prefix_tokens
        positions, native = self.pos_embed, self.patch_embed.grid_size
        if tuple(grid) != tuple(native):
            # (1, h0*w0, D) -> (1, D, h0, w0) -> (1, D, h, w) -> (1, h*w, D)
            patch_positions = positions[:, count:].transpose(1, 2).unflatten(2, native)
            factors = tuple((new + 0.1) / math.sqrt(math.prod(native)) for new in grid)
            patch_positions = F.interpolate(patch_positions, scale_factor=factors, mode="bicubic")
            positions = torch.cat([positions[:, :count], patch_positions.flatten(2).transpose(1, 2)], dim=1)
        tokens = torch.cat([self.cls_token.expand(batch, -1, -1), patches.flatten(1, 2)], dim=1)
        return self.pos_drop(tokens + positions)
