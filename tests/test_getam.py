"""GETAM and its baselines against maps written out, N x N, and what they must leave alone."""

import sys

import pytest
import timm
import torch
from reference import naive_getam as naive
from test_attention_tape import VITS, build
from torch import nn

from wsss_lib import create_model, localize
from wsss_lib.localization import METHODS, class_attention, combine_rows, getam, rollout
from wsss_lib.localization.getam import VARIANTS, frozen
from wsss_lib.models.attention import AttentionTape

LABELS = torch.tensor([[1.0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1]])
GRID = (3, 5)


@pytest.fixture(scope="module")
def model():
    """A toy network in float64: what differs from the reference is then an error, not rounding."""
    torch.manual_seed(0)
    toy = create_model("cam", num_classes=4, pretrained=False, pool=0.2).double().eval()
    for block in toy.backbone.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.2)  # attention far from uniform
    return toy


@pytest.fixture(scope="module")
def images():
    return torch.randn(4, 3, 24, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_same_maps(maps, expected, tolerance):
    """Relative to each map's largest value: 1e-12 in float64, 1e-5 in float32, for sums in other orders."""
    largest = expected.amax((2, 3), keepdim=True)
    assert (largest > 0).any() and not maps[largest[:, :, 0, 0] == 0].any()
    scale = largest.masked_fill(largest == 0, 1)
    torch.testing.assert_close(maps / scale, expected / scale, rtol=0, atol=tolerance)


# ------------------------------------------------------------------ GETAM


@pytest.mark.parametrize("head", ["both", "class", "patch"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_getam_agrees_with_attention_written_out(model, images, variant, head):
    forwards = {
        "both": model,
        "class": lambda x: model.forward_heads(x).class_logits,
        "patch": lambda x: model.forward_heads(x).pooled,
    }
    for start, layer in ((None, 3), (0, 0)):  # the default is half of the depth
        maps = getam(model, images, LABELS, start_layer=start, variant=variant, head=head)
        expected = naive.getam(model.backbone, forwards[head], images, LABELS, layer, variant, GRID)
        assert maps.shape == (4, 4, 3, 5) and (maps >= 0).all() and not maps[LABELS == 0].any()
        assert_same_maps(maps, expected, 1e-12)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_classifiers_of_timm(pool):
    """A plain timm model, its logit from the class token or the mean of the patches; float32 and float64."""
    vit = build(depth=4, std=0.08, global_pool=pool)  # sharper attention magnifies the rounding of float32
    pictures = torch.randn(4, 3, 32, 48, dtype=torch.float64)
    expected = naive.getam(vit, vit, pictures, LABELS, 2, "cam_grad_s", (2, 3))
    assert_same_maps(getam(vit, pictures, LABELS), expected, 1e-12)
    maps = getam(vit.float(), pictures.float(), LABELS)
    assert maps.dtype == torch.float32
    assert_same_maps(maps.double(), expected, 1e-5)


@pytest.mark.parametrize("name", VITS)
def test_vits_of_timm_localise(name):
    torch.manual_seed(0)
    vit = create_model("cam", name, num_classes=4, pretrained=False, depth=2).double().eval()
    pictures = torch.randn(2, 3, 2 * vit.patch_stride, 3 * vit.patch_stride, dtype=torch.float64)
    maps = localize(vit, pictures, LABELS[:2], "getam", start_layer=0)
    expected = naive.getam(vit.backbone, vit, pictures, LABELS[:2], 0, "cam_grad_s", (2, 3))
    assert_same_maps(maps, expected, 1e-11)  # of a few magnitudes of 1e-6 where layer scale starts at 1e-5


def test_the_published_loop_is_the_same_map(model, images):
    loop = naive.getam_loop(model.backbone, model, images, LABELS, 3, "cam_grad_s", GRID)
    assert_same_maps(getam(model, images, LABELS), loop, 1e-12)


def test_combine_rows_worked_by_hand():
    attention = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])  # two heads, three tokens
    gradient = torch.tensor([[2.0, -4.0, 4.0], [1.0, 3.0, -1.0]])
    expected = {
        "grad": [1.5, 1.5, 2.0],
        "grad_s": [2.25, 2.25, 4.0],
        "cam_grad": [0.55, 0.15, 0.5],
        "cam_grad_s": [0.825, 0.225, 1.0],
    }
    assert set(expected) == set(VARIANTS)
    for variant, values in expected.items():
        torch.testing.assert_close(combine_rows(attention, gradient, variant), torch.tensor(values))


def test_passes_hold_images_of_equally_many_classes(model, images, monkeypatch):
    """Seven images, passes of at most two: no pass mixes counts, none sees an image without a class."""
    labels = torch.cat([LABELS, LABELS[:3]])
    pictures = torch.cat([images, images[:3]])
    expected = getam(model, pictures, labels)
    assert torch.equal(expected[4:], expected[:3])
    sizes, forward = [], type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, x: sizes.append(len(x)) or forward(self, x))
    getam(model, pictures, labels)
    assert sorted(sizes) == [1, 2, 2]  # two classes; one class (twice); three classes (twice)
    sizes.clear()
    monkeypatch.setattr(sys.modules[getam.__module__], "CPU_PASS", 1)
    torch.testing.assert_close(getam(model, pictures, labels), expected, rtol=1e-12, atol=1e-18)
    assert sizes == [1] * 5


def test_no_images(model, images):
    assert getam(model, images[:0], LABELS[:0]).shape == (0, 4, 3, 5)


def test_memory_holds_half_the_network_and_no_weights(model, images):
    """Nothing is saved for a backward before start_layer, and what is saved after is no attention map."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        pictures = images[:1].clone().requires_grad_()  # no reason to go back to the pixels
        getam(model, pictures, LABELS[:1], start_layer=5)
        late = sum(t.numel() for t in saved if not isinstance(t, nn.Parameter))
        saved.clear()
        getam(model, images[:1], LABELS[:1], start_layer=0)
        every = sum(t.numel() for t in saved if not isinstance(t, nn.Parameter))
    assert late < every / 5
    assert not [t for t in saved if t.shape[-2:] == (16, 16)]


@pytest.mark.parametrize("method", ["getam", "attention", "rollout"])
def test_a_batch_is_its_pictures_one_by_one(model, images, method):
    maps = METHODS[method](model, images, LABELS)
    one_by_one = torch.cat([METHODS[method](model, images[b : b + 1], LABELS[b : b + 1]) for b in range(4)])
    torch.testing.assert_close(maps, one_by_one, rtol=1e-12, atol=1e-18)
    without = METHODS[method](model, images, torch.zeros(4, 4))
    assert without.shape == (4, 4, 3, 5) and not without.any()
    assert localize(model, images, LABELS, method, scales=(1.0, 2.0), flip=True).shape == (4, 4, 6, 10)


@pytest.mark.parametrize("method", ["getam", "attention", "rollout"])
def test_maps_leave_no_trace(model, images, method):
    with torch.inference_mode():  # where evaluation code calls it
        expected = METHODS[method](model, images, LABELS)
    with torch.no_grad():
        assert torch.equal(METHODS[method](model, images, LABELS), expected)
    model.train()
    model.backbone.norm.eval()
    model.backbone.blocks[4].attn.fused_attn = False
    model.patch_head.weight.grad = torch.ones_like(model.patch_head.weight)
    model.class_head.weight.requires_grad_(False)
    pictures = images.clone().requires_grad_()
    try:
        maps = METHODS[method](model, pictures, LABELS)
        assert torch.equal(maps, expected) and not maps.requires_grad and pictures.grad is None
        assert model.training and model.backbone.blocks[0].training and not model.backbone.norm.training
        assert not model.backbone.blocks[4].attn.fused_attn and model.backbone.blocks[3].attn.fused_attn
        asking = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        assert asking == ["class_head.weight"]
        with_grad = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
        assert with_grad == ["patch_head.weight"] and (model.patch_head.weight.grad == 1).all()
    finally:
        model.patch_head.weight.grad = None
        model.backbone.blocks[4].attn.fused_attn = True
        model.requires_grad_(True).eval()


def test_frozen_weights_thaw_after_errors(model, images, monkeypatch):
    def breaks(self, x):
        raise ZeroDivisionError

    monkeypatch.setattr(type(model), "forward", breaks)
    with pytest.raises(ZeroDivisionError):
        getam(model.train(), images, LABELS)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ZeroDivisionError), frozen(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        1 / 0
    assert all(parameter.requires_grad for parameter in model.eval().parameters())


@pytest.mark.parametrize("method", ["getam", "attention", "rollout"])
def test_dropout_and_checkpointing_of_training_do_not_matter(images, method):
    torch.manual_seed(0)
    dropping = {"attn_drop_rate": 0.5, "drop_path_rate": 0.5, "proj_drop_rate": 0.5}
    toy = create_model("cam", num_classes=4, pretrained=False, **dropping).double()
    expected = METHODS[method](toy.eval(), images, LABELS)
    toy.train().backbone.set_grad_checkpointing(True)
    assert torch.equal(METHODS[method](toy, images, LABELS), expected)
    assert toy.backbone.grad_checkpointing


# ------------------------------------------------------------------ attention and rollout


@pytest.mark.parametrize("start", [0, 4])
def test_attention_and_rollout_agree_with_maps_written_out(model, images, start):
    with torch.no_grad(), naive.attention_maps(model.backbone) as attention:
        model(images)
    for method, reference in ((class_attention, naive.class_attention), (rollout, naive.rollout)):
        maps = method(model, images, LABELS, start_layer=start)
        expected = reference(attention, start)[:, 1:].reshape(4, 1, 3, 5).expand(4, 4, 3, 5)
        expected = expected * LABELS[:, :, None, None]  # the same for all classes that are there
        torch.testing.assert_close(maps, expected, rtol=1e-12, atol=1e-15)
    default = class_attention(model, images, LABELS)
    assert torch.equal(default, class_attention(model, images, LABELS, start_layer=3))
    assert torch.equal(rollout(model, images, LABELS), rollout(model, images, LABELS, start_layer=0))


def test_prefix_tokens_are_no_patches():
    torch.manual_seed(0)
    vit = create_model("cam", "deit_tiny_distilled_patch16_224", 4, pretrained=False, depth=2).double().eval()
    pictures = torch.randn(1, 3, 32, 48, dtype=torch.float64)
    with AttentionTape(detach=True) as tape:
        vit(pictures)
    rows = tape.class_rows().mean(dim=(0, 2))  # (1, 2 + 6)
    maps = class_attention(vit, pictures, torch.eye(4)[:1], start_layer=0)
    torch.testing.assert_close(maps[0, 0].flatten(), rows[0, 2:], rtol=1e-12, atol=0)


# ------------------------------------------------------------------ refusals


def test_wrong_arguments(model, images):
    wrong = [
        ({"variant": "cam"}, "variant: found 'cam', expected one of cam_grad_s, grad_s, cam_grad, grad"),
        ({"head": "token"}, "head: found 'token', expected one of both, class, patch"),
        ({"start_layer": 6}, r"start_layer: found 6, expected None or a block, 0..5"),
        ({"start_layer": -1}, "start_layer: found -1"),
        ({"start_layer": True}, "start_layer: found True"),
        ({"labels": LABELS[:3]}, r"labels: found shape \(3, 4\), expected \(4, 4\)"),
        ({"labels": LABELS * 2}, "labels: found values"),
        ({"images": images[:, :, 1:]}, "found 23x40 pixels, expected multiples of 8"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            getam(**{"model": model, "images": images, "labels": LABELS, **change})
        if not change.keys() & {"variant", "head"}:
            for method in (class_attention, rollout):
                with pytest.raises(ValueError, match=message):
                    method(**{"model": model, "images": images, "labels": LABELS, **change})


def test_models_that_have_no_such_map(images):
    registers = create_model("cam", "vit_pwee_patch16_reg1_gap_256", 4, pretrained=False, depth=1)
    plain = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=4, img_size=32)
    pictures = torch.zeros(1, 3, 32, 32)
    for method in (getam, class_attention, rollout):
        with pytest.raises(ValueError, match="found no class token, expected one"):
            method(registers, pictures, LABELS[:1])
    with pytest.raises(ValueError, match="VisionTransformer has no forward_heads"):
        getam(plain, pictures, LABELS[:1], head="class")
    plain.blocks[0].attn = nn.Sequential(plain.blocks[0].attn, plain.blocks[0].attn)
    plain.blocks[0].attn.forward = lambda x, **_: plain.blocks[0].attn[1](plain.blocks[0].attn[0](x))
    with pytest.raises(ValueError, match="found 2 calls of attention, expected 1"):
        getam(plain, pictures, LABELS[:1])
