"""What the published code computes, as vectorised PyTorch that keeps everything in memory: the slow side of `bench`.

Every function agrees with the kernel that it is compared with and materialises what the published code does.
"""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_attention_sum(
    q: Tensor, k: Tensor, weights: Tensor, scale: float | None = None, heads: int = 6
) -> Tensor:
    """WeakTr's fusion with every map in memory: (B, N, N); arguments as of `kernels.weighted_attention_sum`.

    Block by block (`heads` maps of a block follow one another in q and k) softmax(scale q k^T); the blocks' maps
    stacked, brought into the order heads x blocks, and multiplied by their weights: 3 B M N^2 numbers at the peak,
    697 MiB for M = 72, N = 920. The published code copies the maps once more (a clone) and adds them up twice.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    batch, maps, n, _ = q.shape
    blocks = [
        (q[:, m : m + heads] @ k[:, m : m + heads].transpose(-2, -1) * scale).softmax(-1)
        for m in range(0, maps, heads)
    ]
    stacked = torch.stack(blocks)  # (L, B, H, N, N)
    del blocks
    attention = stacked.permute(1, 2, 0, 3, 4).reshape(batch, maps, n, n)  # heads x blocks: a copy
    weights = weights.unflatten(1, (-1, heads)).transpose(1, 2).reshape(batch, maps, 1, 1)
    return (attention * weights).sum(1)


def attention_affinity(q: Tensor, k: Tensor, weight: Tensor, bias: Tensor, heads: int = 8) -> Tensor:
    """AFA's affinity with the scores of every head in memory: (B, N, N); arguments as of
    `kernels.attention_affinity`.

    Block by block (`heads` of the M follow one another) q k^T; concatenated; plus their transpose; a 1x1
    convolution M -> 1; a sigmoid: 3 B M N^2 numbers at the peak, 192 MB for M = 16, N = 1024.
    """
    blocks = [q[:, m : m + heads] @ k[:, m : m + heads].transpose(-2, -1) for m in range(0, q.shape[1], heads)]
    scores = torch.cat(blocks, dim=1)  # (B, M, N, N)
    scores = scores + scores.transpose(-2, -1)
    return torch.sigmoid(F.conv2d(scores, weight.view(1, -1, 1, 1), bias.view(1)))[:, 0]


def dense_crf_uncached(
    unary: Tensor, images: Tensor, spatial: tuple, bilateral: tuple, num_iter: int = 10
) -> Tensor:
    """The classic DenseCRF as sparse matrices, nothing kept between calls: (B, C, H, W), arguments as of
    `kernels.dense_crf`.

    Both lattices built anew for every image, their vertices found by one sort of all N (d + 1) of them; splat
    and slice as CSR matrices, blur as gathered neighbours, normalisation and weight multiplied in at every
    iteration: 215 MB at the peak for 500x375 pixels, 21 labels and 130 000 vertices.
    """
    from .dense_crf import bilateral_features, positions

    outputs = []
    for energies, image in zip(unary, images):
        score = -energies.flatten(1).T.contiguous()  # (C, H, W) -> (N, C)
        place = positions(*image.shape[1:], spatial[0], image.dtype, image.device)
        kernels = []
        colour = bilateral_features(image, *bilateral[:2])
        for features, weight in ((place, spatial[1]), (colour, bilateral[2])):
            gaussian = _classic_lattice(features)
            kernels.append((gaussian, weight, (gaussian(torch.ones_like(score[:, :1])) + 1e-20).rsqrt()))
        q = torch.softmax(score, 1)
        for _ in range(num_iter):
            q = torch.softmax(score + sum(weight * n * gaussian(n * q) for gaussian, weight, n in kernels), 1)
        outputs.append(q.T.reshape(energies.shape))
    return torch.stack(outputs)


def _classic_lattice(features: Tensor):
    """Features (d, N) -> the permutohedral filter of values (N, L): splat, blur and slice one by one."""
    from .permutohedral import embed, number_vertices

    kinds, points = len(features) + 1, features.shape[1]
    corner, rank, barycentric = embed(features)
    numbers, strides = number_vertices(corner, rank)
    distinct, vertex = torch.unique(numbers.T.reshape(-1), return_inverse=True)  # (N * (d + 1),)
    weights, count = barycentric.T.reshape(-1), len(distinct)
    rows = torch.arange(0, len(vertex) + 1, kinds, device=vertex.device)
    order = torch.argsort(vertex)
    ends = F.pad(torch.bincount(vertex, minlength=count).cumsum(0), (1, 0))
    with warnings.catch_warnings():  # CSR matrices announce that they are in beta
        warnings.simplefilter("ignore")
        splat = torch.sparse_csr_tensor(ends.int(), (order // kinds).int(), weights[order], (count, points))
        weights = weights / (1 + 2.0 ** (1 - kinds))
        slicing = torch.sparse_csr_tensor(rows.int(), vertex.int(), weights, (points, count))
    neighbours = []
    for stride in strides:
        for step in (kinds * stride - sum(strides), sum(strides) - kinds * stride):
            position = torch.searchsorted(distinct, distinct + step).clamp(max=count - 1)
            missing = distinct[position] != distinct + step
            neighbours.append(position.masked_fill(missing, count))  # a row of zeros stands for the missing

    def gaussian(values: Tensor) -> Tensor:
        values = F.pad(splat @ values, (0, 0, 0, 1))  # (N, L) -> (count + 1, L)
        for behind, ahead in zip(neighbours[::2], neighbours[1::2]):
            values[:count].add_(values[behind].add_(values[ahead]), alpha=0.5)
        return slicing @ values[:count]

    return gaussian


def dense_crf_exact(
    unary: Tensor, images: Tensor, spatial: tuple, bilateral: tuple, num_iter: int = 10
) -> Tensor:
    """`kernels.dense_crf(..., method="exact")` with the kernel between all pixels in memory: (B, C, H, W).

    Both kernels normalised, weighted and added, once for each image: 3 N^2 numbers at the peak, 1.6 GB for
    125x94 pixels in float32. Small images only; every iteration is one matrix product.
    """
    from .dense_crf import bilateral_features, positions

    outputs = []
    for energies, image in zip(unary, images):
        score = -energies.flatten(1).T.contiguous()  # (C, H, W) -> (N, C)
        place = positions(*image.shape[1:], spatial[0], image.dtype, image.device)
        total = 0
        colour = bilateral_features(image, *bilateral[:2])
        for features, weight in ((place, spatial[1]), (colour, bilateral[2])):
            exact = "donot_use_mm_for_euclid_dist"
            kernel = torch.cdist(features.T, features.T, compute_mode=exact)
            kernel.square_().div_(-2).clamp_(min=-60).exp_()  # no denormal numbers: they are slow
            n = kernel.sum(1).rsqrt()
            total = total + kernel.mul_(weight * n[:, None]).mul_(n)  # (N, N)
        q = torch.softmax(score, 1)
        for _ in range(num_iter):
            q = torch.softmax(score + total @ q, 1)
        outputs.append(q.T.reshape(energies.shape))
    return torch.stack(outputs)


def refine_cam(
    images: Tensor,
    masks: Tensor,
    dilations: tuple[int, ...] = (1, 2, 4, 8, 12, 24),
    num_iter: int = 10,
    variant: str = "par",
) -> Tensor:
    """PAR and PAMR with every neighbour copied out: (B, C, H, W); arguments as of `kernels.refine_cam`.

    K = 8 len(dilations) shifted pictures, and in each iteration K shifted copies of the maps times the
    affinity, summed: 8 B C K H W bytes of float32 at the peak, 2.1 GB for 21 maps of 512 x 512. The published
    code makes the same copies by convolutions with a single 1 in the kernel: three times as slow on a CPU.
    """
    masks = F.interpolate(masks, images.shape[-2:], mode="bilinear", align_corners=True)
    neighbors = _copy_neighbors(images, dilations)  # (B, 3, K, H, W)
    difference = (neighbors - images[:, :, None]).abs()
    if variant == "par":
        scaled = -(difference / (neighbors.std(2, keepdim=True) + 1e-8) / 0.3).square()
        offsets = [(d * dy, d * dx) for d in dilations for dy, dx in _RING]
        distance = images.new_tensor([math.hypot(*o) for o in offsets])
        position = 0.01 * torch.softmax(-(distance / (distance.std() + 1e-8) / 0.3).square(), 0)
    else:
        centers = images[:, :, None].expand(-1, -1, len(dilations), -1, -1)
        deviation = torch.cat([neighbors, centers], 2).std(2, keepdim=True)  # of (B, 3, 9 K / 8, H, W)
        scaled = -difference / (1e-8 + 0.1 * deviation)
        position = scaled.new_zeros(neighbors.shape[2])
    del neighbors, difference
    affinity = torch.softmax(scaled.mean(1, keepdim=True), 2) + position[:, None, None]  # (B, 1, K, H, W)
    del scaled
    for _ in range(num_iter):
        masks = (_copy_neighbors(masks, dilations) * affinity).sum(2)
    return masks


_RING = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]


def _copy_neighbors(maps: Tensor, dilations: tuple[int, ...]) -> Tensor:
    """(B, C, H, W) -> (B, C, K, H, W), the 8 neighbours at each dilation, edges repeated."""
    (height, width), margin = maps.shape[-2:], max(dilations)
    padded = F.pad(maps, [margin] * 4, mode="replicate")
    copies = maps.new_empty(*maps.shape[:2], 8 * len(dilations), height, width)
    for k, (dy, dx) in enumerate((d * dy, d * dx) for d in dilations for dy, dx in _RING):
        copies[:, :, k] = padded[:, :, margin + dy : margin + dy + height, margin + dx : margin + dx + width]
    return copies


def attention_consistency_loss(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, permutation: Tensor, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    """ACR's two terms from written-out attention; arguments as of `kernels.attention_consistency_loss`.

    Autograd keeps each head's attention of every block and view: 2 L B H N^2 numbers, 366 MiB for ViT-B at
    384 x 384, and backward some two blocks' more. Scores are scaled and soft-maxed as timm writes them out.
    """
    region, affinity = [], []
    for q_1, k_1, q_2, k_2 in zip(q1, k1, q2, k2):
        scale, p = q_1.shape[-1] ** -0.5, num_prefix_tokens
        one = ((q_1 * scale) @ k_1.transpose(-2, -1)).softmax(-1).mean(1)  # (B, H, N, N) -> (B, N, N)
        two = ((q_2 * scale) @ k_2.transpose(-2, -1)).softmax(-1).mean(1)
        terms = consistency_terms(one, two, permutation, p)
        region.append(terms[0])
        affinity.append(terms[1])
    return torch.stack(region).mean(), torch.stack(affinity).mean()


def consistency_terms(one: Tensor, two: Tensor, permutation: Tensor, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """ACR's region and affinity terms of one block, from the attention of two views, (B, N, N) each."""
    p = num_prefix_tokens
    patches = two[:, p:, p:][:, permutation][:, :, permutation]
    region = (one[:, 0, p:] - two[:, 0, p:][:, permutation]).abs().mean()
    return region, (one[:, p:, p:] - patches).abs().mean()
