"""Tables as Markdown, and numbers with their spread."""

from collections.abc import Iterable, Sequence
from math import isnan

TINY = 1e-4  # below it decimals are mostly zeros


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table that is Markdown to a renderer and aligned to a reader."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "".join(f"| {' | '.join(map(str.ljust, line, widths))} |\n" for line in lines)


def spread(mean: float, sd: float, decimals: int | None = None) -> str:
    """Write mean ± sd, or the mean alone where there is no sd.

    Args:
        mean: "-" if NaN.
        sd: Two digits of it are shown, or one where the mean has three by then.
        decimals: Of both, if not by this rule.
    """
    if isnan(mean):
        return "-"
    if decimals is None and isnan(sd):
        return f"{mean:.3g}"
    if decimals is None and 0 < abs(mean) < TINY:
        return f"{mean:.3g} ± {sd:.2g}"
    if decimals is None:
        decimals = min(max(_decimals(mean, 3), _decimals(sd, 1)), _decimals(sd, 2))
    return f"{mean:.{decimals}f}" + ("" if isnan(sd) else f" ± {sd:.{decimals}f}")


def _decimals(number: float, significant: int) -> int:
    """How many decimals show that many significant digits of a number."""
    exponent = int(f"{number:e}".split("e")[1])
    return max(significant - 1 - exponent, 0)
