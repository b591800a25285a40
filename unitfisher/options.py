"""The options of a Monitor, checked once and recorded as given."""

from dataclasses import dataclass, fields
from typing import Any

from unitfisher.choices import (
    require_choice,
    require_counts,
    require_damping,
    require_seed,
    require_share,
)
from unitfisher.columns import Estimator
from unitfisher.forward import Pick
from unitfisher.likelihoods import Likelihood, likelihood_of
from unitfisher.memory import DEFAULT, bytes_in
from unitfisher.planner import Budget
from unitfisher.schedule import EVERY, Overhead, Schedule

IDENTITY = ("likelihood", "fisher", "samples", "sharing", "units")


@dataclass(frozen=True)
class Options:
    """The options of `Monitor`, whose docstring explains them."""

    likelihood: str | Likelihood
    fisher: str
    samples: int
    sharing: str
    damping: float
    every: Schedule | None
    overhead: float | None
    activations: int | None
    window: int
    rows: int | None
    solver: str
    units: int | None
    output: Pick
    on_nonfinite: str
    memory: int | str | None
    seed: int

    def __post_init__(self) -> None:
        require_choice("on_nonfinite", self.on_nonfinite, ("raise", "record"))
        require_choice("solver", self.solver, ("auto", "direct", "iterative"))
        require_damping(self.damping)
        require_seed(self.seed)
        object.__setattr__(self, "damping", float(self.damping))  # as in its recorded column
        counts = {"rows": self.rows, "units": self.units, "activations": self.activations}
        counts = {name: count for name, count in counts.items() if count is not None}
        if self.every is not None and not callable(self.every):
            counts["every"] = self.every
        require_counts(window=self.window, **counts)
        for name in ("window", *counts):
            object.__setattr__(self, name, int(getattr(self, name)))  # numpy's integers overflow
        if self.overhead is not None:
            require_share(self.overhead)
            if self.every is not None:
                raise ValueError(
                    f"every={self.every!r} and overhead={self.overhead!r} both say when to "
                    f"measure: give one of them"
                )

    def schedule(self) -> Schedule:
        """Return the schedule of measured passes; that of ``overhead`` starts without timings."""
        if self.overhead is not None:
            return Overhead(self.overhead)
        return EVERY if self.every is None else self.every

    def estimator(self) -> Estimator:
        return Estimator(likelihood_of(self.likelihood), self.fisher, self.samples, self.sharing)

    def budget(self) -> Budget:
        asked = self.memory is not None
        memory = DEFAULT if self.memory is None else bytes_in(self.memory)
        return Budget(memory, self.rows, self.window, self.solver, self.damping, strict=asked)

    def recorded(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def identity(self) -> dict[str, Any]:
        """Return the options that determine the rows of a table but are not among its columns."""
        return {name: getattr(self, name) for name in IDENTITY}
