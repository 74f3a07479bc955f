"""Mixed precision: the half-precision type of a device, and the scaling of losses that float16 needs.

bfloat16 has float32's range and trains as it is. float16 has more digits and far less range: small gradients become
zero. So the loss is multiplied by a large factor before the backward pass and the gradients are divided by it after;
a step whose gradients overflow is left out, and the factor halved (Micikevicius et al. 2018, arXiv 1710.03740).
"""

from __future__ import annotations

import torch

AMP = ("auto", "bf16", "fp16", "off")


def half_type(amp: str, device: torch.device) -> torch.dtype | None:
    """What autocast computes in, None for no autocast.

    "auto": bfloat16 where the device computes in it (CPUs; GPUs from compute capability 8.0), float16 on other GPUs
    such as a T4, nothing on other devices. "bf16", "fp16", "off": that.
    Raises ValueError for bf16 or fp16 on a device other than cpu and cuda.
    """
    if amp == "off" or (amp == "auto" and device.type not in ("cpu", "cuda")):
        return None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"amp: found {amp!r} on {device.type}, expected 'auto' or 'off'")
    if amp == "auto":
        native = device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def make_scaler(half: torch.dtype | None, device: torch.device) -> torch.amp.GradScaler:
    """The factor's keeper; for everything but float16 one that lets losses, gradients and steps pass as they are."""
    enabled = half is torch.float16
    return torch.amp.GradScaler(device.type if enabled else "cpu", enabled=enabled)
