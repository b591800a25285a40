"""Likelihoods p(y | z) of labels y given the model's output z, and roots of their Fisher.

The Fisher of ln p(y | z) with respect to z is S Sᵀ. Sent back from z, a column of S gives one
column of error at every unit; the squares of these columns sum to D = E_y δ². No label is needed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from unitfisher.contrasts import contrasts, most_probable, positive, signed_contrasts

Output = Float[Tensor, "n t y"]


class OutputError(ValueError):
    """The model's output or targets do not fit the likelihood."""


@runtime_checkable
class Likelihood(Protocol):
    """A family p(y | z). Outputs z are (n, t, y): samples, positions, logits."""

    def arrange(self, output: Tensor) -> Output:
        """View the model's output as (n, t, y), or raise OutputError."""
        ...

    def columns(self, z: Output) -> int:
        """Count the columns of the root at one position."""
        ...

    def root(self, z: Output, start: int, stop: int) -> Float[Tensor, "r n t y"]:
        """Return columns start to stop of S, with S Sᵀ the output Fisher at each position."""
        ...

    def sample(self, z: Output, generator: torch.Generator) -> Tensor:
        """Draw y ~ p(y | z), in the form of targets."""
        ...

    def score(self, z: Output, y: Tensor) -> Output:
        """Return ∂ ln p(y | z) / ∂z, or raise OutputError if the targets y do not fit."""
        ...


@runtime_checkable
class Residual(Protocol):
    """A likelihood whose score can be taken sample by sample under ``torch.func.vmap``."""

    def residual(self, z: Output, y: Tensor) -> Output:
        """Return `Likelihood.score`, for targets that were checked before."""
        ...


@runtime_checkable
class Signed(Protocol):
    """A likelihood that computes S ε without forming S."""

    def signed(self, z: Output, signs: Float[Tensor, "r n t"]) -> Output:
        """Return S ε for signs ε, one for each column, sample and position."""
        ...


@runtime_checkable
class Classes(Protocol):
    """A likelihood of classes, with a root whose first column is that of the most probable one."""

    def top(self, z: Output) -> Output:
        """Return that root's first column: the most probable class against all others."""
        ...

    def signed_rest(self, z: Output, signs: Float[Tensor, "r n t"]) -> Output:
        """Return the sum of the root's other columns, each times a sign."""
        ...


@dataclass(frozen=True)
class Categorical:
    """Softmax over the last axis of logits or log-probabilities, (n, C) or (n, T, C).

    Targets are class indices, (n,) or (n, T).
    """

    def arrange(self, output: Tensor) -> Output:
        if output.dim() not in (2, 3) or output.shape[-1] < 2:
            raise OutputError(
                f"likelihood 'categorical' takes logits (n, C) or (n, T, C) with at least two "
                f"classes, got {tuple(output.shape)}; bring the classes last, and all positions "
                f"into one axis, with output=lambda z: z.movedim(1, -1).flatten(1, -2), or choose "
                f"'bernoulli' or 'gaussian'"
            )
        return output if output.dim() == 3 else output.unsqueeze(1)

    def columns(self, z: Output) -> int:
        return z.shape[-1] - 1

    def root(self, z: Output, start: int, stop: int) -> Float[Tensor, "r n t y"]:
        """Contrast each class with the mean of the later ones (Tanabe & Sagae 1992, eq. 4).

        Column j is √(π_j r_j / (π_j + r_j)) (e_j - π_{>j} / r_j) with r_j = Σ_{i>j} π_i.
        """
        pi = z.double().softmax(-1)
        scale, rest = contrasts(pi)
        later = (pi.unsqueeze(-2) / rest[..., start:stop].unsqueeze(-1)).triu(start + 1)
        column = later.neg_()
        column.diagonal(start, -2, -1).fill_(1.0)
        column *= scale[..., start:stop].unsqueeze(-1)
        return column.movedim(-2, 0).to(z.dtype)  # from (n, t, r, y)

    def signed(self, z: Output, signs: Float[Tensor, "r n t"]) -> Output:
        return signed_contrasts(z.double().softmax(-1), signs).to(z.dtype)

    def top(self, z: Output) -> Output:
        """√(π_m r) (e_m - π_{≠m} / r), m the most probable class and r = 1 - π_m."""
        pi, is_top = most_probable(z)
        others = pi.masked_fill(is_top, 0.0)
        r = others.sum(-1, keepdim=True)
        scale = (pi.amax(-1, keepdim=True) * r).sqrt()
        return (scale * (is_top.double() - others / positive(r))).to(z.dtype)

    def signed_rest(self, z: Output, signs: Float[Tensor, "r n t"]) -> Output:
        """With the top class's mass set to 0 its column vanishes; the others are the rest of S."""
        pi, is_top = most_probable(z)
        return signed_contrasts(pi.masked_fill(is_top, 0.0), signs).to(z.dtype)

    def sample(self, z: Output, generator: torch.Generator) -> Tensor:
        pi = z.detach().double().softmax(-1)
        waiting = torch.empty_like(pi).exponential_(generator=generator)
        return (pi / waiting).argmax(-1)  # as multinomial does, which makes the host wait

    def score(self, z: Output, y: Tensor) -> Output:
        _require_tensor(y)
        labels = y.unsqueeze(1) if y.dim() == 1 else y
        if labels.shape != z.shape[:2] or y.is_floating_point() or y.is_complex():
            raise OutputError(
                f"targets must be class indices of shape {_leading(z)}, got {tuple(y.shape)} "
                f"of {y.dtype}"
            )
        classes, (low, high) = z.shape[-1], torch.stack(y.aminmax()).tolist()
        if low < 0 or high >= classes:
            raise OutputError(
                f"targets must be class indices from 0 to {classes - 1}, got {low} to {high}; "
                f"measure only samples that have a label"
            )
        return self.residual(z, y)

    def residual(self, z: Output, y: Tensor) -> Output:
        labels = y.long().reshape(*z.shape[:2], 1)
        observed = labels == torch.arange(z.shape[-1], device=z.device)
        return observed.to(z.dtype) - z.softmax(-1)


@dataclass(frozen=True)
class Bernoulli:
    """An independent binary label for every output, a logit; outputs and targets are (n, ...)."""

    def arrange(self, output: Tensor) -> Output:
        return _independent(output, "bernoulli")

    def columns(self, z: Output) -> int:
        return z.shape[-1]

    def root(self, z: Output, start: int, stop: int) -> Float[Tensor, "r n t y"]:
        return _diagonal(self._scale(z), start, stop)

    def signed(self, z: Output, signs: Float[Tensor, "r n t"]) -> Output:
        return self._scale(z) * signs.movedim(0, -1)

    def sample(self, z: Output, generator: torch.Generator) -> Tensor:
        return torch.bernoulli(z.detach().sigmoid(), generator=generator)

    def score(self, z: Output, y: Tensor) -> Output:
        return self.residual(z, _matching(y, z))

    def residual(self, z: Output, y: Tensor) -> Output:
        return y.to(z.dtype).reshape(z.shape) - z.sigmoid()

    def _scale(self, z: Output) -> Output:
        p = z.double().sigmoid()
        return (p * (-z.double()).sigmoid()).sqrt().to(z.dtype)


@dataclass(frozen=True)
class Gaussian:
    """Normal distribution about every output; outputs and targets are (n, ...).

    Args:
        variance: Of every output; 1 if the loss is ½ squared error.

    Raises:
        ValueError: The variance is not positive and finite.
    """

    variance: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.variance < math.inf:
            raise ValueError(f"variance must be positive and finite, got {self.variance!r}")

    def arrange(self, output: Tensor) -> Output:
        return _independent(output, "gaussian")

    def columns(self, z: Output) -> int:
        return z.shape[-1]

    def root(self, z: Output, start: int, stop: int) -> Float[Tensor, "r n t y"]:
        return _diagonal(torch.full_like(z, self.variance**-0.5), start, stop)

    def signed(self, z: Output, signs: Float[Tensor, "r n t"]) -> Output:
        scaled: Output = signs.movedim(0, -1) * self.variance**-0.5
        return scaled

    def sample(self, z: Output, generator: torch.Generator) -> Tensor:
        noise = torch.empty_like(z).normal_(generator=generator)
        return z.detach() + self.variance**0.5 * noise

    def score(self, z: Output, y: Tensor) -> Output:
        return self.residual(z, _matching(y, z))

    def residual(self, z: Output, y: Tensor) -> Output:
        return (y.to(z.dtype).reshape(z.shape) - z).div(self.variance)


BY_NAME: dict[str, Callable[[], Likelihood]] = {
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
}


def likelihood_of(choice: str | Likelihood) -> Likelihood:
    """Return the likelihood itself, or the one of that name."""
    if isinstance(choice, str) and choice in BY_NAME:
        return BY_NAME[choice]()
    if isinstance(choice, Likelihood) and not isinstance(choice, type):
        return choice
    names = ", ".join(map(repr, BY_NAME))
    raise ValueError(f"likelihood must be one of {names} or a Likelihood object, got {choice!r}")


def _independent(output: Tensor, name: str) -> Output:
    if output.dim() < 1 or output.numel() == 0:
        raise OutputError(
            f"likelihood {name!r} takes outputs (n, ...), one row per sample, "
            f"got {tuple(output.shape)}"
        )
    return output.reshape(len(output), 1, -1)


def _diagonal(scale: Output, start: int, stop: int) -> Float[Tensor, "r n t y"]:
    columns = scale.new_zeros(stop - start, *scale.shape)
    here = torch.arange(start, stop, device=scale.device)
    columns[here - start, ..., here] = scale[..., start:stop].movedim(-1, 0)
    return columns


def _require_tensor(y: object) -> None:
    if not isinstance(y, Tensor):
        raise OutputError(f"targets must be a tensor, got {type(y).__name__}")


def _matching(y: Tensor, z: Output) -> Output:
    _require_tensor(y)
    if y.numel() != z.numel() or len(y) != len(z):
        raise OutputError(
            f"targets must have the output's shape, {z.numel() // len(z)} numbers for each of "
            f"{len(z)} samples, got {tuple(y.shape)}"
        )
    return y.to(z.dtype).reshape(z.shape)


def _leading(z: Output) -> str:
    return f"({len(z)},)" if z.shape[1] == 1 else str(tuple(z.shape[:2]))
