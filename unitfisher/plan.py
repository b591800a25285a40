"""A plan of what a measurement will hold in memory, layer by layer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from unitfisher.costs import Sizes, units_together
from unitfisher.memory import readable

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

    def columns(self) -> dict[str, Any]:
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


def too_large(plan: Plan) -> MemoryBudgetError:
    """Say which layers need most, and what to do."""
    takes = {of.layer: of.kept + of.solving + PIECES * of.least for of in plan.layers}
    largest: Sequence[str] = sorted(takes, key=lambda name: -takes[name])[:3]
    named = ", ".join(f"{name!r} {readable(takes[name])}" for name in largest)
    return MemoryBudgetError(
        f"a measurement would hold {readable(plan.least)} at least, and may hold "
        f"{readable(plan.memory)}; most of it {named}: observe fewer units (units=...), solve "
        f"from fewer cases (rows=...), leave layers out (layers=...), measure smaller batches, or "
        f"allow more (memory=...)"
    )
