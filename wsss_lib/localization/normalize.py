"""Raw maps -> maps in [0, 1]."""

from __future__ import annotations

from torch import Tensor


def normalize_maps(maps: Tensor, mode: str = "max") -> Tensor:
    """Maps (B, C, h, w) -> the same in [0, 1], for each image and class by itself.

    mode "max": divided by the maximum, so zero stays zero; "minmax": the minimum is subtracted first. The
    highest value becomes exactly 1. A map that is zero everywhere (or, for minmax, constant) becomes zero.
    Raises ValueError for another shape or mode, values that are not finite and, for "max", negative ones.
    """
    if maps.ndim != 4:
        raise ValueError(f"maps: found shape {tuple(maps.shape)}, expected (B, C, h, w)")
    if mode not in ("max", "minmax"):
        raise ValueError(f"mode: found {mode!r}, expected 'max' or 'minmax'")
    if not maps.isfinite().all():
        raise ValueError("maps: found values that are not finite, expected finite ones")
    if maps.numel() == 0:
        return maps
    low = maps.amin(dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
    if mode == "max":
        if low.min() < 0:
            found = f"{low.min().item():.4g}"
            raise ValueError(f"maps: found {found}, expected no negative value: relu them, or use 'minmax'")
    else:
        maps = maps - low
    high = maps.amax(dim=(2, 3), keepdim=True)
    # No epsilon: it would keep the highest value of weak maps below 1.
    return maps / high.masked_fill(high == 0, 1)
