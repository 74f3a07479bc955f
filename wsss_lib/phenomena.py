"""Two failures of weak supervision as numbers, for drawn pictures that come with parts and contexts.

*Partial activation*: the map lights up the head and forgets the body, for the head tells the classes apart.
*False activation*: the map of the boat lights up the water, for the two are always seen together.
mIoU falls for both and tells neither; these counts do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from wsss_lib.evaluation import ArrayLike, as_mask_pair, as_masks


def _share(hits: float, pixels: float) -> float:
    return float(hits / pixels) if pixels else float("nan")


class PartCoverage:
    """How much of each group of parts (head, body, ...) is predicted as the object it belongs to.

    part_groups: group name -> the part ids it consists of. classes: ids (1..C) of the objects that count,
    such as those that differ in the head only. ValueError for no group, no class, or the background as one.
    """

    def __init__(
        self,
        part_groups: Mapping[str, Sequence[int]],
        classes: Sequence[int],
        num_classes: int = 20,
        ignore_index: int = 255,
    ) -> None:
        if not part_groups or not classes:
            raise ValueError(f"found {len(part_groups)} part groups, {len(classes)} classes, expected some")
        if not all(1 <= c <= num_classes for c in classes):
            raise ValueError(f"classes: found {list(classes)}, expected ids within 1..{num_classes}")
        self.part_groups = {name: tuple(ids) for name, ids in part_groups.items()}
        self.classes, self.num_classes, self.ignore_index = tuple(classes), num_classes, ignore_index
        self.hits, self.pixels = (np.zeros((len(part_groups), num_classes + 1), np.int64) for _ in range(2))

    def update(self, prediction: ArrayLike, mask: ArrayLike, parts: ArrayLike) -> None:
        """Add prediction, true mask and part ids, each (H, W) or (B, H, W); pixels where the mask is none
        of `classes` do not count. ValueError for unequal shapes, or class ids outside 0..C."""
        prediction, mask = as_mask_pair(prediction, mask, self.num_classes, self.ignore_index)
        parts = as_masks("parts", parts).to(mask.device)
        if parts.shape != mask.shape:
            found, expected = tuple(parts.shape), tuple(mask.shape)
            raise ValueError(f"parts: found shape {found}, expected {expected}, the mask's")
        wanted = torch.isin(mask, torch.tensor(self.classes, device=mask.device))
        for row, ids in enumerate(self.part_groups.values()):
            where = wanted & torch.isin(parts, torch.tensor(ids, dtype=torch.long, device=mask.device))
            for counts, chosen in ((self.pixels, where), (self.hits, where & (prediction == mask))):
                counts[row] += torch.bincount(mask[chosen], minlength=self.num_classes + 1).cpu().numpy()

    def coverage(self) -> dict[str, float]:
        """Group -> share (0..1) of its pixels, over all classes, predicted right; nan without a pixel."""
        hits, pixels = self.hits.sum(1), self.pixels.sum(1)
        return {name: _share(hits[row], pixels[row]) for row, name in enumerate(self.part_groups)}

    def per_class(self) -> dict[int, dict[str, float]]:
        """Class id -> group -> share (0..1), nan without a pixel."""
        rows = list(zip(self.part_groups, self.hits, self.pixels))
        return {c: {name: _share(hits[c], pixels[c]) for name, hits, pixels in rows} for c in self.classes}


class ContextActivation:
    """How much of each context (water, rails, sky, ...) is taken for each class that is in the picture.

    contexts: name -> id in the context map. Only true background (mask 0) counts: a boat on the water is no
    water. ValueError for no context or a negative id.
    """

    def __init__(self, num_classes: int, contexts: Mapping[str, int], ignore_index: int = 255) -> None:
        if not contexts or min(contexts.values()) < 0:
            raise ValueError(f"contexts: found {dict(contexts)}, expected some name -> id of 0 or more")
        self.num_classes, self.contexts, self.ignore_index = num_classes, dict(contexts), ignore_index
        self.hits, self.pixels = (np.zeros((num_classes, len(contexts)), np.int64) for _ in range(2))
        self.background_hits = self.background_pixels = 0

    def update(self, prediction: ArrayLike, mask: ArrayLike, contexts: ArrayLike, labels: ArrayLike) -> None:
        """Add prediction, true mask and context ids, each (H, W) or (B, H, W), and the image-level labels,
        multi-hot (C,) or (B, C). ValueError for unequal shapes, or class ids outside 0..C."""
        prediction, mask = as_mask_pair(prediction, mask, self.num_classes, self.ignore_index)
        contexts = as_masks("contexts", contexts).to(mask.device)
        if contexts.shape != mask.shape:
            found, expected = tuple(contexts.shape), tuple(mask.shape)
            raise ValueError(f"contexts: found shape {found}, expected {expected}, the mask's")
        present = np.atleast_2d(torch.as_tensor(labels).cpu().numpy() > 0)  # (C,) or (B, C) -> (B, C)
        if present.shape != (len(mask), self.num_classes):
            raise ValueError(f"labels: found shape {present.shape}, expected {(len(mask), self.num_classes)}")
        background = mask == 0
        self.background_pixels += int(background.sum())
        self.background_hits += int((background & (prediction > 0)).sum())
        for b, classes in enumerate(present):
            for column, context in enumerate(self.contexts.values()):
                seen = prediction[b][background[b] & (contexts[b] == context)]  # (P,)
                seen_as = torch.bincount(seen, minlength=self.num_classes + 1).cpu().numpy()
                self.pixels[:, column] += classes * len(seen)
                self.hits[:, column] += classes * seen_as[1:]

    def rates(self) -> np.ndarray:
        """(C, K) float64: share (0..1) of the background pixels of context k, over the pictures labelled with
        class c, that are predicted as c; nan without a pixel. Columns in the order of `contexts`."""
        return np.where(self.pixels > 0, self.hits / np.maximum(self.pixels, 1), np.nan)

    def background_rate(self) -> float:
        """Share (0..1) of all true background pixels that are predicted as any class; nan without a pixel."""
        return _share(self.background_hits, self.background_pixels)
