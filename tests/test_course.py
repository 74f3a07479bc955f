"""Profiles, stateless batches and the classification loss."""
import pytest
import torch

from wsss_lib.course import PROFILES, preflight
from wsss_lib.data import VOC
from wsss_lib.data.batches import Batches
from wsss_lib.data.toyvoc import build_toyvoc
from wsss_lib.data.transforms import EvalTransform, TrainTransform
from wsss_lib.models import create_model
from wsss_lib.training.losses import classification_loss


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return build_toyvoc(tmp_path_factory.mktemp("toy") / "tree", 10, 4, 0, seed=1, progress=False)


def test_unknown_profile_and_missing_root_are_named():
    with pytest.raises(ValueError, match=r"PROFILE: found 'nonsense', expected one of toy, full, voc, coco"):
        preflight("nonsense")
    for profile in ("voc", "coco"):
        with pytest.raises(ValueError, match="DATA_ROOT: found None"):
            preflight(profile)


def test_profiles_open_masks_for_scores_only(root, capsys):
    course = preflight("toy", root, device="cpu")
    assert course.train[0].truths() == {} and set(course.val[0].truths()) == {"mask", "instances", "parts", "contexts"}
    assert (len(course.train), len(course.val)) == (10, 4)
    assert "10 pictures to learn from, 4 to score on (val)" in capsys.readouterr().out
    assert "toy" in PROFILES and course.profile == "toy"


def test_batches_are_a_pure_function_of_the_step(root):
    data, transform = VOC(root, "train"), TrainTransform(48, color_jitter=(.2, .2, .2, .05))
    batches = Batches(data, transform, 3, seed=5)
    first = [batches(i) for i in range(8)]
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    for step in (6, 0, 3):
        again = Batches(data, transform, 3, seed=5)(step)
        assert again["name"] == first[step]["name"] and torch.equal(again["image"], first[step]["image"])
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's random numbers are left alone"
    assert first[0]["name"] != Batches(data, transform, 3, seed=6)(0)["name"]
    assert not torch.equal(first[0]["image"], first[3]["image"])


def test_an_epoch_shows_each_picture_at_most_once(root):
    batches = Batches(VOC(root, "train"), EvalTransform(), 3, seed=2)
    for epoch in range(3):
        names = [n for k in range(3) for n in batches(3 * epoch + k)["name"]]
        assert len(set(names)) == 9
    assert len({n for k in range(30) for n in batches(k)["name"]}) == 10, "what an epoch leaves out comes later"


def test_a_batch_larger_than_the_data_is_refused(root):
    with pytest.raises(ValueError, match="batch_size: found 11, expected 1..10"):
        Batches(VOC(root, "train"), EvalTransform(), 11)


def test_classification_loss_is_the_mean_binary_cross_entropy_of_both_heads():
    torch.manual_seed(0)
    model = create_model("cam", num_classes=4, pretrained=False).eval()
    batch = {"image": torch.randn(3, 3, 64, 64), "labels": torch.tensor([[1., 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]])}
    losses, out = classification_loss(model, batch, 0), model.forward_heads(batch["image"])
    for name, logits in (("class", out.class_logits), ("patch", out.pooled)):
        p = logits.double().sigmoid()
        expected = -(batch["labels"] * p.log() + (1 - batch["labels"]) * (1 - p).log()).mean()
        torch.testing.assert_close(losses[name].double(), expected, rtol=1e-5, atol=1e-6)   # float32 against float64
