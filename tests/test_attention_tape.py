"""The attention tape against attention written out, N x N, on ViTs of timm that nothing was changed in."""

import pytest
import timm
import torch
import torch.nn.functional as F
from reference import naive_getam as naive
from torch import nn
from torch.overrides import _get_current_function_mode
from torch.utils._python_dispatch import TorchDispatchMode

from wsss_lib.localization import class_slots
from wsss_lib.models.attention import AttentionTape, fused_attention, module_flags

# name: prefix tokens
VITS = {
    "deit_tiny_patch16_224": 1,
    "deit_tiny_distilled_patch16_224": 2,
    "vit_tiny_patch16_224": 1,
    "vit_tiny_r_s16_p8_224": 1,  # hybrid: a convolutional stem
    "vit_small_patch14_dinov2": 1,
    "vit_small_patch16_dinov3": 5,  # four registers; RoPE
    "eva02_tiny_patch14_224": 1,  # RoPE
}
LABELS = torch.tensor([[1.0, 0, 1, 1], [0, 1, 0, 0]])


def build(name="vit_tiny_patch16_224", depth=3, std=0.2, **kw):
    """A ViT in float64 whose attention is far from uniform."""
    torch.manual_seed(0)
    vit = timm.create_model(name, depth=depth, num_classes=4, dynamic_img_size=True, **kw).double().eval()
    for block in vit.blocks:
        for parameter in block.attn.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=std)
        for scale in ("ls1", "ls2", "gamma_1", "gamma_2"):  # layer scale starts near 0, which hides blocks
            gamma = getattr(getattr(block, scale, None), "gamma", getattr(block, scale, None))
            if isinstance(gamma, nn.Parameter):
                nn.init.ones_(gamma)
    return vit


@pytest.fixture(scope="module")
def vit():
    return build()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 32, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def written_out(vit, images, labels):
    """All maps, L x (B, H, N, N), and gradients, K x L x (B, H, N, N): one backward per image and class."""
    with naive.attention_maps(vit) as maps:
        logits = vit(images)
    index, valid = class_slots(labels)
    gradients = []
    for k in range(index.shape[1]):
        total = [torch.zeros_like(a) for a in maps]
        for b in valid[:, k].nonzero()[:, 0].tolist():
            for layer, g in enumerate(torch.autograd.grad(logits[b, index[b, k]], maps, retain_graph=True)):
                total[layer][b] = g[b]
        gradients.append(total)
    return [a.detach() for a in maps], gradients


# ------------------------------------------------------------------ what the tape reads


@pytest.mark.parametrize("name", VITS)
def test_vits_of_timm_are_read_as_they_are(name):
    """float64 on both sides: sums of at most 384 terms in another order, so 1e-12 relative is generous."""
    vit = build(name, depth=2)
    stride = vit.patch_embed.patch_size[0] if "_r_" not in name else 32
    pictures = torch.randn(2, 3, 2 * stride, 3 * stride, dtype=torch.float64)
    expected, expected_gradients = written_out(vit, pictures, LABELS)
    with AttentionTape() as tape:
        logits = vit(pictures)
    assert torch.equal(logits, vit(pictures))  # watching changes nothing
    assert vit.num_prefix_tokens == VITS[name]
    heads, tokens = vit.blocks[0].attn.num_heads, VITS[name] + 6
    assert len(tape.blocks) == 2
    for layer, block in enumerate(tape.blocks):
        for tensor in (block.q, block.k, block.v, block.out):
            assert tensor.shape[:3] == (2, heads, tokens)
        torch.testing.assert_close(tape.maps(layer), expected[layer], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(tape.maps(layer) @ block.v, block.out, rtol=1e-10, atol=1e-12)
    rows = torch.stack([a[:, :, 0] for a in expected])
    torch.testing.assert_close(tape.class_rows(), rows, rtol=1e-12, atol=1e-14)
    gradients = tape.class_row_gradients(logits, class_slots(LABELS))
    assert gradients.shape == (3, 2, 2, heads, tokens)
    expected_rows = torch.stack([torch.stack([g[:, :, 0] for g in slot]) for slot in expected_gradients])
    largest = expected_rows.abs().max()
    assert largest > 1e-6 and not gradients[1:, :, 1].any()  # image 1 has one class only
    torch.testing.assert_close(gradients / largest, expected_rows / largest, rtol=0, atol=1e-12)


class Attends(nn.Module):
    """(B, N, D) -> logits (B, 4) with two attention calls a block, each with arguments of its own."""

    def __init__(self, **arguments):
        super().__init__()
        torch.manual_seed(2)
        self.qkv = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))
        self.head, self.arguments = nn.Linear(8, 4), arguments
        self.double()

    def forward(self, x):
        for qkv in self.qkv:
            q, k, v = qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)  # (B, N, 24) -> 3 x (B, 2, N, 4)
            y = F.scaled_dot_product_attention(q, k, v, **self.arguments)
            x = x + y.transpose(1, 2).flatten(2)
        return self.head(x[:, 0] + x[:, 1:].max(1).values)


HIDDEN = torch.rand(5, 5, generator=torch.Generator().manual_seed(3)) < 0.3


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"scale": 2.0},
        {"is_causal": True},
        {"attn_mask": ~HIDDEN.fill_diagonal_(False)},
        {"attn_mask": torch.randn(2, 1, 5, 5, dtype=torch.float64)},
        {"attn_mask": torch.randn(1, 2, 1, 5, dtype=torch.float64), "scale": 0.1},
    ],
    ids=["plain", "scale", "causal", "bool mask", "float mask", "broadcast mask"],
)
def test_arguments_of_attention_count(arguments):
    model, x = Attends(**arguments), torch.randn(2, 5, 8, dtype=torch.float64)
    with AttentionTape() as tape:
        logits = model(x)
    assert len(tape.blocks) == 2
    for block in tape.blocks:
        torch.testing.assert_close(block.map() @ block.v, block.out, rtol=1e-12, atol=1e-13)
        assert torch.equal(block.row(), block.map()[:, :, 0])
        torch.testing.assert_close(block.row(3), block.map()[:, :, 3], rtol=1e-14, atol=0)
    slots = torch.tensor([[1], [2]]), torch.ones(2, 1, dtype=torch.bool)
    gradients = tape.class_row_gradients(logits, slots)
    for layer in range(2):  # central differences: A of the class token is moved, the rest stays
        for j in range(5):
            def moved(step):
                calls, fused = iter(range(2)), F.scaled_dot_product_attention

                def attention(q, k, v, **kw):
                    out = fused(q, k, v, **kw)
                    if next(calls) == layer:
                        out = out.clone()
                        out[:, 1, 0] += step * v[:, 1, j]
                    return out

                with pytest.MonkeyPatch.context() as patch, torch.no_grad():
                    patch.setattr(F, "scaled_dot_product_attention", attention)
                    return model(x)[[0, 1], [1, 2]]

            slope = (moved(1e-6) - moved(-1e-6)) / 2e-6
            torch.testing.assert_close(gradients[0, layer, :, 1, j], slope, rtol=1e-6, atol=1e-8)


def test_rows_are_differentiable(vit, images):
    vit.zero_grad()
    with AttentionTape() as tape:
        vit(images)
    tape.class_rows()[-1, 0, 0, 3].backward()
    found = vit.blocks[0].attn.qkv.weight.grad.clone()
    vit.zero_grad()
    with naive.attention_maps(vit) as maps:
        vit(images)
    maps[-1][0, 0, 0, 3].backward()
    torch.testing.assert_close(found, vit.blocks[0].attn.qkv.weight.grad, rtol=1e-10, atol=1e-16)
    vit.zero_grad(set_to_none=True)


def test_no_attention_matrix_is_made(vit, images):
    """No operation of the pass, the rows or their gradients puts out an N x N map."""
    shapes = []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            shapes.extend(t.shape for t in (out if isinstance(out, tuple) else (out,)) if hasattr(t, "shape"))
            return out

    tokens = 7
    with Shapes(), AttentionTape() as tape:
        logits = vit(images)
        tape.class_rows()
        tape.class_row_gradients(logits, class_slots(LABELS))
    assert (2, 3, tokens, 64) in shapes and not [s for s in shapes if s[-2:] == (tokens, tokens)]
    with Shapes():
        tape.maps(0)
    assert (2, 3, tokens, tokens) in shapes  # so it would have been seen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_in_float32(dtype):
    """Softmax and sums in float32 of the recorded half-precision numbers: compared with those in float64."""
    vit = build().float()
    images = torch.randn(2, 3, 32, 48)
    with torch.autocast("cpu", dtype), AttentionTape() as tape:
        logits = vit(images)
        rows = tape.class_rows()
        gradients = tape.class_row_gradients(logits.float(), class_slots(LABELS), retain_graph=True)
    again = tape.class_row_gradients(logits.float(), class_slots(LABELS))  # and not under autocast
    assert tape.blocks[0].q.dtype == dtype and rows.dtype == gradients.dtype == torch.float32
    assert torch.equal(gradients, again)
    block = tape.blocks[0]
    exact = (block.q[:, :, :1].double() @ block.k.double().mT * block.scale).softmax(-1)[:, :, 0]
    torch.testing.assert_close(rows[0].double(), exact, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------ what the tape keeps


def test_earlier_blocks_are_not_kept(vit, images):
    with AttentionTape() as everything:
        logits = vit(images)
    with AttentionTape(start_layer=2) as tape:
        again = vit(images)
    assert len(tape.blocks) == 1
    assert torch.equal(tape.class_rows(), everything.class_rows()[2:])
    slots = class_slots(LABELS)
    late = everything.class_row_gradients(logits, slots)[:, 2:]
    torch.testing.assert_close(tape.class_row_gradients(again, slots), late, rtol=1e-12, atol=1e-16)


def test_the_graph_of_frozen_weights_begins_at_the_first_recorded_output(vit, images):
    with AttentionTape() as tape:
        logits = vit(images)
    expected = tape.class_row_gradients(logits, class_slots(LABELS))
    vit.requires_grad_(False)
    try:
        with AttentionTape(start_layer=1) as tape:
            logits = vit(images)
        first, second = tape.blocks
        assert first.out.is_leaf and first.out.requires_grad and not first.q.requires_grad
        assert second.q.requires_grad and not second.out.is_leaf
        found = tape.class_row_gradients(logits, class_slots(LABELS))
        torch.testing.assert_close(found, expected[:, 1:], rtol=1e-12, atol=1e-16)
        with AttentionTape(detach=True):
            assert not vit(images).requires_grad  # nobody wants gradients, so no graph
        with torch.no_grad(), AttentionTape() as tape:
            assert not vit(images).requires_grad
        assert not tape.blocks[0].out.requires_grad
    finally:
        vit.requires_grad_(True)


def test_detached_tapes_leave_the_model_its_graph(vit, images):
    with AttentionTape(detach=True) as tape:
        logits = vit(images)
    for block in tape.blocks:
        assert not any(t.requires_grad for t in (block.q, block.k, block.v, block.out))
    assert logits.requires_grad and not tape.class_rows().requires_grad
    with pytest.raises(RuntimeError, match="detach=True"):
        tape.class_row_gradients(logits, class_slots(LABELS))


def test_gradients_leave_no_trace(vit, images):
    assert all(parameter.grad is None for parameter in vit.parameters())
    with AttentionTape() as tape:
        logits = vit(images)
    slots = class_slots(LABELS)
    first = tape.class_row_gradients(logits, slots, retain_graph=True)
    assert torch.equal(tape.class_row_gradients(logits, slots), first) and not first.requires_grad
    assert all(parameter.grad is None for parameter in vit.parameters())
    with pytest.raises(RuntimeError, match="second time"):  # the graph is gone, as after any backward
        tape.class_row_gradients(logits, slots)
    with AttentionTape() as tape:
        logits = vit(images)
    none = tape.class_row_gradients(logits, class_slots(torch.zeros(2, 4)))
    assert none.shape == (0, 3, 2, 3, 7) and none.dtype == torch.float64


# ------------------------------------------------------------------ the context


def test_tapes_nest(vit, images):
    with AttentionTape() as outer:
        vit(images)
        with AttentionTape(start_layer=1, detach=True) as inner:
            vit(images)
    assert len(outer.blocks) == 6 and len(inner.blocks) == 2
    assert torch.equal(inner.class_rows(), outer.class_rows()[4:])
    with AttentionTape(detach=True) as outer, AttentionTape() as inner:
        logits = vit(images)
    assert inner.class_row_gradients(logits, class_slots(LABELS)).abs().max() > 0


def test_a_tape_can_be_used_again_but_not_twice_at_once(vit, images):
    tape = AttentionTape()
    for _ in range(2):
        with tape:
            vit(images)
        assert len(tape.blocks) == 3
    with tape, pytest.raises(RuntimeError, match="recording already"):
        tape.__enter__()
    assert _get_current_function_mode() is None


def test_errors_inside_end_the_recording(vit, images):
    with pytest.raises(ZeroDivisionError), AttentionTape() as tape:
        vit(images)
        1 / 0
    assert _get_current_function_mode() is None
    vit(images)
    assert len(tape.blocks) == 3  # the pass after it was not recorded


def test_compiled_models_run_uncompiled_under_the_tape(vit, images):
    compiled, graphs = nn.Sequential(vit), []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(compiled, backend=backend)
    try:
        with AttentionTape() as tape:
            logits = compiled(images)
        assert len(tape.blocks) == 3 and not graphs
        gradients = tape.class_row_gradients(logits, class_slots(LABELS))
        with AttentionTape() as tape:
            logits = vit(images)
        assert torch.equal(gradients, tape.class_row_gradients(logits, class_slots(LABELS)))
        small = torch.compile(lambda x: x + 1, backend=backend)
        small(torch.ones(2))
        assert len(graphs) == 1  # afterwards compilation is on again
    finally:
        torch._dynamo.reset()


def test_unfused_attention_is_seen_with_its_flag_on(vit, images):
    with AttentionTape() as tape:
        logits = vit(images)
    flags = [module for module in vit.modules() if hasattr(module, "fused_attn")]
    flags[1].fused_attn = flags[2].fused_attn = False
    try:
        with pytest.raises(ZeroDivisionError), fused_attention(vit):
            assert all(module.fused_attn for module in flags)
            with AttentionTape() as again:
                assert torch.equal(vit(images), logits)
            1 / 0
        assert torch.equal(again.class_rows(), tape.class_rows())
        assert [module.fused_attn for module in flags] == [True, False, False]
        with AttentionTape(start_layer=1) as tape:
            vit(images)
        with pytest.raises(RuntimeError, match="found 1 calls .* expected more than start_layer = 1"):
            tape.class_rows()
    finally:
        flags[1].fused_attn = flags[2].fused_attn = True


def test_module_flags_touch_only_what_differs(vit):
    with module_flags(vit, fused_attn=False, no_such_flag=True):
        assert not any(block.attn.fused_attn for block in vit.blocks)
        assert not hasattr(vit, "no_such_flag")
    assert all(block.attn.fused_attn for block in vit.blocks)


# ------------------------------------------------------------------ refusals


def test_attention_that_cannot_be_recorded():
    q = torch.randn(2, 4, 5, 8)
    with AttentionTape() as tape:
        with pytest.raises(ValueError, match=r"queries \(2, 4, 5, 8\) and keys \(2, 2, 5, 8\)"):
            F.scaled_dot_product_attention(q, q[:, :2], q[:, :2], enable_gqa=True)
        with pytest.raises(ValueError, match=r"expected \(B, H, N, d\)"):
            F.scaled_dot_product_attention(q[0], q[0], q[0])
        F.scaled_dot_product_attention(q, q[:, :, :3], q[:, :, :3])  # fewer keys than queries are fine
    assert tape.class_rows().shape == (1, 2, 4, 3) and tape.maps(-1).shape == (2, 4, 5, 3)
    with pytest.raises(RuntimeError, match="found 0 calls"):
        AttentionTape().blocks
    for wrong in (-1, 1.0, True):
        with pytest.raises(ValueError, match="start_layer: found"):
            AttentionTape(start_layer=wrong)


def test_gradients_that_cannot_be_had(vit, images):
    slots = class_slots(LABELS)
    dropping = build(attn_drop_rate=0.25).train()
    with AttentionTape() as tape:
        logits = dropping(images)
    assert tape.class_rows().sum(-1).allclose(torch.ones((), dtype=torch.float64))  # the rows are fine
    with pytest.raises(ValueError, match="found dropout 0.25, expected none"):
        tape.class_row_gradients(logits, slots)
    with AttentionTape() as tape:
        logits = vit(images)
    for wrong in (logits[0], logits[:1]):
        with pytest.raises(ValueError, match=r"expected \(B, C\), \(B, K\) and \(B, K\)"):
            tape.class_row_gradients(wrong, slots)
    with pytest.raises(ValueError, match=r"none that depend on blocks \[0, 1, 2\]"):
        tape.class_row_gradients(vit(images), slots)
    with pytest.raises(RuntimeError, match="logits: found none with a graph"):
        tape.class_row_gradients(logits.detach(), slots)
