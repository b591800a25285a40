"""Which training passes are measured: every n-th, by a predicate, or by a share of the time."""

import time
from collections import deque
from collections.abc import Callable
from statistics import median

import torch

Schedule = int | Callable[[int], bool]
EVERY = 50  # training passes, by default


def due(schedule: Schedule, step: int) -> bool:
    return schedule(step) if callable(schedule) else step % schedule == 0


def wait_for_gpu() -> None:
    """Wait for what a GPU has been given to do, if one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Overhead:
    """Measures as often as a share of the training time allows.

    A measurement is due when this share of the training time so far covers all measurements and
    one more, as long as the newest. A step is timed from its forward pass to the next one's, so
    that all work for a measurement counts; a pause (evaluation, a checkpoint) counts as no more
    than two steps. The first pass is always measured, and its time covered before the second one.

    A GPU falls behind the clock: it is waited for before a measured step, so that no plain step's
    work counts as measuring, and after it.

    Args:
        share: Time of measuring over time of plain training, above 0.
        clock: Returns seconds.
        wait: Returns when all work given to a device is done.
    """

    def __init__(
        self,
        share: float,
        clock: Callable[[], float] = time.perf_counter,
        wait: Callable[[], None] = wait_for_gpu,
    ) -> None:
        self.share, self.clock, self.wait = share, clock, wait
        self.plain: deque[float] = deque(maxlen=32)  # seconds of the newest plain steps
        self.usual = 0.0  # their median
        self.plain_time = self.measured_time = 0.0  # seconds of steps without and with one
        self.newest = 0.0  # seconds of the newest measured step
        self.measurements = 0
        self.started: float | None = None  # when the current step began
        self.measuring = False

    def __call__(self, step: int) -> bool:
        if self.measuring:
            self.wait()
        now = self.clock()
        if self.started is not None:
            self._book(now - self.started)
        training = self.plain_time + self.measurements * self.usual
        spent = self.measured_time - self.measurements * self.usual
        cost = self.newest - self.usual
        self.started, self.measuring = now, self.share * training >= spent + cost
        if self.measuring:
            self.wait()
            self.started = self.clock()
            self.plain_time += self.started - now
        return self.measuring

    def __repr__(self) -> str:
        return f"Overhead({self.share})"

    def _book(self, seconds: float) -> None:
        """Count the time of the step that has ended."""
        if self.measuring:
            self.newest = min(seconds, 2 * self.newest) if self.measurements else seconds
            self.measured_time += self.newest
            self.measurements += 1
        else:
            self.plain.append(seconds)
            self.usual = median(self.plain)
            self.plain_time += min(seconds, 2 * self.usual)
