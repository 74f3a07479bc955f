"""Masks of a network that segments, and their score: the same as by the plain calls."""

import pytest
import torch
import torch.nn.functional as F

from wsss_lib import create_model, evaluate
from wsss_lib.data.toyvoc import build_toyvoc
from wsss_lib.data.transforms import EvalTransform
from wsss_lib.data.voc import VOC
from wsss_lib.segmentation import segment, segmentation_report


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return VOC(build_toyvoc(tmp_path_factory.mktemp("toyvoc"), 0, 3, 0, processes=1, progress=False), "val", ["mask"])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("segmenter", "toyvit", pretrained=False)


def test_one_view_is_the_softmax_of_the_logits(model):
    images = torch.randn(2, 3, 24, 40)
    with torch.no_grad():
        expected = model.eval()(images).softmax(1)
    found = segment(model.train(), images)
    assert model.training and not found.requires_grad
    torch.testing.assert_close(found, expected)


def test_views_are_mirrored_back_and_averaged(model):
    images = torch.randn(1, 3, 32, 48)
    found = segment(model, images, (1.0, 0.5), flip=True)
    with torch.no_grad():
        total = 0
        for size in ((32, 48), (16, 24)):
            view = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
            for mirrored in (False, True):
                logits = model.eval()(view.flip(-1) if mirrored else view)
                logits = logits.flip(-1) if mirrored else logits
                total = total + F.interpolate(logits, (32, 48), mode="bilinear", align_corners=False).softmax(1) / 4
    torch.testing.assert_close(found, total, atol=1e-5, rtol=0)  # float32 sums of four
    torch.testing.assert_close(segment(model, images.flip(-1), (1.0, 0.5), flip=True).flip(-1), found, atol=1e-5, rtol=0)


def test_afa_decodes_its_own_masks(data):
    model = create_model("afa", "toyvit", pretrained=False)
    images = torch.randn(1, 3, 16, 24)
    found = segment(model, images)
    with torch.no_grad():
        logits = model.eval().forward_segmentation(images).segmentation
    expected = F.interpolate(logits, (16, 24), mode="bilinear", align_corners=False).softmax(1)
    torch.testing.assert_close(found, expected)


def test_a_classifier_does_not_segment():
    with pytest.raises(ValueError, match="model: found CamViT, which returns"):
        segment(create_model("cam", "toyvit", pretrained=False), torch.zeros(1, 3, 16, 16))


def test_report_is_evaluate(model, data):
    found = segmentation_report(model, data, batch_size=2, progress=False)
    transform = EvalTransform(mean=model.data_config["mean"], std=model.data_config["std"])
    predictions = [segment(model, transform(sample)["image"][None])[0].argmax(0) for sample in data]
    expected = evaluate(predictions, [torch.as_tensor(sample.mask) for sample in data])
    assert found["miou"] == pytest.approx(expected.miou, abs=1e-4) and found["pictures"] == 3
    assert len(found["iou"]) == 21 and found["labels"] == "none"
    assert segmentation_report(model, data, limit=1, size=64, progress=False)["pictures"] == 1
