"""Scores against plain loops, examples worked by hand, and inputs that must be refused."""

import json
import math

import numpy as np
import pytest
import torch
from reference import naive_scores as naive

from wsss_lib.evaluation import ConfusionMatrix, ThresholdSweep, evaluate, mean_average_precision

SIZES = [(7, 9), (12, 5), (1, 1), (8, 8)]


def ragged(seed=0, classes=4):
    """Predictions and truths of several sizes; class 2 is in neither, some pixels are ignored."""
    rng = np.random.default_rng(seed)
    predictions = [rng.choice([0, 1, 3, 4][:classes], size) for size in SIZES]
    truths = [rng.choice([0, 1, 3, 4, 255], size, p=[0.4, 0.2, 0.1, 0.2, 0.1]) for size in SIZES]
    return predictions, [t.astype(np.uint8) for t in truths]


# ------------------------------------------------------------------ confusion and mIoU


@pytest.mark.parametrize("seed", range(3))
def test_evaluate_agrees_with_the_loop(seed):
    predictions, truths = ragged(seed)
    scores = evaluate(predictions, truths, num_classes=4)
    counts = naive.confusion(predictions, truths, 4)
    assert scores.confusion.dtype == np.int64 and scores.iou.dtype == np.float64
    np.testing.assert_array_equal(scores.confusion, counts)
    np.testing.assert_allclose(scores.iou, naive.iou(counts), rtol=0, atol=1e-12)
    assert math.isnan(scores.iou[2])
    assert abs(scores.miou - naive.mean(naive.iou(counts))) < 1e-12


def test_scores_worked_by_hand():
    prediction = torch.tensor([[0, 1, 1], [0, 0, 2]])
    truth = torch.tensor([[0, 1, 0], [1, 255, 255]])
    scores = evaluate([prediction], [truth], num_classes=3, split="val")
    # counted pixels (truth, prediction): (0,0) (1,1) (0,1) (1,0); the predicted 2 is under an ignored pixel
    np.testing.assert_array_equal(scores.confusion[:2, :2], [[1, 1], [1, 1]])
    assert scores.confusion.sum() == 4
    np.testing.assert_allclose(scores.iou, [1 / 3, 1 / 3, np.nan, np.nan])
    assert scores.miou == pytest.approx(1 / 3)
    np.testing.assert_allclose(scores.precision, [0.5, 0.5, np.nan, np.nan])
    np.testing.assert_allclose(scores.recall, [0.5, 0.5, np.nan, np.nan])
    assert (scores.split, scores.oracle, scores.choice) == ("val", False, "")


def test_precision_is_of_predictions_and_recall_of_truth():
    scores = evaluate(torch.tensor([[[1, 1, 1, 0]]]), torch.tensor([[[1, 0, 0, 0]]]), num_classes=1)
    np.testing.assert_allclose(scores.precision, [1, 1 / 3])
    np.testing.assert_allclose(scores.recall, [1 / 3, 1])


def test_a_class_predicted_but_never_true_counts_as_zero():
    scores = evaluate(torch.tensor([[[0, 2]]]), torch.tensor([[[0, 0]]]), num_classes=2)
    np.testing.assert_allclose(scores.iou, [0.5, np.nan, 0])
    assert scores.miou == 0.25


def test_streaming_equals_one_batch_and_any_integer_type():
    rng = np.random.default_rng(1)
    prediction, truth = rng.integers(0, 5, (6, 8, 8)), rng.integers(0, 5, (6, 8, 8))
    truth[truth == 4] = 255
    whole, parts = ConfusionMatrix(4), ConfusionMatrix(4)
    whole.update(torch.from_numpy(prediction), torch.from_numpy(truth))
    truth = truth.astype(np.uint8)
    truth.setflags(write=False)  # as an array read from an image file is
    for i in range(6):
        parts.update(prediction[i].astype(np.uint8), truth[i])
    np.testing.assert_array_equal(whole.counts, parts.counts)
    np.testing.assert_array_equal(evaluate(prediction, truth, 4).confusion, whole.counts)


def test_scores_do_not_change_with_later_updates():
    matrix = ConfusionMatrix(1)
    matrix.update([[0, 1]], [[0, 1]])
    before = matrix.scores()
    matrix.update([[0, 1]], [[1, 0]])
    assert before.confusion.sum() == 2 and matrix.scores().confusion.sum() == 4


def test_table_and_json():
    scores = evaluate(torch.tensor([[[0, 1, 1]]]), torch.tensor([[[0, 1, 0]]]), num_classes=2, oracle=True)
    table = scores.table(["cat", "dog"])
    assert [row.split()[:2] for row in table[1:4]] == [["background", "50.0"], ["cat", "50.0"], ["dog", "-"]]
    assert table[-1].split()[:2] == ["mean", "50.0"] and "oracle" in table[-1]
    assert table == scores.table(["background", "cat", "dog"])
    with pytest.raises(ValueError, match="found 1 names"):
        scores.table(["cat"])
    back = json.loads(json.dumps(scores.to_json(), allow_nan=False))
    assert back["iou"][2] is None and back["miou"] == 0.5 and back["oracle"] is True
    assert back["confusion"] == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize("prediction, truth, message", [
    (np.zeros((2, 3), int), np.zeros((3, 2), int), r"\(1, 2, 3\).*\(1, 3, 2\)"),
    (np.zeros(6, int), np.zeros(6, int), r"\(6,\).*\(H, W\)"),
    (np.zeros((2, 2)), np.zeros((2, 2), int), "prediction: found dtype float64"),
    (torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, 2), "truth: found dtype torch.float32"),
    (np.full((2, 2), 255), np.full((2, 2), 255), r"prediction: found values \[255\].*decides every pixel"),
    (np.full((2, 2), 5), np.zeros((2, 2), int), r"prediction: found values \[5\], expected 0..4"),
    (np.full((2, 2), -1), np.zeros((2, 2), int), r"prediction: found values \[-1\]"),
    (np.zeros((2, 2), int), np.full((2, 2), 7), r"truth: found values \[7\], expected 0..4 or 255"),
])  # fmt: skip
def test_bad_masks_are_refused(prediction, truth, message):
    matrix = ConfusionMatrix(4)
    with pytest.raises(ValueError, match=message):
        matrix.update(prediction, truth)
    assert matrix.counts.sum() == 0


def test_unequal_lengths_and_emptiness_are_refused():
    mask = np.zeros((2, 2), int)
    with pytest.raises(ValueError, match="predictions: found 1 masks.*truths"):
        evaluate((m for m in [mask]), (m for m in [mask, mask]))
    with pytest.raises(ValueError, match="truths: found 1 masks.*predictions"):
        evaluate([mask, mask], (m for m in [mask]))
    with pytest.raises(ValueError, match="no counted pixel"):
        evaluate([], [])
    with pytest.raises(ValueError, match="no counted pixel"):
        evaluate([mask], [mask + 255])
    with pytest.raises(ValueError, match="ignore_index: found 3"):
        ConfusionMatrix(4, ignore_index=3)


# ------------------------------------------------------------------ the sweep


def sweep_data(seed=0, batch=3, classes=3, size=(6, 7)):
    """Maps of which half lie exactly on a threshold and many are equal to one another, truth, labels."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(batch, classes, *size, generator=generator)
    on_threshold = torch.tensor([i / 100 for i in range(101)])[(maps * 100).long()]
    maps = torch.where(torch.rand(maps.shape, generator=generator) < 0.5, on_threshold, maps)
    maps[:, 1] = torch.where(torch.rand(maps[:, 1].shape, generator=generator) < 0.4, maps[:, 0], maps[:, 1])
    maps[0, :, 0] = torch.tensor([0.0, 1.0, 0.5, 0.3, 0.29, 0.57, 0.58])  # ends, and decimals that round
    truth = torch.randint(0, classes + 1, (batch, *size), generator=generator)
    truth[torch.rand(truth.shape, generator=generator) < 0.1] = 255
    labels = (torch.rand(batch, classes, generator=generator) < 0.6).float()
    return maps, truth, labels


@pytest.mark.parametrize("with_labels", [False, True])
def test_every_threshold_agrees_with_predicting_anew(with_labels):
    maps, truth, labels = sweep_data()
    labels = labels if with_labels else None
    sweep = ThresholdSweep(num_classes=3)
    sweep.update(maps, truth, labels)
    thresholds, miou = sweep.curve()
    assert len(thresholds) == 101 and (thresholds[0], thresholds[31], thresholds[-1]) == (0.0, 0.31, 1.0)
    for k, threshold in enumerate(thresholds):
        predictions = [
            np.array(naive.predict(m.numpy(), np.float32(threshold), None if labels is None else labels[i]))
            for i, m in enumerate(maps)
        ]
        counts = naive.confusion(predictions, truth.numpy(), 3)
        np.testing.assert_array_equal(sweep.scores_at(threshold).confusion, counts)
        assert abs(miou[k] - naive.mean(naive.iou(counts))) < 1e-12


@pytest.mark.parametrize("thresholds", [[0.4], [0.0, 0.1, 1 / 3, 0.7, 1.0]])
def test_sweep_agrees_with_argmax_beside_a_background_score(thresholds):
    maps, truth, _ = sweep_data(seed=3)
    maps[0, 0, 0, :5] = torch.tensor([0.1, 1 / 3, 0.7, 0.4, 1.0])
    sweep = ThresholdSweep(num_classes=3, thresholds=thresholds)
    sweep.update(maps, truth)
    for threshold in thresholds:
        prediction = torch.cat([torch.full_like(maps[:, :1], threshold), maps], 1).argmax(1)
        expected = evaluate(prediction, truth, num_classes=3)
        np.testing.assert_array_equal(sweep.scores_at(threshold).confusion, expected.confusion)


def test_ties_go_to_the_background_and_then_to_the_lowest_class():
    sweep = ThresholdSweep(num_classes=2, thresholds=[0.0, 0.3, 0.5])
    sweep.update(torch.tensor([0.3, 0.3]).view(1, 2, 1, 1), torch.ones(1, 1, 1, dtype=torch.long))
    assert sweep.scores_at(0.0).confusion[1].tolist() == [0, 1, 0]
    assert sweep.scores_at(0.3).confusion[1].tolist() == [1, 0, 0]


def test_sweep_streams_and_keeps_what_it_says():
    maps, truth, labels = sweep_data(seed=5)
    whole, parts = ThresholdSweep(3), ThresholdSweep(3)
    whole.update(maps, truth, labels)
    for i in range(len(maps)):
        parts.update(maps[i : i + 1].numpy(), truth[i : i + 1].numpy(), labels[i : i + 1])
    np.testing.assert_array_equal(whole.histogram, parts.histogram)
    thresholds, miou = whole.curve()
    best = whole.best("train")
    assert best.oracle and best.split == "train" and best.miou == miou.max()
    assert best.choice == f"background threshold {thresholds[miou.argmax()]:.4g}"
    fixed = whole.scores_at(0.4, "train")
    assert not fixed.oracle and fixed.choice == "" and fixed.split == "train" and fixed.miou == miou[40]


def test_absent_classes_take_no_part():
    maps = torch.tensor([0.2, 0.9]).view(1, 2, 1, 1)
    sweep = ThresholdSweep(2, thresholds=[0.1])
    sweep.update(maps, torch.ones(1, 1, 1, dtype=torch.long), torch.tensor([[1.0, 0.0]]))
    assert sweep.scores_at(0.1).miou == 1.0


def test_bad_sweeps_are_refused():
    maps, truth, labels = sweep_data()
    sweep = ThresholdSweep(3)
    for bad in (maps - 0.5, maps * 2, maps * float("nan")):
        with pytest.raises(ValueError, match="maps: found values"):
            sweep.update(bad, truth)
    with pytest.raises(ValueError, match=r"maps: found shape \(3, 2, 6, 7\)"):
        sweep.update(maps[:, :2], truth)
    with pytest.raises(ValueError, match=r"expected \(3, 3, 5, 7\)"):
        sweep.update(maps, truth[:, :5])
    with pytest.raises(ValueError, match="labels: found shape"):
        sweep.update(maps, truth, labels[:2])
    with pytest.raises(ValueError, match=r"truth: found values \[9\]"):
        sweep.update(maps, truth.where(truth != 255, torch.tensor(9)))
    with pytest.raises(ValueError, match="no counted pixel"):
        sweep.curve()
    sweep.update(maps, truth)
    with pytest.raises(ValueError, match="threshold: found 0.405"):
        sweep.scores_at(0.405)
    for bad in ([], [0.5, 0.5], [0.5, 0.4], [0.1, 1.5], [-0.1, 0.5]):
        with pytest.raises(ValueError, match="thresholds"):
            ThresholdSweep(3, thresholds=bad)


# ------------------------------------------------------------------ average precision


def test_average_precision_worked_by_hand():
    scores = [[0.9], [0.8], [0.7], [0.6]]
    value, ap = mean_average_precision(scores, [[1], [0], [1], [0]])
    assert value == ap[0] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    tied, _ = mean_average_precision([[0.5]] * 4, [[1], [0], [1], [0]])
    assert tied == 0.5  # all enter at once: precision 2/4 at recall 1


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_agrees_with_the_ranks(seed):
    rng = np.random.default_rng(seed)
    scores, labels = rng.normal(size=(40, 5)).round(1), rng.random((40, 5)) < 0.2
    labels[:, 2] = False
    value, ap = mean_average_precision(torch.from_numpy(scores), torch.from_numpy(labels))
    expected = [naive.average_precision(scores[:, c].tolist(), labels[:, c].tolist()) for c in range(5)]
    np.testing.assert_allclose(ap, expected, rtol=0, atol=1e-12)
    assert math.isnan(ap[2]) and abs(value - naive.mean(expected)) < 1e-12
    order = rng.permutation(40)
    assert mean_average_precision(scores[order], labels[order])[0] == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("scores, labels, message", [
    (np.zeros((3, 2)), np.ones((2, 3)), "shapes"),
    (np.zeros(3), np.ones(3), "shapes"),
    (np.full((3, 2), np.nan), np.ones((3, 2)), "scores: found nan"),
    (np.zeros((3, 2)), np.zeros((3, 2)), "at least one 1"),
    (np.zeros((3, 2)), np.full((3, 2), 0.5), "only 0 and 1"),
])  # fmt: skip
def test_bad_rankings_are_refused(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        mean_average_precision(scores, labels)
