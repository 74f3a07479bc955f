"""Saliency: against loops, on painted pictures, from folders, and how well it finds ToyVOC's objects."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from wsss_lib.data.transforms import EvalTransform, TrainTransform, collate
from wsss_lib.data.voc import VOC
from wsss_lib.paths import shipped
from wsss_lib.refinement import (
    ContrastSaliency,
    FolderSaliency,
    complete_labels,
    contrast_saliency,
    saliency_report,
)
from wsss_lib.refinement.saliency import (
    BANDWIDTH,
    RAREST,
    FMeasure,
    all_foreground,
    border_rareness,
    centre_prior,
    cielab,
)

GREEN, RED = torch.tensor([60.0, 130.0, 70.0]), torch.tensor([200.0, 40.0, 40.0])


@pytest.fixture(scope="module")
def data():
    return VOC(shipped("toyvoc"), "val", truth="mask")


@pytest.fixture(scope="module")
def pictures(data):
    """(4, 3, 112, 112) uint8."""
    return torch.stack([torch.as_tensor(data[i].image) for i in range(4)])


def painted(size, *boxes):
    """A green picture (1, 3, H, W) with a red rectangle for each (y0, y1, x0, x1)."""
    image = GREEN[:, None, None].repeat(1, *size)
    for y0, y1, x0, x1 in boxes:
        image[:, y0:y1, x0:x1] = RED[:, None, None]
    return image[None]


# ------------------------------------------------------------------ contrast


def test_rareness_against_loops(pictures):
    """Every pixel with every border pixel (a small picture is not subsampled), in float64."""
    lab = cielab(pictures[:1, :, 30:46, 20:39] / 255)[0]
    _, height, width = lab.shape
    colours = lab.double().numpy()
    sides = [[(0, x) for x in range(width)], [(height - 1, x) for x in range(width)],
             [(y, 0) for y in range(height)], [(y, width - 1) for y in range(height)]]
    expected = np.zeros((height, width))
    for y, x in np.ndindex(height, width):
        densities = []
        for side in sides:
            squares = [((colours[:, y, x] - colours[:, v, u]) ** 2).sum() / BANDWIDTH**2 for v, u in side]
            densities.append(sum(math.exp(-s / 2) for s in squares) / len(side))
        expected[y, x] = -math.log(max(sorted(densities)[2], RAREST))
    # distances in float32 from products that cancel: 5e-4 of a standard deviation for near colours
    np.testing.assert_allclose(border_rareness(lab).numpy(), expected, rtol=0, atol=1e-3)
    assert expected.max() > 5


def test_colours_of_cielab():
    """White, black, and the three primaries as tables have them."""
    rgb = torch.tensor([[1.0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0.5]])
    lab = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86],
           [53.39, 0, 0]]
    found = cielab(rgb.T[None, :, None])[0, :, 0].T  # (1, 3, 1, 6) -> (6, 3)
    # tables whose matrix has other fifth digits
    torch.testing.assert_close(found, torch.tensor(lab), rtol=0, atol=0.05)


def test_an_object_stands_out_and_may_touch_one_side():
    inside = contrast_saliency(painted((40, 50), (10, 25, 20, 35)))[0]
    assert inside[12:23, 22:33].min() > 0.99 and inside[:8].max() < 0.01
    touching = contrast_saliency(painted((40, 50), (10, 25, 38, 50)))[0]
    assert touching[12:23, 40:].min() > 0.99 and touching[:, :35].max() < 0.01
    # What runs from side to side is background, like a road.
    road = contrast_saliency(painted((40, 50), (10, 25, 0, 50)))[0]
    assert road.max() < 0.5


def test_a_picture_of_one_colour_has_no_foreground():
    assert not contrast_saliency(painted((40, 50))).any()
    noise = 3 * torch.rand(1, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    assert contrast_saliency(painted((40, 50)) + noise).max() < 0.5


def test_values_batches_and_types(pictures):
    saliency = contrast_saliency(pictures)
    assert saliency.dtype == torch.float32 and saliency.shape == (4, 112, 112)
    assert saliency.min() >= 0 and saliency.max() <= 1 and (saliency.amax((1, 2)) > 0.9).all()
    assert torch.equal(saliency, contrast_saliency(pictures))
    # Products of matrices of other shapes round otherwise: 1e-6 was measured.
    for b in range(4):
        torch.testing.assert_close(contrast_saliency(pictures[b : b + 1])[0], saliency[b], rtol=0, atol=1e-4)
    for dtype in (torch.float32, torch.float64, torch.float16):  # all hold whole numbers up to 255
        assert torch.equal(contrast_saliency(pictures.to(dtype)), saliency)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrast_saliency(pictures), saliency)


def test_mirror_images(pictures):
    small = pictures[:, :, 20:80:2, 20:100:2]  # 30 x 40: every border pixel but one in a side is a sample
    for flip in (2, 3):
        found = contrast_saliency(small[..., :30].flip(flip)).flip(flip - 1)
        torch.testing.assert_close(found, contrast_saliency(small[..., :30]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (1, 20), (2, 3), (200, 301), (520, 90)])
def test_any_size(pictures, size):
    images = torch.nn.functional.interpolate(pictures[:1].float(), size, mode="bilinear")
    saliency = contrast_saliency(images)
    assert saliency.shape == (1, *size) and saliency.isfinite().all()


def test_larger_pictures_have_the_same_map(pictures):
    """Twice the size: enlarging and shrinking blur edges, the map of most pixels stays."""
    images = torch.nn.functional.interpolate(pictures.float(), (224, 224), mode="bilinear")
    large, small = contrast_saliency(images), contrast_saliency(pictures)
    assert (large[:, ::2, ::2] - small).abs().mean() < 0.05
    resize = torch.nn.functional.interpolate
    shrunk = contrast_saliency(resize(images, (128, 128), mode="bilinear", antialias=True))
    # 0..255 resized, or 0..1: rounding, which products that cancel enlarge
    expected = resize(shrunk[:, None], (224, 224), mode="bilinear")[:, 0]
    torch.testing.assert_close(large, expected, rtol=0, atol=1e-4)


def test_wrong_pictures():
    images = torch.zeros(1, 3, 8, 8)
    wrong = [
        (images[0], r"images: found shape \(3, 8, 8\), expected \(B, 3, H, W\)"),
        (images[:, :, :0], "images: found shape"),
        (images.long(), "images: found torch.int64, expected uint8 or floating point"),
        (images - 1, "images: found values -1 to -1, expected 0 to 255"),
        (images + 256, "images: found values 256 to 256"),
        (images / 0, "images: found values nan"),
    ]
    for value, message in wrong:
        with pytest.raises(ValueError, match=message):
            contrast_saliency(value)


# ------------------------------------------------------------------ in a training loop


def test_contrast_of_a_batch_leaves_padding_out(data):
    batch = collate([EvalTransform(keep_uint8=True)(data[i]) for i in range(3)])
    assert torch.equal(ContrastSaliency()(batch), contrast_saliency(batch["image_uint8"]))
    torch.manual_seed(0)
    transform = TrainTransform(128, scale_range=(0.4, 1.0), keep_uint8=True)
    batch = collate([transform(data[i]) for i in range(3)])
    saliency = ContrastSaliency()(batch)
    assert saliency.shape == (3, 128, 128)
    for image, (y0, x0, y1, x1), found in zip(batch["image_uint8"], batch["box"].tolist(), saliency):
        assert (y1 - y0) * (x1 - x0) < 128 * 128
        assert torch.equal(found[y0:y1, x0:x1], contrast_saliency(image[None, :, y0:y1, x0:x1])[0])
        found[y0:y1, x0:x1] = 0
        assert not found.any()


def write_map(folder, name, grey, mode="L"):
    Image.fromarray(np.asarray(grey, np.uint8)).convert(mode).save(folder / f"{name}.png")


def test_maps_from_a_folder(tmp_path):
    ramp = np.add.outer(np.arange(30), 4 * np.arange(40))
    for name, mode in (("grey", "L"), ("colour", "RGB"), ("palette", "P")):
        write_map(tmp_path, name, ramp, mode)
    source = FolderSaliency(tmp_path)
    batch = {"name": ["grey", "colour"], "image_uint8": torch.zeros(2, 3, 30, 40)}
    expected = torch.tensor(ramp / 255, dtype=torch.float32)
    assert torch.equal(source(batch), expected.expand(2, -1, -1))
    assert torch.equal(source.read("palette"), expected)
    # A ramp stays a ramp at other sizes, but for its ends.
    double = source({"name": ["grey"], "image_uint8": torch.zeros(1, 3, 60, 80)})[0]
    torch.testing.assert_close(double[1:-1:2, 1:-1:2], (expected[:-1, :-1] * 255 + 1.25)[:, :39] / 255)
    half = source.read("grey", (15, 20))
    torch.testing.assert_close(half[2:-2, 2:-2], (expected[::2, ::2] * 255 + 2.5)[2:-2, 2:-2] / 255)
    write_map(tmp_path, "stripes", np.tile([255, 0, 0, 255], (40, 10)))
    quarter = source.read("stripes", (10, 10))  # averages stripes, where every fourth pixel would miss them
    assert quarter.min() > 0.3 and quarter.max() < 0.7
    assert source.read("grey", (17, 22)).shape == (17, 22)  # 0.55 times, rounded
    labels = complete_labels(torch.zeros(2, 1, 30, 40), torch.ones(2, 1), source(batch))
    assert labels.masks.any()


def test_wrong_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder of saliency maps"):
        FolderSaliency(tmp_path / "nowhere")
    source = FolderSaliency(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"absent\.png"):
        source.read("absent")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png"):
        source.read("broken")
    Image.fromarray(np.eye(6, dtype=np.uint8)[..., None] * np.array([9, 99, 199], np.uint8)).save(
        tmp_path / "red.png")
    with pytest.raises(ValueError, match=r"red\.png: found colours, expected a grey map"):
        source.read("red")
    write_map(tmp_path, "wide", np.zeros((30, 40)))
    batch = {"name": ["wide"], "image_uint8": torch.zeros(1, 3, 30, 30)}
    with pytest.raises(ValueError, match=r"wide\.png: found 30 x 40 \(height x width\), expected .* 30 x 30"):
        source(batch)
    source.read("wide", (30, 41))  # as the rounding of 30 x 40.6 would be
    with pytest.raises(ValueError, match=r"wide\.png: found 30 x 40 .* 30 x 42"):
        source.read("wide", (30, 42))


# ------------------------------------------------------------------ how good it is


def test_f_measure_against_loops():
    generator = torch.Generator().manual_seed(0)
    saliency = torch.rand(3, 9, 11, generator=generator)
    saliency[0, :4] = 0.5  # not above it
    masks = torch.randint(0, 4, (3, 9, 11), generator=generator)
    masks[masks == 3] = 255
    counter = FMeasure()
    counter.update(saliency[:1], masks[:1].byte())
    counter.update(saliency[1:].double(), masks[1:])
    pairs = [(s, m > 0) for s, m in zip(saliency.flatten().tolist(), masks.flatten().tolist()) if m != 255]
    curve = []
    for threshold in torch.linspace(0, 1, 101).tolist():
        hits = sum(truth for s, truth in pairs if s > threshold)
        found, there = sum(s > threshold for s, _ in pairs), sum(truth for _, truth in pairs)
        precision, recall = hits / max(found, 1), hits / there
        curve.append(1.3 * precision * recall / max(0.3 * precision + recall, 1e-9))
    torch.testing.assert_close(counter.curve(), torch.tensor(curve, dtype=torch.float64))
    best = max(range(101), key=lambda k: curve[k])
    assert counter.to_json() == {
        "max_f": {"f": round(curve[best], 4), "threshold": best / 100, "oracle": True},
        "f": {"f": round(curve[50], 4), "threshold": 0.5, "oracle": False},
        "mae": round(sum(abs(s - truth) for s, truth in pairs) / len(pairs), 4),
    }
    assert counter.share() == pytest.approx(sum(truth for _, truth in pairs) / len(pairs))


def test_f_measure_refuses():
    with pytest.raises(ValueError, match=r"saliency: found shape \(1, 2, 2\), expected \(1, 3, 3\)"):
        FMeasure().update(torch.zeros(1, 2, 2), torch.zeros(1, 3, 3).long())
    counter = FMeasure()
    with pytest.raises(ValueError, match="masks: found 0 pixels, none of them foreground"):
        counter.to_json()
    counter.update(torch.zeros(1, 3, 3), torch.zeros(1, 3, 3).long())
    with pytest.raises(ValueError, match="masks: found 9 pixels, none of them foreground"):
        counter.to_json()


def test_contrast_finds_the_objects_of_toyvoc(data):
    """F at 0.5 on 30 shipped pictures: far above the baselines that look at none."""
    report = saliency_report(data, limit=30)
    scores = {name: score["f"]["f"] for name, score in report["methods"].items()}
    assert list(scores) == ["contrast", "centre_prior", "all_foreground"]
    assert scores["contrast"] > 0.8 and 0.5 > scores["centre_prior"] > scores["all_foreground"]
    assert report["pictures"] == 30 and report["split"] == "val"
    share = report["foreground_share"]  # everything called foreground: precision is the share, recall 1
    assert scores["all_foreground"] == pytest.approx(1.3 * share / (0.3 * share + 1), abs=2e-4)
    assert report["methods"]["all_foreground"]["mae"] == pytest.approx(1 - share, abs=2e-4)


def test_reports_take_any_source(data, tmp_path):
    for i in range(3):
        mask = torch.as_tensor(data[i].mask)
        write_map(tmp_path, data[i].name, 255 * ((mask > 0) & (mask < 255)))
    report = saliency_report(data, FolderSaliency(tmp_path), limit=3)
    assert report["methods"]["given"]["f"]["f"] == 1 and report["methods"]["given"]["mae"] == 0
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    report = saliency_report(data, "all_foreground", limit=1)
    assert list(report["methods"]) == ["all_foreground", "centre_prior"]
    with pytest.raises(ValueError, match="method: found 'deep', expected one of contrast, centre_prior, all"):
        saliency_report(data, "deep")


def test_baselines():
    batch = {"image_uint8": torch.zeros(2, 3, 5, 9)}
    assert torch.equal(all_foreground(batch), torch.ones(2, 5, 9))
    prior = centre_prior(batch)
    assert prior.shape == (2, 5, 9) and prior[0, 2, 4] == 1 and prior[0].argmax() == 22
    assert torch.equal(prior, prior.flip(1)) and torch.equal(prior, prior.flip(2))
