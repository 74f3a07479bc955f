"""The tests run in several processes, each with one core and a folder of its own: else they get in each other's way."""

import os
from pathlib import Path

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; notebooks and commands inherit it
    os.environ.setdefault("WSSS_RUNS", str(Path(__file__).parent.parent / "runs" / f"tests_{worker}"))
