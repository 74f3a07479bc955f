"""Masks of a folder of pictures: of their own size, in files that can be opened, with errors that name files."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from wsss_lib import create_model
from wsss_lib.data.sample import read_image, read_mask
from wsss_lib.prediction import predict, predict_folder
from wsss_lib.segmentation import segment


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("segmenter", "toyvit", pretrained=False)


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for name, size in (("wide.jpg", (60, 90)), ("tall.PNG", (41, 30))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_masks_have_the_pictures_size_and_are_the_networks(model, pictures):
    counts = predict_folder(model, pictures, pictures / "out", 32, progress=False)
    assert sorted(f.name for f in (pictures / "out").iterdir()) == [
        "tall.png", "tall_overlay.jpg", "wide.png", "wide_overlay.jpg"]
    picture = read_image(pictures / "wide.jpg")
    pixels = F.resize(torch.as_tensor(picture), [32, 48], antialias=True).float() / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.data_config["mean"], model.data_config["std"]))
    scores = torch.nn.functional.interpolate(segment(model, ((pixels - mean) / std)[None]), (60, 90), mode="bilinear")
    mask = read_mask(pictures / "out" / "wide.png", 20, (60, 90))
    assert (mask == scores[0].argmax(0)).float().mean() > 0.99  # 8-bit resize against float: ties may fall otherwise
    assert torch.equal(mask.long(), predict(model, picture, 32)) and sum(counts[1].values()) == 60 * 90
    assert Image.open(pictures / "out" / "tall_overlay.jpg").size == (30, 41)


def test_errors_name_the_file(model, pictures, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: found no such folder, expected some of"):
        predict_folder(model, tmp_path / "nowhere", tmp_path / "out", 32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: found no picture"):
        predict_folder(model, tmp_path / "empty", tmp_path / "out", 32)
    (pictures / "broken.jpg").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="broken.jpg: cannot be read as a picture"):
        predict_folder(model, pictures, tmp_path / "out", 32, progress=False)
    (pictures / "broken.jpg").unlink()
    (pictures / "wide.png").write_bytes((pictures / "wide.jpg").read_bytes())
    with pytest.raises(ValueError, match="found several pictures called wide"):
        predict_folder(model, pictures, tmp_path / "out", 32, progress=False)
