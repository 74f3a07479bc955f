"""Reports: each number is the one that the plain library calls give, and every one of them survives JSON."""
import json
import platform
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wsss_lib import create_model, evaluate, localize, normalize_maps, pseudo_labels
from wsss_lib.data.sample import TRUTHS
from wsss_lib.data.toyvoc import CONTEXT_ID, PART_GROUPS, QUADRUPEDS, build_toyvoc
from wsss_lib.data.transforms import EvalTransform
from wsss_lib.data.voc import VOC, VOC_CLASSES
from wsss_lib.evaluation import mean_average_precision
from wsss_lib.ledgers import write_results
from wsss_lib.localization import affinity_cam
from wsss_lib.paths import REPOSITORY
from wsss_lib.refinement import crf_labels, random_walk
from wsss_lib.reports import (
    localize_split,
    measure_phenomena,
    report,
    sweep_thresholds,
    write_labels,
    write_pseudo_labels,
)

FIXED = .25
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> VOC:
    """Six scenes with all truths."""
    root = build_toyvoc(tmp_path_factory.mktemp("toyvoc"), 0, 6, 0, processes=1, progress=False)
    return VOC(root, "val", truth=TRUTHS)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model("cam", "toyvit", pretrained=False).eval()


@pytest.fixture(scope="module")
def result(model, data) -> dict:
    return report(model, data, background=FIXED, batch_size=4, **QUIET)


@pytest.fixture(scope="module")
def maps(model, data) -> torch.Tensor:
    """(N, C, h, w), without the module under test."""
    transform = EvalTransform(mean=model.data_config["mean"], std=model.data_config["std"])
    images = torch.stack([transform(sample)["image"] for sample in data])
    return localize(model, images, data.labels)


def stacked(data: VOC, field: str) -> torch.Tensor:
    """A truth of all pictures: (N, H, W)."""
    return torch.stack([torch.as_tensor(getattr(sample, field)) for sample in data]).long()


def predictions(data: VOC, maps: torch.Tensor, background: float) -> torch.Tensor:
    return pseudo_labels(maps, data.labels, background=background, size=stacked(data, "mask").shape[-2:])


def test_scores_are_those_of_the_pseudo_labels(model, data, maps, result):
    split = localize_split(model, data, batch_size=4, **QUIET)
    sweep, masks = sweep_thresholds(split), stacked(data, "mask")
    best = evaluate(predictions(data, maps, result["best"]["background"]), masks)
    assert (best.confusion == sweep.best().confusion).all() and best.miou == sweep.best().miou
    assert best.confusion[:, 1:].any(), "some of it must be foreground"
    assert result["best"]["miou"] == round(best.miou, 4)
    assert result["best"]["iou"] == [None if np.isnan(v) else round(v, 4) for v in best.iou]
    fixed = evaluate(predictions(data, maps, FIXED), masks)
    assert fixed.miou == sweep.scores_at(FIXED).miou
    assert (result["fixed"]["background"], result["fixed"]["miou"]) == (FIXED, round(fixed.miou, 4))


def test_no_threshold_beats_the_best(data, maps, result):
    masks = stacked(data, "mask")
    others = [evaluate(predictions(data, maps, t / 20), masks).miou for t in range(21)]
    assert result["best"]["miou"] >= round(max(others), 4) > round(min(others), 4)


def test_every_score_says_what_it_was_measured_on(result):
    assert (result["split"], result["pictures"]) == ("val", 6)
    assert (result["labels"], result["method"]) == ("given", "cam")
    assert result["best"]["oracle"] is True and result["fixed"]["oracle"] is False


def test_mean_average_precision_is_that_of_the_logits(model, data, result):
    transform = EvalTransform(mean=model.data_config["mean"], std=model.data_config["std"])
    with torch.no_grad():
        logits = model(torch.stack([transform(sample)["image"] for sample in data]))
    assert result["mean_average_precision"] == round(mean_average_precision(logits, data.labels)[0], 4)


def test_coverage_is_that_of_a_direct_count(data, maps, result):
    prediction = predictions(data, maps, result["best"]["background"])
    masks, parts = stacked(data, "mask"), stacked(data, "parts")
    wanted = torch.isin(masks, torch.tensor([VOC_CLASSES.index(name) + 1 for name in QUADRUPEDS]))
    for group, ids in PART_GROUPS.items():
        where = wanted & torch.isin(parts, torch.tensor(ids))
        assert where.any()
        share = (prediction[where] == masks[where]).double().mean().item()
        assert result["coverage"][group] == round(share, 4)
    assert result["coverage"].keys() == PART_GROUPS.keys()


def test_context_activation_is_that_of_a_direct_count(data, maps, result):
    prediction = predictions(data, maps, result["best"]["background"])
    background, contexts = stacked(data, "mask") == 0, stacked(data, "contexts")
    called = (prediction[background] > 0).double().mean().item()
    assert result["background_called_foreground"] == round(called, 4) > 0
    direct: dict[str, dict[str, float]] = {name: {} for name in VOC_CLASSES}
    for c, name in enumerate(VOC_CLASSES):
        with_class = (data.labels[:, c] > 0)[:, None, None]
        for context, number in CONTEXT_ID.items():
            seen = prediction[background & with_class & (contexts == number)]
            if len(seen):
                direct[name][context] = round((seen == c + 1).double().mean().item(), 4)
    assert result["context_activation"] == direct
    assert any(rate > 0 for rates in direct.values() for rate in rates.values())


def test_a_threshold_that_was_not_swept_is_refused(model, data):
    with pytest.raises(ValueError, match="threshold: found 0.405"):
        report(model, data, background=.405, **QUIET)


# ---- JSON


def test_a_report_comes_back_from_json_as_it_was(model, data):
    whole = report(model, data, scales=(1., .5), flip=True, **QUIET)
    assert json.loads(json.dumps(whole, allow_nan=False)) == whole
    assert whole["options"] == {"scales": [1., .5], "flip": True}       # what moves a number, and no more
    assert None in whole["best"]["iou"], "six scenes do not show all classes"


def test_nothing_to_measure_is_none(model, data):
    """Pictures without a quadruped have no coverage."""
    few = VOC(data.root, "val", truth=TRUTHS)
    quadrupeds = [VOC_CLASSES.index(name) for name in QUADRUPEDS]
    few.names = [name for name, row in zip(data.names, data.labels) if not row[quadrupeds].any()]
    assert 0 < len(few) < 6
    result = report(model, few, **QUIET)
    assert set(result["coverage"].values()) == {None}
    json.dumps(result, allow_nan=False)


def test_limit_takes_the_first_pictures(model, data):
    split = localize_split(model, data, limit=2, **QUIET)
    assert [sample.name for sample in split.samples] == data.names[:2] and len(split.maps) == 2


def test_power_and_refinement_are_those_of_the_library(model, data, maps):
    split = localize_split(model, data, batch_size=6, power=.5, refine="par", limit=3, **QUIET)
    torch.testing.assert_close(split.maps, maps[:3].sqrt(), atol=1e-4, rtol=1e-4)
    images = torch.stack([torch.as_tensor(sample.image) for sample in split.samples])
    expected = pseudo_labels(split.maps, split.labels, images, background=FIXED, refine="par")
    found = torch.stack([split.pseudo_labels(i, FIXED) for i in range(3)])
    assert torch.equal(found, expected)
    assert not torch.equal(found, pseudo_labels(split.maps, split.labels, images, background=FIXED))
    score = sweep_thresholds(split).scores_at(FIXED)
    assert (score.confusion == evaluate(expected, stacked(data, "mask")[:3]).confusion).all()


def test_minmax_subtracts_the_minimum(model, data, maps):
    split = localize_split(model, data, batch_size=6, minmax=True, power=.5, **QUIET)
    expected = normalize_maps(maps, "minmax").sqrt()
    torch.testing.assert_close(split.maps, expected, atol=1e-4, rtol=1e-4)


def test_a_crf_refines_the_masks_of_both_thresholds(model, data, maps, result):
    found = report(model, data, background=FIXED, batch_size=4, refine="crf", **QUIET)
    images = torch.stack([torch.as_tensor(sample.image) for sample in data])
    for name in ("best", "fixed"):
        assert found[name]["background"] == result[name]["background"]
        masks = crf_labels(predictions(data, maps, found[name]["background"]), data.labels, images)
        expected = evaluate(masks, stacked(data, "mask")).miou
        again = report(model, data, background=FIXED, refine="crf", split=localize_split(model, data, batch_size=4, **QUIET),
                       **QUIET)
        assert again[name] == found[name] and again["coverage"] == found["coverage"]
        assert found[name]["miou"] == pytest.approx(expected, abs=1e-4) != result[name]["miou"]


def test_affinity_maps_are_reported(data):
    torch.manual_seed(0)
    network = create_model("afa", "toyvit", pretrained=False)
    split = localize_split(network, data, "affinity", scales=(1., .5), flip=False, radius=3, limit=2, **QUIET)
    transform = EvalTransform(mean=network.data_config["mean"], std=network.data_config["std"])
    images = torch.stack([transform(data[i])["image"] for i in range(2)])
    found = affinity_cam(network, images, data.labels[:2], (1., .5), flip=False)
    expected = random_walk(found.on_grid(), found.affinity, data.labels[:2], None, 3)
    torch.testing.assert_close(split.maps, expected)
    without = localize_split(network, data, "affinity", walk=False, scales=(1., .5), flip=False, limit=2, **QUIET)
    torch.testing.assert_close(without.maps, found.maps)


def test_labels_are_written_once_and_without_a_truth(model, data, maps, tmp_path):
    blind = VOC(data.root, "val")
    written = {"background": FIXED, "folder": tmp_path, "chunk": 4, **QUIET}
    assert write_labels(model, blind, limit=5, **written) == 5
    first = tmp_path / f"{data.names[0]}.png"
    first.write_bytes(b"kept")
    assert write_labels(model, blind, **written) == 1 and first.read_bytes() == b"kept"
    expected = predictions(data, maps, FIXED)
    for i, name in enumerate(data.names[1:], 1):
        assert (np.array(Image.open(tmp_path / f"{name}.png")) == expected[i].numpy()).all()
    assert len(list(tmp_path.iterdir())) == 6


def test_the_size_of_a_batch_makes_no_difference(model, data, maps):
    split = localize_split(model, data, batch_size=1, **QUIET)
    torch.testing.assert_close(split.maps, maps, atol=1e-4, rtol=1e-4)
    coverage, activation = measure_phenomena(split, FIXED)
    assert coverage.pixels.sum() > 0 and activation.pixels.sum() > 0


def test_results_say_what_made_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["wsss_lib", "evaluate", "--split", "val", "--root", f"{REPOSITORY}/data/x"])
    path = write_results(tmp_path / "new" / "cam.json", {"miou": .5})
    assert path == tmp_path / "new" / "cam.json"
    found = json.loads(path.read_text())
    commit = found.pop("commit")
    assert commit is None or re.fullmatch("[0-9a-f]{7,}", commit), "None outside a git checkout"
    assert found == {
        "command": "python -m wsss_lib evaluate --split val --root data/x", "torch": torch.__version__,
        "python": platform.python_version(), "machine": platform.machine(), "miou": .5}
    assert [f.name for f in path.parent.iterdir()] == ["cam.json"], "no temporary file stays"


def test_results_that_json_cannot_hold_leave_the_old_file_alone(tmp_path):
    path = write_results(tmp_path / "cam.json", {"miou": .5})
    before = path.read_bytes()
    with pytest.raises(ValueError):
        write_results(path, {"miou": float("nan")})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_written_pseudo_labels_are_the_scored_ones(model, data, maps, tmp_path: Path):
    split = localize_split(model, data, **QUIET)
    scores = write_pseudo_labels(split, FIXED, tmp_path / "masks")
    files = sorted((tmp_path / "masks").glob("*.png"))
    assert [f.stem for f in files] == sorted(data.names)
    for i, name in enumerate(data.names):
        written = np.array(Image.open(tmp_path / "masks" / f"{name}.png"))
        assert (written == split.pseudo_labels(i, FIXED).numpy()).all() and written.any()
    again = evaluate([np.array(Image.open(tmp_path / "masks" / f"{name}.png")) for name in data.names],
                     stacked(data, "mask"))
    assert (again.confusion == scores.confusion).all()
    record = json.loads((tmp_path / "masks" / "scores.json").read_text())
    assert (record["background"], record["miou"], record["split"]) == (FIXED, scores.miou, "val")
    assert record["oracle"] is False


def test_a_model_in_training_mode_is_scored_without_its_dropout(data):
    torch.manual_seed(0)
    dropping = create_model("cam", "toyvit", pretrained=False, drop_path_rate=.9)
    expected = localize_split(dropping.eval(), data, batch_size=4, **QUIET)
    dropping.train()
    found = localize_split(dropping, data, batch_size=4, **QUIET)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=0)
    torch.testing.assert_close(found.maps, expected.maps, rtol=0, atol=0)
    assert dropping.training, "the model is left in the mode it was in"
