"""CAM and Grad-CAM against plain loops and finite differences, views, and inputs that must be refused."""

import numpy as np
import pytest
import torch
from reference import naive_cam as naive

from wsss_lib import create_model, localize, normalize_maps
from wsss_lib.localization import METHODS, cam, class_slots, grad_cam

LABELS = torch.tensor([[1.0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1]])


@pytest.fixture(scope="module")
def model():
    """A toy network in float64: what differs from the reference is then an error, not rounding."""
    torch.manual_seed(0)
    return create_model("cam", num_classes=4, pretrained=False, pool=0.2).double().eval()


@pytest.fixture(scope="module")
def network(model):
    """The network that a method reads its maps off: a `WeakTr` for WeakTr's, else the CamViT."""
    torch.manual_seed(0)
    weaktr = create_model("weaktr", num_classes=4, pretrained=False).double().eval()
    return lambda method: weaktr if method == "weaktr" else model


@pytest.fixture(scope="module")
def images():
    return torch.randn(4, 3, 24, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------ class slots


def test_class_slots_worked_by_hand():
    index, valid = class_slots(LABELS)
    assert index.dtype == torch.long and valid.dtype == torch.bool
    assert index.tolist() == [[0, 2, 3], [1, 0, 0], [0, 0, 0], [1, 3, 0]]
    assert valid.tolist() == [[True] * 3, [True, False, False], [False] * 3, [True, True, False]]


@pytest.mark.parametrize(
    "labels, slots", [(torch.zeros(2, 4), 0), (torch.ones(2, 4), 4), (torch.zeros(0, 4), 0)]
)
def test_class_slots_at_the_edges(labels, slots):
    index, valid = class_slots(labels)
    assert index.shape == valid.shape == (len(labels), slots) and valid.all()


# ------------------------------------------------------------------ maps


def test_cam_agrees_with_the_loop(model, images):
    maps = cam(model, images, LABELS)
    with torch.no_grad():
        features = model.forward_heads(images).features
    expected = naive.cam(features.numpy(), model.patch_head.weight.detach().numpy(), LABELS.numpy())
    # float64 on both sides: only the order of 128 additions differs
    torch.testing.assert_close(maps, torch.from_numpy(expected), rtol=0, atol=1e-12)
    assert not maps.requires_grad and maps.max() > 0 and not maps[LABELS == 0].any()


@pytest.mark.parametrize("pool", [1, 4, 0.2, 1.0])
def test_grad_cam_of_the_final_features_is_cam_over_hw(model, images, pool, monkeypatch):
    monkeypatch.setattr(model, "pool", pool)
    maps = grad_cam(model, images, LABELS)
    torch.testing.assert_close(maps, cam(model, images, LABELS) / (3 * 5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer", [1, -1])
def test_grad_cam_of_a_block_agrees_with_finite_differences(model, images, layer):
    """Central differences of step 1e-5 in float64 are good to about 1e-9; the maps are of order 1e-2."""
    labels = torch.tensor([[1.0, 1, 1, 1], [0, 1, 0, 1]])
    maps = grad_cam(model, images[:2], labels, layer=layer)
    assert (maps.amax((2, 3)) > 1e-3).sum() >= 2  # the relu has left something to compare
    for b in range(2):
        def run(features=None, picture=images[b : b + 1]):
            """The block's output patches (D, h, w), and the logits (C,) with `features` in their place."""
            seen = []

            def swap(_module, _inputs, out):
                seen.append(out[0, 1:].T.reshape(128, 3, 5).numpy())  # (N - 1, D) -> (D, h, w)
                if features is None:
                    return None
                patches = torch.from_numpy(features).reshape(128, 15).T[None]  # (D, h, w) -> (1, h*w, D)
                return torch.cat([out[:, :1], patches], dim=1)

            handle = model.backbone.blocks[layer].register_forward_hook(swap)
            with torch.no_grad():
                logits = model(picture)[0].numpy()
            handle.remove()
            return seen[0], logits

        expected = torch.from_numpy(naive.grad_cam(run()[0], lambda f: run(f)[1]))
        expected[labels[b] == 0] = 0
        torch.testing.assert_close(maps[b], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("method, kw", [("cam", {}), ("grad_cam", {}), ("grad_cam", {"layer": 4})])
def test_a_batch_is_its_pictures_one_by_one(model, images, method, kw):
    maps = METHODS[method](model, images, LABELS, **kw)
    one_by_one = [METHODS[method](model, images[b : b + 1], LABELS[b : b + 1], **kw) for b in range(4)]
    assert maps.shape == (4, 4, 3, 5) and (maps >= 0).all() and not maps[LABELS == 0].any()
    torch.testing.assert_close(maps, torch.cat(one_by_one), rtol=0, atol=1e-12)
    without = METHODS[method](model, images, torch.zeros(4, 4), **kw)
    assert without.shape == maps.shape and not without.any()


@pytest.mark.parametrize("kw", [{}, {"layer": 2}])
def test_grad_cam_leaves_no_trace(model, images, kw):
    with torch.no_grad():  # where evaluation code calls it
        expected = grad_cam(model, images, LABELS, **kw)
    model.train()
    model.backbone.norm.eval()
    model.patch_head.weight.grad = torch.ones_like(model.patch_head.weight)
    model.requires_grad_(False)
    try:
        maps = grad_cam(model, images, LABELS, **kw)  # also where nothing is trained
        assert torch.equal(maps, expected) and not maps.requires_grad
        assert model.training and model.backbone.blocks[0].training and not model.backbone.norm.training
        assert (model.patch_head.weight.grad == 1).all() and model.class_head.weight.grad is None
        assert not any(block._forward_hooks for block in model.backbone.blocks)
    finally:
        model.patch_head.weight.grad = None
        model.requires_grad_(True).eval()


def test_maps_are_float32_or_better(images):
    for method, found in METHODS.items():
        name = "weaktr" if method == "weaktr" else "cam"
        model = create_model(name, num_classes=4, pretrained=False).bfloat16()
        assert found(model, images.bfloat16(), LABELS).dtype == torch.float32, method


# ------------------------------------------------------------------ views


@pytest.mark.parametrize("method", METHODS)
def test_one_plain_view_is_the_plain_map(network, images, method):
    model = network(method)
    assert torch.equal(localize(model, images, LABELS, method), METHODS[method](model, images, LABELS))


@pytest.mark.parametrize("method", METHODS)
def test_flip_is_the_mean_of_both_sides(network, images, method):
    model = network(method)
    maps = localize(model, images, LABELS, method, flip=True)
    plain = METHODS[method]
    expected = (plain(model, images, LABELS) + plain(model, images.flip(-1), LABELS).flip(-1)) / 2
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-12)
    # so a mirrored picture has the mirrored maps, which no single view of this network gives
    mirrored = localize(model, images.flip(-1), LABELS, method, flip=True)
    torch.testing.assert_close(mirrored, maps.flip(-1), rtol=0, atol=1e-12)
    assert not torch.allclose(plain(model, images.flip(-1), LABELS), plain(model, images, LABELS).flip(-1))


def test_scales_meet_at_the_grid_of_the_largest(model, images):
    maps = localize(model, images, LABELS, scales=(1.0, 2.0))
    assert maps.shape == (4, 4, 6, 10)
    small = localize(model, images, LABELS, scales=(1.0,)).numpy()
    large = localize(model, images, LABELS, scales=(2.0,))
    expected = torch.from_numpy(np.array([[naive.resize(m, (6, 10)) for m in picture] for picture in small]))
    torch.testing.assert_close(maps, (expected + large) / 2, rtol=0, atol=1e-12)
    assert localize(model, images, LABELS, scales=(2.0, 0.5, 1.0), flip=True).shape == (4, 4, 6, 10)


@pytest.mark.parametrize(
    "size, grid", [((24, 40), (3, 5)), ((25, 37), (3, 5)), ((30, 8), (4, 1)), ((3, 3), (1, 1))]
)
def test_ragged_sizes_go_to_the_nearest_grid(model, size, grid):
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    assert localize(model, images, LABELS[:2]).shape == (2, 4, *grid)


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_tiny_r_s16_p8_224",
     "vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_224", "vit_pwee_patch16_reg1_gap_256"],
)
def test_vits_of_timm_localise(name):
    torch.manual_seed(0)
    vit = create_model("cam", name, num_classes=4, pretrained=False).eval()
    images = torch.randn(2, 3, 2 * vit.patch_stride, 3 * vit.patch_stride)
    maps = localize(vit, images, LABELS[:2])
    assert maps.shape == (2, 4, 2, 3) and maps.dtype == torch.float32 and maps[LABELS[:2] == 1].any()
    # float32: both are a sum over at most 384 channels, in two orders
    torch.testing.assert_close(localize(vit, images, LABELS[:2], "grad_cam") * 6, maps, rtol=1e-4, atol=1e-5)
    assert localize(vit, images, LABELS[:2], "grad_cam", layer=-1).shape == (2, 4, 2, 3)


# ------------------------------------------------------------------ normalisation


@pytest.mark.parametrize("mode", ["max", "minmax"])
def test_normalised_maps_reach_one_and_no_further(mode):
    maps = torch.rand(3, 2, 5, 7) * torch.tensor([1e-30, 1.0, 1e30])[:, None, None, None] + 1e-32
    maps[0, 1] = 0
    out = normalize_maps(maps, mode)
    assert not out[0, 1].any() and out.min() >= 0
    expected = torch.ones(3, 2)
    expected[0, 1] = 0
    assert torch.equal(out.amax((2, 3)), expected)  # exactly, whatever the magnitude
    assert (out[1:].amin((2, 3)) == 0).all() == (mode == "minmax")


def test_minmax_takes_negative_values_and_constants():
    maps = torch.tensor([[[[-2.0, 0.0, 2.0]], [[3.0, 3.0, 3.0]]]])
    assert normalize_maps(maps, "minmax").tolist() == [[[[0, 0.5, 1]], [[0, 0, 0]]]]
    with pytest.raises(ValueError, match="found -2, expected no negative"):
        normalize_maps(maps)


@pytest.mark.parametrize(
    "maps, mode, message",
    [
        (torch.zeros(2, 3, 3), "max", r"found shape \(2, 3, 3\)"),
        (torch.zeros(1, 1, 2, 2), "mean", "mode: found 'mean'"),
        (torch.full((1, 1, 2, 2), float("nan")), "max", "not finite"),
        (torch.full((1, 1, 2, 2), float("inf")), "minmax", "not finite"),
    ],
)
def test_maps_that_cannot_be_normalised(maps, mode, message):
    with pytest.raises(ValueError, match=message):
        normalize_maps(maps, mode)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize("method", ["cam", "grad_cam"])
def test_a_network_that_says_nothing_of_single_patches(method, images):
    getam_net = create_model("getam", num_classes=4, pretrained=False).double()
    with pytest.raises(ValueError, match="model: found GetamViT, which says nothing of single patches"):
        localize(getam_net, images, LABELS, method=method)
    assert localize(getam_net, images, LABELS, method="grad_cam", layer=-1).sum() > 0


def test_maps_and_networks_that_do_not_go_together(model, images):
    with pytest.raises(ValueError, match="model: found CamViT, expected a WeakTr"):
        localize(model, images, LABELS, method="weaktr")
    weaktr = create_model("weaktr", num_classes=4, pretrained=False).double()
    for method in ("getam", "acr", "attention", "rollout"):  # each class has a token of its own
        with pytest.raises(ValueError, match="model: found 4 class tokens, expected one"):
            localize(weaktr, images, LABELS, method=method)
    with pytest.raises(ValueError, match="model: found no class token, expected one"):
        localize(create_model("cam", "toymit", 4, pretrained=False).double(), images, LABELS, method="getam")


def test_wrong_arguments(model, images):
    good = {"model": model, "images": images, "labels": LABELS}
    wrong = [
        ({"method": "gradcam"}, "method: found 'gradcam', expected one of cam, grad_cam"),
        ({"images": images[0]}, r"images: found torch.float64 of shape \(3, 24, 40\)"),
        ({"images": images[:, :1]}, r"expected normalised floats \(B, 3, H, W\)"),
        ({"images": (images * 9).byte()}, "images: found torch.uint8"),
        ({"labels": LABELS[:3]}, r"labels: found shape \(3, 4\), expected \(4, 4\)"),
        ({"labels": torch.ones(4, 5)}, r"labels: found shape \(4, 5\), expected \(4, 4\)"),
        ({"labels": LABELS[0]}, r"labels: found shape \(4,\)"),
        ({"labels": LABELS * 2}, r"labels: found values \[2.0, 2.0, 2.0\], expected 0 or 1"),
        ({"labels": LABELS / 0}, "labels: found values"),
        ({"scales": ()}, r"scales: found \(\)"),
        ({"scales": (1.0, 0.0)}, "scales: found"),
        ({"method": "grad_cam", "layer": 6}, r"layer: found 6, expected None or a block, -6..5"),
        ({"method": "grad_cam", "layer": True}, "layer: found True"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            localize(**{**good, **change})
    with pytest.raises(ValueError, match="found 23x40 pixels, expected multiples of 8"):
        cam(model, images[:, :, 1:], LABELS)
    with pytest.raises(ValueError, match="labels: found values"):
        class_slots(LABELS * 0.5)
