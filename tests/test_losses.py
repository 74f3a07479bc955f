"""The segmentation losses against published numbers and loops in float64: values, gradients, empty sides."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from allocations import count_allocations
from reference import naive_dense_crf
from reference import naive_losses as naive
from safetensors.torch import load_file

from wsss_lib.training.dense_energy import gaussian_kernel
from wsss_lib.training.losses import balanced_segmentation_loss, dense_energy_loss, saliency_loss

GOLDEN = Path(__file__).parent / "golden"
FLOAT32 = 2e-6  # relative: means of some thousand float32 terms of one sign, in other orders
FLOAT64 = 1e-12  # sums in other orders than the loops'


def with_gradient(loss, tensor, *args, **kw):
    """(loss, gradient to `tensor`), the loss's first argument."""
    tensor = tensor.detach().clone().requires_grad_()
    value = loss(tensor, *args, **kw)
    value.backward()
    return value.detach(), tensor.grad


def assert_close(found, expected, tolerance):
    """Relative to the largest value."""
    if not isinstance(expected, torch.Tensor):
        expected = torch.as_tensor(expected, dtype=torch.float64)
    expected = expected.to(found)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def make_inputs(size=(6, 7), classes=3, seed=0, dtype=torch.float64):
    """Logits (2, C+1, H, W), masks with every class and 255, images of 60..150 with an edge."""
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, classes + 1, *size, generator=g, dtype=torch.float64)
    masks = torch.randint(0, classes + 2, (2, *size), generator=g)
    masks[masks == classes + 1] = 255
    images = torch.rand(2, 3, *size, generator=g, dtype=torch.float64) * 40 + 60
    images[..., size[1] // 2 :] += 50
    return logits.to(dtype), masks, images.to(dtype)


# ------------------------------------------------------------------ balanced segmentation loss


@pytest.mark.parametrize("published", [False, True])
def test_balanced_loss_of_getam(published):
    t = load_file(GOLDEN / "getam_joint_loss.safetensors")
    inputs = t["in.seg"], t["in.seg_label"]
    value, gradient = with_gradient(balanced_segmentation_loss, *inputs, published=published)
    assert_close(value, t["out.celoss"], FLOAT32)
    assert_close(gradient, t["grad.seg"], FLOAT32)


def test_balanced_loss_of_afa_is_half_of_it():
    t = load_file(GOLDEN / "afa_seg_loss.safetensors")
    value, gradient = with_gradient(balanced_segmentation_loss, t["in.seg"], t["in.label_map"], average=True)
    assert_close(value, t["out.seg_loss"], FLOAT32)
    assert_close(gradient.flatten()[::11], t["grad.seg.sub11"], FLOAT32)


def test_balanced_loss_against_loops():
    logits, masks, _ = make_inputs()
    value, gradient = with_gradient(balanced_segmentation_loss, logits, masks)
    expected = naive.balanced(logits.numpy(), masks.numpy())
    assert_close(value, expected[0], FLOAT64)
    assert_close(gradient, expected[1], FLOAT64)
    small, smaller_gradient = with_gradient(balanced_segmentation_loss, logits.float()[..., ::2, ::2], masks)
    large = F.interpolate(logits.float()[..., ::2, ::2], masks.shape[1:], mode="bilinear")
    assert_close(small, naive.balanced(large.double().numpy(), masks.numpy())[0], FLOAT32)
    assert smaller_gradient.shape == (2, 4, 3, 4)


@pytest.mark.parametrize("side", ["background", "foreground", "neither"])
def test_a_missing_side_adds_nothing(side):
    logits, masks, _ = make_inputs()
    other = {"background": (masks > 0) & (masks < 255), "foreground": masks == 0, "neither": masks < 255}
    masks[other[side]] = 255
    value, gradient = with_gradient(balanced_segmentation_loss, logits, masks)
    targets = masks if side != "neither" else None
    expected = 0.0 if targets is None else F.cross_entropy(logits, targets, ignore_index=255)
    assert_close(value, expected, FLOAT64)
    assert gradient.isfinite().all() and gradient.any() == (side != "neither")
    assert not gradient.transpose(0, 1)[:, masks == 255].any()
    assert_close(balanced_segmentation_loss(logits, masks, average=True), value / 2, FLOAT64)
    assert balanced_segmentation_loss(logits, masks, published=True).isnan()
    assert math.isnan(naive.balanced(logits.numpy(), masks.numpy())[0])


# ------------------------------------------------------------------ saliency loss


def test_saliency_loss_against_loops():
    logits, masks, _ = make_inputs()
    soft = torch.rand(2, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for truth in (soft, masks > 0):
        expected = naive.saliency(logits.numpy(), truth.double().numpy())
        assert_close(saliency_loss(logits, truth), expected, FLOAT64)
    assert torch.equal(saliency_loss(logits, masks > 0), saliency_loss(logits, (masks > 0).double()))
    assert torch.autograd.gradcheck(lambda x: saliency_loss(x, soft), logits.requires_grad_())
    small = logits.detach()[..., ::2, ::2]
    large = F.interpolate(small, (6, 7), mode="bilinear")
    assert_close(saliency_loss(small, soft), naive.saliency(large.numpy(), soft.numpy()), FLOAT64)


def test_saliency_loss_of_certain_networks():
    """A logit of 1000: p is 0 or 1 in any precision; the loss is the margin, 1000 - log 2 for two classes."""
    logits = torch.tensor([1000.0, 0.0, 0.0]).view(1, 3, 1, 1)
    value, gradient = with_gradient(saliency_loss, logits, torch.ones(1, 1, 1))
    assert_close(value, 1000 - math.log(2), 1e-6)
    assert_close(gradient.flatten(), [1.0, -0.5, -0.5], 1e-6)
    value, gradient = with_gradient(saliency_loss, logits, torch.zeros(1, 1, 1))
    assert value == 0 and gradient.isfinite().all()


# ------------------------------------------------------------------ dense energy


def energy_reference(logits, images, masks, boxes, matrices, published, settings):
    """(value, gradient to the logits): loops from the resized probabilities on, PyTorch up to there."""
    logits = logits.double().requires_grad_()
    large = F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)
    p = F.interpolate(large.softmax(1), scale_factor=settings["scale"], mode="bilinear", align_corners=False)
    step = round(1 / settings["scale"])
    rows, columns = slice(0, p.shape[2] * step, step), slice(0, p.shape[3] * step, step)
    inside = torch.zeros(masks.shape, dtype=torch.bool)
    for mask, (y0, x0, y1, x1) in zip(inside, boxes.tolist()):
        mask[y0:y1, x0:x1] = True
    small = images[..., rows, columns].double()
    kernels = [matrices(image, settings["sigma_xy"] / step, settings["sigma_rgb"]) for image in small.numpy()]
    unknown = (masks == 255)[:, rows, columns].numpy()
    inside = inside[:, rows, columns].numpy()
    value, gradient = naive.dense_energy(p.detach().numpy(), kernels, unknown, inside, published)
    p.backward(torch.from_numpy(gradient))
    return value, logits.grad


def lattice_matrix(image, sigma_xy, sigma_rgb):
    """The permutohedral lattice of a dictionary as a matrix (N, N); not symmetric."""
    lattice = naive_dense_crf.Lattice(naive_dense_crf.bilateral_features(image, sigma_xy, sigma_rgb))
    return lattice.filter(np.eye(image[0].size))


MATRICES = {"exact": naive.kernel, "lattice": lattice_matrix}
SETTINGS = {"sigma_rgb": 21.3, "sigma_xy": 8.7, "scale": 0.5}  # leave no pixel on the border of two simplices
BOXES = torch.tensor([[0, 0, 12, 15], [2, 3, 9, 14]])


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("method", MATRICES)
@pytest.mark.parametrize("size, scale", [((12, 15), 0.5), ((12, 15), 1 / 3), ((6, 7), 1.0)])
def test_dense_energy_against_every_pair_of_pixels(size, scale, method, published):
    """Odd sides, a box, unknown pixels, sure pixels (gates from 0 to 1); either kernel, both gradients."""
    logits, masks, images = make_inputs(size)
    boxes = BOXES.clamp(max=torch.tensor([*size, *size]))
    settings = SETTINGS | {"scale": scale}
    options = {"method": method, "weight": 0.3, "published": published, **settings}
    value, gradient = with_gradient(dense_energy_loss, logits, images, masks, boxes, **options)
    expected = energy_reference(logits, images, masks, boxes, MATRICES[method], published, settings)
    assert value < 0
    assert_close(value, 0.3 * expected[0], FLOAT64)
    assert_close(gradient, 0.3 * expected[1], FLOAT64)


def test_dense_energy_of_small_logits_and_float32():
    logits, masks, images = make_inputs((12, 16))
    boxes = torch.tensor([[0, 0, 12, 16]]).expand(2, 4)
    small = logits[..., ::3, ::4]
    expected = energy_reference(small, images, masks, boxes, naive.kernel, False, SETTINGS)
    args = images.float(), masks.byte()
    options = {"method": "exact", "weight": 1, **SETTINGS}
    value, gradient = with_gradient(dense_energy_loss, small.float(), *args, **options)
    assert value.dtype == torch.float32
    assert_close(value, expected[0], FLOAT32)
    assert_close(gradient, expected[1], 5 * FLOAT32)  # a softmax's gradient: differences of near numbers
    whole = images.round()
    same = [dense_energy_loss(small, kind, masks, boxes) for kind in (whole, whole.byte())]
    assert torch.equal(*same) and torch.equal(same[0], dense_energy_loss(small, whole, masks))


def test_defaults_are_the_published_settings():
    logits, masks, images = make_inputs((12, 16))
    explicit = dense_energy_loss(logits, images, masks, sigma_rgb=15, sigma_xy=100, scale=0.5, weight=1e-7,
                                 method="lattice")
    assert torch.equal(dense_energy_loss(logits, images, masks), explicit)


@pytest.mark.parametrize("method", MATRICES)
def test_gradient_by_finite_differences_where_every_gate_is_one(method):
    """Elsewhere the gate depends on p, and differences would see what the gradient leaves out."""
    logits, masks, images = make_inputs((6, 8))
    unknown = torch.full_like(masks, 255)
    options = {"method": method, "weight": 1.0, **SETTINGS}
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dense_energy_loss(x, images, unknown, **options), logits,
                                    fast_mode=True)


def test_published_gradient_is_exact_only_where_every_gate_is_one():
    logits, masks, images = make_inputs((12, 16))
    options = {"method": "exact", "weight": 1.0, **SETTINGS}

    def difference(masks):
        ours = with_gradient(dense_energy_loss, logits, images, masks, **options)
        theirs = with_gradient(dense_energy_loss, logits, images, masks, published=True, **options)
        assert_close(ours[0], theirs[0], FLOAT64)
        return float((ours[1] - theirs[1]).abs().max() / ours[1].abs().max())

    assert difference(torch.full_like(masks, 255)) < FLOAT64 < 0.01 < difference(masks)


@pytest.mark.parametrize("method", MATRICES)
def test_transposed_kernel(method):
    """<u, K v> = <K^T u, v>; of the lattice K is not its own transpose."""
    image = 255 * torch.rand(3, 9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kernel, transposed = gaussian_kernel(image, 3.7, 31.3, method)
    u, v = torch.randn(2, 99, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_close((u * kernel(v)).sum(), (transposed(u) * v).sum(), FLOAT64)
    gap = (kernel(v) - transposed(v)).abs().max()
    assert gap == 0 if method == "exact" else gap > 1e-3


@pytest.mark.parametrize("method", MATRICES)
def test_no_matrix_of_all_pairs_of_pixels(method):
    logits, masks, images = make_inputs((96, 128), dtype=torch.float32)
    pixels = 48 * 64
    with count_allocations() as memory:
        with_gradient(dense_energy_loss, logits, images, masks, method=method)
    assert memory.peak < pixels**2 * 4 / 4  # bytes: a quarter of one float32 matrix


# ------------------------------------------------------------------ all of them

LOSSES = {
    "balanced": lambda x, masks, images: balanced_segmentation_loss(x, masks),
    "saliency": lambda x, masks, images: saliency_loss(x, masks > 0),
    "energy": lambda x, masks, images: dense_energy_loss(x, images, masks),
}


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_and_half_precision_change_nothing(name):
    loss, (logits, masks, images) = LOSSES[name], make_inputs((12, 16), dtype=torch.float32)
    expected = with_gradient(loss, logits, masks, images)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradient(loss, logits, masks, images)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    for dtype in (torch.float16, torch.bfloat16):
        value, gradient = with_gradient(loss, logits.to(dtype), masks, images)
        assert value.dtype == torch.float32 and gradient.dtype == dtype
        assert torch.equal(value, loss(logits.to(dtype).float(), masks, images))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_through_many_values_of_logits(name):
    """Logits far apart (probabilities of exactly 0 and 1) leave no nan behind."""
    loss, (logits, masks, images) = LOSSES[name], make_inputs((12, 16), dtype=torch.float32)
    value, gradient = with_gradient(loss, 1e4 * logits, masks, images)
    assert value.isfinite() and gradient.isfinite().all()


def test_wrong_arguments():
    logits, masks, images = make_inputs((12, 16), dtype=torch.float32)
    saliency = torch.rand(2, 12, 16)
    for loss, other in ((balanced_segmentation_loss, masks), (saliency_loss, saliency)):
        for wrong in (logits[0], logits[:, :1], logits.long(), logits[..., :0]):
            with pytest.raises(ValueError, match=r"logits: found torch.\w+ of shape .*, expected floating"):
                loss(wrong, other)
    for wrong in (masks[0], masks[:1], masks.float(), masks > 0):
        with pytest.raises(ValueError, match=r"masks: found .*, expected whole numbers \(2, H, W\)"):
            balanced_segmentation_loss(logits, wrong)
    wrong = [
        (saliency[0], r"saliency: found shape \(12, 16\), expected \(2, H, W\)"),
        (saliency[:, :0], "saliency: found shape"),
        (masks, "saliency: found torch.int64, expected torch.bool or floating point"),
        (saliency * 255, r"saliency: found values \S+ to \S+, expected 0 to 1"),
        (saliency / 0, "saliency: found values nan|saliency: found values inf"),
    ]
    for value, message in wrong:
        with pytest.raises(ValueError, match=message):
            saliency_loss(logits, value)
    wrong = [
        ({"logits": logits[:, :1]}, "logits: found"),
        ({"images": images[:1]}, r"images: found shape \(1, 3, 12, 16\), expected \(2, 3, H, W\)"),
        ({"images": images.long()}, "images: found torch.int64, expected uint8 or floating point"),
        ({"masks": masks[:, 1:]}, r"masks: found shape \(2, 11, 16\), expected \(2, 12, 16\)"),
        ({"boxes": BOXES[0]}, r"boxes: found shape \(4,\), expected \(2, 4\)"),
        ({"sigma_xy": 0}, "sigma_xy: found 0, expected a number > 0"),
        ({"sigma_rgb": -1}, "sigma_rgb: found -1"),
        ({"scale": 0}, "scale: found 0"),
        ({"scale": 0.05}, "images: found 12 x 16 pixels, expected at least one at scale 0.05"),
        ({"method": "tiles"}, "method: found 'tiles', expected one of lattice, exact"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            dense_energy_loss(**{"logits": logits, "images": images, "masks": masks, **change})
