"""The VOC reader: what it reads, and what it says of every kind of bad input."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from trees import (
    HEIGHT,
    VOC_NAMES,
    WIDTH,
    message,
    voc_mask,
    voc_tree,
    write_annotation,
    write_mask,
    write_picture,
    write_split,
)  # fmt: skip

from wsss_lib.data.sample import Sample, multi_hot, read_image, read_mask
from wsss_lib.data.voc import VOC, VOC_CLASSES, build_train_aug, voc_palette


@pytest.fixture
def root(tmp_path):
    return voc_tree(tmp_path / "voc")


# What is read


def test_classes_and_palette():
    assert len(VOC_CLASSES) == 20
    assert (VOC_CLASSES[0], VOC_CLASSES[14], VOC_CLASSES[19]) == ("aeroplane", "person", "tvmonitor")
    assert list(VOC_CLASSES) == sorted(VOC_CLASSES)  # the official order is alphabetical
    palette = voc_palette()
    assert palette.shape == (256, 3) and palette.dtype == np.uint8
    expected = {
        0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128), 8: (64, 0, 0),
        15: (192, 128, 128), 20: (0, 64, 128), 64: (32, 0, 0), 255: (224, 224, 192),
    }  # fmt: skip
    for index, colour in expected.items():
        assert tuple(palette[index]) == colour
    assert len({tuple(colour) for colour in palette.tolist()}) == 256


def test_sample(root):
    data = VOC(root, truth=("mask", "instances", "parts", "contexts"))
    assert data.names == VOC_NAMES and len(data) == 3 and data.num_classes == 20 and data.split == "train"
    sample = data[0]
    assert isinstance(sample, Sample) and sample.name == VOC_NAMES[0]
    assert sample.image.shape == (3, HEIGHT, WIDTH) and sample.image.dtype == torch.uint8
    pixels = np.array(Image.open(data.image_path(0)).convert("RGB"))
    assert np.array_equal(sample.image.permute(1, 2, 0).numpy(), pixels)
    assert sample.labels.nonzero()[:, 0].tolist() == [11, 14] and sample.labels.dtype == torch.float32
    assert sample.mask.dtype == torch.uint8 and np.array_equal(sample.mask.numpy(), voc_mask(VOC_NAMES[0]))
    for field, value in (("instances", 41), ("parts", 77), ("contexts", 99)):
        assert (getattr(sample, field) == value).all()
    assert len(list(data)) == 3  # iteration ends


def test_labels_of_all_pictures(root):
    data = VOC(root)
    expected = torch.zeros(3, 20)
    for row, column in ((0, 11), (0, 14), (1, 19), (2, 7)):
        expected[row, column] = 1
    before = [data[i].labels for i in range(3)]
    assert torch.equal(data.labels, expected) and torch.equal(torch.stack(before), expected)
    assert data.labels is data.labels
    shutil.rmtree(root / "Annotations")
    data[0].labels.zero_()  # a caller's change of one sample must not reach the data set
    assert torch.equal(data[0].labels, expected[0])


@pytest.mark.parametrize("above", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_root_is_found(tmp_path, above):
    tree = voc_tree(tmp_path / above)
    assert VOC(tmp_path).root == tree
    assert VOC(str(tmp_path))[0].name == VOC_NAMES[0]


def test_training_opens_no_mask(root):
    for folder in root.glob("Segmentation*"):
        shutil.rmtree(folder)
    for sample in VOC(root):
        assert sample.truths() == {} and sample.labels.sum() > 0


def test_train_aug_masks_are_in_their_own_folder(root):
    write_split(root, "train_aug", VOC_NAMES[:1])
    write_mask(root / "SegmentationClassAug" / f"{VOC_NAMES[0]}.png", np.full((HEIGHT, WIDTH), 5))
    assert (VOC(root, "train_aug", truth="mask")[0].mask == 5).all()
    assert VOC(root, "train", truth="mask")[0].mask.max() != 5


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_pictures_of_other_modes_become_rgb(tmp_path, mode):
    assert read_image(write_picture(tmp_path / "a.jpg", mode=mode)).shape == (3, HEIGHT, WIDTH)


@pytest.mark.parametrize("palette", [True, False])
def test_mask_is_read_as_indices(tmp_path, palette):
    values = np.arange(256).reshape(16, 16)
    path = write_mask(tmp_path / "m.png", values, palette)
    assert Image.open(path).mode == ("P" if palette else "L")
    assert np.array_equal(read_mask(path).numpy(), values)


def test_multi_hot():
    assert multi_hot([2, 0, 2], 4).tolist() == [1, 0, 1, 0]
    for index in (-1, 4):
        assert str(index) in message(ValueError, lambda: multi_hot([index], 4))


# What is refused


def test_no_tree(tmp_path):
    text = message(FileNotFoundError, lambda: VOC(tmp_path / "nowhere"))
    for part in ("nowhere/JPEGImages", "nowhere/VOC2012/JPEGImages", "nowhere/VOCdevkit/VOC2012/JPEGImages"):
        assert part in text


def test_unknown_split(root):
    write_split(root, "val", VOC_NAMES)
    text = message(ValueError, lambda: VOC(root, "test"))
    assert "ImageSets/Segmentation" in text and "'test'" in text and "['train', 'val']" in text
    assert "build_train_aug" in message(ValueError, lambda: VOC(root, "train_aug"))


@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_empty_list(root, content):
    write_split(root, "train", []).write_text(content)
    text = message(ValueError, lambda: VOC(root))
    assert "train.txt" in text and "empty" in text


def test_duplicate_ids(root):
    write_split(root, "train", VOC_NAMES + VOC_NAMES[1:2])
    text = message(ValueError, lambda: VOC(root))
    assert "train.txt" in text and "duplicate" in text and VOC_NAMES[1] in text and VOC_NAMES[0] not in text


def test_list_of_paths(root):
    write_split(root, "train", ["/JPEGImages/2007_000001.jpg /SegmentationClassAug/2007_000001.png"])
    text = message(ValueError, lambda: VOC(root))
    assert "train.txt" in text and "/JPEGImages/2007_000001.jpg" in text


def test_unknown_truth(root):
    text = message(ValueError, lambda: VOC(root, truth=("mask", "depth")))
    assert "truth" in text and "'depth'" in text and "'contexts'" in text


@pytest.mark.parametrize(
    "folder, suffix", [("JPEGImages", "jpg"), ("Annotations", "xml"), ("SegmentationClass", "png")]
)
def test_missing_file(root, folder, suffix):
    (root / folder / f"{VOC_NAMES[1]}.{suffix}").unlink()
    data = VOC(root, truth="mask")
    assert data[0] is not None
    assert f"{folder}/{VOC_NAMES[1]}.{suffix}" in message(FileNotFoundError, lambda: data[1])


def test_truncated_picture(root):
    path = write_picture(root / "JPEGImages" / f"{VOC_NAMES[0]}.jpg", 64, 64)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    text = message(ValueError, lambda: VOC(root)[0])
    assert f"{VOC_NAMES[0]}.jpg" in text and "truncated" in text


def test_corrupt_picture(root):
    (root / "JPEGImages" / f"{VOC_NAMES[0]}.jpg").write_bytes(b"not a picture")
    assert f"{VOC_NAMES[0]}.jpg" in message(ValueError, lambda: VOC(root)[0])


def test_truncated_mask(root):
    path = root / "SegmentationClass" / f"{VOC_NAMES[0]}.png"
    write_mask(path, np.random.default_rng(0).integers(0, 20, (HEIGHT, WIDTH)))
    path.write_bytes(path.read_bytes()[:-30])
    assert f"SegmentationClass/{VOC_NAMES[0]}.png" in message(ValueError, lambda: VOC(root, truth="mask")[0])


def test_mask_of_another_size(root):
    write_mask(root / "SegmentationClass" / f"{VOC_NAMES[0]}.png", np.zeros((WIDTH, HEIGHT)))
    text = message(ValueError, lambda: VOC(root, truth="mask")[0])
    assert f"SegmentationClass/{VOC_NAMES[0]}.png" in text and f"JPEGImages/{VOC_NAMES[0]}.jpg" in text
    assert f"{WIDTH} x {HEIGHT}" in text and f"{HEIGHT} x {WIDTH}" in text


def test_rgb_mask(root):
    write_picture(root / "SegmentationClass" / f"{VOC_NAMES[0]}.png")
    text = message(ValueError, lambda: VOC(root, truth="mask")[0])
    assert f"{VOC_NAMES[0]}.png" in text and "RGB" in text


@pytest.mark.parametrize("value", [21, 100, 254])
def test_class_index_out_of_range(root, value):
    mask = voc_mask(VOC_NAMES[0])
    mask[5, 5] = value
    write_mask(root / "SegmentationClass" / f"{VOC_NAMES[0]}.png", mask)
    text = message(ValueError, lambda: VOC(root, truth="mask")[0])
    assert f"{VOC_NAMES[0]}.png" in text and f"[{value}]" in text and "0..20 or 255" in text


def test_unknown_class(root):
    write_annotation(root / "Annotations" / f"{VOC_NAMES[0]}.xml", ["dog", "unicorn"])
    for call in (lambda: VOC(root)[0], lambda: VOC(root).labels):
        text = message(ValueError, call)
        assert f"{VOC_NAMES[0]}.xml" in text and "object/name" in text and "['unicorn']" in text
        assert "aeroplane" in text


def test_object_without_name(root):
    (root / "Annotations" / f"{VOC_NAMES[0]}.xml").write_text("<annotation><object/></annotation>")
    assert "object/name" in message(ValueError, lambda: VOC(root)[0])


def test_no_labels(root):
    write_annotation(root / "Annotations" / f"{VOC_NAMES[0]}.xml", [])
    text = message(ValueError, lambda: VOC(root)[0])
    assert f"{VOC_NAMES[0]}.xml" in text and "object" in text


def test_malformed_xml(root):
    (root / "Annotations" / f"{VOC_NAMES[0]}.xml").write_text("<annotation><object>")
    text = message(ValueError, lambda: VOC(root)[0])
    assert f"{VOC_NAMES[0]}.xml" in text and "XML" in text


def test_sample_refuses_a_mask_of_another_size(root):
    sample = VOC(root, truth="mask")[0]
    text = message(ValueError, lambda: Sample("a", sample.image, sample.labels, instances=sample.mask[1:]))
    assert "sample a" in text and "instances" in text


# train_aug, with lists of the real sizes


def augmented_lists(root, sbd, overlap_val=1103):
    """SBD 8,498 + 2,857, of which 1,103 are in VOC val and 1,134 in VOC train: 10,582 remain."""
    extra = [f"2008_{k:06d}" for k in range(20_000)]
    train = [f"2009_{k:06d}" for k in range(1464)]
    val = [f"2010_{k:06d}" for k in range(1449)]
    shared = val[:overlap_val] + train[:1134]
    ids = shared + extra[: 8498 + 2857 - len(shared)]
    ids = ids[::2] + ids[1::2]  # unsorted, and both overlaps in both lists
    write_split(root, "train", train)
    write_split(root, "val", val)
    sbd.mkdir(parents=True)
    (sbd / "train.txt").write_text("\n".join(ids[:8498]))
    (sbd / "val.txt").write_text("\n".join(ids[8498:]))
    return set(ids) | set(train), set(val)


@pytest.mark.parametrize("below", ["", "dataset", "benchmark_RELEASE/dataset"])
def test_build_train_aug(root, tmp_path, below):
    union, val = augmented_lists(root, tmp_path / "sbd" / below)
    path = build_train_aug(root, tmp_path / "sbd")
    names = path.read_text().split()
    assert path == root / "ImageSets/Segmentation/train_aug.txt" and len(names) == 10_582
    assert names == sorted(union - val)
    assert VOC(root, "train_aug").names == names
    assert sorted(file.name for file in path.parent.iterdir()) == ["train.txt", "train_aug.txt", "val.txt"]


def test_build_train_aug_counts(root, tmp_path):
    augmented_lists(root, tmp_path / "sbd", overlap_val=1102)
    text = message(ValueError, lambda: build_train_aug(root, tmp_path / "sbd"))
    for number in ("10583", "10582", "8498", "2857", "1464", "1449"):
        assert number in text
    assert not (root / "ImageSets/Segmentation/train_aug.txt").exists()


def test_build_train_aug_without_sbd(root, tmp_path):
    text = message(FileNotFoundError, lambda: build_train_aug(root, tmp_path / "sbd"))
    assert "train.txt" in text and "sbd/benchmark_RELEASE/dataset" in text
