"""Label completion against the published results, loops, and what each step promises."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import naive_label_completion as naive
from safetensors.torch import load_file

from wsss_lib.kernels import refine_cam
from wsss_lib.refinement import (
    complete,
    complete_labels,
    completion_thresholds,
    initial_labels,
    open_regions,
)

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "getam_seg_label.json").read_text())
LABELS = torch.tensor([[1.0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]])


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "getam_seg_label.safetensors")


def case_inputs(golden, name):
    """Scores (1, 20, H, W), labels, saliency (1, H, W) and the cut of a golden case."""
    present, classes = golden[f"in.{name}.norm_cam_present"], CASES[name]["classes"]
    scores, labels = torch.zeros(1, 20, *present.shape[1:]), torch.zeros(1, 20)
    scores[0, classes], labels[0, classes] = present, 1
    return scores, labels, golden[f"in.{name}.saliency"][None].float(), CASES[name]["cut_threshold"]


def make_inputs(size=(17, 23), seed=0, dtype=torch.float64, smooth=5):
    """Scores with zeros, blobs that overlap, absent classes that score too; saliency of three blobs."""
    generator = torch.Generator().manual_seed(seed)
    coarse = [-(-side // smooth) for side in size]
    scores = torch.rand(3, 4, *coarse, generator=generator, dtype=torch.float64).sub(0.3).clamp(min=0) / 0.7
    saliency = torch.rand(3, *coarse, generator=generator, dtype=torch.float64)
    grow = torch.nn.functional.interpolate
    scores = grow(scores, size, mode="bilinear").clamp(0, 1).to(dtype)
    return scores, LABELS, grow(saliency[:, None], size, mode="bilinear")[:, 0].clamp(0, 1)


def assert_same_as_loops(scores, labels, saliency, **options):
    settings = {"cut": 0.9, "power": 32, "opening": 10, "published": False} | options
    masks, changed = complete_labels(scores, labels, saliency, **settings)
    assert masks.dtype == torch.long
    for b in range(len(scores)):
        salient = saliency[b].double().numpy() > 0.5
        numbers = scores[b].double().numpy()
        mask, seen = naive.complete_labels(numbers, labels[b].tolist(), salient, **settings)
        np.testing.assert_array_equal(masks[b].numpy(), mask)
        if seen is not None:
            np.testing.assert_array_equal(changed[b].numpy(), seen)
    return masks


# ------------------------------------------------------------------ the published code


@pytest.mark.parametrize("name", CASES)
def test_published_labels_and_saliency(golden, name):
    """Pixel by pixel. The published saliency is 255 where the completion wrote: all that its loss reads."""
    scores, labels, saliency, cut = case_inputs(golden, name)
    masks, changed = complete_labels(scores, labels, saliency, cut, published=True)
    assert torch.equal(masks[0], golden[f"out.{name}.label"].long())
    assert torch.equal(changed[0], (golden[f"out.{name}.saliency"] == 255).float())
    thresholds = completion_thresholds(scores, labels, cut)
    assert thresholds[labels > 0].tolist() == CASES[name]["thresholds"]  # the very float32 numbers
    assert (thresholds[labels == 0] == torch.inf).all()
    loops, seen = naive.complete_labels(scores[0].numpy(), labels[0].tolist(), saliency[0].numpy() > 0.5,
                                        cut, 32, 10, True)
    np.testing.assert_array_equal(loops, masks[0].numpy())
    np.testing.assert_array_equal(seen, changed[0].numpy())


@pytest.mark.parametrize("name", CASES)
def test_claims_of_two_classes_are_ignored(golden, name):
    scores, labels, saliency, cut = case_inputs(golden, name)
    before = initial_labels(scores, labels, saliency)
    thresholds = completion_thresholds(scores, labels, cut)
    both = (before == 0) & ((scores > thresholds[:, :, None, None]).sum(1) > 1)
    assert both.sum() == CASES[name]["conflict_pixels_before_open"]
    ours = complete(before, scores, thresholds)
    published = complete(before, scores, thresholds, published=True)
    assert (ours[both] == 255).all() and (published[both] != 255).all()
    assert torch.equal(ours[~both], published[~both])
    assert_same_as_loops(scores, labels, saliency, cut=cut)


def test_published_opening_moves_regions_by_a_pixel(golden):
    probe = golden["in.morph_probe"][None] > 0
    assert torch.equal(open_regions(probe, 10, published=True)[0], golden["out.morph_probe_open10"] > 0)
    rectangle = torch.zeros(1, 40, 44, dtype=torch.bool)
    rectangle[0, 6:22, 8:27] = True
    moved = rectangle.roll((1, 1), (1, 2))
    assert torch.equal(open_regions(rectangle, 10, published=True), moved)
    assert torch.equal(open_regions(rectangle, 10), rectangle)


def test_labels_of_the_published_training_loop():
    """Raw maps of the network (4 x 4 patches), PAMR, division by maximum + 1e-5: the loop's labels.

    in.maps are GETAM maps by this library; the refined ones are compared with the published numbers first.
    """
    t = load_file(GOLDEN / "getam_e2e_labels.safetensors")
    labels, images = t["in.labels"].float(), t["in.images"].float()
    refined = refine_cam(images, t["in.maps"], variant="pamr")
    scores = refined / (refined.amax((2, 3), keepdim=True) + 1e-5)
    for b in (0, 1):
        found = scores[b][labels[b] > 0].flatten()[::11]
        # Rounding of a ViT-B in float32, then ten iterations: 2.4e-6 was measured.
        torch.testing.assert_close(found, t[f"out.norm_cam_img{b}.sub11"], rtol=0, atol=1e-5)
    # The loop makes the saliency binary; no value lies between 0 and 120 of 255.
    masks, changed = complete_labels(scores, labels, t["in.saliency"] > 0, cut=0.9, published=True)
    assert torch.equal(masks, t["out.seg_label"].long())
    assert torch.equal(changed, (t["out.saliency"] == 255).float())


# ------------------------------------------------------------------ loops


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize(
    "size, opening", [((17, 23), 1), ((17, 23), 2), ((24, 9), 3), ((5, 30), 10), ((31, 26), 10)]
)
def test_against_loops(size, opening, published):
    for seed in range(3):
        inputs = make_inputs(size, seed)
        options = {"opening": opening, "cut": (0.5, 0.9, 0.0)[seed], "power": (4, 32, 1.5)[seed]}
        assert_same_as_loops(*inputs, published=published, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_types_are_what_their_numbers_are(dtype):
    """Half precision scores in float32: thousands of equal scores, and no rounding decides between them."""
    scores, labels, saliency = make_inputs((31, 26), dtype=dtype, smooth=9)
    masks = assert_same_as_loops(scores, labels, saliency.to(dtype), opening=3)
    assert set(masks.unique().tolist()) >= {0, 1, 2, 255}


def test_a_batch_is_its_pictures_one_by_one_and_inputs_stay():
    scores, labels, saliency = make_inputs((40, 33))
    copies = [tensor.clone() for tensor in (scores, labels, saliency)]
    for published in (False, True):
        masks, changed = complete_labels(scores, labels, saliency, published=published)
        for b in range(3):
            rows = slice(b, b + 1)
            alone = complete_labels(scores[rows], labels[rows], saliency[rows], published=published)
            assert torch.equal(alone.masks, masks[rows]) and torch.equal(alone.saliency, changed[rows])
        assert (changed is saliency) == (not published)
    for tensor, copy in zip((scores, labels, saliency), copies):
        assert torch.equal(tensor, copy)
    binary = complete_labels(scores, labels, saliency > 0.5)
    assert torch.equal(binary.masks, complete_labels(scores, labels, saliency).masks)
    assert not complete_labels(scores.requires_grad_(), labels, saliency).masks.requires_grad


def test_defaults_are_those_of_voc():
    scores, labels, saliency = make_inputs((60, 64), smooth=15)
    masks = complete_labels(scores, labels, saliency).masks
    published = {"cut": 0.9, "power": 32, "opening": 10}
    assert torch.equal(masks, complete_labels(scores, labels, saliency, **published).masks)
    for other in ({"cut": 0.95}, {"power": 16}, {"opening": 9}):
        assert not torch.equal(masks, complete_labels(scores, labels, saliency, **published | other).masks)


# ------------------------------------------------------------------ the steps, worked by hand


def test_initial_labels_worked_by_hand():
    # (1 - 0.5)^2 = 0.25; 0.4 > 0.36; 0.38 < 0.3844; equal scores: the lowest class. The third is absent.
    scores = torch.tensor([[[[0.5, 0.4, 0.38, 0.0, 0.9, 0.9]], [[0.2, 0.1, 0.0, 0.0, 0.9, 0.9]],
                            [[1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]]])
    salient = torch.tensor([[[True, True, True, True, True, False]]])
    labels = torch.tensor([[1.0, 1, 0]])
    assert initial_labels(scores, labels, salient, power=2).tolist() == [[[1, 1, 255, 255, 1, 0]]]
    tie = torch.full((1, 1, 1, 1), 0.5)  # (1 - 0.5)^1: no class wants it more than the background
    assert initial_labels(tie, torch.ones(1, 1), tie[0] > 0, power=1).item() == 255
    soft = torch.tensor([[[0.51, 0.5, 0.49, 1.0, 0.0, 1.0]]])  # above one half
    assert initial_labels(scores, labels, soft, power=2).tolist() == [[[1, 0, 0, 255, 0, 1]]]


def test_thresholds_worked_by_hand():
    rows = [[0.3, 0.0, 0.1, 0.2, 0.4, 0.0], [0.0] * 6, [0.7] + [0.0] * 5, [0.5] * 6]
    scores = torch.tensor(rows)[None, :, None]  # (1, 4, 1, 6)
    labels = torch.ones(1, 4)
    # of 0.1 0.2 0.3 0.4 the one at int(0.9 * 4) = 3, and so on; zeros do not count
    for cut, expected in ((0.9, 0.4), (0.74, 0.3), (0.5, 0.3), (0.25, 0.2), (0.0, 0.1)):
        found = completion_thresholds(scores, labels, cut)
        torch.testing.assert_close(found, torch.tensor([[expected, torch.inf, 0.7, 0.5]]))
    labels[0, 0] = 0
    assert completion_thresholds(scores, labels)[0, 0] == torch.inf
    hundred = torch.arange(1, 101)[None, None, None] / 100
    # 0.29 * 100 is 28.999999999999996 in float64, and 29 in float32
    assert completion_thresholds(hundred, torch.ones(1, 1), 0.29).item() == torch.tensor(0.29).item()


def test_completion_takes_background_strictly_above_the_threshold():
    masks = torch.tensor([[[0, 0, 0, 255, 2, 0]]])
    scores = torch.tensor([[[[0.5, 0.6, 0.6, 0.9, 0.9, 0.1]], [[0.0, 0.3, 0.4, 0.0, 0.0, 0.3]]]])
    thresholds = torch.tensor([[0.5, 0.3]])
    assert complete(masks, scores, thresholds).tolist() == [[[0, 1, 255, 255, 2, 0]]]
    assert complete(masks, scores, thresholds, published=True).tolist() == [[[0, 1, 1, 255, 2, 0]]]


@pytest.mark.parametrize("size", [2, 3, 10])
def test_openings_keep_their_place(size):
    regions = torch.rand(4, 30, 37, generator=torch.Generator().manual_seed(0)) < 0.9
    regions[:, 4:18, 9:24] = True
    opened = open_regions(regions, size)
    assert opened.any() and not (opened & ~regions).any() and (opened != regions).any()
    assert torch.equal(open_regions(opened, size), opened)
    for flip in ((1,), (2,)):
        assert torch.equal(open_regions(regions.flip(flip), size).flip(flip), opened)
    assert torch.equal(open_regions(regions, 1), regions)


def test_pictures_without_a_class():
    scores, _, saliency = make_inputs((30, 30), smooth=15)
    masks, _ = complete_labels(scores, torch.zeros(3, 4), saliency, opening=3)
    salient = saliency > 0.5
    assert torch.equal(masks, open_regions(salient, 3).long() * 255)
    assert set(masks.unique().tolist()) == {0, 255}
    nothing = complete_labels(torch.zeros_like(scores), torch.ones(3, 4), torch.zeros(3, 30, 30))
    assert not nothing.masks.any()


# ------------------------------------------------------------------ refusals


def test_wrong_arguments():
    scores, labels, saliency = make_inputs()
    wrong = [
        ({"scores": scores[0]}, r"scores: found torch.float64 of shape \(4, 17, 23\), expected floating"),
        ({"scores": scores.long()}, "scores: found torch.int64"),
        ({"scores": scores * 2}, r"scores: found values 0 to \S+, expected 0 to 1"),
        ({"scores": scores - 0.1}, "scores: found values -0.1 to"),
        ({"scores": scores / 0}, "scores: found values nan"),
        ({"labels": labels[:2]}, r"labels: found shape \(2, 4\), expected \(3, 4\)"),
        ({"labels": labels * 2}, "labels: found values"),
        ({"saliency": saliency[:, 1:]}, r"saliency: found shape \(3, 16, 23\) on cpu, expected \(3, 17"),
        ({"saliency": saliency.to("meta")}, "saliency: found shape .* on meta"),
        ({"saliency": saliency * 255}, r"saliency: found values \S+ to \d+\S*, expected 0 to 1"),
        ({"saliency": (saliency * 255).byte()}, "saliency: found torch.uint8, expected torch.bool or"),
        ({"cut": 1}, r"cut: found 1, expected a share in \[0, 1\)"),
        ({"cut": -0.1}, "cut: found -0.1"),
        ({"power": 0}, "power: found 0, expected a number > 0"),
        ({"opening": 0}, "opening: found 0, expected a whole number of pixels, 1 or more"),
        ({"opening": 2.5}, "opening: found 2.5"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            complete_labels(**{"scores": scores, "labels": labels, "saliency": saliency, **change})
    masks, thresholds = torch.zeros(3, 17, 23, dtype=torch.long), torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"masks: found shape \(2, 17, 23\), expected \(3, 17, 23\)"):
        complete(masks[:2], scores, thresholds)
    with pytest.raises(ValueError, match=r"thresholds: found shape \(3, 3\), expected \(3, 4\)"):
        complete(masks, scores, thresholds[:, 1:])
    for regions in (masks, masks[0] > 0):
        with pytest.raises(ValueError, match=r"regions: found .*, expected torch.bool \(B, H, W\)"):
            open_regions(regions)
