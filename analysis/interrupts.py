"""How scripts and their processes respond to Ctrl-C."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERRUPTED = 130  # exit code, as shells have it


@contextmanager
def first_interrupt(noted: Callable[[], None]) -> Iterator[None]:
    """Call ``noted`` on a first Ctrl-C, and let the step at hand end; a second one interrupts."""

    def note(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # even if `&` had it ignored
        noted()
        os.write(
            2, b"\nEnding after this step; Ctrl-C again ends at once.\n"
        )  # print is not reentrant

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
