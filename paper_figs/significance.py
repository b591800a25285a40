"""The paper's test, Wilcoxon's signed-rank test over paired runs, those of one seed; one-sided."""

from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd
from scipy.stats import wilcoxon
from summary import Summary

from unitfisher.experiments import plotting

PAIRS = 5  # fewer cannot reach 5 %, on the one side that is tested


class Comparison(NamedTuple):
    """Whether one kind of network has lower errors than another."""

    pairs: int
    p: float | None  # one-sided; None: too few pairs to tell


def lower(errors: pd.DataFrame, others: pd.DataFrame) -> Comparison:
    """Test if test errors are lower than others.

    Args:
        errors: Columns seed and test_error, one row per seed.
        others: The same.
    """
    paired = errors.merge(others, on="seed", suffixes=("", "_other"))
    differences = (paired["test_error"] - paired["test_error_other"]).dropna()
    if len(differences) < PAIRS:
        return Comparison(len(differences), None)
    if not differences.any():
        return Comparison(len(differences), 1.0)
    p = float(wilcoxon(differences, alternative="less").pvalue)
    return Comparison(len(differences), p)


def final_errors(summary: Summary) -> dict[str, pd.DataFrame]:
    """The networks' errors after training, by the label of their activation."""
    final = summary.final
    present = [name for name in plotting.COLOURS if (final["activation"] == name).any()]
    return {plotting.label(name): final[final["activation"] == name] for name in present}


def told(lowest: str, errors: Mapping[str, pd.DataFrame]) -> str:
    """Say if one kind's final test errors are lower than each other's, or that nothing can tell."""
    if lowest not in errors:
        return f"no significance test: no networks of {lowest}"
    results = {other: lower(errors[lowest], errors[other]) for other in errors if other != lowest}
    tested = {other: result for other, result in results.items() if result.p is not None}
    if not tested:
        pairs = max((result.pairs for result in results.values()), default=0)
        return (
            f"no significance test: {pairs} pair{'s' if pairs != 1 else ''} of runs, "
            f"the one-sided Wilcoxon signed-rank test needs {PAIRS}"
        )
    each = [f"{p:.2g} against {other} ({pairs} pairs)" for other, (pairs, p) in tested.items()]
    uncorrected = ", not corrected for several comparisons" if len(each) > 1 else ""
    return (
        f"one-sided Wilcoxon signed-rank test that the final test error of {lowest} is lower: "
        f"p = {', '.join(each)}{uncorrected}"
    )
