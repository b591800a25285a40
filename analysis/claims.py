"""The ELU paper's claims, judged by a rule that is stated beside the verdicts.

    python analysis/claims.py results/bias-shift-mnist/claims.md

replaces the rule in that file by its present wording; the verdicts stay as they were written.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

import pandas as pd
from tables import When, markdown

from unitfisher.experiments import ACTIVATIONS
from unitfisher.experiments.markdown import spread

# probability of "holds" if differences are normal with mean 0, by seeds; simulated in a test
CHANCE: Final = MappingProxyType({2: 0.20, 3: 0.11, 5: 0.03})
RATES = ", ".join(f"{100 * share:.0f} % ({seeds} seeds)" for seeds, share in CHANCE.items())
RULE = f"""\
ELU is compared with every other activation, seed by seed: same initial weights, same batches.
  holds                   ELU is better on every seed, and on average by more than one standard
                          deviation (over seeds) of the difference
  does not hold           the same with ELU worse
  depends on the damping  the verdict is not the same at every damping
  not decided             all else, and always with a single seed
Where there is no difference, chance alone says "holds" in {RATES}
of the comparisons, and "does not hold" as often; that they are several is not corrected for.
Through training: a run's mean over its recorded epochs but 0. At the end: its last epoch.
+ in the tables: by how much ELU is better, mean ± sd over seeds.
"""

Verdict = Literal["holds", "does not hold", "depends on the damping", "not decided"]


class Claim(NamedTuple):
    """A claim of the paper, and the quantity of a run by which it is judged."""

    sentence: str
    quantity: str
    measured: str
    better: Literal["smaller", "larger"]
    absolute: bool = False


CLAIMS = (
    Claim(
        "Mean activations are closer to zero",
        "mean_activation",
        "|median over the hidden units of their mean activation|",
        "smaller",
        absolute=True,
    ),
    Claim(
        "Learning is faster",
        "train_loss",
        "training loss; through training it is the area under the loss curve, per epoch",
        "smaller",
    ),
    Claim(
        "There is less bias shift in the gradient",
        "bias_shift_share_gradient",
        "bias-shift share of the gradient, mean over units and layers",
        "smaller",
    ),
    Claim(
        "The gradient is closer to the natural gradient",
        "cosine",
        "cosine between the two, mean over units and layers",
        "larger",
    ),
)


class Comparison(NamedTuple):
    """ELU against one activation in one quantity, at one damping if it has one."""

    when: str
    damping: str
    against: str
    elu: str
    gain: str
    verdict: Verdict


def judge(gains: "pd.Series[float]") -> Verdict:
    """Apply the rule to ELU's advantage on each seed."""
    beyond_spread = len(gains) > 1 and abs(gains.mean()) > gains.std()
    if beyond_spread and (gains > 0).all():
        return "holds"
    if beyond_spread and (gains < 0).all():
        return "does not hold"
    return "not decided"


def over_dampings(verdicts: Sequence[Verdict]) -> Verdict:
    """Join the verdicts at several dampings."""
    return verdicts[0] if len(set(verdicts)) == 1 else "depends on the damping"


def compare(runs: pd.DataFrame, claim: Claim, when: When) -> list[Comparison]:
    """Compare ELU with every other activation present, at every damping."""
    rows = runs[runs["quantity"] == claim.quantity]
    values = rows.pivot(index=["damping", "seed"], columns="activation", values="value")
    values = values.abs() if claim.absolute else values
    others = [name for name in ACTIVATIONS if name in values.columns and name != "elu"]
    dampings = sorted(set(rows["damping"]), key=lambda d: -float(d or 0))
    found = []
    for damping in dampings:
        for other in others:
            paired = values.loc[damping][["elu", other]].dropna()
            difference = paired["elu"] - paired[other]
            gains = difference if claim.better == "larger" else -difference
            elu, gain = (spread(v.mean(), v.std()) for v in (paired["elu"], gains))
            sign = "+" if gains.mean() > 0 else ""
            label = ACTIVATIONS[other].label
            found.append(Comparison(when, damping, label, elu, sign + gain, judge(gains)))
    return found


def report(runs: Mapping[When, pd.DataFrame]) -> str:
    """Write the rule and every claim with its numbers and verdicts, as Markdown."""
    present = {name for frame in runs.values() for name in frame["activation"]}
    if "elu" not in present or len(present) < 2:
        return "The claims compare ELU with other activations: run it with at least one more.\n"
    sections = [
        _section(
            f"{i}. {claim.sentence}",
            claim,
            [compare(frame, claim, when) for when, frame in runs.items()],
        )
        for i, claim in enumerate(CLAIMS, start=1)
    ]
    return "\n".join([f"```\n{RULE}```\n", *sections])


def restated(written: str) -> str:
    """Replace the rule in what ``report`` wrote by its present wording; the verdicts stay."""
    return re.sub(
        r"```\n.*?```\n", lambda _: f"```\n{RULE}```\n", written, count=1, flags=re.DOTALL
    )


def _section(title: str, claim: Claim, moments: Sequence[Sequence[Comparison]]) -> str:
    """Write one claim: what was measured, the verdicts in words, the numbers."""
    verdicts = [f"- **{found[0].when}: {headline(found)}**" for found in moments]
    rows = pd.DataFrame([comparison for found in moments for comparison in found])
    rows["cell"] = rows["gain"] + ", " + rows["verdict"]
    wide = rows.pivot(index=["when", "damping", "elu"], columns="against", values="cell")
    order = rows[["when", "damping", "elu"]].drop_duplicates().itertuples(index=False, name=None)
    table = wide.loc[list(order), rows["against"].unique()].reset_index()
    table = table.rename(columns={"elu": "ELU"} | {a: f"against {a}" for a in rows["against"]})
    measured = f"{claim.measured} ({claim.better} is better)"
    return "\n".join([f"### {title}", "", measured, "", *verdicts, "", markdown(table)])


def headline(comparisons: Sequence[Comparison]) -> str:
    """Give the verdict if all agree, else each verdict with the activations it is about."""
    joined = {
        other: over_dampings([c.verdict for c in comparisons if c.against == other])
        for other in dict.fromkeys(c.against for c in comparisons)
    }
    if len(set(joined.values())) == 1:
        return next(iter(joined.values()))
    groups: dict[str, list[str]] = {}
    for other, verdict in joined.items():
        groups.setdefault(verdict, []).append(other)
    return "; ".join(f"{verdict} against {', '.join(who)}" for verdict, who in groups.items())


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(restated(path.read_text()))
