"""Segmenter: the published numbers, backbones, any size of image, sliding windows, wrong inputs."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from reference.naive_attention import formula_weight
from safetensors.torch import load_file, save_file
from torch import nn

from wsss_lib import load_official
from wsss_lib.models import MaskTransformer, Segmenter, create_backbone, sliding_window
from wsss_lib.models.official import SEGMENTER_NAMES
from wsss_lib.models.published import published_name
from wsss_lib.models.segmenter import window_starts

GOLDEN = Path(__file__).parent / "golden"
CASES = {"weaktr_segmenter": ("native", "resize", "pad"), "weaktr_segmenter_distilled": ("native", "resize")}
INPUTS = load_file(GOLDEN / "weaktr_segmenter.safetensors")  # both networks saw the same pictures
# Of a tensor's largest value: re-running the published code with other thread counts moves outputs by 2e-5,
# gradients by 1.1e-5.
OUTPUTS, GRADIENTS = 2e-5, 1.1e-5


def checkpoint(name):
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    return {key: torch.from_numpy(formula_weight(key, tuple(shape), facts["salt"])).float()
            for key, shape in facts["state_dict"].items()}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    file = tmp_path_factory.mktemp("segmenter") / "checkpoint.safetensors"
    save_file(checkpoint(request.param), file)
    facts = json.loads((GOLDEN / f"{request.param}.json").read_text())
    tensors = load_file(GOLDEN / f"{request.param}.safetensors")
    return request.param, load_official("weaktr", file), tensors, facts


def assert_recorded(found, key, tensors, strides, tolerance):
    """found: whole tensor; recorded: all of it, or every n-th number."""
    recorded = tensors.get(key)
    if recorded is None:
        recorded, found = tensors[f"{key}.sub"], found.flatten()[:: strides[key]]
    assert found.shape == recorded.shape
    error = (found - recorded).abs().max() / recorded.abs().max()
    assert error <= tolerance, f"{key}: off by {error:.1e} of the largest"


def test_official_masks(case):
    name, model, tensors, facts = case
    assert isinstance(model, Segmenter) and model.published and not model.training
    assert (model.num_classes, model.num_prefix_tokens, model.patch_stride) == (20, 1 + ("dist" in name), 16)
    heads = ["encoder.head.bias", "encoder.head.weight"]
    distilled = ["encoder.head_dist.bias", "encoder.head_dist.weight"]
    assert model.unused_weights == heads + distilled * ("dist" in name) and model.missing_weights == []
    for tag in CASES[name]:
        images = INPUTS[f"in.{tag}.image"]
        with torch.no_grad():
            logits = model(images)
        assert logits.shape == (1, 21, *images.shape[2:])
        assert_recorded(logits, f"out.{tag}.masks", tensors, facts["strides"], OUTPUTS)


def test_official_gradients(case):
    _, model, tensors, facts = case
    model.zero_grad()
    loss = F.cross_entropy(model(INPUTS["in.native.image"]), INPUTS["in.native.gt"].long(), ignore_index=255)
    assert loss.item() == pytest.approx(tensors["out.native.loss"].item(), rel=OUTPUTS)
    loss.backward()
    parameters = {published_name(key, SEGMENTER_NAMES): p for key, p in model.named_parameters()}
    recorded = {key.removesuffix(".sub") for key in tensors if key.startswith("grad.")}
    assert len(recorded) == 6
    for key in recorded:
        found = parameters[key.removeprefix("grad.native.")].grad
        assert_recorded(found, key, tensors, facts["strides"], GRADIENTS)
    assert all(p.grad is not None for p in model.parameters())


def test_official_network_that_is_read_after_each_block(tmp_path):
    """The published variant with two outputs has the same tensors; the first is read one block earlier."""
    save_file(checkpoint("weaktr_multisegmenter"), tmp_path / "x.safetensors")
    model = load_official("weaktr", tmp_path / "x.safetensors")
    tensors = load_file(GOLDEN / "weaktr_multisegmenter.safetensors")
    strides = json.loads((GOLDEN / "weaktr_multisegmenter.json").read_text())["strides"]
    with torch.no_grad():
        layers, logits = model.forward_layers(tensors["in.image"]), model(tensors["in.image"])
    assert len(layers) == 2 and torch.equal(layers[-1], logits)
    for number, found in enumerate(layers, start=1):
        assert_recorded(found, f"out.masks{number}", tensors, strides, OUTPUTS)


def without(prefix):
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(prefix)]


@pytest.mark.parametrize("change, message", [
    (without("decoder.proj_patch"), r"proj_patch: found no such tensor, expected shape \(128, 128\)"),
    (without("decoder.blocks"), "decoder.blocks.0: found no such tensors"),
    (lambda t: t.update({"decoder.x": torch.zeros(2)}), r"x: found a tensor of shape \(2,\), expected none"),
    (lambda t: t.update({"decoder.mask_norm.bias": torch.zeros(20)}), r"found shape \(20,\), expected \(21"),
])  # fmt: skip
def test_official_refuses(change, message, tmp_path):
    tensors = checkpoint("weaktr_segmenter")
    change(tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        load_official("weaktr", tmp_path / "x.safetensors")


# ------------------------------------------------------------------ the network

BACKBONES = {  # name: (pixels per token, prefix tokens)
    "toyvit": (8, 1),
    "deit_tiny_distilled_patch16_224": (16, 2),
    "vit_small_patch14_dinov2": (14, 1),
    "vit_small_patch16_dinov3": (16, 5),
    "eva02_tiny_patch14_224": (14, 1),
    "vit_pwee_patch16_reg1_gap_256": (16, 1),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_of_timm_and_images_of_any_size(name):
    stride, prefix = BACKBONES[name]
    torch.manual_seed(0)
    model = Segmenter(create_backbone(name, depth=2), num_classes=3)
    assert (model.patch_stride, model.num_prefix_tokens, model.published) == (stride, prefix, False)
    logits = model(torch.randn(2, 3, 2 * stride - 3, 3 * stride + 1))
    assert logits.shape == (2, 4, 2 * stride - 3, 3 * stride + 1)
    F.cross_entropy(logits, torch.zeros(2, *logits.shape[2:], dtype=torch.long)).backward()
    # keys and values of a prefix token count even where the token itself is dropped
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def written_out(model, images):
    """The decoder on one picture, in the paper's words."""
    height, width = images.shape[2:]
    padded = F.pad(images, (0, -width % 8, 0, -height % 8))
    tokens = model.backbone.forward_features(padded)[:, model.num_prefix_tokens :]
    decoder = model.decoder
    count = tokens.shape[1]
    x = torch.cat([tokens @ decoder.project.weight.T + decoder.project.bias,
                   decoder.label_tokens.repeat(len(images), 1, 1)], dim=1)
    for block in decoder.blocks:
        x = block(x)
    x = decoder.norm(x)
    patches, labels = x[:, :count] @ decoder.patch_projection, x[:, count:] @ decoder.label_projection
    masks = torch.empty(len(images), count, decoder.num_labels, dtype=images.dtype)
    for b in range(len(images)):
        for j in range(count):
            cosines = [(patches[b, j] @ label) / patches[b, j].norm() / label.norm() for label in labels[b]]
            masks[b, j] = decoder.mask_norm(torch.stack(cosines))
    grid = (padded.shape[2] // 8, padded.shape[3] // 8)
    pixels = F.interpolate(masks.transpose(1, 2).unflatten(2, grid), padded.shape[2:], mode="bilinear")
    return pixels[:, :, :height, :width]


def test_agrees_with_the_decoder_written_out():
    torch.manual_seed(0)
    model = Segmenter(create_backbone("toyvit", depth=1), num_classes=4, depth=3).double().eval()
    nn.init.normal_(model.decoder.label_tokens)
    nn.init.normal_(model.decoder.mask_norm.weight)
    images = torch.randn(2, 3, 21, 32, dtype=torch.float64)
    torch.testing.assert_close(model(images), written_out(model, images), rtol=0, atol=1e-12)
    layers = model.forward_layers(images)
    assert len(layers) == 3 and not torch.allclose(layers[0], layers[2])


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    decoder, patches = MaskTransformer(64, 5, dropout=0.5), torch.randn(1, 6, 64)
    assert decoder(patches).shape == (1, 5, 6) and not torch.equal(decoder(patches), decoder(patches))
    decoder.eval()
    assert torch.equal(decoder(patches), decoder(patches))
    still = MaskTransformer(64, 5, dropout=0.0)
    assert torch.equal(still(patches), still(patches))


def test_a_token_of_zeros_has_no_nan():
    decoder = MaskTransformer(64, 3).eval()
    nn.init.zeros_(decoder.patch_projection)
    assert decoder(torch.randn(1, 4, 64)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precisions(dtype):
    torch.manual_seed(0)
    model = Segmenter(create_backbone("toyvit", depth=1), num_classes=2).eval()
    images = torch.randn(1, 3, 16, 24)
    expected, found = model(images), model.to(dtype)(images.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-4 if dtype == torch.float64 else 0.2)


# ------------------------------------------------------------------ sliding windows


def test_where_windows_start():
    assert window_starts(480, 480, 320) == window_starts(100, 480, 320) == [0]
    assert window_starts(481, 480, 320) == [0, 1]
    assert window_starts(800, 480, 320) == [0, 320]
    assert window_starts(801, 480, 320) == [0, 320, 321]
    assert window_starts(1500, 480, 320) == [0, 320, 640, 960, 1020]
    for side in range(1, 60):
        starts = window_starts(side, 7, 5)
        assert sorted(set(starts)) == starts and starts[-1] + 7 >= side
        assert {x for s in starts for x in range(s, min(s + 7, side))} == set(range(side))


def test_windows_are_averaged_where_they_overlap():
    """A model that answers with what it sees, plus the window's mean: averages can be told by hand."""
    def model(images):
        assert images.shape[2:] in {(6, 6), (5, 6), (6, 4)}
        return torch.cat([images[:, :1] + images.mean(), images[:, :1]], dim=1)

    images = torch.rand(2, 3, 9, 11, dtype=torch.float64)
    found = sliding_window(model, images, window=6, stride=4)
    expected, count = torch.zeros(2, 2, 9, 11, dtype=torch.float64), torch.zeros(9, 11)
    for top in (0, 3):
        for left in (0, 4, 5):
            here = (..., slice(top, top + 6), slice(left, left + 6))
            expected[here] += model(images[here])
            count[here] += 1
    assert count.min() == 1 and count.max() == 6
    torch.testing.assert_close(found, expected / count)
    torch.testing.assert_close(found[:, 1], images[:, 0])
    small = torch.rand(1, 3, 5, 6)
    assert torch.equal(sliding_window(model, small, 6, 4), model(small))  # one window, no averaging


def test_a_segmenter_through_windows():
    torch.manual_seed(0)
    model = Segmenter(create_backbone("toyvit", depth=1), num_classes=2).eval()
    images = torch.randn(1, 3, 37, 50)
    with torch.no_grad():
        assert sliding_window(model, images, 32, 20).shape == (1, 3, 37, 50)
        assert torch.equal(sliding_window(model, images, 64, 64), model(images))


# ------------------------------------------------------------------ what must be refused


def test_refused():
    with pytest.raises(ValueError, match="num_classes: found 0, expected at least 1"):
        Segmenter(num_classes=0)
    with pytest.raises(ValueError, match="depth: found 0, expected at least 1"):
        Segmenter(num_classes=3, depth=0)
    with pytest.raises(ValueError, match="backbone: found Eva, expected, as published"):
        Segmenter("eva02_tiny_patch14_224", published=True)
    model = Segmenter(create_backbone("toyvit", depth=1))
    for shape in ((3, 16, 16), (1, 3, 0, 16)):
        with pytest.raises(ValueError, match="images: found shape"):
            model(torch.zeros(shape))
    for window, stride in ((0, 1), (8, 0), (8, 9)):
        with pytest.raises(ValueError, match=f"window, stride: found {window}, {stride}, expected 1 <="):
            sliding_window(model, torch.zeros(1, 3, 16, 16), window, stride)
