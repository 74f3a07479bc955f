"""Recipes: named, changed one setting at a time, and trained by one call that can be killed."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from trees import annotation, box, coco_tree, write_annotation, write_picture, write_split

from wsss_lib import create_model
from wsss_lib.data.coco import COCO
from wsss_lib.data.pseudo import PseudoLabelled, WithSaliency
from wsss_lib.data.toyvoc import build_toyvoc
from wsss_lib.data.transforms import TrainTransform
from wsss_lib.data.voc import VOC, encode_mask
from wsss_lib.paths import shipped
from wsss_lib.training.checkpoints import save_weights
from wsss_lib.training.engine import TrainConfig
from wsss_lib.training.fit import fit, freeze, load_trained
from wsss_lib.training.objectives import OBJECTIVES
from wsss_lib.training.optimizers import learning_rate, make_optimizer
from wsss_lib.training.recipes import NAMES, Recipe, find_recipe, override
from wsss_lib.training.toy_recipes import TOY_RECIPES

ACR = TOY_RECIPES["acr"]
SHORT = ["steps=2", "batch_size=2", "warmup=1", "log_every=1", "seed=3"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return build_toyvoc(tmp_path_factory.mktemp("toyvoc"), 4, 2, 0, processes=1, progress=False)


@pytest.fixture(scope="module")
def masks(tree, tmp_path_factory):
    """Pseudo labels of the four pictures: the upper half is the picture's first class, the rest ignored."""
    folder, data = tmp_path_factory.mktemp("masks"), VOC(tree, "train")
    for i, name in enumerate(data.names):
        mask = torch.full((112, 112), 255, dtype=torch.uint8)
        mask[:56] = int(data.labels[i].argmax()) + 1
        (folder / f"{name}.png").write_bytes(encode_mask(mask.numpy()))
    return folder


# ---- recipes are data


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_names_what_exists(name):
    recipe = find_recipe(name)
    assert name == f"{recipe.data}/{recipe.method}"
    OBJECTIVES[recipe.method](**recipe.loss)
    if recipe.data == "toyvoc" or recipe.method == "afa":  # ViT-B is built in the tests of the models
        model = create_model(recipe.method, recipe.backbone, pretrained=False, **recipe.network)
        freeze(model, recipe.freeze)
        make_optimizer(model, recipe.config)
    assert 0 <= learning_rate(recipe.config, recipe.config.steps - 1) < recipe.config.lr
    if recipe.data != "toyvoc":
        find_recipe(name, published=True)


# What the papers and their code say, written down once more: steps, peak rate, batch, crop.
PUBLISHED = {
    "voc12/getam": (20 * 2645, 0.04, 4, 256), "coco14/getam": (20 * 20520, 0.04, 4, 256),
    "voc12/afa": (20_000, 6e-4, 8, 512), "coco14/afa": (80_000, 6e-4, 8, 512),
    "voc12/weaktr": (60 * 165, 7.5e-5, 64, 224), "coco14/weaktr": (60 * 1282, 2.5e-5, 64, 224),
    "voc12/segmenter": (100 * 2645, 1e-4, 4, 480), "coco14/segmenter": (100 * 20520, 1e-4, 4, 480),
    "voc12/acr": (10 * 2645, 0.05, 4, 384), "coco14/acr": (5 * 20520, 0.05, 4, 384),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_numbers(name):
    recipe = find_recipe(name)
    config = recipe.config
    assert (config.steps, pytest.approx(config.lr), recipe.batch_size, recipe.crop_size) == PUBLISHED[name]
    first, last = (learning_rate(config, step) for step in (config.warmup, config.steps - 1))
    voc = name.startswith("voc12")
    if recipe.method == "getam":
        assert (config.momentum, config.weight_decay, recipe.loss["cut"]) == (0.0, 5e-4, 0.9 if voc else 0.95)
        half = config.steps // 2
        assert recipe.loss["classify_until"] == half
        before, after = learning_rate(config, half - 1), learning_rate(config, half)
        assert after == pytest.approx(0.1 * before, rel=1e-4)
        swapped = find_recipe(name, published=True).config
        assert (swapped.momentum, swapped.weight_decay) == (5e-4, 0.0)
    elif recipe.method == "afa":
        stages = (2000, 6000, 10) if voc else (5000, 15000, 15)
        assert tuple(recipe.loss[k] for k in ("classify_until", "propagate_from", "num_iter")) == stages
        assert config.lr * config.lr_factors["backbone"] == pytest.approx(6e-5) and config.warmup == 1500
        jump = find_recipe(name, published=True).config
        assert learning_rate(jump, 1500) == pytest.approx(6e-4 * (1 - 1500 / config.steps))
    elif recipe.method == "weaktr":
        assert config.warmup == config.steps // 12 and config.weight_decay == 0.03
        assert first == pytest.approx(config.lr, rel=1e-3) and last == pytest.approx(1e-5)
    elif recipe.method == "segmenter":
        assert (config.momentum, config.weight_decay, config.lr_factors) == (0.9, 0.0, {"backbone": 0.1})
        assert recipe.loss == {"start": 1.2, "patch": 120} and last == pytest.approx(1e-5, rel=1e-3)
    else:
        weight = 125 if voc else 100
        assert recipe.loss == {"region_weight": weight, "affinity_weight": weight}
        assert find_recipe(name, published=True).loss["region_weight"] == 100


def test_unknown_recipes():
    with pytest.raises(ValueError, match="recipe: found 'voc/afa', expected one of .*toyvoc/afa.*voc12/afa"):
        find_recipe("voc/afa")
    with pytest.raises(ValueError, match="published: found True for toyvoc/afa"):
        find_recipe("toyvoc/afa", published=True)


def test_override_changes_one_setting_and_not_the_table():
    before = ACR
    changed = override(before, ["lr=1", "loss.region_weight=0", "loss.view=vflip", "freeze=('backbone',)",
                                "color_jitter=None", "device=cpu"])
    assert (changed.config.lr, changed.loss, changed.freeze, changed.color_jitter) == (
        1, {"region_weight": 0, "view": "vflip"}, ("backbone",), None)
    assert changed.batch_size == before.batch_size and changed.config.steps == before.config.steps
    assert before.loss == {} and before.config.lr < 1


@pytest.mark.parametrize("setting, message", [
    ("lr", "found 'lr', expected key=value"),
    ("rate=1", "found key 'rate', expected one of method, "),
    ("loss=3", "loss: found 3, expected a value like"),
    ("steps=many", "steps: found 'many', expected a value like"),
    ("steps=1.5", "steps: found 1.5"),
    ("amp=half", "amp: found .half., expected .auto. or .bf16. or .fp16. or .off."),
    ("lr=True", "lr: found True"),
    ("steps=0", "steps: found 0, expected 1 or more"),
    ("optimizer=lion", "optimizer: found 'lion', expected 'adamw' or 'sgd'"),
])
def test_override_refuses(setting, message):
    with pytest.raises(ValueError, match=message):
        override(ACR, [setting])


# ---- optimisers


def test_groups_have_their_factor_and_decay():
    model = create_model("segmenter", "toyvit", pretrained=False)
    config = TrainConfig(4, lr=2.0, weight_decay=0.5, optimizer="sgd", momentum=0.7, schedule="poly", warmup=0,
                         final_lr=0.0, lr_factors={"backbone.blocks": 0.1, "backbone": 0.5})
    optimizer = make_optimizer(model, config)
    found = {(g["factor"], g["weight_decay"]): {id(p) for p in g["params"]} for g in optimizer.param_groups}
    expected = {}
    for name, p in model.named_parameters():
        factor = 0.1 if name.startswith("backbone.blocks") else 0.5 if name.startswith("backbone") else 1.0
        expected.setdefault((factor, 0.5 if p.ndim > 1 else 0.0), set()).add(id(p))
    assert found == expected and len(found) == 6
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["momentum"] == 0.7
    assert [learning_rate(config, step) for step in range(4)] == [2.0, 1.5, 1.0, 0.5]
    with pytest.raises(ValueError, match=r"lr_factors: found \['head'\]"):
        make_optimizer(model, TrainConfig(1, lr_factors={"head": 2.0}))


def test_the_engine_multiplies_the_rate_by_the_groups_factor(tree, tmp_path):
    """SGD without momentum moves a weight by rate x factor x gradient: one step, two factors, one gradient."""
    def moved(factor: float) -> float:
        settings = [*SHORT, "steps=1", "optimizer=sgd", "momentum=0.0", "weight_decay=0.0", "clip=0.0", "amp=off",
                    f"lr_factors={{'backbone.blocks.5.mlp.fc2.weight': {factor}}}"]
        model = fit(override(TOY_RECIPES["weaktr"], settings), tree, tmp_path / str(factor), progress=False)
        start = create_model("weaktr", "toyvit", reduction=2)
        name = "backbone.blocks.5.mlp.fc2.weight"
        return (model.state_dict()[name] - start.state_dict()[name]).abs().sum().item()

    assert moved(4.0) == pytest.approx(4 * moved(1.0), rel=1e-3)  # float32 differences of nearly equal weights


# ---- training by a recipe


@pytest.mark.parametrize("name", sorted(TOY_RECIPES))
def test_a_recipe_trains_saves_and_loads(name, tree, masks, tmp_path):
    settings = [*SHORT, "loss.classify_until=1"] if name.endswith(("afa", "getam")) else SHORT
    recipe = override(TOY_RECIPES[name], settings)
    folder = masks if recipe.pseudo_labels else None
    init = recipe.backbone == "toyvit"
    model = fit(recipe, tree, tmp_path, init, folder, progress=False)
    loaded, record = load_trained(tmp_path / "model.safetensors")
    assert record["seed"] == 3 and record["images"] == 4 and record["recipe"]["method"] == recipe.method
    assert type(loaded) is type(model) and not loaded.training
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value.half().to(value.dtype)), key
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    before = load_file(tmp_path / "checkpoint.safetensors")
    fit(recipe, tree, tmp_path, init, folder, progress=False)  # a finished run only loads its weights
    assert all(torch.equal(v, before[k]) for k, v in load_file(tmp_path / "checkpoint.safetensors").items())
    with pytest.raises(ValueError, match="seed: found 3, expected 4"):
        fit(override(recipe, ["seed=4"]), tree, tmp_path, init, folder, progress=False)


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("toyvoc")])
def test_real_data_take_the_same_path(name, tmp_path):
    """Trees in the layout of VOC and COCO with 12 pictures, a small random backbone, two steps."""
    pictures = voc_pictures(tmp_path, 12) if name.startswith("voc12") else coco_pictures(tmp_path, 12)
    method = name.split("/")[1]
    tiny = {"steps": 2, "batch_size": 2, "crop_size": 32, "warmup": 0, "late_from": 1, "log_every": 1, "lr": 1e-4}
    settings = [f"{key}={value}" for key, value in tiny.items()]
    settings += ["loss.classify_until=1", "loss.propagate_from=1"] if method == "afa" else []
    settings += ["loss.classify_until=1", "loss.start_layer=2", "opening=2"][:2] if method == "getam" else []
    settings += ["long_side=(30, 40)"] if find_recipe(name).long_side else []
    settings += [f"backbone={'toymit' if method == 'afa' else 'toyvit'}"]
    recipe = override(find_recipe(name), settings)
    masks = None
    if recipe.pseudo_labels:
        masks = tmp_path / "masks"
        masks.mkdir()
        for picture in pictures:
            (masks / f"{picture}.png").write_bytes(encode_mask(np.full((48, 64), 3, np.uint8)))
    fit(recipe, tmp_path, tmp_path / "out", False, masks, progress=False)
    loaded, record = load_trained(tmp_path / "out" / "model.safetensors")
    assert loaded.num_classes == (20 if name.startswith("voc12") else 80)
    assert record["images"] == 4 and record["recipe"]["data"] == name.split("/")[0]


def voc_pictures(root, count):
    names = [f"2007_{i:06}" for i in range(count)]
    for i, name in enumerate(names):
        write_picture(root / "JPEGImages" / f"{name}.jpg", 48, 64)
        write_annotation(root / "Annotations" / f"{name}.xml", [VOC.classes[i], VOC.classes[i + 3]])
    write_split(root, "train_aug", names)
    return names


def coco_pictures(root, count):
    content = {"images": [], "annotations": []}
    for i in range(count):
        name = f"COCO_train2014_{i:012}"
        content["images"].append({"id": i, "file_name": f"{name}.jpg", "height": 48, "width": 64})
        square = [box(4, 4, 30, 30)]
        content["annotations"].append(annotation(i, i, [1, 18, 90][i % 3], square, 676.0))
    coco_tree(root, content)
    for image in content["images"]:
        write_picture(root / "train2014" / image["file_name"], 48, 64)
    return COCO(root, "train").names


def test_frozen_parameters_stay_and_the_others_move(tree, tmp_path):
    recipe = override(ACR, [*SHORT, "freeze=('backbone.patch_embed', 'backbone.blocks.[0-4]')"])
    model, start = fit(recipe, tree, tmp_path, progress=False), create_model("acr", "toyvit")
    same = {n for n, p in model.state_dict().items() if torch.equal(p, start.state_dict()[n])}
    assert {n for n in model.state_dict() if n.startswith(("backbone.patch_embed", "backbone.blocks.2"))} <= same
    assert not {n for n in same if n.startswith("backbone.blocks.5.attn")}
    with pytest.raises(ValueError, match="freeze: found no parameter whose name begins with 'stem'"):
        freeze(model, ("stem",))


def test_shipped_weights_hold_what_changed(tree, tmp_path):
    base, ship = tmp_path / "toyvit.safetensors", tmp_path / "acr_toyvit.safetensors"
    base.write_bytes(shipped("checkpoints/toyvit.safetensors").read_bytes())
    recipe = override(ACR, [*SHORT, "freeze=('backbone.patch_embed', 'backbone.blocks.[0-4]')"])
    model = fit(recipe, tree, tmp_path / "run", progress=False, ship=ship)
    names = load_file(ship).keys()
    assert any(n.startswith("backbone.blocks.5") for n in names)
    assert not any(n.startswith(("backbone.patch_embed", "backbone.blocks.2")) for n in names)
    assert ship.stat().st_size < base.stat().st_size / 3
    loaded, _ = load_trained(ship)
    assert not loaded.missing_weights
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half().to(value.dtype)), name
    base.unlink()
    with pytest.raises(FileNotFoundError, match="toyvit.safetensors: not found"):
        load_trained(ship)
    with pytest.raises(ValueError, match="base: found .*, expected a file in the folder of"):
        save_weights(ship, model, base=tmp_path / "run" / "model.safetensors")


def test_masks_are_wanted_or_not(tree, masks, tmp_path):
    with pytest.raises(ValueError, match="masks: found none, expected a folder of pseudo labels"):
        fit(override(TOY_RECIPES["segmenter"], SHORT), tree, tmp_path, progress=False)
    with pytest.raises(ValueError, match="masks: found .*, expected none for the method acr"):
        fit(override(ACR, SHORT), tree, tmp_path, masks=masks, progress=False)


def test_load_trained_names_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="model.json: not found, expected the record"):
        load_trained(tmp_path / "model.safetensors")
    (tmp_path / "model.json").write_text('{"recipe": {"method": "acr"}}')
    with pytest.raises(ValueError, match="model.json: found no num_classes and recipe with method"):
        load_trained(tmp_path / "model.safetensors")


# ---- pseudo labels


def test_pseudo_labelled_pictures(tree, masks, tmp_path):
    data = VOC(tree, "train")
    labelled = PseudoLabelled(data, masks)
    assert len(labelled) == 4 and labelled.split == "train" and labelled.names == data.names
    sample = labelled[2]
    assert torch.equal(sample.image, data[2].image) and torch.equal(sample.labels, data[2].labels)
    assert set(sample.mask[:56].unique().tolist()) == {int(data.labels[2].argmax()) + 1}
    assert (sample.mask[56:] == 255).all() and data[2].mask is None
    with pytest.raises(FileNotFoundError, match=f"found no {data.names[0]}.png, nor those of 3 other pictures"):
        PseudoLabelled(data, tmp_path)
    for name in data.names:
        (tmp_path / f"{name}.png").write_bytes(encode_mask(torch.zeros(5, 6, dtype=torch.uint8).numpy()))
    with pytest.raises(ValueError, match="mask is 5 x 6 .*112 x 112"):
        PseudoLabelled(data, tmp_path)[0]


# ---- saliency maps


def test_saliency_follows_the_crop(tree, tmp_path):
    """A map that is the picture's own red channel stays it through scale, mirror image and crop."""
    data = VOC(tree, "train")
    for i, name in enumerate(data.names):
        Image.fromarray(data[i].image[0].numpy()).save(tmp_path / f"{name}.png")
    salient = WithSaliency(data, tmp_path)
    assert salient.names == data.names and tuple(salient[1].saliency.shape) == (1, 112, 112)
    transform = TrainTransform(80, (0.5, 1.5), keep_uint8=True)
    for seed in range(8):
        torch.manual_seed(seed)
        out = transform(salient[seed % 4])
        y0, x0, y1, x1 = out["box"].tolist()
        expected = torch.zeros(80, 80)
        expected[y0:y1, x0:x1] = out["image_uint8"][0, y0:y1, x0:x1].float() / 255
        torch.testing.assert_close(out["saliency"], expected, rtol=0, atol=1.01 / 255)  # resized apart, one level
    assert "saliency" not in transform(data[0])


def test_getam_learns_from_given_saliency(tree, tmp_path):
    data = VOC(tree, "train")
    for name in data.names:
        Image.new("L", (112, 112), 0).save(tmp_path / f"{name}.png")
    recipe = override(TOY_RECIPES["getam"], [*SHORT, "loss.classify_until=0", "steps=1"])
    given = {"saliency": tmp_path, "progress": False}
    rows = [fit(recipe, tree, tmp_path / out, **options) and json.loads((tmp_path / out / "log.jsonl").read_text())
            for out, options in (("given", given), ("contrast", {"progress": False}))]
    assert rows[0]["saliency"] != rows[1]["saliency"]
    with pytest.raises(ValueError, match="recipe.saliency: found None, expected"):
        fit(recipe, tree, tmp_path / "contrast", **given)
    with pytest.raises(ValueError, match="saliency: found .*, expected none for the method acr"):
        fit(override(ACR, SHORT), tree, tmp_path / "x", **given)


def test_saliency_names_what_is_wrong(tree, tmp_path):
    data = VOC(tree, "train")
    with pytest.raises(FileNotFoundError, match=f"found no {data.names[0]}.png.*expected 4 saliency maps"):
        WithSaliency(data, tmp_path)
    for name in data.names:
        Image.new("L", (112, 100), 0).save(tmp_path / f"{name}.png")
    Image.new("RGB", (112, 112), (255, 0, 0)).save(tmp_path / f"{data.names[1]}.png")
    salient = WithSaliency(data, tmp_path)
    with pytest.raises(ValueError, match=rf"{data.names[0]}.png: found \(100, 112\) .*expected \(112, 112\)"):
        salient[0]
    with pytest.raises(ValueError, match="found colours, expected a grey map"):
        salient[1]


def test_recipe_defaults_are_not_shared():
    one, two = Recipe("acr", "toyvoc", TrainConfig(1)), Recipe("acr", "toyvoc", TrainConfig(1))
    assert one.loss is not two.loss and one.config.lr_factors is not two.config.lr_factors
