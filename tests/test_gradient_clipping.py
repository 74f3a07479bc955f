"""Gradient clipping against loops and golden vectors; sizes that squares do not divide; ties; precisions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import naive_weaktr as naive
from safetensors.torch import load_file

from wsss_lib.training.gradient_clipping import clip_loss_map, gradient_clipping_loss

GOLDEN = Path(__file__).parent / "golden"
TENSORS = load_file(GOLDEN / "weaktr_gradclip.safetensors")
FACTS = json.loads((GOLDEN / "weaktr_gradclip.json").read_text())


def some_losses(*shape, dtype=torch.float64):
    """Losses, some very large, some pixels ignored."""
    losses = torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64) ** 4
    return losses.masked_fill(losses < 0.01, 0).mul(5).to(dtype)


def gradient_of(losses, start, patch):
    leaf = losses.clone().requires_grad_()
    gradient_clipping_loss(leaf, start, patch).backward()
    return leaf.grad


@pytest.mark.parametrize("name", FACTS["config"])
def test_agrees_with_the_published_code(name):
    """float32, the mean taken in another order: a few times 6e-8 of the largest value."""
    config, exact = FACTS["config"][name], FACTS["exact"][name]
    prediction = TENSORS[f"in.{name}.seg_pred"].clone().requires_grad_()
    truth = TENSORS[f"in.{name}.seg_gt"].long()
    losses = F.cross_entropy(prediction, truth, ignore_index=255, reduction="none")
    torch.testing.assert_close(losses, TENSORS[f"out.{name}.ori_loss"], rtol=0, atol=1e-6)
    clipped = clip_loss_map(losses, config["start_value"], config["patch_size"])
    torch.testing.assert_close(clipped, TENSORS[f"out.{name}.loss"], rtol=0, atol=1e-6)
    lowered = TENSORS[f"out.{name}.ori_loss"] - TENSORS[f"out.{name}.loss"] > 1e-6  # by more than rounding
    assert torch.equal(clipped < losses, lowered) and 0.4 < lowered.double().mean() < 0.6
    looped, _ = naive.clipped(losses.detach().double().numpy(), config["start_value"], config["patch_size"])
    np.testing.assert_allclose(looped, TENSORS[f"out.{name}.loss"].numpy(), rtol=0, atol=1e-6)
    loss = gradient_clipping_loss(losses, config["start_value"], config["patch_size"])
    assert loss.item() == pytest.approx(exact, rel=1e-6)
    loss.backward()
    key = f"grad.{name}.seg_pred"
    if key in TENSORS:
        torch.testing.assert_close(prediction.grad, TENSORS[key], rtol=0, atol=1e-9)  # gradients are 1e-4
    elif f"{key}.sub" in TENSORS:
        found = prediction.grad.flatten()[:: FACTS["strides"][key]]
        torch.testing.assert_close(found, TENSORS[f"{key}.sub"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape, patch", [
    ((2, 8, 12), 4), ((3, 9, 7), 4), ((1, 5, 5), 5), ((2, 3, 10), 120), ((1, 1, 1), 3), ((2, 6, 6), 1),
    ((1, 7, 8), 7),
])  # fmt: skip
@pytest.mark.parametrize("start", [0.1, 100.0])
def test_agrees_with_the_loop_also_where_squares_are_cut(shape, patch, start):
    """float64: rounding of a mean. Gradients are exact."""
    losses = some_losses(*shape)
    expected, kept = naive.clipped(losses.numpy(), start, patch)
    clipped = clip_loss_map(losses, start, patch)
    torch.testing.assert_close(clipped, torch.from_numpy(expected), rtol=0, atol=1e-14)
    if start == 100.0 and patch > 1 and losses.numel() > 1:
        assert not kept.all()
    gradient = gradient_of(losses, start, patch)
    torch.testing.assert_close(gradient, torch.from_numpy(kept).double() / losses.numel(), rtol=0, atol=0)


def test_worked_by_hand():
    """Squares of 2x2 with means 1, 4 and 0; the mean of all is 5/3: it replaces the first and the last."""
    losses = torch.tensor([[[1.0, 1, 2, 2, 0, 0], [0, 2, 4, 8, 0, 0]]], dtype=torch.float64)
    mean = 20 / 12
    expected = torch.tensor([[[1.0, 1, 2, 2, 0, 0], [0, mean, 4, 4, 0, 0]]], dtype=torch.float64)
    torch.testing.assert_close(clip_loss_map(losses, 2.0, 2), expected, rtol=0, atol=1e-15)
    assert torch.equal(clip_loss_map(losses, 1.5, 2), losses)  # the mean is above start
    assert gradient_clipping_loss(losses, 1.5, 2) == losses.mean()


def test_a_pixel_at_its_threshold_keeps_all_of_its_gradient():
    even = torch.full((1, 4, 4), 0.5)
    assert torch.equal(gradient_of(even, 1.0, 2), torch.full_like(even, 1 / 16))
    losses = torch.tensor([[[0.0, 1.0, 2.0]]])  # mean 1
    assert torch.equal(gradient_of(losses, 1.0, 3), torch.tensor([[[1 / 3, 1 / 3, 0.0]]]))


def test_ignored_pixels_count_in_every_mean():
    losses = torch.tensor([[[0.0, 0, 0, 4]]])  # three ignored: the mean is 1, not 4
    assert torch.equal(clip_loss_map(losses, 1.2, 4), torch.tensor([[[0.0, 0, 0, 1]]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    losses = some_losses(2, 30, 30, dtype=dtype) + 300  # their sum is no float16
    expected, _ = naive.clipped(losses.double().numpy(), 1e4, 8)
    clipped = clip_loss_map(losses, 1e4, 8)
    assert clipped.dtype == torch.float32
    np.testing.assert_allclose(clipped.numpy(), expected, rtol=2e-6)  # means of 128 float32 numbers
    assert gradient_of(losses, 1e4, 8).dtype == dtype


@pytest.mark.parametrize("losses, patch, message", [
    (torch.zeros(4, 4), 2, r"loss_map: found torch.float32 of shape \(4, 4\), expected losses \(B, H, W\)"),
    (torch.zeros(1, 0, 4), 2, "not empty"),
    (torch.zeros(1, 4, 4).long(), 2, "found torch.int64"),
    (torch.zeros(1, 4, 4), 0, "patch: found 0, expected at least 1"),
])  # fmt: skip
def test_refused(losses, patch, message):
    with pytest.raises(ValueError, match=message):
        clip_loss_map(losses, 1.2, patch)
