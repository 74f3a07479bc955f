"""Gaussian filtering of N scattered points in time linear in N: the permutohedral lattice.

Adams, Baek & Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice", Eurographics 2010.
Wanted, for features f_i of d dimensions measured in standard deviations, and values q_i:

    out_i = sum_j exp(-|f_i - f_j|^2 / 2) q_j

The lattice A*_d tiles space with simplices. Three linear steps follow (section 3), each a sparse matrix:
splat W^T (a point gives to the d + 1 vertices of its simplex, by barycentric weight), blur B_0 .. B_d (along
each of the d + 1 directions, weights 1/2 1 1/2, over the vertices that were splatted to) and slice W:

    out = s W B_d .. B_0 W^T q        s = 1 / (1 + 2^-d), a constant that the classic code uses

An approximation, and the very one that published DenseCRF figures were made with: its deviations from the
Gaussian are part of those results.

Why it is fast, with no hash table and no loop over points:
- A vertex's d coordinates become one int64 that is linear in them: the neighbour along any direction is that
  number plus a constant.
- Vertices come in d + 1 kinds, by the common remainder of their coordinates mod d + 1, and a point touches
  exactly one of each. So d + 1 sorts of N numbers find the distinct vertices, and each sort's permutation
  lists the points by vertex: the rows of W^T, with no transposition of W.
- Of a vertex's two neighbours one is looked up, by binary search in ascending order (which walks through
  memory); the other is the same relation read backwards.
- The matrices multiply by `embedding_bag`, the weighted sum of gathered rows: vectorised on the CPU, and
  without atomics on CUDA, so that two runs give the same bits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class SparseRows(NamedTuple):
    """A sparse matrix (R, K) by rows: row r holds weights[o_r : o_r+1] in the columns index[o_r : o_r+1]."""

    index: Tensor  # (nonzeros,) int32
    offsets: Tensor  # (R + 1,) int32
    weights: Tensor  # (nonzeros,)

    def matmul(self, values: Tensor) -> Tensor:
        """This matrix times values (K, L) -> (R, L)."""
        return F.embedding_bag(
            self.index, values, self.offsets, mode="sum", per_sample_weights=self.weights,
            include_last_offset=True,
        )


class PermutohedralLattice:
    """The lattice around N points, built once, to filter any number of values given on them.

    features: (d, N) float32 or float64, the points' coordinates in standard deviations of the Gaussian.
    num_vertices; splat (num_vertices, N), blurs (one a direction), slice (N, num_vertices): SparseRows.
    Raises ValueError for another shape or dtype, features that are not finite, and points that span too many
    standard deviations for their vertices to be numbered.
    """

    def __init__(self, features: Tensor):
        if features.ndim != 2 or 0 in features.shape:
            raise ValueError(f"features: found shape {tuple(features.shape)}, expected (d, N) without a 0")
        if features.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"features: found {features.dtype}, expected float32 or float64")
        if not features.isfinite().all():
            raise ValueError("features: found values that are not finite, expected finite ones")
        d = len(features)
        with torch.no_grad():
            corner, rank, barycentric = embed(features)
            numbers, strides = number_vertices(corner, rank)
            self.splat, self.slice, numbers = connect(numbers, barycentric)
            self.slice.weights.div_(1 + 2.0**-d)
            # Along direction i a step changes coordinate i by d and the others by -1.
            steps = [(d + 1) * stride - sum(strides) for stride in strides]
            self.blurs = connect_neighbours(numbers, steps, features.dtype)
        self.num_vertices = len(numbers)

    def filter(self, values: Tensor) -> Tensor:
        """values (N, L), of the features' dtype and device -> their Gaussian sums (N, L)."""
        values = self.splat.matmul(values)  # (N, L) -> (num_vertices, L)
        for blur in self.blurs:
            values = blur.matmul(values)
        return self.slice.matmul(values)  # (num_vertices, L) -> (N, L)

    def scale(self, before: Tensor, after: Tensor) -> None:
        """From now on filter(q) is after * filter(before * q), at no cost; before, after: (N,)."""
        self.splat = self.splat._replace(weights=self.splat.weights * before[self.splat.index])
        by_point = self.slice.weights.view(len(after), -1)  # (N * (d + 1),) -> (N, d + 1)
        self.slice = self.slice._replace(weights=(by_point * after[:, None]).view(-1))


def embed(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features (d, N) -> each point's simplex: corner, rank, barycentric, all (d + 1, N) (section 3.1).

    corner: the simplex's vertex of remainder 0, divided by d + 1 (whole numbers, in the features' dtype).
    rank (int64): the place of each coordinate of point - corner in descending order, which tells the simplex
    from the others at this corner. barycentric: row k is the weight of the simplex's vertex of remainder k.
    """
    d, num_points = features.shape
    point = elevate(features)
    corner = torch.round(point / (d + 1))
    point -= corner * (d + 1)  # now relative to the corner
    rank = torch.zeros(d + 1, num_points, dtype=torch.int8, device=features.device)
    for i in range(d + 1):
        for j in range(i + 1, d + 1):
            smaller = point[i] < point[j]
            rank[i] += smaller
            rank[j] += ~smaller
    # Rounded one by one, the coordinates need not sum to 0. Those rounded furthest, as many as there are
    # steps too many or too few, step back, which also rotates the ranks.
    rank += corner.sum(0).to(torch.int8)
    back = (rank < 0).to(torch.int8) - (rank > d).to(torch.int8)
    rank = (rank + back * (d + 1)).long()
    corner += back
    point -= back * (d + 1)
    ordered = torch.empty_like(point).scatter_(0, rank, point).div_(d + 1)  # row r: the coordinate of rank r
    barycentric = torch.empty_like(ordered)
    barycentric[0] = 1 - (ordered[0] - ordered[d])
    barycentric[1:] = (ordered[:-1] - ordered[1:]).flip(0)
    return corner, rank, barycentric


def elevate(features: Tensor) -> Tensor:
    """Features (d, N) -> the same points in the plane sum(x) = 0 of d + 1 dimensions, (d + 1, N).

    A rotation, and a scale of (d + 1) sqrt(2 / 3): the standard deviation, in the lattice's units, of splat,
    blur and slice together.
    """
    d = len(features)
    point = features.new_empty(d + 1, features.shape[1])
    rest = torch.zeros_like(features[0])  # the sum of the axes above j
    for j in range(d, 0, -1):
        axis = features[j - 1] * (math.sqrt(2 / 3) * (d + 1) / math.sqrt(j * (j + 1)))
        torch.sub(rest, axis, alpha=j, out=point[j])
        rest += axis
    point[0] = rest
    return point


def number_vertices(corner: Tensor, rank: Tensor) -> tuple[Tensor, list[int]]:
    """Simplices -> the numbers of their vertices (d + 1, N) int64, row k for remainder k; and the strides.

    A vertex's number is sum_i strides[i] * coordinate_i, distinct within the box of all vertices and their
    neighbours. The last stride is 0, since the coordinates sum to 0.
    """
    d = len(corner) - 1
    low, high = corner.amin(1, keepdim=True), corner.amax(1, keepdim=True)  # (d + 1, 1)
    # A vertex is up to d off its corner and a neighbour d further, on either side.
    extent = [int(span + 5) * (d + 1) for span in (high - low)[:d, 0].tolist()]
    # 2^22: whole numbers, and a point's place between them, in float32.
    if math.prod(extent) >= 2**62 or max(high.max(), -low.min()) >= 2**22:
        raise ValueError(
            f"features: found points that span {extent} steps of the lattice, expected a product below 2^62 "
            "and no coordinate above 2^22: the standard deviations are too small"
        )
    strides = [math.prod(extent[:i]) for i in range(d)] + [0]
    stride = torch.tensor(strides, device=corner.device)[:, None]  # (d + 1, 1)
    numbers = torch.empty_like(rank)
    torch.sum((corner - low).long() * (stride * (d + 1)), dim=0, out=numbers[0])
    # From vertex k to k + 1 every coordinate grows by 1, but that of rank d - k falls by d.
    stride_of_rank = torch.empty_like(rank).scatter_(0, rank, stride.expand_as(rank))
    for k in range(d):
        torch.sub(numbers[k], stride_of_rank[d - k], alpha=d + 1, out=numbers[k + 1])
        numbers[k + 1] += sum(strides)
    return numbers, strides


def connect(numbers: Tensor, barycentric: Tensor) -> tuple[SparseRows, SparseRows, Tensor]:
    """Vertex numbers and weights (d + 1, N) -> splat, slice, and the distinct vertices' numbers (M,).

    The M vertices stand in order of remainder, then of number.
    """
    num_kinds, num_points = numbers.shape
    points = torch.empty(num_kinds, num_points, dtype=torch.int32, device=numbers.device)
    vertices = torch.empty_like(points)
    weights = torch.empty_like(barycentric)
    distinct, starts, num_vertices = [], [], 0
    for k in range(num_kinds):
        ascending, order = torch.sort(numbers[k], stable=True)
        is_new = torch.ones_like(ascending, dtype=torch.bool)
        torch.ne(ascending[1:], ascending[:-1], out=is_new[1:])
        vertices[k].scatter_(0, order, is_new.cumsum(0, dtype=torch.int32) + (num_vertices - 1))
        points[k] = order
        torch.take(barycentric[k], order, out=weights[k])
        first = is_new.nonzero()[:, 0]
        distinct.append(ascending[first])
        starts.append(first + k * num_points)
        num_vertices += len(first)
    end = torch.tensor([numbers.numel()], device=numbers.device)
    splat = SparseRows(points.view(-1), torch.cat([*starts, end]).int(), weights.view(-1))
    # (d + 1, N) -> (N, d + 1) -> (N * (d + 1),)
    offsets = equal_rows(num_points, num_kinds, numbers)
    by_point = SparseRows(vertices.T.reshape(-1), offsets, barycentric.T.reshape(-1))
    return splat, by_point, torch.cat(distinct)


def connect_neighbours(numbers: Tensor, steps: list[int], dtype: torch.dtype) -> list[SparseRows]:
    """Vertices' numbers (M,) -> for each direction the matrix (M, M) of its blur.

    A row is a vertex plus half of its two neighbours along the direction, those that exist: their numbers
    differ from the vertex's by the direction's step.
    """
    num_vertices = len(numbers)
    ascending, vertex = torch.sort(numbers)
    own = torch.arange(num_vertices, dtype=torch.int32, device=numbers.device)[:, None]
    offsets = equal_rows(num_vertices, 3, numbers)
    blurs = []
    for step in steps:
        wanted = ascending + step
        position = torch.searchsorted(ascending, wanted).clamp_(max=num_vertices - 1)
        found = (ascending[position] == wanted).nonzero()[:, 0]
        here, there = vertex[found], vertex[position[found]]
        # Columns: the neighbour behind, the vertex, the neighbour ahead. A missing one is the vertex itself
        # with weight 0.
        index = own.repeat(1, 3)
        weights = torch.tensor([0, 1, 0], dtype=dtype, device=numbers.device).repeat(num_vertices, 1)
        index[here, 2], weights[here, 2] = there.int(), 0.5
        index[there, 0], weights[there, 0] = here.int(), 0.5
        blurs.append(SparseRows(index.view(-1), offsets, weights.view(-1)))
    return blurs


def equal_rows(num_rows: int, length: int, like: Tensor) -> Tensor:
    """The offsets (num_rows + 1,) of rows of one length, on the device of `like`."""
    return torch.arange(0, num_rows * length + 1, length, dtype=torch.int32, device=like.device)
