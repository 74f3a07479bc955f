"""The Mix Transformer: names and sizes, reduced attention, the course's small one, weights, wrong inputs.

That it computes what was published is in test_afa.py.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from reference import naive_afa as naive
from safetensors.torch import save_file
from torch import nn

from wsss_lib import create_model
from wsss_lib.localization import cam, grad_cam
from wsss_lib.models import CamViT, create_backbone, fold_batch_norm
from wsss_lib.models.attention import AttentionTape
from wsss_lib.models.mit import Attention, MixTransformer, pooled_queries
from wsss_lib.training.engine import TrainConfig, plain_attention, train
from wsss_lib.training.mosaics import mosaic_loss

GOLDEN = Path(__file__).parent / "golden"
BATCH_NORM = nn.modules.batchnorm._BatchNorm
TINY = {"embed_dims": (8, 16, 24, 32), "depths": (1, 2, 1, 2), "num_heads": (1, 2, 3, 4)}


def tiny(**kw):
    torch.manual_seed(0)
    return MixTransformer(**{**TINY, **kw}).eval()


# ------------------------------------------------------------------ the published networks


def test_names_and_shapes_are_the_published_ones():
    published = json.loads((GOLDEN / "afa_mit_b1.json").read_text())["state_dict"]
    start = "encoder."
    encoder = {name[len(start) :]: shape for name, shape in published.items() if name.startswith(start)}
    own = create_backbone("mit_b1").state_dict()
    assert {name: list(tensor.shape) for name, tensor in own.items()} == encoder


@pytest.mark.parametrize(
    "name, millions, depths", [("mit_b0", 3.3, (2, 2, 2, 2)), ("mit_b1", 13.2, (2, 2, 2, 2)),
                               ("mit_b2", 24.2, (3, 4, 6, 3))])
def test_sizes(name, millions, depths):
    """Parameters without a classifier; ImageNet's would add 0.3, 0.5 and 0.5 million."""
    backbone = create_backbone(name)
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert tuple(len(getattr(backbone, f"block{stage}")) for stage in (1, 2, 3, 4)) == depths
    assert len(backbone.blocks) == sum(depths) and backbone.num_prefix_tokens == 0
    config = timm.data.resolve_model_data_config(backbone)
    assert (config["mean"], config["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_epsilons_are_the_published_ones():
    """1e-6 in the blocks and at a stage's end, 1e-5 after the convolutions."""
    found = {name: module.eps for name, module in create_backbone("mit_b0").named_modules()
             if isinstance(module, nn.LayerNorm)}
    convolved = {name for name in found if name.startswith("patch_embed") or name.endswith("attn.norm")}
    assert len(convolved) == 4 + 6 and {found[name] for name in convolved} == {1e-5}
    assert {eps for name, eps in found.items() if name not in convolved} == {1e-6}


def test_strides():
    images = torch.randn(2, 3, 64, 96)
    sizes = {(4, 2, 2, 1): (4, 6), (4, 2, 2, 2): (2, 3), (4, 2, 1, 1): (8, 12)}
    for strides, last in sizes.items():
        model = tiny(strides=strides)
        levels = model.forward_stages(images)
        assert [level.shape[1] for level in levels] == [8, 16, 24, 32]
        assert levels[0].shape[2:] == (16, 24) and levels[-1].shape[2:] == last
        assert model.patch_embed.feat_ratio() == math.prod(strides)
        tokens = model.forward_features(images)
        assert torch.equal(tokens[:, 4], levels[-1][:, :, 4 // last[1], 4 % last[1]])  # row by row
    assert tiny(strides=(4, 2, 2, 2)).state_dict().keys() == tiny().state_dict().keys()


def test_any_size_of_picture():
    model = tiny()
    for size in ((1, 1), (16, 32), (33, 70), (100, 64)):
        levels = model.forward_stages(torch.randn(1, 3, *size))
        for level, stride in zip(levels, (4, 8, 16, 16)):
            assert level.shape[2:] == tuple(math.ceil(side / stride) for side in size)
            assert level.isfinite().all()


def test_drop_path_falls_linearly():
    model = create_backbone("mit_b1")
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.1 * i / 7 for i in range(8)])
    assert all(isinstance(block.drop_path, nn.Identity) for block in create_backbone("toymit").blocks)


def test_first_weights():
    """Linear 0.02, convolutions by the fan-out of a group; deviations of many numbers, to 10 %."""
    model = create_backbone("mit_b0")
    block = model.block3[0]
    wanted = {block.attn.kv: 0.02, block.mlp.fc1: 0.02, block.mlp.dwconv.dwconv: math.sqrt(2 / 9),
              block.attn.sr: math.sqrt(2 / (4 * 160)), model.patch_embed1.proj: math.sqrt(2 / (49 * 32))}
    for module, deviation in wanted.items():
        assert module.weight.std().item() == pytest.approx(deviation, rel=0.1) and not module.bias.any()


# ------------------------------------------------------------------ attention


def test_reduced_attention_is_attention_to_the_coarse_grid():
    attention = Attention(12, 3, sr_ratio=2).double()
    x, grid = torch.randn(2, 7 * 6, 12, dtype=torch.float64), (7, 6)
    coarse = x.transpose(1, 2).unflatten(2, grid)[:, :, :6]  # the seventh row fills no window
    coarse = attention.norm(attention.sr(coarse).flatten(2).transpose(1, 2))
    keys, values = attention.kv(coarse).chunk(2, dim=-1)
    heads = []
    for head in range(3):
        own = slice(4 * head, 4 * head + 4)
        scores = attention.q(x)[..., own] @ keys[..., own].transpose(1, 2) / 2  # sqrt(4)
        heads.append(scores.softmax(-1) @ values[..., own])
    expected = attention.proj(torch.cat(heads, -1))
    torch.testing.assert_close(attention(x, grid), expected, rtol=0, atol=1e-14)
    attention.fused_attn = False
    torch.testing.assert_close(attention(x, grid), expected, rtol=0, atol=1e-14)


def test_a_grid_smaller_than_a_window_is_filled_up():
    attention = Attention(12, 3, sr_ratio=4).double()
    x = torch.randn(1, 6, 12, dtype=torch.float64)
    seen = []
    attention.sr.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    attention(x, (2, 3))
    assert seen[0].shape == (1, 12, 4, 4)
    assert torch.equal(seen[0][:, :, :2, :3], x.transpose(1, 2).view(1, 12, 2, 3))
    assert not seen[0][:, :, 2:].any() and not seen[0][..., 3:].any()


def test_the_tape_sees_every_block():
    model = tiny()
    with AttentionTape() as tape:
        levels = model.forward_stages(torch.randn(2, 3, 64, 96))
    assert len(tape.blocks) == len(model.blocks) == 6
    tokens = [16 * 24, 8 * 12, 8 * 12, 4 * 6, 4 * 6, 4 * 6]
    assert [block.q.shape[2] for block in tape.blocks] == tokens
    assert [block.k.shape[2] for block in tape.blocks] == [2 * 3, 2 * 3, 2 * 3, 2 * 3, 24, 24]
    assert [block.q.shape[1] for block in tape.blocks] == [1, 2, 2, 3, 4, 4]
    with plain_attention(model), AttentionTape() as tape:
        plain = model.forward_stages(levels[0].new_zeros(1, 3, 64, 96))
    assert plain[0].isfinite().all() and not tape._blocks  # plain: nothing calls the fused function


def test_fused_and_plain_attention_agree():
    model, images = tiny().double(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    fused = model(images)
    with plain_attention(model):
        torch.testing.assert_close(model(images), fused, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid, ratio", [((4, 6), 2), ((5, 7), 2), ((6, 6), 3), ((4, 4), 1)])
def test_pooled_queries_average_the_scores(grid, ratio):
    generator = torch.Generator().manual_seed(0)
    coarse = tuple(side // ratio for side in grid)
    q = torch.randn(2, 3, math.prod(grid), 4, generator=generator, dtype=torch.float64)
    k = torch.randn(2, 3, math.prod(coarse), 4, generator=generator, dtype=torch.float64)
    pooled, found = pooled_queries(q, grid, ratio)
    assert found == coarse
    scores = pooled @ k.transpose(-2, -1)
    for b in range(2):
        for h in range(3):
            expected = naive.pooled_scores(q[b, h].numpy(), k[b, h].numpy(), grid, ratio)
            # float64: averaged before or after the product
            np.testing.assert_allclose(scores[b, h].numpy(), expected, rtol=0, atol=1e-14)


# ------------------------------------------------------------------ the course's Mix Transformer


def test_toymit_is_what_the_course_says():
    backbone = create_backbone("toymit")
    assert isinstance(backbone, MixTransformer) and "toymit" in timm.list_models()
    model = CamViT("toymit", 20)
    assert 1.6e6 < sum(p.numel() for p in model.parameters()) <= 1.7e6
    assert not any(isinstance(m, BATCH_NORM) for m in backbone.modules())
    levels = backbone.forward_stages(torch.zeros(1, 3, 112, 112))
    assert [tuple(level.shape[1:]) for level in levels] == [
        (64, 28, 28), (96, 14, 14), (128, 14, 14), (128, 14, 14)]
    config = timm.data.resolve_model_data_config(backbone)
    assert (config["mean"], config["std"], config["input_size"]) == ((0.5,) * 3, (0.25,) * 3, (3, 112, 112))


@pytest.mark.parametrize("name, stride", [("toymit", 8), ("mit_b0", 16)])
def test_the_classifier_works_on_it(name, stride):
    torch.manual_seed(0)
    model = create_model("cam", name, num_classes=3, pretrained=False).eval()
    assert (model.patch_stride, model.num_prefix_tokens, model.num_class_tokens) == (stride, 0, 0)
    images, labels = torch.randn(2, 3, 2 * stride, 3 * stride), torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    heads = model.forward_heads(images)
    assert heads.class_logits is heads.pooled and heads.patch_logits.shape == (2, 3, 2, 3)
    assert cam(model, images, labels).shape == grad_cam(model, images, labels, layer=-1).shape == (2, 3, 2, 3)
    heads.pooled.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match=f"expected multiples of {stride}"):
        model(torch.zeros(1, 3, 2 * stride + 1, stride))


def test_pretraining_with_batch_norm_in_the_stem():
    """Two steps of the course's recipe; the norm is then folded into the tensors that ship."""
    torch.manual_seed(0)
    model = create_model("cam", "toymit", 3, pretrained=False, stem_norm="batch")
    assert any(isinstance(m, BATCH_NORM) for m in model.modules())
    labels = torch.eye(3)[:2]
    batch = {"image": torch.randn(4, 3, 48, 48), "labels": labels, "single": True, "cut": (3, 2),
             "quadrants": labels[:, None].repeat(1, 4, 1)}
    config = TrainConfig(2, warmup=1, save_every=2, log_every=1)
    history = train(model, lambda step: batch, mosaic_loss, config, progress=False)
    assert all(math.isfinite(row["quadrant"]) for row in history)
    expected = model.forward_heads(batch["image"]).patch_logits
    fold_batch_norm(model)
    # float32, thirty layers
    found = model.forward_heads(batch["image"]).patch_logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    shapes = {n: t.shape for n, t in create_model("cam", "toymit", 3, pretrained=False).state_dict().items()}
    assert {n: t.shape for n, t in model.state_dict().items()} == shapes


def test_stem_norms_and_arguments():
    group = create_backbone("toymit", stem_norm="group")
    assert any(isinstance(m, nn.GroupNorm) for m in group.modules())
    shallow = create_backbone("toymit", depths=(1, 1, 1, 1), embed_dims=(32, 48, 64, 64), in_chans=1)
    assert len(shallow.blocks) == 4
    assert shallow.forward_features(torch.zeros(1, 1, 16, 16)).shape == (1, 4, 64)
    with pytest.raises(ValueError, match="norm: found 'layer', expected one of none, batch, group"):
        create_backbone("toymit", stem_norm="layer")
    with pytest.raises(TypeError, match="colour"):
        create_backbone("toymit", colour="red")
    with pytest.raises(ValueError, match="toymit: timm has no weights"):
        timm.create_model("toymit", pretrained=True)


def test_weights_come_back(tmp_path):
    torch.manual_seed(0)
    model = create_model("cam", "toymit", 3, pretrained=False).eval()
    save_file({name: t.half() for name, t in model.state_dict().items()}, tmp_path / "toymit.safetensors")
    again = create_model("cam", "toymit", 3, pretrained=tmp_path / "toymit.safetensors").eval()
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(again(images), model(images), rtol=0, atol=2e-2)  # weights in half precision
    assert again.missing_weights == again.unused_weights == []


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_imagenet_weights_load_by_key(suffix, tmp_path):
    """A file as SegFormer's authors published it, classifier included; nothing but it is left out."""
    torch.manual_seed(0)
    stored = {name: torch.randn_like(t) for name, t in create_backbone("mit_b0").state_dict().items()}
    head = {"head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)}
    file = tmp_path / f"mit_b0.{suffix}"
    save_file({**stored, **head}, file) if suffix == "safetensors" else torch.save({**stored, **head}, file)
    model = create_model("cam", "mit_b0", 3, pretrained=True, pretrained_cfg_overlay={"file": str(file)})
    own = model.backbone.state_dict()
    assert own.keys() == stored.keys() and all(torch.equal(own[name], stored[name]) for name in own)
    assert model.missing_weights == ["patch_head.weight", "patch_head.bias"]
    with pytest.raises(ValueError, match='mit_b1: timm has no .*_overlay={"file": "mit_b1.pth"}'):
        create_model("cam", "mit_b1")


# ------------------------------------------------------------------ precisions and wrong inputs


def test_precisions():
    model, images = tiny().double(), torch.randn(1, 3, 32, 64, dtype=torch.float64)
    expected = model(images)
    assert expected.dtype == torch.float64
    torch.testing.assert_close(model.float()(images.float()).double(), expected, rtol=0, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(images.float())
    assert (rough.double() - expected).abs().max() < 0.1  # bfloat16, values of order 1


def test_gradients_agree_between_fused_and_plain_attention():
    model, images = tiny().double(), torch.randn(1, 3, 32, 64, dtype=torch.float64)
    weight = torch.randn(1, 8, 32, dtype=torch.float64)
    gradients = []
    for context in (plain_attention(model), torch.enable_grad()):
        with context:
            loss = (model(images) * weight).sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_pictures_of_a_batch_do_not_mix():
    model, images = tiny(drop_path_rate=0.0).double(), torch.randn(3, 3, 32, 48, dtype=torch.float64)
    one_by_one = torch.cat([model.train()(image[None]) for image in images])
    torch.testing.assert_close(model(images), one_by_one, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"depths": (1, 1, 1)}, r"depths: found \(1, 1, 1\), expected four whole numbers"),
        ({"strides": (4, 2, 2, 0)}, "strides: found"),
        ({"embed_dims": (8, 16, 24, 33)}, "num_heads: found 4, expected a divisor of the width 33"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        tiny(**change)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 3, 0, 32)])
def test_wrong_images(shape):
    with pytest.raises(ValueError, match="images: found shape"):
        tiny()(torch.zeros(shape))
