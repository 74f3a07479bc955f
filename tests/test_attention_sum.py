"""The fused attention map against loops, golden vectors and differences; its memory; PyTorch and Triton."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from allocations import count_allocations
from reference import naive_attention as naive
from safetensors.torch import load_file, save_file
from triton_harness import interpret

from wsss_lib.kernels import attention_sum, baselines, products
from wsss_lib.kernels.attention_sum import propagate, weighted_attention_sum
from wsss_lib.kernels.dispatch import choose_backend

ROOT = Path(__file__).parents[1]
GOLDEN = load_file(ROOT / "tests/golden/weaktr_fusion.safetensors")

# (B, M, N, d): one token, ragged sizes around Triton's blocks of 64, one map, head dimensions of 8, 32 and 64
SIZES = [(1, 1, 1, 8), (2, 3, 17, 8), (2, 2, 84, 32), (1, 2, 197, 64)]
HALF_SIZES = [(2, 3, 17, 64), (1, 2, 84, 8)]


def make_inputs(size, dtype=torch.float64, spread=1.5):
    """q, k, weights of either sign and one of them zero, and a gradient: the same in every process."""
    batch, maps, n, d = size
    generator = torch.Generator().manual_seed(n * maps + d)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, weights = randn(batch, maps, n, d) * spread, randn(batch, maps, n, d), randn(batch, maps)
    if maps > 1:
        weights[:, 1] = 0
    values = [q, k, weights, randn(batch, n, n)]
    return [x.to(torch.float16).to(dtype) for x in values]  # numbers that every type can hold


def expected(q, k, weights, gradient, scale=None):
    """F and dw of the float64 maps written out."""
    q, k, weights, gradient = (x.detach().double() for x in (q, k, weights, gradient))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    attention = (scale * q @ k.transpose(-2, -1)).softmax(-1)  # (B, M, N, N)
    fused = torch.einsum("bm,bmij->bij", weights, attention)
    return fused, torch.einsum("bij,bmij->bm", gradient, attention)


def run(q, k, weights, gradient, **options):
    """F and dw of the library."""
    weights = weights.detach().clone().requires_grad_()
    fused = weighted_attention_sum(q, k, weights, **options)
    fused.backward(gradient.to(fused.dtype))
    return fused.detach(), weights.grad


def assert_close(found, wanted, tolerance):
    """Differences beside the largest value: entries of an attention map are as small as one likes."""
    assert found.shape == wanted.shape
    assert (found.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


# ------------------------------------------------------------------ the counter of allocations


def test_count_allocations_worked_by_hand():
    older = torch.zeros(100)
    with count_allocations() as memory:
        a = torch.zeros(1000)  # 4000 bytes
        b = torch.zeros(500)  # 6000 held
        del a, older  # 2000: what was there before does not count
        c = b + 1  # 4000
    assert memory.peak == 6000 and memory.held == 4000
    del b, c


def test_count_allocations_sees_what_operators_allocate_inside():
    a, b = torch.zeros(100, 200), torch.zeros(200, 100).T
    with count_allocations() as memory:
        torch.softmax(a + b, -1)  # the sum and the softmax
    assert memory.peak == 2 * 80000 and memory.held == 0


# ------------------------------------------------------------------ the reference itself


def golden_inputs():
    """q, k of the golden network (B, M, N, d) and its weights, maps in the order of the blocks."""
    q, k = naive.weaktr_queries_and_keys(GOLDEN["image"].double().numpy(), 96, 4, 6, 20, 16, salt="s1/")
    # (B, H*L) -> (B, L*H)
    weights = GOLDEN["weights"].unflatten(1, (6, 4)).transpose(1, 2).flatten(1)
    return torch.from_numpy(q).flatten(1, 2), torch.from_numpy(k).flatten(1, 2), weights / 24


@pytest.mark.parametrize("fuse", ["loops", "kernel", "float32", "baseline"])
def test_agrees_with_the_published_network(fuse):
    """Golden vectors are float32; their own noise is 2e-5 of the largest value."""
    q, k, weights = golden_inputs()
    if fuse == "loops":
        q, k, weights = q[:1], k[:1], weights[:1]
        fused = torch.from_numpy(naive.weighted_sum(q, k, weights, 16**-0.5))
    elif fuse == "baseline":
        fused = baselines.weighted_attention_sum(q, k, weights.double(), heads=6)
    else:
        dtype = torch.float64 if fuse == "kernel" else torch.float32
        fused = weighted_attention_sum(q.to(dtype), k.to(dtype), weights.to(dtype))
    pictures = len(fused)
    assert_close(fused[:, 20:, 20:], GOLDEN["patch_attention"][0, :pictures].double(), 2e-5)
    assert_close(fused[:, :20, 20:], GOLDEN["class_attention"][:pictures].flatten(2).double(), 2e-5)


def test_maps_written_out_agree_with_the_loops():
    q, k, weights, gradient = make_inputs((2, 3, 17, 8))
    looped = torch.from_numpy(naive.weighted_sum(q, k, weights, 0.3))
    # float64 on both sides: only the order of additions differs
    torch.testing.assert_close(expected(q, k, weights, gradient, 0.3)[0], looped, rtol=0, atol=1e-14)


# ------------------------------------------------------------------ PyTorch


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tiles", [(2**18, 2**16), (60, 130), (2000, 1)])
def test_float64(size, tiles, monkeypatch):
    """Rounding only, in one tile, in several row blocks and in packs of maps."""
    monkeypatch.setitem(attention_sum.TILE_AND_PACK, "cpu", tiles)
    inputs = make_inputs(size)
    for found, wanted in zip(run(*inputs), expected(*inputs)):
        assert found.dtype == torch.float64
        assert_close(found, wanted, 1e-13)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("worthwhile", [0, 2**60])
def test_float32(size, worthwhile, monkeypatch):
    """An exponent of 20 has an error of 20 x 6e-8, and a sum of maps keeps the largest: 4e-6 is thrice that.
    Both matrix products: oneDNN's and MKL's."""
    monkeypatch.setattr(products, "WORTHWHILE", worthwhile)
    inputs = make_inputs(size, torch.float32)
    for found, wanted in zip(run(*inputs), expected(*inputs)):
        assert found.dtype == torch.float32
        assert_close(found, wanted, 4e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", HALF_SIZES)
def test_half_precision_inputs_accumulate_in_float32(size, dtype):
    """The inputs are taken as they are: the result is float32's, not half precision's 1e-3."""
    inputs = [x.to(dtype) for x in make_inputs(size)]
    fused, d_weights = run(*inputs)
    wanted = expected(*inputs)
    assert fused.dtype == torch.float32 and d_weights.dtype == dtype
    assert_close(fused, wanted[0], 4e-6)
    assert_close(d_weights, wanted[1], torch.finfo(dtype).eps)  # rounded to the type of the weights


@pytest.mark.parametrize("tiles", [(2**18, 2**16), (8, 16)])
def test_gradients_agree_with_finite_differences(tiles, monkeypatch):
    monkeypatch.setitem(attention_sum.TILE_AND_PACK, "cpu", tiles)
    q, k, weights, _ = make_inputs((2, 3, 4, 3))
    values = torch.randn(2, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    leaves = [x.requires_grad_() for x in (q, k, weights, values)]
    assert torch.autograd.gradcheck(lambda q, k, w: weighted_attention_sum(q, k, w, scale=0.7), leaves[:3])
    assert torch.autograd.gradcheck(lambda *x: propagate(*x, scale=0.7), leaves)
    for i in range(4):  # each alone
        alone = [x.detach() for x in leaves]
        alone[i].requires_grad_()
        assert torch.autograd.gradcheck(propagate, alone)


@pytest.mark.parametrize("worthwhile", [0, 2**60])
def test_gradients_of_queries_and_keys_in_float32(worthwhile, monkeypatch):
    monkeypatch.setattr(products, "WORTHWHILE", worthwhile)
    q, k, weights, gradient = make_inputs((2, 2, 84, 32))
    found = [x.float().requires_grad_() for x in (q, k, weights)]
    weighted_attention_sum(*found).backward(gradient.float())
    wanted = [x.requires_grad_() for x in (q, k, weights)]
    attention = (32**-0.5 * q @ k.transpose(-2, -1)).softmax(-1)
    torch.einsum("bm,bmij->bij", weights, attention).backward(gradient)
    for x, y in zip(found, wanted):
        assert_close(x.grad, y.grad, 4e-6)  # as in test_float32


@pytest.mark.parametrize("spread", [1e-3, 40.0, 1e4])
def test_scores_of_any_size(spread):
    """Up to 1e5: the exponential of such a score is no float32 without the row maximum taken off first."""
    inputs = make_inputs((1, 3, 17, 8), torch.float32, spread)
    wanted = expected(*inputs)
    # the error of a score of s is s x 6e-8, and the map's error the same in relative terms
    tolerance = 4e-6 * max(1, spread)
    for x, y in zip(run(*inputs), wanted):
        assert x.isfinite().all()
        if spread < 1e4:
            assert_close(x, y, tolerance)
    # scores on the safe side of the bound, and the same ones forced through the row maximum
    exponentials = attention_sum._Exponentials(*inputs[:2], 8**-0.5)
    assert any(exponentials.shifted[0]) == (spread > 1)


def test_rows_sum_to_the_weights():
    q, k, weights, _ = make_inputs((2, 3, 17, 8))
    fused = weighted_attention_sum(q, k, weights)
    rows = weights.sum(1, keepdim=True).expand(2, 17)
    torch.testing.assert_close(fused.sum(-1), rows, rtol=0, atol=1e-13)  # rounding of float64


def test_not_contiguous_inputs_autocast_and_a_second_run_give_the_same_bits():
    inputs = make_inputs((2, 3, 84, 32), torch.float32)
    first = run(*inputs)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:2]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = run(*inputs)
    for other in (run(*inputs), under_autocast, run(*strided, *inputs[2:])):
        assert all(torch.equal(x, y) for x, y in zip(first, other))


def test_expanded_gradient():
    """What `.sum()` hands back: one number with strides of zero."""
    q, k, weights, _ = make_inputs((1, 2, 17, 8))
    weights.requires_grad_()
    weighted_attention_sum(q, k, weights).sum().backward()
    # each of the 17 rows sums to 1
    torch.testing.assert_close(weights.grad, torch.full_like(weights, 17), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tiles", [(2**18, 2**16), (60, 130)])
def test_propagate_is_the_map_times_the_values(tiles, monkeypatch):
    monkeypatch.setitem(attention_sum.TILE_AND_PACK, "cpu", tiles)
    q, k, weights, _ = make_inputs((2, 3, 17, 8))
    values = torch.randn(2, 17, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = weighted_attention_sum(q, k, weights) @ values
    found = propagate(q, k, weights, values)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)  # rounding of float64
    half = propagate(*(x.half() for x in (q, k, weights, values)))
    assert half.dtype == torch.float32
    assert_close(half, wanted, 2e-3)  # weights and values rounded to half precision


# ------------------------------------------------------------------ memory


def extra_memory(maps, gradients, n=600):
    """Numbers held at the peak of forward and backward beside inputs and outputs, in units of N^2."""
    q, k, weights, gradient = (x.detach() for x in make_inputs((1, maps, n, 8), torch.float32))
    leaves = {"q": q, "k": k, "weights": weights}
    for name in gradients:
        leaves[name].requires_grad_()
    with count_allocations() as memory:
        fused = weighted_attention_sum(q, k, weights)
        fused.backward(gradient)
    outputs = fused.numel() + sum(leaves[name].numel() for name in gradients)
    assert memory.held == 4 * outputs
    return (memory.peak - memory.held) / 4 / n**2


@pytest.mark.parametrize("gradients", [["weights"], ["q", "k", "weights"]])
@pytest.mark.parametrize("n", [300, 600])
def test_memory_is_three_maps_at_most_however_many_there_are(gradients, n):
    four, eight = extra_memory(4, gradients, n), extra_memory(8, gradients, n)
    assert four <= 3 and abs(four - eight) < 0.02  # the row sums and |q|, |k| of every map: M N numbers


def test_the_baseline_holds_three_numbers_for_each_of_all_maps():
    q, k, weights, _ = make_inputs((1, 12, 200, 8), torch.float32)
    with count_allocations() as memory:
        baselines.weighted_attention_sum(q, k, weights)
    assert 3 <= memory.peak / 4 / 12 / 200**2 < 3.1


def test_propagate_holds_no_map():
    """A tile of rows, these rows of F and backward of dF: at N = 600 300 rows each, for the whole batch."""
    q, k, weights, _ = make_inputs((2, 2, 600, 8), torch.float32)
    weights.requires_grad_()
    values = torch.rand(2, 600, 4)
    tile = 2**18
    with count_allocations() as memory:
        out = propagate(q, k, weights, values)
        out.backward(values)
    assert memory.peak / 4 < 2.2 * tile  # for the whole batch: one N x N a picture would be 2.7


# ------------------------------------------------------------------ what must be refused


@pytest.mark.parametrize(
    "q, k, weights, message",
    [
        ((2, 3, 5), (2, 3, 5), (2, 3), "q, k: found shapes"),
        ((2, 3, 5, 4), (2, 3, 6, 4), (2, 3), r"found shapes \(2, 3, 5, 4\) and \(2, 3, 6, 4\)"),
        ((0, 3, 5, 4), (0, 3, 5, 4), (0, 3), "none of them zero"),
        ((2, 0, 5, 4), (2, 0, 5, 4), (2, 0), "none of them zero"),
        ((2, 3, 5, 4), (2, 3, 5, 4), (3,), r"weights: found shape \(3,\), expected \(B, M\) = \(2, 3\)"),
    ],
)
def test_wrong_shapes(q, k, weights, message):
    with pytest.raises(ValueError, match=message):
        weighted_attention_sum(torch.zeros(q), torch.zeros(k), torch.zeros(weights))
    with pytest.raises(ValueError, match=message):
        propagate(torch.zeros(q), torch.zeros(k), torch.zeros(weights), torch.zeros(2, 5, 1))


def test_wrong_types_values_and_backends():
    q, weights = torch.zeros(2, 3, 5, 4), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="found torch.int64"):
        weighted_attention_sum(q.long(), q.long(), weights)
    with pytest.raises(ValueError, match="the same for q and k"):
        weighted_attention_sum(q, q.half(), weights)
    with pytest.raises(ValueError, match=r"values: found shape \(2, 4, 1\), expected .* with B = 2, N = 5"):
        propagate(q, q, weights, torch.zeros(2, 4, 1))
    with pytest.raises(ValueError, match="values: found torch.int64"):
        propagate(q, q, weights, torch.zeros(2, 5, 1).long())
    with pytest.raises(ValueError, match="backend: found 'cuda'"):
        weighted_attention_sum(q, q, weights, backend="cuda")


def test_auto_leaves_old_cards_and_large_heads_to_torch(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: "there is Triton")

    def auto(head_dim, capability, uses_dot=True):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda _device: capability)
        tensor = SimpleNamespace(device=torch.device("cuda"), shape=(1, 1, 5, head_dim))
        return choose_backend("auto", tensor, uses_dot)

    assert auto(64, (8, 0)) == auto(64, (9, 0)) == "triton"
    assert auto(64, (7, 5)) == auto(65, (9, 0)) == "torch"
    assert auto(512, (7, 5), uses_dot=False) == "triton"


def test_triton_is_left_to_what_it_can_do(monkeypatch):
    """As on a GPU: "auto" falls back, an explicit "triton" says why not."""
    monkeypatch.setattr(attention_sum, "choose_backend", lambda *_args, **_options: "triton")
    q, weights = torch.zeros(1, 1, 5, 4), torch.zeros(1, 1)
    learned, double = q.clone().requires_grad_(), q.double()
    choose = attention_sum._choose
    assert choose(q, q, weights, "auto") == choose(q, q, weights, "triton") == "triton"
    assert choose(learned, q, weights, "auto") == choose(q, learned, weights, "auto") == "torch"
    assert choose(double, double, weights, "auto") == "torch"
    with pytest.raises(ValueError, match="q or k that require a gradient"):
        choose(q, learned, weights, "triton")
    with pytest.raises(ValueError, match="float64"):
        choose(double, double, weights, "triton")
    with torch.no_grad():
        assert choose(learned, q, weights, "triton") == "triton"


# ------------------------------------------------------------------ Triton, interpreted on the CPU

TRITON_CASES = [(size, torch.float32) for size in SIZES] + [(size, torch.float16) for size in HALF_SIZES]


def triton_main(file):
    """Every case once, and one from strided tensors, with large scores and with another scale."""
    results = {}
    for number, (size, dtype) in enumerate(TRITON_CASES):
        inputs = make_inputs(size, dtype)
        results[f"{number}.sum"], results[f"{number}.gradient"] = run(*inputs, backend="triton")
    q, k, weights, gradient = make_inputs((2, 3, 17, 8), torch.float32)
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    gradient = gradient.transpose(1, 2).contiguous().transpose(1, 2)
    results["strided.sum"], results["strided.gradient"] = run(q, k, weights, gradient, backend="triton")
    large = make_inputs((1, 3, 17, 8), torch.float32, 40.0)
    results["large.sum"], results["large.gradient"] = run(*large, backend="triton")
    results["scaled.sum"], _ = run(*make_inputs((2, 3, 17, 8), torch.float32), scale=-0.3, backend="triton")
    save_file(results, file)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    return interpret(triton_main, tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("number", range(len(TRITON_CASES)))
def test_triton(interpreted, number):
    """The tolerance of PyTorch's float32; float16 products are exact in float32."""
    size, dtype = TRITON_CASES[number]
    inputs = make_inputs(size, dtype)
    fused, d_weights = expected(*inputs)
    assert interpreted[f"{number}.sum"].dtype == torch.float32
    assert_close(interpreted[f"{number}.sum"], fused, 4e-6)
    assert_close(interpreted[f"{number}.gradient"], d_weights, max(4e-6, torch.finfo(dtype).eps))


def test_triton_with_strides_large_scores_and_another_scale(interpreted):
    assert torch.equal(interpreted["strided.sum"], interpreted["1.sum"])
    assert torch.equal(interpreted["strided.gradient"], interpreted["1.gradient"])
    fused, d_weights = expected(*make_inputs((1, 3, 17, 8), torch.float32, 40.0))
    assert_close(interpreted["large.sum"], fused, 1.6e-4)  # as in test_scores_of_any_size
    assert_close(interpreted["large.gradient"], d_weights, 1.6e-4)
    fused, _ = expected(*make_inputs((2, 3, 17, 8), torch.float32), scale=-0.3)
    assert_close(interpreted["scaled.sum"], fused, 4e-6)
