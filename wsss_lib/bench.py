"""Kernels beside what the published code computes: speed, peak memory, error, and how far is left to go.

Baseline and kernel take turns in one process (b, o, b, o, ...), so both see the same machine, and medians are
compared. Memory is counted in runs of its own, errors are to float64. The floor of a case is the time its
unavoidable bytes or operations take at the bandwidth of a large copy and the rate of a large matrix product,
measured in the same run, on the same device, with as many threads; data that fit into a cache can beat it.
The cases are in `bench_cases`.
"""

from __future__ import annotations

import importlib.metadata
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import bench_instruments as instruments
from .bench_instruments import Clock, Rates

BUDGET = {"tiny": 0.0, "small": 2.0, "paper": 20.0}  # seconds for the pairs of a case at one thread count
BUSY = 0.5  # other processes: where more of them run, the time of several threads says little


@dataclass(frozen=True)
class Calls:
    """What a case runs, on inputs made once. Each returns its tensors: outputs, then gradients if any."""

    baseline: Callable[[], tuple[Tensor, ...]]
    ours: Callable[[], tuple[Tensor, ...]]
    exact: Callable[[], tuple[Tensor, ...]]  # the plain formula in float64


@dataclass(frozen=True)
class Case:
    """One comparison at one size.

    make: device -> Calls. bytes, flops: what no implementation can do without; a comment where the case is
    made says why. needs: the most bytes that the baseline or the float64 result holds at once (an upper bound
    will do); where less memory is free, both are left out.
    """

    kernel: str
    title: str
    make: Callable[[torch.device], Calls]
    bytes: float
    flops: float
    needs: float
    dtype: torch.dtype = torch.float32


def run(cases: Sequence[Case], device: torch.device, budget: float) -> dict:
    """Measure all cases: {"device", "device_name", "threads", "load", "versions", "rates", "cases"}.

    cases: one row for each case and thread count, as of `measure`. rates: by thread count. load: how many
    other processes ran when it began (None where the system does not say). Ready for `write_results`.
    """
    load, settings, rates, rows = instruments.load_average(), instruments.thread_settings(device), {}, []
    instruments.settle_allocator()
    for threads in settings:
        with instruments.num_threads(threads):
            rates[threads] = instruments.measure_rates(device, instruments.make_clock(device, threads))
    for case in tqdm(cases, desc=f"bench on {device.type}"):
        rows += measure(case, device, rates, budget)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {
        "device": device.type, "device_name": instruments.device_name(device), "threads": settings, "load": load,
        "versions": {"timm": _version("timm"), "triton": _version("triton"), "cuda": torch.version.cuda},
        "rates": {str(threads): rate.to_json() for threads, rate in rates.items()}, "cases": rows,
    }


def measure(
    case: Case,
    device: torch.device,
    rates: dict[int, Rates],
    budget: float,
    clock_for: Callable[[torch.device, int], Clock] = instruments.make_clock,
) -> list[dict]:
    """One row for each thread count in `rates`: median seconds, peak bytes, ratios baseline / ours, errors.

    "range": the fastest and the slowest sample. "system_share": of the CPU time, with one thread, see there;
    "user_speed_ratio" leaves it out, as it differs from system to system. Both are None on a GPU.
    Where the baseline does not fit, its fields and the errors are None, and `note` says so. ValueError where
    results have different shapes or are not finite. clock_for: a clock for a device and a number of threads.
    """
    calls, note = case.make(device), _too_large(case, device)
    errors = (None, None) if note else _errors(case, calls)
    peak = partial(instruments.peak_bytes, device=device)
    peaks = (None if note else peak(calls.baseline), peak(calls.ours))
    shares = (None if note else _system_share(calls.baseline, device, budget),
              _system_share(calls.ours, device, budget))
    rows = []
    for threads, rate in rates.items():
        clock, floor = clock_for(device, threads), rate.floor(case.bytes, case.flops, case.dtype)
        with instruments.num_threads(threads):
            times = instruments.time_in_turns([calls.ours] if note else [calls.baseline, calls.ours], clock, budget)
        ours, baseline = statistics.median(times[-1]), None if note else statistics.median(times[0])
        rows.append({
            "kernel": case.kernel, "case": case.title, "dtype": str(case.dtype).removeprefix("torch."),
            "threads": threads, "clock": "process" if clock is time.process_time else "wall",
            "samples": len(times[-1]), "baseline_seconds": baseline, "seconds": ours,
            "baseline_range": None if note else [min(times[0]), max(times[0])],
            "range": [min(times[-1]), max(times[-1])], "speed_ratio": _ratio(baseline, ours),
            "baseline_system_share": shares[0], "system_share": shares[1],
            "user_speed_ratio": _user_ratio(baseline, ours, shares),
            "baseline_peak_bytes": peaks[0], "peak_bytes": peaks[1], "memory_ratio": _ratio(*peaks),
            "baseline_error": errors[0], "error": errors[1],
            "bytes": case.bytes, "flops": case.flops, "floor_seconds": floor, "times_floor": ours / floor,
            "note": note,
        })
    return rows


def _ratio(baseline: float | None, ours: float) -> float | None:
    """None where there is nothing to compare with, or nothing to divide by."""
    return baseline / ours if baseline is not None and ours else None


def _system_share(call: Callable, device: torch.device, budget: float) -> float | None:
    if device.type != "cpu":
        return None
    with instruments.num_threads(1):
        return instruments.system_share(call, budget)


def _user_ratio(baseline: float | None, ours: float, shares: tuple[float | None, ...]) -> float | None:
    if baseline is None or None in shares:
        return None
    return _ratio(baseline * (1 - shares[0]), ours * (1 - shares[1]))


def _too_large(case: Case, device: torch.device) -> str | None:
    free = instruments.free_bytes(device)
    if case.needs <= free:
        return None
    numbers = f"needs {case.needs / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on {device.type}"
    return f"baseline and float64 result left out: {numbers}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ------------------------------------------------------------------ from functions to cases


def compare(
    baseline: Callable,
    ours: Callable,
    draw: Callable[[torch.Generator], list[Tensor]],
    dtype: torch.dtype = torch.float32,
    wanted: Sequence[int] = (),
    exact: Callable | None = None,
) -> Callable[[torch.device], Calls]:
    """`Case.make` for two functions of the inputs that `draw` makes.

    wanted: the inputs that get a gradient. exact: called with the same numbers in float64, None is baseline.
    """
    def make(device: torch.device) -> Calls:
        inputs = [_cast(x.to(device), dtype) for x in draw(torch.Generator().manual_seed(0))]
        call = partial(_with_gradients, wanted=wanted) if wanted else _without_gradients
        return Calls(
            baseline=lambda: call(baseline, inputs),
            ours=lambda: call(ours, inputs),
            exact=lambda: call(exact or baseline, [_cast(x, torch.float64) for x in inputs]),
        )

    return make


@torch.no_grad()
def _without_gradients(function: Callable, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return _tuple(function(*inputs))


@torch.enable_grad()
def _with_gradients(
    function: Callable, inputs: Sequence[Tensor], wanted: Sequence[int]
) -> tuple[Tensor, ...]:
    """The function's outputs, and the gradients of a weighted sum of their numbers to the wanted inputs."""
    leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
    outputs = _tuple(function(*leaves))
    weights = [_sum_weights(tuple(y.shape), y.dtype, y.device) for y in outputs]
    gradients = torch.autograd.grad(outputs, [leaves[i] for i in wanted], weights)
    return *(y.detach() for y in outputs), *gradients


@lru_cache(maxsize=8)
def _sum_weights(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The weights of that sum, from -1 to 1; of a scalar 1. Kept: making them is no part of the kernel."""
    count = torch.Size(shape).numel()
    return torch.cos(torch.arange(count, dtype=torch.float64, device=device)).float().to(dtype).view(shape)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x  # a permutation stays one


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


# ------------------------------------------------------------------ error


def relative_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """max |found - exact| / max |exact| of each tensor; the largest of them.

    Raises ValueError for other shapes and for numbers that are not finite.
    """
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (found, exact)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"found tensors of shapes {shapes[0]}, expected {shapes[1]}")
    errors = []
    for f, e in zip(found, exact):
        error = (f.detach().double() - e.detach()).abs().max().item()
        errors.append(error / (e.abs().max().item() or 1.0))
    if not all(map(math.isfinite, errors)):
        raise ValueError(f"found errors {errors}, expected finite numbers")
    return max(errors)


def _errors(case: Case, calls: Calls) -> tuple[float, float]:
    """Of the baseline and of ours."""
    exact = calls.exact()
    try:
        return relative_error(calls.baseline(), exact), relative_error(calls.ours(), exact)
    except ValueError as error:
        raise ValueError(f"{case.kernel}, {case.title}: {error}") from error


# ------------------------------------------------------------------ what is printed

HEAD = (
    "kernel", "case", "type", "threads", "baseline", "ours", "speed", "user", "x floor", "baseline", "ours",
    "memory", "error",
)
NAMES = 3  # columns of text, set to the left; numbers to the right


def table(result: dict) -> str:
    """What `run` returned as text: a line for each row, then what was left out, the machine's rates and load.

    Times and bytes: of baseline and ours. "speed" and "memory" are their ratios, "user" that of the time
    outside the operating system (see `measure`); "x floor" is ours / floor.
    """
    lines = [HEAD] + [_cells(row) for row in result["cases"]]
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = []
    for line in lines:
        names = [cell.ljust(width) for cell, width in zip(line[:NAMES], widths)]
        numbers = [cell.rjust(width) for cell, width in zip(line[NAMES:], widths[NAMES:])]
        text.append("  ".join(names + numbers))
    notes = [f"{row['kernel']}, {row['case']}: {row['note']}" for row in result["cases"] if row["note"]]
    rates = [_machine(result["device_name"], threads, rate) for threads, rate in result["rates"].items()]
    return "\n".join([*text, *dict.fromkeys(notes), *rates, *_warning(result["load"])])


def _cells(row: dict) -> tuple[str, ...]:
    def show(name: str, form: str, factor: float = 1) -> str:
        return "-" if row[name] is None else form.format(row[name] * factor)

    return (
        row["kernel"], row["case"], row["dtype"], str(row["threads"]),
        show("baseline_seconds", "{:.4g} ms", 1e3), show("seconds", "{:.4g} ms", 1e3),
        show("speed_ratio", "{:.1f}x"), show("user_speed_ratio", "{:.1f}x"), show("times_floor", "{:.1f}"),
        show("baseline_peak_bytes", "{:.4g} MB", 1e-6), show("peak_bytes", "{:.4g} MB", 1e-6),
        show("memory_ratio", "{:.1f}x"), show("error", "{:.0e}"),
    )


def _machine(name: str, threads: str, rate: dict) -> str:
    flops = ", ".join(f"{dtype} at {x / 1e12:.3g} TFLOP/s" for dtype, x in rate["flops_per_second"].items())
    threads = "1 thread" if threads == "1" else f"{threads} threads"
    return f"{name}, {threads}: copies at {rate['copy_bytes_per_second'] / 1e9:.3g} GB/s, multiplies {flops}"


def _warning(load: float | None) -> list[str]:
    if load is None or load <= BUSY:
        return []
    warning = (f"The machine was busy, {load} other processes ran: threads that wait for one another then take any "
               "time, and only the rows of one thread can be trusted.")
    return [warning]
