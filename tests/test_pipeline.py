"""From labels to a network that segments: one step or two, resumed, refused, on drawn and on real layouts."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from trees import annotation, box, coco_tree, write_annotation, write_mask, write_picture, write_split

from wsss_lib.__main__ import main
from wsss_lib.data.coco import COCO
from wsss_lib.data.splits import open_split
from wsss_lib.data.toyvoc import build_toyvoc
from wsss_lib.data.voc import VOC
from wsss_lib.models.segmenter import Segmenter
from wsss_lib.paths import shipped
from wsss_lib.pipeline import label_options, second_recipe, train_segmenter
from wsss_lib.reports import localize_split, report, write_labels
from wsss_lib.segmentation import segmentation_report
from wsss_lib.training.fit import load_trained
from wsss_lib.training.recipes import NAMES, find_recipe, override
from wsss_lib.training.toy_recipes import TOY_RECIPES

SHORT = ["steps=2", "batch_size=2", "warmup=0", "log_every=1", "crop_size=48"]
SIZES = [(40, 56), (40, 56), (56, 40), (48, 48), (33, 50), (64, 32)]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return build_toyvoc(tmp_path_factory.mktemp("toyvoc"), 4, 2, 0, processes=1, progress=False)


def voc_tree(root):
    """Twelve pictures of five sizes in VOC's layout, with masks of their two classes."""
    names = [f"2007_{i:06}" for i in range(12)]
    for i, name in enumerate(names):
        height, width = SIZES[i % 6]
        write_picture(root / "JPEGImages" / f"{name}.jpg", height, width)
        write_annotation(root / "Annotations" / f"{name}.xml", [VOC.classes[i], VOC.classes[i + 3]])
        mask = np.zeros((height, width), np.uint8)
        mask[4:20, 4:20], mask[24:30, 8:28] = i + 1, i + 4
        write_mask(root / "SegmentationClass" / f"{name}.png", mask)
    for split in ("train_aug", "val"):
        write_split(root, split, names)
    return names


def coco_pictures(root):
    for split in ("train", "val"):
        content = {"images": [], "annotations": []}
        for i in range(12):
            height, width = SIZES[i % 6]
            name = f"COCO_{split}2014_{i:012}.jpg"
            content["images"].append({"id": i, "file_name": name, "height": height, "width": width})
            content["annotations"].append(annotation(i, i, [1, 18, 90][i % 3], [box(4, 4, 20, 20)], 256.0))
        coco_tree(root, content, split)
        for image in content["images"]:
            write_picture(root / f"{split}2014" / image["file_name"], image["height"], image["width"])
    return COCO(root, "train").names


@pytest.mark.parametrize("method", ["weaktr", "acr"])
def test_two_steps_end_with_a_segmenter(method, tree, tmp_path):
    recipe = override(TOY_RECIPES[method], [*SHORT, "seed=5"])
    second = override(second_recipe(recipe), SHORT)
    assert second.config.seed == 5
    seen = []
    options = {"progress": False, "second": second, "evaluate": lambda model, step: seen.append(type(model)) or {}}
    model = train_segmenter(recipe, tree, tmp_path, **options)
    assert isinstance(model, Segmenter) and set(seen) == {Segmenter}
    first, record = load_trained(tmp_path / "model.safetensors")
    assert record["recipe"]["method"] == method
    data, labels = VOC(tree, "train"), tmp_path / "labels"
    assert sorted(f.stem for f in labels.glob("*.png")) == sorted(data.names)
    assert load_trained(tmp_path / "segmenter" / "model.safetensors")[1]["masks"] == "labels"
    # the labels are those of the first network, which was saved in half precision
    again = tmp_path / "again"
    write_labels(first, data, folder=again, progress=False, **label_options(recipe))
    pairs = [(np.array(Image.open(labels / f"{n}.png")), np.array(Image.open(again / f"{n}.png"))) for n in data.names]
    assert np.mean([np.mean(a == b) for a, b in pairs]) > 0.99


def test_one_step_methods_end_as_they_are(tree, tmp_path):
    recipe = override(TOY_RECIPES["afa"], [*SHORT, "loss.classify_until=1", "backbone=toyvit"])
    model = train_segmenter(recipe, tree, tmp_path, progress=False)
    assert hasattr(model, "forward_segmentation") and not (tmp_path / "labels").exists()
    assert segmentation_report(model, VOC(tree, "val", ["mask"]), progress=False)["pictures"] == 2


def test_each_part_resumes(tree, tmp_path, monkeypatch):
    """Stopped in the labels, and in the second training: the end is that of the run that was not stopped."""
    from wsss_lib import pipeline, reports

    recipe = override(TOY_RECIPES["acr"], SHORT)
    options = {"progress": False, "second": override(second_recipe(recipe), SHORT)}
    train_segmenter(recipe, tree, tmp_path / "whole", **options)
    write, written = reports._write_mask, []

    def stopped(path, mask):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, mask)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reports, "_write_mask", stopped)
        train_segmenter(recipe, tree, tmp_path / "cut", **options)
    assert len(list((tmp_path / "cut" / "labels").glob("*.png"))) == 2
    assert not (tmp_path / "cut" / "segmenter").exists()
    fit = pipeline.fit

    def second_stops(recipe, *args, **kw):
        if recipe.method == "segmenter":
            raise KeyboardInterrupt
        return fit(recipe, *args, **kw)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "fit", second_stops)
        train_segmenter(recipe, tree, tmp_path / "cut", **options)
    assert len(list((tmp_path / "cut" / "labels").glob("*.png"))) == 4
    train_segmenter(recipe, tree, tmp_path / "cut", **options)
    a, b = (load_file(tmp_path / name / "segmenter" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_another_recipe_in_the_folder_is_refused(tree, tmp_path):
    recipe = override(TOY_RECIPES["acr"], SHORT)
    train_segmenter(recipe, tree, tmp_path, progress=False, second=override(second_recipe(recipe), SHORT))
    for setting, message in [
        ("loss.region_weight=0", r"recipe.loss: found \{\}, expected \{'region_weight': 0\}"),
        ("labels.background=0.5", "recipe.labels: found .*0.2.*, expected .*0.5"),
        ("crop_size=64", "recipe.crop_size: found 48, expected 64"),
    ]:
        with pytest.raises(ValueError, match=f"checkpoint.safetensors: {message}"):
            train_segmenter(override(recipe, [setting]), tree, tmp_path, progress=False)
    with pytest.raises(ValueError, match="recipe.init: found True, expected toyvit_plain.safetensors"):
        train_segmenter(recipe, tree, tmp_path, init=shipped("checkpoints/toyvit_plain.safetensors"), progress=False)
    other = build_toyvoc(tmp_path / "other", 5, 0, 0, processes=1, progress=False)
    with pytest.raises(ValueError, match="recipe.pictures: found 4, expected 5"):
        train_segmenter(recipe, other, tmp_path, progress=False)


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_options_that_exist(name):
    recipe = find_recipe(name)
    if recipe.method in ("cam", "weaktr", "acr"):
        assert label_options(recipe)["method"] == recipe.method and 0 < recipe.labels["background"] < 1
    else:
        assert recipe.labels == {}
        with pytest.raises(ValueError, match="labels: found maps None, expected one of cam, "):
            label_options(recipe)


# ---- pictures of many sizes, as VOC and COCO have them


@pytest.mark.parametrize("name", ["voc12/weaktr", "voc12/acr", "coco14/weaktr", "coco14/acr"])
def test_real_layouts_take_both_steps(name, tmp_path):
    """Published settings but for size and length; a random network: the path is tested, not the masks."""
    names = voc_tree(tmp_path) if name.startswith("voc12") else coco_pictures(tmp_path)
    tiny = [*SHORT, "backbone=toyvit", "crop_size=32", "late_from=1"]
    recipe = override(find_recipe(name), [*tiny, *(["long_side=(30, 40)"] if find_recipe(name).long_side else [])])
    second = override(second_recipe(recipe), tiny)
    model = train_segmenter(recipe, tmp_path, tmp_path / "out", False, progress=False, second=second)
    truth = {name: size for name, size in zip(names, SIZES * 2)}
    for name_, size in truth.items():
        assert np.array(Image.open(tmp_path / "out" / "labels" / f"{name_}.png")).shape == size
    val = open_split(recipe.data, tmp_path, "val", ["mask"])
    found = segmentation_report(model, val, scales=(1.0, 0.5), flip=True, refine="crf", progress=False)
    assert found["pictures"] == 12 and 0 <= found["miou"] < 0.2


def test_maps_of_many_sizes_are_those_of_one_by_one(tmp_path):
    voc_tree(tmp_path)
    from wsss_lib import create_model

    torch.manual_seed(0)
    model, data = create_model("cam", "toyvit", pretrained=False), VOC(tmp_path, "val", ["mask"])
    split = localize_split(model, data, progress=False)
    assert isinstance(split.maps, list) and [s.name for s in split.samples] == data.names
    for i in range(12):
        alone = localize_split(model, data, progress=False, places=[i])
        torch.testing.assert_close(split.maps[i][None], alone.maps, rtol=1e-4, atol=1e-5)
        assert split.pseudo_labels(i, 0.4).shape == split.samples[i].image.shape[-2:]
    found = report(model, data, progress=False)
    assert "coverage" not in found and found["pictures"] == 12 and 0 <= found["best"]["miou"] <= 1
    squashed = localize_split(model, data, progress=False, size=32)
    assert squashed.maps.shape == (12, 20, 4, 4)


def test_crf_options_reach_the_crf(tree):
    from wsss_lib import create_model

    data, model = VOC(tree, "val", ["mask"]), create_model("cam", "toyvit")
    one, two = (localize_split(model, data, progress=False, refine="crf", crf=crf)
                for crf in (None, {"bilateral": (83, 5, 0.0), "spatial": (3, 0.0)}))
    plain = localize_split(model, data, progress=False)
    assert not torch.equal(one.pseudo_labels(0, 0.2), two.pseudo_labels(0, 0.2))
    assert torch.equal(plain.pseudo_labels(0, 0.2), two.pseudo_labels(0, 0.2)), "a CRF without weights does nothing"


def test_open_split_refuses():
    with pytest.raises(ValueError, match="data: found 'voc', expected one of toyvoc, voc12, coco14"):
        open_split("voc", ".", "train")


# ---- the command


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["wsss_lib", *map(str, arguments)])
    main()


def test_retrain_by_the_command(tree, tmp_path, monkeypatch, capsys):
    """The Segmenter's recipe has no short form on the command line, so it is replaced."""
    from wsss_lib import pipeline

    monkeypatch.setattr(pipeline, "second_recipe", lambda recipe: override(second_recipe(recipe), SHORT))
    run(monkeypatch, "train", "--recipe", "toyvoc/acr", "--root", tree, "--out", tmp_path, "--retrain", "--set", *SHORT)
    assert capsys.readouterr().out.count('"recipe"') == 2
    run(monkeypatch, "evaluate", "--checkpoint", tmp_path / "segmenter/model.safetensors", "--root", tree,
        "--methods", "segmentation", "--refine", "none", "crf", "--limit", "1")
    out = capsys.readouterr().out
    assert "segmentation, val, 1 pictures, labels none: mIoU" in out and "segmentation+crf, val" in out
    for more, message in [(["toyvoc/afa"], "retrain: found toyvoc/afa, expected a recipe that makes"),
                          (["toyvoc/acr", "--masks", "x"], "found toyvoc/acr with other files, expected")]:
        with pytest.raises(SystemExit, match=message):
            run(monkeypatch, "train", "--out", tmp_path / "x", "--root", tree, "--retrain", "--recipe", *more)


def test_commands_read_the_data_of_the_record(tmp_path, monkeypatch, capsys):
    voc_tree(tmp_path)
    settings = [*SHORT, "backbone=toyvit", "crop_size=32"]
    run(monkeypatch, "train", "--recipe", "voc12/weaktr", "--root", tmp_path, "--out", tmp_path / "out", "--set", *settings)
    weights = tmp_path / "out/model.safetensors"
    run(monkeypatch, "localize", "--checkpoint", weights, "--root", tmp_path, "--split", "train_aug", "--method",
        "weaktr", "--out", tmp_path / "masks")
    assert len(list((tmp_path / "masks").glob("*.png"))) == 12
    run(monkeypatch, "evaluate", "--checkpoint", weights, "--root", tmp_path, "--methods", "weaktr", "--size", "32")
    assert "12 pictures" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="root: found none, expected the folder that holds voc12"):
        run(monkeypatch, "evaluate", "--checkpoint", weights)


def test_second_recipe_follows_the_first():
    recipe = override(find_recipe("voc12/weaktr"), ["seed=3", "device=cuda", "workers=4"])
    second = second_recipe(recipe)
    assert (second.data, second.method, second.pseudo_labels) == ("voc12", "segmenter", True)
    own = find_recipe("voc12/segmenter")
    assert second == dataclasses.replace(own, config=dataclasses.replace(own.config, seed=3, device="cuda", workers=4))
