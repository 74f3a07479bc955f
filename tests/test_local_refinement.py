"""PAR and PAMR against loops in float64 and golden vectors; their memory; PyTorch and Triton."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from allocations import count_allocations
from reference import naive_refinement as naive
from safetensors.torch import load_file, save_file
from triton_harness import interpret

from wsss_lib.kernels import baselines, local_refinement
from wsss_lib.kernels.local_refinement import refine_cam

ROOT = Path(__file__).parents[1]
VARIANTS = ("par", "pamr")
DILATIONS = (1, 2, 4, 8, 12, 24)
GOLDEN = {  # name: dilations, iterations; a: one picture of 0..255 and larger than its maps, b: two of 0..1
    "par_a": (DILATIONS, 10), "pamr_a": (DILATIONS, 10), "par_b": ((1, 2, 4), 3), "pamr_b": ((1, 2, 4), 3),
}  # fmt: skip
# (B, C, H, W): one pixel, pictures smaller than the dilations, one row; maps below and above MANY_MAPS
SIZES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 9, 7, 5), (1, 2, 1, 11), (1, 10, 13, 1), (2, 8, 11, 30)]

# A float32 iteration adds up 48 products: a relative error of some 1e-6 at worst. Ten iterations, ten errors.
FLOAT32 = 1e-5
# float64 loses as much, 2^-29 times that; sums in another order than the loops'.
FLOAT64 = 1e-13


def make_inputs(size, dtype=torch.float64, seed=0):
    """Whole colours 0..255 with flat parts, and maps in [0, 1] of another size: the same in every process."""
    batch, maps, height, width = size
    generator = torch.Generator().manual_seed(seed + height * width + maps)
    images = torch.randint(0, 256, (batch, 3, height, width), generator=generator)
    images[..., : width // 2] = images[..., :1, :1]
    masks = torch.rand(batch, maps, (height + 1) // 2, width, generator=generator)
    return images.to(dtype), masks.half().to(dtype)  # numbers that every type can hold


def expected(images, masks, dilations=DILATIONS, num_iter=10, variant="par"):
    return torch.from_numpy(naive.refine(images.double(), masks.double(), dilations, num_iter, variant))


def assert_close(found, wanted, tolerance):
    assert found.shape == wanted.shape
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=tolerance)


# ------------------------------------------------------------------ golden vectors


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    """The published float32 results, after every stored number of iterations: loops, library and baseline."""
    golden, (dilations, last) = load_file(ROOT / f"tests/golden/{name}.safetensors"), GOLDEN[name]
    images, masks, variant = golden["in.image"], golden["in.mask"], name.split("_")[0]
    maps = masks.shape[1]
    assert_close(expected(images, masks, dilations, last, variant), golden[f"out.iter{last}"], FLOAT32)
    for num_iter in (0, 1, last):
        options = {"dilations": dilations, "num_iter": num_iter, "variant": variant}
        wanted = golden[f"out.iter{num_iter}"]
        assert_close(refine_cam(images, masks, **options), wanted, FLOAT32)
        many = refine_cam(images, masks.repeat(1, 4, 1, 1), **options)  # the sparse product
        assert_close(many[:, -maps:], wanted, FLOAT32)
        assert_close(baselines.refine_cam(images, masks, **options), wanted, FLOAT32)


# ------------------------------------------------------------------ loops


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", SIZES)
def test_against_loops(size, variant):
    images, masks = make_inputs(size)
    wanted = expected(images, masks, num_iter=3, variant=variant)
    found = refine_cam(images, masks, num_iter=3, variant=variant)
    assert found.dtype == torch.float64
    assert_close(found, wanted, FLOAT64)
    found = refine_cam(images.float(), masks.float(), num_iter=3, variant=variant)
    assert found.dtype == torch.float32
    assert_close(found, wanted, FLOAT32)
    assert_close(baselines.refine_cam(images, masks, num_iter=3, variant=variant), wanted, FLOAT64)


@pytest.mark.parametrize("dilations", [(1,), (3, 1), [40, 2, 2]])
def test_other_dilations(dilations):
    """One, in any order, larger than the picture, twice the same."""
    images, masks = make_inputs((1, 3, 9, 12))
    for variant in VARIANTS:
        wanted = expected(images, masks, dilations, 2, variant)
        assert_close(refine_cam(images, masks, dilations, 2, variant), wanted, FLOAT64)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("maps", [3, 9])
def test_strips_of_any_height_are_the_same(monkeypatch, maps, variant):
    """Strips of 4, 4, 3 rows; of one row, though even that is too long; the default is the whole picture."""
    images, masks = make_inputs((2, maps, 11, 30))
    whole = refine_cam(images, masks, num_iter=2, variant=variant)
    for rows in (4, 0):
        monkeypatch.setitem(local_refinement.STRIP, "cpu", rows * 3 * 48 * 30)
        assert_close(refine_cam(images, masks, num_iter=2, variant=variant), whole, FLOAT64)


@pytest.mark.parametrize("variant", VARIANTS)
def test_few_and_many_maps_take_different_ways_to_the_same_result(monkeypatch, variant):
    images, masks = make_inputs((1, 9, 21, 34), torch.float32)
    calls = []
    sparse = local_refinement._propagate_sparse
    monkeypatch.setattr(local_refinement, "_propagate_sparse", lambda *a: calls.append(1) or sparse(*a))
    many = refine_cam(images, masks, variant=variant)
    few = torch.cat([refine_cam(images, m, variant=variant) for m in masks.split(3, dim=1)], dim=1)
    assert len(calls) == 1
    assert_close(few, many, FLOAT32)


# ------------------------------------------------------------------ what the weights are


def test_constant_maps_grow_by_the_sum_of_the_weights():
    """1.01 per iteration for PAR, 1 for PAMR, whatever the picture."""
    images, _ = make_inputs((1, 1, 17, 23))
    ones = torch.ones(1, 2, 17, 23, dtype=torch.float64)
    for num_iter in (1, 10):
        grown = torch.full_like(ones, 1.01**num_iter)
        assert_close(refine_cam(images, ones, num_iter=num_iter), grown, FLOAT64)
        assert_close(refine_cam(images, ones, num_iter=num_iter, variant="pamr"), ones, FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_picture_averages_the_neighbors(dtype):
    """No deviation, no difference: all colours count the same, 1/48, and nothing divides by zero."""
    _, masks = make_inputs((1, 3, 25, 31), dtype)
    masks = F.interpolate(masks, (25, 31), mode="bilinear", align_corners=True)
    images = torch.full((1, 3, 25, 31), 255, dtype=dtype)
    around = [naive.neighbors(12, 20, 25, 31, DILATIONS)] * 3
    mean = torch.stack([m[list(y), list(x)].mean() for m, (y, x) in zip(masks[0], around, strict=True)])
    found = refine_cam(images, masks, num_iter=1, variant="pamr")[0, :, 12, 20]
    tolerance = FLOAT32 if dtype == torch.float32 else FLOAT64
    assert_close(found, mean, tolerance)
    assert_close(refine_cam(images, masks), expected(images, masks), tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
def test_flat_colors_with_rounding_noise_keep_their_digits(variant):
    """White with noise in the last bit, as resizing leaves it: the deviation is 1e-7 of the colour.

    In float32 a sum of squares minus a squared sum, or a mean subtracted from the colours, leaves nothing.
    """
    images, masks = make_inputs((1, 2, 15, 18), torch.float32)
    images = 255 - images.remainder(4) * 2.0**-16  # the distance of float32 numbers there
    assert_close(
        refine_cam(images, masks, variant=variant), expected(images, masks, variant=variant), FLOAT32
    )


def test_a_bright_pixel_on_a_dull_ground_keeps_its_digits():
    """Neighbours that deviate by 0.6 and differ from the centre by 235: squares minus squares are 5% off."""
    generator = torch.Generator().manual_seed(0)
    differences = torch.randint(-1, 2, (3, 48, 1, 5), generator=generator).double() * 0.75 - 235
    wanted = local_refinement._logits(differences.clone(), "par")
    found = local_refinement._logits(differences.float(), "par")
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_pictures_of_0_to_1_give_the_same_maps(variant):
    """The deviation here is 0.3 (of 1), beside which the 1e-8 changes a relative 1e-7."""
    images, masks = make_inputs((1, 2, 15, 18))
    images = images + torch.arange(18.0)  # no flat parts
    found = refine_cam(images / 255, masks, variant=variant)
    assert_close(found, refine_cam(images, masks, variant=variant), 1e-5)


# ------------------------------------------------------------------ inputs and outputs


def test_types_and_strides():
    """uint8 pictures, half-precision maps and strided inputs give the bits of plain float32 ones."""
    images, masks = make_inputs((2, 9, 11, 30), torch.float32)
    for few in (masks, masks[:, :3].clone()):
        plain = refine_cam(images, few, num_iter=2)
        assert torch.equal(refine_cam(images.byte(), few.half(), num_iter=2), plain)
        assert torch.equal(refine_cam(images, few.bfloat16(), num_iter=2),
                           refine_cam(images, few.bfloat16().float(), num_iter=2))  # fmt: skip
        strided = [x.to(memory_format=torch.channels_last) for x in (images, few)]
        assert torch.equal(refine_cam(*strided, num_iter=2), plain)
        transposed = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (images, few)]
        assert torch.equal(refine_cam(*transposed, num_iter=2), plain)
        expanded = refine_cam(images[:1].expand(2, -1, -1, -1), few[:1].expand(2, -1, -1, -1), num_iter=2)
        assert torch.equal(expanded[0], plain[0]) and torch.equal(expanded[1], plain[0])
        assert refine_cam(*strided, num_iter=2).is_contiguous()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(refine_cam(images, few, num_iter=2), plain)


def test_every_picture_by_itself_and_the_same_bits_again():
    for maps in (3, 9):
        images, masks = make_inputs((3, maps, 20, 33), torch.float32)
        before = images.clone(), masks.clone()
        together = refine_cam(images, masks)
        assert torch.equal(together, refine_cam(images, masks))
        assert torch.equal(together[1:2], refine_cam(images[1:2], masks[1:2]))
        assert torch.equal(images, before[0]) and torch.equal(masks, before[1])


def test_no_gradient_and_memory_of_its_own():
    images, masks = make_inputs((1, 3, 6, 9), torch.float32)
    assert not refine_cam(images.requires_grad_(), masks.requires_grad_()).requires_grad
    masks = torch.rand(1, 3, 6, 9)  # needs no resizing
    for num_iter in (0, 1):
        found = refine_cam(images, masks, num_iter=num_iter)
        assert found.data_ptr() != masks.data_ptr()
    assert torch.equal(refine_cam(images, masks, num_iter=0), masks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.rand(2, 1, 8, 8)}, r"images: found shape \(2, 1, 8, 8\), expected \(B, 3, H, W\)"),
        ({"images": torch.rand(3, 8, 8)}, "images: found shape"),
        ({"images": torch.rand(2, 3, 0, 8)}, "images: found shape"),
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.int64)}, "images: found torch.int64, expected uint8"),
        ({"masks": torch.rand(1, 4, 8, 8)}, r"masks: found shape \(1, 4, 8, 8\), expected \(2, C, h, w\)"),
        ({"masks": torch.rand(2, 8, 8)}, "masks: found shape"),
        ({"masks": torch.rand(2, 0, 8, 8)}, "masks: found shape"),
        ({"masks": torch.ones(2, 4, 8, 8, dtype=torch.int64)}, "masks: found torch.int64"),
        ({"masks": torch.rand(2, 4, 8, 8, device="meta")}, "masks: found meta, expected cpu"),
        ({"dilations": ()}, "dilations: found"),
        ({"dilations": (1, 0)}, r"dilations: found \(1, 0\), expected whole numbers"),
        ({"dilations": (1.5,)}, "dilations: found"),
        ({"num_iter": -1}, "num_iter: found -1, expected"),
        ({"variant": "crf"}, "variant: found 'crf', expected one of par, pamr"),
        ({"backend": "cuda"}, "backend: found 'cuda', expected"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        refine_cam(**{"images": torch.rand(2, 3, 8, 8), "masks": torch.rand(2, 4, 8, 8), **change})


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize("maps", [3, 21])
def test_memory(maps):
    """The bound of the docstring, and that the baseline holds the copies of the neighbours that it says."""
    height, width, k = 128, 160, 48
    images, masks = torch.rand(1, 3, height, width), torch.rand(1, maps, height, width)
    numbers = height * width
    with count_allocations() as ours:
        refine_cam(images, masks, num_iter=2)
    sparse = maps >= local_refinement.MANY_MAPS
    strip = 10 * local_refinement.STRIP["cpu"]  # differences, less their mean, logits: 4 bytes each
    padding = (height + 48) * (width + 48) * 4 * (3 if sparse else max(3, maps))
    assert ours.peak <= 4 * numbers * k * (2 if sparse else 1) + 4 * numbers * maps * 3 + strip + padding
    with count_allocations() as copies:
        baselines.refine_cam(images, masks, num_iter=2)
    assert copies.peak >= 8 * numbers * k * maps
    assert ours.peak * (9 if sparse else 2) < copies.peak


# ------------------------------------------------------------------ Triton, interpreted

# (B, C, H, W), dilations, variant, dtype: one pixel; ragged blocks of pixels and of maps; all neighbours
TRITON_CASES = [
    ((1, 1, 1, 1), (1, 3), "par", torch.float32),
    ((2, 3, 5, 7), (1, 3), "pamr", torch.float32),
    ((1, 11, 9, 17), (1, 8), "par", torch.float32),
    ((2, 9, 9, 17), (2,), "pamr", torch.float64),
    ((1, 2, 5, 12), DILATIONS, "par", torch.float64),
]
TRITON_PIXELS = 64  # smaller than most of these pictures


def triton_main(file):
    """Every case once, and one from strided tensors."""
    from wsss_lib.kernels import local_refinement_triton

    local_refinement_triton.INTERPRETED_PIXELS = TRITON_PIXELS
    results = {}
    for number, (size, dilations, variant, dtype) in enumerate(TRITON_CASES):
        images, masks = make_inputs(size, dtype)
        results[str(number)] = refine_cam(images, masks, dilations, 2, variant, "triton")
    size, dilations, variant, dtype = TRITON_CASES[1]
    images, masks = (x.to(memory_format=torch.channels_last) for x in make_inputs(size, dtype))
    results["strided"] = refine_cam(images, masks.half(), dilations, 2, variant, "triton")
    save_file(results, file)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    return interpret(triton_main, tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("number", range(len(TRITON_CASES)))
def test_triton(interpreted, number):
    size, dilations, variant, dtype = TRITON_CASES[number]
    images, masks = make_inputs(size, dtype)
    assert interpreted[str(number)].dtype == dtype
    tolerance = FLOAT32 if dtype == torch.float32 else FLOAT64
    assert_close(interpreted[str(number)], expected(images, masks, dilations, 2, variant), tolerance)


def test_triton_with_strides_and_half_precision_maps(interpreted):
    assert torch.equal(interpreted["strided"], interpreted["1"])
