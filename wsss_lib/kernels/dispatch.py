"""Which implementation of a kernel runs: Triton on a CUDA device where it wins, PyTorch everywhere else.

Triton is imported by nobody but the kernels' own Triton files, and those only once `choose_backend` has
answered "triton": machines without Triton never notice.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch")
LARGEST_HEAD = 64  # tiles of 128 numbers a token, in float32, take 160 KB of shared memory: an RTX card has 99


def choose_backend(backend: str, tensor: Tensor, uses_dot: bool = False) -> str:
    """"triton" or "torch", for inputs that live where `tensor` does.

    backend: "auto" takes Triton on CUDA devices where it is installed; a kernel built on `tl.dot` (uses_dot)
    needs compute capability 8.0 as well: below, Triton emits no tensor-core instruction and PyTorch's own
    matrix products win; and at most 64 numbers in the last dimension, whose rows its tiles hold. "triton" insists,
    on CUDA or, under TRITON_INTERPRET=1, on the CPU (slow: for tests).
    Raises ValueError for another name, and for "triton" where it cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: found {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "torch":
        return "torch"
    device, installed = tensor.device, importlib.util.find_spec("triton") is not None
    if backend == "auto":
        fast = device.type == "cuda" and installed
        if fast and uses_dot:
            fast = torch.cuda.get_device_capability(device) >= (8, 0) and tensor.shape[-1] <= LARGEST_HEAD
        return "triton" if fast else "torch"
    if not installed:
        raise ValueError('backend: found "triton", which is not installed here; use "auto" or "torch"')
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        raise ValueError(
            f'backend: found "triton" for tensors on {device.type}, expected a CUDA device (or the CPU under '
            'TRITON_INTERPRET=1, for tests); use "auto" or "torch"'
        )
    return "triton"


def interpreted() -> bool:
    """Whether Triton interprets its kernels: the environment asked for it before the first one was imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"
