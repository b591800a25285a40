"""Two hooks on a model: between them a pass in training is watched, if its Monitor wants that.

Passes in eval mode, without gradients, inside ``torch.func``, in a compiler's trace, without
numbers (on the meta device, of fake tensors), captured as a CUDA graph or in a recomputation during
backward are no training passes.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from unitfisher.calls import Seen
from unitfisher.capture import Hook, capture
from unitfisher.chain import Chain
from unitfisher.record import Run

WITHOUT_NUMBERS = torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY
STANDING: WeakSet["Live"] = WeakSet()  # on models


class Wanted(NamedTuple):
    """What a Monitor wants of a training pass."""

    step: int
    errors: bool  # the whole measurement
    averages: bool  # mean and variance of the outputs
    targets: Tensor | None


class Live:
    """Stands on a model until it is removed.

    Args:
        model: Whose passes are watched.
        layers: What is watched in them.
        begin: Called at every training pass; says what is wanted of it, None for nothing.
        end: Called when a wanted pass has ended, with what was seen and what forward returned.
        run: To which what is wanted goes, where others may write to it, too.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        begin: Callable[[], Wanted | None],
        end: Callable[[Seen, Any, Wanted], None],
        run: Run | None = None,
    ) -> None:
        self.layers, self.begin, self.end, self.run = layers, begin, end, run
        self.chain = Chain()
        self._watched: tuple[ExitStack, Seen, Wanted] | None = None
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
        self._drop()  # a pass that was interrupted
        wanted = self.begin() if _trains(model) and self._has_numbers() else None
        if wanted is not None:
            self._come_last(model._forward_hooks)
            stack = ExitStack()
            watched = capture(self.layers, follow=not self.chain.links, look=wanted.errors)
            self._watched = stack, stack.enter_context(watched), wanted

    def _has_numbers(self) -> bool:
        """Look at one weight: to find the model's device takes longer than all else here."""
        weight = next(iter(self.layers.values()))._parameters.get("weight")
        return weight is None or not weight.is_meta

    def _come_last(self, hooks: dict[int, Callable[..., Any]]) -> None:
        """Stand behind hooks that were registered later: they may change the output."""
        if next(reversed(hooks)) != self._last.id:
            hooks[self._last.id] = hooks.pop(self._last.id)

    def _after(self, model: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        if self._watched is None or model is not self.model:
            return
        (stack, seen, wanted), self._watched = self._watched, None
        stack.close()
        if result is not None:  # else forward raised, and this hook runs on the way out
            self.chain.settle(seen, result)
            self.end(seen, result, wanted)

    def _drop(self) -> None:
        if self._watched is not None:
            (stack, *_), self._watched = self._watched, None
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
