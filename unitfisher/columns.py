"""The columns to send back from the model's output, whose squared errors sum to D = E_y δ².

They are the columns of the output Fisher's root S (exact), scores of drawn labels (mc), S times
random signs (rademacher), the most probable class exactly and the rest of S times random signs
(top-rademacher), or the score of the observed labels (empirical).
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from unitfisher.choices import require_choice, require_counts
from unitfisher.likelihoods import Classes, Likelihood, Output, OutputError, Residual, Signed
from unitfisher.memory import workspace

DRAWN = ("mc", "rademacher", "top-rademacher")
FISHERS = ("exact", *DRAWN, "empirical")
SHARINGS = ("expand", "joint", "reduce")
ROOT = 40  # bytes for each number of a root while it is formed
MANY_COLUMNS = 1000  # above this, warn that "exact" is slow


@dataclass(frozen=True)
class Estimator:
    """How the Fisher is estimated: likelihood, labels, random columns, sharing of weights."""

    likelihood: Likelihood
    fisher: str = "exact"
    samples: int = 1
    sharing: str = "expand"

    def __post_init__(self) -> None:
        require_choice("fisher", self.fisher, FISHERS)
        require_choice("sharing", self.sharing, SHARINGS)
        require_counts(samples=self.samples)
        if self.fisher == "top-rademacher" and not isinstance(self.likelihood, Classes):
            raise ValueError(
                f"fisher='top-rademacher' takes the most probable of several classes exactly, and "
                f"{self.likelihood!r} has no classes: use fisher='rademacher'"
            )

    @property
    def replicates(self) -> int:
        """The number of random columns, which come last; 0: nothing is drawn."""
        return self.samples if self.fisher in DRAWN else 0

    def count(self, z: Output) -> int:
        """Count the columns."""
        if self.fisher == "exact":
            return self.likelihood.columns(z) * z.shape[1]
        return self.samples + 1 if self.fisher == "top-rademacher" else max(1, self.replicates)


def columns(
    z: Output,
    estimator: Estimator,
    generator: torch.Generator,
    targets: Tensor | None,
    together: int = 1,
    *,
    independent: bool = False,
) -> Iterator[Float[Tensor, "r n t y"]]:
    """Yield cotangents of z, ``together`` at most, whose squared errors sum to D, or estimate it.

    All samples go back in one column. Where one sample may affect another's output (batch
    statistics, graphs) each has a random sign: products of two samples vanish on average, and
    squares stay. If samples are ``independent`` signs are not applied, but drawn all the same, so
    that the generator's state does not depend on it.
    """
    likelihood, signs = estimator.likelihood, None
    if estimator.fisher in ("exact", "top-rademacher"):
        (coin,) = _coin(z, 1, generator)
        signs = None if independent else _signs(coin, z)
    if estimator.fisher == "exact":
        yield from _exact(z, likelihood, together, signs)
    elif estimator.fisher in DRAWN:
        drawn = _drawn(z, estimator, generator, signs)
        while block := list(islice(drawn, together)):
            yield torch.stack(block)
    else:
        if targets is None:
            raise ValueError(
                "fisher='empirical' needs the observed labels: set monitor.targets = y before the "
                "forward pass, or pass targets=y"
            )
        yield likelihood.score(z, targets).unsqueeze(0)


def _exact(
    z: Output, likelihood: Likelihood, together: int, signs: Float[Tensor, "n t"] | None
) -> Iterator[Tensor]:
    """One position after another: the labels of two positions are independent."""
    total, positions = likelihood.columns(z), z.shape[1]
    if total * positions > MANY_COLUMNS:
        warnings.warn(
            f"the exact Fisher of an output of {positions} positions and {z.shape[2]} numbers each "
            f"takes {total * positions} backward columns per measurement; fisher='rademacher' "
            f"estimates it from samples= random columns",
            stacklevel=2,
        )
    for position in range(positions):
        here = slice(position, position + 1)
        for start in range(0, total, together):
            root = likelihood.root(z[:, here], start, min(start + together, total))
            column = z.new_zeros(len(root), *z.shape)
            column[:, :, here] = root if signs is None else root * signs[:, here, None]
            yield column


def _drawn(
    z: Output,
    estimator: Estimator,
    generator: torch.Generator,
    signs_of_top: Float[Tensor, "n t"] | None,
) -> Iterator[Output]:
    """Yield the random columns, scaled to average; before them the exact one, if there is one."""
    likelihood, share = estimator.likelihood, estimator.samples**-0.5
    if estimator.fisher == "top-rademacher":
        assert isinstance(likelihood, Classes)
        _require_one_label(z)
        top = likelihood.top(z)
        yield top if signs_of_top is None else top * signs_of_top.unsqueeze(-1)
    # what was drawn fits: only targets need the checks of `score`
    score = likelihood.residual if isinstance(likelihood, Residual) else likelihood.score
    for _ in range(estimator.samples):
        if estimator.fisher == "mc":
            yield score(z, likelihood.sample(z, generator)) * share
            continue
        signs = _signs(_coin(z, likelihood.columns(z), generator), z)
        if estimator.fisher == "rademacher":
            yield _signed(z, likelihood, signs) * share
        else:
            assert isinstance(likelihood, Classes)
            yield likelihood.signed_rest(z, signs) * share


def _coin(z: Output, columns: int, generator: torch.Generator) -> Float[Tensor, "r n t"]:
    """Draw 0 or 1, equally likely, for every column, sample and position."""
    coin = torch.empty(columns, *z.shape[:2], device=z.device)
    return coin.bernoulli_(0.5, generator=generator)


def _signs(coin: Float[Tensor, "*r n t"], z: Output) -> Float[Tensor, "*r n t"]:
    """Turn 0 and 1 into signs ε = ±1, in place. For a root S, E (S ε)(S ε)ᵀ = S Sᵀ."""
    return coin.mul_(2).sub_(1).to(z.dtype)


def _signed(z: Output, likelihood: Likelihood, signs: Float[Tensor, "r n t"]) -> Output:
    if isinstance(likelihood, Signed):
        return likelihood.signed(z, signs)
    signed, start = torch.zeros_like(z), 0
    for part in signs.split(max(1, workspace() // (ROOT * z.numel()))):
        root = likelihood.root(z, start, start + len(part))
        signed += (root * part.unsqueeze(-1)).sum(0)
        start += len(part)
    return signed


def _require_one_label(z: Output) -> None:
    if z.shape[1] > 1:
        raise OutputError(
            f"fisher='top-rademacher' takes one label a sample, and the output has {z.shape[1]} "
            f"positions, whose columns would mix on their way back: use fisher='rademacher'"
        )
