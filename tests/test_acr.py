"""ACR's network on the ViTs of timm, and its loss against attention written out; what both must refuse."""

import pytest
import timm
import torch
import torch.nn.functional as F
from reference import naive_acr as naive
from test_attention_tape import VITS
from torch import nn

from wsss_lib import create_model
from wsss_lib.data.views import VIEWS, transform
from wsss_lib.localization import cam, getam, grad_cam
from wsss_lib.models import create_backbone
from wsss_lib.models.acr import AcrViT
from wsss_lib.models.attention import AttentionTape
from wsss_lib.training.consistency import consistency_loss
from wsss_lib.training.engine import TrainConfig, train

LABELS = torch.tensor([[1.0, 0, 1, 1], [0, 1, 0, 0]])


def build(name="toyvit", seed=0, **kw):
    """In float64, with attention far from uniform, so that two views differ by more than rounding."""
    torch.manual_seed(seed)
    model = AcrViT(create_backbone(name, **kw), num_classes=4).double().eval()
    for block in model.backbone.blocks:
        for parameter in block.attn.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.15)
    return model


@pytest.fixture(scope="module")
def model():
    return build(depth=3)


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 24, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------ the network


@pytest.mark.parametrize("name", ["toyvit", *VITS])
def test_both_heads_read_the_last_block_before_its_norm(name):
    model = create_model("acr", name, num_classes=4, pretrained=False, depth=2).eval()
    backbone, stride = model.backbone, model.patch_stride
    prefix = VITS.get(name, 1)
    assert isinstance(model, AcrViT) and model.num_prefix_tokens == prefix
    config = timm.data.resolve_model_data_config(backbone)
    assert model.data_config == {"mean": config["mean"], "std": config["std"]}
    images, seen = torch.randn(2, 3, 2 * stride, 3 * stride), []
    handle = backbone.blocks[-1].register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.no_grad():
        heads, logits = model.forward_heads(images), model(images)
    handle.remove()
    tokens = seen[0]
    assert tokens.shape == (2, prefix + 6, backbone.embed_dim)
    torch.testing.assert_close(logits, model.classifier(tokens[:, 0]))
    assert torch.equal(heads.class_logits, logits)
    assert heads.features.shape == (2, backbone.embed_dim, 2, 3) and heads.patch_logits.shape == (2, 4, 2, 3)
    torch.testing.assert_close(heads.features[:, :, 1, 0], tokens[:, prefix + 3])
    patches = model.classifier(tokens[:, prefix:])
    torch.testing.assert_close(heads.patch_logits[:, :, 1, 0], patches[:, 3])
    torch.testing.assert_close(heads.pooled, patches.mean(1))
    bias = model.classifier.bias[:, None, None]
    torch.testing.assert_close(model.activation_maps(heads.features) + bias, heads.patch_logits)


def test_the_maps_of_other_networks_work(model, images):
    maps = cam(model, images, LABELS)
    with torch.no_grad():
        features = model.forward_heads(images).features
    evidence = torch.einsum("cd,bdhw->bchw", model.classifier.weight.detach(), features)
    torch.testing.assert_close(maps, evidence.relu() * LABELS[:, :, None, None])
    # Grad-CAM of the mean of the patch logits is CAM / (h*w)
    torch.testing.assert_close(grad_cam(model, images, LABELS), maps / 15)
    torch.testing.assert_close(
        getam(model, images, LABELS), getam(model, images, LABELS, head="class"), rtol=1e-12, atol=0)
    assert getam(model, images, LABELS, head="patch").shape == (2, 4, 3, 5)


def test_published_form(images):
    """The distillation token is averaged with the patches, and CAM has the bias; the class logits stay."""
    name = "deit_tiny_distilled_patch16_224"
    model = build(name, depth=2)
    published = AcrViT(create_backbone(name, depth=2), num_classes=4, published=True).double().eval()
    published.load_state_dict(model.state_dict())
    assert type(published.backbone) is not type(model.backbone)
    pictures = torch.randn(2, 3, 224, 224, dtype=torch.float64)  # no positions to be resized, either way
    with torch.no_grad():
        ours, theirs = model.forward_heads(pictures), published.forward_heads(pictures)
        _, prefix = model._tokens(pictures)
    torch.testing.assert_close(theirs.class_logits, ours.class_logits)
    torch.testing.assert_close(theirs.patch_logits, ours.patch_logits)
    together = torch.cat([ours.patch_logits.flatten(2), model.classifier(prefix[:, 1])[..., None]], -1)
    torch.testing.assert_close(theirs.pooled, together.mean(-1))
    torch.testing.assert_close(cam(published, pictures, torch.ones(2, 4)), ours.patch_logits.relu())
    with pytest.raises(ValueError, match="found Eva, expected, as published, a ViT or DeiT"):
        AcrViT(create_backbone("eva02_tiny_patch14_224", depth=1), published=True)


def test_create_model_loads_the_shipped_backbone():
    model = create_model("acr", num_classes=20)
    assert model.missing_weights == ["classifier.weight", "classifier.bias"]
    assert {name.split(".")[0] for name in model.unused_weights} == {"class_head", "patch_head"}
    other = create_model("cam", num_classes=20)
    assert torch.equal(model.backbone.blocks[5].mlp.fc2.weight, other.backbone.blocks[5].mlp.fc2.weight)


def test_networks_that_are_refused():
    for name in ("toycnn", "vit_pwee_patch16_reg1_gap_256"):
        with pytest.raises(ValueError, match="backbone: found no class token, expected one"):
            AcrViT(name)
    with pytest.raises(ValueError, match="num_classes: found 0"):
        AcrViT(num_classes=0)
    with pytest.raises(ValueError, match="found 20x24 pixels, expected multiples of 8"):
        AcrViT()(torch.zeros(1, 3, 20, 24))


# ------------------------------------------------------------------ the loss


def expected_losses(model, images, view, layers, weights=(100.0, 100.0)):
    grid = [side // model.patch_stride for side in images.shape[-2:]]
    order, other = naive.permutation(view, grid), transform(images, view)
    found = naive.losses(model.backbone, model, images, other, LABELS.double(), order, layers)
    names = ("class", "class_view", "region", "affinity")
    return dict(zip(names, (x * weight for x, weight in zip(found, (1, 1, *weights)))))


def gradients(losses, model):
    """Of a sum in which each loss counts differently, to every parameter (None where there is none)."""
    total = sum(weight * loss for weight, loss in zip((1.0, 0.5, 3.0, 2.0), losses.values()))
    return torch.autograd.grad(total, list(model.parameters()), allow_unused=True)


def assert_same_losses(model, found, expected, tolerance=1e-12):
    """Values and gradients; in float64 only the order of additions differs."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].shape == () and value > 1e-3
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=0, msg=name)
    names = [name for name, _ in model.named_parameters()]
    for name, one, two in zip(names, gradients(found, model), gradients(expected, model)):
        unused = name.startswith(("backbone.norm.", "backbone.fc_norm."))
        assert (one is None) == (two is None) == unused, name
        if one is not None:
            assert (one - two).abs().max() <= 1e3 * tolerance * max(two.abs().max(), 1e-3), name


@pytest.mark.parametrize("view", VIEWS)
def test_agrees_with_attention_written_out(model, images, view):
    """A grid of 3 x 5, so that rotations change its shape."""
    found = consistency_loss(model, images, LABELS, view)
    assert_same_losses(model, found, expected_losses(model, images, view, range(3)))


@pytest.mark.parametrize("name", VITS)
def test_prefix_tokens_of_any_kind(name):
    """Distillation token, registers, rotary positions, hybrid stem: patches are compared with patches."""
    model = build(name, depth=2)
    images = torch.randn(2, 3, 2 * model.patch_stride, 3 * model.patch_stride, dtype=torch.float64)
    found = consistency_loss(model, images, LABELS, "rot90")
    assert_same_losses(model, found, expected_losses(model, images, "rot90", range(2)), 1e-11)


def test_layers_and_weights(model, images):
    weights = {"region_weight": 7.0, "affinity_weight": 3.0}
    found = consistency_loss(model, images, LABELS, "vflip", layers=[2, 0], **weights)
    assert_same_losses(model, found, expected_losses(model, images, "vflip", [0, 2], (7.0, 3.0)))
    region = consistency_loss(model, images, LABELS, "vflip", affinity_weight=0.0)
    assert not region["affinity"] and region["region"] > 0


def test_other_classifiers_and_models_without_fused_attention(images):
    """A CamViT, and modules of timm that write attention out until the loss asks for it."""
    torch.manual_seed(0)
    model = create_model("cam", num_classes=4, pretrained=False, depth=2).double().eval()
    model.backbone.blocks[1].attn.fused_attn = False
    found = consistency_loss(model, images, LABELS)
    assert not model.backbone.blocks[1].attn.fused_attn and model.backbone.blocks[0].attn.fused_attn
    expected = F.multilabel_soft_margin_loss(model(images.flip(-1)), LABELS.double())
    torch.testing.assert_close(found["class_view"], expected)


@pytest.mark.parametrize("view", VIEWS)
def test_a_network_without_a_sense_of_place_has_nothing_to_learn(view):
    """Mean colours of patches and no positions: attention moves with the patches, in every view."""
    plain = build("vit_tiny_patch16_224", depth=2, pos_embed="none")
    with torch.no_grad():
        kernel = plain.backbone.patch_embed.proj.weight
        kernel.copy_(100 * kernel.mean((2, 3), keepdim=True).expand_as(kernel))
        images = torch.randn(2, 3, 48, 32, dtype=torch.float64)
        losses = consistency_loss(plain, images, LABELS, view)
        torch.testing.assert_close(losses["class"], losses["class_view"])
        assert losses["region"] < 1e-12 and losses["affinity"] < 1e-12  # 100 times float64's rounding
        with AttentionTape() as tape:
            plain(images)
        assert tape.class_rows()[-1].std(-1).min() > 1e-2


def test_precision(model, images):
    """float32: its own rounding through three blocks; autocast: float32 losses of attention in bfloat16."""
    expected = consistency_loss(model, images, LABELS)
    try:
        single = consistency_loss(model.float(), images.float(), LABELS)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = consistency_loss(model, images.float(), LABELS.long())
            with AttentionTape() as tape:
                model(images.float())
    finally:
        model.double()
    assert tape.blocks[0].q.dtype == torch.bfloat16
    for name, value in expected.items():
        assert value.dtype == torch.float64 and single[name].dtype == half[name].dtype == torch.float32
        torch.testing.assert_close(single[name].double(), value, rtol=2e-5, atol=0)
        torch.testing.assert_close(half[name].double(), value, rtol=0.05, atol=0)


def test_checkpointing_gives_the_same_gradients(model, images):
    plain = gradients(consistency_loss(model, images, LABELS), model)
    model.backbone.set_grad_checkpointing(True)
    try:
        losses = consistency_loss(model, images, LABELS)
        sum(weight * loss for weight, loss in zip((1.0, 0.5, 3.0, 2.0), losses.values())).backward()
    finally:
        model.backbone.set_grad_checkpointing(False)
    for parameter, expected in zip(model.parameters(), plain):
        if expected is not None:
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-12)
    model.zero_grad()


def test_a_short_training_aligns_the_views():
    """Through the engine, whose plain attention the loss has to do without: every term falls."""
    torch.manual_seed(0)
    model = create_model("acr", num_classes=4, pretrained=False, depth=2)
    for block in model.backbone.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.1)
    batch = {"image": torch.randn(2, 3, 24, 40), "labels": LABELS}

    def loss(model, batch, step):
        return consistency_loss(model, batch["image"], batch["labels"], region_weight=20, affinity_weight=20)

    config = TrainConfig(steps=15, lr=2e-3, warmup=1, log_every=1, amp="off")
    first, *_, last = train(model, lambda step: batch, loss, config, progress=False)
    for name, share in {"region": 0.9, "affinity": 0.9, "class": 1, "class_view": 1}.items():
        assert last[name] < share * first[name], name


def test_wrong_arguments(model, images):
    wrong = [
        ({"view": "mirror"}, "view: found 'mirror', expected one of hflip"),
        ({"layers": []}, r"layers: found \[\], expected None or different blocks, each 0..2"),
        ({"layers": [0, 3]}, r"layers: found \[0, 3\]"),
        ({"layers": [-1]}, r"layers: found \[-1\]"),
        ({"layers": [1, 1]}, r"layers: found \[1, 1\]"),
        ({"layers": [True]}, r"layers: found \[True\]"),
        ({"labels": LABELS[:1]}, r"labels: found shape \(1, 4\), expected \(2, 4\)"),
        ({"labels": LABELS * 2}, "labels: found values"),
        ({"images": images[:, :, 1:]}, "found 23x40 pixels, expected multiples of 8"),
        ({"images": images[0]}, r"images: found shape \(3, 24, 40\)"),
        ({"model": create_model("cam", "toycnn", pretrained=False)}, "model: found no class token"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            consistency_loss(**{"model": model, "images": images, "labels": LABELS, **change})
    fixed = AcrViT(create_backbone("toyvit", dynamic_img_size=False, img_size=(24, 40), depth=1), 4)
    with pytest.raises(ValueError, match="found 40x24 pixels, expected 24x40, its only size"):
        consistency_loss(fixed, images.float(), LABELS, "rot90")
