"""What tests of runs share."""

import time
from collections.abc import Callable

from unitfisher.record import Run

NEVER = float("inf")


def parts(run: Run, table: str = "units") -> list[str]:
    return sorted(path.name for path in (run.folder / table).iterdir())


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
