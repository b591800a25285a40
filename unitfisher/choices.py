"""Checks of option values; the errors name the possible ones."""

from collections.abc import Sequence
from numbers import Integral, Real

MEANING = {
    "activations": " or None",
    "every": " (measure each n-th training pass) or a predicate of the step",
    "rows": " or None for all",
    "samples": "",
    "units": " or None for all",
    "window": " of batches",
}


def require_choice(option: str, value: object, valid: Sequence[str]) -> None:
    if value not in valid:
        names = ", ".join(map(repr, valid))
        raise ValueError(f"{option} must be one of {names}, got {value!r}")


def require_counts(**options: object) -> None:
    """Refuse values that are not whole numbers from 1."""
    for name, value in options.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number from 1{MEANING[name]}, got {value!r}")


def require_seed(seed: object) -> None:
    if not isinstance(seed, Integral) or not -(2**63) <= int(seed) < 2**64:
        raise ValueError(f"seed must be a whole number of 64 bits, got {seed!r}")


def require_damping(damping: object) -> None:
    if not isinstance(damping, Real) or not 0 <= float(damping) < float("inf"):
        raise ValueError(f"damping must be 0 or more and finite, got {damping!r}")


def require_share(overhead: object) -> None:
    if not isinstance(overhead, Real) or not float(overhead) > 0:
        raise ValueError(f"overhead must be above 0, as 0.05 for 5 % of the time, got {overhead!r}")
