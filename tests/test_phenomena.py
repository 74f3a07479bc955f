"""Partial and false activation as counts: examples worked by hand, streaming, refusals."""

import math

import numpy as np
import pytest
import torch

from wsss_lib.phenomena import ContextActivation, PartCoverage


def test_part_coverage_worked_by_hand():
    mask = np.array([[8, 8, 8, 12], [8, 255, 0, 15]])
    parts = np.array([[1, 2, 2, 1], [3, 1, 2, 1]])  # 1 head, 2 and 3 body
    prediction = np.array([[8, 8, 0, 8], [12, 8, 8, 15]])
    coverage = PartCoverage({"head": (1,), "body": (2, 3), "tail": (9,)}, classes=(8, 12, 13))
    coverage.update(prediction, mask, parts)
    # head: cat right, dog taken for a cat (the person does not count); body: one of three
    overall = coverage.coverage()
    assert overall["head"] == 0.5 and overall["body"] == pytest.approx(1 / 3) and math.isnan(overall["tail"])
    per_class = coverage.per_class()
    assert list(per_class) == [8, 12, 13]
    assert per_class[8]["head"] == 1 and per_class[12]["head"] == 0
    assert per_class[8]["body"] == pytest.approx(1 / 3) and math.isnan(per_class[13]["head"])


def test_part_coverage_streams_and_is_one_for_the_truth():
    rng = np.random.default_rng(0)
    mask, parts, prediction = (rng.integers(0, high, (4, 9, 9)) for high in (4, 5, 4))
    groups = {"head": (1,), "body": (2, 4)}
    perfect, whole, single = (PartCoverage(groups, classes=(1, 3)) for _ in range(3))
    perfect.update(mask, mask, parts)
    assert perfect.coverage() == {"head": 1.0, "body": 1.0}
    whole.update(prediction, mask, parts)
    for i in range(4):
        single.update(torch.from_numpy(prediction[i]), mask[i], parts[i].astype(np.uint8))
    assert whole.coverage() == single.coverage() and whole.per_class() == single.per_class()
    where = np.isin(mask, (1, 3)) & np.isin(parts, (2, 4))
    assert whole.coverage()["body"] == pytest.approx((prediction == mask)[where].mean())


def test_context_activation_worked_by_hand():
    # the first picture holds a boat (4), the second a boat and a bird (3)
    mask = np.array([[[0, 0, 4], [0, 0, 255]], [[0, 0, 4], [0, 3, 0]]])
    contexts = np.array([[[1, 1, 1], [1, 2, 1]], [[1, 1, 1], [2, 2, 0]]])  # 1 water, 2 sky
    prediction = np.array([[[4, 4, 4], [0, 3, 4]], [[4, 0, 4], [3, 3, 5]]])
    labels = torch.zeros(2, 20)
    labels[0, 3] = labels[1, 3] = labels[1, 2] = 1
    activation = ContextActivation(20, {"water": 1, "sky": 2, "rails": 3})
    activation.update(prediction, mask, contexts, labels)
    rates = activation.rates()
    assert rates.shape == (20, 3)
    np.testing.assert_allclose(rates[3], [3 / 5, 0, np.nan])  # boat: 2 of 3 and 1 of 2 water pixels
    np.testing.assert_allclose(rates[2], [0, 1, np.nan])  # bird: only the second picture, its one sky pixel
    assert np.isnan(np.delete(rates, [2, 3], axis=0)).all()
    assert activation.background_rate() == pytest.approx(6 / 8)  # whatever the context and the class


def test_context_activation_streams():
    rng = np.random.default_rng(2)
    mask, contexts, prediction = (rng.integers(0, high, (4, 9, 9)) for high in (4, 3, 4))
    labels = (rng.random((4, 3)) < 0.5).astype(np.float32)
    whole, single = (ContextActivation(3, {"water": 1, "sky": 2}) for _ in range(2))
    whole.update(prediction, mask, contexts, labels)
    for i in range(4):
        single.update(prediction[i], mask[i], contexts[i], labels[i])
    np.testing.assert_array_equal(whole.rates(), single.rates())
    assert whole.background_rate() == single.background_rate() == (prediction > 0)[mask == 0].mean()


def test_bad_phenomena_are_refused():
    mask = np.zeros((2, 3), int)
    head = {"head": (1,)}
    for groups, classes in (({}, (1,)), (head, ()), (head, (0, 1)), (head, (21,))):
        with pytest.raises(ValueError, match="classes"):
            PartCoverage(groups, classes)
    with pytest.raises(ValueError, match="parts: found shape"):
        PartCoverage({"head": (1,)}, (1,)).update(mask, mask, mask.T)
    with pytest.raises(ValueError, match="contexts"):
        ContextActivation(3, {})
    activation = ContextActivation(3, {"water": 1})
    assert math.isnan(activation.background_rate()) and np.isnan(activation.rates()).all()
    with pytest.raises(ValueError, match="contexts: found shape"):
        activation.update(mask, mask, mask.T, np.ones(3))
    with pytest.raises(ValueError, match=r"labels: found shape \(1, 2\)"):
        activation.update(mask, mask, mask, np.ones(2))
