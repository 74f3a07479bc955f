"""Every Triton kernel compiled for a T4 and a Hopper GPU, neither of them here, as its launcher asks for it.

The interpreter of the other tests checks what a kernel computes, not that it compiles, fits a card's shared
memory or keeps its numbers in registers.
"""

import json
import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from triton_harness import run_apart

from wsss_lib.kernels import attention_consistency, attention_sum, dispatch
from wsss_lib.kernels.dense_crf import choose_kernel_backend

MODULES = sorted(path.stem for path in Path(dispatch.__file__).parent.glob("*_triton.py"))
CARDS = {"T4": (7, 5), "H100": (9, 0)}  # compute capability; an H200 has the H100's
SHARED = {"T4": 64 * 1024, "H100": 227 * 1024}  # bytes of shared memory a block may have
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# Bytes spilled a thread where float32 products without tensor cores need more than its 255 registers: on a T4
# only, and only for who insists on Triton there.
KNOWN_SPILLS = {("T4", "_weighted_sum"): 20, ("T4", "dq_kernel"): 412}


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device="cuda")


# ------------------------------------------------------------------ what is launched
# For each module, the sizes of the papers in every type that makes another kernel, and sizes of 1, which
# Triton takes for constants: what compiles for a number may not for them. Returns what "auto" chooses there.


def local_refinement_triton():
    from wsss_lib.kernels.local_refinement_triton import refine

    sizes = ((2, 21, 512, 48), (2, 3, 512, 48), (1, 1, 1, 8))  # pictures, maps, side, neighbours
    for dtype, cases in ((torch.float32, sizes), (torch.float64, sizes[:1])):
        for batch, maps, side, neighbors in cases:
            images, masks = (zeros(batch, channels, side, side, dtype=dtype) for channels in (3, maps))
            offsets = torch.zeros(neighbors, 2, dtype=torch.int32)
            position = torch.zeros(neighbors, dtype=dtype)
            for variant in ("par", "pamr"):
                refine(images, masks, offsets, position, 2, variant)
    return dispatch.choose_backend("auto", images)


def attention_sum_triton():
    from wsss_lib.kernels.attention_sum_triton import weight_gradient, weighted_sum

    for (*shape, d), dtypes in (((2, 72, 920, 64), FLOATS), ((1, 1, 1, 8), FLOATS[:1])):
        for dtype in dtypes:
            q, weights = zeros(*shape, d, dtype=dtype), zeros(*shape[:2])
            weighted_sum(q, q, weights, d**-0.5)
            weight_gradient(q, q, zeros(shape[0], shape[2], shape[2]), d**-0.5)
    return attention_sum._choose(q, q, weights, "auto")


def attention_consistency_triton():
    from wsss_lib.kernels.attention_consistency_triton import ConsistencySums

    def launch(blocks, *shape, dtype=torch.float32, gradients_from=0):
        """gradients_from: the first of q1, k1, q2, k2 that requires one."""
        tensors = [zeros(*shape, dtype=dtype) for _ in range(4 * blocks)]
        for i, tensor in enumerate(tensors):
            tensor.requires_grad_(i % 4 >= gradients_from)
        terms = ConsistencySums.apply(zeros(shape[2] - 1, dtype=torch.long), 1, True, *tensors)
        if gradients_from < 4:
            terms[0].grad_fn.apply(*terms)  # backward; autograd's engine would look for the card
        return attention_consistency._choose("auto", tensors[0])

    for dtype in FLOATS:
        launch(12, 2, 12, 577, 64, dtype=dtype)
    for gradients_from in (0, 2, 4):  # both views, the second one only, none
        chosen = launch(1, 1, 1, 2, 8, gradients_from=gradients_from)
    return chosen


def dense_crf_triton():
    from wsss_lib.kernels.dense_crf_triton import gaussian_sum

    sizes = (5, 187500, 2), (5, 187500, 21), (5, 187500, 81), (2, 187500, 21), (5, 1, 1)
    for num_features, points, labels in sizes:
        features = zeros(num_features, points)
        gaussian_sum(features, zeros(points, labels))
    return choose_kernel_backend("exact", "auto", features)


# ------------------------------------------------------------------ compiling, in a process of its own


def compile_all(file):
    """For every card, the kernels that were compiled and what "auto" chooses; for every module, the functions
    of Triton's that nobody launches or calls."""
    from fake_card import fake_card

    compiled, chosen = {}, {}
    for card, capability in CARDS.items():
        with fake_card(capability) as compiled[card]:
            chosen[card] = {module: globals()[module]() for module in MODULES}
    launched = {(code["module"], code["kernel"]) for codes in compiled.values() for code in codes}
    forgotten = {module: without_a_case(module, launched) for module in MODULES}
    Path(file).write_text(json.dumps({"compiled": compiled, "chosen": chosen, "forgotten": forgotten}))


def without_a_case(module, launched):
    """The names of a module's @triton.jit functions that are not launched, nor called by one that is."""
    from triton.runtime.jit import JITFunction

    module = import_module(f"wsss_lib.kernels.{module}")
    functions = {name: value.fn for name, value in vars(module).items() if isinstance(value, JITFunction)}
    found, pending = set(), [name for name in functions if (module.__name__, name) in launched]
    while pending:
        found.add(name := pending.pop())
        called = functions[name].__code__.co_names
        pending += [other for other in called if other in functions and other not in found]
    return sorted(functions.keys() - found)


def find_ptxas():
    """NVIDIA's assembler, where Triton looks for it; None where there is none, or no Triton."""
    triton = find_spec("triton")
    own = triton and Path(triton.origin).parent / "backends/nvidia/bin/ptxas"
    return next((x for x in (os.environ.get("TRITON_PTXAS_PATH"), own) if x and Path(x).exists()), None)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    if find_ptxas() is None:
        pytest.skip("nothing to compile with: no Triton here, or none with NVIDIA's ptxas")
    folder = tmp_path_factory.mktemp("triton")
    # With an empty cache, and without the cards that are here: what compiles depends on neither.
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    run_apart(compile_all, folder / "results.json", CUDA_VISIBLE_DEVICES="", **environment)
    return json.loads((folder / "results.json").read_text())


# ------------------------------------------------------------------ what must hold


def test_every_module_has_its_launches():
    """Where there is no compiler as well."""
    assert MODULES and not [module for module in MODULES if module not in globals()]


@pytest.mark.parametrize("module", MODULES)
def test_every_kernel_is_compiled(results, module):
    assert results["forgotten"][module] == []


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("module", MODULES)
def test_kernels_fit_the_card(results, module, card):
    """All of them, also those that run there only on request. No spills: they go to memory and back in the
    innermost loop."""
    codes = [code for code in results["compiled"][card] if code["module"].endswith(f".{module}")]
    assert codes
    for code in codes:
        assert code["shared"] <= SHARED[card], code
        on_request = results["chosen"][card][module] != "triton"
        assert code["spilled"] <= (KNOWN_SPILLS.get((card, code["kernel"]), 0) if on_request else 0), code


def test_old_cards_get_the_kernels_that_need_no_tensor_cores(results):
    """What the dispatcher's rule rests on: on a T4 Triton has no tensor cores for `tl.dot`, so that "auto"
    leaves attention to PyTorch there; DenseCRF's products are in full float32, which has none anywhere."""
    assert set(results["chosen"]["H100"].values()) == {"triton"}
    on_t4 = {module for module, chosen in results["chosen"]["T4"].items() if chosen == "triton"}
    assert on_t4 == {"local_refinement_triton", "dense_crf_triton"}
    assert not any(code["tensor_cores"] for code in results["compiled"]["T4"])
    for code in results["compiled"]["H100"]:
        assert code["tensor_cores"] == (".attention_" in code["module"]), code
