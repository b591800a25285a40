"""Runs a model and restores its modes, its buffers and the random states."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode; at the end restore modes, buffers and random states.

    Flags are set one by one: a model's own ``train`` may do more than change them. Recurrent layers
    stay in training mode, without dropout, which is the same: cuDNN has no backward pass in eval.
    """
    modes = [(module, module.training) for module in model.modules()]
    recurrent = [(m, m.dropout) for m in model.modules() if isinstance(m, nn.RNNBase)]
    try:
        with kept(model):
            for module, _ in modes:
                module.training = isinstance(module, nn.RNNBase)
            for module, _ in recurrent:
                module.dropout = 0.0
            yield
    finally:
        for module, training in modes:
            module.training = training
        for module, dropout in recurrent:
            module.dropout = dropout


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Restore buffers and random states at the end, whatever a forward pass does to them.

    Sending errors back may run forward passes too, of checkpointed segments.
    """
    modules = list(model.modules())
    owned = [(module, dict(module._buffers)) for module in modules if module._buffers]
    distinct = {id(b): b for _, own in owned for b in own.values() if b is not None}
    values = [(b, b.clone()) for b in distinct.values() if not _overlaps(b)]
    devices = {p.device for m in modules for p in m._parameters.values() if p is not None}
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng([]))
            for device in devices:
                if device.type not in ("cpu", "meta"):
                    stack.enter_context(torch.random.fork_rng([device], device_type=device.type))
            yield
    finally:
        for module, buffers in owned:
            module._buffers.update(buffers)
        for buffer, value in values:
            buffer.data.copy_(value)  # .data: like batch norm, no new version for autograd


def _overlaps(buffer: Tensor) -> bool:
    """Whether elements share memory (``expand``): such a buffer cannot be written to."""
    return buffer.layout is torch.strided and torch._debug_has_internal_overlap(buffer) == 1


def device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
