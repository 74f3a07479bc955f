"""Pseudo labels against plain loops, the agreement with the threshold sweep, and refusals."""

import numpy as np
import pytest
import torch
from reference import naive_cam as naive

from wsss_lib import evaluate, pseudo_labels
from wsss_lib.evaluation import ThresholdSweep
from wsss_lib.kernels import refine_cam
from wsss_lib.refinement import scored_maps

LABELS = torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]])


@pytest.fixture
def maps():
    """Raw maps of very different magnitude; those of absent classes are the strongest; one is zero."""
    maps = torch.rand(4, 3, 4, 6, generator=torch.Generator().manual_seed(0)) ** 2
    maps *= torch.tensor([1e-6, 1.0, 1e6])[None, :, None, None]
    maps[LABELS == 0] += 1e9
    maps[3, 1] = 0
    return maps


@pytest.mark.parametrize("size", [None, (4, 6), (9, 23), (13, 12), (2, 3)])
def test_scores_and_masks_agree_with_the_loop(maps, size):
    expected = naive.scores(maps.double().numpy(), LABELS.numpy(), size or (4, 6))
    scores = scored_maps(maps, LABELS, size)
    # float32 scores of up to 1, two interpolations: a few times 6e-8
    np.testing.assert_allclose(scores.numpy(), expected, rtol=0, atol=5e-7)
    assert scores.dtype == torch.float32 and scores.min() >= 0 and scores.max() <= 1
    masks = pseudo_labels(maps, LABELS, size=size, background=0.4)
    assert masks.dtype == torch.long
    # the loop reads the library's scores, so that rounding decides no pixel
    np.testing.assert_array_equal(masks.numpy(), naive.masks(scores.numpy(), np.float32(0.4)))
    assert not masks[2].any()  # no label, no foreground
    assert set(masks[0].unique().tolist()) <= {0, 1, 3} and set(masks[1].unique().tolist()) <= {0, 2}


def test_worked_by_hand():
    maps = torch.tensor([[[[4.0, 2.0, 1.0, 0.0]], [[0.0, 3.0, 3.0, 0.0]]]])  # scores 1 .5 .25 0 and 0 1 1 0
    assert pseudo_labels(maps, torch.ones(1, 2), background=0.4).tolist() == [[[1, 2, 2, 0]]]
    assert pseudo_labels(maps, torch.tensor([[1, 0]]), background=0.25).tolist() == [[[1, 1, 0, 0]]]  # a tie
    assert pseudo_labels(maps, torch.tensor([[True, False]]), background=0.0).tolist() == [[[1, 1, 1, 0]]]
    assert not pseudo_labels(maps, torch.ones(1, 2), background=1.0).any()
    same = torch.ones(1, 2, 1, 1)
    assert pseudo_labels(same, torch.ones(1, 2)).item() == 1  # two classes alike: the lower


def test_size_of_the_masks(maps):
    images = torch.zeros(4, 3, 16, 24)
    assert pseudo_labels(maps, LABELS).shape == (4, 4, 6)
    assert pseudo_labels(maps, LABELS, images).shape == (4, 16, 24)
    assert pseudo_labels(maps, LABELS, images, size=(5, 7)).shape == (4, 5, 7)
    assert pseudo_labels(maps, LABELS, size=torch.Size([5, 7])).shape == (4, 5, 7)


def test_a_sweep_at_t_scores_exactly_the_masks_of_background_t(maps):
    truth = torch.randint(0, 4, (4, 16, 24), generator=torch.Generator().manual_seed(1))
    truth[:, :2] = 255
    # thresholds that are themselves scores decide by the tie rule
    scores = scored_maps(maps, LABELS, (16, 24))
    ties = scores[scores > 0].unique()[::97].tolist()
    thresholds = sorted({0.0, 0.1, 0.3, 0.4, 0.43, 0.7, 1.0, *ties})
    sweep = ThresholdSweep(num_classes=3, thresholds=thresholds)
    sweep.update(scores, truth, LABELS)
    for t in thresholds:
        direct = evaluate(pseudo_labels(maps, LABELS, background=t, size=(16, 24)), truth, num_classes=3)
        np.testing.assert_array_equal(sweep.scores_at(t).confusion, direct.confusion, err_msg=str(t))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_read_as_float32(dtype):
    maps = torch.rand(1, 3, 4, 6).to(dtype)
    assert torch.equal(scored_maps(maps, LABELS[:1]), scored_maps(maps.float(), LABELS[:1]))


def test_resizing_never_leaves_zero_to_one():
    maps = torch.ones(1, 1, 7, 35)
    for size in [(30, 11), (112, 112), (97, 331)]:  # the first made 1.0000001 of ones
        assert scored_maps(maps, torch.ones(1, 1), size).max() <= 1


@pytest.mark.parametrize("variant", ["par", "pamr"])
def test_refined_scores_are_the_kernels_and_the_background_stays_comparable(maps, variant):
    images = 255 * torch.rand(4, 3, 9, 13, generator=torch.Generator().manual_seed(2))
    plain = scored_maps(maps, LABELS, images=images)
    refined = scored_maps(maps, LABELS, images=images, refine=variant)
    # the background as a channel of its own, as the papers have it, against a threshold on the others
    background = torch.full((4, 1, 9, 13), 0.3)
    channels = refine_cam(images, torch.cat([background, plain], 1), variant=variant)
    expected = channels.argmax(1)
    found = pseudo_labels(maps, LABELS, images, background=0.3, refine=variant)
    clear = channels.topk(2, dim=1).values.diff(dim=1).abs()[:, 0] > 1e-5  # rounding decides ties
    assert clear.float().mean() > 0.7 and torch.equal(found[clear], expected[clear])
    assert not torch.equal(refined, plain) and refined.max() <= 1
    assert (refined[LABELS == 0] == 0).all()


def test_refusals(maps):
    good = {"maps": maps, "labels": LABELS}
    nan = maps.clone()
    nan[0, 0, 0, 0] = float("nan")
    wrong = [
        ({"background": 1.01}, "background: found 1.01"),
        ({"background": -0.1}, "background: found -0.1"),
        ({"background": float("nan")}, "background: found nan"),
        ({"refine": "pra"}, "refine: found 'pra', expected None or one of par, pamr"),
        ({"refine": "par"}, "images: found none, expected images of the scores' size"),
        ({"refine": "par", "images": torch.zeros(4, 3, 8, 8), "size": (4, 4)}, r"images: found \(8, 8\) pixels"),
        ({"images": torch.zeros(3, 3, 8, 8)}, r"images: found shape \(3, 3, 8, 8\), expected \(4, 3, H, W\)"),
        ({"images": torch.zeros(3, 8, 8)}, "images: found shape"),
        ({"size": (0, 5)}, r"size: found \(0, 5\)"),
        ({"size": (5,)}, r"size: found \(5,\)"),
        ({"maps": maps[0]}, r"maps: found shape \(3, 4, 6\)"),
        ({"maps": -maps}, "expected no negative value"),
        ({"maps": nan}, "not finite"),
        ({"labels": LABELS[:2]}, r"labels: found shape \(2, 3\), expected \(4, 3\)"),
        ({"labels": LABELS + 1}, "expected 0 or 1"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            pseudo_labels(**{**good, **change})
