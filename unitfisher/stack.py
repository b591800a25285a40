"""Several columns of error sent back in one pass, as one tensor that holds a stack of them.

torch's own vmap takes elu's backward column by column. Here a stack goes through a nonlinearity
by one product with its derivative, and through a linear layer by one product with its weight.
"""

from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import Any, Final

import torch
from jaxtyping import Shaped
from torch import Tensor

aten = torch.ops.aten
Rule = Callable[..., Tensor]


class Stack(Tensor):
    """A tensor that has the shape of one column for autograd, and holds r columns.

    It has only operations that treat columns independently: others raise NotImplementedError. It
    has no data pointer: kernels outside torch, which ask for one, get a RuntimeError.
    """

    columns: Tensor

    @staticmethod
    def __new__(cls, columns: Shaped[Tensor, "r ..."]) -> "Stack":
        stack: Stack = Tensor._make_wrapper_subclass(
            cls, columns.shape[1:], dtype=columns.dtype, device=columns.device
        )
        torch._C._set_throw_on_mutable_data_ptr(stack)  # else that pointer would be 0
        stack.columns = columns
        return stack

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> "Stack":
        first, *others = args
        if kwargs or func not in RULES or not isinstance(first, Stack):
            raise NotImplementedError(f"{func} of a stack of columns")
        return cls(RULES[func](first.columns, *others))


def _through(backward: Any) -> Rule:
    """Send columns through an elementwise function by its derivative, which they share."""

    def rule(columns: Tensor, *saved: Any) -> Tensor:
        at = next(x for x in saved if isinstance(x, Tensor))
        derivative: Tensor = backward(torch.ones_like(at), *saved)
        return columns * derivative

    return rule


def _times(columns: Tensor, other: Tensor | float) -> Tensor:
    factor = isinstance(other, Tensor) and other.dim() < columns.dim()
    if isinstance(other, Stack) or not (factor or isinstance(other, float | int)):
        raise NotImplementedError(
            "a stack of columns times anything but a number or one column's tensor"
        )
    return columns * other


def _mm(columns: Tensor, weight: Tensor) -> Tensor:
    return columns @ weight


NONLINEAR = (
    "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu",
    "mish", "silu", "sigmoid", "softplus", "tanh", "threshold",
)  # fmt: skip
BACKWARD = [getattr(aten, f"{name}_backward").default for name in NONLINEAR]
RULES: Final = MappingProxyType(
    {backward: _through(backward) for backward in BACKWARD}
    | {
        aten.detach.default: Tensor.detach,
        aten.mm.default: _mm,
        aten.mul.Tensor: _times,
        aten.native_dropout_backward.default: lambda columns, kept, scale: columns * kept * scale,
        aten.view.default: lambda columns, size: columns.reshape(len(columns), *size),
    }
)


def unstacked(grad: Tensor | None, r: int) -> Tensor | None:
    """Return the columns of a gradient; one that does not depend on them is repeated."""
    if grad is None or not isinstance(grad, Stack):
        return grad if grad is None else grad.expand(r, *grad.shape)
    return grad.columns
