"""Systems diag(v) K diag(v) + ε I of some hundred cases, factored in single precision.

That takes half the time. Iterative refinement brings solutions to double precision: residuals are
computed in double, by products that the units share, and solved for with the same factor, until
they are as small as a factor in double leaves them: natural gradients, which are differences of
such solutions divided by ε, need that. Units too ill-conditioned for it are factored in double.
"""

import torch
from jaxtyping import Bool, Float, Float32, Float64
from torch import Tensor

from unitfisher import native
from unitfisher.costs import REFINED
from unitfisher.gram import GramSolution, Scaled, Task, products, solve_others
from unitfisher.native import Kernel
from unitfisher.solvers import outer, substituted

MANY_UNITS = 16  # of a group at least: they share products and fill vectors
RESIDUAL = 4 * torch.finfo(torch.float64).eps  # of the solution's norm, at which a unit stops
STEPS = 12
SLOW = 0.1  # a step that leaves more of the residual shows a factor of little use
TOGETHER = 16  # units a thread: the floats of the longest vector register


def pays(K: Float[Tensor, "g n n"], units: int) -> bool:
    """Whether this is faster than factoring in double precision."""
    return K.shape[-1] >= REFINED and units >= MANY_UNITS * len(K) and K.device.type == "cpu"


def solve_refined(
    K: Float64[Tensor, "g n n"],
    v: Float64[Tensor, "u n"],
    epsilon: Float64[Tensor, " u"],
    rhs: Float64[Tensor, "u r n"],
) -> GramSolution:
    """Solve (diag(v_u) K diag(v_u) + ε_u I) Y_u = rhs_u, ε > 0, with one K for each group of units.

    Units are treated in parts whose factors stay in the cache.
    """
    together, groups = (TOGETHER if native.compiled() else 1) * torch.get_num_threads(), len(K)
    found = []
    for gram, *operands in zip(K, *(x.chunk(groups) for x in (v, epsilon, rhs)), strict=True):
        root = gram.diagonal().sqrt()
        root = torch.where(root > 0, root, 1.0)
        correlation = (gram / torch.outer(root, root)).float()
        for part in zip(*(x.split(together) for x in operands), strict=True):
            found.append(_of_part(gram, correlation, root, *part))
    Y, refined = (torch.cat(parts) for parts in zip(*found, strict=True))
    regular = solve_others(Y, ~refined, K, v, epsilon, rhs)
    return GramSolution(Y, regular, products(Y, rhs))


def _of_part(
    K: Float64[Tensor, "n n"],
    correlation: Float32[Tensor, "n n"],
    root: Float64[Tensor, " n"],
    v: Float64[Tensor, "u n"],
    epsilon: Float64[Tensor, " u"],
    rhs: Float64[Tensor, "u r n"],
) -> tuple[Float64[Tensor, "u r n"], Bool[Tensor, " u"]]:
    """Return solutions, and which units have converged."""
    scaled, divisor = Scaled.of(K, v, epsilon)
    factors = Factors(correlation, (scaled.t * root).float(), scaled.own.float())
    b = (rhs / divisor.unsqueeze(1)).flatten(0, 1)
    scaled = scaled.at(torch.arange(len(b), device=b.device) // rhs.shape[1])
    left = size = torch.linalg.vector_norm(b, dim=-1, keepdim=True)
    y, done = factors.solve(b, size), size == 0
    for _ in range(STEPS):
        rest = b - scaled.times(y, K)
        before, left = left, torch.linalg.vector_norm(rest, dim=-1, keepdim=True)
        ratio = left / torch.where(before > 0, before, 1.0)
        y += factors.solve(rest, left)
        # the residual expected after this step, and what Cholesky in double precision leaves
        done |= left * ratio <= RESIDUAL * torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        if bool((done | ~(ratio <= SLOW)).all()):
            break
    Y = y.view_as(rhs) / divisor.unsqueeze(1)
    return Y, done.view(len(v), -1).all(1)


class Factors:
    """Cholesky factors of diag(own) + diag(t) K diag(t), one for each unit, kept in the cache."""

    def __init__(
        self,
        K: Float32[Tensor, "n n"],
        t: Float32[Tensor, "u n"],
        own: Float32[Tensor, "u n"],
    ) -> None:
        self.given = K, t, own
        self.kernel = native.kernel("solve_grams_single", K, dtype=torch.float32)
        self.L: Tensor | None = None

    def solve(
        self, b: Float64[Tensor, "w n"], size: Float64[Tensor, "w 1"]
    ) -> Float64[Tensor, "w n"]:
        """Solve for right-hand sides of norm ``size``, as many a unit; NaN without a factor."""
        size = torch.where(size > 0, size, 1.0)
        rhs = (b / size).float().unflatten(0, (len(self.given[1]), -1))
        Y = self._by_torch(rhs) if self.kernel is None else self._by_kernel(self.kernel, rhs)
        return Y.flatten(0, 1) * size

    def _by_kernel(self, kernel: Kernel, rhs: Float32[Tensor, "u r n"]) -> Float32[Tensor, "u r n"]:
        (K, t, own), (u, r, n), known = self.given, rhs.shape, self.L is not None
        if self.L is None:
            self.none = torch.zeros_like(t)
            self.regular = t.new_empty(u, dtype=torch.bool)
            self.L = t.new_empty(-(-u // TOGETHER) * TOGETHER * (n + 3) * (n + 7) // 2)
        Y = torch.empty_like(rhs)
        given = [x.data_ptr() for x in (K, t, own, rhs, self.none, self.none, Y)]
        kept = self.L.data_ptr(), self.regular.data_ptr()
        task = Task(*given, None, *kept, u, n, r, u, known, 0)
        native.run(kernel, task, u * n**2 * (4 * r + (0 if known else n // 3)))
        return Y

    def _by_torch(self, rhs: Float32[Tensor, "u r n"]) -> Float32[Tensor, "u r n"]:
        if self.L is None:
            K, t, own = self.given
            self.L, info = torch.linalg.cholesky_ex(outer(t, t).mul_(K) + torch.diag_embed(own))
            self.L[info != 0] = torch.nan
        return substituted(self.L, rhs.mT).mT
