"""DenseCRF: the fully connected random field that sharpens a segmentation along the edges of its image.

Krähenbühl & Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials", NeurIPS
2011 (arXiv 1210.5644): mean field, algorithm 1, with the Potts model. From Q = softmax(-U),

    Q_i(l) <- softmax_l( -U_i(l) + sum_m w_m sum_j n_i K_m(i, j) n_j Q_j(l) )

K_m is a Gaussian: the spatial kernel of pixel positions, the bilateral one of positions and colours. The sum
includes i itself, and n = (sum_j K(i, j))^(-1/2) normalises symmetrically, D^-1/2 K D^-1/2: both as in the
classic C++ code that the published figures were made with.

All the time goes into K Q, where K is N x N for N pixels. Two ways:
- "lattice" (permutohedral.py), linear in N: what the classic code computes, to 1e-4. Fast because the spatial
  lattice, which depends on the image's size alone, is kept from one call to the next; because a `DenseCRF`
  keeps the bilateral one, for many unaries of one image; because n and w go into the lattice's weights.
- "exact": the sum itself, in tiles that are never stored: memory linear in N, time quadratic. The spatial
  kernel is a product of one of rows and one of columns: two small matrix products, no tiles.
They are not interchangeable. The lattice's bilateral kernel is a rough Gaussian: labels agree on about 99% of
the pixels, but single probabilities differ by up to 0.9. Published figures need "lattice".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .dispatch import choose_backend
from .permutohedral import PermutohedralLattice

METHODS = ("lattice", "exact")
SPATIAL, BILATERAL = (3, 3), (64, 5, 4)
TILE = 512  # pixels: a tile of the kernel (1 MB in float32) stays in the cache


def dense_crf(
    unary: Tensor,
    images: Tensor,
    spatial: tuple[float, float] = SPATIAL,
    bilateral: tuple[float, float, float] = BILATERAL,
    num_iter: int = 10,
    method: str = "lattice",
    backend: str = "auto",
) -> Tensor:
    """Unary energies (B, C, H, W), images (B, 3, H, W) 0..255 -> label probabilities (B, C, H, W).

    unary: -log p, finite (see `unary_from_probabilities`, `unary_from_labels`). spatial: (sigma in pixels,
    weight); bilateral: (sigma in pixels, sigma in grey levels, weight); a weight of 0 leaves its kernel out.
    The defaults are those of AFA. GETAM: (3, 3), (83, 5, 4), 20 iterations; WeakTr, on labels: (4, 3),
    (83, 5, 3). num_iter 0 is softmax(-unary).
    method: "lattice" or "exact" (above). backend: for "exact" alone, "triton" or "torch" ("auto": see
    dispatch.py); Triton works in float32.
    Computed, and returned, in float64 for float64 unaries, else in float32. No gradients. One image after the
    other; to run many unaries on one image, keep its `DenseCRF`. Raises ValueError for other shapes, empty
    ones, values that are not finite, a sigma that is not positive, a negative weight or num_iter.
    """
    if unary.ndim != 4 or 0 in unary.shape:
        raise ValueError(f"unary: found shape {tuple(unary.shape)}, expected (B, C, H, W) without a 0")
    expected = (len(unary), 3, *unary.shape[2:])
    if images.shape != expected:
        raise ValueError(f"images: found shape {tuple(images.shape)}, expected {expected}")
    images = images.to(torch.float64 if unary.dtype == torch.float64 else torch.float32)
    return torch.stack([
        DenseCRF(image, spatial, bilateral, method, backend)(energies, num_iter)
        for image, energies in zip(images, unary)
    ])  # fmt: skip


class DenseCRF:
    """The pairwise kernels of one image, built once, to run any number of unaries on them.

    image: (3, H, W), 0..255; float64 makes it work in float64, anything else in float32. The other arguments,
    and the errors, are those of `dense_crf`. Calling it gives the probabilities.
    """

    def __init__(
        self,
        image: Tensor,
        spatial: tuple[float, float] = SPATIAL,
        bilateral: tuple[float, float, float] = BILATERAL,
        method: str = "lattice",
        backend: str = "auto",
    ):
        check_settings(image, spatial, bilateral, method)
        backend = choose_kernel_backend(method, backend, image)
        image = image.detach().to(torch.float64 if image.dtype == torch.float64 else torch.float32)
        if not image.isfinite().all():
            raise ValueError("images: found values that are not finite, expected 0..255")
        self.size, self.dtype = tuple(image.shape[1:]), image.dtype
        (sigma, weight), (sigma_xy, sigma_rgb, bilateral_weight) = spatial, bilateral
        self.messages: list[Callable[[Tensor], Tensor]] = []  # each from Q (N, C) to w n K n Q (N, C)
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            if weight > 0:
                make = spatial_lattice if method == "lattice" else spatial_exact
                self.messages.append(make(*self.size, sigma, weight, image.dtype, image.device))
            if bilateral_weight > 0:
                features = bilateral_features(image, sigma_xy, sigma_rgb)
                if method == "lattice":
                    self.messages.append(lattice_message(features, bilateral_weight))
                else:
                    gaussian = functools.partial(gaussian_sum, features, backend=backend)
                    self.messages.append(normalized(gaussian, features[0], bilateral_weight))

    @torch.no_grad()
    def __call__(self, unary: Tensor, num_iter: int = 10) -> Tensor:
        """Unary energies (C, H, W), on the image's device -> probabilities (C, H, W) in its precision."""
        if unary.ndim != 3 or not len(unary) or unary.shape[1:] != self.size:
            size = ", ".join(map(str, self.size))
            raise ValueError(f"unary: found shape {tuple(unary.shape)}, expected (C, {size}), C at least 1")
        if num_iter < 0:
            raise ValueError(f"num_iter: found {num_iter}, expected 0 or more")
        if not unary.isfinite().all():
            raise ValueError("unary: found energies that are not finite: clip probabilities before the log")
        with torch.autocast(unary.device.type, enabled=False):
            # (C, H, W) -> (N, C): a pixel's labels side by side, since the kernels gather whole pixels.
            score = -unary.to(self.dtype).flatten(1).T.contiguous()
            q = torch.softmax(score, 1)
            for _ in range(num_iter):
                total = score
                for message in self.messages:
                    total = message(q).add_(total)  # in the message's memory
                torch.softmax(total, 1, out=q)
        return q.T.reshape(unary.shape)


def unary_from_probabilities(probabilities: Tensor, clip: float = 1e-5) -> Tensor:
    """Probabilities (B, C, H, W) -> unary energies -log max(p, clip), of their shape.

    Raises ValueError for another shape, values outside [0, 1] and clip outside (0, 1].
    """
    if probabilities.ndim != 4:
        raise ValueError(f"probabilities: found shape {tuple(probabilities.shape)}, expected (B, C, H, W)")
    if not 0 < clip <= 1:
        raise ValueError(f"clip: found {clip}, expected a number in (0, 1]")
    # Some softmaxes end an ulp above 1.
    if not ((probabilities >= 0) & (probabilities <= 1 + 1e-3)).all():
        raise ValueError("probabilities: found values outside [0, 1]: apply a softmax first")
    return -probabilities.clamp(clip, 1).log()


def unary_from_labels(
    labels: Tensor, num_labels: int, gt_prob: float = 0.7, ignore_index: int = 255
) -> Tensor:
    """Label maps (B, H, W) -> unary energies (B, num_labels, H, W), float32.

    A pixel's label has probability gt_prob and the others share the rest; a pixel of ignore_index prefers
    none. Raises ValueError for another shape, labels outside 0 .. num_labels - 1 and gt_prob outside (0, 1).
    """
    if labels.ndim != 3:
        raise ValueError(f"labels: found shape {tuple(labels.shape)}, expected (B, H, W)")
    if num_labels < 1:
        raise ValueError(f"num_labels: found {num_labels}, expected 1 or more")
    if not 0 < gt_prob < 1:
        raise ValueError(f"gt_prob: found {gt_prob}, expected a number in (0, 1)")
    labels, ignored = labels.long()[:, None], (labels == ignore_index)[:, None]  # (B, 1, H, W)
    known = labels[~ignored]
    if len(known) and not 0 <= known.min() <= known.max() < num_labels:
        found = f"{known.min()}..{known.max()}"
        raise ValueError(f"labels: found {found}, expected 0..{num_labels - 1} or {ignore_index}")
    rest = -math.log((1 - gt_prob) / max(num_labels - 1, 1))
    energies = torch.full((len(labels), num_labels, *labels.shape[2:]), rest, device=labels.device)
    energies.scatter_(1, labels.masked_fill(ignored, 0), -math.log(gt_prob))
    return torch.where(ignored, math.log(num_labels), energies)


# ------------------------------------------------------------------ kernels


def positions(height: int, width: int, sigma: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Pixel coordinates in standard deviations, rows x and y: (2, H * W)."""
    y, x = torch.meshgrid(
        torch.arange(height, dtype=dtype, device=device), torch.arange(width, dtype=dtype, device=device),
        indexing="ij",
    )  # fmt: skip
    return torch.stack([x.reshape(-1), y.reshape(-1)]) / sigma


def bilateral_features(image: Tensor, sigma_xy: float, sigma_rgb: float) -> Tensor:
    """Image (3, H, W) -> x, y, r, g, b in standard deviations: (5, H * W)."""
    place = positions(*image.shape[1:], sigma_xy, image.dtype, image.device)
    return torch.cat([place, image.flatten(1) / sigma_rgb])


def normalized(gaussian: Callable, like: Tensor, weight: float) -> Callable[[Tensor], Tensor]:
    """The sum q -> K q, for values (N, L) -> q -> w n K n q; like: (N,), for its dtype and device."""
    n = (gaussian(torch.ones_like(like)[:, None]) + 1e-20).rsqrt()  # (N, 1); K is at least 1 on its diagonal
    return lambda q: gaussian(q * n) * (weight * n)


def lattice_message(features: Tensor, weight: float) -> Callable[[Tensor], Tensor]:
    """`normalized` for the lattice of features (d, N), with w and n inside the lattice's weights."""
    lattice = PermutohedralLattice(features)
    # 1e-20, as the classic code has it.
    n = (lattice.filter(torch.ones_like(features[0])[:, None])[:, 0] + 1e-20).rsqrt()
    lattice.scale(before=n, after=weight * n)
    return lattice.filter


@functools.lru_cache(maxsize=4)
def spatial_lattice(
    height: int, width: int, sigma: float, weight: float, dtype: torch.dtype, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """The spatial kernel's message by the lattice. 50 bytes a pixel, for the last four sizes asked for."""
    return lattice_message(positions(height, width, sigma, dtype, device), weight)


def spatial_exact(
    height: int, width: int, sigma: float, weight: float, dtype: torch.dtype, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """The spatial kernel's exact message: K = K_rows x K_columns, and so are n and D^-1/2 K D^-1/2."""
    factors = []
    for length in (height, width):
        place = torch.arange(length, dtype=dtype, device=device) / sigma
        kernel = torch.exp((place[:, None] - place).square() / -2)
        n = kernel.sum(1).rsqrt()
        factors.append(n[:, None] * kernel * n)
    rows, columns = factors

    def message(q: Tensor) -> Tensor:
        image = q.view(height, width * q.shape[1])  # (N, C) -> (H, W * C)
        image = (rows @ image).view(height, width, -1)  # -> (H, W, C)
        return (weight * (columns @ image)).view(q.shape)

    return message


def gaussian_sum(features: Tensor, values: Tensor, backend: str = "torch") -> Tensor:
    """The sums over j of exp(-|f_i - f_j|^2 / 2) values_j, no N x N matrix: (d, N), (N, L) -> (N, L).

    backend "torch": K is symmetric, so each tile above the diagonal serves twice. Its exponents come from one
    float64 product, [f, -|f|^2 / 2, 1] . [g, 1, -|g|^2 / 2] = -|f - g|^2 / 2: in float32 it would cancel.
    """
    if backend == "triton":
        from . import dense_crf_triton

        return dense_crf_triton.gaussian_sum(features, values)
    f = features.T.double()  # (N, d)
    half, one = f.square().sum(1, keepdim=True) / -2, torch.ones_like(f[:, :1])
    left, right = torch.cat([f, half, one], 1), torch.cat([f, one, half], 1).T.contiguous()
    out = torch.zeros_like(values)
    for i in range(0, len(values), TILE):
        for j in range(i, len(values), TILE):
            tile = (left[i : i + TILE] @ right[:, j : j + TILE]).to(values.dtype)
            # e^-80 is nothing beside the diagonal's 1, and spares arithmetic on denormal numbers (3x slower).
            tile = tile.clamp_(-80, 0).exp_()
            out[i : i + TILE].addmm_(tile, values[j : j + TILE])
            if j > i:
                out[j : j + TILE].addmm_(tile.T, values[i : i + TILE])
    return out


# ------------------------------------------------------------------ checks


def check_settings(image: Tensor, spatial: tuple, bilateral: tuple, method: str) -> None:
    """Raise ValueError for what `DenseCRF` cannot use."""
    if image.ndim != 3 or len(image) != 3 or 0 in image.shape:
        raise ValueError(f"image: found shape {tuple(image.shape)}, expected (3, H, W) without a 0")
    for name, numbers, names in (
        ("spatial", spatial, "(sigma, weight)"), ("bilateral", bilateral, "(sigma_xy, sigma_rgb, weight)")
    ):  # fmt: skip
        count = names.count(",") + 1
        if len(numbers) != count or min(numbers[:-1]) <= 0 or numbers[-1] < 0:
            raise ValueError(f"{name}: found {numbers}, expected {names}, sigmas positive, weight 0 or more")
    if method not in METHODS:
        raise ValueError(f"method: found {method!r}, expected one of {', '.join(METHODS)}")


def choose_kernel_backend(method: str, backend: str, image: Tensor) -> str:
    """"triton" or "torch", by dispatch.py's rules: the lattice and float64 are PyTorch's alone.

    Products in full float32 use no tensor cores anywhere, so old GPUs take Triton as well.
    """
    if method == "exact" and image.dtype != torch.float64:
        return choose_backend(backend, image)
    if backend == "triton":
        found = "method 'lattice'" if method == "lattice" else "float64"
        raise ValueError(f"backend: found 'triton' with {found}, expected 'auto' or 'torch'")
    return choose_backend("torch" if backend == "auto" else backend, image)
