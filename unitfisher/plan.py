"""What a measurement will hold in memory, known from shapes before anything is allocated.

The budget covers what is held beside the pass itself: beside the model's activations and graph.
Everything here is of known size but the gradients inside operations that are no observed layers,
which are taken to be as large as the largest observed input or output.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from unitfisher.costs import (
    Sizes,
    bytes_of_group,
    bytes_of_passes,
    bytes_of_sums,
    least,
    route_of,
    units_together,
)
from unitfisher.memory import AMPLE, DEFAULT, readable, within
from unitfisher.patches import FEW
from unitfisher.shapes import Shape, bare

LOG = logging.getLogger("unitfisher")
PIECES = 3  # workspaces in use at one time: of the units treated together, of copies, of systems


class MemoryBudgetError(ValueError):
    """A measurement needs more memory than it may take."""


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is measured, and the bytes that takes."""

    layer: str
    sizes: Sizes
    route: str  # "rows", "sums", "products" or "passes"; "" while the cases are not known
    together: int  # units
    kept: int  # cases and results, this measurement's and the newest one's
    solving: int  # beside the workspace
    least: int  # of workspace

    def parted(self) -> "LayerPlan":
        """Treat as many units together as the workspace allows."""
        if self.route in ("", "passes"):
            return self
        return replace(self, together=units_together(self.sizes, self.route))

    @property
    def parts(self) -> int:
        return -(-self.sizes.units // self.together)


@dataclass(frozen=True)
class Plan:
    """A measurement's memory, layer by layer."""

    memory: int
    layers: tuple[LayerPlan, ...]
    beside: int
    workspace: int
    column: int  # bytes of one column of errors on its way back

    @property
    def held(self) -> int:
        kept = sum(of.kept for of in self.layers) + self.beside
        return kept + max(of.solving for of in self.layers)

    @property
    def least_workspace(self) -> int:
        return max(-(-self.column // PIECES), *(of.least for of in self.layers))

    @property
    def least(self) -> int:
        """Bytes without which the measurement cannot be made."""
        return self.held + PIECES * self.least_workspace

    @property
    def total(self) -> int:
        return self.held + PIECES * self.workspace

    @property
    def known(self) -> bool:
        """Whether there was a pass to read the shapes from."""
        return all(of.route for of in self.layers)

    def rows(self) -> dict[str, Any]:
        """Lay the plan out as columns of a table."""
        return {
            "layer": [of.layer for of in self.layers],
            "cases": [of.sizes.rows for of in self.layers],
            "inputs": [of.sizes.inputs for of in self.layers],
            "units": [of.sizes.units for of in self.layers],
            "route": [of.route for of in self.layers],
            "parts": [of.parts for of in self.layers],
            "kept": [of.kept for of in self.layers],
            "solving": [of.solving for of in self.layers],
            "workspace": self.workspace,
            "memory": self.memory,
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        means = "" if self.known else ", cases not known before the first pass"
        yield f"memory plan: up to {readable(self.total)} of {readable(self.memory)}{means}"
        width = max(5, *(len(of.layer) for of in self.layers))
        yield f"  {'layer':{width}}    cases  inputs  units route    parts      kept"
        for of in self.layers:
            rows, route = (str(of.sizes.rows), of.route) if of.route else ("?", "?")
            yield (
                f"  {of.layer:{width}} {rows:>8} {of.sizes.inputs:>7} {of.sizes.units:>6} "
                f"{route:8} {of.parts:>5} {readable(of.kept):>9}"
            )


@dataclass
class Planner:
    """Plans each measurement within a budget, and remembers the newest plan."""

    memory: int = DEFAULT
    rows: int | None = None
    window: int = 1
    solver: str = "auto"
    damping: float = 0.0
    strict: bool = False  # was the budget asked for? Else it sizes the work, and refuses nothing
    beside: int | None = None  # what is held of earlier measurements; None: one like this
    summed: bool = False  # are sums kept over batches?
    passing: frozenset[str] = frozenset()  # layers whose sums are too large to be kept
    settled: bool = False  # may no more layers join these?
    newest: Plan | None = None
    _asked: tuple[dict[str, Shape], int] | None = None

    def alone(self, pooled: int) -> "Planner":
        """Plan a batch that is not pooled, beside so many bytes of the window."""
        if self.window == 1:
            return self
        return replace(self, window=1, memory=max(1, self.memory - pooled))

    def over_batches(self, beside: int) -> "Planner":
        """Plan sums over batches, or passes where these are too large, beside so many bytes."""
        sums = replace(self, rows=None, window=1, solver="sums", beside=beside, summed=True)
        sums._asked, sums.settled = None, self.solver == "direct"
        return sums

    @property
    def workspace(self) -> int:
        return AMPLE if self.newest is None else self.newest.workspace

    def attached(
        self, layers: Mapping[str, nn.Module], units: Mapping[str, Int[Tensor, " u"]]
    ) -> None:
        """Plan what is known before the first pass."""
        shapes = {name: bare(layer, units.get(name)) for name, layer in layers.items()}
        self.newest = self._within_budget(shapes, column=0)
        self._tell()

    def plan(self, shapes: Mapping[str, Shape], column: int) -> Plan:
        """Plan a measurement.

        Raises:
            MemoryBudgetError: It needs more than it may take; names the layers that need most.
        """
        asked = dict(shapes), column
        if self.newest is None or asked != self._asked:
            first = self.newest is None or not self.newest.known
            self.newest, self._asked = self._within_budget(shapes, column), asked
            layers = self.newest.layers if self.summed else ()
            self.passing |= {of.layer for of in layers if of.route == "passes"}
            self.settled = True  # what the first batch has begun the others go on with
            if first:
                self._tell()
        return self.newest

    def solver_of(self, layer: str) -> str:
        """Say how a layer's systems are to be solved."""
        assert self.newest is not None
        if self.solver != "auto" or self.window > 1:  # until it is filled there are fewer rows
            return self.solver
        return next(of.route for of in self.newest.layers if of.layer == layer)

    def _tell(self) -> None:
        """Log the plan; who asked for a budget sees it without having configured logging."""
        LOG.log(logging.WARNING if self.strict else logging.INFO, "%s", self.newest)

    def _within_budget(self, shapes: Mapping[str, Shape], column: int) -> Plan:
        alike = Counter(shapes.values())
        kept = {name: self._kept(name, s, alike[s] > 1) for name, s in shapes.items()}
        left = self.memory - (self.beside or 0) - sum(kept.values())
        with within(min(AMPLE, left // (2 * PIECES))):  # half of it for what was solved
            bare = tuple(self._of_layer(name, s, kept[name]) for name, s in shapes.items())
        plan = Plan(self.memory, bare, self.beside or 0, 0, column)
        if plan.least > self.memory:
            if (largest := self._largest_sums(shapes)) is not None:
                passes = replace(self, passing=self.passing | {largest})
                return passes._within_budget(shapes, column)
            if self.strict or self.summed:
                raise _too_large(plan)
            ample = plan.held + 2 * PIECES * max(AMPLE, plan.least_workspace)
            return replace(self, memory=ample)._within_budget(shapes, column)
        room = min(AMPLE, (self.memory - plan.held) // (2 * PIECES))
        plan = replace(plan, workspace=max(room, plan.least_workspace))
        with within(plan.workspace):
            return replace(plan, layers=tuple(of.parted() for of in bare))

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
        unfolded = shape.bytes_to_unfold if whole or shape.bytes_to_unfold <= FEW else 0
        solving = bytes_of_group(sizes, route) + unfolded + 2 * shape.bytes_of_results
        return LayerPlan(name, sizes, route, units, kept, solving, least(sizes, route))


def _too_large(plan: Plan) -> MemoryBudgetError:
    takes = {of.layer: of.kept + of.solving + PIECES * of.least for of in plan.layers}
    largest: Sequence[str] = sorted(takes, key=lambda name: -takes[name])[:3]
    named = ", ".join(f"{name!r} {readable(takes[name])}" for name in largest)
    return MemoryBudgetError(
        f"a measurement would hold {readable(plan.least)} at least, and may hold "
        f"{readable(plan.memory)}; most of it {named}: observe fewer units (units=...), solve "
        f"from fewer cases (rows=...), leave layers out (layers=...), measure smaller batches, or "
        f"allow more (memory=...)"
    )
