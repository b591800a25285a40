"""What is computed of a pass is not rounded as the pass may be."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, Final

import torch


class Ieee:
    """Products without reduced precision, as long as any thread is inside: flags are all threads'.

    They are left as they were when the first one came in.
    """

    def __init__(self) -> None:
        self.lock, self.inside = Lock(), 0
        self.asked: list[str] = []

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.asked = [backend.fp32_precision for backend in _backends()]
                for backend in _backends():
                    backend.fp32_precision = "ieee"
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside:
                return
            for backend, precision in zip(_backends(), self.asked, strict=True):
                backend.fp32_precision = "none"  # as torch.backends.fp32_precision says
                if backend.fp32_precision != precision:
                    backend.fp32_precision = precision


IEEE: Final = Ieee()


def _backends() -> tuple[Any, Any]:
    mkldnn: Any = torch.backends.mkldnn  # its stub does not know of matmul
    return torch.backends.cuda.matmul, mkldnn.matmul


@contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Compute without autocast, reduced-precision products or a graph of our own."""
    exact = torch.autocast(device.type, enabled=False)
    with IEEE, torch.inference_mode(False), torch.no_grad(), exact:
        yield
