"""Plans the memory of each measurement from shapes, before anything is allocated.

The budget covers what is held beside the measured pass, its activations and its graph. All sizes
are known but those of gradients inside operations other than observed layers, which are assumed to
be as large as the largest input or output of an observed layer.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from jaxtyping import Int
from torch import Tensor, nn

from unitfisher.costs import ROUTES, bytes_of_group, bytes_of_passes, bytes_of_sums, least, route_of
from unitfisher.memory import AMPLE, AMPLE_ON_GPU, DEFAULT, within
from unitfisher.patches import UNFOLDED_WHOLE
from unitfisher.plan import PIECES, LayerPlan, Plan, too_large
from unitfisher.shapes import Shape, bare

LOG = logging.getLogger("unitfisher")


@dataclass(frozen=True)
class Budget:
    """The bytes that a measurement may take, and the options that its plan depends on."""

    memory: int = DEFAULT
    rows: int | None = None
    window: int = 1
    solver: str = "auto"
    damping: float = 0.0
    strict: bool = False  # exceeding ``memory`` raises; else it only sizes pieces of work
    beside: int | None = None  # bytes held of earlier measurements; None: of one like this
    summed: bool = False  # sums are kept over batches
    passing: frozenset[str] = frozenset()  # layers whose sums are too large to be kept
    settled: bool = False  # whether ``passing`` is final

    def alone(self, pooled: int) -> "Budget":
        """Return the budget for an unpooled batch, while a window holds ``pooled`` bytes."""
        if self.window == 1:
            return self
        return replace(self, window=1, memory=max(1, self.memory - pooled))

    def over_batches(self, beside: int) -> "Budget":
        """Return the budget for sums, or passes, over batches, with ``beside`` bytes in use."""
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
            shapes: The shapes of the layers that took part in a pass.
            column: Bytes that one column of errors takes on its way back.

        Raises:
            MemoryBudgetError: It needs more than the budget; names the layers that need most.
        """
        alike = Counter(shapes.values())
        kept = {name: self._kept(name, s, alike[s] > 1) for name, s in shapes.items()}
        left = self.memory - (self.beside or 0) - sum(kept.values())
        most = AMPLE_ON_GPU if any(s.engine == "cuda" for s in shapes.values()) else AMPLE
        room = min(most, left // (2 * PIECES))  # the other half is for solved systems
        plan = self._within(room, shapes, kept, column)
        if plan.least > self.memory:
            plan = self._smallest(shapes, kept, column)
        if plan.least > self.memory:
            if (largest := self._largest_sums(shapes)) is not None:
                return replace(self, passing=self.passing | {largest}).plan(shapes, column)
            if self.strict or self.summed:
                raise too_large(plan, summed=self.summed)
            ample = plan.held + 2 * PIECES * max(most, plan.least_workspace)
            return replace(self, memory=ample).plan(shapes, column)
        room = min(most, (self.memory - plan.held) // (2 * PIECES))
        plan = replace(plan, workspace=max(room, plan.least_workspace))
        with within(plan.workspace):
            return replace(plan, layers=tuple(layer.parted() for layer in plan.layers))

    def _within(
        self,
        room: int,
        shapes: Mapping[str, Shape],
        kept: Mapping[str, int],
        column: int,
        *,
        smallest: bool = False,
    ) -> Plan:
        """Plan with the routes that are best within a workspace, which is not divided yet."""
        with within(room):
            layers = tuple(
                self._of_layer(name, shape, kept[name], smallest=smallest)
                for name, shape in shapes.items()
            )
        return Plan(self.memory, layers, self.beside or 0, 0, column)

    def _smallest(self, shapes: Mapping[str, Shape], kept: Mapping[str, int], column: int) -> Plan:
        """Find the plan that needs least: one route may need the workspace, another room beside."""
        sizes = {shape.sizes(self._solved(shape)) for shape in shapes.values()}
        rooms = {least(s, route) for s in sizes for route in ROUTES}
        plans = [self._within(room, shapes, kept, column, smallest=True) for room in rooms]
        return min(plans, key=lambda plan: plan.least)

    def _largest_sums(self, shapes: Mapping[str, Shape]) -> str | None:
        """Name the layer that saves most by route "passes" instead of "sums"; None if none does."""
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
        if name in self.passing:  # results reuse what solving has taken
            cases = shape.cases * shape.bytes_of_case
            return shape.bytes_observing + cases + bytes_of_passes(shape.sizes(shape.cases))
        pooled, solved, passed = self.window * shape.cases, self._solved(shape), shape.bytes_of_pass
        cases = (self.window > 1) * (1 + (shape.folded > 0)) * pooled  # unfolded and concatenated
        cases += ((solved < pooled) + alike) * solved  # drawn, or joined with others of its form
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

    def _of_layer(self, name: str, shape: Shape, kept: int, *, smallest: bool) -> LayerPlan:
        sizes, units = shape.sizes(self._solved(shape)), shape.units
        if not sizes.rows:
            return LayerPlan(name, sizes, "", units, kept, shape.bytes_of_results, 0)
        if name in self.passing:
            return LayerPlan(name, sizes, "passes", units, kept, 0, 0)
        route = route_of(sizes, self.solver, self.damping, smallest=smallest)
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
        self._told = False  # whether a plan that is based on a pass was logged

    def within(self, budget: Budget) -> "Planner":
        """Return a planner for another budget, which does not log again what was logged."""
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
        """Plan as `Budget.plan` does; the newest plan holds as long as nothing has changed."""
        asked = dict(shapes), column
        if self.newest is None or asked != self._asked:
            self.newest, self._asked = self.budget.plan(shapes, column), asked
            if self.budget.summed:  # later batches keep the first one's routes
                passing = {x.layer for x in self.newest.layers if x.route == "passes"}
                passing |= self.budget.passing
                self.budget = replace(self.budget, passing=frozenset(passing), settled=True)
            if not self._told:
                self._tell()
            self._told = self.newest.known
        return self.newest

    def solver_of(self, layer: str) -> str:
        """Return the solver or route for a layer's systems."""
        assert self.newest is not None
        if self.budget.solver != "auto" or self.budget.window > 1:
            return self.budget.solver  # until the window is full, there are fewer rows than planned
        return next(plan.route for plan in self.newest.layers if plan.layer == layer)

    def _tell(self) -> None:
        """Log the plan, as a warning if a budget was given: that is shown by default."""
        LOG.log(logging.WARNING if self.budget.strict else logging.INFO, "%s", self.newest)
