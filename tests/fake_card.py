"""A graphics card that is not there: kernels are compiled for it as their launchers ask, and never run."""

import contextlib
import io
import re
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, MockTensor

REPORT = re.compile(r"(\d+) bytes spill stores.*?Used (\d+) registers", re.DOTALL)  # of `ptxas -v`


@contextlib.contextmanager
def fake_card(capability: tuple[int, int]) -> Iterator[list[dict]]:
    """Inside, tensors on "cuda" have a shape, a type and no numbers. Yields what has been compiled so far.

    A launch goes through Triton's own argument binding, so types, constants and alignments are those of the
    real thing; it ends before the driver. Each kernel and specialisation is compiled once per capability and
    listed once: module and kernel, `spilled` and `shared` bytes, `registers` of a thread, whether there are
    `tensor_cores` instructions.
    """
    number = 10 * capability[0] + capability[1]  # also the device's: Triton keeps its kernels by device
    card = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", number, 32),
        get_current_device=lambda: number,
        get_current_stream=lambda _device: 0,
    )
    compiled: list[dict] = []
    launch = JITFunction.run

    def compile_only(kernel: JITFunction, *args, grid: tuple, warmup: bool, **options) -> None:
        args = [MockTensor(x.dtype) if isinstance(x, torch.Tensor) else x for x in args]
        with contextlib.redirect_stdout(io.StringIO()) as log:  # empty where it was compiled before
            code = launch(kernel, *args, grid=grid, warmup=True, **options)
        if report := REPORT.search(log.getvalue()):
            compiled.append({
                "module": kernel.fn.__module__,
                "kernel": kernel.fn.__name__,
                "spilled": int(report[1]),
                "registers": int(report[2]),
                "shared": code.metadata.shared,
                "tensor_cores": "mma.sync" in code.asm["ptx"] or "wgmma" in code.asm["ptx"],
            })  # fmt: skip

    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch.object(triton.knobs.nvidia, "dump_ptxas_log", True),
            mock.patch.object(triton.runtime.driver, "_active", card),
            mock.patch.object(JITFunction, "run", compile_only),
            mock.patch.object(FakeTensor, "data_ptr", lambda _tensor: 0, create=True),
            mock.patch("torch.cuda.get_device_capability", lambda _device=None: capability),
            mock.patch("torch.cuda.device_of", lambda _tensor: contextlib.nullcontext()),
            FakeTensorMode(),
        ):
            stack.enter_context(patch)
        yield compiled
