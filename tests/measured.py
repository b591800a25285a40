"""What tests look at in measurements: numbers, steps, operations, the memory that they take."""

import gc
from collections import Counter
from collections.abc import Callable

from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from unitfisher import Monitor

THEORY = ("mean_q", "s", "k", "corrected_mean", "n_eff", "damping_share", "mean_share_q")
WITH_GRADIENT = ("cosine", "bias_shift_share_gradient", "bias_shift_share_natural")


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function._schema.name] += 1
        return function(*args, **(kwargs or {}))


def measured_steps(monitor: Monitor) -> list[int]:
    return sorted(set(monitor.to_pandas()["step"]))


def peak(run: Callable[[], object]) -> tuple[int, int]:
    """The most bytes that torch held beyond those at the start, and those held at the end."""
    gc.disable()  # or what earlier tests have left would be freed in the midst of it
    try:
        with profile(profile_memory=True) as seen:  # of autograd: events are read when asked for
            result = run()
    finally:
        gc.enable()
    events = [e for e in seen.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    del result
    return most, held
