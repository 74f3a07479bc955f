"""WeakTr's maps against maps written out and scale by scale; DenseCRF on labels against loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import naive_dense_crf
from reference import naive_weaktr as naive
from test_weaktr import build, pictures

from wsss_lib import localize, normalize_maps, pseudo_labels
from wsss_lib.localization.fusion import FUSIONS, weaktr_maps
from wsss_lib.refinement.label_crf import crf_labels

LABELS = torch.tensor([[1.0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]])


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def images(model):
    return pictures(model, 3, 4, batch=3)


# ------------------------------------------------------------------ maps


@pytest.mark.parametrize("fusion", FUSIONS)
def test_maps_of_each_fusion(model, images, fusion):
    """float64: only the order of additions differs."""
    attention, *_ = naive.record(model, images)
    expected = naive.predictions(model, images)
    coarse = expected["coarse_cam"].clamp(min=0)
    if fusion == "mean":
        fused_map = torch.from_numpy(sum(a.mean(1) for a in attention)) / 3
    elif fusion == "random":
        weights = torch.rand(3, 3, generator=torch.Generator().manual_seed(0)).double()  # blocks x heads
        maps = torch.stack([torch.from_numpy(a) for a in attention])  # (L, B, H, N, N)
        fused_map = torch.einsum("lh,lbhij->bij", weights, maps) / 9
    if fusion == "coarse":
        wanted = coarse
    elif fusion == "adaptive":
        wanted = expected["fine_cam"]
    else:
        fused = fused_map[:, :4, 4:].unflatten(2, (3, 4)) * coarse
        wanted = torch.einsum("bij,bcj->bci", fused_map[:, 4:, 4:], fused.flatten(2)).unflatten(2, (3, 4))
        before = weaktr_maps(model, images, LABELS, fusion, patch_attention=False)
        torch.testing.assert_close(before, fused.where(LABELS[:, :, None, None] > 0, 0), rtol=0, atol=1e-13)
    maps = weaktr_maps(model, images, LABELS, fusion=fusion)
    present = LABELS[:, :, None, None] > 0
    assert maps.shape == (3, 4, 3, 4) and not maps.requires_grad and (maps >= 0).all()
    torch.testing.assert_close(maps, wanted.where(present, 0), rtol=0, atol=1e-13)
    assert not maps[LABELS == 0].any() and (maps[LABELS > 0].amax((1, 2)) > 0).all()


def test_random_weights_follow_their_seed(model, images):
    first, same, other = (weaktr_maps(model, images, LABELS, "random", seed=s) for s in (3, 3, 4))
    assert torch.equal(first, same) and not torch.allclose(first, other)


def test_runs_in_eval_mode_and_leaves_the_model_alone(images):
    model = build(proj_drop_rate=0.5)
    expected = weaktr_maps(model, images, LABELS)
    model.train()
    model.backbone.blocks[0].eval()
    assert torch.equal(weaktr_maps(model, images, LABELS), expected)
    assert model.training and not model.backbone.blocks[0].training
    assert all(p.grad is None for p in model.parameters())


def test_maps_are_float32_or_better(images):
    model = build(double=False)
    assert weaktr_maps(model, images.float(), LABELS).dtype == torch.float32
    for fusion in FUSIONS:
        assert weaktr_maps(model.bfloat16(), images.bfloat16(), LABELS, fusion).dtype == torch.float32


def test_scales_and_mirror_images_as_published(model, images):
    """`localize` averages the views' maps; the published code enlarges each to the picture and adds them
    up: the same but for a factor and, where scales differ, one more interpolation."""
    maps = localize(model, images, LABELS, "weaktr", scales=(1.0, 2.0), flip=True)
    views = [weaktr_maps(model, images, LABELS), weaktr_maps(model, images.flip(-1), LABELS).flip(-1)]
    large = F.interpolate(images, scale_factor=2, mode="bilinear")
    views += [weaktr_maps(model, large, LABELS), weaktr_maps(model, large.flip(-1), LABELS).flip(-1)]
    assert maps.shape == (3, 4, 6, 8)
    expected = sum(F.interpolate(v, (6, 8), mode="bilinear") for v in views) / 4
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-13)
    size = images.shape[-2:]
    summed = sum(F.interpolate(v, size, mode="bilinear") for v in views)
    published = normalize_maps(summed, "minmax")
    ours = F.interpolate(normalize_maps(maps, "minmax"), size, mode="bilinear")
    assert (ours - published).abs().mean() < 0.02


def test_pseudo_labels_are_the_argmax_over_threshold_and_maps(model, images):
    maps = normalize_maps(weaktr_maps(model, images, LABELS), "minmax")
    masks = pseudo_labels(maps, LABELS, background=0.43, size=maps.shape[-2:])
    stacked = torch.cat([torch.full_like(maps[:, :1], 0.43), maps], dim=1)
    assert torch.equal(masks, stacked.argmax(1)) and set(masks[0].unique().tolist()) > {0}


def test_maps_refused(model, images):
    with pytest.raises(ValueError, match="fusion: found 'max', expected one of adaptive, mean, coarse"):
        weaktr_maps(model, images, LABELS, "max")
    with pytest.raises(ValueError, match=r"labels: found shape \(2, 4\), expected \(3, 4\)"):
        weaktr_maps(model, images, LABELS[:2])
    with pytest.raises(ValueError, match="labels: found values"):
        weaktr_maps(model, images, LABELS * 2)
    with pytest.raises(ValueError, match="images: found 40x64 pixels, expected multiples of 16"):
        weaktr_maps(model, images[:, :, :40], LABELS)


# ------------------------------------------------------------------ DenseCRF on labels


def noisy_scene(height=12, width=14, side=3):
    """Squares of random colours and labels (background, 2, 3, unknown), both with noise."""
    generator = torch.Generator().manual_seed(4)

    def squares(channels):
        coarse = torch.rand(channels, -(-height // side), -(-width // side), generator=generator)
        return coarse.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, :height, :width]

    image = 100 + 40 * squares(3) + 2 * torch.randn(3, height, width, generator=generator)
    mask = torch.tensor([0, 2, 3, 255])[(squares(1)[0] * 4).long()]
    noise = torch.rand(height, width, generator=generator)
    mask[noise < 0.1] = 2
    mask[noise > 0.9] = 0
    return image, mask


def looped_crf(image, mask, classes, spatial, bilateral, gt_prob, num_iter):
    """One picture's mask, over these classes."""
    rest = -np.log((1 - gt_prob) / (len(classes) - 1))
    unary = np.full((len(classes), *mask.shape), rest)
    for y in range(mask.shape[0]):
        for x in range(mask.shape[1]):
            if mask[y, x] == 255:
                unary[:, y, x] = np.log(len(classes))
            else:
                unary[classes.index(mask[y, x]), y, x] = -np.log(gt_prob)
    found = naive_dense_crf.dense_crf(unary, image.double().numpy(), spatial, bilateral, num_iter, "lattice")
    return torch.tensor(classes)[torch.from_numpy(found).argmax(0)]


VOC = {"spatial": (4, 3), "bilateral": (83, 5, 3), "gt_prob": 0.7, "num_iter": 10}
OTHERS = [{"spatial": (3, 3)}, {"bilateral": (50, 5, 10)}, {"gt_prob": 0.5}, {"num_iter": 2}]


def test_label_crf_agrees_with_loops():
    """The same masks, pixel by pixel; and each setting, the defaults included, plays a part."""
    image, mask = noisy_scene()
    labels = torch.tensor([[0.0, 1, 1, 0]])
    found = crf_labels(mask[None], labels, image[None])
    assert found.dtype == torch.long and found.unique().tolist() == [0, 2, 3]
    assert torch.equal(found[0], looped_crf(image, mask.numpy(), [0, 2, 3], **VOC))
    for other in OTHERS:
        settings = {**VOC, **other}
        others = crf_labels(mask[None], labels, image[None], **settings)
        assert torch.equal(others[0], looped_crf(image, mask.numpy(), [0, 2, 3], **settings))
        assert not torch.equal(others, found), other


def test_label_crf_of_a_batch_is_that_of_each_picture():
    image, mask = noisy_scene()
    images, masks = torch.stack([image, image.flip(-1), image]), torch.stack([mask, mask.flip(-1), mask * 0])
    labels = torch.tensor([[0.0, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]])
    found = crf_labels(masks, labels, images)
    for b in range(3):
        assert torch.equal(found[b], crf_labels(masks[b : b + 1], labels[b : b + 1], images[b : b + 1])[0])
    assert not found[2].any()  # no class, no foreground
    unknown = crf_labels(torch.full((1, 12, 14), 255), labels[:1], images[:1])
    assert set(unknown.unique().tolist()) <= {0, 2, 3}
    assert torch.equal(crf_labels(masks.to(torch.uint8), labels, images), found)


def test_label_crf_refused():
    image, mask = noisy_scene()
    labels, images, masks = torch.tensor([[0.0, 1, 0, 0]]), image[None], mask[None]
    with pytest.raises(ValueError, match=r"masks: found \[3\], expected \[0, 2\] \(background, present"):
        crf_labels(masks, labels, images)
    with pytest.raises(ValueError, match=r"images: found shape \(1, 3, 12, 13\), expected \(1, 3, 12, 14\)"):
        crf_labels(masks, labels, images[..., 1:])
    with pytest.raises(ValueError, match="masks: found torch.float32"):
        crf_labels(masks.float(), labels, images)
    with pytest.raises(ValueError, match=r"labels: found shape \(2, 4\)"):
        crf_labels(masks, labels.expand(2, 4), images)
    with pytest.raises(ValueError, match="gt_prob"):
        crf_labels(masks, torch.tensor([[0.0, 1, 1, 0]]), images, gt_prob=1.0)
