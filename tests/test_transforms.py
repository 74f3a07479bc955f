"""Joint transforms: picture and masks stay together, the box is the picture, the padding is not."""

import pytest
import torch
from torchvision import tv_tensors

from wsss_lib.data.sample import Sample
from wsss_lib.data.transforms import ClassificationTransform, EvalTransform, TrainTransform, collate, scaled_views

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def blocks(height=48, width=64, block=16, **kw) -> Sample:
    """Blocks of flat colour, no two alike: the mask's value v has the colour (8 v, 255 - 8 v, 4 v)."""
    rows, columns = torch.arange(height) // block, torch.arange(width) // block
    mask = (rows[:, None] * (-(-width // block)) + columns[None] + 1).to(torch.uint8)
    value = mask.int()
    image = torch.stack([8 * value, 255 - 8 * value, 4 * value]).to(torch.uint8)
    return Sample("blocks", tv_tensors.Image(image), torch.ones(3), mask=tv_tensors.Mask(mask), **kw)


def denormalised(image, mean=MEAN, std=STD):
    """Normalised (3, S, S) -> values in 0..255."""
    return 255 * (image * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None])


def inside(box, size):
    y0, x0, y1, x1 = box.tolist()
    region = torch.zeros(size, size, dtype=torch.bool)
    region[y0:y1, x0:x1] = True
    return region


def test_shapes_and_types():
    sample = blocks(instances=tv_tensors.Mask(torch.ones(48, 64, dtype=torch.uint8)))
    out = TrainTransform(32, mean=MEAN, std=STD, keep_uint8=True)(sample)
    assert set(out) == {"image", "labels", "name", "box", "image_uint8", "mask", "instances"}
    assert out["image"].shape == (3, 32, 32) and out["image"].dtype == torch.float32
    assert out["image_uint8"].shape == (3, 32, 32) and out["image_uint8"].dtype == torch.uint8
    assert out["box"].shape == (4,) and out["box"].dtype == torch.long
    for field in ("mask", "instances"):
        assert out[field].shape == (32, 32) and out[field].dtype == torch.long
    assert out["name"] == "blocks" and torch.equal(out["labels"], torch.ones(3))
    assert all(type(value) in (torch.Tensor, str) for value in out.values())
    bare = TrainTransform(32)(Sample("a", sample.image, sample.labels))
    assert set(bare) == {"image", "labels", "name", "box"}


def test_mask_and_picture_stay_aligned_exactly_without_rescale():
    torch.manual_seed(0)
    transform = TrainTransform(40, scale_range=(1, 1), mean=MEAN, std=STD)
    corners = set()
    for _ in range(30):
        out = transform(blocks())
        picture = denormalised(out["image"]).round()
        assert torch.equal(picture[0], 8.0 * out["mask"]) and torch.equal(picture[1], 255 - 8.0 * out["mask"])
        corners.add((int(out["mask"][0, 0]), int(out["mask"][0, -1])))
    assert len(corners) > 3 and any(a < b for a, b in corners) and any(a > b for a, b in corners)


def test_mask_and_picture_stay_aligned_under_rescale():
    torch.manual_seed(1)
    transform = TrainTransform(56, scale_range=(0.5, 2.0), mean=MEAN, std=STD)
    for _ in range(30):
        out = transform(blocks())
        picture = denormalised(out["image"])
        valid = inside(out["box"], 56)
        # Bilinear blends at the edges of blocks; in their inside colour and mask agree.
        agrees = (picture[0] - 8.0 * out["mask"]).abs() < 2
        assert agrees[valid].float().mean() > 0.7
        # At an edge the nearest pixel holds the bigger share of the blend, so picture and mask are on the
        # same side of it, and half the difference of the neighbours (1 across, 4 down) bounds the error.
        assert (picture[0] - 8.0 * out["mask"])[valid].abs().max() <= 8 * 5 / 2 + 2


def test_long_side_comes_before_the_scale():
    """A picture of 20x40 pixels, long side 80, then half: 20x40 again, so the crop of 40 holds all of it."""
    sample = blocks(20, 40)
    out = TrainTransform(40, scale_range=(0.5, 0.5), long_side=(80, 80))(sample)
    y0, x0, y1, x1 = out["box"].tolist()
    assert (y1 - y0, x1 - x0) == (20, 40)
    sizes = {tuple((b[2:] - b[:2]).tolist()) for b in
             (TrainTransform(90, scale_range=(1, 1), long_side=(60, 90))(sample)["box"] for _ in range(20))}
    assert len(sizes) > 3 and all(60 <= w <= 90 and h in (w // 2, (w + 1) // 2) for h, w in sizes)


def test_classification_transform_is_seeded_by_torch_and_refuses_truths():
    sample = blocks()
    bare = Sample("a", sample.image, sample.labels)
    transform = ClassificationTransform(32, MEAN, STD)
    views = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        views.append(transform(bare)["image"])
    assert views[0].shape == (3, 32, 32) and torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])
    assert transform(bare).keys() == TrainTransform(32)(bare).keys()
    with pytest.raises(ValueError, match=r"sample .*: found \['mask'"):
        transform(sample)


def test_flip_is_joint_and_optional():
    sample = blocks(32, 32, 16)
    plain = TrainTransform(32, scale_range=(1, 1), flip=0.0, mean=MEAN, std=STD)(sample)
    mirror = TrainTransform(32, scale_range=(1, 1), flip=1.0, mean=MEAN, std=STD)(sample)
    assert torch.equal(plain["mask"], sample.mask.long())
    assert not torch.equal(mirror["mask"], plain["mask"])
    assert torch.equal(mirror["mask"], plain["mask"].flip(-1))
    assert torch.equal(mirror["image"], plain["image"].flip(-1))


@pytest.mark.parametrize("height, width", [(20, 20), (20, 64), (64, 20), (31, 32), (64, 64)])
def test_box_is_exactly_the_picture(height, width):
    torch.manual_seed(2)
    transform = TrainTransform(32, scale_range=(1, 1), mean=MEAN, std=STD, keep_uint8=True)
    # A flat colour far from the mean: no pixel of the picture can pass for padding.
    image = tv_tensors.Image(torch.full((3, height, width), 250, dtype=torch.uint8))
    mask = tv_tensors.Mask(torch.full((height, width), 7, dtype=torch.uint8))
    sample = Sample("a", image, torch.ones(3), mask=mask)
    boxes = set()
    for _ in range(40):
        out = transform(sample)
        valid = inside(out["box"], 32)
        assert valid.sum() == min(height, 32) * min(width, 32)
        assert torch.equal(out["mask"] == 7, valid) and (out["mask"][~valid] == 255).all()
        assert (out["image"][:, ~valid] == 0).all() and (out["image"][:, valid] > 1).all()
        assert (out["image_uint8"][:, valid] == 250).all()
        # 255 * 0.485 = 123.7, 255 * 0.456 = 116.3, 255 * 0.406 = 103.5
        assert (out["image_uint8"][:, ~valid] == torch.tensor([[124], [116], [104]])).all()
        boxes.add(tuple(out["box"].tolist()))
    assert (len(boxes) > 1) == (min(height, width) < 32)  # the offset of the padding is random
    assert out["image"].dtype == torch.float32


def test_scale_covers_its_range():
    torch.manual_seed(3)
    transform = TrainTransform(200, scale_range=(0.5, 2.0), mean=MEAN, std=STD)
    scales = []
    for _ in range(100):
        y0, x0, y1, x1 = transform(blocks())["box"].tolist()
        assert abs((y1 - y0) / 48 - (x1 - x0) / 64) < 0.03  # the aspect ratio is kept
        scales.append((x1 - x0) / 64)
    assert 0.49 < min(scales) < 0.6 and 1.9 < max(scales) < 2.01


def test_reproducible_under_a_seed():
    transform = TrainTransform(40, color_jitter=(0.4, 0.4, 0.4, 0.1), mean=MEAN, std=STD, keep_uint8=True)

    def run(seed):
        torch.manual_seed(seed)
        return [transform(blocks()) for _ in range(4)]

    first, again, other = run(5), run(5), run(6)
    for a, b in zip(first, again):
        assert all(torch.equal(a[key], b[key]) for key in a if key != "name")
    assert not all(torch.equal(a["image"], b["image"]) for a, b in zip(first, other))


def test_colour_jitter_changes_colour_only():
    torch.manual_seed(4)
    sample = blocks(32, 32)
    out = TrainTransform(32, (1, 1), 0.0, (0.4, 0.4, 0.4, 0.1), MEAN, STD, keep_uint8=True)(sample)
    assert not torch.equal(out["image_uint8"], sample.image.as_subclass(torch.Tensor))
    assert torch.equal(out["mask"], sample.mask.long())
    # image and image_uint8 are the same view
    assert (denormalised(out["image"]) - out["image_uint8"]).abs().max() < 0.01


def test_sample_is_not_changed():
    sample = blocks(32, 32)
    image, mask = sample.image.clone(), sample.mask.clone()
    TrainTransform(32, (1, 1), 0.0)(sample)["image"].zero_()
    EvalTransform()(sample)["mask"].zero_()
    assert torch.equal(sample.image, image) and torch.equal(sample.mask, mask)


def test_eval_transform():
    sample = blocks()
    out = EvalTransform(mean=MEAN, std=STD, keep_uint8=True)(sample)
    assert torch.equal(denormalised(out["image"]).round(), sample.image.as_subclass(torch.Tensor).float())
    assert torch.equal(out["image_uint8"], sample.image) and out["box"].tolist() == [0, 0, 48, 64]
    for size, expected in ((32, (32, 32)), ((24, 40), (24, 40))):
        out = EvalTransform(size)(sample)
        assert out["image"].shape == (3, *expected) and out["box"].tolist() == [0, 0, *expected]
        assert torch.equal(out["mask"], sample.mask.long()) and out["mask"].dtype == torch.long


def test_collate_stacks():
    batch = collate([TrainTransform(32, keep_uint8=True)(blocks()) for _ in range(3)])
    assert batch["image"].shape == batch["image_uint8"].shape == (3, 3, 32, 32)
    assert batch["mask"].shape == (3, 32, 32) and batch["box"].shape == (3, 4)
    assert batch["labels"].shape == (3, 3)
    assert batch["name"] == ["blocks"] * 3


def test_collate_keeps_masks_of_differing_sizes_as_a_list():
    samples = [blocks(32, 48), blocks(48, 32)]
    batch = collate([EvalTransform(32)(sample) for sample in samples])
    assert batch["image"].shape == (2, 3, 32, 32)
    assert isinstance(batch["mask"], list) and [tuple(m.shape) for m in batch["mask"]] == [(32, 48), (48, 32)]


def test_collate_refuses():
    a, b = EvalTransform()(blocks(32, 48)), EvalTransform()(blocks(48, 32))
    with pytest.raises(ValueError, match=r"image: .*\(3, 32, 48\).*\(3, 48, 32\)"):
        collate([a, b])
    with pytest.raises(ValueError, match="no samples"):
        collate([])
    with pytest.raises(ValueError, match="mask"):
        collate([a, {key: value for key, value in a.items() if key != "mask"}])


def test_scaled_views():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 40, 56)
    views = list(scaled_views(images, (0.5, 1.0, 1.5), flip=True, multiple_of=16))
    assert [(scale, flipped) for scale, flipped, _ in views] == [
        (s, f) for s in (0.5, 1.0, 1.5) for f in (False, True)
    ]
    # 20 x 28 -> 16 x 32; 40 and 56 lie half-way, where Python rounds to even: 32 x 64; 60 x 84 -> 64 x 80
    assert [tuple(view.shape[-2:]) for _, _, view in views[::2]] == [(16, 32), (32, 64), (64, 80)]
    for (_, _, plain), (_, _, mirror) in zip(views[::2], views[1::2]):
        assert torch.equal(mirror, plain.flip(-1))
    ((scale, flipped, same),) = scaled_views(images)
    assert scale == 1.0 and flipped is False and torch.equal(same, images)
    ((_, _, tiny),) = scaled_views(images, (0.01,), multiple_of=8)
    assert tiny.shape == (2, 3, 8, 8)


def test_scaled_views_interpolate_as_documented():
    ramp = torch.arange(8.0).expand(1, 3, 8, 8)
    ((_, _, twice),) = scaled_views(ramp, (2.0,))
    assert torch.allclose(twice[0, 0, 0, 1:5], torch.tensor([0.25, 0.75, 1.25, 1.75]))  # align_corners False
    stripes = (torch.arange(32) % 2).float().expand(1, 3, 32, 32)
    ((_, _, quarter),) = scaled_views(stripes, (0.25,))
    assert (quarter - 0.5).abs().max() < 0.1  # antialias: without it 0.5 only by luck of the phase
    ((_, _, odd),) = scaled_views((torch.arange(33) % 3 == 0).float().expand(1, 3, 33, 33), (1 / 3,))
    assert (odd - 1 / 3).abs().max() < 0.15  # plain bilinear would pick single columns: 0 everywhere


@pytest.mark.parametrize(
    "call, field",
    [
        (lambda: TrainTransform(0), "crop_size"),
        (lambda: TrainTransform(32.5), "crop_size"),
        (lambda: TrainTransform(32, scale_range=(2.0, 0.5)), "scale_range"),
        (lambda: TrainTransform(32, long_side=(2.0, 0.5)), "long_side"),
        (lambda: TrainTransform(32, scale_range=(0.0, 1.0)), "scale_range"),
        (lambda: TrainTransform(32, scale_range=(1.0,)), "scale_range"),
        (lambda: TrainTransform(32, flip=1.5), "flip"),
        (lambda: TrainTransform(32, color_jitter=(0.4, 0.4)), "color_jitter"),
        (lambda: TrainTransform(32, color_jitter=(0.4, 0.4, 0.4, 0.9)), "hue"),
        (lambda: TrainTransform(32, mean=(0.5,)), "mean"),
        (lambda: TrainTransform(32, mean=(123.0, 116.0, 103.0)), "mean"),
        (lambda: TrainTransform(32, std=(0.5, 0.0, 0.5)), "std"),
        (lambda: EvalTransform(0), "size"),
        (lambda: EvalTransform((32, -1)), "size"),
        (lambda: EvalTransform((32, 32, 32)), "size"),
        (lambda: EvalTransform(std=(0.5, 0.5)), "std"),
        # The call itself reports, before the first view is asked for.
        (lambda: scaled_views(torch.zeros(1, 3, 8, 8), ()), "scales"),
        (lambda: scaled_views(torch.zeros(1, 3, 8, 8), (1.0, 0.0)), "scales"),
        (lambda: scaled_views(torch.zeros(1, 3, 8, 8), multiple_of=0), "multiple_of"),
    ],
)
def test_bad_arguments(call, field):
    with pytest.raises(ValueError, match=field):
        call()
