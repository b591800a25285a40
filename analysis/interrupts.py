"""What Ctrl-C does to whom."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERRUPTED = 130  # exit code, as shells have it


@contextmanager
def first_interrupt(noted: Callable[[], None]) -> Iterator[None]:
    """Let a first Ctrl-C only be noted: in a step, the state is of no step. A second one ends."""

    def note(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # before, `&` had it ignored
        noted()
        os.write(2, b"\nEnding after this step; Ctrl-C again ends at once.\n")  # print may be busy

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Let Ctrl-C do nothing here, nor in processes that are started meanwhile."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
