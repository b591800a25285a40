"""Materialised unit Fishers of one pass."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unitfisher.cases import UnitCases
from unitfisher.chance import Chance
from unitfisher.columns import Estimator
from unitfisher.forward import Pick
from unitfisher.joint import JointGradients
from unitfisher.kinds import LayerSelectionError, supported, weight_of
from unitfisher.layers import Layers, match
from unitfisher.likelihoods import Likelihood, likelihood_of
from unitfisher.memory import workspace
from unitfisher.observation import require_finite
from unitfisher.observer import Observer, observe_now
from unitfisher.per_sample import unit_fisher_per_sample
from unitfisher.precision import exactly
from unitfisher.untouched import device_of


def unit_fisher(
    model: nn.Module,
    inputs: Any,
    *,
    layers: Layers = None,
    likelihood: str | Likelihood = "categorical",
    fisher: str = "exact",
    sharing: str = "expand",
    targets: Tensor | None = None,
    output: Pick = None,
    samples: int = 1,
    seed: int = 0,
) -> dict[str, Float[Tensor, "u e e"]]:
    """Materialise every unit's Fisher block, weights in ``weight[i].flatten()`` order, bias last.

    A block is the Fisher of one sample's ln p, summed over positions and averaged over samples.
    Where the weight's first axis is inputs (transposed convolutions, GPT-2's linear layers) its
    order is that of ``weight[:, i]``, or of the part of it that belongs to the unit's group.

    The model runs in eval mode and is left as it was. `Monitor` gives the theorems' quantities
    without these u·(d+1)² numbers per layer.

    Args:
        model: Any module; its forward is called once.
        inputs: A tensor, a tuple of arguments or a mapping of keyword arguments.
        layers: Patterns, types or a predicate, as for `Monitor`. Layers of other kinds than Monitor
            supports are measured by per-sample gradients, which need ``sharing="joint"``.
        likelihood: "categorical", "bernoulli", "gaussian" or a Likelihood object.
        fisher: "exact", "mc", "rademacher", "top-rademacher" or "empirical".
        sharing: "expand", "joint" or "reduce" (positions that share weights).
        targets: Observed labels, for ``fisher="empirical"``.
        output: Picks the logits from what forward returns.
        samples: Number of random columns; "top-rademacher" has one more, which is exact.
        seed: Seed of the drawn labels or signs.

    Returns:
        By layer name, (u, d+1, d+1) for u units of d inputs; (u, d, d) for a layer without bias; in
        the weight's precision, float32 at least.
        By ``layer.weight_name`` for a layer that has several weights, such as an LSTM.

    Raises:
        LayerSelectionError: A choice matches no layer, or a layer needs ``sharing="joint"``, or has
            no weight.
        NonFiniteError: Activations, logits or errors hold NaN or infinity.
        OutputError: The output, or the targets, do not fit the likelihood.
        ValueError: An unknown name or impossible number for an option, or missing targets.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ELU(), nn.Linear(4, 2))
    >>> {name: tuple(F.shape) for name, F in unit_fisher(model, torch.randn(10, 3)).items()}
    {'0': (4, 4, 4), '2': (2, 5, 5)}
    """
    estimator = Estimator(likelihood_of(likelihood), fisher, samples, sharing)
    chosen = match(model, layers)
    covered = {name: layer for name, layer in chosen.items() if supported(layer)}
    blocks = {}
    if covered:
        observer = Observer(covered, estimator, {}, Chance(seed), output)
        with exactly(device_of(model)):
            observations = observe_now(model, inputs, observer, targets)
        require_finite(observation.fault for observation in observations.values())
        for name, observation in observations.items():
            biased = covered[name].bias is not None
            precision = torch.promote_types(weight_of(covered[name]).dtype, torch.float32)
            blocks[name] = materialised(observation.cases, biased=biased).to(precision)
    for name in (name for name in chosen if name not in covered):
        require_joint(name, chosen[name], estimator)
        with exactly(device_of(model)):
            found = unit_fisher_per_sample(
                model, inputs, name, estimator, targets=targets, output=output, seed=seed
            )
        finite = all(F.isfinite().all() for F in found.values())
        require_finite([None if finite else f"the gradients of layer {name!r}"])
        blocks |= found
    return blocks


def materialised(cases: UnitCases, *, biased: bool) -> Float[Tensor, "u e e"]:
    """Form the Fishers of all units, bias last, in the precision of the received activations."""
    e = cases.inputs + biased
    F = cases.delta.new_empty(cases.units, e, e, dtype=cases.received.dtype)
    parted = max(1, workspace() // (64 * cases.rows * e))
    for start in range(0, cases.units, parted):
        part = slice(start, start + parted)
        Z = _root(cases.of_units(part), biased=biased)
        torch.matmul(Z.mT, Z, out=F[part])
    return F


def _root(cases: UnitCases, *, biased: bool) -> Float[Tensor, "u n e"]:
    """Return each unit's rows Z with Zᵀ Z = F."""
    rows: Tensor
    if not cases.joint:
        a = cases.a.squeeze(2)
        a = torch.cat([a, torch.ones_like(a[..., :1])], -1) if biased else a
        weight = (cases.D / cases.samples).sqrt().to(a.dtype).T
        rows = weight.unflatten(0, (len(a), -1)).unsqueeze(-1) * a.unsqueeze(1)
        return rows.flatten(0, 1)
    G, S, _ = JointGradients.of(cases, torch.zeros_like(cases.mean))
    rows = (torch.cat([G, S.unsqueeze(-1)], -1) if biased else G) / cases.samples**0.5
    return rows.to(cases.received.dtype).transpose(0, 1)


def require_joint(name: str, layer: nn.Module, estimator: Estimator) -> None:
    if estimator.sharing != "joint":
        raise LayerSelectionError(
            f"layer {name!r} ({type(layer).__name__}) is measured by per-sample gradients, which "
            f"are summed over positions already: pass sharing='joint'"
        )
