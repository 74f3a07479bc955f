"""AFA's network and maps: the published numbers, the variant on plain ViTs, precisions, wrong inputs.

The golden networks' weights are made from their published names, so each is written to a file as the
published code would, loaded, and compared with what the published code computed.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from reference import naive_afa as naive
from reference.naive_attention import affinity as naive_affinity
from safetensors.torch import load_file, save_file
from torch import nn

from wsss_lib import create_model, load_official
from wsss_lib.localization import cam
from wsss_lib.localization.affinity_cam import affinity_cam
from wsss_lib.models import create_backbone
from wsss_lib.models.afa import AfaNet, AfaViT, afa_network
from wsss_lib.models.attention import AttentionTape
from wsss_lib.models.mit import MixTransformer, pooled_queries
from wsss_lib.models.official import AFA_NAMES
from wsss_lib.models.published import published_name
from wsss_lib.models.segformer import SegFormerHead
from wsss_lib.training.affinity import affinity_labels, affinity_loss
from wsss_lib.training.engine import plain_attention
from wsss_lib.training.losses import balanced_segmentation_loss

GOLDEN = Path(__file__).parent / "golden"
# Of the largest value: re-running the published code with other thread counts moves its outputs by 2e-5, its
# gradients by 1.1e-5.
OUTPUTS, GRADIENTS = 2e-5, 1.1e-5
# At scale 1.5 the scores of 16 heads add up to hundreds, and cancel. In float64 we are as far from the golden
# affinity, 2.8e-5, as in float32: that is its own rounding.
SCALED_AFFINITY = 4e-5
NETWORKS = {"afa_small": ("sq", "rect"), "afa_small_gap": ("gp",), "afa_mit_b1": ("sq",)}
BATCH_NORM = nn.modules.batchnorm._BatchNorm


def write(name, folder):
    """The golden network's published file, and what was recorded of it."""
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    file = folder / f"{name}.safetensors"
    save_file({key: naive.golden_weight(key, shape) for key, shape in facts["state_dict"].items()}, file)
    return file, facts


@pytest.fixture(scope="module", params=NETWORKS)
def case(request, tmp_path_factory):
    file, facts = write(request.param, tmp_path_factory.mktemp("official"))
    model = load_official("afa", file)
    model.pool = "gap" if "gap" in request.param else "gmp"
    golden = load_file(GOLDEN / f"{request.param}.safetensors")
    tags = NETWORKS[request.param]
    return SimpleNamespace(name=request.param, model=model, golden=golden, facts=facts, tags=tags)


def assert_close(found, expected, tolerance, name=""):
    error = (found.detach().double() - expected.double()).abs().max() / expected.abs().max()
    assert found.shape == expected.shape and error <= tolerance, f"{name}: off by {error:.1e} of the largest"


def assert_recorded(case, name, tensor, tolerance, together=False):
    """A stored tensor; of a large one every n-th value, and sums over all of it. together: all errors may have
    one sign, as in maps that are divided by their own maximum, where its rounding is in every pixel."""
    if name in case.golden:
        assert_close(tensor, case.golden[name], tolerance, name)
        return
    flat, stats = tensor.detach().double().flatten(), case.facts["stats"][name]
    assert list(tensor.shape) == stats["shape"]
    assert_close(flat[:: case.facts["strides"][name]], case.golden[f"{name}.sub"], tolerance, name)
    assert abs(flat.norm() / stats["l2"] - 1) <= tolerance
    assert abs(flat.abs().max() / stats["absmax"] - 1) <= tolerance
    # Errors of either sign add up by the root of their number, those of one sign by the number.
    scatter = tolerance * stats["absmax"] * len(flat) ** (1 if together else 0.5)
    assert abs(flat.sum() - stats["sum"]) <= scatter


def inputs(case, tag):
    return case.golden[f"in.{tag}.image"], case.golden[f"in.{tag}.label"].float()


# ------------------------------------------------------------------ the published numbers


def test_configuration_follows_from_the_file(case):
    model, backbone = case.model, case.model.backbone
    assert type(model) is AfaNet and model.published and not model.training
    assert (model.num_classes, model.num_prefix_tokens, model.patch_stride) == (20, 0, 16)
    assert isinstance(model.decoder.norm, BATCH_NORM) and model.affinity.in_channels == 16
    assert [block.attn.num_heads for block in backbone.blocks][-2:] == [8, 8]
    assert len(backbone.blocks) == 8
    assert model.data_config == {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def test_every_tensor_is_in_its_place(case):
    theirs = {published_name(name, AFA_NAMES): tensor for name, tensor in case.model.state_dict().items()}
    assert theirs.keys() == case.facts["state_dict"].keys()
    assert case.model.unused_weights == ["decoder.linear_fuse.bn.num_batches_tracked"]
    assert case.model.missing_weights == []
    for name, shape in case.facts["state_dict"].items():
        assert torch.equal(theirs[name], naive.golden_weight(name, shape)), name


def test_heads_and_levels(case):
    for tag in case.tags:
        images, _ = inputs(case, tag)
        with torch.no_grad():
            out, heads = case.model.forward_segmentation(images), case.model.forward_heads(images)
            levels, logits = case.model.forward_levels(images), case.model(images)
            features, affinity, grid = case.model.forward_affinity(images)
        assert_recorded(case, f"out.{tag}.cls", out.logits, OUTPUTS)
        assert_recorded(case, f"out.{tag}.seg", out.segmentation, OUTPUTS)
        assert_recorded(case, f"out.{tag}.attn_pred", out.affinity, OUTPUTS)
        assert_recorded(case, f"out.{tag}.cam_only", heads.patch_logits, OUTPUTS)
        for number, level in enumerate(levels):
            assert_recorded(case, f"aux.{tag}.feat{number}", level, OUTPUTS)
        for same in (logits, heads.class_logits, heads.pooled):
            torch.testing.assert_close(same, out.logits)
        assert torch.equal(features, levels[-1]) and torch.equal(affinity, out.affinity)
        assert grid == tuple(levels[-1].shape[-2:])


def test_scores_of_every_block(case):
    """Averaged over the queries that share a window of keys: square at every stage."""
    backbone = case.model.backbone
    for tag in case.tags:
        with torch.no_grad(), AttentionTape() as tape:
            levels = case.model.forward_levels(inputs(case, tag)[0])
        stages = [stage for stage in range(4) for _ in getattr(backbone, f"block{stage + 1}")]
        for number, (block, stage) in enumerate(zip(tape.blocks, stages)):
            ratio = backbone.blocks[number].attn.sr_ratio
            queries, _ = pooled_queries(block.q, tuple(levels[stage].shape[-2:]), ratio)
            assert_recorded(case, f"out.{tag}.attn{number}", queries @ block.k.transpose(-2, -1), OUTPUTS)


def test_losses_and_gradients(case):
    """Class + .1 segmentation + .1 affinity (radius 2), as in training."""
    parameters = {published_name(name, AFA_NAMES): p for name, p in case.model.named_parameters()}
    for tag in case.tags:
        (images, labels), masks = inputs(case, tag), case.golden[f"in.{tag}.lab"]
        out = case.model.forward_segmentation(images)
        losses = [
            F.multilabel_soft_margin_loss(out.logits, labels),
            balanced_segmentation_loss(out.segmentation, masks, average=True),
            affinity_loss(out.affinity, affinity_labels(masks, radius=2, published=True)),
        ]
        losses.append(losses[0] + 0.1 * losses[1] + 0.1 * losses[2])
        assert_close(torch.stack(losses), case.golden[f"out.{tag}.losses_cls_seg_aff_total"], OUTPUTS)
        names = {key.removesuffix(".sub") for key in case.golden if key.startswith(f"grad.{tag}.")}
        wanted = [parameters[name.removeprefix(f"grad.{tag}.")] for name in sorted(names)]
        for name, gradient in zip(sorted(names), torch.autograd.grad(losses[-1], wanted) if wanted else ()):
            assert_recorded(case, name, gradient, GRADIENTS)
        assert len(names) == (0 if tag == "rect" else 11)


def test_maps_and_affinity_over_scales(case):
    for tag in case.tags:
        images, labels = inputs(case, tag)
        found = affinity_cam(case.model, images, labels, published=True)
        assert_recorded(case, f"out.{tag}.ms_cam", found.maps, OUTPUTS, together=True)
        mirrored = affinity_cam(case.model, images.flip(-1), labels, published=True).affinity
        expected = case.golden[f"out.{tag}.ms_aff_mat"]  # of the pictures, then of their mirror images
        assert_close(torch.cat([found.affinity, mirrored]), expected, SCALED_AFFINITY)
        assert found.grid == tuple(side * 3 // 2 // 16 for side in images.shape[-2:])
        assert found.on_grid().shape == (*labels.shape, *found.grid)


def test_groups_of_parameters_are_the_published_ones(tmp_path):
    file, facts = write("afa_small", tmp_path)
    model = load_official("afa", file)
    names = {parameter: published_name(name, AFA_NAMES) for name, parameter in model.named_parameters()}
    groups = model.parameter_groups(lr=6e-5, weight_decay=0.01)
    encoder, norms, classifier, decoder = facts["param_groups"]
    found = [{names[parameter] for parameter in group["params"]} for group in groups]
    assert found == [set(encoder), set(norms), {*classifier, *decoder}]
    assert [group["lr"] for group in groups] == pytest.approx([6e-5, 0, 6e-4])
    assert [group["weight_decay"] for group in groups] == [0.01, 0, 0.01]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"encoder.block4.1.attn.q.weight": None}, "encoder.block4.1.attn.q.weight: found no such tensor"),
        ({"encoder.block2": None}, "encoder.block2.0: found no such tensors, expected blocks"),
        ({"classifier.weight": torch.zeros(9, 32, 1, 1)}, r"classifier.weight: found shape \(9, 32, 1, 1\)"),
        ({"attn_proj.weight": torch.zeros(1, 8, 1, 1)}, r"attn_proj.weight: found shape \(1, 8, 1, 1\)"),
        ({"head.weight": torch.zeros(1)}, "head.weight: found a tensor of shape"),
        ({"classifier.weight": None}, "classifier.weight: found no such tensor, expected one of 4"),
    ],
)
def test_other_files_are_refused(change, message, tmp_path):
    file, _ = write("afa_small", tmp_path)
    tensors = load_file(file)
    for name, tensor in change.items():
        tensors = {key: value for key, value in tensors.items() if not key.startswith(name)}
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message):
        load_official("afa", file)


# ------------------------------------------------------------------ the network, on any backbone


# name: (class, pixels per token, heads of the last two blocks, channels of the levels)
BACKBONES = {
    "toymit": (AfaNet, {}, 8, 8, [64, 96, 128, 128]),
    "mit_b0": (AfaNet, {}, 16, 16, [32, 64, 160, 256]),
    "toyvit": (AfaViT, {}, 8, 8, [64, 128, 128, 128]),
    "deit_tiny_distilled_patch16_224": (AfaViT, {"depth": 4}, 16, 6, [192] * 4),
    "vit_small_patch14_reg4_dinov2": (AfaViT, {"depth": 2}, 14, 12, [384] * 4),
    "eva02_tiny_patch14_224": (AfaViT, {"depth": 3}, 14, 6, [192] * 4),
    "vit_tiny_patch16_224": (  # no class token, and the norm after pooling
        AfaViT, {"depth": 5, "class_token": False, "global_pool": "avg"}, 16, 6, [192] * 4),
}


def build(name="toymit", num_classes=3, **kw):
    torch.manual_seed(0)
    return create_model("afa", name, num_classes, pretrained=False, **BACKBONES[name][1], **kw).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 32, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([[1.0, 0, 1], [0, 1, 0]])


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones(name):
    kind, _, stride, heads, channels = BACKBONES[name]
    model = build(name)
    assert type(model) is kind and (model.num_classes, model.patch_stride) == (3, stride)
    assert model.num_prefix_tokens == model.backbone.num_prefix_tokens and not model.published
    assert not any(isinstance(m, BATCH_NORM) for m in model.modules())
    pictures = torch.randn(2, 3, 3 * stride, 5 * stride)
    out, heads_out, levels = (f(pictures) for f in (
        model.forward_segmentation, model.forward_heads, model.forward_levels))
    assert model.affinity.in_channels == heads and [level.shape[1] for level in levels] == channels
    assert out.logits.shape == (2, 3) and out.segmentation.shape == (2, 4, *levels[0].shape[2:])
    assert out.affinity.shape == (2, 15, 15) and heads_out.patch_logits.shape == (2, 3, 3, 5)
    assert torch.equal(out.affinity, out.affinity.transpose(1, 2)) and 0 < out.affinity.min()
    torch.testing.assert_close(model(pictures), out.logits)
    assert cam(model, pictures, LABELS).shape == (2, 3, 3, 5)
    (out.logits.sum() + out.segmentation.square().mean() + out.affinity.mean()).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert all(n.endswith(("norm.weight", "norm.bias")) or "token" in n for n in missing), missing


@pytest.mark.parametrize("name", ["toyvit", "vit_small_patch14_reg4_dinov2", "vit_tiny_patch16_224"])
def test_what_a_plain_vit_is_read_for(name):
    """Blocks a quarter, half and three quarters up, then the normed tokens; a stem is the first two."""
    model, seen = build(name).double(), []
    handles = [b.register_forward_hook(lambda _m, _i, out: seen.append(out)) for b in model.backbone.blocks]
    pictures = torch.randn(1, 3, 2 * model.patch_stride, 3 * model.patch_stride, dtype=torch.float64)
    levels = model.forward_levels(pictures)
    for handle in handles:
        handle.remove()
    depth, prefix = len(seen), model.num_prefix_tokens
    blocks = [depth // 4 - 1, depth // 2 - 1, depth * 3 // 4 - 1]
    if name == "toyvit":
        stem, blocks = model.backbone.patch_embed.backbone, [3]
        found = stem.block2(stem.down2(stem.down1(pictures)))
        torch.testing.assert_close(levels[0], found)
        torch.testing.assert_close(levels[1], stem.block3(stem.down3(found)))
    for level, block in zip(levels[-1 - len(blocks) : -1], blocks):
        expected = seen[max(block, 0)][:, prefix:].transpose(1, 2).unflatten(2, (2, 3))
        torch.testing.assert_close(level, expected, rtol=0, atol=0)
    tokens = model.backbone.fc_norm(model.backbone.norm(seen[-1]))
    torch.testing.assert_close(levels[-1].flatten(2).transpose(1, 2), tokens[:, prefix:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["toymit", "toyvit"])
def test_affinity_agrees_with_the_loop(name, images):
    model = build(name).double()
    nn.init.normal_(model.affinity.weight, std=0.1)
    nn.init.constant_(model.affinity.bias, 0.3)
    with AttentionTape() as tape:
        model(images)
    last, prefix = tape.blocks[-2:], model.num_prefix_tokens
    q, k = (torch.cat([getattr(block, x)[:, :, prefix:] for block in last], 1).detach().numpy() for x in "qk")
    expected = naive_affinity(q, k, model.affinity.weight.detach().flatten().numpy(), 0.3)
    found = model.forward_affinity(images)
    assert found.grid == (4, 6) == tuple(found.features.shape[2:])
    torch.testing.assert_close(found.affinity, torch.from_numpy(expected), rtol=0, atol=1e-12)


def test_affinity_of_pooled_keys():
    """A last stage with half as many keys to a side: the affinity lies on their grid."""
    backbone = MixTransformer((8, 16, 24, 32), (1, 1, 1, 2), (1, 2, 3, 4), sr_ratios=(8, 4, 2, 2))
    model = AfaNet(backbone, 3).double().eval()
    pictures = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with AttentionTape() as tape:
        model(pictures)
    q, k = (torch.cat([getattr(block, x) for block in tape.blocks[-2:]], 1)[0] for x in "qk")
    scores = sum(naive.pooled_scores(a, b, (4, 6), 2) for a, b in zip(q.tolist(), k.tolist()))
    expected = torch.sigmoid(torch.from_numpy(scores + scores.T) * model.affinity.weight.detach()[0, 0, 0, 0])
    found = model.forward_affinity(pictures)
    assert found.grid == (2, 3)
    torch.testing.assert_close(found.affinity[0], expected, rtol=0, atol=1e-12)
    small = model.forward_affinity(pictures[..., :16, :40])  # one row of three patches: less than a window
    assert small.grid == (1, 1) and small.affinity.shape == (1, 1, 1)


def test_affinity_starts_as_the_mean_of_scaled_scores(images):
    model = build().double()
    with AttentionTape() as tape:
        found = model.forward_affinity(images).affinity
    scores = [block.q @ block.k.transpose(-2, -1) * block.scale for block in tape.blocks[-2:]]
    mean = torch.cat(scores, dim=1).mean(1)
    torch.testing.assert_close(found, torch.sigmoid(mean + mean.transpose(1, 2)))
    published = build(published=True).affinity.weight
    assert 0.3 < published.std() < 0.9  # eight draws of deviation 0.58


def test_pooling(images):
    model = build().double()
    features = model.forward_levels(images)[-1]
    weight = model.classifier.weight[:, :, 0, 0]
    torch.testing.assert_close(model(images), features.flatten(2).max(-1).values @ weight.T)
    model.pool = "gap"
    torch.testing.assert_close(model(images), features.flatten(2).mean(-1) @ weight.T)
    torch.testing.assert_close(model(images), model.activation_maps(features).mean((2, 3)))


def test_segmentation_head_is_the_published_one():
    """Levels resized, concatenated coarsest first, fused: the order in which the files have them."""
    torch.manual_seed(0)
    head = SegFormerHead([4, 6, 8, 10], features=16, num_outputs=5).double().eval()
    levels = [torch.randn(2, c, *size, dtype=torch.float64)
              for c, size in zip((4, 6, 8, 10), ((9, 12), (5, 6), (3, 3), (3, 3)))]
    wide = [project(level.movedim(1, -1)).movedim(-1, 1) for level, project in zip(levels, head.project)]
    wide = [F.interpolate(x, (9, 12), mode="bilinear", align_corners=False) for x in wide]
    fused = F.relu(head.norm(head.fuse(torch.cat(wide[::-1], dim=1))))
    torch.testing.assert_close(head(levels), head.predict(fused), rtol=0, atol=1e-12)
    for wrong, message in (
        ({"channels": [4, 6, 8]}, "channels: found 3"),
        ({"features": 0}, "features: found 0"),
        ({"norm": "layer"}, "norm: found 'layer'"),
    ):
        with pytest.raises(ValueError, match=message):
            SegFormerHead(**{"channels": [4, 6, 8, 10], "features": 16, **wrong})


def test_works_with_plain_attention_and_frozen_weights(images):
    """The engine's plain attention stays plain below the last two blocks; a frozen encoder has no graph."""
    for name in ("toymit", "toyvit"):
        model = build(name).double()
        expected = model.forward_affinity(images).affinity
        with plain_attention(model):
            with AttentionTape() as tape:
                found = model.forward_affinity(images).affinity
            assert len(tape.blocks) == 2 and not model.backbone.blocks[-1].attn.fused_attn
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert model.backbone.blocks[-1].attn.fused_attn
        for parameter in model.backbone.parameters():
            parameter.requires_grad_(False)
        loss = model.forward_affinity(images).affinity.mean()
        assert torch.autograd.grad(loss, model.affinity.bias)[0].isfinite().all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_keep_the_affinity_differentiable(reentrant, images):
    """In the reentrant form blocks run without a graph at first, and queries and keys with them."""
    model, default = build("toyvit").double(), timm.layers.use_reentrant_ckpt()
    weight = model.backbone.blocks[-1].attn.qkv.weight
    model.forward_affinity(images).affinity.mean().backward()
    expected, weight.grad = weight.grad, None
    model.backbone.set_grad_checkpointing()
    timm.layers.set_reentrant_ckpt(reentrant)
    try:
        model.forward_affinity(images).affinity.mean().backward()
    finally:
        timm.layers.set_reentrant_ckpt(default)
    torch.testing.assert_close(weight.grad, expected)
    assert model.backbone.grad_checkpointing and expected.any()


def test_precisions(images):
    model = build()
    expected = build().double().forward_segmentation(images)
    found = model.forward_segmentation(images.float())
    for one, other in zip(found, expected):
        assert one.dtype == torch.float32 and other.dtype == torch.float64
        torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-4 * other.abs().max().item())
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.forward_segmentation(images.float())
    assert rough.affinity.dtype == torch.float32
    torch.testing.assert_close(rough.affinity.double(), expected.affinity, rtol=0, atol=0.02)


def test_pictures_of_any_size_and_their_gradients(images):
    model = build().double()
    out = model.forward_segmentation(torch.randn(1, 3, 37, 51, dtype=torch.float64))
    assert out.affinity.shape == (1, 35, 35) and out.segmentation.shape == (1, 4, 10, 13)
    with pytest.raises(ValueError, match="found 37x51 pixels, expected multiples of 8"):
        build("toyvit")(torch.randn(1, 3, 37, 51))
    with pytest.raises(ValueError, match="images: found shape"):
        model(torch.zeros(3, 32, 32, dtype=torch.float64))


def test_weights_come_back(tmp_path, images):
    for name in ("toymit", "toyvit"):
        model = build(name).double()
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
        again = create_model("afa", name, 3, pretrained=tmp_path / f"{name}.safetensors").double().eval()
        # it was in float32 for a moment
        torch.testing.assert_close(again(images), model(images), rtol=0, atol=1e-4)
        assert again.missing_weights == again.unused_weights == []


def test_wrong_arguments():
    for change, message in (
        ({"num_classes": 0}, "num_classes: found 0"),
        ({"pool": "max"}, "pool: found 'max', expected one of gmp, gap"),
        ({"features": 0}, "features: found 0"),
    ):
        with pytest.raises(ValueError, match=message):
            afa_network(**{"backbone": "toymit", **change})
    one_block = create_backbone("toymit", depths=(1, 1, 1, 1))
    for network, backbone, message in (
        (AfaNet, "toyvit", "backbone: found VisionTransformer, expected a MixTransformer"),
        (AfaNet, one_block, "backbone: found 1 block in the last stage"),
        (AfaViT, "toymit", "backbone: found MixTransformer, expected a plain ViT"),
        (AfaViT, "toycnn", "backbone: found ToyCNN, expected a plain ViT"),
        (AfaViT, create_backbone("toyvit", depth=1), "backbone: found 1 blocks of Block, expected two"),
        (AfaViT, "vit_pwee_patch16_reg1_gap_256", "with one attention each"),  # its blocks have several
    ):
        with pytest.raises(ValueError, match=message):
            network(backbone)


# ------------------------------------------------------------------ maps over scales


def test_one_scale_is_the_activation_map(images):
    """Against the formula written out, mirrored and not; scores of absent classes are 0."""
    model = build().double()
    for flip in (False, True):
        found = affinity_cam(model, images, LABELS, scales=(1.0,), flip=flip)
        views = [images, images.flip(-1)] if flip else [images]
        evidence = [model.forward_heads(view).patch_logits for view in views]
        evidence = [F.interpolate(e, (32, 48), mode="bilinear", align_corners=False) for e in evidence]
        maps = torch.maximum(evidence[0], evidence[1].flip(-1)) if flip else evidence[0]
        maps = maps.relu() * LABELS[:, :, None, None]
        low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
        assert ((high > 0)[..., 0, 0] == (LABELS > 0)).all()
        torch.testing.assert_close(found.maps, (maps - low) / (high - low).clamp(min=1e-300))
        assert torch.equal(found.affinity, model.forward_affinity(images).affinity) and found.grid == (4, 6)
        assert found.maps.amax((2, 3))[LABELS > 0].eq(1).all()


def test_published_form_differs_by_what_is_said(images):
    """Where nothing shrinks and sizes fit the stride: by 1e-5 beside the maximum, and the absent classes."""
    model = build().double()
    corrected = affinity_cam(model, images, LABELS, scales=(1.0, 1.5))
    published = affinity_cam(model, images, LABELS, scales=(1.0, 1.5), published=True)
    assert torch.equal(corrected.affinity, published.affinity) and corrected.grid == published.grid == (6, 9)
    present = LABELS[:, :, None, None]
    assert (published.maps * (1 - present)).any() and not (corrected.maps * (1 - present)).any()
    maps = published.maps * present
    highest = maps.amax((2, 3), keepdim=True)
    assert (highest[LABELS > 0] < 1).all()
    torch.testing.assert_close(maps / highest.clamp(min=1e-300), corrected.maps)


def test_the_named_scale_has_the_affinity(images):
    model = build().double()
    sizes = {0.5: (2, 3), 1.0: (4, 6), 1.5: (6, 9)}
    for scales in ((1.0, 0.5, 1.5), (1.5, 0.5, 1.0), (0.5, 1.5)):
        assert affinity_cam(model, images, LABELS, scales).grid == (6, 9)  # the largest
        for scale in scales:
            found = affinity_cam(model, images, LABELS, scales, affinity_scale=scale)
            assert found.grid == sizes[scale] and found.affinity.shape[1] == sizes[scale][0] * sizes[scale][1]
    # the published place in another list: [1, the others]
    for scales, grid in (((1.0, 0.5, 1.5), (6, 9)), ((1.5, 0.5, 1.0), (4, 6)), ((0.5, 1.5), (2, 3))):
        assert affinity_cam(model, images, LABELS, scales, published=True).grid == grid


def test_maps_leave_the_model_alone(images):
    model = build().double().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = affinity_cam(model, images, LABELS)
    assert model.training and not found.maps.requires_grad and not found.affinity.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(found.maps, affinity_cam(model.eval(), images, LABELS).maps)


def test_sizes_that_do_not_fit():
    """Resized to the nearest multiple; published, as they are, rounded down."""
    model, pictures = build(), torch.randn(1, 3, 37, 51)
    assert affinity_cam(model, pictures, LABELS[:1]).grid == (7, 10)  # 55.5 and 76.5 pixels: 56 and 80
    sizes = {"scales": (1.0, 1.75), "published": True}  # 64.75 and 89.25: 64 and 89, patches rounded up
    assert affinity_cam(model, pictures, LABELS[:1], **sizes).grid == (8, 12)
    assert affinity_cam(model, pictures, LABELS[:1], scales=(1.0,)).maps.shape == (1, 3, 37, 51)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": LABELS[:1]}, "labels: found shape"),
        ({"scales": ()}, "scales: found"),
        ({"scales": (1.0, 0.0)}, "scales: found"),
        ({"affinity_scale": 2.0}, "affinity_scale: found 2.0, expected one of"),
    ],
)
def test_wrong_inputs_of_the_maps(change, message, images):
    with pytest.raises(ValueError, match=message):
        affinity_cam(**{"model": build().double(), "images": images, "labels": LABELS, **change})
