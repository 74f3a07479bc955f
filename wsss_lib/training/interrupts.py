"""Ctrl-C and SIGTERM noted, not obeyed at once, so that no training step is cut in two."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def noted_signals() -> Iterator[list[BaseException]]:
    """Note Ctrl-C and SIGTERM in the yielded list, as what they will raise; the second one raises itself."""
    received: list[BaseException] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers
        return

    def note(number: int, frame: Any) -> None:
        received.append(KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number))
        if len(received) > 1:
            raise received[-1]

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)


def ignore_interrupt(worker: int) -> None:
    """For worker processes: Ctrl-C in a terminal reaches them too, but the training process decides when they end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
