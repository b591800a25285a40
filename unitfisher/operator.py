"""One unit's Fisher as a linear operator: products, solves and its spectrum, without the matrix.

F = [[V + c μ μᵀ, c μ], [c μᵀ, c]] with V = Rᵀ R + λ I, where the rows R are the gradients of the
cases in the weights, centred at μ = E_q(a): large means cost no digits. All in double precision.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from unitfisher.cases import UnitCases
from unitfisher.choices import require_damping
from unitfisher.condensed import Condensed
from unitfisher.observation import NonFiniteError
from unitfisher.products import UnitProducts
from unitfisher.rounds import Rounds
from unitfisher.solvers import SingularFisherError
from unitfisher.statistics import UnitStatistics
from unitfisher.streaming import PartSums
from unitfisher.sums import UnitMoments

if TYPE_CHECKING:
    import scipy.sparse.linalg

LAPACK_SIDE = 2048  # with more rows and more inputs, top eigenvalues come from Lanczos
EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class UnitFisherOperator:
    """F + λ diag(1, ..., 1, 0) of one unit, bias last; A + λ I for a layer without bias."""

    layer: str
    unit: int
    biased: bool
    R: Float64[Tensor, "n d"] = field(repr=False)  # a row per case, or per case and column
    mu: Float64[Tensor, " d"] = field(repr=False)  # without bias 0: R is not centred
    c: Float64[Tensor, ""]  # without bias 1, for a bias that results leave out
    ridge: Float64[Tensor, ""]  # λ

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.mu) + self.biased, len(self.mu) + self.biased

    @property
    def dtype(self) -> torch.dtype:
        return self.R.dtype

    @property
    def device(self) -> torch.device:
        return self.R.device

    def __matmul__(self, v: Float[Tensor, "e *k"]) -> Float64[Tensor, "e *k"]:
        """Return F v for a vector or for columns.

        Raises:
            ValueError: ``v`` does not fit, or is no real tensor.
        """
        w, w0 = self._columns(v)
        bias = self.c * (self.mu @ w + w0)
        weights = self.R.T @ (self.R @ w) + self.mu[:, None] * bias + self.ridge * w
        return torch.cat([weights, bias[None]])[: len(v)].view(v.shape)

    matvec = matmat = __matmul__

    def solve(self, rhs: Float[Tensor, "e *k"]) -> Float64[Tensor, "e *k"]:
        """Return F⁻¹ rhs for a vector or for columns: w = V⁻¹ (g - g0 μ), w0 = g0 / c - μᵀ w.

        Raises:
            SingularFisherError: F has no inverse, as for a dead unit at any damping.
            ValueError: ``rhs`` does not fit, or is no real tensor.
        """
        g, g0 = self._columns(rhs)
        factor, about = self._factor, g - self.mu[:, None] * g0
        y: Tensor = torch.cholesky_solve(self.R @ about if self._few else about, factor, upper=True)
        w = (about - self.R.T @ y) / self.ridge if self._few else y  # Woodbury
        return torch.cat([w, (g0 / self.c - self.mu @ w)[None]])[: len(rhs)].view(rhs.shape)

    def top_eigenvalues(self, k: int) -> Float64[Tensor, " k"]:
        """Return the k largest, descending; by scipy's Lanczos where all would be expensive.

        Raises:
            ValueError: F has fewer than k eigenvalues, or k is below 1.
            ImportError: Lanczos is due, and scipy is not installed.
        """
        if not 1 <= k <= self.shape[0]:
            raise ValueError(f"F has {self.shape[0]} eigenvalues, got k={k}")
        side = min(self.R.shape)
        if side <= LAPACK_SIDE or 16 * k > side or "eigenvalues" in vars(self):
            return self.eigenvalues[:k]
        F = self.to_scipy()
        from scipy.sparse.linalg import eigsh  # installed: to_scipy() imports it too

        start = np.random.default_rng(0).standard_normal(F.shape[0])
        found = eigsh(F, k, which="LA", v0=start, return_eigenvectors=False)
        return torch.from_numpy(found).to(self.device).sort(descending=True).values

    def condition_number(self) -> float:
        """Return the ratio of the extreme eigenvalues; inf where F has no inverse."""
        first, last = self.eigenvalues[[0, -1]].tolist()
        noise = EPS * sum(self.R.shape)  # of singular values, whose squares these are
        return first / last if last > noise**2 * first else math.inf

    def effective_rank(self) -> float:
        """Return exp H(p), p the eigenvalues over their sum (Roy, Vetterli, EUSIPCO 2007).

        From 1, for rank one, to d + 1, for multiples of the identity; NaN for F = 0. It includes
        the damping: an operator with ``damping=0`` gives that of the data alone.
        """
        p = self.eigenvalues / self.eigenvalues.sum()
        return float(torch.special.entr(p).sum().exp())

    def trace(self) -> float:
        return float(self.diagonal().sum())

    def diagonal(self) -> Float64[Tensor, " e"]:
        weights = (self.R**2).sum(0) + self.c * self.mu**2 + self.ridge
        return torch.cat([weights, self.c[None]])[: self.shape[0]]

    def dense(self) -> Float64[Tensor, "e e"]:
        """Return F itself, (d+1)² numbers."""
        return self @ torch.eye(*self.shape).to(self.R)

    def to_scipy(self) -> "scipy.sparse.linalg.LinearOperator":
        """Return F on float64 numpy arrays, for scipy's cg, eigsh, lobpcg and others.

        Raises:
            ImportError: scipy is not installed.
        """
        try:
            from scipy.sparse.linalg import LinearOperator
        except ImportError as error:
            raise ImportError("a unit Fisher for scipy needs it: pip install scipy") from error

        def product(v: np.ndarray) -> np.ndarray:
            x = torch.tensor(np.ascontiguousarray(v, np.float64), device=self.device)
            return np.asarray((self @ x).numpy(force=True))

        return LinearOperator(
            self.shape, product, rmatvec=product, matmat=product, rmatmat=product, dtype=np.float64
        )

    @cached_property
    def eigenvalues(self) -> Float64[Tensor, " e"]:
        """All of them, descending: squared singular values of Z, ZᵀZ = F, which keep small ones."""
        rows = torch.cat([self.R, self.c.sqrt() * self.mu[None]])
        if len(rows) < len(self.mu):  # in a basis of their span; on its complement F is λ I
            rows = torch.linalg.qr(rows.T, mode="r").R.T
        n, p = rows.shape
        Z = rows.new_zeros(n + p, p + 1)
        Z[:n, :p], Z[n - 1, p] = rows, self.c.sqrt()
        Z[n:].fill_diagonal_(float(self.ridge.sqrt()))
        squares = torch.linalg.svdvals(Z[:, : p + self.biased]) ** 2
        rest = self.ridge.expand(len(self.mu) - p)
        return torch.cat([squares, rest]).sort(descending=True).values

    @cached_property
    def _factor(self) -> Float64[Tensor, "m m"]:
        """Cholesky factor of V or R Rᵀ + λ I, by QR: forming products loses half the digits."""
        tall = self.R.T if self._few else self.R
        damping = self.ridge.sqrt() * torch.eye(tall.shape[1]).to(tall)
        factor: Tensor = torch.linalg.qr(torch.cat([tall, damping]), mode="r").R
        pivots, noise = factor.diagonal().abs(), EPS * sum(self.R.shape) * factor.norm(dim=0)
        regular = self.ridge > EPS * (self.R**2).sum() if self._few else (pivots > noise).all()
        if self.c == 0 or not regular:
            advice = "damp it, unless it is dead: unit_fisher_operator(..., damping=1e-3)"
            raise SingularFisherError(self.unit, f" in layer {self.layer!r}", advice)
        return factor

    @property
    def _few(self) -> bool:
        return self.R.shape[0] < self.R.shape[1]

    def _columns(
        self, v: Float[Tensor, "e *k"]
    ) -> tuple[Float64[Tensor, "d k"], Float64[Tensor, " k"]]:
        """Split a vector or columns into weights and bias, 0 where there is no bias."""
        unit = f"unit {self.unit} in layer {self.layer!r}"
        if not isinstance(v, Tensor) or v.is_complex():
            raise ValueError(f"{unit} takes real tensors (to_scipy() takes arrays), got {type(v)}")
        if v.dim() not in (1, 2) or len(v) != self.shape[0]:
            raise ValueError(f"the Fisher of {unit} is {self.shape}; got {tuple(v.shape)}")
        v = v.double() if v.dim() == 2 else v.double().unsqueeze(1)
        return v[: len(self.mu)], v[-1] if self.biased else torch.zeros_like(v[0])


def unit_fisher_operator(
    measured: UnitStatistics, unit: int, *, damping: float | None = None
) -> UnitFisherOperator:
    """View one unit's Fisher as an operator, from a Monitor's measurement of its layer.

    The measurement of a batch gives its cases, in double precision; that of a loader gives its sums
    or, where these were too large, reads the loader once more.

    Args:
        measured: What ``monitor.latest[layer]`` or ``monitor.measure(x)[layer]`` gives.
        unit: The unit's number in the layer, one of ``measured.units``.
        damping: Relative, λ = damping · trace(A) / d on the weights; the measurement's by default.

    Raises:
        ValueError: The unit was not measured, ``measured`` is not the measurement of a layer, or
            the damping is negative or not finite.
        LoaderError: The loader that has to be read again has changed, or the model has.
        NonFiniteError: The measurement holds NaN or infinity.

    >>> from unitfisher import Monitor
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ELU(), torch.nn.Linear(4, 2))
    >>> F = unit_fisher_operator(Monitor(model).measure(torch.randn(10, 3))["0"], unit=2)
    >>> F.shape, bool(torch.allclose(F @ F.solve(torch.ones(4)), torch.ones(4).double()))
    ((4, 4), True)
    """
    if not isinstance(measured, UnitStatistics):
        raise ValueError(
            f"measured must be one layer's measurement, monitor.latest[layer], got "
            f"{type(measured).__name__}"
        )
    damping = measured.damping if damping is None else damping
    require_damping(damping)
    if not measured.finite:
        raise NonFiniteError(f"this measurement of layer {measured.layer!r} holds NaN or infinity")
    units: list[int] = measured.units.tolist()
    if unit not in units:
        known = ", ".join(map(str, units[:16])) + ", ..." * (len(units) > 16)
        raise ValueError(f"layer {measured.layer!r} measured units {known}; not unit {unit}")
    held, i = measured.alone.held, units.index(unit)
    if isinstance(held, Condensed):
        R, mu, c = _centred(held.cases, i, measured.biased)
    else:
        R, mu, c = _rooted(held, i, measured.biased)
    ridge = damping * ((R**2).sum() + c * (mu @ mu)) / len(mu)
    return UnitFisherOperator(measured.layer, unit, measured.biased, R, mu, c, ridge)


def _rooted(
    held: PartSums | Rounds, i: int, biased: bool
) -> tuple[Float64[Tensor, "d d"], Float64[Tensor, " d"], Float64[Tensor, ""]]:
    """Return R, μ and c from sums over a data set, R a square root of their matrix."""
    m, unit = next((m, i - (part.start or 0)) for part, m in held.parts() if i in _range(part, m))
    V = _matrix(m, unit, biased)
    squares, vectors = torch.linalg.eigh(V)
    R = (squares.clamp_min(0).sqrt() * vectors).T
    mu, c = m.mu_q[unit], m.c[unit]
    return (R, mu, c) if biased else (R, mu * 0, torch.ones_like(c))


def _matrix(m: UnitMoments | UnitProducts, own: int, biased: bool) -> Float64[Tensor, "d d"]:
    """Return c Var_q, or A where there is no bias."""
    if isinstance(m, UnitMoments):
        return m.c[own] * m.Var_q[own] if biased else m.A[own]
    V, mu = m.covariance(own), m.mu_q[own]
    return m.c[own] * (V if biased else V + torch.outer(mu, mu))


def _range(part: slice, m: UnitMoments | UnitProducts) -> range:
    return range(part.start or 0, (part.start or 0) + len(m.c))


def _centred(
    cases: UnitCases, i: int, biased: bool
) -> tuple[Float64[Tensor, "n d"], Float64[Tensor, " d"], Float64[Tensor, ""]]:
    """Return R, μ and c of a unit: the sums Σ_t δ a of its cases, for a bias about their mean."""
    a = cases.a[i * len(cases.a) // cases.units].double()
    delta = cases.delta[..., i].double() / cases.samples**0.5
    delta = delta.norm(dim=0, keepdim=True) if delta.shape[2] == 1 else delta  # columns are summed
    weight = (delta**2).sum(0) * biased  # without a bias nothing is centred
    mu = torch.einsum("mt,mtd->d", weight, a) / torch.where(weight.any(), weight.sum(), 1.0)
    R = torch.einsum("rmt,mtd->rmd", delta, a - mu).flatten(0, 1)
    S = delta.sum(2).flatten() * biased  # the same sums for the bias
    c = S @ S
    rest = S @ R / torch.where(c > 0, c, 1.0)  # error of the mean: rounding, joined positions
    return R - torch.outer(S, rest), mu + rest, c if biased else torch.ones_like(c)
