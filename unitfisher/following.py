"""Follows each preactivation to the nonlinearity that is applied to it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from unitfisher.calls import Call, version_of

NONLINEARITIES = frozenset(
    [
        "celu",
        "clamp",
        "clamp_max",
        "clamp_min",
        "clip",
        "elu",
        "gelu",
        "hardshrink",
        "hardsigmoid",
        "hardswish",
        "hardtanh",
        "leaky_relu",
        "logsigmoid",
        "max",
        "maximum",
        "minimum",
        "mish",
        "prelu",
        "relu",
        "relu6",
        "rrelu",
        "selu",
        "sigmoid",
        "silu",
        "softplus",
        "softshrink",
        "softsign",
        "tanh",
        "tanhshrink",
        "threshold",
        "where",
    ]
)
TRANSPARENT = frozenset(
    [
        "alpha_dropout",
        "batch_norm",
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "feature_alpha_dropout",
        "group_norm",
        "instance_norm",
        "layer_norm",
        "rms_norm",
    ]
)


class Follow(TorchFunctionMode):
    """Follows each preactivation through normalisation and dropout to its nonlinearity.

    A function mode sees ``F.elu(x)``, ``x.relu_()`` and ``nn.ELU()(x)`` alike; module hooks would
    see only the last.
    """

    def __init__(self, retained: list[Tensor]) -> None:
        super().__init__()
        self.retained = retained
        self.open: dict[int, tuple[Call, int, Tensor]] = {}  # by id; held, or ids would be reused

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        call = self._followed(args or kwargs.values()) if self.open else None
        result = func(*args, **kwargs) if call is None else self._step(call, func, args, kwargs)
        if func is Tensor.retain_grad:
            self.retained.append(args[0])
        return result

    def _followed(self, args: Iterable[Any]) -> Call | None:
        """Return the call whose preactivation is read, unless it was changed in place since."""
        for x in args:
            if id(x) in self.open:
                call, version, y = self.open[id(x)]
                if version_of(y) == version:
                    return call
        return None

    def _step(
        self,
        call: Call,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        name = getattr(func, "__name__", "").strip("_")  # F.threshold is _threshold
        transparent, nonlinear = name in TRANSPARENT, name in NONLINEARITIES
        if (
            call.output is None
            and not nonlinear
            and not (transparent and _is_pure(func, args, kwargs))
        ):
            call.take(call.y)
        result = func(*args, **kwargs)
        if transparent:
            self.open[id(result)] = call, version_of(result), result
        elif nonlinear and call.nonlinearity is None:
            whole = isinstance(result, Tensor) and result.shape == call.shape  # not a reducing max
            call.take(result if whole else call.y, name if whole else None)
            if whole:
                self.open = {i: held for i, held in self.open.items() if held[0] is not call}
        return result


def _is_pure(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a function leaves its input unchanged; dropout has a flag for in place."""
    in_place = kwargs.get("inplace", len(args) > 3 and args[3] is True)
    return not (func.__name__.endswith("_") or in_place)
