"""WeakTr's network: the published numbers, maps written out, backbones, what learns from what, memory."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from allocations import count_allocations
from reference import naive_weaktr as naive
from reference.naive_attention import formula_weight
from safetensors.torch import load_file, save_file
from torch import nn

from wsss_lib import create_model, load_official, paths
from wsss_lib.models import WeakTr, WeakTrOutput, create_backbone
from wsss_lib.models.official import WEAKTR_NAMES
from wsss_lib.models.published import published_name
from wsss_lib.training.losses import weaktr_loss

GOLDEN = Path(__file__).parent / "golden"
CASES = {
    "weaktr_small_max_r8_f8": ("sq", "rect", "sq_up"),
    "weaktr_small_avg_r4_f8": ("rect",),
    "weaktr_deit_small": ("sq",),
}
# the networks saw the same pictures; the square ones are stored with the attention maps
INPUTS = load_file(GOLDEN / "weaktr_small_max_r8_f8.safetensors")
INPUTS["in.sq.image"] = load_file(GOLDEN / "weaktr_fusion.safetensors")["image"]
# Of a tensor's largest value: re-running the published code with other thread counts moves outputs by 2e-5,
# gradients by 1.1e-5.
OUTPUTS, GRADIENTS = 2e-5, 1.1e-5


def golden(name):
    return load_file(GOLDEN / f"{name}.safetensors"), json.loads((GOLDEN / f"{name}.json").read_text())


def checkpoint(name):
    """The tensors of a published network, by their published names."""
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    return {key: torch.from_numpy(formula_weight(key, tuple(shape), facts["salt"])).float()
            for key, shape in facts["state_dict"].items()}


def assert_close(found, expected, tolerance, name=""):
    assert found.shape == expected.shape, name
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"{name}: off by {error:.1e} of the largest"


# ------------------------------------------------------------------ the published network


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    file = tmp_path_factory.mktemp("weaktr") / "checkpoint.safetensors"
    save_file(checkpoint(request.param), file)
    return request.param, load_official("weaktr", file), *golden(request.param)


def test_official_outputs_maps_and_weights(case):
    name, model, tensors, facts = case
    config = facts["config"]
    assert isinstance(model, WeakTr) and model.published and not model.training
    assert model.fusion.pool == config["pool"]
    assert model.data_config["mean"] == timm.data.IMAGENET_DEFAULT_MEAN
    assert model.unused_weights == ["norm.bias", "norm.weight"] and model.missing_weights == []
    for tag in CASES[name]:
        images = INPUTS[f"in.{tag}.image"]
        with torch.no_grad():
            out, logits = model.forward_predictions(images), model(images)
            fused_map = model.attention_map(images)
            torch.testing.assert_close(model.coarse_cam(images), out.coarse_cam, rtol=0, atol=0)
        assert torch.equal(logits, out.class_logits)
        found = {
            "cls_token_pred": out.class_logits, "coarse_cam_pred": out.coarse_logits,
            "fine_cam_pred": out.fine_logits, "cams.fused": out.fused_cam,
            "cams.patchcam": out.coarse_cam.relu(), "patch_attn": fused_map[None, :, 20:, 20:]}
        for key, tensor in found.items():
            assert_close(tensor, tensors[f"out.{tag}.{key}"], OUTPUTS, f"{tag} {key}")
        # published: the blocks of one head side by side
        assert_close(out.head_weights.transpose(1, 2).flatten(1), tensors[f"aux.{tag}.aaf_weight"], OUTPUTS)


def test_official_losses_and_gradients(case):
    name, model, tensors, facts = case
    for tag in CASES[name]:
        model.zero_grad()
        batch = {"image": INPUTS[f"in.{tag}.image"], "labels": INPUTS[f"in.{tag}.label"].float()}
        found = weaktr_loss(model, batch, step=0)
        assert list(found) == ["class", "coarse", "fine"]
        losses = torch.stack(list(found.values()))
        assert_close(losses, tensors[f"out.{tag}.losses"], OUTPUTS)
        losses.sum().backward()
        parameters = {published_name(key, WEAKTR_NAMES): p for key, p in model.named_parameters()}
        recorded = [key for key in tensors if key.startswith(f"grad.{tag}.")]
        assert len(recorded) == 12
        for key in recorded:
            own = key.removeprefix(f"grad.{tag}.")
            found, stride = parameters[own.removesuffix(".sub")].grad, 1
            if own.endswith(".sub"):
                stride, found = facts["strides"][key.removesuffix(".sub")], found.flatten()
            assert_close(found[::stride], tensors[key], GRADIENTS, key)
        for key in facts["never_trained"]:
            assert parameters[key.split(".", 2)[2]].grad is None


@pytest.mark.parametrize("tag", ["sq", "rect"])
def test_the_plain_reference_is_the_published_network(tag, tmp_path):
    save_file(checkpoint("weaktr_small_max_r8_f8"), tmp_path / "x.safetensors")
    model = load_official("weaktr", tmp_path / "x.safetensors").double()
    found = naive.predictions(model, INPUTS[f"in.{tag}.image"].double())
    assert_close(found["fine_logits"], INPUTS[f"out.{tag}.fine_cam_pred"].double(), OUTPUTS)
    assert_close(found["fused_cam"], INPUTS[f"out.{tag}.cams.fused"].double(), OUTPUTS)
    assert_close(found["attention_map"][:, 20:, 20:], INPUTS[f"out.{tag}.patch_attn"][0].double(), OUTPUTS)


def test_official_from_torch_save(tmp_path):
    """As the published training saves: under "model", beside an epoch."""
    tensors = checkpoint("weaktr_small_avg_r4_f8")
    torch.save({"model": tensors, "epoch": 3}, tmp_path / "best.pth")
    model = load_official("weaktr", tmp_path / "best.pth")
    assert torch.equal(model.backbone.cls_token, tensors["cls_token"])
    assert (model.fusion.depth, model.fusion.num_heads, model.num_prefix_tokens) == (4, 6, 20)


@pytest.mark.parametrize("reductions", [(2, 4), (3, 1), (8, 8)])
def test_official_of_other_sizes(reductions, tmp_path):
    """Classes, depth, heads and both reductions follow from the tensors."""
    torch.manual_seed(0)
    backbone = create_backbone("vit_base_patch16_384", img_size=48, embed_dim=32, depth=3, num_heads=4)
    model = WeakTr(backbone, 3, "max", *reductions, published=True).eval()
    tensors = {f"module.{published_name(key, WEAKTR_NAMES)}": v for key, v in model.state_dict().items()}
    save_file(tensors, tmp_path / "x.safetensors")  # as from DataParallel
    again, images = load_official("weaktr", tmp_path / "x.safetensors"), torch.randn(1, 3, 32, 64)
    for found, expected in zip(again.forward_predictions(images), model.forward_predictions(images)):
        assert torch.equal(found, expected)


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, *shape):
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


AAF = "adaptive_attention_fusion"


@pytest.mark.parametrize("change, message", [
    (drop("cls_token"), "cls_token: found no such tensor, expected one of 3 dimensions"),
    (drop("head.weight"), r"head.weight: found no such tensor, expected shape \(20, 96, 3, 3\)"),
    (drop(f"{AAF}.attn_head_ffn.0.weight"), "attn_head_ffn.0.weight: found no such tensor"),
    (put("head.weight", 20, 96), r"head.weight: found shape \(20, 96\), expected \(20, 96, 3, 3\)"),
    (put("cls_token", 1, 19, 96), r"pos_embed: found 36 tokens, expected 19 and a square of patches"),
    (put("cls_token", 1, 40, 96), r"pos_embed: found 36 tokens, expected 40 and a square of patches"),
    (put("blocks.0.ls1.gamma", 96), r"blocks.0.ls1.gamma: found a tensor of shape \(96,\), expected none"),
    (put(f"{AAF}.attn_head_ffn.2.weight", 25, 6), r"found shape \(25, 6\), expected \(24, 6\)"),
])  # fmt: skip
def test_official_refuses(change, message, tmp_path):
    tensors = checkpoint("weaktr_small_avg_r4_f8")
    change(tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        load_official("weaktr", tmp_path / "x.safetensors")


# ------------------------------------------------------------------ maps written out

SMALL = {"embed_dim": 48, "num_heads": 3, "depth": 3}
# name: (arguments for timm, pixels per token, prefix tokens for 4 classes)
BACKBONES = {
    "toyvit": ({"depth": 2}, 8, 4),
    "deit_small_patch16_224": ({"depth": 2}, 16, 4),
    "vit_small_patch16_224.augreg_in21k": ({"depth": 2}, 16, 4),
    "vit_small_patch14_dinov2": ({"depth": 2}, 14, 4),
    "vit_small_patch16_dinov3": ({"depth": 2}, 16, 8),  # rotary positions, four registers
    "eva02_small_patch14_224": ({"depth": 2}, 14, 4),  # rotary positions beside learned ones
    "deit_tiny_distilled_patch16_224": ({"depth": 2}, 16, 5),
    "vit_small_patch14_reg4_dinov2": ({"depth": 2}, 14, 8),
}


def build(name="vit_tiny_patch16_224", double=True, arguments=SMALL, **kw):
    """Random weights, attention far from uniform, class tokens that differ, ReLUs enough that some are on."""
    torch.manual_seed(0)
    model = create_model("weaktr", name, 4, pretrained=False, reduction=1, **kw, **arguments).eval()
    nn.init.normal_(model.backbone.cls_token)
    for block in model.backbone.blocks:
        for key in ("qkv", "q_proj", "k_proj"):  # EVA-02 has them apart
            layer = getattr(block.attn, key, None)
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=2 * layer.in_features**-0.5)
    for layer in model.fusion.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=3 * layer.in_features**-0.5)
    return model.double() if double else model


def pictures(model, height=2, width=3, batch=2, dtype=torch.float64):
    stride, generator = model.patch_stride, torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, height * stride, width * stride, dtype=dtype, generator=generator)


LABELS = torch.tensor([[1.0, 0, 1, 1], [0, 1, 0, 0]], dtype=torch.float64)


def loss(out):
    return sum(F.multilabel_soft_margin_loss(logits.double(), LABELS) for logits in out[:3])


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_agrees_with_maps_written_out(published, pool):
    """float64: only the order of additions differs."""
    model = build(published=published, pool=pool)
    images = pictures(model)
    expected, out = naive.predictions(model, images), model.forward_predictions(images)
    for key, tensor in out._asdict().items():
        assert tensor.dtype == torch.float64
        assert_close(tensor, expected[key], 1e-12, key)
    assert_close(model.attention_map(images), expected["attention_map"], 1e-12)
    assert out.head_weights.std(dim=(1, 2)).min() > 0.02  # heads are told apart
    assert (out.fine_cam >= 0).all() and (out.fused_cam >= 0).all() and out.coarse_cam.min() < 0


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_of_timm(name):
    arguments, stride, prefix = BACKBONES[name]
    model = build(name, arguments=arguments)
    assert (model.patch_stride, model.num_prefix_tokens, model.num_classes) == (stride, prefix, 4)
    assert model.backbone.cls_token.shape[1] == 4
    images = pictures(model)
    out, expected = model.forward_predictions(images), naive.predictions(model, images)
    assert isinstance(out, WeakTrOutput) and out.fine_cam.shape == (2, 4, 2, 3)
    for key in ("class_logits", "coarse_cam", "fused_cam", "fine_cam", "head_weights"):
        assert_close(getattr(out, key), expected[key], 1e-11, key)
    assert torch.equal(model(images), out.class_logits)
    loss(out).backward()
    untrained = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(key.startswith(("backbone.norm.", "backbone.fc_norm.")) for key in untrained)
    # DDP would wait for the gradient of a parameter that asks for one
    assert not any(p.requires_grad for key, p in model.named_parameters() if key in untrained)


def test_weights_that_are_given():
    """One head alone: the map is that head's; all alike: the mean. In the order (block, head)."""
    model = build()
    images = pictures(model)
    maps, *_ = naive.record(model, images)
    for l, h in ((0, 0), (2, 1), (1, 2)):
        alone = torch.zeros(3, 3, dtype=torch.float64)
        alone[l, h] = 9
        assert_close(model.attention_map(images, alone), torch.from_numpy(maps[l][:, h]), 1e-12)
    mean = sum(m.mean(1) for m in maps) / 3
    out = model.forward_predictions(images, torch.ones(3, 3, dtype=torch.float64))
    assert out.head_weights.shape == (2, 3, 3) and (out.head_weights == 1).all()
    fused = torch.from_numpy(mean[:, :4, 4:]).unflatten(2, (2, 3)) * out.coarse_cam.relu()
    assert_close(out.fused_cam, fused, 1e-12)
    # (B, h*w, h*w) @ (B, h*w, C)
    fine = torch.from_numpy(mean[:, 4:, 4:]) @ fused.flatten(2).transpose(1, 2)
    assert_close(out.fine_cam.flatten(2), fine.transpose(1, 2), 1e-12)


def test_the_scale_is_that_of_the_blocks():
    """timm's networks all scale by d^-0.5, another one may not."""
    model = build()
    *_, blocks, weights = model._record(pictures(model), None)
    blocks = [replace(block, scale=0.9) for block in blocks]
    coarse = torch.rand(2, 4, 2, 3, dtype=torch.float64)
    maps = torch.stack([block.map() for block in blocks], dim=1)  # (B, L, H, N, N)
    total = torch.einsum("blh,blhij->bij", weights, maps) / 9
    fused = total[:, :4, 4:].unflatten(2, (2, 3)) * coarse
    fine = torch.einsum("bij,bcj->bci", total[:, 4:, 4:], fused.flatten(2)).unflatten(2, (2, 3))
    for found, expected in zip(model._fuse(blocks, weights, coarse), (fused, fine)):
        assert_close(found, expected, 1e-12)


def test_who_learns_from_what():
    model = build()
    fusion = {f"fusion.{key}" for key, _ in model.fusion.named_parameters()}
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    for logits, expected in (
        ("fine_logits", fusion),
        ("coarse_logits", trained - fusion),
        ("class_logits", {key for key in trained - fusion if not key.startswith("coarse_head")}),
    ):
        model.zero_grad()
        # a weighted sum: the class logits' own sum may be blind to something
        (getattr(model.forward_predictions(pictures(model)), logits) * LABELS).sum().backward()
        assert {key for key, p in model.named_parameters() if p.grad is not None} == expected, logits


def test_gradient_of_the_head_weights():
    """Of the fine logits, by finite differences, through both the class rows and the patch rows."""
    model = build()
    weights = torch.rand(2, 3, 3, dtype=torch.float64, requires_grad=True)
    images = pictures(model)
    assert torch.autograd.gradcheck(lambda w: model.forward_predictions(images, w).fine_logits, weights)


def test_precisions():
    """float32 within 1e-4 of float64 (attention far from uniform magnifies rounding); bfloat16 within 5%, and
    what is fused is float32 all the same; with the maps written out by timm nothing changes."""
    model = build()
    images = pictures(model)
    expected = model.forward_predictions(images)
    single = model.float().forward_predictions(images.float())
    for key, tensor in single._asdict().items():
        assert tensor.dtype == torch.float32
        assert_close(tensor, getattr(expected, key), 1e-4, key)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model.forward_predictions(images.float())
    assert half.fine_cam.dtype == half.fused_cam.dtype == half.head_weights.dtype == torch.float32
    assert_close(half.fine_logits, expected.fine_logits, 0.05)
    for block in model.backbone.blocks:
        block.attn.fused_attn = False
    assert_close(model.forward_predictions(images.float()).fine_cam, expected.fine_cam, 1e-4)
    model.bfloat16().forward_predictions(images.bfloat16()).fine_logits.sum().backward()
    assert model.fusion.weigh[2].weight.grad.isfinite().all()


def test_autocast_leaves_the_fusion_alone():
    model = build(double=False)
    *_, blocks, weights = model._record(pictures(model, dtype=torch.float32), None)
    coarse = torch.rand(2, 4, 2, 3)
    expected = model._fuse(blocks, weights, coarse)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model._fuse(blocks, weights, coarse)
    assert all(torch.equal(x, y) for x, y in zip(found, expected))


def test_gradient_checkpointing_and_training_mode():
    model = build(double=False)
    images = pictures(model, dtype=torch.float32)
    loss(model.forward_predictions(images)).backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.backbone.set_grad_checkpointing()
    model.train()
    loss(model.forward_predictions(images)).backward()
    for p, expected in zip([p for p in model.parameters() if p.grad is not None], plain):
        torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-7)  # the same computation twice


# ------------------------------------------------------------------ positions, class tokens, weights


def test_class_tokens_begin_as_copies():
    torch.manual_seed(0)
    plain = create_backbone("deit_tiny_distilled_patch16_224", **SMALL)
    before = {key: p.detach().clone() for key, p in plain.named_parameters()}
    model = WeakTr(plain, 4)
    assert torch.equal(plain.cls_token, before["cls_token"].expand(1, 4, 48))
    assert torch.equal(plain.pos_embed[:, :4], before["pos_embed"][:, :1].expand(1, 4, 48))
    assert torch.equal(plain.pos_embed[:, 4:], before["pos_embed"][:, 1:])  # distillation token, patches
    assert torch.equal(plain.dist_token, before["dist_token"])
    logits = model(pictures(model, dtype=torch.float32))
    torch.testing.assert_close(logits, logits[:, :1].expand(2, 4))
    with pytest.raises(ValueError, match="backbone: found 4 class tokens, expected one"):
        WeakTr(plain, 4)


def test_positions_are_resized_as_timm_does():
    """The patches' positions on another grid are those of timm's network with one class token."""
    plain = create_backbone("vit_tiny_patch16_224", **SMALL)
    nn.init.normal_(plain.pos_embed)
    with torch.no_grad():
        wanted = plain._pos_embed(torch.zeros(1, 5, 3, 48))[:, 1:]
        model = WeakTr(plain, 4)
        found = model.backbone._pos_embed(torch.zeros(1, 5, 3, 48))
        assert torch.equal(found[:, 4:], wanted)
        published = WeakTr(create_backbone("vit_tiny_patch16_224", **SMALL), 4, published=True).backbone
        published.pos_embed.copy_(model.backbone.pos_embed)
        published.cls_token.copy_(model.backbone.cls_token)
        other = published._pos_embed(torch.zeros(1, 5, 3, 48))
        assert torch.equal(other[:, :4], found[:, :4]) and (other[:, 4:] - wanted).abs().max() > 0.1
        native = published._pos_embed(torch.zeros(1, 14, 14, 48))
        assert torch.equal(native, model.backbone._pos_embed(torch.zeros(1, 14, 14, 48)))


def test_the_shipped_weights_serve_as_they_are():
    model = create_model("weaktr")
    stored = load_file(paths.shipped("checkpoints/toyvit.safetensors"))
    token, positions = (stored[f"backbone.{key}"].float() for key in ("cls_token", "pos_embed"))
    assert torch.equal(model.backbone.cls_token, token.expand(1, 20, 128))
    assert torch.equal(model.backbone.pos_embed[:, 20:], positions[:, 1:])
    assert torch.equal(model.backbone.pos_embed[:, :20], positions[:, :1].expand(1, 20, 128))
    assert all(name.startswith(("coarse_head", "fusion")) for name in model.missing_weights)
    assert all(name.startswith(("class_head", "patch_head")) for name in model.unused_weights)


@pytest.mark.parametrize("name", ["toyvit", "vit_small_patch16_dinov3"])
def test_its_own_weights_come_back(name, tmp_path):
    model = build(name, arguments={"depth": 2}, double=False)
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    again = create_model("weaktr", name, 4, tmp_path / "x.safetensors", depth=2, reduction=1).eval()
    images = pictures(model, dtype=torch.float32)
    assert torch.equal(again(images), model(images)) and again.missing_weights == again.unused_weights == []
    with pytest.raises(ValueError, match=r"(cls_token|pos_embed): found shape"):
        create_model("weaktr", name, 5, tmp_path / "x.safetensors", depth=2, reduction=1)


# ------------------------------------------------------------------ memory

DEPTH, HEADS = 6, 6


@pytest.fixture(scope="module")
def long():
    """Many tokens, few channels: 30 x 30 patches, so that the maps would be most of the memory."""
    torch.manual_seed(0)
    kw = {"embed_dim": 48, "num_heads": HEADS, "depth": DEPTH, "img_size": 480}
    return create_model("weaktr", "vit_tiny_patch16_224", 20, pretrained=False, **kw)


def numbers_at_the_peak(model, images, training):
    with count_allocations() as memory, torch.set_grad_enabled(training):
        out = model.forward_predictions(images)
        if training:
            (out.class_logits.mean() + out.coarse_logits.mean() + out.fine_logits.mean()).backward()
    return memory.peak / 4


@pytest.mark.parametrize("training", [False, True])
def test_no_stack_of_attention_maps_exists(long, training):
    """20 classes at 480 x 480: N = 920. All maps together are L H N^2 numbers; what is held at any time,
    network included, is a third of that in training, so no such tensor can be among it."""
    images, tokens = torch.randn(1, 3, 480, 480), 20 + 30 * 30
    maps = DEPTH * HEADS * tokens**2
    held = numbers_at_the_peak(long, images, training)
    assert held < maps * (0.33 if training else 0.12)
    if training:  # the network alone, and then what fusion adds: q and k, class rows, two tiles of 2^18
        with count_allocations() as memory:
            (long(images).mean() + long.coarse_cam(images[:, :, :16, :16]).mean()).backward()
        added = 2 * DEPTH * tokens * 48 + DEPTH * HEADS * 20 * tokens * 2 + 3 * 2**18
        assert held < memory.peak / 4 + 1.1 * added


def test_what_is_said_of_deit_small_at_480():
    tokens, width, maps, classes = 20 + (480 // 16) ** 2, 384, 72, 20
    assert tokens == 920
    assert round(2 * 12 * tokens * width / 1e6, 1) == 8.5
    assert round(maps * classes * tokens / 1e6, 1) == 1.3
    assert round(maps * tokens**2 / 1e6) == 61
    assert 2 * 2**18 / 1e6 < 0.53


# ------------------------------------------------------------------ what must be refused


@pytest.mark.parametrize("arguments, message", [
    ({"num_classes": 0}, "num_classes: found 0, expected at least 1"),
    ({"pool": "mean"}, "pool: found 'mean', expected one of max, avg"),
    ({"reduction": 0}, "found 0, 8, expected at least 1"),
    ({"backbone": "vit_pwee_patch16_reg1_gap_256"}, "backbone: found 0 class tokens, expected one"),
    ({"backbone": "eva02_tiny_patch14_224", "published": True}, "backbone: found Eva, expected, as"),
    ({"backbone": "vit_small_patch14_reg4_dinov2", "published": True}, "a learned position for each"),
])  # fmt: skip
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeakTr(**arguments)


def test_wrong_images():
    model = build(double=False)
    with pytest.raises(ValueError, match="images: found 20x32 pixels, expected multiples of 16"):
        model.forward_predictions(torch.zeros(1, 3, 20, 32))
    with pytest.raises(RuntimeError):
        model.forward_predictions(torch.zeros(1, 3, 32, 32), torch.zeros(2, 2))


def test_attention_that_is_not_of_one_kind():
    model = build(double=False)
    block = model.backbone.blocks[1]
    forward, block.forward = block.forward, lambda x: forward(forward(x))
    with pytest.raises(ValueError, match="backbone: found 4 calls of attention .* expected 3 alike"):
        model.forward_predictions(pictures(model, dtype=torch.float32))


