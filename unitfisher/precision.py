"""Measurements are computed in full precision, whatever the precision of the measured pass."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, Final

import torch
from torch import Tensor


class Ieee:
    """Products and convolutions in full precision while any thread is inside: flags are global.

    They are restored, when the last thread leaves, to what they were when the first one entered.
    """

    def __init__(self) -> None:
        self.lock, self.inside = Lock(), 0
        self.asked: list[tuple[Any, str]] = []

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.asked = [(backend, backend.fp32_precision) for backend in _backends()]
                for backend, _ in self.asked:
                    backend.fp32_precision = "ieee"
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside:
                return
            for backend, precision in self.asked:
                if backend not in _of_cudnn():  # which has a default of its own to fall back to
                    backend.fp32_precision = "none"  # follow torch.backends.fp32_precision
                if backend.fp32_precision != precision:
                    backend.fp32_precision = precision


IEEE: Final = Ieee()


def _backends() -> list[Any]:
    mkldnn: Any = torch.backends.mkldnn  # its type stub lacks these
    on_cpu = [mkldnn.matmul, mkldnn.conv, mkldnn.rnn]
    on_gpu = _of_cudnn() if torch.cuda.is_initialized() else []
    return [torch.backends.cuda.matmul, *on_cpu, *on_gpu]


def _of_cudnn() -> list[Any]:
    cudnn: Any = torch.backends.cudnn
    return [cudnn.conv, cudnn.rnn]


def measuring(device: torch.device) -> torch.device:
    """Return where a device's tensors are measured: the CPU if it has no double precision."""
    return device if device.type == "cpu" or _has_double(device) else torch.device("cpu")


def measurable(x: Tensor) -> Tensor:
    """Return x where it is measured, as above."""
    return x if x.is_cpu else x.to(measuring(x.device))


@functools.cache
def _has_double(device: torch.device) -> bool:
    """Whether a device has double precision: Apple's GPUs do not."""
    try:
        torch.zeros((), dtype=torch.float64, device=device).add_(1)
    except (RuntimeError, TypeError):
        return False
    return True


@contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Compute without autocast, reduced-precision products or an autograd graph."""
    exact = torch.autocast(device.type, enabled=False)
    with IEEE, torch.inference_mode(False), torch.no_grad(), exact:
        yield
