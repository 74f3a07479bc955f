"""Mosaic pretraining: teach a small ViT where things are from image-level labels alone.

A picture-level loss is satisfied by any patch that gives the class away, background included: a classifier
trained on pooled patch logits floods the picture. A mosaic of four pictures says more with the same labels:
the patches of a quadrant must name *its* picture's classes and not its neighbours', although attention sees
all four. No mask, no box, nothing but image-level labels is used.

Two stages on one schedule: single-object pictures (softmax cross entropy works there), then scenes.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.voc import VOC
from .engine import step_seed


@dataclass(frozen=True)
class MosaicRecipe:
    """Hyper-parameters of the pretraining (shares are of a batch, of the steps or of the patches).

    batch: pictures and mosaics together. mosaics: share that are mosaics. singles_until: share of the steps
    spent on single-object pictures. quadrant_share: share of a quadrant's patches whose logits are averaged
    into its prediction; a whole picture uses the model's own `pool`.
    Raises ValueError for a batch below 1 and shares outside 0..1.
    """

    batch: int = 32
    mosaics: float = .5
    singles_until: float = .4
    quadrant_share: float = .12
    label_smoothing: float = .05

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch: found {self.batch}, expected 1 or more")
        for name in ("mosaics", "singles_until", "quadrant_share", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected a share, 0..1")


class PictureStore:
    """All pictures of a split in memory, as uint8, with their labels: (N, 3, S, S) and (N, C)."""

    def __init__(self, root: str | Path, split: str, progress: bool = True) -> None:
        data = VOC(root, split)
        bar = tqdm(range(len(data)), desc=f"reading {split}", unit="picture", disable=not progress)
        self.images = torch.stack([torch.as_tensor(data[i].image) for i in bar])
        self.labels = data.labels

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` random pictures, as float in 0..1, with labels."""
        index = torch.randint(len(self.images), (count,), generator=generator)
        return self.images[index].float() / 255, self.labels[index]


def augment(images: Tensor, smallest: float, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Random crop (scale in [smallest, 1], slight change of aspect), flip, contrast and tint.

    images: (B, 3, H, W) -> (B, 3, *size).
    """
    count = len(images)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    images = images * (1 + .2 * normal(count, 1, 1, 1)) + .035 * normal(count, 3, 1, 1)
    sy = smallest + (1 - smallest) * uniform(count, 1)
    sx = (sy * (1 + .15 * normal(count, 1).clamp(-1, 1))).clamp(max=1)
    tx, ty = (2 * uniform(count, 1) - 1) * (1 - sx), (2 * uniform(count, 1) - 1) * (1 - sy)
    mirror, zero = torch.where(uniform(count, 1) < .5, -1., 1.), torch.zeros(count, 1)
    row_x, row_y = torch.cat([sx * mirror, zero, tx], 1), torch.cat([zero, sy, ty], 1)
    theta = torch.stack([row_x, row_y], 1)                            # 2 x (B, 3) -> (B, 2, 3)
    grid = F.affine_grid(theta, [count, 3, *size], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False, padding_mode="reflection")


class MosaicBatches:
    """step -> batch, a pure function of (seed, step).

    A batch: image (n + m, 3, S, S), the last m of them mosaics; labels (n, C); quadrants (m, 4, C), labels
    of a mosaic's upper left, upper right, lower left and lower right picture; cut (row, column) in patches;
    single (bool): whether the step belongs to the first stage; pictures, the number drawn.
    """

    def __init__(self, singles: PictureStore, scenes: PictureStore, steps: int, mean: Tensor, std: Tensor,
                 recipe: MosaicRecipe = MosaicRecipe(), seed: int = 0, stride: int = 8) -> None:
        self.singles, self.scenes, self.recipe, self.seed, self.stride = singles, scenes, recipe, seed, stride
        self.mean, self.std = (torch.as_tensor(v).view(1, 3, 1, 1) for v in (mean, std))
        self.single_steps = round(recipe.singles_until * steps)
        self.size = scenes.images.shape[-1]

    def __call__(self, step: int) -> dict:
        generator = torch.Generator().manual_seed(step_seed(self.seed, step))
        single = step < self.single_steps
        mosaics = round(self.recipe.mosaics * self.recipe.batch)
        plain = self.recipe.batch - mosaics
        images, labels = (self.singles if single else self.scenes).draw(plain, generator)
        images = augment(images, .6 if single else .8, (self.size, self.size), generator)
        batch = {"labels": labels, "single": single, "pictures": plain + 4 * mosaics}
        if mosaics:
            mosaic, batch["quadrants"], batch["cut"] = self._mosaics(mosaics, single, generator)
            images = torch.cat([images, mosaic])
        return {"image": (images - self.mean) / self.std, **batch}

    def _mosaics(
        self, count: int, single: bool, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, tuple[int, int]]:
        patches = self.size // self.stride
        low = patches // 3 + 1
        row, column = (torch.randint(low, patches - low + 1, (2,), generator=generator)).tolist()
        rows, labels = [], []
        for h in (row, patches - row):
            cells = []
            for w in (column, patches - column):
                half = 0 if single else count // 2
                a, ya = self.singles.draw(count - half, generator)
                b, yb = self.scenes.draw(half, generator)
                order = torch.randperm(count, generator=generator)
                images, y = torch.cat([a, b])[order], torch.cat([ya, yb])[order]
                size = h * self.stride, w * self.stride
                cells.append(augment(F.avg_pool2d(images, 2), .7, size, generator))
                labels.append(y)
            rows.append(torch.cat(cells, 3))
        return torch.cat(rows, 2), torch.stack(labels, 1), (row, column)


def top_mean(patch_logits: Tensor, share: float) -> Tensor:
    """Mean of the highest `share` of the patches: (B, C, h, w) -> (B, C)."""
    flat = patch_logits.flatten(2)                                    # (B, C, h, w) -> (B, C, h*w)
    return flat.topk(max(2, round(share * flat.shape[-1])), dim=-1).values.mean(-1)


def mosaic_loss(
    model: nn.Module, batch: dict, step: int, recipe: MosaicRecipe = MosaicRecipe()
) -> dict[str, Tensor]:
    """Losses of the class head and the patch head on pictures, and of both on mosaics.

    class, patch: cross entropy on single-object pictures, multi-label soft margin on scenes. union: the class
    head names all classes of a mosaic. quadrant: the patch head names each quadrant's own classes, no others.
    """
    out = model.forward_heads(batch["image"])
    labels, single, n = batch["labels"], batch["single"], len(batch["labels"])
    class_logits, patch_logits, pooled = (
        x.float() for x in (out.class_logits, out.patch_logits, out.pooled))

    def entropy(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target.argmax(1), label_smoothing=recipe.label_smoothing)

    margin = F.multilabel_soft_margin_loss
    plain = entropy if single else lambda logits, target: 3 * margin(logits, target)
    losses = {"class": plain(class_logits[:n], labels), "patch": plain(pooled[:n], labels)}
    if "quadrants" in batch:
        row, column = batch["cut"]
        maps = patch_logits[n:]
        parts = [cell for band in (maps[..., :row, :], maps[..., row:, :])
                 for cell in (band[..., :column], band[..., column:])]
        losses["union"] = 2 * margin(class_logits[n:], batch["quadrants"].amax(1))
        terms = []
        for part, target in zip(parts, batch["quadrants"].unbind(1)):
            logits = top_mean(part, recipe.quadrant_share)
            one_each = single and (target.sum(1) == 1).all()
            terms.append(.5 * entropy(logits, target) + margin(logits, target) if one_each
                         else 3 * margin(logits, target))
        losses["quadrant"] = torch.stack(terms).mean()
    return losses
