"""ACR's alignment loss against loops, golden vectors and differences; its memory; PyTorch and Triton."""

from pathlib import Path

import pytest
import torch
from allocations import count_allocations
from reference import naive_consistency as naive
from safetensors.torch import load_file, save_file
from triton_harness import interpret

from wsss_lib.kernels import attention_consistency, baselines, products
from wsss_lib.kernels.attention_consistency import attention_consistency_loss

ROOT = Path(__file__).parents[1]
GOLDEN = load_file(ROOT / "tests/golden/acr_consistency.safetensors")
FLIP = torch.arange(16).view(4, 4).flip(1).flatten()

# (L, B, H, N, d, prefix tokens): one patch, ragged sizes around Triton's blocks of 64, one head, one block
SIZES = [(1, 1, 1, 2, 8, 1), (2, 2, 2, 17, 8, 1), (1, 1, 2, 84, 24, 5), (1, 1, 1, 197, 64, 2)]
HALF_SIZES = [(2, 1, 3, 17, 8, 1), (1, 1, 1, 84, 64, 5)]
INCOMING = (70.0, 300.0)  # gradients of the two terms, so that each has to be told from the other


def make_inputs(size, dtype=torch.float64, spread=1.0):
    """q1, k1, q2, k2, a permutation that is not its own inverse, and the number of prefix tokens."""
    *shape, prefix = size
    generator = torch.Generator().manual_seed(sum(shape))
    views = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4)]
    views[0], views[2] = views[0] * spread, views[2] * spread
    views = [x.to(torch.float16).to(dtype) for x in views]  # numbers that every type can hold
    return *views, torch.randperm(shape[3] - prefix, generator=generator), prefix


def run(q1, k1, q2, k2, permutation, prefix, loss=attention_consistency_loss, **options):
    """The two terms, and the gradients of their weighted sum: dq1, dk1, dq2, dk2."""
    leaves = [x.detach().requires_grad_() for x in (q1, k1, q2, k2)]
    terms = loss(*leaves, permutation, prefix, **options)
    sum(weight * term for weight, term in zip(INCOMING, terms)).backward()
    return torch.stack(terms).detach(), *(x.grad for x in leaves)


def expected(*inputs):
    return run(*(x.double() for x in inputs[:4]), *inputs[4:], loss=naive.written_out)


def assert_close(found, wanted, tolerance):
    """Differences beside the largest value: entries of an attention map are as small as one likes."""
    assert found.shape == wanted.shape
    assert (found.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


def assert_all_close(found, wanted, tolerance):
    for x, y in zip(found, wanted, strict=True):
        assert_close(x, y, tolerance)


# ------------------------------------------------------------------ the references themselves


@pytest.mark.parametrize("loss", [naive.written_out, baselines.attention_consistency_loss])
@pytest.mark.parametrize("size", [(1, 1, 1, 2, 8, 1), (2, 2, 3, 17, 8, 1), (1, 1, 2, 17, 4, 5)])
def test_matrices_agree_with_the_loops(size, loss):
    inputs = make_inputs(size)
    wanted = torch.tensor(naive.consistency(*inputs), dtype=torch.float64)
    # float64 on both sides: only the order of additions differs
    torch.testing.assert_close(torch.stack(loss(*inputs)), wanted, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ["vitb", "vitb_hybrid"])
def test_loops_agree_with_the_published_class_term(name):
    """From its class rows alone: softmax(log A) is A, with one head whose keys are the unit vectors. The
    other rows may be anything. Golden vectors are float32."""
    queries = []
    for view in ("class1", "class2"):  # view 2 aligned already
        row = GOLDEN[f"{name}.{view}"].double().transpose(0, 1)  # (B, L, 1, M) -> (L, B, 1, M)
        row = torch.cat([1 - row.sum(-1, keepdim=True), row], -1)
        attention = torch.cat([row, torch.ones(*row.shape[:2], 16, 17)], 2)  # (L, B, N, N)
        queries.append(17**0.5 * attention.log()[:, :, None])  # (L, B, N, N) -> (L, B, 1, N, N)
    q1, q2 = queries
    unit = torch.eye(17, dtype=torch.float64).expand_as(q1)
    for loss in (naive.consistency, attention_consistency_loss):
        term = loss(q1, unit, q2, unit, torch.arange(16))[0]
        assert abs(float(term) / GOLDEN[f"{name}.losses"][0] - 1) < 1e-6


@pytest.fixture(scope="module")
def network():
    """The golden ViT-B: queries and keys of two pictures and of their mirror images, with a graph to two of
    its weights."""
    vit = naive.GoldenViT()
    learned = [vit.weight(f"blocks.{l}.attn.qkv.weight", 2304, 768).requires_grad_() for l in (0, 11)]
    images = GOLDEN["vitb.images"].double()
    return [*vit.queries_and_keys(images), *vit.queries_and_keys(images.flip(-1))], learned


def test_network_agrees_with_the_published_attention(network):
    """float32's noise there: 1e-7 of an attention of 0.1."""
    (q1, k1, q2, k2), _ = network
    one, two = (
        torch.stack([(q @ k.transpose(-2, -1) / 8).softmax(-1).mean(1) for q, k in zip(queries, keys)], 1)
        for queries, keys in ((q1, k1), (q2, k2))
    )  # (B, L, N, N)
    two = two[:, :, [0, *(1 + FLIP)]][..., [0, *(1 + FLIP)]]
    for number, attention in ((1, one), (2, two)):
        assert_close(attention[:, :, :1, 1:], GOLDEN[f"vitb.class{number}"].double(), 2e-6)
        patches = attention[:, :, 1:, 1:].flatten()[::11]
        assert_close(patches, GOLDEN[f"vitb.patch{number}.sub"].double(), 2e-6)


@pytest.mark.parametrize("loss", ["written_out", "baseline", "kernel", "float32"])
def test_agrees_with_the_published_losses_and_gradients(network, loss):
    """Through twelve blocks back to the first; golden gradients are good to 1.1e-5 of the largest."""
    (*views,), learned = network
    stacked = [torch.stack(view) for view in views]
    if loss == "kernel":
        terms = attention_consistency_loss(*views, FLIP)
    elif loss == "float32":
        terms = attention_consistency_loss(*(x.float() for x in stacked), FLIP)
    else:
        function = {"written_out": naive.written_out, "baseline": baselines.attention_consistency_loss}[loss]
        terms = function(*stacked, FLIP)
    assert_close(torch.stack(terms).detach(), GOLDEN["vitb.losses"], 1e-6)
    gradients = torch.autograd.grad(sum(terms), learned, retain_graph=True)
    for layer, gradient in zip((0, 11), gradients):
        assert_close(gradient.flatten()[::1777], GOLDEN[f"vitb.gradient.{layer}.sub"].double(), 2e-5)


# ------------------------------------------------------------------ which way the permutation goes


@pytest.mark.parametrize("backward", [False, True])
def test_rotation_of_a_grid_that_is_not_square(backward):
    """View 2 attends as view 1 does, rotated: no difference, unless the permutation goes the wrong way."""
    def rotate(grid):  # (h, w, ...) -> (w, h, ...)
        return torch.rot90(grid, dims=(0, 1))

    q1, k1, *_ = make_inputs((2, 1, 2, 2 + 3 * 5, 8, 2))
    views = []
    for x in (q1, k1):
        grid = x[..., 2:, :].movedim(3, 0).unflatten(0, (3, 5))  # (L, B, H, 15, d) -> (3, 5, L, B, H, d)
        views.append(torch.cat([x[..., :2, :], rotate(grid).flatten(0, 1).movedim(0, 3)], 3))
    permutation = rotate(torch.arange(15).view(3, 5)).flatten().argsort()
    if backward:
        permutation = permutation.argsort()
    terms = torch.stack(attention_consistency_loss(q1, k1, *views, permutation, 2))
    # In the right order float64 rounding is left; in the wrong one a difference like that of strangers.
    assert (terms > 1e-2).all() if backward else (terms < 1e-16).all()


def test_a_flip_is_its_own_inverse():
    assert torch.equal(FLIP, FLIP.argsort())


# ------------------------------------------------------------------ PyTorch


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scratch", [2**23, 5000, 1])
def test_float64(size, scratch, monkeypatch):
    """Rounding only, in one block of rows, in several, and in blocks of two rows."""
    monkeypatch.setattr(attention_consistency, "SCRATCH", scratch)
    inputs = make_inputs(size)
    found = run(*inputs)
    assert all(x.dtype == torch.float64 for x in found)
    assert_all_close(found, expected(*inputs), 1e-12)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("worthwhile", [0, 2**60])
def test_float32(size, worthwhile, monkeypatch):
    """An exponent of 10 has an error of 10 x 6e-8, and a sum keeps it: 4e-6 is several times that. The sign
    of every D is right (a wrong one would move a gradient by 1e-3). Both products: oneDNN's and MKL's."""
    monkeypatch.setattr(products, "WORTHWHILE", worthwhile)
    inputs = make_inputs(size, torch.float32)
    found = run(*inputs)
    assert all(x.dtype == torch.float32 for x in found)
    assert_all_close(found, expected(*inputs), 4e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", HALF_SIZES)
def test_half_precision_inputs_accumulate_in_float32(size, dtype):
    """The inputs are taken as they are: the terms are float32's; gradients have the type of q and k."""
    inputs = [x.to(dtype) for x in make_inputs(size)[:4]] + [*make_inputs(size)[4:]]
    terms, *gradients = run(*inputs)
    wanted_terms, *wanted = expected(*inputs)
    assert terms.dtype == torch.float32 and all(x.dtype == dtype for x in gradients)
    assert_close(terms, wanted_terms, 1e-6)
    assert_all_close(gradients, wanted, torch.finfo(dtype).eps)


@pytest.mark.parametrize("size", [(1, 1, 1, 3, 2, 1), (2, 1, 2, 5, 2, 2)])
def test_gradients_agree_with_finite_differences(size):
    """Steps of 1e-6 away from ties: the least |D| is larger than such a step could bridge."""
    *views, permutation, prefix = make_inputs(size)
    scores = [q @ k.transpose(-2, -1) * size[4] ** -0.5 for q, k in (views[:2], views[2:])]
    one, two = (x.softmax(-1).mean(2) for x in scores)  # (L, B, N, N)
    order = prefix + permutation
    one = one[..., [0, *range(prefix, size[3])], prefix:]
    assert (one - two[..., [0, *order.tolist()], :][..., order]).abs().min() > 1e-5
    leaves = [x.requires_grad_() for x in views]

    def loss(*tensors):
        return attention_consistency_loss(*tensors, permutation, prefix)

    assert torch.autograd.gradcheck(loss, leaves)
    for i in range(4):  # each alone
        alone = [x.detach() for x in leaves]
        alone[i].requires_grad_()
        assert torch.autograd.gradcheck(loss, alone)


@pytest.mark.parametrize("spread", [1e-3, 40.0, 1e4])
def test_scores_of_any_size(spread):
    """Up to 1e5: the exponential of such a score is no float32 without the row maximum taken off first."""
    inputs = make_inputs((1, 1, 3, 17, 8, 1), torch.float32, spread)
    found, wanted = run(*inputs), expected(*inputs)
    assert all(x.isfinite().all() for x in found)
    # the error of a score of s is s x 6e-8, and the attention's error the same in relative terms; a small
    # spread leaves differences of 1e-5 between attentions of 1/17, which have an error of 4e-9
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=4e-6 * max(1, spread), atol=4e-9)
    if spread == 40:
        assert_all_close(found[1:], wanted[1:], 4e-6 * max(1, spread))
    view = attention_consistency._View(inputs[0][0, 0], inputs[1][0, 0], torch.arange(17), False, 1)
    assert view.may_overflow == (spread > 1)


def test_views_that_agree_have_no_loss_and_no_gradient():
    q, k, *_ = make_inputs((2, 2, 3, 17, 8, 1), torch.float32)
    assert not any(x.any() for x in run(q, k, q.clone(), k.clone(), torch.arange(16), 1))


def test_one_patch_of_one_token_beside_the_class():
    """N = 2, worked by hand: scores 0 and log 3 in view 1, equal ones in view 2."""
    q1, k1 = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [3.0]]).log1p() / 2  # log 1 and log 4, halved
    shape = (1, 1, 1, 2, 1)
    zero = torch.zeros(shape)
    terms = attention_consistency_loss(q1.view(shape), k1.view(shape), zero, zero, torch.tensor([0]))
    # log 4 / 2 = log 2: attention to the patch is 2/3 in view 1 and 1/2 in view 2
    torch.testing.assert_close(torch.stack(terms), torch.tensor([1 / 6, 1 / 6]), rtol=1e-6, atol=0)


def test_sequences_strides_autocast_and_a_second_run_give_the_same_bits():
    *views, permutation, prefix = make_inputs((2, 2, 3, 84, 32, 2), torch.float32)
    first = run(*views, permutation, prefix)
    strided = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in views]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = run(*views, permutation, prefix)
    for other in (run(*views, permutation, prefix), run(*strided, permutation, prefix), under_autocast):
        assert all(torch.equal(x, y) for x, y in zip(first, other))
    leaves = [[x.clone().requires_grad_() for x in view] for view in views]
    terms = attention_consistency_loss(*leaves, permutation, prefix)
    sum(weight * term for weight, term in zip(INCOMING, terms)).backward()
    assert torch.equal(torch.stack(terms), first[0])
    for blocks, gradient in zip(leaves, first[1:]):
        assert torch.equal(torch.stack([x.grad for x in blocks]), gradient)


def test_backward_twice_in_parts_and_for_one_view_only():
    *views, permutation, prefix = make_inputs((2, 1, 2, 17, 8, 2))
    _, *wanted = run(*views, permutation, prefix)
    leaves = [x.requires_grad_() for x in views]
    terms = attention_consistency_loss(*leaves, permutation, prefix)
    parts = [torch.autograd.grad(term, leaves, retain_graph=True) for term in (*terms, *terms)]
    for k in (0, 2):  # the second time as the first; a weighted sum's gradient is the sum of the parts
        for of_class, of_patch, whole in zip(*parts[k : k + 2], wanted):
            assert_close(INCOMING[0] * of_class + INCOMING[1] * of_patch, whole, 1e-12)
    for kept in ((0, 1), (2, 3)):
        alone = [x if i in kept else x.detach() for i, x in enumerate(leaves)]
        half = attention_consistency_loss(*alone, permutation, prefix)
        gradients = torch.autograd.grad(half, [leaves[i] for i in kept], INCOMING_TENSORS)
        assert all(torch.equal(x, wanted[i]) for i, x in zip(kept, gradients))
    with torch.no_grad():
        assert all(map(torch.equal, attention_consistency_loss(*leaves, permutation, prefix), terms))


INCOMING_TENSORS = [torch.tensor(x, dtype=torch.float64) for x in INCOMING]


# ------------------------------------------------------------------ memory


def peak_numbers(blocks, tokens, gradients=True, loss=attention_consistency_loss):
    """Numbers held at the peak of forward and backward, and those of one block's four inputs."""
    heads, d = 4, 4
    *views, permutation, prefix = make_inputs((blocks, 1, heads, tokens, d, 1), torch.float32)
    leaves = [[x.requires_grad_(gradients) for x in view.unbind()] for view in views]
    with count_allocations() as memory:
        terms = loss(*leaves, permutation, prefix)
        if gradients:
            sum(terms).backward()
    return memory.peak / 4, 4 * heads * tokens * d


@pytest.mark.parametrize("gradients", [False, True])
def test_memory_does_not_grow_with_the_attention(gradients, monkeypatch):
    """Held at most: the scratch; less than as much for a head's scores, D and the like; both views' inputs in
    the order of view 1; and of every block the gradients, twice for the one that is being handed on.
    Attention of one block would be 2 x 4 x 300 x 300 = 720000."""
    monkeypatch.setattr(attention_consistency, "SCRATCH", 2**15)
    (two, inputs), (six, _) = peak_numbers(2, 300, gradients), peak_numbers(6, 300, gradients)
    if gradients:
        assert two < 2 * 2**15 + 4 * inputs and six - two < 1.2 * 4 * inputs
    else:
        assert two < 2 * 2**15 + inputs and abs(six - two) < 2000  # a few rows a block


def test_the_baseline_holds_the_attention_of_every_block():
    """As its docstring has it: 2 L B H N^2, and two blocks' more."""
    peak, _ = peak_numbers(8, 200, loss=baselines.attention_consistency_loss)
    assert 2 * 8 * 4 * 200**2 < peak < 2 * 10.5 * 4 * 200**2


# ------------------------------------------------------------------ what must be refused


def zeros(*shape, **options):
    return torch.zeros(shape or (2, 1, 3, 5, 4), **options)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"q1": zeros(1, 3, 5, 4)}, r"q1: found shape \(1, 3, 5, 4\), expected \(L, B, H, N, d\)"),
        ({"k2": zeros(3, 1, 3, 5, 4)}, "found 2, 2, 2, 3 blocks, expected the same number"),
        ({"q2": zeros(2, 1, 3, 6, 4)}, r"q2: found \(1, 3, 6, 4\) .* expected \(1, 3, 5, 4\)"),
        ({"k1": [zeros(1, 3, 5, 4), zeros(1, 3, 5, 3)]}, r"k1: found \(1, 3, 5, 3\)"),
        ({"k1": zeros().half()}, "k1: found .* torch.float16 on cpu, expected .* torch.float32"),
        ({"k1": zeros(device="meta")}, "k1: found .* on meta"),
        (
            {"permutation": torch.arange(5)},
            r"permutation: found torch.int64 of shape \(5,\), expected .* \(4,\)",
        ),
        ({"permutation": torch.arange(4.0)}, "permutation: found torch.float32"),
        (
            {"permutation": torch.tensor([0, 1, 1, 3])},
            "permutation: found some patches twice, expected each of 0..3",
        ),
        ({"permutation": torch.tensor([1, 2, 3, 4])}, "permutation: found"),
        ({"num_prefix_tokens": 0}, "num_prefix_tokens: found 0, expected the class token at least"),
        ({"num_prefix_tokens": 5}, "num_prefix_tokens: found 5"),
        ({"backend": "cuda"}, "backend: found 'cuda'"),
    ],
)
def test_wrong_arguments(changed, message):
    arguments = {name: zeros() for name in ("q1", "k1", "q2", "k2")} | {"permutation": torch.arange(4)}
    with pytest.raises(ValueError, match=message):
        attention_consistency_loss(**arguments | changed)


@pytest.mark.parametrize("empty", range(5))
def test_empty_inputs(empty):
    shape = [2, 1, 3, 5, 4]
    shape[empty] = 0
    with pytest.raises(ValueError, match="expected"):
        attention_consistency_loss(*(zeros(*shape) for _ in range(4)), torch.arange(4))


def test_wrong_type():
    with pytest.raises(ValueError, match="q1: found torch.int64, expected floating point"):
        attention_consistency_loss(*(zeros().long() for _ in range(4)), torch.arange(4))


def test_triton_leaves_float64_to_pytorch(monkeypatch):
    """As on a GPU: "auto" falls back, an explicit "triton" says why not."""
    monkeypatch.setattr(attention_consistency, "choose_backend", lambda *_args, **_options: "triton")
    choose = attention_consistency._choose
    assert choose("auto", zeros()) == choose("triton", zeros()) == "triton"
    assert choose("auto", zeros().double()) == "torch"
    with pytest.raises(ValueError, match="float64"):
        choose("triton", zeros().double())


# ------------------------------------------------------------------ Triton, interpreted on the CPU

SMALL = (1, 1, 2, 17, 8, 1)  # compared with itself under other circumstances
TRITON_CASES = [(size, torch.float32) for size in (SMALL, *SIZES)]
TRITON_CASES += [(size, torch.float16) for size in HALF_SIZES]
NAMES = ("terms", "q1", "k1", "q2", "k2")


def triton_main(file):
    """Every case once, the first also again, strided, in parts and with equal views."""
    results = {}

    def keep(name, found):
        results.update({f"{name}.{part}": tensor.contiguous() for part, tensor in zip(NAMES, found)})

    for number, (size, dtype) in enumerate(TRITON_CASES):
        keep(number, run(*make_inputs(size, dtype), backend="triton"))
    *views, permutation, prefix = make_inputs(SMALL, torch.float32)
    keep("again", run(*views, permutation, prefix, backend="triton"))
    mixed = [views[0].transpose(2, 3).contiguous().transpose(2, 3), *views[1:]]
    keep("strided", run(*mixed, permutation, prefix, backend="triton"))
    keep("large", run(*make_inputs(SMALL, torch.float32, 40.0), backend="triton"))
    keep("equal", run(*views[:2], *views[:2], torch.arange(16), 1, backend="triton"))
    second = [x.clone().requires_grad_(i >= 2) for i, x in enumerate(views)]
    terms = attention_consistency_loss(*(x.unbind() for x in second), permutation, prefix, backend="triton")
    gradients = torch.autograd.grad(sum(w * t for w, t in zip(INCOMING, terms)), second[2:])
    results["second.q2"], results["second.k2"] = gradients
    with torch.no_grad():
        terms = attention_consistency_loss(*second, permutation, prefix, backend="triton")
    results["no_grad.terms"] = torch.stack(terms)
    save_file(results, file)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """name -> terms, dq1, dk1, dq2, dk2; None where the case has none."""
    results = interpret(triton_main, tmp_path_factory.mktemp("triton"))
    names = {name.split(".")[0] for name in results}
    return {name: [results.get(f"{name}.{part}") for part in NAMES] for name in names}


@pytest.mark.parametrize("number", range(len(TRITON_CASES)))
def test_triton(interpreted, number):
    """The tolerance of PyTorch's float32. In float16 A and dS are rounded before they multiply k and q, and
    so are the gradients: twice the type's eps."""
    size, dtype = TRITON_CASES[number]
    terms, *gradients = interpreted[str(number)]
    wanted_terms, *wanted = expected(*make_inputs(size, dtype))
    assert terms.dtype == torch.float32 and all(x.dtype == dtype for x in gradients)
    assert_close(terms, wanted_terms, 1e-6)
    assert_all_close(gradients, wanted, 4e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("other", ["again", "strided"])
def test_triton_gives_the_same_bits_again_and_for_strided_tensors(interpreted, other):
    assert all(map(torch.equal, interpreted[other], interpreted["0"]))


def test_triton_with_large_scores(interpreted):
    wanted = expected(*make_inputs(SMALL, torch.float32, 40.0))
    # as in test_scores_of_any_size, with a log-sum-exp of up to 300, rounded to 1.5e-5, taken off as well
    assert_all_close(interpreted["large"], wanted, 5e-4)


def test_triton_finds_no_difference_between_equal_views(interpreted):
    assert not any(x.any() for x in interpreted["equal"])


def test_triton_for_the_second_view_only_and_without_gradients(interpreted):
    assert torch.equal(interpreted["second"][3], interpreted["0"][3])
    assert torch.equal(interpreted["second"][4], interpreted["0"][4])
    assert torch.equal(interpreted["no_grad"][0], interpreted["0"][0])
