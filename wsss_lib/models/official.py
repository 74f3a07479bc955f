"""Published checkpoints -> our networks; the code that wrote them is not needed.

A method is one function: it reads the configuration off names and shapes, builds the network, and says how
our names translate to the published ones and which published tensors the network never uses.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable

import timm
from torch import nn

from .acr import AcrViT
from .afa import AfaNet
from .getam import GetamViT
from .published import Checkpoint, fill, read_checkpoint
from .segmenter import Segmenter
from .vit import create_backbone
from .weaktr import WeakTr

IMAGENET = {"mean": timm.data.IMAGENET_DEFAULT_MEAN, "std": timm.data.IMAGENET_DEFAULT_STD}
HEAD_DIM = 64  # of each attention head in every published network; shapes do not tell it


def load_official(method: str, path: str | os.PathLike) -> nn.Module:
    """The network of a published checkpoint, in eval mode, with `published=True`.

    method: one of LOADERS. path: the file that the published code wrote (a state dict by itself or under
    "model" or "state_dict", wrapped by DataParallel or not; loaded with weights_only) or the same tensors as
    .safetensors. Backbone, number of classes and widths follow from the tensors.

    `model.data_config` is ImageNet's mean and std: the published code normalises with it, whatever the
    backbone was pretrained with. `model.unused_weights` names the tensors of the file that the network never
    uses, as the published one did not; `model.missing_weights` is empty.
    Raises FileNotFoundError; ValueError for an unknown method, a file that holds no checkpoint, and a tensor
    that is missing, unexpected or of another shape: the message names file, tensor, found and expected.
    """
    if method not in LOADERS:
        raise ValueError(f"method: found {method!r}, expected one of {', '.join(LOADERS)}")
    model = LOADERS[method](read_checkpoint(path))
    model.data_config = {name: tuple(values) for name, values in IMAGENET.items()}
    return model.eval()


# ------------------------------------------------------------------ the methods


GETAM_NAMES = (  # ours, theirs; {} is the group plus one: they count levels from 1
    (r"backbone\.", "pretrained.model."),
    (r"classifier\.", "cls_head."),
    (r"reassemble\.(\d)\.readout\.", "pretrained.act_postprocess{}.0.project.0."),
    (r"reassemble\.(\d)\.project\.", "pretrained.act_postprocess{}.3."),
    (r"reassemble\.(\d)\.resize\.", "pretrained.act_postprocess{}.4."),
    (r"decoder\.project\.(\d)\.", "scratch.layer{}_rn."),
    (r"decoder\.fuse\.(\d)\.out\.", "scratch.refinenet{}.out_conv."),
    (r"decoder\.fuse\.(\d)\.merge\.norm", "scratch.refinenet{}.resConfUnit1.bn"),
    (r"decoder\.fuse\.(\d)\.merge\.", "scratch.refinenet{}.resConfUnit1."),
    (r"decoder\.fuse\.(\d)\.refine\.norm", "scratch.refinenet{}.resConfUnit2.bn"),
    (r"decoder\.fuse\.(\d)\.refine\.", "scratch.refinenet{}.resConfUnit2."),
    (r"decoder\.attention\.body\.", "cam_module.body."),
    (r"decoder\.attention\.gate\.", "cam_module.fc."),
    (r"decoder\.head\.", "scratch.output_conv."),
)
GETAM_UNUSED = (
    r"pretrained\.model\.norm\.",  # the blocks are read before the final norm
    r"pretrained\.model\.head(_dist)?\.",  # ImageNet's classes
    r"scratch\.refinenet4\.resConfUnit1\.",  # the coarsest level has nothing to be merged with
    r".*\.num_batches_tracked$",
)


def _load_getam(checkpoint: Checkpoint) -> nn.Module:
    backbone = _timm_backbone(checkpoint, "pretrained.model.")
    num_classes = checkpoint.shape("cls_head.weight", 2)[0]
    features = checkpoint.shape("scratch.layer1_rn.weight", 4)[0]
    model = GetamViT(backbone, num_classes, features, published=True)
    fill(model, checkpoint, GETAM_NAMES, GETAM_UNUSED)
    return model


WEAKTR_NAMES = (
    (r"backbone\.", ""),
    (r"coarse_head\.", "head."),
    (r"fusion\.describe\.", "adaptive_attention_fusion.attn_feat_ffn."),
    (r"fusion\.weigh\.", "adaptive_attention_fusion.attn_head_ffn."),
)
WEAKTR_UNUSED = (r"norm\.",)  # the tokens are read before the final norm
SEGMENTER_NAMES = (
    (r"backbone\.", "encoder."),
    (r"decoder\.project\.", "decoder.proj_dec."),
    (r"decoder\.label_tokens$", "decoder.cls_emb"),
    (r"decoder\.patch_projection$", "decoder.proj_patch"),
    (r"decoder\.label_projection$", "decoder.proj_classes"),
    (r"decoder\.norm\.", "decoder.decoder_norm."),
    (r"decoder\.", "decoder."),
)
SEGMENTER_UNUSED = (r"encoder\.head(_dist)?\.",)  # ImageNet's classes


def _load_weaktr(checkpoint: Checkpoint) -> nn.Module:
    """Of either stage: a `WeakTr`, or the `Segmenter` that is retrained on its masks.

    Shapes do not tell how the fusion pools. The published runs that reduce by 8 take the maximum, the code's
    defaults are 4 and the average; so 4 is read as "avg", all else as "max". `model.fusion.pool` may be set.
    """
    if "decoder.cls_emb" in checkpoint.tensors:
        labels = checkpoint.shape("decoder.cls_emb", 3)[1]
        backbone, depth = _timm_backbone(checkpoint, "encoder."), _depth(checkpoint, "decoder.")
        model = Segmenter(backbone, labels - 1, depth, published=True)
        fill(model, checkpoint, SEGMENTER_NAMES, SEGMENTER_UNUSED)
        return model
    fusion = "adaptive_attention_fusion."
    hidden, maps = checkpoint.shape(f"{fusion}attn_head_ffn.0.weight", 2)
    described, head_dim = checkpoint.shape(f"{fusion}attn_feat_ffn.0.weight", 2)
    classes = checkpoint.shape("cls_token", 3)[1]
    reduction = maps // hidden
    model = WeakTr(
        _timm_backbone(checkpoint, "", classes, head_dim), classes, "avg" if reduction == 4 else "max",
        reduction, head_dim // described, published=True)
    fill(model, checkpoint, WEAKTR_NAMES, WEAKTR_UNUSED)
    return model


ACR_NAMES = ((r"backbone\.", "pretrained.model."), (r"classifier\.", "cls_head."))
ACR_UNUSED = (
    r"pretrained\.model\.norm\.",  # the last block is read before the final norm
    r"pretrained\.model\.head(_dist)?\.",  # ImageNet's classes
    r"pretrained\.model\.bkg_token$",
    r"pretrained\.act_postprocess\d\.",  # parts of a decoder that the method does without
    r"scratch\.",
)


def _load_acr(checkpoint: Checkpoint) -> nn.Module:
    backbone = _timm_backbone(checkpoint, "pretrained.model.")
    model = AcrViT(backbone, checkpoint.shape("cls_head.weight", 2)[0], published=True)
    fill(model, checkpoint, ACR_NAMES, ACR_UNUSED)
    return model


AFA_NAMES = (
    (r"backbone\.", "encoder."),
    (r"classifier\.", "classifier."),
    (r"affinity\.", "attn_proj."),
    (r"decoder\.project\.(\d)\.", "decoder.linear_c{}.proj."),
    (r"decoder\.fuse\.", "decoder.linear_fuse.conv."),
    (r"decoder\.norm\.", "decoder.linear_fuse.bn."),
    (r"decoder\.predict\.", "decoder.linear_pred."),
)
AFA_UNUSED = (r".*\.num_batches_tracked$",)


def _load_afa(checkpoint: Checkpoint) -> nn.Module:
    """Nothing in the file tells the published runs' maximum from the mean: `model.pool` may be set."""
    widths = [checkpoint.shape(f"encoder.patch_embed{i}.proj.weight", 4)[0] for i in (1, 2, 3, 4)]
    depths = [_depth(checkpoint, "encoder.", f"block{i}") for i in (1, 2, 3, 4)]
    backbone = create_backbone("mit_b1", embed_dims=widths, depths=depths)
    classes = checkpoint.shape("classifier.weight", 4)[0]
    features = checkpoint.shape("decoder.linear_fuse.conv.weight", 4)[0]
    model = AfaNet(backbone, classes, features=features, published=True)
    fill(model, checkpoint, AFA_NAMES, AFA_UNUSED)
    return model


LOADERS: dict[str, Callable[[Checkpoint], nn.Module]] = {
    "getam": _load_getam, "weaktr": _load_weaktr, "acr": _load_acr, "afa": _load_afa,
}


def _timm_backbone(
    checkpoint: Checkpoint, prefix: str, class_tokens: int = 1, head_dim: int = HEAD_DIM
) -> nn.Module:
    """The ViT, distilled DeiT or R50+ViT of timm whose tensors these are (DeiT is ViT with other weights).

    class_tokens: how many the checkpoint has; the network of timm that is returned has one.
    """
    tokens, width = checkpoint.shape(f"{prefix}pos_embed", 3)[1:]
    distilled = f"{prefix}dist_token" in checkpoint.tensors
    hybrid = any(name.startswith(f"{prefix}patch_embed.backbone.") for name in checkpoint.tensors)
    patches = tokens - class_tokens - distilled
    side = math.isqrt(max(patches, 0))
    if side < 1 or side**2 != patches:
        expected = f"{class_tokens + distilled} and a square of patches"
        checkpoint.refuse(f"{prefix}pos_embed", f"{tokens} tokens", expected)
    if width % head_dim:
        checkpoint.refuse(f"{prefix}pos_embed", f"width {width}", f"a multiple of {head_dim}")
    name = "vit_base_r50_s16_384" if hybrid else "vit_base_patch16_384"
    if distilled:
        name = "deit_base_distilled_patch16_384"
    depth, heads = _depth(checkpoint, prefix), width // head_dim
    return create_backbone(name, img_size=16 * side, embed_dim=width, depth=depth, num_heads=heads)


def _depth(checkpoint: Checkpoint, prefix: str, blocks: str = "blocks") -> int:
    """How many blocks there are under this prefix, in the list of this name. ValueError for none."""
    numbered = re.compile(re.escape(prefix + blocks) + r"\.(\d+)\.")
    depth = len({m[1] for m in map(numbered.match, checkpoint.tensors) if m})
    if not depth:
        checkpoint.refuse(f"{prefix}{blocks}.0", "no such tensors", "blocks of a transformer")
    return depth
