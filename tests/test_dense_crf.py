"""DenseCRF against the classic code's results, loops and dictionaries in float64, edges, refused inputs."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import naive_dense_crf as naive
from safetensors.torch import load_file, save_file
from triton_harness import interpret

from wsss_lib.kernels import baselines
from wsss_lib.kernels.dense_crf import DenseCRF, dense_crf, unary_from_labels, unary_from_probabilities
from wsss_lib.kernels.permutohedral import PermutohedralLattice, elevate, embed

dense_crf_module = sys.modules["wsss_lib.kernels.dense_crf"]
GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "dense_crf.json").read_text())
RUNS = [(name, n) for name, case in CASES.items() for n in case["iterations"]]
SETTINGS = ((2.7, 3), (11.3, 23, 4))  # sigmas that leave no pixel on the border of two simplices


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "dense_crf.safetensors")


def inputs(height, width, labels, batch=1, seed=0, dtype=torch.float64):
    """Random energies and images, smooth enough for neighbours to matter."""
    g = torch.Generator().manual_seed(seed)
    unary = 3 * torch.rand(batch, labels, height, width, generator=g, dtype=torch.float64)
    ramp = torch.linspace(0, 150, width, dtype=torch.float64)
    images = ramp + 100 * torch.rand(batch, 3, height, width, generator=g, dtype=torch.float64)
    return unary.to(dtype), images.to(dtype)


def case_inputs(golden, name):
    case, image = CASES[name], golden[f"{name}.image"].permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)
    return golden[f"{name}.unary"][None], image[None], tuple(case["spatial"]), tuple(case["bilateral"])


# ------------------------------------------------------------------ the classic code


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name, num_iter", RUNS)
def test_lattice_reproduces_the_classic_code(golden, name, num_iter, dtype):
    unary, image, *settings = case_inputs(golden, name)
    out, expected = dense_crf(unary.to(dtype), image, *settings, num_iter)[0], golden[f"{name}.q{num_iter}"]
    assert out.dtype == dtype
    # Two float32 programs that add in another order, ten times over: 1.2e-5 was measured.
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=5e-5)
    assert torch.equal(out.argmax(0), expected.argmax(0))


def test_the_reference_lattice_reproduces_the_classic_code(golden):
    unary, image, *settings = case_inputs(golden, "photo_softmax")
    out = naive.dense_crf(unary[0].numpy(), image[0].numpy(), *settings, 1, "lattice")
    np.testing.assert_allclose(out, golden["photo_softmax.q1"], rtol=0, atol=2e-5)  # the golden is float32


@pytest.mark.parametrize("name", ["synthetic_labels", "photo_softmax"])
def test_the_baseline_reproduces_the_classic_code(golden, name):
    unary, image, *settings = case_inputs(golden, name)
    out = baselines.dense_crf_uncached(unary, image, *settings, 10)[0]
    torch.testing.assert_close(out, golden[f"{name}.q10"], rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", CASES)
def test_unary_energies_are_those_of_the_classic_code(golden, name):
    expected = golden[f"{name}.unary"]
    if CASES[name]["unary"] == "labels":
        out = unary_from_labels(golden[f"{name}.label"][None], len(expected), CASES[name]["gt_prob"])[0]
    else:
        out = unary_from_probabilities(golden[f"{name}.prob"][None])[0]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)  # one float32 logarithm


# ------------------------------------------------------------------ the references


@pytest.mark.parametrize("method", ["lattice", "exact"])
@pytest.mark.parametrize("height, width, labels", [(7, 10, 3), (1, 13, 2), (9, 1, 4), (1, 1, 3), (6, 5, 1)])
def test_agrees_with_the_loops(method, height, width, labels, monkeypatch):
    monkeypatch.setattr(dense_crf_module, "TILE", 16)  # ragged tiles, on and above the diagonal
    unary, images = inputs(height, width, labels)
    out = dense_crf(unary, images, *SETTINGS, 3, method)
    expected = naive.dense_crf(unary[0].numpy(), images[0].numpy(), *SETTINGS, 3, method)
    # float64 on both sides: the order of additions
    np.testing.assert_allclose(out[0].numpy(), expected, rtol=0, atol=1e-11)
    out = dense_crf(unary.float(), images, *SETTINGS, 3, method)
    assert out.dtype == torch.float32
    # float32: probabilities near 1/2 with messages of up to 7, each good to 1e-6
    np.testing.assert_allclose(out[0].numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["lattice", "exact"])
def test_each_kernel_alone_and_none(method):
    unary, images = inputs(6, 8, 3)
    for weights in [(2, 0), (0, 5), (0, 0)]:
        settings = (3.1, weights[0]), (9.7, 31, weights[1])
        out = dense_crf(unary, images, *settings, 2, method)[0]
        expected = naive.dense_crf(unary[0].numpy(), images[0].numpy(), *settings, 2, method)
        np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=1e-11)


def test_exact_over_several_tiles_agrees_with_the_whole_kernel():
    unary, images = inputs(25, 43, 4)  # 1075 pixels: three tiles a side, the last ragged
    expected = baselines.dense_crf_exact(unary, images, *SETTINGS, 5)
    out = dense_crf(unary, images, *SETTINGS, 5, "exact")
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
    out = dense_crf(unary.float(), images, *SETTINGS, 5, "exact")
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


def test_exact_survives_bright_colours_and_a_narrow_sigma():
    """|f|^2 is 20000 here: in float32 its rounding alone would be 1e-3 of the kernel."""
    _, images = inputs(8, 9, 3)
    features = dense_crf_module.bilateral_features(245 + images[0].float() / 25, 40, 3)
    values = torch.ones(72, 1)
    out = dense_crf_module.gaussian_sum(features, values)
    expected = naive.gaussian_kernel(features.T.numpy()) @ values.numpy()
    np.testing.assert_allclose(out, expected, rtol=1e-6)  # exponents exact, then one float32 sum


# (height, width, labels): ragged blocks, more labels than a program accumulates, one pixel, several blocks
TRITON_CASES = {"ragged": (9, 13, 3), "many_labels": (5, 7, 70), "pixel": (1, 1, 1), "blocks": (11, 12, 21)}
TRITON_SETTINGS = ((3, 3), (20, 60, 4), 2)


def triton_main(file):
    results = {}
    for name, shape in TRITON_CASES.items():
        unary, images = inputs(*shape, dtype=torch.float32)
        results[name] = dense_crf(unary, images, *TRITON_SETTINGS, "exact", "triton").contiguous()
    save_file(results, file)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    return interpret(triton_main, tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("name", TRITON_CASES)
def test_triton_agrees_with_the_whole_kernel(interpreted, name):
    unary, images = inputs(*TRITON_CASES[name], dtype=torch.float32)
    expected = baselines.dense_crf_exact(unary.double(), images.double(), *TRITON_SETTINGS)
    torch.testing.assert_close(interpreted[name].double(), expected, rtol=0, atol=1e-5)  # float32, as above


# ------------------------------------------------------------------ the lattice


@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_embedding_keeps_distances_and_surrounds_the_point(d):
    features = 6 * torch.randn(d, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(d))
    point = elevate(features)
    torch.testing.assert_close(point.sum(0), torch.zeros(200, dtype=torch.float64), rtol=0, atol=1e-12)
    scale = 2 / 3 * (d + 1) ** 2
    torch.testing.assert_close(point.square().sum(0), scale * features.square().sum(0), rtol=1e-12, atol=0)
    corner, rank, barycentric = embed(features)
    assert (corner.sum(0) == 0).all() and (rank.sort(0).values == torch.arange(d + 1)[:, None]).all()
    assert barycentric.min() > -1e-12  # so that the point is inside; an error of rounding on a border
    vertex, mean = corner * (d + 1), 0
    for k in range(d + 1):
        mean = mean + barycentric[k] * vertex
        vertex = vertex + 1 - (d + 1) * (rank == d - k)  # the next remainder's vertex
    torch.testing.assert_close(mean, point, rtol=0, atol=1e-10)


@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_lattice_filter_agrees_with_the_dictionary(d):
    g = torch.Generator().manual_seed(d)
    features = 2 * torch.randn(d, 150, dtype=torch.float64, generator=g)
    values = torch.rand(150, 4, dtype=torch.float64, generator=g)
    lattice, expected = PermutohedralLattice(features), naive.Lattice(features.T.numpy())
    assert lattice.num_vertices == len(expected.vertices)
    np.testing.assert_allclose(lattice.filter(values), expected.filter(values.numpy()), rtol=1e-12)


@pytest.mark.parametrize("d", [2, 3, 5])
def test_neighbours_outside_the_box_of_vertices_are_nobody(d):
    """In a small box a number out of range would soon be another vertex's."""
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        features = torch.rand(d, 12, dtype=torch.float64, generator=g) * (1 + seed % 3)
        values = torch.rand(12, 1, dtype=torch.float64, generator=g)
        out, expected = PermutohedralLattice(features).filter(values), naive.Lattice(features.T.numpy())
        np.testing.assert_allclose(out, expected.filter(values.numpy()), rtol=1e-12)


def test_lattice_approximates_the_gaussian_of_a_smooth_signal():
    y, x = torch.meshgrid(torch.arange(30.0), torch.arange(40.0), indexing="ij")
    features = torch.stack([x.reshape(-1), y.reshape(-1)]) / 4
    signal = (1 + torch.sin(x / 7) * torch.cos(y / 5)).reshape(-1, 1)
    lattice, ones = PermutohedralLattice(features), torch.ones(1200, 1)
    mean = lattice.filter(signal) / lattice.filter(ones)
    kernel = torch.exp(torch.cdist(features.T, features.T).square() / -2)
    exact = kernel @ signal / kernel.sum(1, keepdim=True)
    # A lattice of 1.4 cells a standard deviation, on values of 0..2; leaving one blur out gives 0.1.
    assert (mean - exact).abs().max() < 0.06 and (signal - exact).abs().max() > 0.3


def test_the_bilateral_lattice_does_not_cross_an_edge():
    image = torch.zeros(1, 3, 8, 12)
    image[..., 6:] = 200
    labels = (image[:, 0] > 0).long()
    labels[0, 2, 3], labels[0, 5, 9] = 1, 0  # noise on either side
    for method in ("lattice", "exact"):
        out = dense_crf(unary_from_labels(labels, 2), image, method=method)
        assert torch.equal(out.argmax(1), (image[:, 0] > 0).long())


# ------------------------------------------------------------------ edges


@pytest.mark.parametrize("method", ["lattice", "exact"])
def test_no_iteration_is_a_softmax_and_one_label_is_certain(method):
    unary, images = inputs(5, 6, 3, dtype=torch.float32)
    torch.testing.assert_close(dense_crf(unary, images, num_iter=0, method=method), (-unary).softmax(1))
    assert (dense_crf(unary[:, :1], images, method=method) == 1).all()


@pytest.mark.parametrize("method", ["lattice", "exact"])
def test_a_constant_image_stays_finite_and_sums_to_one(method):
    unary, images = inputs(12, 9, 4, dtype=torch.float32)
    out = dense_crf(unary, images * 0 + 255, method=method)
    torch.testing.assert_close(out.sum(1), torch.ones(1, 12, 9))


@pytest.mark.parametrize("method", ["lattice", "exact"])
def test_batches_runs_layouts_and_autocast_change_no_bit(method):
    unary, images = inputs(9, 14, 3, batch=3, dtype=torch.float32)
    out = dense_crf(unary, images, method=method)
    assert torch.equal(out, dense_crf(unary, images, method=method))
    for b in range(3):
        assert torch.equal(out[b : b + 1], dense_crf(unary[b : b + 1], images[b : b + 1], method=method))
    strided = torch.zeros(3, 9, 28, 3)[:, :, ::2].permute(0, 3, 1, 2).copy_(unary)
    turned = images.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    assert not strided.is_contiguous() and torch.equal(out, dense_crf(strided, turned, method=method))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(out, dense_crf(unary, images, method=method))
    assert not dense_crf(unary.clone().requires_grad_(), images, method=method).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    unary, images = inputs(6, 7, 3, dtype=dtype)
    out = dense_crf(unary, images)
    assert out.dtype == torch.float32 and torch.equal(out, dense_crf(unary.float(), images.float()))


@pytest.mark.parametrize("method", ["lattice", "exact"])
def test_kept_kernels_serve_many_unaries(method):
    unary, images = inputs(8, 11, 3, batch=2, dtype=torch.float32)
    crf = DenseCRF(images[0], *SETTINGS, method)
    for energies in (unary[0], unary[1, :2], unary[0]):
        expected = dense_crf(energies[None], images[:1], *SETTINGS, 4, method)[0]
        assert torch.equal(crf(energies, 4), expected)


def test_the_spatial_lattice_is_kept_for_its_size_sigma_weight_and_precision():
    unary, images = inputs(5, 8, 2, dtype=torch.float32)
    cache = dense_crf_module.spatial_lattice
    cache.cache_clear()
    first = dense_crf(unary, images, (3, 3), num_iter=2)
    for changed in ((4, 3), (3, 2)):
        assert not torch.equal(dense_crf(unary, images, changed, num_iter=2), first)
    dense_crf(unary.double(), images, (3, 3), num_iter=2)
    assert (cache.cache_info().hits, cache.cache_info().misses) == (0, 4)
    assert torch.equal(dense_crf(unary, images, (3, 3), num_iter=2), first)
    assert cache.cache_info().hits == 1


# ------------------------------------------------------------------ unaries


def test_unary_helpers_worked_by_hand():
    labels = torch.tensor([[[0, 2, 255]]])
    probabilities = (-unary_from_labels(labels, 3, gt_prob=0.6)).exp()[0, :, 0].T  # (3 pixels, 3 labels)
    expected = torch.tensor([[0.6, 0.2, 0.2], [0.2, 0.2, 0.6], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(probabilities, expected)
    assert unary_from_labels(labels * 0, 1).isfinite().all()
    energies = unary_from_probabilities(torch.tensor([1.0, 0.5, 0.0]).view(1, 3, 1, 1), clip=0.01)
    torch.testing.assert_close(energies.flatten(), torch.tensor([0, math.log(2), math.log(100)]))


# ------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    "change, message",
    [
        ({"unary": torch.zeros(2, 4, 4)}, "unary: found shape"),
        ({"unary": torch.zeros(0, 2, 4, 4), "images": torch.zeros(0, 3, 4, 4)}, "unary: found shape"),
        ({"unary": torch.zeros(1, 0, 4, 4)}, "unary: found shape"),
        ({"images": torch.zeros(1, 1, 4, 4)}, r"images: .* expected \(1, 3, 4, 4\)"),
        ({"images": torch.zeros(1, 3, 4, 5)}, "images: found shape"),
        ({"images": torch.zeros(2, 3, 4, 4)}, "images: found shape"),
        ({"unary": torch.full((1, 2, 4, 4), math.inf)}, "not finite: clip"),
        ({"unary": torch.full((1, 2, 4, 4), math.nan)}, "not finite: clip"),
        ({"images": torch.full((1, 3, 4, 4), math.nan)}, "images: found values that are not finite"),
        ({"spatial": (0, 3)}, "spatial: found"),
        ({"spatial": (3, -1)}, "spatial: found"),
        ({"bilateral": (80, 13)}, "bilateral: found"),
        ({"bilateral": (80, -13, 10)}, "bilateral: found"),
        ({"bilateral": (1e-5, 1e-5, 1)}, "deviations are too small"),
        ({"num_iter": -1}, "num_iter: found -1"),
        ({"method": "fast"}, "method: found 'fast'"),
        ({"backend": "cuda"}, "backend: found 'cuda'"),
        ({"backend": "triton"}, "backend: found 'triton' with method 'lattice'"),
    ],
)
def test_dense_crf_refuses(change, message):
    arguments = {"unary": torch.zeros(1, 2, 4, 4), "images": torch.rand(1, 3, 4, 4) * 255}
    with pytest.raises(ValueError, match=message):
        dense_crf(**{**arguments, **change})


def test_triton_refuses_float64():
    unary, images = inputs(3, 3, 2)
    with pytest.raises(ValueError, match="float64"):
        dense_crf(unary, images, method="exact", backend="triton")


def test_other_refusals():
    crf = DenseCRF(torch.rand(3, 4, 5))
    with pytest.raises(ValueError, match=r"expected \(C, 4, 5\)"):
        crf(torch.zeros(2, 5, 4))
    with pytest.raises(ValueError, match="image: found shape"):
        DenseCRF(torch.rand(1, 3, 4, 5))
    with pytest.raises(ValueError, match=r"labels: found 0\.\.3"):
        unary_from_labels(torch.tensor([[[0, 3, 255]]]), 3)
    with pytest.raises(ValueError, match="labels: found shape"):
        unary_from_labels(torch.zeros(4, 4), 3)
    with pytest.raises(ValueError, match="gt_prob: found 1"):
        unary_from_labels(torch.zeros(1, 4, 4), 3, gt_prob=1)
    with pytest.raises(ValueError, match="num_labels: found 0"):
        unary_from_labels(torch.zeros(1, 4, 4), 0)
    with pytest.raises(ValueError, match="outside"):
        unary_from_probabilities(torch.full((1, 2, 3, 3), -0.1))
    with pytest.raises(ValueError, match="outside"):
        unary_from_probabilities(torch.full((1, 2, 3, 3), math.nan))
    with pytest.raises(ValueError, match="clip: found 0"):
        unary_from_probabilities(torch.zeros(1, 2, 3, 3), clip=0)
    for features in (torch.zeros(3), torch.zeros(0, 4), torch.zeros(2, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match="features: found"):
            PermutohedralLattice(features)
