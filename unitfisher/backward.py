"""Backpropagation of columns from the model's output to the units: δ = ∂ ln p(y | z) / ∂net.

Several columns share one backward pass through the graph that the forward pass has built.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge

from unitfisher.calls import Seen
from unitfisher.columns import ROOT, Estimator
from unitfisher.likelihoods import Output, OutputError
from unitfisher.memory import workspace
from unitfisher.stack import Stack, unstacked

Grads = tuple[Tensor | None, ...]
Send = Callable[[Tensor, Sequence[GradientEdge], Tensor], Grads]


@dataclass(frozen=True)
class Backward:
    """The graph from a model's output back to the layers."""

    output: Tensor
    edges: Sequence[GradientEdge]  # where ∂/∂net arrives
    half: bool = False  # does the graph contain float16 tensors?

    def send_all_back(self, blocks: Iterator[Float[Tensor, "r n t y"]]) -> Iterator[Grads]:
        """Send blocks of columns back, the columns of a block together where the graph allows it.

        A block goes as a `Stack`; if the graph has operations without a rule for that, through
        ``vmap``; if some have no batching rule either (checkpointed segments, custom functions),
        column by column. The result is the same. What failed once is not tried again.
        """
        ways = [_stacked, _vmapped]
        for block in blocks:
            while ways and len(block) > 1:
                try:
                    yield self._send(ways[0], block)
                    break
                except torch.OutOfMemoryError:
                    raise
                except Exception:  # a custom function may raise anything on a tensor subclass
                    ways.pop(0)
            else:
                for column in block.split(1):
                    yield self.send_back(column)

    def send_back(self, column: Float[Tensor, "1 n t y"]) -> Grads:
        """Return δ at each edge, (1, *net.shape); None where the output does not depend on it.

        Raises:
            OutputError: Reentrant checkpointing, which has no gradients at inner edges.
        """
        try:
            return self._send(_alone, column)
        except RuntimeError as error:
            if "use_reentrant=True" not in str(error):
                raise
            raise OutputError(
                "errors cannot be sent back through reentrant checkpointing: use "
                "torch.utils.checkpoint(..., use_reentrant=False), or observe only the layers "
                "behind it (layers=...)"
            ) from error
        except Exception as error:
            error.add_note(
                "This backward function was called by unitfisher, before the training calls it: "
                "a function whose backward works only once cannot be measured through."
            )
            raise

    def _send(self, way: Send, block: Float[Tensor, "r n t y"]) -> Grads:
        """Send a block back; through float16 scaled to at most 1, or small entries become zero."""
        if not self.half:
            return way(self.output, self.edges, block)
        _, exponent = block.abs().amax().frexp()
        grads = way(self.output, self.edges, block.ldexp(-exponent))
        return tuple(None if g is None else g.float().ldexp(exponent) for g in grads)


def _alone(output: Tensor, edges: Sequence[GradientEdge], column: Tensor) -> Grads:
    grads = _back(output, edges, _cotangent(output, column)[0])
    return tuple(None if g is None else g.unsqueeze(0) for g in grads)


def _stacked(output: Tensor, edges: Sequence[GradientEdge], block: Tensor) -> Grads:
    grads = _back(output, edges, Stack(_cotangent(output, block)))
    return tuple(unstacked(g, len(block)) for g in grads)


def _vmapped(output: Tensor, edges: Sequence[GradientEdge], block: Tensor) -> Grads:
    # is_grads_batched=True would take the backward of convolutions and others column by column
    reached: list[bool] = []

    def back(column: Tensor) -> Grads:
        grads = _back(output, edges, column)
        reached[:] = [g is not None for g in grads]
        return tuple(g for g in grads if g is not None)

    found = iter(torch.func.vmap(back)(_cotangent(output, block)))
    return tuple(next(found) if each else None for each in reached)


def _back(output: Tensor, edges: Sequence[GradientEdge], S: Tensor) -> Grads:
    return torch.autograd.grad(output, edges, grad_outputs=S, retain_graph=True, allow_unused=True)


def _cotangent(output: Tensor, column: Float[Tensor, "r n t y"]) -> Tensor:
    return column.reshape(len(column), *output.shape).to(output)


def bytes_of_column(z: Output, seen: Seen, estimator: Estimator) -> int:
    """Return the bytes that a column needs: its root, gradients at and between layers, squares."""
    roots = z if estimator.fisher == "rademacher" else z[:, :1]
    item, largest = z.element_size(), seen.largest
    return (
        ROOT * roots.numel()
        + item * (3 * z.numel() + seen.net_numbers + 3 * largest)
        + 20 * largest
    )


def columns_together(output: Tensor, column: int, convolutional: bool) -> int:
    """Return how many columns, of ``column`` bytes each, to send back at once.

    On a CPU a convolution's batched backward leaves the cache and is slower than a loop.
    """
    if convolutional and output.device.type == "cpu":
        return 1
    return max(1, workspace() // column)
