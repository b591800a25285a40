"""Plans each measurement from shapes, before anything is allocated.

The budget covers what is held beside the pass itself: beside the model's activations and graph.
Everything is of known size but the gradients inside operations that are no observed layers, which
are taken to be as large as the largest observed input or output.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from jaxtyping import Int
from torch import Tensor, nn

from unitfisher.costs import bytes_of_group, bytes_of_passes, bytes_of_sums, least, route_of
from unitfisher.memory import AMPLE, DEFAULT, within
from unitfisher.patches import UNFOLDED_WHOLE
from unitfisher.plan import PIECES, LayerPlan, Plan, too_large
from unitfisher.shapes import Shape, bare

LOG = logging.getLogger("unitfisher")


@dataclass(frozen=True)
class Budget:
    """What a measurement may take, and how it is asked for."""

    memory: int = DEFAULT
    rows: int | None = None
    window: int = 1
    solver: str = "auto"
    damping: float = 0.0
    strict: bool = False  # exceeding it raises; else it only sizes pieces of work
    beside: int | None = None  # what is held of earlier measurements; None: one like this
    summed: bool = False  # sums are kept over batches
    passing: frozenset[str] = frozenset()  # layers whose sums are too large to be kept
    settled: bool = False  # later batches may not add layers to these

    def alone(self, pooled: int) -> "Budget":
        """Return what is left for a batch that is not pooled, beside so many bytes of a window."""
        if self.window == 1:
            return self
        return replace(self, window=1, memory=max(1, self.memory - pooled))

    def over_batches(self, beside: int) -> "Budget":
        """Ask for sums over batches, or passes where these are too large, beside so many bytes."""
        return replace(
            self,
            rows=None,
            window=1,
            solver="sums",
            beside=beside,
            summed=True,
            settled=self.solver == "direct",
        )

    def plan(self, shapes: Mapping[str, Shape], column: int) -> Plan:
        """Plan a measurement.

        Args:
            shapes: Of the layers that took part in a pass.
            column: Bytes that one column of errors takes on its way back.

        Raises:
            MemoryBudgetError: It needs more than it may take; names the layers that need most.
        """
        alike = Counter(shapes.values())
        kept = {name: self._kept(name, s, alike[s] > 1) for name, s in shapes.items()}
        left = self.memory - (self.beside or 0) - sum(kept.values())
        with within(min(AMPLE, left // (2 * PIECES))):  # half of it for what was solved
            layers = tuple(self._of_layer(name, s, kept[name]) for name, s in shapes.items())
        plan = Plan(self.memory, layers, self.beside or 0, 0, column)
        if plan.least > self.memory:
            if (largest := self._largest_sums(shapes)) is not None:
                return replace(self, passing=self.passing | {largest}).plan(shapes, column)
            if self.strict or self.summed:
                raise too_large(plan)
            ample = plan.held + 2 * PIECES * max(AMPLE, plan.least_workspace)
            return replace(self, memory=ample).plan(shapes, column)
        room = min(AMPLE, (self.memory - plan.held) // (2 * PIECES))
        plan = replace(plan, workspace=max(room, plan.least_workspace))
        with within(plan.workspace):
            return replace(plan, layers=tuple(of.parted() for of in layers))

    def _largest_sums(self, shapes: Mapping[str, Shape]) -> str | None:
        """Name the layer that would spare most by passing over the loader instead; None: none."""
        if self.settled or not self.summed:
            return None
        sizes = {name: s.sizes(s.cases) for name, s in shapes.items() if name not in self.passing}
        spared = {
            name: bytes_of_sums(s) - bytes_of_passes(s) for name, s in sizes.items() if not s.joint
        }
        gains = {name: spare for name, spare in spared.items() if spare > 0}
        return max(gains, key=lambda name: gains[name], default=None)

    def _kept(self, name: str, shape: Shape, alike: bool) -> int:
        """Bytes of a layer's cases and results, until the next measurement is complete."""
        if name in self.passing:  # results take the place of what solving has taken
            cases = shape.cases * shape.bytes_of_case
            return shape.bytes_observing + cases + bytes_of_passes(shape.sizes(shape.cases))
        pooled, solved, passed = self.window * shape.cases, self._solved(shape), shape.bytes_of_pass
        cases = (self.window > 1) * (1 + (shape.folded > 0)) * pooled  # unfolded, side by side
        cases += ((solved < pooled) + alike) * solved  # drawn, beside others of its form
        held, results = self.window * passed, 3 * shape.bytes_of_results
        if self.beside is None:
            newest = passed if self._as_it_came(shape) else solved * shape.bytes_of_case
            held, results = held + newest, results + shape.bytes_of_results
        sums = bytes_of_sums(shape.sizes(shape.cases)) * self.summed
        return shape.bytes_observing + held + cases * shape.bytes_of_case + results + sums

    def _as_it_came(self, shape: Shape) -> bool:
        """Whether a pass is solved as it is, neither pooled with others nor drawn from."""
        return self.window == 1 and self._solved(shape) == shape.cases

    def _solved(self, shape: Shape) -> int:
        pooled = self.window * shape.cases
        return pooled if self.rows is None else min(self.rows, pooled)

    def _of_layer(self, name: str, shape: Shape, kept: int) -> LayerPlan:
        sizes, units = shape.sizes(self._solved(shape)), shape.units
        if not sizes.rows:
            return LayerPlan(name, sizes, "", units, kept, shape.bytes_of_results, 0)
        if name in self.passing:
            return LayerPlan(name, sizes, "passes", units, kept, 0, 0)
        route = route_of(sizes, self.solver, self.damping)
        whole = self._as_it_came(shape) and not sizes.joint
        unfolded = shape.bytes_to_unfold if whole or shape.bytes_to_unfold <= UNFOLDED_WHOLE else 0
        solving = bytes_of_group(sizes, route) + unfolded + 2 * shape.bytes_of_results
        return LayerPlan(name, sizes, route, units, kept, solving, least(sizes, route))


class Planner:
    """Plans each measurement within a budget, and remembers the newest plan."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.newest: Plan | None = None
        self._asked: tuple[dict[str, Shape], int] | None = None  # what the newest plan is for
        self._told = False  # the first plan that is based on a pass

    def within(self, budget: Budget) -> "Planner":
        """Plan a measurement of another kind; a plan that was told once is not told again."""
        if budget == self.budget:
            return self
        other = Planner(budget)
        other._told = self._told
        return other

    @property
    def workspace(self) -> int:
        return AMPLE if self.newest is None else self.newest.workspace

    def attached(
        self, layers: Mapping[str, nn.Module], units: Mapping[str, Int[Tensor, " u"]]
    ) -> None:
        """Plan what is known before the first pass."""
        shapes = {name: bare(layer, units.get(name)) for name, layer in layers.items()}
        self.newest = self.budget.plan(shapes, column=0)
        self._tell()

    def plan(self, shapes: Mapping[str, Shape], column: int) -> Plan:
        """Plan a measurement as `Budget.plan` does, unless the last one was alike."""
        asked = dict(shapes), column
        if self.newest is None or asked != self._asked:
            self.newest, self._asked = self.budget.plan(shapes, column), asked
            if self.budget.summed:  # what the first batch has begun the others go on with
                passing = {of.layer for of in self.newest.layers if of.route == "passes"}
                passing |= self.budget.passing
                self.budget = replace(self.budget, passing=frozenset(passing), settled=True)
            if not self._told:
                self._tell()
            self._told = self.newest.known
        return self.newest

    def solver_of(self, layer: str) -> str:
        """Say how a layer's systems are to be solved."""
        assert self.newest is not None
        if self.budget.solver != "auto" or self.budget.window > 1:
            return self.budget.solver  # there are fewer rows until a window is filled
        return next(of.route for of in self.newest.layers if of.layer == layer)

    def _tell(self) -> None:
        """Log the plan; who asked for a budget sees it without having configured logging."""
        LOG.log(logging.WARNING if self.budget.strict else logging.INFO, "%s", self.newest)
