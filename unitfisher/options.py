"""What a Monitor is asked to do, checked once and written down as it is."""

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
    """The options of `Monitor`, which says what they mean."""

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
        object.__setattr__(self, "damping", float(self.damping))  # as its column in a record
        counts = {"rows": self.rows, "units": self.units, "activations": self.activations}
        counts = {name: count for name, count in counts.items() if count is not None}
        if self.every is not None and not callable(self.every):
            counts["every"] = self.every
        require_counts(window=self.window, **counts)
        for name in ("window", *counts):
            object.__setattr__(self, name, int(getattr(self, name)))  # those of numpy overflow
        if self.overhead is not None:
            require_share(self.overhead)
            if self.every is not None:
                raise ValueError(
                    f"every={self.every!r} and overhead={self.overhead!r} both say when to "
                    f"measure: give one of them"
                )

    def schedule(self) -> Schedule:
        """Return when a training pass is due; one that keeps time begins now."""
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
        """Return what tells one table's rows from another's, and no column says."""
        return {name: getattr(self, name) for name in IDENTITY}
