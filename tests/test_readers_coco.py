"""The COCO reader: labels, masks from polygons and run lengths, and what it says of bad input."""

import json

import numpy as np
import pytest
import torch
from trees import HEIGHT, WIDTH, annotation, box, coco_content, coco_tree, message, write_picture

from wsss_lib.data.coco import COCO, COCO_CLASSES, polygon_mask, rle_counts, rle_mask

JSON = "annotations/instances_train2014.json"
FIRST, THIRD = "COCO_train2014_000000000001", "COCO_train2014_000000000003"


def encode(counts: list[int]) -> str:
    """The compressed string, from the format's description: an independent check of the decoder."""
    text = ""
    for i, count in enumerate(counts):
        value = count - counts[i - 2] if i > 2 else count
        while True:
            group, value = value & 31, value >> 5
            last = value == (-1 if group & 16 else 0)
            text += chr(48 + group + (0 if last else 32))
            if last:
                break
    return text


# What is read


def test_classes():
    assert len(COCO_CLASSES) == len(set(COCO_CLASSES)) == 80
    assert (COCO_CLASSES[0], COCO_CLASSES[11], COCO_CLASSES[79]) == ("person", "stop sign", "toothbrush")


def test_category_ids_become_classes(tmp_path):
    # The ids on either side of the gaps.
    expected = {
        11: "fire hydrant", 13: "stop sign", 25: "giraffe", 27: "backpack", 28: "umbrella", 31: "handbag",
        44: "bottle", 46: "wine glass", 65: "bed", 67: "dining table", 70: "toilet", 72: "tv",
        82: "refrigerator", 84: "book", 90: "toothbrush",
    }  # fmt: skip
    content = coco_content()
    content["annotations"] = [annotation(n, 1, k, [box(0, 0, 2, 2)], 4.0) for n, k in enumerate(expected)]
    labels = COCO(coco_tree(tmp_path, content)).labels[0]
    assert [COCO_CLASSES[c] for c in labels.nonzero()[:, 0]] == list(expected.values())


def test_labels_and_names(tmp_path):
    data = COCO(coco_tree(tmp_path))
    assert data.names == [FIRST, THIRD] and len(data) == 2 and data.num_classes == 80
    assert data.unlabelled == ["COCO_train2014_000000000002"]
    assert data.labels.shape == (2, 80) and data.labels.dtype == torch.float32
    assert [row.nonzero()[:, 0].tolist() for row in data.labels] == [[16], [0, 79]]
    sample = data[1]
    assert sample.name == THIRD and sample.truths() == {} and sample.image.shape == (3, HEIGHT, WIDTH)
    sample.labels.zero_()
    assert data.labels[1].sum() == 2
    assert len(list(data)) == 2


def test_crowd_counts_as_label(tmp_path):
    content = coco_content()
    content["annotations"] = [a for a in content["annotations"] if a["iscrowd"]]
    assert COCO(coco_tree(tmp_path, content)).labels.nonzero().tolist() == [[0, 0]]


@pytest.mark.parametrize("crowd, value", [("ignore", 255), ("class", 1)])
def test_masks(tmp_path, crowd, value):
    data = COCO(coco_tree(tmp_path), truth=("mask", "instances"), crowd=crowd)
    expected = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    expected[4:6] = value  # the crowd, underneath
    expected[1:5, 1:5] = 1
    expected[2:4, 2:4] = 80  # the smaller one on top, though it comes first in the file
    assert np.array_equal(data[1].mask.numpy(), expected) and data[1].mask.dtype == torch.uint8
    numbers = np.where(expected == 80, 2, 0)
    numbers[4:6] = 255
    numbers[1:5, 1:5] = 1
    numbers[2:4, 2:4] = 2
    assert np.array_equal(data[1].instances.numpy(), numbers)
    two_parts = np.zeros((HEIGHT, WIDTH))
    two_parts[:2, :2] = two_parts[4:, 6:] = 17
    assert np.array_equal(data[0].mask.numpy(), two_parts)


def test_truth_opens_only_what_is_asked(tmp_path):
    root = coco_tree(tmp_path)
    for field in ("mask", "instances"):
        assert list(COCO(root, truth=field)[0].truths()) == [field]


# Polygons and run lengths


def test_polygon_of_whole_pixels_is_exact():
    expected = np.zeros((6, 8), dtype=bool)
    expected[1:5, 2:7] = True
    assert np.array_equal(polygon_mask([np.array(box(2, 1, 7, 5), dtype=np.float32)], 6, 8), expected)


def test_polygon_takes_pixels_by_their_centre():
    def row(x0, x1):
        return polygon_mask([np.array(box(x0, 0, x1, 1), dtype=np.float32)], 1, 6)[0].astype(int).tolist()

    assert row(1.3, 3.7) == [0, 1, 1, 1, 0, 0]
    assert row(1.7, 3.3) == [0, 0, 1, 0, 0, 0]
    assert row(-5, 2) == [1, 1, 0, 0, 0, 0]  # beyond the picture
    assert row(5, 60) == [0, 0, 0, 0, 0, 1]
    assert row(8, 9) == [0, 0, 0, 0, 0, 0]


def test_polygon_has_the_right_area():
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    circle = np.stack([50 + 30 * np.cos(angles), 40 + 30 * np.sin(angles)], 1).astype(np.float32)
    mask = polygon_mask([circle.ravel()], 80, 100)
    y, x = np.mgrid[:80, :100] + 0.5
    assert (mask != ((x - 50) ** 2 + (y - 40) ** 2 < 30**2)).sum() < 30  # of 2,827
    assert abs(mask.sum() / (np.pi * 30**2) - 1) < 0.02


def test_run_lengths_go_down_the_columns():
    assert rle_mask([1, 2, 3], 2, 3).astype(int).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert rle_mask([0, 6], 2, 3).all() and not rle_mask([6], 2, 3).any()


@pytest.mark.parametrize(
    "text, counts",
    [
        ("6", [6]),  # 48 + 6
        ("123", [1, 2, 3]),  # the third number is not yet a difference
        ("1232", [1, 2, 3, 4]),  # 4 = 2 + 2
        ("P1", [32]),  # low group 0, "more follows", then 1
        ("`0", [16]),  # 16 alone would have the sign bit
        ("292N", [2, 9, 2, 7]),  # 7 = 9 - 2; "N" is 48 + 30, and 30 - 32 = -2
        ("2T333PN", [2, 100, 3, 103, -61]),  # 103 = 100 + 3; "PN" is 0 and 30 * 32 - 1024 = -64, 3 - 64 = -61
    ],
)
def test_compressed_counts_by_hand(text, counts):
    assert rle_counts(text) == rle_counts(text.encode()) == counts
    assert encode(counts) == text
    if min(counts) < 0:
        assert str(min(counts)) in message(ValueError, lambda: rle_mask(text, 2, 3))


def test_compressed_counts_round_trip():
    generator = np.random.default_rng(0)
    for _ in range(50):
        counts = generator.integers(0, 10 ** generator.integers(1, 6), generator.integers(1, 30)).tolist()
        assert rle_counts(encode(counts)) == counts
    mask = generator.random((7, 5)) < 0.4
    changes = np.flatnonzero(np.diff(np.concatenate([[False], mask.ravel(order="F")])))
    runs = np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()
    for counts in (runs, encode(runs)):
        assert np.array_equal(rle_mask(counts, 7, 5), mask)


def test_compressed_segmentation_in_the_file(tmp_path):
    content = coco_content()
    text = encode([4, 2] * WIDTH)
    content["annotations"][2]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": text}
    compressed = COCO(coco_tree(tmp_path / "a", content), truth="mask")[1].mask
    assert torch.equal(compressed, COCO(coco_tree(tmp_path / "b"), truth="mask")[1].mask)


@pytest.mark.parametrize("text, part", [("1 2", "' '"), ("1~", "'~'"), ("1P", "ends within")])
def test_bad_compressed_counts(text, part):
    assert part in message(ValueError, lambda: rle_counts(text))


# What is refused


def broken(tmp_path, change) -> COCO:
    content = coco_content()
    change(content)
    return COCO(coco_tree(tmp_path, content), truth=("mask", "instances"))


def test_unknown_arguments(tmp_path):
    root = coco_tree(tmp_path)
    text = message(ValueError, lambda: COCO(root, "test"))
    assert "'test'" in text and "['train', 'val']" in text
    assert "'parts'" in message(ValueError, lambda: COCO(root, truth=("parts",)))
    assert "'drop'" in message(ValueError, lambda: COCO(root, crowd="drop"))


def test_missing_files(tmp_path):
    root = coco_tree(tmp_path)
    assert "instances_val2014.json" in message(FileNotFoundError, lambda: COCO(root, "val"))
    (root / "train2014" / f"{FIRST}.jpg").unlink()
    assert f"{FIRST}.jpg" in message(FileNotFoundError, lambda: COCO(root)[0])


def test_truncated_picture(tmp_path):
    root = coco_tree(tmp_path)
    path = write_picture(root / "train2014" / f"{FIRST}.jpg", 64, 64)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    text = message(ValueError, lambda: COCO(root)[0])
    assert f"{FIRST}.jpg" in text and "truncated" in text


@pytest.mark.parametrize("content", ["{", "", '{"images": [}'])
def test_invalid_json(tmp_path, content):
    root = coco_tree(tmp_path)
    (root / JSON).write_text(content)
    text = message(ValueError, lambda: COCO(root))
    assert JSON in text and "JSON" in text


@pytest.mark.parametrize("content", ["[]", '{"images": []}', '{"images": {}, "annotations": []}'])
def test_json_of_another_kind(tmp_path, content):
    root = coco_tree(tmp_path)
    (root / JSON).write_text(content)
    text = message(ValueError, lambda: COCO(root))
    assert JSON in text and "expected a list" in text


def test_no_annotations(tmp_path):
    text = message(ValueError, lambda: broken(tmp_path, lambda c: c["annotations"].clear()))
    assert JSON in text and "annotations" in text


@pytest.mark.parametrize(
    "where, name", [("images", "id"), ("images", "height"), ("annotations", "category_id"),
                    ("annotations", "image_id"), ("annotations", "segmentation"), ("annotations", "area")]
)  # fmt: skip
def test_missing_field(tmp_path, where, name):
    root = coco_tree(tmp_path)
    content = coco_content()
    del content[where][1][name]
    (root / JSON).write_text(json.dumps(content))
    text = message(ValueError, lambda: COCO(root, truth="mask"))
    assert JSON in text and f"{where}[1], field {name}" in text


@pytest.mark.parametrize("category", [0, 12, 83, 91])
def test_unknown_category(tmp_path, category):
    change = {"category_id": category}
    text = message(ValueError, lambda: broken(tmp_path, lambda c: c["annotations"][1].update(change)))
    assert JSON in text and "category_id" in text and f"found {category}" in text and "1..90" in text


def test_unknown_picture(tmp_path):
    text = message(ValueError, lambda: broken(tmp_path, lambda c: c["annotations"][1].update(image_id=99)))
    assert JSON in text and "annotations[1]" in text and "image_id" in text and "found 99" in text


def test_duplicate_picture(tmp_path):
    text = message(ValueError, lambda: broken(tmp_path, lambda c: c["images"].append(dict(c["images"][0]))))
    assert JSON in text and "images/id" in text and "duplicate ids 3," in text


@pytest.mark.parametrize(
    "segmentation, part",
    [
        ([], "no polygon"),
        ([[1, 1, 2, 2]], "4 numbers"),
        ([[1, 1, 2, 2, 3, 3, 4]], "7 numbers"),
        ([["a", 1, 2, 2, 3, 3]], "convert"),
        (None, "NoneType"),
    ],
)
def test_bad_polygon(tmp_path, segmentation, part):
    change = {"segmentation": segmentation}
    text = message(ValueError, lambda: broken(tmp_path, lambda c: c["annotations"][1].update(change)))
    assert JSON in text and "annotation 11, field segmentation" in text and part in text


@pytest.mark.parametrize(
    "segmentation, part",
    [
        ({"size": [HEIGHT, WIDTH], "counts": [4, 2]}, "sum of 6"),
        ({"size": [HEIGHT, WIDTH], "counts": encode([4, 45])}, "sum of 49"),
        ({"size": [HEIGHT, WIDTH], "counts": [50, -2]}, "-2"),
        ({"size": [HEIGHT, WIDTH], "counts": [4.5, 43.5]}, "segmentation"),
        ({"size": [HEIGHT, WIDTH]}, "NoneType"),
        ({"size": [WIDTH, HEIGHT], "counts": [48]}, f"[{WIDTH}, {HEIGHT}]"),
    ],
)
def test_bad_rle(tmp_path, segmentation, part):
    data = broken(tmp_path, lambda c: c["annotations"][2].update(segmentation=segmentation))
    text = message(ValueError, lambda: data[1])
    assert JSON in text and "annotation 12, field segmentation" in text and part in text


def test_picture_of_another_size(tmp_path):
    data = broken(tmp_path, lambda c: None)
    write_picture(tmp_path / "train2014" / f"{THIRD}.jpg", WIDTH, HEIGHT)
    text = message(ValueError, lambda: data[1])
    assert f"{THIRD}.jpg" in text and JSON in text
    assert f"{HEIGHT} x {WIDTH}" in text and f"{WIDTH} x {HEIGHT}" in text


def test_too_many_instances(tmp_path):
    many = [annotation(n, 3, 1, [box(0, 0, 2, 2)], 4.0) for n in range(255)]
    data = broken(tmp_path, lambda c: c.update(annotations=many))
    assert "254" in message(ValueError, lambda: data[0])
