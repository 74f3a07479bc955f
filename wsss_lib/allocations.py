"""How much memory a computation holds at its peak: allocations are counted, the same on any machine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch.profiler import ProfilerActivity, profile

CPU = 0  # the trace's number for the device type


@dataclass
class Allocations:
    """Filled in when the `with` ends: bytes of tensors on the CPU, beside what was there at the start."""

    peak: int = 0  # the most that was held at one time
    held: int = 0  # what is still held at the end; negative where something older was freed


@contextmanager
def count_allocations() -> Iterator[Allocations]:
    """`with count_allocations() as memory: ...`, then `memory.peak` and `memory.held`, in bytes.

    Every request to PyTorch's CPU allocator counts, those inside an operator too (the copy that a matrix
    product makes of a transposed input), in whatever thread; memory that PyTorch does not hand out does not.
    What runs inside is slower: count and time in separate runs.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler reports its own doings on stderr
    memory = Allocations()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        yield memory
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]"]
    changes = [change for change in changes if change["args"]["Device Type"] == CPU]
    for change in sorted(changes, key=lambda change: change["ts"]):
        memory.held += change["args"]["Bytes"]
        memory.peak = max(memory.peak, memory.held)
