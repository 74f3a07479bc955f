"""Backbones by name, the two heads, weights in and out, and inputs that must be refused."""

import math

import pytest
import timm
import torch
from reference import naive_cam as naive
from safetensors.torch import load_file, save_file
from torch import nn

from wsss_lib import create_model, paths
from wsss_lib.models import METHODS, CamViT, ConvStem, create_backbone, fold_batch_norm, split_tokens
from wsss_lib.models.cam import PATCH_PRIOR

# name: (pixels per token, prefix tokens, of which class tokens)
VITS = {
    "toyvit": (8, 1, 1),
    "vit_tiny_patch16_224": (16, 1, 1),
    "deit_tiny_distilled_patch16_224": (16, 2, 2),
    "vit_tiny_r_s16_p8_224": (32, 1, 1),  # hybrid: a convolutional stem
    "vit_small_patch14_reg4_dinov2": (14, 5, 1),  # four registers
    "eva02_tiny_patch14_224": (14, 1, 1),
    "vit_pwee_patch16_reg1_gap_256": (16, 1, 0),  # a register, no class token
}


@pytest.fixture
def toy():
    torch.manual_seed(0)
    return create_model("cam", num_classes=3, pretrained=False).eval()


@pytest.mark.parametrize("name", VITS)
def test_vits_of_timm_work_by_name(name):
    stride, prefix, class_tokens = VITS[name]
    model = create_model("cam", name, num_classes=3, pretrained=False).eval()
    assert (model.patch_stride, model.num_prefix_tokens) == (stride, prefix)
    assert model.num_class_tokens == class_tokens
    config = timm.data.resolve_model_data_config(model.backbone)
    assert model.data_config == {"mean": config["mean"], "std": config["std"]}
    images = torch.randn(2, 3, 2 * stride, 3 * stride)
    with torch.no_grad():
        heads, logits = model.forward_heads(images), model(images)
        assert heads.features.shape == (2, model.backbone.embed_dim, 2, 3)
        assert heads.patch_logits.shape == (2, 3, 2, 3)
        assert heads.pooled.shape == heads.class_logits.shape == logits.shape == (2, 3)
        torch.testing.assert_close(logits, (heads.class_logits + heads.pooled) / 2)
        # the heads read the tokens in timm's order: class tokens, registers, patches row by row
        tokens = model.backbone.fc_norm(model.backbone.forward_features(images))
    torch.testing.assert_close(heads.features[:, :, 1, 0], tokens[:, prefix + 3])
    if class_tokens:
        torch.testing.assert_close(heads.class_logits, model.class_head(tokens[:, :class_tokens].mean(1)))
    else:
        assert model.class_head is None and heads.class_logits is heads.pooled


def test_toyvit_is_what_the_course_says():
    model = timm.create_model("toyvit")
    assert isinstance(model, timm.models.VisionTransformer) and "toyvit" in timm.list_models()
    assert (len(model.blocks), model.embed_dim, model.blocks[0].attn.num_heads) == (6, 128, 4)
    assert model.patch_embed.grid_size == (14, 14) and model.cls_token is not None
    config = timm.data.resolve_model_data_config(model)
    assert (config["mean"], config["std"]) == ((0.5,) * 3, (0.25,) * 3)
    assert config["input_size"] == (3, 112, 112)
    backbone = create_backbone("toyvit")
    assert 1.6e6 < sum(p.numel() for p in backbone.parameters()) < 1.8e6
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in backbone.modules())
    stem = ConvStem()
    assert stem(torch.zeros(1, 3, 16, 40)).shape == (1, 128, 2, 5)
    assert not any(isinstance(m, NORMS) for m in stem.modules())


NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


@pytest.mark.parametrize("name", ["toyvit", "toycnn"])
def test_folded_batch_norm_gives_the_same_outputs_and_the_tensors_that_ship(name):
    torch.manual_seed(0)
    model = create_model("cam", name, pretrained=False, stem_norm="batch")
    for _ in range(3):  # statistics that are not 0 and 1
        model(2 * torch.randn(4, 3, 32, 32) + 1)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight, 1, 0.2), nn.init.normal_(norm.bias)
    model.eval()
    images = torch.randn(2, 3, 48, 32)
    expected = model.forward_heads(images)
    assert fold_batch_norm(model) is model and not model.training
    assert not any(isinstance(m, NORMS) for m in model.backbone.patch_embed.modules())
    for found, wanted in zip(model.forward_heads(images), expected):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)  # float32, a dozen layers
    plain = create_model("cam", name, pretrained=False)
    shapes = {n: t.shape for n, t in plain.state_dict().items()}
    assert {n: t.shape for n, t in model.state_dict().items()} == shapes
    assert fold_batch_norm(model.train()).training


def test_stem_norms():
    assert any(isinstance(m, nn.GroupNorm) for m in create_backbone("toyvit", stem_norm="group").modules())
    with pytest.raises(ValueError, match="norm: found 'layer', expected one of none, batch, group"):
        create_backbone("toyvit", stem_norm="layer")


def test_toycnn_is_as_large_as_toyvit_and_has_no_class_token():
    sizes = [sum(p.numel() for p in create_backbone(n).parameters()) for n in ("toyvit", "toycnn")]
    assert abs(sizes[1] / sizes[0] - 1) < 0.05
    model = create_model("cam", "toycnn", 3, pretrained=False).eval()
    heads = model.forward_heads(torch.randn(2, 3, 32, 48))
    assert heads.class_logits is heads.pooled and heads.patch_logits.shape == (2, 3, 4, 6)
    with pytest.raises(ValueError, match="toycnn: timm has no weights"):
        timm.create_model("toycnn", pretrained=True)


def test_create_backbone_hands_arguments_to_timm_and_leaves_the_mode_alone():
    backbone = create_backbone("vit_tiny_patch16_224", depth=2, img_size=64)
    assert len(backbone.blocks) == 2 and backbone.training and backbone.patch_embed.grid_size == (4, 4)
    assert all(module.training for module in backbone.modules())
    model = create_model("cam", "vit_tiny_patch16_224", 3, pretrained=False, depth=2, pool=1.0)
    assert len(model.backbone.blocks) == 2 and model.pool == 1.0


def test_a_backbone_of_one_size_says_so():
    model = CamViT(create_backbone("vit_tiny_patch16_224", depth=1, img_size=64, dynamic_img_size=False), 3)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    with pytest.raises(ValueError, match="found 64x96 pixels, expected 64x64"):
        model(torch.zeros(1, 3, 64, 96))


@pytest.mark.parametrize(
    "name, message",
    [
        ("vit_tiny_patch16_225", "did you mean .*vit_tiny_patch16_224"),
        ("toyvitt", "did you mean toyvit"),
        ("vit_tiny_patch16_224.augreg", "did you mean .*vit_tiny_patch16_224.augreg_in21k"),
        ("resnet18", "resnet18, which has no num_prefix_tokens"),
        ("convnext_atto", "expected a plain ViT"),
    ],
)
def test_other_backbones_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        create_backbone(name)


def test_timm_says_where_the_toy_weights_are():
    with pytest.raises(ValueError, match="wsss_lib.create_model"):
        timm.create_model("toyvit", pretrained=True)


def test_an_argument_that_timm_does_not_know_is_not_swallowed():
    with pytest.raises(TypeError, match="colour"):
        create_model("cam", pretrained=False, colour="red")


@pytest.mark.parametrize("pool, top", [(12 / 196, 2), (1.0, 35), (0.0001, 1), (1, 1), (7, 7), (35, 35)])
def test_pooling_agrees_with_the_loop(pool, top):
    model = CamViT("toyvit", 2, pool)
    logits = torch.randn(3, 2, 5, 7, dtype=torch.float64)
    pooled = model.pool_logits(logits)
    expected = [[naive.top_mean(logits[b, c].flatten().tolist(), top) for c in range(2)] for b in range(3)]
    # float64 against float64: only the order of the sum differs
    torch.testing.assert_close(pooled, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_default_pool_is_twelve_of_the_toy_tokens(toy):
    logits = torch.arange(196.0).view(1, 1, 14, 14)
    assert toy.pool_logits(logits).item() == sum(range(184, 196)) / 12


@pytest.mark.parametrize("pool", [0, -1, 0.0, 1.5, math.nan, True])
def test_wrong_pool(pool):
    with pytest.raises(ValueError, match="pool: found"):
        CamViT("toyvit", 3, pool)


def test_wrong_inputs(toy):
    with pytest.raises(ValueError, match="found 20x16 pixels, expected multiples of 8"):
        toy(torch.zeros(1, 3, 20, 16))
    with pytest.raises(ValueError, match=r"found shape \(3, 16, 16\)"):
        toy(torch.zeros(3, 16, 16))
    with pytest.raises(ValueError, match="found 0x16"):
        toy(torch.zeros(1, 3, 0, 16))
    with pytest.raises(ValueError, match="num_classes: found 0"):
        CamViT("toyvit", 0)
    with pytest.raises(ValueError, match="found 40 patches, expected at most the 4"):
        CamViT("toyvit", 3, pool=40)(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="method: found 'cma', expected one of cam"):
        create_model("cma")
    assert list(METHODS) == ["cam", "getam", "weaktr", "acr", "afa", "segmenter"]


def test_pictures_of_a_batch_do_not_mix(toy):
    images = torch.randn(3, 3, 24, 40)
    with torch.no_grad():
        one_by_one = torch.cat([toy.train()(image[None]) for image in images])
        # float32; the kernels block their sums by batch size
        torch.testing.assert_close(toy(images), one_by_one, rtol=0, atol=1e-5)


def test_split_tokens():
    tokens = torch.arange(2 * 8 * 3).view(2, 8, 3)
    prefix, patches = split_tokens(tokens, 2, (2, 3))
    assert prefix.shape == (2, 2, 3) and patches.shape == (2, 3, 2, 3)
    assert torch.equal(prefix, tokens[:, :2]) and torch.equal(patches[1, :, 1, 2], tokens[1, 7])
    for wrong in (tokens[:, 1:], tokens[0]):
        with pytest.raises(ValueError, match=r"expected \(B, 8, D\) for 2 prefix tokens and a grid of 2x3"):
            split_tokens(wrong, 2, (2, 3))


# ------------------------------------------------------------------ weights


@pytest.fixture
def weights(toy, tmp_path):
    path = tmp_path / "toy.safetensors"
    save_file({name: t.half() for name, t in toy.state_dict().items()}, path)
    return path


def test_weights_come_back(toy, weights):
    model = create_model("cam", num_classes=3, pretrained=weights)
    assert model.missing_weights == model.unused_weights == []
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32  # the file is half precision
        assert torch.equal(tensor, toy.state_dict()[name].half().float()), name
    images = torch.randn(1, 3, 112, 112)
    torch.testing.assert_close(model.eval()(images), toy(images), rtol=0, atol=2e-2)  # weights in fp16


def test_heads_for_other_classes_stay_as_they_are(weights):
    model = create_model("cam", num_classes=5, pretrained=str(weights))
    heads = ["class_head.bias", "class_head.weight", "patch_head.bias", "patch_head.weight"]
    assert sorted(model.missing_weights) == model.unused_weights == heads
    assert torch.equal(model.backbone.cls_token.half(), load_file(weights)["backbone.cls_token"])


def test_shipped_weights_are_the_default(toy, weights, monkeypatch):
    asked = []
    monkeypatch.setattr(paths, "shipped", lambda relative: asked.append(relative) or weights)
    model = create_model("cam", num_classes=3)
    assert asked == ["checkpoints/toyvit.safetensors"]
    assert torch.equal(model.patch_head.weight, toy.patch_head.weight.half().float())


def test_without_weights_all_are_missing(toy):
    assert toy.missing_weights == list(toy.state_dict())


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("backbone.cls_token", None, r"found no such tensor, expected shape \(1, 1, 128\)"),
        ("backbone.cls_token", (1, 1, 64), r"found shape \(1, 1, 64\), expected \(1, 1, 128\)"),
        ("backbone.blocks.6.bias", (7,), r"found a tensor of shape \(7,\), expected none"),
        ("patch_head.weight", (3, 64), r"found shape \(3, 64\), expected \(3, 128\)"),
    ],
)
def test_weights_that_do_not_fit(weights, name, change, message):
    stored = load_file(weights)
    stored.pop(name, None)
    if change is not None:
        stored[name] = torch.zeros(change)
    save_file(stored, weights)
    with pytest.raises(ValueError, match=f"toy.safetensors: {name}: {message}"):
        create_model("cam", num_classes=3, pretrained=weights)


def test_weights_that_are_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors: not found"):
        create_model("cam", pretrained=tmp_path / "nowhere.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors here")
    with pytest.raises(ValueError, match="text.safetensors: found no safetensors file"):
        create_model("cam", pretrained=tmp_path / "text.safetensors")


def test_a_head_that_the_model_lacks_is_reported(weights):
    save_file({**load_file(weights), "decoder.weight": torch.zeros(2)}, weights)
    model = create_model("cam", num_classes=3, pretrained=weights)
    assert model.unused_weights == ["decoder.weight"] and model.missing_weights == []


def test_the_patch_head_starts_at_its_prior_and_heads_can_be_forgotten():
    model = create_model("cam", num_classes=3, pretrained=False)
    prior = torch.full((3,), PATCH_PRIOR)
    torch.testing.assert_close(model.patch_head.bias.detach().sigmoid(), prior)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.patch_head.bias.fill_(7)
    model.reset_heads()
    after = model.state_dict()
    assert not torch.equal(after["patch_head.weight"], before["patch_head.weight"])
    assert not torch.equal(after["class_head.weight"], before["class_head.weight"])
    torch.testing.assert_close(after["patch_head.bias"].sigmoid(), prior)
    assert all(torch.equal(after[n], before[n]) for n in after if n.startswith("backbone."))


def test_patch_logits_are_the_activation_map_and_a_bias():
    model = create_model("cam", num_classes=3, pretrained=False).eval()
    with torch.no_grad():
        model.patch_head.bias.copy_(torch.tensor([-1.0, 0.0, 2.0]))
        out = model.forward_heads(torch.randn(2, 3, 32, 40))
        maps = model.activation_maps(out.features)
    expected = maps + torch.tensor([-1.0, 0.0, 2.0])[:, None, None]
    torch.testing.assert_close(out.patch_logits, expected, rtol=0, atol=1e-5)  # float32 sums in another order
