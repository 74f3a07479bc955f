"""Models: batch in -> logits and features out. `create_model` builds them by name."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import paths
from .acr import AcrViT
from .afa import AfaNet, AfaOutput, AfaViT, afa_network
from .cam import CamOutput, CamViT
from .decoders import DPTDecoder
from .getam import GetamOutput, GetamViT
from .official import load_official
from .segmenter import MaskTransformer, Segmenter, sliding_window
from .toy import ConvStem, fold_batch_norm
from .vit import create_backbone, split_tokens
from .weaktr import WeakTr, WeakTrOutput

__all__ = ["METHODS", "AcrViT", "AfaNet", "AfaOutput", "AfaViT", "CamOutput", "CamViT", "ConvStem",
           "DPTDecoder", "GetamOutput", "GetamViT", "MaskTransformer", "Segmenter", "WeakTr", "WeakTrOutput",
           "create_backbone", "create_model", "fold_batch_norm", "load_official", "load_weights",
           "sliding_window", "split_tokens"]

METHODS: dict[str, Callable[..., nn.Module]] = {
    "cam": CamViT, "getam": GetamViT, "weaktr": WeakTr, "acr": AcrViT, "afa": afa_network,
    "segmenter": Segmenter,
}
SHIPPED = {name: f"checkpoints/{name}.safetensors" for name in ("toyvit", "toycnn", "toymit")}


def create_model(
    method: str,
    backbone: str = "toyvit",
    num_classes: int = 20,
    pretrained: bool | str | os.PathLike = True,
    **kw,
) -> nn.Module:
    """The network of a method, on a backbone of timm.

    method: one of METHODS. backbone: "toyvit" or a ViT of timm by name. num_classes: C, without background.
    pretrained: True loads the shipped weights of toyvit, toymit and toycnn, timm's for other backbones (their
    heads start at random); False starts at random; a path loads that safetensors file, written from a model like this.
    kw: arguments of the method's network (see its class); the others go to timm, for the backbone.

    The model lists in `missing_weights` its tensors that no file gave a value to (heads, where the file has
    another number of classes), in `unused_weights` those of the file that it has no place for.
    Raises ValueError for an unknown method or backbone and as `load_weights`; FileNotFoundError.
    """
    if method not in METHODS:
        raise ValueError(f"method: found {method!r}, expected one of {', '.join(METHODS)}")
    network = METHODS[method]
    own = inspect.signature(network).parameters
    own_kw = {name: value for name, value in kw.items() if name in own}
    timm_kw = {name: value for name, value in kw.items() if name not in own}
    file = None
    if isinstance(pretrained, (str, os.PathLike)):
        file = Path(pretrained)
    elif pretrained and backbone in SHIPPED:
        file = paths.shipped(SHIPPED[backbone])
    body = create_backbone(backbone, pretrained=bool(pretrained) and file is None, **timm_kw)
    model = network(body, num_classes=num_classes, **own_kw)
    if file is not None:
        load_weights(model, file)
    else:
        names = list(model.state_dict())
        model.missing_weights = [n for n in names if not (pretrained and n.startswith("backbone."))]
        model.unused_weights = []
    return model


def load_weights(model: nn.Module, file: str | os.PathLike) -> None:
    """Fill a model from a safetensors file of its own state dict, half precision or full.

    Where the file's header names a base, a file in the same folder, the tensors that it lacks are the base's.
    The backbone's tensors must all be there, and no others. A head's tensor is left alone where the file has
    none or one for another number of classes; see `missing_weights` and `unused_weights`, which this sets.
    Raises FileNotFoundError; ValueError that names file, tensor, found and expected shape.
    """
    file = Path(file)
    stored = _stored(file)
    if hasattr(model, "adapt_weights"):  # WeakTr: one class token in the file, one per class in the model
        stored = model.adapt_weights(stored)
    own = model.state_dict()
    _check_backbone(file, stored, own)
    loaded: dict[str, Tensor] = {}
    for name in stored.keys() & own.keys():
        found, expected = tuple(stored[name].shape), tuple(own[name].shape)
        if found == expected:
            loaded[name] = stored[name].to(own[name].dtype)
        elif name.startswith("backbone.") or found[1:] != expected[1:]:
            raise ValueError(f"{file}: {name}: found shape {found}, expected {expected}")
        # else a head for another number of classes
    model.load_state_dict(loaded, strict=False)
    model.missing_weights = [name for name in own if name not in loaded]
    model.unused_weights = sorted(stored.keys() - loaded.keys())


def _stored(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, and those that only its base has."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found, expected a safetensors file of weights")
    try:
        with safe_open(file, framework="pt") as opened:
            base = (opened.metadata() or {}).get("base")
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: found no safetensors file ({error})") from error
    return tensors if base is None else {**_stored(file.parent / base), **tensors}


def _check_backbone(file: Path, stored: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """ValueError unless both have the same tensors under `backbone.`."""
    for holder, other, found in ((own, stored, "no such tensor"), (stored, own, "a tensor")):
        names = sorted(n for n in holder.keys() - other.keys() if n.startswith("backbone."))
        if names:
            shape = tuple(holder[names[0]].shape)
            expected = f"shape {shape}" if holder is own else "none"
            found = found if holder is own else f"{found} of shape {shape}"
            more = f" ({len(names) - 1} more like it)" if len(names) > 1 else ""
            raise ValueError(f"{file}: {names[0]}: found {found}, expected {expected}{more}")
