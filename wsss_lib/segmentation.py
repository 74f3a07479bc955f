"""A segmentation network and a labelled split in, masks and their score out."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from .data.transforms import EvalTransform, scaled_views
from .evaluation import ConfusionMatrix
from .kernels.dense_crf import dense_crf, unary_from_probabilities
from .localization.cam import eval_mode
from .training import distributed


@torch.no_grad()
def segment(
    model: nn.Module, images: Tensor, scales: Sequence[float] = (1.0,), flip: bool = False
) -> Tensor:
    """Probabilities (B, C+1, H, W), background first, of a network that segments: no image-level labels needed.

    model: one with `forward_segmentation` (its `segmentation` is taken), such as an `AfaNet`, or one that returns
    logits (B, C+1, h, w), such as a `Segmenter`. images (B, 3, H, W), normalised. Each scale, and with flip its
    mirror image, is a pass of its own; its logits are mirrored back and resized to H x W (bilinear,
    align_corners False), and the views' probabilities averaged. Runs in eval mode.
    Raises ValueError for a network that does not segment and as `scaled_views`.
    """
    views = []
    with eval_mode(model):
        for _, flipped, view in scaled_views(images, scales, flip, model.patch_stride):
            decodes = hasattr(model, "forward_segmentation")
            out = model.forward_segmentation(view).segmentation if decodes else model(view)
            if out.ndim != 4:
                found = f"{type(model).__name__}, which returns {tuple(out.shape)}"
                raise ValueError(f"model: found {found}, expected one that segments: (B, C+1, h, w)")
            out = out.flip(-1) if flipped else out
            out = F.interpolate(out.float(), images.shape[-2:], mode="bilinear", align_corners=False)
            views.append(out.softmax(dim=1))
    return torch.stack(views).mean(dim=0)


def segmentation_report(
    model: nn.Module,
    data,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    limit: int | None = None,
    batch_size: int = 50,
    size: int | None = None,
    progress: bool = True,
    refine: str | None = None,
    crf: dict | None = None,
) -> dict:
    """Score a network's masks on a split opened with its masks: plain numbers, ready for JSON.

    size: pictures are resized to size x size for the network, its probabilities back to the picture's size;
    None: as they are. limit: the first so many pictures only. There is no threshold and no label: each pixel has
    the label of its highest probability, with refine "crf" after `dense_crf` (crf: its options). Of several
    processes each has its share; all return the whole report. Raises ValueError for another refine.
    """
    if refine not in (None, "crf"):
        raise ValueError(f"refine: found {refine!r}, expected None or 'crf'")
    started = time.perf_counter()
    device = next(model.parameters()).device
    transform = EvalTransform(size, mean=model.data_config["mean"], std=model.data_config["std"])
    confusion = ConfusionMatrix(model.num_classes)
    count = len(data) if limit is None else min(len(data), limit)
    places = distributed.share(count)
    for start in tqdm(range(0, len(places), batch_size), desc=f"segmenting {data.split}", disable=not progress):
        chunk = [data[i] for i in places[start:start + batch_size]]
        for _, group in groupby(chunk, lambda sample: sample.image.shape):
            group = list(group)
            images = torch.stack([transform(sample)["image"] for sample in group]).to(device)
            for sample, scores in zip(group, segment(model, images, scales, flip)):
                truth = torch.as_tensor(sample.mask)
                if scores.shape[-2:] != truth.shape:
                    scores = F.interpolate(scores[None], truth.shape, mode="bilinear", align_corners=False)[0]
                if refine == "crf":
                    unary = unary_from_probabilities(scores[None].cpu())
                    scores = dense_crf(unary, torch.as_tensor(sample.image)[None], **(crf or {}))[0]
                confusion.update(scores.argmax(dim=0).cpu(), truth)
    confusion.counts = distributed.total_counts(confusion.counts)
    found = confusion.scores(data.split)
    return {"options": {"scales": list(scales), "flip": flip, "refine": refine}, "split": data.split,
            "pictures": count, "labels": "none", "miou": round(float(found.miou), 4),
            "iou": [None if math.isnan(v) else round(float(v), 4) for v in found.iou],
            "seconds": round(time.perf_counter() - started, 1)}
