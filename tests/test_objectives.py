"""Objectives: each stage minimises the losses it names, made of the library's own pieces."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wsss_lib import create_model
from wsss_lib.localization import affinity_cam, getam
from wsss_lib.refinement import ContrastSaliency, complete_labels, propagated_labels, reliable_labels, scored_maps
from wsss_lib.training.losses import (
    affinity_labels,
    affinity_loss,
    balanced_segmentation_loss,
    consistency_loss,
    dense_energy_loss,
    saliency_loss,
)
from wsss_lib.training.objectives import AcrObjective, AfaObjective, GetamObjective, RetrainingObjective

BOXES = torch.tensor([[0, 0, 32, 48], [8, 4, 32, 44]])


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (2, 3, 32, 48), generator=generator, dtype=torch.uint8)
    labels = torch.zeros(2, 5)
    labels[0, [1, 3]] = labels[1, 2] = 1
    return {"image": (pixels.float() / 255 - 0.5) / 0.25, "image_uint8": pixels, "labels": labels, "box": BOXES}


@pytest.fixture
def afa():
    torch.manual_seed(0)
    return create_model("afa", "toyvit", num_classes=5, pretrained=False).eval()


def test_afa_goes_through_its_stages(afa, batch):
    objective = AfaObjective(1, 2, 0.3, 0.7, scales=(1.0, 1.5), backgrounds=(0.6, 0.5), radius=2, num_iter=3)
    found = affinity_cam(afa, batch["image"], batch["labels"], (1.0, 1.5))
    out = afa.forward_segmentation(batch["image"])
    classes = F.multilabel_soft_margin_loss(out.logits, batch["labels"])
    pictures = batch["labels"], batch["image_uint8"], (0.6, 0.5), BOXES
    sure = reliable_labels(found.maps, *pictures, 3)
    spread = propagated_labels(found.on_grid(), found.affinity, *pictures, 2, 3)
    assert not torch.equal(sure, spread)  # else the third stage could not be told from the second
    pairs = 0.7 * affinity_loss(out.affinity, affinity_labels(sure, 2, 8))
    for step, masks in ((0, None), (1, sure), (2, spread)):
        expected = {"class": classes}
        if masks is not None:
            segmentation = 0.3 * balanced_segmentation_loss(out.segmentation, masks, average=True)
            expected |= {"segmentation": segmentation, "affinity": pairs}
        losses = objective(afa, batch, step)
        assert losses.keys() == expected.keys()
        for name, value in losses.items():  # the same operations: rounding of other batch sizes at most
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    sum(losses.values()).backward()
    assert afa.affinity.weight.grad.abs().sum() > 0 and afa.classifier.weight.grad.abs().sum() > 0


def test_afa_trains_in_half_precision(afa, batch):
    with torch.autocast("cpu", torch.bfloat16):
        losses = AfaObjective(0, 0, radius=2)(afa.train(), batch, 0)
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())


def test_getam_makes_its_labels_and_learns_from_them(batch):
    torch.manual_seed(0)
    model = create_model("getam", "toyvit", num_classes=5, pretrained=False).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    objective = GetamObjective(1, start_layer=2, cut=0.8, opening=2, energy_weight=1e-3)
    assert objective(model, batch, 0).keys() == {"class"}
    losses = objective(model, batch, 1)
    assert all(p.grad is None for p in model.parameters()) and model.training  # maps leave no trace
    maps = getam(model.eval(), batch["image"], batch["labels"], 2)
    scores = scored_maps(maps, batch["labels"], images=batch["image_uint8"], refine="pamr")
    saliency = ContrastSaliency()(batch)
    masks = complete_labels(scores, batch["labels"], saliency, 0.8, opening=2).masks
    assert masks[0].unique().numel() > 1
    masks[1, :8] = masks[1, :, :4] = masks[1, :, 44:] = 255  # outside of the second box
    out = model.forward_segmentation(batch["image"])
    expected = {
        "class": F.multilabel_soft_margin_loss(out.logits, batch["labels"]),
        "segmentation": balanced_segmentation_loss(out.segmentation, masks),
        "saliency": saliency_loss(out.segmentation, saliency),
        "energy": dense_energy_loss(out.segmentation, batch["image_uint8"], masks, BOXES, weight=1e-3),
    }
    for name, value in expected.items():  # float32; without dropout the mode makes no difference
        torch.testing.assert_close(losses[name], value, rtol=1e-5, atol=1e-6)
    sum(losses.values()).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.startswith(("decoder.head", "classifier")))


def test_acr_hands_its_options_on(batch):
    model = create_model("acr", "toyvit", num_classes=5, pretrained=False).eval()
    found = AcrObjective("vflip", 3.0, 0.0)(model, batch, 7)
    expected = consistency_loss(model, batch["image"], batch["labels"], "vflip", 3.0, 0.0)
    assert found.keys() == expected.keys() and found["affinity"] == 0
    for name in found:
        torch.testing.assert_close(found[name], expected[name])


def test_retraining_clips_by_hand():
    """Two labels, four pixels in patches of 1x2: losses known, one stands out, one pixel is ignored."""
    losses = torch.tensor([[[0.1, 1.0], [0.4, 9.9]]])
    logits = torch.stack([torch.zeros_like(losses), losses.expm1().log()], 1)  # CE of label 0 is log(1 + e^x)
    mask = torch.tensor([[[0, 0], [0, 255]]])
    network = lambda images: logits
    batch = {"image": torch.zeros(1, 3, 2, 2), "mask": mask}
    plain = RetrainingObjective(start=0, patch=2)(network, batch, 0)
    assert plain["segmentation"].item() == pytest.approx((0.1 + 1.0 + 0.4) / 4)  # the ignored pixel counts
    clipped = RetrainingObjective(start=1.2, patch=2)(network, batch, 0)
    threshold = 1.5 / 4
    assert clipped["segmentation"].item() == pytest.approx((0.1 + threshold + threshold + 0) / 4)
