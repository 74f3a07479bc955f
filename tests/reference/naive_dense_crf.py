"""DenseCRF by explicit loops in float64: the exact sum over pixel pairs, and the lattice as a dictionary."""

import math

import numpy as np


def softmax(score):
    """score (N, C) -> probabilities (N, C)."""
    out = np.exp(score - score.max(1, keepdims=True))
    return out / out.sum(1, keepdims=True)


def spatial_features(height, width, sigma):
    """(H * W, 2): x, y of the pixels, row by row."""
    return np.array([[x / sigma, y / sigma] for y in range(height) for x in range(width)])


def bilateral_features(image, sigma_xy, sigma_rgb):
    """image (3, H, W) -> (H * W, 5): x, y, r, g, b."""
    _, height, width = image.shape
    return np.array([
        [x / sigma_xy, y / sigma_xy, *(float(image[c, y, x]) / sigma_rgb for c in range(3))]
        for y in range(height) for x in range(width)
    ])  # fmt: skip


def gaussian_kernel(features):
    """features (N, d) -> exp(-|f_i - f_j|^2 / 2), (N, N)."""
    rows = [[float(v) for v in f] for f in features]
    return np.array([
        [math.exp(-0.5 * sum((a - b) ** 2 for a, b in zip(f, g))) for g in rows] for f in rows
    ])  # fmt: skip


class Lattice:
    """The permutohedral lattice of features (N, d): a dictionary of vertices, tuples of d + 1 coordinates."""

    def __init__(self, features):
        self.d, self.corners, self.vertices = features.shape[1], [], {}
        for feature in features:
            corners = [
                (self.vertices.setdefault(key, len(self.vertices)), weight)
                for key, weight in self.simplex(feature)
            ]
            self.corners.append(corners)
        self.neighbours = []  # for each direction, vertex -> its two neighbours; -1: none
        for axis in range(self.d + 1):
            pairs = np.full((len(self.vertices), 2), -1)
            for key, vertex in self.vertices.items():
                for side, sign in enumerate((1, -1)):
                    there = tuple(k + sign * (self.d if i == axis else -1) for i, k in enumerate(key))
                    pairs[vertex, side] = self.vertices.get(there, -1)
            self.neighbours.append(pairs)

    def simplex(self, feature):
        """The d + 1 (vertex, barycentric weight) of the simplex around one point."""
        d = self.d
        # Row j of the orthogonal basis of the plane: j ones, then -j, divided by its length.
        point = [0.0] * (d + 1)
        for j in range(d, 0, -1):
            length = math.sqrt(j * (j + 1))
            step = float(feature[j - 1]) * math.sqrt(2 / 3) * (d + 1) / length
            for i in range(j):
                point[i] += step
            point[j] -= j * step
        corner = [round(p / (d + 1)) * (d + 1) for p in point]
        while sum(corner) != 0:  # off the plane: undo the rounding that went furthest
            sign = 1 if sum(corner) > 0 else -1
            gaps = [sign * (c - p) for c, p in zip(corner, point)]
            worst = gaps.index(max(gaps)) if sign < 0 else d - gaps[::-1].index(max(gaps))
            corner[worst] -= sign * (d + 1)
        offset = [p - c for p, c in zip(point, corner)]
        order = sorted(range(d + 1), key=lambda i: -offset[i])  # stable: equal ones keep their order
        key, ordered = list(corner), [offset[i] for i in order]
        out = []
        for k in range(d + 1):  # vertex k: the k smallest coordinates lost d + 1 - k, the others gained k
            if k == 0:
                weight = 1 - (ordered[0] - ordered[d]) / (d + 1)
            else:
                weight = (ordered[d - k] - ordered[d - k + 1]) / (d + 1)
            out.append((tuple(key), weight))
            key = [c + 1 for c in key]
            key[order[d - k]] -= d + 1
        return out

    def filter(self, values):
        """values (N, L) -> (N, L)."""
        grid = np.zeros((len(self.vertices) + 1, values.shape[1]))  # the last row stays 0: no neighbour
        for value, corners in zip(values, self.corners):
            for vertex, weight in corners:
                grid[vertex] += weight * value
        for pairs in self.neighbours:
            grid[:-1] = grid[:-1] + 0.5 * (grid[pairs[:, 0]] + grid[pairs[:, 1]])
        out = np.zeros_like(values, dtype=float)
        for i, corners in enumerate(self.corners):
            for vertex, weight in corners:
                out[i] += weight * grid[vertex]
        return out / (1 + 2.0**-self.d)


def dense_crf(unary, image, spatial, bilateral, num_iter, method):
    """unary (C, H, W), image (3, H, W) -> probabilities (C, H, W)."""
    classes, height, width = unary.shape
    score = -np.asarray(unary, float).reshape(classes, -1).T
    kernels = []
    for features, weight in (
        (spatial_features(height, width, spatial[0]), spatial[1]),
        (bilateral_features(image, *bilateral[:2]), bilateral[2]),
    ):
        if method == "exact":
            kernel = gaussian_kernel(features)
            gaussian = kernel.__matmul__
        else:
            gaussian = Lattice(features).filter
        n = gaussian(np.ones((len(score), 1))) ** -0.5
        kernels.append((gaussian, n, weight))
    q = softmax(score)
    for _ in range(num_iter):
        q = softmax(score + sum(weight * n * gaussian(n * q) for gaussian, n, weight in kernels))
    return q.T.reshape(unary.shape)
