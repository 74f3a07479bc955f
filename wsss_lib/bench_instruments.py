"""What `bench` measures with: clocks, threads, peak memory, and what the machine itself can do."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .allocations import count_allocations
from .kernels.products import multiply_transposed

Clock = Callable[[], float]  # seconds since some moment

ROUNDS = (3, 15)  # the fewest, whatever they take, and the most, however short they are
SAMPLE = 0.01  # seconds: a shorter call is repeated until one sample takes this long
LONG = 2.0  # seconds: what warming up costs does not show in a call that takes longer
COPY = 2**26  # numbers copied to measure bandwidth: 256 MB, beyond any cache
SHARE = 0.5  # seconds of a call's repetitions from which its share of system time is read
MATRIX = {"cpu": 2048, "cuda": 8192}  # side of the matrices multiplied to measure the rate


# ------------------------------------------------------------------ time


def time_in_turns(calls: Sequence[Callable], clock: Clock, budget: float) -> list[list[float]]:
    """Samples of seconds per call, for each of the calls, taken in turn.

    At least 3 rounds, then until the budget (in seconds) or 15 of them are over. One call each before that
    warms up and says how many make a sample of 10 ms; it is a sample itself only where all calls are long.
    """
    first = [_seconds(call, 1, clock) for call in calls]
    repeats = [max(1, math.ceil(SAMPLE / seconds)) if seconds > 0 else 1 for seconds in first]
    times = [[seconds] if min(first) > LONG else [] for seconds in first]
    fewest, most = ROUNDS
    spent = sum(map(sum, times))
    while len(times[0]) < fewest or (len(times[0]) < most and spent < budget):
        for call, count, samples in zip(calls, repeats, times):
            samples.append(_seconds(call, count, clock))
            spent += samples[-1] * count
    return times


def _seconds(call: Callable, count: int, clock: Clock) -> float:
    """Seconds per call, over `count` of them."""
    started = clock()
    for _ in range(count):
        call()
    return (clock() - started) / count


def make_clock(device: torch.device, threads: int) -> Clock:
    """On a CPU with one thread the process's own time, which others do not disturb; else the wall's."""
    if device.type == "cuda":
        return cuda_clock
    return time.process_time if threads == 1 else time.perf_counter


def cuda_clock() -> float:
    """Seconds on the wall, once everything that was launched has run."""
    torch.cuda.synchronize()
    return time.perf_counter()


def system_share(call: Callable, budget: float) -> float | None:
    """Share of a call's CPU time that the operating system takes, 0..1; None where it is too short to tell.

    Nearly all of it hands out fresh memory, page by page, to blocks beyond the 32 MB that the C library keeps
    for the next one. Repeated for half a second, or for the budget if that is less.
    """
    start = os.times()
    while True:
        call()
        now = os.times()
        user, system = now.user - start.user, now.system - start.system
        if user + system >= min(SHARE, budget):
            return system / (user + system) if user + system else None


def settle_allocator() -> None:
    """Bring the C library's allocator to the state it has in a long-lived process.

    glibc returns large blocks to the system, and with every one raises the size that it calls large, up to
    32 MB. So a block of 20 MB would be slow in the first case, and fast after any that freed a larger one.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def thread_settings(device: torch.device) -> list[int]:
    """On a CPU one thread, and as many as PyTorch takes here; on a GPU the latter only: it hardly matters."""
    default = torch.get_num_threads()
    return sorted({1, default}) if device.type == "cpu" else [default]


@contextmanager
def num_threads(threads: int) -> Iterator[None]:
    """PyTorch computes with so many threads; afterwards with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------ the machine


@dataclass(frozen=True)
class Rates:
    """What the machine can do with some number of threads."""

    bandwidth: float  # bytes per second
    flops: dict[torch.dtype, float]  # operations per second

    def floor(self, moved: float, flops: float, dtype: torch.dtype) -> float:
        """Seconds that nothing can beat: the longer of moving these bytes and doing these operations."""
        return max(moved / self.bandwidth, flops / self.flops[dtype])

    def to_json(self) -> dict:
        flops = {str(dtype).removeprefix("torch."): rate for dtype, rate in self.flops.items()}
        return {"copy_bytes_per_second": self.bandwidth, "flops_per_second": flops}


def _bandwidth(device: torch.device, clock: Clock, copy: int) -> float:
    """Bytes per second of a copy: each number is read and written."""
    source = torch.ones(copy, device=device)
    target = torch.empty_like(source)
    seconds = min(time_in_turns([lambda: target.copy_(source)], clock, budget=1)[0])
    return 2 * source.element_size() * copy / seconds


def measure_rates(device: torch.device, clock: Clock, copy: int = COPY, side: int | None = None) -> Rates:
    """Bandwidth of a large copy, and the rate of a large matrix product: the best of several.

    copy: numbers in it; side: of the matrices. float32 products are true float32, not TF32; on a CPU the
    faster of PyTorch's two libraries counts (see `kernels.products`). On CUDA float16 as well.
    """
    side, flops = side or MATRIX[device.type], {}
    bandwidth = _bandwidth(device, clock, copy)
    for dtype in (torch.float32, torch.float16) if device.type == "cuda" else (torch.float32,):
        a = torch.ones(1, side, side, dtype=dtype, device=device)
        ways = [partial(torch.bmm, a, a), partial(multiply_transposed, a, a)]
        flops[dtype] = 2 * side**3 / min(map(min, time_in_turns(ways, clock, budget=2)))
    return Rates(bandwidth, flops)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    models = _values(Path("/proc/cpuinfo"), "model name")
    return models[0] if models else platform.processor() or platform.machine()


def load_average() -> float | None:
    """How many processes wanted to run in the last minute. None on Windows, which does not count them."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


# ------------------------------------------------------------------ memory


def peak_bytes(call: Callable, device: torch.device) -> int:
    """The most bytes of tensors that a call holds at once beside what was there before; its result counts."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    with count_allocations() as memory:
        call()
    return memory.peak


def free_bytes(device: torch.device) -> float:
    """Memory that is free on a device; infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = _values(Path("/proc/meminfo"), "MemAvailable")  # such as "12345 kB"
    return 1024 * int(available[0].split()[0]) if available else math.inf


def _values(path: Path, name: str) -> list[str]:
    """Of lines "name: value" those of this name; none where there is no such file."""
    lines = path.read_text().splitlines() if path.exists() else []
    pairs = [line.partition(":") for line in lines]
    return [value.strip() for key, _, value in pairs if key.strip() == name]
