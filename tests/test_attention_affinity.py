"""AFA's affinity and the matrix product under it: loops, golden vectors, finite differences, memory."""

from pathlib import Path

import pytest
import torch
from allocations import count_allocations
from reference import naive_attention as naive
from safetensors.torch import load_file

from wsss_lib.kernels import baselines, products
from wsss_lib.kernels.attention_affinity import attention_affinity
from wsss_lib.kernels.products import inner_products

GOLDEN = load_file(Path(__file__).parent / "golden/afa_affinity.safetensors")
SIZES = [(1, 1, 1, 8), (2, 3, 17, 8), (2, 4, 84, 32), (1, 2, 197, 64)]  # (B, M, N, d)


def make_inputs(size, dtype=torch.float64):
    """q, k, weight, bias and a gradient; scores of order 1."""
    batch, maps, n, d = size
    generator = torch.Generator().manual_seed(n * maps + d)
    shapes = [(batch, maps, n, d), (batch, maps, n, d), (maps,), (1,), (batch, n, n)]
    q, k, weight, bias, gradient = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    inputs = [q, k, weight * (d * maps) ** -0.5, bias, gradient]
    return [x.to(torch.float16).to(dtype) for x in inputs]  # numbers that every type can hold


def expected(q, k, weight, bias):
    """In float64, the scores of every head written out."""
    q, k, weight, bias = (x.double() for x in (q, k, weight, bias))
    scores = torch.einsum("m,bmid,bmjd->bij", weight, q, k)
    return torch.sigmoid(scores + scores.transpose(1, 2) + bias)


def gradients(function, q, k, weight, bias, gradient):
    """Of q, k, weight and bias."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, weight, bias)]
    return torch.autograd.grad(function(*leaves), leaves, gradient)


def assert_close(found, wanted, tolerance):
    """Differences beside the largest value."""
    assert found.shape == wanted.shape
    assert (found.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


# ------------------------------------------------------------------ the formula


@pytest.mark.parametrize("way", ["loops", "kernel", "float32", "baseline"])
def test_agrees_with_the_published_network(way):
    """The golden scores as queries, one-hot vectors as keys: their products are the scores themselves.

    The affinities reach down to 1e-13; a score of 30 in float32 is good to 2e-6, and so is its sigmoid,
    relatively.
    """
    scores = GOLDEN["scores"].double()  # (1, 16, N, N)
    keys = torch.eye(16, dtype=torch.float64).expand(1, 16, 16, 16)
    weight = torch.from_numpy(naive.formula_weight("attn_proj.weight", (1, 16, 1, 1))).flatten()
    bias = torch.from_numpy(naive.formula_weight("attn_proj.bias", (1,)))
    if way == "loops":
        found = torch.from_numpy(naive.affinity(scores, keys, weight, bias[0]))
    elif way == "baseline":
        found = baselines.attention_affinity(scores, keys, weight, bias)
    else:
        dtype = torch.float64 if way == "kernel" else torch.float32
        found = attention_affinity(scores.to(dtype), keys.to(dtype), weight.to(dtype), bias.to(dtype))
    torch.testing.assert_close(found.double(), GOLDEN["affinity"].double(), rtol=2e-5, atol=0)


def test_written_out_agrees_with_the_loops():
    q, k, weight, bias, _ = make_inputs((2, 3, 17, 8))
    looped = torch.from_numpy(naive.affinity(q, k, weight, bias[0]))
    # float64 on both sides: only the order of additions differs
    torch.testing.assert_close(expected(q, k, weight, bias), looped, rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 4e-6)])
@pytest.mark.parametrize("worthwhile", [0, 2**60])
def test_values_and_gradients(size, dtype, tolerance, worthwhile, monkeypatch):
    """Rounding only: float32 adds up to 256 products of order 1. Both matrix products: oneDNN's and MKL's."""
    monkeypatch.setattr(products, "WORTHWHILE", worthwhile)
    *inputs, gradient = make_inputs(size)
    low = [x.to(dtype) for x in inputs]
    found = attention_affinity(*low)
    assert found.dtype == dtype
    assert_close(found, expected(*inputs), tolerance)
    wanted = gradients(expected, *inputs, gradient)
    for x, y in zip(gradients(attention_affinity, *low, gradient.to(dtype)), wanted):
        assert x.dtype == dtype
        assert_close(x, y, tolerance)


def test_gradients_agree_with_finite_differences():
    leaves = [x.requires_grad_() for x in make_inputs((2, 3, 4, 3))[:4]]
    assert torch.autograd.gradcheck(attention_affinity, leaves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_accumulate_in_float32(dtype):
    *inputs, gradient = (x.to(dtype) for x in make_inputs((2, 4, 84, 32)))
    found = attention_affinity(*inputs)
    assert found.dtype == torch.float32
    assert_close(found, expected(*inputs), 4e-6)
    for x in gradients(attention_affinity, *inputs, gradient.float()):
        assert x.dtype == dtype


def test_symmetric_and_a_plain_number_as_bias():
    q, k, weight, bias, _ = make_inputs((2, 4, 84, 32), torch.float32)
    found = attention_affinity(q, k, weight, bias)
    assert torch.equal(found, found.transpose(1, 2))
    assert torch.equal(found, attention_affinity(q, k, weight, bias.item()))


def test_not_contiguous_inputs_autocast_and_a_second_run_give_the_same_bits():
    *inputs, gradient = make_inputs((2, 4, 84, 32), torch.float32)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:2]] + inputs[2:]
    first = attention_affinity(*inputs)
    assert torch.equal(first, attention_affinity(*strided))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(first, attention_affinity(*inputs))
    twice = [gradients(attention_affinity, *inputs, gradient) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*twice))


def test_memory_is_a_few_maps_however_many_heads_there_are():
    """Four N x N and the copies of q and k; the published way: three for every head."""

    def peak(function, maps):
        *inputs, gradient = make_inputs((1, maps, 300, 8), torch.float32)
        leaves = [x.requires_grad_() for x in inputs]
        with count_allocations() as memory:
            function(*leaves).backward(gradient)
        return memory.peak / 4 / 300**2  # 8 numbers a token and head: 0.027 of N x N

    assert peak(attention_affinity, 8) < 4 + 6 * 8 * 0.027
    assert peak(attention_affinity, 16) < 4 + 6 * 16 * 0.027
    # with several threads autograd may free a map later: up to a fourth for every head
    assert 3 * 16 <= peak(baselines.attention_affinity, 16) < 4 * 16 + 6


@pytest.mark.parametrize(
    "q, k, weight, bias, message",
    [
        ((2, 3, 5, 4), (2, 3, 4, 4), (3,), (1,), r"q, k: found shapes \(2, 3, 5, 4\) and \(2, 3, 4, 4\)"),
        ((3, 5, 4), (3, 5, 4), (3,), (1,), r"expected both \(B, M, N, d\)"),
        ((0, 3, 5, 4), (0, 3, 5, 4), (3,), (1,), "none of them zero"),
        ((2, 3, 5, 4), (2, 3, 5, 4), (2, 3), (1,), r"weight: found shape \(2, 3\), expected \(M,\) = \(3,\)"),
        ((2, 3, 5, 4), (2, 3, 5, 4), (3,), (3,), r"bias: found shape \(3,\), expected one number"),
    ],
)
def test_wrong_shapes(q, k, weight, bias, message):
    with pytest.raises(ValueError, match=message):
        attention_affinity(torch.zeros(q), torch.zeros(k), torch.zeros(weight), torch.zeros(bias))


def test_wrong_types():
    q, weight = torch.zeros(2, 3, 5, 4), torch.zeros(3)
    with pytest.raises(ValueError, match="the same for q and k"):
        attention_affinity(q, q.half(), weight, 0.0)
    with pytest.raises(ValueError, match="found torch.int64"):
        attention_affinity(q.long(), q.long(), weight, 0.0)


# ------------------------------------------------------------------ the matrix product


@pytest.fixture
def forget_linear():
    """The choice of the product is remembered: forget it before and after."""
    products._linear.cache_clear()
    yield
    products._linear.cache_clear()


@pytest.mark.parametrize("batch, n, m, d", [(1, 5, 4, 3), (2, 130, 210, 40), (3, 300, 90, 64)])
@pytest.mark.parametrize("worthwhile", [0, products.WORTHWHILE, 2**60])
def test_inner_products(batch, n, m, d, worthwhile, monkeypatch):
    """float32: sums of 64 products of order 1."""
    monkeypatch.setattr(products, "WORTHWHILE", worthwhile)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(batch, rows, d, generator=generator).requires_grad_() for rows in (n, m))
    wide = [x.detach().double().requires_grad_() for x in (a, b)]
    found, wanted = inner_products(a, b), torch.einsum("bnd,bmd->bnm", *wide)
    assert_close(found.detach(), wanted.detach(), 1e-6)
    gradient = torch.randn(found.shape, generator=generator)
    found.backward(gradient)
    wanted.backward(gradient.double())
    for x, y in zip((a, b), wide):
        assert_close(x.grad, y.grad, 2e-6)


def test_the_product_without_onednn(monkeypatch, forget_linear):
    a, b = torch.randn(1, 130, 40), torch.randn(1, 210, 40)
    monkeypatch.setattr(products, "WORTHWHILE", 0)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert products._linear() is None
    assert torch.equal(inner_products(a, b), torch.bmm(a, b.transpose(1, 2)))


def test_an_operator_that_has_changed_is_not_used(monkeypatch, forget_linear):
    def changed(*_args):
        raise RuntimeError("found six arguments")

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", changed, raising=False)
    assert products._linear() is None
