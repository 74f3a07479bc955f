"""What `bench` compares: for every kernel its cases, at three sizes.

"paper" is what the papers run, "small" what a laptop does in two minutes, "tiny" is for tests. Inputs are
random, the same on every run. The least bytes and operations of a case: every input read and every output
written once, and what the method itself repeats; a multiplication with an addition is two operations, an
exponential none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .bench import Calls, Case, compare
from .bench_acr import acr_cases
from .bench_getam import getam_cases
from .kernels import baselines
from .kernels.attention_affinity import attention_affinity
from .kernels.attention_consistency import attention_consistency_loss
from .kernels.attention_sum import propagate, weighted_attention_sum
from .kernels.dense_crf import BILATERAL, SPATIAL, DenseCRF, dense_crf
from .kernels.local_refinement import refine_cam

SIZES = ("tiny", "small", "paper")
HALF = ("weighted_attention_sum", "propagate", "attention_affinity", "attention_consistency_loss")
LABELS, ITERATIONS = 21, 10
NEIGHBORS = 48  # of PAR and PAMR: 8 directions, 6 dilations


def cases(kernels: Sequence[str] | None, size: str, device: torch.device) -> list[Case]:
    """The cases of these kernels (None: all) at one size; on CUDA, those of attention in float16 as well.

    Raises ValueError for a kernel or size that there is not.
    """
    unknown = [name for name in kernels or () if name not in KERNELS]
    if unknown:
        found, expected = ", ".join(map(repr, unknown)), ", ".join(KERNELS)
        raise ValueError(f"kernel: found {found}, expected some of {expected}")
    if size not in SIZES:
        raise ValueError(f"size: found {size!r}, expected one of {', '.join(SIZES)}")
    found = []
    for name in dict.fromkeys(kernels or KERNELS):
        half = device.type == "cuda" and name in HALF
        for dtype in (torch.float32, torch.float16) if half else (torch.float32,):
            found += KERNELS[name](size, dtype)
    return found


# ------------------------------------------------------------------ attention


def weighted_attention_sum_cases(size: str, dtype: torch.dtype) -> list[Case]:
    """WeakTr, DeiT-S: 12 blocks x 6 heads, 20 class tokens and the patches of 480 x 480 (small: 320)."""
    maps, n, d = {"tiny": (12, 23, 8), "small": (72, 420, 64), "paper": (72, 920, 64)}[size]
    case, title = partial(Case, "weighted_attention_sum", dtype=dtype), f"{maps} maps of {n} tokens"
    draw = partial(_attention, maps, n, d)
    make = partial(compare, baselines.weighted_attention_sum, weighted_attention_sum, draw, dtype)
    # Read q and k, write the sum; multiply q k^T, weigh and add each map. Backward the same once more, since
    # no map was kept: read q, k and the gradient; multiply each map with it and add.
    moved = 2 * maps * n * d * dtype.itemsize + 4 * n * n
    flops = 2 * maps * n * n * d + 2 * maps * n * n
    needs = 8 * 4 * maps * n * n  # the float64 result holds all maps three times, and one block's beside
    return [
        case(f"{title}, forward", make(), moved, flops, needs),
        case(f"{title}, forward and backward", make(wanted=(2,)), 2 * moved, 2 * flops, 2 * needs),
    ]


def propagate_cases(size: str, dtype: torch.dtype) -> list[Case]:
    """The same sum applied to the maps of 20 classes, for which it need not be written."""
    maps, n, d = {"tiny": (12, 23, 8), "small": (72, 420, 64), "paper": (72, 920, 64)}[size]
    classes = 20

    def draw(generator: torch.Generator) -> list[Tensor]:
        return [*_attention(maps, n, d, generator), torch.rand(1, n, classes, generator=generator)]

    def materialised(q: Tensor, k: Tensor, weights: Tensor, values: Tensor) -> Tensor:
        return baselines.weighted_attention_sum(q, k, weights) @ values.to(weights.dtype)

    return [
        Case(
            "propagate", f"{maps} maps of {n} tokens, {classes} classes, forward",
            compare(materialised, propagate, draw, dtype),
            bytes=2 * maps * n * d * dtype.itemsize + 2 * 4 * n * classes,
            # q k^T, each map weighed and added, the sum times the values.
            flops=2 * maps * n * n * d + 2 * maps * n * n + 2 * n * n * classes,
            needs=8 * 4 * maps * n * n,
            dtype=dtype,
        )
    ]


def attention_affinity_cases(size: str, dtype: torch.dtype) -> list[Case]:
    """AFA: the 2 x 8 heads of the last two blocks, a picture of 512 x 512 (small: 320 x 320) at 1/16."""
    maps, n, d = {"tiny": (16, 23, 8), "small": (16, 400, 64), "paper": (16, 1024, 64)}[size]

    def draw(generator: torch.Generator) -> list[Tensor]:
        q, k, weights = _attention(maps, n, d, generator)
        return [q / d**0.5, k, weights[0] - 0.5 / maps, torch.zeros(1)]  # scores around 0

    case, title = partial(Case, "attention_affinity", dtype=dtype), f"{maps} maps of {n} tokens"
    make = partial(compare, baselines.attention_affinity, attention_affinity, draw, dtype)
    # Read q and k, write the affinity, one product; backward two, each with its operands and result.
    moved = 2 * maps * n * d * dtype.itemsize + 4 * n * n
    flops = 2 * maps * n * n * d
    needs = 8 * 4 * maps * n * n
    return [
        case(f"{title}, forward", make(), moved, flops, needs),
        case(f"{title}, forward and backward", make(wanted=(0, 1, 2, 3)), 3 * moved, 3 * flops, 2 * needs),
    ]


def attention_consistency_loss_cases(size: str, dtype: torch.dtype) -> list[Case]:
    """ACR: all blocks of a ViT-B on a picture of 384 x 384 and its mirror image (small: ViT-S, 224 x 224).

    The gradient jumps where both views agree: one sign that rounding turns is an error of up to 1e-3.
    """
    blocks, heads, side, d = {"tiny": (2, 2, 4, 8), "small": (12, 6, 14, 64), "paper": (12, 12, 24, 64)}[size]
    n = side * side + 1
    shape, products = (blocks, 1, heads, n, d), 2 * 2 * blocks * heads * n * n * d

    def draw(generator: torch.Generator) -> list[Tensor]:
        views = [1.5 * torch.randn(shape, generator=generator) for _ in range(4)]
        return [*views, torch.arange(side * side).view(side, side).flip(1).flatten()]

    baseline, ours = baselines.attention_consistency_loss, attention_consistency_loss
    return [
        Case(
            "attention_consistency_loss", f"{blocks} blocks, {heads} heads, {n} tokens, forward and backward",
            compare(baseline, ours, draw, dtype, wanted=range(4)),
            bytes=2 * 4 * blocks * heads * n * d * dtype.itemsize,  # four tensors read, four written
            flops=3 * products,  # of both views: q k^T; the scores' gradient times k, and times q
            needs=8 * 6 * blocks * heads * n * n,
            dtype=dtype,
        )
    ]


def _attention(maps: int, n: int, d: int, generator: torch.Generator) -> list[Tensor]:
    """q, k (1, M, N, d) whose attention is neither flat nor one-hot, and weights (1, M) in [0, 1 / M]."""
    q, k = (1.5 * torch.randn(1, maps, n, d, generator=generator) for _ in range(2))
    return [q, k, torch.rand(1, maps, generator=generator) / maps]


# ------------------------------------------------------------------ pictures


def refine_cam_cases(size: str, dtype: torch.dtype) -> list[Case]:
    """AFA's PAR on a crop of 512 x 512, for 21 and for 3 classes; GETAM's PAMR, for 3 (small: 128 x 128)."""
    pixels = {"tiny": 26, "small": 128, "paper": 512}[size]
    return [_refine_case(pixels, *variant) for variant in ((21, "par"), (3, "par"), (3, "pamr"))]


def _refine_case(pixels: int, classes: int, variant: str) -> Case:
    n = pixels * pixels

    def draw(generator: torch.Generator) -> list[Tensor]:
        masks = torch.rand(1, classes, pixels, pixels, generator=generator)
        return [picture(pixels, pixels, generator), masks]

    def exact(images: Tensor, masks: Tensor) -> Tensor:  # classes do not mix: two at a time, for the memory
        return torch.cat([baseline(images, chunk) for chunk in masks.split(2, dim=1)], dim=1)

    baseline = partial(baselines.refine_cam, num_iter=ITERATIONS, variant=variant)
    return Case(
        "refine_cam", f"{variant}, {pixels}x{pixels}, {classes} classes",
        compare(baseline, partial(refine_cam, num_iter=ITERATIONS, variant=variant), draw, exact=exact),
        # The affinity written, and read in every iteration, which reads and writes the masks.
        bytes=4 * n * (NEIGHBORS + ITERATIONS * (NEIGHBORS + 2 * classes)),
        # Neighbours weighed and added up; differences squared and added up, for deviation and affinity.
        flops=2 * n * NEIGHBORS * (ITERATIONS * classes + 2 * 3),
        # All maps' neighbours twice in float32; the picture's five times in float64; and some single maps.
        needs=max(2 * 4 * classes, 5 * 8 * 3) * (NEIGHBORS + 4) * n,
    )


def dense_crf_cases(size: str, dtype: torch.dtype) -> list[Case]:
    """A picture of PASCAL VOC (small: a third as wide and high), 21 labels; the exact form at a quarter."""
    height, width, vertices = {
        "tiny": (12, 15, (38, 1055)),
        "small": (125, 166, (2795, 28341)),
        "paper": (375, 500, (24540, 148798)),
    }[size]
    exact_size = {"tiny": (9, 8), "small": (40, 50), "paper": (94, 125)}[size]
    return [*_lattice_cases(height, width, vertices), _exact_crf_case(*exact_size)]


def _lattice_cases(height: int, width: int, vertices: tuple[int, int]) -> list[Case]:
    """vertices: of the spatial and the bilateral lattice of `picture`, as a test counts them."""
    n, moved, flops = height * width, 0.0, 0.0
    for dims, v in zip((2, 5), vertices):
        # Splat reads values and writes vertices, each of d + 1 blurs reads and writes them, slice goes back.
        # A point has d + 1 vertices (index, weight; in splat and slice), a vertex two neighbours a blur.
        moved += 4 * LABELS * (2 * n + 2 * v + 2 * (dims + 1) * v) + 16 * (dims + 1) * n + 8 * (dims + 1) * v
        flops += 2 * LABELS * (dims + 1) * (2 * n + 3 * v)
    moved += 2 * 4 * LABELS * n  # the softmax: energies read, probabilities written
    numbers = 6 * LABELS * (n + sum(vertices)) + 100 * n  # what the baseline holds, roughly

    def baseline(unary: Tensor, image: Tensor) -> Tensor:
        return baselines.dense_crf_uncached(unary, image, SPATIAL, BILATERAL, ITERATIONS)

    make = compare(baseline, dense_crf, partial(_energies, height, width))

    def make_kept(device: torch.device) -> Calls:
        unary, image = (x.to(device) for x in _energies(height, width, torch.Generator().manual_seed(0)))
        crf = DenseCRF(image[0])
        return replace(make(device), ours=lambda: (crf(unary[0], ITERATIONS)[None],))

    title = f"lattice, {width}x{height}, {LABELS} labels"
    case = partial(Case, "dense_crf", flops=ITERATIONS * flops, needs=8 * numbers)
    # A new picture's lattice: 6 vertex numbers of 8 bytes a pixel written, read, and written sorted.
    build = 3 * 6 * 8 * n
    return [
        case(f"{title}, new picture", make, bytes=ITERATIONS * moved + build),
        case(f"{title}, kept picture", make_kept, bytes=ITERATIONS * moved),
    ]


def _exact_crf_case(height: int, width: int) -> Case:
    n = height * width

    def baseline(unary: Tensor, image: Tensor) -> Tensor:
        return baselines.dense_crf_exact(unary, image, SPATIAL, BILATERAL, ITERATIONS)

    return Case(
        "dense_crf", f"exact, {width}x{height}, {LABELS} labels",
        compare(baseline, partial(dense_crf, method="exact"), partial(_energies, height, width)),
        bytes=ITERATIONS * 3 * 4 * LABELS * n,  # energies and probabilities read, probabilities written
        # Every iteration the bilateral kernel times the probabilities, and its entries above the diagonal,
        # each a product of two vectors of 7 numbers; the same for the normalisation, with one column.
        flops=ITERATIONS * (2 * LABELS + 7) * n**2 + (2 + 7) * n**2,
        needs=8 * (3 * n**2 + 6 * LABELS * n),
    )


def _energies(height: int, width: int, generator: torch.Generator) -> list[Tensor]:
    """Energies (1, 21, H, W) of smooth scores, and a picture (1, 3, H, W)."""
    scores = 3 * _octaves(LABELS, height, width, generator, smallest=16)
    return [-scores.log_softmax(dim=1).clamp(min=-11.5), picture(height, width, generator)]


def picture(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Colours of whole numbers 0..255 that vary at every scale, more at larger ones: (1, 3, H, W).

    Its lattice has as many vertices as a photograph's (PASCAL VOC: 90 to 160 thousand at 375 x 500).
    """
    return (127 + 60 * _octaves(3, height, width, generator, smallest=1)).round().clamp(0, 255)


def _octaves(channels: int, height: int, width: int, generator: torch.Generator, smallest: int) -> Tensor:
    """Noise of the scales smallest, twice that, ... up to the picture's: (1, C, H, W), deviation 1."""
    total, scale = torch.zeros(1, channels, height, width), min(smallest, height, width)
    while scale <= max(height, width):
        noise = torch.randn(1, channels, -(-height // scale), -(-width // scale), generator=generator)
        total += scale**0.6 * F.interpolate(noise, (height, width), mode="bilinear", align_corners=False)
        scale *= 2
    return total / total.std()


KERNELS: dict[str, Callable[[str, torch.dtype], list[Case]]] = {
    "refine_cam": refine_cam_cases,
    "weighted_attention_sum": weighted_attention_sum_cases,
    "propagate": propagate_cases,
    "attention_affinity": attention_affinity_cases,
    "attention_consistency_loss": attention_consistency_loss_cases,
    "dense_crf": dense_crf_cases,
    "getam": getam_cases,
    "acr_step": acr_cases,
}
