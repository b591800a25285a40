"""D = E_y δ² of linear layers in a row, by a kernel in C.

Where nothing but an elementwise function stands between one layer and the next, a column of errors
goes down by one product with a weight and one with a derivative. The kernel takes all columns of a
few cases the whole way at once and keeps nothing of them but their squares.
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

ROWS = 144  # taken down together: as many as leave room for weights in the cache
LINEAR = {"Addmm", "Mm"}
ELEMENTWISE = {
    *("Celu", "Clamp", "ClampMax", "ClampMin", "Elu", "Gelu", "Hardsigmoid", "Hardswish"),
    *("Hardtanh", "LeakyRelu", "Mish", "Relu", "Sigmoid", "Silu", "Softplus", "Tanh", "Threshold"),
}


class Layer(ctypes.Structure):
    """As in cascade.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "derivative", "root")),
        *((name, ctypes.c_int64) for name in ("units", "inputs", "stride")),
    )


class Task(native.Task):
    """As in cascade.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("layers", "columns")),
        *((name, ctypes.c_int64) for name in ("count", "r", "widest", "together", "u", "taken")),
    )


class Cascade(NamedTuple):
    """The layers that one pass has gone through in a row."""

    kernel: Kernel
    cases: int
    weights: list[Float[Tensor, "_ _"]]
    derivatives: list[Float[Tensor, "n _"] | None]  # of the function behind each layer; None: 1

    @classmethod
    def of(cls, seen: Seen, output: Tensor) -> "Cascade | None":
        """Take a pass whose layers stand in a row; None for any other, or where no kernel is."""
        pairs = list(zip(seen.calls, seen.row, strict=False))
        if not pairs or seen.row[-1] is not output or _recomputed():
            return None
        once = len(seen.by_layer()) == len(seen.calls)
        if not (once and all(_plain(call, received) for call, received in pairs)):
            return None
        layers = [call.module for call in seen.calls]
        weights = [of.weight.detach().contiguous() for of in layers if isinstance(of, nn.Linear)]
        kernel = native.kernel("cascade", *weights, dtype=torch.float32)
        going_down = 2 * ROWS * torch.get_num_threads() * max(map(len, weights))
        if kernel is None or 4 * (seen.net_numbers + going_down) > workspace():
            return None
        derivatives = [_derivative(call, received) for call, received in pairs]
        return cls(kernel, output.shape[0], weights, derivatives)

    def send(
        self, blocks: Iterable[Float[Tensor, "_ n 1 y"]]
    ) -> Iterator[tuple[Float[Tensor, "1 n _"], ...]]:
        """Send all columns back; yield for each layer one that stands for them, √D."""
        widths = [len(weight) for weight in self.weights]
        roots = self.weights[0].new_zeros(self.cases, sum(widths))
        layers = self._downward(roots.split(widths, 1))
        last, flop = self.derivatives[-1], sum(weight.numel() for weight in self.weights[1:])
        for block in (part for all_columns in blocks for part in all_columns.split(ROWS)):
            columns = block.squeeze(2) if last is None else block.squeeze(2) * last
            columns, r = columns.float().contiguous(), len(block)
            together = max(1, min(ROWS // r, -(-self.cases // torch.get_num_threads())))
            given = len(widths), r, max(widths), together, self.cases
            task = Task(ctypes.addressof(layers), columns.data_ptr(), *given, 0)
            native.run(self.kernel, task, r * self.cases * flop)
        yield roots.unsqueeze(0).split(widths, 2)

    def _downward(self, roots: Sequence[Float[Tensor, "n _"]]) -> "ctypes.Array[Layer]":
        layers = [
            Layer(
                weight.data_ptr(),
                None if of_input is None else of_input.data_ptr(),
                root.data_ptr(),
                *weight.shape,
                root.stride(0),
            )
            for weight, of_input, root in zip(
                self.weights, [None, *self.derivatives[:-1]], roots, strict=True
            )
        ]
        return (Layer * len(layers))(*reversed(layers))


def _plain(call: Call, received: Tensor) -> bool:
    """Nothing but a product and an elementwise function, and no hook that might change errors.

    A weight that is made from activations would be another way for errors.
    """
    if type(call.module) is not nn.Linear or call.y.dim() != 2 or call.edge is None:
        return False
    layer, behind = call.edge.node, received.grad_fn
    known = behind is layer or operation(behind) in ELEMENTWISE
    single = native.plain(call.y.detach(), torch.float32)
    hooks = call.y._backward_hooks or received._backward_hooks
    given = all(p is None or p.is_leaf for p in (call.module.weight, call.module.bias))
    return operation(layer) in LINEAR and known and single and given and not hooks


def operation(node: Node | None) -> str:
    """Read the name of "EluBackward0", whose number tells variants apart, in place or not."""
    return "" if node is None else node.name().partition("Backward")[0]


def _derivative(call: Call, received: Tensor) -> Float[Tensor, "n u"] | None:
    """Ask the node of the function, which has kept what it needs for that."""
    behind: Any = received.grad_fn
    if call.edge is None or behind is call.edge.node:
        return None
    derivative: Tensor = behind(received.new_ones(()).expand_as(received))
    return derivative.contiguous()


def _recomputed() -> bool:
    """Tell whether nodes keep nothing here: what they are asked would run the model again."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
