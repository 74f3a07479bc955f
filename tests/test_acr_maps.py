"""ACR's maps against attention written out, N x N; their passes, their memory and what they leave alone."""

import sys

import pytest
import torch
from allocations import count_allocations
from reference import naive_acr as naive
from test_attention_tape import VITS
from test_getam import GRID, LABELS, assert_same_maps
from torch import nn

from wsss_lib import create_model, localize
from wsss_lib.kernels import attention_sum
from wsss_lib.localization import METHODS, getam
from wsss_lib.localization.acr import acr_maps, spread
from wsss_lib.localization.getam import VARIANTS
from wsss_lib.models.acr import AcrViT
from wsss_lib.models.attention import AttentionTape


def sharpen(model, std=0.2):
    for block in model.backbone.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=std)  # attention far from uniform
    return model.double().eval()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return sharpen(AcrViT(num_classes=4))


@pytest.fixture(scope="module")
def images():
    return torch.randn(4, 3, 24, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees_with_attention_written_out(model, images, variant):
    """float64 on both sides; the default starts at the last two of the six blocks, with "grad"."""
    options = {"variant": variant} if variant != "grad" else {}
    for start, layer in ((None, 4), (0, 0)):
        maps = acr_maps(model, images, LABELS, start_layer=start, **options)
        found, expected = naive.maps(model.backbone, model, images, LABELS, layer, variant, GRID)
        assert_same_maps(maps, expected, 1e-12)
        gradient = acr_maps(model, images, LABELS, start_layer=start, patch_affinity=False, **options)
        assert_same_maps(gradient, found, 1e-12)
        assert not maps.requires_grad and (maps >= 0).all()
        with AttentionTape(detach=True) as tape:
            model(images)
        assert_same_maps(spread(found, tape.blocks), expected, 1e-12)


@pytest.mark.parametrize("name", ["toyvit", *VITS])
def test_vits_of_timm_localise(name, monkeypatch):
    """Any number of prefix tokens, a grid that is not square, through `localize`."""
    monkeypatch.setitem(METHODS, "acr", acr_maps)
    torch.manual_seed(0)
    model = create_model("acr", name, num_classes=4, pretrained=False, depth=2).double().eval()
    pictures = torch.randn(2, 3, 2 * model.patch_stride, 3 * model.patch_stride, dtype=torch.float64)
    maps = localize(model, pictures, LABELS[:2], "acr")
    assert maps.shape == (2, 4, 2, 3)
    _, expected = naive.maps(model.backbone, model, pictures, LABELS[:2], 0, "grad", (2, 3))
    assert_same_maps(maps, expected, 1e-11)  # of a few magnitudes of 1e-6 where layer scale starts at 1e-5


def test_float32_and_half_precision(model, images):
    """Rounding of float32 and of bfloat16's eight bits, the latter through six blocks."""
    expected = acr_maps(model, images, LABELS)
    try:
        maps = acr_maps(model.float(), images.float(), LABELS)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = acr_maps(model, images.float(), LABELS)
    finally:
        model.double()
    assert maps.dtype == rough.dtype == torch.float32
    assert_same_maps(maps.double(), expected, 1e-4)
    assert_same_maps(rough.double(), expected, 0.2)


def test_passes_keep_pictures_and_maps_together(model, images, monkeypatch):
    """Ten pictures in groups of at most three and passes of at most two; then one by one: the same maps."""
    monkeypatch.setattr(sys.modules[acr_maps.__module__], "PICTURES", 3)
    labels = LABELS[[0, 1, 3, 2, 1, 3, 0, 1, 1, 0]]
    pictures = torch.cat([images, images.flip(2), images.flip(3)])[:10]
    sizes, forward = [], type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, x: sizes.append(len(x)) or forward(self, x))
    monkeypatch.setattr(sys.modules[getam.__module__], "CPU_PASS", 2 * 128 * 16)
    maps = acr_maps(model, pictures, labels)
    # One class: four pictures. Two: two. Three: three. None: one, which needs no pass.
    assert sizes == [2, 1, 1, 2, 2, 1]
    one_by_one = torch.cat([acr_maps(model, pictures[b : b + 1], labels[b : b + 1]) for b in range(10)])
    torch.testing.assert_close(maps, one_by_one, rtol=1e-12, atol=1e-18)
    assert not maps[3].any() and maps[labels > 0].flatten(1).any(1).all()


def test_no_pictures_and_no_classes(model, images):
    assert acr_maps(model, images[:0], LABELS[:0]).shape == (0, 4, *GRID)
    without = acr_maps(model, images.float().double(), torch.zeros(4, 4))
    assert without.shape == (4, 4, *GRID) and without.dtype == torch.float64 and not without.any()


def test_flip_inference_is_the_mean_of_both(model, images, monkeypatch):
    monkeypatch.setitem(METHODS, "acr", acr_maps)
    both = localize(model, images, LABELS, "acr", flip=True)
    expected = acr_maps(model, images, LABELS) + acr_maps(model, images.flip(-1), LABELS).flip(-1)
    torch.testing.assert_close(both, expected / 2, rtol=1e-12, atol=0)


def test_memory_does_not_grow_with_heads_and_blocks(monkeypatch):
    """More blocks cost their queries and keys, not their attention: a tile of one map is all there is."""
    monkeypatch.setattr(attention_sum, "TILE_AND_PACK", {"cpu": (2**14, 2**12), "cuda": ()})
    tokens, peaks = 401, []
    for count in (2, 8):
        q, k = torch.rand(2, 1, 4, tokens, 8)
        block = type("Block", (), {"q": q, "k": k, "scale": 1.0})
        with count_allocations() as memory:
            spread(torch.rand(1, 3, 20, 20), [block] * count)
        peaks.append(memory.peak / 4)
    inputs = 2 * 4 * tokens * 8  # numbers in a block's queries and keys
    assert peaks[0] < 2 * inputs + 3 * 2**14 < tokens**2 and peaks[1] - peaks[0] < 6 * 1.1 * inputs


def test_leaves_no_trace(model, images):
    expected = acr_maps(model, images, LABELS)
    model.train()
    model.backbone.blocks[4].attn.fused_attn = False
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    pictures = images.clone().requires_grad_()
    try:
        with torch.inference_mode():
            maps = acr_maps(model, images, LABELS)
        assert torch.equal(maps, expected) and not maps.is_inference()
        assert torch.equal(acr_maps(model, pictures, LABELS), expected) and pictures.grad is None
        assert model.training and not model.backbone.blocks[4].attn.fused_attn
        assert [name for name, p in model.named_parameters() if p.grad is not None] == ["classifier.weight"]
        assert (model.classifier.weight.grad == 1).all()
        assert all(p.requires_grad for p in model.parameters())
    finally:
        model.classifier.weight.grad = None
        model.backbone.blocks[4].attn.fused_attn = True
        model.eval()


def test_other_classifiers(images):
    """A CamViT, of whose heads the class token's is differentiated."""
    torch.manual_seed(0)
    model = sharpen(create_model("cam", num_classes=4, pretrained=False))
    _, expected = naive.maps(
        model.backbone, lambda x: model.forward_heads(x).class_logits, images, LABELS, 4, "grad", GRID)
    assert_same_maps(acr_maps(model, images, LABELS, head="class"), expected, 1e-12)


def test_wrong_arguments(model, images):
    wrong = [
        ({"variant": "cam"}, "variant: found 'cam', expected one of"),
        ({"head": "token"}, "head: found 'token', expected one of"),
        ({"start_layer": 6}, r"start_layer: found 6, expected None or a block, 0..5"),
        ({"labels": LABELS[:3]}, r"labels: found shape \(3, 4\), expected \(4, 4\)"),
        ({"labels": LABELS * 2}, "labels: found values"),
        ({"images": images[:, :, 1:]}, "found 23x40 pixels, expected multiples of 8"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            acr_maps(**{"model": model, "images": images, "labels": LABELS, **change})
