"""AFA's random walk and reliable labels: loops, the published numbers, and what must be left alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from allocations import count_allocations
from reference import naive_afa as naive
from safetensors.torch import load_file

from wsss_lib.refinement.random_walk import radius_mask, random_walk
from wsss_lib.refinement.reliable_labels import (
    combine_labels,
    propagated_labels,
    refine_scores,
    reliable_labels,
    threshold_labels,
)

GOLDEN = Path(__file__).parent / "golden"
VECTORS = load_file(GOLDEN / "afa_utils.safetensors")
FACTS = json.loads((GOLDEN / "afa_utils.json").read_text())
LABELS, IMAGES = VECTORS["in.cls_label"].float(), VECTORS["in.image"].float()
BOXES = torch.tensor(FACTS["boxes"])
MAPS = torch.zeros(2, 20, 48, 64)
MAPS[:, FACTS["classes"]] = VECTORS["in.cams_kept"]
SMALL = F.interpolate(MAPS, (3, 4), mode="bilinear", align_corners=False)


def assert_close(found, expected, tolerance):
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


def assert_recorded(name, tensor, tolerance):
    """A tensor too large to be stored: every n-th value, and sums over all of it."""
    flat, stats = tensor.double().flatten(), FACTS["stats"][name]
    assert_close(flat[:: FACTS["strides"][name]], VECTORS[f"{name}.sub"].double(), tolerance)
    assert abs(flat.norm() / stats["l2"] - 1) <= tolerance
    assert abs(flat.max() / stats["absmax"] - 1) <= tolerance
    assert abs(flat.sum() / stats["sum"] - 1) <= tolerance


def make_walk(seed=0, batch=2, classes=3, grid=(3, 5), dtype=torch.float64):
    """Maps in [0, 1], an affinity that is not symmetric, labels with a picture of one class."""
    generator = torch.Generator().manual_seed(seed)
    n = grid[0] * grid[1]
    maps = torch.rand(batch, classes, *grid, generator=generator, dtype=dtype)
    affinity = torch.rand(batch, n, n, generator=generator, dtype=dtype)
    labels = torch.ones(batch, classes)
    labels[0, 1:] = 0
    return maps, affinity, labels


# ------------------------------------------------------------------ the random walk


@pytest.mark.parametrize(
    "name, background, radius", [("low", 0.35, 2), ("high", 0.55, 2), ("nomask", 0.45, None)])
def test_walk_agrees_with_the_published_numbers(name, background, radius):
    expected = VECTORS[f"out.propagate_{name}"]
    found = random_walk(SMALL, VECTORS["in.aff"], LABELS, background, radius)
    assert_close(found, expected, 1e-6)  # float32, sums of 12
    looped = [naive.random_walk(m.double().numpy(), a.double().numpy(), y, background, radius)
              for m, a, y in zip(SMALL, VECTORS["in.aff"], LABELS)]
    assert_close(torch.from_numpy(np.stack(looped)), expected.double(), 1e-6)
    assert not found[:, 1:][LABELS == 0].any()


def test_walk_of_maps_alone_agrees_with_the_published_numbers():
    kept = (MAPS * LABELS[:, :, None, None])[:, FACTS["classes"]]
    kept = F.interpolate(kept, (3, 4), mode="bilinear", align_corners=False)
    found = random_walk(kept, VECTORS["in.aff"], torch.ones(2, 4), None, 2)
    assert_close(found, VECTORS["out.propagte_aff_cam"], 1e-6)


@pytest.mark.parametrize("radius", [0, 1, 3, None])
@pytest.mark.parametrize("background", [None, 0.35])
def test_walk_agrees_with_the_loop(background, radius):
    maps, affinity, labels = make_walk()
    for power in (1, 2):
        found = random_walk(maps, affinity, labels, background, radius, power)
        for b in range(2):
            picture = maps[b].numpy(), affinity[b].numpy(), labels[b]
            expected = naive.random_walk(*picture, background, radius, power)
            # float64: the order of sums of 15
            np.testing.assert_allclose(found[b].numpy(), expected, rtol=0, atol=1e-14)


def test_walk_changes_nothing_in_place_and_mixes_no_pictures():
    inputs = make_walk(grid=(7, 4), dtype=torch.float32)
    copies = [x.clone() for x in inputs]
    found = random_walk(*inputs, 0.5, 2)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies))
    alone = torch.cat([random_walk(*(x[b : b + 1] for x in inputs), 0.5, 2) for b in range(2)])
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-6)
    assert not found[0, 2:].any() and found[0, :2].all() and found.shape == (2, 4, 7, 4)


def test_walk_of_a_picture_without_classes_is_background():
    maps, affinity, labels = make_walk()
    found = random_walk(maps, affinity, 0 * labels, 0.5)
    assert (found[:, 0] > 0.9).all() and not found[:, 1:].any()
    assert not random_walk(maps, affinity, 0 * labels, None).any()


def test_walk_is_in_float32_or_better():
    maps, affinity, labels = make_walk(grid=(6, 6))
    expected = random_walk(maps, affinity, labels)
    assert expected.dtype == torch.float64
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
        # the inputs' own rounding: 2^-11 and 2^-8 of values up to 1
        with torch.autocast("cpu", torch.bfloat16):
            found = random_walk(maps.to(dtype), affinity.to(dtype), labels)
        assert found.dtype == torch.float32
        assert_close(found, expected, tolerance)


def test_walk_has_no_graph():
    maps, affinity, labels = make_walk()
    assert not random_walk(maps.requires_grad_(), affinity.requires_grad_(), labels).requires_grad


def test_walk_needs_no_second_matrix():
    """48x48 patches: the affinity is 21 MB a picture; a row of the grid with its neighbours, 157 kB."""
    maps, affinity, labels = make_walk(batch=1, grid=(48, 48), dtype=torch.float32)
    random_walk(maps, affinity, labels)
    with count_allocations() as memory:
        random_walk(maps, affinity, labels)
    assert memory.peak < 0.05 * affinity.numel() * 4


def test_radius_mask():
    expected = VECTORS["out.mask_h3_w4_r2"].bool()
    assert torch.equal(radius_mask(3, 4, 2), expected)
    looped = [[naive.near(i, j, 4, 2) for j in range(12)] for i in range(12)]
    assert torch.equal(torch.tensor(looped), expected)
    assert radius_mask(20, 20, 8).sum() == FACTS["mask_20_20_8_sum"]
    assert torch.equal(radius_mask(2, 3, 0), torch.eye(6, dtype=torch.bool)) and radius_mask(5, 2, 4).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"maps": torch.zeros(2, 3, 15)}, r"maps: found torch.float32 of shape \(2, 3, 15\)"),
        ({"maps": torch.zeros(2, 3, 3, 5, dtype=torch.long)}, "maps: found torch.int64"),
        ({"maps": 2 * torch.ones(2, 3, 3, 5)}, "maps: found values 2 to 2, expected 0 to 1"),
        ({"maps": -torch.ones(2, 3, 3, 5)}, "maps: found values -1"),
        ({"maps": torch.full((2, 3, 3, 5), torch.nan)}, "maps: found values nan"),
        ({"affinity": torch.zeros(2, 15, 14)}, r"affinity: found shape \(2, 15, 14\), expected \(2, 15, 15"),
        ({"labels": torch.ones(2, 2)}, r"labels: found shape \(2, 2\), expected \(2, 3\)"),
        ({"labels": 2 * torch.ones(2, 3)}, "labels: found values"),
        ({"background": 1.5}, "background: found 1.5"),
        ({"radius": -1}, "radius, power: found -1 and 2"),
        ({"power": 0}, "radius, power: found 8 and 0"),
    ],
)
def test_wrong_inputs_of_the_walk(change, message):
    maps, affinity, labels = make_walk()
    with pytest.raises(ValueError, match=message):
        random_walk(**{"maps": maps, "affinity": affinity, "labels": labels, **change})


def test_maps_alone_may_have_any_scale():
    maps, affinity, labels = make_walk()
    small = random_walk(maps, affinity, labels, None)
    torch.testing.assert_close(random_walk(50 * maps, affinity, labels, None), 50 * small)
    with pytest.raises(ValueError, match="grid, radius: found 0x3 and 1"):
        radius_mask(0, 3, 1)


# ------------------------------------------------------------------ reliable labels


@pytest.mark.parametrize(
    "name, background, boxes",
    [("nobox", 0.45, None), ("box_mid0", 0.45, BOXES), ("box_mid1", (0.55, 0.35), BOXES)],
)
def test_thresholds_agree_with_the_published_masks(name, background, boxes):
    found = threshold_labels(MAPS, LABELS, background, boxes)
    assert torch.equal(found, VECTORS[f"out.cam_to_label_{name}"].long())
    assert 255 in found or boxes is None


def test_a_score_at_the_threshold_is_not_above_it():
    maps = torch.tensor([0.25, 0.5, 0.75, 1.0]).view(1, 1, 1, 4)
    assert threshold_labels(maps, torch.ones(1, 1), 0.5).tolist() == [[[0, 0, 1, 1]]]
    assert threshold_labels(maps, torch.ones(1, 1), (0.75, 0.25)).tolist() == [[[0, 255, 255, 1]]]


def test_reliable_labels_agree_with_the_published_masks():
    found = reliable_labels(MAPS, LABELS, IMAGES, boxes=BOXES, published=True)
    assert torch.equal(found, VECTORS["out.refine_cams_with_bkg_v2"].long())
    assert found.dtype == torch.long and {0, 255} < set(found.unique().tolist())


@pytest.mark.parametrize("name", ["low", "high"])
def test_refined_scores_agree_with_the_published_ones(name):
    scores = VECTORS[f"out.propagate_{name}"]
    found = refine_scores(scores, LABELS, IMAGES, BOXES, published=True)
    assert_recorded(f"out.refine_cls_label_{name}", found, 5e-6)  # float32, ten iterations
    assert torch.equal(found.argmax(1), VECTORS[f"out.refine_cls_label_{name}_argmax"].long())
    assert not found[:, 1:][LABELS == 0].any() and not found[1, :, :5].any()


def test_propagated_labels_agree_with_the_published_masks():
    found = propagated_labels(SMALL, VECTORS["in.aff"], LABELS, IMAGES, boxes=BOXES, radius=2, published=True)
    assert torch.equal(found, VECTORS["out.refined_aff_label"].long())


def make_pictures(height=12, width=16):
    """Two pictures of two coloured halves, with noise, and maps that follow them loosely."""
    generator = torch.Generator().manual_seed(0)
    images = 60 * torch.rand(2, 3, height, width, generator=generator)
    images[0, :, :, : width // 2] += 150
    images[1, :, height // 2 :] += 150
    maps = 0.6 * torch.rand(2, 3, height, width, generator=generator)
    maps[0, 0, :, : width // 2] += 0.4
    maps[1, 2, height // 2 :] += 0.4
    return maps, torch.tensor([[1.0, 0, 1], [0, 1, 1]]), images


@pytest.mark.parametrize("boxes", [None, torch.tensor([[2, 1, 12, 15], [0, 0, 9, 16]])])
def test_reliable_labels_agree_with_the_loop(boxes):
    maps, labels, images = make_pictures()
    found = reliable_labels(maps.double(), labels, images, boxes=boxes, num_iter=2)
    whole = torch.tensor([[0, 0, 12, 16]] * 2)
    for b, box in enumerate(whole if boxes is None else boxes):
        arrays = (maps[b].double().numpy(), labels[b], images[b].double().numpy())
        expected = naive.reliable_labels(*arrays, (0.55, 0.35), box.tolist(), num_iter=2)
        assert np.array_equal(found[b].numpy(), expected)
    assert len(found.unique()) > 3


def test_padding_has_no_say():
    """Whatever the maps are there, in a picture whose colours do not keep them apart; published: it has."""
    maps, labels, _ = make_pictures(24, 24)
    images, boxes = torch.full((2, 3, 24, 24), 100.0), torch.tensor([[0, 0, 24, 18], [4, 0, 24, 24]])
    other = maps.clone()
    other[0, 2, :, 18:], other[1, 1, :4] = 1, 1
    differs = {}
    for published in (False, True):
        pair = [reliable_labels(x, labels, images, boxes=boxes, published=published) for x in (maps, other)]
        assert (pair[0][0, :, 18:] == 255).all() and (pair[0][1, :4] == 255).all()
        differs[published] = not torch.equal(*pair)
    assert differs == {False: False, True: True}
    scores = [refine_scores(x, labels[:, 1:], images, boxes) for x in (maps, other)]
    assert torch.equal(*scores)


def test_halved_scores_lie_beside_the_halved_image():
    """PAR without iterations only resizes. A ramp halved and doubled stays; with corners onto corners not."""
    ramp = torch.arange(16.0).expand(1, 2, 8, 16) / 16
    images = torch.zeros(1, 3, 8, 16)
    inner = (..., slice(2, -2), slice(2, -2))
    found = refine_scores(ramp, torch.ones(1, 1), images, num_iter=0)
    torch.testing.assert_close(found[inner], ramp[inner])
    shifted = refine_scores(ramp, torch.ones(1, 1), images, num_iter=0, published=True)
    assert (shifted - ramp)[inner].abs().max() > 0.02


def test_a_picture_without_classes_is_background():
    maps, labels, images = make_pictures()
    labels[0] = 0
    found = reliable_labels(maps, labels, images)
    assert not found[0].any() and found[1].any()
    walked = propagated_labels(maps, torch.rand(2, 192, 192), labels, images)
    assert not walked[0].any() and not threshold_labels(maps, labels)[0].any()


def test_small_maps_are_resized_and_images_may_be_bytes():
    maps, labels, images = make_pictures()
    small = F.avg_pool2d(maps, 4)
    large = F.interpolate(small, (12, 16), mode="bilinear", align_corners=False)
    found = reliable_labels(small, labels, images.to(torch.uint8))
    assert torch.equal(found, reliable_labels(large, labels, images.to(torch.uint8).float()))


def test_combine_labels():
    strict, loose = torch.tensor([[[0, 0, 3, 3, 0, 255]]]), torch.tensor([[[0, 2, 3, 2, 255, 255]]])
    found = combine_labels(strict, loose)
    assert found.tolist() == [[[0, 255, 3, 3, 255, 255]]]
    pairs = zip(strict.flatten(), loose.flatten())
    assert found.flatten().tolist() == [naive.combine(*pair) for pair in pairs]
    boxed = combine_labels(strict, loose, torch.tensor([[0, 1, 1, 3]]))
    assert boxed.tolist() == [[[255, 255, 3, 255, 255, 255]]]


def test_inputs_are_left_alone():
    maps, labels, images = make_pictures()
    boxes, n = torch.tensor([[0, 0, 9, 16]] * 2), 192
    affinity = torch.rand(2, n, n)
    inputs = [maps, labels, images, affinity, boxes]
    copies = [x.clone() for x in inputs]
    threshold_labels(maps, labels, boxes=boxes)
    reliable_labels(maps, labels, images, boxes=boxes)
    propagated_labels(maps, affinity, labels, images, boxes=boxes)
    strict = torch.zeros(2, 3, 4, dtype=torch.long)
    combine_labels(strict, strict + 1, torch.tensor([[0, 0, 1, 1]] * 2))
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies)) and not strict.any()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"maps": torch.zeros(2, 3, 12)}, "maps: found torch.float32 of shape"),
        ({"maps": 3 * torch.ones(2, 3, 12, 16)}, "maps: found values 3 to 3"),
        ({"labels": torch.ones(2, 4)}, r"labels: found shape \(2, 4\)"),
        ({"images": torch.zeros(1, 3, 12, 16)}, r"found shape \(1, 3, 12, 16\), expected \(2, 3, H, W\)"),
        ({"boxes": torch.zeros(2, 3)}, r"boxes: found shape \(2, 3\)"),
        ({"boxes": torch.tensor([[0, 0, 12, 16], [0, 0, 12, 17]])}, r"boxes: found \(0, 0, 12, 17\)"),
        ({"boxes": torch.tensor([[0, 0, 12, 16], [5, 0, 5, 16]])}, r"boxes: found \(5, 0, 5, 16\)"),
        ({"backgrounds": (0.35, 0.55)}, r"background: found \(0.35, 0.55\)"),
        ({"backgrounds": (0.5, 0.4, 0.3)}, "background: found"),
    ],
)
def test_wrong_inputs_of_the_labels(change, message):
    maps, labels, images = make_pictures()
    with pytest.raises(ValueError, match=message):
        reliable_labels(**{"maps": maps, "labels": labels, "images": images, **change})


def test_wrong_masks():
    masks = torch.zeros(2, 3, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="strict, loose: found shapes"):
        combine_labels(masks, masks[:1])
