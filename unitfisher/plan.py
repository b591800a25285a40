"""A plan of what a measurement will hold in memory, layer by layer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from unitfisher.costs import Sizes, units_together
from unitfisher.memory import readable

PIECES = 3  # workspaces in use at one time: for units treated together, copies, systems


BY_CASES = "solve from fewer cases (rows=...), measure smaller batches, "


class MemoryBudgetError(ValueError):
    """A measurement needs more memory than its budget allows."""


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is measured, and the bytes that takes."""

    layer: str
    sizes: Sizes
    route: str  # "rows", "sums", "products" or "passes"; "" while the cases are not known
    together: int  # units treated at a time
    kept: int  # bytes of cases and results, this measurement's and the newest one's
    solving: int  # bytes while it is solved, beside the workspace
    least: int  # bytes of workspace at least

    def parted(self) -> "LayerPlan":
        """Return a plan that treats as many units together as the workspace allows."""
        if self.route in ("", "passes"):
            return self
        return replace(self, together=units_together(self.sizes, self.route))

    @property
    def parts(self) -> int:
        """How many parts the units are treated in, one after the other."""
        return -(-self.sizes.units // self.together)


@dataclass(frozen=True)
class Plan:
    """A measurement's memory in bytes, layer by layer; ``print(plan)`` shows a table."""

    memory: int  # the budget
    layers: tuple[LayerPlan, ...]
    beside: int  # held of earlier measurements
    workspace: int  # for a piece of work
    column: int  # bytes of one column of errors on its way back

    @property
    def held(self) -> int:
        """Bytes beside the workspaces."""
        kept = sum(layer.kept for layer in self.layers) + self.beside
        return kept + max(layer.solving for layer in self.layers)

    @property
    def least_workspace(self) -> int:
        return max(-(-self.column // PIECES), *(layer.least for layer in self.layers))

    @property
    def least(self) -> int:
        """Bytes without which the measurement cannot be made."""
        return self.held + PIECES * self.least_workspace

    @property
    def total(self) -> int:
        """The most bytes that the measurement will hold."""
        return self.held + PIECES * self.workspace

    @property
    def known(self) -> bool:
        """Whether there was a pass to read the shapes from."""
        return all(layer.route for layer in self.layers)

    def columns(self) -> dict[str, Any]:
        """Lay the plan out as columns of a table."""
        return {
            "layer": [each.layer for each in self.layers],
            "cases": [each.sizes.rows for each in self.layers],
            "inputs": [each.sizes.inputs for each in self.layers],
            "units": [each.sizes.units for each in self.layers],
            "route": [each.route for each in self.layers],
            "parts": [each.parts for each in self.layers],
            "kept": [each.kept for each in self.layers],
            "solving": [each.solving for each in self.layers],
            "workspace": self.workspace,
            "memory": self.memory,
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        means = "" if self.known else ", cases not known before the first pass"
        yield f"memory plan: up to {readable(self.total)} of {readable(self.memory)}{means}"
        width = max(5, *(len(each.layer) for each in self.layers))
        yield f"  {'layer':{width}}    cases  inputs  units route    parts      kept"
        for each in self.layers:
            rows, route = (str(each.sizes.rows), each.route) if each.route else ("?", "?")
            yield (
                f"  {each.layer:{width}} {rows:>8} {each.sizes.inputs:>7} {each.sizes.units:>6} "
                f"{route:8} {each.parts:>5} {readable(each.kept):>9}"
            )


def too_large(plan: Plan, *, summed: bool) -> MemoryBudgetError:
    """Say which layers need most, and what to do; sums over a loader use all cases and batches."""
    takes = {x.layer: x.kept + x.solving + PIECES * x.least for x in plan.layers}
    largest: Sequence[str] = sorted(takes, key=lambda name: -takes[name])[:3]
    named = ", ".join(f"{name!r} {readable(takes[name])}" for name in largest)
    without = "" if plan.known else " (and its cases, which are not known yet)"
    return MemoryBudgetError(
        f"a measurement would hold {readable(plan.least)} at least{without}, and may hold "
        f"{readable(plan.memory)}; most of it {named}: observe fewer units (units=...), leave "
        f"layers out (layers=...), {'' if summed else BY_CASES}or allow more (memory=...)"
    )
