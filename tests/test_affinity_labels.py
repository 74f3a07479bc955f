"""AFA's affinity labels and loss: loops, the published numbers, finite differences, memory."""

from pathlib import Path

import numpy as np
import pytest
import torch
from allocations import count_allocations
from reference import naive_afa as naive
from safetensors.torch import load_file

from wsss_lib.training.affinity import affinity_labels, affinity_loss

VECTORS = load_file(Path(__file__).parent / "golden/afa_utils.safetensors")


def make_masks(height=32, width=48, seed=0):
    """Whole numbers that change from pixel to pixel, so each pixel of a patch says something else."""
    masks = torch.randint(0, 4, (2, height, width), generator=torch.Generator().manual_seed(seed))
    return masks.masked_fill(masks == 3, 255)


def make_affinity(n, dtype=torch.float64):
    return torch.rand(2, n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(dtype)


# ------------------------------------------------------------------ labels


@pytest.mark.parametrize("radius, suffix", [(2, ""), (None, "_nomask")])
def test_labels_agree_with_the_published_ones(radius, suffix):
    masks = VECTORS["out.refine_cams_with_bkg_v2"]
    expected = VECTORS[f"out.cams_to_affinity_label{suffix}"]
    assert torch.equal(affinity_labels(masks, radius, published=True), expected)
    assert set(expected.unique().tolist()) == {0, 1, 255}
    for mask, wanted in zip(masks, expected):
        assert np.array_equal(naive.affinity_labels(mask, radius, 16, 0), wanted.numpy())


def test_labels_of_another_mask_agree_with_the_published_ones():
    found = affinity_labels(VECTORS["in.label_map"].long(), 2, published=True)
    assert torch.equal(found, VECTORS["out.affinity_label_map"]) and found.dtype == torch.uint8


@pytest.mark.parametrize("stride", [1, 8, 16])
@pytest.mark.parametrize("radius", [0, 1, None])
@pytest.mark.parametrize("published", [False, True])
def test_labels_agree_with_the_loop(stride, radius, published):
    masks = make_masks() if stride > 1 else make_masks(4, 6)
    found = affinity_labels(masks, radius, stride, published)
    for mask, labels in zip(masks, found):
        expected = naive.affinity_labels(mask, radius, stride, 0 if published else stride // 2)
        assert np.array_equal(labels.numpy(), expected)


def test_default_reads_the_middle_of_a_patch():
    """Two halves whose border lies 4 pixels into the second of three patches of 16: the patch is mostly 2."""
    masks = torch.ones(1, 16, 48, dtype=torch.long)
    masks[:, :, 20:] = 2
    assert affinity_labels(masks)[0, 1].tolist() == [0, 1, 1]
    assert affinity_labels(masks, published=True)[0, 1].tolist() == [1, 1, 0]  # upper left pixel
    assert affinity_labels(masks, radius=1)[0].tolist() == [[1, 0, 255], [0, 1, 1], [255, 1, 1]]


def test_masks_are_left_alone_and_may_be_bytes():
    masks = make_masks()
    copy = masks.clone()
    assert torch.equal(affinity_labels(masks), affinity_labels(masks.to(torch.uint8)))
    assert torch.equal(masks, copy)


def test_labels_need_one_byte_a_pair():
    """B N^2 bytes come out; in between, the comparison and one mask of N^2 bytes for the whole batch."""
    masks = make_masks(256, 256).repeat(4, 1, 1)  # 8 pictures of 16x16 patches: 512 KB of labels
    with count_allocations() as memory:
        labels = affinity_labels(masks)
    assert memory.peak < 2.6 * labels.numel()


@pytest.mark.parametrize(
    "masks, change, message",
    [
        (torch.zeros(2, 32, 32), {}, "masks: found torch.float32"),
        (torch.zeros(2, 32, 32, dtype=torch.bool), {}, "masks: found torch.bool"),
        (torch.zeros(32, 32, dtype=torch.long), {}, r"masks: found torch.int64 of shape \(32, 32\)"),
        (torch.zeros(2, 40, 32, dtype=torch.long), {}, "40x32 pixels, expected multiples of the stride, 16"),
        (torch.zeros(2, 32, 32, dtype=torch.long), {"stride": 0}, "expected multiples of the stride, 0"),
        (torch.zeros(2, 32, 32, dtype=torch.long), {"radius": -1}, "grid, radius: found"),
        (torch.zeros(0, 32, 32, dtype=torch.long), {}, r"\(0, 32, 32\)"),
    ],
)
def test_wrong_masks(masks, change, message):
    with pytest.raises(ValueError, match=message):
        affinity_labels(masks, **change)


# ------------------------------------------------------------------ the loss


def test_loss_and_gradient_agree_with_the_published_ones():
    affinity = VECTORS["in.attn_pred"].clone().requires_grad_()
    labels = VECTORS["out.affinity_label_map"]
    loss = affinity_loss(affinity, labels)
    expected, *divisors = VECTORS["out.aff_loss_pos_neg"].tolist()
    assert loss.item() == pytest.approx(expected, rel=1e-6)  # float32, sums of 64 and 48
    assert [(labels == 1).sum() + 1, (labels == 0).sum() + 1] == divisors
    (gradient,) = torch.autograd.grad(loss, affinity)
    torch.testing.assert_close(gradient, VECTORS["grad.aff_loss_attn_pred"], rtol=1e-6, atol=0)
    looped = naive.affinity_loss(affinity.detach().double().numpy(), labels.numpy())
    assert looped == pytest.approx(expected, rel=1e-6)


def test_loss_agrees_with_the_loop():
    affinity, labels = make_affinity(6), affinity_labels(make_masks(), radius=1)
    expected = naive.affinity_loss(affinity.numpy(), labels.numpy())
    for kind in (labels, labels.long()):  # float64, sums in another order
        assert affinity_loss(affinity, kind).item() == pytest.approx(expected, rel=1e-14)


def test_loss_is_defined_where_a_side_is_empty():
    affinity = make_affinity(4).requires_grad_()
    same, different, ignored = (torch.full((2, 4, 4), value) for value in (1, 0, 255))
    for labels, expected in (
        (same, (1 - affinity).sum() / 66), (different, affinity.sum() / 66), (ignored, torch.zeros(()))
    ):
        loss = affinity_loss(affinity, labels)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-14)
        (gradient,) = torch.autograd.grad(loss, affinity)
        assert gradient.isfinite().all()


def test_gradients_by_finite_differences():
    labels = affinity_labels(make_masks(), radius=1)
    assert torch.autograd.gradcheck(lambda a: affinity_loss(a, labels), make_affinity(6).requires_grad_())


def test_loss_is_in_float32_or_better():
    labels = affinity_labels(make_masks(), radius=1)
    expected = affinity_loss(make_affinity(6), labels)
    assert expected.dtype == torch.float64
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
        with torch.autocast("cpu", torch.bfloat16):
            found = affinity_loss(make_affinity(6, dtype), labels)
        assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), abs=tolerance)


@pytest.mark.parametrize(
    "affinity, labels, message",
    [
        (torch.zeros(2, 4, 4), torch.zeros(2, 4, 5), "affinity, labels: found"),
        (torch.zeros(4, 4), torch.zeros(4, 4), "affinity, labels: found"),
        (torch.zeros(1, 4, 4, dtype=torch.long), torch.zeros(1, 4, 4), "affinity, labels: found torch.int64"),
        (torch.zeros(1, 4, 4), torch.full((1, 4, 4), 7), r"labels: found values \[7\], expected 0, 1 or 255"),
    ],
)
def test_wrong_affinities(affinity, labels, message):
    with pytest.raises(ValueError, match=message):
        affinity_loss(affinity, labels)
