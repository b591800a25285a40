"""D = E_y δ² of a chain of linear layers, by a kernel in C.

Where only an elementwise function stands between two layers, a column of errors is sent back by a
product with the weight and one with the function's derivative. The kernel takes all columns of a
few cases through all layers at once, and keeps only their squares.
"""

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import Node

from unitfisher import native
from unitfisher.calls import Call, Seen
from unitfisher.memory import workspace
from unitfisher.native import Kernel

ROWS = 144  # errors sent back together: as many as leave the weights room in the cache
LINEAR = {"Addmm", "Mm"}
ELEMENTWISE = {
    "Celu", "Clamp", "ClampMax", "ClampMin", "Elu", "Gelu", "Hardsigmoid", "Hardswish", "Hardtanh",
    "LeakyRelu", "Mish", "Relu", "Sigmoid", "Silu", "Softplus", "Tanh", "Threshold",
}  # fmt: skip


class Layer(ctypes.Structure):
    """The struct Layer of cascade.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "derivative", "root")),
        *((name, ctypes.c_int64) for name in ("units", "inputs", "stride")),
    )


class Task(native.Task):
    """The struct Task of cascade.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("layers", "columns")),
        *((name, ctypes.c_int64) for name in ("count", "r", "widest", "together", "u", "taken")),
    )


class Cascade(NamedTuple):
    """The chain of linear layers of one pass."""

    kernel: Kernel
    cases: int
    weights: list[Float[Tensor, "_ _"]]
    derivatives: list[Float[Tensor, "n _"] | None]  # of the function behind each layer; None: 1

    @classmethod
    def of(cls, seen: Seen, output: Tensor) -> "Cascade | None":
        """Take a pass through a chain; None for any other, without a kernel, or short of memory."""
        pairs = list(zip(seen.calls, seen.row, strict=False))
        if not pairs or seen.row[-1] is not output or _recomputed():
            return None
        once = len(seen.by_layer()) == len(seen.calls)
        if not (once and all(_plain(call, received) for call, received in pairs)):
            return None
        layers = [call.module for call in seen.calls]
        weights = [m.weight.detach().contiguous() for m in layers if isinstance(m, nn.Linear)]
        kernel = native.kernel("cascade", *weights, dtype=torch.float32)
        going_down = 2 * ROWS * torch.get_num_threads() * max(map(len, weights))
        if kernel is None or 4 * (seen.net_numbers + going_down) > workspace():
            return None
        derivatives = [_derivative(call, received) for call, received in pairs]
        return cls(kernel, output.shape[0], weights, derivatives)

    def send(
        self, blocks: Iterable[Float[Tensor, "_ n 1 y"]]
    ) -> Iterator[tuple[Float[Tensor, "1 n _"], ...]]:
        """Send all columns back; yield once, with a single column for each layer: √D."""
        widths = [len(weight) for weight in self.weights]
        roots = self.weights[0].new_zeros(self.cases, sum(widths))
        layers = self._downward(roots.split(widths, 1))
        last, flop = self.derivatives[-1], sum(weight.numel() for weight in self.weights[1:])
        for block in (part for all_columns in blocks for part in all_columns.split(ROWS)):
            columns = block.squeeze(2) if last is None else block.squeeze(2) * last
            columns, r = columns.float().contiguous(), len(block)
            together = max(1, min(ROWS // r, -(-self.cases // torch.get_num_threads())))
            sizes = len(widths), r, max(widths), together, self.cases
            task = Task(ctypes.addressof(layers), columns.data_ptr(), *sizes, 0)
            native.run(self.kernel, task, r * self.cases * flop)
        yield roots.unsqueeze(0).split(widths, 2)

    def _downward(self, roots: Sequence[Float[Tensor, "n _"]]) -> "ctypes.Array[Layer]":
        layers = [
            Layer(
                weight.data_ptr(),
                None if derivative is None else derivative.data_ptr(),
                root.data_ptr(),
                *weight.shape,
                root.stride(0),
            )
            for weight, derivative, root in zip(
                self.weights, [None, *self.derivatives[:-1]], roots, strict=True
            )
        ]
        return (Layer * len(layers))(*reversed(layers))


def _plain(call: Call, received: Tensor) -> bool:
    """Return whether a call is a product and an elementwise function, without hooks on errors.

    Weight and bias must be leaves: through a weight made from activations errors flow as well.
    """
    if type(call.module) is not nn.Linear or call.y.dim() != 2 or call.edge is None:
        return False
    layer, behind = call.edge.node, received.grad_fn
    known = behind is layer or operation(behind) in ELEMENTWISE
    single = native.plain(call.y.detach(), torch.float32)
    hooks = call.y._backward_hooks or received._backward_hooks
    leaves = all(p is None or p.is_leaf for p in (call.module.weight, call.module.bias))
    return operation(layer) in LINEAR and known and single and leaves and not hooks


def operation(node: Node | None) -> str:
    """Return "Elu" for "EluBackward0"; the number distinguishes variants, such as in place."""
    return "" if node is None else node.name().partition("Backward")[0]


def _derivative(call: Call, received: Tensor) -> Float[Tensor, "n u"] | None:
    """Return the derivative of the function behind the layer: its backward applied to ones."""
    behind: Any = received.grad_fn
    if call.edge is None or behind is call.edge.node:
        return None
    derivative: Tensor = behind(received.new_ones(()).expand_as(received))
    return derivative.contiguous()


def _recomputed() -> bool:
    """Return whether saved-tensor hooks are active: backward might run the model again."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
