"""GETAM's network and the DPT decoder: backbones, levels, gradients, precisions, weights, wrong inputs.

That it computes what was published is in test_official.py.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from reference import naive_getam as naive
from safetensors.torch import load_file, save_file
from timm.layers import StdConv2dSame
from torch import nn

from wsss_lib import create_model, localize, paths
from wsss_lib.models import DPTDecoder, GetamOutput, GetamViT, create_backbone
from wsss_lib.models.attention import AttentionTape
from wsss_lib.models.decoders import ChannelAttention, Fusion, Reassemble
from wsss_lib.models.getam import PublishedStdConv2d, as_published, block_outputs, stem_levels

BATCH_NORM = nn.modules.batchnorm._BatchNorm
SMALL = {"embed_dim": 64, "num_heads": 1, "depth": 4}

# name: (arguments for timm, pixels per token, prefix tokens, blocks read,
#        channels of the levels, their sizes for a grid of 3x5 patches)
BACKBONES = {
    "toyvit": ({}, 8, 1, [3, 5], [64, 128, 128, 128], [(6, 10), (3, 5), (3, 5), (2, 3)]),
    "vit_base_patch16_224": (
        SMALL, 16, 1, [0, 1, 2, 3], [8, 16, 32, 64], [(12, 20), (6, 10), (3, 5), (2, 3)]),
    "deit_tiny_distilled_patch16_224": (
        {"depth": 6}, 16, 2, [0, 2, 3, 5], [24, 48, 96, 192], [(12, 20), (6, 10), (3, 5), (2, 3)]),
    "vit_base_r50_s16_384": (
        {**SMALL, "img_size": 64}, 16, 1, [2, 3], [256, 512, 64, 64], [(12, 20), (6, 10), (3, 5), (2, 3)]),
    "vit_small_patch14_reg4_dinov2": (
        {"depth": 2}, 14, 5, [0, 0, 0, 1], [48, 96, 192, 384], [(12, 20), (6, 10), (3, 5), (2, 3)]),
    "eva02_tiny_patch14_224": (
        {"depth": 3}, 14, 1, [0, 0, 1, 2], [24, 48, 96, 192], [(12, 20), (6, 10), (3, 5), (2, 3)]),
}


def build(name="toyvit", num_classes=3, **kw):
    torch.manual_seed(0)
    return create_model("getam", name, num_classes, pretrained=False, **BACKBONES[name][0], **kw).eval()


@pytest.fixture(scope="module")
def toy():
    """In float64: what differs is then an error, not rounding."""
    model = build().double()
    for block in model.backbone.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.2)  # attention far from uniform
    return model


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 24, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([[1.0, 0, 1], [0, 1, 0]])


# ------------------------------------------------------------------ the network


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_of_timm(name):
    _, stride, prefix, blocks, channels, sizes = BACKBONES[name]
    model = build(name)
    assert (model.num_classes, model.num_prefix_tokens, model.patch_stride) == (3, prefix, stride)
    assert model.blocks_read == blocks and not model.published
    pictures = torch.randn(2, 3, 3 * stride, 5 * stride)  # an odd grid
    with torch.no_grad():
        levels, logits = model.forward_levels(pictures), model(pictures)
        out = model.forward_segmentation(pictures)
    assert [tuple(level.shape) for level in levels] == [(2, c, *size) for c, size in zip(channels, sizes)]
    assert isinstance(out, GetamOutput) and out.segmentation.shape == (2, 4, 3 * stride, 5 * stride)
    assert logits.shape == (2, 3)
    torch.testing.assert_close(logits, out.logits)
    torch.testing.assert_close(logits, model.classifier(levels[3].mean((2, 3))))
    for size in ((1, 1), (4, 6)):
        out = model.forward_segmentation(torch.randn(1, 3, size[0] * stride, size[1] * stride))
        assert out.segmentation.shape[2:] == (size[0] * stride, size[1] * stride)


def test_blocks_of_the_published_networks():
    """Twelve blocks: 2, 5, 8, 11 of a plain ViT; on the R50 stem 8 and 11. Width 768: 256 features."""
    small = {"embed_dim": 64, "num_heads": 1}
    assert GetamViT(create_backbone("vit_base_patch16_224", **small)).blocks_read == [2, 5, 8, 11]
    hybrid = GetamViT(create_backbone("vit_base_r50_s16_384", img_size=64, **small))
    assert hybrid.blocks_read == [8, 11]
    widths = {width: GetamViT(create_backbone("vit_base_patch16_224", embed_dim=width, num_heads=1, depth=1))
              .decoder.head[0].out_channels for width in (64, 512, 768)}
    assert widths == {64: 32, 512: 256, 768: 256}
    assert GetamViT("toyvit", features=24).decoder.head[0].out_channels == 24


def test_levels_are_block_outputs_before_the_norm(toy, images):
    """Against hooks on the blocks and the stem; the final norm does not even run."""
    seen = {}

    def keep(name):
        return lambda _module, _inputs, out: seen.update({name: out})

    def refuse(*_):
        raise AssertionError("the final norm ran")

    blocks, stem = toy.backbone.blocks, toy.backbone.patch_embed.backbone
    modules = {3: blocks[3], 5: blocks[5], "stem4": stem.block2, "stem8": stem.block3}
    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    handles.append(toy.backbone.norm.register_forward_hook(refuse))
    try:
        levels = toy.forward_levels(images)
        toy(images)
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(levels[0], seen["stem4"]) and torch.equal(levels[1], seen["stem8"])
    for level, block in ((2, 3), (3, 5)):
        tokens = seen[block]
        expected = toy.reassemble[level](tokens[:, 1:], tokens[:, 0], (3, 5))
        torch.testing.assert_close(levels[level], expected, rtol=0, atol=0)
    (patches, prefix), (again, _) = block_outputs(toy.backbone, images, [5, 5])
    assert torch.equal(torch.cat([prefix, patches], 1), seen[5]) and torch.equal(patches, again)


def test_classification_leaves_the_decoder_alone(toy, images, monkeypatch):
    expected = toy(images)

    def refuse(*_):
        raise AssertionError("the decoder ran")

    monkeypatch.setattr(toy.decoder, "forward", refuse)
    monkeypatch.setattr(toy.reassemble[2], "forward", refuse)
    assert torch.equal(toy(images), expected)


def test_hooks_end_with_the_pass_and_models_share_nothing(toy, images):
    other = build(features=8).double()
    expected = [model.forward_segmentation(images).segmentation for model in (toy, other)]
    again = [model.forward_segmentation(images).segmentation for model in (other, toy)][::-1]
    assert all(map(torch.equal, expected, again))
    toy.backbone.blocks[4].register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError):
            toy.forward_segmentation(images)
    finally:
        toy.backbone.blocks[4]._forward_pre_hooks.clear()
    for model in (toy, other, build("vit_base_r50_s16_384")):
        assert not any(module._forward_hooks for module in model.modules())


def test_a_picture_does_not_see_its_batch(toy, images):
    together = toy.forward_segmentation(images)
    for b in range(2):
        alone = toy.forward_segmentation(images[b : b + 1])
        torch.testing.assert_close(alone.segmentation[0], together.segmentation[b], rtol=0, atol=1e-12)
        torch.testing.assert_close(alone.logits[0], together.logits[b], rtol=0, atol=1e-12)
    toy.train()  # group norm, no batch norm: in training too, but for dropout
    dropout = toy.decoder.head[3]
    try:
        dropout.eval()
        training = toy.forward_segmentation(images)
    finally:
        toy.eval()
    assert torch.equal(training.segmentation, together.segmentation)


# ------------------------------------------------------------------ GETAM's maps on it


@pytest.mark.parametrize("start", [None, 0])
def test_getam_agrees_with_attention_written_out(toy, images, start):
    maps = localize(toy, images, LABELS, method="getam", start_layer=start)
    layer = 3 if start is None else start
    expected = naive.getam(toy.backbone, toy, images, LABELS, layer, "cam_grad_s", (3, 5))
    assert maps.shape == (2, 3, 3, 5) and not maps[LABELS == 0].any()
    scale = expected.amax((2, 3), keepdim=True)
    assert (scale > 0).sum() == 3
    scale = scale.masked_fill(scale == 0, 1)
    torch.testing.assert_close(maps / scale, expected / scale, rtol=0, atol=1e-12)
    views = localize(toy, images, LABELS, method="getam", scales=(1.0, 2.0), flip=True)
    assert views.shape == (2, 3, 6, 10)


def test_both_passes_are_taped_block_by_block(toy, images):
    with AttentionTape() as tape:
        logits = toy(images)
    with AttentionTape() as second, torch.no_grad():
        out = toy.forward_segmentation(images)
    assert len(tape.blocks) == len(second.blocks) == 6
    assert torch.equal(tape.class_rows(), second.class_rows()) and torch.equal(logits, out.logits)
    slots = torch.tensor([[0], [1]]), torch.ones(2, 1, dtype=torch.bool)
    assert tape.class_row_gradients(logits, slots).abs().amax((0, 2, 3, 4)).min() > 0


# ------------------------------------------------------------------ training


@pytest.mark.parametrize("name", ["toyvit", "vit_base_patch16_224", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("published", [False, True])
def test_gradients_reach_all_that_is_used(name, published):
    model = build(name, published=published).train()
    pictures = torch.randn(2, 3, 2 * model.patch_stride, 4 * model.patch_stride)
    out = model.forward_segmentation(pictures)
    (out.segmentation.square().mean() + out.logits.square().mean()).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert without == ["backbone.norm.weight", "backbone.norm.bias"]
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    model(pictures).square().mean().backward()
    last = [n for n, p in model.named_parameters() if p.grad is not None and not n.startswith("backbone.")]
    coarsest = [f"reassemble.3.{part}.{kind}" for part in ("readout", "project", "resize")
                for kind in ("weight", "bias")]
    assert last == [*coarsest, "classifier.weight", "classifier.bias"]


def test_checkpointing_changes_no_gradient(images):
    gradients = []
    for checkpointing in (False, True):
        model = build(features=8).double()
        model.backbone.set_grad_checkpointing(checkpointing)
        model.forward_segmentation(images).segmentation.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-18)


def test_gradient_of_the_decoder_by_finite_differences():
    torch.manual_seed(0)
    decoder = DPTDecoder([3, 4, 2, 5], features=4, num_outputs=2).double().eval()
    levels = [torch.randn(1, c, *size, dtype=torch.float64, requires_grad=True)
              for c, size in zip([3, 4, 2, 5], [(4, 6), (2, 3), (2, 3), (1, 2)])]
    assert torch.autograd.gradcheck(lambda *four: decoder(four, (7, 9)), levels, fast_mode=True)


def test_float32_and_autocast_are_near_float64(toy, images):
    expected = toy.forward_segmentation(images)
    single = copy.deepcopy(toy).float()
    for context, dtype, tolerance in (
        (torch.autocast("cpu", enabled=False), torch.float32, 1e-5),  # twenty layers of float32
        (torch.autocast("cpu", torch.bfloat16), torch.bfloat16, 5e-2),  # of 8 bits: one part in 256 each
    ):
        with context, torch.no_grad():
            out = single.forward_segmentation(images.float())
            assert single(images.float()).dtype == dtype
        for found, wanted in zip(out, expected):
            assert not found.requires_grad and found.isfinite().all()
            error = (found.double() - wanted).abs().max() / wanted.abs().max()
            assert error < tolerance, (dtype, error)
    maps = localize(single, images.float(), LABELS, "getam")
    assert maps.dtype == torch.float32


# ------------------------------------------------------------------ the decoder's parts


def test_no_toy_model_has_batch_norm():
    assert not any(isinstance(module, BATCH_NORM) for module in build().modules())
    norms = [module for module in build().decoder.modules() if isinstance(module, nn.GroupNorm)]
    assert [(norm.num_groups, norm.num_channels) for norm in norms] == [(8, 64)] * (2 * 7 + 1)
    assert DPTDecoder([4] * 4, features=12).head[1].num_groups == 4  # what divides 12
    published = build(published=True).decoder
    assert published.head[3].p == 0.1  # dropout
    assert sum(isinstance(module, nn.BatchNorm2d) for module in published.modules()) == 2 * 7 + 1


def test_readout_is_a_layer_on_patch_and_class_token():
    torch.manual_seed(0)
    level = Reassemble(6, 4, 1).double()
    patches, token = torch.randn(2, 15, 6).double(), torch.randn(2, 6).double()
    joined = torch.cat([patches, token[:, None].expand(-1, 15, -1)], dim=2)  # (B, h*w, 2D)
    mixed = F.gelu(level.readout(joined))
    expected = torch.stack([level.project(m.T.reshape(6, 3, 5)[None])[0] for m in mixed])
    torch.testing.assert_close(level(patches, token, (3, 5)), expected, rtol=0, atol=1e-12)
    sizes = {scale: tuple(Reassemble(6, 4, scale)(patches.float(), token.float(), (3, 5)).shape)
             for scale in (4, 2, 1, 0.5)}
    assert sizes == {4: (2, 4, 12, 20), 2: (2, 4, 6, 10), 1: (2, 4, 3, 5), 0.5: (2, 4, 2, 3)}


def test_fusion_adds_refines_and_resizes():
    """The order of the paper: the 1x1 convolution after the resizing, whose corners are aligned."""
    torch.manual_seed(0)
    fusion = Fusion(8, "group").double()
    level, coarser = torch.randn(2, 2, 8, 3, 5).double()
    x = fusion.refine(coarser + fusion.merge(level))
    expected = fusion.out(F.interpolate(x, (5, 9), mode="bilinear", align_corners=True))
    out = fusion(level, (5, 9), coarser)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    corners = fusion.out(x)
    torch.testing.assert_close(out[..., ::4, ::8], corners[..., ::2, ::4], rtol=0, atol=1e-12)
    assert Fusion(8, "group", merges=False).merge is None


def test_residual_unit_and_channel_attention_worked_by_hand():
    """Constant pictures; convolutions that only multiply, by 2 and by 3; norms that do nothing."""
    x = torch.tensor([4.0, -1.0]).view(1, 2, 1, 1).expand(1, 2, 3, 3)

    def multiply(conv, factor):
        with torch.no_grad():
            conv.weight.zero_()
            conv.weight[range(2), range(2), 1, 1] = factor
            if conv.bias is not None:
                conv.bias.zero_()

    unit = Fusion(2, "group").refine
    unit.norm1 = unit.norm2 = nn.Identity()
    multiply(unit.conv1, 2.0), multiply(unit.conv2, 3.0)
    assert unit(x)[0, :, 1, 1].tolist() == [4 + 24, -1]  # -1 does not pass the first ReLU

    attention = ChannelAttention(2, reduction=1)
    multiply(attention.body[0], 2.0), multiply(attention.body[2], -3.0)
    with torch.no_grad():
        attention.gate[0].weight.copy_(torch.tensor([[-1.0, 0.0], [0.0, 0.0]]))
        attention.gate[2].weight.copy_(torch.tensor([[0.0, 0.0], [0.0, 0.0]]))
        body = torch.tensor([-24.0, 0.0])
        assert attention(x)[0, :, 1, 1].tolist() == [4 - 24 / 2, -1]  # gate 1/2
        attention.gate[2].weight[0, 0] = 0.1  # gate sigmoid(0.1 relu(24)) on the first channel
        expected = 4 + body[0] * torch.sigmoid(torch.tensor(2.4))
        torch.testing.assert_close(attention(x)[0, 0, 0, 0], expected)
    assert ChannelAttention(4).gate[0].out_features == 1 and ChannelAttention(256).gate[0].out_features == 16


def test_published_and_default_decoder_differ_in_the_norm_only():
    channels, sizes = [8, 16, 32, 64], [(12, 20), (6, 10), (3, 5), (2, 3)]
    levels = [torch.randn(2, c, *size) for c, size in zip(channels, sizes)]
    decoders = []
    for norm in ("group", "batch"):
        torch.manual_seed(0)
        decoder = DPTDecoder(channels, 16, 4, norm).eval()
        decoder.head[1] = nn.Identity()
        for fusion in decoder.fuse:
            for unit in filter(None, (fusion.merge, fusion.refine)):
                unit.norm1 = unit.norm2 = nn.Identity()
        decoders.append(decoder)
    assert torch.equal(*(decoder(levels, (48, 80)) for decoder in decoders))


# ------------------------------------------------------------------ the published backbone


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_published_positions_are_resized_bilinearly(name):
    plain = build(name).backbone
    published = as_published(copy.deepcopy(plain))
    count = plain.num_prefix_tokens
    with torch.no_grad():
        native, other = torch.randn(1, 3, 224, 224), torch.randn(1, 3, 64, 96)
        torch.testing.assert_close(published(native), plain(native))  # nothing to resize
        assert (published(other) - plain(other)).abs().max() > 1e-4  # bicubic, antialiased
        patches = plain.patch_embed(other)
        found = published._pos_embed(patches)[:, count:] - patches.flatten(1, 2)
        grid = plain.pos_embed[0, count:].T.reshape(1, -1, 14, 14)
        expected = F.interpolate(grid, (4, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found[0].T.reshape(1, -1, 4, 6), expected, rtol=0, atol=1e-6)
    assert list(published.state_dict()) == list(plain.state_dict())
    assert as_published(published) is published  # once more changes nothing
    published.pos_drop = nn.Dropout(1.0)
    assert not published._pos_embed(patches).any()  # timm's dropout of tokens is kept


def test_published_models_can_be_copied():
    model = build("vit_base_patch16_224", published=True)
    pictures = torch.randn(1, 3, 48, 80)
    double = copy.deepcopy(model)
    expected = model(pictures)
    assert torch.equal(double(pictures), expected)
    nn.init.zeros_(double.backbone.pos_embed)
    assert not torch.equal(double(pictures), expected) and torch.equal(model(pictures), expected)


def test_published_weight_standardisation():
    backbone = create_backbone("vit_base_r50_s16_384", img_size=64, **SMALL)
    convolutions = [m for m in as_published(backbone).modules() if isinstance(m, StdConv2dSame)]
    assert convolutions and all(type(m) is PublishedStdConv2d for m in convolutions)
    conv = PublishedStdConv2d(2, 1, kernel_size=1)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([1e-5, 3e-5]).view(1, 2, 1, 1))  # standard deviation 1e-5
        out = conv(torch.tensor([1.0, 0.0]).view(1, 2, 1, 1))
    torch.testing.assert_close(out.item(), -0.5)  # -1e-5 / (1e-5 + 1e-5)
    conv = PublishedStdConv2d(1, 1, kernel_size=7, stride=2)
    assert conv(torch.zeros(1, 1, 9, 12)).shape == (1, 1, 5, 6)  # padded as TensorFlow does


def test_published_backbones_of_one_size_stay_as_they_are():
    backbone = create_backbone("vit_base_patch16_224", img_size=32, dynamic_img_size=False, **SMALL)
    model = GetamViT(backbone, 3, published=True).eval()
    assert model.forward_segmentation(torch.zeros(1, 3, 32, 32)).segmentation.shape == (1, 4, 32, 32)
    with pytest.raises(ValueError, match="found 32x64 pixels, expected 32x32"):
        model(torch.zeros(1, 3, 32, 64))


# ------------------------------------------------------------------ weights


def test_weights_come_back(tmp_path, images):
    model, file, pictures = build(features=16), tmp_path / "getam.safetensors", images.float()
    save_file(model.state_dict(), file)
    again = create_model("getam", num_classes=3, pretrained=file, features=16).eval()
    assert again.missing_weights == again.unused_weights == []
    assert all(map(torch.equal, again.forward_segmentation(pictures), model.forward_segmentation(pictures)))
    other = create_model("getam", num_classes=5, pretrained=file, features=16)
    heads = ["classifier.weight", "classifier.bias", "decoder.head.4.weight", "decoder.head.4.bias"]
    assert other.missing_weights == heads  # for other classes; the rest is kept


def test_shipped_weights_fill_the_backbone_and_nothing_else():
    model = create_model("getam")
    shipped = load_file(paths.shipped("checkpoints/toyvit.safetensors"))
    own = model.state_dict()
    assert model.missing_weights == [name for name in own if not name.startswith("backbone.")]
    assert model.unused_weights == sorted(name for name in shipped if not name.startswith("backbone."))
    for name in own:
        if name.startswith("backbone."):
            assert torch.equal(own[name], shipped[name].float()), name


def test_arguments_go_to_the_network_and_to_timm():
    model = create_model("getam", "vit_base_patch16_224", 3, False, features=12, published=True,
                         drop_path_rate=0.2, **SMALL)
    assert model.decoder.head[0].out_channels == 12 and model.published
    assert model.backbone.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)


# ------------------------------------------------------------------ refusals


def test_wrong_arguments(toy):
    wrong = [
        (lambda: GetamViT("toyvit", 0), "num_classes: found 0, expected at least 1"),
        (lambda: GetamViT("toyvit", 3, features=0), "features: found 0, expected at least 1"),
        (lambda: GetamViT("toycnn"), "backbone: found no class token, expected one"),
        (lambda: GetamViT("vit_pwee_patch16_reg1_gap_256"), "backbone: found no class token"),
        (lambda: GetamViT("vit_tiny_patch16_225"), "did you mean"),
        (lambda: DPTDecoder([8, 8, 8]), "channels: found 3 levels, expected 4"),
        (lambda: DPTDecoder([8, 8, 8, 8], norm="layer"), "norm: found 'layer', expected one of group, batch"),
        (lambda: Reassemble(8, 8, 3), "scale: found 3, expected 4, 2, 1 or 0.5"),
        (lambda: build("eva02_tiny_patch14_224", published=True), "found Eva, expected, as published, a ViT"),
        (lambda: build("vit_small_patch14_reg4_dinov2", published=True), "found VisionTransformer, expected"),
    ]
    for size, message in (((20, 16), "found 20x16 pixels, expected multiples of 8"), ((0, 16), "found 0x16")):
        for run in (toy.forward, toy.forward_segmentation):
            wrong.append((lambda run=run, size=size: run(torch.zeros(1, 3, *size).double()), message))
    for run, message in wrong:
        with pytest.raises(ValueError, match=message):
            run()


def test_stem_levels():
    assert stem_levels(create_backbone("vit_tiny_patch16_224", depth=1)) == []
    assert stem_levels(create_backbone("vit_tiny_r_s16_p8_224", depth=1)) == []  # a stem of one convolution
    hybrid = create_backbone("vit_base_r50_s16_384", img_size=64, **SMALL)
    (first, c), (second, d) = stem_levels(hybrid)
    stages = hybrid.patch_embed.backbone.stages
    assert first is stages[0] and second is stages[1] and (c, d) == (256, 512)
