"""Mosaic pretraining: a batch is a function of (seed, step), a quadrant's labels are its own picture's."""
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from wsss_lib import create_model
from wsss_lib.data.toyvoc import SIZE, build_toyvoc
from wsss_lib.training.engine import TrainConfig, train
from wsss_lib.training.mosaics import MosaicBatches, MosaicRecipe, PictureStore, augment, mosaic_loss, top_mean

MEAN, STD, STRIDE, STEPS = (.5, .4, .3), (.25, .2, .5), 8, 10
RECIPE = MosaicRecipe(batch=10, mosaics=.6, singles_until=.4)      # 4 pictures, 6 mosaics; steps 0..3: single
# A class is a colour: red, green and blue are single-object classes, their mixtures classes of scenes.
COLOURS = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]])
SINGLES, SCENES = (0, 1, 2), (3, 4, 5)


def plain_store(classes: tuple[int, ...]) -> PictureStore:
    """One picture for each class, all over in the class's colour."""
    store = PictureStore.__new__(PictureStore)
    colours = COLOURS[list(classes)] * 255
    store.images = colours.to(torch.uint8)[:, :, None, None].expand(-1, -1, SIZE, SIZE).contiguous()
    store.labels = torch.eye(len(COLOURS))[list(classes)]
    return store


def plain_batches(seed: int = 0, recipe: MosaicRecipe = RECIPE) -> MosaicBatches:
    stores = plain_store(SINGLES), plain_store(SCENES)
    return MosaicBatches(*stores, STEPS, MEAN, STD, recipe, seed, STRIDE)


def denormalised(batch: dict) -> Tensor:
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return batch["image"] * std + mean


def classes_of(pictures: Tensor) -> list[int]:
    """The class of each plain picture (B, 3, h, w), by its colour; every pixel must have it."""
    colour = pictures.mean((2, 3))
    torch.testing.assert_close(pictures, colour[:, :, None, None].expand_as(pictures), atol=1e-3, rtol=0)
    lit = (colour > colour.amax(1, keepdim=True) / 2).long()        # contrast and tint move a colour a little
    return [int((COLOURS == row).all(1).nonzero()) for row in lit]


# ---- batches


def test_a_batch_is_a_function_of_seed_and_step():
    batch, again = plain_batches(3)(5), plain_batches(3)
    [again(step) for step in (7, 0)]                                # others before it make no difference
    torch.manual_seed(123)                                          # nor does the global generator
    state = torch.get_rng_state()
    again = again(5)
    assert torch.equal(state, torch.get_rng_state()), "the global generator must stay as it was"
    assert batch.keys() == again.keys()
    for name, value in batch.items():
        assert torch.equal(value, again[name]) if isinstance(value, Tensor) else value == again[name]
    for other in (plain_batches(3)(6), plain_batches(4)(5)):
        assert not torch.equal(batch["image"], other["image"])


def test_shapes_and_counts():
    batch = plain_batches()(0)
    assert batch["image"].shape == (10, 3, SIZE, SIZE) and batch["image"].dtype == torch.float32
    assert batch["labels"].shape == (4, 6) and batch["quadrants"].shape == (6, 4, 6)
    assert batch["pictures"] == 4 + 4 * 6
    assert batch["image"].isfinite().all()


def test_without_mosaics_there_are_pictures_only():
    batch = plain_batches(recipe=MosaicRecipe(batch=3, mosaics=0))(0)
    assert batch["image"].shape[0] == len(batch["labels"]) == batch["pictures"] == 3
    assert not {"quadrants", "cut"} & batch.keys()


def test_cuts_are_in_range_and_vary():
    batches, patches = plain_batches(), SIZE // STRIDE
    cuts = [batches(step)["cut"] for step in range(60)]
    assert all(type(v) is int for cut in cuts for v in cut)
    low = patches // 3 + 1                                          # no picture is narrower than a third
    for axis in zip(*cuts):
        assert set(axis) == set(range(low, patches - low + 1))


@pytest.mark.parametrize("step", range(8))
def test_the_labels_of_a_picture_and_of_a_quadrant_are_its_own(step):
    batch = plain_batches()(step)
    pictures, (row, column) = denormalised(batch), (STRIDE * v for v in batch["cut"])
    assert classes_of(pictures[:4]) == batch["labels"].argmax(1).tolist()
    bands = pictures[4:, :, :row], pictures[4:, :, row:]
    parts = [part for band in bands for part in (band[..., :column], band[..., column:])]
    for k, part in enumerate(parts):                                # plain up to its edges: the cut is exact
        assert classes_of(part) == batch["quadrants"][:, k].argmax(1).tolist()


def test_single_objects_first_then_scenes():
    batches = plain_batches()
    for step in range(STEPS):
        batch, single = batches(step), step < 4                     # .4 of 10 steps
        assert batch["single"] is single
        assert set(batch["labels"].argmax(1).tolist()) <= set(SINGLES if single else SCENES)
        quadrants = batch["quadrants"].argmax(2)                    # (m, 4)
        scenes = torch.isin(quadrants, torch.tensor(SCENES)).sum(0)
        assert scenes.tolist() == [0 if single else 3] * 4          # later half of each quadrant's pictures


# ---- augmentation


def test_augment_mirrors_about_half_and_never_upside_down():
    images = torch.zeros(64, 3, 32, 32)
    images[..., :, 16:] += .25
    images[..., 16:, :] += .5
    out = augment(images, 1., (24, 40), torch.Generator().manual_seed(0))
    assert out.shape == (64, 3, 24, 40)
    mirrored = out[..., :20].mean((1, 2, 3)) > out[..., 20:].mean((1, 2, 3))
    assert 16 <= mirrored.sum() <= 48
    assert (out[:, :, 12:].mean((1, 2, 3)) > out[:, :, :12].mean((1, 2, 3))).all()


def test_augment_crops_within_its_scale():
    """A crop of scale s shows the share s of a ramp. Contrast scales that too, in both directions alike."""
    ramp = (torch.arange(64) + .5) / 64
    images = torch.zeros(200, 3, 64, 64)
    images[:, 0], images[:, 2] = ramp[:, None], ramp[None, :]
    out = augment(images, .6, (64, 64), torch.Generator().manual_seed(1))
    tall = out[:, 0].mean(2).diff(dim=1).median(1).values * 64      # (B,): contrast x vertical scale
    wide = out[:, 2].mean(1).diff(dim=1).median(1).values.abs() * 64
    aspect = wide / tall                                            # contrast cancels
    assert .84 < aspect.min() < .9 and 1.1 < aspect.max() < 1.16
    assert tall.mean() == pytest.approx(.8, abs=.05)    # the mean contrast is 1, the mean scale .8
    assert .1 < tall.std() < .3
    assert out[:, 1].std((1, 2)).max() < 1e-5                       # tint moves a channel as a whole
    assert out[:, 1].mean((1, 2)).std() > .02


# ---- losses


def test_top_mean_by_hand():
    logits = torch.tensor([[[[5., 1., 3.], [9., -2., 0.]], [[-1., -1., -1.], [-4., -1., -7.]]]])
    torch.testing.assert_close(top_mean(logits, .5), torch.tensor([[(9 + 5 + 3) / 3, -1.]]))
    torch.testing.assert_close(top_mean(logits, 1.), torch.tensor([[16 / 6, -15 / 6]]))
    torch.testing.assert_close(top_mean(logits, .01), torch.tensor([[7., -1.]]))    # two at least


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model("cam", "toyvit", num_classes=len(COLOURS), pretrained=False)


@pytest.mark.parametrize("step", [0, 5], ids=["single", "scenes"])
def test_all_terms_are_finite_and_reach_heads_and_stem(model, step):
    with torch.autocast("cpu", torch.bfloat16):
        losses = mosaic_loss(model, plain_batches()(step), step, RECIPE)
    assert losses.keys() == {"class", "patch", "union", "quadrant"}
    for value in losses.values():
        assert value.shape == () and value.dtype == torch.float32 and value.isfinite()
    weights = {"class_head": model.class_head.weight, "patch_head": model.patch_head.weight,
               "stem": model.backbone.patch_embed.backbone.down1[0].weight}
    reached = {name: _reached(value, weights) for name, value in losses.items()}
    assert reached == {"class": {"class_head", "stem"}, "union": {"class_head", "stem"},
                       "patch": {"patch_head", "stem"}, "quadrant": {"patch_head", "stem"}}


def _reached(loss: Tensor, weights: dict[str, Tensor]) -> set[str]:
    """The names of the weights that get a gradient."""
    gradients = torch.autograd.grad(loss, list(weights.values()), retain_graph=True, allow_unused=True)
    return {name for name, g in zip(weights, gradients) if g is not None and g.abs().sum() > 0}


@pytest.mark.parametrize("single", [True, False])
def test_the_quadrant_loss_compares_each_quadrant_with_its_own_labels(single):
    """Patch logits that are right everywhere cost almost nothing, any exchange of two quadrants costs."""
    row, column, classes = 2, 3, 4
    truth = torch.tensor([[0, 1], [2, 3]]).repeat_interleave(torch.tensor([row, 4 - row]), 0)
    truth = truth.repeat_interleave(torch.tensor([column, 5 - column]), 1)      # (4, 5)
    logits = torch.eye(classes)[truth].permute(2, 0, 1)[None] * 40 - 20         # (1, C, 4, 5)
    stub = SimpleNamespace(forward_heads=lambda image: SimpleNamespace(
        class_logits=torch.zeros(1, classes), patch_logits=logits, pooled=torch.zeros(1, classes)))
    recipe = MosaicRecipe(quadrant_share=1., label_smoothing=0.)

    def cost(order: list[int]) -> float:
        batch = {"image": None, "labels": torch.zeros(0, classes), "single": single, "cut": (row, column),
                 "quadrants": torch.eye(classes)[order][None]}
        return mosaic_loss(stub, batch, 0, recipe)["quadrant"].item()

    assert cost([0, 1, 2, 3]) < 1e-6
    for a in range(4):
        for b in range(a):
            order = [0, 1, 2, 3]
            order[a], order[b] = b, a
            assert cost(order) > 1


def test_exchanged_labels_change_the_quadrant_loss_alone(model):
    batch = plain_batches()(0)
    before = mosaic_loss(model, batch, 0, RECIPE)
    upper = batch["quadrants"][:, :2].argmax(2)
    assert (upper[:, 0] != upper[:, 1]).any(), "the exchange must exchange something"
    after = mosaic_loss(model, batch | {"quadrants": batch["quadrants"][:, [1, 0, 2, 3]]}, 0, RECIPE)
    assert before["quadrant"] != after["quadrant"]
    assert all(before[name] == after[name] for name in ("class", "patch", "union"))


# ---- end to end


@pytest.fixture(scope="module")
def maskless(tmp_path_factory) -> Path:
    """A tiny ToyVOC tree with pictures and annotations only."""
    root = build_toyvoc(tmp_path_factory.mktemp("toyvoc"), 8, 0, 8, processes=1, progress=False)
    folders = sorted(root.glob("Segmentation*"))
    assert len(folders) == 4
    for folder in folders:
        shutil.rmtree(folder)
    return root


def test_a_store_holds_a_split(maskless):
    store = PictureStore(maskless, "single", progress=False)
    assert store.images.shape == (8, 3, SIZE, SIZE) and store.images.dtype == torch.uint8
    assert store.labels.shape == (8, 20) and (store.labels.sum(1) == 1).all()
    images, labels = store.draw(30, torch.Generator().manual_seed(0))
    assert images.shape == (30, 3, SIZE, SIZE) and 0 <= images.min() and images.max() <= 1
    for image, label in zip(images, labels):
        known = [i for i in range(8) if torch.equal(store.images[i], (image * 255).round().to(torch.uint8))]
        assert known and torch.equal(store.labels[known[0]], label)


def test_training_opens_no_mask_and_a_stopped_run_ends_where_the_uninterrupted_one_ends(maskless, tmp_path):
    steps, recipe = 6, MosaicRecipe(batch=4, singles_until=.5)
    stores = [PictureStore(maskless, split, progress=False) for split in ("single", "train")]
    config = TrainConfig(steps, warmup=2, log_every=1)

    learning = partial(mosaic_loss, recipe=recipe)

    def run(folder: str, loss=learning) -> list[dict]:
        torch.manual_seed(1)
        network = create_model("cam", "toyvit", pretrained=False)
        normal = network.data_config["mean"], network.data_config["std"]
        return train(network, MosaicBatches(*stores, steps, *normal, recipe), loss, config, tmp_path / folder,
                     progress=False)

    def stopped(network, batch: dict, step: int) -> dict[str, Tensor]:
        if step == 4:                                               # in the second stage
            raise KeyboardInterrupt
        return mosaic_loss(network, batch, step, recipe)

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("parts", stopped)
    parts = run("parts")
    for row, other in zip(whole, parts, strict=True):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}
    assert {"class", "patch", "union", "quadrant"} <= whole[-1].keys()
    assert whole[-1]["pictures"] == steps * (2 + 4 * 2)
    ours, theirs = (load_file(tmp_path / folder / "checkpoint.safetensors") for folder in ("whole", "parts"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
