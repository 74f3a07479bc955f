"""Mix Transformer: four stages of attention on ever coarser grids, and a small one for the course's pictures.

Source: SegFormer, Xie et al. 2021 (arXiv 2105.15203), section 3.1. There are no positions to be resized: 3x3
convolutions inside the MLPs tell tokens where they are. Where the grid is fine, keys and values come from a
coarser one (`sr_ratio`, "spatial reduction"), so attention is not square there.

The modules have the published names, so the published weights fit by key. In timm's registry: mit_b0, mit_b1,
mit_b2 and toymit. They speak the ViT's language: tokens of the last stage, no class token.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .toy import NORMS, Residual, _conv

__all__ = ["MixTransformer", "pooled_queries"]  # timm's registry adds mit_b0, mit_b1, mit_b2 and toymit

EPSILON = 1e-6  # of the blocks' norms and the stages' last; the others have LayerNorm's own, 1e-5
STAGES = (1, 2, 3, 4)
WIDE = (64, 128, 320, 512)  # of B1 and B2

_imagenet = {  # where timm's registry looks for the input that a model expects
    "input_size": (3, 224, 224), "num_classes": 1000, "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225), "interpolation": "bilinear", "crop_pct": 0.9,
    "first_conv": "patch_embed1.proj", "classifier": "head",
}
_toy = {
    **_imagenet, "input_size": (3, 112, 112), "num_classes": 20, "mean": (0.5,) * 3, "std": (0.25,) * 3,
    "crop_pct": 1.0, "first_conv": "patch_embed1.proj.0", "license": "mit",
}
default_cfgs = generate_default_cfgs(
    {**{name: _imagenet for name in ("mit_b0", "mit_b1", "mit_b2")}, "toymit": _toy})

Grid = tuple[int, int]


class OverlapPatchEmbed(nn.Module):
    """A picture or grid -> a coarser grid of tokens, each normalised: (B, C, H, W) -> (B, h*w, D), (h, w).

    proj: the convolution, whose windows overlap (or a stem of several).
    """

    def __init__(self, proj: nn.Module, dim: int) -> None:
        super().__init__()
        self.proj, self.norm = proj, nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), tuple(x.shape[-2:])  # (B, D, h, w) -> (B, h*w, D)


class Attention(nn.Module):
    """Attention whose keys and values are those of a grid sr_ratio times coarser: (B, N, D) -> (B, N, D).

    The coarse grid is a convolution of window and stride sr_ratio; rows and columns that fill no window are
    left out, a grid smaller than one window is filled up with zeros. fused_attn: as in timm, call the fused
    function, which an `AttentionTape` sees; False: softmax(q k^T) v step by step.
    """

    fused_attn = True

    def __init__(self, dim: int, num_heads: int, sr_ratio: int = 1) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads: found {num_heads}, expected a divisor of the width {dim}")
        self.num_heads, self.sr_ratio, self.scale = num_heads, sr_ratio, (dim // num_heads) ** -0.5
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        if sr_ratio > 1:
            self.sr, self.norm = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio), nn.LayerNorm(dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        q = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, N, D) -> (B, H, N, d)
        # (B, M, 2*D) -> (B, M, 2, H, d) -> (2, B, H, M, d)
        k, v = self.kv(self._reduced(x, grid)).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = (q * self.scale @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, H, N, d) -> (B, N, D)

    def _reduced(self, x: Tensor, grid: Grid) -> Tensor:
        """Tokens (B, N, D) -> those that keys and values are made of, (B, M, D)."""
        if self.sr_ratio == 1:
            return x
        x = x.transpose(1, 2).unflatten(2, grid)  # (B, N, D) -> (B, D, h, w)
        bottom, right = (max(0, self.sr_ratio - side) for side in grid)
        x = F.pad(x, (0, right, 0, bottom)) if bottom or right else x
        return self.norm(self.sr(x).flatten(2).transpose(1, 2))  # (B, D, h', w') -> (B, M, D)


def pooled_queries(q: Tensor, grid: Grid, sr_ratio: int) -> tuple[Tensor, Grid]:
    """Queries averaged over the windows that keys come from: (B, H, h*w, d) -> (B, H, M, d), grid of the M.

    AFA averages the scores q k^T over these windows of queries, which makes them square. Scores are linear in
    q, so the average of the queries gives the same without the large scores. sr_ratio 1 changes nothing.
    """
    if sr_ratio == 1:
        return q, grid
    # (B, H, h*w, d) -> (B, H, d, h, w) -> (B, H*d, h, w)
    pictures = q.transpose(2, 3).unflatten(3, grid).flatten(1, 2)
    pooled = F.avg_pool2d(pictures, tuple(min(sr_ratio, side) for side in grid))
    # (B, H*d, h', w') -> (B, H, d, M) -> (B, H, M, d)
    return pooled.unflatten(1, (q.shape[1], -1)).flatten(3).transpose(2, 3), tuple(pooled.shape[-2:])


class MixFFN(nn.Module):
    """The MLP of a block, with a 3x3 convolution of each hidden channel: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        convolution = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.dwconv = nn.Sequential(OrderedDict(dwconv=convolution))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        # (B, N, hidden) -> (B, hidden, h, w) -> (B, N, hidden)
        x = self.dwconv(self.fc1(x).transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        return self.fc2(F.gelu(x))


class Block(nn.Module):
    """x -> x + attention, then + MixFFN, norm before each: (B, N, D) -> (B, N, D), grid (h, w), N = h*w."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int, sr_ratio: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=EPSILON), nn.LayerNorm(dim, eps=EPSILON)
        self.attn = Attention(dim, num_heads, sr_ratio)
        self.mlp = MixFFN(dim, mlp_ratio * dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x), grid))


@dataclass(frozen=True)
class TokenGrid:
    """What is asked of a ViT's `patch_embed`: pixels per token; None: any size of picture."""

    stride: int
    in_chans: int
    img_size: None = None

    def feat_ratio(self, as_scalar: bool = True) -> int | Grid:
        """Pixels per token, along both sides unless as_scalar."""
        return self.stride if as_scalar else (self.stride, self.stride)


class MixTransformer(nn.Module):
    """A Mix Transformer without classifier.

    embed_dims, depths, num_heads, sr_ratios, strides: of the four stages. strides (4, 2, 2, 1) leave the last
    stage at 16 pixels per token, as AFA has it; SegFormer's are (4, 2, 2, 2), with the same weights.
    drop_path_rate: of the last block; it falls linearly to 0 at the first. stem: in place of the first
    convolution, (B, in_chans, H, W) -> (B, embed_dims[0], H/s, W/s), s = strides[0]. num_classes: what timm
    asks of every model; there is no classifier.

    Attributes: blocks, all of them in order; embed_dims; embed_dim, that of the tokens; num_prefix_tokens, 0.
    Raises ValueError for other than four stages or heads that do not divide the width.
    """

    num_prefix_tokens = 0
    dynamic_img_size = True

    def __init__(
        self,
        embed_dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int] = (1, 2, 5, 8),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        strides: Sequence[int] = (4, 2, 2, 1),
        mlp_ratio: int = 4,
        drop_path_rate: float = 0.1,
        in_chans: int = 3,
        stem: nn.Module | None = None,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        for name, values in (("embed_dims", embed_dims), ("depths", depths), ("num_heads", num_heads),
                             ("sr_ratios", sr_ratios), ("strides", strides)):
            if len(values) != 4 or min(values) < 1:
                raise ValueError(f"{name}: found {tuple(values)}, expected four whole numbers, one a stage")
        self.embed_dims, self.embed_dim = tuple(embed_dims), embed_dims[-1]
        self.patch_embed = TokenGrid(math.prod(strides), in_chans)
        total, channels, made = sum(depths), in_chans, 0
        for stage, dim, depth, heads, ratio, stride in zip(
                STAGES, embed_dims, depths, num_heads, sr_ratios, strides):
            window = 7 if stage == 1 else 3
            proj = nn.Conv2d(channels, dim, window, stride=stride, padding=window // 2)
            rates = [drop_path_rate * (made + i) / max(1, total - 1) for i in range(depth)]
            blocks = [Block(dim, heads, mlp_ratio, ratio, rate) for rate in rates]
            setattr(self, f"patch_embed{stage}", OverlapPatchEmbed(proj, dim))
            setattr(self, f"block{stage}", nn.ModuleList(blocks))
            setattr(self, f"norm{stage}", nn.LayerNorm(dim, eps=EPSILON))
            channels, made = dim, made + depth
        self.apply(_init)
        if stem is not None:  # with the weights that it starts with
            self.patch_embed1.proj = stem

    @property
    def blocks(self) -> list[Block]:
        """All blocks, of the first stage first."""
        return [block for stage in STAGES for block in getattr(self, f"block{stage}")]

    def forward_stages(self, images: Tensor) -> list[Tensor]:
        """Images (B, in_chans, H, W) -> four levels (B, D_i, h_i, w_i), finest first, normalised.

        Any size: h_i is H over the strides so far, rounded up. ValueError for other shapes."""
        if images.ndim != 4 or 0 in images.shape:
            raise ValueError(f"images: found shape {tuple(images.shape)}, expected (B, in_chans, H, W)")
        x, levels = images, []
        for stage in STAGES:
            tokens, grid = getattr(self, f"patch_embed{stage}")(x)
            for block in getattr(self, f"block{stage}"):
                tokens = block(tokens, grid)
            # (B, h*w, D) -> (B, D, h*w) -> (B, D, h, w)
            x = getattr(self, f"norm{stage}")(tokens).transpose(1, 2).unflatten(2, grid)
            levels.append(x)
        return levels

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> tokens of the last stage, normalised, row by row: (B, h*w, D)."""
        return self.forward_stages(images)[-1].flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, h*w, D)

    forward = forward_features


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):  # fan-out of one group
        fan_out = math.prod(module.kernel_size) * module.out_channels / module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.zeros_(module.bias)


def _build(name: str, pretrained: bool, kw: dict, **shape) -> MixTransformer:
    kw.pop("dynamic_img_size", None)  # always so
    kw["num_classes"] = 0  # timm then leaves a file's classifier out
    file = (kw.get("pretrained_cfg_overlay") or {}).get("file")
    if pretrained and not file:
        raise ValueError(
            f"{name}: timm has no weights for it; give those that SegFormer's authors published as "
            f'pretrained_cfg_overlay={{"file": "{name}.pth"}}')
    return build_model_with_cfg(MixTransformer, name, pretrained, **{**shape, **kw})


@register_model
def mit_b0(pretrained: bool = False, **kwargs) -> MixTransformer:
    """MiT-B0, 3.3 M parameters.

    pretrained: ImageNet's weights, from the file that pretrained_cfg_overlay={"file": path} names; ValueError
    where none is: timm has none to download.
    """
    return _build("mit_b0", pretrained, kwargs, embed_dims=(32, 64, 160, 256), depths=(2, 2, 2, 2))


@register_model
def mit_b1(pretrained: bool = False, **kwargs) -> MixTransformer:
    """MiT-B1, 13.2 M parameters, AFA's backbone; see `mit_b0`."""
    return _build("mit_b1", pretrained, kwargs, embed_dims=WIDE, depths=(2, 2, 2, 2))


@register_model
def mit_b2(pretrained: bool = False, **kwargs) -> MixTransformer:
    """MiT-B2, 24.2 M parameters; see `mit_b0`."""
    return _build("mit_b2", pretrained, kwargs, embed_dims=WIDE, depths=(3, 4, 6, 3))


@register_model
def toymit(pretrained: bool = False, stem_norm: str = "none", **kwargs) -> MixTransformer:
    """The course's Mix Transformer, for 112x112 pictures: 28x28, then 14x14 tokens, 1.7 M parameters.

    Like toyvit it sees the picture through a stem of convolutions, here to the first stage's grid, whose norm
    is stem_norm (see `toy`). Raises ValueError for another norm and for pretrained=True: the weights of a
    file include heads, which timm knows nothing of.
    """
    if pretrained:
        raise ValueError("toymit: timm has no weights for it; wsss_lib.create_model takes a file's path")
    if stem_norm not in NORMS:
        raise ValueError(f"norm: found {stem_norm!r}, expected one of {', '.join(NORMS)}")
    shape = {"embed_dims": (64, 96, 128, 128), "depths": (1, 1, 2, 3), "num_heads": (2, 3, 4, 4),
             "sr_ratios": (4, 2, 1, 1), "strides": (4, 2, 1, 1), "drop_path_rate": 0.0, **kwargs}
    dim = shape["embed_dims"][0]
    stem = nn.Sequential(  # (B, in_chans, H, W) -> (B, dim, H/4, W/4)
        *_conv(kwargs.get("in_chans", 3), dim // 2, stem_norm, stride=2), nn.ReLU(inplace=True),
        *_conv(dim // 2, dim, stem_norm, stride=2), nn.ReLU(inplace=True), Residual(dim, stem_norm))
    return _build("toymit", False, shape, stem=stem)
