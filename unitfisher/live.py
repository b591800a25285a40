"""Two hooks on a model, between which a training pass is watched if the Monitor asks for it.

Passes do not count as training passes in eval mode, without gradients, inside ``torch.func``, in a
compiler's trace, without numbers (meta device, fake tensors), while a CUDA graph is captured, or in
a recomputation during backward.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from types import FrameType
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from unitfisher.calls import Seen
from unitfisher.capture import Hook, capture
from unitfisher.chain import Chain
from unitfisher.record import Run

WITHOUT_NUMBERS = torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY
STANDING: WeakSet["Live"] = WeakSet()  # all that are on models now


class Wanted(NamedTuple):
    """What a Monitor wants to have from a training pass."""

    step: int
    errors: bool  # the whole measurement
    averages: bool  # mean and variance of the outputs
    targets: Tensor | None


class Live:
    """The hooks on a model, from construction until `remove`.

    Args:
        model: The model to watch.
        layers: The layers to watch, by name.
        begin: Called at every training pass; returns what is wanted of it, None for nothing.
        end: Called after a wanted pass, with what was seen, forward's result and what was wanted.
        detach: Detaches the Monitor whose this is.
        run: The run that results are written to, if any; other Monitors may write to it, too.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        begin: Callable[[], Wanted | None],
        end: Callable[[Seen, Any, Wanted], None],
        detach: Callable[[], None],
        run: Run | None = None,
    ) -> None:
        self.layers, self.begin, self.end, self.run = layers, begin, end, run
        self.detach = detach
        self.chain = Chain()
        self._watched: tuple[ExitStack, Seen, Wanted] | None = None
        self._frame: FrameType | None = None  # in which the watched pass runs
        self._inner = 0  # passes under way inside it
        self.model = model
        self._last = model.register_forward_hook(Hook(self._after), always_call=True)
        self._handles = [model.register_forward_pre_hook(Hook(self._before)), self._last]
        STANDING.add(self)

    def remove(self) -> None:
        """Take the hooks off; safe to call twice."""
        for handle in self._handles:
            handle.remove()
        STANDING.discard(self)
        self._drop()

    def _before(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if model is not self.model:
            return  # a replica, in a thread of its own
        wanted = self.begin() if _trains(model) and self._has_numbers() else None
        if wanted is None and self._watched is not None and self._is_inside():
            self._watched[1].paused, self._inner = True, self._inner + 1
            return
        self._drop()  # of a pass that was interrupted
        if wanted is not None:
            calls = vars(nn.modules.module)
            self._frame = next(frame for frame in _frames() if frame.f_globals is calls)
            self._come_last(model._forward_hooks)
            stack = ExitStack()
            watched = capture(self.layers, follow=not self.chain.links, look=wanted.errors)
            self._watched = stack, stack.enter_context(watched), wanted

    def _has_numbers(self) -> bool:
        """Check one weight only: to find the model's device takes longer than all else here."""
        weight = next(iter(self.layers.values()))._parameters.get("weight")
        return weight is None or not weight.is_meta

    def _come_last(self, hooks: dict[int, Callable[..., Any]]) -> None:
        """Move our hook behind those registered later, which may change the output."""
        if next(reversed(hooks)) != self._last.id:
            hooks[self._last.id] = hooks.pop(self._last.id)

    def _after(self, model: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        if self._watched is None or model is not self.model:
            return
        _, seen, wanted = self._watched
        if self._inner:
            self._inner -= 1
            seen.paused = self._inner > 0
            return
        self._drop()
        if result is not None:  # else forward raised, and this hook runs on the way out
            self.chain.settle(seen, result)
            self.end(seen, result, wanted)

    def _is_inside(self) -> bool:
        """Say whether the watched pass is under way, and was not interrupted."""
        return any(frame is self._frame for frame in _frames())

    def _drop(self) -> None:
        if self._watched is not None:
            (stack, *_), self._watched = self._watched, None
            self._frame, self._inner = None, 0
            stack.close()


def _trains(model: nn.Module) -> bool:
    return (
        model.training
        and model._compiled_call_impl is None
        and torch.is_grad_enabled()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and torch._C._current_graph_task_id() == -1
        and not any(torch._C._get_dispatch_mode(mode) for mode in WITHOUT_NUMBERS)
        and not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    )


def _frames() -> Iterator[FrameType]:
    """Yield the calls under way in this thread, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
