"""From the model's output back to the units: δ = ∂ ln p(y | z) / ∂net, for column after column.

Several at once go through one backward pass of the graph that the forward pass has built.
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
    half: bool = False  # do float16 numbers lie between?

    def send_all_back(self, blocks: Iterator[Float[Tensor, "r n t y"]]) -> Iterator[Grads]:
        """Send block after block of columns back, together where the graph allows it.

        Operations that a stack of columns does not know are vmapped; those without a batching rule
        (checkpointed segments, custom functions) take their columns one by one, with the same
        result.
        """
        ways = [_stacked, _vmapped]
        for block in blocks:
            while ways and len(block) > 1:
                try:
                    yield self._send(ways[0], block)
                    break
                except Exception:  # whatever a custom function does with what is no plain tensor
                    ways.pop(0)
            else:
                for column in block.split(1):
                    yield self.send_back(column)

    def send_back(self, column: Float[Tensor, "1 n t y"]) -> Grads:
        """Return ∂/∂net at each edge, (1, *net.shape); None where the output does not depend.

        Raises:
            OutputError: The graph cannot be gone through by parts (reentrant checkpointing).
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
                "This backward function was called by unitfisher, which sends errors back before "
                "the training does: one that works only once cannot be measured through."
            )
            raise

    def _send(self, way: Send, block: Float[Tensor, "r n t y"]) -> Grads:
        """Send columns as large as half precision takes them; small ones would become zero."""
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
    return _back(output, edges, _cotangent(output, block), is_grads_batched=True)


def _back(
    output: Tensor, edges: Sequence[GradientEdge], S: Tensor, *, is_grads_batched: bool = False
) -> Grads:
    return torch.autograd.grad(
        output,
        edges,
        grad_outputs=S,
        retain_graph=True,
        allow_unused=True,
        is_grads_batched=is_grads_batched,
    )


def _cotangent(output: Tensor, column: Float[Tensor, "r n t y"]) -> Tensor:
    return column.reshape(len(column), *output.shape).to(output.dtype)


def bytes_of_column(z: Output, seen: Seen, estimator: Estimator) -> int:
    """What a column takes on its way: its root, gradients at the layers and between, squares."""
    roots = z if estimator.fisher == "rademacher" else z[:, :1]
    item, largest = z.element_size(), seen.largest
    return (
        ROOT * roots.numel()
        + item * (3 * z.numel() + seen.net_numbers + 3 * largest)
        + 20 * largest
    )


def columns_together(output: Tensor, column: int, convolutional: bool) -> int:
    """How many columns of so many bytes to send back at once.

    On a CPU a convolution's batched backward leaves the cache and loses to a loop.
    """
    if convolutional and output.device.type == "cpu":
        return 1
    return max(1, workspace() // column)
